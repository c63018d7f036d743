"""Labelled structures for those who have none: geometries from dynamics at a temperature or from random displacements, labelled by a fast method.

GFN2-xTB and GFN1-xTB (Bannwarth, Ehlert, Grimme, JCTC 2019; Grimme, Bannwarth, Shushkov, JCTC 2017) by tblite for all elements up to radon, effective
medium theory by ASE for Al, Cu, Ag, Au, Ni, Pd and Pt. What such labels are worth is what the method is worth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator, CalculatorError, InputError, PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, output_folder
from foveal.core.reports import BatchReport
from foveal.graphs3d.data.neighbors import check_structure
from foveal.graphs3d.data.structures import SUFFIXES, UNITS, read_structures, without_labels

#: Word on the command line -> the method's name.
METHODS = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB", "emt": "EMT"}
#: Of the Langevin thermostat; strong, because frames shall differ and not be a time series.
_FRICTION = 0.02 / units.fs


def labeller(method: str) -> Calculator:
    """An ASE calculator of `METHODS`.

    Raises:
        UserError: an unknown method, or tblite is not installed.
    """
    if method not in METHODS:
        raise UserError(f"expected --method {', '.join(METHODS)}; got {method!r}")
    if method == "emt":
        return EMT()
    try:
        from tblite.ase import TBLite
    except ImportError:
        raise UserError(f"expected tblite for {METHODS[method]}; it is not installed; pip install 'foveal-graphs3d[label]'") from None
    return TBLite(method=METHODS[method], verbosity=0)


def label(atoms: ase.Atoms, calculator: Calculator) -> ase.Atoms:
    """A copy with energy, forces and, where it is periodic throughout, stress as the calculator gives them.

    Raises:
        UserError: the method fails on this structure.
    """
    check_structure(atoms)
    done = without_labels(atoms)
    done.calc = calculator
    labels: dict[str, Any] = {}
    try:
        labels |= {"energy": done.get_potential_energy(), "forces": done.get_forces()}
        if done.pbc.all():
            labels["stress"] = done.get_stress()
    except (CalculatorError, InputError, NotImplementedError, PropertyNotImplementedError, RuntimeError, KeyError) as error:
        if "stress" not in str(error):
            raise UserError(f"expected a structure that the method can compute; {_reason(error)}") from None
    done.calc = SinglePointCalculator(done, **{name: labels[name] for name in UNITS if name in labels})
    return done


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__


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
    MaxwellBoltzmannDistribution(moving, temperature_K=2 * temperature, rng=generator)
    Stationary(moving)
    dynamics = Langevin(moving, timestep * units.fs, temperature_K=temperature, friction=_FRICTION, rng=generator)
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
    inputs = collect_inputs(files, SUFFIXES)
    calculator = labeller(method)
    folder = output_folder(output or "labelled", overwrite)
    report = BatchReport()
    for path in inputs:
        target = folder / f"{path.stem}_labelled.extxyz"
        if target.exists() and not overwrite:
            report.kept(path, [str(target)])
            continue
        with report.item(path) as entry:
            labelled: list[ase.Atoms] = []
            for index, atoms in enumerate(read_structures(path)):
                generator = np.random.default_rng([seed, index])
                try:
                    for frame in sample(atoms, calculator, frames, temperature, rattle, every, timestep, generator):
                        labelled.append(_described(frame, METHODS[method], index))
                except UserError as error:
                    raise UserError(f"structure {index}: {error}") from None
            with atomic_write(target) as temporary:
                ase.io.write(temporary, labelled, format="extxyz")
            forces = np.concatenate([frame.calc.results["forces"] for frame in labelled])
            entry.outputs = [str(target)]
            entry.numbers = {"structures": float(len(labelled)), "force RMS eV/A": float(np.sqrt(np.square(forces).mean()))}
    return report.finish(as_json, {"structures": ".0f"})


def _described(frame: ase.Atoms, method: str, index: int) -> ase.Atoms:
    frame.info = {"method": method, "structure": frame.info.get("structure", index)}
    frame.arrays = {name: frame.arrays[name] for name in ("numbers", "positions")}
    return frame
