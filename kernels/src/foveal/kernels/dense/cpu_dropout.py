"""Dropout's factors on the CPU: dropout.c, or the torch form of philox.py where there is no library. Both draw the same bits."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal.kernels import native
from foveal.kernels.dense.philox import kept, threshold

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

SOURCE = str(Path(__file__).with_name("dropout.c"))


class Problem(ctypes.Structure):
    """``Problem`` of dropout.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("planes", "rows", "keys", "first_row", "first_key")),
        *((name, ctypes.c_uint64) for name in ("seed", "threshold")),
        ("growth", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("plane", "out")),
    )


def factors(
    seed: Int64[Tensor, "1"], dropout: float, plane: Int64[Tensor, "..."], rows: tuple[int, int], keys: tuple[int, int], dtype: torch.dtype
) -> Float[Tensor, "... rows keys"]:
    """What the weights of a tile are multiplied by: 0, or 1 / (1 - dropout).

    Args:
        seed: of the call.
        dropout: probability with which a pair is dropped.
        plane: number of each sequence and head, sequence x heads + head.
        rows: first and last (exclusive) query.
        keys: first and last (exclusive) key.
        dtype: float32 or float64.
    """
    shape = (*plane.shape, rows[1] - rows[0], keys[1] - keys[0])
    growth = 1 / (1 - dropout)
    library = native.load(SOURCE)
    if library is None:
        row, column = torch.arange(*rows)[:, None], torch.arange(*keys)
        return kept(seed, dropout, plane[..., None, None], row, column).to(dtype).mul_(growth)
    plane, out = plane.contiguous(), torch.empty(shape, dtype=dtype)
    problem = Problem(plane.numel(), shape[-2], shape[-1], rows[0], keys[0], int(seed) & (2**64 - 1), threshold(dropout), growth)
    problem.plane, problem.out = plane.data_ptr(), out.data_ptr()
    getattr(library, f"dropout_{'double' if dtype == torch.float64 else 'float'}")(ctypes.byref(problem), torch.get_num_threads())
    return out
