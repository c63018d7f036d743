"""The public function `decode_attention`: its arguments and their checks, and its registration with torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.decode import cpu
from foveal.kernels.decode.reference import decode_reference
from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, operator

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LARGEST_DIM = 256


def decode_attention(
    q: Float[Tensor, "batch heads query dim"],
    k_cache: Float[Tensor, "batch|pages kv_heads length dim"],
    v_cache: Float[Tensor, "batch|pages kv_heads length value_dim"],
    cache_seqlens: Int[Tensor, " batch"] | int | None = None,
    *,
    kv_index: Int[Tensor, "batch|1 key"] | Int[Tensor, "batch|1 kv_heads|1 key"] | None = None,
    page_table: Int[Tensor, "batch page"] | None = None,
    causal: bool = False,
    num_splits: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Attention of a few queries over a long cache of keys and values, the last of which need not be filled.

    .. math:: o_i = \sum_j p_{ij} v_j, \quad p_{ij} \propto \exp(s\, q_i \cdot k_j), \quad j < \mathrm{cache\_seqlens}

    One query has too little work for a GPU's cores, so the keys are split among them and the parts merged by their log-sum-exps. The heads
    that share a key head are computed together: each key is read once.

    Args:
        q: queries, (batch, heads, query, dim), the last tokens of each sequence; one while decoding, a few while verifying a draft.
        k_cache: keys, (batch, kv_heads, length, dim); with `page_table` (pages, kv_heads, page length, dim). heads must be a multiple of
            kv_heads; query head h reads key head h // (heads / kv_heads). The new tokens' keys are in it already.
        v_cache: values, likewise, (..., value_dim).
        cache_seqlens: filled length of each sequence, integers (batch,) or one for all; all of the cache by default.
        kv_index: read only the keys at these positions of their sequences, (batch, key) or (batch, kv_heads, key), any integer dtype;
            positions below 0 or beyond the filled length are left out. A position named twice counts twice.
        page_table: position p of sequence b lies in page ``page_table[b, p // page length]``; entries beyond the filled length are not read.
        causal: query i sees positions up to cache_seqlens - query + i: the last query sees all.
        num_splits: parts that the keys are cut into on a GPU; 0 fills the device. The result does not depend on it but for rounding.
        scale: s above; dim ** -0.5 by default.
        return_lse: also return the log-sum-exp; it is differentiable.
        backend: "triton", "cpu" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, query, value_dim) in q's dtype and, if asked for, the log-sum-exp (batch, heads, query): natural logarithm,
        float32 (float64 for float64 inputs). A query without keys gives 0, -inf and zero gradients. Gradients reach q and both caches.

    Raises:
        ValueError: a shape, dtype or device does not fit, a length exceeds the cache (seen where it lies in the CPU's memory), or `backend`
            cannot run the call.
        TypeError: q or a cache is not floating, or an index is not an integer tensor.

    References:
        Dao, Haziza, Massa, Sizov, Flash-Decoding, 2023. Kwon et al., PagedAttention, 2023.
    """
    prepared = _prepare(q, k_cache, v_cache, cache_seqlens, kv_index, page_table, causal, num_splits, scale)
    chosen = choose("decode_attention", _candidates(*prepared[:3]), backend)
    if chosen == "reference":
        q, k_cache, v_cache, lengths, index, pages, causal, _, scale = prepared
        out, lse = decode_reference(q, k_cache, v_cache, lengths, index, pages, causal, scale)
    else:
        out, lse = decode_forward(*prepared, chosen)
    return (out, lse) if return_lse else out


def _candidates(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Candidates:
    why = None if q.device.type == "cpu" else f"it needs tensors on the CPU, these are on {q.device.type}"
    return [("triton", why_not_triton(q, k_cache, v_cache)), ("cpu", why), ("reference", None)]


_OPTIONS: dict[str, Any] = {"kv_index": None, "page_table": None, "causal": False, "num_splits": 0, "scale": None}


def _public_candidates(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor | int | None = None, **options: Any) -> Candidates:
    options.pop("return_lse", None)
    arguments = [options.pop(name, default) for name, default in _OPTIONS.items()]
    if options:
        raise TypeError(f"decode_attention has no argument {', '.join(map(repr, options))}")
    return _candidates(*_prepare(q, k_cache, v_cache, cache_seqlens, *arguments)[:3])


decode_attention.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | int | None,
    kv_index: Tensor | None,
    page_table: Tensor | None,
    causal: bool,
    num_splits: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, int, float]:
    """Check the arguments; give the lengths as int32 (batch,) and the index list with three dimensions."""
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k_cache, v_cache = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k_cache, v_cache))
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache must have one dtype; got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}")
    batch, heads, _, dim = q.shape
    outer, kv_heads, length, key_dim = k_cache.shape
    value_dim = v_cache.shape[3]
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(f"k_cache and v_cache must agree but for the head dimension; got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}")
    if key_dim != dim:
        raise ValueError(f"q and k_cache must have one head dimension; got {dim} and {key_dim}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of the cache; got {heads} and {kv_heads}")
    if not (1 <= dim <= LARGEST_DIM and 1 <= value_dim <= LARGEST_DIM):
        raise ValueError(f"head dimensions must be from 1 to {LARGEST_DIM}; got {dim} for q and keys, {value_dim} for values")
    if page_table is None and outer != batch:
        raise ValueError(f"q and the cache must have one batch size; got {batch} and {outer} (a paged cache needs page_table)")
    if page_table is not None:
        _integers("page_table", page_table)
        if page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(f"page_table must have shape (batch, page) = ({batch}, ...); got {tuple(page_table.shape)}")
        page_table = page_table.to(torch.int32)
    if kv_index is not None:
        _integers("kv_index", kv_index)
        if kv_index.dim() == 2:
            kv_index = kv_index[:, None]
        if kv_index.dim() != 3 or kv_index.shape[0] not in (1, batch) or kv_index.shape[1] not in (1, kv_heads):
            raise ValueError(f"kv_index must be (batch, key) or (batch, kv_heads, key) = ({batch}, {kv_heads}, ...); got {tuple(kv_index.shape)}")
        kv_index = kv_index.to(torch.int32)
    capacity = length if page_table is None else length * page_table.shape[1]
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        if not 0 <= cache_seqlens <= capacity:
            raise ValueError(f"cache_seqlens must be from 0 to the cache's length {capacity}; got {cache_seqlens}")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    _integers("cache_seqlens", cache_seqlens)
    if cache_seqlens.shape != (batch,):
        raise ValueError(f"cache_seqlens must have shape (batch,) = ({batch},); got {tuple(cache_seqlens.shape)}")
    if num_splits < 0:
        raise ValueError(f"num_splits must be 0 (automatic) or more; got {num_splits}")
    devices = {t.device for t in (q, k_cache, v_cache, cache_seqlens, kv_index, page_table) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(sorted(map(str, devices)))}")
    scale = float(dim**-0.5 if scale is None else scale)
    return q, k_cache, v_cache, cache_seqlens.to(torch.int32), kv_index, page_table, bool(causal), num_splits, scale


