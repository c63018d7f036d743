"""BEVANet: the class of every pixel in real time, from a branch of meaning with large-kernel attention and a branch of detail at an eighth.

Huang et al., BEVANet: Bilateral Efficient Visual Attention Network for Real-time Semantic Segmentation, ICIP 2025 (arXiv:2508.07300), after
PIDNet. Parameters with 19 classes and without the two heads that only training uses: 58,599,296, and 15,090,784 of the small one. The boundary's
branch decides at each place how much of detail and of meaning goes into the answer. Where the authors cut sides to whole eighths, any size goes here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.large_kernel import KERNELS, ChannelNorm, EfficientAttentionBlock, KernelAttention, SeparableKernel


@dataclass(frozen=True)
class BEVANetConfig:
    """Sizes of a network; the defaults are the published larger one.

    Attributes:
        classes: number of classes.
        channels: width of the stem; 64, or 32 of the small one.
        blocks: residual blocks of the stages at a quarter, an eighth and a sixteenth; (2, 2, 4), or (2, 2, 3) of the small one.
        windows: large kernels of the semantic branch at 1/32 and 1/64, and of the detail branch: each 7, 11, 23 or 35.
        expansion: hidden channels of the perceptrons over their channels.
        pyramid_channels: of a branch of the pyramid pooling.
        head_channels: hidden channels of the heads.
        auxiliary: whether there are the heads of detail and boundary, which training needs and inference does not.

    Raises:
        ValueError: sizes that cannot be.
    """

    classes: int = 19
    channels: int = 64
    blocks: tuple[int, int, int] = (2, 2, 4)
    windows: tuple[int, int, int] = (35, 35, 23)
    expansion: float = 4.0
    pyramid_channels: int = 96
    head_channels: int = 128
    auxiliary: bool = True

    def __post_init__(self) -> None:
        for name in ("blocks", "windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.classes, self.channels, self.pyramid_channels, self.head_channels) < 1 or self.expansion <= 0:
            raise ValueError(f"classes, channels and expansion must be positive; got {self}")
        if len(self.blocks) != 3 or min(self.blocks) < 1:
            raise ValueError(f"blocks must be three positive numbers; got {self.blocks}")
        if len(self.windows) != 3 or any(window not in KERNELS for window in self.windows):
            raise ValueError(f"windows must be three of {', '.join(map(str, KERNELS))}; got {self.windows}")


#: The published sizes.
SIZES: dict[str, dict[str, Any]] = {"small": {"channels": 32, "blocks": (2, 2, 3)}, "base": {"channels": 64, "blocks": (2, 2, 4)}}


class RawScene(NamedTuple):
    """Logits at an eighth of the picture's sides, rounded up.

    Attributes:
        classes: the answer.
        detail: classes as the detail branch alone sees them.
        boundary: whether a place lies at the boundary of two classes.
    """

    classes: Float[Tensor, "batch classes height width"]
    detail: Float[Tensor, "batch classes height width"]
    boundary: Float[Tensor, "batch 1 height width"]


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, bias: bool = False) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias), nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a shortcut.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution and the shortcut.
        activated: whether ReLU follows the sum.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, activated: bool = True) -> None:
        super().__init__()
        self.first, self.second = conv_norm(inputs, outputs, 3, stride), conv_norm(outputs, outputs, 3)
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()
        self.activated = activated

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height_out width_out"]:
        """Map to map."""
        y = self.second(F.relu(self.first(x))) + self.shortcut(x)
        return F.relu(y) if self.activated else y


class Bottleneck(nn.Module):
    """Pointwise, 3 x 3 and pointwise convolution to twice the channels, with a shortcut and without a last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv_norm(channels, channels), conv_norm(channels, channels, 3)
        self.third, self.shortcut = conv_norm(channels, 2 * channels), conv_norm(channels, 2 * channels)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        return self.third(F.relu(self.second(F.relu(self.first(x))))) + self.shortcut(x)


class NormConv(nn.Module):
    """Batch norm, ReLU, convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=bias)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        return self.conv(F.relu(self.norm(x)))


class AttentionStage(nn.Module):
    """A residual block, then blocks of large-kernel attention, each followed by a layer norm over channels."""

    def __init__(self, inputs: int, outputs: int, window: int, expansion: float, repeats: int, stride: int) -> None:
        super().__init__()
        self.down = Residual(inputs, outputs, stride)
        self.blocks = nn.ModuleList(EfficientAttentionBlock(outputs, window, expansion) for _ in range(repeats))
        self.norms = nn.ModuleList(ChannelNorm(outputs) for _ in range(repeats))

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height_out width_out"]:
        """Map to map."""
        x = self.down(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x))
        return x


class Meeting(nn.Module):
    """The detail branch takes from the semantic one where the two agree (PagFM)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.detail, self.meaning = conv_norm(channels, hidden), conv_norm(channels, hidden)

    def forward(self, detail: Float[Tensor, "batch channels height width"], meaning: Float[Tensor, "batch channels h w"]) -> Tensor:
        """Two maps to one of the finer size."""
        agreement = (self.detail(detail) * enlarge(self.meaning(meaning), detail)).sum(1, keepdim=True)
        return torch.lerp(detail, enlarge(meaning, detail), torch.sigmoid(agreement))


