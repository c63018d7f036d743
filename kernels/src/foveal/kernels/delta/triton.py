"""The part of the chunked delta rule and of Titans that goes from chunk to chunk, as two Triton kernels: torch launches some calls a chunk for it.

A program owns a tile of the values of one head and keeps its state, (dim, values), in registers while it walks the chunks; of Titans memory
and momentum (`PARTS` is 2). Backward it keeps the state's gradient and walks from the last. What needs no order, the triangular solves before
and the products of each chunk's errors and states behind, stays with torch, all chunks at once. Everything is float32; no atomics, the same
bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gpu import precision, width
from foveal.kernels.testing.compile import CompileCase


@triton.jit
def load_matrix(base, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, stride, first):
    """(HEIGHT, WIDTH) from column `first` of a (ROWS, stride) matrix of which COLUMNS columns are there; zeros outside."""
    row, column = tl.arange(0, HEIGHT), first + tl.arange(0, WIDTH)
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_matrix(base, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, stride, first):
    row, column = tl.arange(0, HEIGHT), first + tl.arange(0, WIDTH)
    tl.store(base + row[:, None] * stride + column[None, :], tile, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def walk_forward_kernel(
    from_values, from_state, seen, query_in, key_out, kept, state, out, last, errors, entering, chunks,
    TOKENS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    STATE: tl.constexpr = PARTS * DIM
    tiles = (VALUES + BLOCK_V - 1) // BLOCK_V
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_V
    current = load_matrix(state + pair * (STATE * VALUES), DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
    if PARTS == 2:
        momentum = load_matrix(state + pair * (STATE * VALUES) + DIM * VALUES, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
    for chunk in range(chunks):
        place = pair * chunks + chunk
        store_matrix(entering + place * (STATE * VALUES), current, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
        reads = load_matrix(from_state + place * (TOKENS * STATE), TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
        error = load_matrix(from_values + place * (TOKENS * VALUES), TOKENS, VALUES, BLOCK_T, BLOCK_V, VALUES, first)
        error -= tl.dot(reads, current, input_precision=PRECISION)
        queries = load_matrix(query_in + place * (TOKENS * STATE), TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
        given = tl.dot(queries, current, input_precision=PRECISION)
        if PARTS == 2:
            store_matrix(entering + place * (STATE * VALUES) + DIM * VALUES, momentum, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
            reads = load_matrix(from_state + place * (TOKENS * STATE) + DIM, TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
            error -= tl.dot(reads, momentum, input_precision=PRECISION)
            queries = load_matrix(query_in + place * (TOKENS * STATE) + DIM, TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
            given = tl.dot(queries, momentum, given, input_precision=PRECISION)
        store_matrix(errors + place * (TOKENS * VALUES), error, TOKENS, VALUES, BLOCK_T, BLOCK_V, VALUES, first)
        weights = load_matrix(seen + place * (TOKENS * TOKENS), TOKENS, TOKENS, BLOCK_T, BLOCK_T, TOKENS, 0)
        given = tl.dot(weights, error, given, input_precision=PRECISION)
        store_matrix(out + place * (TOKENS * VALUES), given, TOKENS, VALUES, BLOCK_T, BLOCK_V, VALUES, first)
        keys = load_matrix(key_out + place * (TOKENS * STATE), TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
        keeps = kept + place * (PARTS * PARTS)
        following = current * tl.load(keeps)
        if PARTS == 2:
            following += momentum * tl.load(keeps + 1)
            momentum = current * tl.load(keeps + 2) + momentum * tl.load(keeps + 3)
            adds = load_matrix(key_out + place * (TOKENS * STATE) + DIM, TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
            momentum = tl.dot(tl.trans(adds), error, momentum, input_precision=PRECISION)
        current = tl.dot(tl.trans(keys), error, following, input_precision=PRECISION)
    store_matrix(last + pair * (STATE * VALUES), current, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
    if PARTS == 2:
        store_matrix(last + pair * (STATE * VALUES) + DIM * VALUES, momentum, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)


@triton.jit
def walk_backward_kernel(
    dout, dlast, from_state, seen, query_in, key_out, kept, derrors, dleaving, dstate, chunks,
    TOKENS: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    STATE: tl.constexpr = PARTS * DIM
    tiles = (VALUES + BLOCK_V - 1) // BLOCK_V
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_V
    current = load_matrix(dlast + pair * (STATE * VALUES), DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
    if PARTS == 2:
        momentum = load_matrix(dlast + pair * (STATE * VALUES) + DIM * VALUES, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
    for step in range(chunks):
        place = pair * chunks + (chunks - 1 - step)
        store_matrix(dleaving + place * (STATE * VALUES), current, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
        wanted = load_matrix(dout + place * (TOKENS * VALUES), TOKENS, VALUES, BLOCK_T, BLOCK_V, VALUES, first)
        weights = load_matrix(seen + place * (TOKENS * TOKENS), TOKENS, TOKENS, BLOCK_T, BLOCK_T, TOKENS, 0)
        keys = load_matrix(key_out + place * (TOKENS * STATE), TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
        error = tl.dot(tl.trans(weights), wanted, input_precision=PRECISION)
        error = tl.dot(keys, current, error, input_precision=PRECISION)
        if PARTS == 2:
            store_matrix(dleaving + place * (STATE * VALUES) + DIM * VALUES, momentum, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
            keys = load_matrix(key_out + place * (TOKENS * STATE) + DIM, TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
            error = tl.dot(keys, momentum, error, input_precision=PRECISION)
        store_matrix(derrors + place * (TOKENS * VALUES), error, TOKENS, VALUES, BLOCK_T, BLOCK_V, VALUES, first)
        keeps = kept + place * (PARTS * PARTS)
        before = current * tl.load(keeps)
        if PARTS == 2:
            before += momentum * tl.load(keeps + 2)
            momentum = current * tl.load(keeps + 1) + momentum * tl.load(keeps + 3)
            queries = load_matrix(query_in + place * (TOKENS * STATE) + DIM, TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
            reads = load_matrix(from_state + place * (TOKENS * STATE) + DIM, TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
            momentum = tl.dot(tl.trans(queries), wanted, momentum, input_precision=PRECISION)
            momentum -= tl.dot(tl.trans(reads), error, input_precision=PRECISION)
        queries = load_matrix(query_in + place * (TOKENS * STATE), TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
        reads = load_matrix(from_state + place * (TOKENS * STATE), TOKENS, DIM, BLOCK_T, BLOCK_D, STATE, 0)
        current = tl.dot(tl.trans(queries), wanted, before, input_precision=PRECISION)
        current -= tl.dot(tl.trans(reads), error, input_precision=PRECISION)
    store_matrix(dstate + pair * (STATE * VALUES), current, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)
    if PARTS == 2:
        store_matrix(dstate + pair * (STATE * VALUES) + DIM * VALUES, momentum, DIM, VALUES, BLOCK_D, BLOCK_V, VALUES, first)


def _blocks(tokens: int, dim: int, values: int, parts: int) -> dict[str, Any]:
    sizes = {"TOKENS": tokens, "DIM": dim, "VALUES": values, "PARTS": parts, "BLOCK_T": width(tokens)}
    sizes |= {"BLOCK_D": width(dim), "BLOCK_V": 16}
    return sizes


def _warps(tokens: int, dim: int) -> int:
    """Three TF32 products of the larger matrices do not fit into the registers of four warps."""
    return 4 if max(16, tokens) * dim <= 16 * 64 else 8


def _launch(kernel: Any, tokens: int, parts: int, state: Tensor, tensors: list[Tensor]) -> None:
    dim, values = state.shape[2] // parts, state.shape[3]
    blocks = _blocks(tokens, dim, values, parts)
    pairs = tensors[0].shape[0] * tensors[0].shape[1]
    grid = (pairs * triton.cdiv(values, blocks["BLOCK_V"]),)
    device = tensors[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: no device to switch to
        kernel[grid](*tensors, tensors[0].shape[2], **blocks, PRECISION=precision(), num_warps=_warps(tokens, dim), num_stages=1)


def walk_forward(
    from_values: Tensor, from_state: Tensor, seen: Tensor, query_in: Tensor, key_out: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(outputs, last state, errors, states entering the chunks), float32."""
    given = [t.contiguous() for t in (from_values, from_state, seen, query_in, key_out, kept, state)]
    out, last, errors = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (from_values, state, from_values))
    entering = out.new_empty(*from_values.shape[:3], *state.shape[2:])
    if out.numel() == 0:
        return out, last.copy_(state), errors, entering.zero_()
    _launch(walk_forward_kernel, from_values.shape[3], kept.shape[-1], state, [*given, out, last, errors, entering])
    return out, last, errors, entering


