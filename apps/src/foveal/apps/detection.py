"""``foveal detection``: find objects in pictures and videos, check data, train, export, measure, convert the authors' checkpoints."""

from __future__ import annotations

import typer

from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "detection", "configs/detection/yolov13n_small.yaml")
add_convert(app, "detection")
