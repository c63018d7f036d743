"""The edges of a graph grouped by the node that receives them, and by the node that sends them.

Direction follows PyTorch Geometric: ``edge_index[0]`` holds the sources j, ``edge_index[1]`` the targets i, messages flow j -> i.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal.kernels.library import operator
from foveal.kernels.segment import cpu

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True, eq=False)
class CSR:
    """Edges sorted by target; within a target they keep the caller's order. Build it once per graph with `from_edge_index`.

    Row i holds positions ``indptr[i]`` to ``indptr[i + 1]``; the edge at position p comes from node ``source[p]`` and is the caller's edge
    ``permutation[p]``. Everything per edge that goes into or comes out of an operator stays in the caller's order.

    Attributes:
        indptr: row pointer, int64.
        source: source node of each position, int64.
        permutation: the caller's edge at each position, int64.
        num_sources: number of nodes that may send; equals the number of targets unless the graph is bipartite.
    """

    indptr: Int[Tensor, "targets+1"]
    source: Int[Tensor, " edges"]
    permutation: Int[Tensor, " edges"]
    num_sources: int
    #: Holds `transposed` once it was asked for: a list, because torch.compile traces it where it does not trace functools.cached_property.
    _turned: list[CSR] = field(default_factory=list, init=False, repr=False)

    @staticmethod
    def from_edge_index(edge_index: Int[Tensor, "2 edges"], num_nodes: int | None = None, num_sources: int | None = None) -> CSR:
        """Sort the edges by target; linear in their number, and stable.

        Args:
            edge_index: sources in row 0, targets in row 1, integers.
            num_nodes: number of targets. Default: one more than the largest target, or than the largest index at all where `num_sources`
                is not given either; reading it stops the GPU and torch.compile, so give it there.
            num_sources: number of sources of a bipartite graph. Default: `num_nodes`.

        Raises:
            TypeError: `edge_index` is not a tensor of integers.
            ValueError: its shape is not (2, edges), or an index is out of range; the message names the edge.
        """
        if not isinstance(edge_index, Tensor) or edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
            found = edge_index.dtype if isinstance(edge_index, Tensor) else type(edge_index).__name__
            raise TypeError(f"edge_index must be a tensor of integers, such as torch.long; got {found}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index must have shape (2, edges), sources then targets; got {tuple(edge_index.shape)}")
        if num_nodes is None:
            counted = edge_index if num_sources is None else edge_index[1]
            num_nodes = int(counted.max()) + 1 if counted.numel() else 0
        num_sources = num_nodes if num_sources is None else num_sources
        if num_nodes < 0 or num_sources < 0:
            raise ValueError(f"num_nodes and num_sources must not be negative; got {num_nodes} and {num_sources}")
        source, target = edge_index.long().contiguous().unbind(0)
        indptr, column, permutation = torch.ops.foveal.segment_csr(target, source, num_nodes, num_sources)
        return CSR(indptr, column, permutation, num_sources)

    @property
    def num_nodes(self) -> int:
        """Number of targets."""
        return self.indptr.shape[0] - 1

    @property
    def num_edges(self) -> int:
        """Number of edges; a pair joined twice counts twice."""
        return self.source.shape[0]

    @property
    def target(self) -> Int[Tensor, " edges"]:
        """Target node of each position: `indptr` written out."""
        return _rows(self.indptr, self.num_edges)

    @property
    def transposed(self) -> CSR:
        """The same edges grouped by source, their `permutation` still the caller's edges: the rows of the keys' and values' gradient.

        Sorted when first asked for, then kept.
        """
        if not self._turned:
            indptr, column, permutation = torch.ops.foveal.segment_transpose(self.indptr, self.source, self.permutation, self.num_sources)
            self._turned.append(CSR(indptr, column, permutation, self.num_nodes))
        return self._turned[0]

    def edge_index(self) -> Int[Tensor, "2 edges"]:
        """Sources and targets in the caller's order, as given to `from_edge_index`."""
        pairs = torch.stack((self.source, self.target))
        return torch.zeros_like(pairs).index_copy(1, self.permutation, pairs)

    def to(self, device: torch.device | str) -> CSR:
        """The same edges on another device."""
        return CSR(self.indptr.to(device), self.source.to(device), self.permutation.to(device), self.num_sources)


def _rows(indptr: Tensor, edges: int) -> Tensor:
    nodes = torch.arange(indptr.shape[0] - 1, device=indptr.device)
    return torch.repeat_interleave(nodes, indptr.diff(), output_size=edges)


def _out_of_range(name: str, index: Tensor, size: int) -> ValueError:
    edge = int(((index < 0) | (index >= size)).nonzero()[0])
    return ValueError(f"{name} of edge {edge} is {int(index[edge])}, but there are {size} {name} nodes: expected 0 <= index < {size}")


def _order(index: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    """Row pointer and stable permutation that group `index` by value."""
    if cpu.why_not(index) is None:
        indptr, permutation, valid = cpu.order(index, size)
    else:
        grouped, permutation = torch.sort(index, stable=True)
        indptr = torch.searchsorted(grouped, torch.arange(size + 1, device=index.device))
        valid = index.numel() == 0 or (int(grouped[0]) >= 0 and int(grouped[-1]) < size)
    if not valid:
        raise _out_of_range(name, index, size)
    return indptr, permutation


@operator("foveal::segment_csr", "(Tensor target, Tensor? source, int targets, int sources) -> (Tensor, Tensor, Tensor)")
def _csr(target: Tensor, source: Tensor | None, targets: int, sources: int) -> tuple[Tensor, Tensor, Tensor]:
    indptr, permutation = _order(target, targets, "target")
    if source is None:
        return indptr, target.new_empty(0), permutation
    if source.numel():
        low, high = torch.aminmax(source)
        if int(low) < 0 or int(high) >= sources:
            raise _out_of_range("source", source, sources)
    return indptr, source[permutation], permutation


@_csr.register_fake
def _(target: Tensor, source: Tensor | None, targets: int, sources: int) -> tuple[Tensor, Tensor, Tensor]:
    return target.new_empty(targets + 1), target.new_empty(0 if source is None else target.shape[0]), torch.empty_like(target)


@operator("foveal::segment_transpose", "(Tensor indptr, Tensor column, Tensor permutation, int columns) -> (Tensor, Tensor, Tensor)")
def _transpose(indptr: Tensor, column: Tensor, permutation: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    turned, order = _order(column, columns, "source")
    return turned, _rows(indptr, column.shape[0])[order], permutation[order]


@_transpose.register_fake
def _(indptr: Tensor, column: Tensor, permutation: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return indptr.new_empty(columns + 1), torch.empty_like(column), torch.empty_like(permutation)
