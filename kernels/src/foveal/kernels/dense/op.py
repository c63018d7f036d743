"""The public function `attention`: its arguments and their checks, and its registration with torch (fake, autograd, vmap)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dense.reference import attention_reference
from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import operator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

SMALLEST_DIM, LARGEST_DIM = 1, 256


def attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    *,
    bias: Float[Tensor, "batch|1 heads|1 query|1 key|1"] | None = None,
    mask: Bool[Tensor, "batch key"] | Bool[Tensor, "batch|1 heads|1 query|1 key|1"] | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bhnd",
    backend: str | None = None,
) -> Any:
    r"""Softmax attention, tiled: no (query, key) array in memory, with the gradient of every input, the bias included.

    .. math:: o_i = \sum_j p_{ij} v_j, \quad p_{ij} = \exp(s\, q_i \cdot k_j + b_{ij} - \mathrm{lse}_i), \quad
              \mathrm{lse}_i = \log \sum_j \exp(s\, q_i \cdot k_j + b_{ij})

    over the keys j that mask, causality and window all allow. The backward pass has no atomics: it gives the same bits every time.

    Args:
        q: queries, (batch, heads, query, dim); dim from 1 to 256.
        k: keys, (batch, kv_heads, key, dim). heads must be a multiple of kv_heads; query head h reads key head h // (heads / kv_heads).
        v: values, (batch, kv_heads, key, value_dim); value_dim from 1 to 256, need not equal dim.
        bias: added to the logits, broadcastable to (batch, heads, query, key) and not expanded in memory: pass size 1 where it is shared,
            its gradient has that shape. Any floating dtype, float32 advised beside half precision. -inf shuts a pair; +inf counts as 1000.
        mask: True where attention is allowed; (batch, key) for padding, or four dimensions broadcastable to (batch, heads, query, key).
        causal: query i sees keys up to i + key - query: the last query sees the last key (bottom-right, as FlashAttention; torch's
            `is_causal` aligns top-left).
        window: (left, right): query i sees keys from i + key - query - left to i + key - query + right; -1 is no limit.
        scale: s above; dim ** -0.5 by default.
        return_lse: also return the log-sum-exp; it is differentiable.
        layout: "bhnd" as above, or "bnhd": q, k, v and the output are (batch, length, heads, dim). Neither copies.
        backend: "triton", "cpu" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, query, value_dim) in q's dtype and, if asked for, the log-sum-exp (batch, heads, query): natural logarithm,
        float32 (float64 for float64 inputs). A query that may see no key gives 0, -inf and zero gradients. Under autocast q, k and v are
        cast, the bias is not.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `backend` cannot run the call.
        TypeError: q, k, v or bias are not floating, or the mask is not bool.

    References:
        Dao, FlashAttention-2, 2023 (tiling, log-sum-exp, recomputation).
    """
    q, k, v, bias, mask, left, right, scale = _prepare(q, k, v, bias, mask, causal, window, scale, layout)
    chosen = choose("attention", _candidates(q, k, v, bias, mask), backend)
    if chosen == "reference":
        out, lse = attention_reference(q, k, v, bias, mask, left, right, scale)
    else:
        out, lse = attention_forward(q, k, v, bias, mask, left, right, scale, chosen)
    if layout == "bnhd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _candidates(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Candidates:
    cpu = None if q.device.type == "cpu" else f"it needs tensors on the CPU, these are on {q.device.type}"
    return [("triton", why_not_triton(q, k, v, bias, mask)), ("cpu", cpu), ("reference", None)]


def _public_candidates(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Candidates:
    options.pop("return_lse", None)
    arguments = [options.pop(name, default) for name, default in _OPTIONS.items()]
    if options:
        raise TypeError(f"attention has no argument {', '.join(map(repr, options))}")
    return _candidates(*_prepare(q, k, v, *arguments)[:5])


_OPTIONS: dict[str, Any] = {"bias": None, "mask": None, "causal": False, "window": None, "scale": None, "layout": "bhnd"}
attention.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int, int, float]:
    """Check the arguments; give them as (batch, heads, length, dim), four-dimensional bias and mask, and one window for all of its forms."""
    axes = _axes(layout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions ({', '.join(axes)}); got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    if layout == "bnhd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ValueError(f"q, k and v must have one batch size; got {batch}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[3] != dim:
        raise ValueError(f"q and k must have one head dimension; got {dim} and {k.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"k and v must have the same heads and length; got {tuple(k.shape[1:3])} and {tuple(v.shape[1:3])}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v; got {heads} and {kv_heads} (layout {layout!r})")
    if not (SMALLEST_DIM <= dim <= LARGEST_DIM and SMALLEST_DIM <= value_dim <= LARGEST_DIM):
        raise ValueError(f"head dimensions must be from {SMALLEST_DIM} to {LARGEST_DIM}; got {dim} for q and k, {value_dim} for v")
    devices = {t.device for t in (q, k, v, bias, mask) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    full = (batch, heads, queries, keys)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, it is added to the logits; got {bias.dtype} (a bool mask goes into mask=)")
        bias = _four_dimensional("bias", bias, full)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True where attention is allowed; got {mask.dtype} (numbers to add go into bias=)")
        if mask.dim() == 2:
            if mask.shape != (batch, keys):
                raise ValueError(
                    f"a mask of two dimensions is (batch, key) = {(batch, keys)}; got {tuple(mask.shape)} (pass (query, key) as mask[None, None])"
                )
            mask = mask[:, None, None, :]
        mask = _four_dimensional("mask", mask, full)
    left, right = (-1, -1) if window is None else window
    if left < -1 or right < -1:
        raise ValueError(f"window must be (left, right) with numbers of keys >= 0, or -1 for no limit; got {window}")
    if causal:
        right = 0
    return q, k, v, bias, mask, left, right, float(dim**-0.5 if scale is None else scale)


def _axes(layout: str) -> tuple[str, ...]:
    if layout == "bhnd":
        return ("batch", "heads", "length", "dim")
    if layout == "bnhd":
        return ("batch", "length", "heads", "dim")
    raise ValueError(f"layout must be 'bhnd' or 'bnhd'; got {layout!r}")


def _four_dimensional(name: str, tensor: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    if tensor.dim() > 4 or any(size not in (1, wanted) for size, wanted in zip(tensor.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to (batch, heads, query, key) = {full}; got shape {tuple(tensor.shape)}")
    return tensor[(None,) * (4 - tensor.dim())]


# --- registration --------------------------------------------------------------------------------------------------------------------


def _new(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised (batch, heads, length, dim), heads inside lengths in memory where `like` has them so, in its dtype."""
    batch, heads, length, dim = shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, length, heads, dim).transpose(1, 2)
    return like.new_empty(batch, heads, length, dim)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_major(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


@operator("foveal::attention_forward")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, left: int, right: int, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by one backend; arguments as `_prepare` gives them."""
    out = _new(q, *q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=_wide(q), device=q.device)
    q, k, v = _row_major(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        _implementation(backend).forward(q, k, v, bias, mask, left, right, scale, out, lse)
    return out, lse


@attention_forward.register_fake
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any, left: int, right: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return _new(q, *q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_wide(q))


@operator("foveal::attention_backward")
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty where not asked for) by one backend."""
    gradients = [_new(t, *t.shape) for t in (q, k, v)]
    dbias = bias.new_empty(bias.shape, dtype=_wide(bias)) if bias is not None and needs_dbias else None
    dout, q, k, v, out = _row_major(dout, q, k, v, out)
    with torch.autocast(q.device.type, enabled=False):
        _implementation(backend).backward(dout, dlse, q, k, v, bias, mask, out, lse, left, right, scale, *gradients, dbias)
    dq, dk, dv = gradients
    return dq, dk, dv, q.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)


