"""Neighbourhood attention as Triton kernels: tiles of neighbouring tokens, each with the box of tokens it meets. No atomics.

A program owns a tile of 1, 2 or 3 axes (of one interleaved axis each, where dilated) and walks over the box of tokens that its own can meet,
numbered row by row, so that no axis is padded: forward and for the queries' gradient the keys from the first window's start to the last
window's end, for the keys' gradient the queries whose windows reach the tile. Whether a pair is inside a window is tested token by token.

The table's gradient: `query_gradients` writes the gradient of each logit in the place that its key has in the query's window, (batch, heads,
token, window) in float32, a few batches at a time; the shift from places to offsets is a product with a 0/1 matrix for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.gathered import (
    LOG2E,
    absorb,
    candidates,
    compile_case,
    constants,
    finish,
    launch,
    load_rows,
    load_sums,
    row_sums,
    store_rows,
    tiling,
)
from foveal.kernels.gpu import width
from foveal.kernels.neighborhood.reference import window
from foveal.kernels.testing.compile import CompileCase
from foveal.kernels.tune import Tunable

#: Most bytes of the array from which the table's gradient is gathered.
SCRATCH = 2**28


@triton.jit
def window_start(position, length, kernel, stride, CAUSAL: tl.constexpr):
    """First key that a query sees."""
    group = position // stride * stride
    if CAUSAL:
        start = tl.maximum(tl.minimum(group + stride, length) - kernel, 0)
    else:
        start = tl.minimum(tl.maximum(group + stride // 2 - kernel // 2, 0), length - kernel)
    return start


@triton.jit
def window_end(position, start, kernel, CAUSAL: tl.constexpr):
    """One past the last key that a query sees."""
    if CAUSAL:
        end = position + 1
    else:
        end = start + kernel
    return end


@triton.jit
def key_box(first, count, length, kernel, stride, CAUSAL: tl.constexpr):
    """First key that queries first .. first + count see, and how many from there on."""
    last = tl.minimum(first + count, length) - 1
    low = window_start(first, length, kernel, stride, CAUSAL)
    high = window_end(last, window_start(last, length, kernel, stride, CAUSAL), kernel, CAUSAL)
    return low, tl.where(first < length, high - low, 0)


@triton.jit
def query_box(first, count, length, kernel, stride, CAUSAL: tl.constexpr):
    """First query that sees one of the keys first .. first + count, and how many from there on."""
    last = tl.minimum(first + count, length) - 1
    if CAUSAL:
        low = first + 0
        reached = last + kernel - stride
        all_after = last + kernel >= length
    else:
        shift = kernel // 2 - stride // 2
        lowest = first - kernel + 1
        low = tl.where(lowest <= 0, 0, (lowest + shift + stride - 1) // stride * stride)
        reached = last + shift
        all_after = last >= length - kernel
    high = tl.where(all_after, length, tl.minimum((reached // stride + 1) * stride, length))
    return low, tl.where(first < length, tl.maximum(high - low, 0), 0)


@triton.jit
def own_axis(place, length, dilation, TILE: tl.constexpr):
    """Of the tile number `place` of an axis: its interleaved axis, that one's length, and the tile's first position on it."""
    tiles = tl.cdiv(tl.cdiv(length, dilation), TILE)
    member = place // tiles
    return member, (length - member + dilation - 1) // dilation, place % tiles * TILE


@triton.jit
def own_tile(
    x, y, z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, TILE_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_Z: tl.constexpr
):
    """Of a program's tile: its (batch, head) plane, and for each axis the interleaved axis, that one's length and the first position on it."""
    tiles = tiles_x * tiles_y * tiles_z
    place = tl.program_id(0) % tiles
    member_x, length_x, first_x = own_axis(place // (tiles_y * tiles_z), x, dilation_x, TILE_X)
    member_y, length_y, first_y = own_axis(place // tiles_z % tiles_y, y, dilation_y, TILE_Y)
    member_z, length_z, first_z = own_axis(place % tiles_z, z, dilation_z, TILE_Z)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    return plane, member_x, length_x, first_x, member_y, length_y, first_y, member_z, length_z, first_z


@triton.jit
def along(first_x, first_y, first_z, start, size_x, size_y, size_z, COUNT: tl.constexpr):
    """Positions on three axes of the tokens start .. start + COUNT of a box, and whether they are in it."""
    number = start + tl.arange(0, COUNT)
    deep = tl.maximum(size_z, 1)
    flat = tl.maximum(size_y, 1) * deep
    return first_x + number // flat, first_y + number % flat // deep, first_z + number % deep, number < size_x * size_y * size_z


@triton.jit
def inside(
    qx, qy, qz, kx, ky, kz, x, y, z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z,
    CAUSAL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_Z: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Whether the keys are in the queries' windows; queries and keys broadcast against each other in either order."""
    start = window_start(qz, z, kernel_z, stride_z, CAUSAL_Z)
    seen = (kz >= start) & (kz < window_end(qz, start, kernel_z, CAUSAL_Z))
    if AXES > 1:
        start = window_start(qy, y, kernel_y, stride_y, CAUSAL_Y)
        seen = seen & (ky >= start) & (ky < window_end(qy, start, kernel_y, CAUSAL_Y))
    if AXES > 2:
        start = window_start(qx, x, kernel_x, stride_x, CAUSAL_X)
        seen = seen & (kx >= start) & (kx < window_end(qx, start, kernel_x, CAUSAL_X))
    return seen


