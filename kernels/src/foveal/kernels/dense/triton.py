"""Attention as Triton kernels: one forward, four small kernels backward, none with atomics.

A forward program owns a tile of queries and walks over the keys that they can see; the tiles at the window's edges are masked, those inside
are not. Backward, a program owns what it writes: `key_gradients` a tile of keys, `query_gradients` a tile of queries, `bias_gradient` a
tile of the bias in the bias's own shape, walking over every batch, head, query or key that shares it. Each recomputes the logits; that
costs two more products than sharing them and saves the atomics, so that every gradient is the same bits each time.

Logits are kept in base 2 (`exp2` is one instruction); the log-sum-exp outside is natural. UPCAST loads in float32, as triton's interpreter
needs for bfloat16; DOT is the dtype in which probabilities enter a product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.dense.reference import POSITIVE_INFINITY
from foveal.kernels.dispatch import interpreting

if TYPE_CHECKING:
    from foveal.kernels.testing.compile import CompileCase

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))
BIAS_CEILING: tl.constexpr = tl.constexpr(POSITIVE_INFINITY)


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
def biased(
    logits, query, key, query_start, key_start, queries, keys, bias, bias_query, bias_key, mask, mask_query, mask_key, left, right,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 with bias, mask and window.

    `query` and `key` count from the tile's corner and broadcast against each other in either order: so only the corner needs 64 bits.
    """
    first = query_start
    start = key_start
    inside = (query < queries - first) & (key < keys - start)
    if HAS_BIAS:
        corner = bias + first.to(tl.int64) * bias_query + start.to(tl.int64) * bias_key
        added = tl.load(corner + query * bias_query + key * bias_key, mask=inside, other=0.0).to(tl.float32)
        logits += tl.where(added == float("inf"), BIAS_CEILING, added) * LOG2E
    if HAS_MASK:
        corner = mask + first.to(tl.int64) * mask_query + start.to(tl.int64) * mask_key
        logits = tl.where(tl.load(corner + query * mask_query + key * mask_key, mask=inside, other=0) != 0, logits, float("-inf"))
    if EDGE:
        distance = (key - query) + (start - first - (keys - queries))
        if HAS_LEFT:
            inside = inside & (distance >= -left)
        if HAS_RIGHT:
            inside = inside & (distance <= right)
        logits = tl.where(inside, logits, float("-inf"))
    return logits


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


