"""The public function `selective_scan`: its arguments and their checks, and its registration with torch (fake, autograd, vmap)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, operator
from foveal.kernels.scan import cpu
from foveal.kernels.scan.inputs import Inputs
from foveal.kernels.scan.reference import selective_scan_reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int

#: Largest state that the Triton kernel keeps in registers.
LARGEST_TRITON_STATE = 64

_MODULES = {"triton": "triton", "cpu": "cpu", "torch": "chunked"}


def selective_scan(
    u: Float[Tensor, "batch dim length"],
    delta: Float[Tensor, "batch dim length"],
    A: Float[Tensor, "dim state"],
    B: Float[Tensor, "dim state"] | Float[Tensor, "batch state length"] | Float[Tensor, "batch groups state length"],
    C: Float[Tensor, "dim state"] | Float[Tensor, "batch state length"] | Float[Tensor, "batch groups state length"],
    D: Float[Tensor, " dim"] | None = None,
    z: Float[Tensor, "batch dim length"] | None = None,
    delta_bias: Float[Tensor, " dim"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    initial_state: Float[Tensor, "batch dim state"] | None = None,
    seq_idx: Int[Tensor, "batch length"] | None = None,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Selective state-space scan, with mamba-ssm's argument order and shapes and the gradient of every tensor.

    .. math:: h_t = \exp(\Delta_t A)\, h_{t-1} + \Delta_t B_t u_t, \quad y_t = C_t \cdot h_t + D u_t, \quad o_t = y_t\, \mathrm{silu}(z_t),
              \quad \Delta_t = \mathrm{softplus}(\delta_t + \beta)

    for each batch element and channel; softplus only where `delta_softplus`. States are float32, or float64 where an argument is, whatever
    the dtype of the inputs; they are kept every 64 steps and recomputed in the backward pass, which gives the same bits every time.

    Args:
        u: input, (batch, dim, length); any length from 0.
        delta: step sizes before bias and softplus, (batch, dim, length).
        A: real rates, (dim, state), negative for a state that forgets.
        B: how the input enters the state: (batch, state, length) for all channels, (batch, groups, state, length) for consecutive groups of
            dim / groups channels, or (dim, state) constant in time.
        C: how the state is read, in any of the shapes of B, not necessarily the same one.
        D: weight of the skip connection, (dim,).
        z: gate, (batch, dim, length): the output is multiplied by silu(z).
        delta_bias: added to delta before softplus, (dim,).
        delta_softplus: whether step sizes are softplus(delta + delta_bias).
        return_last_state: also return the state after the last step; it is differentiable.
        reverse: scan from the last position to the first, without flipping anything in memory; the last state is then the one after
            position 0, and `initial_state` comes before position length - 1.
        initial_state: state before the first step, (batch, dim, state); zeros by default. Feed the last state of one piece of a sequence
            to the next to scan it in pieces.
        seq_idx: which sequence each position belongs to, where several are packed one after the other: the state is forgotten wherever the
            number changes. `initial_state` belongs to the first sequence of the scan, the last state to the last one.
        cu_seqlens: the same as boundaries, [0, ..., length], shared by the batch: sequence i is positions cu_seqlens[i] to cu_seqlens[i + 1].
        backend: "triton", "cpu" (C), "torch" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, dim, length) in u's dtype and, if asked for, the last state (batch, dim, state) in float32 or float64. Under autocast
        u, B, C and z are cast; delta, A, D, delta_bias and the states are not.

    Raises:
        ValueError: a shape or device does not fit, or `backend` cannot run the call.
        TypeError: an argument is not a floating-point tensor.

    References:
        Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, equations 2 and 4, algorithm 2.
    """
    inputs = _prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, initial_state, seq_idx, cu_seqlens)
    chosen = choose("selective_scan", _candidates(inputs), backend)
    if chosen == "reference":
        wide = inputs.wide()
        out, last_state = _defined(wide)
        out = out.to(inputs.u.dtype)
    else:
        out, last_state, _ = selective_scan_forward(*inputs, chosen)
    return (out, last_state) if return_last_state else out


def _defined(wide: Inputs) -> tuple[Tensor, Tensor]:
    """Output and last state by the definition."""
    options = {"reverse": wide.reverse, "initial_state": wide.initial_state, "starts": wide.starts}
    return selective_scan_reference(*wide[:8], wide.delta_softplus, **options)  # type: ignore[arg-type]


