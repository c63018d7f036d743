"""Slices of labelled scans to train on, whole scans to measure on: fixed folds, augmentation by MONAI, resumable to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.medical.data.cases import Case, Layout, check_labels, find_cases
from foveal.medical.preparation import Preparation
from foveal.medical.volumes import Volume


class Scan(NamedTuple):
    """A whole scan: its slices, and what is needed to go back to its own grid.

    Attributes:
        name: of the scan.
        slices: as the network reads them.
        image: the first sequence.
        labels: on the scan's own grid.
    """

    name: str
    slices: Float[Tensor, "slices channels height width"]
    image: Volume
    labels: Volume


class Scans(Dataset):
    """Whole scans, read when asked for."""

    def __init__(self, cases: list[Case], preparation: Preparation, classes: int) -> None:
        self.cases, self.preparation, self.classes = cases, preparation, classes

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Scan:
        case = self.cases[index]
        volumes, labels = case.read()
        check_labels(labels, self.classes)
        return Scan(case.name, self.preparation.slices(volumes), volumes[0], labels)


class Slices(Dataset):
    """Augmented slices of scans that are held in memory.

    Args:
        cases: to read.
        preparation: of slices.
        classes: labels are from 0 to this minus one.
        crop: (height, width) of the piece that is cut from a random place; None takes whole slices, the largest scan's size.
        empty: share of the slices without any structure that is kept.
        flips: axes (0 height, 1 width) along which half the slices are mirrored.
        rotation: largest angle in degrees, to either side.
        scaling: largest relative change of size.
        augmented: probability of each augmentation.
        intensity: largest relative change of contrast, and shift in standard deviations.
    """

    def __init__(
        self, cases: list[Case], preparation: Preparation, classes: int, crop: tuple[int, int] | None = None, empty: float = 1.0,
        flips: tuple[int, ...] = (), rotation: float = 0.0, scaling: float = 0.0, augmented: float = 0.5, intensity: float = 0.0,
    ) -> None:  # fmt: skip
        from monai.transforms import Compose, RandAffined, RandFlipd, RandScaleIntensityd, RandShiftIntensityd

        images, labels = [], []
        generator = np.random.default_rng(0)
        for case in cases:
            volumes, marked = case.read()
            check_labels(marked, classes)
            slices, targets = preparation.slices(volumes), preparation.label_slices(marked)
            shown = targets.flatten(1).any(1).numpy() | (generator.random(len(targets)) < empty)
            images.append(slices[shown])
            labels.append(targets[shown].to(torch.uint8))
        largest = [max(stack.shape[axis] for stack in images) for axis in (2, 3)]
        self.images = [image for stack in images for image in _filled(stack, largest)]
        self.labels = [label for stack in labels for label in _filled(stack[:, None], largest)]
        self.crop = None if crop is None else (min(crop[0], largest[0]), min(crop[1], largest[1]))
        both = ["image", "label"]
        chain: list[Any] = [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in flips]
        if rotation or scaling:
            chain.append(RandAffined(both, prob=augmented, rotate_range=float(np.radians(rotation)), scale_range=scaling,
                                     mode=("bilinear", "nearest"), padding_mode="border", cache_grid=True, spatial_size=largest))  # fmt: skip
        if intensity:
            chain.append(RandScaleIntensityd("image", factors=intensity, prob=augmented))
            chain.append(RandShiftIntensityd("image", offsets=intensity, prob=augmented))
        self.augment = Compose(chain)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels height width"], Int[Tensor, "height width"]]:
        pair = {"image": self.images[index], "label": self.labels[index].float()}
        # MONAI's transforms have generators of their own; the loader has seeded torch's by epoch and index.
        self.augment.set_random_state(int(torch.randint(2**31, ())))
        with _without_history():
            out: Any = self.augment(pair)
        image, label = torch.as_tensor(np.asarray(out["image"])), torch.as_tensor(np.asarray(out["label"]))[0].long()
        if self.crop is not None:
            top, left = (int(torch.randint(size - cut + 1, ())) for size, cut in zip(image.shape[1:], self.crop, strict=True))
            place = (slice(top, top + self.crop[0]), slice(left, left + self.crop[1]))
            image, label = image[:, place[0], place[1]], label[place]
        return image, label


@contextmanager
def _without_history() -> Iterator[None]:
    """MONAI's transforms on plain tensors: writing down what was done to each costs as much as doing it."""
    from monai.data import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def _filled(stack: Tensor, size: list[int]) -> Tensor:
    """Edges repeated below and to the right, so that slices of several scans make a batch; labels get background."""
    pad = (0, size[1] - stack.shape[3], 0, size[0] - stack.shape[2])
    return F.pad(stack, pad, mode="replicate") if stack.is_floating_point() else F.pad(stack, pad)


