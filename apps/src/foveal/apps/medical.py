"""``foveal medical``: segmentation and restoration of the user's images, training, the authors' checkpoints."""

from __future__ import annotations

import typer

from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "medical", "configs/medical/hippocampus_small.yaml")
add_convert(app, "medical")