class KernelPyramid(nn.Module):
    """Contexts of six reaches, each added to the one before it: the place, two pools, a large kernel, quarters of the picture, all of it (DLKPPM)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.place = NormConv(inputs, hidden)
        self.pools = nn.ModuleList(NormConv(inputs, hidden) for _ in range(4))
        self.norm, self.scale = nn.BatchNorm2d(hidden), nn.Parameter(torch.full((hidden,), 1e-2))
        self.attention = KernelAttention(hidden, SeparableKernel(hidden, 35))
        self.process = nn.ModuleList(NormConv(hidden, hidden, 3, dilation) for dilation in (2, 2, 1, 1, 1))
        self.merge, self.shortcut = NormConv(6 * hidden, outputs), NormConv(inputs, outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        place = self.place(x)
        pooled = (F.avg_pool2d(x, 5, 2, 2), F.avg_pool2d(x, 9, 4, 4), F.adaptive_avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 1))
        contexts = [enlarge(branch(part), x) for branch, part in zip(self.pools, pooled, strict=True)]
        contexts.insert(2, place + self.scale[:, None, None] * self.attention(self.norm(place)))
        reached = [place]
        for process, context in zip(self.process, contexts, strict=True):
            reached.append(process(context + reached[-1]))
        return self.merge(torch.cat(reached, 1)) + self.shortcut(x)


class BoundaryFusion(nn.Module):
    """Detail at boundaries, meaning inside of them, and the sum of both everywhere (BGAF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.detail, self.meaning, self.merge = (NormConv(channels, channels, 3) for _ in range(3))

    def forward(self, detail: Float[Tensor, "batch channels height width"], meaning: Tensor, boundary: Tensor) -> Tensor:
        """Three maps of a size to one."""
        detail, meaning = self.detail(detail), self.meaning(meaning)
        return self.merge(torch.lerp(meaning, detail, torch.sigmoid(boundary)) + detail + meaning)


class Head(nn.Module):
    """A 3 x 3 and a pointwise convolution, each after batch norm and ReLU."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = NormConv(inputs, hidden, 3), NormConv(hidden, outputs, bias=True)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to logits."""
        return self.second(self.first(x))


class BEVANet(nn.Module):
    """The network. A batch in training needs two pictures or more: some batch norms see one place of each.

    Args:
        config: sizes.
    """

    def __init__(self, config: BEVANetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BEVANetConfig()
        c, (near, far, fine), expansion = config.channels, config.windows, config.expansion
        self.stem = nn.Sequential(conv_norm(3, c, 3, 2, bias=True), nn.ReLU(), conv_norm(c, c, 3, 2, bias=True), nn.ReLU())
        self.quarter = _residuals(c, c, config.blocks[0])
        self.eighth = _residuals(c, 2 * c, config.blocks[1], 2)

        # Meaning, at 1/16, 1/32 and 1/64.
        self.semantic3 = _residuals(2 * c, 4 * c, config.blocks[2], 2)
        self.semantic4 = AttentionStage(4 * c, 8 * c, near, expansion, 2, 2)
        self.semantic5 = AttentionStage(8 * c, 16 * c, far, expansion, 2, 2)
        self.pyramid = KernelPyramid(16 * c, config.pyramid_channels, 4 * c)

        # Detail, always at an eighth, told twice of the meaning.
        self.detail3 = _residuals(2 * c, 2 * c, config.blocks[0])
        self.told3, self.meeting3 = conv_norm(4 * c, 2 * c), Meeting(2 * c, c)
        self.detail4 = AttentionStage(2 * c, 2 * c, fine, expansion, 1, 1)
        self.told4, self.meeting4 = conv_norm(8 * c, 2 * c), Meeting(2 * c, c)
        self.detail5, self.boundary5 = Bottleneck(2 * c), Bottleneck(2 * c)

        self.fusion = BoundaryFusion(4 * c)
        self.head = Head(4 * c, config.head_channels, config.classes)
        if config.auxiliary:
            self.detail_head = Head(2 * c, config.head_channels, config.classes)
            self.boundary_head = Head(2 * c, c, 1)

    def _branches(self, image: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits; the detail branch after its first and its second meeting."""
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"image must have shape (batch, 3, height, width); got {tuple(image.shape)}")
        x = F.relu(self.eighth(F.relu(self.quarter(self.stem(image)))))
        meaning = F.relu(self.semantic3(x))
        # The authors' ReLU works in place, so that their detail head too sees what comes after it.
        first = F.relu(self.meeting3(self.detail3(x), self.told3(meaning)))
        meaning = self.semantic4(meaning)
        second = self.meeting4(self.detail4(first), self.told4(meaning))
        meaning = enlarge(self.pyramid(self.semantic5(meaning)), second)
        return self.head(self.fusion(self.detail5(second), meaning, self.boundary5(second))), first, second

    def raw(self, image: Float[Tensor, "batch 3 height width"]) -> RawScene:
        """Logits of the answer, the detail and the boundary, for the losses.

        Raises:
            ValueError: a network without the heads of training.
        """
        if not self.config.auxiliary:
            raise ValueError("the heads of detail and boundary are missing; build the network with auxiliary=True")
        classes, first, second = self._branches(image)
        return RawScene(classes, self.detail_head(first), self.boundary_head(second))

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes eighth_height eighth_width"]:
        """Logits at an eighth of the sides, of a picture whose red, green and blue are normalised as ImageNet's."""
        return self._branches(image)[0]


def _residuals(inputs: int, outputs: int, repeats: int, stride: int = 1) -> nn.Sequential:
    """Residual blocks, the last without its ReLU if there are several."""
    last = repeats - 1
    return nn.Sequential(
        *(
            Residual(outputs if place else inputs, outputs, 1 if place else stride, activated=place == 0 or place < last)
            for place in range(repeats)
        )
    )  # fmt: skip


def enlarge(x: Float[Tensor, "batch channels h w"], like: Float[Tensor, "batch others height width"]) -> Float[Tensor, "batch channels height width"]:
    """A map at the size of another, by bilinear interpolation between the middles of cells."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
