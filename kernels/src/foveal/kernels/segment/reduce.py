"""Softmax and reductions over the edges of each node, of any trailing shape, with gradients of every order.

Sum and gather are each other's transpose, so a gradient of one is a call of the other: nothing here needs atomics or an edge-sized copy of
the row index.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import operator
from foveal.kernels.segment import cpu, reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def implementation(backend: str) -> ModuleType:
    """The module that holds a backend's kernels; triton is imported only here."""
    if backend == "triton":
        from foveal.kernels.segment import triton

        return triton
    return cpu


def segment_softmax(
    src: Float[Tensor, "edges *rest"],
    index: Int[Tensor, " edges"] | None = None,
    ptr: Int[Tensor, "nodes+1"] | None = None,
    num_nodes: int | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "edges *rest"]:
    """Softmax over the edges of each node: ``exp(s_e - max) / sum exp(s_f - max)``, f over the edges with the same index.

    Takes the arguments of ``torch_geometric.utils.softmax``; no constant is added to the denominator. A node whose entries are all -inf
    gets weights 0.

    Args:
        src: values, one or more an edge.
        index: node of each edge, in any order.
        ptr: instead of `index`, for edges sorted by node: the edges of node i are ``ptr[i]`` to ``ptr[i + 1]``.
        num_nodes: number of nodes; default: one more than the largest index. Give it on a GPU and under torch.compile.
        backend: "triton", "cpu" or "reference"; default: the first that can run.

    Returns:
        Weights in the order, shape and dtype of `src`.

    Raises:
        TypeError: `src` is not a floating tensor, or the index is not of integers.
        ValueError: not exactly one of `index` and `ptr`, wrong shapes, or an index out of range.
    """
    chosen = choose("segment_softmax", _candidates(src), backend)
    if chosen == "reference":
        return reference.softmax(src, *_index_and_count(src, index, ptr, num_nodes))
    indptr, permutation = _grouped(src, index, ptr, num_nodes)
    return torch.ops.foveal.segment_softmax(src.flatten(1) if src.dim() > 1 else src.unsqueeze(1), indptr, permutation, chosen).view(src.shape)


def segment_reduce(
    src: Float[Tensor, "edges *rest"],
    index: Int[Tensor, " edges"] | None = None,
    ptr: Int[Tensor, "nodes+1"] | None = None,
    reduce: str = "sum",
    num_nodes: int | None = None,
    *,
    backend: str | None = None,
) -> Float[Tensor, "nodes *rest"]:
    """Reduce the edges of each node to one value; a node without edges gets 0.

    The result does not depend on the number of threads and is the same in every run. The gradient of a maximum or minimum is shared
    evenly by the edges that attain it.

    Args:
        src: values, one or more an edge.
        index: node of each edge, in any order.
        ptr: instead of `index`, for edges sorted by node: the edges of node i are ``ptr[i]`` to ``ptr[i + 1]``.
        reduce: "sum", "mean", "max" or "min".
        num_nodes: number of nodes; default: one more than the largest index. Give it on a GPU and under torch.compile.
        backend: "triton", "cpu" or "reference"; default: the first that can run.

    Returns:
        (nodes, ...) in the dtype of `src`.

    Raises:
        TypeError: `src` is not a floating tensor, or the index is not of integers.
        ValueError: an unknown `reduce`, not exactly one of `index` and `ptr`, wrong shapes, or an index out of range.
    """
    if reduce not in ("sum", "mean", "max", "min"):
        raise ValueError(f"reduce must be 'sum', 'mean', 'max' or 'min'; got {reduce!r}")
    chosen = choose("segment_reduce", _candidates(src), backend)
    if chosen == "reference":
        return reference.reduce(src, *_index_and_count(src, index, ptr, num_nodes), reduce)
    indptr, permutation = _grouped(src, index, ptr, num_nodes)
    flat = src.flatten(1) if src.dim() > 1 else src.unsqueeze(1)
    reduced = torch.ops.foveal.segment_reduce(flat, indptr, permutation, "sum" if reduce == "mean" else reduce, chosen)
    if reduce == "mean":
        reduced = reduced / indptr.diff().clamp(min=1).to(src.dtype).unsqueeze(1)
    return reduced.view(-1, *src.shape[1:]) if src.numel() else reduced.new_zeros(indptr.shape[0] - 1, *src.shape[1:])


def _candidates(src: Tensor, *_: Any, **__: Any) -> Candidates:
    if not isinstance(src, Tensor) or not src.is_floating_point() or src.dim() == 0:
        found = f"{src.dtype} of shape {tuple(src.shape)}" if isinstance(src, Tensor) else type(src).__name__
        raise TypeError(f"src must be a floating tensor with one entry an edge in front; got {found}")
    return [("triton", why_not_triton(src)), ("cpu", cpu.why_not(src)), ("reference", None)]


segment_softmax.candidates = _candidates  # type: ignore[attr-defined]
segment_reduce.candidates = _candidates  # type: ignore[attr-defined]


