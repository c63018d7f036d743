"""Local linear attention as Triton kernels: a program owns a tile of queries and solves their regressions without forming a matrix.

As flash attention does, `forward_kernel` walks the keys with a running softmax; then each step of conjugate gradients is one more walk, in
which the weights come again from the log-sum-exp and every query's product with its matrix is two matrix products of the tile. A query that
has converged is frozen, and a tile stops when all of its queries have. The backward pass is implicit: `adjoint_kernel` solves once more with
the same matrices and gives dq, `key_gradients_kernel` owns a tile of keys and walks the queries. Inside all is float32, by three TF32
products where the matrix units have no float32, whatever torch is told: conjugate gradients feed on the difference of nearly equal numbers. No
atomics, the same bits every time.
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
def store_rows(base, tile, first, length, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row, column = first + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < length)[:, None] & (column < DIM)[None, :]
    tl.store(base + row[:, None] * DIM + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def dots(a, b):
    """Row by row."""
    return tl.sum(a * b, 1)


@triton.jit
def weights_of(q, keys_tile, sums, row, start, queries, keys, scale, CAUSAL: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax weights of a tile from the queries' log-sum-exp, which is +inf for a query that sees no key."""
    key = start + tl.arange(0, KEYS)
    seen = (row < queries)[:, None] & (key < keys)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= row[:, None] + keys - queries)
    logits = tl.dot(q, tl.trans(keys_tile), input_precision=PRECISION) * scale
    return tl.exp(tl.where(seen, logits, float("-inf")) - sums[:, None])


@triton.jit
def softmax_and_mean(
    q, k, row, end, queries, keys, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the logits, +inf where no key is seen, and the mean offset of the keys from the query, 0 there."""
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        keys_tile = load_rows(k, start, keys, DIM, KEYS, WIDTH)
        seen = (row < queries)[:, None] & (key < keys)[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= row[:, None] + keys - queries)
        logits = tl.where(seen, tl.dot(q, tl.trans(keys_tile), input_precision=PRECISION) * scale, float("-inf"))
        higher = tl.maximum(largest, tl.max(logits, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(logits - anchor[:, None])
        shrink = tl.exp(largest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        mean = tl.dot(weights, keys_tile, mean * shrink[:, None], input_precision=PRECISION)
        largest = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    mean = tl.where(empty[:, None], 0.0, mean / total[:, None] - q)
    return tl.where(empty, float("inf"), largest + tl.log(total)), mean


@triton.jit
def solve(
    right, q, k, sums, ridge, row, end, queries, keys, scale, iterations, tolerance,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Conjugate gradients for every query of the tile, until the residual is `tolerance` times the right side or `iterations` are over."""
    x = tl.zeros([QUERIES, WIDTH], tl.float32)
    residual = right
    direction = right
    norm = dots(right, right)
    enough = norm * tolerance * tolerance
    live = norm > enough
    turn = 0
    awake = tl.max(live.to(tl.int32), 0)
    while (turn < iterations) & (awake > 0):
        away = dots(direction, q)
        weighed = tl.zeros([QUERIES], tl.float32)
        product = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(0, end, KEYS):
            keys_tile = load_rows(k, start, keys, DIM, KEYS, WIDTH)
            weights = weights_of(q, keys_tile, sums, row, start, queries, keys, scale, CAUSAL, KEYS, PRECISION)
            weights *= tl.dot(direction, tl.trans(keys_tile), input_precision=PRECISION) - away[:, None]
            weighed += tl.sum(weights, 1)
            product = tl.dot(weights, keys_tile, product, input_precision=PRECISION)
        product += ridge * direction - weighed[:, None] * q
        curvature = dots(direction, product)
        live = live & (curvature > 0)
        step = tl.where(live, norm / tl.where(live, curvature, 1.0), 0.0)
        x += step[:, None] * direction
        residual -= step[:, None] * product
        after = dots(residual, residual)
        live = live & (after > enough)
        turned = residual + (after / tl.where(live, norm, 1.0))[:, None] * direction
        direction = tl.where(live[:, None], turned, direction)
        norm = tl.where(live, after, norm)
        awake = tl.max(live.to(tl.int32), 0)
        turn += 1
    return x


@triton.jit
def last_key(first, queries, keys, CAUSAL: tl.constexpr, QUERIES: tl.constexpr):
    """How many keys some query of the tile sees."""
    end = keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, first + QUERIES + keys - queries), 0)
    return end


