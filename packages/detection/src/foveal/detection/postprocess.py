"""From what the network says of every cell to a list of objects: scores, non-maximum suppression, and the way back to the picture's own pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foveal.detection.masks import Masks
from foveal.detection.models.heads import masks_of

#: Boxes that go into the suppression at most.
_CANDIDATES = 30_000
#: Boxes of different classes are moved apart by this, more than any picture is wide.
_APART = 100_000.0
#: Turned boxes that are held against all surer ones at once.
_BLOCK = 512
#: Masks that are brought to the size that the network saw at once.
_MASKS = 16
#: Pixels of a picture whose logits are in memory at once.
_PIXELS = 1 << 22


@dataclass  # not frozen: Lightning moves what a step predicts to the CPU in place
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
        kept = _suppress_turned(turned, classes if not across_classes else torch.zeros_like(classes), overlap, most)
        return Found(turned[kept], values[kept], classes[kept])
    chosen = corners(chosen)
    apart = chosen if across_classes else chosen + (classes * _APART)[:, None].to(chosen.dtype)
    kept = torchvision.ops.nms(apart.double(), values.double(), overlap)[:most]
    return Found(chosen[kept], values[kept], classes[kept], None if extra is None else extra[:, cells[kept]].T)


def _suppress_turned(boxes: Float[Tensor, "boxes 5"], classes: Int[Tensor, " boxes"], overlap: float, most: int) -> Int[Tensor, " kept"]:
    """Numbers of the first `most` boxes that no surer one of their class overlaps; the boxes are in falling order of score.

    As ultralytics has it, a box that is shut out shuts out others too. A block of boxes at a time is held against all before it.
    """
    kept: list[Tensor] = []
    for start in range(0, len(boxes), _BLOCK):
        rows = torch.arange(start, min(start + _BLOCK, len(boxes)), device=boxes.device)
        end = start + len(rows)
        shut = (probabilistic_overlap(boxes[:end], boxes[rows]) > overlap) & (classes[:end, None] == classes[rows])
        surer = torch.arange(end, device=boxes.device)[:, None] < rows
        kept.append(rows[~(shut & surer).any(0)])
        if sum(map(len, kept)) >= most:
            break
    return torch.cat(kept)[:most] if kept else torch.zeros(0, dtype=torch.long, device=boxes.device)


def probabilistic_overlap(first: Float[Tensor, "n 5"], second: Float[Tensor, "m 5"]) -> Float[Tensor, "n m"]:
    """How much turned boxes share: one minus the Hellinger distance of their Gaussians, as ultralytics has it (probiou).

    Args:
        first: centre x, centre y, width, height in pixels and angle in radians.
        second: the same.

    References:
        Llerena et al., Gaussian Bounding Boxes and Probabilistic Intersection-over-Union for Object Detection, 2021 (arXiv:2106.06072).
    """

    def covariance(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = boxes[:, 2] ** 2 / 12, boxes[:, 3] ** 2 / 12
        cosine, sine = boxes[:, 4].cos(), boxes[:, 4].sin()
        return a * cosine**2 + b * sine**2, a * sine**2 + b * cosine**2, (a - b) * cosine * sine

    small = 1e-7
    (a1, b1, c1), (a2, b2, c2) = (tuple(part[:, None] for part in covariance(first)), tuple(part[None] for part in covariance(second)))
    dx, dy = second[None, :, 0] - first[:, None, 0], second[None, :, 1] - first[:, None, 1]
    a, b, c = a1 + a2, b1 + b2, c1 + c2
    common = a * b - c**2
    distance = (a * dy**2 + b * dx**2) / (common + small) / 4 - c * dx * dy / (common + small) / 2
    shapes = (a1 * b1 - c1**2).clamp_min(0) * (a2 * b2 - c2**2).clamp_min(0)
    distance = distance + (common / (4 * shapes.sqrt() + small) + small).log() / 2
    return 1 - (1 - (-distance.clamp(small, 100.0)).exp() + small).sqrt()


def corners_of_turned(boxes: Float[np.ndarray, "objects 5"]) -> Float[np.ndarray, "objects 4 2"]:
    """The four corners of turned boxes (centre x, centre y, width, height, angle), one after the other round each."""
    centre, angle = boxes[:, :2], boxes[:, 4]
    across = np.stack((np.cos(angle), np.sin(angle)), 1) * boxes[:, 2:3] / 2
    down = np.stack((-np.sin(angle), np.cos(angle)), 1) * boxes[:, 3:4] / 2
    return np.stack((centre + across + down, centre + across - down, centre - across - down, centre - across + down), 1)


def turned_in_picture(
    boxes: Float[Tensor, "objects 5"], factor: float, padding: Sequence[float], size: tuple[int, int]
) -> tuple[Float[Tensor, "objects 5"], Float[Tensor, "objects 4"]]:
    """Turned boxes of the padded picture in the picture of `size` (width, height), and the upright box around each, which ends with the picture."""
    turned = boxes.clone()
    turned[:, :2] = (turned[:, :2] - turned.new_tensor(padding)) / factor
    turned[:, 2:4] /= factor
    cosine, sine = turned[:, 4].cos().abs(), turned[:, 4].sin().abs()
    half = torch.stack((turned[:, 2] * cosine + turned[:, 3] * sine, turned[:, 2] * sine + turned[:, 3] * cosine), 1) / 2
    upright = torch.cat((turned[:, :2] - half, turned[:, :2] + half), 1)
    return turned, upright.clamp_min(0).minimum(turned.new_tensor([*size, *size]))


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


def back_to_picture(boxes: Float[Tensor, "objects 4"], factor: float, padding: Sequence[float], size: tuple[int, int]) -> Float[Tensor, "objects 4"]:
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
) -> Masks:
    """Masks of a picture's objects in its own pixels. A mask ends with its box, and only there it is computed.

    The values are those of the logits' bilinear interpolation to the size of the picture.

    Args:
        prototypes: of the picture.
        coefficients: of the objects.
        boxes: of the objects, corners in the picture's own pixels.
        seen: height and width of what the network saw.
        factor: that the picture was scaled by for it.
        padding: on its left and top.
        size: width and height of the picture.
    """
    rows, columns = max(round(size[1] * factor), 1), max(round(size[0] * factor), 1)
    limits = boxes.round().int().tolist()

    def crops() -> Iterator[tuple[int, int, np.ndarray]]:
        for start in range(0, len(boxes), _MASKS):
            logits = masks_of(prototypes, coefficients[start : start + _MASKS], seen)
            logits = logits[:, padding[1] : padding[1] + rows, padding[0] : padding[0] + columns]
            for own, box in zip(logits, limits[start : start + _MASKS], strict=True):
                yield box[0], box[1], _positive(own, box, size)

    return Masks(size, crops())


def _positive(logits: Float[Tensor, "height width"], box: Sequence[int], size: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """Where the logits, stretched to `size` (width, height), are above nothing, within a box (left, top, right, bottom) of whole pixels."""
    left, top, right, bottom = box
    before, after, share = _cells(left, right, logits.shape[1], size[0], logits)
    across = logits[:, before] * (1 - share) + logits[:, after] * share
    found = np.empty((bottom - top, right - left), bool)
    step = max(_PIXELS // max(right - left, 1), 1)
    for start in range(top, bottom, step):
        before, after, share = _cells(start, min(start + step, bottom), logits.shape[0], size[1], logits)
        block = across[before] * (1 - share[:, None]) + across[after] * share[:, None]
        found[start - top : start - top + step] = (block > 0).cpu().numpy()
    return found


def _cells(start: int, end: int, cells: int, pixels: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cells that pixels lie between, and the share of the second, as `torch.nn.functional.interpolate` has it without aligned corners."""
    place = (torch.arange(start, end, device=like.device, dtype=like.dtype) + 0.5).mul_(cells / pixels).sub_(0.5).clamp_min_(0)
    before = place.long().clamp_max_(cells - 1)
    return before, (before + 1).clamp_max_(cells - 1), place - before
