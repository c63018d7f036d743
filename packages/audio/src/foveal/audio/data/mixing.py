"""Mixtures made on the fly: recordings of single speakers in, mixtures and their sources out.

Every choice (speakers, cuts, speeds, rooms, levels, overlap, noise) is drawn from one number, so a mixture can be made again from that number
alone: the fixed mixtures of an evaluation, and the same training data after an interruption or with another number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from scipy.signal import oaconvolve
from torch.utils.data import Dataset

from foveal.audio.data.example import Example
from foveal.core.errors import UserError

SILENCE = 1e-8  # power, full scale 1: a signal under it has no level to set
_QUIET_CUT = 0.03  # a cut with less than this share of its recording's power (-15 dB) is mostly a pause
_CUTS_TRIED = 8


@dataclass(frozen=True)
class Utterance:
    """A recording of one speaker."""

    path: Path
    speaker: str
    group: str = ""  # such as the speaker's gender


@dataclass(frozen=True)
class MixingRule:
    """How single speakers become a mixture. A pair of numbers is a range, from which each mixture draws evenly.

    A mixture is made in the order in which sound reaches a microphone: speed, room and gain of each source, their sum, noise. Speed changes
    only speakers, so noise stays as it was recorded, and sources in a room are reverberant targets, as in EchoSet.
    """

    seconds: float = 3.0  # of the mixture
    sample_rate: int = 16_000  # Hz
    sources: int = 2
    gain: tuple[float, float] = (-2.5, 2.5)  # dB, of each source against the common level
    level: tuple[float, float] = (-28.0, -22.0)  # dB of full scale, RMS of the sum of the sources
    speed: tuple[float, float] = (1.0, 1.0)  # of playing: pitch and formants move with it, which makes further speakers of one
    overlap: tuple[float, float] = (1.0, 1.0)  # share of each source's time in which the next one speaks too; 0: one after another
    snr: tuple[float, float] = (5.0, 20.0)  # dB, sum of the sources against noise
    noisy: float = 0.0  # share of the mixtures that get noise
    reverberant: float = 0.0  # share of the mixtures that get a room

    def __post_init__(self) -> None:
        for name in ("gain", "level", "speed", "overlap", "snr"):  # lists come from YAML
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"expected mixing.{name} as (low, high); got ({low}, {high}); swap them")
            object.__setattr__(self, name, (float(low), float(high)))
        if self.sources < 1 or self.seconds <= 0 or self.speed[0] <= 0 or not 0 <= self.overlap[0] <= self.overlap[1] <= 1:
            raise UserError(
                "expected mixing with at least one source, seconds and speed above 0, and overlap from 0 to 1; "
                f"got sources={self.sources}, seconds={self.seconds}, speed={self.speed}, overlap={self.overlap}"
            )

    @property
    def samples(self) -> int:
        """Length of the mixture."""
        return round(self.seconds * self.sample_rate)


class SpeakerMixtures(Dataset):
    """Mixtures of different speakers.

    Args:
        utterances: recordings of at least `rule.sources` speakers.
        rule: how they are mixed.
        count: mixtures in an epoch.
        seed: mixture i is a function of (seed, i). None draws it from torch's generator, which the training loader seeds by
            (seed, epoch, i): fresh mixtures each epoch, the same after an interruption.
        noises: recordings of noise.
        impulse_responses: of rooms; the channels of one file are positions in one room, files with one channel are taken one a source.

    Raises:
        UserError: fewer speakers than sources, or a rule with noise or rooms and no files for them.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        rule: MixingRule,
        count: int,
        seed: int | None = None,
        noises: Sequence[Path] = (),
        impulse_responses: Sequence[Path] = (),
    ) -> None:
        self.rule, self.count, self.seed = rule, count, seed
        self.noises, self.impulse_responses = list(noises), list(impulse_responses)
        self.by_speaker: dict[str, list[Utterance]] = {}
        for utterance in utterances:
            self.by_speaker.setdefault(utterance.speaker, []).append(utterance)
        self.speakers = sorted(self.by_speaker)
        if len(self.speakers) < rule.sources:
            raise UserError(f"expected recordings of at least {rule.sources} speakers to mix; got {len(self.speakers)}; add speakers")
        for share, files, what in ((rule.noisy, self.noises, "noise"), (rule.reverberant, self.impulse_responses, "impulse response")):
            if share > 0 and not files:
                raise UserError(f"expected {what} files, since a share of {share:g} of the mixtures needs one; got none; name their folder")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        """The mixture, (samples,), and its sources, (sources, samples), float32."""
        rule = self.rule
        key = (int(torch.randint(2**62, ())),) if self.seed is None else (self.seed, index)
        generator = np.random.default_rng(key)
        chosen = [self.speakers[speaker] for speaker in generator.choice(len(self.speakers), rule.sources, replace=False)]
        utterances = [self.by_speaker[speaker][generator.integers(len(self.by_speaker[speaker]))] for speaker in chosen]

        overlap = generator.uniform(*rule.overlap)
        active = min(rule.samples, round(rule.samples / (1 + (rule.sources - 1) * (1 - overlap))))
        starts = np.linspace(0, rule.samples - active, rule.sources).round().astype(int)
        rooms = self._rooms(generator)
        sources = np.zeros((rule.sources, rule.samples))
        for source, utterance, start, room in zip(sources, utterances, starts, rooms, strict=True):
            speech = self._speech(utterance, active, generator)
            if room is not None:
                speech = oaconvolve(speech, room)
            heard = speech[: rule.samples - start]
            source[start : start + len(heard)] = heard

        mixture = sources.sum(0)
        scale = 10 ** (generator.uniform(*rule.level) / 20) / np.sqrt(max(np.mean(mixture**2), SILENCE))
        sources, mixture = sources * scale, mixture * scale
        group = "".join(sorted(utterance.group for utterance in utterances))
        if generator.random() < rule.noisy:
            noise, kind = self._noise(chosen, generator)
            power = np.mean(mixture**2) * 10 ** (-generator.uniform(*rule.snr) / 10)
            mixture = mixture + noise * np.sqrt(power / max(np.mean(noise**2), SILENCE))
            group = kind or group
        return Example(_tensor(mixture), _tensor(sources), f"{index:05d}-{'-'.join(chosen)}", group)

    def _speech(self, utterance: Utterance, samples: int, generator: np.random.Generator) -> np.ndarray:
        """A cut of one speaker with its own speed and gain, power about one; shorter recordings stand somewhere in silence."""
        rule = self.rule
        speed = generator.uniform(*rule.speed)
        signal = read_signal(utterance.path, rule.sample_rate)[:, 0]
        wanted = round(samples * speed)
        cut = loud_cut(signal, wanted, generator)
        if speed != 1.0:
            cut = soxr.resample(cut, speed * rule.sample_rate, rule.sample_rate, quality="MQ")
        cut = cut[:samples]
        gain = 10 ** (generator.uniform(*rule.gain) / 20) / np.sqrt(max(np.mean(cut**2), SILENCE))
        before = generator.integers(samples - len(cut) + 1)
        return np.pad(cut.astype(np.float64) * gain, (before, samples - len(cut) - before))

    def _rooms(self, generator: np.random.Generator) -> list[np.ndarray | None]:
        """An impulse response for each source, its direct sound first and its energy one, so that levels stay as drawn; or none."""
        count = self.rule.sources
        if generator.random() >= self.rule.reverberant:
            return [None] * count
        room = self._impulse_response(generator)
        if room.shape[1] >= count:
            positions = generator.choice(room.shape[1], count, replace=False)
            responses = [room[:, position] for position in positions]
        else:
            responses = [room[:, 0], *(self._impulse_response(generator)[:, 0] for _ in range(count - 1))]
        from_direct = [response[np.abs(response).argmax() :].astype(np.float64) for response in responses]
        return [response / np.sqrt(np.sum(response**2)) for response in from_direct]

    def _impulse_response(self, generator: np.random.Generator) -> np.ndarray:
        return read_signal(self.impulse_responses[generator.integers(len(self.impulse_responses))], self.rule.sample_rate)

    def _noise(self, speakers: Sequence[str], generator: np.random.Generator) -> tuple[np.ndarray, str]:
        """A cut of noise of any level, repeated where it is too short, and the group that it puts the mixture in."""
        noise = read_signal(self.noises[generator.integers(len(self.noises))], self.rule.sample_rate)[:, 0]
        start = generator.integers(max(len(noise) - self.rule.samples, 0) + 1)
        return np.resize(noise[start:], self.rule.samples).astype(np.float64), ""


