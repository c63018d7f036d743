"""Torch form of the selective scan, for machines without a C compiler and devices without a kernel.

A chunk of steps is laid out time first, so that everything but the recurrence itself is one elementwise call for the whole chunk and a
step of the recurrence is one `addcmul`. States exist for one chunk and a slice of the batch at a time; backward recomputes them from the
state kept at the chunk's start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.kernels.scan.inputs import CHUNK, Gradients, Inputs

#: States held at a time, at most (unless a single batch element has more).
_STATES = 2**22


class _Chunk(NamedTuple):
    """One chunk of one slice of the batch, steps in scan order; (step, batch, dim) and, with states, (step, batch, dim, state)."""

    positions: slice
    u: Tensor
    raw: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    decay: Tensor


def _slices(inputs: Inputs) -> Iterator[tuple[slice, Inputs]]:
    """The batch in slices whose states of a chunk are few enough."""
    size = max(1, _STATES // max(1, CHUNK * inputs.dim * inputs.state))
    for low in range(0, inputs.batch, size):
        rows = slice(low, low + size)
        batched = {name: getattr(inputs, name)[rows] for name in ("u", "delta")}
        batched |= {name: matrix if matrix.dim() == 2 else matrix[rows] for name, matrix in (("B", inputs.B), ("C", inputs.C))}
        batched |= {name: None if value is None else value[rows] for name, value in _batched(inputs)}
        yield rows, inputs._replace(**batched)


def _batched(inputs: Inputs) -> tuple[tuple[str, Tensor | None], ...]:
    return ("z", inputs.z), ("initial_state", inputs.initial_state), ("starts", inputs.starts)


def _in_scan_order(tensor: Tensor, positions: slice, reverse: bool) -> Tensor:
    """Chunk of (..., length) as (step, ...)."""
    chunk = tensor[..., positions]
    return (chunk.flip(-1) if reverse else chunk).movedim(-1, 0)


def _in_place(steps: Tensor, reverse: bool) -> Tensor:
    """Inverse of `_in_scan_order`: (step, ...) as (..., position)."""
    return (steps.flip(0) if reverse else steps).movedim(0, -1)


def _chunk(inputs: Inputs, index: int) -> _Chunk:
    first, last = index * CHUNK, min((index + 1) * CHUNK, inputs.length)
    positions = slice(inputs.length - last, inputs.length - first) if inputs.reverse else slice(first, last)

    def per_channel(matrix: Tensor) -> Tensor:
        steps = _in_scan_order(inputs.grouped(matrix), positions, inputs.reverse)
        return steps.repeat_interleave(inputs.dim // steps.shape[2], dim=2)

    u, raw = (_in_scan_order(tensor, positions, inputs.reverse) for tensor in (inputs.u, inputs.delta))
    if inputs.delta_bias is not None:
        raw = raw + inputs.delta_bias
    dt = F.softplus(raw) if inputs.delta_softplus else raw
    decay = torch.exp(dt[..., None] * inputs.A)
    if inputs.starts is not None:  # a state that is forgotten has decayed to nothing, and so has its gradient
        decay = decay.masked_fill(_in_scan_order(inputs.starts, positions, inputs.reverse)[..., None, None] != 0, 0.0)
    return _Chunk(positions, u, raw, dt, per_channel(inputs.B), per_channel(inputs.C), decay)


def _states(chunk: _Chunk, state: Tensor) -> Tensor:
    """States before and after every step: (steps + 1, batch, dim, state)."""
    states = torch.cat([state[None], (chunk.dt * chunk.u)[..., None] * chunk.B])
    for t in range(chunk.u.shape[0]):
        states[t + 1].addcmul_(chunk.decay[t], states[t])
    return states


def _read_out(inputs: Inputs, chunk: _Chunk, states: Tensor) -> Tensor:
    y = (states[1:] * chunk.C).sum(-1)
    return y if inputs.D is None else y + inputs.D * chunk.u


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out in u's dtype, last state, states at the start of every chunk of `CHUNK` steps)."""
    wide = inputs.wide()
    out, last_state = torch.empty(wide.u.shape, dtype=wide.u.dtype, device=wide.u.device), wide.first_state()
    checkpoints = out.new_empty(wide.checkpoints_shape("torch"))
    for rows, part in _slices(wide):
        for index in range(checkpoints.shape[2]):
            chunk = _chunk(part, index)
            checkpoints[rows, :, index] = last_state[rows]
            states = _states(chunk, last_state[rows])
            last_state[rows] = states[-1]
            out[rows, :, chunk.positions] = _in_place(_read_out(part, chunk, states), wide.reverse)
    if wide.z is not None:
        out *= F.silu(wide.z)
    return out.to(inputs.u.dtype), last_state, checkpoints


