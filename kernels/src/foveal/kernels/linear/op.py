"""The public functions `linear_attention` and `linear_attention_step`: their arguments and checks, and the registration with torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, fold_into_batch, operator
from foveal.kernels.linear import chunked, cpu
from foveal.kernels.linear.feature_maps import FeatureMap, feature_maps
from foveal.kernels.linear.packed import pack, places, unpack
from foveal.kernels.linear.reference import bidirectional_reference, linear_attention_reference

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

#: Largest head dimension of q and k that the Triton kernels take.
LARGEST_TRITON_DIM = 256


def linear_attention(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length value_dim"],
    *,
    decay: Float[Tensor, " heads"] | Float[Tensor, "batch heads length"] | Float[Tensor, "batch heads length dim"] | None = None,
    feature_map: str | FeatureMap | tuple[FeatureMap, FeatureMap] | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    causal: bool = True,
    reverse: bool = False,
    mask: Bool[Tensor, "batch length"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    cu_seqlens: Int[Tensor, " sequences+1"] | None = None,
    max_seqlen: int | None = None,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Linear attention with decay, in time linear in the length, with the gradient of every tensor.

    .. math:: S_t = e^{g_t} S_{t-1} + \phi(k_t) v_t^\top, \qquad o_t = s\, S_t^\top \phi(q_t), \qquad
              \text{normalised: } o_t = \frac{S_t^\top \phi(q_t)}{z_t \cdot \phi(q_t) + \epsilon},\ z_t = e^{g_t} z_{t-1} + \phi(k_t)

    States are float32 (float64 for float64 inputs) whatever the dtype of the inputs. No decay is ever divided by another: decays of any
    strength are exact. The backward pass gives the same bits every time.

    Args:
        q: queries, (batch, heads, length, dim).
        k: keys, (batch, heads, length, dim).
        v: values, (batch, heads, length, value_dim).
        decay: g above, the logarithm of what a step keeps of the state, <= 0 for a state that forgets: one number a head (Lightning
            Attention, RetNet), one a token and head (Mamba-2, gated RetNet), or one a token and channel of the keys (GLA, RWKV-6).
        feature_map: phi, one of "elu" (elu + 1), "relu", "relu^p" (p a number; the row keeps its norm), "exp", "softmax" (over dim),
            "hedgehog" (dim doubles), "norm_aware" (NaLaFormer; dim doubles), a function, or a pair of functions for q and k; none by default.
        normalize: divide by the sum of the weights. Meant for feature maps that are not negative. States then have value_dim + 1 columns,
            the last of which is z.
        eps: added to the sum of the weights.
        causal: token i sees tokens up to i. Otherwise it sees all: without decay that is one reduction of K^T V; with decay the weight of
            token j shrinks with the decays between i and j on either side (the sum of a scan in each direction, the token itself once).
        reverse: run from the last token to the first; `initial_state` then comes before the last token.
        mask: True where a key counts, (batch, length): padding. A token that does not count still decays the state.
        scale: s above; dim ** -0.5 (of q as given) by default. It cancels where normalised, up to eps.
        initial_state: state before the first token, (batch, heads, dim of phi(k), value_dim, or value_dim + 1 with `normalize`).
        output_final_state: also return the state after the last token: feed it to the next call, or to `linear_attention_step`.
        chunk_size: tokens that the chunked forms treat at once; results differ by rounding only.
        cu_seqlens: boundaries of sequences packed one after the other along the length, [0, ..., length]; batch must be 1. Each sequence
            has a state of its own: initial and final states are (sequences, heads, ...). Inside, sequences are padded to the longest.
        max_seqlen: length of the longest packed sequence; given, the call needs nothing from the device and compiles without a break.
        layout: "bhnd" as above, or "bnhd": q, k, v, decay and the output have length before heads.
        backend: "triton", "cpu" (C), "torch" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, length, value_dim) in v's dtype and, if asked for, the last state. Under autocast q, k and v are cast, decay
        and states are not.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or `backend` cannot run the call.
        TypeError: an argument is not a floating-point tensor.

    References:
        Katharopoulos et al., Transformers are RNNs, 2020. Qin et al., Lightning Attention-2, 2024. Yang et al., Gated Linear Attention
        Transformers with Hardware-Efficient Training, 2024.
    """
    swapped = _swapped(layout)
    q, k, v, decay = (None if t is None else t.transpose(1, 2) if swapped and t.dim() > 1 else t for t in (q, k, v, decay))  # type: ignore[assignment]
    _check(q, k, v, decay, mask, causal, reverse, chunk_size, initial_state, cu_seqlens)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    q, k, v = _cast(q, k, v)
    q, k, v = _mapped(q, k, v, feature_map, normalize)
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0)
    sequences, where = 0, None
    if cu_seqlens is not None:
        sequences, where = cu_seqlens.numel() - 1, places(cu_seqlens, q.shape[2], max_seqlen)
        q, k, v = (pack(t, where) for t in (q, k, v))
        if decay is not None:  # one a head becomes one a token: what pads a sequence must not decay its state
            decay = pack(decay[None, :, None].expand(1, -1, where[1].numel()) if decay.dim() == 1 else decay, where)
    _check_state(initial_state, (sequences or q.shape[0], q.shape[1], k.shape[3], v.shape[3]), normalize)
    decay = decay[None, :, None] if decay is not None and decay.dim() == 1 else decay
    chosen = choose("linear_attention", _candidates(q, k, v, decay, initial_state, causal), backend)
    with torch.autocast(q.device.type, enabled=False):
        if causal:
            out, state = _scan(q, k, v, decay, initial_state, scale, chunk_size, reverse, chosen)
        else:
            out, state = _both_ways(q, k, v, decay, initial_state, scale, chunk_size, chosen)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps * scale)
    if where is not None:
        out = unpack(out, where)
    out = out.transpose(1, 2) if swapped else out
    return (out, state) if output_final_state else out


