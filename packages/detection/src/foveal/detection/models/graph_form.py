"""The form of a trained YOLOv13 that is written into an ONNX file: the same numbers, in the nodes that graph runtimes run fastest.

`inference.inference_form` is for torch, whose memory is channels last. A graph runtime keeps maps in blocks of channels, and leaves these blocks
wherever a node cuts, permutes or reshapes a map. Hence here, and exact:

- batch norms go into the convolutions before them;
- what is cut after a convolution comes from two convolutions, each with its part of the weights: there is nothing to cut;
- attention keeps the cells last, as a map has them, so that no map is permuted but in rows of whole areas;
- hyperedges are few, so that the projections around them go into the few (as `inference.FoldedHyperedges`), and cells stay last as well;
- a gate is a convolution of one weight a channel, which a runtime computes with its sum in one pass;
- narrow groups, which fill no block, become one convolution with zeros between them;
- what is merged after upsampling by a 1 x 1 convolution is convolved before it, at a quarter of the places.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import AreaAttention, AreaStage, ConvNorm, DSC3k2, DSConv
from foveal.detection.models.hyperace import C3AH, HyperACE
from foveal.detection.models.inference import FoldedHyperedges, folded
from foveal.detection.models.yolov13 import YOLOv13
from foveal.kernels.convolution import ActivatedConv2d

#: Channels of a runtime's block on processors with 512-bit vectors.
_BLOCK = 16


def _sizes(x: Tensor) -> tuple[int, int]:
    """Height and width as constants of the file: what is left to the runtime to ask for costs nodes."""
    return int(x.shape[2]), int(x.shape[3])


def _plain(module: ConvNorm) -> ActivatedConv2d:
    return _filled(folded(module.conv, module.norm, module.activated))


def _filled(conv: ActivatedConv2d) -> ActivatedConv2d:
    """Narrow groups as one convolution with zeros between them; depthwise ones and wide groups as they are."""
    inputs, groups = conv.weight.shape[1], conv.groups
    if groups == 1 or inputs == 1 or inputs % _BLOCK == 0:
        return conv
    parts = conv.weight.chunk(groups)
    weight = torch.cat([F.pad(part, (0, 0, 0, 0, number * inputs, (groups - 1 - number) * inputs)) for number, part in enumerate(parts)])
    with torch.device("meta"):
        like = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
    return ActivatedConv2d.of(weight, conv.bias, conv.activated, like)


def _cut(conv: ActivatedConv2d, *outputs: int) -> list[ActivatedConv2d]:
    """A convolution as several, each with so many of its outputs."""
    assert conv.bias is not None
    pairs = zip(conv.weight.split(outputs), conv.bias.split(outputs), strict=True)
    return [ActivatedConv2d.of(weight, bias, conv.activated, conv) for weight, bias in pairs]


class MergedConv(nn.Module):
    """A 1 x 1 convolution of maps side by side, the last of half the size and doubled: each is convolved by itself, and the sums are added."""

    def __init__(self, conv: ActivatedConv2d, fine: int, coarse_first: bool) -> None:
        super().__init__()
        coarse = conv.in_channels - fine
        far, near = conv.weight.split((coarse, fine), 1) if coarse_first else conv.weight.split((fine, coarse), 1)[::-1]
        self.near, self.far = ActivatedConv2d.of(near, conv.bias, False, conv), ActivatedConv2d.of(far, None, False, conv)
        self.activated = conv.activated

    def forward(self, fine: Float[Tensor, "batch fine height width"], coarse: Float[Tensor, "batch coarse height/2 width/2"]) -> Tensor:
        """Two maps to one."""
        y = self.near(fine) + F.interpolate(self.far(coarse), scale_factor=2.0)
        return F.silu(y) if self.activated else y


class GraphStage(nn.Module):
    """DSC3k2 whose two halves come from two convolutions.

    Args:
        source: trained.
        fine: channels of the second of two maps, where the first is of half the size; None if all have one size.
    """

    def __init__(self, source: DSC3k2, fine: int | None) -> None:
        super().__init__()
        whole = _plain(source.split)
        halves = _cut(whole, whole.out_channels // 2, whole.out_channels // 2)
        self.doubled = fine is not None
        self.halves = nn.ModuleList(halves if fine is None else [MergedConv(half, fine, True) for half in halves])
        self.blocks, self.merge = source.blocks, source.merge

    def forward(self, *maps: Float[Tensor, "batch some_inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map. Several are joined; one of half the size is doubled."""
        given = maps[::-1] if self.doubled else (maps[0] if len(maps) == 1 else torch.cat(maps, 1),)
        parts = [half(*given) for half in self.halves]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat(parts, 1))


