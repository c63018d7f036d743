"""Bags to learn from: folds that keep a subject's bags together, batches in which bags of different lengths stand one behind the other."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.medical.data.bag_sources import BagItem, find_bags


class BagBatch(NamedTuple):
    """Several bags, unpadded.

    Attributes:
        names: of the bags.
        features: of all their instances, one bag behind the other.
        lengths: instances of each bag.
        labels: class of each bag.
    """

    names: tuple[str, ...]
    features: Float[Tensor, "instances features"]
    lengths: tuple[int, ...]
    labels: Int[Tensor, " bags"]


class Bags(Dataset):
    """Bags, read when asked for.

    Args:
        items: to read.
        classes: label in the source -> class.
        limit: largest number of instances; of a larger bag a random part. None takes all.
    """

    def __init__(self, items: Sequence[BagItem], classes: Mapping[str, int], limit: int | None = None) -> None:
        self.items, self.classes, self.limit = list(items), classes, limit

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[str, Float[Tensor, "instances features"], int]:
        item = self.items[index]
        features = torch.from_numpy(np.ascontiguousarray(item.read(), dtype=np.float32))
        if self.limit is not None and len(features) > self.limit:
            features = features[torch.randperm(len(features))[: self.limit]]
        return item.name, features, self.classes[item.label]


def packed(bags: Sequence[tuple[str, Tensor, int]]) -> BagBatch:
    """Bags as one batch.

    Raises:
        UserError: bags with features of different widths.
    """
    widths = {features.shape[1]: name for name, features, _ in bags}
    if len(widths) > 1:
        told = ", ".join(f"{name} has {width}" for width, name in widths.items())
        raise UserError(f"expected features of one width in all bags; {told}; extract them with one encoder")
    names, features, labels = zip(*bags, strict=True)
    return BagBatch(names, torch.cat(features), tuple(map(len, features)), torch.tensor(labels))


class LabelledBags(pl.LightningDataModule):
    """Bags of one source in three parts.

    The parts are those that the source or `splits` names; without them one fold of a stratified k-fold is the test set, drawn so that all bags of
    a subject are in the same fold, anew with every `repetition`.

    Args:
        root: table, HDF5 file, folder of HDF5 files, or the name of a set; see `find_bags`.
        labels: CSV of slides; see `find_bags`.
        splits: CSV with columns train, val and test that list slides (CLAM's), or JSON with train_names, val_names and test_names (ACMIL's).
        label_values: label in the source -> class, such as {N: 0, PB: 0, UDH: 0, FEA: 1}; None numbers the labels in sorted order.
        class_names: for reports; default: the labels.
        fold: which of `folds` parts is the test set.
        folds: how many.
        repetition: a new draw of the folds for each.
        validation: share of the other folds that chooses the checkpoint; 0 leaves none, and training runs to its end.
        batch_size: bags in a batch, for each process.
        instances: most instances of a bag in training, drawn anew each time; None takes all. Tests always take all.
        workers: processes that read.
        seed: of folds and order.
    """

    def __init__(
        self, root: str, labels: str | None = None, splits: str | None = None, label_values: dict[str, int] | None = None,
        class_names: list[str] | None = None, fold: int = 0, folds: int = 10, repetition: int = 0, validation: float = 0.0, batch_size: int = 1,
        instances: int | None = None, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= fold < folds or folds < 2:
            raise UserError(f"expected at least 2 folds and fold from 0 to folds - 1; got fold {fold} of {folds}")
        if not 0 <= validation < 1 or (instances is not None and instances < 1):
            raise UserError(f"expected validation from 0 to below 1 and instances of at least 1; got {validation} and {instances}")
        self.root, self.labels, self.splits, self.label_values = root, labels, splits, label_values
        self.fold, self.folds, self.repetition, self.validation = fold, folds, repetition, validation
        self.batch_size, self.instances, self.workers, self.seed = batch_size, instances, workers, seed
        self.class_names: list[str] = list(class_names or [])
        self.class_of: dict[str, int] = {}
        self._parts: dict[str, list[BagItem]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the bags and split them."""
        if self._parts:
            return
        items = find_bags(self.root, self.labels)
        self.class_of = self._numbered(items)
        count = max(self.class_of.values()) + 1
        self.class_names = self.class_names or _names(self.class_of, count)
        if len(self.class_names) != count:
            raise UserError(f"expected {count} class_names for {self.root}; got {len(self.class_names)}: {', '.join(self.class_names)}")
        if self.splits is not None:
            self._parts = _listed(items, Path(self.splits))
        elif all(item.split for item in items):
            self._parts = {part: [item for item in items if item.split == part] for part in ("train", "validation", "test")}
        else:
            rest, test = self._drawn(items, self.folds, self.fold, self.seed + self.repetition)
            chosen: list[BagItem] = []
            if self.validation:
                most = max(Counter(item.label for item in rest).values())
                rest, chosen = self._drawn(rest, max(2, min(round(1 / self.validation), most)), 0, self.seed + self.repetition)
            self._parts = {"train": rest, "validation": chosen, "test": test}
        if not self._parts["train"] or not self._parts["test"]:
            sizes = ", ".join(f"{len(part)} {name}" for name, part in self._parts.items())
            raise UserError(f"expected bags to train and to test on in {self.root}; got {sizes}; check labels and splits")

    def _numbered(self, items: Sequence[BagItem]) -> dict[str, int]:
        found = sorted({item.label for item in items}, key=lambda label: (float(label), label) if _is_number(label) else (float("inf"), label))
        if self.label_values is None:
            if len(found) < 2:
                raise UserError(f"expected bags of at least two classes in {self.root}; all are {', '.join(found)}")
            return {label: number for number, label in enumerate(found)}
        values = {str(label): number for label, number in self.label_values.items()}
        unknown = [label for label in found if label not in values]
        if unknown:
            raise UserError(f"expected the labels {', '.join(values)} in {self.root}; it also holds {', '.join(unknown[:5])}; set label_values")
        return values

    def _drawn(self, items: Sequence[BagItem], folds: int, fold: int, seed: int) -> tuple[list[BagItem], list[BagItem]]:
        subjects = [item.subject for item in items]
        if len(set(subjects)) < folds:
            raise UserError(f"expected at least {folds} subjects for {folds} folds in {self.root}; found {len(set(subjects))}; set fewer folds")
        labels = [self.class_of[item.label] for item in items]
        most = max(Counter(labels).values())
        if most < folds:
            raise UserError(f"expected at least {folds} bags of a class for {folds} folds in {self.root}; found {most}; set fewer folds")
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        kept, held = list(splitter.split(items, labels, subjects))[fold]
        return [items[index] for index in kept], [items[index] for index in held]

    def items(self, part: str) -> list[BagItem]:
        """Bags of ``train``, ``validation`` or ``test``."""
        self.setup()
        return self._parts[part]

    def statistics(self) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
        """Mean and standard deviation of each feature over the instances of the training bags, each bag read once; constant features get 1."""
        count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for item in self.items("train"):
            features = torch.from_numpy(np.asarray(item.read(), dtype=np.float64))
            count, total, squares = count + len(features), total + features.sum(0), squares + features.square().sum(0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(deviation > 1e-6 * mean.abs() + 1e-12, deviation, 1.0).float()

    def train_dataloader(self) -> DataLoader:
        """Shuffled bags; resumable to the bit."""
        bags = Bags(self.items("train"), self.class_of, self.instances)
        return ResumableDataLoader(bags, self.batch_size, shuffle=True, seed=self.seed, num_workers=self.workers, collate_fn=packed)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Whole bags to choose by; none where there are none."""
        if self.items("validation"):
            return self._whole("validation")
        # Lightning asks whether that was meant.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def test_dataloader(self) -> DataLoader:
        """Whole bags of the test part."""
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader:
        """The test bags."""
        return self._whole("test")

    def _whole(self, part: str) -> DataLoader:
        return DataLoader(Bags(self._parts[part], self.class_of), batch_size=self.batch_size, num_workers=self.workers, collate_fn=packed)


def _is_number(label: str) -> bool:
    return label.lstrip("-").replace(".", "", 1).isdigit()


def _names(class_of: Mapping[str, int], count: int) -> list[str]:
    by_class: dict[int, list[str]] = {}
    for label, number in class_of.items():
        by_class.setdefault(number, []).append(label)
    return ["+".join(by_class.get(number, [str(number)])) for number in range(count)]


def _listed(items: Sequence[BagItem], file: Path) -> dict[str, list[BagItem]]:
    """The parts that a file of splits names."""
    if not file.is_file():
        raise UserError(f"expected a file of splits; {file} does not exist; check data.splits")
    columns = {"train": "train", "validation": "val", "test": "test"}
    if file.suffix.lower() == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        lists = {part: content.get(f"{name}_names", content.get(name, [])) for part, name in columns.items()}
    else:
        table = pd.read_csv(file, dtype=str)
        lists = {part: table[name].dropna().tolist() if name in table else [] for part, name in columns.items()}
    by_name = {item.name: item for item in items}
    missing = sorted({name for names in lists.values() for name in names} - set(by_name))
    if missing:
        raise UserError(f"expected the slides of {file} among the features; {len(missing)} are not there, such as {missing[0]}; extract them first")
    seen: dict[str, str] = {}
    for part, names in lists.items():
        for name in names:
            subject = by_name[name].subject
            if seen.setdefault(subject, part) != part:
                raise UserError(f"expected every subject in one part of {file}; {subject} is in {seen[subject]} and {part}; move its slides together")
    return {part: [by_name[name] for name in names] for part, names in lists.items()}
