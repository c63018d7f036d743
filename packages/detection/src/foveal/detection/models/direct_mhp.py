r"""DirectMHP: heads of many people and where each is turned to, over the whole circle, in one look.

Zhou et al., DirectMHP: Direct 2D Multi-Person Head Pose Estimation with Full-range Angles, 2023 (arXiv:2302.01110): YOLOv5 (release 5.0, four
levels) whose anchors say, beside a box and how sure it is, three Euler angles. 12,375,084 parameters of the small network, 35,478,348 of the
medium one. A head's axes, in a picture whose x points right, y down and z to the viewer, are the columns of

.. math:: R = R_x(\text{pitch})\, R_y(-\text{yaw})\, R_z(\text{roll})

so that the nose, the third column, points up with positive pitch, to the picture's left with positive yaw, and away from the viewer beyond 90
degrees of yaw. Pitch and roll lie in -90..90 degrees, yaw in -180..180.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import ConvNorm

STRIDES = (8, 16, 32, 64)
#: Width and height of the published anchors in pixels, three a level.
ANCHORS = (
    ((19, 27), (44, 40), (38, 94)), ((96, 68), (86, 152), (180, 137)), ((140, 301), (303, 264), (238, 542)), ((436, 615), (739, 380), (925, 792)),
)  # fmt: skip
#: Degrees of pitch, yaw and roll from the least to the greatest value.
SPANS = (180.0, 360.0, 180.0)
#: The published sizes, as (width, depth).
SIZES = {"small": (0.5, 0.33), "medium": (0.75, 0.67)}
#: Numbers of an anchor: centre, size, objectness, class, pitch, yaw, roll.
NUMBERS = 9


@dataclass(frozen=True)
class DirectMHPConfig:
    """Sizes of a network; the defaults are the published small one.

    Attributes:
        width: channels over YOLOv5's; 0.5 or 0.75 are published.
        depth: repeats over YOLOv5's; 0.33 or 0.67 are published.
        anchors: width and height in pixels of three boxes for each of four levels. The published ones suit pictures of 1,280 pixels.

    Raises:
        ValueError: sizes that cannot be.
    """

    width: float = 0.5
    depth: float = 0.33
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ANCHORS

    def __post_init__(self) -> None:
        anchors = tuple(tuple((float(pair[0]), float(pair[1])) for pair in level) for level in self.anchors)
        object.__setattr__(self, "anchors", anchors)
        if self.width <= 0 or self.depth <= 0:
            raise ValueError(f"width and depth must be positive; got {self.width} and {self.depth}")
        if [len(level) for level in anchors] != [3, 3, 3, 3] or min(side for level in anchors for pair in level for side in pair) <= 0:
            raise ValueError(f"anchors must be three positive (width, height) for each of four levels; got {self.anchors}")

    def channels(self, published: int) -> int:
        """Width of a layer, a multiple of eight."""
        return math.ceil(published * self.width / 8) * 8

    def repeats(self, published: int) -> int:
        """Blocks of a stage."""
        return max(round(published * self.depth), 1)


class HeadPoses(NamedTuple):
    """What every anchor says.

    Attributes:
        boxes: centre x, centre y, width, height in pixels.
        scores: from 0 to 1.
        angles: pitch, yaw, roll in degrees.
    """

    boxes: Float[Tensor, "batch anchors 4"]
    scores: Float[Tensor, "batch anchors"]
    angles: Float[Tensor, "batch anchors 3"]


class PointBlock(nn.Module):
    """A pointwise and a 3 x 3 convolution, with a shortcut or without."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = ConvNorm(channels, channels), ConvNorm(channels, channels, 3), shortcut

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Two ways side by side, one through a chain of blocks, merged by a pointwise convolution."""

    def __init__(self, inputs: int, outputs: int, repeats: int, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.main, self.side = ConvNorm(inputs, half), ConvNorm(inputs, half)
        self.blocks = nn.Sequential(*(PointBlock(half, shortcut) for _ in range(repeats)))
        self.merge = ConvNorm(2 * half, outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        return self.merge(torch.cat((self.blocks(self.main(x)), self.side(x)), 1))


class PooledContext(nn.Module):
    """The greatest values within windows of 3, 5 and 7 places beside the map itself (SPP)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = inputs // 2
        self.reduce, self.merge = ConvNorm(inputs, half), ConvNorm(4 * half, outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        x = self.reduce(x)
        return self.merge(torch.cat((x, *(F.max_pool2d(x, window, 1, window // 2) for window in (3, 5, 7))), 1))


class PoseHead(nn.Module):
    """A pointwise convolution a level, and what its numbers mean.

    Args:
        levels: channels of the four levels.
        anchors: as in `DirectMHPConfig`.
    """

    anchors: Tensor
    anchor_cells: Tensor

    def __init__(self, levels: tuple[int, ...], anchors: tuple[tuple[tuple[float, float], ...], ...]) -> None:
        super().__init__()
        pixels = torch.tensor(anchors)
        self.register_buffer("anchors", pixels)
        self.register_buffer("anchor_cells", pixels / torch.tensor(STRIDES).view(-1, 1, 1))
        self.out = nn.ModuleList(nn.Conv2d(channels, 3 * NUMBERS, 1) for channels in levels)
        for layer, stride in zip(self.out, STRIDES, strict=True):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            with torch.no_grad():
                bias = layer.bias.view(3, NUMBERS)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)  # eight objects in a picture of 640 pixels
                bias[:, 5] += math.log(0.6 / (1 - 0.99))

    def forward(self, maps: tuple[Tensor, ...]) -> list[Float[Tensor, "batch 3 height width 9"]]:
        """Logits of every anchor, level by level."""
        return [layer(x).unflatten(1, (3, NUMBERS)).permute(0, 1, 3, 4, 2) for layer, x in zip(self.out, maps, strict=True)]

    def decode(self, raw: list[Float[Tensor, "batch 3 height width 9"]]) -> HeadPoses:
        """Logits to boxes, scores and angles."""
        boxes, scores, angles = [], [], []
        for level, (numbers, stride) in enumerate(zip(raw, STRIDES, strict=True)):
            height, width = numbers.shape[2:4]
            values = numbers.sigmoid()
            column, row = torch.arange(width, device=values.device), torch.arange(height, device=values.device)
            cells = torch.stack(torch.meshgrid(column, row, indexing="xy"), -1).to(values.dtype)
            centre = (2 * values[..., :2] - 0.5 + cells) * stride
            size = (2 * values[..., 2:4]) ** 2 * self.anchors[level].to(values.dtype)[:, None, None]
            boxes.append(torch.cat((centre, size), -1).flatten(1, 3))
            scores.append((values[..., 4] * values[..., 5]).flatten(1))
            angles.append(to_degrees(values[..., 6:]).flatten(1, 3))
        return HeadPoses(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(angles, 1))


class DirectMHP(nn.Module):
    """The network. Sides of a picture must be multiples of 64.

    Args:
        config: sizes.
    """

    def __init__(self, config: DirectMHPConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DirectMHPConfig()
        c1, c2, c3, c4, c5, c6 = (config.channels(published) for published in (64, 128, 256, 512, 768, 1024))
        three, nine = config.repeats(3), config.repeats(9)

        # Backbone, strides 2 to 64.
        self.stem = ConvNorm(12, c1, 3)
        self.down2, self.stage2 = ConvNorm(c1, c2, 3, 2), C3(c2, c2, three)
        self.down3, self.stage3 = ConvNorm(c2, c3, 3, 2), C3(c3, c3, nine)
        self.down4, self.stage4 = ConvNorm(c3, c4, 3, 2), C3(c4, c4, nine)
        self.down5, self.stage5 = ConvNorm(c4, c5, 3, 2), C3(c5, c5, three)
        self.down6, self.context, self.stage6 = ConvNorm(c5, c6, 3, 2), PooledContext(c6, c6), C3(c6, c6, three, False)

        # Neck: down the pyramid, and up again.
        self.reduce5, self.top_down5 = ConvNorm(c6, c5), C3(2 * c5, c5, three, False)
        self.reduce4, self.top_down4 = ConvNorm(c5, c4), C3(2 * c4, c4, three, False)
        self.reduce3, self.neck3 = ConvNorm(c4, c3), C3(2 * c3, c3, three, False)
        self.up4, self.neck4 = ConvNorm(c3, c3, 3, 2), C3(2 * c3, c4, three, False)
        self.up5, self.neck5 = ConvNorm(c4, c4, 3, 2), C3(2 * c4, c5, three, False)
        self.up6, self.neck6 = ConvNorm(c5, c5, 3, 2), C3(2 * c5, c6, three, False)
        self.head = PoseHead((c3, c4, c5, c6), config.anchors)

    def raw(self, image: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch 3 level_height level_width 9"]]:
        """Logits of every anchor at strides 8 to 64, for the loss: centre, size, objectness, class, pitch, yaw, roll."""
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % 64 or image.shape[3] % 64 or 0 in image.shape:
            raise ValueError(f"image must have shape (batch, 3, height, width) with sides that are multiples of 64; got {tuple(image.shape)}")
        # Four neighbouring pixels side by side: rows fastest, then columns.
        folded = torch.cat([image[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)
        x = self.stage2(self.down2(self.stem(folded)))
        p3 = self.stage3(self.down3(x))
        p4 = self.stage4(self.down4(p3))
        p5 = self.stage5(self.down5(p4))
        p6 = self.stage6(self.context(self.down6(p5)))

        inner6 = self.reduce5(p6)
        inner5 = self.reduce4(self.top_down5(torch.cat((_double(inner6), p5), 1)))
        inner4 = self.reduce3(self.top_down4(torch.cat((_double(inner5), p4), 1)))
        out3 = self.neck3(torch.cat((_double(inner4), p3), 1))
        out4 = self.neck4(torch.cat((self.up4(out3), inner4), 1))
        out5 = self.neck5(torch.cat((self.up5(out4), inner5), 1))
        out6 = self.neck6(torch.cat((self.up6(out5), inner6), 1))
        return self.head((out3, out4, out5, out6))

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> HeadPoses:
        """Heads in a picture whose pixels are in 0..1, red first."""
        return self.head.decode(self.raw(image))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def to_degrees(share: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Pitch, yaw and roll in 0..1 to degrees."""
    return (share - 0.5) * share.new_tensor(SPANS)


def to_share(degrees: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Pitch, yaw and roll in degrees to 0..1, as the network says them."""
    return degrees / degrees.new_tensor(SPANS) + 0.5


def axes(degrees: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """A head's axes (columns: its right-hand side of the picture, its chin, its nose) of pitch, yaw and roll, in the picture's x, y and depth."""
    (pitch, yaw, roll) = torch.deg2rad(degrees).unbind(-1)
    yaw = -yaw
    p, q, y, z, r, s = pitch.cos(), pitch.sin(), yaw.cos(), yaw.sin(), roll.cos(), roll.sin()
    rows = (
        (y * r, -y * s, z),
        (p * s + q * z * r, p * r - q * z * s, -q * y),
        (q * s - p * z * r, q * r + p * z * s, p * y),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
