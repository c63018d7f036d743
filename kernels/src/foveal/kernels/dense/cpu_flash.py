"""Attention by torch's flash kernels for the CPU, which know neither windows nor grouped heads nor tables.

A window, or causality with as many keys as it likes, becomes blocks of rows, each with the keys it can see; grouped heads become one call per
member of the group, on views; what is added to the logits becomes one array a block. A temperature divides the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.dense.call import Call
from foveal.kernels.dense.cpu_tiles import WINDOW_ROWS, Rows, added_by_position, outside, part, row_blocks

#: Largest additive mask that is built at once.
COMBINED = 2**20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Piece(NamedTuple):
    """One call of a flash kernel: the member of the head group, the rows, the additive mask, and torch's own (square) causality."""

    member: slice
    block: Rows
    additive: Tensor | None
    causal: bool


def _pieces(call: Call) -> Iterator[_Piece]:
    queries, keys, group, left, right = call.q.shape[2], call.k.shape[2], call.group, call.left, call.right
    causal = left < 0 and right == 0 and queries == keys
    if causal:
        right = -1
    windowed = left >= 0 or right >= 0
    rows = max(WINDOW_ROWS, (left + right) // 2 if min(left, right) >= 0 else 256) if windowed else queries
    built = [tensor.shape[:2] for tensor in (call.alibi, call.table) if tensor is not None]
    if call.mask is not None or built:
        by_pair = [tensor.shape for tensor in (call.bias, call.mask) if tensor is not None]
        row = torch.broadcast_shapes(*by_pair, *((*planes, queries, keys) for planes in built), (1, 1, 1, 1))
        if row[-2] > 1:
            rows = min(rows, max(16, COMBINED // (row[0] * row[1] * row[3])))
    by_head = {name: t for name in ("bias", "mask", "alibi", "table") if (t := getattr(call, name)) is not None and t.shape[1] > 1}
    for block in row_blocks(queries, keys, left, right, rows):
        beyond = outside(block, queries, keys, left, right) if block.edge else None
        for index in range(group):
            member = slice(index, None, group)
            own = call.replace(**{name: tensor[:, member] for name, tensor in by_head.items()}) if by_head else call
            yield _Piece(member, block, _additive(own, block, beyond), causal)


def _additive(call: Call, block: Rows, beyond: Tensor | None) -> Tensor | None:
    """Bias, positions, mask and window as one array to add to the logits; the bias itself, unexpanded and uncopied, where it is alone."""
    # The kernel takes masks of the query's dtype, or float32 beside half precision; a float32 mask beside float64 it misreads.
    dtype = call.wide
    bias, mask = (None if tensor is None else part(tensor, block) for tensor in (call.bias, call.mask))
    shut = beyond if mask is None else ~mask if beyond is None else ~mask | beyond
    positions = added_by_position(call, block)
    if positions is not None:
        bias = positions if bias is None else bias.to(dtype) + positions
    if bias is None:
        return None if shut is None else torch.zeros(shut.shape, dtype=dtype).masked_fill_(shut, float("-inf"))[(None,) * (4 - shut.dim())]
    bias = bias.to(dtype)
    if shut is not None:
        return bias.masked_fill(shut, float("-inf"))
    return bias if bias.stride(-1) in (0, 1) else bias.contiguous()


def _same_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The flash kernel wants one head dimension: the shorter side is padded with zeros, which change nothing."""
    extra = v.shape[-1] - q.shape[-1]
    if extra > 0:
        return F.pad(q, (0, extra)), F.pad(k, (0, extra)), v
    return q, k, F.pad(v, (0, -extra)) if extra else v


def _shut_rows(additive: Tensor, keys: int, causal: bool) -> Tensor:
    """The rows that see no key, (..., query|1)."""
    is_open = (additive > float("-inf")).expand(*additive.shape[:-1], keys)
    if not causal:
        return ~is_open.any(-1)
    up_to = is_open.int().cummax(-1).values == 1  # whether any key up to each one is open
    return ~(up_to.squeeze(-2) if up_to.shape[-2] == 1 else up_to.diagonal(dim1=-2, dim2=-1))


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill the rows of `out` and `lse` that see a key."""
    value_dim = call.v.shape[-1]
    q = call.q if call.temperature is None else call.q / call.temperature[..., None]
    q, k, v = _same_dim(q, call.k, call.v)
    for member, block, additive, causal in _pieces(call):
        rows, seen = slice(block.start, block.stop), slice(block.first_key, block.last_key)
        result, sums = _flash(q[:, member, rows], k[:, :, seen], v[:, :, seen], is_causal=causal, attn_mask=additive, scale=call.scale)
        if additive is not None and (sums == 0).any():  # the kernel's answer for a row without keys, or a coincidence
            sums = sums.masked_fill((sums == 0) & _shut_rows(additive, block.last_key - block.first_key, causal), float("-inf"))
        out[:, member, rows] = result[..., :value_dim]
        lse[:, member, rows] = sums


def backward(call: Call, dout: Tensor, out: Tensor, lse: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill the gradients of q, k and v."""
    dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    q = call.q if call.temperature is None else call.q / call.temperature[..., None]
    q, k, v = _same_dim(q, call.k, call.v)
    extra = v.shape[-1] - value_dim
    dout, out = (F.pad(dout, (0, extra)), F.pad(out, (0, extra))) if extra else (dout, out)
    dq = torch.zeros_like(q)
    in_pieces = call.group > 1 or call.left >= 0 or call.right >= 0 or any(t is not None for t in (call.mask, call.alibi, call.table))
    dk, dv = (torch.zeros_like(t, dtype=call.wide) if in_pieces else t for t in (k, v))
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for member, block, additive, causal in _pieces(call):
        rows, seen = slice(block.start, block.stop), slice(block.first_key, block.last_key)
        at = (slice(None), member, rows)
        found = _flash_backward(dout[at], q[at], k[:, :, seen], v[:, :, seen], out[at], lse[at], 0.0, causal, attn_mask=additive, scale=call.scale)
        if not in_pieces:
            dq, dk, dv = found
            break
        dq[at] = found[0]
        dk[:, :, seen] += found[1]
        dv[:, :, seen] += found[2]
    dq = dq[..., :dim]
    gradients["q"].copy_(dq if call.temperature is None else dq / call.temperature[..., None])
    gradients["k"].copy_(dk[..., :dim])
    gradients["v"].copy_(dv[..., :value_dim])
