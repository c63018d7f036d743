"""MHS-VM: a U-shaped segmentation network of selective scans whose heads walk over the image along different routes.

Ji, MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba (arXiv:2406.05992), as the released code computes it: 17,257,129
parameters with four heads. All heads and routes of a block run in two calls of `foveal.kernels.selective_scan`, one a direction: a route and
its reverse read the same gathered sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.kernels import selective_scan
from foveal.medical.models.scan_routes import PATTERNS, scan_routes

ROUTES = 4  # route 0, its reverse, route 1, its reverse


@dataclass(frozen=True)
class MHSVMConfig:
    """Sizes of the network; the defaults are the published ones."""

    classes: int = 1  # one class comes out as a probability, more as logits
    channels: int = 3  # of the input; a grey image is repeated
    dims: tuple[int, ...] = (96, 192, 384, 768)  # channels of the encoder's stages; the decoder's are the reverse
    depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (2, 2, 2, 1)  # from the coarsest stage on
    heads: int = 4  # the first of serpentine, anti-diagonals, spiral, raster
    threshold: float = 0.5  # t of the fusion: positions where the routes vary less are damped; below 2/3 none is shut
    state: int = 16  # of the scan
    project: bool = True  # a norm and a linear layer after the heads
    drop_path: float = 0.2  # of the deepest block; the others' grow up to it
    patch: int = 4  # side of the pixels that one cell of the finest map stands for

    def __post_init__(self) -> None:
        for name in ("dims", "depths", "decoder_depths"):  # lists come from YAML and from headers of checkpoints
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.dims) == len(self.depths) == len(self.decoder_depths):
            raise ValueError(f"dims, depths and decoder_depths must be of one length; got {self.dims}, {self.depths}, {self.decoder_depths}")
        if not 1 <= self.heads <= len(PATTERNS):
            raise ValueError(f"heads must be from 1 to {len(PATTERNS)}; got {self.heads}")
        if not self.project and any(dim % self.heads for dim in self.dims):
            raise ValueError(f"without project every dim must be a multiple of heads; got {self.dims} and {self.heads}")
        if self.dims[0] % self.patch:
            raise ValueError(f"dims[0] must be a multiple of patch; got {self.dims[0]} and {self.patch}")

    @property
    def multiple(self) -> int:
        """What height and width of an image must be multiples of."""
        return self.patch << (len(self.dims) - 1)


def fuse_routes(y: Float[Tensor, "*batch 4 dim cells"], threshold: float) -> Float[Tensor, "*batch dim cells"]:
    """Scan route attention: the sum of the four routes, weighed by how much they vary at each position.

    ``sum_r y_r * relu(cv - t)`` with ``cv = std(y) / (mean(y - min y) + 1e-5)`` (unbiased). For four values cv lies between 2/3 and 2.
    """
    total = y.sum(-3)
    variance = ((y - total.unsqueeze(-3) / ROUTES) ** 2).sum(-3) / (ROUTES - 1)  # a third of the time that y.std(-3) takes
    varied = variance > 0  # where it does not vary, a square root has no gradient
    deviation = torch.where(varied, variance, 1.0).sqrt() * varied
    spread = deviation / ((y - y.min(-3, keepdim=True).values).mean(-3) + 1e-5)
    return total * F.relu(spread - threshold)


class _Along(torch.autograd.Function):
    """Reorder the last axis by a permutation; its gradient is the inverse reordering, without the atomics of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.gather(-1, order.expand_as(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Along.apply(gradient, inverse, order), None, None


class MultiHeadScan(nn.Module):
    """Linear, split into heads, scan each along its routes, fuse the routes, join the heads."""

    def __init__(self, dim: int, config: MHSVMConfig) -> None:
        super().__init__()
        heads, size, state, rank = config.heads, dim // config.heads, config.state, math.ceil(dim // config.heads / 16)
        self.heads, self.size, self.state, self.rank, self.threshold = heads, size, state, rank, config.threshold
        self.split = nn.Linear(dim, heads * size, bias=False)
        # Of every head and route: to step size, B and C; from step size's rank to the channels; and the scan's own parameters.
        self.to_scan = nn.Parameter(torch.empty(heads, ROUTES, rank + 2 * state, size).uniform_(-(size**-0.5), size**-0.5))
        self.step = nn.Parameter(torch.empty(heads, ROUTES, size, rank).uniform_(-(rank**-0.5), rank**-0.5))
        steps = torch.exp(torch.empty(heads, ROUTES, size).uniform_(math.log(1e-3), math.log(0.1))).clamp(min=1e-4)
        self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus gives `steps` back
        self.rate_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(heads, ROUTES, size, 1))
        self.skip = nn.Parameter(torch.ones(heads, ROUTES, size))
        self.norm = nn.LayerNorm(heads * size) if config.project else None
        self.join = nn.Linear(heads * size, dim, bias=False) if config.project else None

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        split = self.split(x).flatten(1, 2).mT.unflatten(1, (self.heads, self.size))
        joined = fuse_routes(self.routes(split, (x.shape[1], x.shape[2])), self.threshold).flatten(1, 2).mT.unflatten(1, x.shape[1:3]).to(x.dtype)
        return joined if self.norm is None or self.join is None else self.join(self.norm(joined))

    def routes(self, x: Float[Tensor, "batch heads size cells"], grid: tuple[int, int]) -> Float[Tensor, "batch heads 4 size cells"]:
        """The scan of every head along each of its four routes, back in raster order; float32 at least: the fusion compares them."""
        order, inverse = (table[:, :, None] for table in scan_routes(*grid, self.heads, x.device))
        walked = _Along.apply(x.unsqueeze(2).expand(-1, -1, 2, -1, -1), order, inverse).flatten(1, 2)  # (batch, heads * 2, size, cells)
        both = [self._scan(walked, direction) for direction in (0, 1)]
        scanned = torch.stack(both, 2).unflatten(1, (self.heads, 2)).flatten(2, 3)  # forth and back of route 0, of route 1
        there = inverse.repeat_interleave(2, 1), order.repeat_interleave(2, 1)
        return _Along.apply(scanned if scanned.dtype == torch.float64 else scanned.float(), *there)

    def _scan(self, walked: Float[Tensor, "batch routes size cells"], direction: int) -> Float[Tensor, "batch routes size cells"]:
        """All heads' routes of one direction at once."""
        to_scan, step = (weight[:, direction::2].flatten(0, 1) for weight in (self.to_scan, self.step))
        rank, b, c = (to_scan @ walked).split([self.rank, self.state, self.state], 2)
        bias, skip, rates = (weight[:, direction::2].flatten(0, 2) for weight in (self.step_bias, self.skip, self.rate_log))
        out = selective_scan(
            walked.flatten(1, 2), (step @ rank).flatten(1, 2), -rates.exp(), b, c, skip, delta_bias=bias, delta_softplus=True, reverse=direction == 1
        )
        assert isinstance(out, Tensor)
        return out.unflatten(1, walked.shape[1:3])


class DropPath(nn.Module):
    """In training, leaves a sample's branch out with probability `rate` and scales the others'."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class GatedScanBlock(nn.Module):
    """x plus a gated multi-head scan of its norm; no inner expansion, no second half."""

    def __init__(self, dim: int, config: MHSVMConfig, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim, bias=False)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.scan = MultiHeadScan(dim, config)
        self.out_norm = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        return x + self.drop_path(self.attended(self.norm(x)))

    def attended(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """The block's branch, of normed features."""
        inner, gate = self.expand(x).chunk(2, -1)
        inner = F.silu(self.conv(inner.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.out_norm(self.scan(inner)) * F.silu(gate)


class PatchMerge(nn.Module):
    """Four neighbours to one cell of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height2 width2 dim2"]:
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)))


class PatchExpand(nn.Module):
    """One cell to side x side cells of `out` channels."""

    def __init__(self, dim: int, side: int, out: int) -> None:
        super().__init__()
        self.side = side
        self.expand = nn.Linear(dim, side * side * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height2 width2 out"]:
        cells = self.expand(x).unflatten(-1, (self.side, self.side, -1))  # batch, height, width, row, column, out
        return self.norm(cells.transpose(2, 3).flatten(3, 4).flatten(1, 2))


class MHSVM(nn.Module):
    """The whole network.

    Args:
        config: sizes.
    """

    def __init__(self, config: MHSVMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MHSVMConfig()
        dims, levels = config.dims, len(config.dims)
        self.embed = nn.Conv2d(config.channels, dims[0], config.patch, config.patch)
        self.embed_norm = nn.LayerNorm(dims[0])
        rates = torch.linspace(0, config.drop_path, sum(config.depths)).tolist()
        self.encoder = nn.ModuleList(nn.ModuleList(GatedScanBlock(dim, config, rates.pop(0)) for _ in range(depth))
                                     for dim, depth in zip(dims, config.depths, strict=True))  # fmt: skip
        self.merge = nn.ModuleList(PatchMerge(dim) for dim in dims[:-1])
        rates = torch.linspace(config.drop_path, 0, sum(config.decoder_depths)).tolist()
        self.decoder = nn.ModuleList(nn.ModuleList(GatedScanBlock(dim, config, rates.pop(0)) for _ in range(depth))
                                     for dim, depth in zip(dims[::-1], config.decoder_depths, strict=True))  # fmt: skip
        self.expand = nn.ModuleList(PatchExpand(dims[level], 2, dims[level] // 2) for level in range(levels - 1, 0, -1))
        self.final = PatchExpand(dims[0], config.patch, dims[0] // config.patch)
        self.head = nn.Conv2d(dims[0] // config.patch, config.classes, 1)
        self.apply(_initialise)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        """Logits, or of a single class probabilities. Images of the published weights have values from 0 to 255.

        Raises:
            ValueError: height and width are not multiples of ``config.multiple``.
        """
        logits = self.logits(image)
        return logits.sigmoid() if self.config.classes == 1 else logits

    def logits(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        """Logits, of a single class too."""
        multiple = self.config.multiple
        if image.shape[2] % multiple or image.shape[3] % multiple:
            raise ValueError(f"image must have height and width that are multiples of {multiple}; got {tuple(image.shape[2:])}")
        x = self.embed(image.expand(-1, self.config.channels, -1, -1)).permute(0, 2, 3, 1)
        x, skips = self.embed_norm(x), []
        for level, blocks in enumerate(self.encoder):
            if level:
                x = self.merge[level - 1](x)
                skips.append(x)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
        for step, blocks in enumerate(self.decoder):
            if step:
                x = self.expand[step - 1](x + skips.pop())  # the skip joins before the map grows, as published
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
        return self.head(self.final(x).permute(0, 3, 1, 2))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