def folds_of(cases: list[Case], folds: int, seed: int) -> list[list[Case]]:
    """The cases in `folds` fixed parts, drawn from their sorted names."""
    order = np.random.default_rng(seed).permutation(len(cases))
    ordered = sorted(cases, key=lambda case: case.name)
    return [sorted((ordered[index] for index in order[part::folds]), key=lambda case: case.name) for part in range(folds)]


class LabelledScans(pl.LightningDataModule):
    """A corpus of labelled scans: one fold to measure on, a few scans of the others to choose by, the rest to learn from.

    Args:
        root: folder of the corpus.
        layout: how it is laid out: folders, chaos_mr, brats, hvsmr.
        classes: background included.
        class_names: of the classes but the background, for reports.
        preparation: of slices.
        fold: which of `folds` parts is the test set.
        folds: how many parts.
        validation: how many scans of the other parts are left to choose by.
        label_values: value in the label files -> class.
        batch_size: slices in a batch, for each process.
        crop: see `Slices`; like empty, flips, rotation, scaling, augmented and intensity.
        empty: share of slices without structures that is kept.
        flips: mirrored axes.
        rotation: degrees.
        scaling: relative.
        augmented: probability of each augmentation.
        intensity: relative.
        workers: processes that read.
        seed: of folds and order.
    """

    def __init__(
        self, root: str, classes: int, layout: Layout = "folders", class_names: list[str] | None = None, preparation: Preparation = Preparation(),  # noqa: B008
        fold: int = 0, folds: int = 5, validation: int = 8, label_values: dict[int, int] | None = None, batch_size: int = 16,
        crop: tuple[int, int] | None = None, empty: float = 1.0, flips: list[int] | None = None, rotation: float = 0.0, scaling: float = 0.0,
        augmented: float = 0.5, intensity: float = 0.0, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= fold < folds:
            raise UserError(f"expected fold from 0 to {folds - 1}; got {fold}")
        if class_names is not None and len(class_names) != classes - 1:
            raise UserError(f"expected {classes - 1} class_names, one a class but the background; got {len(class_names)}")
        self.root, self.layout, self.classes, self.preparation = root, layout, classes, preparation
        self.class_names = class_names or [f"class {label}" for label in range(1, classes)]
        self.fold, self.folds, self.validation, self.label_values = fold, folds, validation, label_values
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.augmentation: Mapping[str, Any] = {"crop": crop, "empty": empty, "flips": tuple(flips or ()), "rotation": rotation, "scaling": scaling,
                                                "augmented": augmented, "intensity": intensity}  # fmt: skip
        self._parts: dict[str, list[Case]] = {}
        self._train: Slices | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find the cases and split them; the slices are read when training asks for them."""
        if self._parts:
            return
        parts = folds_of(find_cases(self.root, self.layout, self.label_values), self.folds, self.seed)
        others = [case for number, part in enumerate(parts) if number != self.fold for case in part]
        if len(others) < 2 or not parts[self.fold]:
            raise UserError(f"expected at least {self.folds} labelled scans in {self.root} for {self.folds} folds; found {sum(map(len, parts))}")
        order = np.random.default_rng(self.seed + 1).permutation(len(others))
        kept = min(self.validation, len(others) - 1)
        self._parts = {"test": parts[self.fold], "validation": [others[i] for i in order[:kept]], "train": [others[i] for i in order[kept:]]}

    def cases(self, part: str) -> list[Case]:
        """Those of ``train``, ``validation`` or ``test``."""
        self.setup()
        return self._parts[part]

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented slices; resumable to the bit."""
        if self._train is None:
            self._train = Slices(self._parts["train"], self.preparation, self.classes, **self.augmentation)
        whole = len(self._train) >= self.batch_size
        return ResumableDataLoader(self._train, self.batch_size, shuffle=True, seed=self.seed, num_workers=self.workers, drop_last=whole)

    def val_dataloader(self) -> DataLoader:
        """Whole scans to choose by."""
        return self._scans("validation")

    def test_dataloader(self) -> DataLoader:
        """Whole scans of the fold."""
        return self._scans("test")

    def predict_dataloader(self) -> DataLoader:
        """The test scans."""
        return self._scans("test")

    def _scans(self, part: str) -> DataLoader:
        return DataLoader(Scans(self._parts[part], self.preparation, self.classes), batch_size=None, num_workers=self.workers)