def linear_attention_step(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch heads dim"],
    v: Float[Tensor, "batch heads value_dim"],
    state: Float[Tensor, "batch heads dim value_dim"],
    *,
    decay: Float[Tensor, " heads"] | Float[Tensor, "batch heads"] | Float[Tensor, "batch heads dim"] | None = None,
    feature_map: str | FeatureMap | tuple[FeatureMap, FeatureMap] | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of causal `linear_attention`, for decoding: (output, state after it). Arguments as there, without the length.

    Raises:
        ValueError: a shape does not fit; that of the state is (batch, heads, dim of phi(k), value_dim, or value_dim + 1 with `normalize`).
    """
    for name, tensor, shape in (("q", q, "dim"), ("k", k, "dim"), ("v", v, "value_dim")):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must have shape (batch, heads, {shape}), one token; got {got}")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q, k, v = _cast(q, k, v)
    q, k, v = _mapped(q, k, v, feature_map, normalize)
    _check_state(state, (*k.shape, v.shape[-1]), normalize)
    if decay is not None:
        kept = decay.to(state.dtype).exp()
        state = state * (kept[..., None] if decay.dim() == 3 else kept[..., None, None])
    state = state + k[..., None].to(state.dtype) * v[..., None, :].to(state.dtype)
    with torch.autocast(q.device.type, enabled=False):
        out = (scale * q[..., None, :].to(state.dtype) @ state).squeeze(-2)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps * scale)
    return out.to(v.dtype), state


# --- arguments -----------------------------------------------------------------------------------------------------------------------


def _swapped(layout: str) -> bool:
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")
    return layout == "bnhd"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    reverse: bool,
    chunk_size: int,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
    if k.shape != q.shape:
        raise ValueError(
            f"q and k must have one shape; got {tuple(q.shape)} and {tuple(k.shape)} (repeat the heads of k and v where heads share them)"
        )
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must have the batch, heads and length of q, {tuple(q.shape[:3])}; got {tuple(v.shape[:3])}")
    batch, heads, length, dim = q.shape
    if decay is not None:
        if not decay.is_floating_point():
            raise TypeError(f"decay must be a floating-point tensor, a logarithm; got {decay.dtype}")
        shapes = {1: (heads,), 3: (batch, heads, length), 4: (batch, heads, length, dim)}
        if decay.shape != shapes.get(decay.dim()):
            raise ValueError(f"decay must have shape {shapes[1]} (heads), {shapes[3]} or {shapes[4]} (with dim); got {tuple(decay.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
        raise ValueError(
            f"mask must be bool of shape (batch, length) = {(batch, length)}, True where a key counts; got {mask.dtype} {tuple(mask.shape)}"
        )
    if reverse and not causal:
        raise ValueError("reverse gives a causal scan its direction; with causal=False every token sees every other: leave one of them out")
    if not causal and decay is not None and initial_state is not None:
        raise ValueError("initial_state with decay needs causal=True: a scan in both directions has no first token")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"packed sequences (cu_seqlens) must come with batch 1; got {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
            raise ValueError(f"cu_seqlens must be integers [0, ..., length]; got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}")
    devices = {t.device for t in (q, k, v, decay, mask, initial_state) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")


def _check_state(state: Tensor | None, shape: tuple[int, ...], normalize: bool) -> None:
    if state is not None and state.shape != shape:
        why = ", value_dim + 1 with normalize" if normalize else ""
        raise ValueError(f"a state must have shape (batch, heads, dim, value_dim{why}) = {tuple(shape)}; got {tuple(state.shape)}")


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in autocast's dtype where it is on; they must have one dtype."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        tensors = tuple(t if t.dtype == torch.float64 else t.to(low) for t in tensors)
    if len({t.dtype for t in tensors}) > 1:
        raise ValueError(f"q, k and v must have one dtype; got {', '.join(str(t.dtype) for t in tensors)}")
    return tensors


def _mapped(q: Tensor, k: Tensor, v: Tensor, asked: Any, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Feature maps on q and k, a column of ones on v: the sum of the weights is the attention to a value of 1."""
    maps = feature_maps(asked)
    if maps is not None:
        q, k = maps[0](q).to(q.dtype), maps[1](k).to(k.dtype)
    return q, k, torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1) if normalize else v


