"""``foveal graphs3d``: potentials of molecules and materials, the rows of a table worth keeping, relations of objects in rooms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "graphs3d", "configs/graphs3d/relations_small.yaml")
add_convert(app, "graphs3d")


@app.command()
def evaluate(
    structures: Annotated[list[Path], typer.Argument(help="Files of any format that ASE reads (extxyz, CIF, POSCAR, ASE db, ...), or folders.")],
    checkpoint: Annotated[Path, typer.Option(help="Weights of the potential (.safetensors), as convert writes them.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: evaluated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda[:N].")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs instead of keeping them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for machines.")] = False,
) -> None:
    """Energy, forces and stress of structures (extxyz); where the files carry labels, errors (csv, json) and a parity plot."""
    from foveal.graphs3d.evaluate import evaluate_command

    raise typer.Exit(
        evaluate_command(
            structures, checkpoint=checkpoint, output=output, device=device, dtype=dtype, overwrite=overwrite, as_json=as_json
        )
    )  # fmt: skip


_Target = Annotated[str, typer.Option(help="Column of the classes.")]
_Ignore = Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="A column not to select by, such as an identifier; repeatable.")]
_Seed = Annotated[int, typer.Option(help="Of all that is random.")]
_TableOverwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the report for machines.")]


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
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda[:N].")] = "auto",
    seed: _Seed = 0,
    overwrite: _TableOverwrite = False,
    as_json: _Json = False,
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
    seed: _Seed = 0,
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
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda[:N].")] = "auto",
    seed: _Seed = 0,
    overwrite: _TableOverwrite = False,
    as_json: _Json = False,
) -> None:
    """Ask where objects stand to one another (left, nearest, between, above, largest, ...): answers by network and boxes, with a picture."""
    from foveal.graphs3d.relations import ask_command

    raise typer.Exit(
        ask_command(
            scenes or [], questions=question or [], demo=demo, checkpoint=checkpoint, output=output, device=device, seed=seed,
            overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip
