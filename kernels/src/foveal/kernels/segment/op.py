"""The public segment attention: checks, registration with torch, and which backend runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.library import operator
from foveal.kernels.segment import cpu, reference
from foveal.kernels.segment.composed import attention_gradients
from foveal.kernels.segment.csr import CSR as CSR
from foveal.kernels.segment.reduce import implementation
from foveal.kernels.segment.reduce import segment_reduce as segment_reduce
from foveal.kernels.segment.reduce import segment_softmax as segment_softmax

if TYPE_CHECKING:
    from jaxtyping import Float, Int

#: Largest head dim of the Triton kernels.
_WIDEST = 1024


@overload
def segment_attention(
    q: Tensor | None, k: Tensor | None, v: Tensor, edges: CSR | Tensor, *, return_weights: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def segment_attention(
    q: Tensor | None, k: Tensor | None, v: Tensor, edges: CSR | Tensor, *, return_weights: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def segment_attention(  # type: ignore[misc]
    q: Float[Tensor, "targets heads dim"] | None,
    k: Float[Tensor, "sources heads dim"] | Float[Tensor, "edges heads dim"] | None,
    v: Float[Tensor, "sources heads value_dim"] | Float[Tensor, "edges heads value_dim"],
    edges: CSR | Int[Tensor, "2 edges"],
    *,
    edge_bias: Float[Tensor, "edges heads"] | Float[Tensor, " edges"] | None = None,
    edge_envelope: Float[Tensor, "edges heads"] | Float[Tensor, " edges"] | None = None,
    edge_gate: Float[Tensor, "edges heads"] | Float[Tensor, " edges"] | None = None,
    scale: float | None = None,
    eps: float = 0.0,
    keys_on_edges: bool = False,
    values_on_edges: bool = False,
    num_nodes: int | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "targets heads value_dim"] | tuple[Float[Tensor, "targets heads value_dim"], Float[Tensor, "edges heads"]]:
    """Attention of each node over the edges that reach it.

    For an edge e from source j to target i, per head::

        s_e = scale * q_i . k_j + bias_e
        a_e = envelope_e exp(s_e - m_i) / (sum_f envelope_f exp(s_f - m_i) + eps)     f over the edges of i, m_i = max_f s_f
        w_e = gate_e a_e
        out_i = sum_e w_e v_j

    `edge_envelope` weighs an edge inside the softmax, so an edge with envelope 0 is as if it were not there. `edge_gate` multiplies
    the weight afterwards, so weights need not sum to one. A smooth cutoff u(distance) wants both: inside, so that a neighbour that
    arrives does not push the others by a jump; outside, so that the last one fades instead of keeping weight 1. EquiformerV3 is
    ``edge_envelope=u, edge_gate=u, eps=1e-16``; GAT is ``q=None, k=None`` with its additive logits as `edge_bias`.

    A node without edges, or whose edges all have envelope 0 or bias -inf, gives 0, with gradient 0. Forward and backward store nothing of
    size edges x heads x dim, use no atomics, and give the same bits in every run. Gradients of any order exist for q, k, v and the edge
    tensors; with `eps`, m_i counts as a constant.

    Args:
        q: one query a target; None where the logits are `edge_bias` alone (then `k` is None too).
        k: one key a source, or one an edge with `keys_on_edges`.
        v: one value a source, or one an edge with `values_on_edges`, such as messages that already carry the edge's rotation.
        edges: a `CSR` (sorted once, used by every layer), or an edge index of shape (2, edges): sources, then targets.
        edge_bias: added to the logits, in the caller's edge order, per head or shared by the heads.
        edge_envelope: weight inside the softmax, not negative.
        edge_gate: factor of the softmax's result.
        scale: default ``dim ** -0.5``.
        eps: added to the denominator, relative to the largest term.
        keys_on_edges: `k` has one row an edge, in the caller's edge order.
        values_on_edges: `v` has one row an edge, in the caller's edge order.
        num_nodes: number of targets where `edges` is an edge index and there is no q; default: as many as `v` has rows.
        return_weights: also return w, in the caller's edge order.
        backend: "triton", "cpu" or "reference"; default: the first that can run.

    Returns:
        Output in the dtype of `v`, and with `return_weights` the weights in float32 (float64 where v is). Under autocast q, k and v are
        cast, the edge tensors stay float32.

    Raises:
        TypeError: an argument is not a floating tensor, or q, k and v differ in dtype.
        ValueError: shapes that do not fit, an index out of range, or no logits at all.
    """
    csr = _checked(q, k, v, edges, edge_bias, edge_envelope, edge_gate, keys_on_edges, values_on_edges, num_nodes)
    chosen = choose("segment_attention", _backends(q, v), backend)
    q, k, v = (None if q is None else _autocast(q)), (None if k is None else _autocast(k)), _autocast(v)
    wide = torch.promote_types(v.dtype, torch.float32)
    bias, envelope, gate = (_per_head(tensor, v.shape[1], wide) for tensor in (edge_bias, edge_envelope, edge_gate))
    scale = scale if scale is not None else 1.0 if q is None else q.shape[-1] ** -0.5
    if chosen == "reference":
        arguments = (csr.edge_index(), csr.num_nodes, bias, envelope, gate, float(scale), float(eps), keys_on_edges, values_on_edges)
        out, weights = reference.attention(q, k, v, *arguments)
        return (out, weights) if return_weights else out
    turned: tuple[Tensor | None, ...] = (None, None, None)
    by_source = [tensor for tensor, on_edges in ((k, keys_on_edges), (v, values_on_edges)) if tensor is not None and not on_edges]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in by_source):
        turned = _rows_of(csr.transposed)
    options = (float(scale), float(eps), keys_on_edges, values_on_edges, return_weights, chosen)
    out, weights, _ = torch.ops.foveal.segment_attention_forward(q, k, v, bias, envelope, gate, *_rows_of(csr), *turned, *options)
    # The operator's own output is float32 at least: the gradient subtracts its product with the incoming one, which rounding would spoil.
    out = out.to(v.dtype)
    return (out, weights) if return_weights else out


def _backends(q: Tensor | None, v: Tensor) -> Candidates:
    triton = why_not_triton(v)
    widest = v.shape[2] if q is None else max(q.shape[2], v.shape[2])
    if triton is None and widest > _WIDEST:
        triton = f"a head of one source must fit into registers, up to {_WIDEST} wide; this one is {widest}"
    return [("triton", triton), ("cpu", cpu.why_not(v)), ("reference", None)]


def _candidates(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    edges: CSR | Tensor,
    *,
    edge_bias: Tensor | None = None,
    edge_envelope: Tensor | None = None,
    edge_gate: Tensor | None = None,
    keys_on_edges: bool = False,
    values_on_edges: bool = False,
    num_nodes: int | None = None,
    **_: Any,
) -> Candidates:
    _checked(q, k, v, edges, edge_bias, edge_envelope, edge_gate, keys_on_edges, values_on_edges, num_nodes)
    return _backends(q, v)


segment_attention.candidates = _candidates  # type: ignore[attr-defined]


def _rows_of(csr: CSR) -> tuple[Tensor, Tensor, Tensor]:
    return csr.indptr, csr.source, csr.permutation


def _checked(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    edges: CSR | Tensor,
    bias: Tensor | None,
    envelope: Tensor | None,
    gate: Tensor | None,
    keys_on_edges: bool,
    values_on_edges: bool,
    num_nodes: int | None,
) -> CSR:
    """The edges as CSR, once every argument fits."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is None and name != "v":
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (nodes, heads, dim); got {tuple(tensor.shape)}")
        if tensor.dtype != v.dtype or tensor.device != v.device:
            raise TypeError(f"q, k and v must share dtype and device; got {name} {tensor.dtype} on {tensor.device}, v {v.dtype} on {v.device}")
        if tensor.shape[1] != v.shape[1]:
            raise ValueError(f"q, k and v must have as many heads; got {name} {tuple(tensor.shape)}, v {tuple(v.shape)}")
    if (q is None) != (k is None):
        raise ValueError(f"q and k are given together or not at all; got only {'k' if q is None else 'q'}")
    if q is None and bias is None:
        raise ValueError("nothing to attend by: give q and k, or edge_bias")
    if q is not None and k is not None and q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must have the same head dim; got q {tuple(q.shape)}, k {tuple(k.shape)}")
    csr = _as_csr(q, k, v, edges, keys_on_edges, values_on_edges, num_nodes)
    if csr.indptr.device != v.device:
        raise ValueError(f"edges are on {csr.indptr.device}, v on {v.device}: move them with edges.to(v.device)")
    if q is not None and q.shape[0] != csr.num_nodes:
        raise ValueError(f"q must have one row a target, {csr.num_nodes}; got {tuple(q.shape)}")
    for name, tensor, on_edges in (("k", k, keys_on_edges), ("v", v, values_on_edges)):
        rows, what = (csr.num_edges, "edge") if on_edges else (csr.num_sources, "source")
        if tensor is not None and tensor.shape[0] != rows:
            raise ValueError(f"{name} must have one row {'an' if on_edges else 'a'} {what}, {rows}; got {tuple(tensor.shape)}")
    for name, tensor in (("edge_bias", bias), ("edge_envelope", envelope), ("edge_gate", gate)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor; got {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
        if tuple(tensor.shape) not in {(csr.num_edges,), (csr.num_edges, 1), (csr.num_edges, v.shape[1])}:
            raise ValueError(f"{name} must have shape ({csr.num_edges},) or ({csr.num_edges}, {v.shape[1]}); got {tuple(tensor.shape)}")
    return csr


def _as_csr(
    q: Tensor | None, k: Tensor | None, v: Tensor, edges: CSR | Tensor, keys_on_edges: bool, values_on_edges: bool, num_nodes: int | None
) -> CSR:
    if isinstance(edges, CSR):
        if num_nodes is not None and num_nodes != edges.num_nodes:
            raise ValueError(f"num_nodes is {num_nodes}, but the CSR has {edges.num_nodes} targets; leave it out")
        return edges
    if not isinstance(edges, Tensor):
        raise TypeError(f"edges must be a CSR or an edge index of shape (2, edges); got {type(edges).__name__}")
    if num_nodes is not None and q is not None and num_nodes != q.shape[0]:
        raise ValueError(f"num_nodes is {num_nodes}, but q has {q.shape[0]} rows; leave it out")
    targets = num_nodes if q is None else q.shape[0]
    if targets is None and values_on_edges:
        raise ValueError("without q and with values on edges nothing tells how many targets there are: give num_nodes, or a CSR")
    targets = v.shape[0] if targets is None else targets
    if not values_on_edges:
        return CSR.from_edge_index(edges, targets, v.shape[0])
    if k is not None and not keys_on_edges:
        return CSR.from_edge_index(edges, targets, k.shape[0])
    # Nothing is read from a source: only the targets must be in range.
    return CSR.from_edge_index(edges[1:].expand(2, -1) if edges.dim() == 2 and edges.shape[0] == 2 else edges, targets)


def _autocast(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _per_head(tensor: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor if tensor.dim() == 2 else tensor.unsqueeze(1)).to(dtype).expand(-1, heads).contiguous()


_INPUTS = "Tensor? q, Tensor? k, Tensor v, Tensor? bias, Tensor? envelope, Tensor? gate"
_ROWS = "Tensor indptr, Tensor column, Tensor permutation, Tensor? turned_indptr, Tensor? turned_column, Tensor? turned_permutation"
_OPTIONS = "float scale, float eps, bool keys_on_edges, bool values_on_edges"


@operator(
    "foveal::segment_attention_forward",
    f"({_INPUTS}, {_ROWS}, {_OPTIONS}, bool return_weights, str backend) -> (Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs, rows, options, backend = arguments[:6], arguments[6:9], arguments[12:17], arguments[17]
    return implementation(backend).attention_forward(*inputs, *rows, *options)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    v, indptr, permutation, return_weights = arguments[2], arguments[6], arguments[8], arguments[16]
    targets, heads, wide = indptr.shape[0] - 1, v.shape[1], torch.promote_types(v.dtype, torch.float32)
    weights = v.new_empty(permutation.shape[0] if return_weights else 0, heads, dtype=wide)
    return v.new_empty(targets, heads, v.shape[2], dtype=wide), weights, v.new_empty(targets, heads, dtype=wide)


@operator(
    "foveal::segment_attention_backward",
    (
        f"(Tensor grad_out, Tensor? grad_weights, {_INPUTS}, Tensor out, Tensor weights, Tensor lse, {_ROWS}, {_OPTIONS}, bool[] needs, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    grads_inputs_results, rows, turned, options, backend = arguments[:11], arguments[11:14], arguments[14:17], arguments[17:22], arguments[22]
    by_source = None if turned[0] is None else turned
    return tuple(implementation(backend).attention_backward(*grads_inputs_results, *rows, by_source, *options))


@_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, needs = arguments[2:8], arguments[21]
    v = inputs[2]
    return tuple(v.new_empty(0) if x is None or not need else torch.empty_like(x).contiguous() for x, need in zip(inputs, needs, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *_, ctx.scale, ctx.eps, ctx.keys_on_edges, ctx.values_on_edges, ctx.return_weights, ctx.backend = inputs
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, rows, turned, results = (ctx.saved_tensors[part] for part in (slice(0, 6), slice(6, 9), slice(9, 12), slice(12, 15)))
    nothing: list[Tensor | None] = [None] * 12
    _, k, v = inputs[:3]
    if grad_out is None and (grad_weights is None or not ctx.return_weights):
        return *[None] * 6, *nothing
    from_nodes = (k is not None and not ctx.keys_on_edges, not ctx.values_on_edges)
    asked = any(node and (need or torch.is_grad_enabled()) for node, need in zip(from_nodes, ctx.needs_input_grad[1:3], strict=True))
    if turned[0] is None and asked:
        sources = v.shape[0] if not ctx.values_on_edges else k.shape[0]
        turned = torch.ops.foveal.segment_transpose(*rows, sources)
    options = (ctx.scale, ctx.eps, ctx.keys_on_edges, ctx.values_on_edges)
    needs = list(ctx.needs_input_grad[:6])
    grad_weights = grad_weights if ctx.return_weights else None
    if torch.is_grad_enabled():
        graph = (rows, turned if turned[0] is not None else rows)
        grads = attention_gradients(grad_out, grad_weights, *inputs, *graph, *options, ctx.backend)  # type: ignore[call-arg]
    else:
        grad_out = torch.zeros_like(results[0]) if grad_out is None else grad_out
        grads = torch.ops.foveal.segment_attention_backward(grad_out, grad_weights, *inputs, *results, *rows, *turned, *options, needs, ctx.backend)
    return *[grad if need else None for grad, need in zip(grads, needs, strict=True)], *nothing


_forward.register_autograd(_gradients, setup_context=_setup)


@_forward.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Heads are independent: a batch of calls on one graph is one call with more heads."""
    if any(dim is not None for dim in in_dims[6:12]):
        raise ValueError(
            "segment_attention under vmap takes one graph for the whole batch; join the graphs into one with offset node indices instead"
        )

    def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        batched = tensor.movedim(dim, 1) if dim is not None else tensor.unsqueeze(1).expand(-1, info.batch_size, *tensor.shape[1:])
        return batched.flatten(1, 2).contiguous()

    folded = [fold(tensor, dim) for tensor, dim in zip(arguments[:6], in_dims[:6], strict=True)]
    results = torch.ops.foveal.segment_attention_forward(*folded, *arguments[6:])
    return tuple(result.unflatten(1, (info.batch_size, -1)) for result in results), (1, 1, 1)
