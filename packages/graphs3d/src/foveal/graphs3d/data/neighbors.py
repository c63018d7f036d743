"""Atoms to the graphs that networks take: every neighbour inside the cutoff, across periodic images, by vesin's cell lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ase
import numpy as np
import torch
import vesin
from jaxtyping import Float, Int
from torch import Tensor

from foveal.core.errors import UserError

#: Atoms closer than this, in A, are taken for a mistake in the file.
_OVERLAP = 0.05


class AtomGraph(NamedTuple):
    """One or more structures, in the order of the network's arguments: ``model(*graph)``.

    Attributes:
        numbers: atomic numbers.
        positions: A.
        cell: rows are the lattice vectors, A; zeros where there is none.
        edge_index: atom that sends, atom that receives.
        edge_offsets: periodic image of the sender, in lattice vectors.
        batch: structure of each atom.
    """

    numbers: Int[Tensor, " atoms"]
    positions: Float[Tensor, "atoms 3"]
    cell: Float[Tensor, "structures 3 3"]
    edge_index: Int[Tensor, "2 edges"]
    edge_offsets: Int[Tensor, "edges 3"]
    batch: Int[Tensor, " atoms"]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AtomGraph:
        """On another device; `dtype` is of positions and cell."""
        moved = (tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None) for tensor in self)
        return AtomGraph(*moved)


class NeighborList:
    """Neighbours of each atom, kept from call to call while no atom has moved by half the skin.

    Pairs up to cutoff + skin are listed once; each call measures them anew and hands out those inside the cutoff, so the result is the same as
    without a skin. A change of cell, elements, number of atoms or periodicity lists anew.

    Args:
        cutoff: A.
        skin: A; 0 lists anew in every call.
        max_neighbors: of each atom the nearest so many are kept; None: all.
    """

    def __init__(self, cutoff: float, skin: float = 0.0, max_neighbors: int | None = None) -> None:
        self.cutoff, self.skin, self.max_neighbors = cutoff, skin, max_neighbors
        #: How often pairs were listed.
        self.builds = 0
        #: Whether the last call left neighbours out because of `max_neighbors`.
        self.truncated = False
        self._listed: ase.Atoms | None = None
        self._pairs: tuple[np.ndarray, np.ndarray, np.ndarray] = (np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3), int))

    def __call__(self, atoms: ase.Atoms) -> AtomGraph:
        """The graph of one structure, float64.

        Raises:
            UserError: no atoms, positions that are not finite, a periodic cell without volume, or atoms that overlap.
        """
        check_structure(atoms)
        if self._moved(atoms):
            self._list(atoms)
        target, source, offsets = self._pairs
        vectors = atoms.positions[source] - atoms.positions[target] + offsets @ atoms.cell.array
        distance = np.linalg.norm(vectors, axis=1)
        if len(distance) and distance.min() < _OVERLAP:
            pair = int(distance.argmin())
            raise _overlapping(int(target[pair]), int(source[pair]), float(distance[pair]))
        kept = np.flatnonzero(distance < self.cutoff)
        if self.max_neighbors is not None:
            inside = len(kept)
            kept = _nearest(kept, target, distance, self.max_neighbors)
            self.truncated = len(kept) < inside
        return AtomGraph(
            torch.from_numpy(atoms.numbers.astype(np.int64)),
            torch.from_numpy(np.array(atoms.positions, dtype=np.float64)),
            torch.from_numpy(np.array(atoms.cell.array, dtype=np.float64)).unsqueeze(0),
            torch.from_numpy(np.stack((source[kept], target[kept])).astype(np.int64)),
            torch.from_numpy(offsets[kept].astype(np.int64)),
            torch.zeros(len(atoms), dtype=torch.long),
        )

    def _moved(self, atoms: ase.Atoms) -> bool:
        listed = self._listed
        if listed is None or self.skin == 0 or len(listed) != len(atoms):
            return True
        same = np.array_equal(listed.cell.array, atoms.cell.array) and np.array_equal(listed.pbc, atoms.pbc)
        if not same or not np.array_equal(listed.numbers, atoms.numbers):
            return True
        return bool((np.square(atoms.positions - listed.positions).sum(1) >= (self.skin / 2) ** 2).any())

    def _list(self, atoms: ase.Atoms) -> None:
        finder = vesin.NeighborList(cutoff=self.cutoff + self.skin, full_list=True, sorted=True, n_threads=torch.get_num_threads())
        # Directions that are not periodic need no lattice vector, but the list needs three independent ones.
        box = atoms.cell.complete().array
        target, source, offsets = finder.compute(points=atoms.positions, box=box, periodic=atoms.pbc, quantities="ijS", copy=True)
        self._pairs = target.astype(np.int64), source.astype(np.int64), offsets.astype(np.int64)
        self._listed = atoms.copy()
        self.builds += 1


def check_structure(atoms: ase.Atoms) -> None:
    """Refuse what no network can answer.

    Raises:
        UserError: no atoms, positions or cell that are not finite, or a periodic cell without volume.
    """
    if len(atoms) == 0:
        raise UserError("expected a structure with at least one atom; it is empty")
    if not np.isfinite(atoms.positions).all():
        atom = int(np.flatnonzero(~np.isfinite(atoms.positions).all(1))[0])
        raise UserError(f"expected finite positions; those of atom {atom} are {atoms.positions[atom].tolist()}")
    if not np.isfinite(atoms.cell.array).all():
        raise UserError(f"expected a finite cell; got {atoms.cell.array.tolist()}")
    periodic = atoms.cell.array[atoms.pbc]
    if len(periodic) and np.linalg.svd(periodic, compute_uv=False)[-1] < 1e-6:
        raise UserError(f"expected independent lattice vectors in the periodic directions; got {periodic.tolist()}; mend the cell or pbc")


def refuse_overlap(atoms: ase.Atoms) -> None:
    """Refuse atoms that lie on one another, where a method that has no list of its own would answer with NaN.

    Raises:
        UserError: names the two that are nearest.
    """
    finder = vesin.NeighborList(cutoff=_OVERLAP, full_list=False)
    first, second, distance = finder.compute(points=atoms.positions, box=atoms.cell.complete().array, periodic=atoms.pbc, quantities="ijd", copy=True)
    if len(distance):
        pair = int(np.argmin(distance))
        raise _overlapping(int(first[pair]), int(second[pair]), float(distance[pair]))


def _overlapping(first: int, second: int, distance: float) -> UserError:
    return UserError(
        f"expected atoms at least {_OVERLAP} A apart; atoms {first} and {second} are {distance:.2g} A apart; remove one, or mend the cell"
    )


def _nearest(
    kept: Int[np.ndarray, " inside"], target: Int[np.ndarray, " pairs"], distance: Float[np.ndarray, " pairs"], most: int
) -> Int[np.ndarray, " fewer"]:
    """Of each target the `most` nearest pairs; of equally far ones the first listed."""
    order = kept[np.lexsort((distance[kept], target[kept]))]
    sorted_target = target[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_target, sorted_target)
    return np.sort(order[rank < most])


def collate(graphs: Sequence[AtomGraph]) -> AtomGraph:
    """Structures as one disconnected graph."""
    starts = np.cumsum([0, *(len(graph.numbers) for graph in graphs)]).tolist()
    structures = np.cumsum([0, *(len(graph.cell) for graph in graphs)]).tolist()
    return AtomGraph(
        torch.cat([graph.numbers for graph in graphs]),
        torch.cat([graph.positions for graph in graphs]),
        torch.cat([graph.cell for graph in graphs]),
        torch.cat([graph.edge_index + start for graph, start in zip(graphs, starts, strict=False)], 1),
        torch.cat([graph.edge_offsets for graph in graphs]),
        torch.cat([graph.batch + first for graph, first in zip(graphs, structures, strict=False)]),
    )
