"""Pictures of heads for training: four pictures put together, scaled, shifted and recoloured as YOLOv5's recipe has it; angles stay as they are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.detection.data.head_labels import HeadPicture, draw_people, read_heads
from foveal.detection.models.direct_mhp import to_share
from foveal.detection.postprocess import letterbox

_GREY = 114


@dataclass(eq=False)
class HeadBatch:
    """Pictures of a size, and their heads.

    Attributes:
        images: pixels in 0..1.
        targets: of each head its picture's number in the batch, centre x, centre y, width and height over the picture's sides, pitch, yaw and
            roll in 0..1.
        pictures: their labels as they stand in the file.
        factors: of each picture the factor that it was scaled by, and the padding on its left and top.
    """

    images: Float[Tensor, "batch 3 height width"]
    targets: Float[Tensor, "heads 8"]
    pictures: list[HeadPicture]
    factors: list[tuple[float, tuple[int, int]]]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HeadBatch:
        """The batch on a device; labels stay where they are."""
        images, targets = (value.to(device, non_blocking=non_blocking) for value in (self.images, self.targets))
        return HeadBatch(images, targets, self.pictures, self.factors)


class HeadSet(Dataset):
    """Pictures and heads as the network is fed.

    Args:
        pictures: the set.
        image_size: side in pixels.
        mosaic: share of items that are put together from four pictures; None reads the pictures as they are.
        scale: greatest change of size, 0.9 for factors of 0.1 to 1.9.
        translate: greatest shift over the side.
        hue: greatest change of hue, and so for the two that follow.
        saturation: likewise.
        brightness: likewise.
        flip: share of items that are mirrored; yaw and roll change their sign.
    """

    def __init__(
        self, pictures: Sequence[HeadPicture], image_size: int, mosaic: float | None = None, scale: float = 0.9, translate: float = 0.1,
        hue: float = 0.015, saturation: float = 0.7, brightness: float = 0.4, flip: float = 0.0,
    ) -> None:  # fmt: skip
        self.pictures, self.image_size, self.mosaic, self.scale, self.translate = pictures, image_size, mosaic, scale, translate
        self.colour, self.flip = (hue, saturation, brightness), flip

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, HeadPicture, tuple[float, tuple[int, int]]]:
        picture = self.pictures[index]
        if self.mosaic is None:
            pixels = torch.from_numpy(np.array(picture.read())).permute(2, 0, 1).float() / 255
            image, factor, padding = letterbox(pixels, self.image_size, 64)
            boxes = picture.boxes * factor + np.array([*padding, *padding])
            return image, _targets(boxes, picture.angles, image.shape[2], image.shape[1]), picture, (factor, padding)
        canvas, boxes, angles = self._together(index) if random.random() < self.mosaic else self._fitted(index)
        canvas, boxes, angles = self._moved(canvas, boxes, angles)
        canvas = _recoloured(canvas, self.colour)
        if random.random() < self.flip:
            canvas, angles = canvas[:, ::-1], angles * np.array([1, -1, -1])
            boxes = np.stack((self.image_size - boxes[:, 2], boxes[:, 1], self.image_size - boxes[:, 0], boxes[:, 3]), 1)
        image = torch.from_numpy(np.ascontiguousarray(canvas)).permute(2, 0, 1).float() / 255
        return image, _targets(boxes, angles, self.image_size, self.image_size), picture, (1.0, (0, 0))

    def _fitted(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A picture in the middle of a square."""
        side, (image, boxes) = self.image_size, self._loaded(index)
        height, width = image.shape[:2]
        left, top = (side - width) // 2, (side - height) // 2
        canvas = np.full((side, side, 3), _GREY, np.uint8)
        canvas[top : top + height, left : left + width] = image
        return canvas, boxes + np.array([left, top, left, top]), self.pictures[index].angles

    def _loaded(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A picture whose longer side is the set's, and its boxes."""
        picture = self.pictures[index]
        image = picture.read()
        factor = self.image_size / max(image.shape[:2])
        if factor != 1:
            size = (max(round(image.shape[1] * factor), 1), max(round(image.shape[0] * factor), 1))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
        return image, picture.boxes * factor

    def _together(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Four pictures around a point of a square of twice the side; partners are drawn from the whole set."""
        side = self.image_size
        canvas = np.full((2 * side, 2 * side, 3), _GREY, np.uint8)
        middle_x, middle_y = random.randint(side // 2, 3 * side // 2), random.randint(side // 2, 3 * side // 2)
        boxes, angles = [], []
        for place, other in enumerate([index, *(random.randrange(len(self.pictures)) for _ in range(3))]):
            image, found = self._loaded(other)
            height, width = image.shape[:2]
            left = middle_x - width if place in (0, 2) else middle_x
            top = middle_y - height if place in (0, 1) else middle_y
            x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, 2 * side), min(top + height, 2 * side)
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
            boxes.append(found + np.array([left, top, left, top]))
            angles.append(self.pictures[other].angles)
        return canvas, np.concatenate(boxes).clip(0, 2 * side), np.concatenate(angles)

    def _moved(self, canvas: np.ndarray, boxes: np.ndarray, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scaled and shifted into a square; heads of which less than a tenth is left, or a sliver, go."""
        side, extent = self.image_size, canvas.shape[0]
        factor = random.uniform(1 - self.scale, 1 + self.scale)
        shift = [random.uniform(0.5 - self.translate, 0.5 + self.translate) * side - factor * extent / 2 for _ in range(2)]
        matrix = np.array([[factor, 0, shift[0]], [0, factor, shift[1]]])
        canvas = cv2.warpAffine(canvas, matrix, (side, side), borderValue=(_GREY, _GREY, _GREY))
        whole = boxes * factor + np.array([*shift, *shift])
        cut = whole.clip(0, side)
        size, before = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
        kept = (size.min(1) > 2) & (size.prod(1) > 0.1 * before.prod(1)) & (size.max(1) < 20 * size.min(1)) if len(boxes) else np.zeros(0, bool)
        return canvas, cut[kept], angles[kept]


def _targets(boxes: np.ndarray, angles: np.ndarray, width: int, height: int) -> Float[Tensor, "heads 8"]:
    """Rows of `HeadBatch.targets`, of picture 0."""
    found = torch.zeros(len(boxes), 8)
    if len(boxes):
        corners = torch.from_numpy(boxes).float() / torch.tensor([width, height, width, height])
        found[:, 1:3], found[:, 3:5] = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        found[:, 5:] = to_share(torch.from_numpy(angles).float())
    return found


def _recoloured(image: UInt8[np.ndarray, "height width 3"], colour: tuple[float, float, float]) -> UInt8[np.ndarray, "height width 3"]:
    """Hue turned, saturation and brightness stretched, each by a factor drawn within `colour` of one."""
    if not any(colour):
        return image
    factors = [1 + random.uniform(-1, 1) * share for share in colour]
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    ramp = np.arange(256, dtype=np.float64)
    tables = [(ramp * factors[0]) % 180, (ramp * factors[1]).clip(0, 255), (ramp * factors[2]).clip(0, 255)]
    parts = [cv2.LUT(part, table.astype(np.uint8)) for part, table in zip((hue, saturation, value), tables, strict=True)]
    return np.asarray(cv2.cvtColor(cv2.merge(parts), cv2.COLOR_HSV2RGB))


def collate(items: Sequence[tuple[Tensor, Tensor, HeadPicture, tuple[float, tuple[int, int]]]]) -> HeadBatch:
    """Items of one size to a batch."""
    rows = [found.clone() for _, found, _, _ in items]
    for place, found in enumerate(rows):
        found[:, 0] = place
    return HeadBatch(torch.stack([item[0] for item in items]), torch.cat(rows), [item[2] for item in items], [item[3] for item in items])


class HeadPoseData(pl.LightningDataModule):
    """Training, validation and test sets of heads.

    Args:
        source: folder that the other names lie below; None draws heads.
        train: COCO file to train on, as ``annotations/coco_style_train.json`` of AGORA-HPE.
        val: file to measure on while training.
        test: file to measure on in the end; None is `val`.
        train_images: folder of the pictures of `train`.
        val_images: folder of the pictures of `val`.
        test_images: folder of the pictures of `test`.
        made: without `source`, pictures to draw for training; a quarter as many are measured on.
        image_size: side in pixels, a multiple of 64.
        batch_size: pictures a step, of each process.
        mosaic: share of items put together from four pictures.
        scale: greatest change of size.
        translate: greatest shift over the side.
        colour: greatest change of hue, saturation and brightness.
        flip: share of items that are mirrored, with their yaw and roll; 0 as the authors'.
        workers: processes that read pictures.
        seed: of order, augmentation and drawing.

    Raises:
        UserError: settings that cannot be.
    """

    def __init__(
        self,
        source: str | None = None,
        train: str = "annotations/coco_style_train.json",
        val: str = "annotations/coco_style_validation.json",
        test: str | None = None,
        train_images: str = "images/train",
        val_images: str = "images/validation",
        test_images: str | None = None,
        made: int = 400,
        image_size: int = 1280,
        batch_size: int = 30,
        mosaic: float = 1.0,
        scale: float = 0.9,
        translate: float = 0.1,
        colour: tuple[float, float, float] = (0.015, 0.7, 0.4),
        flip: float = 0.0,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if image_size < 64 or image_size % 64:
            raise UserError(f"expected data.image_size a multiple of 64; got {image_size}")
        if not 0 <= mosaic <= 1 or not 0 <= flip <= 1 or not 0 <= scale < 1 or not 0 <= translate <= 0.5:
            raise UserError(f"expected data.mosaic, flip in 0..1, scale below 1, translate up to 0.5; got {mosaic}, {flip}, {scale}, {translate}")
        if source is None and made < 4:
            raise UserError(f"expected data.source, or data.made of at least four pictures; got {made}")
        self.source = None if source is None else Path(source)
        self.parts = {"train": (train, train_images), "val": (val, val_images), "test": (test or val, test_images or val_images)}
        self.made, self.image_size, self.batch_size, self.mosaic, self.flip = made, image_size, batch_size, mosaic, flip
        self.scale, self.translate, self.colour = scale, translate, colour
        self.workers, self.seed = workers, seed
        self._read: dict[str, list[HeadPicture]] = {}

    def pictures(self, part: str) -> list[HeadPicture]:
        """Pictures of "train", "val" or "test", read or drawn once."""
        if part not in self._read:
            if self.source is None:
                kind = ("train", "val", "test").index(part)
                count = self.made if part == "train" else max(self.made // 4, 1)
                self._read[part] = [draw_people(number, self.image_size, 3 * self.seed + kind) for number in range(count)]
            else:
                file, images = self.parts[part]
                self._read[part] = read_heads(self.source / file, self.source / images)
        return self._read[part]

    def train_dataloader(self) -> ResumableDataLoader:
        """Augmented, in an order of its own each epoch; the last, smaller batch is left out where there are others."""
        pictures = self.pictures("train")
        items = HeadSet(pictures, self.image_size, self.mosaic, self.scale, self.translate, *self.colour, self.flip)
        return ResumableDataLoader(
            items, self.batch_size, shuffle=True, seed=self.seed, drop_last=len(pictures) > self.batch_size, collate_fn=collate,
            num_workers=self.workers,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Whole pictures, one at a time, for they may differ in shape."""
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        """As `val_dataloader`."""
        return self._whole("test")

    predict_dataloader = test_dataloader

    def _whole(self, part: str) -> DataLoader:
        return DataLoader(HeadSet(self.pictures(part), self.image_size), batch_size=1, shuffle=False, collate_fn=collate, num_workers=self.workers)
