# ruff: noqa: NPY002  numpy's global generator is what other people's datasets draw from
"""`last.ckpt`: written every so many steps at a point from which training goes on to the same result, bit for bit.

Lightning's own checkpoints hold weights, optimisers, schedulers, loop counters and the data loader's position. Three things are missing for
an equal result, and this callback adds them: the states of the random generators (of every process), the running means of what was logged
with ``on_epoch=True``, and the states of the module's torchmetrics.

A checkpoint taken while a validation or the end of an epoch is due would lose it on resuming (Lightning 2.6 then skips that validation, and
the step of a ReduceLROnPlateau that waits for it). So a save that falls there is put off to the next batch after which training just goes on.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from torchmetrics import Metric

from foveal.core.errors import UserError

_KEY = "foveal_resume_point"


class ResumePoint(Checkpoint):
    """Writes ``<folder>/last.ckpt``, and restores from any checkpoint what Lightning leaves out.

    Args:
        every_n_steps: optimiser steps between two saves; at most that many are lost with a killed process.
        folder: where; None writes nothing and only restores.
    """

    def __init__(self, every_n_steps: int = 100, folder: str | None = None) -> None:
        if every_n_steps < 1:
            raise UserError(f"expected resume_point.every_n_steps of at least 1; got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.folder = None if folder is None else Path(folder)
        self._saved_at = 0
        self._pending: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = trainer.global_step
        loop = trainer.fit_loop
        if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
            # A schedule that asked for `estimated_stepping_batches` had the loaders made before their positions were read from the checkpoint.
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        # Here and not earlier: whatever set-up drew from the generators does not matter any more.
        if self._pending is not None:
            _restore_metrics(pl_module, self._pending["metrics"])
            _set_generators(self._pending["generators"][trainer.global_rank])
            # Lightning 2.6 counts the whole first epoch as restarting, and would skip the ReduceLROnPlateau step at its end.
            trainer.fit_loop._restarting = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._pending is not None:
            # The first batch has logged, so the collection's entries exist to be added to.
            _add_running_means(trainer, self._pending["running"])
            self._pending = None
        due = trainer.global_step - self._saved_at >= self.every_n_steps
        if due and self.folder is not None and not getattr(trainer, "fast_dev_run", False) and _training_just_goes_on(trainer):
            self._save(trainer, self.folder)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        generators: list[Any] = [_generators()]
        if trainer.world_size > 1:
            generators = [None] * trainer.world_size
            torch.distributed.all_gather_object(generators, _generators())
        checkpoint[_KEY] = {"generators": generators, "running": _running_means(trainer), "metrics": _metrics(pl_module)}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._pending = checkpoint.get(_KEY)
            if self._pending is not None and len(self._pending["generators"]) != trainer.world_size:
                raise UserError(
                    f"expected {len(self._pending['generators'])} processes, as the interrupted run had; got {trainer.world_size}; "
                    "use as many devices, or start a new run from the weights alone"
                )
            for logger in trainer.loggers:
                # Rows after the checkpoint's step will be written again.
                if hasattr(logger, "rewind"):
                    logger.rewind(checkpoint["global_step"])

    def _save(self, trainer: pl.Trainer, folder: Path) -> None:
        target, temporary = folder / "last.ckpt", folder / ".last.ckpt.part"
        trainer.save_checkpoint(temporary, weights_only=False)
        self._saved_at = trainer.global_step
        if trainer.is_global_zero:
            if target.is_dir():  # sharded strategies write folders, and a folder does not replace another
                shutil.rmtree(target)
            temporary.replace(target)


def _training_just_goes_on(trainer: pl.Trainer) -> bool:
    """Whether after this batch comes the next one: no validation, no end of epoch, no gradients half accumulated."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return not (
        loop._num_ready_batches_reached()
        or loop._should_accumulate()
        or trainer.should_stop
        or (fetcher is not None and loop._should_check_val_fx(fetcher))
    )


def _generators() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _running_means(trainer: pl.Trainer) -> dict[str, list[torch.Tensor]]:
    """Value and weight, so far in this epoch, of everything that the module logs with on_epoch=True."""
    running = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        if result.meta.on_epoch and result.is_tensor:
            running[key] = [result.value.detach().cpu().clone(), torch.as_tensor(result.cumulated_batch_size).detach().cpu().clone()]
    return running


def _add_running_means(trainer: pl.Trainer, running: dict[str, list[torch.Tensor]]) -> None:
    results = trainer.fit_loop.epoch_loop._results
    for key, (value, weight) in running.items():
        result = results.get(key)
        if result is None:
            continue
        value, weight = value.to(result.value.device), weight.to(result.value.device)
        meta = result.meta
        if meta.is_mean_reduction or meta.is_sum_reduction:
            result.value = value + result.value
            result.cumulated_batch_size = weight + result.cumulated_batch_size
        elif meta.is_max_reduction:
            result.value = torch.maximum(value, result.value)
        elif meta.is_min_reduction:
            result.value = torch.minimum(value, result.value)


def _metrics(module: pl.LightningModule) -> dict[str, Any]:
    """States of the module's torchmetrics that have been updated since their last reset."""
    return {
        name: {"updates": metric._update_count, "state": metric.metric_state}
        for name, metric in module.named_modules()
        if isinstance(metric, Metric) and metric._update_count
    }


def _restore_metrics(module: pl.LightningModule, saved: dict[str, Any]) -> None:
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and name in saved:
            for key, value in saved[name]["state"].items():
                moved = [one.to(metric.device) for one in value] if isinstance(value, list) else value.to(metric.device)
                setattr(metric, key, moved)
            metric._update_count = saved[name]["updates"]
