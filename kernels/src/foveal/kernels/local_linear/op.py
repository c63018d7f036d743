"""The public function `local_linear_attention`: its arguments and their checks, and its registration with torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, fold_into_batch, operator
from foveal.kernels.local_linear.reference import local_linear_attention_reference

if TYPE_CHECKING:
    from jaxtyping import Float

#: Head and value dimensions whose tiles the Triton kernels keep in registers.
LARGEST_TRITON_DIM = 64


def local_linear_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch heads key dim"],
    v: Float[Tensor, "batch heads key value_dim"],
    *,
    ridge: float | Float[Tensor, " heads"],
    causal: bool = True,
    scale: float | None = None,
    cg_iters: int = 16,
    tol: float = 1e-6,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Tensor:
    r"""Local linear attention: the value at each query of a linear function fitted to the values around it, weighted by the softmax.

    .. math:: o_i = \frac{\sum_j p_{ij} (1 - d_{ij} \cdot \rho_i) v_j}{1 - \mu_i \cdot \rho_i}, \quad d_{ij} = k_j - q_i, \quad
              \mu_i = \sum_j p_{ij} d_{ij}, \quad \rho_i = \Big(\sum_j p_{ij} d_{ij} d_{ij}^\top + \lambda I\Big)^{-1} \mu_i

    with p the softmax of s q k^T. Softmax attention is the fit of a constant, which a large ridge gives back. The weights sum to 1, so the
    ridge is relative to their sum: a paper's absolute ridge is this one times the sum of the exponentials.

    Args:
        q: queries, (batch, heads, query, dim): the points at which the fit is read, in the space of the keys.
        k: keys, (batch, heads, key, dim).
        v: values, (batch, heads, key, value_dim).
        ridge: lambda above, > 0: one number, or one a head (heads,), which then gets a gradient.
        causal: query i sees keys up to i + key - query (the last query sees the last key).
        scale: s above; dim ** -0.5 by default.
        cg_iters: most iterations of conjugate gradients; dim of them are exact up to rounding, and fewer do for keys that
            lie together or a larger ridge; 16 leave 2e-3 of the output's norm at dim 32 for standard normal keys and a ridge of 0.1.
        tol: a query is solved when its residual is this part of its right side.
        layout: "bhnd" as above, or "bnhd": q, k, v and the output have length before heads.
        backend: "triton" or "torch" (tiles of queries, conjugate gradients), or "reference" (direct solves); by default the first that can
            (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, query, value_dim) in v's dtype; 0 for a query that sees no key. Gradients are those of the exact solve: the
        backward pass solves once more. Everything inside is float32 (float64 for float64 inputs); under autocast q, k and v are cast.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        TypeError: an argument is not a floating-point tensor.

    References:
        Zuo et al., Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention for Test-Time Regression, 2025.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")
    if layout == "bnhd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k, v, ridge = _prepare(q, k, v, ridge, cg_iters, tol)
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    chosen = choose("local_linear_attention", _candidates(q, k, v, ridge), backend)
    if chosen == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out = local_linear_attention_reference(q, k, v, ridge, causal, scale)
    else:
        out, _ = local_linear_forward(q, k, v, ridge, causal, scale, cg_iters, tol, chosen)
    return out.transpose(1, 2) if layout == "bnhd" else out


