"""Pairs of degraded and good images with region maps: the authors' folders, and pairs that are simulated from good images.

Simulation is stated as what it is: Poisson noise of fewer photons for CT (on line integrals of the picture's own values) or of fewer counts for PET,
averaging and subsampling for enlargement. It is not a scanner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.medical.regions import region_volume, superpixels
from foveal.medical.volumes import ITK, NIFTI, PICTURES, read_volume, stem_of, suffix_of

Degradation = Literal["low_dose", "low_count", "enlarge"]


class Pair(NamedTuple):
    """One image, or a batch of them.

    Attributes:
        degraded: values about 0 to 1.
        regions: on the target's grid.
        target: values about 0 to 1.
    """

    degraded: Float[Tensor, "*batch 1 rows columns"]
    regions: Int[Tensor, "*batch outrows outcolumns"]
    target: Float[Tensor, "*batch 1 outrows outcolumns"]


def degrade(
    target: Float[Tensor, "rows columns"], kind: Degradation, amount: float, scale: int, generator: torch.Generator
) -> Float[Tensor, "rows2 columns2"]:
    """A worse image.

    Args:
        target: values from 0 to 1.
        kind: "low_dose" adds noise whose variance is exp(value) / photons with photons = `amount`, as transmitted light has; "low_count" draws
            counts of mean `amount` times the value; "enlarge" averages `scale` x `scale` pixels.
        amount: see kind.
        scale: of "enlarge".
        generator: of the noise.
    """
    if kind == "enlarge":
        return F.avg_pool2d(target[None], scale)[0]
    if kind == "low_count":
        return torch.poisson(target.clamp(min=0) * amount, generator) / amount
    noise = torch.randn(target.shape, generator=generator)
    return target + noise * (torch.exp(target) / amount).sqrt()


def rows_first(values: Shaped[np.ndarray, "first second"], kind: str) -> Shaped[np.ndarray, "rows columns"]:
    """A slice with its rows first: the first index of a volume's file runs along a row, that of a picture down a column."""
    return values if kind == "picture" else values.T


