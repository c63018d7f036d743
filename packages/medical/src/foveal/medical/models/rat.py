"""RAT, the Region Attention Transformer: restores images with attention inside regions of any shape, such as organs.

Yang et al., Region Attention Transformer for Medical Image Restoration, MICCAI 2024 (arXiv:2407.09268), as the released code computes it:
15,945,025 parameters. Pixels are sorted by region once an image and attended to as sequences of different lengths
(`foveal.kernels.attention_varlen`): cost and memory follow the regions' sizes, there is no mask of (pixel, pixel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.kernels import attention, attention_varlen

LAYERS_OF_A_BLOCK = 3


@dataclass(frozen=True)
class RATConfig:
    """Sizes of the network; the defaults are the published ones."""

    scale: int = 1  # output pixels of one input pixel: 1 restores, 2 or 4 enlarge
    channels: int = 1  # of the image
    width: int = 64  # channels at full size; they double with every halving
    middle_layers: int = 12  # of region and window attention, three a block
    encoder_blocks: tuple[int, ...] = (2, 2)  # convolutional blocks before each halving
    decoder_blocks: tuple[int, ...] = (2, 2)
    heads: int = 8
    window: int = 4  # side of the window attention's windows

    def __post_init__(self) -> None:
        for name in ("encoder_blocks", "decoder_blocks"):  # lists come from YAML and from headers of checkpoints
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(f"encoder_blocks and decoder_blocks must be of one length; got {self.encoder_blocks} and {self.decoder_blocks}")
        if self.middle_layers % LAYERS_OF_A_BLOCK:
            raise ValueError(f"middle_layers must be a multiple of {LAYERS_OF_A_BLOCK}; got {self.middle_layers}")
        if (self.width << len(self.encoder_blocks)) % self.heads:
            raise ValueError(f"the middle's {self.width << len(self.encoder_blocks)} channels must be a multiple of heads; got {self.heads}")

    @property
    def reduction(self) -> int:
        """Pixels of the output a side that one cell of the attention's maps stands for."""
        return 1 << len(self.encoder_blocks)

    @property
    def multiple(self) -> int:
        """What height and width of the output must be multiples of."""
        return self.reduction * self.window


class SortedRegions(NamedTuple):
    """Pixels of a batch in the order of their regions; made once, used by every layer.

    Attributes:
        order: place in the batch of each sorted pixel, (batch * pixels,).
        inverse: where each pixel went.
        bounds: where each region begins among the sorted pixels, (regions + 1,).
        longest: pixels of the largest region.
    """

    order: Int[Tensor, " pixels"]
    inverse: Int[Tensor, " pixels"]
    bounds: Int[Tensor, " regions+1"]
    longest: int


def sort_regions(regions: Int[Tensor, "batch height width"]) -> SortedRegions:
    """Sort the pixels of each image by region. Identifiers are any integers from 0, with gaps or not.

    Raises:
        ValueError: negative identifiers.
    """
    if regions.numel() and int(regions.min()) < 0:
        raise ValueError(f"regions must be numbered from 0 and cover every pixel; got {int(regions.min())}")
    batch = regions.shape[0]
    count = int(regions.max()) + 1 if regions.numel() else 1
    keys = (regions.flatten(1).long() + count * torch.arange(batch, device=regions.device)[:, None]).flatten()
    order = keys.argsort(stable=True)
    lengths = torch.unique_consecutive(keys[order], return_counts=True)[1]
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return SortedRegions(order, order.argsort(), bounds, int(lengths.max()) if len(lengths) else 0)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "batch width height columns"]) -> Float[Tensor, "batch width height columns"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvolutionBlock(nn.Module):
    """NAFNet's block: depthwise convolution with gates instead of activations, then two pointwise layers with a gate between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.conv1, self.conv2 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.channels = nn.Conv2d(width, width, 1)
        self.conv3, self.conv4, self.conv5 = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, x: Float[Tensor, "batch width height columns"]) -> Float[Tensor, "batch width height columns"]:
        y = _gated(self.conv2(self.conv1(self.norm1(x))))
        y = x + self.beta * self.conv3(y * self.channels(y.mean((2, 3), keepdim=True)))
        return y + self.gamma * self.conv5(_gated(self.conv4(self.norm2(y))))


class RegionAttention(nn.Module):
    """Multi-head attention inside regions. The logits' scale is heads ** -0.5, as in the released code."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "batch width height columns"], regions: SortedRegions) -> Float[Tensor, "batch width height columns"]:
        q, k, v = self.qkv(x).permute(0, 2, 3, 1).flatten(0, 2)[regions.order].unflatten(1, (3, self.heads, -1)).unbind(1)
        longest = regions.longest
        out = attention_varlen(q, k, v, regions.bounds, regions.bounds, longest, longest, scale=self.heads**-0.5)
        back = out.flatten(1)[regions.inverse].view(x.shape[0], *x.shape[2:], -1)
        return self.project(back.permute(0, 3, 1, 2))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows that do not overlap and do not shift, without positions; the same scale."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch width height columns"]) -> Float[Tensor, "batch width height columns"]:
        side, (batch, width, height, columns) = self.window, x.shape
        windows = x.view(batch, width, height // side, side, columns // side, side).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = self.project(attention(q, k, v, scale=self.heads**-0.5, layout="bnhd").flatten(2))
        back = out.view(batch, height // side, columns // side, side, side, width).permute(0, 5, 1, 3, 2, 4)
        return back.reshape(x.shape)


class Pointwise(nn.Sequential):
    """Two 1x1 convolutions with a GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Conv2d(width, inner, 1), nn.GELU(), nn.Conv2d(inner, width, 1))


class RegionLayer(nn.Module):
    """Region attention, pointwise, window attention, pointwise, each added to what it reads; the attentions start switched off."""

    def __init__(self, width: int, heads: int = 8, window: int = 4, ratio: int = 2) -> None:
        super().__init__()
        self.norm_region, self.region, self.region_weight = ChannelNorm(width), RegionAttention(width, heads), _zeros(width)
        self.norm_region_mlp, self.region_mlp = ChannelNorm(width), Pointwise(width, ratio * width)
        self.norm_window, self.window, self.window_weight = ChannelNorm(width), WindowAttention(width, heads, window), _zeros(width)
        self.norm_window_mlp, self.window_mlp = ChannelNorm(width), Pointwise(width, ratio * width)

    def forward(self, x: Float[Tensor, "batch width height columns"], regions: SortedRegions) -> Float[Tensor, "batch width height columns"]:
        x = x + self.region_weight * self.region(self.norm_region(x), regions)
        x = x + self.region_mlp(self.norm_region_mlp(x))
        x = x + self.window_weight * self.window(self.norm_window(x))
        return x + self.window_mlp(self.norm_window_mlp(x))


class RegionBlock(nn.Module):
    """Three layers and a convolution, added to what the block reads."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RegionLayer(width, heads, window) for _ in range(LAYERS_OF_A_BLOCK))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch width height columns"], regions: SortedRegions) -> Float[Tensor, "batch width height columns"]:
        y = x
        for layer in self.layers:
            y = layer(y, regions)
        return x + self.conv(y)


