"""What a separation run shows besides curves: sounds and spectrograms while it trains, a table of every mixture when it is tested."""

from __future__ import annotations

import csv
import os
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import soundfile
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foveal.audio.plots import plot_separation
from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.core.tracking import Wandb


def show_separation(
    trainer: pl.Trainer,
    mixture: Float[Tensor, " samples"],
    estimates: Float[Tensor, "sources samples"],
    sources: Float[Tensor, "sources samples"],
    sample_rate: int,
) -> None:
    """Put a mixture, its separation and their spectrograms into ``examples/`` of the run's folder and on wandb."""
    if trainer.sanity_checking or _dry(trainer):
        return
    folder = _folder(trainer) / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    # estimates have no bound of their own; all are played at one level, at which none is clipped
    peak = max(float(signal.abs().max()) for signal in (mixture, estimates, sources))
    named = {"mixture": mixture} | {f"speaker{index}": estimate for index, estimate in enumerate(estimates, 1)}
    sounds = {name: (signal / max(peak, 1e-8)).detach().float().cpu().numpy() for name, signal in named.items()}
    for name, sound in sounds.items():
        with atomic_write(folder / f"{name}.wav") as temporary:
            soundfile.write(temporary, sound, sample_rate)
    picture = plot_separation(mixture, estimates, sources, sample_rate)
    with atomic_write(folder / "separation.png") as temporary:
        picture.savefig(temporary, dpi=80)
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            _to_wandb(logger, sounds, folder / "separation.png", sample_rate, trainer.global_step)


def _to_wandb(logger: Wandb, sounds: dict[str, Any], picture: Path, sample_rate: int, step: int) -> None:
    import wandb

    media: dict[str, Any] = {f"val/{name}": wandb.Audio(sound, sample_rate=sample_rate) for name, sound in sounds.items()}
    media["val/separation"] = wandb.Image(str(picture))
    logger.log_metrics(media, step=step)


class SeparationReport:
    """Scores of test mixtures: every one to ``test_mixtures.csv``, means with standard errors to ``test_summary.csv`` and the terminal."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, dict[str, float]]] = []

    def add(self, name: str, group: str, scores: dict[str, float]) -> None:
        """Note the scores of a mixture."""
        self.rows.append((name, group, scores))

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
        folder = _folder(trainer)
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


def _folder(trainer: pl.Trainer) -> Path:
    """The run's folder; without the command line, where Lightning was told to write."""
    # trainer.log_dir would wait for all processes, and only the first one asks
    return Path(os.environ.get(run_folder.VARIABLE) or trainer.default_root_dir)
