"""Labelled scenes for training: scaled, cropped and mirrored as PIDNet's and BEVANet's recipe has it, in batches that resume to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.detection.data.pictures import read_picture
from foveal.detection.data.scenes import Scene, SceneFolder, scene_folder, scenes_of
from foveal.detection.models.bevanet_loss import IGNORED

#: Mean and deviation of ImageNet's red, green and blue.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(image: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "3 height width"]:
    """A picture as the network is fed."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def boundaries(labels: UInt8[np.ndarray, "height width"], margin: int = 0, width: int = 4) -> Float[np.ndarray, "height width"]:
    """1 where two classes meet, as lines of `width` pixels, else 0; nothing starts within `margin` of the picture's border."""
    edges = cv2.Canny(labels, 0.1, 0.2)
    if margin:
        kept = np.zeros_like(edges)
        kept[margin:-margin, margin:-margin] = edges[margin:-margin, margin:-margin]
        edges = kept
    return (cv2.dilate(edges, np.ones((width, width), np.uint8)) > 50).astype(np.float32)


class SceneSet(Dataset):
    """Pictures, the classes of their pixels, and the boundaries between them.

    Args:
        scenes: files.
        kind: what they are.
        crop: height and width of what is cut out; None gives pictures as they are.
        base: longer side in pixels at scale 1; None is the picture's own.
        scale: least and greatest, drawn in steps of a tenth.
        flip: whether half of the pictures are mirrored.
    """

    def __init__(
        self, scenes: Sequence[Scene], kind: SceneFolder, crop: tuple[int, int] | None = None, base: int | None = None,
        scale: tuple[float, float] = (1.0, 1.0), flip: bool = False,
    ) -> None:  # fmt: skip
        self.scenes, self.kind, self.crop, self.base, self.scale, self.flip = scenes, kind, crop, base, scale, flip

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scenes[index]
        image, labels = read_picture(scene.picture), self.kind.read(scene)
        if image.shape[:2] != labels.shape:
            (height, width), size = labels.shape, f"{image.shape[1]} x {image.shape[0]}"
            raise UserError(f"expected labels of the picture's size, {size}; {scene.labels} has {width} x {height}; mend or remove it")
        edge = boundaries(labels, self.kind.margin)
        if self.crop is not None:
            image, labels, edge = self._cut(image, labels, edge, self.crop)
        if self.flip and random.random() < 0.5:
            image, labels, edge = image[:, ::-1], labels[:, ::-1], edge[:, ::-1]
        return {
            "image": normalised(image),
            "labels": torch.from_numpy(np.ascontiguousarray(labels)).long(),
            "boundary": torch.from_numpy(np.ascontiguousarray(edge)),
            "file": str(scene.picture),
        }

    def _cut(self, image: np.ndarray, labels: np.ndarray, edge: np.ndarray, crop: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A piece of the scaled picture; beyond the picture it is black and counts nowhere."""
        height, width = labels.shape
        steps = round((self.scale[1] - self.scale[0]) * 10)
        factor = (self.scale[0] + random.randint(0, steps) / 10) * (self.base or max(height, width)) / max(height, width)
        size = (max(int(width * factor + 0.5), 1), max(int(height * factor + 0.5), 1))
        if size != (width, height):
            image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
            labels, edge = (cv2.resize(values, size, interpolation=cv2.INTER_NEAREST) for values in (labels, edge))
        below, right = max(crop[0] - size[1], 0), max(crop[1] - size[0], 0)
        if below or right:
            image = np.pad(image, ((0, below), (0, right), (0, 0)))
            labels = np.pad(labels, ((0, below), (0, right)), constant_values=IGNORED)
            edge = np.pad(edge, ((0, below), (0, right)))
        top, left = random.randint(0, labels.shape[0] - crop[0]), random.randint(0, labels.shape[1] - crop[1])
        piece = (slice(top, top + crop[0]), slice(left, left + crop[1]))
        return image[piece], labels[piece], edge[piece]


class SegmentationData(pl.LightningDataModule):
    """Training, validation and test sets of scenes.

    Args:
        source: folder, see `foveal.detection.data.scenes.scene_folder`.
        layout: "auto", "cityscapes", "camvid" or "folders".
        train: name of the part to train on.
        val: part to measure on while training.
        test: part to measure on in the end.
        names: of the classes of plain folders, in the order of their numbers.
        crop: height and width of the pieces that are trained on.
        base_size: longer side in pixels at scale 1; None is each picture's own.
        scale: least and greatest, drawn in steps of a tenth.
        flip: whether half of the pictures are mirrored.
        batch_size: pieces a step, of each process; two or more, for some norms see one place of each.
        workers: processes that read pictures.
        seed: of order and augmentation.

    Raises:
        UserError: settings or a folder that cannot be.
    """

    def __init__(
        self,
        source: str,
        layout: str = "auto",
        train: str = "train",
        val: str = "val",
        test: str = "test",
        names: list[str] | None = None,
        crop: tuple[int, int] = (1024, 1024),
        base_size: int | None = None,
        scale: tuple[float, float] = (0.5, 2.1),
        flip: bool = True,
        batch_size: int = 12,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise UserError(f"expected data.batch_size of two or more, for some norms see one place of each picture; got {batch_size}")
        if len(crop) != 2 or min(crop) < 32:
            raise UserError(f"expected data.crop (height, width) of at least 32 pixels each; got {list(crop)}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise UserError(f"expected data.scale (least, greatest), positive; got {list(scale)}")
        if base_size is not None and base_size < 32:
            raise UserError(f"expected data.base_size of at least 32 pixels; got {base_size}")
        self.source, self.parts = source, {"train": train, "val": val, "test": test}
        self.layout, self.names = layout, names
        self.crop, self.base_size, self.scale, self.flip = (crop[0], crop[1]), base_size, (scale[0], scale[1]), flip
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self._kind: SceneFolder | None = None

    @property
    def kind(self) -> SceneFolder:
        """What the folder is: names and colours of its classes."""
        if self._kind is None:
            self._kind = scene_folder(self.source, self.layout, self.names)
        return self._kind

    def train_dataloader(self) -> ResumableDataLoader:
        """Pieces, in an order of their own each epoch; the last, smaller batch is left out."""
        scenes = scenes_of(self.source, self.kind, self.parts["train"])
        if len(scenes) < self.batch_size:
            raise UserError(f"expected at least data.batch_size ({self.batch_size}) pictures to train on; found {len(scenes)}")
        pieces = SceneSet(scenes, self.kind, self.crop, self.base_size, self.scale, self.flip)
        return ResumableDataLoader(pieces, self.batch_size, shuffle=True, seed=self.seed, drop_last=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """Whole pictures, one at a time, for they may differ in size."""
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        """As `val_dataloader`."""
        return self._whole("test")

    predict_dataloader = test_dataloader

    def _whole(self, part: str) -> DataLoader:
        return DataLoader(SceneSet(scenes_of(self.source, self.kind, self.parts[part]), self.kind), batch_size=1, num_workers=self.workers)
