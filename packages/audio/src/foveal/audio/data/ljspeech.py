"""LJSpeech, and any folder of one speaker's recordings with their texts.

Ito and Johnson, "The LJ Speech Dataset", 2017, https://keithito.com/LJ-Speech-Dataset/ : 13,100 clips, 24 hours, 22,050 Hz, public domain; 2.6 GB
to download. A folder holds ``metadata.csv`` with rows ``id|text|normalised text`` and ``wavs/id.wav``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from foveal.audio.audio_files import SUFFIXES
from foveal.audio.data.speech import Clip, SpeechClips
from foveal.audio.models.mel import MelConfig
from foveal.core.errors import UserError
from foveal.core.files import output_names

LJSPEECH_MEL = MelConfig(sample_rate=22_050)


def read_metadata(folder: str | Path, sample_rate: int) -> list[Clip]:
    """Clips of a folder with ``metadata.csv`` in LJSpeech's form; recordings lie beside it or in ``wavs/``.

    Raises:
        UserError: no such folder or table, rows without text, recordings that are missing or cannot be read.
    """
    place = Path(folder)
    table = place / "metadata.csv"
    if not table.is_file():
        raise UserError(f"expected LJSpeech in {place}; there is no metadata.csv; get it from https://keithito.com/LJ-Speech-Dataset/")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE) if row]
    except UnicodeDecodeError:
        raise UserError(f"expected text in UTF-8; {table} is something else; save it as plain text in UTF-8") from None
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) < 2 or not row[-1].strip()), None)
    if wrong is not None:
        raise UserError(f"expected rows id|text in {table}; row {wrong} has no text; mend or remove it")
    return [Clip.file(_recording(place, name := row[0].strip()), row[-1], sample_rate, name) for row in rows]


def _recording(folder: Path, name: str) -> Path:
    places = [folder / "wavs" / f"{name}.wav", *(folder / f"{name}{suffix}" for suffix in ("", *SUFFIXES)), folder / "wavs" / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"expected a recording of {name!r} of metadata.csv in {folder} or its wavs folder; there is none; copy it there")
    return found


def read_pairs(folder: str | Path, sample_rate: int) -> list[Clip]:
    """Clips of a folder in which every recording has a text file of its name beside it: ``hello.wav`` and ``hello.txt``.

    Raises:
        UserError: no such folder, no pairs in it, or files that cannot be read.
    """
    place = Path(folder)
    recordings = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES) if place.is_dir() else []
    pairs = [(path, path.with_suffix(".txt")) for path in recordings if path.with_suffix(".txt").is_file()]
    if not pairs:
        raise UserError(f"expected recordings with a .txt of the same name each below {place}; found none; or put a metadata.csv in it")
    clips, names = [], output_names([path for path, _ in pairs])
    for (path, text), name in zip(pairs, names, strict=True):
        try:
            clips.append(Clip.file(path, text.read_text(encoding="utf-8-sig"), sample_rate, name))
        except UnicodeDecodeError:
            raise UserError(f"expected text in UTF-8; {text} is something else; save it as plain text in UTF-8") from None
    return clips


class SpeakerFolder(SpeechClips):
    """One speaker's recordings: LJSpeech, or a folder with ``metadata.csv``, or recordings with texts beside them.

    Args:
        folder: the corpus.
        mel: as of `SpeechClips`.
        batch_frames: as of `SpeechClips`.
        held_out: as of `SpeechClips`.
        **settings: the others of `SpeechClips`.
    """

    def __init__(
        self,
        folder: str,
        mel: MelConfig = LJSPEECH_MEL,
        batch_frames: int = 20_000,
        held_out: float = 0.02,
        **settings: Any,
    ) -> None:
        super().__init__(folder, mel, batch_frames=batch_frames, held_out=held_out, **settings)

    def clips(self) -> list[Clip]:
        """As `read_metadata` or `read_pairs` give them."""
        read = read_metadata if (Path(self.folder) / "metadata.csv").is_file() or not Path(self.folder).is_dir() else read_pairs
        return read(self.folder, self.voice.mel.sample_rate)
