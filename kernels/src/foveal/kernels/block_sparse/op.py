"""The public function `block_sparse_attention`: its arguments and their checks, and its registration with torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.block_sparse.block_index import BlockIndex
from foveal.kernels.block_sparse.reference import block_sparse_reference
from foveal.kernels.dense.reference import finite_above
from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import differentiate_twice, operator

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["BlockIndex", "block_sparse_attention"]

LARGEST_DIM = 256


def block_sparse_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    block_index: BlockIndex,
    *,
    bias: Float[Tensor, "batch|1 heads|1 query|1 key|1"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Softmax attention over the tiles of a list, at the cost of those tiles, with every gradient.

    .. math:: o_i = \sum_{j \in S(i)} p_{ij} v_j, \quad p_{ij} \propto \exp(s\, q_i \cdot k_j + b_{ij})

    S(i) are the keys of the tiles listed for the block of query i, as far as the masks of partial tiles, the list's window and causality
    allow: exact to the token. The backward pass walks the transposed list and has no atomics: it gives the same bits every time.

    Args:
        q: queries, (batch, heads, query, dim); dim from 1 to 256.
        k: keys, (batch, kv_heads, key, dim). heads must be a multiple of kv_heads; query head h reads key head h // (heads / kv_heads).
        v: values, (batch, kv_heads, key, value_dim).
        block_index: the list; its planes are those of q, or shared where they are 1. It must be on q's device.
        bias: added to the logits, broadcastable to (batch, heads, query, key) and not expanded in memory; its gradient has its shape and is
            zero outside the list. -inf shuts a pair; +inf counts as 1000.
        causal: query i sees keys up to i + key - query, besides what the list says; tiles after that are skipped.
        scale: s above; dim ** -0.5 by default.
        return_lse: also return the log-sum-exp; it is differentiable.
        backend: "triton", "cpu" or "reference"; by default the first that can (`foveal.kernels.explain` says which and why).

    Returns:
        Output (batch, heads, query, value_dim) in q's dtype and, if asked for, the log-sum-exp (batch, heads, query): natural logarithm,
        float32 (float64 for float64 inputs). A query that may see no key gives 0, -inf and zero gradients. Under autocast q, k and v are
        cast, the bias is not.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `backend` cannot run the call.
        TypeError: q, k, v or bias are not floating, or block_index is not a `BlockIndex`.

    References:
        Child et al., Generating Long Sequences with Sparse Transformers, 2019. Dao et al., FlashAttention, 2022 (block-sparse).
    """
    q, k, v, bias, left, right, scale = _prepare(q, k, v, block_index, bias, causal, scale)
    chosen = choose("block_sparse_attention", _candidates(q, k, v, bias, block_index), backend)
    own = (block_index.row_start, block_index.columns, block_index.tile, block_index.tiles)
    if chosen == "reference":
        out, lse = block_sparse_reference(q, k, v, bias, *own, left, right, scale)
    else:
        turned = block_index.transpose() if chosen == "triton" else None
        theirs = (None, None, None) if turned is None else (turned.row_start, turned.columns, turned.tile)
        out, lse = block_sparse_forward(q, k, v, bias, *own, *theirs, left, right, scale, chosen)
    return (out, lse) if return_lse else out


def _candidates(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, index: BlockIndex) -> Candidates:
    cpu = None if q.device.type == "cpu" else f"it needs tensors on the CPU, these are on {q.device.type}"
    why = why_not_triton(q, k, v, bias)
    if why is None and any(size < 16 or size & (size - 1) for size in index.block_size):
        why = f"its blocks are powers of two from 16 on, these are {index.block_size[0]} x {index.block_size[1]}"
    return [("triton", why), ("cpu", cpu), ("reference", None)]


_OPTIONS: dict[str, Any] = {"bias": None, "causal": False, "scale": None}


