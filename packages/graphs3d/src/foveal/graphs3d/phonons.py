"""Vibrations by finite displacements, all evaluated together: bands and density of states of crystals by phonopy, normal modes of molecules."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator
from ase.vibrations import VibrationsData

from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.reports import Entry
from foveal.graphs3d.data.structures import without_labels
from foveal.graphs3d.file_runs import calculator_of, run_files
from foveal.graphs3d.plots import draw_bands, draw_modes
from foveal.graphs3d.relax import evaluate_together, relax

#: A supercell is at least so long in every direction, A, unless its size is given.
_LENGTH = 10.0
#: meV; vibrations below minus this count as imaginary.
_IMAGINARY = 1.0


@dataclass(frozen=True)
class Bands:
    """Phonons of a crystal, THz.

    Attributes:
        distances: along the path, of each of its segments.
        frequencies: (points, bands) of each segment; imaginary ones are negative.
        marks: (distance, name) of the special points.
        dos: frequencies and densities.
        thermal: temperature (K), free energy (kJ/mol), entropy (J/K/mol), heat capacity (J/K/mol) of the primitive cell.
        supercell: repeats of the cell.
    """

    distances: list[np.ndarray]
    frequencies: list[np.ndarray]
    marks: list[tuple[float, str]]
    dos: tuple[np.ndarray, np.ndarray]
    thermal: np.ndarray
    supercell: tuple[int, int, int]


def supercell_of(atoms: ase.Atoms) -> tuple[int, int, int]:
    """Repeats after which every edge of the cell is 10 A long."""
    first, second, third = (max(1, int(np.ceil(_LENGTH / length))) for length in atoms.cell.lengths())
    return first, second, third


def crystal_phonons(
    atoms: ase.Atoms,
    calculator: Calculator,
    supercell: tuple[int, int, int] | None = None,
    displacement: float = 0.01,
    points: int = 51,
    mesh: float = 40.0,
) -> Bands:
    """Bands along the path that the lattice asks for, density of states, and what follows from it.

    Args:
        atoms: relaxed, periodic throughout.
        calculator: of the forces.
        supercell: repeats of the cell; None: at least 10 A in each direction.
        displacement: A.
        points: of each segment of the path.
        mesh: length of the mesh of the density of states, A.

    Raises:
        UserError: phonopy is not installed, or a structure that cannot be computed.
    """
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError:
        raise UserError("expected phonopy for the phonons of crystals; it is not installed; pip install 'foveal-graphs3d[phonons]'") from None
    repeats = supercell or supercell_of(atoms)
    unit = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, scaled_positions=atoms.get_scaled_positions())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # phonopy warns of the acoustic modes at the zone's centre, which every crystal has
        phonon = Phonopy(unit, np.diag(repeats), primitive_matrix=np.eye(3))
        phonon.generate_displacements(distance=displacement)
        moved = [
            ase.Atoms(one.symbols, cell=one.cell, scaled_positions=one.scaled_positions, pbc=True)
            for one in phonon.supercells_with_displacements or []
            if one is not None
        ]
        phonon.forces = np.array([result["forces"] for result in evaluate_together(moved, calculator)])
        phonon.produce_force_constants()
        phonon.symmetrize_force_constants()
        path = atoms.cell.bandpath()
        segments, names = _segments(path, points)
        phonon.run_band_structure(segments)
        bands: Any = phonon.get_band_structure_dict()
        phonon.run_mesh(mesh)
        phonon.run_total_dos()
        phonon.run_thermal_properties(t_min=0, t_max=1000, t_step=20)
        dos: Any = phonon.get_total_dos_dict()
        thermal: Any = phonon.get_thermal_properties_dict()
    marks: list[tuple[float, str]] = []
    for distance, (start, end) in zip(bands["distances"], names, strict=True):
        for place, name in ((float(distance[0]), start), (float(distance[-1]), end)):
            if marks and abs(marks[-1][0] - place) < 1e-9:
                marks[-1] = (place, marks[-1][1] if name in marks[-1][1].split("|") else f"{marks[-1][1]}|{name}")
            else:
                marks.append((place, name))
    keys = ("temperatures", "free_energy", "entropy", "heat_capacity")
    return Bands(
        [np.asarray(one) for one in bands["distances"]],
        [np.asarray(one) for one in bands["frequencies"]],
        marks,
        (np.asarray(dos["frequency_points"]), np.asarray(dos["total_dos"])),
        np.stack([np.asarray(thermal[key]) for key in keys], 1),
        repeats,
    )


def _segments(path: Any, points: int) -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """The straight pieces of ASE's path, and the names of their ends."""
    segments, names = [], []
    for piece in path.path.split(","):
        stops = _stops(piece)
        for start, end in pairwise(stops):
            segments.append(np.linspace(path.special_points[start], path.special_points[end], points))
            names.append((start, end))
    return segments, names


