"""Relaxation of many structures at once: each has its own optimiser of ASE's, and one evaluation of the network serves a step of all."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS

from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.reports import Entry
from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.data.structures import without_labels
from foveal.graphs3d.file_runs import Going, calculator_of, run_files
from foveal.graphs3d.methods import label
from foveal.graphs3d.plots import draw_relaxation

OPTIMIZERS: dict[str, Any] = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}


class Handed(Calculator):
    """A calculator that is handed its results, by whoever evaluates many structures together."""

    def __init__(self) -> None:
        super().__init__()
        self.implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]
        self.given: dict[str, Any] = {}

    def calculate(self, atoms: ase.Atoms | None = None, properties: Sequence[str] = ("energy",), system_changes: Sequence[str] = all_changes) -> None:
        """Take over what was handed."""
        super().calculate(atoms, properties, system_changes)
        if not self.given:
            raise RuntimeError("the structure moved and nothing was handed for it; an optimiser with a line search needs a calculator of its own")
        self.results, self.given = self.given, {}


def evaluate_together(structures: Sequence[ase.Atoms], calculator: Calculator, neighbors: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """Results of many structures: together by a network, one after the other by any other calculator.

    Raises:
        UserError: a structure that cannot be computed.
    """
    if isinstance(calculator, FovealCalculator):
        return calculator.batch(structures, neighbors)
    return [label(atoms, calculator).calc.results for atoms in structures]


@dataclass
class Relaxation:
    """What became of one structure.

    Attributes:
        atoms: relaxed, with its energy, forces and stress.
        converged: whether the largest force is below the limit.
        energies: eV, of each step.
        forces: eV/A, the largest of each step (with the cell's, where it moves).
        frames: of each step.
    """

    atoms: ase.Atoms
    converged: bool = False
    energies: list[float] = field(default_factory=list)
    forces: list[float] = field(default_factory=list)
    frames: list[ase.Atoms] = field(default_factory=list)


def relax(
    structures: Sequence[ase.Atoms], calculator: Calculator, fmax: float = 0.02, steps: int = 500, cell: bool = False, optimizer: str = "fire"
) -> list[Relaxation]:
    """Relax structures together.

    Args:
        structures: their constraints hold.
        calculator: a network's, or any of ASE's.
        fmax: eV/A, that the largest force must come below.
        steps: at most.
        cell: the lattice of structures that are periodic throughout relaxes too.
        optimizer: of `OPTIMIZERS`.

    Raises:
        UserError: an unknown optimiser, a structure that cannot be computed, or a lattice to relax without stress.
    """
    if optimizer not in OPTIMIZERS:
        raise UserError(f"expected --optimizer {', '.join(OPTIMIZERS)}; got {optimizer!r}")
    if cell and "stress" not in calculator.implemented_properties:
        raise UserError("expected a potential with stress to relax the cell; this one has none; relax without --cell, or use other weights")
    moving = [without_labels(atoms) for atoms in structures]
    runs = [Relaxation(atoms) for atoms in moving]
    lists = [calculator.new_neighbors(0.5) for _ in moving] if isinstance(calculator, FovealCalculator) else None
    movers = []
    for atoms in moving:
        atoms.calc = Handed()
        target = FrechetCellFilter(atoms) if cell and atoms.pbc.all() else atoms
        movers.append((OPTIMIZERS[optimizer](target, logfile=None), target))
    active = list(range(len(moving)))
    for step in range(steps + 1):
        results = evaluate_together([moving[index] for index in active], calculator, None if lists is None else [lists[index] for index in active])
        still = []
        for index, result in zip(active, results, strict=True):
            run, (mover, target) = runs[index], movers[index]
            moving[index].calc.given = dict(result)
            largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
            frame = moving[index].copy()
            frame.calc = SinglePointCalculator(frame, **{name: result[name] for name in ("energy", "forces", "stress") if name in result})
            run.atoms, run.converged = frame, largest < fmax
            run.energies.append(result["energy"])
            run.forces.append(largest)
            run.frames.append(frame)
            if not run.converged and step < steps:
                mover.step()
                still.append(index)
        active = still
        if not active:
            break
    return runs


def _each(structures: Sequence[ase.Atoms], work: Callable[[Sequence[ase.Atoms]], list[Relaxation]], going: Going) -> dict[int, Relaxation]:
    """Number -> relaxation of the structures that can be computed: of all together, and where one cannot, of each alone."""
    try:
        return dict(enumerate(work(structures)))
    except UserError:
        done: dict[int, Relaxation] = {}
        for index, atoms in enumerate(structures):
            with going.past(index):
                done[index] = work([atoms])[0]
        going.refuse_all(len(structures))
        return done


def relax_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    method: str | None = None,
    fmax: float = 0.02,
    steps: int = 500,
    cell: bool = False,
    optimizer: str = "fire",
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d relax`` does: ``<stem>_relaxed.extxyz`` and its steps as a trajectory, a table and a picture.

    Args:
        files: of any format that ASE reads, and folders of them.
        output: folder for the results; None is ``relaxed`` here.
        checkpoint: weights of ours; None: the package's.
        method: a reference method instead of a network.
        fmax: see `relax`.
        steps: see `relax`.
        cell: see `relax`.
        optimizer: see `relax`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        dtype: ``float32`` or ``float64``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a structure could not be computed or did not converge.

    Raises:
        UserError: as `relax`; no inputs, weights that cannot be loaded, or an output folder that cannot be written.
    """
    if not fmax > 0 or steps < 0:
        raise UserError(f"expected a positive --fmax and --steps of 0 or more; got {fmax} and {steps}")
    calculator = calculator_of(checkpoint, method, device, dtype)

    def work(structures: list[ase.Atoms], target: Path, entry: Entry) -> None:
        going = Going()
        relaxed = _each(structures, lambda several: relax(several, calculator, fmax, steps, cell, optimizer), going)
        runs = list(relaxed.values())
        stem = target.name.removesuffix("_relaxed.extxyz")
        trajectory, table, picture = (target.with_name(f"{stem}_{ending}") for ending in ("relaxation.traj", "relaxation.csv", "relaxation.png"))
        with atomic_write(trajectory) as temporary:
            ase.io.write(temporary, [frame for run in runs for frame in run.frames])
        with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["structure", "step", "energy eV", "largest force eV/A"])
            for index, run in relaxed.items():
                writer.writerows(
                    [index, step, f"{energy:.8f}", f"{force:.6f}"] for step, (energy, force) in enumerate(zip(run.energies, run.forces, strict=True))
                )
        with atomic_write(picture) as temporary:
            draw_relaxation([(run.energies, run.forces) for run in runs], fmax).savefig(temporary, dpi=150)
        going.number(relaxed, [run.atoms for run in runs])
        with atomic_write(target) as temporary:
            ase.io.write(temporary, [run.atoms for run in runs], format="extxyz")
        entry.outputs = [str(path) for path in (target, trajectory, table, picture)]
        left = [str(index) for index, run in relaxed.items() if not run.converged]
        entry.numbers = {
            "structures": float(len(runs)),
            "converged": float(len(runs) - len(left)),
            "steps": float(max(len(run.energies) - 1 for run in runs)),
            "largest force eV/A": max(run.forces[-1] for run in runs),
        }
        if left and not going.left:
            listed = ", ".join(left[:8]) + (", ..." if len(left) > 8 else "")
            raise UserError(
                f"expected forces below {fmax} eV/A within {steps} steps; not so in structure {listed}; the last geometries are written; "
                "allow more --steps"
            )
        going.tell()

    columns = {"structures": ".0f", "converged": ".0f", "steps": ".0f", "largest force eV/A": ".4f"}
    return run_files(files, output or Path("relaxed"), "relaxed.extxyz", work, overwrite, as_json, columns)