class RAT(nn.Module):
    """The whole network: a degraded image and its region map to the restored image.

    Args:
        config: sizes.
    """

    def __init__(self, config: RATConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RATConfig()
        widths = [config.width << level for level in range(len(config.encoder_blocks) + 1)]
        self.intro, self.ending = nn.Conv2d(config.channels, widths[0], 3, padding=1), nn.Conv2d(widths[0], config.channels, 3, padding=1)
        levels = list(zip(widths[:-1], config.encoder_blocks, strict=True))
        self.encoders = nn.ModuleList(nn.Sequential(*(ConvolutionBlock(width) for _ in range(depth))) for width, depth in levels)
        self.downs = nn.ModuleList(nn.Conv2d(width, 2 * width, 2, 2) for width in widths[:-1])
        self.middle = nn.ModuleList(RegionBlock(widths[-1], config.heads, config.window) for _ in range(config.middle_layers // LAYERS_OF_A_BLOCK))
        self.ups = nn.ModuleList(nn.Conv2d(width, 2 * width, 1, bias=False) for width in widths[:0:-1])
        levels = list(zip(widths[-2::-1], config.decoder_blocks, strict=True))
        self.decoders = nn.ModuleList(nn.Sequential(*(ConvolutionBlock(width) for _ in range(depth))) for width, depth in levels)

    def forward(
        self, image: Float[Tensor, "batch channels height width"], regions: Int[Tensor, "batch outheight outwidth"]
    ) -> Float[Tensor, "batch channels outheight outwidth"]:
        """Restore.

        Args:
            image: degraded, values as in training (usually 0 to 1).
            regions: number of each output pixel's region, from 0. The attention reads every fourth pixel of it (`config.reduction`).

        Raises:
            ValueError: shapes that do not fit each other or the windows.
        """
        scale, multiple, reduction = self.config.scale, self.config.multiple, self.config.reduction
        size = (image.shape[2] * scale, image.shape[3] * scale)
        if regions.shape != (image.shape[0], *size) or regions.is_floating_point():
            raise ValueError(f"regions must be integers of shape {(image.shape[0], *size)}; got {regions.dtype} of shape {tuple(regions.shape)}")
        if size[0] % multiple or size[1] % multiple:
            raise ValueError(f"the output's height and width must be multiples of {multiple}; got {size}")
        if scale > 1:
            image = F.interpolate(image, size, mode="bilinear", align_corners=False)
        parts = sort_regions(regions[:, ::reduction, ::reduction])
        x, skips = self.intro(image), []
        for blocks, down in zip(self.encoders, self.downs, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)
        plain = x
        for block in self.middle:
            x = block(x, parts)
        x = x + plain
        for up, blocks in zip(self.ups, self.decoders, strict=True):
            x = blocks(F.pixel_shuffle(up(x), 2) + skips.pop())
        return self.ending(x) + image


def _zeros(width: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, width, 1, 1))


def _gated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first * second
