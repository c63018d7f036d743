"""The running mean of the weights that YOLO networks are measured and shipped with."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class RampedAverage(WeightAveraging):
    r"""Exponential mean whose memory grows with training.

    .. math:: \bar w \leftarrow d_t \bar w + (1 - d_t) w, \quad d_t = d\,(1 - e^{-t / \tau})

    Validation, checkpoints' ``state_dict`` and what is exported are the mean's; training goes on from the weights themselves, which the
    checkpoint holds too.

    Args:
        decay: d, in the end.
        ramp: tau, in steps.
    """

    def __init__(self, decay: float = 0.9999, ramp: float = 2000.0) -> None:
        self.decay, self.ramp = decay, ramp
        super().__init__(use_buffers=True, avg_fn=self._mix)

    def _mix(self, mean: Tensor, value: Tensor, steps: Any) -> Tensor:
        if not mean.is_floating_point():
            return value  # batch counters
        weight = self.decay * (1 - math.exp(-float(steps) / self.ramp))
        return weight * mean + (1 - weight) * value
