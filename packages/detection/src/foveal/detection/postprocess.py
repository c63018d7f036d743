"""From what the network says of every cell to a list of objects: scores, non-maximum suppression, and the way back to the picture's own pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveal.detection.models.heads import masks_of

#: Boxes that go into the suppression at most.
_CANDIDATES = 30_000
#: Boxes of different classes are moved apart by this, more than any picture is wide.
_APART = 100_000.0
#: Masks that are brought to a picture's size at once.
_MASKS = 16


@dataclass(frozen=True)
class Found:
    """Objects of one picture, the surest first.

    Attributes:
        boxes: left, top, right, bottom in pixels; of oriented boxes centre x, centre y, width, height, angle.
        scores: from 0 to 1.
        classes: numbers.
        extra: of each object what the head said besides (mask coefficients, keypoints).
    """

    boxes: Float[Tensor, "objects 4"]
    scores: Float[Tensor, " objects"]
    classes: Int[Tensor, " objects"]
    extra: Float[Tensor, "objects numbers"] | None = None


def corners(boxes: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 4"]:
    """Centre and size to left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:4] / 2
    return torch.cat((centre - half, centre + half), -1)


def suppress(
    decoded: Float[Tensor, "numbers cells"],
    *,
    score: float = 0.25,
    overlap: float = 0.7,
    most: int = 300,
    several: bool = False,
    across_classes: bool = False,
    extra: Float[Tensor, "more cells"] | None = None,
    oriented: bool = False,
) -> Found:
    """Keep the best box of every heap of boxes that overlap.

    Args:
        decoded: centre, size and a score for each class, of every cell of one picture.
        score: least score.
        overlap: greatest intersection over union of two boxes of a class.
        most: number of objects at most.
        several: whether a cell may be several classes at once, as in evaluation.
        across_classes: whether boxes of different classes shut each other out too.
        extra: further numbers of every cell; of `oriented` the angle.
        oriented: whether boxes are turned; their overlap is that of Gaussians (probiou).
    """
    boxes, chances = decoded[:4].T, decoded[4:].T
    if several:
        cells, classes = (chances > score).nonzero(as_tuple=True)
        values = chances[cells, classes]
    else:
        values, classes = chances.max(1)
        cells = (values > score).nonzero()[:, 0]
        values, classes = values[cells], classes[cells]
    order = values.argsort(descending=True, stable=True)[:_CANDIDATES]
    cells, values, classes = cells[order], values[order], classes[order]
    chosen = boxes[cells]
    if oriented:
        assert extra is not None
        turned = torch.cat((chosen, extra[:, cells].T), 1)
        kept = _suppress_turned(turned, classes if not across_classes else torch.zeros_like(classes), overlap)[:most]
        return Found(turned[kept], values[kept], classes[kept])
    chosen = corners(chosen)
    apart = chosen if across_classes else chosen + (classes * _APART)[:, None].to(chosen.dtype)
    kept = torchvision.ops.nms(apart.double(), values.double(), overlap)[:most]
    return Found(chosen[kept], values[kept], classes[kept], None if extra is None else extra[:, cells[kept]].T)


def _suppress_turned(boxes: Float[Tensor, "boxes 5"], classes: Tensor, overlap: float) -> Tensor:
    """Numbers of the boxes that no surer one of their class overlaps; the boxes are in falling order of score."""
    shut = (_probabilistic_overlap(boxes, boxes) >= overlap) & (classes[:, None] == classes)
    return (shut.triu(1).sum(0) == 0).nonzero()[:, 0]


def _probabilistic_overlap(first: Float[Tensor, "n 5"], second: Float[Tensor, "m 5"]) -> Float[Tensor, "n m"]:
    """One minus the Hellinger distance of the boxes' Gaussians (Llerena et al., 2021)."""

    def covariance(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = boxes[:, 2] ** 2 / 12, boxes[:, 3] ** 2 / 12
        cosine, sine = boxes[:, 4].cos(), boxes[:, 4].sin()
        return a * cosine**2 + b * sine**2, a * sine**2 + b * cosine**2, (a - b) * cosine * sine

    small = 1e-7
    (a1, b1, c1), (a2, b2, c2) = (tuple(part[:, None] for part in covariance(first)), tuple(part[None] for part in covariance(second)))
    dx, dy = second[None, :, 0] - first[:, None, 0], second[None, :, 1] - first[:, None, 1]
    a, b, c = a1 + a2, b1 + b2, c1 + c2
    common = a * b - c**2 + small
    distance = (a * dy**2 + b * dx**2) / common / 4 + c * dx * dy / common / 2
    shapes = (a1 * b1 - c1**2).clamp_min(0) * (a2 * b2 - c2**2).clamp_min(0)
    distance = distance + ((common / (4 * shapes.sqrt() + small)) + small).log() / 2
    return 1 - (1 - (-distance.clamp(small, 100.0)).exp() + small).sqrt()


def letterbox(image: Float[Tensor, "3 height width"], size: int, stride: int = 32) -> tuple[Tensor, float, tuple[int, int]]:
    """A picture made to fit `size`, keeping its shape, and padded with grey to sides that are multiples of `stride`.

    Returns:
        The picture, the factor that it was scaled by, and the padding on its left and top.
    """
    height, width = image.shape[1:]
    factor = size / max(height, width)
    inner = (max(round(height * factor), 1), max(round(width * factor), 1))
    if inner != (height, width):
        image = F.interpolate(image[None], inner, mode="bilinear", align_corners=False, antialias=factor < 1)[0]
    right, below = -inner[1] % stride, -inner[0] % stride
    left, top = right // 2, below // 2
    return F.pad(image, (left, right - left, top, below - top), value=114 / 255), factor, (left, top)


def back_to_picture(boxes: Float[Tensor, "objects 4"], factor: float, padding: tuple[int, int], size: tuple[int, int]) -> Float[Tensor, "objects 4"]:
    """Corners in the padded picture to corners in the picture of `size` (width, height)."""
    shift = boxes.new_tensor([*padding, *padding])
    limit = boxes.new_tensor([*size, *size])
    return ((boxes - shift) / factor).clamp_min(0).minimum(limit)


def masks_in_picture(
    prototypes: Float[Tensor, "masks height width"],
    coefficients: Float[Tensor, "objects masks"],
    boxes: Float[Tensor, "objects 4"],
    seen: tuple[int, int],
    factor: float,
    padding: tuple[int, int],
    size: tuple[int, int],
) -> Iterator[Bool[np.ndarray, "size_height size_width"]]:
    """Masks of a picture's objects in its own pixels, a few at a time in memory. A mask ends with its box.

    Args:
        prototypes: of the picture.
        coefficients: of the objects.
        boxes: of the objects, corners in the picture's own pixels.
        seen: height and width of what the network saw.
        factor: that the picture was scaled by for it.
        padding: on its left and top.
        size: width and height of the picture.
    """
    rows, columns = round(size[1] * factor), round(size[0] * factor)
    limits = boxes.round().int().tolist()
    for start in range(0, len(boxes), _MASKS):
        logits = masks_of(prototypes, coefficients[start : start + _MASKS], seen)
        logits = logits[:, padding[1] : padding[1] + rows, padding[0] : padding[0] + columns]
        whole = (F.interpolate(logits[None], (size[1], size[0]), mode="bilinear", align_corners=False)[0] > 0).cpu().numpy()
        for mask, (left, top, right, bottom) in zip(whole, limits[start : start + _MASKS], strict=True):
            own = np.zeros_like(mask)
            own[top:bottom, left:right] = mask[top:bottom, left:right]
            yield own
