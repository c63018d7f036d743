"""LibriSpeech as single speakers to mix: read English, 16 kHz, CC BY 4.0, https://www.openslr.org/12.

Folders may hold ``speaker/chapter/utterance.flac`` as published (train-clean-100: 6.3 GB, 100 h, 251 speakers) or the files alone, as samples
of the corpus do; a file's name begins with its speaker's number, ``103-1240-0000.flac``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import soundfile

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Utterance:
    """A recording of one speaker."""

    path: Path
    speaker: str

    def read(self) -> np.ndarray:
        """Samples, float32, full scale 1."""
        return _decoded(self.path).astype(np.float32) / 32768


@lru_cache(maxsize=4096)
def _decoded(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="int16")[0]


def find_utterances(folder: Path) -> list[Utterance]:
    """All flac files below `folder`, in the order of their names.

    Raises:
        UserError: there are none.
    """
    found = sorted(folder.rglob("*.flac"), key=lambda path: path.name)
    if not found:
        raise UserError(f"expected LibriSpeech flac files below {folder}; found none; get a subset from https://www.openslr.org/12")
    return [Utterance(path, path.stem.split("-")[0]) for path in found]


def split_speakers(utterances: Iterable[Utterance], held_out: int, seed: int) -> tuple[list[Utterance], list[Utterance]]:
    """Utterances of most speakers, and those of `held_out` other speakers."""
    utterances = list(utterances)
    speakers = sorted({utterance.speaker for utterance in utterances})
    chosen = set(np.random.default_rng(seed).permutation(speakers)[:held_out].tolist())
    return [u for u in utterances if u.speaker not in chosen], [u for u in utterances if u.speaker in chosen]


class LibriSpeechMixtures(pl.LightningDataModule):
    """Two-speaker mixtures made on the fly.

    Args:
        train_dir: LibriSpeech folder for training and validation; speakers of the one are never in the other.
        test_dir: folder with the test speakers.
    """

    def __init__(
        self,
        train_dir: str,
        test_dir: str,
        seconds: float = 3.0,
        batch_size: int = 1,
        mixtures: int = 10_000,
        validation_speakers: int = 21,
        validation_mixtures: int = 24,
        test_mixtures: int = 200,
        evaluation_seconds: float = 4.0,
        gain: tuple[float, float] = (-2.5, 2.5),
        speed: tuple[float, float] = (0.9, 1.1),
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Find the recordings."""
        from foveal.audio.data.mixing import MixingRule, SpeakerMixtures

        h = self.hparams
        train, validation = split_speakers(find_utterances(Path(h.train_dir)), h.validation_speakers, h.seed)
        rule = MixingRule(seconds=h.seconds, gain=tuple(h.gain), speed=tuple(h.speed))
        fixed = MixingRule(seconds=h.evaluation_seconds, gain=tuple(h.gain), level=(-25.0, -25.0))
        self.train = SpeakerMixtures(train, rule, h.mixtures)
        self.validation = SpeakerMixtures(validation, fixed, h.validation_mixtures, seed=h.seed)
        if stage in (None, "test"):
            self.test = SpeakerMixtures(find_utterances(Path(h.test_dir)), fixed, h.test_mixtures, seed=h.seed)

    def train_dataloader(self) -> DataLoader:
        """Fresh mixtures each epoch."""
        return ResumableDataLoader(self.train, self.hparams.batch_size, shuffle=False, seed=self.hparams.seed, num_workers=self.hparams.workers)

    def val_dataloader(self) -> DataLoader:
        """Fixed mixtures of held-out speakers."""
        from torch.utils.data import DataLoader

        return DataLoader(self.validation, batch_size=2)

    def test_dataloader(self) -> DataLoader:
        """Fixed mixtures of the test speakers."""
        from torch.utils.data import DataLoader

        return DataLoader(self.test, batch_size=1)
