"""The definition of attention, in plain torch: any floating dtype, any device, differentiable as often as one likes, (query, key) in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

#: What a bias of +inf counts as: its keys take the row's whole weight, and the log-sum-exp stays finite.
POSITIVE_INFINITY = 1000.0


def finite_above(bias: Tensor) -> Tensor:
    """The bias with +inf replaced; a replaced entry has gradient zero."""
    return torch.where(bias == float("inf"), torch.full((), POSITIVE_INFINITY, dtype=bias.dtype, device=bias.device), bias)


def inside_window(query: Tensor, key: Tensor, left: int, right: int) -> Bool[Tensor, "query key"]:
    """Whether query position i (counted so that the last query meets the last key) may see key j: i - left <= j <= i + right; -1 is no limit."""
    distance = key[None, :] - query[:, None]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (distance >= -left)
    if right >= 0:
        allowed = allowed & (distance <= right)
    return allowed


def attention_reference(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    bias: Float[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
    mask: Bool[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
    left: int,
    right: int,
    scale: float,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """softmax(scale q k^T + bias) v over the keys that mask and window allow, and the log-sum-exp of the logits.

    A row without keys gives 0 and -inf, with zero gradients. Logits and softmax of half precision inputs are float32.
    """
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q @ k.mT).to(wide) * scale
    if bias is not None:
        logits = logits + finite_above(bias)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if left >= 0 or right >= 0:
        queries, keys = logits.shape[-2:]
        query, key = torch.arange(keys - queries, keys, device=q.device), torch.arange(keys, device=q.device)
        logits = logits.masked_fill(~inside_window(query, key, left, right), float("-inf"))
    shut = (logits == float("-inf")).all(-1, keepdim=True)
    logits = logits.masked_fill(shut, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(shut, 0.0)
    lse = torch.logsumexp(logits, -1).masked_fill(shut.squeeze(-1), float("-inf"))
    return weights.to(v.dtype) @ v, lse
