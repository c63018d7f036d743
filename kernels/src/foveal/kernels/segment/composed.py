"""Segment attention's gradient out of parts that are themselves differentiable, for gradients of gradients.

Training on forces differentiates through a gradient. Two operators carry the products between nodes and edges: the dot of an edge's two
nodes and the weighted sum of a node's edges. The gradient of each is made of the two again, so every order stays free of arrays of size
edges x heads x dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.kernels.library import operator
from foveal.kernels.segment.reduce import implementation

#: indptr, column and permutation of the rows by target or by source.
Rows = tuple[Tensor, Tensor, Tensor]

_ROWS = "Tensor indptr, Tensor column, Tensor permutation, Tensor turned_indptr, Tensor turned_column, Tensor turned_permutation"


@operator("foveal::segment_edge_dot", f"(Tensor a, Tensor b, {_ROWS}, str backend) -> Tensor")
def edge_dot(a: Tensor, b: Tensor, indptr: Tensor, column: Tensor, permutation: Tensor, *rest: Any) -> Tensor:
    """``a[target(e)] . b[source(e)]`` of each edge and head, (edges, heads) in float32 at least."""
    return implementation(rest[-1]).edge_dot(a, b, indptr, column, permutation)


@operator("foveal::segment_weighted_sum", f"(Tensor weight, Tensor x, {_ROWS}, str backend) -> Tensor")
def weighted_sum(weight: Tensor, x: Tensor, indptr: Tensor, column: Tensor, permutation: Tensor, *rest: Any) -> Tensor:
    """``sum_e weight[e] x[source(e)]`` over the edges of each target, per head."""
    return implementation(rest[-1]).weighted_sum(weight, x, indptr, column, permutation, 1.0)


@edge_dot.register_fake
def _(a: Tensor, b: Tensor, indptr: Tensor, column: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(column.shape[0], a.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))


@weighted_sum.register_fake
def _(weight: Tensor, x: Tensor, indptr: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(indptr.shape[0] - 1, *x.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _edge_dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, *rows = ctx.saved_tensors
    turned = (*rows[3:], *rows[:3], ctx.backend)
    grad_a = weighted_sum(grad, b, *rows, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_b = weighted_sum(grad, a, *turned) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, *[None] * 7


def _weighted_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x, *rows = ctx.saved_tensors
    turned = (*rows[3:], *rows[:3], ctx.backend)
    grad_weight = edge_dot(grad, x, *rows, ctx.backend) if ctx.needs_input_grad[0] else None
    grad_x = weighted_sum(weight, grad, *turned) if ctx.needs_input_grad[1] else None
    return grad_weight, grad_x, *[None] * 7


edge_dot.register_autograd(_edge_dot_backward, setup_context=_setup)
weighted_sum.register_autograd(_weighted_sum_backward, setup_context=_setup)


def attention_gradients(
    grad_out: Tensor | None,
    grad_weights: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None,
    envelope: Tensor | None,
    gate: Tensor | None,
    rows: Rows,
    turned: Rows,
    scale: float,
    eps: float,
    keys_on_edges: bool,
    values_on_edges: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, bias, envelope and gate, differentiable in all of them and in the incoming gradients."""
    indptr, _, permutation = rows
    edges = permutation.shape[0]
    both = (*rows, *turned, backend)
    back = (*turned, *rows, backend)
    wide = torch.promote_types(v.dtype, torch.float32)

    def total(x: Tensor) -> Tensor:
        return torch.ops.foveal.segment_reduce(x, indptr, permutation, "sum", backend)

    def spread(x: Tensor) -> Tensor:
        return torch.ops.foveal.segment_gather(x, indptr, permutation, edges, backend)

    def dot(a: Tensor, b: Tensor, on_edges: bool) -> Tensor:
        if not on_edges:
            return edge_dot(a, b, *both)
        return (spread(a.flatten(1)).view(b.shape) * b).sum(-1).to(wide)

    logits = None
    if q is not None and k is not None:
        logits = scale * dot(q, k, keys_on_edges)
    if bias is not None:
        logits = bias if logits is None else logits + bias
    assert logits is not None
    peak = torch.ops.foveal.segment_reduce(logits.detach(), indptr, permutation, "max", backend)
    share = (logits - spread(peak.masked_fill(peak == -torch.inf, 0.0))).exp()
    mass = total(share if envelope is None else share * envelope)
    share = share / spread((mass + eps).masked_fill(mass == 0, torch.inf))
    inside = share if envelope is None else share * envelope
    weights = inside if gate is None else inside * gate

    slope = torch.zeros_like(weights) if grad_weights is None else grad_weights
    if grad_out is not None:
        slope = slope + dot(grad_out, v, values_on_edges)
    gated = slope if gate is None else slope * gate
    centred = gated - spread(total(inside * gated))
    grad_logits = inside * centred

    grad_q = grad_k = grad_v = None
    if q is not None and k is not None:
        scaled = scale * grad_logits
        if keys_on_edges:
            grad_q = total((scaled.unsqueeze(-1) * k).to(k.dtype).flatten(1)).view(q.shape)
            grad_k = (scaled.unsqueeze(-1) * spread(q.flatten(1)).view(k.shape)).to(k.dtype)
        else:
            grad_q, grad_k = weighted_sum(scaled, k, *both), weighted_sum(scaled, q, *back)
    if grad_out is not None:
        if values_on_edges:
            grad_v = (weights.unsqueeze(-1) * spread(grad_out.flatten(1)).view(v.shape)).to(v.dtype)
        else:
            grad_v = weighted_sum(weights, grad_out, *back).to(v.dtype)
    return grad_q, grad_k, grad_v, grad_logits, share * centred, inside * slope
