"""Softmax attention forward by flash.c: float32, on processors with 512-bit vectors; sequences of one length or of many in one call.

The backward pass is that of the other forms: it needs the output and the log-sum-exp, which are the same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels import native
from foveal.kernels.dense.call import Call

SOURCE = str(Path(__file__).with_name("flash.c"))
#: Rows below which it does not pay to copy a head's keys once more for another thread.
_STRETCH = 96


class Problem(ctypes.Structure):
    """``Problem`` of flash.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "kv_heads", "group", "dim", "value_dim", "left", "right", "chunks")),
        *((name, ctypes.c_int64 * 2) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        ("bias_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("bias_key", "lse_stride")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("place", "q", "k", "v", "bias", "out", "lse")),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native.load(SOURCE)
    return library if library is not None and library.flash_serves() else None


def serves(call: Call) -> bool:
    """Whether flash.c computes this call: nothing changes the logits but a temperature and a bias in float32."""
    plain = call.score == "softmax" and not call.softcap and not call.dropout and call.mask is call.alibi is call.table is None
    bias = call.bias is None or (call.bias.dtype == torch.float32 and call.bias.stride(-1) in (0, 1))
    return plain and bias and call.q.dtype == torch.float32 and _library() is not None


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`; 0 and -inf for rows that see no key."""
    library = _library()
    assert library is not None
    q = call.q if call.temperature is None else call.q / call.temperature[..., None]
    k, v = call.k, call.v
    if call.cu_queries is None or call.cu_keys is None:
        batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
        steps = torch.tensor([*(t.stride(0) for t in (q, k, v, out, lse)), 0, 0])
        place = torch.arange(batch)[:, None] * steps + torch.tensor([0, 0, 0, 0, 0, queries, keys])
    else:
        rows, seen = (_bounds(cu, total) for cu, total in ((call.cu_queries, q.shape[2]), (call.cu_keys, k.shape[2])))
        batch, queries = rows.shape[0] - 1, call.longest_query
        steps = torch.tensor([t.stride(2) for t in (q, k, v, out, lse)])
        starts = torch.stack([rows[:-1], seen[:-1], seen[:-1], rows[:-1], rows[:-1]], 1)
        place = torch.cat([starts * steps, rows.diff()[:, None], seen.diff()[:, None]], 1)
    threads, kv_heads = torch.get_num_threads(), k.shape[1]
    chunks = max(1, min(-(-queries // _STRETCH), -(-2 * threads // max(1, batch * kv_heads)) if threads > 1 else 1))
    problem = Problem(batch, kv_heads, call.group, q.shape[3], v.shape[3], call.left, call.right, chunks)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        setattr(problem, f"{name}_stride", (tensor.stride(1), tensor.stride(2)))
    if call.bias is not None:
        step = [stride if size > 1 else 0 for stride, size in zip(call.bias.stride(), call.bias.shape, strict=True)]
        problem.bias_stride, problem.bias_key, problem.bias = tuple(step[:3]), step[3], call.bias.data_ptr()
    problem.lse_stride, problem.scale = lse.stride(1), call.scale
    for name, tensor in (("place", place), ("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse)):
        setattr(problem, name, tensor.data_ptr())
    if library.flash_forward(ctypes.byref(problem), threads) != 0:
        raise MemoryError("attention: no memory for the rows of a thread")


def _bounds(cu: Tensor, total: int) -> Tensor:
    """Where sequences begin, int64. Checked here once more: where a call is compiled the public function could not see the numbers."""
    numbers = cu.tolist()
    if numbers[0] != 0 or numbers[-1] != total or numbers != sorted(numbers):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the total {total}; got {numbers if len(numbers) <= 6 else [*numbers[:3], ..., numbers[-1]]}"
        )
    return cu.long()