def _integers(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")


# --- registration --------------------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@operator("foveal::decode_forward")
def decode_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    kv_index: Tensor | None,
    page_table: Tensor | None,
    causal: bool,
    num_splits: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by one backend; arguments as `_prepare` gives them."""
    out = q.new_empty(*q.shape[:3], v_cache.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=_wide(q))
    capacity = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    if cache_seqlens.device.type == "cpu" and cache_seqlens.numel() and not 0 <= int(cache_seqlens.min()) <= int(cache_seqlens.max()) <= capacity:
        raise ValueError(f"cache_seqlens must be from 0 to the cache's length {capacity}; got {cache_seqlens.tolist()}")
    module = cpu if backend == "cpu" else importlib.import_module(f"foveal.kernels.decode.{backend}")
    with torch.autocast(q.device.type, enabled=False):
        module.forward(q, k_cache, v_cache, cache_seqlens, kv_index, page_table, causal, num_splits, scale, out, lse)
    return out, lse


@decode_forward.register_fake
def _fake_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=_wide(q))


@operator("foveal::decode_backward")
def decode_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    kv_index: Tensor | None,
    page_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and of both caches."""
    with torch.autocast(q.device.type, enabled=False):
        found = cpu.gradients(dout, dlse, q, k_cache, v_cache, cache_seqlens, kv_index, page_table, out, lse, causal, scale)
    dq, dk, dv = (gradient.contiguous() for gradient in found)
    return dq, dk, dv


@decode_backward.register_fake
def _fake_backward(dout: Tensor, dlse: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k_cache.new_empty(k_cache.shape), v_cache.new_empty(v_cache.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, _, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = causal, scale
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out = ctx.saved_tensors[6]
    if dout is None:
        if dlse is None:
            return (None,) * 10
        dout = torch.zeros_like(out)
    return (*decode_backward(dout, dlse, *ctx.saved_tensors, *ctx.options), *(None,) * 7)


decode_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, causal, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = causal, scale
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition."""
    dout, dlse, q, k_cache, v_cache, *places = ctx.saved_tensors

    def definition(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        return decode_reference(q, k_cache, v_cache, *places, *ctx.options)

    return (*differentiate_twice(definition, (dout, dlse), (q, k_cache, v_cache), second), *(None,) * 7)


decode_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


def _map(function: Callable[..., tuple[Tensor, ...]], pages: tuple[int, int], table: int) -> Callable[..., tuple[Any, Any]]:
    """Batching rule: more sequences. Pages of several mapped caches lie one cache after the other, and the tables count on."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        paged = arguments[table] is not None
        folded = []
        for position, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
            if not isinstance(value, Tensor):
                folded.append(value)
                continue
            value = value[None].expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            if paged and position == table:
                count = arguments[pages[0]].shape[0] if in_dims[pages[0]] is None else arguments[pages[0]].movedim(in_dims[pages[0]], 0).shape[1]
                value = value + torch.arange(size, device=value.device, dtype=value.dtype)[:, None, None] * count
            folded.append(value.flatten(0, 1))
        batch = folded[pages[0] - 1].shape[0] // size
        index = folded[table - 1]
        if index is not None and index.shape[0] == size and batch != 1:  # one list for all sequences of a call
            folded[table - 1] = index.repeat_interleave(batch, 0)
        return tuple(value.unflatten(0, (size, -1)) for value in function(*folded)), (0,) * (2 if function is decode_forward else 3)

    return rule


decode_forward.register_vmap(_map(decode_forward, (1, 2), 5))
decode_backward.register_vmap(_map(decode_backward, (3, 4), 7))