def _public_candidates(q: Tensor, k: Tensor, v: Tensor, block_index: BlockIndex, **options: Any) -> Candidates:
    options.pop("return_lse", None)
    arguments = [options.pop(name, default) for name, default in _OPTIONS.items()]
    if options:
        raise TypeError(f"block_sparse_attention has no argument {', '.join(map(repr, options))}")
    q, k, v, bias, *_ = _prepare(q, k, v, block_index, *arguments)
    return _candidates(q, k, v, bias, block_index)


block_sparse_attention.candidates = _public_candidates  # type: ignore[attr-defined]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, bias: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, int, float]:
    """Check the arguments; give a bias of four dimensions without +inf, and the window of list and causality together."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, dim); got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    if not isinstance(index, BlockIndex):
        raise TypeError(f"block_index must be a BlockIndex, such as BlockIndex.from_mask(mask); got {type(index).__name__}")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[3]
    if k.shape != (batch, kv_heads, keys, dim) or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"k must have the batch and head dimension of q, v the heads and length of k; got {tuple(k.shape)} and {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v; got {heads} and {kv_heads}")
    if not (1 <= dim <= LARGEST_DIM and 1 <= value_dim <= LARGEST_DIM):
        raise ValueError(f"head dimensions must be from 1 to {LARGEST_DIM}; got {dim} for q and k, {value_dim} for v")
    if (index.queries, index.keys) != (queries, keys):
        raise ValueError(f"block_index is for {index.queries} queries and {index.keys} keys; q and k have {queries} and {keys}")
    planes = tuple(index.row_start.shape[:2])
    if planes[0] not in (1, batch) or planes[1] not in (1, heads):
        raise ValueError(f"block_index must have planes (batch|1, heads|1) of ({batch}, {heads}); got {planes}")
    devices = {t.device for t in (q, k, v, bias, index.columns) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors and block_index must be on one device; got {', '.join(sorted(map(str, devices)))}")
    if bias is not None:
        full = (batch, heads, queries, keys)
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, it is added to the logits; got {bias.dtype}")
        if bias.dim() > 4 or any(size not in (1, wanted) for size, wanted in zip(bias.shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"bias must be broadcastable to (batch, heads, query, key) = {full}; got shape {tuple(bias.shape)}")
        bias = finite_above(bias[(None,) * (4 - bias.dim())])
    return q, k, v, bias, index.left, 0 if causal else index.right, float(dim**-0.5 if scale is None else scale)


# --- registration --------------------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _implementation(backend: str) -> Any:
    """The module of a backend, imported on its first call: triton only where it runs."""
    return importlib.import_module(f"foveal.kernels.block_sparse.{backend}")


@operator("foveal::block_sparse_forward")
def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    row_start: Tensor,
    columns: Tensor,
    tile: Tensor,
    tiles: Tensor,
    turned_start: Tensor | None,
    turned_rows: Tensor | None,
    turned_tile: Tensor | None,
    left: int,
    right: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by one backend; the list's tensors and those of its transpose, which only the backward of some walks."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=_wide(q))
    with torch.autocast(q.device.type, enabled=False):
        _implementation(backend).forward(q, k, v, bias, row_start, columns, tile, tiles, left, right, scale, out, lse)
    return out, lse


@block_sparse_forward.register_fake
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_wide(q))


@operator("foveal::block_sparse_backward")
def block_sparse_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    row_start: Tensor,
    columns: Tensor,
    tile: Tensor,
    tiles: Tensor,
    turned_start: Tensor | None,
    turned_rows: Tensor | None,
    turned_tile: Tensor | None,
    out: Tensor,
    lse: Tensor,
    left: int,
    right: int,
    scale: float,
    needs_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty where not asked for) by one backend."""
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dbias = bias.new_empty(bias.shape, dtype=_wide(bias)) if bias is not None and needs_dbias else None
    turned = (turned_start, turned_rows, turned_tile) if backend == "triton" else ()
    with torch.autocast(q.device.type, enabled=False):
        _implementation(backend).backward(
            dout, dlse, q, k, v, bias, row_start, columns, tile, tiles, *turned, out, lse, left, right, scale, dq, dk, dv, dbias
        )
    return dq, dk, dv, q.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)


@block_sparse_backward.register_fake
def _fake_backward(dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dbias = bias.new_empty(bias.shape) if bias is not None and rest[-2] else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, left, right, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = left, right, scale, backend
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        if dlse is None:
            return (None,) * 15
        dout = torch.zeros_like(ctx.saved_tensors[11])
    *options, backend = ctx.options
    needs_dbias = ctx.saved_tensors[3] is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = block_sparse_backward(dout, dlse, *ctx.saved_tensors, *options, needs_dbias, backend)
    return (dq, dk, dv, dbias if needs_dbias else None, *(None,) * 11)


block_sparse_forward.register_autograd(_differentiate, setup_context=_remember)


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[15:18]
    ctx.set_materialize_grads(False)


def _differentiate_twice(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
    """The gradient of the gradient, through the definition: it holds (query, key) arrays."""
    dout, dlse, q, k, v, bias, row_start, columns, tile, tiles = ctx.saved_tensors
    left, right, scale = ctx.options

    def definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return block_sparse_reference(q, k, v, bias, row_start, columns, tile, tiles, left, right, scale)

    return (*differentiate_twice(definition, (dout, dlse), (q, k, v, bias), second), *(None,) * 14)


block_sparse_backward.register_autograd(_differentiate_twice, setup_context=_remember_backward)


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A vmapped argument with the mapped dimension folded into the batch; one that is shared and has batch 1 stays as it is."""
    if tensor is None:
        return None
    if dim is None:
        return tensor if tensor.shape[0] == 1 and batch != 1 else tensor.repeat(size, *[1] * (tensor.dim() - 1))
    tensor = tensor.movedim(dim, 0)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def _refuse_mapped_lists(in_dims: tuple[Any, ...]) -> None:
    if any(dim is not None for dim in in_dims):
        raise ValueError("vmap over block_index is not possible: give the list a plane for each batch or head instead")


@block_sparse_forward.register_vmap
def _map_forward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    _refuse_mapped_lists(in_dims[4:11])
    size, q = info.batch_size, arguments[0]
    batch = q.shape[0] if in_dims[0] is None else q.movedim(in_dims[0], 0).shape[1]
    folded = [_fold(t, dim, size, batch) for t, dim in zip(arguments[:4], in_dims, strict=False)]
    out, lse = block_sparse_forward(*folded, *_repeated(arguments[4:11], size), *arguments[11:])
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


def _repeated(index: tuple[Any, ...], size: int) -> list[Any]:
    """The list for `size` times the batch: only where its lists start depends on the batch."""
    starts = (0, 4)
    return [t.repeat(size, 1, 1) if at in starts and t is not None and t.shape[0] > 1 else t for at, t in enumerate(index)]


@block_sparse_backward.register_vmap
def _map_backward(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    _refuse_mapped_lists(in_dims[6:13])
    size, needs_dbias = info.batch_size, arguments[18]
    q, bias = arguments[2], arguments[5]
    batch = q.shape[0] if in_dims[2] is None else q.movedim(in_dims[2], 0).shape[1]
    folded = [_fold(t, dim, size, batch) for t, dim in zip(arguments[:6], in_dims, strict=False)]
    shared = bias is not None and (bias.shape[0] if in_dims[5] is None else bias.movedim(in_dims[5], 0).shape[1]) == 1 and batch != 1
    if needs_dbias and bias is not None and in_dims[5] is None and shared:  # a gradient for each mapped call: the bias cannot stay shared
        folded[5] = bias[None].expand(size, batch, *bias.shape[1:]).flatten(0, 1)
    results = [_fold(t, dim, size, batch) for t, dim in zip(arguments[13:15], in_dims[13:15], strict=True)]
    found = block_sparse_backward(*folded, *_repeated(arguments[6:13], size), *results, *arguments[15:])
    dq, dk, dv, dbias = (t if t.numel() == 0 and t.dim() == 1 else t.unflatten(0, (size, -1)) for t in found)
    if needs_dbias and shared:
        dbias = dbias.sum(1, keepdim=True)
    return (dq, dk, dv, dbias), (0, 0, 0, 0 if needs_dbias else None)
