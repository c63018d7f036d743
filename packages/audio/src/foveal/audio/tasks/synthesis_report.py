"""Scores of every held-out clip that was spoken or vocoded: ``test_speech.csv`` in the run's folder, means with standard errors on the terminal, and
on wandb a table with the sounds of the first clips.
"""

from __future__ import annotations

import csv
import statistics
from operator import itemgetter

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.core.processes import of_every_process, once
from foveal.core.tracking import Wandb

_HEARD = 16  # clips whose sound is kept


class SynthesisReport:
    """Collects scores by clip."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, float]]] = []
        self.sounds: dict[str, Tensor] = {}
        self.sample_rate = 0

    @property
    def has_room(self) -> bool:
        """Whether another sound is wanted."""
        return len(self.sounds) < _HEARD

    def add(self, name: str, scores: dict[str, float], sound: Tensor | None = None, sample_rate: int = 0) -> None:
        """Note the scores of a clip and, where there is room, how it sounds: (samples,)."""
        self.rows.append((name, scores))
        if sound is not None and self.has_room:
            self.sounds[name], self.sample_rate = (sound / sound.abs().max().clamp(min=1e-8)).detach().float().cpu(), sample_rate

    def gather(self, trainer: pl.Trainer) -> None:
        """Bring the rows of all processes of a run together; every one of them calls this."""
        self.rows = once(of_every_process(trainer, self.rows), itemgetter(0))

    def finish(self, trainer: pl.Trainer) -> None:
        """Write the table and print the means; a try of two batches leaves no files."""
        if not self.rows or getattr(trainer, "fast_dev_run", False):
            return
        names = list(self.rows[0][1])
        folder = run_folder.current(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "test_speech.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["name", *names])
            writer.writerows([name, *scores.values()] for name, scores in self.rows)
        self._to_wandb(trainer, names)
        table = Table("score", "mean", "standard error", "median", title=f"Test, {len(self.rows)} held-out clips")
        for name in names:
            values = [scores[name] for _, scores in self.rows]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            table.add_row(name, f"{statistics.fmean(values):.3f}", f"{error:.3f}", f"{statistics.median(values):.3f}")
        console = Console()
        console.print(table)
        console.print(f"every clip: {folder / 'test_speech.csv'}", highlight=False, soft_wrap=True)

    def _to_wandb(self, trainer: pl.Trainer, names: list[str]) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, Wandb)]
        if not loggers or not self.sounds:
            return
        import wandb

        scores = dict(self.rows)
        rows = [[name, *scores[name].values(), wandb.Audio(sound.numpy(), sample_rate=self.sample_rate)] for name, sound in self.sounds.items()]
        for logger in loggers:
            logger.log_metrics({"test/speech": wandb.Table(columns=["name", *names, "sound"], data=rows)}, step=trainer.global_step)
