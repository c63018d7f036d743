"""The English prompts of the Asterisk telephone exchange: one professional speaker, 16 kHz, with texts, CC BY-SA 3.0.

Allison Smith for Digium, Inc.: 568 prompts, 25 minutes, as the Debian packages ``asterisk-core-sounds-en-g722`` (10.6 MB, the sounds) and
``asterisk-core-sounds-en`` (the texts). ``apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-g722`` fetches both into a folder; the
folder may hold the packages as they are, or what they unpack to. G.722 is decoded by PyAV.

Most prompts are a word or a sentence. Long ones are cut at pauses into their sentences where number and length of the parts agree.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soxr
from numpy import ndarray

from foveal.audio.data.speech import Clip, SpeechClips, block_levels, trim
from foveal.audio.text.normalisation import normalise
from foveal.core.errors import UserError

_TEXTS = "core-sounds-en.txt"
_RATE = 16_000  # of G.722
_LONG_SECONDS, _LONGEST_SECONDS = 5.0, 10.0  # prompts that are cut into sentences, sentences that are cut into clauses
_PAUSE = 0.15  # seconds of silence at least, between sentences
_PAUSE_LEVEL = 10 ** (-38 / 20)
_RATES = (0.6, 1.6)  # of a part's characters a second, relative to the whole prompt's, that are believed

#: Prompts whose sound is no speech, or says something else than the text; and remarks inside texts that are not read.
_NOT_SPEECH = re.compile(r"^(silence/|tt-monkeys$|beep|ascending|descending|confbridge-(join|leave)$|vm-intro$|spy-iax)")
_REMARK = re.compile(r"\[[^\]]*\]|<[^>]*>|\([^)]*\)")


def _members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a Debian package: an ar archive whose member data.tar.* holds them."""
    content = package.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise UserError(f"expected a Debian package; {package} is none; download it again")
    place = 8
    while place + 60 <= len(content):
        header = content[place : place + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(content[place + 60 : place + 60 + size])) as archive:
                    for member in archive:
                        file = archive.extractfile(member) if member.isfile() else None
                        if file is not None:
                            yield member.name, file.read()
            except (tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"expected a whole Debian package; {package}: {error}; download it again") from None
            return
        place += 60 + size + size % 2
    raise UserError(f"expected a Debian package with data in it; {package} has none; download it again")


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the prompts and texts below `folder`, in packages or unpacked."""
    wanted = re.compile(rf"\.g722$|{re.escape(_TEXTS)}(\.gz)?$")
    plain = sorted(path for path in folder.rglob("*") if path.is_file() and wanted.search(path.name))
    if plain:
        yield from ((str(path), path.read_bytes()) for path in plain)
        return
    for package in sorted(folder.glob("asterisk-core-sounds-en*.deb")):
        yield from ((name, content) for name, content in _members(package) if wanted.search(name))


def decode_g722(content: bytes) -> ndarray:
    """Float32 samples at 16 kHz, full scale 1, of a raw G.722 stream."""
    with av.open(io.BytesIO(content), mode="r", format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768 if frames else np.zeros(0, np.float32)


def read_texts(content: str) -> dict[str, str]:
    """Prompt's name -> what it says, without remarks; prompts that are no speech are left out."""
    rows = (line.partition(":") for line in content.splitlines() if ":" in line and not line.startswith(";"))
    texts = {name.strip(): " ".join(_REMARK.sub(" ", text).split()).strip(" .?!") + _ending(text) for name, _, text in rows}
    return {name: text for name, text in texts.items() if re.search(r"[a-z]", text, re.IGNORECASE) and not _NOT_SPEECH.search(name)}


def _ending(text: str) -> str:
    # an ellipsis says that another prompt follows: it is spoken as an unfinished sentence
    text = text.strip()
    return "," if text.endswith("...") else text[-1] if text and text[-1] in "?!." else ""


def cut_at_pauses(clip: Clip) -> list[Clip]:
    """A long prompt's sentences, and the clauses of long sentences; what cannot be cut with certainty stays whole."""
    sentences = _cut(clip, r"[^.?!]+[.?!]*") if clip.seconds > _LONG_SECONDS else [clip]
    return [part for sentence in sentences for part in (_cut(sentence, r"[^,.?!]+[,.?!]*") if sentence.seconds > _LONGEST_SECONDS else [sentence])]


