"""What the Triton kernels of the sparse families share: rows gathered by their index, one step of online softmax, constants, tilings.

The kernels take contiguous (batch, heads, length, dim) arrays and name a row by its number. Logits are in base 2 (`exp2` is one
instruction); the log-sum-exp outside is natural. UPCAST loads in float32, as triton's interpreter needs for bfloat16; DOT is the dtype in
which probabilities enter a product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels import configurations
from foveal.kernels.dispatch import interpreting
from foveal.kernels.gpu import COMPILED_FOR, architecture, compiled_precision, precision, width

if TYPE_CHECKING:
    from foveal.kernels.testing.compile import CompileCase

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2.0))


@triton.jit
def load_rows(base, row, seen, stride, DIM: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a matrix by their number, zero where not `seen` and beyond DIM."""
    column = tl.arange(0, WIDTH)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if DIM == WIDTH:
        tile = tl.load(pointers, mask=seen[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=seen[:, None] & (column[None, :] < DIM), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(base, tile, row, seen, stride, DIM: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=seen[:, None] & (column[None, :] < DIM))


@triton.jit
def load_sums(lse, delta, row, seen):
    """Log-sum-exp in base 2 and delta of some rows; rows without keys and rows that are not there get +inf, which makes every weight 0."""
    sums = tl.load(lse + row, mask=seen, other=float("-inf"))
    sums = tl.where(sums == float("-inf"), float("inf"), sums * LOG2E)
    return sums, tl.load(delta + row, mask=seen, other=0.0)


@triton.jit
def absorb(accumulated, largest, total, logits, values, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """One step of online softmax: logits (query, key) in base 2 and values (key, dim) taken into the sums."""
    higher = tl.maximum(largest, tl.max(logits, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - anchor[:, None])
    shrink = tl.exp2(largest - anchor)
    total = total * shrink + tl.sum(weights, 1)
    accumulated = tl.dot(weights.to(DOT), values, accumulated * shrink[:, None], input_precision=PRECISION)
    return accumulated, higher, total


@triton.jit
def finish(accumulated, largest, total):
    """Output and natural log-sum-exp of the sums; 0 and -inf where there was no key."""
    empty = total == 0
    whole = tl.where(empty, 1.0, total)
    return accumulated / whole[:, None], tl.where(empty, float("-inf"), (largest + tl.log2(whole)) * LN2)


# --- configurations ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and launch options of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


#: (kernel, architecture, bytes of an element) -> tilings for head widths up to 64, 128 and 256.
TILINGS: dict[tuple[str, str, int], tuple[Tiling, Tiling, Tiling]] = {
    ("forward", "ampere", 2): (Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 1)),
    ("forward", "hopper", 2): (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), Tiling(64, 32, 8, 2)),
    ("forward", "cdna", 2): (Tiling(64, 64, 4, 1), Tiling(64, 32, 4, 1), Tiling(32, 32, 4, 1)),
    ("forward", "ampere", 4): (Tiling(32, 32, 4, 1), Tiling(32, 32, 8, 1), Tiling(16, 16, 4, 1)),
    ("forward", "hopper", 4): (Tiling(32, 32, 4, 1), Tiling(32, 32, 8, 1), Tiling(16, 16, 4, 1)),
    ("forward", "cdna", 4): (Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1)),
    ("key_gradients", "ampere", 2): (Tiling(32, 64, 4, 1), Tiling(32, 64, 8, 1), Tiling(16, 32, 4, 1)),
    ("key_gradients", "hopper", 2): (Tiling(64, 64, 8, 1), Tiling(32, 64, 8, 1), Tiling(32, 32, 8, 1)),
    ("key_gradients", "cdna", 2): (Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1), Tiling(16, 16, 4, 1)),
    ("key_gradients", "ampere", 4): (Tiling(16, 32, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
    ("key_gradients", "hopper", 4): (Tiling(16, 32, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
    ("key_gradients", "cdna", 4): (Tiling(16, 32, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
    ("query_gradients", "ampere", 2): (Tiling(64, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(32, 32, 8, 1)),
    ("query_gradients", "hopper", 2): (Tiling(64, 64, 8, 1), Tiling(64, 32, 8, 1), Tiling(64, 16, 8, 1)),
    ("query_gradients", "cdna", 2): (Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1)),
    ("query_gradients", "ampere", 4): (Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
    ("query_gradients", "hopper", 4): (Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
    ("query_gradients", "cdna", 4): (Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1), Tiling(16, 16, 8, 1)),
}

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def tiling(
    family: str, kernel: str, q: Tensor, value_dim: int, *, queries: int | None = None, keys: int | None = None, crowded: bool = False
) -> Tiling:
    """What was tuned for a call on this GPU, else the table's entry; its tiles no larger than `queries` and `keys` (powers of two) need.

    `crowded` as in `_entry`.
    """
    wide = max(width(q.shape[-1]), width(value_dim))
    if interpreting():  # a tile costs the same whatever its size
        entry = Tiling(64, 64, 4, 1)
    else:
        entry = _entry(kernel, architecture(q.device), q.element_size(), wide, crowded)
    shipped = {"QUERIES": entry.queries, "KEYS": entry.keys, "num_warps": entry.warps, "num_stages": entry.stages}
    chosen = Tiling(*configurations.tiling(family, kernel + ("_crowded" if crowded else ""), q, wide, shipped).values())
    return replace(chosen, queries=min(chosen.queries, queries or chosen.queries), keys=min(chosen.keys, keys or chosen.keys))


def _entry(kernel: str, architecture: str, itemsize: int, wide: int, crowded: bool) -> Tiling:
    """The table's entry; where a bias, masks or lists crowd the registers the side that is walked over is halved."""
    entry = TILINGS[kernel, architecture, itemsize][0 if wide <= 64 else 1 if wide <= 128 else 2]
    if not crowded:
        return entry
    if kernel == "key_gradients":
        return replace(entry, queries=max(16, entry.queries // 2))
    return replace(entry, keys=max(16, entry.keys // 2))


def constants(q: Tensor, value_dim: int) -> dict[str, Any]:
    """Dimensions and arithmetic of a call, as the kernels' constexpr arguments."""
    upcast = interpreting() and q.dtype == torch.bfloat16
    return {**dimensions(q.shape[-1], value_dim), "UPCAST": upcast, "DOT": tl.float32 if upcast else _DTYPES[q.dtype], "PRECISION": precision()}


def dimensions(dim: int, value_dim: int) -> dict[str, int]:
    return {"DIM": dim, "VALUE_DIM": value_dim, "WIDTH": width(dim), "VALUE_WIDTH": width(value_dim)}


def written(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes for a result of `dtype`: the interpreter cuts bfloat16 off where it should round, so there torch rounds float32."""
    return torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype


def launch(kernel: Any, programs: int, tiles: Tiling, arguments: Mapping[str, Any]) -> None:
    """Run `kernel` with those of the arguments that it has."""
    if programs == 0:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: no device to switch to
        kernel[(programs,)](**{name: arguments[name] for name in kernel.arg_names}, num_warps=tiles.warps, num_stages=tiles.stages)


def row_sums(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """Row sums of out * dout, less the gradient of the log-sum-exp: what the softmax takes off every logit's gradient."""
    sums = (out.float() * dout.float()).sum(-1)
    return sums.contiguous() if dlse is None else (sums - dlse).contiguous()


def candidates(toy: bool = False) -> list[dict[str, int]]:
    """Tilings to try for a kernel of the table, beside the shipped one."""
    sizes = [(16, 16)] if toy else [(32, 32), (32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64)]
    return [
        {"QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages}
        for queries, keys in sizes
        for warps, stages in ([(4, 1)] if toy else [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2)])
    ]


# --- the compile check ---------------------------------------------------------------------------------------------------------------

_HALF = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_SINGLE = ("bias", "table", "lse", "delta", "scratch")
_WHOLE = ("row_start", "columns", "tile", "index", "pages", "lengths")


def compile_case(
    name: str, kernel: Any, kind: str, arch: str, dim: int, dtype: str, own: Mapping[str, Any], *, types: Mapping[str, str] | None = None,
    divisible: Sequence[str] = (), crowded: bool = False, quick: bool = False,
) -> CompileCase:  # fmt: skip
    """The case of one kernel with the tiling of (`kind`, `arch`) at head dimension `dim`; `own` adds constants and overrides."""
    from foveal.kernels.testing.compile import CompileCase

    wide, size = width(dim), 4 if dtype == "fp32" else 2
    entry = _entry(kind, arch, size, wide, crowded)
    values: dict[str, Any] = {
        **dimensions(dim, dim), "QUERIES": entry.queries, "KEYS": entry.keys, "UPCAST": False,
        "DOT": {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[dtype],
        "PRECISION": compiled_precision(arch), **own,
    }  # fmt: skip
    pointers = {
        **dict.fromkeys(_HALF, f"*{dtype}"),
        **dict.fromkeys(_SINGLE, "*fp32"),
        **dict.fromkeys(_WHOLE, "*i32"),
        "tiles": "*u8",
        "scale": "fp32",
    }
    known = {**pointers, **(types or {})}
    return CompileCase(
        name=f"{name}-{arch}-d{dim}-{dtype}",
        kernel=kernel,
        signature={argument: known.get(argument, "i32") for argument in kernel.arg_names if argument not in values},
        constants={key: value for key, value in values.items() if key in kernel.arg_names},
        num_warps=entry.warps,
        num_stages=entry.stages,
        divisible=list(divisible),
        matrix=size == 2,
        targets=COMPILED_FOR[arch],
        quick=quick,
    )
