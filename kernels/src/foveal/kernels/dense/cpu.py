"""Attention on the CPU without a (query, key) array: torch's flash kernels where they can serve, blocks of rows where they cannot.

Forward: torch's flash forward gives output and log-sum-exp. A window, or causality with as many keys as it likes, becomes blocks of rows,
each with the keys it can see; grouped heads become one call per member of the group, on views. Short sequences (up to 64) are a batched
matmul: there the flash kernel's set-up costs more than the product.

Backward: torch's flash backward where neither the bias nor the log-sum-exp carries a gradient. Else blocks of rows whose probabilities,
recomputed from the log-sum-exp, fit the cache; the bias gradient is added up block by block in the bias's own, unexpanded shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels.dense.reference import finite_above, inside_window

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

#: Longest sequence for which a batched matmul beats the flash kernel.
SHORT = 64
#: Logits of one block that one thread works on: 1 MiB in float32, about a core's own cache.
BLOCK = 2**18
#: Largest additive mask that is built at once.
COMBINED = 2**20
#: Rows of one flash call under a window: the halo of keys costs more below, the masked corners above.
WINDOW_ROWS = 64

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Rows(NamedTuple):
    """A block of query rows and the keys that they can see; `edge` says whether some of these pairs are outside the window."""

    start: int
    stop: int
    first_key: int
    last_key: int
    edge: bool


def row_blocks(queries: int, keys: int, left: int, right: int, rows: int) -> Iterator[Rows]:
    """Cut the queries into blocks of `rows`; blocks that see no key are left out."""
    offset = keys - queries
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        first = max(0, start + offset - left) if left >= 0 else 0
        last = min(keys, stop + offset + right) if right >= 0 else keys
        if last > first:
            whole = (left < 0 or stop - 1 + offset - left <= first) and (right < 0 or start + offset + right >= last - 1)
            yield Rows(start, stop, first, last, not whole)


def _part(tensor: Tensor, block: Rows) -> Tensor:
    """The rows and keys of a block from a (..., query|1, key|1) array, a view."""
    if tensor.shape[-2] > 1:
        tensor = tensor[..., block.start : block.stop, :]
    if tensor.shape[-1] > 1:
        tensor = tensor[..., block.first_key : block.last_key]
    return tensor


def _outside(block: Rows, queries: int, keys: int, left: int, right: int) -> Bool[Tensor, "rows keys"]:
    query = torch.arange(block.start, block.stop) + (keys - queries)
    return ~inside_window(query, torch.arange(block.first_key, block.last_key), left, right)


def _bounded(bias: Tensor | None) -> Tensor | None:
    """The bias without +inf; copied only where it holds one."""
    return finite_above(bias) if bias is not None and bias.numel() and bias.amax() == float("inf") else bias


# --- torch's flash kernels -----------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a flash kernel: the member of the head group, the rows, the additive mask, and torch's own (square) causality."""

    member: slice
    block: Rows
    additive: Tensor | None
    causal: bool


