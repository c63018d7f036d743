"""The search on a GPU: a program keeps a tile of vectors in registers and walks the codebook, one matrix product a tile of codes.

The codebook (8192 codes of 64 are 2 MB) stays in the second-level cache; what is written is one index a vector. Products are exact float32
("ieee"), or three TF32 products that come as close: in one TF32 product a tenth of a percent of the indices would flip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.configurations import tiling
from foveal.kernels.gpu import precision, width
from foveal.kernels.testing.compile import CompileCase
from foveal.kernels.tune import Tunable


@triton.jit
def nearest_kernel(
    x, codebook, penalty, index, vectors, codes, dim,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    live = m < vectors
    if WHOLE:
        rows = tl.load(x + m[:, None] * dim + d[None, :], mask=live[:, None] & (d < dim)[None, :], other=0.0)
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    at = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, codes, BLOCK_K):
        k = first + lane
        if WHOLE:
            tile = tl.load(codebook + k[None, :] * dim + d[:, None], mask=(k < codes)[None, :] & (d < dim)[:, None], other=0.0)
            score = tl.dot(rows, tile, input_precision=PRECISION)
        else:
            score = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for low in range(0, dim, BLOCK_D):
                part = low + d
                rows = tl.load(x + m[:, None] * dim + part[None, :], mask=live[:, None] & (part < dim)[None, :], other=0.0)
                tile = tl.load(codebook + k[None, :] * dim + part[:, None], mask=(k < codes)[None, :] & (part < dim)[:, None], other=0.0)
                score += tl.dot(rows, tile, input_precision=PRECISION)
        minus = tl.load(penalty + k, mask=k < codes, other=float("inf"))
        score -= minus[None, :]
        value = tl.max(score, 1)
        # the first of several equal ones: the smallest index among those that attain the maximum
        found = tl.min(tl.where(score == value[:, None], k[None, :], codes), 1)
        higher = value > best
        best = tl.where(higher, value, best)
        at = tl.where(higher, found, at)
    tl.store(index + m, at.to(tl.int64), mask=live)


#: Channels of a tile; wider vectors are walked in such parts, read again for each tile of codes.
_CHANNELS = 64


def _shipped() -> dict[str, int]:
    """Vectors and codes of a tile: its three TF32 products fit into the registers of eight warps (of 64 codes, 4 KB a thread would spill)."""
    return {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}


def _part(dim: int) -> dict[str, Any]:
    return {"BLOCK_D": min(_CHANNELS, width(dim)), "WHOLE": dim <= _CHANNELS}


def nearest(x: Tensor, codebook: Tensor, penalty: Tensor) -> Tensor:
    """Index of the code with the largest ``x . c - penalty``, the lowest one where several are; float32."""
    index = torch.empty(x.shape[0], dtype=torch.long, device=x.device)
    if x.shape[0] == 0:
        return index
    constants: dict[str, Any] = {**_part(x.shape[1]), "PRECISION": precision(close=True)}
    constants |= tiling("quantize", "nearest", x, triton.next_power_of_2(x.shape[1]), _shipped())
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(x.shape[0], constants["BLOCK_M"]),)
        nearest_kernel[grid](x.contiguous(), codebook.contiguous(), penalty.contiguous(), index, *x.shape[:1], *codebook.shape, **constants)
    return index


def compile_cases() -> list[CompileCase]:
    """Vectors that fit into a tile, and wider ones; in the precision that each architecture runs."""
    cases = []
    signature = {"x": "*fp32", "codebook": "*fp32", "penalty": "*fp32", "index": "*i64", "vectors": "i32", "codes": "i32", "dim": "i32"}
    for dim in (16, 64, 256):
        tile = _shipped()
        for arithmetic, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):
            constants = {"BLOCK_M": tile["BLOCK_M"], "BLOCK_K": tile["BLOCK_K"], **_part(dim), "PRECISION": arithmetic}
            options: dict[str, Any] = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"], "targets": targets, "matrix": True}
            name = f"nearest-d{dim}-{arithmetic}"
            cases.append(CompileCase(name, nearest_kernel, signature, constants, divisible=("dim",), quick=dim == 64, **options))
    return cases


def tunables(*, toy: bool = False) -> list[Tunable]:
    """Tiles of vectors and of codes, by code dim."""
    vectors, codes = (9, 40) if toy else (65_536, 8192)
    found = []
    for dim in (16,) if toy else (32, 64, 128):

        def inputs(device: torch.device, dim: int = dim) -> list[Tensor]:
            draw = torch.Generator().manual_seed(0)
            return [torch.randn(rows, dim, generator=draw).to(device) for rows in (vectors, codes)]

        sizes = [(64, 32, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (32, 64, 4, 2)][: 2 if toy else 5]
        tilings = [{"BLOCK_M": m, "BLOCK_K": k, "num_warps": warps, "num_stages": stages} for m, k, warps, stages in sizes]
        found.append(Tunable("quantize", "nearest", torch.float32, dim, tilings, inputs, _run_sample))
    return found


def _run_sample(tensors: Sequence[Tensor], backend: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Distances to the chosen codes, which a wrong index makes larger; by the blocked form for the definition, whose matrix would be 4 GB."""
    from foveal.kernels.quantize.op import nearest_code

    x, codebook = tensors
    form = "cpu" if backend == "reference" and x.shape[0] > 1024 else backend
    return [nearest_code(x, codebook, return_distance=True, backend=form)[1]], []
