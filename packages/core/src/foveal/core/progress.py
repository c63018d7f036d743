"""Progress where there is no terminal to draw a bar on: one line after each validation, or each epoch without one."""

from __future__ import annotations

import sys
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class ProgressLines(Callback):
    """Prints ``epoch 3 step 1200 0:41 train/loss 0.52 val/si_sdr 6.1`` to stderr, from the first process only."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._printed = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._print(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._printed != trainer.global_step:
            self._print(trainer)

    def _print(self, trainer: pl.Trainer) -> None:
        self._printed = trainer.global_step
        if trainer.is_global_zero:
            minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
            numbers = " ".join(f"{name} {float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items()))
            print(f"epoch {trainer.current_epoch} step {trainer.global_step} {minutes}:{seconds:02d} {numbers}", file=sys.stderr, flush=True)
