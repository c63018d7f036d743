"""The learning rate's way through a training."""

from __future__ import annotations

import math
from collections.abc import Callable


def rising_then_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Share of the highest rate at each step: a rise over the first `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))

    def share(step: int) -> float:
        return (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))

    return share
