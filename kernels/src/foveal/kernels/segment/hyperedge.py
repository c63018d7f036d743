"""Hypergraphs: features flow from nodes into hyperedges and from hyperedges back to nodes, along a sparse incidence.

The incidence is a CSR whose targets are hyperedges and whose sources are nodes; its transpose, which `CSR` keeps, is the way back and the
way of every gradient. Both ways are segment operators: nothing of size incidences x heads x dim is stored, and there are no atomics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal.kernels.dispatch import Candidates, choose, why_not_triton
from foveal.kernels.segment import cpu
from foveal.kernels.segment.composed import weighted_sum
from foveal.kernels.segment.csr import CSR
from foveal.kernels.segment.op import segment_attention

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def hyperedge_mean(
    x: Float[Tensor, "nodes channels"],
    incidence: CSR | Int[Tensor, "2 incidences"],
    *,
    edge_weight: Float[Tensor, " hyperedges"] | None = None,
    num_edges: int | None = None,
    return_edges: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Hypergraph convolution's smoothing: the mean of each hyperedge's nodes, then the weighted mean of each node's hyperedges.

    .. math:: y_e = \frac{1}{|e|} \sum_{v \in e} x_v, \quad o_v = \frac{\sum_{e \ni v} w_e y_e}{\sum_{e \ni v} w_e},
              \quad\text{or}\quad D^{-1} H W B^{-1} H^\top x

    A hyperedge without nodes and a node without hyperedges give 0. Gradients of every order, of x and of the weights.

    Args:
        x: node features, (nodes, channels).
        incidence: (2, incidences), nodes in row 0 and their hyperedges in row 1, as PyTorch Geometric's ``hyperedge_index``; or a `CSR` built from
            it once: ``CSR.from_edge_index(incidence, num_nodes=hyperedges, num_sources=nodes)``.
        edge_weight: weight of each hyperedge, not negative; 1 by default.
        num_edges: number of hyperedges where `incidence` is a tensor; default: one more than the largest.
        return_edges: also return y, (hyperedges, channels).
        backend: "triton", "cpu" (C) or "reference" (gather and scatter); by default the first that can.

    Returns:
        Node features (nodes, channels), and with `return_edges` those of the hyperedges.

    Raises:
        TypeError: x is not floating.
        ValueError: shapes that do not fit, an index out of range, or `backend` cannot run the call.

    References:
        Feng et al., Hypergraph Neural Networks, 2019, equation 11; Bai et al., Hypergraph Convolution and Hypergraph Attention, 2021.
    """
    edges = _incidence(x, incidence, num_edges)
    chosen = choose("hyperedge_mean", _mean_backends(x), backend)
    wide = torch.promote_types(x.dtype, torch.float32)
    node, edge = edges.edge_index()
    sizes = edges.indptr.diff()
    if edge_weight is not None and edge_weight.shape != (edges.num_nodes,):
        raise ValueError(f"edge_weight must have shape ({edges.num_nodes},), one a hyperedge; got {tuple(edge_weight.shape)}")
    weight = torch.ones(edges.num_nodes, dtype=wide, device=x.device) if edge_weight is None else edge_weight.to(wide)
    spoken = weight.index_select(0, edge)
    total = _scattered(spoken.unsqueeze(1), node, edges.num_sources).squeeze(1)
    into = (1 / sizes.clamp(min=1).to(wide)).index_select(0, edge)
    back = spoken / torch.where(total == 0, 1.0, total).index_select(0, node)
    if chosen == "reference":
        pooled = _scattered(into.unsqueeze(1) * x.index_select(0, node).to(wide), edge, edges.num_nodes).to(x.dtype)
        out = _scattered(back.unsqueeze(1) * pooled.index_select(0, edge).to(wide), node, edges.num_sources).to(x.dtype)
    else:
        there = (edges.indptr, edges.source, edges.permutation)
        turned = (edges.transposed.indptr, edges.transposed.source, edges.transposed.permutation)
        pooled = weighted_sum(into.unsqueeze(1), x.unsqueeze(1), *there, *turned, chosen).squeeze(1)
        out = weighted_sum(back.unsqueeze(1), pooled.unsqueeze(1), *turned, *there, chosen).squeeze(1)
    return (out, pooled) if return_edges else out


