"""Triton form of the selective scan.

A tile is (state, step): the states of one channel over a chunk of 64 steps, in registers (of more than 32 states, 32 steps). Inside a
chunk the recurrence is an associative scan over steps, which reads and writes memory along the sequence, as it lies; from chunk to chunk
the state is carried. Forward gives each program one channel of one batch element and keeps the state at every chunk's start.

Backward gives a program a block of channels of one batch element. It walks the chunks from the last to the first and, in each, its
channels: so dB and dC, which channels share, gather in registers and are stored once a chunk. What is left to sum (blocks of a group,
batch elements of A, D and the bias) is summed by torch afterwards: no atomics, the same bits every time. Bias, softplus, skip and gate are
fused; a reversed scan computes positions from the end. A step past the end of the sequence has step size 0 after softplus, which leaves
the state as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.kernels.configurations import tiling
from foveal.kernels.gpu import width
from foveal.kernels.scan.inputs import Gradients, Inputs, chunk
from foveal.kernels.testing.compile import CompileCase
from foveal.kernels.tune import Tunable

#: Warps of a program by padded state size: 8 numbers of a tile a thread, more would not stay in registers.
_WARPS = {16: 4, 32: 8, 64: 8}
#: Programs that the backward pass aims at; more of them means smaller blocks of channels and more partial sums.
_PROGRAMS = 1024


@triton.jit
def _then(decay_first, add_first, decay_second, add_second):
    """Two steps of ``state = decay state + add`` as one."""
    return decay_first * decay_second, add_second + decay_second * add_first


@triton.jit
def _softplus(x):
    small = tl.exp(tl.minimum(x, 20.0))
    grown = 1.0 + small
    # log(1 + e) that keeps the relative precision of small e: the rounding of 1 + e cancels in the quotient.
    curved = tl.where(grown == 1.0, small, tl.log(grown) * (small / tl.where(grown == 1.0, 1.0, grown - 1.0)))
    return tl.where(x > 20.0, x, curved)


@triton.jit
def _step_sizes(delta, bias, row, channel, places, live, SOFTPLUS: tl.constexpr):
    """(what softplus receives, step sizes; 0 where not live)."""
    raw = tl.load(delta + row + places, mask=live, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + channel).to(tl.float32)
    dt = _softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(live, dt, 0.0)


@triton.jit
def _forgetting(decay, starts, row, places, live):
    """Decays of a tile; 0 where another sequence starts: a forgotten state has decayed to nothing, and so have its gradients."""
    if starts is not None:
        first = tl.load(starts + row + places, mask=live, other=0) != 0
        decay = tl.where(first[None, :], 0.0, decay)
    return decay


@triton.jit
def _matrix(matrix, index, length, places, live, n, STATE: tl.constexpr, CONSTANT: tl.constexpr):
    """Tile of B or C: of one group, or of one channel where it is constant in time."""
    if CONSTANT:
        column = tl.load(matrix + index * STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
        return tl.where(live[None, :], column[:, None], 0.0)
    offsets = (index * STATE + n[:, None]) * length + places[None, :]
    return tl.load(matrix + offsets, mask=(n < STATE)[:, None] & live[None, :], other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, bias, initial_state, starts, out, last_state, checkpoints,
    dim, length, chunks, per_b, per_c,
    STATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    batch, channel = line // dim, line % dim
    row = line * length
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    rate = tl.load(A + channel * STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
    state = tl.zeros([BLOCK_N], tl.float32)
    if initial_state is not None:
        state += tl.load(initial_state + line * STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
    index_b = channel if CONSTANT_B else batch * (dim // per_b) + channel // per_b
    index_c = channel if CONSTANT_C else batch * (dim // per_c) + channel // per_c
    for k in range(chunks):
        steps = k * BLOCK_T + t
        live = steps < length
        places = length - 1 - steps if REVERSE else steps
        tl.store(checkpoints + (line * chunks + k) * STATE + n, state, mask=n < STATE)
        x = tl.load(u + row + places, mask=live, other=0.0).to(tl.float32)
        _, dt = _step_sizes(delta, bias, row, channel, places, live, SOFTPLUS)
        tile_b = _matrix(B, index_b, length, places, live, n, STATE, CONSTANT_B)
        tile_c = _matrix(C, index_c, length, places, live, n, STATE, CONSTANT_C)
        decay = _forgetting(tl.exp(rate[:, None] * dt[None, :]), starts, batch * length, places, live)
        decays, adds = tl.associative_scan((decay, tile_b * (dt * x)[None, :]), 1, _then)
        states = adds + decays * state[:, None]
        y = tl.sum(states * tile_c, 0)
        if D is not None:
            y += tl.load(D + channel).to(tl.float32) * x
        if z is not None:
            gate = tl.load(z + row + places, mask=live, other=0.0).to(tl.float32)
            y *= gate / (1.0 + tl.exp(-gate))
        tl.store(out + row + places, y, mask=live)
        state = tl.sum(tl.where((t == BLOCK_T - 1)[None, :], states, 0.0), 1)
    tl.store(last_state + line * STATE + n, state, mask=n < STATE)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, bias, starts, checkpoints, dout,
    du, ddelta, dA, dB, dC, dD, dz, dbias, carried,
    dim, length, chunks, per_b, per_c, per_block,
    STATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = dim // per_block
    batch, low = program // blocks, program % blocks * per_block
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    group_b, group_c = batch * (dim // per_b) + low // per_b, batch * (dim // per_c) + low // per_c
    for reversed_k in range(chunks):
        k = chunks - 1 - reversed_k
        steps = k * BLOCK_T + t
        live = steps < length
        places = length - 1 - steps if REVERSE else steps
        # The decay of the next step leads from its gradient to this one's; past the chunk's end the carried gradient has it already.
        followed = (steps + 1 < length) & (t + 1 < BLOCK_T)
        next_places = places - 1 if REVERSE else places + 1
        tile_b = _matrix(B, low if CONSTANT_B else group_b, length, places, live, n, STATE, CONSTANT_B)
        tile_c = _matrix(C, low if CONSTANT_C else group_c, length, places, live, n, STATE, CONSTANT_C)
        grad_b = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        grad_c = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for offset in range(per_block):
            channel = low + offset
            line = batch * dim + channel
            row = line * length
            kept = (line * chunks + k) * STATE + n
            if CONSTANT_B:
                tile_b = _matrix(B, channel, length, places, live, n, STATE, CONSTANT_B)
            if CONSTANT_C:
                tile_c = _matrix(C, channel, length, places, live, n, STATE, CONSTANT_C)
            rate = tl.load(A + channel * STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
            state = tl.load(checkpoints + kept, mask=n < STATE, other=0.0)
            x = tl.load(u + row + places, mask=live, other=0.0).to(tl.float32)
            raw, dt = _step_sizes(delta, bias, row, channel, places, live, SOFTPLUS)
            decay = _forgetting(tl.exp(rate[:, None] * dt[None, :]), starts, batch * length, places, live)
            added = tile_b * (dt * x)[None, :]
            decays, adds = tl.associative_scan((decay, added), 1, _then)
            states = adds + decays * state[:, None]

            dy = tl.load(dout + row + places, mask=live, other=0.0).to(tl.float32)
            skip = 0.0
            if D is not None:
                skip = tl.load(D + channel).to(tl.float32)
            if z is not None:
                gate = tl.load(z + row + places, mask=live, other=0.0).to(tl.float32)
                opened = 1.0 / (1.0 + tl.exp(-gate))
                y = tl.sum(states * tile_c, 0) + skip * x
                tl.store(dz + row + places, dy * y * opened * (1.0 + gate * (1.0 - opened)), mask=live)
                dy *= gate * opened

            _, next_dt = _step_sizes(delta, bias, row, channel, next_places, followed, SOFTPLUS)
            next_decay = _forgetting(tl.exp(rate[:, None] * next_dt[None, :]), starts, batch * length, next_places, followed)
            decays, adds = tl.associative_scan((next_decay, tile_c * dy[None, :]), 1, _then, reverse=True)
            after = tl.load(carried + line * STATE + n, mask=n < STATE, other=0.0)
            grads = adds + decays * after[:, None]
            before = tl.sum(tl.where((t == 0)[None, :], grads * decay, 0.0), 1)
            tl.store(carried + line * STATE + n, before, mask=n < STATE)

            through_b = tl.sum(grads * tile_b, 0)
            decayed = grads * (states - added)
            ddt = x * through_b + tl.sum(decayed * rate[:, None], 0)
            if SOFTPLUS:
                ddt = tl.where(raw > 20.0, ddt, ddt / (1.0 + tl.exp(-raw)))
            tl.store(du + row + places, dt * through_b + skip * dy, mask=live)
            tl.store(ddelta + row + places, ddt, mask=live)
            tl.store(dA + kept, tl.sum(decayed * dt[None, :], 1), mask=n < STATE)
            if bias is not None:
                tl.store(dbias + line * chunks + k, tl.sum(tl.where(live, ddt, 0.0), 0))
            if D is not None:
                tl.store(dD + line * chunks + k, tl.sum(dy * x, 0))
            if CONSTANT_B:
                tl.store(dB + kept, tl.sum(grads * (dt * x)[None, :], 1), mask=n < STATE)
            else:
                grad_b += grads * (dt * x)[None, :]
            if CONSTANT_C:
                tl.store(dC + kept, tl.sum(states * dy[None, :], 1), mask=n < STATE)
            else:
                grad_c += states * dy[None, :]
        offsets = (program * STATE + n[:, None]) * length + places[None, :]
        inside = (n < STATE)[:, None] & live[None, :]
        if not CONSTANT_B:
            tl.store(dB + offsets, grad_b, mask=inside)
        if not CONSTANT_C:
            tl.store(dC + offsets, grad_c, mask=inside)
        # What one thread carried, others read in the next chunk.
        tl.debug_barrier()


def _warps(block_n: int, reverse: bool) -> int:
    """Warps of a program; what is read backwards is turned round on its way, which takes registers too."""
    return max(8, _WARPS[block_n]) if reverse else _WARPS[block_n]


def _contiguous(inputs: Inputs) -> Inputs:
    return Inputs._make(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)


def _sizes(inputs: Inputs, kernel: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Run-time sizes and compile-time constants of a kernel."""
    per_b, per_c = (1 if matrix.dim() == 2 else inputs.dim // inputs.grouped(matrix).shape[1] for matrix in (inputs.B, inputs.C))
    block_n = width(inputs.state)
    constants = {
        "STATE": inputs.state,
        "BLOCK_N": block_n,
        "BLOCK_T": chunk("triton", inputs.state),
        "SOFTPLUS": inputs.delta_softplus,
        "REVERSE": inputs.reverse,
        "CONSTANT_B": inputs.B.dim() == 2,
        "CONSTANT_C": inputs.C.dim() == 2,
        **tiling("scan", kernel, inputs.u, block_n, {"num_warps": _warps(block_n, inputs.reverse), "num_stages": 1}),
    }
    return (inputs.dim, inputs.length, inputs.checkpoints_shape("triton")[2], per_b, per_c), constants


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(out in u's dtype, last state, states at the start of every chunk)."""
    u, delta, A, B, C, D, z, bias, initial_state, _, _, starts = inputs = _contiguous(inputs)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    checkpoints = torch.empty(inputs.checkpoints_shape("triton"), dtype=torch.float32, device=u.device)
    if out.numel() == 0:
        return out, inputs.first_state(), checkpoints
    last_state = checkpoints.new_empty(inputs.batch, inputs.dim, inputs.state)
    sizes, constants = _sizes(inputs, "forward")
    grid = (inputs.batch * inputs.dim,)
    with torch.cuda.device_of(u):
        forward_kernel[grid](u, delta, A, B, C, D, z, bias, initial_state, starts, out, last_state, checkpoints, *sizes, **constants)
    return out, last_state, checkpoints


def _channels_per_block(inputs: Inputs) -> int:
    """Channels of a backward program: as many as leave enough programs, within one group of B and of C."""
    shared = [inputs.dim // inputs.grouped(matrix).shape[1] for matrix in (inputs.B, inputs.C) if matrix.dim() > 2]
    within = math.gcd(*shared) if shared else inputs.dim
    wanted = max(1, inputs.batch * inputs.dim // _PROGRAMS)
    return max(size for size in range(1, within + 1) if within % size == 0 and size <= wanted)


def backward(inputs: Inputs, dout: Tensor, dlast_state: Tensor | None, checkpoints: Tensor) -> Gradients:
    """Gradients of every argument, partial sums in float32."""
    u, delta, A, B, C, D, z, bias, _, _, _, starts = inputs = _contiguous(inputs)
    lines = (inputs.batch, inputs.dim)
    carried = (torch.zeros_like(inputs.first_state()) if dlast_state is None else dlast_state.to(torch.float32, copy=True)).contiguous()
    du, ddelta = (torch.empty(u.shape, dtype=tensor.dtype, device=u.device) for tensor in (u, delta))
    dz = None if z is None else torch.empty(u.shape, dtype=z.dtype, device=u.device)
    sizes, constants = _sizes(inputs, "backward")
    chunks, per_block = sizes[2], _channels_per_block(inputs)
    blocks = inputs.dim // per_block

    def partial(matrix: Tensor) -> Tensor:
        return carried.new_empty((*lines, chunks, inputs.state) if matrix.dim() == 2 else (inputs.batch, blocks, inputs.state, inputs.length))

    dA, dB, dC = carried.new_empty(*lines, chunks, inputs.state), partial(B), partial(C)
    dD, dbias = (None if weight is None else carried.new_empty(*lines, chunks) for weight in (D, bias))
    if u.numel() > 0:
        gradients = (du, ddelta, dA, dB, dC, dD, dz, dbias, carried)
        with torch.cuda.device_of(u):
            backward_kernel[(inputs.batch * blocks,)](
                u, delta, A, B, C, D, z, bias, starts, checkpoints, dout.contiguous(), *gradients, *sizes, per_block, **constants
            )

    def whole(part: Tensor, matrix: Tensor) -> Tensor:
        if matrix.dim() == 2:
            return part.sum((0, 2))
        return part.unflatten(1, (inputs.grouped(matrix).shape[1], -1)).sum(2).view(matrix.shape)

    return Gradients(
        u=du,
        delta=ddelta,
        A=dA.sum((0, 2)),
        B=whole(dB, B),
        C=whole(dC, C),
        D=None if dD is None else dD.sum((0, 2)),
        z=dz,
        delta_bias=None if dbias is None else dbias.sum((0, 2)),
        initial_state=carried,
    )


def compile_cases() -> list[CompileCase]:
    """What the launcher can ask for: states of 16, 32 and 64, float32 and bfloat16, every argument and none, reversed, constant B and C."""
    cases = []
    for state in _WARPS:
        for variant in ("full-fp32", "full-bf16", "plain-fp32", "reverse-fp32", "constant-fp32", "packed-fp32"):
            full = not variant.startswith("plain")
            low = "*bf16" if variant.endswith("bf16") else "*fp32"
            optional = {"D": "*fp32", "z": low, "bias": "*fp32"}
            optional |= {"starts": "*u8"} if variant.startswith("packed") else {}
            common = {"u": low, "delta": low, "A": "*fp32", "B": low, "C": low, **(optional if full else {})}
            sizes = dict.fromkeys(("dim", "length", "chunks", "per_b", "per_c"), "i32")
            constants: dict[str, Any] = {
                **({} if full else dict.fromkeys(optional)),
                **({} if variant.startswith("packed") else {"starts": None}),
                "STATE": state,
                "BLOCK_N": width(state),
                "BLOCK_T": chunk("triton", state),
                "SOFTPLUS": full,
                "REVERSE": variant.startswith("reverse"),
                "CONSTANT_B": variant.startswith("constant"),
                "CONSTANT_C": variant.startswith("constant"),
            }
            kept = {"initial_state": "*fp32", "out": low, "last_state": "*fp32", "checkpoints": "*fp32"}
            gradients = {"dA": "*fp32", "dB": "*fp32", "dC": "*fp32", "carried": "*fp32", "du": low, "ddelta": low, "dout": low}
            gradients |= {"checkpoints": "*fp32", "per_block": "i32"}
            absent: dict[str, Any] = {} if full else {"dD": None, "dz": None, "dbias": None}
            gradients |= {"dD": "*fp32", "dz": low, "dbias": "*fp32"} if full else {}
            quick = state == 16 and variant == "full-bf16"
            options: dict[str, Any] = {"num_warps": _warps(width(state), variant.startswith("reverse")), "num_stages": 1, "quick": quick}
            for name, kernel, arguments, values in (
                ("forward", forward_kernel, kept, constants),
                ("backward", backward_kernel, gradients, constants | absent),
            ):
                cases.append(CompileCase(f"{name}-n{state}-{variant}", kernel, {**common, **arguments, **sizes}, values, **options))
    return cases


def tunables(*, toy: bool = False) -> list[Tunable]:
    """Warps of a program, by padded state: enough for the tile to stay in registers, few enough for many programs."""
    batch, dim, length = (1, 2, 9) if toy else (8, 256, 1024)
    found = []
    for dtype in (torch.float32,) if toy else (torch.float32, torch.bfloat16):
        for state in (16,) if toy else (16, 32, 64):

            def inputs(device: torch.device, dtype: torch.dtype = dtype, state: int = state) -> list[Tensor]:
                draw = torch.Generator().manual_seed(0)
                shapes = [(batch, dim, length)] * 3 + [(batch, state, length)] * 2
                low = [torch.randn(shape, generator=draw).to(dtype).to(device).requires_grad_() for shape in shapes]
                return [*low, (-torch.rand(dim, state, generator=draw)).to(device).requires_grad_()]

            tilings = [{"num_warps": warps} for warps in ((2, 8) if toy else (1, 2, 4, 8, 16))]
            found += [Tunable("scan", kernel, dtype, state, tilings, inputs, _run_sample) for kernel in ("forward", "backward")]
    return found


def _run_sample(tensors: Sequence[Tensor], backend: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    from foveal.kernels.scan.op import selective_scan

    u, delta, z, B, C, A = tensors
    # the definition step by step would take minutes at these lengths; the chunked torch form is held to it by the tests
    form = "torch" if backend == "reference" and u.shape[2] > 64 else backend
    out, _ = selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, return_last_state=True, backend=form)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out], torch.autograd.grad(out, list(tensors), weights)
