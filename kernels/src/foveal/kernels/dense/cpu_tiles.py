"""Attention on the CPU in blocks of logits that fit the cache: every option, every gradient.

Forward, a block of rows sees all of its keys, so its weights are known at once. Backward, the weights are computed again from the saved
log-normaliser; the gradient of whatever was added to the logits is summed block by block in that input's own, unexpanded shape.

Logits of softmax are in base 2: torch's `exp2_` takes half the time of its `exp_`, and no more where a logit is -inf or far below the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foveal.kernels.dense.call import Call, normalizer
from foveal.kernels.dense.cpu_dropout import factors
from foveal.kernels.dense.reference import entry_of_pair, inside_window
from foveal.kernels.dense.reference import score as weigh

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

#: Logits of one block that one thread works on: 1 MiB in float32, about a core's own cache.
BLOCK = 2**18
LOG2E, LN2 = math.log2(math.e), math.log(2.0)
#: Rows of one block under a window: the halo of keys costs more below, the masked corners above.
WINDOW_ROWS = 64


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


def part(tensor: Tensor, block: Rows) -> Tensor:
    """The rows and keys of a block from a (..., query|1, key|1) array, a view."""
    if tensor.shape[-2] > 1:
        tensor = tensor[..., block.start : block.stop, :]
    if tensor.shape[-1] > 1:
        tensor = tensor[..., block.first_key : block.last_key]
    return tensor


def outside(block: Rows, queries: int, keys: int, left: int, right: int) -> Bool[Tensor, "rows keys"]:
    """The pairs of a block that the window shuts."""
    query = torch.arange(block.start, block.stop) + (keys - queries)
    return ~inside_window(query, torch.arange(block.first_key, block.last_key), left, right)


def _distance(call: Call, block: Rows) -> Float[Tensor, "rows keys"]:
    query = torch.arange(block.start, block.stop) + (call.k.shape[2] - call.q.shape[-2])
    return (torch.arange(block.first_key, block.last_key)[None, :] - query[:, None]).abs().to(call.wide)


def _entry(call: Call, block: Rows) -> Tensor:
    """The table's entry of every pair of a block."""
    assert call.table is not None
    assert call.query_code is not None
    assert call.key_code is not None
    return entry_of_pair(call.query_code[block.start : block.stop], call.key_code[block.first_key : block.last_key], call.table.shape[-1])


def added_by_position(call: Call, block: Rows) -> Float[Tensor, "... rows keys"] | None:
    """What slopes and tables add to the logits of a block, whatever dimensions stand before query and key."""
    added = None
    if call.alibi is not None:
        added = call.alibi[..., None, None] * -_distance(call, block)
    if call.table is not None:
        entry = _entry(call, block)
        if call.table.shape[-2] == 1:
            looked_up = call.table.squeeze(-2).index_select(-1, entry.flatten()).unflatten(-1, entry.shape)
        else:
            table = call.table[..., block.start : block.stop, :]
            looked_up = table.gather(-1, entry.expand(*table.shape[:-2], -1, -1))
        added = looked_up if added is None else added + looked_up
    return added


def log_divisor(call: Call) -> float:
    """Logarithm of what the weights are divided by where it is not the row's sum."""
    return math.log(normalizer(call, call.k.shape[2]))


def _slope(logits: Tensor, weights: Tensor, name: str, power: int) -> Tensor:
    """f'(x), from x and f(x)."""
    match name:
        case "softmax":
            return weights
        case "sigmoid":
            return weights * (1 - weights)
        case "softplus":
            return logits.sigmoid()
        case "relu":
            return (logits > 0).to(logits.dtype) if power == 1 else power * logits.relu() ** (power - 1)
        case _:
            return (logits != float("-inf")).to(logits.dtype)


