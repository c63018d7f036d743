"""What the network says of each place: boxes and classes, and besides them masks, keypoints or an angle.

A box is four distances from the cell's centre to its sides, each the mean of a distribution over 0..15 strides. Decoded boxes are centre x,
centre y, width, height in pixels. Cells stand level by level (strides 8, 16, 32), row by row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import ConvNorm

STRIDES = (8, 16, 32)
#: Values of a distance's distribution, in strides.
BINS = 16


class Prediction(NamedTuple):
    """What the network says.

    Attributes:
        decoded: centre x, centre y, width, height in pixels, then a score in 0..1 for each class: (batch, 4 + classes, cells).
        maps: of each level, the logits of the four distributions and of the classes: (batch, 64 + classes, height, width).
        extra: mask coefficients (batch, 32, cells); keypoints x, y in pixels and visibility in 0..1 (batch, keypoints * 3, cells); or the angle in
            radians (batch, 1, cells). None for boxes alone.
        prototypes: of masks, (batch, 32, height / 4, width / 4).
    """

    decoded: Tensor
    maps: tuple[Tensor, ...]
    extra: Tensor | None = None
    prototypes: Tensor | None = None


class RawPrediction(NamedTuple):
    """What the losses take: `maps` and `prototypes` as in `Prediction`, `extra` (batch, numbers, cells) before it is decoded."""

    maps: tuple[Tensor, ...]
    extra: Tensor | None = None
    prototypes: Tensor | None = None


def anchor_points(
    shapes: Sequence[tuple[int, int]], like: Tensor, strides: Sequence[int] = STRIDES
) -> tuple[Float[Tensor, "2 cells"], Float[Tensor, " cells"]]:
    """Centres of the cells of all levels, in units of their stride, and their strides."""
    return _anchor_points(tuple((int(height), int(width)) for height, width in shapes), like.dtype, like.device, tuple(strides))


# Cached tensors are made outside inference mode: one made inside could not take part in training later on.
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _anchor_points(shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device, strides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    points, sizes = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        places = (torch.arange(count, device=device, dtype=dtype) + 0.5 for count in (height, width))
        y, x = torch.meshgrid(*places, indexing="ij")
        points.append(torch.stack((x.flatten(), y.flatten())))
        sizes.append(torch.full((height * width,), float(stride), device=device, dtype=dtype))
    return torch.cat(points, 1), torch.cat(sizes)


class Detect(nn.Module):
    """Boxes and classes of three levels.

    Args:
        channels: of the three levels.
        classes: number of classes.
    """

    #: Numbers a cell besides box and classes.
    extras = 0

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        self.classes = classes
        box_width = max(16, channels[0] // 4, 4 * BINS)
        class_width = max(channels[0], min(classes, 100))
        self.box = nn.ModuleList(
            nn.Sequential(ConvNorm(width, box_width, 3), ConvNorm(box_width, box_width, 3), nn.Conv2d(box_width, 4 * BINS, 1)) for width in channels
        )
        self.score = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(ConvNorm(width, width, 3, groups=width), ConvNorm(width, class_width)),
                nn.Sequential(ConvNorm(class_width, class_width, 3, groups=class_width), ConvNorm(class_width, class_width)),
                nn.Conv2d(class_width, classes, 1),
            )
            for width in channels
        )
        # The authors keep the constants 0..15 as a frozen weight, which counts among the parameters.
        self.bins = nn.Parameter(torch.arange(float(BINS)), requires_grad=False)
        #: Boxes and classes of all levels by one module: what the inference form has in place of `box` and `score`.
        self.at_once: nn.Module | None = None
        self._start_biases()

    def _start_biases(self) -> None:
        """Boxes of about one stride, and classes as rare as five objects in a picture of 640 pixels."""
        for box, score, stride in zip(self.box, self.score, STRIDES, strict=True):
            nn.init.ones_(box[-1].bias)  # type: ignore[index]
            nn.init.constant_(score[-1].bias, math.log(5 / self.classes / (640 / stride) ** 2))  # type: ignore[index]

    def raw(self, levels: Sequence[Float[Tensor, "batch channels height width"]]) -> RawPrediction:
        """Logits of every level."""
        if self.at_once is not None:
            return RawPrediction(tuple(self.at_once(*levels)))
        maps = [torch.cat((box(x), score(x)), 1) for x, box, score in zip(levels, self.box, self.score, strict=True)]
        return RawPrediction(tuple(maps))

    def distances(
        self, maps: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "batch 4 cells"], Float[Tensor, "batch classes cells"], Float[Tensor, "2 cells"], Float[Tensor, " cells"]]:
        """Distances in strides to left, top, right, bottom; class logits; and the cells' centres and strides."""
        sizes = [(int(x.shape[2]), int(x.shape[3])) for x in maps]
        centres, strides = anchor_points(sizes, maps[0])
        if torch.jit.is_tracing():  # graph runtimes keep the cells last: nothing is permuted
            rows = [x.reshape(-1, 4 * BINS + self.classes, height * width) for x, (height, width) in zip(maps, sizes, strict=True)]
            logits, scores = torch.cat(rows, 2).split((4 * BINS, self.classes), 1)
            logits = logits.reshape(-1, 4, BINS, sum(height * width for height, width in sizes))
            shares = (logits - logits.amax(2, keepdim=True)).exp()
            weighted, whole = (torch.stack((self.bins, torch.ones_like(self.bins))).to(shares.dtype) @ shares).unbind(2)
            return weighted / whole, scores, centres, strides
        # Cell by cell: views where memory is channels last, and a distribution's numbers stand together.
        rows = [x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps]
        boxes = torch.cat([x[..., : 4 * BINS] for x in rows], 1).unflatten(2, (4, BINS))
        scores = torch.cat([x[..., 4 * BINS :] for x in rows], 1)
        return (boxes.softmax(3) @ self.bins.to(boxes.dtype)).transpose(1, 2), scores.transpose(1, 2), centres, strides

    def decode(self, raw: RawPrediction) -> Prediction:
        """Pixels and probabilities."""
        distances, scores, centres, strides = self.distances(raw.maps)
        before, after = distances.split(2, 1)
        low, high = centres - before, centres + after
        boxes = torch.cat(((low + high) / 2, high - low), 1) * strides
        return Prediction(torch.cat((boxes, scores.sigmoid()), 1), raw.maps, raw.extra, raw.prototypes)

    def forward(self, levels: Sequence[Float[Tensor, "batch channels height width"]]) -> Prediction:
        """Three maps to what is in them."""
        return self.decode(self.raw(levels))


