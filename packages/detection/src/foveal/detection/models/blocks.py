"""The parts that YOLOv13 is made of: depthwise-separable convolutions and area attention.

Maps are (batch, channels, height, width). Every normalisation is a batch norm with epsilon 1e-3 and momentum 0.03, as the authors set it
everywhere. In `channels_last` memory the attention reads the map as it lies; otherwise its tokens are copied once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.kernels import attention
from foveal.kernels.convolution import join

#: Channels of one attention head of the network.
HEAD_DIM = 32


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with the authors' constants."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.03)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, SiLU.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel_size: odd; the map keeps its size at stride 1.
        stride: of the convolution.
        groups: of the convolution.
        activated: whether SiLU follows.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, activated: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm = BatchNorm(outputs)
        self.activated = activated

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height_out width_out"]:
        """Map to map."""
        y = self.norm(self.conv(x))
        return F.silu(y) if self.activated else y


class DSConv(nn.Module):
    """Depthwise-separable convolution: depthwise, pointwise, one batch norm, SiLU; nothing between the two convolutions."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel_size, stride, kernel_size // 2, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height_out width_out"]:
        """Map to map."""
        return F.silu(self.norm(self.pointwise(self.depthwise(x))))


class DSBottleneck(nn.Module):
    """Two depthwise-separable convolutions, and a shortcut where the widths agree."""

    def __init__(
        self, inputs: int, outputs: int, shortcut: bool = True, expansion: float = 0.5, kernel_sizes: tuple[int, int] = (3, 5)
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = int(outputs * expansion)
        self.first = DSConv(inputs, hidden, kernel_sizes[0])
        self.second = DSConv(hidden, outputs, kernel_sizes[1])
        self.shortcut = shortcut and inputs == outputs

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class DSC3k(nn.Module):
    """Two ways side by side, one through a chain of bottlenecks, and a convolution that merges them (the layout of C3)."""

    def __init__(
        self, inputs: int, outputs: int, repeats: int = 1, shortcut: bool = True, expansion: float = 0.5, kernel_sizes: tuple[int, int] = (3, 5)
    ) -> None:
        super().__init__()
        hidden = int(outputs * expansion)
        self.main = ConvNorm(inputs, hidden)
        self.side = ConvNorm(inputs, hidden)
        self.blocks = nn.Sequential(*(DSBottleneck(hidden, hidden, shortcut, 1.0, kernel_sizes) for _ in range(repeats)))
        self.merge = ConvNorm(2 * hidden, outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        return self.merge(torch.cat((self.blocks(self.main(x)), self.side(x)), 1))


class DSC3k2(nn.Module):
    """The map is split in two; one half goes through a chain of blocks, and every link of the chain is merged (the layout of C2f).

    Args:
        inputs: channels in.
        outputs: channels out.
        repeats: links of the chain.
        nested: whether a link is a DSC3k of two bottlenecks, or one bottleneck.
        expansion: width of a half over `outputs`.
        shortcut: of the bottlenecks.
    """

    def __init__(self, inputs: int, outputs: int, repeats: int = 1, nested: bool = False, expansion: float = 0.5, shortcut: bool = True) -> None:
        super().__init__()
        half = int(outputs * expansion)
        self.split = ConvNorm(inputs, 2 * half)

        def link() -> nn.Module:
            return DSC3k(half, half, 2, shortcut, 1.0, (3, 7)) if nested else DSBottleneck(half, half, shortcut, 1.0, (3, 7))

        self.blocks = nn.ModuleList(link() for _ in range(repeats))
        self.merge = ConvNorm((2 + repeats) * half, outputs)

    def forward(self, *maps: Float[Tensor, "batch some_inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map. Several are joined; one of half the size is doubled."""
        parts = list(self.split(join(*maps)).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat(parts, 1))


def attend_in_areas(
    query: Float[Tensor, "batch channels height width"],
    key: Float[Tensor, "batch channels height width"],
    value: Float[Tensor, "batch channels height width"],
    heads: int,
    areas: int,
) -> Float[Tensor, "batch channels height width"]:
    """Softmax attention of the cells of a map, each to the cells of its own area: cells row by row, cut into `areas` equal pieces.

    Raises:
        ValueError: the cells cannot be shared among the areas.
    """
    batch, channels, height, width = value.shape
    if height * width % areas:
        raise ValueError(f"a map of {height} x {width} cells cannot be cut into {areas} equal areas; make the picture's sides multiples of 32")

    def tokens(x: Tensor) -> Tensor:
        # Channels last: a view where the memory is, one copy where it is not.
        return x.permute(0, 2, 3, 1).reshape(batch * areas, height * width // areas, heads, channels // heads)

    if torch.jit.is_tracing():  # exporters know plain operators only
        rows, columns, contents = (tokens(part).transpose(1, 2) for part in (query, key, value))
        mixed = (torch.softmax(rows * (channels // heads) ** -0.5 @ columns.transpose(2, 3), -1) @ contents).transpose(1, 2)
    else:
        mixed = attention(tokens(query), tokens(key), tokens(value), layout="bnhd")
    return mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class AreaAttention(nn.Module):
    r"""Area attention on a convolutional map: strips of whole rows attend to themselves, a depthwise 5 x 5 convolution carries position.

    .. math:: y = W_o\big(\mathrm{softmax}(q k^\top / \sqrt d)\, v + \mathrm{DWC}_{5}(v)\big)

    Every projection is a 1 x 1 convolution with batch norm. `foveal.kernels.nn.AreaAttention` is the mechanism on tokens, with plain projections.

    References:
        Tian et al., YOLOv12, 2025, section 3.2; Lei et al., YOLOv13, 2025, whose form has one projection for q and k and a kernel of 5.
    """

    def __init__(self, dim: int, heads: int, areas: int = 1) -> None:
        super().__init__()
        self.heads, self.areas = heads, areas
        self.query_key = ConvNorm(dim, 2 * dim, activated=False)
        self.value = ConvNorm(dim, dim, activated=False)
        self.project = ConvNorm(dim, dim, activated=False)
        self.position = ConvNorm(dim, dim, 5, groups=dim, activated=False)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Map to map."""
        query, key = self.query_key(x).chunk(2, 1)
        value = self.value(x)
        return self.project(attend_in_areas(query, key, value, self.heads, self.areas) + self.position(value))


class AreaBlock(nn.Module):
    """Area attention and a two-layer perceptron, each added to the map; no normalisation before them."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, areas: int) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attention = AreaAttention(dim, heads, areas)
        self.mlp = nn.Sequential(ConvNorm(dim, hidden), ConvNorm(hidden, dim, activated=False))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Map to map."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class AreaStage(nn.Module):
    """Groups of two area blocks in a chain, every link merged (A2C2f).

    Args:
        inputs: channels in.
        outputs: channels out.
        repeats: groups of two blocks.
        areas: strips that a map is cut into; 1 is plain attention.
        scaled: whether the result is added to the input, scaled by a learned factor a channel that starts at 0.01 (scales L and X).
        mlp_ratio: hidden width of the perceptrons over their width.

    Raises:
        ValueError: half of `outputs` is not a multiple of 32, the width of a head.
    """

    def __init__(self, inputs: int, outputs: int, repeats: int, areas: int, scaled: bool = False, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        hidden = outputs // 2
        if hidden % HEAD_DIM:
            raise ValueError(f"half of outputs must be a multiple of {HEAD_DIM}; got {outputs}")
        heads = hidden // HEAD_DIM
        self.reduce = ConvNorm(inputs, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(AreaBlock(hidden, heads, mlp_ratio, areas) for _ in range(2))) for _ in range(repeats)
        )  # fmt: skip
        self.merge = ConvNorm((1 + repeats) * hidden, outputs)
        self.layer_scale = nn.Parameter(torch.full((outputs,), 0.01)) if scaled else None

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        parts = [self.reduce(x)]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        y = self.merge(torch.cat(parts, 1))
        return y if self.layer_scale is None else x + self.layer_scale[:, None, None] * y