@triton.jit
def attend(
    accumulated,
    largest,
    total,
    q,
    k,
    v,
    bias,
    mask,
    first,
    begin,
    end,
    queries,
    keys,
    k_row,
    v_row,
    bias_query,
    bias_key,
    mask_query,
    mask_key,
    left,
    right,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over keys begin .. end, in tiles of KEYS."""
    for start in range(begin, end, KEYS):
        keys_tile = load_rows(k, start, keys, k_row, KEYS, DIM, WIDTH, UPCAST)
        logits = tl.dot(q, tl.trans(keys_tile), input_precision=PRECISION) * (scale * LOG2E)
        logits = biased(
            logits, tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], first, start, queries, keys,
            bias, bias_query, bias_key, mask, mask_query, mask_key, left, right,
            HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, EDGE,
        )  # fmt: skip
        higher = tl.maximum(largest, tl.max(logits, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - anchor[:, None])
        shrink = tl.exp2(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        accumulated = accumulated * shrink[:, None]
        values_tile = load_rows(v, start, keys, v_row, KEYS, VALUE_DIM, VALUE_WIDTH, UPCAST)
        accumulated = tl.dot(weights.to(DOT), values_tile, accumulated, input_precision=PRECISION)
        largest = higher
    return accumulated, largest, total


@triton.jit
def forward_kernel(
    q, k, v, bias, mask, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    heads, group, queries, keys, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of QUERIES queries of one head."""
    tiles = tl.cdiv(queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = tl.program_id(0) // tiles
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    shared = head // group
    k += batch * k_batch + shared * k_head
    v += batch * v_batch + shared * v_head
    if HAS_BIAS:
        bias += batch * bias_batch + head * bias_head
    if HAS_MASK:
        mask += batch * mask_batch + head * mask_head
    row = first + tl.arange(0, QUERIES)
    tile = load_rows(q + batch * q_batch + head * q_head, first, queries, q_row, QUERIES, DIM, WIDTH, UPCAST)
    accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)

    # The keys in three stretches: the window's left edge, the inside (no mask needed), the right edge and the last, ragged tile.
    offset = keys - queries
    lowest = first_key(first, queries, keys, left, KEYS, HAS_LEFT)
    highest = last_key(first + QUERIES, queries, keys, right, HAS_RIGHT)
    inner, outer = lowest, highest // KEYS * KEYS
    if HAS_RIGHT:
        outer = tl.maximum(tl.minimum(keys, first + offset + right + 1), 0) // KEYS * KEYS
    if HAS_LEFT:
        inner = (tl.maximum(first + QUERIES - 1 + offset - left, 0) + KEYS - 1) // KEYS * KEYS
        inner = tl.minimum(inner, (highest + KEYS - 1) // KEYS * KEYS)
        accumulated, largest, total = attend(
            accumulated, largest, total, tile, k, v, bias, mask, first, lowest, tl.minimum(inner, highest), queries, keys, k_row, v_row,
            bias_query, bias_key, mask_query, mask_key, left, right, scale, HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, True,
            DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, QUERIES, KEYS, UPCAST, DOT, PRECISION,
        )  # fmt: skip
    outer = tl.maximum(outer, inner)
    accumulated, largest, total = attend(
        accumulated, largest, total, tile, k, v, bias, mask, first, inner, outer, queries, keys, k_row, v_row,
        bias_query, bias_key, mask_query, mask_key, left, right, scale, HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, False,
        DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, QUERIES, KEYS, UPCAST, DOT, PRECISION,
    )  # fmt: skip
    accumulated, largest, total = attend(
        accumulated, largest, total, tile, k, v, bias, mask, first, outer, highest, queries, keys, k_row, v_row,
        bias_query, bias_key, mask_query, mask_key, left, right, scale, HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, True,
        DIM, VALUE_DIM, WIDTH, VALUE_WIDTH, QUERIES, KEYS, UPCAST, DOT, PRECISION,
    )  # fmt: skip

    empty = total == 0
    accumulated = accumulated / tl.where(empty, 1.0, total)[:, None]
    store_rows(out + batch * out_batch + head * out_head, accumulated, first, queries, out_row, QUERIES, VALUE_DIM, VALUE_WIDTH)
    sums = tl.where(empty, float("-inf"), (largest + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + pair.to(tl.int64) * queries + row, sums, mask=row < queries)


@triton.jit
def delta_kernel(
    out, dout, dlse, delta,
    out_batch, out_head, out_row, dout_batch, dout_head, dout_row, dlse_batch, dlse_head, dlse_row, heads, queries,
    HAS_DLSE: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Row sums of out * dout, less the gradient of the log-sum-exp: what the softmax takes off every logit's gradient."""
    tiles = tl.cdiv(queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = tl.program_id(0) // tiles
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    row = first + tl.arange(0, QUERIES)
    given = load_rows(out + batch * out_batch + head * out_head, first, queries, out_row, QUERIES, VALUE_DIM, VALUE_WIDTH, True)
    wanted = load_rows(dout + batch * dout_batch + head * dout_head, first, queries, dout_row, QUERIES, VALUE_DIM, VALUE_WIDTH, True)
    sums = tl.sum(given * wanted, 1)
    if HAS_DLSE:
        sums -= tl.load(dlse + batch * dlse_batch + head * dlse_head + row.to(tl.int64) * dlse_row, mask=row < queries, other=0.0)
    tl.store(delta + pair.to(tl.int64) * queries + row, sums, mask=row < queries)


@triton.jit
def load_sums(lse, delta, row, queries):
    """Log-sum-exp in base 2 and delta of some rows; rows without keys and rows beyond the end get +inf, which makes every weight 0."""
    sums = tl.load(lse + row, mask=row < queries, other=float("-inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
    return sums, tl.load(delta + row, mask=row < queries, other=0.0)


@triton.jit
def key_gradients_kernel(
    q, k, v, bias, mask, dout, lse, delta, dk, dv,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    kv_heads, group, queries, keys, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of KEYS keys and values: over every head of its group and every query that sees it. Logits stand transposed, (key, query)."""
    tiles = tl.cdiv(keys, KEYS)
    first = tl.program_id(0) % tiles * KEYS
    pair = tl.program_id(0) // tiles
    batch = (pair // kv_heads).to(tl.int64)
    shared = (pair % kv_heads).to(tl.int64)
    keys_tile = load_rows(k + batch * k_batch + shared * k_head, first, keys, k_row, KEYS, DIM, WIDTH, UPCAST)
    if WANT_K:
        values_tile = load_rows(v + batch * v_batch + shared * v_head, first, keys, v_row, KEYS, VALUE_DIM, VALUE_WIDTH, UPCAST)
        key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    if WANT_V:
        value_sum = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)

    offset = keys - queries
    begin = tl.full([], 0, tl.int32)
    end = queries
    if HAS_RIGHT:
        begin = tl.maximum(first - right - offset, 0) // QUERIES * QUERIES
    if HAS_LEFT:
        end = tl.maximum(tl.minimum(queries, first + KEYS + left - offset), 0)
    for member in range(0, group):
        head = shared * group + member
        q_base = q + batch * q_batch + head * q_head
        dout_base = dout + batch * dout_batch + head * dout_head
        sums_base = (batch * kv_heads * group + head) * queries
        bias_base = bias
        mask_base = mask
        if HAS_BIAS:
            bias_base = bias + batch * bias_batch + head * bias_head
        if HAS_MASK:
            mask_base = mask + batch * mask_batch + head * mask_head
        for start in range(begin, end, QUERIES):
            row = start + tl.arange(0, QUERIES)
            queries_tile = load_rows(q_base, start, queries, q_row, QUERIES, DIM, WIDTH, UPCAST)
            logits = tl.dot(keys_tile, tl.trans(queries_tile), input_precision=PRECISION) * (scale * LOG2E)
            logits = biased(
                logits, tl.arange(0, QUERIES)[None, :], tl.arange(0, KEYS)[:, None], start, first, queries, keys,
                bias_base, bias_query, bias_key, mask_base, mask_query, mask_key, left, right, HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, True,
            )  # fmt: skip
            sums, taken = load_sums(lse + sums_base, delta + sums_base, row, queries)
            weights = tl.exp2(logits - sums[None, :])
            gradient = load_rows(dout_base, start, queries, dout_row, QUERIES, VALUE_DIM, VALUE_WIDTH, UPCAST)
            if WANT_V:
                value_sum = tl.dot(weights.to(DOT), gradient, value_sum, input_precision=PRECISION)
            if WANT_K:
                dweights = tl.dot(values_tile, tl.trans(gradient), input_precision=PRECISION)
                dlogits = weights * (dweights - taken[None, :])
                key_sum = tl.dot(dlogits.to(DOT), queries_tile, key_sum, input_precision=PRECISION)
    if WANT_K:
        store_rows(dk + batch * dk_batch + shared * dk_head, key_sum * scale, first, keys, dk_row, KEYS, DIM, WIDTH)
    if WANT_V:
        store_rows(dv + batch * dv_batch + shared * dv_head, value_sum, first, keys, dv_row, KEYS, VALUE_DIM, VALUE_WIDTH)


@triton.jit
def store_bias_gradient(
    corner, gradient, bias, bias_query, bias_key, query_start, key_start, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """A tile of a contiguous (query, key) gradient at `corner`; zero where the bias is +inf, which the logits took as a constant."""
    first = query_start
    start = key_start
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    seen = (query < queries - first) & (key < keys - start)
    origin = bias + first.to(tl.int64) * bias_query + start.to(tl.int64) * bias_key
    given = tl.load(origin + query * bias_query + key * bias_key, mask=seen, other=0.0)
    tl.store(corner + query * keys + key, tl.where(given == float("inf"), 0.0, gradient), mask=seen)


@triton.jit
def query_gradients_kernel(
    q, k, v, bias, mask, dout, lse, delta, dq, dbias,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    heads, group, queries, keys, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WRITE_BIAS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of QUERIES queries; with WRITE_BIAS also the gradient of an unshared, contiguous bias (zeroed before where unseen)."""
    tiles = tl.cdiv(queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = tl.program_id(0) // tiles
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    shared = head // group
    row = first + tl.arange(0, QUERIES)
    k += batch * k_batch + shared * k_head
    v += batch * v_batch + shared * v_head
    if HAS_BIAS:
        bias += batch * bias_batch + head * bias_head
    if HAS_MASK:
        mask += batch * mask_batch + head * mask_head
    sums_base = pair.to(tl.int64) * queries
    queries_tile = load_rows(q + batch * q_batch + head * q_head, first, queries, q_row, QUERIES, DIM, WIDTH, UPCAST)
    gradient = load_rows(dout + batch * dout_batch + head * dout_head, first, queries, dout_row, QUERIES, VALUE_DIM, VALUE_WIDTH, UPCAST)
    sums, taken = load_sums(lse + sums_base, delta + sums_base, row, queries)
    query_sum = tl.zeros([QUERIES, WIDTH], tl.float32)
    begin = first_key(first, queries, keys, left, KEYS, HAS_LEFT)
    end = last_key(first + QUERIES, queries, keys, right, HAS_RIGHT)
    for start in range(begin, end, KEYS):
        keys_tile = load_rows(k, start, keys, k_row, KEYS, DIM, WIDTH, UPCAST)
        logits = tl.dot(queries_tile, tl.trans(keys_tile), input_precision=PRECISION) * (scale * LOG2E)
        logits = biased(
            logits, tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], first, start, queries, keys,
            bias, bias_query, bias_key, mask, mask_query, mask_key, left, right,
            HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, True,
        )  # fmt: skip
        values_tile = load_rows(v, start, keys, v_row, KEYS, VALUE_DIM, VALUE_WIDTH, UPCAST)
        dweights = tl.dot(gradient, tl.trans(values_tile), input_precision=PRECISION)
        dlogits = tl.exp2(logits - sums[:, None]) * (dweights - taken[:, None])
        if WRITE_BIAS:
            store_bias_gradient(
                dbias + (pair.to(tl.int64) * queries + first) * keys + start, dlogits, bias, bias_query, bias_key,
                first, start, queries, keys, QUERIES, KEYS,
            )  # fmt: skip
        query_sum = tl.dot(dlogits.to(DOT), keys_tile, query_sum, input_precision=PRECISION)
    store_rows(dq + batch * dq_batch + head * dq_head, query_sum * scale, first, queries, dq_row, QUERIES, DIM, WIDTH)


@triton.jit
def bias_gradient_kernel(
    q, k, v, bias, mask, dout, lse, delta, dbias,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, dout_batch, dout_head, dout_row,
    bias_batch, bias_head, bias_query, bias_key, mask_batch, mask_head, mask_query, mask_key,
    batches, heads, group, queries, keys, bias_heads, bias_queries, bias_keys, left, right, scale,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SUM_BATCHES: tl.constexpr, SUM_HEADS: tl.constexpr, SUM_QUERIES: tl.constexpr, SUM_KEYS: tl.constexpr,
    UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of a shared bias: the sum over all that shares it, in a fixed order."""
    key_tiles = 1 if SUM_KEYS else tl.cdiv(keys, KEYS)
    query_tiles = 1 if SUM_QUERIES else tl.cdiv(queries, QUERIES)
    plane = tl.program_id(0) // (key_tiles * query_tiles)
    query_begin = tl.program_id(0) // key_tiles % query_tiles * QUERIES
    key_begin = tl.program_id(0) % key_tiles * KEYS
    query_end = queries if SUM_QUERIES else tl.minimum(query_begin + QUERIES, queries)
    key_end = keys if SUM_KEYS else tl.minimum(key_begin + KEYS, keys)
    own_batch = plane // bias_heads
    own_head = plane % bias_heads
    batch_count = batches if SUM_BATCHES else 1
    head_count = heads if SUM_HEADS else 1
    gathered = tl.zeros([QUERIES, KEYS], tl.float32)
    for shared in range(0, batch_count * head_count):
        batch = (own_batch + shared // head_count).to(tl.int64)
        head = (own_head + shared % head_count).to(tl.int64)
        bias_base = bias + batch * bias_batch + head * bias_head
        mask_base = mask
        if HAS_MASK:
            mask_base = mask + batch * mask_batch + head * mask_head
        sums_base = (batch * heads + head) * queries
        for query_start in range(query_begin, query_end, QUERIES):
            row = query_start + tl.arange(0, QUERIES)
            queries_tile = load_rows(q + batch * q_batch + head * q_head, query_start, queries, q_row, QUERIES, DIM, WIDTH, UPCAST)
            gradient = load_rows(
                dout + batch * dout_batch + head * dout_head, query_start, queries, dout_row, QUERIES, VALUE_DIM, VALUE_WIDTH, UPCAST
            )
            sums, taken = load_sums(lse + sums_base, delta + sums_base, row, queries)
            for start in range(key_begin, key_end, KEYS):
                keys_tile = load_rows(k + batch * k_batch + (head // group) * k_head, start, keys, k_row, KEYS, DIM, WIDTH, UPCAST)
                logits = tl.dot(queries_tile, tl.trans(keys_tile), input_precision=PRECISION) * (scale * LOG2E)
                logits = biased(
                    logits, tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :], query_start, start, queries, keys,
                    bias_base, bias_query, bias_key, mask_base, mask_query, mask_key, left, right, HAS_BIAS, HAS_MASK, HAS_LEFT, HAS_RIGHT, True,
                )  # fmt: skip
                values_tile = load_rows(v + batch * v_batch + (head // group) * v_head, start, keys, v_row, KEYS, VALUE_DIM, VALUE_WIDTH, UPCAST)
                dweights = tl.dot(gradient, tl.trans(values_tile), input_precision=PRECISION)
                gathered += tl.exp2(logits - sums[:, None]) * (dweights - taken[:, None])
    own = bias + own_batch.to(tl.int64) * bias_batch + own_head.to(tl.int64) * bias_head
    row = query_begin + tl.arange(0, QUERIES)
    column = key_begin + tl.arange(0, KEYS)
    base = dbias + plane.to(tl.int64) * bias_queries * bias_keys
    if SUM_QUERIES and SUM_KEYS:
        value = tl.sum(tl.sum(gathered, 1), 0)
        tl.store(base, tl.where(tl.load(own) == float("inf"), 0.0, value))
    elif SUM_QUERIES:
        value = tl.sum(gathered, 0)
        raw = tl.load(own + column.to(tl.int64) * bias_key, mask=column < keys, other=0.0)
        tl.store(base + column, tl.where(raw == float("inf"), 0.0, value), mask=column < keys)
    elif SUM_KEYS:
        value = tl.sum(gathered, 1)
        raw = tl.load(own + row.to(tl.int64) * bias_query, mask=row < queries, other=0.0)
        tl.store(base + row, tl.where(raw == float("inf"), 0.0, value), mask=row < queries)
    else:
        store_bias_gradient(
            base + query_begin.to(tl.int64) * keys + key_begin,
            gathered,
            own,
            bias_query,
            bias_key,
            query_begin,
            key_begin,
            queries,
            keys,
            QUERIES,
            KEYS,
        )


# --- configurations ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and launch options of one kernel; `split`: dk and dv in two launches, each with half the accumulators."""

    queries: int
    keys: int
    warps: int
    stages: int
    split: bool = False


#: (kernel, architecture, bytes of an element) -> tilings for head widths up to 64, 128 and 256.
TILINGS: dict[tuple[str, str, int], tuple[Tiling, Tiling, Tiling]] = {
    ("forward", "ampere", 2): (Tiling(128, 32, 4, 2), Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("forward", "hopper", 2): (Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
    ("forward", "cdna", 2): (Tiling(128, 64, 4, 1), Tiling(128, 64, 8, 1), Tiling(64, 32, 8, 1)),
    ("forward", "ampere", 4): (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(16, 16, 4, 1)),
    ("forward", "hopper", 4): (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(16, 16, 4, 1)),
    ("forward", "cdna", 4): (Tiling(64, 32, 4, 1), Tiling(64, 32, 8, 1), Tiling(32, 16, 4, 1)),
    ("key_gradients", "ampere", 2): (Tiling(64, 64, 4, 2), Tiling(32, 64, 8, 2), Tiling(32, 64, 8, 1, True)),
    ("key_gradients", "hopper", 2): (Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 2), Tiling(32, 64, 8, 1, True)),
    ("key_gradients", "cdna", 2): (Tiling(32, 64, 4, 1), Tiling(32, 64, 8, 1), Tiling(16, 32, 4, 1, True)),
    ("key_gradients", "ampere", 4): (Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1, True), Tiling(16, 16, 4, 1, True)),
    ("key_gradients", "hopper", 4): (Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1, True), Tiling(16, 16, 4, 1, True)),
    ("key_gradients", "cdna", 4): (Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1, True), Tiling(16, 16, 4, 1, True)),
    ("query_gradients", "ampere", 2): (Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 1)),
    ("query_gradients", "hopper", 2): (Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 1)),
    ("query_gradients", "cdna", 2): (Tiling(64, 32, 4, 1), Tiling(64, 32, 8, 1), Tiling(32, 16, 4, 1)),
    ("query_gradients", "ampere", 4): (Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1)),
    ("query_gradients", "hopper", 4): (Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1)),
    ("query_gradients", "cdna", 4): (Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1)),
}

#: What the compile check compiles each architecture's tilings for.
COMPILED_FOR = {"ampere": ("sm_80",), "hopper": ("sm_90", "sm_100"), "cdna": ("gfx942",)}


def architecture(device: torch.device) -> str:
    """The architecture whose tilings a device takes."""
    if torch.version.hip is not None:
        return "cdna"
    return "hopper" if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9 else "ampere"


def tiling(kernel: str, architecture: str, itemsize: int, width: int, queries: int, keys: int, *, biased: bool) -> Tiling:
    """The table's entry, its tiles no longer than the sequences need (16 is the least a matrix instruction takes).

    A bias or a mask takes as many registers as the logits do: one side of their tile is halved for it, and `key_gradients`, which holds two
    sums besides, spreads over eight warps.
    """
    if interpreting():  # a tile costs the same whatever its size
        entry = Tiling(64, 64, 4, 1, split=width > 64)
    else:
        entry = TILINGS[kernel, architecture, itemsize][0 if width <= 64 else 1 if width <= 128 else 2]
    if biased:
        rows, columns = (entry.queries, entry.keys // 2) if kernel == "query_gradients" else (entry.queries // 2, entry.keys)
        warps = 8 if kernel == "key_gradients" and itemsize == 2 else entry.warps
        entry = replace(entry, queries=max(16, rows), keys=max(16, columns), warps=warps)
    shortest = [max(16, triton.next_power_of_2(length)) for length in (queries, keys)]
    return Tiling(min(entry.queries, shortest[0]), min(entry.keys, shortest[1]), entry.warps, entry.stages, entry.split)


def _width(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


# --- launching -----------------------------------------------------------------------------------------------------------------------


class _Launch:
    """What the launches of one call share: strides, flags and constants, by argument name."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, left: int, right: int, scale: float) -> None:
        self.device = q.device
        self.batch, self.heads, self.queries, self.dim = q.shape
        self.kv_heads, self.keys, self.value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.itemsize = q.element_size()
        self.biased = bias is not None or mask is not None
        full = (self.batch, self.heads, self.queries, self.keys)
        upcast = interpreting() and q.dtype == torch.bfloat16
        self.arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "bias": bias,
            "mask": None if mask is None else mask.view(torch.uint8),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "group": self.heads // self.kv_heads,
            "batches": self.batch,
            "queries": self.queries,
            "keys": self.keys,
            "left": left,
            "right": right,
            "scale": scale,
            "HAS_BIAS": bias is not None,
            "HAS_MASK": mask is not None,
            "HAS_LEFT": left >= 0,
            "HAS_RIGHT": right >= 0,
            **_dimensions(self.dim, self.value_dim),
            "UPCAST": upcast,
            "DOT": tl.float32 if upcast else _TRITON_DTYPE[q.dtype],
            "PRECISION": _precision(q),
            **_strides("q", q),
            **_strides("k", k),
            **_strides("v", v),
        }
        for name, tensor in (("bias", bias), ("mask", mask)):
            strides = (0, 0, 0, 0) if tensor is None else tensor.expand(full).stride()
            self.arguments.update(zip((f"{name}_batch", f"{name}_head", f"{name}_query", f"{name}_key"), strides, strict=True))

    def tiling(self, kernel: str) -> Tiling:
        width = max(_width(self.dim), _width(self.value_dim))
        return tiling(kernel, architecture(self.device), self.itemsize, width, self.queries, self.keys, biased=self.biased)

    def run(self, kernel: Any, programs: int, tiles: Tiling, **own: Any) -> None:
        everything = {**self.arguments, "QUERIES": tiles.queries, "KEYS": tiles.keys, **own}
        chosen = {name: everything[name] for name in kernel.arg_names}
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):  # -1: no device to switch to
            kernel[(programs,)](**chosen, num_warps=tiles.warps, num_stages=tiles.stages)


_TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _dimensions(dim: int, value_dim: int) -> dict[str, int]:
    return {"DIM": dim, "VALUE_DIM": value_dim, "WIDTH": _width(dim), "VALUE_WIDTH": _width(value_dim)}


def _precision(q: Tensor) -> str:
    """How float32 enters the matrix units: exactly, or in three TF32 products that come close; in one where torch is told so."""
    if interpreting() or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), tensor.stride(), strict=False))


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, left: int, right: int, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill `out` and `lse`; shapes as in `foveal.kernels.dense.cpu.forward`."""
    if out.numel() == 0:
        return
    launch = _Launch(q, k, v, bias, mask, left, right, scale)
    tiles = launch.tiling("forward")
    programs = triton.cdiv(launch.queries, tiles.queries) * launch.batch * launch.heads
    launch.run(forward_kernel, programs, tiles, out=out, lse=lse, **_strides("out", out))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
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
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
) -> None:
    """Fill `dq`, `dk`, `dv` and, where it is asked for, `dbias`; shapes as in `foveal.kernels.dense.cpu.backward`."""
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv, dbias):
            if gradient is not None:
                gradient.zero_()
        return
    launch = _Launch(q, k, v, bias, mask, left, right, scale)
    delta = torch.empty_like(lse)
    shared = {"dout": dout, "lse": lse, "delta": delta, **_strides("dout", dout)}
    tiles = Tiling(min(64, _width(launch.queries)), 16, 4, 1)
    programs = triton.cdiv(launch.queries, tiles.queries) * launch.batch * launch.heads
    given = {"out": out, "dlse": dlse, "HAS_DLSE": dlse is not None, **_strides("out", out), **_strides("dlse", lse if dlse is None else dlse)}
    launch.run(delta_kernel, programs, tiles, **shared, **given)

    tiles = launch.tiling("key_gradients")
    programs = triton.cdiv(launch.keys, tiles.keys) * launch.batch * launch.kv_heads
    wanted = {"dk": dk, "dv": dv, **_strides("dk", dk), **_strides("dv", dv)}
    for want_k, want_v in ((True, False), (False, True)) if tiles.split else ((True, True),):
        launch.run(key_gradients_kernel, programs, tiles, **shared, **wanted, WANT_K=want_k, WANT_V=want_v)

    tiles = launch.tiling("query_gradients")
    whole = dbias is not None and dbias.shape == (launch.batch, launch.heads, launch.queries, launch.keys)
    if whole and dbias is not None and (left >= 0 or right >= 0):
        dbias.zero_()  # tiles outside the window are not visited
    programs = triton.cdiv(launch.queries, tiles.queries) * launch.batch * launch.heads
    launch.run(query_gradients_kernel, programs, tiles, **shared, dq=dq, **_strides("dq", dq), dbias=dbias if whole else None, WRITE_BIAS=whole)
    if dbias is None or whole:
        return
    sums = {"SUM_BATCHES": dbias.shape[0] == 1, "SUM_HEADS": dbias.shape[1] == 1, "SUM_QUERIES": dbias.shape[2] == 1, "SUM_KEYS": dbias.shape[3] == 1}
    sizes = {"bias_heads": dbias.shape[1], "bias_queries": dbias.shape[2], "bias_keys": dbias.shape[3]}
    query_tiles = 1 if sums["SUM_QUERIES"] else triton.cdiv(launch.queries, tiles.queries)
    key_tiles = 1 if sums["SUM_KEYS"] else triton.cdiv(launch.keys, tiles.keys)
    programs = query_tiles * key_tiles * dbias.shape[0] * dbias.shape[1]
    launch.run(bias_gradient_kernel, programs, tiles, **shared, dbias=dbias, **sums, **sizes)


# --- the compile check ---------------------------------------------------------------------------------------------------------------

_POINTERS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
#: Head dimension, dtype and variant of what is compiled: each entry of the table, and each option's code at least once.
_COMPILED_2_BYTES = [
    (16, "fp16", "all"),
    (64, "fp16", "plain"),
    (64, "fp16", "causal"),
    (64, "fp16", "all"),
    (64, "bf16", "bias"),
    (100, "bf16", "bias"),
    (128, "fp16", "plain"),
    (128, "bf16", "all"),
    (256, "bf16", "plain"),
    (256, "fp16", "all"),
]
_COMPILED_4_BYTES = [(32, "fp32", "all"), (64, "fp32", "plain"), (128, "fp32", "all"), (256, "fp32", "all")]
_KERNELS = {"forward": forward_kernel, "key_gradients": key_gradients_kernel, "query_gradients": query_gradients_kernel}


def compile_cases() -> list[CompileCase]:
    """Every tiling of the table in both half precisions or float32, with the options that change the code."""
    from foveal.kernels.testing.compile import CompileCase

    plain = {"HAS_BIAS": False, "HAS_MASK": False, "HAS_LEFT": False, "HAS_RIGHT": False}
    variants = {"plain": plain, "bias": {**plain, "HAS_BIAS": True}, "causal": {**plain, "HAS_RIGHT": True}, "all": dict.fromkeys(plain, True)}
    cases = []
    for name, arch, itemsize in TILINGS:
        for dim, dtype, variant in _COMPILED_4_BYTES if itemsize == 4 else _COMPILED_2_BYTES:
            flags = variants[variant]
            tiles = tiling(name, arch, itemsize, dim, 1024, 1024, biased=flags["HAS_BIAS"])
            for suffix, kernel, own in _variants_of(name, tiles, variant):
                constants = {
                    **flags, **own, **_dimensions(dim, dim), "QUERIES": tiles.queries, "KEYS": tiles.keys, "UPCAST": False,
                    "DOT": {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
                    "PRECISION": "ieee" if arch == "cdna" else "tf32x3",
                }  # fmt: skip
                cases.append(
                    CompileCase(
                        name=f"{name}{suffix}-{arch}-d{dim}-{dtype}-{variant}",
                        kernel=kernel,
                        signature=_signature(kernel, dtype, constants),
                        constants={key: value for key, value in constants.items() if key in kernel.arg_names},
                        num_warps=tiles.warps,
                        num_stages=tiles.stages,
                        divisible=[argument for argument in kernel.arg_names if argument.endswith(("_batch", "_head", "_row", "_query"))],
                        matrix=itemsize == 2,
                        targets=COMPILED_FOR[arch],
                        quick=dim == 64 and dtype == "fp16" and variant == "all",
                    )
                )
    return cases


def _variants_of(name: str, tiles: Tiling, variant: str) -> list[tuple[str, Any, dict[str, Any]]]:
    kernel = _KERNELS[name]
    if name == "key_gradients":
        parts = {"-k": (True, False), "-v": (False, True)} if tiles.split else {"": (True, True)}
        return [(suffix, kernel, {"WANT_K": k, "WANT_V": v}) for suffix, (k, v) in parts.items()]
    if name == "query_gradients" and variant == "all":
        shared = {"SUM_BATCHES": True, "SUM_HEADS": False, "SUM_QUERIES": False, "SUM_KEYS": False}
        return [("-bias", kernel, {"WRITE_BIAS": True}), ("-shared-bias", bias_gradient_kernel, shared)]
    return [("", kernel, {"WRITE_BIAS": False})]


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    types = {
        **dict.fromkeys(_POINTERS, f"*{dtype}"),
        **dict.fromkeys(("bias", "dbias", "lse", "delta"), "*fp32"),
        "mask": "*u8",
        "scale": "fp32",
    }
    return {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
