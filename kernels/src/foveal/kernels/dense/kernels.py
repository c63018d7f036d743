"""Attention as Triton kernels: one forward, four small kernels backward, none with atomics.

A forward program owns a tile of queries and walks over the keys that they can see; the tiles at the window's edges are masked, those inside
are not. Backward, a program owns what it writes: `key_gradients` a tile of keys, `query_gradients` a tile of queries, `shared_gradient` a
tile of an input that several logits share, in that input's own shape, walking over every batch, head, query or key that shares it. Each
recomputes the logits; that costs two more products than sharing them and saves the atomics, so that every gradient is the same bits each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from foveal.kernels.dense.logits import (
    LN2,
    LOG2E,
    Matrix,
    at,
    curve,
    entry_of,
    extent,
    first_key,
    last_key,
    load_rates,
    load_rows,
    load_sums,
    locate,
    modify,
    separation,
    store_rows,
    survivors,
    unit,
    weigh,
)


@triton.jit
def load_columns(base, first, count, stride, begin, LENGTH: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr, UPCAST: tl.constexpr):
    """Columns begin .. begin + PART of rows first .. first + LENGTH of a (count, DIM) matrix, zero beyond its ends."""
    position = first  # in the interpreter a loop's index is a Python int, an assigned name is a tensor
    row = position + tl.arange(0, LENGTH)
    column = begin + tl.arange(0, PART)
    pointers = base + position.to(tl.int64) * stride + tl.arange(0, LENGTH)[:, None] * stride + column[None, :]
    if DIM % PART == 0:
        tile = tl.load(pointers, mask=row[:, None] < count, other=0.0)
    else:
        tile = tl.load(pointers, mask=(row[:, None] < count) & (column[None, :] < DIM), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def row_products(
    left, left_first, left_count, left_stride, right, right_first, right_count, right_stride,
    DIM: tl.constexpr, WIDTH: tl.constexpr, F: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Products of LEFT rows of a matrix with RIGHT rows of another, 128 bytes of each row at a time from memory: whole wide rows would spill."""
    MOST: tl.constexpr = 32 if F.dot == "fp32" else 64
    PART: tl.constexpr = MOST if WIDTH > MOST else WIDTH
    product = tl.zeros([LEFT, RIGHT], tl.float32)
    for column in range(0, WIDTH, PART):
        some = load_columns(left, left_first, left_count, left_stride, column, LEFT, DIM, PART, F.upcast)
        others = load_columns(right, right_first, right_count, right_stride, column, RIGHT, DIM, PART, F.upcast)
        product = tl.dot(some, tl.trans(others), product, input_precision=F.precision)
    return product


