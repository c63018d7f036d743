"""Labelled structures for those who have none: geometries from dynamics at a temperature or from random displacements, labelled by a fast method.

GFN2-xTB and GFN1-xTB (Bannwarth, Ehlert, Grimme, JCTC 2019; Grimme, Bannwarth, Shushkov, JCTC 2017) by tblite for all elements up to radon, effective
medium theory by ASE for Al, Cu, Ag, Au, Ni, Pd and Pt. What such labels are worth is what the method is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, thermalize_momenta

from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.reports import Entry
from foveal.graphs3d.data.structures import without_labels
from foveal.graphs3d.file_runs import Going, run_files
from foveal.graphs3d.methods import METHODS, label, labeller

#: Of the Langevin thermostat; strong, because frames shall differ and not be a time series.
_FRICTION = 0.02 / units.fs


def sample(
    atoms: ase.Atoms,
    calculator: Calculator,
    frames: int,
    temperature: float | None,
    rattle: float,
    every: int,
    timestep: float,
    generator: np.random.Generator,
) -> Iterator[ase.Atoms]:
    """Labelled geometries of one structure.

    Args:
        atoms: where to start.
        calculator: of the labels and of the dynamics.
        frames: how many geometries; 0 gives the structure itself alone.
        temperature: K of Langevin dynamics that frames are taken from; None displaces atoms at random instead.
        rattle: A, standard deviation of those displacements.
        every: steps between two frames.
        timestep: fs.
        generator: of everything random.

    Raises:
        UserError: as `label`.
    """
    if frames == 0:
        yield label(atoms, calculator)
        return
    moving = without_labels(atoms)
    if temperature is None:
        for _ in range(frames):
            moving.positions = atoms.positions + generator.normal(0.0, rattle, atoms.positions.shape)
            yield label(moving, calculator)
        return
    label(moving, calculator)  # a structure that cannot be computed is refused before dynamics fails on it
    moving.calc = calculator
    # Twice the temperature: half of the kinetic energy goes into the bonds.
    thermalize_momenta(moving, temperature_K=2 * temperature, rng=generator)
    Stationary(moving)
    dynamics = Langevin(moving, timestep * units.fs, temperature_K=temperature, friction=_FRICTION, rng=generator, fixcm=False)
    for _ in range(frames):
        dynamics.run(every)
        yield label(moving, calculator)


def label_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    method: str = "gfn2",
    frames: int = 0,
    temperature: float | None = None,
    rattle: float = 0.05,
    every: int = 20,
    timestep: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d label`` does: ``<stem>_labelled.extxyz`` of every file.

    Args:
        files: of any format that ASE reads, and folders of them.
        output: folder for the results; None is ``labelled`` here.
        method: of `METHODS`.
        frames: geometries of each structure; 0 labels the structures as they are.
        temperature: K; see `sample`.
        rattle: A; see `sample`.
        every: steps; see `sample`.
        timestep: fs; see `sample`.
        seed: of everything random.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a file could not be labelled.

    Raises:
        UserError: no inputs, an unknown method, numbers that cannot be, or an output folder that cannot be written.
    """
    if frames < 0 or every < 1 or not timestep > 0 or not rattle >= 0 or (temperature is not None and not temperature > 0):
        raise UserError("expected --frames of 0 or more, and positive --every, --timestep, --temperature and --rattle")
    calculator = labeller(method)

    def work(structures: list[ase.Atoms], target: Path, entry: Entry) -> None:
        labelled: list[ase.Atoms] = []
        going = Going()
        for index, atoms in enumerate(structures):
            generator = np.random.default_rng([seed, index])
            with going.past(index):
                frames_of_one = sample(atoms, calculator, frames, temperature, rattle, every, timestep, generator)
                labelled += [_described(frame, METHODS[method], index) for frame in frames_of_one]
        going.refuse_all(len(structures))
        with atomic_write(target) as temporary:
            ase.io.write(temporary, labelled, format="extxyz")
        forces = np.concatenate([frame.calc.results["forces"] for frame in labelled])
        entry.outputs = [str(target)]
        entry.numbers = {"structures": float(len(labelled)), "force RMS eV/A": float(np.sqrt(np.square(forces).mean()))}
        going.tell()

    return run_files(files, output or Path("labelled"), "labelled.extxyz", work, overwrite, as_json, {"structures": ".0f"})


def _described(frame: ase.Atoms, method: str, index: int) -> ase.Atoms:
    frame.info = {"method": method, "structure": frame.info.get("structure", index)}
    frame.arrays = {name: frame.arrays[name] for name in ("numbers", "positions")}
    return frame