@triton.jit
def forward_kernel(
    q, k, v, ridge, out, slopes, heads, queries, keys, scale, iterations, tolerance,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and slopes of a tile of queries of one head."""
    tiles = tl.cdiv(queries, QUERIES)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * QUERIES
    row = first + tl.arange(0, QUERIES)
    end = last_key(first, queries, keys, CAUSAL, QUERIES)
    k += pair * keys * DIM
    v += pair * keys * VALUES
    tile = load_rows(q + pair * queries * DIM, first, queries, DIM, QUERIES, WIDTH)
    strength = tl.load(ridge + pair % heads)
    sums, mean = softmax_and_mean(tile, k, row, end, queries, keys, scale, CAUSAL, DIM, WIDTH, QUERIES, KEYS, PRECISION)
    slope = solve(mean, tile, k, sums, strength, row, end, queries, keys, scale, iterations, tolerance, CAUSAL, DIM, WIDTH, QUERIES, KEYS, PRECISION)
    away = dots(slope, tile)
    gathered = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    for start in range(0, end, KEYS):
        keys_tile = load_rows(k, start, keys, DIM, KEYS, WIDTH)
        weights = weights_of(tile, keys_tile, sums, row, start, queries, keys, scale, CAUSAL, KEYS, PRECISION)
        weights *= 1.0 - (tl.dot(slope, tl.trans(keys_tile), input_precision=PRECISION) - away[:, None])
        gathered = tl.dot(weights, load_rows(v, start, keys, VALUES, KEYS, VALUE_WIDTH), gathered, input_precision=PRECISION)
    gathered /= (1.0 - dots(mean, slope))[:, None]
    store_rows(out + pair * queries * VALUES, gathered, first, queries, VALUES, QUERIES, VALUE_WIDTH)
    store_rows(slopes + pair * queries * DIM, slope, first, queries, DIM, QUERIES, WIDTH)


@triton.jit
def adjoint_kernel(
    q, k, v, ridge, slopes, dout, dq, adjoints, rows, heads, queries, keys, scale, iterations, tolerance,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoints and gradients of a tile of queries; in `rows`, (4, pairs, queries), what the keys' gradients take by query.

    Those are the log-sum-exp, the fit's denominator, the sum of the corrected weights times their gradients, and the sum that the softmax's
    gradient subtracts. With t the gradient of the corrected weight: t = (dout . v - sum corrected (dout . v)) / denominator.
    """
    tiles = tl.cdiv(queries, QUERIES)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * QUERIES
    row = first + tl.arange(0, QUERIES)
    end = last_key(first, queries, keys, CAUSAL, QUERIES)
    k += pair * keys * DIM
    v += pair * keys * VALUES
    tile = load_rows(q + pair * queries * DIM, first, queries, DIM, QUERIES, WIDTH)
    slope = load_rows(slopes + pair * queries * DIM, first, queries, DIM, QUERIES, WIDTH)
    strength = tl.load(ridge + pair % heads)
    sums, mean = softmax_and_mean(tile, k, row, end, queries, keys, scale, CAUSAL, DIM, WIDTH, QUERIES, KEYS, PRECISION)
    total = 1.0 - dots(mean, slope)
    away = dots(slope, tile)
    wanted = load_rows(dout + pair * queries * VALUES, first, queries, VALUES, QUERIES, VALUE_WIDTH)
    right = tl.zeros([QUERIES, WIDTH], tl.float32)
    weighed = tl.zeros([QUERIES], tl.float32)
    corrected = tl.zeros([QUERIES], tl.float32)
    for start in range(0, end, KEYS):
        keys_tile = load_rows(k, start, keys, DIM, KEYS, WIDTH)
        weights = weights_of(tile, keys_tile, sums, row, start, queries, keys, scale, CAUSAL, KEYS, PRECISION)
        values = load_rows(v, start, keys, VALUES, KEYS, VALUE_WIDTH)
        weights *= tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
        kept = 1.0 - (tl.dot(slope, tl.trans(keys_tile), input_precision=PRECISION) - away[:, None])
        corrected += tl.sum(weights * kept, 1)
        weighed += tl.sum(weights, 1)
        right = tl.dot(weights, keys_tile, right, input_precision=PRECISION)
    corrected /= total
    right = (corrected[:, None] * mean - (right - weighed[:, None] * tile)) / total[:, None]
    adjoint = solve(
        right, tile, k, sums, strength, row, end, queries, keys, scale, iterations, tolerance, CAUSAL, DIM, WIDTH, QUERIES, KEYS, PRECISION
    )
    store_rows(adjoints + pair * queries * DIM, adjoint, first, queries, DIM, QUERIES, WIDTH)
    aside = dots(adjoint, tile)
    through_slope = tl.zeros([QUERIES], tl.float32)
    through_adjoint = tl.zeros([QUERIES], tl.float32)
    taken = tl.zeros([QUERIES], tl.float32)
    through_logits = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, end, KEYS):
        keys_tile = load_rows(k, start, keys, DIM, KEYS, WIDTH)
        weights = weights_of(tile, keys_tile, sums, row, start, queries, keys, scale, CAUSAL, KEYS, PRECISION)
        values = load_rows(v, start, keys, VALUES, KEYS, VALUE_WIDTH)
        both = (tl.dot(wanted, tl.trans(values), input_precision=PRECISION) - corrected[:, None]) / total[:, None]
        both += tl.dot(adjoint, tl.trans(keys_tile), input_precision=PRECISION) - aside[:, None]
        kept = 1.0 - (tl.dot(slope, tl.trans(keys_tile), input_precision=PRECISION) - away[:, None])
        through_slope += tl.sum(weights * both, 1)
        through_adjoint += tl.sum(weights * kept, 1)
        weights *= both * kept
        taken += tl.sum(weights, 1)
        through_logits = tl.dot(weights, keys_tile, through_logits, input_precision=PRECISION)
    alive = tl.where(sums == float("inf"), 0.0, 1.0)
    through_logits -= taken[:, None] * (mean + alive[:, None] * tile)
    gradient = through_slope[:, None] * slope - through_adjoint[:, None] * adjoint + scale * through_logits
    store_rows(dq + pair * queries * DIM, gradient, first, queries, DIM, QUERIES, WIDTH)
    inside = row < queries
    plane = tl.num_programs(0).to(tl.int64) // tiles * queries
    rows += pair * queries + row
    tl.store(rows, sums, mask=inside)
    tl.store(rows + plane, total, mask=inside)
    tl.store(rows + 2 * plane, corrected, mask=inside)
    tl.store(rows + 3 * plane, taken, mask=inside)


