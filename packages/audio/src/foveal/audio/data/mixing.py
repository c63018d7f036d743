"""Mixtures made on the fly: single speakers in, (mixture, sources) out.

Every choice (speakers, cuts, speeds, levels, overlap) is drawn from one number, so a mixture can be made again from that number alone: the
fixed mixtures of an evaluation, and the same training data after an interruption or with another number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from foveal.audio.data.librispeech import Utterance

_SILENCE = 1e-8  # power, full scale 1: under it a signal has no level to set
_QUIET_CUT = 0.03  # a cut with less than this share of its recording's power (-15 dB) is mostly a pause
_CUTS_TRIED = 8


@dataclass(frozen=True)
class MixingRule:
    """How single speakers become a mixture. Pairs are ranges to draw from, evenly."""

    seconds: float = 3.0  # of the mixture
    sample_rate: int = 16_000  # Hz
    sources: int = 2
    gain: tuple[float, float] = (-2.5, 2.5)  # dB, of each source against the common level
    level: tuple[float, float] = (-28.0, -22.0)  # dB of full scale, RMS of the mixture
    speed: tuple[float, float] = (1.0, 1.0)  # of playing: pitch and formants move with it, which makes further speakers of one

    @property
    def samples(self) -> int:
        """Length of the mixture."""
        return round(self.seconds * self.sample_rate)


class SpeakerMixtures(Dataset):
    """Mixtures of different speakers.

    Args:
        utterances: recordings of single speakers, at the rule's sample rate, of at least `rule.sources` speakers.
        rule: how they are mixed.
        count: mixtures in an epoch.
        seed: mixture i is a function of (seed, i). None draws it from torch's generator, which the training loader seeds by
            (seed, epoch, i): fresh mixtures each epoch, the same after an interruption.
    """

    def __init__(self, utterances: Sequence[Utterance], rule: MixingRule, count: int, seed: int | None = None) -> None:
        self.rule, self.count, self.seed = rule, count, seed
        self.by_speaker: dict[str, list[Utterance]] = {}
        for utterance in utterances:
            self.by_speaker.setdefault(utterance.speaker, []).append(utterance)
        self.speakers = sorted(self.by_speaker)
        if len(self.speakers) < rule.sources:
            raise ValueError(f"mixtures of {rule.sources} speakers need at least as many; got {len(self.speakers)}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Float[Tensor, " samples"], Float[Tensor, "sources samples"]]:
        """Mixture and its sources, which add up to it."""
        key = (int(torch.randint(2**62, ())),) if self.seed is None else (self.seed, index)
        generator = np.random.default_rng(key)
        chosen = generator.choice(len(self.speakers), self.rule.sources, replace=False)
        sources = np.stack([self._source(self.by_speaker[self.speakers[speaker]], generator) for speaker in chosen])
        mixture = sources.sum(0)
        level = generator.uniform(*self.rule.level)
        scale = 10 ** (level / 20) / max(np.sqrt(np.mean(mixture**2)), _SILENCE**0.5)
        sources = torch.from_numpy((sources * scale).astype(np.float32))
        return sources.sum(0), sources

    def _source(self, utterances: list[Utterance], generator: np.random.Generator) -> np.ndarray:
        """A cut of one speaker at its own speed and gain, power about one."""
        utterance = utterances[generator.integers(len(utterances))]
        speed, rule = generator.uniform(*self.rule.speed), self.rule
        signal = utterance.read()
        wanted = round(rule.samples * speed)
        power = np.mean(signal**2)
        for _ in range(_CUTS_TRIED):
            if len(signal) <= wanted:
                cut = signal
                break
            start = generator.integers(len(signal) - wanted + 1)
            cut = signal[start : start + wanted]
            if np.mean(cut**2) > _QUIET_CUT * power:
                break
        if speed != 1.0:
            cut = soxr.resample(cut, speed * rule.sample_rate, rule.sample_rate, quality="MQ")
        cut = cut[: rule.samples]
        before = generator.integers(rule.samples - len(cut) + 1)
        cut = np.pad(cut, (before, rule.samples - len(cut) - before)).astype(np.float64)
        gain = 10 ** (generator.uniform(*rule.gain) / 20)
        return cut * (gain / np.sqrt(max(np.mean(cut**2), _SILENCE)))
