"""Neighbourhood attention on the CPU: tiles of queries, each with the box of keys around it, as batched matrix products.

A tile of 64 neighbouring queries sees hardly more keys than one of them (7 x 7 windows on an 8 x 8 tile: 14 x 14 keys), so a dense product
of the tile with its box wastes little and runs at the speed of matrix products; what lies outside a query's own window is shut by adding
-inf. All tiles away from the borders look alike: tiles of one pattern (sizes, windows, place of the box) are computed together and share
one array of -inf and relative biases, which no batch or tile repeats. A dilated axis is cut into its interleaved axes first.

Backward recomputes the weights from the log-sum-exp, tile by tile, and adds the gradients of the boxes where they overlap.

Logits are kept in base 2: torch's `exp` takes five to twenty times as long for an entry that is shut as for another, its `exp2` does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from foveal.kernels.neighborhood.reference import window

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

#: Queries of a tile, by the number of axes longer than one token.
TILES = {0: (1,), 1: (64,), 2: (8, 8), 3: (4, 4, 4)}
#: Logits that one thread works on at once: 1 MiB in float32, about a core's own cache.
BLOCK = 2**18
LOG2E = math.log2(math.e)

Slices = tuple[slice, slice, slice]


class Pattern(NamedTuple):
    """What tiles may share along one axis: for each query its first key and one past its last in the box, and the box's own place."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    keys: int
    offset: int  # of the box's first key from the tile's first query

    def inside(self) -> Tensor:
        """(query, key): whether the query sees the key."""
        key = torch.arange(self.keys)
        return (key >= torch.tensor(self.first)[:, None]) & (key < torch.tensor(self.last)[:, None])

    def relative(self, kernel: int) -> Tensor:
        """(query, key): entry of the relative table; any valid entry where the pair is not seen."""
        distance = torch.arange(self.keys) + self.offset - torch.arange(len(self.first))[:, None]
        return (distance + kernel - 1).clamp(0, 2 * kernel - 2)


class Group(NamedTuple):
    """Tiles of one pattern: where their queries and their boxes of keys lie."""

    patterns: tuple[Pattern, Pattern, Pattern]
    queries: list[Slices]
    keys: list[Slices]

    def sizes(self) -> tuple[int, int]:
        """Queries of a tile and keys of its box."""
        rows = columns = 1
        for pattern in self.patterns:
            rows, columns = rows * len(pattern.first), columns * pattern.keys
        return rows, columns


