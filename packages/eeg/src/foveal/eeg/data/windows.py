"""What every corpus gives: windows of prepared EEG with their label, subject and recording; and data modules made of such windows.

A window is ready for the tokenizer: `TARGET_RATE` Hz, scaled. Labels are an integer for single-label and binary tasks, a vector of zeros and ones
for multi-label tasks, and -1 where there is none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.eeg.preprocessing import EPS, channel_scale, resampled

TARGET_RATE = 200.0

#: Divide each channel of a window by its own scale, as the authors do, or by the scale that the channel has in the whole recording.
Scale = Literal["window", "recording"]


class Window(NamedTuple):
    """One window, or a batch of them.

    Attributes:
        signal: (channels, samples); in a batch with as many channels as its widest window, zeros where a window has fewer.
        label: class, or a vector of zeros and ones; -1 is unknown.
        present: (channels,), false where a channel is only filled up.
        group: subject; of a batch, their names.
        name: recording and time; of a batch, their names.
    """

    signal: Float[Tensor, "*batch channels samples"]
    label: Tensor
    present: Bool[Tensor, "*batch channels"]
    group: Any
    name: Any


def collate(windows: Sequence[Window]) -> Window:
    """A batch; windows with fewer channels than the widest are filled up with silent ones."""
    channels = max(window.signal.shape[0] for window in windows)
    signals, present = [], []
    for window in windows:
        missing = channels - window.signal.shape[0]
        signals.append(torch.nn.functional.pad(window.signal, (0, 0, 0, missing)))
        present.append(torch.nn.functional.pad(window.present, (0, missing)))
    return Window(
        torch.stack(signals), torch.stack([window.label for window in windows]), torch.stack(present),
        [window.group for window in windows], [window.name for window in windows],
    )  # fmt: skip


class ArrayWindows(Dataset):
    """Windows held in memory.

    Args:
        signals: (windows, channels, samples), prepared.
        labels: of each window.
        groups: subject of each.
        names: of each.
    """

    def __init__(
        self, signals: Float[ndarray, "windows channels samples"], labels: Sequence[Any] | ndarray | Tensor,
        groups: Sequence[str], names: Sequence[str],
    ) -> None:  # fmt: skip
        self.signals = torch.from_numpy(np.ascontiguousarray(signals, dtype=np.float32))
        self.labels = torch.as_tensor(np.asarray(labels))
        self.groups, self.names = list(groups), list(names)

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, index: int) -> Window:
        signal = self.signals[index]
        return Window(signal, self.labels[index], torch.ones(len(signal), dtype=torch.bool), self.groups[index], self.names[index])

    def subset(self, chosen: Sequence[int] | ndarray) -> ArrayWindows:
        """Some of the windows."""
        chosen = [int(index) for index in chosen]
        return ArrayWindows(self.signals[chosen].numpy(), self.labels[chosen], [self.groups[i] for i in chosen], [self.names[i] for i in chosen])


def prepare_array(
    samples: Float[ndarray, "*batch channels samples"], rate: float, scale: Scale = "window", recording_scale: ndarray | None = None
) -> Float[ndarray, "*batch channels resampled"]:
    """`samples` resampled to `TARGET_RATE` and scaled.

    Args:
        samples: any unit.
        rate: Hz.
        scale: see `Scale`.
        recording_scale: (channels, 1) for ``recording``; None takes it over all of `samples`.
    """
    signal = resampled(np.asarray(samples, dtype=np.float64), rate, TARGET_RATE)
    if scale == "window":
        divisor = channel_scale(signal)
    elif recording_scale is not None:
        divisor = recording_scale
    else:
        divisor = channel_scale(np.moveaxis(signal, -2, 0).reshape(signal.shape[-2], -1))
    return (signal / (divisor + EPS)).astype(np.float32)


def split_groups(groups: Sequence[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of most groups and of a share of others, drawn from their sorted names: no subject is on both sides, whatever the hash seed.

    Raises:
        UserError: fewer than two groups.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        raise UserError(f"expected recordings of at least two subjects to split; got {len(names)} ({', '.join(names)}); add some, or name a split")
    count = min(max(1, round(held_out * len(names))), len(names) - 1)
    chosen = set(np.random.default_rng(seed).permutation(names)[:count].tolist())
    inside = [index for index, name in enumerate(groups) if name not in chosen]
    return inside, [index for index, name in enumerate(groups) if name in chosen]


@dataclass
class Splits:
    """The three sets of a corpus and what their labels mean.

    Attributes:
        train: to learn from.
        validation: to choose by; of other subjects where there are several.
        test: to report.
        classes: names of the classes; empty without labels.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    classes: tuple[str, ...] = ()


