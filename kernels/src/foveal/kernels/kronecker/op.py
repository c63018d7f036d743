"""The public function `kronecker_attention`: its arguments and their checks, and its registration with torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.kronecker.reference import kronecker_attention_reference
from foveal.kernels.library import differentiate_twice, fold_into_batch, operator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

#: Head and value dimensions whose rows the Triton kernels keep in registers.
LARGEST_TRITON_DIM = 64


def kronecker_attention(
    q: Float[Tensor, "batch heads query dim"],
    k1: Float[Tensor, "batch heads first dim"],
    k2: Float[Tensor, "batch heads second dim"],
    v1: Float[Tensor, "batch heads first value_dim"],
    v2: Float[Tensor, "batch heads second value_dim"],
    *,
    mask1: Bool[Tensor, "batch first"] | None = None,
    mask2: Bool[Tensor, "batch second"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exact three-way softmax attention: each query weighs pairs of keys and reads the elementwise product of their values.

    .. math:: o_i = \sum_{j, l} p_{ijl}\, v^1_j \odot v^2_l, \qquad p_{ijl} = \mathrm{softmax}_{(j, l)}\Big( s \sum_d q_{id} k^1_{jd} k^2_{ld} \Big)

    Time is query x first x second x dim, memory is linear in the lengths: tiles of triples are made and dropped, backward too.

    Args:
        q: queries, (batch, heads, query, dim).
        k1: first keys, (batch, heads, first, dim).
        k2: second keys, (batch, heads, second, dim).
        v1: values of the first keys, (batch, heads, first, value_dim).
        v2: values of the second keys, (batch, heads, second, value_dim).
        mask1: True where a first key counts, (batch, first).
        mask2: True where a second key counts, (batch, second).
        causal: query i sees first keys up to i + first - query and second keys up to i + second - query.
        scale: s above; dim ** -0.5 by default.
        return_lse: also return the log-sum-exp of the logits, (batch, heads, query); it is differentiable.
        layout: "bhnd" as above, or "bnhd": q, keys, values and the output have length before heads.
        backend: "triton", "torch" (tiled, on every device) or "reference" (all triples at once); by default the first that can
            (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, query, value_dim) in v1's dtype, 0 for a query that sees no pair (log-sum-exp -inf). Everything inside is
        float32 (float64 for float64 inputs); under autocast queries, keys and values are cast.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        TypeError: an argument is not a floating-point tensor.

    References:
        Alman and Song, How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation, 2023,
        definition 1.2.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")
    if layout == "bnhd":
        q, k1, k2, v1, v2 = (t.transpose(1, 2) for t in (q, k1, k2, v1, v2))
    q, k1, k2, v1, v2 = _prepare(q, k1, k2, v1, v2, mask1, mask2)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    chosen = choose("kronecker_attention", _candidates(q, k1, k2, v1, v2), backend)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, lse = kronecker_attention_reference(q, k1, k2, v1, v2, mask1, mask2, causal, scale)
    else:
        out, lse = kronecker_forward(q, k1, k2, v1, v2, mask1, mask2, causal, scale, chosen)
    out = out.transpose(1, 2) if layout == "bnhd" else out
    return (out, lse) if return_lse else out


def _candidates(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Candidates:
    triton = why_not_triton(q, k1, k2, v1, v2)
    if triton is None and max(q.shape[3], v1.shape[3]) > LARGEST_TRITON_DIM:
        triton = f"it takes dims up to {LARGEST_TRITON_DIM}, these are {q.shape[3]} and {v1.shape[3]}"
    c = "it has no C form: its tiles are matrix products, which torch does"
    return [("triton", triton), ("torch", None), ("reference", None), ("cpu", c)]


def _public_candidates(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, **options: Any) -> Candidates:
    if unknown := set(options) - {"mask1", "mask2", "causal", "scale", "return_lse", "layout"}:
        raise TypeError(f"kronecker_attention has no argument {', '.join(map(repr, sorted(unknown)))}")
    if options.get("layout") == "bnhd":
        q, k1, k2, v1, v2 = (t.transpose(1, 2) for t in (q, k1, k2, v1, v2))
    return _candidates(*_prepare(q, k1, k2, v1, v2, options.get("mask1"), options.get("mask2")))


kronecker_attention.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, mask1: Tensor | None, mask2: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
        if tensor.shape[:2] != q.shape[:2]:
            raise ValueError(f"{name} must have the batch and heads of q, {tuple(q.shape[:2])}; got {tuple(tensor.shape[:2])}")
    if not q.shape[3] == k1.shape[3] == k2.shape[3]:
        raise ValueError(f"q, k1 and k2 must have one dim; got {q.shape[3]}, {k1.shape[3]} and {k2.shape[3]}")
    if v1.shape[3] != v2.shape[3]:
        raise ValueError(f"v1 and v2 must have one value dim, they are multiplied; got {v1.shape[3]} and {v2.shape[3]}")
    for number, key, value, mask in ((1, k1, v1, mask1), (2, k2, v2, mask2)):
        if key.shape[2] != value.shape[2]:
            raise ValueError(f"k{number} and v{number} must have one length; got {key.shape[2]} and {value.shape[2]}")
        wanted = (q.shape[0], key.shape[2])
        if mask is not None and (mask.dtype != torch.bool or mask.shape != wanted):
            raise ValueError(f"mask{number} must be bool of shape (batch, length) = {wanted}; got {mask.dtype} {tuple(mask.shape)}")
    devices = {t.device for t in (*tensors.values(), mask1, mask2) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    cast = list(tensors.values())
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        cast = [t if t.dtype == torch.float64 else t.to(low) for t in cast]
    if len({t.dtype for t in cast}) > 1:
        raise ValueError(f"q, keys and values must have one dtype; got {', '.join(str(t.dtype) for t in cast)}")
    q, k1, k2, v1, v2 = cast
    return q, k1, k2, v1, v2


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call."""
    return importlib.import_module(f"foveal.kernels.kronecker.{'tiled' if backend == 'torch' else backend}")