def _stops(piece: str) -> list[str]:
    """GXM1 -> G, X, M1."""
    stops: list[str] = []
    for letter in piece:
        if letter.isdigit() or letter == "'":
            stops[-1] += letter
        else:
            stops.append(letter)
    return stops


def hessian(atoms: ase.Atoms, calculator: Calculator, displacement: float = 0.01) -> np.ndarray:
    """(3 atoms, 3 atoms) second derivatives of the energy, eV/A^2, by central differences of the forces.

    Raises:
        UserError: a structure that cannot be computed.
    """
    moved = []
    for atom in range(len(atoms)):
        for axis in range(3):
            for sign in (1, -1):
                one = without_labels(atoms)
                one.positions[atom, axis] += sign * displacement
                moved.append(one)
    forces = np.array([result["forces"].ravel() for result in evaluate_together(moved, calculator)])
    matrix = (forces[1::2] - forces[::2]) / (2 * displacement)
    return (matrix + matrix.T) / 2


def molecule_modes(atoms: ase.Atoms, calculator: Calculator, displacement: float = 0.01) -> VibrationsData:
    """Normal modes of a molecule, the six (five) of its motion as a whole included.

    Raises:
        UserError: a structure that cannot be computed.
    """
    return VibrationsData.from_2d(atoms, hessian(atoms, calculator, displacement))


def _rigid(atoms: ase.Atoms) -> int:
    """Motions of a molecule as a whole, whose frequency is zero but for rounding and forces that are left."""
    if len(atoms) == 1:
        return 3
    return 5 if atoms.get_moments_of_inertia().min() < 1e-3 else 6


