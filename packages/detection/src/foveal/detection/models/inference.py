"""The form of a trained YOLOv13 that only answers: the same numbers, fewer and larger steps.

What is exact, and done here once:

- batch norms go into the convolutions before them, those of depthwise-separable ones too;
- queries, keys and values of area attention come from one convolution, as do the four that open the two hypergraph branches;
- the projection before the hyperedges' prototypes goes into the prototypes, x W P^T with W P^T computed once, and the one after them into the few
  hyperedges, (A E) W = A (E W), so that no product of cells by width by width is left;
- what is merged after upsampling by a 1 x 1 convolution is convolved before it, at a quarter of the places;
- memory is channels last, in which attention reads the map as it lies.

On a CPU with oneDNN, SiLU is computed inside the convolution that it follows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import AreaAttention, ConvNorm, DSConv, attend_in_areas
from foveal.detection.models.hyperace import C3AH, Fuse, HyperACE, hyperedge_attention_on_map
from foveal.detection.models.yolov13 import YOLOv13
from foveal.kernels.nn import HyperedgeAttention


class Conv(nn.Conv2d):
    """A convolution with bias, and SiLU where `activated`."""

    activated = False

    def forward(self, input: Tensor) -> Tensor:
        """Map to map."""
        if _fusible(input):
            padding, stride, dilation = (list(map(int, value)) for value in (self.padding, self.stride, self.dilation))
            return torch.ops.mkldnn._convolution_pointwise(
                input, self.weight, self.bias, padding, stride, dilation, self.groups, "swish" if self.activated else "none", [], ""
            )
        y = super().forward(input)
        return F.silu(y) if self.activated else y


def _fusible(x: Tensor) -> bool:
    """Whether oneDNN's convolution with its activation can be called: eager inference in single precision on a CPU."""
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise") and not torch.is_grad_enabled()
        and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    )  # fmt: skip


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d, activated: bool) -> Conv:
    """Convolution and batch norm in one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    return _conv(weight.to(conv.weight.dtype), bias.to(conv.weight.dtype), activated, conv)


def _conv(weight: Tensor, bias: Tensor, activated: bool, like: nn.Conv2d) -> Conv:
    """A convolution of these values, with stride, padding and groups of another."""
    with torch.device("meta"):
        made = Conv(weight.shape[1] * like.groups, weight.shape[0], like.kernel_size, like.stride, like.padding, groups=like.groups)  # type: ignore[arg-type]
    made.weight, made.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    made.activated = activated
    return made


def _beside(convs: Iterable[Conv]) -> Conv:
    """Convolutions of one input as one, their outputs side by side."""
    several = list(convs)
    return _conv(
        torch.cat([conv.weight for conv in several]),
        torch.cat([conv.bias for conv in several if conv.bias is not None]),
        several[0].activated,
        several[0],
    )


class SeparableConv(nn.Sequential):
    """Depthwise, then pointwise with bias and SiLU."""

    def __init__(self, source: DSConv) -> None:
        depthwise = _conv(source.depthwise.weight, torch.zeros_like(source.depthwise.weight[:, 0, 0, 0]), False, source.depthwise)
        super().__init__(depthwise, _folded(source.pointwise, source.norm, True))


class FoldedAreaAttention(nn.Module):
    """Area attention with one convolution for queries, keys and values."""

    def __init__(self, source: AreaAttention) -> None:
        super().__init__()
        self.heads, self.areas = source.heads, source.areas
        self.query_key_value = _beside(_folded(part.conv, part.norm, False) for part in (source.query_key, source.value))
        self.position = _folded(source.position.conv, source.position.norm, False)
        self.project = _folded(source.project.conv, source.project.norm, False)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Map to map."""
        query, key, value = self.query_key_value(x).chunk(3, 1)
        return self.project(attend_in_areas(query, key, value, self.heads, self.areas) + self.position(value))


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


class FoldedFuse(nn.Module):
    """Three levels to one, each convolved where it is smallest, and added."""

    def __init__(self, source: Fuse) -> None:
        super().__init__()
        whole = _folded(source.merge.conv, source.merge.norm, False)
        assert whole.bias is not None
        weights, none = whole.weight.split(source.channels, 1), torch.zeros_like(whole.bias)
        self.fine, self.middle, self.coarse = (
            _conv(weight, bias, False, whole) for weight, bias in zip(weights, (none, whole.bias, none), strict=True)
        )  # fmt: skip

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Three maps to one."""
        # A mean of four places costs less than a convolution at all of them.
        return F.silu(self.middle(middle) + self.fine(F.avg_pool2d(fine, 2)) + F.interpolate(self.coarse(coarse), scale_factor=2.0))


class FoldedHyperACE(nn.Module):
    """HyperACE whose two branches open with one convolution."""

    def __init__(self, source: HyperACE) -> None:
        super().__init__()
        branches: list[C3AH] = [source.first_branch, source.second_branch]
        self.fuse = FoldedFuse(source.fuse)
        self.split = _folded(source.split.conv, source.split.norm, True)
        self.open = _beside(_folded(part.conv, part.norm, True) for branch in branches for part in (branch.main, branch.side))
        self.hypergraphs = nn.ModuleList(FoldedHyperedges(branch.hypergraph) for branch in branches)
        self.merges = nn.ModuleList(_folded(branch.merge.conv, branch.merge.norm, True) for branch in branches)
        self.local, self.merge = source.local, source.merge

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Three maps to one."""
        kept, high, low = self.split(self.fuse(fine, middle, coarse)).chunk(3, 1)
        opened = self.open(high).chunk(4, 1)
        heard = [
            merge(torch.cat((hyperedge_attention_on_map(hypergraph, opened[2 * branch]), opened[2 * branch + 1]), 1))
            for branch, (hypergraph, merge) in enumerate(zip(self.hypergraphs, self.merges, strict=True))
        ]
        parts = [kept, heard[0], low]
        for block in self.local:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat((*parts, heard[1]), 1))


def inference_form(model: YOLOv13) -> YOLOv13:
    """A copy that gives the same answers faster, and cannot be trained or saved as the model can.

    Args:
        model: trained; it stays as it is.
    """
    made = copy.deepcopy(model).eval().requires_grad_(False)
    _replace(made)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, _folded(child.conv, child.norm, child.activated))
        elif isinstance(child, DSConv):
            setattr(module, name, SeparableConv(child))
        elif isinstance(child, AreaAttention):
            setattr(module, name, FoldedAreaAttention(child))
        elif isinstance(child, HyperACE):
            folded = FoldedHyperACE(child)
            _replace(folded)
            setattr(module, name, folded)
        else:
            _replace(child)
