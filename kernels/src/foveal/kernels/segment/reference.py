"""Definitions by gather and scatter: any floating dtype, any device, differentiable to any order. Slow and large, and meant to be read.

`edge_index` is (2, edges): sources j, then targets i. Softmax statistics are kept in float32 at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def softmax(
    logits: Float[Tensor, "edges *rest"], index: Int[Tensor, " edges"], num_nodes: int, envelope: Tensor | None = None, eps: float = 0.0
) -> Float[Tensor, "edges *rest"]:
    """``u exp(s - m) / (sum u exp(s - m) + eps)`` over the edges of a node, m its largest s, a constant; 0 where the sum is 0."""
    peak = reduce(logits.detach(), index, num_nodes, "max")
    share = (logits - peak.masked_fill(peak == -torch.inf, 0.0)[index]).exp()
    share = share if envelope is None else share * envelope
    total = reduce(share, index, num_nodes, "sum")
    return share / (total + eps).masked_fill(total == 0, torch.inf)[index]


def reduce(src: Float[Tensor, "edges *rest"], index: Int[Tensor, " edges"], num_nodes: int, how: str) -> Float[Tensor, "nodes *rest"]:
    """Sum, mean, max or min of the edges of each node; 0 for a node without edges."""
    name = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}[how]
    place = index.reshape(-1, *[1] * (src.dim() - 1)).expand_as(src)
    return src.new_zeros(num_nodes, *src.shape[1:]).scatter_reduce(0, place, src, name, include_self=False)


def attention(
    q: Float[Tensor, "targets heads dim"] | None,
    k: Float[Tensor, "sources heads dim"] | None,
    v: Float[Tensor, "sources heads value_dim"],
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    bias: Float[Tensor, "edges heads"] | None,
    envelope: Float[Tensor, "edges heads"] | None,
    gate: Float[Tensor, "edges heads"] | None,
    scale: float,
    eps: float,
    keys_on_edges: bool,
    values_on_edges: bool,
) -> tuple[Float[Tensor, "targets heads value_dim"], Float[Tensor, "edges heads"]]:
    """Output of each node and weight of each edge, as `foveal.kernels.segment_attention` states them."""
    source, target = edge_index
    wide = torch.promote_types(v.dtype, torch.float32)
    logits = torch.zeros((), dtype=wide, device=v.device)
    if q is not None and k is not None:
        logits = scale * (q[target] * (k if keys_on_edges else k[source])).sum(-1).to(wide)
    if bias is not None:
        logits = logits + bias
    weights = softmax(logits, target, num_nodes, envelope, eps)
    weights = weights if gate is None else weights * gate
    messages = weights.to(v.dtype).unsqueeze(-1) * (v if values_on_edges else v[source])
    return v.new_zeros(num_nodes, *v.shape[1:]).index_add(0, target, messages), weights