@attention_backward.register_fake
def _fake_backward(
    dout: Tensor,
    dlse: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Any,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and needs_dbias else q.new_empty(0)
    dq, dk, dv = (_new(t, *t.shape) for t in (q, k, v))
    return dq, dk, dv, dbias


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call: triton only where it runs."""
    return importlib.import_module(f"foveal.kernels.dense.{backend}")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, mask, *options = inputs
    ctx.save_for_backward(q, k, v, bias, mask, *output)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, bias, mask, out, lse = ctx.saved_tensors
    left, right, scale, backend = ctx.options
    if dout is None:
        if dlse is None:
            return (None,) * 9
        dout = torch.zeros_like(out)
    needs_dbias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = attention_backward(dout, dlse, q, k, v, bias, mask, out, lse, left, right, scale, needs_dbias, backend)
    return dq, dk, dv, dbias if needs_dbias else None, None, None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dout, dlse, q, k, v, bias, mask, _, _, left, right, scale, needs_dbias, _ = inputs
    ctx.save_for_backward(dout, dlse, q, k, v, bias, mask)
    ctx.options = left, right, scale, needs_dbias
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition: it holds (query, key) arrays.

    Output and log-sum-exp are functions of q, k, v and bias there, so what they would pass on arrives with those.
    """
    dout, dlse, q, k, v, bias, mask = ctx.saved_tensors
    left, right, scale, needs_dbias = ctx.options
    with torch.enable_grad():
        leaves: list[Any] = [t if t is None else t.detach().requires_grad_() for t in (dout, dlse, q, k, v, bias)]
        dout, dlse, q, k, v, bias = leaves
        out, lse = attention_reference(q, k, v, bias, mask, left, right, scale)
        sources = [q, k, v, bias] if needs_dbias else [q, k, v]
        results, weights = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        first = torch.autograd.grad(results, sources, weights, create_graph=True)
        pairs = [(a, b) for a, b in zip(first, second, strict=False) if b is not None]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad([a for a, _ in pairs], wanted, [b for _, b in pairs], allow_unused=True))
    gradients = [None if leaf is None else next(found) for leaf in leaves]
    return (*gradients, *(None,) * 8)