def loud_cut(signal: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """A cut of `samples` that is not mostly a pause, if a few tries find one; all of a signal that is not longer."""
    cut, enough = signal, _QUIET_CUT * np.mean(signal**2)
    if len(signal) > samples:
        for _ in range(_CUTS_TRIED):
            start = generator.integers(len(signal) - samples + 1)
            cut = signal[start : start + samples]
            if np.mean(cut**2) > enough:
                break
    return cut


def _tensor(signal: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(signal.astype(np.float32))


def read_signal(path: Path, sample_rate: int) -> np.ndarray:
    """(samples, channels), float32, full scale 1, at `sample_rate`; the last few hundred files are kept in memory."""
    signal = _decoded(path, sample_rate)
    return signal.astype(np.float32) / (32768 if signal.dtype == np.int16 else 1)


@lru_cache(maxsize=512)
def _decoded(path: Path, sample_rate: int) -> np.ndarray:
    # 512 recordings of 12 s are 200 MB in each worker: a sample of a corpus stays in memory, a whole one streams through
    try:
        with soundfile.SoundFile(path) as file:
            # whole numbers out of a floating-point file would be its samples unscaled: all zeros
            kind, rate = "float32" if file.subtype in ("FLOAT", "DOUBLE") else "int16", file.samplerate
            signal = file.read(dtype=kind, always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"expected an audio file; {path} cannot be read ({str(error).splitlines()[0]}); remove or replace it") from None
    return signal if rate == sample_rate else soxr.resample(signal, rate, sample_rate)