@triton.jit
def key_gradients_kernel(
    q, k, v, slopes, adjoints, rows, dout, dk, dv, queries, keys, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values of one head, from what `adjoint_kernel` found for every query."""
    tiles = tl.cdiv(keys, KEYS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * KEYS
    keys_tile = load_rows(k + pair * keys * DIM, first, keys, DIM, KEYS, WIDTH)
    values = load_rows(v + pair * keys * VALUES, first, keys, VALUES, KEYS, VALUE_WIDTH)
    key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    value_sum = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    plane = tl.num_programs(0).to(tl.int64) // tiles * queries
    begin = tl.full([], 0, tl.int32)
    if CAUSAL:
        begin = tl.maximum(first + queries - keys, 0) // QUERIES * QUERIES
    for start in range(begin, queries, QUERIES):
        row = start + tl.arange(0, QUERIES)
        inside = row < queries
        place = rows + pair * queries + row
        sums = tl.load(place, mask=inside, other=float("inf"))
        total = tl.load(place + plane, mask=inside, other=1.0)
        corrected = tl.load(place + 2 * plane, mask=inside, other=0.0)
        taken = tl.load(place + 3 * plane, mask=inside, other=0.0)
        tile = load_rows(q + pair * queries * DIM, start, queries, DIM, QUERIES, WIDTH)
        slope = load_rows(slopes + pair * queries * DIM, start, queries, DIM, QUERIES, WIDTH)
        adjoint = load_rows(adjoints + pair * queries * DIM, start, queries, DIM, QUERIES, WIDTH)
        wanted = load_rows(dout + pair * queries * VALUES, start, queries, VALUES, QUERIES, VALUE_WIDTH)
        weights = weights_of(tile, keys_tile, sums, row, first, queries, keys, scale, CAUSAL, KEYS, PRECISION)
        kept = 1.0 - (tl.dot(slope, tl.trans(keys_tile), input_precision=PRECISION) - dots(slope, tile)[:, None])
        both = (tl.dot(wanted, tl.trans(values), input_precision=PRECISION) - corrected[:, None]) / total[:, None]
        both += tl.dot(adjoint, tl.trans(keys_tile), input_precision=PRECISION) - dots(adjoint, tile)[:, None]
        value_sum = tl.dot(tl.trans(weights * kept / total[:, None]), wanted, value_sum, input_precision=PRECISION)
        key_sum = tl.dot(tl.trans(weights * kept), adjoint, key_sum, input_precision=PRECISION)
        key_sum -= tl.dot(tl.trans(weights * both), slope, input_precision=PRECISION)
        dlogits = weights * (both * kept - taken[:, None]) * scale
        key_sum = tl.dot(tl.trans(dlogits), tile, key_sum, input_precision=PRECISION)
    store_rows(dk + pair * keys * DIM, key_sum, first, keys, DIM, KEYS, WIDTH)
    store_rows(dv + pair * keys * VALUES, value_sum, first, keys, VALUES, KEYS, VALUE_WIDTH)


#: Largest head and value dimension; wider tiles do not stay in registers.
LARGEST = 64
#: Queries and keys of a tile: three to five (query, dim) tiles stand in registers beside the parts of three TF32 products.
_TILING = {"QUERIES": 16, "KEYS": 32, "num_warps": 4, "num_stages": 1}


def _constants(dim: int, value_dim: int, precision: str, causal: bool) -> dict[str, Any]:
    sizes = {"DIM": dim, "VALUES": value_dim, "WIDTH": width(dim), "VALUE_WIDTH": width(value_dim)}
    return {"CAUSAL": causal, **sizes, "PRECISION": precision}


def _launch(kernel: Any, length: int, block: str, pairs: int, dim: int, value_dim: int, causal: bool, device: torch.device, *arguments: Any) -> None:
    constants = _constants(dim, value_dim, precision(close=True), causal)
    programs = pairs * triton.cdiv(length, _TILING[block])
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: no device to switch to
        kernel[(programs,)](*arguments, **constants, **_TILING)


def forward(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, causal: bool, scale: float, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """(output in v's dtype, slopes (batch, heads, query, dim) in float32, which the backward pass needs)."""
    q, k, v, ridge = q.contiguous(), k.contiguous(), v.contiguous(), ridge.float().contiguous()
    batch, heads, queries, dim = q.shape
    out = v.new_empty(batch, heads, queries, v.shape[3], dtype=written(v.dtype))
    slopes = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if slopes.numel() == 0 and out.numel() == 0:
        return out.to(v.dtype), slopes
    arguments = (q, k, v, ridge, out, slopes, heads, queries, k.shape[2], scale, iterations, tolerance)
    _launch(forward_kernel, queries, "QUERIES", batch * heads, dim, v.shape[3], causal, q.device, *arguments)
    return out.to(v.dtype), slopes


def backward(
    dout: Tensor,
    slopes: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    causal: bool,
    scale: float,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and ridge."""
    q, k, v, dout, slopes = (t.contiguous() for t in (q, k, v, dout, slopes))
    strength = ridge.float().contiguous()
    batch, heads, queries, dim = q.shape
    keys, value_dim = v.shape[2:]
    dq, dk, dv = (torch.empty_like(t, dtype=written(t.dtype)) for t in (q, k, v))
    if 0 in (batch, heads, queries, keys):
        return dq.zero_(), dk.zero_(), dv.zero_(), torch.zeros_like(strength)
    pairs = batch * heads
    adjoints = torch.empty_like(slopes)
    rows = torch.empty(4, pairs, queries, dtype=torch.float32, device=q.device)
    shared = (pairs, dim, value_dim, causal, q.device)
    solved = (heads, queries, keys, scale, iterations, tolerance)
    _launch(adjoint_kernel, queries, "QUERIES", *shared, q, k, v, strength, slopes, dout, dq, adjoints, rows, *solved)
    _launch(key_gradients_kernel, keys, "KEYS", *shared, q, k, v, slopes, adjoints, rows, dout, dk, dv, queries, keys, scale)
    return dq, dk, dv, -(adjoints * slopes).sum((0, 2, 3))


# --- the compile check ---------------------------------------------------------------------------------------------------------------


def compile_cases() -> list[CompileCase]:
    """The widest heads, causal, which adds to the code of the other."""
    cases = []
    types = dict.fromkeys(("ridge", "slopes", "adjoints", "rows"), "*fp32") | dict.fromkeys(("scale", "tolerance"), "fp32")
    types |= dict.fromkeys(("heads", "queries", "keys", "iterations"), "i32")
    for products, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
        for kernel in (forward_kernel, adjoint_kernel, key_gradients_kernel):
            tiling = dict(_TILING)
            options: dict[str, Any] = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
            constants = {**_constants(LARGEST, LARGEST, products, True), **tiling}
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
            name = f"{kernel.__name__.removesuffix('_kernel').replace('_', '-')}-d{LARGEST}-fp32-{products}"
            cases.append(CompileCase(name, kernel, signature, constants, targets=targets, quick=kernel is forward_kernel, **options))
    return cases
