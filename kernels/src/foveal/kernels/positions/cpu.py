"""The rotation on the CPU: tables of cosines and sines from torch, each row turned by rotate.c; in torch where there is no library.

All layers of a model turn by the same angles, and its backward pass by their opposites: the last few tables are kept. Positions and
frequencies are compared by value, a thousandth of what the sines cost.
"""

from __future__ import annotations

import ctypes
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels import native
from foveal.kernels.positions.reference import angles

_SOURCE = str(Path(__file__).with_name("rotate.c"))
#: Elements below which waking a second thread costs more than it saves.
_WORTH_A_THREAD = 100_000
#: Largest table that is kept: 16 MiB of float32, its twin of sines as much again.
_KEPT = 2**22

#: Positions, frequencies, cosines and sines of the last calls.
_tables: deque[tuple[Tensor, Tensor, Tensor, Tensor]] = deque(maxlen=4)


class Problem(ctypes.Structure):
    """``Problem`` of rotate.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length", "dim", "pairs", "table_stride", "neighbours")),
        ("x_stride", ctypes.c_int64 * 3),
        ("out_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
    )


def rotate(tensors: list[Tensor], positions: Tensor, frequencies: Tensor, interleaved: bool) -> list[Tensor]:
    """Each tensor (batch, heads, length, dim) turned, in its dtype and memory layout."""
    cos, sin = _cosines_and_sines(positions, frequencies)
    return [_rotate_one(x, cos, sin, interleaved) for x in tensors]


def _cosines_and_sines(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(batch|1, length, pairs) each."""
    for kept_positions, kept_frequencies, cos, sin in tuple(_tables):
        if positions.dtype == cos.dtype and torch.equal(kept_positions, positions) and torch.equal(kept_frequencies, frequencies):
            return cos, sin
    with torch.inference_mode(False):
        positions, frequencies = positions.clone(), frequencies.clone()  # the caller may write into his
        angle = angles(positions, frequencies)
        cos, sin = angle.cos().contiguous(), angle.sin().contiguous()
    if cos.numel() <= _KEPT:
        _tables.append((positions, frequencies, cos, sin))
    return cos, sin


def _rotate_one(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide if wide.stride(-1) == 1 else wide.contiguous()
    library = native.load(_SOURCE)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    out = torch.empty_like(x, dtype=wide.dtype)
    target = out if out.stride(-1) == 1 else torch.empty_like(wide, memory_format=torch.contiguous_format)
    if library is None:
        _in_torch(target, wide, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)
    else:
        batch, heads, length, dim = x.shape
        pairs = cos.shape[-1]
        problem = Problem(batch, heads, length, dim, pairs, length * pairs if cos.shape[0] > 1 else 0, interleaved)
        problem.x_stride, problem.out_stride = tuple(wide.stride()[:3]), tuple(target.stride()[:3])
        for name, tensor in (("x", wide), ("cos", cos), ("sin", sin), ("out", target)):
            setattr(problem, name, tensor.data_ptr())
        threads = max(1, min(torch.get_num_threads(), x.numel() // _WORTH_A_THREAD))
        getattr(library, f"rotate_{'double' if wide.dtype == torch.float64 else 'float'}")(ctypes.byref(problem), threads)
    if target is not out:
        out.copy_(target)
    return out.to(x.dtype)


def _in_torch(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    pairs = cos.shape[-1]
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    halves = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(0, pairs), slice(pairs, 2 * pairs))
    first, second = (x[..., half] for half in halves)
    out[..., halves[0]] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., halves[1]] = torch.addcmul(second * cos, first, sin)
