"""What the processes of a run (one a device) have, together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

Own = TypeVar("Own")


def of_every_process(trainer: pl.Trainer, own: Own) -> list[Own]:
    """What each process has, in their order; every process gets the same list.

    A data set to measure on is dealt out to the processes, so figures of the whole set are made of what all have found.

    Args:
        trainer: of the run.
        own: of this process; anything that can be pickled, tensors on the CPU.
    """
    if trainer.world_size == 1:
        return [own]
    shares: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(shares, own)
    return shares


def once(shares: Sequence[Sequence[Own]], key: Callable[[Own], Hashable]) -> list[Own]:
    """The shares of all processes together, without items that a process before has too: the last shares of a set are filled up with such.

    Args:
        shares: of `of_every_process`.
        key: what tells items of the set apart; those of one share all stay.
    """
    first: dict[Hashable, int] = {}
    for rank, share in enumerate(shares):
        for item in share:
            first.setdefault(key(item), rank)
    return [item for rank, share in enumerate(shares) for item in share if first[key(item)] == rank]