def _flash_calls(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, left: int, right: int) -> Iterator[Call]:
    queries, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    causal = left < 0 and right == 0 and queries == keys
    if causal:
        right = -1
    windowed = left >= 0 or right >= 0
    rows = max(WINDOW_ROWS, (left + right) // 2 if min(left, right) >= 0 else 256) if windowed else queries
    shapes = [tensor.shape for tensor in (bias, mask) if tensor is not None]
    if mask is not None:
        row = torch.broadcast_shapes(*shapes, (1, 1, 1, 1))
        if row[-2] > 1:
            rows = min(rows, max(16, COMBINED // (row[0] * row[1] * row[3])))
    # The kernel takes masks of the query's dtype, or float32 beside half precision; a float32 mask beside float64 it misreads.
    dtype = torch.promote_types(q.dtype, torch.float32)
    for block in row_blocks(queries, keys, left, right, rows):
        outside = _outside(block, queries, keys, left, right) if block.edge else None
        for index in range(group):
            member = slice(index, None, group)
            own_bias, own_mask = (None if t is None else _part(t[:, member] if t.shape[1] > 1 else t, block) for t in (bias, mask))
            yield Call(member, block, _additive(own_bias, own_mask, outside, dtype), causal)


def _additive(bias: Tensor | None, mask: Tensor | None, outside: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias, mask and window as one array to add to the logits; the bias itself, unexpanded and uncopied, where it is alone."""
    shut = outside if mask is None else ~mask if outside is None else ~mask | outside
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


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, left: int, right: int, scale: float, out: Tensor, lse: Tensor
) -> None:
    value_dim = v.shape[-1]
    q, k, v = _same_dim(q, k, v)
    for member, block, additive, causal in _flash_calls(q, k, bias, mask, left, right):
        rows, seen = slice(block.start, block.stop), slice(block.first_key, block.last_key)
        part, sums = _flash(q[:, member, rows], k[:, :, seen], v[:, :, seen], is_causal=causal, attn_mask=additive, scale=scale)
        if additive is not None and (sums == 0).any():  # the kernel's answer for a row without keys, or a coincidence
            sums = torch.where((additive == float("-inf")).all(-1) & (sums == 0), float("-inf"), sums)
        out[:, member, rows] = part[..., :value_dim]
        lse[:, member, rows] = sums


def _flash_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dim, value_dim = q.shape[-1], v.shape[-1]
    q, k, v = _same_dim(q, k, v)
    extra = v.shape[-1] - value_dim
    dout, out = (F.pad(dout, (0, extra)), F.pad(out, (0, extra))) if extra else (dout, out)
    dq = torch.zeros_like(q)
    pieces = q.shape[1] > k.shape[1] or left >= 0 or right >= 0 or mask is not None
    dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if pieces else t for t in (k, v))
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for member, block, additive, causal in _flash_calls(q, k, bias, mask, left, right):
        rows, seen = slice(block.start, block.stop), slice(block.first_key, block.last_key)
        at = (slice(None), member, rows)
        gradients = _flash_backward(dout[at], q[at], k[:, :, seen], v[:, :, seen], out[at], lse[at], 0.0, causal, attn_mask=additive, scale=scale)
        if not pieces:
            dq, dk, dv = gradients
            break
        dq[at] = gradients[0]
        dk[:, :, seen] += gradients[1]
        dv[:, :, seen] += gradients[2]
    return dq[..., :dim], dk[..., :dim].to(k.dtype), dv[..., :value_dim].to(v.dtype)


# --- blocks of logits in the cache ---------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A block of logits: batches, key heads, rows and keys."""

    batch: slice
    heads: slice
    block: Rows


def _tiles(batch: int, kv_heads: int, group: int, queries: int, keys: int, left: int, right: int) -> Iterator[Tile]:
    """Blocks of about `BLOCK` logits a thread: rows first, then whole heads, then whole batches."""
    budget = BLOCK * torch.get_num_threads()
    threads = min(torch.get_num_threads(), kv_heads)
    wide = min(keys, left + right + 1 + WINDOW_ROWS) if min(left, right) >= 0 else keys
    rows = min(queries, max(32, budget // (group * wide * threads)))
    heads = max(threads, min(kv_heads, budget // (group * wide * rows)))
    batches = max(1, min(batch, budget // (group * wide * rows * kv_heads))) if heads == kv_heads else 1
    for first in range(0, batch, batches):
        for head in range(0, kv_heads, heads):
            for block in row_blocks(queries, keys, left, right, rows):
                yield Tile(slice(first, min(first + batches, batch)), slice(head, min(head + heads, kv_heads)), block)


def _grouped(tensor: Tensor, group: int) -> Tensor:
    """(batch, heads|1, ...) as (batch, key heads|1, group|1, ...), a view."""
    return tensor.unflatten(1, (-1, group)) if tensor.shape[1] > 1 else tensor.unsqueeze(2)


def _pick(tensor: Tensor, tile: Tile) -> Tensor:
    """The batches and key heads of a tile, where the array is not broadcast there."""
    tensor = tensor[tile.batch] if tensor.shape[0] > 1 else tensor
    return tensor[:, tile.heads] if tensor.shape[1] > 1 else tensor


class _Operands(NamedTuple):
    """The inputs as views by key head and group, and what cuts them into tiles."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    left: int
    right: int
    scale: float
    dtype: torch.dtype

    def tiles(self) -> Iterator[Tile]:
        batch, kv_heads, group, queries, _ = self.q.shape
        return _tiles(batch, kv_heads, group, queries, self.k.shape[2], self.left, self.right)

    def rows(self, tensor: Tensor, tile: Tile) -> Tensor:
        """(batch, key heads, group, query, dim) cut to the tile, as one matrix a key head: (batch x heads, group x rows, dim)."""
        part = tensor[tile.batch, tile.heads, :, tile.block.start : tile.block.stop].to(self.dtype)
        return part.flatten(2, 3).flatten(0, 1)

    def keys(self, tensor: Tensor, tile: Tile) -> Tensor:
        """(batch, key heads, key, dim) cut to the tile: (batch x heads, keys, dim)."""
        return tensor[tile.batch, tile.heads, tile.block.first_key : tile.block.last_key].to(self.dtype).flatten(0, 1)

    def logits(self, queries: Tensor, keys: Tensor, tile: Tile) -> Float[Tensor, "batch kv_heads group rows keys"]:
        batch, heads, block = tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start, tile.block
        group = self.q.shape[2]
        flat = queries.new_empty(queries.shape[0], queries.shape[1], keys.shape[1])
        torch.baddbmm(flat, queries, keys.mT, beta=0, alpha=self.scale, out=flat)
        logits = flat.view(batch, heads, group, block.stop - block.start, -1)
        if self.bias is not None:
            logits += _part(_pick(self.bias, tile), block)
        if self.mask is not None:
            logits.masked_fill_(~_part(_pick(self.mask, tile), block), float("-inf"))
        if block.edge:
            logits.masked_fill_(_outside(block, self.q.shape[3], self.k.shape[2], self.left, self.right), float("-inf"))
        return logits


def _operands(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, left: int, right: int, scale: float) -> _Operands:
    group = q.shape[1] // k.shape[1]
    bias, mask = (None if t is None else _grouped(t, group) for t in (bias, mask))
    return _Operands(_grouped(q, group), k, v, bias, mask, left, right, scale, torch.promote_types(q.dtype, torch.float32))


def _tiled_forward(operands: _Operands, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`, views of shape (batch, key heads, group, query, ...)."""
    for tile in operands.tiles():
        values = operands.keys(operands.v, tile)
        logits = operands.logits(operands.rows(operands.q, tile), operands.keys(operands.k, tile), tile)
        largest = logits.amax(-1, keepdim=True)
        largest.masked_fill_(largest == float("-inf"), 0.0)
        weights = logits.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        part = torch.bmm(weights.flatten(0, 1).flatten(1, 2), values).view(*total.shape[:-1], -1)
        at = (tile.batch, tile.heads, slice(None), slice(tile.block.start, tile.block.stop))
        lse[at] = (largest + total.log()).squeeze(-1)
        out[at] = part.div_(total.masked_fill_(total == 0, 1.0))


def _tiled_gradients(
    operands: _Operands, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (batch, key heads, group, query, dim), k and v; the bias gradient is added to `dbias`."""
    dtype = operands.dtype
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    lse = lse.masked_fill(lse == float("-inf"), 0.0)  # all logits of such a row are -inf: its weights come out as 0
    dq = torch.zeros_like(operands.q)
    dk, dv = (torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in (operands.k, operands.v))
    for tile in operands.tiles():
        batch, heads, block = tile
        rows, seen = slice(block.start, block.stop), slice(block.first_key, block.last_key)
        queries, keys, values = operands.rows(operands.q, tile), operands.keys(operands.k, tile), operands.keys(operands.v, tile)
        gradient = operands.rows(dout, tile)
        weights = operands.logits(queries, keys, tile).sub_(lse[batch, heads, :, rows, None]).exp_()
        flat = weights.flatten(0, 1).flatten(1, 2)
        slot = dv[batch, heads, seen]
        slot += torch.bmm(flat.mT, gradient).view_as(slot)
        dlogits = torch.bmm(gradient, values.mT).view_as(weights)
        dlogits.sub_(delta[batch, heads, :, rows, None]).mul_(weights)
        if dbias is not None:
            target = _part(_pick(dbias, tile), block)
            target += dlogits.sum_to_size(target.shape)
        flat = dlogits.flatten(0, 1).flatten(1, 2)
        dq[batch, heads, :, rows] = torch.bmm(flat, keys).mul_(operands.scale).view_as(dq[batch, heads, :, rows])
        slot = dk[batch, heads, seen]
        slot += torch.bmm(flat.mT, queries).mul_(operands.scale).view_as(slot)
    return dq, dk.to(operands.k.dtype), dv.to(operands.v.dtype)


# --- the two entry points ------------------------------------------------------------------------------------------------------------


def forward(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    bias: Float[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
    mask: Bool[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
    left: int,
    right: int,
    scale: float,
    out: Float[Tensor, "batch heads query value_dim"],
    lse: Float[Tensor, "batch heads query"],
) -> None:
    """Fill `out` and `lse`. A limit of -1 is no limit; causality is right = 0."""
    out.zero_()
    lse.fill_(float("-inf"))
    if 0 in (*q.shape, *k.shape):
        return
    bias = _bounded(bias)
    if max(q.shape[2], k.shape[2]) > SHORT:
        _flash_forward(q, k, v, bias, mask, left, right, scale, out, lse)
        return
    group = q.shape[1] // k.shape[1]
    _tiled_forward(_operands(q, k, v, bias, mask, left, right, scale), out.unflatten(1, (-1, group)), lse.unflatten(1, (-1, group)))


def backward(
    dout: Float[Tensor, "batch heads query value_dim"],
    dlse: Float[Tensor, "batch heads query"] | None,
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    bias: Float[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
    mask: Bool[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
    out: Float[Tensor, "batch heads query value_dim"],
    lse: Float[Tensor, "batch heads query"],
    left: int,
    right: int,
    scale: float,
    dq: Float[Tensor, "batch heads query dim"],
    dk: Float[Tensor, "batch kv_heads key dim"],
    dv: Float[Tensor, "batch kv_heads key value_dim"],
    dbias: Float[Tensor, "batch|1 heads|1 query|1 key|1"] | None,
) -> None:
    """Fill `dq`, `dk`, `dv`, and `dbias` where it is asked for."""
    if dbias is not None:
        dbias.zero_()
    if 0 in (*q.shape, *k.shape):
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    given, bias = bias, _bounded(bias)
    if dbias is None and dlse is None and max(q.shape[2], k.shape[2]) > SHORT:
        gradients = _flash_gradients(dout, q, k, v, bias, mask, out, lse, left, right, scale)
    else:
        group = q.shape[1] // k.shape[1]
        dout, out, lse = (tensor.unflatten(1, (-1, group)) for tensor in (dout, out, lse))
        dlse = None if dlse is None else dlse.unflatten(1, (-1, group))
        accumulated = None if dbias is None else _grouped(dbias, group)
        gradients = _tiled_gradients(_operands(q, k, v, bias, mask, left, right, scale), dout, out, lse, dlse, accumulated)
        if dbias is not None and given is not None and bias is not given:
            dbias.masked_fill_(given.isposinf(), 0.0)
    for gradient, found in zip((dq, dk, dv), gradients, strict=True):
        gradient.copy_(found.reshape(gradient.shape))
