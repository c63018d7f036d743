"""Efficient attention as Triton kernels: a summary of each head's values, and the reads of all its queries.

Sequences are short and heads narrow, so what counts is that q, k and v are read once, where they lie, and nothing but the summary, (dim,
value_dim) a head, is written between. `context_kernel` walks a head's keys with the running maximum of every feature, as flash attention
does of every query; `read_kernel` owns a tile of queries. Backward, `query_gradients_kernel` walks a head's queries and sums the summary's
gradient, and `key_gradients_kernel` owns a tile of keys. A tile of 32 tokens of a narrow head is the work of one warp. All of it is float32,
no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.efficient.cpu import ordered_like
from foveal.kernels.gathered import written
from foveal.kernels.gpu import precision, width
from foveal.kernels.linear.cpu import rows
from foveal.kernels.testing.compile import CompileCase

#: Tokens of a tile.
TOKENS = 32


@triton.jit
def load_tokens(base, row_stride, first, length, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, other):
    """(BLOCK, WIDTH) rows from `first` in float32; `other` beyond the length and the columns."""
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    return tl.load(base + row[:, None].to(tl.int64) * row_stride + column[None, :], mask=inside, other=other).to(tl.float32)


@triton.jit
def store_tokens(base, row_stride, tile, first, length, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    tl.store(base + row[:, None].to(tl.int64) * row_stride + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_summary(base, pair, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    """A head's (dim, value_dim), zeros beyond."""
    row, column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = (row < DIM)[:, None] & (column < VALUES)[None, :]
    return tl.load(base + pair * (DIM * VALUES) + row[:, None] * VALUES + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_summary(base, pair, tile, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr):
    row, column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    inside = (row < DIM)[:, None] & (column < VALUES)[None, :]
    tl.store(base + pair * (DIM * VALUES) + row[:, None] * VALUES + column[None, :], tile, mask=inside)


@triton.jit
def over_features(q, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Softmax of every row over its DIM features; 0 in the columns beyond."""
    there = (tl.arange(0, WIDTH) < DIM)[None, :]
    q = tl.where(there, q, float("-inf"))
    q = tl.exp(q - tl.max(q, 1)[:, None])
    return q / tl.sum(q, 1)[:, None]


@triton.jit
def load_counted(mask, batch, first, length, BLOCK: tl.constexpr):
    """Whether each token of a tile is there and, with a mask, counts."""
    row = first + tl.arange(0, BLOCK)
    counted = row < length
    if mask is not None:
        counted = counted & (tl.load(mask + batch * length + row, mask=counted, other=0) != 0)
    return counted


@triton.jit
def context_kernel(
    k, v, mask, context, sums, k_batch, k_head, k_row, v_batch, v_head, v_row, heads, keys,
    DIM: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's summary of its values, and the log-sum-exp of every feature of its keys: +inf where no key counts, so that weights are 0."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    column = tl.arange(0, WIDTH)
    largest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    gathered = tl.zeros([WIDTH, VALUE_WIDTH], tl.float32)
    for first in range(0, keys, BLOCK):
        counted = load_counted(mask, batch, first, keys, BLOCK)
        logits = load_tokens(k, k_row, first, keys, DIM, BLOCK, WIDTH, float("-inf"))
        logits = tl.where(counted[:, None], logits, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - anchor[None, :])
        shrink = tl.exp(largest - anchor)
        values = load_tokens(v, v_row, first, keys, VALUES, BLOCK, VALUE_WIDTH, 0.0)
        values = tl.where(counted[:, None], values, 0.0)
        gathered = tl.dot(tl.trans(weights), values, gathered * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 0)
        largest = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_summary(context, pair, gathered / total[:, None], DIM, VALUES, WIDTH, VALUE_WIDTH)
    tl.store(sums + pair * DIM + column, tl.where(empty, float("inf"), largest + tl.log(total)), mask=column < DIM)


@triton.jit
def read_kernel(
    q, context, out, q_batch, q_head, q_row, out_batch, out_head, out_row, heads, queries, scale,
    DIM: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: the mixture of the summary that each one's features weigh."""
    tiles = tl.cdiv(queries, BLOCK)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK
    batch, head = pair // heads, pair % heads
    tile = load_tokens(q + batch * q_batch + head * q_head, q_row, first, queries, DIM, BLOCK, WIDTH, 0.0)
    summary = load_summary(context, pair, DIM, VALUES, WIDTH, VALUE_WIDTH)
    given = tl.dot(over_features(tile, DIM, WIDTH), summary, input_precision=PRECISION) * scale
    store_tokens(out + batch * out_batch + head * out_head, out_row, given, first, queries, VALUES, BLOCK, VALUE_WIDTH)


@triton.jit
def query_gradients_kernel(
    q, dout, context, dq, dcontext, taken,
    q_batch, q_head, q_row, dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row, heads, queries, scale,
    DIM: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All queries of a head: their gradients, the summary's, and by feature the sum of summary times gradient, which the keys' softmax takes."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    q += batch * q_batch + head * q_head
    dout += batch * dout_batch + head * dout_head
    dq += batch * dq_batch + head * dq_head
    summary = load_summary(context, pair, DIM, VALUES, WIDTH, VALUE_WIDTH)
    gathered = tl.zeros([WIDTH, VALUE_WIDTH], tl.float32)
    for first in range(0, queries, BLOCK):
        weights = over_features(load_tokens(q, q_row, first, queries, DIM, BLOCK, WIDTH, 0.0), DIM, WIDTH)
        wanted = load_tokens(dout, dout_row, first, queries, VALUES, BLOCK, VALUE_WIDTH, 0.0) * scale
        gathered = tl.dot(tl.trans(weights), wanted, gathered, input_precision=PRECISION)
        dweights = tl.dot(wanted, tl.trans(summary), input_precision=PRECISION)
        gradient = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        store_tokens(dq, dq_row, gradient, first, queries, DIM, BLOCK, WIDTH)
    store_summary(dcontext, pair, gathered, DIM, VALUES, WIDTH, VALUE_WIDTH)
    column = tl.arange(0, WIDTH)
    tl.store(taken + pair * DIM + column, tl.sum(gathered * summary, 1), mask=column < DIM)


@triton.jit
def key_gradients_kernel(
    k, v, mask, sums, dcontext, taken, dk, dv,
    k_batch, k_head, k_row, v_batch, v_head, v_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, heads, keys,
    DIM: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one head."""
    tiles = tl.cdiv(keys, BLOCK)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK
    batch, head = pair // heads, pair % heads
    column = tl.arange(0, WIDTH)
    counted = load_counted(mask, batch, first, keys, BLOCK)
    logits = load_tokens(k + batch * k_batch + head * k_head, k_row, first, keys, DIM, BLOCK, WIDTH, float("-inf"))
    logits = tl.where(counted[:, None], logits, float("-inf"))
    weights = tl.exp(logits - tl.load(sums + pair * DIM + column, mask=column < DIM, other=float("inf"))[None, :])
    values = load_tokens(v + batch * v_batch + head * v_head, v_row, first, keys, VALUES, BLOCK, VALUE_WIDTH, 0.0)
    gradient = load_summary(dcontext, pair, DIM, VALUES, WIDTH, VALUE_WIDTH)
    given = tl.dot(weights, gradient, input_precision=PRECISION)
    store_tokens(dv + batch * dv_batch + head * dv_head, dv_row, given, first, keys, VALUES, BLOCK, VALUE_WIDTH)
    dweights = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
    dlogits = weights * (dweights - tl.load(taken + pair * DIM + column, mask=column < DIM, other=0.0)[None, :])
    store_tokens(dk + batch * dk_batch + head * dk_head, dk_row, dlogits, first, keys, DIM, BLOCK, WIDTH)


def _blocks(dim: int, value_dim: int) -> dict[str, int]:
    return {"DIM": dim, "VALUES": value_dim, "BLOCK": TOKENS, "WIDTH": width(dim), "VALUE_WIDTH": width(value_dim)}


def _warps(dim: int, value_dim: int) -> int:
    return 1 if max(width(dim), width(value_dim)) <= 16 else 4


def _launch(kernel: Any, programs: int, device: torch.device, dim: int, value_dim: int, *arguments: Any) -> None:
    constants = {**_blocks(dim, value_dim), "PRECISION": precision()}
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: no device to switch to
        kernel[(programs,)](*arguments, **constants, num_warps=_warps(dim, value_dim), num_stages=1)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _context(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(batch * heads, dim, value_dim), and the log-sum-exp of the keys, (batch * heads, dim)."""
    batch, heads, keys, dim = k.shape
    value_dim = v.shape[3]
    context = torch.empty(batch * heads, dim, value_dim, dtype=torch.float32, device=k.device)
    sums = torch.empty(batch * heads, dim, dtype=torch.float32, device=k.device)
    if context.numel():
        _launch(context_kernel, batch * heads, k.device, dim, value_dim, k, v, mask, context, sums, *_strides(k, v), heads, keys)
    return context, sums


def _given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = (rows(t, t.dtype) for t in (q, k, v))
    return q, k, v, None if mask is None else mask.contiguous().view(torch.uint8)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Output in v's dtype, in the memory order of q."""
    q, k, v, mask = _given(q, k, v, mask)
    out = ordered_like(q, v.shape[3], written(v.dtype))
    batch, heads, queries, dim = q.shape
    if out.numel():
        context, _ = _context(k, v, mask)
        programs = batch * heads * triton.cdiv(queries, TOKENS)
        _launch(read_kernel, programs, q.device, dim, v.shape[3], q, context, out, *_strides(q, out), heads, queries, scale)
    return out.to(v.dtype)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the summary is made again from the keys."""
    q, k, v, mask = _given(q, k, v, mask)
    dout = rows(dout, dout.dtype)
    dq, dk, dv = (ordered_like(t, t.shape[3], written(t.dtype)) for t in (q, k, v))
    batch, heads, queries, dim = q.shape
    keys, value_dim = v.shape[2:]
    if 0 in (batch, heads, queries, keys, dim, value_dim):
        return dq.zero_(), dk.zero_(), dv.zero_()
    pairs = batch * heads
    context, sums = _context(k, v, mask)
    dcontext, taken = torch.empty_like(context), torch.empty_like(sums)
    shared = (heads, queries, scale)
    _launch(query_gradients_kernel, pairs, q.device, dim, value_dim, q, dout, context, dq, dcontext, taken, *_strides(q, dout, dq), *shared)
    programs = pairs * triton.cdiv(keys, TOKENS)
    arguments = (k, v, mask, sums, dcontext, taken, dk, dv, *_strides(k, v, dk, dv), heads, keys)
    _launch(key_gradients_kernel, programs, k.device, dim, value_dim, *arguments)
    return dq, dk, dv


# --- the compile check ---------------------------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """The narrow heads that it is made for, and the widest that it takes."""
    cases = []
    signals = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
    for dim, dtype in ((8, "fp32"), (32, "bf16")):
        for products, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
            constants = {**_blocks(dim, dim), "PRECISION": products}
            for kernel in (context_kernel, read_kernel, query_gradients_kernel, key_gradients_kernel):
                types = dict.fromkeys(signals, f"*{dtype}") | dict.fromkeys(("context", "sums", "dcontext", "taken"), "*fp32")
                types |= {"mask": "*u8", "scale": "fp32"}
                signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
                name = f"{kernel.__name__.removesuffix('_kernel').replace('_', '-')}-d{dim}-{dtype}-{products}"
                options: dict[str, Any] = {"num_warps": _warps(dim, dim), "num_stages": 1, "targets": targets}
                cases.append(CompileCase(name, kernel, signature, constants, quick=dim == 8 and kernel is key_gradients_kernel, **options))
    return cases
