"""Options that commands of several domains have, worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[Path | None, typer.Option(help="Weights (.safetensors); default: the small trained model of the package.")]
Device = Annotated[str, typer.Option(help="auto, cpu, or cuda[:N].")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs instead of keeping them.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report for machines.")]
