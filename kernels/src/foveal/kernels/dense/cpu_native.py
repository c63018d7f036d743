"""Softmax attention by flash.c, forward and backward: float32, on processors with 512-bit vectors; sequences of many lengths in one call."""

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
#: Gradients that it gives; those of sinks and gate are outside of the kernels.
_GIVEN = ("q", "k", "v", "bias", "sinks", "gate")
_STRIDED = ("q", "k", "v", "out", "dq", "dk", "dv", "bias", "dbias")


class Problem(ctypes.Structure):
    """``Problem`` of flash.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "kv_heads", "group", "dim", "value_dim", "left", "right", "chunks", "bias_key", "serial")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in _STRIDED),
        ("lse_stride", ctypes.c_int64 * 2),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("place", "q", "k", "v", "bias", "out", "lse", "delta", "dq", "dk", "dv", "dbias")),
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


def differentiates(call: Call, gradients: dict[str, Tensor]) -> bool:
    """Whether it gives these gradients too: that of a bias where every pair of query and key has a number of its own, a head at least."""
    bias = "bias" not in gradients or (call.bias is not None and call.bias.shape[2:] == (call.q.shape[2], call.k.shape[2]))
    return serves(call) and bias and all(name in _GIVEN for name in gradients)


def forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Fill `out` and `lse`; 0 and -inf for rows that see no key."""
    q = call.q if call.temperature is None else call.q / call.temperature[..., None]
    problem, held = _problem(call, {"q": q, "k": call.k, "v": call.v, "out": out, "lse": lse})
    threads, rows = torch.get_num_threads(), call.q.shape[2] if call.cu_queries is None else call.longest_query
    items = max(1, problem.sequences * problem.kv_heads)
    problem.chunks = max(1, min(-(-rows // _STRETCH), -(-2 * threads // items) if threads > 1 else 1))
    _run("flash_forward", problem)
    del held


def backward(call: Call, dout: Tensor, delta: Tensor, lse: Tensor, gradients: dict[str, Tensor]) -> None:
    """Fill the gradients of q, k and v; add that of the bias, if it is wanted, to what is there. `delta` as in `cpu_tiles.backward`."""
    q = call.q if call.temperature is None else call.q / call.temperature[..., None]
    tensors = {"q": q, "k": call.k, "v": call.v, "out": dout, "lse": lse.contiguous(), "delta": delta.contiguous()}
    problem, held = _problem(call, tensors | {f"d{name}": gradients[name] for name in ("q", "k", "v", "bias") if name in gradients})
    if "bias" in gradients:  # heads and batches that share a bias add to one gradient: one after the other
        batch, heads = gradients["bias"].shape[:2]
        problem.serial = (batch == 1) | (heads == 1) << 1
    _run("flash_backward", problem)
    if call.temperature is not None:
        gradients["q"].div_(call.temperature[..., None])
    del held


def _problem(call: Call, tensors: dict[str, Tensor]) -> tuple[Problem, list[Tensor]]:
    """Sizes, strides and pointers, and the tensors that must outlive the call."""
    q, k, v = (tensors[name] for name in "qkv")
    if call.cu_queries is None or call.cu_keys is None:
        place = torch.tensor([0, 0, 0, q.shape[2], k.shape[2]]).repeat(q.shape[0], 1)
        place[:, 0] = torch.arange(q.shape[0])
    else:
        rows, seen = (_bounds(cu, total) for cu, total in ((call.cu_queries, q.shape[2]), (call.cu_keys, k.shape[2])))
        place = torch.stack([torch.zeros_like(rows[:-1]), rows[:-1], seen[:-1], rows.diff(), seen.diff()], 1)
    place = place.contiguous()
    problem = Problem(place.shape[0], k.shape[1], call.group, q.shape[3], v.shape[3], call.left, call.right, 1)
    problem.scale, problem.lse_stride = call.scale, (tensors["lse"].stride(0), tensors["lse"].stride(1))
    if call.bias is not None:
        tensors = {**tensors, "bias": call.bias}
        problem.bias_key = int(call.bias.shape[3] > 1 and call.bias.stride(3) == 1)
    for name, tensor in (*tensors.items(), ("place", place)):
        setattr(problem, name, tensor.data_ptr())
        if name in _STRIDED:
            steps = [step if size > 1 else 0 for step, size in zip(tensor.stride(), tensor.shape, strict=True)]
            setattr(problem, f"{name}_stride", tuple(steps[:3]))
    return problem, [*tensors.values(), place]


def _run(name: str, problem: Problem) -> None:
    library = _library()
    assert library is not None
    if getattr(library, name)(ctypes.byref(problem), torch.get_num_threads()) != 0:
        raise MemoryError("attention: no memory for the rows of a thread")


def _bounds(cu: Tensor, total: int) -> Tensor:
    """Where sequences begin, int64. Checked here once more: where a call is compiled the public function could not see the numbers."""
    numbers = cu.tolist()
    if numbers[0] != 0 or numbers[-1] != total or numbers != sorted(numbers):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the total {total}; got {numbers if len(numbers) <= 6 else [*numbers[:3], ..., numbers[-1]]}"
        )
    return cu.long()