def _spans(length: int, tile: int, kernel: int, stride: int, dilation: int, causal: bool) -> Iterator[tuple[Pattern, slice, slice]]:
    """The tiles of one axis: pattern, place of the queries, place of the keys."""
    for member in range(dilation):
        inner = -(-(length - member) // dilation)
        starts, ends = (bound.tolist() for bound in window(torch.arange(inner), inner, kernel, stride, causal))
        for begin in range(0, inner, tile):
            end = min(begin + tile, inner)
            low, high = starts[begin], ends[end - 1]
            pattern = Pattern(tuple(s - low for s in starts[begin:end]), tuple(e - low for e in ends[begin:end]), high - low, low - begin)
            queries, keys = (slice(member + dilation * a, member + dilation * (b - 1) + 1, dilation) for a, b in ((begin, end), (low, high)))
            yield pattern, queries, keys


@functools.lru_cache(maxsize=64)
def plan(
    shape: tuple[int, int, int],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    dilation: tuple[int, int, int],
    causal: tuple[bool, bool, bool],
) -> tuple[Group, ...]:
    """Cut the tokens into tiles and sort these by their pattern."""
    sizes = iter(TILES[sum(length > 1 for length in shape)])
    tile = [next(sizes) if length > 1 else 1 for length in shape]
    axes = [list(_spans(*axis)) for axis in zip(shape, tile, kernel, stride, dilation, causal, strict=True)]
    groups: dict[tuple[Pattern, ...], Group] = {}
    for (px, qx, kx), (py, qy, ky), (pz, qz, kz) in product(*axes):
        group = groups.setdefault((px, py, pz), Group((px, py, pz), [], []))
        group.queries.append((qx, qy, qz))
        group.keys.append((kx, ky, kz))
    return tuple(groups.values())


# Masks and entries are kept between calls, which differ only in their tokens.


@functools.lru_cache(maxsize=64)
def _inside(patterns: tuple[Pattern, Pattern, Pattern]) -> Bool[Tensor, "query key"]:
    """Whether a tile's query sees a key of its box."""
    with torch.inference_mode(False), torch.device("cpu"):
        x, y, z = (pattern.inside() for pattern in patterns)
        return (x[:, None, None, :, None, None] & y[:, None, None, :, None] & z[:, None, None, :]).flatten(3).flatten(0, 2)


@functools.lru_cache(maxsize=64)
def _shut(patterns: tuple[Pattern, Pattern, Pattern], dtype: torch.dtype) -> Float[Tensor, "1 query key"]:
    """0 where the query sees the key, -inf elsewhere."""
    with torch.inference_mode(False), torch.device("cpu"):
        inside = _inside(patterns)
        return torch.zeros(1, *inside.shape, dtype=dtype).masked_fill_(~inside, float("-inf"))


@functools.lru_cache(maxsize=64)
def _entries(patterns: tuple[Pattern, Pattern, Pattern], kernel: tuple[int, ...]) -> Int[Tensor, "query key"]:
    """Entry of the flattened table of relative biases."""
    with torch.inference_mode(False), torch.device("cpu"):
        x, y, z = (pattern.relative(size) for pattern, size in zip(patterns, kernel, strict=True))
        _, wide, deep = (2 * size - 1 for size in kernel)
        index = (x[:, None, None, :, None, None] * wide + y[:, None, None, :, None]) * deep + z[:, None, None, :]
        return index.flatten(3).flatten(0, 2)


class _Call:
    """One call: its inputs, and how its tiles are cut out, multiplied and put back."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rpb: Tensor | None,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        causal: Sequence[bool],
        scale: float,
    ) -> None:
        self.q, self.k, self.v, self.rpb, self.kernel, self.scale = q, k, v, rpb, kernel, scale
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.groups = plan(*(tuple(each) for each in (q.shape[2:5], kernel, stride, dilation, causal)))

    def additive(self, group: Group) -> Float[Tensor, "heads|1 query key"]:
        """Relative biases of a tile in base 2, -inf where the key is outside the query's window."""
        if self.rpb is None:
            return _shut(group.patterns, self.dtype)
        table = (self.rpb.to(self.dtype) * LOG2E).flatten(1)
        return table[:, self.entries(group)].masked_fill_(~_inside(group.patterns), float("-inf"))

    def entries(self, group: Group) -> Int[Tensor, "query key"]:
        return _entries(group.patterns, tuple(self.kernel))

    def pieces(self, group: Group) -> Iterator[tuple[slice, slice, slice]]:
        """Batches, heads and tiles of a group that are computed at once."""
        batch, heads = self.q.shape[:2]
        rows, columns = group.sizes()
        budget = BLOCK * torch.get_num_threads() // max(1, rows * columns)
        head_step = max(1, min(heads, budget))
        tile_step = max(1, min(len(group.queries), budget // heads))
        batch_step = max(1, min(batch, budget // (heads * tile_step)))
        for b, h, t in product(range(0, batch, batch_step), range(0, heads, head_step), range(0, len(group.queries), tile_step)):
            yield slice(b, min(b + batch_step, batch)), slice(h, min(h + head_step, heads)), slice(t, min(t + tile_step, len(group.queries)))

    def gather(self, tensor: Tensor, places: list[Slices], piece: tuple[slice, slice, slice]) -> Float[Tensor, "matrix rows dim"]:
        """Tiles or boxes of a (batch, heads, x, y, z, dim) array, one matrix each, ordered (batch, tile, head)."""
        b, h, t = piece
        chosen = places[t]
        part = tensor[b, h]
        first = part[(slice(None), slice(None), *chosen[0])]
        found = torch.empty(first.shape[0], len(chosen), *first.shape[1:], dtype=self.dtype)
        for index, place in enumerate(chosen):
            found[:, index] = part[(slice(None), slice(None), *place)]
        return found.flatten(3, 5).flatten(0, 2)

    def put(self, target: Tensor, found: Tensor, places: list[Slices], piece: tuple[slice, slice, slice], *, add: bool = False) -> None:
        """The opposite of `gather`: store the tiles, or add the boxes."""
        b, h, t = piece
        part = target[b, h]
        shape = part[(slice(None), slice(None), *places[t.start])].shape
        tiles = found.view(shape[0], t.stop - t.start, *shape[1:])
        for index, place in enumerate(places[t]):
            slot = part[(slice(None), slice(None), *place)]
            if add:
                slot += tiles[:, index]
            else:
                slot.copy_(tiles[:, index])

    def logits(self, queries: Tensor, keys: Tensor, additive: Tensor, heads: slice) -> Float[Tensor, "matrix query key"]:
        found = queries.new_empty(queries.shape[0], queries.shape[1], keys.shape[1])
        found.view(-1, heads.stop - heads.start, *found.shape[1:]).copy_(additive[heads] if additive.shape[0] > 1 else additive)
        return found.baddbmm_(queries, keys.mT, alpha=self.scale * LOG2E)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    out: Float[Tensor, "batch heads x y z value_dim"],
    lse: Float[Tensor, "batch heads x y z"],
) -> None:
    """Fill `out` and `lse`; arguments as in `neighborhood_reference`."""
    if q.numel() == 0:
        return
    call = _Call(q, k, v, rpb, kernel, stride, dilation, causal, scale)
    sums = lse.unsqueeze(-1)
    for group in call.groups:
        additive = call.additive(group)
        for piece in call.pieces(group):
            logits = call.logits(call.gather(q, group.queries, piece), call.gather(k, group.keys, piece), additive, piece[1])
            largest = logits.amax(-1, keepdim=True)
            if rpb is not None:  # a table of -inf may shut a row
                largest.masked_fill_(largest == float("-inf"), 0.0)
            weights = logits.sub_(largest).exp2_()
            total = weights.sum(-1, keepdim=True)
            found = torch.bmm(weights, call.gather(v, group.keys, piece))
            call.put(sums, (largest + total.log2()) / LOG2E, group.queries, piece)
            call.put(out, found.div_(total.masked_fill_(total == 0, 1.0)), group.queries, piece)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    scale: float,
    dq: Float[Tensor, "batch heads x y z dim"],
    dk: Float[Tensor, "batch heads x y z dim"],
    dv: Float[Tensor, "batch heads x y z value_dim"],
    drpb: Float[Tensor, "heads relative_x relative_y relative_z"] | None,
) -> None:
    """Fill `dq`, `dk`, `dv`, and `drpb` where it is asked for."""
    if drpb is not None:
        drpb.zero_()
    if q.numel() == 0:
        return
    call = _Call(q, k, v, rpb, kernel, stride, dilation, causal, scale)
    delta = (dout.to(call.dtype) * out.to(call.dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1)
    sums = lse.masked_fill(lse == float("-inf"), 0.0).mul_(LOG2E).unsqueeze(-1)
    dk_sum, dv_sum = (torch.zeros(t.shape, dtype=call.dtype) for t in (k, v))
    for group in call.groups:
        additive = call.additive(group)
        shared = torch.zeros(q.shape[1], *group.sizes(), dtype=call.dtype) if drpb is not None else None
        for piece in call.pieces(group):
            queries, gradient, taken, sums_of = (call.gather(t, group.queries, piece) for t in (q, dout, delta, sums))
            keys, values = (call.gather(t, group.keys, piece) for t in (k, v))
            weights = call.logits(queries, keys, additive, piece[1]).sub_(sums_of).exp2_()
            call.put(dv_sum, torch.bmm(weights.mT, gradient), group.keys, piece, add=True)
            dlogits = torch.bmm(gradient, values.mT).sub_(taken).mul_(weights)
            if shared is not None:
                shared[piece[1]] += dlogits.view(-1, piece[1].stop - piece[1].start, *group.sizes()).sum(0)
            call.put(dq, torch.bmm(dlogits, keys).mul_(scale), group.queries, piece)
            call.put(dk_sum, torch.bmm(dlogits.mT, queries).mul_(scale), group.keys, piece, add=True)
        if shared is not None and drpb is not None:
            table = drpb.view(-1)
            entry = call.entries(group).flatten() + torch.arange(q.shape[1])[:, None] * (table.numel() // q.shape[1])
            table.index_add_(0, entry.flatten(), shared.flatten().to(table.dtype))
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)
