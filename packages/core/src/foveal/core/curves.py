"""curves.png: every number of metrics.csv over the steps, drawn when a run ends, however it ends."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from foveal.core.files import atomic_write

Series = dict[str, tuple[list[int], list[float]]]


class DrawCurves(Callback):
    """Draws ``<folder>/curves.png`` at the end of a fit and on an exception, Ctrl-C included."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        metrics = self.folder / "metrics.csv"
        if trainer.is_global_zero and metrics.exists():
            draw_curves(metrics, self.folder / "curves.png")


def read_metrics(path: str | Path) -> Series:
    """Name -> (steps, values) of every column of a metrics.csv but step and epoch, empty cells left out."""
    series: Series = defaultdict(lambda: ([], []))
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if name not in ("step", "epoch") and cell:
                    series[name][0].append(int(row["step"]))
                    series[name][1].append(float(cell))
    return dict(series)


def draw_curves(metrics: str | Path, target: str | Path) -> None:
    """One panel a quantity; train and validation of the same quantity (``train/loss``, ``val/loss``) share one."""
    series = read_metrics(metrics)
    panels: dict[str, list[str]] = defaultdict(list)
    for name in sorted(series):
        panels[name.removesuffix("_step").removesuffix("_epoch").rsplit("/", 1)[-1]].append(name)
    if not panels:
        return
    from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the whole process

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for axis, (quantity, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            steps, values = series[name]
            axis.plot(steps, values, label=name, linewidth=0.8 if name.endswith("_step") else 1.6, marker="." if len(steps) < 30 else None)
        axis.set(xlabel="step", title=quantity)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    with atomic_write(target) as temporary:
        figure.savefig(temporary, dpi=110)
