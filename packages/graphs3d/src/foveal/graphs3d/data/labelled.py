"""Structures with labels as graphs to learn from: what a batch holds, and how atoms are corrupted for denoising."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ase
import numpy as np
import torch
from ase.constraints import FixAtoms
from ase.data import chemical_symbols
from ase.stress import voigt_6_to_full_3x3_stress
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import Dataset

from foveal.core.errors import UserError
from foveal.graphs3d.data.neighbors import AtomGraph, NeighborList, collate
from foveal.graphs3d.data.structures import labels_of


class Noise(NamedTuple):
    """How atoms were moved before the graph was made.

    Attributes:
        shift: divided by its standard deviation; zero where nothing was moved.
        corrupted: atoms that were moved.
        structures: structures with such atoms.
    """

    shift: Float[Tensor, "atoms 3"]
    corrupted: Bool[Tensor, " atoms"]
    structures: Bool[Tensor, " structures"]


class Labelled(NamedTuple):
    """One or more structures with labels; a label that the data does not have is NaN.

    Attributes:
        graph: of the atoms, moved or not.
        energy: eV.
        forces: eV/A, of the atoms before they were moved.
        stress: eV/A^3.
        free: atoms that are not held fixed; forces on the others are not learned.
        noise: for denoising.
    """

    graph: AtomGraph
    energy: Float[Tensor, " structures"]
    forces: Float[Tensor, "atoms 3"]
    stress: Float[Tensor, "structures 3 3"]
    free: Bool[Tensor, " atoms"]
    noise: Noise | None = None


@dataclass(frozen=True)
class Corruption:
    """Which atoms denoising moves (DeNS: Liao, Smidt, Shuaibi, Das, 2024).

    Attributes:
        probability: that a structure is corrupted.
        ratio: that an atom of it is moved.
        std: A, of the normal displacement in each direction.
        max_ratio: structures of which a larger share of atoms happens to be drawn are left as they are.
        max_force: eV/A; structures with a larger force on an atom are left as they are; None: all are taken.
    """

    probability: float = 0.5
    ratio: float = 0.5
    std: float = 0.025
    max_ratio: float = 0.75
    max_force: float | None = None

    def draw(self, atoms: ase.Atoms, forces: Float[np.ndarray, "atoms 3"], free: Bool[np.ndarray, " atoms"]) -> Noise:
        """Displacements, by torch's generator."""
        chosen = bool(torch.rand(()) < self.probability) and bool(np.isfinite(forces).all())
        if self.max_force is not None and chosen:
            chosen = bool((np.linalg.norm(forces, axis=1) <= self.max_force).all())
        moved = (torch.rand(len(atoms)) < self.ratio) & torch.from_numpy(free) & chosen
        moved &= moved.double().mean() <= self.max_ratio
        shift = torch.where(moved.unsqueeze(1), torch.randn(len(atoms), 3, dtype=torch.float64), 0.0)
        return Noise(shift, moved, moved.any().unsqueeze(0))


class LabelledGraphs(Dataset):
    """Structures as `Labelled`, in float64.

    Args:
        structures: with labels.
        cutoff: A.
        max_neighbors: of each atom the nearest so many are kept.
        corruption: moves atoms; None: none.
        max_elements: of the network: atomic numbers go below it; None: any.
    """

    def __init__(
        self, structures: Sequence[ase.Atoms], cutoff: float, max_neighbors: int | None = None, corruption: Corruption | None = None,
        max_elements: int | None = None,
    ) -> None:  # fmt: skip
        self.structures, self.corruption, self.max_elements = structures, corruption, max_elements
        self._neighbors = NeighborList(cutoff, 0.0, max_neighbors)

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> Labelled:
        try:
            return self._labelled(self.structures[index])
        except UserError as error:
            raise UserError(f"structure {index}: {error}") from None

    def _labelled(self, atoms: ase.Atoms) -> Labelled:
        labels, count = labels_of(atoms), len(atoms)
        if self.max_elements is not None and count and int(atoms.numbers.max()) >= self.max_elements:
            last, strange = (chemical_symbols[number] for number in (self.max_elements - 1, int(atoms.numbers.max())))
            raise UserError(
                f"expected elements up to {last}, which is what the network has room for (max_elements {self.max_elements}); got {strange}; leave "
                "the structure out, or train a network with more"
            )
        forces = labels.get("forces", np.full((count, 3), np.nan))
        if forces.shape != (count, 3):
            raise UserError(f"expected forces of shape ({count}, 3); got {forces.shape}")
        stress = labels.get("stress", np.full((3, 3), np.nan))
        stress = voigt_6_to_full_3x3_stress(stress) if stress.size == 6 else stress.reshape(3, 3)
        free = np.ones(count, dtype=bool)
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                free[constraint.index] = False
        noise = None
        if self.corruption is not None:
            noise = self.corruption.draw(atoms, forces, free)
            moved = atoms.copy()
            moved.positions = atoms.positions + self.corruption.std * noise.shift.numpy()
            atoms = moved
        energy = torch.tensor([float(labels.get("energy", np.nan))], dtype=torch.float64)
        known_forces, known_stress = (torch.from_numpy(np.array(array, dtype=np.float64)) for array in (forces, stress[None]))
        return Labelled(self._neighbors(atoms), energy, known_forces, known_stress, torch.from_numpy(free), noise)


def collate_labelled(items: Sequence[Labelled]) -> Labelled:
    """Structures as one disconnected graph with all their labels."""
    noise = [item.noise for item in items if item.noise is not None]
    if noise and len(noise) < len(items):
        raise ValueError(f"expected noise of all structures or of none; got {len(noise)} of {len(items)}")
    return Labelled(
        collate([item.graph for item in items]),
        torch.cat([item.energy for item in items]),
        torch.cat([item.forces for item in items]),
        torch.cat([item.stress for item in items]),
        torch.cat([item.free for item in items]),
        Noise(*(torch.cat(parts) for parts in zip(*noise, strict=True))) if noise else None,
    )
