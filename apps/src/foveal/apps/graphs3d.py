"""``foveal graphs3d``: energies, forces and stress of structures by an interatomic potential, and the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "graphs3d", "configs/graphs3d/equiformer_v3_small.yaml")
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