def _grouped(src: Tensor, index: Tensor | None, ptr: Tensor | None, num_nodes: int | None) -> tuple[Tensor, Tensor | None]:
    """Row pointer, and the permutation that sorts the edges (None where they are sorted)."""
    if (index is None) == (ptr is None):
        raise ValueError(f"give either index or ptr; got {'neither' if index is None else 'both'}")
    given, name = (index, "index") if index is not None else (ptr, "ptr")
    assert given is not None
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, such as torch.long; got {given.dtype}")
    if ptr is not None:
        if ptr.dim() != 1 or ptr.shape[0] == 0 or (num_nodes is not None and ptr.shape[0] != num_nodes + 1):
            raise ValueError(f"ptr must have shape (nodes + 1,){'' if num_nodes is None else f' = ({num_nodes + 1},)'}; got {tuple(ptr.shape)}")
        return torch.ops.foveal.segment_ptr(ptr.long().contiguous(), src.shape[0]), None
    if given.shape != src.shape[:1]:
        raise ValueError(f"index must have one entry an edge, shape ({src.shape[0]},); got {tuple(given.shape)}")
    size = _count(given) if num_nodes is None else num_nodes
    indptr, _, permutation = torch.ops.foveal.segment_csr(given.long().contiguous(), None, size, 0)
    return indptr, permutation


def _count(index: Tensor) -> int:
    return int(index.max()) + 1 if index.numel() else 0


def _index_and_count(src: Tensor, index: Tensor | None, ptr: Tensor | None, num_nodes: int | None) -> tuple[Tensor, int]:
    """The edges' nodes, for the definition; the checks are those of `_grouped`."""
    indptr, permutation = _grouped(src, index, ptr, num_nodes)
    nodes = indptr.shape[0] - 1
    rows = torch.repeat_interleave(torch.arange(nodes, device=indptr.device), indptr.diff(), output_size=src.shape[0])
    return (rows if permutation is None else torch.empty_like(rows).index_copy(0, permutation, rows)), nodes


@operator("foveal::segment_ptr", "(Tensor ptr, int edges) -> Tensor")
def _checked_ptr(ptr: Tensor, edges: int) -> Tensor:
    first, last, falls = int(ptr[0]), int(ptr[-1]), bool((ptr.diff() < 0).any())
    if first != 0 or last != edges or falls:
        raise ValueError(f"ptr must rise from 0 to the number of edges {edges}; got {first} to {last}{', falling in between' if falls else ''}")
    return ptr.clone()


_checked_ptr.register_fake(lambda ptr, edges: torch.empty_like(ptr))


@operator("foveal::segment_reduce", "(Tensor src, Tensor indptr, Tensor? permutation, str reduce, str backend) -> Tensor")
def _reduce(src: Tensor, indptr: Tensor, permutation: Tensor | None, reduce: str, backend: str) -> Tensor:
    return implementation(backend).reduce(src, indptr, permutation, reduce)


@operator("foveal::segment_gather", "(Tensor x, Tensor indptr, Tensor? permutation, int edges, str backend) -> Tensor")
def _gather(x: Tensor, indptr: Tensor, permutation: Tensor | None, edges: int, backend: str) -> Tensor:
    return implementation(backend).gather(x, indptr, permutation, edges)


@operator("foveal::segment_softmax", "(Tensor src, Tensor indptr, Tensor? permutation, str backend) -> Tensor")
def _softmax(src: Tensor, indptr: Tensor, permutation: Tensor | None, backend: str) -> Tensor:
    return implementation(backend).softmax(src, indptr, permutation)


_reduce.register_fake(lambda src, indptr, permutation, reduce, backend: src.new_empty(indptr.shape[0] - 1, src.shape[1]))
_gather.register_fake(lambda x, indptr, permutation, edges, backend: x.new_empty(edges, x.shape[1]))
_softmax.register_fake(lambda src, indptr, permutation, backend: torch.empty_like(src, memory_format=torch.contiguous_format))


def _reduce_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    src, indptr, permutation, ctx.reduce, ctx.backend = inputs
    ctx.edges = src.shape[0]
    ctx.save_for_backward(indptr, permutation, *((src, output) if ctx.reduce != "sum" else ()))


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indptr, permutation, *extremum = ctx.saved_tensors
    if extremum:
        src, output = (tensor.detach() for tensor in extremum)
        attained = (src == torch.ops.foveal.segment_gather(output, indptr, permutation, ctx.edges, ctx.backend)).to(grad.dtype)
        count = torch.ops.foveal.segment_reduce(attained, indptr, permutation, "sum", ctx.backend)
        shared = torch.ops.foveal.segment_gather(grad / count.clamp(min=1), indptr, permutation, ctx.edges, ctx.backend)
        return attained * shared, None, None, None, None
    return torch.ops.foveal.segment_gather(grad, indptr, permutation, ctx.edges, ctx.backend), None, None, None, None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indptr, permutation, _, ctx.backend = inputs
    ctx.save_for_backward(indptr, permutation)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.foveal.segment_reduce(grad, *ctx.saved_tensors, "sum", ctx.backend), None, None, None, None


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indptr, permutation, ctx.backend = inputs
    ctx.save_for_backward(output, indptr, permutation)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, indptr, permutation = ctx.saved_tensors
    flow = weights * grad
    total = torch.ops.foveal.segment_reduce(flow, indptr, permutation, "sum", ctx.backend)
    return flow - weights * torch.ops.foveal.segment_gather(total, indptr, permutation, flow.shape[0], ctx.backend), None, None, None


_reduce.register_autograd(_reduce_backward, setup_context=_reduce_setup)
_gather.register_autograd(_gather_backward, setup_context=_gather_setup)
_softmax.register_autograd(_softmax_backward, setup_context=_softmax_setup)