class WindowsDataModule(pl.LightningDataModule):
    """A corpus as loaders; a corpus says in `splits` what its windows are.

    Args:
        batch_size: windows in a batch, for each process.
        workers: processes that read.
        seed: of the split and of the order.
    """

    def __init__(self, batch_size: int = 64, workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self._found: Splits | None = None

    @abstractmethod
    def find(self) -> Splits:
        """Read the corpus."""

    @property
    def splits(self) -> Splits:
        """The corpus, read once."""
        if self._found is None:
            self._found = self.find()
        return self._found

    def setup(self, stage: str | None = None) -> None:
        """Find the windows."""
        if not len(self.splits.train):  # type: ignore[arg-type]
            raise UserError(f"expected windows to train on; {type(self).__name__} found none; check its root and its window length")

    def train_dataloader(self) -> DataLoader:
        """Shuffled; resumable to the bit. The last batch is left out only where there are others."""
        whole = len(self.splits.train) >= self.batch_size  # type: ignore[arg-type]
        return ResumableDataLoader(
            self.splits.train, self.batch_size, shuffle=True, seed=self.seed, num_workers=self.workers, drop_last=whole, collate_fn=collate
        )

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._in_order(self.splits.validation)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self._in_order(self.splits.test)

    def predict_dataloader(self) -> DataLoader:
        """The test windows."""
        return self.test_dataloader()

    def _in_order(self, windows: Dataset) -> DataLoader:
        return DataLoader(windows, batch_size=self.batch_size, num_workers=self.workers, collate_fn=collate)


class SingleChannels(Dataset):
    """The channels of windows one by one, all cut to the same number of samples: what a tokenizer learns from.

    Args:
        windows: in memory.
        samples: of every piece; longer windows give several.
    """

    def __init__(self, windows: Sequence[ArrayWindows], samples: int) -> None:
        self.samples = samples
        pieces: list[Tensor] = []
        self._origin: list[tuple[ArrayWindows, int]] = []
        for one in windows:
            count = one.signals.shape[-1] // samples
            for part in range(count):
                pieces.append(one.signals[:, :, part * samples : (part + 1) * samples].flatten(0, 1))
                self._origin += [(one, index // one.signals.shape[1]) for index in range(one.signals.shape[0] * one.signals.shape[1])]
        self.signals = torch.cat(pieces) if pieces else torch.zeros(0, samples)
        loud = self.signals.abs().amax(-1) > 0  # a channel that was not connected says nothing
        self.signals = self.signals[loud]
        self._origin = [origin for origin, kept in zip(self._origin, loud.tolist(), strict=True) if kept]

    def __len__(self) -> int:
        return len(self.signals)

    def __getitem__(self, index: int) -> Window:
        source, row = self._origin[index]
        return Window(self.signals[index][None], torch.tensor(-1), torch.ones(1, dtype=torch.bool), source.groups[row], source.names[row])


class Pooled(WindowsDataModule):
    """Several corpora in one, channel by channel and without labels: what a tokenizer is trained on.

    Args:
        corpora: data modules of windows that are held in memory.
        seconds: length of every piece; shorter windows are left out.
        batch_size: pieces in a batch.
        workers: processes that read.
        seed: of the order.
    """

    def __init__(self, corpora: list[WindowsDataModule], seconds: float = 3.0, batch_size: int = 64, workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, workers, seed)
        self.corpora, self.seconds = corpora, seconds

    def find(self) -> Splits:
        """Every corpus' sets, joined."""
        samples = round(self.seconds * TARGET_RATE)
        pick: Callable[[str], SingleChannels] = lambda name: SingleChannels([getattr(one.splits, name) for one in self.corpora], samples)
        return Splits(pick("train"), pick("validation"), pick("test"))