class Tile(NamedTuple):
    """A block of logits: batches, key heads, rows and keys."""

    batch: slice
    heads: slice
    block: Rows

    @property
    def rows(self) -> tuple[slice, slice, slice, slice]:
        """Its place in (batch, key heads, group, query, ...)."""
        return self.batch, self.heads, slice(None), slice(self.block.start, self.block.stop)

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        """Its place in (batch, key heads, key, ...)."""
        return self.batch, self.heads, slice(self.block.first_key, self.block.last_key)

    def pick(self, tensor: Tensor, *, rows: bool = False) -> Tensor:
        """The batches and key heads of the tile (with `rows`, also its rows), where (batch|1, key heads|1, group|1, query|1, ...) is not shared."""
        tensor = tensor[self.batch] if tensor.shape[0] > 1 else tensor
        tensor = tensor[:, self.heads] if tensor.shape[1] > 1 else tensor
        return tensor[:, :, :, self.block.start : self.block.stop] if rows and tensor.shape[3] > 1 else tensor


def _tiles(batch: int, kv_heads: int, group: int, queries: int, keys: int, left: int, right: int) -> Iterator[Tile]:
    """Blocks of about `BLOCK` logits a thread: rows first, then whole heads, then whole batches; the batches of one block follow each other."""
    budget = BLOCK * torch.get_num_threads()
    threads = min(torch.get_num_threads(), kv_heads)
    wide = min(keys, left + right + 1 + WINDOW_ROWS) if min(left, right) >= 0 else keys
    rows = min(queries, max(32, budget // (group * wide * threads)))
    heads = max(threads, min(kv_heads, budget // (group * wide * rows)))
    batches = max(1, min(batch, budget // (group * wide * rows * kv_heads))) if heads == kv_heads else 1
    for head in range(0, kv_heads, heads):
        for block in row_blocks(queries, keys, left, right, rows):
            for first in range(0, batch, batches):
                yield Tile(slice(first, min(first + batches, batch)), slice(head, min(head + heads, kv_heads)), block)


def grouped(tensor: Tensor, group: int) -> Tensor:
    """(batch, heads|1, ...) as (batch, key heads|1, group|1, ...), a view."""
    return tensor.unflatten(1, (-1, group)) if tensor.shape[1] > 1 else tensor.unsqueeze(2)


_BY_HEAD = ("q", "bias", "mask", "score_bias", "temperature", "alibi", "table")


class _Operands:
    """A call's inputs as views by key head and group, and what cuts them into tiles."""

    def __init__(self, call: Call) -> None:
        views = {name: grouped(getattr(call, name), call.group) for name in _BY_HEAD if getattr(call, name) is not None}
        self.heads, self.group, self.dtype = call.q.shape[1], call.group, call.wide
        self.call = call.replace(**views)
        self._added: tuple[tuple[slice, Rows], Tensor | None] | None = None

    def tiles(self) -> Iterator[Tile]:
        batch, kv_heads, group, queries, _ = self.call.q.shape
        return _tiles(batch, kv_heads, group, queries, self.call.k.shape[2], self.call.left, self.call.right)

    def rows(self, tensor: Tensor, tile: Tile) -> Tensor:
        """(batch, key heads, group, query, dim) cut to the tile, as one matrix a key head: (batch x heads, group x rows, dim)."""
        return tensor[tile.rows].to(self.dtype).flatten(2, 3).flatten(0, 1)

    def keys(self, tensor: Tensor, tile: Tile) -> Tensor:
        """(batch, key heads, key, dim) cut to the tile: (batch x heads, keys, dim)."""
        return tensor[tile.keys].to(self.dtype).flatten(0, 1)

    def _positions(self, tile: Tile) -> Tensor | None:
        """What positions add to the logits, kept from one batch to the next where the batches share it."""
        call = self.call
        tensors = {name: tile.pick(tensor) for name in ("alibi", "table") if (tensor := getattr(call, name)) is not None}
        if not tensors:
            return None
        if self._added is not None and self._added[0] == (tile.heads, tile.block) and all(t.shape[0] == 1 for t in tensors.values()):
            return self._added[1]
        self._added = (tile.heads, tile.block), added_by_position(call.replace(**tensors), tile.block)
        return self._added[1]

    def logits(self, queries: Tensor, keys: Tensor, tile: Tile) -> tuple[Float[Tensor, "batch kv_heads group rows keys"], Tensor | None]:
        """Logits of a tile (of softmax in base 2), and what the softcap's derivative is there (None without one)."""
        call, block = self.call, tile.block
        unit = LOG2E if call.score == "softmax" else 1.0
        batch, heads = tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start
        flat = queries.new_empty(queries.shape[0], queries.shape[1], keys.shape[1])
        torch.baddbmm(flat, queries, keys.mT, beta=0, alpha=call.scale * unit, out=flat)
        logits = flat.view(batch, heads, self.group, block.stop - block.start, -1)
        steepness = None
        if call.temperature is not None:
            logits /= tile.pick(call.temperature, rows=True)[..., None]
        if call.softcap:
            logits.div_(call.softcap * unit).tanh_()
            steepness = 1 - logits.square()
            logits *= call.softcap * unit
        if call.bias is not None:
            logits.add_(part(tile.pick(call.bias), block), alpha=unit)
        if call.score_bias is not None:
            logits += tile.pick(call.score_bias)[..., None, None]
        positions = self._positions(tile)
        if positions is not None:
            logits.add_(positions, alpha=unit)
        if call.mask is not None:
            logits.masked_fill_(~part(tile.pick(call.mask), block), float("-inf"))
        if block.edge:
            logits.masked_fill_(outside(block, call.q.shape[3], call.k.shape[2], call.left, call.right), float("-inf"))
        return logits, steepness

    def survivors(self, tile: Tile) -> Tensor | None:
        """What dropout multiplies the weights of a tile by."""
        call, block = self.call, tile.block
        if not call.dropout or call.seed is None:
            return None
        batch, kv_heads, group = call.q.shape[:3]
        plane = (torch.arange(batch * kv_heads * group) + call.first_sequence * self.heads).view(batch, kv_heads, group)[tile.batch, tile.heads]
        return factors(call.seed, call.dropout, plane, (block.start, block.stop), (block.first_key, block.last_key), self.dtype)


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill the rows of `out` that see a key, and of `lse` where weights are divided by their sum; no sink, no gate."""
    operands = _Operands(call)
    group, divisor = call.group, normalizer(call, call.k.shape[2])
    out, lse = (tensor.unflatten(1, (-1, group)) for tensor in (out, lse))
    for tile in operands.tiles():
        values = operands.keys(call.v, tile)
        logits, _ = operands.logits(operands.rows(operands.call.q, tile), operands.keys(call.k, tile), tile)
        if call.score == "softmax":
            largest = logits.amax(-1, keepdim=True)
            largest.masked_fill_(largest == float("-inf"), 0.0)
            weights = logits.sub_(largest).exp2_()
        else:
            weights = weigh(logits, call.score, call.power)
        if call.normalize == "sum":
            total = weights.sum(-1, keepdim=True)
            lse[tile.rows] = ((total.log2() + largest) * LN2 if call.score == "softmax" else total.log()).squeeze(-1)
            total = total.masked_fill_(total == 0, 1.0)
        survivors = operands.survivors(tile)
        if survivors is not None:
            weights *= survivors
        product = torch.bmm(weights.flatten(0, 1).flatten(1, 2), values).view(*weights.shape[:-1], -1)
        out[tile.rows] = product.div_(total if call.normalize == "sum" else divisor)


def backward(call: Call, dout: Tensor, delta: Tensor, lse: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill the gradients of q, k and v; add those of the other inputs to what is there.

    `delta` is the row sum of out x dout, less the gradient of the log-normaliser: what a division by the row's sum takes off every gradient.
    """
    operands = _Operands(call)
    dtype, group = operands.dtype, call.group
    dout, delta, lse = (tensor.unflatten(1, (-1, group)) for tensor in (dout, delta, lse))
    added = {name: grouped(gradient, group) for name, gradient in gradients.items() if name in _BY_HEAD and name != "q"}
    # A row without keys has only logits of -inf: with a finite normaliser its weights come out as 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    dq = gradients["q"].unflatten(1, (-1, group))
    dq.zero_()
    dk, dv = (torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in (call.k, call.v))
    for tile in operands.tiles():
        queries, keys, values = operands.rows(operands.call.q, tile), operands.keys(call.k, tile), operands.keys(call.v, tile)
        gradient = operands.rows(dout, tile)
        logits, steepness = operands.logits(queries, keys, tile)
        if call.score == "softmax":
            weights = slope = logits.sub_(lse[tile.rows][..., None], alpha=LOG2E).exp2_()
        else:
            share = (-lse[tile.rows][..., None]).exp()
            weights = weigh(logits, call.score, call.power)
            slope = _slope(logits, weights, call.score, call.power) * share
            weights = weights * share
        survivors = operands.survivors(tile)
        flat = (weights if survivors is None else weights * survivors).flatten(0, 1).flatten(1, 2)
        slot = dv[tile.keys]
        slot += torch.bmm(flat.mT, gradient).view_as(slot)
        dlogits = torch.bmm(gradient, values.mT).view_as(weights)
        if survivors is not None:
            dlogits *= survivors
        if call.normalize == "sum":
            dlogits -= delta[tile.rows][..., None]
        dlogits *= slope
        _add_to_logit_inputs(operands.call, tile, dlogits, added)
        if steepness is not None:
            dlogits *= steepness
        if operands.call.temperature is not None:
            dlogits /= tile.pick(operands.call.temperature, rows=True)[..., None]
        flat = dlogits.flatten(0, 1).flatten(1, 2)
        found = torch.bmm(flat, keys).mul_(call.scale)
        dq[tile.rows] = found.view_as(dq[tile.rows])
        if "temperature" in added and operands.call.temperature is not None:
            target = tile.pick(added["temperature"], rows=True)
            moved = (found * queries).sum(-1).view(delta[tile.rows].shape) / tile.pick(operands.call.temperature, rows=True)
            target -= moved.sum_to_size(target.shape)
        slot = dk[tile.keys]
        slot += torch.bmm(flat.mT, queries).mul_(call.scale).view_as(slot)
    gradients["k"].copy_(dk)
    gradients["v"].copy_(dv)


def _add_to_logit_inputs(call: Call, tile: Tile, dlogits: Float[Tensor, "batch kv_heads group rows keys"], added: dict[str, Tensor]) -> None:
    """Add a tile's gradient of the logits to the gradients of what was added to them."""
    if "bias" in added:
        target = part(tile.pick(added["bias"]), tile.block)
        target += dlogits.sum_to_size(target.shape)
    if "score_bias" in added:
        target = tile.pick(added["score_bias"])
        target += dlogits.sum((-2, -1)).sum_to_size(target.shape)
    if "alibi" in added:
        target = tile.pick(added["alibi"])
        target -= torch.linalg.vecdot(dlogits.flatten(-2), _distance(call, tile.block).flatten()).sum_to_size(target.shape)
    if "table" in added:
        target = tile.pick(added["table"], rows=True)
        entry = _entry(call, tile.block)
        if target.shape[-2] == 1:  # one table for all queries: its diagonals are summed
            summed = dlogits.sum_to_size(*target.shape[:3], *entry.shape).flatten(-2)
            target.squeeze(-2).scatter_add_(-1, entry.flatten().expand_as(summed), summed)
        else:
            summed = dlogits.sum_to_size(*target.shape[:3], *entry.shape)
            target.scatter_add_(-1, entry.expand_as(summed), summed)
