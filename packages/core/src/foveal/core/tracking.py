"""Where a run's numbers, pictures and sounds go: metrics.csv in its folder, and wandb, which may fail without ending the run."""

from __future__ import annotations

import csv
import os
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from foveal.core import run_folder
from foveal.core.files import atomic_write


class MetricsFile(CSVLogger):
    """``metrics.csv`` in the run's folder. Every row is on disk at once, and a resumed run goes on in the same file."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name=None, version="", flush_logs_every_n_steps=1)

    @property
    def path(self) -> Path:
        return Path(self.save_dir) / ExperimentWriter.NAME_METRICS_FILE

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @pl.loggers.logger.rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.save_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def rewind(self, global_step: int) -> None:
        """Drop the rows that a run resumed at `global_step` will write again."""
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                names, rows = list(reader.fieldnames or ()), [row for row in reader if int(row["step"]) < global_step]
            with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(rows)


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer deletes what it finds; this one goes on behind it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])


class Wandb(WandbLogger):
    """wandb that needs neither network nor login, keeps its files in the run's folder, and whose failure never ends a run.

    Args:
        offline: keep everything on disk (``wandb sync FOLDER/wandb/offline-*`` sends it later); false sends it while training.
        project: wandb's project; None takes ``foveal-<domain>``.
        entity: wandb's user or team.
        tags: labels of the run.
        name: of the run; None takes experiment and time.
        save_dir: None takes the run's folder.
        run_id: None takes one that stays the same when the run is resumed.
    """

    def __init__(
        self,
        offline: bool = True,
        project: str | None = None,
        entity: str | None = None,
        tags: list[str] | None = None,
        name: str | None = None,
        save_dir: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self._failed: str | None = None
        os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(name=name, save_dir=save_dir or ".", offline=offline, project=project or "foveal", entity=entity, tags=tags, id=run_id)
        del self._wandb_init["anonymous"]  # wandb warns of it, even of None

    @property
    @pl.loggers.logger.rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb, or an object that takes every call and does nothing, where wandb failed."""
        if self._experiment is None and self._failed is None:
            import wandb

            # wandb's service outlives a run and keeps the working folder of the first one: a relative path would lead there.
            folder = Path(self.save_dir or ".").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._experiment = wandb.init(
                    **{**self._wandb_init, "dir": str(folder)},
                    mode="offline" if self._offline else "online",
                    settings=wandb.Settings(console="off", silent=True),
                )
                self._experiment.define_metric("trainer/global_step")
                self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            except Exception as error:  # whatever wandb does must not end the run
                self._fail(error)
        return _Nothing() if self._failed is not None else self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self._try(super().log_hyperparams, params)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)
        if self._experiment is not None and self._failed is None:
            self._try(self._experiment.finish, 0 if status == "success" else 1)

    def _try(self, call: Any, *args: Any) -> None:
        if self._failed is None:
            try:
                call(*args)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"wandb failed and is off for the rest of this run (metrics.csv goes on): {self._failed}", stacklevel=3)


class _Nothing:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self


def _wandb_of(module: pl.LightningModule) -> WandbLogger | None:
    return next((logger for logger in module.loggers if isinstance(logger, WandbLogger)), None)


@rank_zero_only
def log_figure(module: pl.LightningModule, name: str, figure: Any) -> None:
    """Log a matplotlib figure under `name`: to wandb where it is on, and as ``pictures/<name>.png`` in the run's folder."""
    begun_by_command = run_folder.VARIABLE in os.environ  # a test has a folder and no logger
    if (begun_by_command or module.loggers) and not getattr(module.trainer, "fast_dev_run", False):
        target = run_folder.current(module.trainer.default_root_dir) / "pictures" / f"{name.replace('/', '-')}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            figure.savefig(temporary, dpi=120)
    if (logger := _wandb_of(module)) is not None:
        logger.log_image(name, [figure], step=module.global_step)


@rank_zero_only
def log_audio(module: pl.LightningModule, name: str, waveform: Any, sample_rate: int, caption: str | None = None) -> None:
    """Log one sound, shape (time,) with values in [-1, 1], to wandb where it is on."""
    if (logger := _wandb_of(module)) is not None:
        samples = waveform.detach().float().cpu().numpy() if hasattr(waveform, "detach") else waveform
        logger.log_audio(name, [samples], step=module.global_step, sample_rate=[sample_rate], caption=[caption])
