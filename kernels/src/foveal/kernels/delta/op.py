"""The public functions of the delta rule and of Titans: arguments and checks, single steps for decoding, and the registration with torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.kernels.delta import chunked, cpu
from foveal.kernels.delta.reference import gated_delta_rule_reference, titans_reference
from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, fold_into_batch, operator
from foveal.kernels.linear.packed import pack, places, unpack

if TYPE_CHECKING:
    from jaxtyping import Float, Int

#: Largest head dimension, of all states together, and largest chunk whose products the Triton kernels keep in registers.
LARGEST_TRITON_DIM, LARGEST_TRITON_CHUNK = 128, 16


def gated_delta_rule(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    beta: Float[Tensor, "batch heads length"],
    g: Float[Tensor, "batch heads length"] | None = None,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    output_final_state: bool = False,
    chunk_size: int = 16,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    max_seqlen: int | None = None,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The gated delta rule: a linear-attention state that each token corrects towards its value, with the gradient of every tensor.

    .. math:: S_t = e^{g_t} S_{t-1} + \beta_t k_t (v_t - e^{g_t} S_{t-1}^\top k_t)^\top, \qquad o_t = s\, S_t^\top q_t

    With keys of norm 1 and beta from 0 to 1 a step moves what the state gives for k towards v by the part beta; with longer keys the
    recurrence grows without bound, as its formula does. States are float32 (float64 for float64 inputs). The backward pass gives the same
    bits every time.

    Args:
        q: queries, (batch, heads, length, dim).
        k: keys, (batch, heads, length, dim).
        v: values, (batch, heads, length, value_dim).
        beta: how far a step corrects, (batch, heads, length).
        g: logarithm of what a step keeps of the state, <= 0, (batch, heads, length); without it nothing is forgotten (`delta_rule`).
        scale: s above; dim ** -0.5 by default.
        normalize_qk: give queries and keys norm 1 first.
        initial_state: state before the first token, (batch, heads, dim, value_dim).
        output_final_state: also return the state after the last token: feed it to the next call, or to `gated_delta_rule_step`.
        chunk_size: tokens that the chunked form treats at once; results differ by rounding only.
        cu_seqlens: boundaries of sequences packed along the length, [0, ..., length]; batch must be 1, states are (sequences, heads, ...).
        max_seqlen: length of the longest packed sequence; given, the call needs nothing from the device.
        layout: "bhnd" as above, or "bnhd": q, k, v, beta, g and the output have length before heads.
        backend: "triton", "cpu" (C), "torch" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, length, value_dim) in v's dtype and, if asked for, the last state. Under autocast q, k and v are cast, beta, g
        and states are not.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or `backend` cannot run the call.
        TypeError: an argument is not a floating-point tensor.

    References:
        Schlag et al., Linear Transformers Are Secretly Fast Weight Programmers, 2021. Yang et al., Parallelizing Linear Transformers with the
        Delta Rule over Sequence Length, 2024; Gated Delta Networks, 2024, equation 10.
    """
    swapped = _swapped(layout)
    if swapped:
        q, k, v, beta = (t.transpose(1, 2) for t in (q, k, v, beta))
        g = None if g is None else g.transpose(1, 2)
    rates = {"beta": beta} if g is None else {"beta": beta, "g": g}
    _check(q, k, v, rates, chunk_size)
    q, k, v = _cast(q, k, v, normalize_qk)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    sequences, where = 0, None
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"packed sequences (cu_seqlens) must come with batch 1; got {q.shape[0]}")
        sequences, where = cu_seqlens.numel() - 1, places(cu_seqlens, q.shape[2], max_seqlen)
        q, k, v, beta = (pack(t, where) for t in (q, k, v, beta))
        g = None if g is None else pack(g, where)
    _check_state("initial_state", initial_state, (sequences or q.shape[0], q.shape[1], q.shape[3], v.shape[3]))
    chosen = choose("gated_delta_rule", _candidates(q, k, v, beta, g, initial_state, chunk_size), backend)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            out, state = gated_delta_rule_reference(q, k, v, beta, g, initial_state, scale)
        elif chosen == "torch":
            out, state = chunked.gated_delta_rule(q, k, v, beta, g, initial_state, scale, chunk_size)
        elif chosen == "triton":
            out, state = chunked.gated_delta_rule(q, k, v, beta, g, initial_state, scale, chunk_size, _walk_in_triton)
        else:
            out, state, _ = delta_rule_forward(q, k, v, beta, g, initial_state, scale, chosen)
    out = out if where is None else unpack(out, where)
    out = out.transpose(1, 2) if swapped else out
    return (out, state) if output_final_state else out


