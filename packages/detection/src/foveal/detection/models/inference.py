"""The form of a trained YOLOv13 that only answers: the same numbers, fewer and larger steps.

What is exact, and done here once:

- batch norms go into the convolutions before them, those of depthwise-separable ones too;
- convolutions that feed each other are written down as chains, which a CPU computes in one call, without joining or doubling maps in memory;
- queries, keys and values of area attention come from one convolution, as do the ways side by side of a block and of the hypergraph branches;
- the projection before the hyperedges' prototypes goes into the prototypes, x W P^T with W P^T computed once, and the one after them into the few
  hyperedges, (A E) W = A (E W), so that no product of cells by width by width is left;
- what is merged after upsampling by a 1 x 1 convolution is convolved before it, at a quarter of the places;
- memory is channels last, in which attention reads the map as it lies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import AreaBlock, AreaStage, ConvNorm, DSBottleneck, DSC3k, DSC3k2, DSConv, attend_in_areas
from foveal.detection.models.heads import Detect
from foveal.detection.models.hyperace import C3AH, HyperACE, Tunnel, hyperedge_attention_on_map
from foveal.detection.models.yolov13 import YOLOv13
from foveal.kernels.convolution import ActivatedConv2d, ConvolutionChain, Place
from foveal.kernels.nn import HyperedgeAttention


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, activated: bool) -> ActivatedConv2d:
    """Convolution and batch norm in one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return ActivatedConv2d.of(weight.to(conv.weight.dtype), bias.to(conv.weight.dtype), activated, conv)


def _plain(module: ConvNorm) -> ActivatedConv2d:
    return folded(module.conv, module.norm, module.activated)


def _beside(several: Iterable[ConvNorm]) -> ActivatedConv2d:
    """Convolutions of one input as one, their outputs side by side."""
    convs = [_plain(module) for module in several]
    bias = torch.cat([conv.bias for conv in convs if conv.bias is not None])
    return ActivatedConv2d.of(torch.cat([conv.weight for conv in convs]), bias, convs[0].activated, convs[0])


# ------------------------------------------------------------------------------------------------------------------- chains


def _separable(chain: ConvolutionChain, parts: Sequence[Place], module: DSConv, added: Place | None = None) -> Place:
    """Depthwise, then pointwise with bias and SiLU."""
    depthwise = ActivatedConv2d.of(module.depthwise.weight, None, False, module.depthwise)
    return chain.convolve([chain.convolve(parts, depthwise)], folded(module.pointwise, module.norm, True), added)


def _bottleneck(chain: ConvolutionChain, x: Place, module: DSBottleneck) -> Place:
    return _separable(chain, [_separable(chain, [x], module.first)], module.second, x if module.shortcut else None)


