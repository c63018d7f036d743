"""Attention over many short sequences (windows of up to 64 queries and keys): several windows a program, one tile each.

A window's logits are one tile, so nothing is walked over: forward, the next window's rows are loaded while this one's product runs; backward,
one kernel gives dq, dk and dv from logits that are computed once, and the gradient of a bias or table that the windows share stays in
registers from window to window. Each program writes its own part of that sum, and the parts are added outside, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveal.kernels.dense.kernels import attend_tile, divided, open_gate
from foveal.kernels.dense.logits import at, load_rates, load_rows, load_sums, locate, modify, store_rows, survivors, unit, weigh


@triton.jit
def forward_windows_kernel(x, n, out, lse, F: tl.constexpr, WINDOWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr):
    """Output and log-normaliser of one head of WINDOWS windows."""
    head = (tl.program_id(0) % n.heads).to(tl.int64)
    begin = tl.program_id(0) // n.heads * WINDOWS
    shared = head // n.group
    start = tl.full([], 0, tl.int32)
    origin = tl.full([], 0, tl.int64)
    row = tl.arange(0, QUERIES)
    VALUE_WIDTH: tl.constexpr = F.value_width
    for window in range(begin, tl.minimum(begin + WINDOWS, n.batches)):
        batch = origin + window
        spot = locate(x, n, batch, head, origin, n.queries, n.keys, F)
        rates = load_rates(x, row, spot, F)
        tile = load_rows(at(x.q, batch, head, origin), start, n.queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
        accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        accumulated, largest, total = attend_tile(
            accumulated, largest, total, tile, at(x.k, batch, shared, origin), at(x.v, batch, shared, origin), rates, start, start,
            x, n, spot, F, True, QUERIES, KEYS, DOT,
        )  # fmt: skip
        accumulated, sums = divided(accumulated, largest, total, batch, head, n.keys, x, F, QUERIES)
        accumulated = open_gate(accumulated, batch, head, origin, start, n.queries, x, F, QUERIES)
        store_rows(at(out, batch, head, origin), accumulated, start, n.queries, out.row, QUERIES, F.value_dim, F.value_width)
        tl.store(at(lse, batch, head, origin) + row, sums, mask=row < n.queries)


@triton.jit
def backward_windows_kernel(
    x, n, dout, lse, delta, dq, dk, dv, parts,
    F: tl.constexpr, WANT_Q: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr, WANT_SHARED: tl.constexpr,
    WINDOWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of WINDOWS windows; with WANT_SHARED the logits' own, summed over the windows, (window, query, key), in `parts`.

    A program takes one tile of a window's pairs: all its keys where dq is wanted, all its queries where dk or dv is.
    """
    pair = tl.program_id(0)
    first = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    if not (WANT_K or WANT_V):
        first += pair % tl.cdiv(n.queries, QUERIES) * QUERIES
        pair = pair // tl.cdiv(n.queries, QUERIES)
    if not WANT_Q:
        start += pair % tl.cdiv(n.keys, KEYS) * KEYS
        pair = pair // tl.cdiv(n.keys, KEYS)
    head = (pair % n.heads).to(tl.int64)
    begin = pair // n.heads * WINDOWS
    origin = tl.full([], 0, tl.int64)
    row = first + tl.arange(0, QUERIES)
    query = tl.arange(0, QUERIES)[:, None]
    key = tl.arange(0, KEYS)[None, :]
    gathered = tl.zeros([QUERIES, KEYS], tl.float32)
    for window in range(begin, tl.minimum(begin + WINDOWS, n.batches)):
        batch = origin + window
        spot = locate(x, n, batch, head, origin, n.queries, n.keys, F)
        rates = load_rates(x, row, spot, F)
        queries_tile = load_rows(at(x.q, batch, head, origin), first, n.queries, x.q.row, QUERIES, F.dim, F.width, F.upcast)
        keys_tile = load_rows(at(x.k, batch, head, origin), start, n.keys, x.k.row, KEYS, F.dim, F.width, F.upcast)
        product = tl.dot(queries_tile, tl.trans(keys_tile), input_precision=F.precision) * (n.scale * unit(F))
        if F.temperature:
            product *= rates[:, None]
        logits, steepness = modify(product, query, key, first, start, x, n, spot, F, True)
        sums, taken = load_sums(at(lse, batch, head, origin), at(delta, batch, head, origin), row, n.queries)
        weights, slope = weigh(logits, sums[:, None], F)
        gradient = load_rows(at(dout, batch, head, origin), first, n.queries, dout.row, QUERIES, F.value_dim, F.value_width, F.upcast)
        values_tile = load_rows(at(x.v, batch, head, origin), start, n.keys, x.v.row, KEYS, F.value_dim, F.value_width, F.upcast)
        dweights = tl.dot(gradient, tl.trans(values_tile), input_precision=F.precision)
        if F.dropout:
            kept = survivors(query, key, first, start, n, spot, F)
            weights *= kept
            dweights *= kept
        if WANT_V:
            dvalues = tl.dot(tl.trans(weights.to(DOT)), gradient, input_precision=F.precision)
            store_rows(at(dv, batch, head, origin), dvalues, start, n.keys, dv.row, KEYS, F.value_dim, F.value_width)
        dlogits = slope * (dweights - taken[:, None])
        if WANT_SHARED:
            gathered += dlogits
        if F.softcap:
            dlogits *= steepness
        if F.temperature:
            dlogits *= rates[:, None]
        dlogits = (dlogits * n.scale).to(DOT)
        if WANT_Q:
            dqueries = tl.dot(dlogits, keys_tile, input_precision=F.precision)
            store_rows(at(dq, batch, head, origin), dqueries, first, n.queries, dq.row, QUERIES, F.dim, F.width)
        if WANT_K:
            dkeys = tl.dot(tl.trans(dlogits), queries_tile, input_precision=F.precision)
            store_rows(at(dk, batch, head, origin), dkeys, start, n.keys, dk.row, KEYS, F.dim, F.width)
    if WANT_SHARED:
        corner = parts + pair.to(tl.int64) * n.queries * n.keys + first * n.keys + start
        tl.store(corner + query * n.keys + key, gathered, mask=(query < n.queries - first) & (key < n.keys - start))
