"""Films to learn classes from: split by patient, balanced or not, augmented as COVID-Net's training, resumable to the bit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.medical.data.film_tables import FilmCase, FilmLayout, Part, find_films
from foveal.medical.films import FilmPreparation

Case = TypeVar("Case", bound=FilmCase)


class LabelledFilm(NamedTuple):
    """A film, or a batch of them.

    Attributes:
        image: as the network reads it.
        label: number of its class.
        index: of the film among those of its part.
    """

    image: Float[Tensor, "*batch 3 height width"]
    label: Any
    index: Any


@dataclass(frozen=True)
class FilmAugmentation:
    """Chance variation of a film in training; the defaults are those of COVID-Net's training.

    Attributes:
        rotation: degrees, to either side.
        shift: share of the side, to either side.
        zoom: share of the size, to either side.
        flip: whether half the films are mirrored left to right.
        brightness: share, to either side.
    """

    rotation: float = 10.0
    shift: float = 0.1
    zoom: float = 0.15
    flip: bool = True
    brightness: float = 0.1


class Films(Dataset):
    """Films with their labels.

    Args:
        cases: films.
        class_names: in the order of the labels.
        preparation: of films.
        augmentation: None takes them as they are.
        balanced: every class as often as the others: an item of class i mod classes, drawn by chance.
        held: whether prepared films are kept in memory after they were read.
    """

    def __init__(
        self, cases: Sequence[FilmCase], class_names: Sequence[str], preparation: FilmPreparation, augmentation: FilmAugmentation | None = None,
        balanced: bool = False, held: bool = False,
    ) -> None:  # fmt: skip
        self.cases, self.class_names, self.preparation, self.augmentation = list(cases), list(class_names), preparation, augmentation
        self.labels = [self.class_names.index(case.label) for case in self.cases]
        self.of_class = [[index for index, label in enumerate(self.labels) if label == number] for number in range(len(class_names))]
        self.balanced = balanced
        self._held: dict[int, Tensor] | None = {} if held else None
        self._augment = None if augmentation is None else _transform(augmentation, preparation.size)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> LabelledFilm:
        if self.balanced:
            films = self.of_class[index % len(self.of_class)]
            index = films[int(torch.randint(len(films), ()))]
        square = self._square(index)
        if self._augment is not None:
            # MONAI's transforms have generators of their own; the loader has seeded torch's by epoch and index.
            self._augment.set_random_state(int(torch.randint(2**31, ())))
            square = torch.as_tensor(np.asarray(self._augment(square[None])))[0].clamp(0, 1)
        return LabelledFilm(self.preparation.normalised(square), self.labels[index], index)

    def _square(self, index: int) -> Tensor:
        if self._held is None:
            return self.preparation.square(self.cases[index].read())
        if index not in self._held:
            self._held[index] = self.preparation.square(self.cases[index].read())
        return self._held[index]


def _transform(augmentation: FilmAugmentation, size: int) -> Any:
    from monai.transforms import Compose, RandAffine, RandFlip, RandScaleIntensity

    move = augmentation.shift * size
    chain: list[Any] = [
        RandAffine(prob=1.0, rotate_range=float(np.radians(augmentation.rotation)), translate_range=(move, move), scale_range=augmentation.zoom,
                   mode="bilinear", padding_mode="zeros", cache_grid=True, spatial_size=(size, size)),
        RandScaleIntensity(factors=augmentation.brightness, prob=1.0),
    ]  # fmt: skip
    return Compose([*chain, RandFlip(prob=0.5, spatial_axis=1)] if augmentation.flip else chain)


def split_by_patient(cases: Sequence[Case], validation: float, test: float, seed: int) -> dict[Part, list[Case]]:
    """The films in three parts, every patient's in one of them, with about the same share of each class.

    Films that the corpus assigns to a part stay there: only what it assigns to none is drawn, and validation is drawn from training where the
    corpus has none. A patient of the test set is left out of training, one of the validation set too.

    Args:
        cases: films.
        validation: share of the patients.
        test: share of the patients.
        seed: of the draw.
    """
    parts: dict[Part, list[Case]] = {part: [case for case in cases if case.part == part] for part in ("train", "validation", "test")}
    free = [case for case in cases if case.part is None]
    if free:
        drawn = _drawn(free, (validation, test), seed)
        for films, more in zip((parts["validation"], parts["test"], parts["train"]), drawn, strict=True):
            films += more
    elif not parts["validation"]:
        parts["validation"], _, parts["train"] = _drawn(parts["train"], (validation, 0.0), seed)
    for part, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        known = {case.patient for other in others for case in parts[other]}  # type: ignore[index]
        parts[part] = [case for case in parts[part] if case.patient not in known]  # type: ignore[index]
    return parts


def _drawn(cases: Sequence[Case], shares: tuple[float, float], seed: int) -> tuple[list[Case], list[Case], list[Case]]:
    """Two shares of the patients of every class, and the rest."""
    of_patient: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: case.name):
        of_patient.setdefault(case.patient, []).append(case)
    of_class: dict[str, list[str]] = {}
    for patient, films in of_patient.items():
        of_class.setdefault(max(film.label for film in films), []).append(patient)
    out: tuple[list[Case], list[Case], list[Case]] = ([], [], [])
    few = sorted(label for label, patients in of_class.items() if len(patients) < 3)
    if few:  # rare combinations of findings are drawn from together
        of_class[""] = [*of_class.pop("", []), *(patient for label in few if label for patient in of_class.pop(label))]
    generator = np.random.default_rng(seed)
    for label in sorted(of_class):
        patients = [of_class[label][index] for index in generator.permutation(len(of_class[label]))]
        counts = [round(share * len(patients)) or int(share > 0 and len(patients) > 2) for share in shares]
        edges = [0, counts[0], sum(counts), len(patients)]
        for place, (first, last) in zip(out, pairwise(edges), strict=True):
            place += [film for patient in patients[first:last] for film in of_patient[patient]]
    return out


class FilmFolders(pl.LightningDataModule):
    """A corpus of films with classes.

    Args:
        root: of the corpus.
        layout: how it is laid out: folders, covidx, rsna, table, medmnist.
        class_names: in the order of the network's classes; the corpus' own, sorted, by default.
        names_of_labels: label in the corpus -> class, such as ``{"0": "normal"}``, also to put several together.
        columns: see `find_films`.
        table: see `find_films`.
        preparation: of films.
        augmentation: of training films; null takes them as they are.
        balanced: whether training draws every class as often as the others.
        batch_size: films in a batch, for each process.
        validation: share of the patients to choose by, where the corpus assigns none.
        test: share of the patients to measure on, where the corpus assigns none.
        held: whether prepared films stay in memory.
        workers: processes that read.
        seed: of parts and order.
    """

    def __init__(
        self, root: str, layout: FilmLayout = "folders", class_names: list[str] | None = None, names_of_labels: dict[str, str] | None = None,
        columns: dict[str, str] | None = None, table: str | None = None, preparation: FilmPreparation = FilmPreparation(),  # noqa: B008
        augmentation: FilmAugmentation | None = FilmAugmentation(), balanced: bool = True, batch_size: int = 16, validation: float = 0.1,
        test: float = 0.2, held: bool = False, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
            raise UserError(f"expected shares of patients for validation and test between 0 and 1, together below 1; got {validation} and {test}")
        self.root, self.layout, self.columns, self.table = root, layout, columns, table
        self.preparation, self.augmentation, self.balanced, self.held = preparation, augmentation, balanced, held
        self.batch_size, self.workers, self.seed, self.shares = batch_size, workers, seed, (validation, test)
        self.names_of_labels = {str(label): name for label, name in (names_of_labels or {}).items()}
        self.class_names: list[str] = list(class_names or [])
        self._parts: dict[Part, Films] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the films and split them."""
        if self._parts:
            return
        cases = find_films(self.root, self.layout, self.columns, self.table)
        cases = [FilmCase(**{**vars(case), "label": self.names_of_labels.get(case.label, case.label)}) for case in cases]
        found = sorted({case.label for case in cases})
        self.class_names = self.class_names or found
        unknown = [label for label in found if label not in self.class_names]
        if unknown:
            raise UserError(
                f"expected classes {', '.join(self.class_names)} in {self.root}; it also has {', '.join(unknown[:5])}; see names_of_labels"
            )
        parts = split_by_patient(cases, *self.shares, self.seed)
        for part, films in parts.items():
            empty = [name for name in self.class_names if not any(film.label == name for film in films)]
            if part == "train" and empty:
                raise UserError(f"expected films of every class to learn from in {self.root}; there are none of {', '.join(empty)}; see class_names")
            if not films:
                raise UserError(f"expected films for {part} in {self.root}; {len(cases)} films are too few to leave any out")
        left = len(cases) - sum(map(len, parts.values()))
        if left:
            print(f"{left} films are left out of training: their patients are in the test or validation set too", file=sys.stderr)
        plain: dict[str, Any] = {"class_names": self.class_names, "preparation": self.preparation, "held": self.held}
        self._parts = {
            "train": Films(parts["train"], augmentation=self.augmentation, balanced=self.balanced, **plain),
            "validation": Films(parts["validation"], **plain),
            "test": Films(parts["test"], **plain),
        }

    def films(self, part: Part) -> Films:
        """Those of a part."""
        self.setup()
        return self._parts[part]

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented films; resumable to the bit."""
        films = self.films("train")
        whole = len(films) >= self.batch_size
        return ResumableDataLoader(films, self.batch_size, shuffle=True, seed=self.seed, num_workers=self.workers, drop_last=whole)

    def val_dataloader(self) -> DataLoader:
        """Films to choose by."""
        return DataLoader(self.films("validation"), batch_size=self.batch_size, num_workers=self.workers)

    def test_dataloader(self) -> DataLoader:
        """Films to measure on."""
        return DataLoader(self.films("test"), batch_size=self.batch_size, num_workers=self.workers)

    def predict_dataloader(self) -> DataLoader:
        """The films of the test set."""
        return self.test_dataloader()