def delta_rule(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    beta: Float[Tensor, "batch heads length"],
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gated_delta_rule` without a gate: nothing is forgotten but what a correction overwrites.

    Shapes, the keyword options, results, errors and references are as there.
    """
    return gated_delta_rule(q, k, v, beta, None, **options)


def titans(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    theta: Float[Tensor, "batch heads length"],
    alpha: Float[Tensor, "batch heads length"],
    eta: Float[Tensor, "batch heads length"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    initial_state: tuple[Float[Tensor, "batch heads dim value_dim"], Float[Tensor, "batch heads dim value_dim"]] | None = None,
    output_final_state: bool = False,
    chunk_size: int = 16,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""The neural memory of Titans with a linear memory: gradient descent with momentum and weight decay, one step a token.

    .. math:: P_t = \eta_t P_{t-1} + \theta_t k_t (v_t - M_{t-1}^\top k_t)^\top, \qquad M_t = (1 - \alpha_t) M_{t-1} + P_t, \qquad
              o_t = s\, M_t^\top q_t

    Exact at every token: the chunked form solves for all errors of a chunk, it does not hold the gradient fixed in it as the paper's
    parallel form does. With alpha and eta zero this is the delta rule with beta = theta.

    Args:
        q: queries, (batch, heads, length, dim).
        k: keys, (batch, heads, length, dim).
        v: values, (batch, heads, length, value_dim).
        theta: learning rate of each token, (batch, heads, length).
        alpha: what each token forgets of the memory, 0 to 1, (batch, heads, length).
        eta: what each token keeps of the momentum, 0 to 1, (batch, heads, length).
        scale: s above; dim ** -0.5 by default.
        normalize_qk: give queries and keys norm 1 first.
        initial_state: (memory, momentum) before the first token, each (batch, heads, dim, value_dim).
        output_final_state: also return (memory, momentum) after the last token: feed it to the next call, or to `titans_step`.
        chunk_size: tokens that the chunked form treats at once; results differ by rounding only.
        layout: "bhnd" as above, or "bnhd": all tensors but states have length before heads.
        backend: "triton", "torch" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why). The Triton form
            has no second gradients.

    Returns:
        Output (batch, heads, length, value_dim) in v's dtype and, if asked for, (memory, momentum) in float32 or float64.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or `backend` cannot run the call.
        TypeError: an argument is not a floating-point tensor.

    References:
        Behrouz, Zhong, Mirrokni, Titans: Learning to Memorize at Test Time, 2024, equations 11 to 14.
    """
    if _swapped(layout):
        q, k, v, theta, alpha, eta = (t.transpose(1, 2) for t in (q, k, v, theta, alpha, eta))
    _check(q, k, v, {"theta": theta, "alpha": alpha, "eta": eta}, chunk_size)
    q, k, v = _cast(q, k, v, normalize_qk)
    for name, state in zip(("memory", "momentum"), initial_state or (None, None), strict=True):
        _check_state(name, state, (*q.shape[:2], q.shape[3], v.shape[3]))
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    chosen = choose("titans", _titans_candidates(q, k, v, theta, alpha, eta, initial_state, chunk_size), backend)
    with torch.autocast(q.device.type, enabled=False):
        if chosen == "reference":
            out, states = titans_reference(q, k, v, theta, alpha, eta, initial_state, scale)
        else:
            walk = _walk_in_triton if chosen == "triton" else chunked.walk
            out, states = chunked.titans(q, k, v, theta, alpha, eta, initial_state, scale, chunk_size, walk)
    out = out.transpose(1, 2) if layout == "bnhd" else out
    return (out, states) if output_final_state else out


def gated_delta_rule_step(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch heads dim"],
    v: Float[Tensor, "batch heads value_dim"],
    beta: Float[Tensor, "batch heads"],
    g: Float[Tensor, "batch heads"] | None,
    state: Float[Tensor, "batch heads dim value_dim"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`, for decoding. Arguments as there, without the length.

    Returns:
        Output (batch, heads, value_dim) in v's dtype, and the state after the token.

    Raises:
        ValueError: a shape, dtype or device does not fit; that of the state is (batch, heads, dim, value_dim).
        TypeError: an argument is not a floating-point tensor.
    """
    q, k, v, rates = _one_token(q, k, v, {"beta": beta, **({} if g is None else {"g": g})})
    _check_state("state", state, (*k.shape[:2], k.shape[3], v.shape[3]))
    q, k, v = _cast(q, k, v, normalize_qk)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    with torch.autocast(q.device.type, enabled=False):
        out, state = gated_delta_rule_reference(q, k, v, rates["beta"], rates.get("g"), state, scale)
    return out[:, :, 0], state


def delta_rule_step(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch heads dim"],
    v: Float[Tensor, "batch heads value_dim"],
    beta: Float[Tensor, "batch heads"],
    state: Float[Tensor, "batch heads dim value_dim"],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`, for decoding: `gated_delta_rule_step` without a gate, with its results and errors."""
    return gated_delta_rule_step(q, k, v, beta, None, state, scale=scale, normalize_qk=normalize_qk)


def titans_step(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch heads dim"],
    v: Float[Tensor, "batch heads value_dim"],
    theta: Float[Tensor, "batch heads"],
    alpha: Float[Tensor, "batch heads"],
    eta: Float[Tensor, "batch heads"],
    state: tuple[Tensor, Tensor],
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One token of `titans`, for decoding. Arguments as there, without the length; `state` is (memory, momentum).

    Returns:
        Output (batch, heads, value_dim) in v's dtype, and (memory, momentum) after the token.

    Raises:
        ValueError: a shape, dtype or device does not fit; memory and momentum are (batch, heads, dim, value_dim).
        TypeError: an argument is not a floating-point tensor.
    """
    q, k, v, rates = _one_token(q, k, v, {"theta": theta, "alpha": alpha, "eta": eta})
    for name, part in zip(("memory", "momentum"), state, strict=True):
        _check_state(name, part, (*k.shape[:2], k.shape[3], v.shape[3]))
    q, k, v = _cast(q, k, v, normalize_qk)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    with torch.autocast(q.device.type, enabled=False):
        out, state = titans_reference(q, k, v, rates["theta"], rates["alpha"], rates["eta"], state, scale)
    return out[:, :, 0], state


# --- arguments -----------------------------------------------------------------------------------------------------------------------


def _swapped(layout: str) -> bool:
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")
    return layout == "bnhd"


def _check(q: Tensor, k: Tensor, v: Tensor, rates: dict[str, Tensor], chunk_size: int) -> None:
    for name, tensor in {"q": q, "k": k, "v": v, **rates}.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if name in "qkv" and tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"q and k must have one shape; got {tuple(q.shape)} and {tuple(k.shape)} (repeat the heads where heads share them)")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have the batch, heads and length of q, {tuple(q.shape[:3])}; got {tuple(v.shape[:3])}")
    for name, tensor in rates.items():
        if tensor.shape != q.shape[:3]:
            raise ValueError(f"{name} must have shape (batch, heads, length) = {tuple(q.shape[:3])}; got {tuple(tensor.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    devices = {t.device for t in (q, k, v, *rates.values())}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")


def _one_token(q: Tensor, k: Tensor, v: Tensor, rates: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Checked, with a length of 1."""
    for name, tensor, shape in (("q", q, "dim"), ("k", k, "dim"), ("v", v, "value_dim")):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must have shape (batch, heads, {shape}), one token; got {got}")
    q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]
    rates = {name: rate[..., None] for name, rate in rates.items()}
    _check(q, k, v, rates, 1)
    return q, k, v, rates


def _check_state(name: str, state: Tensor | None, shape: tuple[int, ...]) -> None:
    if state is not None and state.shape != shape:
        raise ValueError(f"{name} must have shape (batch, heads, dim, value_dim) = {tuple(shape)}; got {tuple(state.shape)}")


def _cast(q: Tensor, k: Tensor, v: Tensor, normalize_qk: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype where it is on, queries and keys of norm 1 where asked for."""
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    return (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v) if normalize_qk else (q, k, v)


def _why_no_walk_in_triton(parts: int, chunk_size: int, q: Tensor, *tensors: Tensor | None) -> str | None:
    """Reason why the kernel that walks from chunk to chunk with `parts` states cannot take the call, or None."""
    reason = why_not_triton(q, *tensors)
    if reason is None and parts * q.shape[3] > LARGEST_TRITON_DIM:
        reason = f"it takes head dimensions up to {LARGEST_TRITON_DIM // parts}, this one is {q.shape[3]}"
    if reason is None and chunk_size > LARGEST_TRITON_CHUNK:
        reason = f"it takes chunks of up to {LARGEST_TRITON_CHUNK} tokens, these are of {chunk_size}"
    return reason


def _candidates(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, chunk_size: int) -> Candidates:
    on_cpu = q.device.type == "cpu"
    c = cpu.why_not() if on_cpu else f"it needs tensors on the CPU, these are on {q.device.type}"
    triton = _why_no_walk_in_triton(1, chunk_size, q, k, v, beta, g, initial_state)
    return [("triton", triton), ("cpu", c), ("torch", None), ("reference", None)]


def _titans_candidates(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor, states: tuple[Tensor, Tensor] | None, chunk_size: int
) -> Candidates:
    return [
        ("triton", _why_no_walk_in_triton(2, chunk_size, q, k, v, theta, alpha, eta, *(states or ()))),
        ("torch", None),
        ("reference", None),
        ("cpu", "it has no C form: its chunks are matrix products, which torch does"),
    ]


def _delta_candidates(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, layout: str = "bhnd", **options: Any) -> Candidates:
    known = {"scale", "normalize_qk", "initial_state", "output_final_state", "chunk_size", "cu_seqlens", "max_seqlen"}
    if unknown := set(options) - known:
        raise TypeError(f"gated_delta_rule has no argument {', '.join(map(repr, sorted(unknown)))}")
    if _swapped(layout):
        q, k, v, beta = (t.transpose(1, 2) for t in (q, k, v, beta))
        g = None if g is None else g.transpose(1, 2)
    _check(q, k, v, {"beta": beta, **({} if g is None else {"g": g})}, options.get("chunk_size", 16))
    return _candidates(q, k, v, beta, g, options.get("initial_state"), options.get("chunk_size", 16))


gated_delta_rule.candidates = _delta_candidates  # type: ignore[attr-defined]
delta_rule.candidates = _delta_candidates  # type: ignore[attr-defined]


def _public_titans_candidates(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, alpha: Tensor, eta: Tensor, **options: Any) -> Candidates:
    known = {"scale", "normalize_qk", "initial_state", "output_final_state", "chunk_size", "layout"}
    if unknown := set(options) - known:
        raise TypeError(f"titans has no argument {', '.join(map(repr, sorted(unknown)))}")
    if _swapped(options.get("layout", "bhnd")):
        q, k, v, theta, alpha, eta = (t.transpose(1, 2) for t in (q, k, v, theta, alpha, eta))
    _check(q, k, v, {"theta": theta, "alpha": alpha, "eta": eta}, options.get("chunk_size", 16))
    return _titans_candidates(q, k, v, theta, alpha, eta, options.get("initial_state"), options.get("chunk_size", 16))


titans.candidates = _public_titans_candidates  # type: ignore[attr-defined]


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call."""
    return importlib.import_module(f"foveal.kernels.delta.{backend}")


@operator("foveal::delta_rule_forward")
def delta_rule_forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and the errors of the predictions, by one backend."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(backend).forward(q, k, v, beta, g, initial_state, scale)


@delta_rule_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape), q.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide), v.new_empty(v.shape, dtype=wide)