def _candidates(inputs: Inputs) -> Candidates:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    triton = why_not_triton(*tensors)
    if triton is None and inputs.state > LARGEST_TRITON_STATE:
        triton = f"it keeps states of up to {LARGEST_TRITON_STATE} in registers, this one has {inputs.state}"
    on_cpu = inputs.u.device.type == "cpu"
    c = cpu.why_not() if on_cpu else f"it needs tensors on the CPU, these are on {inputs.u.device.type}"
    return [("triton", triton), ("cpu", c), ("torch", None), ("reference", None)]


def _public_candidates(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Candidates:
    return _candidates(_prepare(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, initial_state, seq_idx, cu_seqlens))


selective_scan.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Inputs:
    """Check the arguments and apply autocast."""
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
    for name, value in zip(Inputs._fields[:9], inputs, strict=False):
        if value is None and name in ("D", "z", "delta_bias", "initial_state"):
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {value.dtype if isinstance(value, Tensor) else type(value).__name__}")
        if value.device != u.device:
            raise ValueError(f"all tensors must be on one device; u is on {u.device}, {name} on {value.device}")
    if u.dim() != 3:
        raise ValueError(f"u must have shape (batch, dim, length); got {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[1] or A.shape[1] == 0:
        raise ValueError(f"A must have shape (dim, state) with dim = {u.shape[1]} as in u and state >= 1; got {tuple(A.shape)}")
    batch, dim, length = u.shape
    state = A.shape[1]
    expected: dict[str, tuple[int, ...]] = {
        "delta": (batch, dim, length),
        "D": (dim,),
        "z": (batch, dim, length),
        "delta_bias": (dim,),
        "initial_state": (batch, dim, state),
    }
    for name, shape in expected.items():
        value = getattr(inputs, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, from u {tuple(u.shape)} and A {tuple(A.shape)}; got {tuple(value.shape)}")
    for name, matrix in (("B", B), ("C", C)):
        groups = matrix.shape[1] if matrix.dim() == 4 else 1
        shapes = {2: (dim, state), 3: (batch, state, length), 4: (batch, groups, state, length)}
        if matrix.dim() not in shapes or matrix.shape != shapes[matrix.dim()]:
            raise ValueError(
                f"{name} must have shape (dim, state) = {shapes[2]}, (batch, state, length) = {shapes[3]} or (batch, groups, state, length); "
                f"got {tuple(matrix.shape)}"
            )
        if groups == 0 or dim % groups:
            raise ValueError(f"the groups of {name} must divide the {dim} channels of u; got {groups}")
    inputs = inputs._replace(starts=_starts(seq_idx, cu_seqlens, batch, length, reverse, u.device))
    if torch.is_autocast_enabled(u.device.type) and u.dtype != torch.float64:
        low = torch.get_autocast_dtype(u.device.type)
        inputs = inputs._replace(u=u.to(low), B=B.to(low), C=C.to(low), z=None if z is None else z.to(low))
    return inputs


def _starts(
    seq_idx: Tensor | None, cu_seqlens: Tensor | None, batch: int, length: int, reverse: bool, device: torch.device
) -> Int[Tensor, "batch length"] | None:
    """Where the sequence changes, seen along the scan."""
    if seq_idx is None and cu_seqlens is None:
        return None
    if seq_idx is not None and cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens say the same: give one of them")
    for name, value in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if value is None:
            continue
        if value.is_floating_point() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a tensor of integers; got {value.dtype}")
        if value.device != device:
            raise ValueError(f"all tensors must be on one device; u is on {device}, {name} on {value.device}")
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens must have shape (sequences + 1,); got {tuple(cu_seqlens.shape)}")
        if device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading the values would wait for the device
            first, last, falls = int(cu_seqlens[0]), int(cu_seqlens[-1]), bool((cu_seqlens.diff() < 0).any())
            if first != 0 or last != length or falls:
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the length {length}; got {first} to {last}{', falling in between' if falls else ''}"
                )
        seq_idx = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(length, device=device, dtype=cu_seqlens.dtype), right=True)
        seq_idx = seq_idx.expand(batch, length)
    assert seq_idx is not None
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx must have shape (batch, length) = {(batch, length)}; got {tuple(seq_idx.shape)}")
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.uint8)
    return torch.nn.functional.pad(changes, (0, 1) if reverse else (1, 0)) if length else changes.new_zeros(batch, 0)


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call: triton only where it runs."""
    return importlib.import_module(f"foveal.kernels.scan.{_MODULES[backend]}")


@operator("foveal::selective_scan_forward")
def selective_scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    starts: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and the states at the start of every chunk, by one backend."""
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, starts)
    with torch.autocast(u.device.type, enabled=False):
        return _implementation(backend).forward(inputs)


