"""The public function `efficient_attention`: its arguments and their checks, and its registration with torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.efficient import cpu
from foveal.kernels.efficient.reference import efficient_attention_reference
from foveal.kernels.library import differentiate_twice, fold_into_batch, operator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def efficient_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch heads key dim"],
    v: Float[Tensor, "batch heads key value_dim"],
    *,
    mask: Bool[Tensor, "batch key"] | None = None,
    scale: float | None = None,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Tensor:
    r"""Efficient attention: linear in the lengths, each query a mixture of dim summaries of the values.

    .. math:: o_n = s\, \mathrm{softmax}_d(q_n)^\top \sum_m \mathrm{softmax}_m(k_m)\, v_m^\top

    The C form and the Triton kernels read q, k and v where they lie, softmaxes over the strided sequence axis included, and are made for a
    great many short sequences of narrow heads.

    Args:
        q: queries, (batch, heads, query, dim), softmaxed over dim.
        k: keys, (batch, heads, key, dim), softmaxed over the keys.
        v: values, (batch, heads, key, value_dim).
        mask: True where a key counts, (batch, key). Without any key that counts the output is 0.
        scale: s above; dim ** -0.5 by default.
        layout: "bhnd" as above, or "bnhd": q, k, v and the output have length before heads.
        backend: "triton", "cpu" (C) or "reference" (torch, on every device); by default the first that can.

    Returns:
        Output (batch, heads, query, value_dim) in v's dtype. Softmaxes and sums are float32 (float64 for float64 inputs); under autocast q, k
        and v are cast.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or `backend` cannot run the call.
        TypeError: q, k or v is not a floating-point tensor.

    References:
        Shen et al., Efficient Attention: Attention with Linear Complexities, WACV 2021, equation 5.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")
    if layout == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k, v = _prepare(q, k, v, mask)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    chosen = choose("efficient_attention", _candidates(q, k, v), backend)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out = efficient_attention_reference(q, k, v, mask, scale)
    else:
        out = efficient_forward(q, k, v, mask, scale, chosen)
    return out.transpose(1, 2) if layout == "bnhd" else out


#: Head and value dimensions whose summary of the values one program keeps in registers.
LARGEST_TRITON_DIM = 32


def _candidates(q: Tensor, k: Tensor, v: Tensor) -> Candidates:
    on_cpu = q.device.type == "cpu"
    c = cpu.why_not() if on_cpu else f"it needs tensors on the CPU, these are on {q.device.type}"
    triton = why_not_triton(q, k, v)
    if triton is None and max(q.shape[3], v.shape[3]) > LARGEST_TRITON_DIM:
        triton = f"it takes dims up to {LARGEST_TRITON_DIM}, these are {q.shape[3]} and {v.shape[3]}: wide heads are torch's products"
    return [("triton", triton), ("cpu", c), ("reference", None)]


def _public_candidates(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Candidates:
    if unknown := set(options) - {"mask", "scale", "layout"}:
        raise TypeError(f"efficient_attention has no argument {', '.join(map(repr, sorted(unknown)))}")
    if options.get("layout") == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return _candidates(*_prepare(q, k, v, options.get("mask")))


efficient_attention.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must have one batch, heads and dim; got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v must have one batch, heads and length; got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}")
    wanted = (k.shape[0], k.shape[2])
    if mask is not None and (mask.dtype != torch.bool or mask.shape != wanted):
        raise ValueError(f"mask must be bool of shape (batch, key) = {wanted}, True where a key counts; got {mask.dtype} {tuple(mask.shape)}")
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    devices = {t.device for t in (q, k, v, mask) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    return q, k, v


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call."""
    return importlib.import_module(f"foveal.kernels.efficient.{backend}")


@operator("foveal::efficient_attention_forward")
def efficient_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, backend: str) -> Tensor:
    """Output by one backend."""
    return _implementation(backend).forward(q, k, v, mask, scale)


def _ordered(tensor: Tensor, width: int) -> Tensor:
    return cpu.ordered_like(tensor, width, tensor.dtype)


@efficient_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return _ordered(q, v.shape[3])


@operator("foveal::efficient_attention_backward")
def efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes, by one backend."""
    dq, dk, dv = (gradient.to(q.dtype) for gradient in _implementation(backend).backward(dout, q, k, v, mask, scale))
    return dq, dk, dv


@efficient_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (_ordered(t, t.shape[3]) for t in (q, k, v))
    return dq, dk, dv


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    return (*efficient_backward(dout, *ctx.saved_tensors, *ctx.options), None, None, None)


efficient_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition."""
    dout, *inputs, mask = ctx.saved_tensors

    def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (efficient_attention_reference(q, k, v, mask, ctx.scale),)

    return (*differentiate_twice(definition, (dout,), inputs, second), None, None, None)


efficient_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


@efficient_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    (out,), (dim,) = fold_into_batch(lambda *a: (efficient_forward(*a),), info.batch_size, in_dims, arguments, whole=True)
    return out, dim


@efficient_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return fold_into_batch(efficient_backward, info.batch_size, in_dims, arguments, whole=True)
