# ruff: noqa: NPY002  numpy's global generator is what other people's datasets draw from
"""A data loader that goes on where it stopped, with the same items, whatever the number of workers.

Two things make a training set's order and content repeatable in the middle of an epoch:

- the order of epoch e is a permutation drawn from (seed, e), so a position in it is just a count of batches;
- each item is drawn with the random generators of torch, numpy and Python seeded by (seed, e, index), so augmentation and on-the-fly
  mixing give the same item whether drawn in the main process, in any worker, before or after an interruption.

Lightning stores `state_dict` in its checkpoints and hands it back to `load_state_dict`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from foveal.core.errors import UserError


@contextmanager
def seeded_by(*numbers: int) -> Iterator[None]:
    """Inside the block the CPU generators of torch, numpy and Python are seeded by `numbers`; after it they are as before."""
    first, second = (int(word) for word in np.random.SeedSequence(numbers).generate_state(2, np.uint32))
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # torch.manual_seed would also reset the generators of the GPUs.
    torch.default_generator.manual_seed(first << 32 | second)
    np.random.seed(second)
    random.seed(first << 32 | second)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


class SeededItems(Dataset):
    """`dataset` whose item (epoch, index) is drawn with generators seeded by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded_by(self.seed, epoch, index):
            return self.dataset[index]


class EpochSampler(DistributedSampler):
    """(epoch, index) pairs in the order of the epoch, this process' share of them, from the `start`-th on."""

    def __init__(self, dataset: Sized, shuffle: bool, seed: int, drop_last: bool) -> None:
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        size, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if joined else (1, 0)
        super().__init__(dataset, size, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in super().__iter__()][self.start :])


class ResumableDataLoader(DataLoader):
    """`torch.utils.data.DataLoader` for training sets, resumable in the middle of an epoch to the bit.

    Shards itself over the processes of torch.distributed. Its random generators are its own: iterating draws nothing from the global ones.

    Args:
        dataset: map-style dataset of known length. Its `__getitem__` may draw from the global generators of torch, numpy and Python.
        batch_size: items in a batch, for each process.
        shuffle: a new order each epoch.
        seed: of order and items.
        drop_last: leave out the last batch of an epoch where it is smaller.
        sampler: takes the place of the epoch order (Lightning passes one for `overfit_batches`); then nothing is resumable.
        **kwargs: as of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        sampler: Sampler | None = None,
        **kwargs: Any,
    ) -> None:
        seeded = dataset if isinstance(dataset, SeededItems) else SeededItems(dataset, seed)
        if sampler is None:
            sampler = EpochSampler(seeded, shuffle, seed, drop_last)
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        super().__init__(seeded, batch_size=batch_size, sampler=sampler, drop_last=drop_last, **kwargs)
        self.seed = seed
        self._batches = 0
        self._resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is drawn before the first batch is asked for: Lightning sets the sampler's epoch only after iter().
        sampler = self.sampler
        self._batches = 0
        if isinstance(sampler, EpochSampler):
            if self._resumed is not None and self._resumed["epoch"] == sampler.epoch:
                self._batches = self._resumed["batches"]
            self._resumed = None
            sampler.start = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches were handed out, and what must be the same for that to mean the same."""
        return {
            "epoch": getattr(self.sampler, "epoch", 0),
            "batches": self._batches,
            "items": len(cast(Sized, self.dataset)),
            "batch_size": self.batch_size or 1,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state` at the next iteration.

        Raises:
            UserError: the number of items, the batch size or the seed differ from those of the interrupted run.
        """
        now = self.state_dict()
        for name in ("items", "batch_size", "seed"):
            if state[name] != now[name]:
                raise UserError(
                    f"expected the interrupted run's training data ({name} {state[name]}) to resume it; got {name} {now[name]}; "
                    "restore the setting, or start a new run from the weights alone"
                )
        self._resumed = dict(state)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(state["epoch"])
