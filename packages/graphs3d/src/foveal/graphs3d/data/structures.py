"""Structures with their labels out of files that ASE reads: extended xyz, ASE databases, trajectories, CIF, POSCAR, OUTCAR."""

from __future__ import annotations

from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.calculator import PropertyNotImplementedError

from foveal.core.errors import UserError

#: Suffixes of files that are looked for in folders; a file that is named may be anything that ASE reads.
SUFFIXES = (".xyz", ".extxyz", ".cif", ".traj", ".db", ".vasp", ".poscar")
#: Property -> unit of its error; energy is an atom's.
UNITS = {"energy": "eV/atom", "forces": "eV/A", "stress": "eV/A^3"}


def labels_of(atoms: ase.Atoms) -> dict[str, np.ndarray]:
    """Energy (eV), forces (eV/A) and stress (eV/A^3, Voigt or 3 by 3) that a file carries, under ASE's names or with the prefix ``REF_``."""
    found: dict[str, np.ndarray] = {}
    if atoms.calc is not None:
        for name in UNITS:
            try:
                value = atoms.calc.get_property(name, atoms, allow_calculation=False)
            except PropertyNotImplementedError:
                continue
            if value is not None:
                found[name] = np.asarray(value, dtype=float)
    for name, place in (("energy", atoms.info), ("stress", atoms.info), ("forces", atoms.arrays)):
        if f"REF_{name}" in place:
            found[name] = np.asarray(place[f"REF_{name}"], dtype=float)
    return found


def without_labels(atoms: ase.Atoms) -> ase.Atoms:
    """A copy without calculator and labels."""
    bare = atoms.copy()
    for name in UNITS:
        bare.info.pop(f"REF_{name}", None)
        bare.arrays.pop(f"REF_{name}", None)
    return bare


def read_structures(path: Path) -> list[ase.Atoms]:
    """All structures of a file of any format that ASE reads.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    try:
        structures = ase.io.read(path, index=":")
    except Exception as error:  # ASE's readers raise whatever their parser meets
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"expected structures in a format that ASE reads; {path} cannot be read: {reason}; check the file") from None
    if not structures:
        raise UserError(f"expected at least one structure in {path}; it is empty")
    return list(structures)