def _candidates(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> Candidates:
    triton = why_not_triton(q, k, v, ridge)
    if triton is None and max(q.shape[3], v.shape[3]) > LARGEST_TRITON_DIM:
        triton = f"it takes dims up to {LARGEST_TRITON_DIM}, these are {q.shape[3]} and {v.shape[3]}"
    c = "it has no C form: its iterations are matrix products, which torch does"
    return [("triton", triton), ("torch", None), ("reference", None), ("cpu", c)]


def _public_candidates(q: Tensor, k: Tensor, v: Tensor, *, ridge: float | Tensor, **options: Any) -> Candidates:
    if unknown := set(options) - {"causal", "scale", "cg_iters", "tol", "layout"}:
        raise TypeError(f"local_linear_attention has no argument {', '.join(map(repr, sorted(unknown)))}")
    if options.get("layout") == "bnhd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _candidates(*_prepare(q, k, v, ridge, options.get("cg_iters", 16), options.get("tol", 1e-6)))


local_linear_attention.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(q: Tensor, k: Tensor, v: Tensor, ridge: float | Tensor, cg_iters: int, tol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must have one batch, heads and dim; got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k and v must have one batch, heads and length; got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}")
    if cg_iters < 1 or tol < 0:
        raise ValueError(f"cg_iters must be at least 1 and tol at least 0; got {cg_iters} and {tol}")
    if not isinstance(ridge, Tensor):
        if ridge <= 0:
            raise ValueError(f"ridge must be > 0, or a query that sees one key has no solution; got {ridge}")
        ridge = torch.full((q.shape[1],), float(ridge), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if ridge.shape != (q.shape[1],) or not ridge.is_floating_point():
        raise ValueError(f"ridge must be a number or a floating-point tensor (heads,) = ({q.shape[1]},); got {ridge.dtype} {tuple(ridge.shape)}")
    if torch.is_autocast_enabled(q.device.type):
        low = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    devices = {t.device for t in (q, k, v, ridge)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    return q, k, v, ridge


# --- registration --------------------------------------------------------------------------------------------------------------------


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call."""
    return importlib.import_module(f"foveal.kernels.local_linear.{'tiled' if backend == 'torch' else backend}")


@operator("foveal::local_linear_forward")
def local_linear_forward(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, causal: bool, scale: float, iterations: int, tolerance: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and the slope of every query's fit, by one backend."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(backend).forward(q, k, v, ridge, causal, scale, iterations, tolerance)


@local_linear_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))


@operator("foveal::local_linear_backward")
def local_linear_backward(
    dout: Tensor,
    slopes: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: Tensor,
    causal: bool,
    scale: float,
    iterations: int,
    tolerance: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and ridge in their dtypes, by one backend."""
    with torch.autocast(q.device.type, enabled=False):
        gradients = _implementation(backend).backward(dout, slopes, q, k, v, ridge, causal, scale, iterations, tolerance)
    dq, dk, dv, dridge = (gradient.to(value.dtype) for gradient, value in zip(gradients, (q, k, v, ridge), strict=True))
    return dq, dk, dv, dridge


@local_linear_backward.register_fake
def _(dout: Tensor, slopes: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(value.new_empty(value.shape) for value in arguments[:4])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, dslopes: Any) -> tuple[Any, ...]:
    *tensors, slopes = ctx.saved_tensors
    return (*local_linear_backward(dout, slopes, *tensors, *ctx.options), None, None, None, None, None)


local_linear_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *inputs[2:6])
    ctx.options = inputs[6:8]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition: it holds (query, key, dim) and (query, dim, dim) arrays."""
    dout, *inputs = ctx.saved_tensors

    def definition(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> tuple[Tensor]:
        return (local_linear_attention_reference(q, k, v, ridge, *ctx.options),)

    found = differentiate_twice(definition, (dout,), inputs, second)
    return (found[0], None, *found[1:], None, None, None, None, None)


local_linear_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


def _mapped(mapped: Any, ridge: int) -> Any:
    """A vmap rule: folded into the batch, or one by one where the ridge, which has no batch, is mapped or gets a gradient."""

    def rule(info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...], one_by_one: bool) -> tuple[Any, Any]:
        if not one_by_one and in_dims[ridge] is None:
            kept = arguments[ridge]

            def call(*folded: Any) -> Any:
                return mapped(*folded[:ridge], kept, *folded[ridge:])

            others = [*arguments[:ridge], *arguments[ridge + 1 :]], [*in_dims[:ridge], *in_dims[ridge + 1 :]]
            return fold_into_batch(call, info.batch_size, tuple(others[1]), tuple(others[0]))
        moved = [value if dim is None else value.movedim(dim, 0) for value, dim in zip(arguments, in_dims, strict=True)]
        each = [mapped(*(v if dim is None else v[i] for v, dim in zip(moved, in_dims, strict=True))) for i in range(info.batch_size)]
        return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * len(each[0])

    return rule


@local_linear_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return _mapped(local_linear_forward, 3)(info, in_dims, arguments, one_by_one=False)


@local_linear_backward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    return _mapped(local_linear_backward, 5)(info, in_dims, arguments, one_by_one=True)
