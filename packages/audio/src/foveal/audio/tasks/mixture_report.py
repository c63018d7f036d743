"""What a run on mixtures shows besides curves: sounds and spectrograms while it trains, a table of every mixture when it is tested."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import soundfile
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.core.processes import of_every_process, once
from foveal.core.tracking import Wandb


def show_example(trainer: pl.Trainer, sounds: Mapping[str, Float[Tensor, " samples"]], picture: Figure, kind: str, sample_rate: int) -> None:
    """Put the sounds of an example and a picture of it into ``examples/`` of the run's folder and, as a row of a table, on wandb.

    Args:
        trainer: Of the run.
        sounds: By name, such as ``mixture``; all are played at one level, at which none is clipped.
        picture: Their spectrograms.
        kind: Name of the picture, such as ``separation``.
        sample_rate: Hz.
    """
    if trainer.sanity_checking or _dry(trainer):
        return
    folder = run_folder.current(trainer.default_root_dir) / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    peak = max(float(signal.abs().max()) for signal in sounds.values())
    played = {name: (signal / max(peak, 1e-8)).detach().float().cpu().numpy() for name, signal in sounds.items()}
    for name, sound in played.items():
        with atomic_write(folder / f"{name}.wav") as temporary:
            soundfile.write(temporary, sound, sample_rate)
    with atomic_write(folder / f"{kind}.png") as temporary:
        picture.savefig(temporary, dpi=80)
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            _to_wandb(logger, played, folder / f"{kind}.png", kind, sample_rate, trainer.global_step)


def _to_wandb(logger: Wandb, sounds: dict[str, Any], picture: Path, kind: str, sample_rate: int, step: int) -> None:
    import wandb

    row = [step, *(wandb.Audio(sound, sample_rate=sample_rate) for sound in sounds.values()), wandb.Image(str(picture))]
    table = wandb.Table(columns=["step", *sounds, "spectrograms"], data=[row])
    logger.log_metrics({f"val/{kind}_example": table, f"val/{kind}": wandb.Image(str(picture))}, step=step)


class MixtureReport:
    """Scores of test mixtures: every one to ``test_mixtures.csv``, means with standard errors to ``test_summary.csv`` and the terminal."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, dict[str, float]]] = []

    def add(self, name: str, group: str, scores: dict[str, float]) -> None:
        """Note the scores of a mixture."""
        self.rows.append((name, group, scores))

    def gather(self, trainer: pl.Trainer) -> None:
        """Bring the rows of all processes of a run together; every one of them calls this."""
        self.rows = once(of_every_process(trainer, self.rows), itemgetter(0))

    def summary(self) -> list[dict[str, Any]]:
        """One row for all mixtures and, where there are several, one for each group: count, then mean and standard error of each score."""
        groups = sorted({group for _, group, _ in self.rows})
        table = []
        for chosen in [None, *(groups if len(groups) > 1 else [])]:
            scores = [scores for _, group, scores in self.rows if chosen is None or group == chosen]
            row: dict[str, Any] = {"group": "all" if chosen is None else chosen or "unknown", "mixtures": len(scores)}
            for name in scores[0]:
                known = [one[name] for one in scores if one[name] == one[name]]  # a silent source has no score
                row[name] = statistics.fmean(known) if known else float("nan")
                row[f"{name}_standard_error"] = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else float("nan")
            table.append(row)
        return table

    def finish(self, trainer: pl.Trainer) -> None:
        """Write both tables and print the means."""
        if not self.rows or _dry(trainer):
            return
        folder = run_folder.current(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        summary = self.summary()
        _write_table(folder / "test_mixtures.csv", [{"name": name, "group": group, **scores} for name, group, scores in self.rows])
        _write_table(folder / "test_summary.csv", summary)
        names = list(self.rows[0][2])
        table = Table("group", "mixtures", *names, title="Test, mean ± standard error")
        for row in summary:
            table.add_row(row["group"], str(row["mixtures"]), *(f"{row[name]:.2f} ± {row[f'{name}_standard_error']:.2f}" for name in names))
        console = Console()
        console.print(table)
        console.print(f"every mixture: {folder / 'test_mixtures.csv'}", highlight=False, soft_wrap=True)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _dry(trainer: pl.Trainer) -> bool:
    """Whether this is a try of two batches that leaves no files."""
    return bool(getattr(trainer, "fast_dev_run", False))
