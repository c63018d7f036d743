"""``foveal detection``: find objects in pictures and videos, check data, train, export, measure, convert the authors' checkpoints."""

from __future__ import annotations

import typer

from foveal.apps.verbs import add_convert

app = typer.Typer(rich_markup_mode=None)

add_convert(app, "detection")


@app.callback()
def _group() -> None:
    """Keep the verb in the command line, however few there are."""
