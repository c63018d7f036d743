"""CHB-MIT: seizures of children, 24 cases, 256 Hz, bipolar (Shoeb, 2009; physionet.org/content/chbmit, ODC-By 1.0, 43 GB).

``chbNN/*.edf`` with ``chbNN/chbNN-summary.txt``, which says when seizures begin and end. chb21 is the same girl as chb01, a year and a half
later: they are kept together. The authors validate on chb21 and chb22, and test on chb23 and chb24; with chb21 moved to training, chb22 validates.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np

from foveal.core.errors import UserError
from foveal.eeg.data.recorded import Piece, RecordedWindows, edf_seconds
from foveal.eeg.data.windows import Splits, WindowsDataModule
from foveal.eeg.streaming import Preparation

_LENGTH = 10.0


def read_summary(file: Path) -> dict[str, list[tuple[float, float]]]:
    """Recording's name -> beginnings and ends of its seizures, in seconds.

    Raises:
        UserError: a seizure ends before it begins.
    """
    seizures: dict[str, list[tuple[float, float]]] = {}
    name, begin = "", None
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("File Name:"):
            name = line.partition(":")[2].strip()
            seizures.setdefault(name, [])
        elif found := re.match(r"Seizure\s*\d*\s*(Start|End) Time\s*:\s*([\d.]+)", line):
            if found[1] == "Start":
                begin = float(found[2])
            elif begin is None or not name:
                raise UserError(f"expected a seizure's start before its end in {file}; got {line}; download it again")
            else:
                seizures[name].append((begin, float(found[2])))
                begin = None
    return seizures


class CHBMIT(WindowsDataModule):
    """Ten-second windows; 1 is seizure.

    Args:
        root: folder with chb01 to chb24.
        rule: ``overlap`` labels every window that a seizure touches; ``official`` only those that its beginning or end lies in, so that the middle of
            a long seizure counts as none.
        more: further windows every 5 s from 1 s before a seizure to 1 s behind it, in training; with ``official`` in validation and test too.
        validation_cases: to choose by.
        test_cases: to report on.
        band: Hz; None filters nothing, as the authors.
        batch_size: windows in a batch.
        workers: processes that read.
        seed: of the order.
    """

    def __init__(
        self, root: str, rule: Literal["overlap", "official"] = "overlap", more: bool = True, validation_cases: list[str] | None = None,
        test_cases: list[str] | None = None, band: tuple[float, float] | None = None, batch_size: int = 64, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, workers, seed)
        self.root, self.rule, self.more = root, rule, more
        self.validation_cases = ["chb22"] if validation_cases is None else validation_cases
        self.test_cases = ["chb23", "chb24"] if test_cases is None else test_cases
        both = [{"chb01", "chb21"} & set(cases) for cases in (self.validation_cases, self.test_cases)]
        if any(len(some) == 1 for some in both):
            raise UserError("expected chb01 and chb21 on one side; they are one person; hold out both or neither")
        self.preparation = Preparation(window=_LENGTH, montage="bipolar", band=band, notch=0.0)

    def find(self) -> Splits:
        """Every window of every case."""
        cases = sorted(folder for folder in Path(self.root).glob("chb*") if folder.is_dir())
        if not cases:
            raise UserError(f"expected folders chb01 to chb24 below {self.root}; found none; name the corpus' folder")
        parts: dict[str, list[Piece]] = {"train": [], "validation": [], "test": []}
        for case in cases:
            part = "test" if case.name in self.test_cases else "validation" if case.name in self.validation_cases else "train"
            summary = case / f"{case.name}-summary.txt"
            if not summary.exists():
                raise UserError(f"expected {summary}; it is missing; download the corpus again")
            seizures = read_summary(summary)
            for file in sorted(case.glob("*.edf")):
                parts[part] += self._pieces(file, seizures.get(file.name, []), "chb01" if case.name == "chb21" else case.name, part)
        training, validation, test = (RecordedWindows(pieces, self.preparation) for pieces in parts.values())
        return Splits(training, validation, test, ("none", "seizure"))

    def _pieces(self, file: Path, seizures: list[tuple[float, float]], group: str, part: str) -> list[Piece]:
        starts = np.arange(0, edf_seconds(file) - _LENGTH + 1e-9, _LENGTH)
        if self.rule == "overlap":
            labels = [int(any(begin < start + _LENGTH and end > start for begin, end in seizures)) for start in starts]
        else:
            labels = [int(any(start < edge < start + _LENGTH for span in seizures for edge in span)) for start in starts]
        pieces = [Piece(file, float(start), label, group) for start, label in zip(starts, labels, strict=True)]
        if self.more and (part == "train" or self.rule == "official"):
            pieces += [Piece(file, float(at), 1, group) for begin, end in seizures for at in np.arange(begin - 1, end + 1 - 1e-9, 5) if at >= 0]
        return pieces
