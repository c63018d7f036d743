"""``foveal graphs3d``: interatomic potentials, the rows of a table worth keeping, relations of objects in rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.options import Device, Json, Overwrite, Seed
from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "graphs3d", "configs/graphs3d/equiformer_v3_small.yaml")
add_convert(app, "graphs3d")

_Structures = Annotated[list[Path], typer.Argument(help="Files of any format that ASE reads (extxyz, CIF, POSCAR, ASE db, ...), or folders.")]
_Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights (.safetensors); default: the package's small potential, for molecules of H, C, N and O.")
]
_Method = Annotated[str | None, typer.Option(help="A reference method instead of a network: gfn2, gfn1 or emt.")]
_Dtype = Annotated[str, typer.Option(help="float32 or float64.")]
_Target = Annotated[str, typer.Option(help="Column of the classes.")]
_Ignore = Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="A column not to select by, such as an identifier; repeatable.")]
_TableOverwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


@app.command()
def evaluate(
    structures: _Structures,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: evaluated.")] = None,
    checkpoint: _Checkpoint = None,
    device: Device = "auto",
    dtype: _Dtype = "float32",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Energy, forces and stress of structures (extxyz); where the files carry labels, errors (csv, json) and a parity plot."""
    from foveal.graphs3d.evaluate import evaluate_command

    raise typer.Exit(
        evaluate_command(
            structures, checkpoint=checkpoint, output=output, device=device, dtype=dtype, overwrite=overwrite, as_json=as_json
        )
    )  # fmt: skip