def walk_backward(
    dout: Tensor, dlast: Tensor, from_state: Tensor, seen: Tensor, query_in: Tensor, key_out: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the errors, of the states leaving the chunks and of the first state, float32."""
    given = [t.contiguous() for t in (dout, dlast, from_state, seen, query_in, key_out, kept)]
    derrors, dstate = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (dout, dlast))
    dleaving = derrors.new_empty(*dout.shape[:3], *dlast.shape[2:])
    if dout.numel() == 0:
        return derrors, dleaving.zero_(), dstate.copy_(dlast)
    _launch(walk_backward_kernel, dout.shape[3], kept.shape[-1], dlast, [*given, derrors, dleaving, dstate])
    return derrors, dleaving, dstate


# --- the compile check ---------------------------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """Both walks at the usual head dims and the largest chunk, with one state (the delta rule) and with two (Titans)."""
    cases = []
    for parts, prefix in ((1, ""), (2, "titans-")):
        for dim, tokens in ((64, 16), (128, 16))[: 3 - parts]:
            for arithmetic, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
                constants = {**_blocks(tokens, dim, dim, parts), "PRECISION": arithmetic}
                for name, kernel in (("forward", walk_forward_kernel), ("backward", walk_backward_kernel)):
                    signature = {argument: "i32" if argument == "chunks" else "*fp32" for argument in kernel.arg_names if argument not in constants}
                    options: dict[str, Any] = {"num_warps": _warps(tokens, dim), "num_stages": 1, "targets": targets}
                    quick = (dim, tokens) == (64, 16) and name == "forward"
                    cases.append(CompileCase(f"{prefix}{name}-d{dim}-t{tokens}-{arithmetic}", kernel, signature, constants, quick=quick, **options))
    return cases