class GraphAreaAttention(nn.Module):
    """Area attention with the cells last. The scale of the logits is in the queries' weights."""

    def __init__(self, source: AreaAttention) -> None:
        super().__init__()
        self.heads, self.areas, self.dim = source.heads, source.areas, source.value.conv.out_channels
        both, dim = _plain(source.query_key), self.dim
        self.query, self.key = _cut(both, dim, dim)
        self.value, self.position, self.project = (_plain(part) for part in (source.value, source.position, source.project))
        for part in (self.query.weight, self.query.bias):
            assert part is not None
            part.data = part.data * (dim // self.heads) ** -0.5

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Map to map."""
        height, width = _sizes(x)

        def cells(y: Tensor) -> Tensor:
            if self.areas == 1:
                return y.reshape(-1, self.heads, self.dim // self.heads, height * width)
            return y.reshape(-1, self.heads, self.dim // self.heads, self.areas, height * width // self.areas).transpose(2, 3)

        value = self.value(x)
        weights = torch.softmax(cells(self.query(x)).transpose(-2, -1) @ cells(self.key(x)), -1)
        mixed = (weights @ cells(value).transpose(-2, -1)).transpose(-2, -1)
        mixed = (mixed.transpose(2, 3) if self.areas > 1 else mixed).reshape(-1, self.dim, height, width)
        return self.project(self.position(value) + mixed)


class GraphHyperedges(FoldedHyperedges):
    """Adaptive hypergraph convolution with the cells last."""

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Map to map."""
        height, width = _sizes(x)
        cells = x.reshape(-1, self.dim, height * width)
        parts = ([cells.mean(2)] if self.context != "max" else []) + ([cells.amax(2)] if self.context != "mean" else [])
        queries = self.shift(torch.cat(parts, -1)).reshape(-1, self.edges, self.dim)
        incidence = torch.softmax(queries @ cells, -1)
        edges = F.gelu(self.edge_proj(incidence @ cells.transpose(1, 2))) @ self.node_proj.weight.T
        mixed = edges.transpose(1, 2) @ incidence + self.node_proj.bias[:, None]
        return F.gelu(mixed).reshape(-1, self.dim, height, width) + x


class GraphBranch(nn.Module):
    """C3AH of hyperedges that take a map as it is."""

    def __init__(self, main: nn.Module, side: nn.Module, hypergraph: nn.Module, merge: nn.Module) -> None:
        super().__init__()
        self.main, self.side, self.hypergraph, self.merge = main, side, hypergraph, merge

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        return self.merge(torch.cat((self.hypergraph(self.main(x)), self.side(x)), 1))


class GraphHyperACE(nn.Module):
    """HyperACE whose three parts come from three convolutions."""

    def __init__(self, source: HyperACE) -> None:
        super().__init__()
        fine, middle, _ = source.fuse.channels
        self.fuse = MergedConv(_plain(source.fuse.merge), fine + middle, False)
        split = _plain(source.split)
        self.thirds = nn.ModuleList(_cut(split, *[split.out_channels // 3] * 3))
        self.first_branch, self.second_branch, self.local, self.merge = source.first_branch, source.second_branch, source.local, source.merge

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Three maps to one."""
        fused = self.fuse(torch.cat((F.avg_pool2d(fine, 2), middle), 1), coarse)
        kept, high, low = (third(fused) for third in self.thirds)
        parts = [kept, self.first_branch(high), low]
        for block in self.local:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat((*parts, self.second_branch(high)), 1))


class ScaledSum(nn.Module):
    """The sum of a map and another, scaled by a number a channel, as a convolution that is added to."""

    def __init__(self, scale: Tensor, channels: int) -> None:
        super().__init__()
        with torch.device("meta"):
            like = nn.Conv2d(channels, channels, 1, groups=channels)
        self.scale = ActivatedConv2d.of(scale.detach().reshape(-1, 1, 1, 1).expand(channels, 1, 1, 1).clone(), None, False, like)

    def forward(self, x: Tensor, scaled: Tensor) -> Tensor:
        """Two maps to one."""
        return self.scale(scaled) + x


class GraphAreaStage(nn.Module):
    """AreaStage with its layer scale as a convolution."""

    def __init__(self, source: AreaStage) -> None:
        super().__init__()
        self.reduce, self.blocks, self.merge = source.reduce, source.blocks, source.merge
        self.add = None if source.layer_scale is None else ScaledSum(source.layer_scale, source.merge.conv.out_channels)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        parts = [self.reduce(x)]
        for block in self.blocks:
            parts.append(block(parts[-1]))
        y = self.merge(torch.cat(parts, 1))
        return y if self.add is None else self.add(x, y)


def graph_form(model: YOLOv13) -> YOLOv13:
    """A copy that gives the same answers, to be written into an ONNX file.

    Args:
        model: trained; it stays as it is.
    """
    made = copy.deepcopy(model).eval().requires_grad_(False)
    c3, c4, c5 = (module.merge.conv.out_channels for module in (made.neck3, made.neck4, made.neck5))
    # On the way down the coarse map stands first, beside one of c4 channels of twice the size.
    made.top_down4, made.neck3 = GraphStage(made.top_down4, c4), GraphStage(made.neck3, c4)  # type: ignore[assignment]
    widths = {"backbone_tunnel3": c4, "backbone_tunnel4": c4, "backbone_tunnel5": c5, "neck_tunnel3": c3, "neck_tunnel4": c4,
              "head_tunnel4": c4, "head_tunnel5": c5}  # fmt: skip
    for name, width in widths.items():
        setattr(made, name, ScaledSum(getattr(made, name).gate, width))
    _replace(made)
    return made.requires_grad_(False)


def _replace(module: nn.Module) -> None:
    """Every part whose graph form differs, and then the parts of these."""
    for name, child in module.named_children():
        made = child
        if isinstance(child, ConvNorm):
            made = _plain(child)
        elif isinstance(child, DSConv):
            depthwise = ActivatedConv2d.of(child.depthwise.weight, None, False, child.depthwise)
            made = nn.Sequential(depthwise, folded(child.pointwise, child.norm, True))
        elif isinstance(child, DSC3k2):
            made = GraphStage(child, None)
        elif isinstance(child, AreaStage):
            made = GraphAreaStage(child)
        elif isinstance(child, AreaAttention):
            made = GraphAreaAttention(child)
        elif isinstance(child, HyperACE):
            made = GraphHyperACE(child)
        elif isinstance(child, C3AH):
            made = GraphBranch(child.main, child.side, GraphHyperedges(child.hypergraph), child.merge)
        setattr(module, name, made)
        _replace(made)