@selective_scan_forward.register_fake
def _(u: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = Inputs(u, *arguments[:-1])
    checkpoints = u.new_empty(inputs.checkpoints_shape(arguments[-1]), dtype=inputs.compute_dtype)
    return u.new_empty(u.shape), checkpoints.new_empty(inputs.batch, inputs.dim, inputs.state), checkpoints


@operator("foveal::selective_scan_backward")
def selective_scan_backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    checkpoints: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    starts: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the nine tensors in their dtypes, by one backend; that of an absent tensor is empty."""
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, starts)
    with torch.autocast(u.device.type, enabled=False):
        gradients = _implementation(backend).backward(inputs, dout, dlast_state, checkpoints)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = (
        u.new_empty(0) if value is None else gradient.to(value.dtype) for gradient, value in zip(gradients, tensors, strict=True)
    )
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


@selective_scan_backward.register_fake
def _(dout: Tensor, dlast_state: Tensor | None, checkpoints: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(checkpoints.new_empty(0, dtype=arguments[0].dtype) if value is None else value.new_empty(value.shape) for value in arguments[:9])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], inputs[11], output[2])
    ctx.delta_softplus, ctx.reverse, ctx.backend = inputs[9], inputs[10], inputs[12]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlast_state: Tensor | None, dcheckpoints: None) -> tuple[Any, ...]:
    *tensors, starts, checkpoints = ctx.saved_tensors
    if dout is None and dlast_state is None:
        return (None,) * 13
    if dout is None:
        dout = torch.zeros_like(tensors[0])
    gradients = selective_scan_backward(dout, dlast_state, checkpoints, *tensors, ctx.delta_softplus, ctx.reverse, starts, ctx.backend)
    return (*(None if value is None else gradient for gradient, value in zip(gradients, tensors, strict=True)), None, None, None, None)


selective_scan_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[3:12], inputs[14])
    ctx.delta_softplus, ctx.reverse = inputs[12:14]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition: it holds every state. The kept states are functions of the inputs there."""
    dout, dlast_state, *inputs, starts = ctx.saved_tensors

    def definition(*tensors: Any) -> tuple[Tensor, Tensor]:
        return _defined(Inputs._make([*tensors, ctx.delta_softplus, ctx.reverse, starts]).wide())

    gradients = differentiate_twice(definition, (dout, dlast_state), inputs, second)
    return (*gradients[:2], None, *gradients[2:], None, None, None, None)


selective_scan_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


def _one_by_one(mapped_operator: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Map by a loop, where a mapped weight or its gradient leaves nothing to fold."""
    mapped = [value if dim is None else value.movedim(dim, 0) for value, dim in zip(arguments, in_dims, strict=True)]
    each = [mapped_operator(*(v if dim is None else v[i] for v, dim in zip(mapped, in_dims, strict=True))) for i in range(info.batch_size)]
    return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * len(each[0])


@selective_scan_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Folded into the batch, unless a tensor that has no batch dimension is mapped."""
    names = dict(zip(Inputs._fields, zip(arguments, in_dims, strict=True), strict=False))

    def constant(name: str) -> bool:
        value, dim = names[name]
        return value.dim() - (dim is not None) == 2

    weights = [name for name in Inputs._fields[:9] if name in ("A", "D", "delta_bias") or (name in ("B", "C") and constant(name))]
    if any(names[name][1] is not None for name in weights):
        return _one_by_one(selective_scan_forward, info, in_dims, arguments)
    folded = list(arguments)
    for place, name in enumerate(Inputs._fields):
        value, dim = names[name]
        if isinstance(value, Tensor) and name not in weights:
            folded[place] = (value[None].expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)
    results = selective_scan_forward(*folded)
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0, 0)


@selective_scan_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """One by one: each mapped call has its own gradient of the weights."""
    return _one_by_one(selective_scan_backward, info, in_dims, arguments)