class Pairs(Dataset):
    """Crops of pairs, turned by right angles when training.

    Args:
        items: whole pairs.
        multiple: sides of the crops are cut to multiples of it.
        crop: side of a crop of the target; None takes the whole image.
        turned: whether to turn by a random right angle, the authors' only augmentation.
        scale: of the target's grid.
    """

    def __init__(self, items: list[Pair], multiple: int, crop: int | None, turned: bool, scale: int) -> None:
        self.items, self.multiple, self.crop, self.turned, self.scale = items, multiple, crop, turned, scale

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Pair:
        degraded, regions, target = self.items[index]
        rows, columns = ((size if self.crop is None else min(size, self.crop)) // self.multiple * self.multiple for size in target.shape[1:])
        if not rows or not columns:
            raise UserError(f"expected images of at least {self.multiple} x {self.multiple} pixels; got {tuple(target.shape[1:])}")
        step = self.scale
        top, left = ((size - cut) // 2 // step for size, cut in zip(target.shape[1:], (rows, columns), strict=True))
        if self.crop is not None:
            top, left = (int(torch.randint((size - cut) // step + 1, ())) for size, cut in zip(target.shape[1:], (rows, columns), strict=True))
        coarse = slice(top, top + rows // step), slice(left, left + columns // step)
        fine = slice(top * step, top * step + rows), slice(left * step, left * step + columns)
        pair = Pair(degraded[(slice(None), *coarse)], regions[fine], target[(slice(None), *fine)])
        if not self.turned:
            return pair
        turns = int(torch.randint(4, ()))
        return Pair(*(torch.rot90(part, turns, (-2, -1)) for part in pair))


class RestorationPairs(pl.LightningDataModule):
    """Pairs to learn restoration from.

    Either the authors' folders, ``{train,test}/{fd,qd,qd_seg_123456}`` with pictures, or volumes of as many slices, and region maps of one name (any
    names by `target`, `degraded` and `regions`); or, with `simulate`, any folder of good images, whose every slice is degraded.

    Args:
        root: of the folders, or of the good images (a file or folder).
        simulate: kind of degradation; None reads pairs.
        amount: of the degradation, see `degrade`.
        scale: of the target's grid; more than 1 for "enlarge".
        value_range: values that 0 and 1 stand for.
        crop: side of training crops on the target's grid.
        batch_size: crops in a batch, for each process.
        target: name of the folder of good images.
        degraded: name of the folder of degraded ones.
        regions: name of the folder of region maps; where it is missing, superpixels of the degraded image.
        multiple: what the network's sides must be multiples of.
        held_out: share of the images (simulated: of the slices, the last ones) for validation and test.
        workers: processes that read.
        seed: of noise and order.
    """

    def __init__(
        self, root: str, simulate: Degradation | None = None, amount: float = 200.0, scale: int = 1, value_range: tuple[float, float] = (0.0, 255.0),
        crop: int | None = 64, batch_size: int = 8, target: str = "fd", degraded: str = "qd", regions: str = "qd_seg_123456", multiple: int = 16,
        held_out: float = 0.2, workers: int = 0, seed: int = 42,
    ) -> None:  # fmt: skip
        super().__init__()
        if simulate == "enlarge" and scale < 2:
            raise UserError(f"expected scale of at least 2 to simulate enlargement; got {scale}")
        self.root, self.simulate, self.amount, self.scale, self.value_range = Path(root), simulate, amount, scale, value_range
        self.crop, self.batch_size, self.multiple, self.held_out, self.workers, self.seed = crop, batch_size, multiple, held_out, workers, seed
        self.names = (target, degraded, regions)
        self._sets: dict[str, list[Pair]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the images."""
        if self._sets:
            return
        if not self.root.exists():
            raise UserError(f"expected images in {self.root}; it does not exist; see docs/medical.md")
        if self.simulate is None:
            self._sets = {part: self._read(self.root / part) for part in ("train", "test")}
        else:
            pairs = self._simulated()
            kept = max(1, round(len(pairs) * self.held_out))
            if len(pairs) < 2:
                raise UserError(f"expected at least two slices in {self.root}; found {len(pairs)}")
            self._sets = {"train": pairs[:-kept], "test": pairs[-kept:]}

    def _scaled(self, voxels: np.ndarray) -> Tensor:
        low, high = self.value_range
        return (torch.from_numpy(np.ascontiguousarray(voxels).astype(np.float32)) - low) / (high - low)

    def _read(self, folder: Path) -> list[Pair]:
        target, degraded, regions = (folder / name for name in self.names)
        for place in (target, degraded):
            if not place.is_dir():
                raise UserError(f"expected folders {', '.join(self.names[:2])} in {folder}; {place.name} is missing; set target and degraded")
        maps = {stem_of(path): path for path in sorted(regions.iterdir())} if regions.is_dir() else {}
        good = {stem_of(path): path for path in sorted(target.iterdir())}
        pairs = []
        for path in sorted(degraded.iterdir()):
            name = stem_of(path)
            if suffix_of(path) not in (*PICTURES, *NIFTI, *ITK) or name not in good:
                continue
            volumes = [read_volume(place) for place in (path, good[name])]
            counts = [volume.voxels.shape[2] for volume in volumes]
            if counts[0] != counts[1]:
                raise UserError(f"expected as many slices in {path} as in {good[name]}; got {counts[0]} and {counts[1]}; pair them anew")
            parts = region_volume(maps[name], volumes[1]) if name in maps else None
            for index in range(counts[0]):
                pictures = [self._scaled(rows_first(volume.voxels[:, :, index], volume.kind))[None] for volume in volumes]
                if parts is not None:
                    regions_of = rows_first(parts[:, :, index], volumes[1].kind)
                else:
                    regions_of = superpixels(pictures[0][0].numpy()).repeat(self.scale, 0).repeat(self.scale, 1)
                wanted = tuple(self.scale * size for size in pictures[0].shape[1:])
                if tuple(pictures[1].shape[1:]) != wanted:
                    raise UserError(
                        f"expected {good[name]} of {wanted[0]} x {wanted[1]} pixels, {self.scale} times those of {path}; it has "
                        f"{pictures[1].shape[1]} x {pictures[1].shape[2]}; set scale, or pair them anew"
                    )
                pairs.append(Pair(pictures[0], torch.from_numpy(np.ascontiguousarray(regions_of)), pictures[1]))
        if not pairs:
            raise UserError(f"expected pictures of one name in {target} and {degraded}; found none")
        return pairs

    def _simulated(self) -> list[Pair]:
        assert self.simulate is not None
        readable = (*NIFTI, *ITK, *PICTURES)
        files = [self.root] if self.root.is_file() else sorted(path for path in self.root.rglob("*") if suffix_of(path) in readable)
        generator = torch.Generator().manual_seed(self.seed)
        pairs = []
        for file in files:
            volume = read_volume(file)
            for index in range(volume.voxels.shape[2]):
                picture = volume.voxels[:, :, index]
                target = self._scaled(rows_first(picture, volume.kind)).clamp(0, 1)[None]
                rows, columns = (size // self.scale * self.scale for size in target.shape[1:])
                target = target[:, :rows, :columns]
                if float(target.std()) < 1e-3:  # air above a head teaches nothing
                    continue
                degraded = degrade(target[0], self.simulate, self.amount, self.scale, generator)[None]
                parts = superpixels(degraded[0].numpy()).repeat(self.scale, 0).repeat(self.scale, 1)
                pairs.append(Pair(degraded, torch.from_numpy(parts), target))
        return pairs

    def train_dataloader(self) -> DataLoader:
        """Shuffled crops; resumable to the bit."""
        pairs = Pairs(self._sets["train"], self.multiple, self.crop, True, self.scale)
        return ResumableDataLoader(pairs, self.batch_size, seed=self.seed, num_workers=self.workers, drop_last=len(pairs) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Whole images."""
        return DataLoader(Pairs(self._sets["test"], self.multiple, None, False, self.scale), batch_size=1, num_workers=self.workers)

    def test_dataloader(self) -> DataLoader:
        """Whole images."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """Whole images."""
        return self.val_dataloader()
