"""CPU form of the selective scan: scan.c, called through ctypes on tensors as they lie (strides are passed, nothing is transposed).

A task of the C code is a batch element and a block of channels; with few batch elements more blocks make enough tasks for the threads, at
the price of one partial dB and dC a block. Their number depends on shapes alone, so results do not change with the number of threads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from foveal.kernels import native
from foveal.kernels.scan.inputs import Gradients, Inputs

SOURCE = str(Path(__file__).with_name("scan.c"))

_TASKS = 64
_CHANNELS_PER_BLOCK = 8

_SIZES = ("batch", "dim", "length", "state", "groups_b", "groups_c", "constant_b", "constant_c", "blocks", "threads", "softplus", "reverse")
_STRIDES = {"u_stride": 3, "delta_stride": 3, "z_stride": 3, "dout_stride": 3, "b_stride": 4, "c_stride": 4}
_GIVEN = ("u", "delta", "a", "b", "c", "d", "z", "delta_bias", "initial_state", "starts")
_FORWARD = ("out", "last_state", "checkpoints")
_BACKWARD = ("dout", "du", "ddelta", "da", "db", "dc", "dd", "dz", "ddelta_bias", "dinitial_state")


class Problem(ctypes.Structure):
    """``Problem`` of scan.c."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES]
        + [(name, ctypes.c_int64 * count) for name, count in _STRIDES.items()]
        + [(name, ctypes.c_void_p) for name in (*_GIVEN, *_FORWARD, *_BACKWARD)]
    )


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Reason why the C form cannot run on this machine, or None."""
    return None if native.load(SOURCE) is not None else native.explain(SOURCE)


def _blocks(inputs: Inputs) -> int:
    """Channel blocks that each batch element is split in."""
    return max(1, min(-(-_TASKS // max(1, inputs.batch)), inputs.dim // _CHANNELS_PER_BLOCK))


def _problem(inputs: Inputs) -> tuple[Problem, Inputs]:
    """Sizes, strides and pointers of the inputs, and the converted inputs, which must outlive the call."""
    wide = inputs.wide()
    wide = wide._replace(
        A=wide.A.contiguous(),
        D=None if wide.D is None else wide.D.contiguous(),
        delta_bias=None if wide.delta_bias is None else wide.delta_bias.contiguous(),
        initial_state=None if wide.initial_state is None else wide.initial_state.contiguous(),
        starts=None if wide.starts is None else wide.starts.contiguous(),
    )
    b, c = wide.grouped(wide.B), wide.grouped(wide.C)
    problem = Problem(
        batch=wide.batch,
        dim=wide.dim,
        length=wide.length,
        state=wide.state,
        groups_b=b.shape[1],
        groups_c=c.shape[1],
        constant_b=wide.B.dim() == 2,
        constant_c=wide.C.dim() == 2,
        blocks=_blocks(wide),
        threads=torch.get_num_threads(),
        softplus=wide.delta_softplus,
        reverse=wide.reverse,
    )
    for name, tensor in (("u", wide.u), ("delta", wide.delta), ("z", wide.z), ("b", b), ("c", c)):
        if tensor is not None:
            setattr(problem, f"{name}_stride", tuple(tensor.stride()))
    arrays: dict[str, Tensor | None] = {"u": wide.u, "delta": wide.delta, "a": wide.A, "b": b, "c": c, "d": wide.D, "z": wide.z}
    _point(problem, **arrays, delta_bias=wide.delta_bias, initial_state=wide.initial_state, starts=wide.starts)
    return problem, wide


def _point(problem: Problem, **arrays: Tensor | None) -> None:
    for name, tensor in arrays.items():
        setattr(problem, name, None if tensor is None else tensor.data_ptr())


def _call(name: str, problem: Problem, dtype: torch.dtype) -> None:
    library = native.load(SOURCE)
    if library is None:
        raise RuntimeError(f"selective_scan: the C form is not available: {native.explain(SOURCE)}")
    function = getattr(library, f"{name}_{'double' if dtype == torch.float64 else 'float'}")
    if function(ctypes.byref(problem)) != 0:
        raise MemoryError("selective_scan: no memory for the tiles of a thread")


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out in u's dtype, last state, states at the start of every chunk of `CHUNK` steps)."""
    problem, wide = _problem(inputs)
    out = torch.empty(wide.u.shape, dtype=wide.u.dtype)
    checkpoints = out.new_empty(wide.checkpoints_shape("cpu"))
    if wide.length == 0:
        return out.to(inputs.u.dtype), wide.first_state(), checkpoints
    last_state = out.new_empty(wide.batch, wide.dim, wide.state)
    _point(problem, out=out, last_state=last_state, checkpoints=checkpoints)
    _call("selective_scan_forward", problem, out.dtype)
    return out.to(inputs.u.dtype), last_state, checkpoints


def backward(inputs: Inputs, dout: Tensor, dlast_state: Tensor | None, checkpoints: Tensor) -> Gradients:
    """Gradients of every argument, in the type that the scan computes in."""
    problem, wide = _problem(inputs)
    dout = dout.to(wide.u.dtype)
    problem.dout_stride = tuple(dout.stride())
    new = dout.new_zeros
    du, ddelta = dout.new_empty(wide.u.shape), dout.new_empty(wide.u.shape)
    dz = None if wide.z is None else dout.new_empty(wide.u.shape)
    lines = (wide.batch, wide.dim)
    dA, dD, dbias = new(*lines, wide.state), new(lines), new(lines)
    dB, dC = (new(problem.blocks, *wide.grouped(matrix).shape[:3], 1 if matrix.dim() == 2 else wide.length) for matrix in (wide.B, wide.C))
    carried = new(*lines, wide.state) if dlast_state is None else dlast_state.to(dtype=dout.dtype, copy=True).contiguous()
    _point(problem, checkpoints=checkpoints, dout=dout, du=du, ddelta=ddelta, da=dA, db=dB, dc=dC, dd=dD, dz=dz)
    _point(problem, ddelta_bias=dbias, dinitial_state=carried)
    _call("selective_scan_backward", problem, wide.u.dtype)
    return Gradients(
        u=du,
        delta=ddelta,
        A=dA.sum(0),
        B=wide.ungrouped(dB.sum(0), wide.B),
        C=wide.ungrouped(dC.sum(0), wide.C),
        D=dD.sum(0),
        z=dz,
        delta_bias=dbias.sum(0),
        initial_state=carried,
    )
