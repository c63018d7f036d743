"""Molecular dynamics: at constant energy, whose drift tells whether forces are the energy's derivative, or at constant temperature."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.reports import Entry
from foveal.graphs3d.data.structures import without_labels
from foveal.graphs3d.file_runs import Going, calculator_of, name_of, run_files
from foveal.graphs3d.plots import draw_dynamics

#: Columns of the table and keys of the numbers of a run.
COLUMNS = ("time ps", "potential eV", "kinetic eV", "total eV", "temperature K")


@dataclass(frozen=True)
class Dynamics:
    """A trajectory.

    Attributes:
        rows: (frames, 5), in the order of `COLUMNS`.
        frames: geometries with velocities, energy and forces, every so many steps.
        drift: meV an atom and ps: slope of the straight line through the total energy.
        fluctuation: meV an atom: standard deviation of the total energy about that line.
    """

    rows: np.ndarray
    frames: list[ase.Atoms]
    drift: float
    fluctuation: float

    @property
    def temperature(self) -> float:
        """Mean, K."""
        return float(self.rows[:, 4].mean())


def energy_drift(times: np.ndarray, energies: np.ndarray, atoms: int) -> tuple[float, float]:
    """Slope of the straight line through total energies, and the standard deviation about it.

    Args:
        times: ps.
        energies: eV.
        atoms: how many there are.

    Returns:
        meV an atom and ps, and meV an atom.
    """
    if len(times) < 3:
        return float("nan"), float("nan")
    per_atom = 1000 * (energies - energies[0]) / atoms
    slope, start = np.polyfit(times, per_atom, 1)
    return float(slope), float(np.std(per_atom - slope * times - start))


def run_dynamics(
    atoms: ase.Atoms,
    calculator: Calculator,
    time: float = 10.0,
    timestep: float = 0.5,
    ensemble: str = "nve",
    temperature: float = 300.0,
    equilibration: float = 0.5,
    every: int = 20,
    friction: float = 10.0,
    seed: int = 0,
) -> Dynamics:
    """Velocity Verlet (nve) or Langevin dynamics (nvt).

    Args:
        atoms: where to start, at rest.
        calculator: of the forces.
        time: ps.
        timestep: fs.
        ensemble: "nve" or "nvt".
        temperature: K.
        equilibration: ps of Langevin dynamics before the run, which do not count.
        every: steps between two frames.
        friction: 1/ps, of the Langevin thermostat.
        seed: of velocities and thermostat.

    Raises:
        UserError: a structure that cannot be computed, or that flies apart.
    """
    moving = without_labels(atoms)
    moving.calc = calculator
    generator = np.random.default_rng(seed)
    thermalize_momenta(moving, temperature_K=temperature, rng=generator)
    if len(moving) > 1:
        Stationary(moving)

    def thermostat() -> MolecularDynamics:
        return Langevin(moving, timestep * units.fs, temperature_K=temperature, friction=friction / (1000 * units.fs), rng=generator, fixcm=False)

    if equilibration > 0:
        thermostat().run(round(1000 * equilibration / timestep))
        if len(moving) > 1:
            Stationary(moving)
    dynamics = VelocityVerlet(moving, timestep * units.fs) if ensemble == "nve" else thermostat()
    rows: list[tuple[float, float, float, float, float]] = []
    frames: list[ase.Atoms] = []

    def note() -> None:
        potential, kinetic = moving.get_potential_energy(), moving.get_kinetic_energy()
        if not np.isfinite(potential) or moving.get_temperature() > 100 * max(temperature, 300.0):
            raise UserError(
                f"the atoms fly apart after {rows[-1][0] if rows else 0:.3f} ps; take a smaller --timestep, or a potential that knows them"
            )
        rows.append((dynamics.nsteps * timestep / 1000, potential, kinetic, potential + kinetic, moving.get_temperature()))
        frame = moving.copy()
        frame.calc = SinglePointCalculator(frame, energy=potential, forces=moving.get_forces())
        frames.append(frame)

    dynamics.attach(note, interval=every)
    dynamics.run(round(1000 * time / timestep))
    table = np.array(rows)
    return Dynamics(table, frames, *energy_drift(table[:, 0], table[:, 3], len(moving)))


def dynamics_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    method: str | None = None,
    ensemble: str = "nve",
    time: float = 10.0,
    timestep: float = 0.5,
    temperature: float = 300.0,
    equilibration: float = 0.5,
    every: int = 20,
    friction: float = 10.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d md`` does: of each structure a trajectory, a table of energies, a picture of them, and the drift.

    Args:
        files: of any format that ASE reads, and folders of them; of files with several structures every one runs.
        output: folder for the results; None is ``dynamics`` here.
        checkpoint: weights of ours; None: the package's.
        method: a reference method instead of a network.
        ensemble: see `run_dynamics`.
        time: see `run_dynamics`.
        timestep: see `run_dynamics`.
        temperature: see `run_dynamics`.
        equilibration: see `run_dynamics`.
        every: see `run_dynamics`.
        friction: see `run_dynamics`.
        seed: see `run_dynamics`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        dtype: ``float32`` or ``float64``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a structure could not be computed.

    Raises:
        UserError: numbers that cannot be; no inputs, weights that cannot be loaded, or an output folder that cannot be written.
    """
    if ensemble not in ("nve", "nvt"):
        raise UserError(f"expected --ensemble nve or nvt; got {ensemble!r}")
    if not (time > 0 and timestep > 0 and temperature > 0 and equilibration >= 0 and every >= 1 and friction > 0):
        raise UserError("expected positive --time, --timestep, --temperature, --friction and --every, and --equilibration of 0 or more")
    calculator, name = calculator_of(checkpoint, method, device, dtype), name_of(checkpoint, method)

    def work(structures: list[ase.Atoms], target: Path, entry: Entry) -> None:
        stem = target.name.removesuffix("_md.json")
        summary, going = [], Going()
        for index, atoms in enumerate(structures):
            with going.past(index):
                run = run_dynamics(atoms, calculator, time, timestep, ensemble, temperature, equilibration, every, friction, seed)
                prefix = stem if len(structures) == 1 else f"{stem}_{index}"
                trajectory, table, picture = (target.with_name(f"{prefix}_md.{suffix}") for suffix in ("traj", "csv", "png"))
                with atomic_write(trajectory) as temporary:
                    ase.io.write(temporary, run.frames)
                with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
                    writer = csv.writer(stream)
                    writer.writerow(COLUMNS)
                    writer.writerows([f"{value:.8g}" if place != 3 else f"{value:.8f}" for place, value in enumerate(row)] for row in run.rows)
                with atomic_write(picture) as temporary:
                    draw_dynamics({name: run.rows}, len(atoms), ensemble).savefig(temporary, dpi=150)
                entry.outputs += [str(trajectory), str(table), str(picture)]
                one = {"structure": index, "atoms": len(atoms), "time ps": time, "temperature K": run.temperature}
                if ensemble == "nve" and np.isfinite(run.drift):  # a straight line needs three frames
                    one |= {"drift meV/atom/ps": run.drift, "fluctuation meV/atom": run.fluctuation}
                summary.append(one)
        going.refuse_all(len(structures))
        with atomic_write(target) as temporary:
            temporary.write_text(
                json.dumps({"potential": name, "ensemble": ensemble, "timestep fs": timestep, "runs": summary}, indent=2), encoding="utf-8"
            )
        entry.outputs.append(str(target))
        entry.numbers = {key: float(np.mean([one[key] for one in summary])) for key in summary[0] if key not in ("structure", "atoms")}
        if "drift meV/atom/ps" in summary[0]:
            entry.numbers["drift meV/atom/ps"] = max((float(one["drift meV/atom/ps"]) for one in summary), key=abs)
        going.tell()

    return run_files(files, output or Path("dynamics"), "md.json", work, overwrite, as_json, {"temperature K": ".0f"})