@operator("foveal::kronecker_attention_forward")
def kronecker_forward(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by one backend."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(backend).forward(q, k1, k2, v1, v2, mask1, mask2, causal, scale)


@kronecker_forward.register_fake
def _(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return v1.new_empty(*q.shape[:3], v1.shape[3]), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@operator("foveal::kronecker_attention_backward")
def kronecker_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k1, k2, v1 and v2 in their dtypes, by one backend."""
    with torch.autocast(q.device.type, enabled=False):
        gradients = _implementation(backend).backward(dout, dlse, out, lse, q, k1, k2, v1, v2, mask1, mask2, causal, scale)
    dq, dk1, dk2, dv1, dv2 = (gradient.to(value.dtype) for gradient, value in zip(gradients, (q, k1, k2, v1, v2), strict=True))
    return dq, dk1, dk2, dv1, dv2


@kronecker_backward.register_fake
def _(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in arguments[:5])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(out)
    return (*kronecker_backward(dout, dlse, out, lse, *tensors, *ctx.options), None, None, None, None, None)


kronecker_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[4:11])
    ctx.options = inputs[11:13]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition: all triples. Output and log-sum-exp are functions of the inputs there."""
    dout, dlse, *inputs, mask1, mask2 = ctx.saved_tensors

    causal, scale = ctx.options

    def definition(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        return kronecker_attention_reference(q, k1, k2, v1, v2, mask1, mask2, causal, scale)

    gradients = differentiate_twice(definition, (dout, dlse), inputs, second)
    return (*gradients[:2], None, None, *gradients[2:], None, None, None, None, None)


kronecker_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


@kronecker_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_into_batch(kronecker_forward, info.batch_size, in_dims, arguments, whole=True)


@kronecker_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_into_batch(kronecker_backward, info.batch_size, in_dims, arguments, whole=True)