class _DetectAndMore(Detect):
    """Boxes, classes, and `extras` further numbers a cell."""

    def __init__(self, channels: Sequence[int], classes: int, extras: int) -> None:
        super().__init__(channels, classes)
        self.extras = extras
        width = max(channels[0] // 4, extras)
        self.extra = nn.ModuleList(
            nn.Sequential(ConvNorm(inputs, width, 3), ConvNorm(width, width, 3), nn.Conv2d(width, extras, 1)) for inputs in channels
        )

    def raw(self, levels: Sequence[Float[Tensor, "batch channels height width"]]) -> RawPrediction:
        """Logits of every level, and the further numbers of every cell."""
        extra = torch.cat([head(x).flatten(2) for x, head in zip(levels, self.extra, strict=True)], 2)
        return RawPrediction(super().raw(levels).maps, extra)


class Segment(_DetectAndMore):
    """Boxes, classes, and masks: each is a sum of 32 prototypes, weighted by the cell's coefficients.

    References:
        Bolya et al., YOLACT, 2019; the head of YOLOv8-seg.
    """

    def __init__(self, channels: Sequence[int], classes: int, hidden: int = 64, masks: int = 32) -> None:
        super().__init__(channels, classes, masks)
        self.prototypes = nn.Sequential(
            ConvNorm(channels[0], hidden, 3), nn.ConvTranspose2d(hidden, hidden, 2, 2), ConvNorm(hidden, hidden, 3), ConvNorm(hidden, masks)
        )

    def raw(self, levels: Sequence[Float[Tensor, "batch channels height width"]]) -> RawPrediction:
        """As of boxes, with the prototypes at a quarter of the picture's size."""
        return super().raw(levels)._replace(prototypes=self.prototypes(levels[0]))


class Pose(_DetectAndMore):
    """Boxes, classes, and keypoints.

    Args:
        channels: of the three levels.
        classes: number of classes.
        keypoints: number of keypoints and numbers each: 2 for x and y, 3 with visibility.
    """

    def __init__(self, channels: Sequence[int], classes: int, keypoints: tuple[int, int] = (17, 3)) -> None:
        super().__init__(channels, classes, keypoints[0] * keypoints[1])
        self.keypoints = keypoints

    def decode(self, raw: RawPrediction) -> Prediction:
        """Keypoints in pixels; visibility as a probability."""
        assert raw.extra is not None
        found = super().decode(raw)
        centres, strides = anchor_points([(x.shape[2], x.shape[3]) for x in raw.maps], raw.extra)
        numbers = raw.extra.unflatten(1, self.keypoints)
        places = (2 * numbers[:, :, :2] + (centres - 0.5)) * strides
        return found._replace(extra=torch.cat((places, numbers[:, :, 2:].sigmoid()), 2).flatten(1, 2))


class OrientedDetect(_DetectAndMore):
    """Boxes that are turned by an angle from -pi/4 to 3 pi/4, and classes."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__(channels, classes, 1)

    def raw(self, levels: Sequence[Float[Tensor, "batch channels height width"]]) -> RawPrediction:
        """As of boxes, with the angle in radians."""
        raw = super().raw(levels)
        assert raw.extra is not None
        return raw._replace(extra=(raw.extra.sigmoid() - 0.25) * math.pi)

    def decode(self, raw: RawPrediction) -> Prediction:
        """The distances are measured along the turned sides."""
        assert raw.extra is not None
        distances, scores, centres, strides = self.distances(raw.maps)
        cosine, sine = raw.extra.cos(), raw.extra.sin()
        x, y = ((distances[:, 2:] - distances[:, :2]) / 2).split(1, 1)
        centre = torch.cat((x * cosine - y * sine, x * sine + y * cosine), 1) + centres
        boxes = torch.cat((centre, distances[:, :2] + distances[:, 2:]), 1) * strides
        return Prediction(torch.cat((boxes, scores.sigmoid()), 1), raw.maps, raw.extra)


def masks_of(
    prototypes: Float[Tensor, "masks height width"], coefficients: Float[Tensor, "objects masks"], size: tuple[int, int]
) -> Float[Tensor, "objects size_height size_width"]:
    """Logits of the objects' masks at a picture's size."""
    logits = torch.einsum("om,mhw->ohw", coefficients, prototypes)
    return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