def _candidates(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, causal: bool) -> Candidates:
    if not causal and decay is None:
        products = "attention to all without decay is two matrix products, which torch does on every device"
        return [("torch", None), ("reference", None), ("cpu", products), ("triton", products)]
    triton = why_not_triton(q, k, v, decay, initial_state)
    if triton is None and k.shape[3] > LARGEST_TRITON_DIM:
        triton = f"it takes head dimensions up to {LARGEST_TRITON_DIM}, this one is {k.shape[3]}"
    on_cpu = q.device.type == "cpu"
    c = cpu.why_not() if on_cpu else f"it needs tensors on the CPU, these are on {q.device.type}"
    return [("triton", triton), ("cpu", c), ("torch", None), ("reference", None)]


def _public_candidates(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Candidates:
    unknown = set(options) - set(linear_attention.__kwdefaults__ or {})
    if unknown:
        raise TypeError(f"linear_attention has no argument {', '.join(map(repr, sorted(unknown)))}")
    named = {**(linear_attention.__kwdefaults__ or {}), **options}
    if _swapped(named["layout"]):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    decay = (
        named["decay"].transpose(1, 2) if named["layout"] == "bnhd" and named["decay"] is not None and named["decay"].dim() > 1 else named["decay"]
    )
    _check(q, k, v, decay, *(named[name] for name in ("mask", "causal", "reverse", "chunk_size", "initial_state", "cu_seqlens")))
    q, k, v = _cast(q, k, v)
    q, k, v = _mapped(q, k, v, named["feature_map"], named["normalize"])
    return _candidates(q, k, v, decay, named["initial_state"], named["causal"])


linear_attention.candidates = _public_candidates  # type: ignore[attr-defined]


# --- the mathematics, one direction or both -------------------------------------------------------------------------------------------


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if reverse:
        q, k, v = (t.flip(2) for t in (q, k, v))
        decay = None if decay is None else decay.flip(2)
    if backend == "reference":
        out, state = linear_attention_reference(q, k, v, decay, initial_state, scale)
    elif backend == "torch":
        out, state = chunked.scan(q, k, v, decay, initial_state, scale, chunk_size)
        out = out.to(v.dtype)
    else:
        out, state = linear_attention_forward(q, k, v, decay, initial_state, scale, chunk_size, backend)
    return out.flip(2) if reverse else out, state


def _both_ways(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, scale: float, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Every token sees every other; the state is that after the last token of a forward scan."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if decay is None:
        state = k.to(wide).mT @ v.to(wide)
        if initial_state is not None:
            state = state + initial_state.to(wide)
        return (q.to(wide) @ (scale * state)).to(v.dtype), state
    if backend == "reference":
        return bidirectional_reference(q, k, v, decay, scale), linear_attention_reference(q, k, v, decay, None, scale)[1]
    out, state = _scan(q, k, v, decay, None, scale, chunk_size, False, backend)
    before, _ = _scan(q, k, v, decay, None, scale, chunk_size, True, backend)
    own = scale * (q.to(wide) * k.to(wide)).sum(-1, keepdim=True) * v
    return (out + before.to(wide) - own).to(v.dtype), state


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call: triton only where it runs."""
    return importlib.import_module(f"foveal.kernels.linear.{backend}")


@operator("foveal::linear_attention_forward")
def linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, scale: float, chunk_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and last state by one backend; decay is (1 or batch, heads, 1 or length), or with dim after that."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(backend).forward(q, k, v, decay, initial_state, scale, chunk_size)


def _state_like(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.promote_types(q.dtype, torch.float32))


@linear_attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state_like(q, v)


@operator("foveal::linear_attention_backward")
def linear_attention_backward(
    dout: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay and initial state in their dtypes, by one backend; that of an absent tensor is empty."""
    with torch.autocast(q.device.type, enabled=False):
        gradients = _implementation(backend).backward(dout, dfinal_state, q, k, v, decay, initial_state, scale, chunk_size)
    tensors = (q, k, v, decay, initial_state)
    dq, dk, dv, ddecay, dinitial = (
        q.new_empty(0) if value is None else gradient.to(value.dtype) for gradient, value in zip(gradients, tensors, strict=True)
    )
    return dq, dk, dv, ddecay, dinitial


@linear_attention_backward.register_fake
def _(dout: Tensor, dfinal_state: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(arguments[0].new_empty(0) if value is None else value.new_empty(value.shape) for value in arguments[:5])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dfinal_state: Tensor | None) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    if dout is None and dfinal_state is None:
        return (None,) * 8
    if dout is None:
        dout = torch.zeros_like(tensors[2])
    gradients = linear_attention_backward(dout, dfinal_state, *tensors, *ctx.options)
    return (*(None if value is None else gradient for gradient, value in zip(gradients, tensors, strict=True)), None, None, None)


linear_attention_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:9]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the chunked torch form."""
    dout, dfinal_state, *inputs = ctx.saved_tensors

    def definition(*tensors: Any) -> tuple[Tensor, Tensor]:
        return chunked.scan(*tensors, *ctx.options)

    return (*differentiate_twice(definition, (dout, dfinal_state), inputs, second), None, None, None)


linear_attention_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


@linear_attention_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_into_batch(linear_attention_forward, info.batch_size, in_dims, arguments)


@linear_attention_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """A decay that the batch shares gets a gradient for each mapped call: expanded before, summed after."""
    decay, dim = arguments[5], in_dims[5]
    batch = arguments[2].shape[0 if in_dims[2] is None else 1 if in_dims[2] == 0 else 0]
    shared = decay is not None and decay.shape[0 if dim is None else 1 if dim == 0 else 0] == 1 and batch != 1
    results, out_dims = fold_into_batch(linear_attention_backward, info.batch_size, in_dims, arguments, whole=True)
    if shared:
        results = (*results[:3], results[3].sum(1, keepdim=True), results[4])
    return results, out_dims
