"""Three-way attention as Triton kernels: with one of the three fixed, triples are a matrix of pairs, and their logits one matrix product.

A forward program owns a query: its first keys, times it, meet the second keys, as queries meet keys in flash attention; each first key has a
running softmax over the second keys, and these are merged into the query's. `query_gradients_kernel` owns a query too. A program of
`key_gradients_kernel` owns a key, of the first or of the second kind: the definition is the same with the two exchanged, so one kernel is
launched for both. Each recomputes the logits from the log-sum-exp; no atomics, the same bits every time. Everything inside is float32, as in
the definition: a half's product of query and key, rounded again, would be off by more than the output's rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gathered import written
from foveal.kernels.gpu import precision, width
from foveal.kernels.testing.compile import CompileCase


@triton.jit
def load_rows(base, first, length, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) of a contiguous (length, DIM) matrix from row `first`, float32; zeros beyond."""
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    return tl.load(base + row[:, None] * DIM + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_row(base, DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    return tl.load(base + column, mask=column < DIM, other=0.0).to(tl.float32)


@triton.jit
def store_row(base, row, DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    tl.store(base + column, row.to(base.dtype.element_ty), mask=column < DIM)


@triton.jit
def counted(mask, batch, index, length):
    """Whether keys are there and, with a mask, count."""
    there = index < length
    if mask is not None:
        there = there & (tl.load(mask + batch * length + index, mask=there, other=0) != 0)
    return there


@triton.jit
def visible(length, queries, last_query, CAUSAL: tl.constexpr):
    """How many keys a query sees: those up to its own place, aligned at the end."""
    end = length
    if CAUSAL:
        end = tl.maximum(tl.minimum(length, last_query + 1 + length - queries), 0)
    return end


@triton.jit
def forward_kernel(
    q, k1, k2, v1, v2, mask1, mask2, out, lse, heads, queries, first, second, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one query."""
    pair = (tl.program_id(0) // queries).to(tl.int64)
    query = tl.program_id(0) % queries
    batch = pair // heads
    row = load_row(q + (pair * queries + query) * DIM, DIM, WIDTH) * scale
    first_end = visible(first, queries, query, CAUSAL)
    second_end = visible(second, queries, query, CAUSAL)
    gathered = tl.zeros([VALUE_WIDTH], tl.float32)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for j in range(0, first_end, ROWS):
        product = load_rows(k1 + pair * first * DIM, j, first, DIM, ROWS, WIDTH) * row[None, :]
        index = j + tl.arange(0, ROWS)
        live = counted(mask1, batch, index, first) & (index < first_end)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        read = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        for start in range(0, second_end, COLUMNS):
            other = start + tl.arange(0, COLUMNS)
            seen = live[:, None] & (counted(mask2, batch, other, second) & (other < second_end))[None, :]
            keys = load_rows(k2 + pair * second * DIM, start, second, DIM, COLUMNS, WIDTH)
            logits = tl.where(seen, tl.dot(product, tl.trans(keys), input_precision=PRECISION), float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(logits - anchor[:, None])
            shrink = tl.exp(top - anchor)
            sums = sums * shrink + tl.sum(weights, 1)
            values = load_rows(v2 + pair * second * VALUES, start, second, VALUES, COLUMNS, VALUE_WIDTH)
            read = tl.dot(weights, values, read * shrink[:, None], input_precision=PRECISION)
            top = higher
        best = tl.maximum(largest, tl.max(top, 0))
        anchor = tl.where(best == float("-inf"), 0.0, best)
        share = tl.exp(top - anchor)
        shrink = tl.exp(largest - anchor)
        values = load_rows(v1 + pair * first * VALUES, j, first, VALUES, ROWS, VALUE_WIDTH)
        gathered = gathered * shrink + tl.sum(values * read * share[:, None], 0)
        total = total * shrink + tl.sum(sums * share, 0)
        largest = best
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_row(out + (pair * queries + query) * VALUES, gathered / total, VALUES, VALUE_WIDTH)
    tl.store(lse + pair * queries + query, tl.where(empty, float("-inf"), largest + tl.log(total)))


@triton.jit
def query_gradients_kernel(
    q, k1, k2, v1, v2, mask1, mask2, dout, lse, taken, dq, heads, queries, first, second, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one query."""
    pair = (tl.program_id(0) // queries).to(tl.int64)
    query = tl.program_id(0) % queries
    batch = pair // heads
    row = load_row(q + (pair * queries + query) * DIM, DIM, WIDTH) * scale
    wanted = load_row(dout + (pair * queries + query) * VALUES, VALUES, VALUE_WIDTH)
    anchor = tl.load(lse + pair * queries + query)
    anchor = tl.where(anchor == float("-inf"), float("inf"), anchor)  # it sees no pair: weights 0
    less = tl.load(taken + pair * queries + query)
    first_end = visible(first, queries, query, CAUSAL)
    second_end = visible(second, queries, query, CAUSAL)
    gathered = tl.zeros([WIDTH], tl.float32)
    for j in range(0, first_end, ROWS):
        own = load_rows(k1 + pair * first * DIM, j, first, DIM, ROWS, WIDTH)
        product = own * row[None, :]
        given = load_rows(v1 + pair * first * VALUES, j, first, VALUES, ROWS, VALUE_WIDTH) * wanted[None, :]
        index = j + tl.arange(0, ROWS)
        live = counted(mask1, batch, index, first) & (index < first_end)
        through = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, second_end, COLUMNS):
            other = start + tl.arange(0, COLUMNS)
            seen = live[:, None] & (counted(mask2, batch, other, second) & (other < second_end))[None, :]
            keys = load_rows(k2 + pair * second * DIM, start, second, DIM, COLUMNS, WIDTH)
            logits = tl.where(seen, tl.dot(product, tl.trans(keys), input_precision=PRECISION), float("-inf"))
            values = load_rows(v2 + pair * second * VALUES, start, second, VALUES, COLUMNS, VALUE_WIDTH)
            dweights = tl.dot(given, tl.trans(values), input_precision=PRECISION)
            dlogits = tl.exp(logits - anchor) * (dweights - less)
            through = tl.dot(dlogits, keys, through, input_precision=PRECISION)
        gathered += tl.sum(through * own, 0)
    store_row(dq + (pair * queries + query) * DIM, gathered * scale, DIM, WIDTH)


@triton.jit
def key_gradients_kernel(
    q, k1, k2, v1, v2, mask1, mask2, dout, lse, taken, dk1, dv1, heads, queries, first, second, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one first key and its value; of a second one where the two kinds are exchanged."""
    pair = (tl.program_id(0) // first).to(tl.int64)
    own = tl.program_id(0) % first
    batch = pair // heads
    key = load_row(k1 + (pair * first + own) * DIM, DIM, WIDTH) * scale
    value = load_row(v1 + (pair * first + own) * VALUES, VALUES, VALUE_WIDTH)
    key_sum = tl.zeros([WIDTH], tl.float32)
    value_sum = tl.zeros([VALUE_WIDTH], tl.float32)
    begin = tl.full([], 0, tl.int32)
    end = queries
    if mask1 is not None:
        end = tl.where(tl.load(mask1 + batch * first + own) != 0, queries, 0)
    if CAUSAL:
        begin = tl.maximum(own + queries - first, 0) // ROWS * ROWS
    for i in range(begin, end, ROWS):
        row = i + tl.arange(0, ROWS)
        tile = load_rows(q + pair * queries * DIM, i, queries, DIM, ROWS, WIDTH)
        wanted = load_rows(dout + pair * queries * VALUES, i, queries, VALUES, ROWS, VALUE_WIDTH)
        product = tile * key[None, :]
        given = wanted * value[None, :]
        anchor = tl.load(lse + pair * queries + row, mask=row < queries, other=float("-inf"))
        anchor = tl.where(anchor == float("-inf"), float("inf"), anchor)
        less = tl.load(taken + pair * queries + row, mask=row < queries, other=0.0)
        live = row < queries
        if CAUSAL:
            live = live & (own <= row + first - queries)
        through = tl.zeros([ROWS, WIDTH], tl.float32)
        read = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        for start in range(0, visible(second, queries, i + ROWS - 1, CAUSAL), COLUMNS):
            other = start + tl.arange(0, COLUMNS)
            seen = live[:, None] & counted(mask2, batch, other, second)[None, :]
            if CAUSAL:
                seen = seen & (other[None, :] <= row[:, None] + second - queries)
            keys = load_rows(k2 + pair * second * DIM, start, second, DIM, COLUMNS, WIDTH)
            logits = tl.where(seen, tl.dot(product, tl.trans(keys), input_precision=PRECISION), float("-inf"))
            weights = tl.exp(logits - anchor[:, None])
            values = load_rows(v2 + pair * second * VALUES, start, second, VALUES, COLUMNS, VALUE_WIDTH)
            read = tl.dot(weights, values, read, input_precision=PRECISION)
            dweights = tl.dot(given, tl.trans(values), input_precision=PRECISION)
            dlogits = weights * (dweights - less[:, None])
            through = tl.dot(dlogits, keys, through, input_precision=PRECISION)
        key_sum += tl.sum(through * tile, 0)
        value_sum += tl.sum(read * wanted, 0)
    store_row(dk1 + (pair * first + own) * DIM, key_sum * scale, DIM, WIDTH)
    store_row(dv1 + (pair * first + own) * VALUES, value_sum, VALUES, VALUE_WIDTH)


def _tiling(dim: int, value_dim: int) -> dict[str, int]:
    """Pairs and keys of a tile: the parts of three TF32 products stand in registers, so a wide head takes twice the warps."""
    return {"ROWS": 32, "COLUMNS": 32, "num_warps": 8 if max(width(dim), width(value_dim)) > 64 else 4, "num_stages": 1}


def _constants(dim: int, value_dim: int, products: str, causal: bool) -> dict[str, Any]:
    sizes = {"DIM": dim, "VALUES": value_dim, "WIDTH": width(dim), "VALUE_WIDTH": width(value_dim)}
    return {"CAUSAL": causal, **sizes, "PRECISION": products}


def _launch(kernel: Any, programs: int, like: Tensor, value_dim: int, causal: bool, *arguments: Any) -> None:
    if programs == 0:
        return
    constants = _constants(like.shape[-1], value_dim, precision(), causal)
    with torch.cuda.device(like.device if like.device.type == "cuda" else -1):  # -1: no device to switch to
        kernel[(programs,)](*arguments, **constants, **_tiling(like.shape[-1], value_dim))


def _masks(*masks: Tensor | None) -> list[Tensor | None]:
    return [None if mask is None else mask.contiguous().view(torch.uint8) for mask in masks]


def forward(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, mask1: Tensor | None, mask2: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(output in v1's dtype, log-sum-exp in float32)."""
    given = [t.contiguous() for t in (q, k1, k2, v1, v2)]
    batch, heads, queries, _ = q.shape
    out = v1.new_empty(batch, heads, queries, v1.shape[3], dtype=written(v1.dtype))
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    lengths = (heads, queries, k1.shape[2], k2.shape[2], scale)
    _launch(forward_kernel, lse.numel(), given[0], v1.shape[3], causal, *given, *_masks(mask1, mask2), out, lse, *lengths)
    return out.to(v1.dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k1, k2, v1 and v2."""
    q, k1, k2, v1, v2, dout, lse = (t.contiguous() for t in (q, k1, k2, v1, v2, dout, lse))
    one, two = _masks(mask1, mask2)
    batch, heads, queries, _ = q.shape
    taken = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        taken = taken - dlse
    taken = taken.contiguous()
    dq, dk1, dk2, dv1, dv2 = (torch.empty_like(t, dtype=written(t.dtype)) for t in (q, k1, k2, v1, v2))
    pairs, first, second, values = batch * heads, k1.shape[2], k2.shape[2], v1.shape[3]
    shared = (dout, lse, taken)
    lengths = (heads, queries, first, second, scale)
    _launch(query_gradients_kernel, pairs * queries, q, values, causal, q, k1, k2, v1, v2, one, two, *shared, dq, *lengths)
    _launch(key_gradients_kernel, pairs * first, q, values, causal, q, k1, k2, v1, v2, one, two, *shared, dk1, dv1, *lengths)
    lengths = (heads, queries, second, first, scale)
    _launch(key_gradients_kernel, pairs * second, q, values, causal, q, k2, k1, v2, v1, two, one, *shared, dk2, dv2, *lengths)
    return dq, dk1, dk2, dv1, dv2


# --- the compile check ---------------------------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Both widths of heads, causal with masks, which is all that changes the code."""
    cases = []
    pointers = dict.fromkeys(("lse", "taken"), "*fp32") | {"mask1": "*u8", "mask2": "*u8", "scale": "fp32"}
    pointers |= dict.fromkeys(("heads", "queries", "first", "second"), "i32")
    for dim, dtype in ((64, "bf16"),):
        for products, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
            tiling = _tiling(dim, dim)
            options: dict[str, Any] = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
            constants = {**_constants(dim, dim, products, True), **tiling}
            for kernel in (forward_kernel, query_gradients_kernel, key_gradients_kernel):
                signature = {name: pointers.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constants}
                name = f"{kernel.__name__.removesuffix('_kernel').replace('_', '-')}-d{dim}-{dtype}-{products}"
                quick = dim == 64 and kernel is forward_kernel
                cases.append(CompileCase(name, kernel, signature, constants, targets=targets, quick=quick, **options))
    return cases