def backward(inputs: Inputs, dout: Tensor, dlast_state: Tensor | None, checkpoints: Tensor) -> Gradients:
    """Gradients of every argument, in the type that the scan computes in."""
    wide = inputs.wide()
    dout = dout.to(wide.u.dtype)
    du, ddelta = (torch.empty(wide.u.shape, dtype=wide.u.dtype, device=wide.u.device) for _ in range(2))
    dz = None if wide.z is None else torch.empty_like(du)
    dA, dbias, dD = torch.zeros_like(wide.A), du.new_zeros(wide.dim), du.new_zeros(wide.dim)
    dB, dC = (matrix.new_zeros(matrix.shape) for matrix in (wide.B, wide.C))
    dinitial = torch.zeros_like(wide.first_state()) if dlast_state is None else dlast_state.to(wide.u.dtype, copy=True)
    for rows, part in _slices(wide):
        for index in reversed(range(checkpoints.shape[2])):
            chunk = _chunk(part, index)
            states = _states(chunk, checkpoints[rows, :, index])
            dy = _in_scan_order(dout[rows], chunk.positions, wide.reverse)
            if part.z is not None and dz is not None:
                z = _in_scan_order(part.z, chunk.positions, wide.reverse)
                gate = torch.sigmoid(z)
                dz[rows, :, chunk.positions] = _in_place(dy * _read_out(part, chunk, states) * gate * (1 + z * (1 - gate)), wide.reverse)
                dy = dy * z * gate
            # The gradient of the state after a step: what reads it, and what the next step carries on.
            dstates = dy[..., None] * chunk.C
            carried = dinitial[rows]
            for t in reversed(range(dstates.shape[0])):
                dstates[t] += carried
                carried = dstates[t] * chunk.decay[t]
            dinitial[rows] = carried
            through_b = (dstates * chunk.B).sum(-1)
            decayed = dstates * chunk.decay * states[:-1]
            ddt = chunk.u * through_b + (decayed * wide.A).sum(-1)
            if wide.delta_softplus:
                ddt = torch.where(chunk.raw > 20, ddt, ddt * torch.sigmoid(chunk.raw))
            skip = 0 if wide.D is None else wide.D * dy
            du[rows, :, chunk.positions] = _in_place(chunk.dt * through_b + skip, wide.reverse)
            ddelta[rows, :, chunk.positions] = _in_place(ddt, wide.reverse)
            dA += (decayed * chunk.dt[..., None]).sum((0, 1))
            dD += (dy * chunk.u).sum((0, 1))
            dbias += ddt.sum((0, 1))
            _add_matrix(dB, dstates * (chunk.dt * chunk.u)[..., None], rows, chunk.positions, wide.reverse)
            _add_matrix(dC, dy[..., None] * states[1:], rows, chunk.positions, wide.reverse)
    return Gradients(du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)


def _add_matrix(gradient: Tensor, per_channel: Tensor, rows: slice, positions: slice, reverse: bool) -> None:
    """Add (step, batch, dim, state), summed over what the matrix is shared by, to the gradient of B or C in its own shape."""
    if gradient.dim() == 2:
        gradient += per_channel.sum((0, 1))
        return
    grouped = gradient[:, None] if gradient.dim() == 3 else gradient
    summed = per_channel.unflatten(2, (grouped.shape[1], -1)).sum(3)
    grouped[rows, ..., positions] += _in_place(summed, reverse)
