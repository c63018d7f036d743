"""Recordings of one voice with their texts, as batches of equal length to train on; what every corpus of a single speaker shares.

A corpus gives `Clip`s. `SpeechClips` is the data module over them: mel spectrograms are made once and kept while there is room, clips are split
into training and held-out ones by their text (the same words are never on both sides), and a batch holds clips of nearly one length, up to a number
of frames.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import soundfile
import soxr
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.audio.models.mel import MelConfig, mel_spectrogram
from foveal.audio.text.normalisation import normalise
from foveal.audio.text.symbols import Alphabet, phonemes, symbols_of
from foveal.audio.voice import Voice
from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader

_QUIET = 10 ** (-45 / 20)  # of the clip's loudest block; below it is silence
_BLOCK_SECONDS = 0.01
_MARGIN_SECONDS = 0.05  # of silence that is kept before and after speech
_PAUSE_SECONDS = 0.12  # between two clips that are joined
_KEPT_FRAMES = 1_000_000  # of mel spectrograms, in memory: 0.3 GB, three to four hours


@dataclass(frozen=True)
class Clip:
    """One recording.

    Attributes:
        name: unique in its corpus.
        text: as the corpus writes it.
        sample_rate: Hz.
        seconds: duration; of a recording that is read later, before its silence is trimmed.
        read: gives the samples, float32, full scale 1, trimmed.
    """

    name: str
    text: str
    sample_rate: int
    seconds: float
    read: Callable[[], Float[ndarray, " samples"]]

    @staticmethod
    def of(name: str, text: str, samples: Float[ndarray, " samples"], sample_rate: int) -> Clip:
        """A recording that is in memory."""
        return Clip(name, text, sample_rate, len(samples) / sample_rate, lambda: samples)

    @staticmethod
    def file(path: Path, text: str, sample_rate: int, name: str) -> Clip:
        """A recording that is read when it is needed.

        Raises:
            UserError: the file cannot be opened.
        """
        try:
            header = soundfile.info(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"expected an audio file; {path} cannot be read ({str(error).splitlines()[0]}); remove or replace it") from None
        return Clip(name, text, sample_rate, header.frames / header.samplerate, functools.partial(_read, path, sample_rate))

    @property
    def samples(self) -> Float[ndarray, " samples"]:
        """Float32, full scale 1, trimmed."""
        return self.read()


@functools.lru_cache(maxsize=512)  # ten seconds each are 450 MB at most in each worker: a small corpus stays, a large one streams
def _read(path: Path, sample_rate: int) -> ndarray:
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"expected an audio file; {path} cannot be read ({str(error).splitlines()[0]}); remove or replace it") from None
    mono = samples.mean(axis=1)
    spoken = trim(mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate), sample_rate)
    if not len(spoken):
        raise UserError(f"expected speech; {path} is silent from end to end; remove it, and its text")
    return spoken


class SpeechBatch(NamedTuple):
    """Clips of nearly one length.

    Attributes:
        tokens: (batch, symbols), the end last, 0 behind it.
        token_lengths: (batch,) symbols in each row, the end included.
        mel: (batch, frames, mels), normalised as the voice says, 0 behind the end.
        mel_lengths: (batch,) frames in each row.
        names: of the clips.
    """

    tokens: Int[Tensor, "batch symbols"]
    token_lengths: Int[Tensor, " batch"]
    mel: Float[Tensor, "batch frames mels"]
    mel_lengths: Int[Tensor, " batch"]
    names: list[str]


def block_levels(samples: ndarray, sample_rate: int) -> ndarray:
    """Root mean square of each hundredth of a second, relative to the loudest."""
    size = round(_BLOCK_SECONDS * sample_rate)
    blocks = samples[: len(samples) // size * size].reshape(-1, size)
    levels = np.sqrt((blocks.astype(np.float64) ** 2).mean(1))
    return levels / max(levels.max(initial=0.0), 1e-9)


def trim(samples: ndarray, sample_rate: int) -> ndarray:
    """Without the silence before and after speech, but for a twentieth of a second."""
    loud = np.flatnonzero(block_levels(samples, sample_rate) > _QUIET)
    if not len(loud):
        return samples[:0]
    margin, size = round(_MARGIN_SECONDS * sample_rate), round(_BLOCK_SECONDS * sample_rate)
    return samples[max(loud[0] * size - margin, 0) : (loud[-1] + 1) * size + margin]


def is_held_out(text: str, share: float) -> bool:
    """Whether clips of this text are held out: by a hash of the words, so that it does not depend on what else there is.

    Single words and pairs are never: a corpus of prompts says many of them nowhere else, and nothing could be learned of them.
    """
    words = "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").split()
    return len(words) > 2 and zlib.crc32(" ".join(words).encode()) % 10_000 < share * 10_000


class SpokenClips(Dataset):
    """Clips as tokens and mel spectrograms.

    Args:
        clips: the recordings.
        texts: their symbols, one string a clip.
        voice: says how both become numbers.
    """

    def __init__(self, clips: Sequence[Clip], texts: Sequence[str], voice: Voice) -> None:
        self.voice, self.texts, self.clips = voice, list(texts), list(clips)
        self.frames = [int(clip.seconds * voice.mel.sample_rate / voice.mel.hop) + 1 for clip in clips]
        self._kept: dict[int, Tensor] = {}
        self._room = _KEPT_FRAMES
        silence = torch.full((1, voice.mel.mels), float(np.log(voice.mel.floor) if voice.mel.log == "natural" else np.log10(voice.mel.floor)))
        self.silence = voice.normalised(silence)

    def mel(self, index: int) -> Float[Tensor, "frames mels"]:
        """Normalised frames of a clip; the first clips that are asked for are kept."""
        if index in self._kept:
            return self._kept[index]
        mel = self.voice.normalised(mel_spectrogram(torch.from_numpy(self.clips[index].samples), self.voice.mel).T).contiguous()
        if self._room >= len(mel):
            self._kept[index] = mel
            self._room -= len(mel)
        return mel

    def __len__(self) -> int:
        return len(self.texts)

    def item(self, *indices: int) -> tuple[Tensor, Tensor, str]:
        """Tokens, mel and name of a clip, or of several said one after the other."""
        if len(indices) == 1:
            text, mel = self.texts[indices[0]], self.mel(indices[0])
        else:
            text = "".join(self._followed(self.texts[index]) for index in indices[:-1]) + self.texts[indices[-1]]
            pause = self.silence.expand(round(_PAUSE_SECONDS * self.voice.mel.sample_rate / self.voice.mel.hop), -1)
            mel = torch.cat([part for index in indices for part in (self.mel(index), pause)][:-1])
        return torch.tensor(self.voice.vocabulary.encode(text)[0]), mel, "+".join(self.clips[index].name for index in indices)

    def _followed(self, text: str) -> str:
        return f"{text} " if text[-1] in ",.?!" else f"{text}, "

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        return self.item(index)


class LengthBatches(Dataset):
    """Batches of clips of similar length. Item i is drawn anew each epoch, from the clips around the i-th part of all frames.

    Args:
        clips: to draw from.
        frames: of a batch, padding not counted; a batch has one clip at least.
        joined: share of batches whose clips are joined two by two, so that longer speech than the corpus has is learned.
    """

    def __init__(self, clips: SpokenClips, frames: int, joined: float = 0.0) -> None:
        self.clips, self.frames, self.joined = clips, frames, joined
        self.order = sorted(range(len(clips)), key=lambda index: clips.frames[index])
        self.ends = np.cumsum([clips.frames[index] for index in self.order])

    def __len__(self) -> int:
        return max(int(self.ends[-1]) // self.frames, 1)

    def __getitem__(self, index: int) -> SpeechBatch:
        # torch's generator is seeded by (epoch, index) for each item
        place = (index + torch.rand(()).item()) / len(self) * self.ends[-1]
        centre = int(np.searchsorted(self.ends, place))
        centre = min(centre, len(self.order) - 1)
        wanted = max(self.frames // self.clips.frames[self.order[centre]], 1)
        first = max(centre - wanted, 0)
        near = self.order[first : centre + wanted + 1]
        chosen = [near[i] for i in torch.randperm(len(near))[:wanted].tolist()]
        # a whole batch is joined or none of it, so that its rows stay of one length
        size = 2 if torch.rand(()).item() < self.joined else 1
        items = [self.clips.item(*chosen[i : i + size]) for i in range(0, len(chosen), size)]
        return collate(items)


def collate(items: Sequence[tuple[Tensor, Tensor, str]]) -> SpeechBatch:
    """Clips as one batch."""
    tokens, mels, names = zip(*items, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = [torch.tensor([len(row) for row in rows]) for rows in (tokens, mels)]
    return SpeechBatch(pad(list(tokens), batch_first=True), lengths[0], pad(list(mels), batch_first=True), lengths[1], list(names))


def _only(items: list[SpeechBatch]) -> SpeechBatch:
    return items[0]


class SpeechClips(pl.LightningDataModule):
    """What the corpora of one voice have in common; each gives its `clips()`.

    Args:
        folder: where the corpus is.
        mel: the spectrogram; clips of another sample rate are resampled.
        alphabet: symbols that the model reads.
        language: of espeak-ng, for phonemes.
        batch_frames: mel frames of a training batch.
        joined: share of training batches whose clips are joined two by two.
        held_out: share of texts that are kept for validation and test.
        shortest: seconds; shorter clips are left out.
        longest: seconds; longer clips are left out of training.
        workers: processes that make batches.
        seed: of batches and their order.
    """

    def __init__(
        self,
        folder: str,
        mel: MelConfig = MelConfig(),  # noqa: B008
        alphabet: Alphabet = "characters",
        language: str = "en-us",
        batch_frames: int = 2000,
        joined: float = 0.0,
        held_out: float = 0.05,
        shortest: float = 0.2,
        longest: float = 12.0,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.voice = Voice(mel=mel, symbols=symbols_of(alphabet), alphabet=alphabet, language=language)
        self.batch_frames, self.joined, self.held_out, self.shortest, self.longest = batch_frames, joined, held_out, shortest, longest
        self.workers, self.seed = workers, seed
        self._made: tuple[SpokenClips, SpokenClips] | None = None

    def clips(self) -> list[Clip]:
        """All recordings with speech and text, trimmed, at the voice's sample rate.

        Raises:
            UserError: they cannot be found or read.
        """
        raise TypeError(f"{type(self).__name__} does not say where its clips are")

    def split(self) -> tuple[list[Clip], list[Clip]]:
        """Clips to train on, and held-out ones.

        Raises:
            UserError: none of usable length.
        """
        usable = [clip for clip in self.clips() if self.shortest <= clip.seconds <= self.longest and normalise(clip.text).text]
        train = [clip for clip in usable if not is_held_out(clip.text, self.held_out)]
        if not train:
            raise UserError(f"expected clips of {self.shortest:g} to {self.longest:g} s with text to train on; found none; check the folder")
        return train, [clip for clip in usable if is_held_out(clip.text, self.held_out)] or train[:1]

    def setup(self, stage: str | None = None) -> None:
        """Find the clips, once."""
        if self._made is None:
            train, held_out = (SpokenClips(part, self._symbols(part), self.voice) for part in self.split())
            if unknown := self.voice.vocabulary.encode("".join(train.texts))[1]:
                warnings.warn(f"the voice's symbols lack {unknown!r}, which the texts have: they are left out", stacklevel=2)
            self._made = train, held_out
        self.train, self.validation = self._made

    def _symbols(self, clips: Sequence[Clip]) -> list[str]:
        texts = [normalise(clip.text).text for clip in clips]
        return phonemes(texts, self.voice.language) if self.voice.alphabet == "phonemes" else texts

    def train_dataloader(self) -> DataLoader:
        """Batches drawn anew each epoch; resumable to the bit."""
        batches = LengthBatches(self.train, self.batch_frames, self.joined)
        return ResumableDataLoader(batches, 1, seed=self.seed, num_workers=self.workers, collate_fn=_only)

    def val_dataloader(self) -> DataLoader:
        """Held-out clips, in the order of their length."""
        order = sorted(range(len(self.validation)), key=lambda index: self.validation.frames[index])
        return DataLoader(torch.utils.data.Subset(self.validation, order), batch_size=8, collate_fn=collate, num_workers=self.workers)

    def test_dataloader(self) -> DataLoader:
        """Held-out clips, one at a time."""
        return DataLoader(self.validation, batch_size=1, collate_fn=collate, num_workers=self.workers)

    predict_dataloader = test_dataloader