@triton.jit
def with_table(logits, table, qx, qy, qz, kx, ky, kz, kernel_x, kernel_y, kernel_z, seen):
    """Logits in base 2 with the bias of each pair's offset."""
    entry = (kx - qx + kernel_x - 1) * (2 * kernel_y - 1) + ky - qy + kernel_y - 1
    entry = entry * (2 * kernel_z - 1) + kz - qz + kernel_z - 1
    return logits + tl.load(table + entry, mask=seen, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def in_window(
    logits, table, qx, qy, qz, kx, ky, kz, there, x, y, z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z,
    HAS_TABLE: tl.constexpr, CAUSAL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_Z: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 with the bias of each pair's offset, -inf outside the windows; and which pairs of those that are there are inside."""
    seen = there & inside(
        qx, qy, qz, kx, ky, kz, x, y, z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, CAUSAL_X, CAUSAL_Y, CAUSAL_Z, AXES
    )
    if HAS_TABLE:
        logits = with_table(logits, table, qx, qy, qz, kx, ky, kz, kernel_x, kernel_y, kernel_z, seen)
    return tl.where(seen, logits, float("-inf")), seen


@triton.jit
def forward_kernel(
    q, k, v, table, out, lse,
    heads, x, y, z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, scale,
    HAS_TABLE: tl.constexpr, CAUSAL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_Z: tl.constexpr, AXES: tl.constexpr,
    TILE_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_Z: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries."""
    plane, member_x, length_x, first_x, member_y, length_y, first_y, member_z, length_z, first_z = own_tile(
        x, y, z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, TILE_X, TILE_Y, TILE_Z
    )
    base = plane * x * y * z
    if HAS_TABLE:
        table += plane % heads * ((2 * kernel_x - 1) * (2 * kernel_y - 1) * (2 * kernel_z - 1))
    qx, qy, qz, there = along(first_x, first_y, first_z, 0, TILE_X, TILE_Y, TILE_Z, QUERIES)
    there = there & (qx < length_x) & (qy < length_y) & (qz < length_z)
    row = ((member_x + dilation_x * qx) * y + member_y + dilation_y * qy) * z + member_z + dilation_z * qz
    queries = load_rows(q + base * DIM, row, there, DIM, DIM, WIDTH, UPCAST)
    low_x, size_x = key_box(first_x, TILE_X, length_x, kernel_x, stride_x, CAUSAL_X)
    low_y, size_y = key_box(first_y, TILE_Y, length_y, kernel_y, stride_y, CAUSAL_Y)
    low_z, size_z = key_box(first_z, TILE_Z, length_z, kernel_z, stride_z, CAUSAL_Z)
    accumulated = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(0, size_x * size_y * size_z, KEYS):
        kx, ky, kz, present = along(low_x, low_y, low_z, start, size_x, size_y, size_z, KEYS)
        key = ((member_x + dilation_x * kx) * y + member_y + dilation_y * ky) * z + member_z + dilation_z * kz
        keys = load_rows(k + base * DIM, key, present, DIM, DIM, WIDTH, UPCAST)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        logits, _seen = in_window(
            logits, table, qx[:, None], qy[:, None], qz[:, None], kx[None, :], ky[None, :], kz[None, :], there[:, None] & present[None, :],
            length_x, length_y, length_z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, HAS_TABLE, CAUSAL_X, CAUSAL_Y, CAUSAL_Z, AXES,
        )  # fmt: skip
        values = load_rows(v + base * VALUE_DIM, key, present, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
        accumulated, largest, total = absorb(accumulated, largest, total, logits, values, DOT, PRECISION)
    found, sums = finish(accumulated, largest, total)
    store_rows(out + base * VALUE_DIM, found, row, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH)
    tl.store(lse + base + row, sums, mask=there)


@triton.jit
def key_gradients_kernel(
    q, k, v, table, dout, lse, delta, dk, dv,
    heads, x, y, z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, scale,
    HAS_TABLE: tl.constexpr, CAUSAL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_Z: tl.constexpr, AXES: tl.constexpr,
    TILE_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_Z: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over the queries that see them. Logits stand transposed, (key, query)."""
    plane, member_x, length_x, first_x, member_y, length_y, first_y, member_z, length_z, first_z = own_tile(
        x, y, z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, TILE_X, TILE_Y, TILE_Z
    )
    base = plane * x * y * z
    if HAS_TABLE:
        table += plane % heads * ((2 * kernel_x - 1) * (2 * kernel_y - 1) * (2 * kernel_z - 1))
    kx, ky, kz, there = along(first_x, first_y, first_z, 0, TILE_X, TILE_Y, TILE_Z, KEYS)
    there = there & (kx < length_x) & (ky < length_y) & (kz < length_z)
    key = ((member_x + dilation_x * kx) * y + member_y + dilation_y * ky) * z + member_z + dilation_z * kz
    keys = load_rows(k + base * DIM, key, there, DIM, DIM, WIDTH, UPCAST)
    values = load_rows(v + base * VALUE_DIM, key, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
    low_x, size_x = query_box(first_x, TILE_X, length_x, kernel_x, stride_x, CAUSAL_X)
    low_y, size_y = query_box(first_y, TILE_Y, length_y, kernel_y, stride_y, CAUSAL_Y)
    low_z, size_z = query_box(first_z, TILE_Z, length_z, kernel_z, stride_z, CAUSAL_Z)
    key_sum = tl.zeros([KEYS, WIDTH], tl.float32)
    value_sum = tl.zeros([KEYS, VALUE_WIDTH], tl.float32)
    for start in range(0, size_x * size_y * size_z, QUERIES):
        qx, qy, qz, present = along(low_x, low_y, low_z, start, size_x, size_y, size_z, QUERIES)
        row = ((member_x + dilation_x * qx) * y + member_y + dilation_y * qy) * z + member_z + dilation_z * qz
        queries = load_rows(q + base * DIM, row, present, DIM, DIM, WIDTH, UPCAST)
        gradient = load_rows(dout + base * VALUE_DIM, row, present, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
        sums, taken = load_sums(lse + base, delta + base, row, present)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
        logits, _seen = in_window(
            logits, table, qx[None, :], qy[None, :], qz[None, :], kx[:, None], ky[:, None], kz[:, None], there[:, None] & present[None, :],
            length_x, length_y, length_z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, HAS_TABLE, CAUSAL_X, CAUSAL_Y, CAUSAL_Z, AXES,
        )  # fmt: skip
        weights = tl.exp2(logits - sums[None, :])
        value_sum = tl.dot(weights.to(DOT), gradient, value_sum, input_precision=PRECISION)
        dweights = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
        dlogits = weights * (dweights - taken[None, :])
        key_sum = tl.dot(dlogits.to(DOT), queries, key_sum, input_precision=PRECISION)
    store_rows(dk + base * DIM, key_sum * scale, key, there, DIM, DIM, WIDTH)
    store_rows(dv + base * VALUE_DIM, value_sum, key, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH)


@triton.jit
def query_gradients_kernel(
    q, k, v, table, dout, lse, delta, dq, scratch,
    heads, x, y, z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, scale,
    HAS_TABLE: tl.constexpr, WRITE_LOGITS: tl.constexpr,
    CAUSAL_X: tl.constexpr, CAUSAL_Y: tl.constexpr, CAUSAL_Z: tl.constexpr, AXES: tl.constexpr,
    TILE_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_Z: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; with WRITE_LOGITS also that of every logit, at its key's place in the query's window."""
    plane, member_x, length_x, first_x, member_y, length_y, first_y, member_z, length_z, first_z = own_tile(
        x, y, z, dilation_x, dilation_y, dilation_z, tiles_x, tiles_y, tiles_z, TILE_X, TILE_Y, TILE_Z
    )
    base = plane * x * y * z
    if HAS_TABLE:
        table += plane % heads * ((2 * kernel_x - 1) * (2 * kernel_y - 1) * (2 * kernel_z - 1))
    qx, qy, qz, there = along(first_x, first_y, first_z, 0, TILE_X, TILE_Y, TILE_Z, QUERIES)
    there = there & (qx < length_x) & (qy < length_y) & (qz < length_z)
    row = ((member_x + dilation_x * qx) * y + member_y + dilation_y * qy) * z + member_z + dilation_z * qz
    queries = load_rows(q + base * DIM, row, there, DIM, DIM, WIDTH, UPCAST)
    gradient = load_rows(dout + base * VALUE_DIM, row, there, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
    sums, taken = load_sums(lse + base, delta + base, row, there)
    low_x, size_x = key_box(first_x, TILE_X, length_x, kernel_x, stride_x, CAUSAL_X)
    low_y, size_y = key_box(first_y, TILE_Y, length_y, kernel_y, stride_y, CAUSAL_Y)
    low_z, size_z = key_box(first_z, TILE_Z, length_z, kernel_z, stride_z, CAUSAL_Z)
    query_sum = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, size_x * size_y * size_z, KEYS):
        kx, ky, kz, present = along(low_x, low_y, low_z, start, size_x, size_y, size_z, KEYS)
        key = ((member_x + dilation_x * kx) * y + member_y + dilation_y * ky) * z + member_z + dilation_z * kz
        keys = load_rows(k + base * DIM, key, present, DIM, DIM, WIDTH, UPCAST)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        logits, seen = in_window(
            logits, table, qx[:, None], qy[:, None], qz[:, None], kx[None, :], ky[None, :], kz[None, :], there[:, None] & present[None, :],
            length_x, length_y, length_z, kernel_x, kernel_y, kernel_z, stride_x, stride_y, stride_z, HAS_TABLE, CAUSAL_X, CAUSAL_Y, CAUSAL_Z, AXES,
        )  # fmt: skip
        weights = tl.exp2(logits - sums[:, None])
        values = load_rows(v + base * VALUE_DIM, key, present, VALUE_DIM, VALUE_DIM, VALUE_WIDTH, UPCAST)
        dlogits = weights * (tl.dot(gradient, tl.trans(values), input_precision=PRECISION) - taken[:, None])
        if WRITE_LOGITS:
            at = kx[None, :] - window_start(qx, length_x, kernel_x, stride_x, CAUSAL_X)[:, None]
            at = at * kernel_y + ky[None, :] - window_start(qy, length_y, kernel_y, stride_y, CAUSAL_Y)[:, None]
            at = at * kernel_z + kz[None, :] - window_start(qz, length_z, kernel_z, stride_z, CAUSAL_Z)[:, None]
            tl.store(scratch + (base + row)[:, None] * (kernel_x * kernel_y * kernel_z) + at, dlogits, mask=seen)
        query_sum = tl.dot(dlogits.to(DOT), keys, query_sum, input_precision=PRECISION)
    store_rows(dq + base * DIM, query_sum * scale, row, there, DIM, DIM, WIDTH)


# --- launching -----------------------------------------------------------------------------------------------------------------------


def tile_shape(count: int, shape: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int]:
    """`count` tokens (a power of two) as a box that is about a cube, no longer along an axis than that needs while another has room."""
    needed = [triton.next_power_of_2(-(-length // spread)) for length, spread in zip(shape, dilation, strict=True)]
    box = [1, 1, 1]
    while box[0] * box[1] * box[2] < count:
        open_axes = [axis for axis in (2, 1, 0) if box[axis] < needed[axis]] or [2]
        box[min(open_axes, key=lambda axis: box[axis])] *= 2
    return box[0], box[1], box[2]


class _Call:
    """What the launches of one call share, by argument name."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
        causal: Sequence[bool], scale: float,
    ) -> None:  # fmt: skip
        self.q, self.value_dim = q, v.shape[-1]
        self.shape, self.dilation = q.shape[2:5], dilation
        self.axes = 3 if kernel[0] > 1 or self.shape[0] > 1 else 2 if kernel[1] > 1 or self.shape[1] > 1 else 1
        self.arguments: dict[str, Any] = {
            "q": q.contiguous(),
            "k": k.contiguous(),
            "v": v.contiguous(),
            "table": None if rpb is None else rpb.contiguous(),
            "heads": q.shape[1],
            "scale": scale,
            "HAS_TABLE": rpb is not None,
            "AXES": self.axes,
            **constants(q, self.value_dim),
        }
        for name, values in (("", self.shape), ("kernel_", kernel), ("stride_", stride), ("dilation_", dilation), ("CAUSAL_", causal)):
            names = ("X", "Y", "Z") if name == "CAUSAL_" else ("x", "y", "z")
            self.arguments.update({name + axis: value for axis, value in zip(names, values, strict=True)})

    def run(self, name: str, kernel: Any, batches: int, **own: Any) -> None:
        """Launch for `batches` batches; the tile is one of keys for their gradients, else of queries."""
        tiles = tiling("neighborhood", name, self.q, self.value_dim, crowded=self.arguments["HAS_TABLE"])
        box = tile_shape(tiles.keys if name == "key_gradients" else tiles.queries, self.shape, self.dilation)
        counts = [
            spread * triton.cdiv(triton.cdiv(length, spread), side) for length, spread, side in zip(self.shape, self.dilation, box, strict=True)
        ]
        sizes = {f"TILE_{axis}": side for axis, side in zip("XYZ", box, strict=True)} | {
            f"tiles_{axis}": n for axis, n in zip("xyz", counts, strict=True)
        }
        programs = batches * self.q.shape[1] * counts[0] * counts[1] * counts[2]
        launch(kernel, programs, tiles, {**self.arguments, **sizes, "QUERIES": tiles.queries, "KEYS": tiles.keys, **own})


def forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    causal: Sequence[bool], scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `lse`; shapes as in `foveal.kernels.neighborhood.cpu.forward`."""
    if q.numel():
        _Call(q, k, v, rpb, kernel, stride, dilation, causal, scale).run("forward", forward_kernel, q.shape[0], out=out, lse=lse)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, out: Tensor, lse: Tensor, kernel: Sequence[int],
    stride: Sequence[int], dilation: Sequence[int], causal: Sequence[bool], scale: float, dq: Tensor, dk: Tensor, dv: Tensor, drpb: Tensor | None,
) -> None:  # fmt: skip
    """Fill `dq`, `dk`, `dv` and, where it is asked for, `drpb`; shapes as in `foveal.kernels.neighborhood.cpu.backward`."""
    if drpb is not None:
        drpb.zero_()
    if q.numel() == 0:
        return
    call = _Call(q, k, v, rpb, kernel, stride, dilation, causal, scale)
    shared = {"dout": dout.contiguous(), "lse": lse.contiguous(), "delta": row_sums(out, dout, dlse)}
    call.run("key_gradients", key_gradients_kernel, q.shape[0], **shared, dk=dk, dv=dv)
    if drpb is None:
        call.run("query_gradients", query_gradients_kernel, q.shape[0], **shared, dq=dq, scratch=None, WRITE_LOGITS=False)
        return
    places = [_offsets(*axis, q.device) for axis in zip(q.shape[2:5], kernel, stride, dilation, causal, strict=True)]
    window_shape = torch.Size(kernel)
    step = max(1, SCRATCH // (4 * q[0, ..., 0].numel() * window_shape.numel()))
    for first in range(0, q.shape[0], step):
        own = slice(first, min(first + step, q.shape[0]))
        batches = own.stop - own.start
        # a causal window has places without a key, which nobody writes
        scratch = torch.zeros(batches, *q.shape[1:5], *window_shape, dtype=torch.float32, device=q.device)
        part = {name: call.arguments[name][own] for name in ("q", "k", "v")} | {name: tensor[own] for name, tensor in shared.items()}
        call.run("query_gradients", query_gradients_kernel, batches, **part, dq=dq[own], scratch=scratch, WRITE_LOGITS=True)
        drpb += _table(scratch.sum(0), places)


def _offsets(length: int, kernel: int, stride: int, dilation: int, causal: bool, device: torch.device) -> Tensor:
    """(token, place in its window, entry of the table): 1 where the place has that offset from the token."""
    token = torch.arange(length)
    inner, member = torch.div(token, dilation, rounding_mode="floor"), token % dilation
    entry = torch.empty(length, kernel, dtype=torch.long)
    for group in range(dilation):
        own = member == group
        start, _ = window(inner[own], int(own.sum()), kernel, stride, causal)
        entry[own] = (start - inner[own])[:, None] + torch.arange(kernel) + kernel - 1
    return (entry[..., None] == torch.arange(2 * kernel - 1)).float().to(device)


def _table(dlogits: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Sum of (heads, x, y, z, window x, window y, window z) gradients by offset, one axis after the other: matrix products, in a fixed order."""
    found = torch.einsum("hxyzijk,xia->hyzjka", dlogits, places[0])
    found = torch.einsum("hyzjka,yjb->hzkab", found, places[1])
    return torch.einsum("hzkab,zkc->habc", found, places[2])


# --- the compile check ---------------------------------------------------------------------------------------------------------------

_KERNELS = {"forward": forward_kernel, "key_gradients": key_gradients_kernel, "query_gradients": query_gradients_kernel}


def compile_cases() -> list[CompileCase]:
    """Tilings of the table for one to three axes, with and without a table of relative positions."""
    cases = []
    for arch in ("ampere", "hopper", "cdna"):
        for name, kernel in _KERNELS.items():
            for dim, dtype, axes, table in [(32, "fp16", 2, True), (128, "bf16", 3, False), (64, "fp32", 1, True)]:
                entry = compile_case("", kernel, name, arch, dim, dtype, {}, crowded=table).constants
                box = tile_shape(entry["KEYS" if name == "key_gradients" else "QUERIES"], [1] * (3 - axes) + [64] * axes, (1, 1, 1))
                own: dict[str, Any] = {
                    "HAS_TABLE": table, "WRITE_LOGITS": table, "AXES": axes, "CAUSAL_X": axes == 3, "CAUSAL_Y": False, "CAUSAL_Z": axes == 1,
                    **dict(zip(("TILE_X", "TILE_Y", "TILE_Z"), box, strict=True)),
                }  # fmt: skip
                if not table:
                    own |= {"table": None, "scratch": None}
                variant = f"{name}-{axes}d{'-table' if table else ''}"
                cases.append(compile_case(variant, kernel, name, arch, dim, dtype, own, crowded=table, quick=dim == 32))
    return cases


def tunables(*, toy: bool = False) -> list[Tunable]:
    """Tiles of each kernel by head dimension, on an image with windows of 7 x 7; with a table (crowded registers) and without."""
    side = 7 if toy else 128
    found = []
    for dtype in (torch.float32,) if toy else (torch.bfloat16, torch.float32):
        for dim in (16,) if toy else (32, 64, 128, 256):
            for table in (True, False):

                def inputs(device: torch.device, dtype: torch.dtype = dtype, dim: int = dim, table: bool = table) -> list[Tensor]:
                    draw = torch.Generator().manual_seed(0)
                    leaves = [torch.randn(1, 1 if toy else 4, side, side, dim, generator=draw).to(device, dtype) for _ in range(3)]
                    if table:
                        leaves.append(torch.randn(leaves[0].shape[1], 13, 13, generator=draw).to(device))
                    return [leaf.requires_grad_() for leaf in leaves]

                for kernel in _KERNELS:
                    name = kernel + ("_crowded" if table else "")
                    found.append(Tunable("neighborhood", name, dtype, width(dim), candidates(toy), inputs, _run_sample))
    return found


def _run_sample(tensors: Sequence[Tensor], backend: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    from foveal.kernels.neighborhood.op import neighborhood_attention_2d

    q, k, v, *table = tensors
    out = neighborhood_attention_2d(q, k, v, 7, rpb=table[0] if table else None, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out], torch.autograd.grad(out, list(tensors), weights)
