"""Equations of state: energy against volume, the volume of lowest energy, and the bulk modulus."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator
from ase.eos import EquationOfState

from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.reports import Entry
from foveal.graphs3d.data.structures import without_labels
from foveal.graphs3d.file_runs import Going, calculator_of, run_files
from foveal.graphs3d.plots import draw_equation_of_state
from foveal.graphs3d.relax import evaluate_together, relax

EQUATIONS = ("birchmurnaghan", "birch", "murnaghan", "vinet", "pouriertarantola", "sjeos")
#: How often volumes are centred anew on those of lower energy.
_CENTERINGS = 6


@dataclass(frozen=True)
class Fit:
    """An equation of state.

    Attributes:
        volumes: A^3 of the cell.
        energies: eV of the cell.
        volume: of lowest energy, A^3.
        energy: there, eV.
        bulk_modulus: there, GPa.
        residual: root mean square distance of the energies from the curve, meV an atom.
        curve: volumes and energies of the fitted curve.
    """

    volumes: np.ndarray
    energies: np.ndarray
    volume: float
    energy: float
    bulk_modulus: float
    residual: float
    curve: tuple[np.ndarray, np.ndarray]


def equation_of_state(
    atoms: ase.Atoms, calculator: Calculator, span: float = 0.06, points: int = 11, relax_atoms: bool = True, equation: str = "birchmurnaghan"
) -> Fit:
    """Energies of the structure scaled uniformly, all evaluated together, and the equation that fits them.

    Where the energies fall towards an end of the volumes, these are centred anew.

    Args:
        atoms: periodic throughout.
        calculator: of the energies.
        span: largest change of volume, as a share.
        points: volumes.
        relax_atoms: in each cell, where symmetry leaves forces.
        equation: of `EQUATIONS`.

    Raises:
        UserError: not periodic, an unknown equation, energies without a minimum in the span, or a structure that cannot be computed.
    """
    if not atoms.pbc.all():
        raise UserError(f"expected a structure that is periodic in all directions; got pbc {atoms.pbc.tolist()}")
    if equation not in EQUATIONS:
        raise UserError(f"expected --equation {', '.join(EQUATIONS)}; got {equation!r}")
    center = 1.0
    for _ in range(_CENTERINGS):
        scaled = _scaled(atoms, center * np.linspace(1 - span, 1 + span, points))
        if relax_atoms:
            energies = np.array([run.energies[-1] for run in relax(scaled, calculator, fmax=0.005, steps=300)])
        else:
            energies = np.array([result["energy"] for result in evaluate_together(scaled, calculator)])
        lowest = int(energies.argmin())
        if 0 < lowest < points - 1:
            break
        # The energies fall towards one end: look there.
        center *= 1 - span if lowest == 0 else 1 + span
    volumes = np.array([one.get_volume() for one in scaled])
    fit = EquationOfState(volumes, energies, eos=equation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume, energy, modulus = fit.fit()
            curve_volumes, curve_energies = fit.getplotdata()[4:6]
            at_points = fit.func(volumes, *fit.eos_parameters)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"expected energies that an equation of state fits: {' '.join(str(error).split())[:120]}; look at the volumes") from None
    if not volumes.min() <= volume <= volumes.max() or not modulus > 0:
        raise UserError(
            f"expected a volume of lowest energy; between {volumes.min():.2f} and {volumes.max():.2f} A^3 the energies have none; "
            "start from a relaxed cell, or raise --span"
        )
    residual = 1000 * float(np.sqrt(np.square(at_points - energies).mean())) / len(atoms)
    curve = (np.asarray(curve_volumes), np.asarray(curve_energies))
    return Fit(volumes, energies, float(volume), float(energy), float(modulus / units.GPa), residual, curve)


def _scaled(atoms: ase.Atoms, shares: np.ndarray) -> list[ase.Atoms]:
    structures = []
    for share in shares:
        one = without_labels(atoms)
        one.set_cell(atoms.cell.array * np.cbrt(share), scale_atoms=True)
        structures.append(one)
    return structures


def eos_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    method: str | None = None,
    span: float = 0.06,
    points: int = 11,
    relax_atoms: bool = True,
    equation: str = "birchmurnaghan",
    device: str = "auto",
    dtype: str = "float64",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d eos`` does: volumes and energies as a table, a picture with the fit, and its numbers.

    Args:
        files: of any format that ASE reads, and folders of them; every structure of each.
        output: folder for the results; None is ``eos`` here.
        checkpoint: weights of ours; None: the package's.
        method: a reference method instead of a network.
        span: see `equation_of_state`.
        points: see `equation_of_state`.
        relax_atoms: see `equation_of_state`.
        equation: see `equation_of_state`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        dtype: ``float32`` or ``float64``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a structure could not be computed.

    Raises:
        UserError: numbers that cannot be; no inputs, weights that cannot be loaded, or an output folder that cannot be written.
    """
    if not 0 < span < 0.5 or points < 5:
        raise UserError(f"expected --span above 0 and below 0.5, and --points of 5 or more; got {span} and {points}")
    calculator = calculator_of(checkpoint, method, device, dtype)

    def work(structures: list[ase.Atoms], target: Path, entry: Entry) -> None:
        stem, summary, going = target.name.removesuffix("_eos.json"), [], Going()
        for index, atoms in enumerate(structures):
            with going.past(index):
                fit = equation_of_state(atoms, calculator, span, points, relax_atoms, equation)
                prefix = stem if len(structures) == 1 else f"{stem}_{index}"
                table, picture = target.with_name(f"{prefix}_eos.csv"), target.with_name(f"{prefix}_eos.png")
                with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
                    writer = csv.writer(stream)
                    writer.writerow(["volume A^3", "energy eV"])
                    writer.writerows([f"{volume:.6f}", f"{energy:.8f}"] for volume, energy in zip(fit.volumes, fit.energies, strict=True))
                with atomic_write(picture) as temporary:
                    draw_equation_of_state(fit.volumes, fit.energies, fit.curve, fit.volume, fit.bulk_modulus, len(atoms)).savefig(temporary, dpi=150)
                entry.outputs += [str(table), str(picture)]
                summary.append(
                    {
                        "structure": index,
                        "atoms": len(atoms),
                        "volume A^3/atom": fit.volume / len(atoms),
                        "energy eV/atom": fit.energy / len(atoms),
                        "bulk modulus GPa": fit.bulk_modulus,
                        "residual meV/atom": fit.residual,
                    }
                )
        going.refuse_all(len(structures))
        with atomic_write(target) as temporary:
            temporary.write_text(json.dumps({"equation": equation, "structures": summary}, indent=2), encoding="utf-8")
        entry.outputs.append(str(target))
        if len(summary) == 1:
            entry.numbers = {name: float(value) for name, value in summary[0].items() if name not in ("structure", "atoms")}
        else:
            entry.numbers = {"structures": float(len(summary))}
        going.tell()

    columns = {"structures": ".0f", "volume A^3/atom": ".4f", "energy eV/atom": ".5f", "bulk modulus GPa": ".1f"}
    return run_files(files, output or Path("eos"), "eos.json", work, overwrite, as_json, columns)
