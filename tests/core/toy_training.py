# ruff: noqa: NPY002  numpy's global generator is what other people's datasets draw from
"""A small network on random data that uses everything a resumed run must restore: dropout, augmentation, running means, a plateau schedule."""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from foveal.core.resumable import ResumableDataLoader


class Named(NamedTuple):
    inputs: Tensor
    names: list[str]


class Answer(NamedTuple):
    value: Tensor
    more: list[dict[str, Any]]


class NoisyPoints(Dataset):
    """(input, target) pairs whose inputs get noise from three generators each time they are drawn."""

    def __init__(self, count: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(count)
        self.inputs = torch.randn(count, 6, generator=generator)
        self.targets = self.inputs.sin().sum(1, keepdim=True)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = torch.randn(6) + float(np.random.normal()) + random.gauss(0, 1)
        return self.inputs[index] + self.noise * shift, self.targets[index]


class ToyData(pl.LightningDataModule):
    """42 training and 8 validation points."""

    def __init__(self, workers: int = 0, batch_size: int = 4) -> None:
        super().__init__()
        self.workers = workers
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return ResumableDataLoader(NoisyPoints(42, 0.1), self.batch_size, seed=3, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(NoisyPoints(8, 0.0), 4)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(NoisyPoints(5, 0.0), batch_size=2, collate_fn=named)


def named(points: list[tuple[Tensor, Tensor]]) -> Named:
    return Named(torch.stack([inputs for inputs, _ in points]), [f"point {float(target):.3f}" for _, target in points])


class ToyTask(pl.LightningModule):
    """Regression; `step_seconds` slows it down so that a test can kill it in the middle, `one_cycle` asks Lightning how many steps there will be."""

    def __init__(self, step_seconds: float = 0.0, learning_rate: float = 1e-2, one_cycle: bool = False, width: int = 16) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0; got {learning_rate}")
        self.step_seconds = step_seconds
        self.learning_rate = learning_rate
        self.one_cycle = one_cycle
        self.net = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 1))
        self.train_error = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.step_seconds)
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.train_error.update(loss.detach())
        self.log("train/error", self.train_error, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Named, batch_idx: int) -> Answer:
        return Answer(self.net(batch.inputs), [{"array": np.arange(3.0), "kind": "sum", "sure": None}])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        if self.one_cycle:
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}