@app.command()
def relax(
    structures: _Structures,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: relaxed.")] = None,
    checkpoint: _Checkpoint = None,
    method: _Method = None,
    fmax: Annotated[float, typer.Option(help="eV/A that the largest force must come below.")] = 0.02,
    steps: Annotated[int, typer.Option(help="At most.")] = 500,
    cell: Annotated[bool, typer.Option("--cell", help="Relax the lattice too, where it is periodic throughout.")] = False,
    optimizer: Annotated[str, typer.Option(help="fire, lbfgs or bfgs.")] = "fire",
    device: Device = "auto",
    dtype: _Dtype = "float32",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Relax structures, all of a file together: the relaxed ones (extxyz), their steps (trajectory, csv) and a picture."""
    from foveal.graphs3d.relax import relax_command

    raise typer.Exit(
        relax_command(
            structures, output=output, checkpoint=checkpoint, method=method, fmax=fmax, steps=steps, cell=cell, optimizer=optimizer,
            device=device, dtype=dtype, overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def md(
    structures: _Structures,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: dynamics.")] = None,
    checkpoint: _Checkpoint = None,
    method: _Method = None,
    ensemble: Annotated[str, typer.Option(help="nve (constant energy) or nvt (Langevin, constant temperature).")] = "nve",
    time: Annotated[float, typer.Option(help="ps.")] = 10.0,
    timestep: Annotated[float, typer.Option(help="fs.")] = 0.5,
    temperature: Annotated[float, typer.Option(help="K.")] = 300.0,
    equilibration: Annotated[float, typer.Option(help="ps at that temperature before the run.")] = 0.5,
    every: Annotated[int, typer.Option(help="Steps between two frames.")] = 20,
    friction: Annotated[float, typer.Option(help="1/ps, of the thermostat.")] = 10.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: _Dtype = "float32",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Molecular dynamics: a trajectory, energies and temperature (csv), the drift of the total energy (json) and a picture of it."""
    from foveal.graphs3d.dynamics import dynamics_command

    raise typer.Exit(
        dynamics_command(
            structures, output=output, checkpoint=checkpoint, method=method, ensemble=ensemble, time=time, timestep=timestep,
            temperature=temperature, equilibration=equilibration, every=every, friction=friction, seed=seed,
            device=device, dtype=dtype, overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def phonons(
    structures: _Structures,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: phonons.")] = None,
    checkpoint: _Checkpoint = None,
    method: _Method = None,
    supercell: Annotated[tuple[int, int, int] | None, typer.Option(help="Repeats of a crystal's cell; default: 10 A in each direction.")] = None,
    displacement: Annotated[float, typer.Option(help="A.")] = 0.01,
    relax_first: Annotated[bool, typer.Option("--relax/--no-relax", help="Relax the atoms in their cell first.")] = True,
    fmax: Annotated[float, typer.Option(help="eV/A, of that relaxation.")] = 0.001,
    device: Device = "auto",
    dtype: _Dtype = "float64",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Vibrations: bands and density of states of crystals, normal modes of molecules (csv, json, picture)."""
    from foveal.graphs3d.phonons import phonons_command

    raise typer.Exit(
        phonons_command(
            structures, output=output, checkpoint=checkpoint, method=method, supercell=supercell, displacement=displacement,
            relax_first=relax_first, fmax=fmax, device=device, dtype=dtype, overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def eos(
    structures: _Structures,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: eos.")] = None,
    checkpoint: _Checkpoint = None,
    method: _Method = None,
    span: Annotated[float, typer.Option(help="Largest change of volume, as a share.")] = 0.06,
    points: Annotated[int, typer.Option(help="Volumes.")] = 11,
    relax_atoms: Annotated[bool, typer.Option("--relax/--no-relax", help="Relax the atoms in each cell.")] = True,
    equation: Annotated[str, typer.Option(help="birchmurnaghan, birch, murnaghan, vinet, pouriertarantola or sjeos.")] = "birchmurnaghan",
    device: Device = "auto",
    dtype: _Dtype = "float64",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Energy against volume of crystals: the volume of lowest energy and the bulk modulus (csv, json, picture)."""
    from foveal.graphs3d.equation_of_state import eos_command

    raise typer.Exit(
        eos_command(
            structures, output=output, checkpoint=checkpoint, method=method, span=span, points=points, relax_atoms=relax_atoms,
            equation=equation, device=device, dtype=dtype, overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def label(
    structures: _Structures,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: labelled.")] = None,
    method: Annotated[str, typer.Option(help="gfn2, gfn1 (all elements to Rn) or emt (Al, Cu, Ag, Au, Ni, Pd, Pt).")] = "gfn2",
    frames: Annotated[int, typer.Option(help="Geometries to make of each structure; 0 labels the structures as they are.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="K of dynamics that geometries are taken from; default: random displacements.")] = None,
    rattle: Annotated[float, typer.Option(help="A, standard deviation of random displacements.")] = 0.05,
    every: Annotated[int, typer.Option(help="Steps of dynamics between two geometries.")] = 20,
    timestep: Annotated[float, typer.Option(help="fs, of dynamics.")] = 1.0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Make training data: geometries of your structures with energy, forces and stress by a fast method (extxyz)."""
    from foveal.graphs3d.label import label_command

    raise typer.Exit(
        label_command(
            structures, output=output, method=method, frames=frames, temperature=temperature, rattle=rattle, every=every,
            timestep=timestep, seed=seed, overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def select(
    table: Annotated[Path, typer.Argument(help="csv, tsv or parquet; columns may be numbers, text, times and categories, with gaps.")],
    target: _Target,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Table to write; default: TABLE_selected, here.")] = None,
    reduction: Annotated[float | None, typer.Option(help="Share of the rows to leave out; default: 0.9.")] = None,
    size: Annotated[int | None, typer.Option(help="Rows to keep, instead of --reduction.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Instead: accuracy that may be lost (0.01 is one point); as few rows as possible are kept.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="mini_batch, single_level, multi_level or multi_view.")] = None,
    scoring: Annotated[str | None, typer.Option(help="both, attention or confidence.")] = None,
    settings: Annotated[Path | None, typer.Option(help="File written by foveal graphs3d search.")] = None,
    ignore: _Ignore = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Measure accuracy before and after on held-out rows, and draw.")] = True,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: _TableOverwrite = False,
    as_json: Json = False,
) -> None:
    """Keep the rows of a table that a classifier learns most from (GAIS); writes them and a report picture."""
    from foveal.core.errors import UserError
    from foveal.graphs3d.select import select_command

    if sum(value is not None for value in (reduction, size, tolerance)) > 1:
        raise UserError("expected one of --reduction, --size and --tolerance; got more; leave the others out")
    given = {"reduction": reduction, "n_samples": size, "tolerance": tolerance, "variant": variant, "scoring": scoring, "device": device}
    raise typer.Exit(
        select_command(
            table, target=target, output=output, ignore=ignore or [], settings=settings, parameters=given, report=report, seed=seed,
            overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def search(
    table: Annotated[Path, typer.Argument(help="csv, tsv or parquet.")],
    target: _Target,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Settings to write; default: TABLE_settings.json, here.")] = None,
    trials: Annotated[int, typer.Option(help="Settings to try.")] = 30,
    reduction: Annotated[float | None, typer.Option(help="Share of the rows to leave out; default: searched, too.")] = None,
    variant: Annotated[str | None, typer.Option(help="mini_batch, single_level, multi_level or multi_view; default: searched, too.")] = None,
    classifier: Annotated[str, typer.Option(help="kNN, SVM, random forest or gradient boosting.")] = "random forest",
    ignore: _Ignore = None,
    study: Annotated[Path | None, typer.Option(help="SQLite file that keeps the trials, so that a search can go on.")] = None,
    seed: Seed = 0,
    overwrite: _TableOverwrite = False,
) -> None:
    """Search the settings of select on a table (Optuna); writes a file for select --settings."""
    from foveal.graphs3d.search import search_command

    raise typer.Exit(
        search_command(
            table, target=target, output=output, trials=trials, reduction=reduction, variant=variant, classifier=classifier, ignore=ignore or [],
            study=study, seed=seed, overwrite=overwrite,
        )
    )  # fmt: skip


@app.command()
def ask(
    scenes: Annotated[list[Path] | None, typer.Argument(help="Boxes in JSON or CSV (class, centre, size in metres), or folders of them.")] = None,
    question: Annotated[
        list[str] | None, typer.Option("-q", "--question", help='Such as "Which chair is nearest to the table?"; repeatable; default: drawn ones.')
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Ask about drawn rooms instead of files.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights (.safetensors) of a run of fit; default: the package's own, or the boxes alone.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: answers.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: _TableOverwrite = False,
    as_json: Json = False,
) -> None:
    """Ask where objects stand to one another (left, nearest, between, above, largest, ...): answers by network and boxes, with a picture."""
    from foveal.graphs3d.relations import ask_command

    raise typer.Exit(
        ask_command(
            scenes or [], questions=question or [], demo=demo, checkpoint=checkpoint, output=output, device=device, seed=seed,
            overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip
