"""What a training that starts from weights has taken over of them, said once: layers that a file lacks or has in another shape start at random."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

#: Layers that are named one by one.
_NAMED = 6


def say_start(trainer: pl.Trainer, network: nn.Module, weights: str | None, left_at_random: Sequence[str]) -> None:
    """One line on stderr, of the first process; none where there are no weights, or where a checkpoint replaces them.

    Args:
        trainer: of the training.
        network: that is trained.
        weights: file that it starts from.
        left_at_random: keys of its state that the file did not fill.
    """
    if weights is None or trainer.ckpt_path is not None or not trainer.is_global_zero:
        return
    total, left = len(network.state_dict()), len(left_at_random)
    line = f"{Path(weights).name}: {total - left} of {total} tensors are taken over"
    if left:
        line += f"; {left} start at random, which the file lacks or has in another shape: {', '.join(layers_of(left_at_random))}"
    print(line, file=sys.stderr, flush=True)


def layers_of(keys: Sequence[str]) -> list[str]:
    """The layers that tensors belong to, or where these are many the parts of the network that hold them."""
    parts = [key.split(".")[:-1] for key in keys]
    named: list[str] = []
    for depth in range(max(map(len, parts), default=0), 0, -1):
        named = list(dict.fromkeys(".".join(part[:depth]) for part in parts))
        if len(named) <= _NAMED:
            break
    return named