@triton.jit
def attend_tile(
    accumulated, largest, total, q, k, v, rates, first, start, x, n, spot,
    F: tl.constexpr, EDGE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to a tile of queries' sums: weights times values, and the weights; softmax keeps its largest logit.

    `q` is the tile of queries, or a pointer to the sequence's where products are taken in parts.
    """
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    if F.parted:
        product = row_products(q, first, spot.queries, x.q.row, k, start, spot.keys, x.k.row, F.dim, F.width, F, QUERIES, KEYS)
    else:
        keys_tile = load_rows(k, start, spot.keys, x.k.row, KEYS, F.dim, F.width, F.upcast)
        product = tl.dot(q, tl.trans(keys_tile), input_precision=F.precision)
    product *= n.scale * unit(F)
    if F.temperature:
        product *= rates[:, None]
    logits, _steepness = modify(product, query, key, first, start, x, n, spot, F, EDGE)
    if F.score == "softmax":
        higher = tl.maximum(largest, tl.max(logits, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        accumulated = accumulated * shrink[:, None]
        largest = higher
    else:
        weights, _slope = curve(logits, F)
        total += tl.sum(weights, 1)
    if F.dropout:
        weights *= survivors(query, key, first, start, n, spot, F)
    values_tile = load_rows(v, start, spot.keys, x.v.row, KEYS, F.value_dim, F.value_width, F.upcast)
    accumulated = tl.dot(weights.to(DOT), values_tile, accumulated, input_precision=F.precision)
    return accumulated, largest, total


@triton.jit
def attend(
    accumulated, largest, total, q, k, v, rates, first, begin, end, x, n, spot,
    F: tl.constexpr, EDGE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`attend_tile` over keys begin .. end, in tiles of KEYS."""
    for start in range(begin, end, KEYS):
        accumulated, largest, total = attend_tile(accumulated, largest, total, q, k, v, rates, first, start, x, n, spot, F, EDGE, QUERIES, KEYS, DOT)
    return accumulated, largest, total


@triton.jit
def divided(accumulated, largest, total, batch, head, keys, x, F: tl.constexpr, QUERIES: tl.constexpr):
    """The sums divided as the score wants it, the sink's share included; and the logarithm of what they were divided by."""
    if F.sinks:
        sink = tl.load(x.sinks.data + batch * x.sinks.batch + head * x.sinks.head).to(tl.float32) * LOG2E
        higher = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        accumulated = accumulated * shrink[:, None]
        largest = higher
    if F.normalize == "sum":
        empty = total == 0
        accumulated = accumulated / tl.where(empty, 1.0, total)[:, None]
        sums = tl.log2(tl.where(empty, 1.0, total))
        if F.score == "softmax":
            sums += largest
        sums = tl.where(empty, float("-inf"), sums * LN2)
    elif F.normalize == "length":
        divisor = tl.maximum(keys, 1).to(tl.float32)
        accumulated = accumulated / divisor
        sums = tl.zeros([QUERIES], tl.float32) + tl.log2(divisor) * LN2
    else:
        sums = tl.zeros([QUERIES], tl.float32)
    return accumulated, sums


@triton.jit
def forward_kernel(x, n, out, lse, F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr):
    """Output and log-normaliser of a tile of QUERIES queries of one head."""
    tiles = tl.cdiv(n.queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = tl.program_id(0) // tiles
    batch = (pair // n.heads).to(tl.int64)
    head = (pair % n.heads).to(tl.int64)
    shared = head // n.group
    first_query, queries, first_row, keys = extent(x, n, batch, F)
    if first >= queries:  # a sequence that is shorter than the longest
        return
    spot = locate(x, n, batch, head, first_query, queries, keys, F)
    k = at(x.k, batch, shared, first_row)
    v = at(x.v, batch, shared, first_row)
    row = first + tl.arange(0, QUERIES)
    rates = load_rates(x, row, spot, F)
    tile = at(x.q, batch, head, first_query)
    if not F.parted:
        tile = load_rows(tile, first, queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
    VALUE_WIDTH: tl.constexpr = F.value_width
    accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)

    # The keys in three stretches: the window's left edge, the inside (no mask needed), the right edge and the last, ragged tile.
    offset = keys - queries
    lowest = first_key(first, queries, keys, n.left, KEYS, F.left)
    highest = last_key(first + QUERIES, queries, keys, n.right, F.right)
    inner, outer = lowest, highest // KEYS * KEYS
    if F.right:
        outer = tl.maximum(tl.minimum(keys, first + offset + n.right + 1), 0) // KEYS * KEYS
    if F.left:
        inner = (tl.maximum(first + QUERIES - 1 + offset - n.left, 0) + KEYS - 1) // KEYS * KEYS
        inner = tl.minimum(inner, (highest + KEYS - 1) // KEYS * KEYS)
        accumulated, largest, total = attend(
            accumulated, largest, total, tile, k, v, rates, first, lowest, tl.minimum(inner, highest), x, n, spot, F, True, QUERIES, KEYS, DOT
        )
    outer = tl.maximum(outer, inner)
    accumulated, largest, total = attend(
        accumulated, largest, total, tile, k, v, rates, first, inner, outer, x, n, spot, F, False, QUERIES, KEYS, DOT
    )
    accumulated, largest, total = attend(
        accumulated, largest, total, tile, k, v, rates, first, outer, highest, x, n, spot, F, True, QUERIES, KEYS, DOT
    )

    accumulated, sums = divided(accumulated, largest, total, batch, head, keys, x, F, QUERIES)
    accumulated = open_gate(accumulated, batch, head, first_query, first, queries, x, F, QUERIES)
    store_rows(at(out, batch, head, first_query), accumulated, first, queries, out.row, QUERIES, F.value_dim, F.value_width)
    tl.store(at(lse, batch, head, first_query) + row, sums, mask=row < queries)


@triton.jit
def opening(batch, head, first_query, first, queries, x, F: tl.constexpr, QUERIES: tl.constexpr):
    """Sigmoid of the gate of some rows: (rows, 1) or (rows, channels)."""
    base = at(x.gate, batch, head, first_query)
    if F.gate == 1:
        row = first + tl.arange(0, QUERIES)
        raw = tl.load(base + row.to(tl.int64) * x.gate.row, mask=row < queries, other=0.0).to(tl.float32)[:, None]
    else:
        raw = load_rows(base, first, queries, x.gate.row, QUERIES, F.value_dim, F.value_width, True).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-raw))


@triton.jit
def open_gate(tile, batch, head, first_query, first, queries, x, F: tl.constexpr, QUERIES: tl.constexpr):
    if F.gate > 0:
        tile = tile * opening(batch, head, first_query, first, queries, x, F, QUERIES)
    return tile


@triton.jit
def prepare_kernel(
    x, n, out, dout, dlse, delta, opened, dgate, F: tl.constexpr, HAS_DLSE: tl.constexpr, WANT_GATE: tl.constexpr, QUERIES: tl.constexpr
):
    """What the backward pass takes by row: delta, the row sums of out x dout less the gradient of the log-normaliser; with a gate also

    dout x sigmoid(gate) in `opened`, and the gate's gradient: out is the gated one, so dout x out x (1 - sigmoid) is all of it.
    """
    tiles = tl.cdiv(n.queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = tl.program_id(0) // tiles
    batch = (pair // n.heads).to(tl.int64)
    head = (pair % n.heads).to(tl.int64)
    first_query, queries, _, _ = extent(x, n, batch, F)
    if first >= queries:
        return
    row = first + tl.arange(0, QUERIES)
    given = load_rows(at(out, batch, head, first_query), first, queries, out.row, QUERIES, F.value_dim, F.value_width, True).to(tl.float32)
    wanted = load_rows(at(dout, batch, head, first_query), first, queries, dout.row, QUERIES, F.value_dim, F.value_width, True).to(tl.float32)
    sums = tl.sum(given * wanted, 1)
    if F.gate > 0:
        openings = opening(batch, head, first_query, first, queries, x, F, QUERIES)
        base = at(opened, batch, head, first_query)
        store_rows(base, wanted * openings, first, queries, opened.row, QUERIES, F.value_dim, F.value_width)
        if WANT_GATE:
            base = at(dgate, batch, head, first_query)
            if F.gate == 1:
                tl.store(base + row, sums * (1.0 - tl.sum(openings, 1)), mask=row < queries)
            else:
                store_rows(base, given * wanted * (1.0 - openings), first, queries, dgate.row, QUERIES, F.value_dim, F.value_width)
    if F.normalize != "sum":
        sums = tl.zeros([QUERIES], tl.float32)
    if HAS_DLSE:
        sums -= tl.load(at(dlse, batch, head, first_query) + row.to(tl.int64) * dlse.row, mask=row < queries, other=0.0)
    tl.store(at(delta, batch, head, first_query) + row, sums, mask=row < queries)


@triton.jit
def key_gradients_kernel(
    x, n, dout, lse, delta, dk, dv,
    F: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values: over every head of its group and every query that sees it. Logits stand transposed, (key, query)."""
    kv_heads = n.heads // n.group
    tiles = tl.cdiv(n.keys, KEYS)
    first = tl.program_id(0) % tiles * KEYS
    pair = tl.program_id(0) // tiles
    batch = (pair // kv_heads).to(tl.int64)
    shared = (pair % kv_heads).to(tl.int64)
    first_query, queries, first_row, keys = extent(x, n, batch, F)
    if first >= keys:
        return
    k = at(x.k, batch, shared, first_row)
    v = at(x.v, batch, shared, first_row)
    if not F.parted:
        keys_tile = load_rows(k, first, keys, x.k.row, KEYS, F.dim, F.width, F.upcast)
    if WANT_K:
        if not F.parted:
            values_tile = load_rows(v, first, keys, x.v.row, KEYS, F.value_dim, F.value_width, F.upcast)
        WIDTH: tl.constexpr = F.width
        key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    if WANT_V:
        VALUE_WIDTH: tl.constexpr = F.value_width
        value_sum = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)

    offset = keys - queries
    begin = tl.full([], 0, tl.int32)
    end = queries
    if F.right:
        begin = tl.maximum(first - n.right - offset, 0) // QUERIES * QUERIES
    if F.left:
        end = tl.maximum(tl.minimum(queries, first + KEYS + n.left - offset), 0)
    query = tl.arange(0, QUERIES)[None, :]
    key = tl.arange(0, KEYS)[:, None]
    for member in range(0, n.group):
        head = shared * n.group + member
        spot = locate(x, n, batch, head, first_query, queries, keys, F)
        q_base = at(x.q, batch, head, first_query)
        dout_base = at(dout, batch, head, first_query)
        lse_base = at(lse, batch, head, first_query)
        delta_base = at(delta, batch, head, first_query)
        for start in range(begin, end, QUERIES):
            row = start + tl.arange(0, QUERIES)
            rates = load_rates(x, row, spot, F)
            if F.parted:
                product = row_products(k, first, keys, x.k.row, q_base, start, queries, x.q.row, F.dim, F.width, F, KEYS, QUERIES)
            else:
                queries_tile = load_rows(q_base, start, queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
                product = tl.dot(keys_tile, tl.trans(queries_tile), input_precision=F.precision)
            product *= n.scale * unit(F)
            if F.temperature:
                product *= rates[None, :]
            logits, steepness = modify(product, query, key, start, first, x, n, spot, F, True)
            sums, taken = load_sums(lse_base, delta_base, row, queries)
            weights, slope = weigh(logits, sums[None, :], F)
            if F.dropout:
                kept = survivors(query, key, start, first, n, spot, F)
                weights *= kept
            if WANT_V or not F.parted:
                gradient = load_rows(dout_base, start, queries, dout.row, QUERIES, F.value_dim, F.value_width, F.upcast)
            if WANT_V:
                value_sum = tl.dot(weights.to(DOT), gradient, value_sum, input_precision=F.precision)
            if WANT_K:
                if F.parted:
                    dweights = row_products(
                        v, first, keys, x.v.row, dout_base, start, queries, dout.row, F.value_dim, F.value_width, F, KEYS, QUERIES
                    )
                    queries_tile = load_rows(q_base, start, queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
                else:
                    dweights = tl.dot(values_tile, tl.trans(gradient), input_precision=F.precision)
                if F.dropout:
                    dweights *= kept
                dlogits = slope * (dweights - taken[None, :])
                if F.softcap:
                    dlogits *= steepness
                if F.temperature:
                    dlogits *= rates[None, :]
                key_sum = tl.dot(dlogits.to(DOT), queries_tile, key_sum, input_precision=F.precision)
    if WANT_K:
        store_rows(at(dk, batch, shared, first_row), key_sum * n.scale, first, keys, dk.row, KEYS, F.dim, F.width)
    if WANT_V:
        store_rows(at(dv, batch, shared, first_row), value_sum, first, keys, dv.row, KEYS, F.value_dim, F.value_width)


@triton.jit
def logit_gradients(product, dweights, rates, sums, taken, first, start, x, n, spot, F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """From products of a (query, key) tile, q k^T and dout v^T, to the gradient of its logits; and their derivative by the scaled first."""
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    product *= n.scale * unit(F)
    if F.temperature:
        product *= rates[:, None]
    logits, steepness = modify(product, query, key, first, start, x, n, spot, F, True)
    _, slope = weigh(logits, sums[:, None], F)
    if F.dropout:
        dweights *= survivors(query, key, first, start, n, spot, F)
    return slope * (dweights - taken[:, None]), steepness


@triton.jit
def store_bias_gradient(base, gradient, spot, x, query_start, key_start, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """A tile of a contiguous (query, key) gradient; zero where the bias is +inf, which the logits took as a constant."""
    first = query_start
    start = key_start
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    seen = (query < spot.queries - first) & (key < spot.keys - start)
    origin = spot.bias + first.to(tl.int64) * x.bias.query + start.to(tl.int64) * x.bias.key
    given = tl.load(origin + query * x.bias.query + key * x.bias.key, mask=seen, other=0.0)
    corner = base + first.to(tl.int64) * keys + start
    tl.store(corner + query * keys + key, tl.where(given == float("inf"), 0.0, gradient), mask=seen)


class RowGradients(NamedTuple):
    """What `query_gradients` writes besides dq, by row (data is None where it is not wanted): each a vector, the table's a matrix.

    The bare pointer stands last: triton 3.6 misplaces the constants of the tuples after a field that is None.
    """

    temperature: Matrix
    score_bias: Matrix
    alibi: Matrix
    table: Matrix
    bias: Any


@dataclass(frozen=True)
class Wanted:
    """Which of these are wanted. `bias` only where nothing shares it; `table` where it has a row a query."""

    bias: bool = False
    temperature: bool = False
    score_bias: bool = False
    alibi: bool = False
    table: bool = False


@triton.jit
def query_gradients_kernel(
    x, n, dout, lse, delta, dq, rows, F: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr
):
    """Gradient of a tile of QUERIES queries, and of what is given by query: all of it is sums over that query's keys."""
    tiles = tl.cdiv(n.queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = tl.program_id(0) // tiles
    batch = (pair // n.heads).to(tl.int64)
    head = (pair % n.heads).to(tl.int64)
    shared = head // n.group
    first_query, queries, first_row, keys = extent(x, n, batch, F)
    if first >= queries:
        return
    spot = locate(x, n, batch, head, first_query, queries, keys, F)
    k = at(x.k, batch, shared, first_row)
    v = at(x.v, batch, shared, first_row)
    row = first + tl.arange(0, QUERIES)
    rates = load_rates(x, row, spot, F)
    q = at(x.q, batch, head, first_query)
    given = at(dout, batch, head, first_query)
    if not F.parted:
        queries_tile = load_rows(q, first, queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
        gradient = load_rows(given, first, queries, dout.row, QUERIES, F.value_dim, F.value_width, F.upcast)
    sums, taken = load_sums(at(lse, batch, head, first_query), at(delta, batch, head, first_query), row, queries)
    WIDTH: tl.constexpr = F.width
    query_sum = tl.zeros([QUERIES, WIDTH], tl.float32)
    logit_sum = tl.zeros([QUERIES], tl.float32)
    distance_sum = tl.zeros([QUERIES], tl.float32)
    first_entry = tl.zeros([QUERIES], tl.float32)
    last_entry = tl.zeros([QUERIES], tl.float32)
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    begin = first_key(first, queries, keys, n.left, KEYS, F.left)
    end = last_key(first + QUERIES, queries, keys, n.right, F.right)
    for start in range(begin, end, KEYS):
        if F.parted:
            product = row_products(q, first, queries, x.q.row, k, start, keys, x.k.row, F.dim, F.width, F, QUERIES, KEYS)
            dweights = row_products(given, first, queries, dout.row, v, start, keys, x.v.row, F.value_dim, F.value_width, F, QUERIES, KEYS)
        else:
            values_tile = load_rows(v, start, keys, x.v.row, KEYS, F.value_dim, F.value_width, F.upcast)
            dweights = tl.dot(gradient, tl.trans(values_tile), input_precision=F.precision)
        keys_tile = load_rows(k, start, keys, x.k.row, KEYS, F.dim, F.width, F.upcast)
        if not F.parted:
            product = tl.dot(queries_tile, tl.trans(keys_tile), input_precision=F.precision)
        dlogits, steepness = logit_gradients(product, dweights, rates, sums, taken, first, start, x, n, spot, F, QUERIES, KEYS)
        if W.bias:
            store_bias_gradient(rows.bias + pair.to(tl.int64) * queries * keys, dlogits, spot, x, first, start, keys, QUERIES, KEYS)
        if W.score_bias:
            logit_sum += tl.sum(dlogits, 1)
        if W.alibi:
            distance_sum -= tl.sum(dlogits * tl.abs(separation(query, key, first, start, queries, keys)).to(tl.float32), 1)
        if W.table:
            entry = entry_of(query, key, first, start, x, n, spot, F)
            store_entries(at(rows.table, batch, head, first_query), dlogits, entry, first, start, rows.table.row, n, spot, QUERIES, KEYS)
            first_entry += tl.sum(tl.where(entry == 0, dlogits, 0.0), 1)
            last_entry += tl.sum(tl.where(entry == n.entries - 1, dlogits, 0.0), 1)
        if F.softcap:
            dlogits *= steepness
        if F.temperature:
            dlogits *= rates[:, None]
        query_sum = tl.dot(dlogits.to(DOT), keys_tile, query_sum, input_precision=F.precision)
    query_sum *= n.scale
    store_rows(at(dq, batch, head, first_query), query_sum, first, queries, dq.row, QUERIES, F.dim, F.width)
    seen = row < queries
    if W.temperature:  # the product q k^T / temperature is linear in q: its sum over the keys is dq . q
        if F.parted:
            queries_tile = load_rows(q, first, queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
        moved = -tl.sum(query_sum * queries_tile.to(tl.float32), 1) * rates
        tl.store(at(rows.temperature, batch, head, first_query) + row, moved, mask=seen)
    if W.score_bias:
        tl.store(at(rows.score_bias, batch, head, first_query) + row, logit_sum, mask=seen)
    if W.alibi:
        tl.store(at(rows.alibi, batch, head, first_query) + row, distance_sum, mask=seen)
    if W.table:
        ends = at(rows.table, batch, head, first_query) + row.to(tl.int64) * rows.table.row
        if n.entries > 1:
            tl.store(ends + (n.entries - 1), last_entry, mask=seen)
        tl.store(ends, first_entry, mask=seen)


@triton.jit
def store_entries(base, gradient, entry, query_start, key_start, stride, n, spot, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Write each pair's gradient to its entry of the query's row. Within a row only the two ends take several pairs: those are left out."""
    first = query_start
    start = key_start
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    alone = (query < spot.queries - first) & (key < spot.keys - start) & (entry > 0) & (entry < n.entries - 1)
    tl.store(base + first.to(tl.int64) * stride + query * stride + entry, gradient, mask=alone)


@dataclass(frozen=True)
class Shared:
    """Which dimensions of the input share it, and whether it is a table: then `queries` is what shares it and keys become entries."""

    batches: bool
    heads: bool
    queries: bool = False
    keys: bool = False
    table: bool = False


@triton.jit
def shared_gradient_kernel(
    x, n, dout, lse, delta, target, ends, planes, begin_row, end_row,
    F: tl.constexpr, S: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of a shared bias, or of a table for one tile of pairs: the sum over all that shares it, in a fixed order.

    A table's tile is written by row and entry, the ends of each row by row and tile of keys; the sum over the rows is taken outside, so
    that rows begin_row .. end_row are all that is in memory. `planes` are the heads of `target`.
    """
    key_tiles = 1 if S.keys else tl.cdiv(n.keys, KEYS)
    query_tiles = 1 if S.queries else tl.cdiv(end_row - begin_row, QUERIES)
    plane = tl.program_id(0) // (key_tiles * query_tiles)
    query_begin = begin_row + tl.program_id(0) // key_tiles % query_tiles * QUERIES
    key_tile = tl.program_id(0) % key_tiles
    key_begin = key_tile * KEYS
    own_batch = plane // planes
    own_head = plane % planes
    batch_count = n.batches if S.batches else 1
    head_count = n.heads if S.heads else 1
    gathered = tl.zeros([QUERIES, KEYS], tl.float32)
    lower = tl.zeros([QUERIES], tl.float32)
    upper = tl.zeros([QUERIES], tl.float32)
    row = query_begin + tl.arange(0, QUERIES)
    column = key_begin + tl.arange(0, KEYS)
    base = target.data + plane.to(tl.int64) * target.batch
    for turn in range(0, batch_count * head_count):
        batch = (own_batch + turn // head_count).to(tl.int64)
        head = (own_head + turn % head_count).to(tl.int64)
        first_query, queries, first_row, keys = extent(x, n, batch, F)
        spot = locate(x, n, batch, head, first_query, queries, keys, F)
        q = at(x.q, batch, head, first_query)
        k = at(x.k, batch, head // n.group, first_row)
        v = at(x.v, batch, head // n.group, first_row)
        given = at(dout, batch, head, first_query)
        query_end = queries if S.queries else tl.minimum(query_begin + QUERIES, tl.minimum(queries, end_row))
        key_end = keys if S.keys else tl.minimum(key_begin + KEYS, keys)
        for query_start in range(query_begin, query_end, QUERIES):
            here = query_start + tl.arange(0, QUERIES)
            rates = load_rates(x, here, spot, F)
            sums, taken = load_sums(at(lse, batch, head, first_query), at(delta, batch, head, first_query), here, queries)
            for start in range(key_begin, key_end, KEYS):
                product = row_products(q, query_start, queries, x.q.row, k, start, keys, x.k.row, F.dim, F.width, F, QUERIES, KEYS)
                dweights = row_products(given, query_start, queries, dout.row, v, start, keys, x.v.row, F.value_dim, F.value_width, F, QUERIES, KEYS)
                dlogits, _ = logit_gradients(product, dweights, rates, sums, taken, query_start, start, x, n, spot, F, QUERIES, KEYS)
                gathered += dlogits
    if S.table:
        spot = locate(x, n, own_batch.to(tl.int64), own_head.to(tl.int64), tl.full([], 0, tl.int64), n.queries, n.keys, F)
        entry = entry_of(tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], query_begin, key_begin, x, n, spot, F)
        place = query_begin - begin_row
        inside = (row < end_row)[:, None] & (column < n.keys)[None, :]
        alone = inside & (entry > 0) & (entry < n.entries - 1)
        tl.store(base + (place + tl.arange(0, QUERIES))[:, None].to(tl.int64) * target.row + entry, gathered, mask=alone)
        lower = tl.sum(tl.where(inside & (entry == 0), gathered, 0.0), 1)
        upper = tl.sum(tl.where(inside & (entry == n.entries - 1), gathered, 0.0), 1)
        corner = ends + (plane.to(tl.int64) * key_tiles + key_tile) * 2 * (end_row - begin_row) + place + tl.arange(0, QUERIES)
        tl.store(corner, lower, mask=row < end_row)
        tl.store(corner + (end_row - begin_row), upper, mask=row < end_row)
    else:
        own = x.bias.data + own_batch.to(tl.int64) * x.bias.batch + own_head.to(tl.int64) * x.bias.head
        if S.queries and S.keys:
            value = tl.sum(tl.sum(gathered, 1), 0)
            tl.store(base, tl.where(tl.load(own) == float("inf"), 0.0, value))
        elif S.queries:
            value = tl.sum(gathered, 0)
            raw = tl.load(own + column.to(tl.int64) * x.bias.key, mask=column < n.keys, other=0.0)
            tl.store(base + column, tl.where(raw == float("inf"), 0.0, value), mask=column < n.keys)
        elif S.keys:
            value = tl.sum(gathered, 1)
            raw = tl.load(own + row.to(tl.int64) * x.bias.query, mask=row < n.queries, other=0.0)
            tl.store(base + row, tl.where(raw == float("inf"), 0.0, value), mask=row < n.queries)
        else:
            spot = locate(x, n, own_batch.to(tl.int64), own_head.to(tl.int64), tl.full([], 0, tl.int64), n.queries, n.keys, F)
            store_bias_gradient(base, gathered, spot, x, query_begin, key_begin, n.keys, QUERIES, KEYS)