attention_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A vmapped argument with the mapped dimension folded into the batch; one that is shared and has batch 1 stays as it is."""
    if tensor is None:
        return None
    if dim is None:
        if tensor.shape[0] == 1 and batch != 1:
            return tensor
        tensor = tensor[None].expand(size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
        tensor = tensor.expand(size, batch, *tensor.shape[2:])
    return tensor.flatten(0, 1)


@attention_forward.register_vmap
def _map_forward(info: Any, in_dims: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any, *options: Any) -> tuple[Any, Any]:
    size = info.batch_size
    batch = q.shape[0] if in_dims[0] is None else q.movedim(in_dims[0], 0).shape[1]
    folded = [_fold(t, dim, size, batch) for t, dim in zip((q, k, v, bias, mask), in_dims, strict=False)]
    out, lse = attention_forward(*folded, *options)
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


@attention_backward.register_vmap
def _map_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    tensors, options = arguments[:9], arguments[9:]
    size, needs_dbias = info.batch_size, options[3]
    q, bias = tensors[2], tensors[5]
    batch = q.shape[0] if in_dims[2] is None else q.movedim(in_dims[2], 0).shape[1]
    folded = [_fold(t, dim, size, batch) for t, dim in zip(tensors, in_dims, strict=False)]
    shared = bias is not None and (bias.shape[0] if in_dims[5] is None else bias.movedim(in_dims[5], 0).shape[1]) == 1 and batch != 1
    if needs_dbias and bias is not None and in_dims[5] is None and shared:  # a gradient for each mapped call: the bias cannot stay shared
        folded[5] = bias[None].expand(size, batch, *bias.shape[1:]).flatten(0, 1)
    dq, dk, dv, dbias = (t if t.numel() == 0 and t.dim() == 1 else t.unflatten(0, (size, -1)) for t in attention_backward(*folded, *options))
    if needs_dbias and shared:
        dbias = dbias.sum(1, keepdim=True)
    if not needs_dbias:
        return (dq, dk, dv, dbias), (0, 0, 0, None)
    return (dq, dk, dv, dbias), (0, 0, 0, 0)