def phonons_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    method: str | None = None,
    supercell: tuple[int, int, int] | None = None,
    displacement: float = 0.01,
    relax_first: bool = True,
    fmax: float = 0.001,
    device: str = "auto",
    dtype: str = "float64",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d phonons`` does: frequencies as a table, a picture, a summary, and the structure that they belong to.

    Args:
        files: of any format that ASE reads, and folders of them; of each the first structure.
        output: folder for the results; None is ``phonons`` here.
        checkpoint: weights of ours; None: the package's.
        method: a reference method instead of a network.
        supercell: see `crystal_phonons`.
        displacement: A.
        relax_first: relax the atoms in their cell; otherwise they are taken as they stand.
        fmax: eV/A, of that relaxation.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        dtype: ``float32`` or ``float64``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a structure could not be computed.

    Raises:
        UserError: numbers that cannot be; no inputs, weights that cannot be loaded, or an output folder that cannot be written.
    """
    if not displacement > 0 or not fmax > 0 or (supercell is not None and min(supercell) < 1):
        raise UserError("expected positive --displacement and --fmax, and a --supercell of at least 1 1 1")
    calculator = calculator_of(checkpoint, method, device, dtype)

    def work(structures: list[ase.Atoms], target: Path, entry: Entry) -> None:
        atoms = structures[0]
        if atoms.pbc.any() and not atoms.pbc.all():
            raise UserError(f"expected a crystal, periodic in all directions, or a molecule, periodic in none; got pbc {atoms.pbc.tolist()}")
        if relax_first:
            run = relax([atoms], calculator, fmax, 1000, optimizer="bfgs")[0]
            if not run.converged:
                raise UserError(f"expected a minimum; the forces stay at {run.forces[-1]:.4f} eV/A; relax the structure first, or raise --fmax")
            atoms = run.atoms
        stem = target.name.removesuffix("_phonons.json")
        table, picture, geometry = (target.with_name(f"{stem}_{ending}") for ending in ("phonons.csv", "phonons.png", "phonons.extxyz"))
        about = _crystal(atoms, table, picture) if atoms.pbc.all() else _molecule(atoms, table, picture)
        with atomic_write(geometry) as temporary:
            ase.io.write(temporary, atoms, format="extxyz")
        with atomic_write(target) as temporary:
            temporary.write_text(json.dumps(about, indent=2), encoding="utf-8")
        entry.outputs = [str(path) for path in (target, table, picture, geometry)]
        entry.numbers = {name: float(value) for name, value in about.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
        entry.message = "" if len(structures) == 1 else f"the first of {len(structures)} structures"

    def _crystal(atoms: ase.Atoms, table: Path, picture: Path) -> dict[str, Any]:
        bands = crystal_phonons(atoms, calculator, supercell, displacement)
        with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["distance", *(f"band {band} THz" for band in range(1, bands.frequencies[0].shape[1] + 1))])
            for distances, rows in zip(bands.distances, bands.frequencies, strict=True):
                writer.writerows([f"{place:.6f}", *(f"{value:.6f}" for value in row)] for place, row in zip(distances, rows, strict=True))
        with atomic_write(picture) as temporary:
            draw_bands(bands.distances, bands.frequencies, bands.marks, bands.dos, atoms.get_chemical_formula()).savefig(temporary, dpi=150)
        lowest, highest = (float(pick([pick(rows) for rows in bands.frequencies])) for pick in (np.min, np.max))
        room = bands.thermal[np.argmin(abs(bands.thermal[:, 0] - 300))]
        return {
            "lowest THz": lowest,
            "highest THz": highest,
            "heat capacity 300 K J/K/mol": float(room[3]),
            "supercell": list(bands.supercell),
            "stable": lowest > -0.1,
        }

    def _molecule(atoms: ase.Atoms, table: Path, picture: Path) -> dict[str, Any]:
        vibrations = molecule_modes(atoms, calculator, displacement)
        energies = vibrations.get_energies()
        # Sorted by ASE from imaginary to real; of the zero modes of the whole molecule both kinds occur.
        values = 1000 * np.where(abs(energies.imag) > abs(energies.real), -abs(energies.imag), energies.real)
        wavenumbers = values / 1000 / units.invcm
        with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["mode", "energy meV", "wavenumber 1/cm"])
            writer.writerows([index, f"{value:.4f}", f"{wave:.3f}"] for index, (value, wave) in enumerate(zip(values, wavenumbers, strict=True)))
        rigid = np.zeros(len(values), dtype=bool)
        rigid[np.argsort(abs(values))[: _rigid(atoms)]] = True
        with atomic_write(picture) as temporary:
            draw_modes(wavenumbers, rigid, atoms.get_chemical_formula()).savefig(temporary, dpi=150)
        inside = values[~rigid]
        return {
            "vibrations": len(inside),
            "imaginary": int((inside < -_IMAGINARY).sum()),
            "highest 1/cm": float(wavenumbers.max()),
            "zero-point energy eV": float(np.clip(inside, 0, None).sum() / 2000),
        }

    columns = {"vibrations": ".0f", "imaginary": ".0f", "highest 1/cm": ".0f", "lowest THz": ".3f", "highest THz": ".2f"}
    return run_files(files, output or Path("phonons"), "phonons.json", work, overwrite, as_json, columns)
