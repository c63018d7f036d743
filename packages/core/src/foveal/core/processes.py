"""What the processes of a run (one a device) have, together."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

Own = TypeVar("Own")


def of_every_process(trainer: pl.Trainer, own: Own) -> list[Own]:
    """What each process has, in their order; every process gets the same list.

    A data set to measure on is dealt out to the processes, and the last ones are filled up with items that others have too: figures of the whole set
    are made of what all have found, each item once.

    Args:
        trainer: of the run.
        own: of this process; anything that can be pickled, tensors on the CPU.
    """
    if trainer.world_size == 1:
        return [own]
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, own)
    return shares