@operator("foveal::delta_rule_backward")
def delta_rule_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    errors: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, g and initial state in their dtypes, by one backend; that of an absent tensor is empty."""
    with torch.autocast(q.device.type, enabled=False):
        gradients = _implementation(backend).backward(dout, dfinal_state, errors, q, k, v, beta, g, initial_state, scale)
    tensors = (q, k, v, beta, g, initial_state)
    dq, dk, dv, dbeta, dg, dinitial = (
        q.new_empty(0) if value is None else gradient.to(value.dtype) for gradient, value in zip(gradients, tensors, strict=True)
    )
    return dq, dk, dv, dbeta, dg, dinitial


@delta_rule_backward.register_fake
def _(dout: Tensor, dfinal_state: Tensor | None, errors: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(arguments[0].new_empty(0) if value is None else value.new_empty(value.shape) for value in arguments[:6])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None, derrors: None) -> tuple[Any, ...]:
    *tensors, errors = ctx.saved_tensors
    if dout is None and dfinal_state is None:
        return (None,) * 8
    if dout is None:
        dout = torch.zeros_like(tensors[2])
    gradients = delta_rule_backward(dout, dfinal_state, errors, *tensors, *ctx.options)
    return (*(None if value is None else gradient for gradient, value in zip(gradients, tensors, strict=True)), None, None)


delta_rule_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[3:9])
    ctx.scale = inputs[9]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the chunked torch form. The errors are functions of the inputs there."""
    dout, dfinal_state, *inputs = ctx.saved_tensors

    def definition(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
        return chunked.gated_delta_rule(q, k, v, beta, g, initial_state, ctx.scale, 16)

    gradients = differentiate_twice(definition, (dout, dfinal_state), inputs, second)
    return (*gradients[:2], None, *gradients[2:], None, None)


delta_rule_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


@delta_rule_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_into_batch(delta_rule_forward, info.batch_size, in_dims, arguments, whole=True)


@delta_rule_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_into_batch(delta_rule_backward, info.batch_size, in_dims, arguments, whole=True)


# --- from chunk to chunk in Triton ----------------------------------------------------------------------------------------------------


@operator("foveal::delta_walk_forward")
def delta_walk_forward(
    from_values: Tensor, from_state: Tensor, seen: Tensor, query_in: Tensor, key_out: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunked.walk` by the Triton kernel: outputs, last state, errors, states entering each chunk; float32."""
    return _implementation("triton").walk_forward(from_values, from_state, seen, query_in, key_out, kept, state)


@delta_walk_forward.register_fake
def _(from_values: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state = others[-1]
    entering = state.new_empty(*from_values.shape[:3], *state.shape[2:])
    return from_values.new_empty(from_values.shape), state.new_empty(state.shape), from_values.new_empty(from_values.shape), entering


@operator("foveal::delta_walk_backward")
def delta_walk_backward(
    dout: Tensor,
    dlast: Tensor,
    errors: Tensor,
    entering: Tensor,
    from_state: Tensor,
    seen: Tensor,
    query_in: Tensor,
    key_out: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the arguments of `delta_walk_forward`: a walk back by the Triton kernel, then products of all chunks at once."""
    derrors, dleaving, dstate = _implementation("triton").walk_backward(dout, dlast, from_state, seen, query_in, key_out, kept)
    left, came = (t.unflatten(3, (kept.shape[-1], -1)).flatten(4) for t in (dleaving, entering))  # (..., parts, rows and values of a part)
    return (
        derrors,
        -derrors @ entering.mT,
        dout @ errors.mT,
        dout @ entering.mT,
        errors @ dleaving.mT,
        left @ came.mT,
        dstate,
    )


@delta_walk_backward.register_fake
def _(dout: Tensor, dlast: Tensor, errors: Tensor, entering: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return (dout.new_empty(errors.shape), *(t.new_empty(t.shape) for t in others), dlast.new_empty(dlast.shape))


def _remember_walk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:], *inputs[1:6])


def _differentiate_walk(ctx: Any, dout: Tensor, dlast: Tensor, *unused: Any) -> tuple[Any, ...]:
    return tuple(delta_walk_backward(dout, dlast, *ctx.saved_tensors))


delta_walk_forward.register_autograd(_differentiate_walk, setup_context=_remember_walk)


def _walk_in_triton(
    from_values: Tensor, from_state: Tensor, seen: Tensor, query_in: Tensor, key_out: Tensor, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    out, last, _, _ = delta_walk_forward(from_values, from_state, seen, query_in, key_out, kept, state)
    return out, last