def hyperedge_attention(
    q: Float[Tensor, "nodes heads dim"],
    k: Float[Tensor, "nodes heads dim"],
    v: Float[Tensor, "nodes heads value_dim"],
    edge_query: Float[Tensor, "hyperedges heads dim"],
    incidence: CSR | Int[Tensor, "2 incidences"],
    *,
    bias: Float[Tensor, "incidences heads"] | Float[Tensor, " incidences"] | None = None,
    back_bias: Float[Tensor, "incidences heads"] | Float[Tensor, " incidences"] | None = None,
    scale: float | None = None,
    return_edges: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Attention of nodes through the hyperedges they belong to: each hyperedge gathers its nodes, each node reads its hyperedges.

    .. math:: a_{ev} = \mathrm{softmax}_{v \in e}(s\, p_e \cdot k_v + b_{ev}), \quad \hat k_e = \sum_v a_{ev} k_v, \quad \hat v_e = \sum_v a_{ev} v_v

    .. math:: o_v = \sum_{e \ni v} \mathrm{softmax}_{e \ni v}(s\, q_v \cdot \hat k_e + b'_{ve})\, \hat v_e

    p_e is `edge_query`. Keys and values are gathered in one walk. Cost: linear in the number of incidences; nodes of one hyperedge never meet in
    pairs. A node without hyperedges gives 0. Gradients of every order.

    Args:
        q: what a node asks of its hyperedges, (nodes, heads, dim).
        k: what a node shows to its hyperedges, (nodes, heads, dim).
        v: node values, (nodes, heads, value_dim).
        edge_query: what a hyperedge asks of its nodes, (hyperedges, heads, dim); learned, or made of the hyperedge's features.
        incidence: as in `hyperedge_mean`.
        bias: added to the logits on the way in, in the order of the incidences.
        back_bias: added to the logits on the way back.
        scale: default ``dim ** -0.5``.
        return_edges: also return the hyperedges' values, (hyperedges, heads, value_dim).
        backend: as in `segment_attention`.

    Returns:
        Node values (nodes, heads, value_dim), and with `return_edges` those of the hyperedges.

    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ.
        ValueError: shapes that do not fit, or an index out of range.

    References:
        Ding et al., Be More with Less: Hypergraph Attention Networks, 2020; Chien et al., You are AllSet, 2022. Both gather and scatter by attention.
    """
    edges = _incidence(k, incidence, edge_query.shape[0])
    dim = k.shape[-1]
    both = torch.cat([k, v], -1)
    gathered = segment_attention(edge_query, k, both, edges, edge_bias=bias, scale=scale, backend=backend)
    edge_key, edge_value = gathered.split([dim, v.shape[-1]], -1)
    out = segment_attention(q, edge_key, edge_value, edges.transposed, edge_bias=back_bias, scale=scale, backend=backend)
    return (out, edge_value) if return_edges else out


def _incidence(x: Tensor, incidence: CSR | Tensor, num_edges: int | None) -> CSR:
    """Hyperedges as targets, nodes as sources."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"node features must be a floating tensor; got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"node features must have shape (nodes, channels), or (nodes, heads, dim); got {tuple(x.shape)}")
    if isinstance(incidence, CSR):
        if incidence.num_sources != x.shape[0] or (num_edges is not None and incidence.num_nodes != num_edges):
            counted = f"{incidence.num_sources} nodes and {incidence.num_nodes} hyperedges"
            wanted = f"{x.shape[0]} nodes" + ("" if num_edges is None else f" and {num_edges} hyperedges")
            raise ValueError(
                f"the incidence has {counted}, expected {wanted}: CSR.from_edge_index(incidence, num_nodes=hyperedges, num_sources=nodes)"
            )
        return incidence
    return CSR.from_edge_index(incidence, num_edges, x.shape[0])


def _scattered(values: Tensor, index: Tensor, size: int) -> Tensor:
    return values.new_zeros(size, values.shape[1]).index_add(0, index, values)


def _mean_backends(x: Tensor) -> Candidates:
    return [("triton", why_not_triton(x)), ("cpu", cpu.why_not(x)), ("reference", None)]


def _mean_candidates(x: Tensor, incidence: CSR | Tensor, *, num_edges: int | None = None, **_: Any) -> Candidates:
    _incidence(x, incidence, num_edges)
    return _mean_backends(x)


def _attention_candidates(q: Tensor, k: Tensor, v: Tensor, edge_query: Tensor, incidence: CSR | Tensor, **_: Any) -> Candidates:
    edges = _incidence(k, incidence, edge_query.shape[0])
    return segment_attention.candidates(edge_query, k, torch.cat([k, v], -1), edges)  # type: ignore[attr-defined]


hyperedge_mean.candidates = _mean_candidates  # type: ignore[attr-defined]
hyperedge_attention.candidates = _attention_candidates  # type: ignore[attr-defined]