def _cut(clip: Clip, pattern: str) -> list[Clip]:
    """The parts of a clip whose texts are what `pattern` finds, where as many pauses as it takes stand near where they are expected."""
    sentences = [sentence.strip() for sentence in re.findall(pattern, normalise(clip.text).text) if re.search("[a-z]", sentence)]
    if len(sentences) < 2:
        return [clip]
    quiet = np.concatenate([[0], block_levels(clip.samples, clip.sample_rate) < _PAUSE_LEVEL, [0]])
    edges = np.flatnonzero(np.diff(quiet))
    pauses = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= _PAUSE * 100]
    if len(pauses) < len(sentences) - 1:
        return [clip]
    # of all ways to choose a pause for each boundary in order, the one whose parts' lengths agree best with their texts
    ends = np.cumsum([len(sentence) for sentence in sentences])
    seconds = np.array([(a + b) / 200 for a, b in pauses])
    expected = ends[:-1] / ends[-1] * clip.seconds
    width = np.array([(b - a) / 100 for a, b in pauses])
    cost = np.abs(seconds[None] - expected[:, None]) - np.minimum(width, 1.0)[None]
    total, origin = cost[0], []
    for row in cost[1:]:
        best = np.minimum.accumulate(total)
        index = np.maximum.accumulate(np.where(total == best, np.arange(len(total)), 0))
        total = np.concatenate([[np.inf], best[:-1]]) + row
        origin.append(np.concatenate([[0], index[:-1]]))
    chosen = [int(np.argmin(total))]
    for index in reversed(origin):
        chosen.append(int(index[chosen[-1]]))
    places = [0, *(round(seconds[i] * clip.sample_rate) for i in reversed(chosen)), len(clip.samples)]
    parts = [trim(clip.samples[a:b], clip.sample_rate) for a, b in itertools.pairwise(places)]
    rates = np.array([len(sentence) / max(len(part), 1) for sentence, part in zip(sentences, parts, strict=True)])
    rates /= len(" ".join(sentences)) / sum(map(len, parts))
    if rates.min() < _RATES[0] or rates.max() > _RATES[1]:
        return [clip]
    return [Clip.of(f"{clip.name}#{i + 1}", text, part, clip.sample_rate) for i, (text, part) in enumerate(zip(sentences, parts, strict=True))]


def read_prompts(folder: str | Path, sample_rate: int = _RATE) -> list[Clip]:
    """All prompts with speech and text, trimmed, long ones cut into sentences.

    Raises:
        UserError: packages or files are missing or damaged.
    """
    place = Path(folder)
    found = dict(_files(place)) if place.is_dir() else {}
    texts = next((content for name, content in found.items() if _TEXTS in name), None)
    sounds = {name.rpartition("en_US_f_Allison/")[2].removesuffix(".g722"): content for name, content in found.items() if name.endswith(".g722")}
    if texts is None or not sounds:
        lacking = "the packages" if texts is None and not sounds else "asterisk-core-sounds-en" if texts is None else "asterisk-core-sounds-en-g722"
        raise UserError(
            f"expected the Asterisk prompts in {place}; {lacking} not there; in it, run: "
            "apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-g722"
        )
    said = read_texts((gzip.decompress(texts) if texts[:2] == b"\x1f\x8b" else texts).decode())
    clips = []
    for name, text in said.items():
        if name not in sounds:
            continue
        samples = decode_g722(sounds[name])
        if sample_rate != _RATE:
            samples = soxr.resample(samples, _RATE, sample_rate)
        samples = trim(samples, sample_rate)
        if len(samples):
            clips += cut_at_pauses(Clip.of(name, text, samples, sample_rate))
    return clips


class AsteriskPrompts(SpeechClips):
    """The prompts as training and held-out clips; `folder` has both packages, or what they unpack to."""

    def clips(self) -> list[Clip]:
        """As `read_prompts` gives them."""
        return read_prompts(self.folder, self.voice.mel.sample_rate)
