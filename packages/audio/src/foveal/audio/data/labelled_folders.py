"""Any folder of labelled utterances: one subfolder a class, sound files of any rate below it.

Depression and emotion corpora (DAIC-WOZ, RAVDESS, IEMOCAP) may not be passed on; sorted into one folder a label they are read as they are.
The example config reads LibriSpeech with one folder a speaker, which anyone can get, and learns who speaks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.audio.data.librispeech import find_audio
from foveal.audio.data.mixing import read_signal
from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader


class Utterances(NamedTuple):
    """A batch."""

    waveform: Tensor  # (batch, samples), filled with zeros at the end
    lengths: Tensor  # (batch,), samples
    label: Tensor  # (batch,)
    name: list[str]


class LabelledFiles(Dataset):
    """Sound files and the number of their class; longer ones are cut, in training at a random place."""

    def __init__(self, files: Sequence[tuple[Path, int]], sample_rate: int, seconds: float, random_cuts: bool) -> None:
        self.files, self.sample_rate, self.samples, self.random_cuts = list(files), sample_rate, round(seconds * sample_rate), random_cuts

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        """Waveform, class and name."""
        path, label = self.files[index]
        signal = torch.from_numpy(read_signal(path, self.sample_rate).mean(axis=1))
        if len(signal) == 0:
            raise UserError(f"expected sound; {path} holds no samples; remove it")
        spare = max(len(signal) - self.samples, 0)
        start = int(torch.randint(spare + 1, ())) if self.random_cuts else spare // 2
        return signal[start : start + self.samples], label, path.stem


def _collate(items: list[tuple[Tensor, int, str]]) -> Utterances:
    signals, labels, names = zip(*items, strict=True)
    filled = torch.nn.utils.rnn.pad_sequence(list(signals), batch_first=True)
    return Utterances(filled, torch.tensor([len(signal) for signal in signals]), torch.tensor(labels), list(names))


class LabelledFolders(pl.LightningDataModule):
    """Utterances of ``root/<label>/...``, of each label a share for validation and one for testing.

    Args:
        root: the folder; classes are its subfolders in the order of their names.
        speaker: regular expression whose first group, searched in a file's path below its label, names who speaks; then no speaker is in two
            parts. None splits file by file, which is right where the label is the speaker.
        seconds: longest piece of an utterance that is used.
        validation: share of the speakers or files of each label.
        test: likewise.
        batch_size: utterances in a batch, for each process.
        sample_rate: of what the network hears, Hz.
        workers: processes that read.
        seed: of the split, of order and of cuts.

    Raises:
        UserError: fewer than two classes, a class too small to split, or a path that `speaker` does not match.
    """

    def __init__(
        self,
        root: str,
        speaker: str | None = None,
        seconds: float = 4.0,
        validation: float = 0.1,
        test: float = 0.2,
        batch_size: int = 8,
        sample_rate: int = 16_000,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root, self.speaker, self.seconds, self.validation_share, self.test_share = root, speaker, seconds, validation, test
        self.batch_size, self.sample_rate, self.workers, self.seed = batch_size, sample_rate, workers, seed
        self.labels: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        """Find and split the files."""
        folders = sorted(path for path in Path(self.root).glob("*") if path.is_dir())
        if len(folders) < 2:
            raise UserError(f"expected one subfolder a class in {self.root}; found {len(folders)}; name a folder with at least two")
        self.labels = [folder.name for folder in folders]
        parts: dict[str, list[tuple[Path, int]]] = defaultdict(list)
        chosen: dict[str, str] = {}  # speaker -> part: one whose voice is under several labels stays in one part
        for label, folder in enumerate(folders):
            files = find_audio(folder, "sound")
            speakers = [self._speaker_of(path, folder) for path in files]
            names = sorted({name for name in speakers if name not in chosen})
            order = np.random.default_rng((self.seed, label)).permutation(names).tolist()
            counts = [max(1, round(share * len(names))) for share in (self.test_share, self.validation_share)]
            if names and len(names) <= sum(counts):
                what = "files" if self.speaker is None else "speakers"
                raise UserError(f"expected more than {sum(counts)} {what} below {folder} to split; found {len(names)}; add some")
            for index, name in enumerate(order):
                chosen[name] = "test" if index < counts[0] else "validation" if index < sum(counts) else "train"
            for path, name in zip(files, speakers, strict=True):
                parts[chosen[name]].append((path, label))
        self.parts = {part: LabelledFiles(files, self.sample_rate, self.seconds, part == "train") for part, files in parts.items()}

    def _speaker_of(self, path: Path, folder: Path) -> str:
        if self.speaker is None:
            return str(path)
        found = re.search(self.speaker, str(path.relative_to(folder)))
        if found is None or not found.groups():
            raise UserError(f"expected speaker to match {path.relative_to(folder)} with one group; {self.speaker!r} does not; mend the expression")
        return found[1]

    def train_dataloader(self) -> DataLoader:
        """Random cuts in random order; resumable to the bit."""
        return ResumableDataLoader(
            self.parts["train"], self.batch_size, seed=self.seed, num_workers=self.workers, collate_fn=_collate, drop_last=False
        )

    def val_dataloader(self) -> DataLoader:
        """Validation utterances."""
        return DataLoader(self.parts["validation"], batch_size=self.batch_size, num_workers=self.workers, collate_fn=_collate)

    def test_dataloader(self) -> DataLoader:
        """Test utterances."""
        return DataLoader(self.parts["test"], batch_size=self.batch_size, num_workers=self.workers, collate_fn=_collate)

    predict_dataloader = test_dataloader
