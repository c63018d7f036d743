"""Large-kernel attention: what a place is multiplied with comes from a window of up to 35 x 35, made of a few narrow depthwise kernels.

Guo et al., Visual Attention Network, 2022 (arXiv:2202.09741); Lau et al., Large Separable Kernel Attention, 2023 (arXiv:2309.01439), here
`SeparableKernel`; Huang et al., BEVANet, ICIP 2025 (arXiv:2508.07300), here `SelectedKernel`, whose rows and columns are weighed by
`KernelSelection`, and `EfficientAttentionBlock`. Maps are (batch, channels, height, width) of any height and width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

#: Window -> (side of the dense depthwise kernel, length of the dilated ones, their dilation).
KERNELS = {7: (3, 3, 2), 11: (3, 5, 2), 23: (5, 7, 3), 35: (5, 11, 3)}


def depthwise(channels: int, kernel: int | tuple[int, int] = 3, dilation: int = 1) -> nn.Conv2d:
    """Depthwise convolution with bias that keeps the size of a map."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (height - 1) // 2, dilation * (width - 1) // 2)
    return nn.Conv2d(channels, channels, (height, width), padding=padding, dilation=dilation, groups=channels)


def _lengths(window: int) -> tuple[int, int, int]:
    if window not in KERNELS:
        raise ValueError(f"a large kernel's window must be one of {', '.join(map(str, KERNELS))}; got {window}")
    return KERNELS[window]


class SeparableKernel(nn.Module):
    """Multiplies a map by what four narrow convolutions in a row and a pointwise one make of it (LSKA).

    Args:
        channels: of the map.
        window: side of the square that a place sees: 7, 11, 23 or 35.

    Raises:
        ValueError: another window.
    """

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        near, far, dilation = _lengths(window)
        self.row, self.column = depthwise(channels, (1, near)), depthwise(channels, (near, 1))
        self.far_row, self.far_column = depthwise(channels, (1, far), dilation), depthwise(channels, (far, 1), dilation)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        return x * self.mix(self.far_column(self.far_row(self.column(self.row(x)))))


class GateLayer(nn.Module):
    """Pointwise and depthwise convolution, batch norm, ReLU, on a map of one place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        self.depthwise = depthwise(outputs)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Float[Tensor, "batch inputs 1 1"]) -> Float[Tensor, "batch outputs 1 1"]:
        """Pooled map to gate."""
        return F.relu(self.norm(self.depthwise(self.pointwise(x))))


class KernelSelection(nn.Module):
    """Weighs three maps of kernels of different shape against each other, by channel and by place (CKS).

    The gate of a channel comes from the mean of the maps' sum, that of a place from a 7 x 7 convolution of the mean and greatest over channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 32)
        self.reduce = GateLayer(channels, hidden)
        self.expand = nn.ModuleList(GateLayer(hidden, channels) for _ in range(3))
        self.place = nn.Conv2d(2, 3, 7, padding=3)

    def channel_gates(self, pooled: Float[Tensor, "batch channels 1 1"]) -> list[Tensor]:
        """A gate in 0..1 for each map, (batch, channels, 1, 1)."""
        squeezed = self.reduce(pooled)
        return [torch.sigmoid(layer(squeezed)) for layer in self.expand]

    def forward(self, *maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Three maps to one."""
        total = maps[0] + maps[1] + maps[2]
        channels = self.channel_gates(total.mean((2, 3), keepdim=True))
        summary = torch.cat((total.mean(1, keepdim=True), total.amax(1, keepdim=True)), 1)
        places = torch.sigmoid(self.place(summary)).chunk(3, 1)
        first, second, third = (kept * channel * place for kept, channel, place in zip(maps, channels, places, strict=True))
        return first + second + third


class SelectedKernel(nn.Module):
    """Multiplies a map by a mixture of a dense, a wide and a tall depthwise kernel, the latter two dilated and after the first (SDLSKA).

    Args:
        channels: of the map.
        window: as in `SeparableKernel`.

    Raises:
        ValueError: another window.
    """

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        near, far, dilation = _lengths(window)
        self.dense = depthwise(channels, near)
        self.wide, self.tall = depthwise(channels, (1, far), dilation), depthwise(channels, (far, 1), dilation)
        self.select = KernelSelection(channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        dense = self.dense(x)
        return x * self.mix(self.select(dense, self.wide(dense), self.tall(dense)))


class KernelAttention(nn.Module):
    """A large kernel between two pointwise convolutions, with a shortcut around them."""

    def __init__(self, channels: int, kernel: SeparableKernel | SelectedKernel) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.kernel = kernel

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        return self.leave(self.kernel(F.gelu(self.enter(x)))) + x


class ConvPerceptron(nn.Module):
    """Two pointwise convolutions with a depthwise 3 x 3 one and GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.depthwise = depthwise(hidden)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        return self.project(F.gelu(self.depthwise(self.expand(x))))


class EfficientAttentionBlock(nn.Module):
    r"""Large-kernel attention and a perceptron, each normalised before and scaled by channel after (EVA).

    .. math:: y = x + s_1 \odot A(\mathrm{BN}\, x), \qquad z = y + s_2 \odot M(\mathrm{BN}\, y)

    Args:
        channels: of the map.
        window: as in `SeparableKernel`.
        expansion: hidden channels of the perceptron over `channels`.
    """

    def __init__(self, channels: int, window: int, expansion: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.attention = KernelAttention(channels, SelectedKernel(channels, window))
        self.perceptron = ConvPerceptron(channels, int(channels * expansion))
        self.scale1, self.scale2 = nn.Parameter(torch.full((channels,), 1e-2)), nn.Parameter(torch.full((channels,), 1e-2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        x = x + self.scale1[:, None, None] * self.attention(self.norm1(x))
        return x + self.scale2[:, None, None] * self.perceptron(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place; in `channels_last` memory nothing is copied."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Map to map."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
