"""The learning rate of every task here: linear warm-up, half a cosine to a last value, and that value to the end."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch


def share_of_rate(step: int, steps: int, final: float, warmup: float, settle: float = 0.0) -> float:
    """Share of the highest rate at a step; for the last `settle` of all steps it is `final`.

    >>> [round(share_of_rate(step, 100, 0.1, 0.1), 3) for step in (0, 9, 55, 100)]
    [0.1, 1.0, 0.55, 0.1]
    """
    rising = max(round(warmup * steps), 1)
    if step < rising:
        return (step + 1) / rising
    phase = min((step - rising) / max(round((1 - settle) * steps) - rising, 1), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * phase)) / 2


def cosine_steps(module: pl.LightningModule, optimizer: torch.optim.Optimizer, final: float, warmup: float, settle: float = 0.0) -> dict[str, Any]:
    """What `configure_optimizers` returns: the schedule above, with the trainer's number of steps."""
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, steps, final, warmup, settle))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
