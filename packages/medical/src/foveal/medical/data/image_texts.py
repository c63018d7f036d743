"""Pairs of images and texts to adapt a vision-language model to: a table of images, texts and findings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.medical.data.film_tables import PARTS, FileFinder, FilmCase, Part, column_of, only_table, read_table
from foveal.medical.data.films import split_by_patient
from foveal.medical.films import FilmPreparation


@dataclass(frozen=True)
class PairCase(FilmCase):
    """An image, what is said of it, and its findings.

    Attributes:
        text: of the image.
        findings: 1 present, 0 absent, -1 uncertain, NaN not said; none where the table tells none.
    """

    text: str = ""
    findings: tuple[float, ...] = ()


class ImageText(NamedTuple):
    """A pair, or a batch of them.

    Attributes:
        image: as the model reads it.
        text: or a list of them.
        findings: see `PairCase`.
    """

    image: Float[Tensor, "*batch 3 height width"]
    text: str | list[str]
    findings: Float[Tensor, "*batch findings"]


class ImageTexts(Dataset):
    """Pairs, read when asked for."""

    def __init__(self, cases: Sequence[PairCase], preparation: FilmPreparation) -> None:
        self.cases, self.preparation = list(cases), preparation

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> ImageText:
        case = self.cases[index]
        return ImageText(self.preparation(case.read()), case.text, torch.tensor(case.findings, dtype=torch.float32))


def find_pairs(
    root: str | Path, table: str | None = None, columns: Mapping[str, str] | None = None, label_columns: Sequence[str] = ()
) -> tuple[list[PairCase], list[str]]:
    """The pairs that a table names, and the names of the findings.

    Args:
        root: folder with the table and the images, or the table itself.
        table: its name in the folder; the only CSV by default.
        columns: what a column says (file, text, label, patient, part) -> its name, where it is not one of the usual ones.
        label_columns: columns of findings with 1, 0, -1 (uncertain) or nothing, as CheXpert's labeller writes them. Without them the label column
            counts, which names a finding or several with ``|`` between them; without either there are no findings.

    Raises:
        UserError: no such table or column, an image without text, or images that are not there.
    """
    place = Path(root)
    if not place.exists():
        raise UserError(f"expected a table of images and texts in {place}; it does not exist; see docs/medical.md for what it looks like")
    path = only_table(place, table)
    frame, given = read_table(path), columns or {}
    names = {what: column_of(frame, path, what, given.get(what), ("file", "text")) for what in ("file", "text", "label", "patient", "source", "part")}
    missing = [name for name in label_columns if name not in frame.columns]
    if missing:
        raise UserError(
            f"expected columns of findings in {path}; {', '.join(missing)} is not there; it has {', '.join(map(str, frame.columns[:12]))}"
        )
    rows = [{what: str(row[name]).strip() if name else "" for what, name in names.items()} for _, row in frame.iterrows()]
    said = [{part.strip() for part in row["label"].split("|") if part.strip()} for row in rows]
    findings = list(label_columns) or sorted(set().union(*said))
    find, cases = FileFinder(path.parent), []
    for number, row in enumerate(rows):
        if not row["text"]:
            raise UserError(f"expected a text for every image in {path}; line {number + 2} has none; take it out")
        part = PARTS.get(row["part"].lower()) if row["part"] else None
        if label_columns:
            values = tuple(_value(frame, number, name, path) for name in label_columns)
        else:
            values = tuple(float(name in said[number]) for name in findings)
        file, patient = find(row["file"], path, row["part"]), row["patient"] or row["file"]
        label = row["label"] or "|".join(name for name, value in zip(findings, values, strict=True) if value == 1)
        cases.append(PairCase(row["file"], label, patient, file, part, row["source"], None, row["text"], values))
    find.refuse_missing()
    if not cases:
        raise UserError(f"expected pairs of images and texts in {path}; it has no lines")
    return cases, findings


def _value(frame: pd.DataFrame, number: int, column: str, path: Path) -> float:
    text = str(frame[column].iloc[number]).strip()
    try:
        return float(text) if text else float("nan")
    except ValueError:
        raise UserError(f"expected 1, 0, -1 or nothing in column {column} of {path}; line {number + 2} has {text!r}") from None


class PairTable(pl.LightningDataModule):
    """A table of images and texts, split by patient.

    Args:
        root: see `find_pairs`; so table, columns and label_columns.
        table: name in the root.
        columns: names of columns.
        label_columns: columns of findings.
        preparation: of images; the model's own size and normalisation by default.
        batch_size: pairs in a batch, for each process; every pair is held against all others of the batch.
        validation: share of the patients to choose by, where the table assigns none.
        test: share of the patients to measure on, where the table assigns none.
        workers: processes that read.
        seed: of parts and order.
    """

    def __init__(
        self, root: str, table: str | None = None, columns: dict[str, str] | None = None, label_columns: list[str] | None = None,
        preparation: FilmPreparation | None = None, batch_size: int = 64, validation: float = 0.1, test: float = 0.1, workers: int = 0, seed: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if batch_size < 2:
            raise UserError(f"expected batches of at least 2 pairs, which are held against each other; got {batch_size}")
        if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
            raise UserError(f"expected shares of patients for validation and test between 0 and 1, together below 1; got {validation} and {test}")
        self.root, self.table, self.columns, self.label_columns = root, table, columns, label_columns or []
        self.preparation, self.batch_size, self.workers, self.seed, self.shares = preparation, batch_size, workers, seed, (validation, test)
        self.findings: list[str] = []
        self._parts: dict[Part, list[PairCase]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the pairs and split them."""
        if self._parts:
            return
        cases, self.findings = find_pairs(self.root, self.table, self.columns, self.label_columns)
        parts = split_by_patient(cases, *self.shares, self.seed)
        for part, pairs in parts.items():
            if len(pairs) < 2:
                raise UserError(f"expected at least 2 pairs for {part} in {self.root}; {len(cases)} pairs are too few")
        left = len(cases) - sum(map(len, parts.values()))
        if left:
            print(f"{left} pairs are left out of training: their patients are in the test or validation set too", file=sys.stderr)
        self._parts = parts

    def pairs(self, part: Part) -> ImageTexts:
        """Those of a part, prepared as the model wants them."""
        self.setup()
        task = getattr(self.trainer, "lightning_module", None)
        own = getattr(task, "preparation", None)
        preparation = self.preparation or own or FilmPreparation(size=224, normalise="clip")
        return ImageTexts(self._parts[part], preparation)

    def train_dataloader(self) -> DataLoader:
        """Shuffled pairs; resumable to the bit."""
        pairs = self.pairs("train")
        whole = len(pairs) >= self.batch_size
        return ResumableDataLoader(pairs, self.batch_size, shuffle=True, seed=self.seed, num_workers=self.workers, drop_last=whole)

    def val_dataloader(self) -> DataLoader:
        """Pairs to choose by."""
        return DataLoader(self.pairs("validation"), batch_size=self.batch_size, num_workers=self.workers)

    def test_dataloader(self) -> DataLoader:
        """Pairs to measure on."""
        return DataLoader(self.pairs("test"), batch_size=self.batch_size, num_workers=self.workers)