def _nested(chain: ConvolutionChain, x: Place, module: DSC3k) -> Place:
    opened = _beside((module.main, module.side))
    y, side = chain.cut(chain.convolve([x], opened), opened.out_channels // 2, opened.out_channels // 2)
    for block in module.blocks:
        assert isinstance(block, DSBottleneck)
        y = _bottleneck(chain, y, block)
    return chain.convolve([y, side], _plain(module.merge))


def _pointwise_of_two(chain: ConvolutionChain, coarse: Place, fine: Place, conv: ActivatedConv2d) -> Place:
    """A 1 x 1 convolution of a doubled map and another: the first is convolved before it is doubled."""
    bias = conv.bias
    first, second = conv.weight.split((coarse.channels, fine.channels), 1)
    doubled = chain.convolve([coarse], ActivatedConv2d.of(first, None, False, conv))
    return chain.convolve([fine], ActivatedConv2d.of(second, bias, conv.activated, conv), doubled, early=True)


def _split(chain: ConvolutionChain, parts: Sequence[Place], module: DSC3k2, doubled: bool = False) -> Place:
    """DSC3k2 of maps side by side, of which the first is doubled where `doubled`."""
    opened = _plain(module.split)
    if doubled:
        coarse, fine = parts
        whole = _pointwise_of_two(chain, coarse, fine, opened)
    else:
        whole = chain.convolve(parts, opened)
    kept = chain.cut(whole, opened.out_channels // 2, opened.out_channels // 2)
    for block in module.blocks:
        assert isinstance(block, DSC3k | DSBottleneck)
        kept.append(_nested(chain, kept[-1], block) if isinstance(block, DSC3k) else _bottleneck(chain, kept[-1], block))
    return chain.convolve(kept, _plain(module.merge))


def _chain_of(module: DSC3k2 | DSConv | ConvNorm, *channels: int, doubled: bool = False) -> ConvolutionChain:
    """A module as a chain of its own."""
    chain = ConvolutionChain(*channels)
    if isinstance(module, DSC3k2):
        chain.leave(_split(chain, chain.inputs, module, doubled))
    else:
        chain.leave(_separable(chain, chain.inputs, module) if isinstance(module, DSConv) else chain.convolve(chain.inputs, _plain(module)))
    return chain


# ----------------------------------------------------------------------------------------------------------- blocks of several chains


class FoldedAreaStage(nn.Module):
    """Area attention and the convolutions between two attentions in turn."""

    def __init__(self, source: AreaStage) -> None:
        super().__init__()
        blocks = [block for block in source.blocks.modules() if isinstance(block, AreaBlock)]
        self.heads, self.areas, self.layer_scale = blocks[0].attention.heads, blocks[0].attention.areas, source.layer_scale
        self.dim, self.group = source.reduce.conv.out_channels, len(source.blocks[0])  # type: ignore[arg-type]
        self.open = ConvolutionChain(source.reduce.conv.in_channels)
        first = self.open.convolve(self.open.inputs, _plain(source.reduce))
        self.open.leave(first, self.open.convolve([first], self._query_key_value(blocks[0])))
        self.between = nn.ModuleList(self._after(block, following) for block, following in zip(blocks, [*blocks[1:], None], strict=True))
        self.merge = ConvolutionChain(*[self.dim] * (1 + len(source.blocks)))
        self.merge.leave(self.merge.convolve(self.merge.inputs, _plain(source.merge)))

    @staticmethod
    def _query_key_value(block: AreaBlock) -> ActivatedConv2d:
        return _beside((block.attention.query_key, block.attention.value))

    def _after(self, block: AreaBlock, following: AreaBlock | None) -> ConvolutionChain:
        """From what was attended to, queries, keys and values, and the map before them, to the map after the block, and the next three."""
        chain = ConvolutionChain(self.dim, 3 * self.dim, self.dim)
        attended, query_key_value, x = chain.inputs
        value = chain.cut(query_key_value, 2 * self.dim, self.dim)[1]
        placed = chain.convolve([value], _plain(block.attention.position), attended)
        x = chain.convolve([placed], _plain(block.attention.project), x)
        y = chain.convolve([chain.convolve([x], _plain(block.mlp[0]))], _plain(block.mlp[1]), x)  # type: ignore[arg-type]
        chain.leave(y, *([chain.convolve([y], self._query_key_value(following))] if following is not None else []))
        return chain

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        current, three = self.open(x)
        parts = [current]
        for number, chain in enumerate(self.between):
            query, key, value = three.chunk(3, 1)
            found = chain(attend_in_areas(query, key, value, self.heads, self.areas), three, current)
            current, three = found if isinstance(found, tuple) else (found, three)
            if (number + 1) % self.group == 0:
                parts.append(current)
        y = self.merge(*parts)
        return y if self.layer_scale is None else x + self.layer_scale[:, None, None] * y


class FoldedHyperedges(nn.Module):
    """Adaptive hypergraph convolution whose cost a cell is its width times the few hyperedges, not its width squared."""

    def __init__(self, source: HyperedgeAttention) -> None:
        super().__init__()
        self.edges, self.dim, self.context = source.edges, source.dim, source.context
        # The product with the projection's bias is the same for all cells, and cancels in the softmax over them.
        fold = source.pre_head_proj.weight.double() / (source.heads * source.head_dim**0.5)
        base = source.prototype_base.double() @ fold
        shift = torch.einsum("edc,df->efc", source.context_net.weight.double().unflatten(0, (self.edges, self.dim)), fold)
        constant = source.context_net.bias.double().unflatten(0, (self.edges, self.dim)) @ fold
        dtype = source.prototype_base.dtype
        self.shift = nn.Linear(shift.shape[2], self.edges * self.dim)
        self.shift.weight = nn.Parameter(shift.flatten(0, 1).to(dtype).detach())
        self.shift.bias = nn.Parameter((base + constant).flatten().to(dtype).detach())
        self.edge_proj, self.node_proj = source.edge_proj, source.node_proj

    def forward(self, x: Float[Tensor, "batch cells dim"]) -> Float[Tensor, "batch cells dim"]:
        """Cells to hyperedges and back."""
        parts = ([x.mean(1)] if self.context != "max" else []) + ([x.amax(1)] if self.context != "mean" else [])
        queries = self.shift(torch.cat(parts, -1)).unflatten(-1, (self.edges, self.dim))
        incidence = torch.softmax(queries @ x.transpose(1, 2), -1)
        edges = F.gelu(self.edge_proj(incidence @ x))
        mixed = torch.baddbmm(self.node_proj.bias, incidence.transpose(1, 2), edges @ self.node_proj.weight.T)
        return F.gelu(mixed) + x


class FoldedHyperACE(nn.Module):
    """HyperACE in two chains, with its hypergraphs between them."""

    def __init__(self, source: HyperACE) -> None:
        super().__init__()
        branches: list[C3AH] = [source.first_branch, source.second_branch]
        fuse = _plain(source.fuse.merge)
        assert fuse.bias is not None
        fine, middle, coarse = source.fuse.channels
        self.before = chain = ConvolutionChain(fine, middle, coarse)
        rest, doubled = fuse.weight.split((fine + middle, coarse), 1)
        far = chain.convolve(chain.inputs[2:], ActivatedConv2d.of(doubled, None, False, fuse))
        fused = chain.convolve(chain.inputs[:2], ActivatedConv2d.of(rest, fuse.bias, True, fuse), far, early=True)
        split = chain.convolve([fused], _plain(source.split))
        self.part = split.channels // 3
        _, high, low = chain.cut(split, *[self.part] * 3)
        opened = chain.convolve([high], _beside(part for branch in branches for part in (branch.main, branch.side)))
        local = [low]
        for block in source.local:
            assert isinstance(block, DSC3k)
            local.append(_nested(chain, local[-1], block))
        chain.leave(split, opened, *local[1:])
        self.hypergraphs = nn.ModuleList(FoldedHyperedges(branch.hypergraph) for branch in branches)
        self.after = chain = ConvolutionChain(self.part, self.part, 4 * self.part, 3 * self.part, *[self.part] * len(local[1:]))
        first, second, opened, split, *local = chain.inputs
        _, first_side, _, second_side = chain.cut(opened, *[self.part] * 4)
        kept, _, low = chain.cut(split, *[self.part] * 3)
        heard = [
            chain.convolve([told, side], _plain(branch.merge))
            for told, side, branch in zip((first, second), (first_side, second_side), branches, strict=True)
        ]
        chain.leave(chain.convolve([kept, heard[0], low, *local, heard[1]], _plain(source.merge)))

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Three maps to one."""
        # A mean of four places costs less than a convolution at all of them.
        split, opened, *local = self.before(F.avg_pool2d(fine, 2), middle, coarse)
        mains = opened.chunk(4, 1)[::2]
        told = [hyperedge_attention_on_map(hypergraph, main) for hypergraph, main in zip(self.hypergraphs, mains, strict=True)]
        return self.after(*told, opened, split, *local)


class FoldedTunnel(nn.Module):
    """A sum."""

    def __init__(self, source: Tunnel) -> None:
        super().__init__()
        self.gate = float(source.gate)

    def forward(self, x: Tensor, correlations: Tensor) -> Tensor:
        """The map, and the correlations scaled by the gate."""
        return torch.add(x, correlations, alpha=self.gate)


def _levels_at_once(head: Detect, channels: Sequence[int]) -> ConvolutionChain:
    """Logits of every level: boxes and classes side by side."""
    chain = ConvolutionChain(*channels)
    found = []
    for x, box, score in zip(chain.inputs, head.box, head.score, strict=True):
        together = []
        for way in (box, score):
            y = x
            for module in (part for part in way.modules() if isinstance(part, ConvNorm)):
                y = chain.convolve([y], _plain(module))
            last = way[-1]  # type: ignore[index]
            together.append(chain.convolve([y], ActivatedConv2d.of(last.weight, last.bias, False, last)))
        found.append(together)
    chain.leave(*found)
    return chain


# ------------------------------------------------------------------------------------------------------------------- the whole


def inference_form(model: YOLOv13) -> YOLOv13:
    """A copy that gives the same answers faster, and cannot be trained or saved as the model can.

    Args:
        model: trained; it stays as it is.
    """
    made = copy.deepcopy(model).eval().requires_grad_(False)
    c3, c4, c5 = (module.merge.conv.out_channels for module in (made.neck3, made.neck4, made.neck5))
    # What stands side by side before a stage of the neck; the first of two is doubled on the way down.
    joined = {"top_down4": ((c5, c4), True), "neck3": ((c4, c4), True), "neck4": ((c3, c4), False), "neck5": ((c4, c5), False)}
    for name, (channels, doubled) in joined.items():
        setattr(made, name, _chain_of(getattr(made, name), *channels, doubled=doubled))
    made.head.at_once = _levels_at_once(made.head, (c3, c4, c5))
    del made.head.box, made.head.score
    _replace(made)
    return made.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, _chain_of(child, child.conv.in_channels))
        elif isinstance(child, DSConv):
            setattr(module, name, _chain_of(child, child.depthwise.in_channels))
        elif isinstance(child, DSC3k2):
            setattr(module, name, _chain_of(child, child.split.conv.in_channels))
        elif isinstance(child, AreaStage):
            setattr(module, name, FoldedAreaStage(child))
        elif isinstance(child, HyperACE):
            setattr(module, name, FoldedHyperACE(child))
        elif isinstance(child, Tunnel):
            setattr(module, name, FoldedTunnel(child))
        elif not isinstance(child, ConvolutionChain):
            _replace(child)
