"""TUEV and TUAB of the Temple University Hospital EEG corpus (Obeid and Picone, 2016): registration at isip.piconepress.com; do not redistribute.

TUEV v2 (``edf/train/SUBJECT/*.edf`` and ``edf/eval/SUBJECT/*.edf``, 19 GB): beside each recording a ``.rec`` table, one line a channel and event:
channel, start, end (seconds), label 1 to 6. TUAB v3 (``edf/train|eval/abnormal|normal/01_tcp_ar/*.edf``, 58 GB): whole recordings, normal or not.
The official evaluation part is the test set; a share of the training subjects, drawn from their sorted names, validates.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from foveal.core.errors import UserError
from foveal.eeg.data.recorded import Piece, RecordedWindows, by_group, edf_seconds
from foveal.eeg.data.windows import Splits, WindowsDataModule
from foveal.eeg.streaming import Preparation

TUEV_CLASSES = ("SPSW", "GPED", "PLED", "EYEM", "ARTF", "BCKG")


def _recordings(root: str, part: str) -> list[Path]:
    places = [Path(root) / "edf" / part, Path(root) / part]
    found = sorted(file for place in places for file in place.rglob("*.edf"))
    if not found:
        raise UserError(f"expected recordings (.edf) below {places[0]}; found none; name the corpus' folder")
    return found


class TUEV(WindowsDataModule):
    """Five seconds around each annotated second: 2 s before its start, 2 s behind its end.

    Args:
        root: folder with edf/train and edf/eval.
        once: a moment annotated on several channels is one window; false keeps one window a line of the table, as the authors do.
        validation: share of the training subjects.
        band: Hz.
        notch: Hz of mains hum; the authors take out 50 Hz, though the recordings are American.
        batch_size: windows in a batch.
        workers: processes that read.
        seed: of the split and the order.
    """

    def __init__(
        self, root: str, once: bool = True, validation: float = 0.2, band: tuple[float, float] = (0.1, 75.0), notch: float | None = 60.0,
        batch_size: int = 64, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, workers, seed)
        self.root, self.once, self.validation = root, once, validation
        self.preparation = Preparation(window=5.0, montage="bipolar", band=band, notch=notch)

    def find(self) -> Splits:
        """Every line of every .rec table."""
        train, validation = by_group(self._pieces("train"), self.validation, self.seed)
        training, choosing, testing = (RecordedWindows(part, self.preparation) for part in (train, validation, self._pieces("eval")))
        return Splits(training, choosing, testing, TUEV_CLASSES)

    def _pieces(self, part: str) -> list[Piece]:
        pieces = []
        for file in _recordings(self.root, part):
            table = file.with_suffix(".rec")
            if not table.exists():
                raise UserError(f"expected the table {table.name} beside {file}; it is missing; download the corpus again")
            try:
                rows = [[float(value) for value in line.split(",")] for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
                spans = [(start, end, int(label)) for _, start, end, label in rows]
            except ValueError:
                raise UserError(f"expected lines of channel, start, end, label in {table}; got others; download the corpus again") from None
            wrong = [label for _, _, label in spans if not 1 <= label <= len(TUEV_CLASSES)]
            if wrong:
                raise UserError(f"expected labels from 1 to {len(TUEV_CLASSES)} in {table}; got {wrong[0]}")
            for start, end, label in dict.fromkeys(spans) if self.once else spans:
                pieces.append(Piece(file, (start + end) / 2 - 2.5, label - 1, file.parent.name))
        return pieces


class TUAB(WindowsDataModule):
    """Ten-second windows of normal (0) and abnormal (1) recordings, from end to end.

    Args:
        root: folder with edf/train and edf/eval.
        validation: share of the training subjects of each class.
        band: Hz.
        notch: Hz of mains hum.
        batch_size: windows in a batch.
        workers: processes that read.
        seed: of the split and the order.
    """

    def __init__(
        self, root: str, validation: float = 0.2, band: tuple[float, float] = (0.1, 75.0), notch: float | None = 60.0,
        batch_size: int = 64, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, workers, seed)
        self.root, self.validation = root, validation
        self.preparation = Preparation(window=10.0, montage="bipolar", band=band, notch=notch)

    def find(self) -> Splits:
        """Every window of every recording; a person of both classes stays on one side."""
        pieces = self._pieces("train")
        abnormal = {piece.group for piece in pieces if piece.label}
        halves = [[piece for piece in pieces if (piece.group in abnormal) == side] for side in (False, True)]
        parted = [by_group(half, self.validation, self.seed) for half in halves if half]
        train, validation = ([piece for half in parted for piece in half[side]] for side in (0, 1))
        training, choosing, testing = (RecordedWindows(part, self.preparation) for part in (train, validation, self._pieces("eval")))
        return Splits(training, choosing, testing, ("normal", "abnormal"))

    def _pieces(self, part: str) -> list[Piece]:
        pieces = []
        for file in _recordings(self.root, part):
            kinds = {"normal", "abnormal"} & set(file.parts)
            if len(kinds) != 1:
                raise UserError(f"expected recordings in folders normal and abnormal; {file} is in neither; name TUAB's folder")
            subject, label = file.stem.split("_")[0], int("abnormal" in kinds)
            pieces += [Piece(file, float(start), label, subject) for start in np.arange(0, edf_seconds(file) - 10 + 1e-9, 10)]
        return pieces
