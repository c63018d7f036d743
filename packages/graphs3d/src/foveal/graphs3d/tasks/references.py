"""What a network need not learn: how much energy each element brings by itself, and how large labels are."""

from __future__ import annotations

from collections.abc import Sequence

import ase
import numpy as np

from foveal.core.errors import UserError
from foveal.graphs3d.data.structures import labels_of


def element_references(structures: Sequence[ase.Atoms], energies: Sequence[float] | np.ndarray, elements: int) -> np.ndarray:
    """Energy of each element (eV, by atomic number) that explains the energies of the structures best, by least squares.

    Where compositions do not tell elements apart the smallest such energies are taken; elements that do not occur have 0.

    Args:
        structures: whose numbers of atoms of each element are looked at.
        energies: eV of each; those that are not finite are left out.
        elements: how many energies are wanted.
    """
    known = np.isfinite(np.asarray(energies, dtype=float))
    references = np.zeros(elements)
    if not known.any():
        return references
    counts = np.stack([np.bincount(atoms.numbers, minlength=elements)[:elements] for atoms, one in zip(structures, known, strict=True) if one])
    present = np.flatnonzero(counts.any(0))
    references[present] = np.linalg.lstsq(counts[:, present].astype(float), np.asarray(energies, dtype=float)[known], rcond=None)[0]
    return references


def force_scale(structures: Sequence[ase.Atoms]) -> float:
    """Root mean square of all force components (eV/A), or, without forces, standard deviation of the energy an atom.

    Raises:
        UserError: no labels at all.
    """
    labels = [labels_of(atoms) for atoms in structures]
    forces = [one["forces"].ravel() for one in labels if "forces" in one]
    if forces:
        scale = float(np.sqrt(np.nanmean(np.square(np.concatenate(forces)))))
    else:
        energies = [float(one["energy"]) / len(atoms) for one, atoms in zip(labels, structures, strict=True) if "energy" in one]
        if not energies:
            raise UserError("expected labelled structures: energy and forces under ASE's names or as REF_energy and REF_forces; none has any")
        scale = float(np.std(energies))
    return scale if scale > 1e-6 else 1.0
