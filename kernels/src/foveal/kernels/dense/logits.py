"""What attention's Triton kernels share: how they read their inputs, and the two places where the mathematics of an option stands.

`modify` turns the product of a query and a key into a logit and tells its derivative; `curve` turns a logit into a weight and tells its
derivative. Every kernel, forward or backward, calls these two, so an option is written once and a kernel only says how it tiles.

A call travels as three arguments: `Inputs` (pointers with strides), `Sizes` (numbers) and `Features` (what is compiled in). Logits of softmax
are kept in base 2 (`exp2` is one instruction), those of the other scores as they are; the log-normaliser outside is natural.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from foveal.kernels.dense.philox import ROUNDS
from foveal.kernels.dense.reference import POSITIVE_INFINITY

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))
BIAS_CEILING: tl.constexpr = tl.constexpr(POSITIVE_INFINITY)
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(ROUNDS)


class Matrix(NamedTuple):
    """A (batch, head, row, column) array, columns contiguous; also a vector or a scalar a (batch, head). Strides of 0 where it is shared."""

    data: Any
    batch: Any = 0
    head: Any = 0
    row: Any = 0


class Pairs(NamedTuple):
    """A (batch, head, query, key) array."""

    data: Any
    batch: Any = 0
    head: Any = 0
    query: Any = 0
    key: Any = 0


class Inputs(NamedTuple):
    """The tensors of a `Call`; data is None where an option is off."""

    q: Matrix
    k: Matrix
    v: Matrix
    bias: Pairs
    mask: Pairs
    score_bias: Matrix
    temperature: Matrix
    sinks: Matrix
    alibi: Matrix
    gate: Matrix
    table: Matrix
    query_code: Any
    key_code: Any
    seed: Any
    cu_queries: Any
    cu_keys: Any


class Sizes(NamedTuple):
    """The numbers of a `Call`. `batches` are sequences; `queries` and `keys` are the longest ones."""

    batches: Any
    heads: Any
    group: Any
    queries: Any
    keys: Any
    entries: Any
    left: Any
    right: Any
    scale: Any
    softcap: Any
    threshold: Any  # random words below it drop their pair
    growth: Any  # what the others grow by


@dataclass(frozen=True)
class Features:
    """What is compiled into a kernel. `gate`: 0 none, 1 a number a row, 2 a number a channel. UPCAST loads in float32, as triton's interpreter

    needs for bfloat16; `dot` is the dtype in which weights enter a product, `precision` how float32 does.
    """

    dim: int
    value_dim: int
    width: int
    value_width: int
    dot: str
    precision: str
    upcast: bool = False
    score: str = "softmax"
    power: int = 1
    normalize: str = "sum"
    bias: bool = False
    mask: bool = False
    left: bool = False
    right: bool = False
    score_bias: bool = False
    temperature: bool = False
    softcap: bool = False
    sinks: bool = False
    alibi: bool = False
    table: bool = False
    gate: int = 0
    dropout: bool = False
    varlen: bool = False

    @property
    def parted(self) -> bool:
        """Whether products with whole rows are taken a part of the row at a time: three TF32 products of 256 float32 fill the registers alone."""
        return self.dot == "fp32" and max(self.width, self.value_width) > 128

    @property
    def modified(self) -> bool:
        """Whether a tile of logits needs a second tile of registers beside it."""
        return self.bias or self.mask or self.table or self.dropout or self.softcap or self.score != "softmax"


class Spot(NamedTuple):
    """Where one head of one sequence finds what changes its logits."""

    queries: Any
    keys: Any
    bias: Any
    mask: Any
    table: Any
    temperature: Any
    slope: Any
    shift: Any
    seed: Any
    plane: Any


@triton.jit
def load_rows(base, first, count, stride, LENGTH: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Rows first .. first + LENGTH of a (count, DIM) matrix, zero beyond its end and beyond DIM."""
    position = first  # in the interpreter a loop's index is a Python int, an assigned name is a tensor
    row = position + tl.arange(0, LENGTH)
    column = tl.arange(0, WIDTH)
    pointers = base + position.to(tl.int64) * stride + tl.arange(0, LENGTH)[:, None] * stride + column[None, :]
    if DIM == WIDTH:
        tile = tl.load(pointers, mask=row[:, None] < count, other=0.0)
    else:
        tile = tl.load(pointers, mask=(row[:, None] < count) & (column[None, :] < DIM), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(base, tile, first, count, stride, LENGTH: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    position = first  # in the interpreter a loop's index is a Python int, an assigned name is a tensor
    row = position + tl.arange(0, LENGTH)
    column = tl.arange(0, WIDTH)
    pointers = base + position.to(tl.int64) * stride + tl.arange(0, LENGTH)[:, None] * stride + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(row[:, None] < count) & (column[None, :] < DIM))


@triton.jit
def at(matrix, batch, head, row):
    """Pointer to a row of a matrix; batch, head and row in 64 bits."""
    return matrix.data + batch * matrix.batch + head * matrix.head + row * matrix.row


@triton.jit
def extent(x, n, batch, F: tl.constexpr):
    """First row and number of rows of a sequence's queries, and of its keys."""
    first_query = tl.full([], 0, tl.int64)
    first_key = tl.full([], 0, tl.int64)
    queries = n.queries
    keys = n.keys
    if F.varlen:
        first_query = tl.load(x.cu_queries + batch).to(tl.int64)
        queries = (tl.load(x.cu_queries + batch + 1) - first_query).to(tl.int32)
        first_key = tl.load(x.cu_keys + batch).to(tl.int64)
        keys = (tl.load(x.cu_keys + batch + 1) - first_key).to(tl.int32)
    return first_query, queries, first_key, keys


@triton.jit
def locate(x, n, batch, head, first_query, queries, keys, F: tl.constexpr):
    """The `Spot` of a head of a sequence."""
    nothing = x.q.data
    bias = nothing
    mask = nothing
    table = nothing
    temperature = nothing
    slope = 0.0
    shift = 0.0
    seed = 0
    if F.bias:
        bias = x.bias.data + batch * x.bias.batch + head * x.bias.head
    if F.mask:
        mask = x.mask.data + batch * x.mask.batch + head * x.mask.head
    if F.table:
        table = at(x.table, batch, head, first_query)
    if F.temperature:
        temperature = at(x.temperature, batch, head, first_query)
    if F.alibi:
        slope = tl.load(x.alibi.data + batch * x.alibi.batch + head * x.alibi.head).to(tl.float32)
    if F.score_bias:
        shift = tl.load(x.score_bias.data + batch * x.score_bias.batch + head * x.score_bias.head).to(tl.float32)
    if F.dropout:
        seed = tl.load(x.seed)
    return Spot(queries, keys, bias, mask, table, temperature, slope, shift, seed, (batch * n.heads + head).to(tl.int32))


@triton.jit
def load_rates(x, row, spot, F: tl.constexpr):
    """1 / temperature of some rows."""
    rates = 1.0
    if F.temperature:
        rates = 1.0 / tl.load(spot.temperature + row * x.temperature.row, mask=row < spot.queries, other=1.0)
    return rates


@triton.jit
def load_sums(lse, delta, row, queries):
    """Log-normaliser in base 2 and delta of some rows; rows without keys and rows beyond the end get +inf, which makes every weight 0."""
    sums = tl.load(lse + row, mask=row < queries, other=float("-inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
    return sums, tl.load(delta + row, mask=row < queries, other=0.0)


@triton.jit
def unit(F: tl.constexpr):
    """What a natural logit is multiplied by: softmax counts in base 2."""
    if F.score == "softmax":
        return LOG2E
    else:
        return 1.0


@triton.jit
def separation(query, key, first, start, queries, keys):
    """Key position less query position, counted so that the last query meets the last key."""
    return (key - query) + (start - first - (keys - queries))


@triton.jit
def entry_of(query, key, first, start, x, n, spot, F: tl.constexpr):
    """The table's entry of each pair."""
    row = tl.load(x.query_code + first + query, mask=query < spot.queries - first, other=0)
    column = tl.load(x.key_code + start + key, mask=key < spot.keys - start, other=0)
    entry = column - row
    if F.varlen:  # the codes count from the start of both
        entry -= spot.keys - spot.queries
    return tl.minimum(tl.maximum(entry, 0), n.entries - 1)


@triton.jit
def modify(product, query, key, query_start, key_start, x, n, spot, F: tl.constexpr, EDGE: tl.constexpr):
    """From scale x q k^T / temperature (in the score's unit) to the logit, -inf for a shut pair; and the derivative by that product.

    `query` and `key` count from the tile's corner and broadcast against each other in either order: so only the corner needs 64 bits.
    """
    first = query_start
    start = key_start
    logits = product
    steepness = 1.0
    if F.softcap:
        cap = n.softcap * unit(F)
        bent = 2.0 / (1.0 + tl.exp(-2.0 / cap * logits)) - 1.0
        steepness = 1.0 - bent * bent
        logits = bent * cap
    inside = (query < spot.queries - first) & (key < spot.keys - start)
    if F.bias:
        corner = spot.bias + first.to(tl.int64) * x.bias.query + start.to(tl.int64) * x.bias.key
        added = tl.load(corner + query * x.bias.query + key * x.bias.key, mask=inside, other=0.0).to(tl.float32)
        logits += tl.where(added == float("inf"), BIAS_CEILING, added) * unit(F)
    if F.score_bias:
        logits += spot.shift * unit(F)
    if F.alibi:
        logits -= tl.abs(separation(query, key, first, start, spot.queries, spot.keys)).to(tl.float32) * (spot.slope * unit(F))
    if F.table:
        corner = spot.table + first.to(tl.int64) * x.table.row
        entry = entry_of(query, key, first, start, x, n, spot, F)
        logits += tl.load(corner + query * x.table.row + entry, mask=inside, other=0.0) * unit(F)
    if F.mask:
        corner = spot.mask + first.to(tl.int64) * x.mask.query + start.to(tl.int64) * x.mask.key
        logits = tl.where(tl.load(corner + query * x.mask.query + key * x.mask.key, mask=inside, other=0) != 0, logits, float("-inf"))
    if EDGE:
        if F.left or F.right:
            distance = separation(query, key, first, start, spot.queries, spot.keys)
            if F.left:
                inside = inside & (distance >= -n.left)
            if F.right:
                inside = inside & (distance <= n.right)
        logits = tl.where(inside, logits, float("-inf"))
    return logits, steepness


@triton.jit
def curve(logits, F: tl.constexpr):
    """The weight before its division, f(x), and f'(x); both 0 for a shut pair. Logits as `modify` gives them."""
    if F.score == "softmax":
        weights = tl.exp2(logits)
        slope = weights
    elif F.score == "sigmoid":
        weights = 1.0 / (1.0 + tl.exp(-logits))
        slope = weights * (1.0 - weights)
    elif F.score == "softplus":
        small = tl.exp(-tl.abs(logits))
        one = 1.0 + small
        # log(1 + small) to the last bit where small vanishes beside 1
        tail = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
        weights = tl.maximum(logits, 0.0) + tail
        slope = tl.where(logits >= 0, 1.0, small) / one
    elif F.score == "relu":
        base = tl.maximum(logits, 0.0)
        slope = tl.where(logits > 0, 1.0, 0.0) * F.power
        for _ in tl.static_range(F.power - 1):
            slope *= base
        weights = slope * base / F.power
    else:
        weights = tl.where(logits == float("-inf"), 0.0, logits)
        slope = tl.where(logits == float("-inf"), 0.0, 1.0)
    return weights, slope


@triton.jit
def weigh(logits, sums, F: tl.constexpr):
    """Weight and its derivative by the logit, divided as the forward pass did; `sums` is the log-normaliser in base 2."""
    if F.score == "softmax":
        weights = tl.exp2(logits - sums)
        slope = weights
    else:
        weights, slope = curve(logits, F)
        share = tl.exp2(-sums)
        weights *= share
        slope *= share
    return weights, slope


@triton.jit
def survivors(query, key, query_start, key_start, n, spot, F: tl.constexpr):
    """What dropout multiplies each weight by: a function of seed, sequence, head, query and key alone."""
    zero = query * 0 + key * 0
    word, _, _, _ = tl.philox(spot.seed, key_start + key + zero, query_start + query + zero, spot.plane + zero, zero, PHILOX_ROUNDS)
    return tl.where(word.to(tl.int64) >= n.threshold, n.growth, 0.0)


@triton.jit
def first_key(start, queries, keys, left, TILE: tl.constexpr, HAS_LEFT: tl.constexpr):
    """First tile edge of the keys that queries from `start` on can see."""
    lowest = tl.full([], 0, tl.int32)
    if HAS_LEFT:
        lowest = tl.maximum(start + (keys - queries) - left, 0) // TILE * TILE
    return lowest


@triton.jit
def last_key(stop, queries, keys, right, HAS_RIGHT: tl.constexpr):
    """One past the last key that queries before `stop` can see; not below 0."""
    highest = keys
    if HAS_RIGHT:
        highest = tl.maximum(tl.minimum(keys, stop + (keys - queries) + right), 0)
    return highest
