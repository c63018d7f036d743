"""A recording of any length as windows the tokenizer can read, in bounded memory: blocks are read, filtered with a margin, cut, resampled, scaled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import mne
import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import signal

from foveal.core.errors import UserError
from foveal.eeg.data.windows import TARGET_RATE, Scale
from foveal.eeg.montages import Derivation, Montage, derive
from foveal.eeg.preprocessing import EPS, channel_scale, resampled, samples_at

#: Hz below which nothing that the tokenizer looks for can be in a recording.
LOWEST_RATE = 50.0

_BLOCK_SAMPLES = 4_000_000  # read at a time, over all channels: 32 MB in float64
_FLAT = 1e-4  # microvolt between lowest and highest sample of a window; amplifiers resolve some 0.01


@dataclass(frozen=True)
class Preparation:
    """What happens to a recording before it is cut.

    Attributes:
        window: seconds of a window.
        step: seconds from one window to the next; None is `window`.
        montage: see `foveal.eeg.montages.derive`.
        channels: names to keep; None keeps all EEG.
        band: Hz of the band-pass, Butterworth of order 4 forward and backward; None is no filter. Its upper edge gives way to the recording's rate.
        notch: Hz of mains hum to take out with its harmonics; 0 is none, None looks for 50 and 60 Hz.
        scale: each channel of a window by itself, or by the channel's scale in up to ten minutes spread over the recording.
    """

    window: float = 5.0
    step: float | None = None
    montage: Montage = "auto"
    channels: tuple[str, ...] | None = None
    band: tuple[float, float] | None = (0.1, 75.0)
    notch: float | None = None
    scale: Scale = "window"


class Windows(NamedTuple):
    """Some windows of a recording.

    Attributes:
        starts: seconds from the beginning of the recording.
        signal: (windows, channels, samples), prepared.
        valid: (windows, channels), false where samples are missing or the channel is flat.
    """

    starts: Float[ndarray, " windows"]
    signal: Float[ndarray, "windows channels samples"]
    valid: Bool[ndarray, "windows channels"]


class WindowedRecording:
    """A recording and how it will be cut.

    Args:
        raw: need not be preloaded.
        preparation: what to do.

    Raises:
        UserError: the rate is below `LOWEST_RATE`, the recording shorter than a window, or `derive` finds no channels.
    """

    def __init__(self, raw: mne.io.BaseRaw, preparation: Preparation = Preparation()) -> None:
        self.raw, self.preparation = raw, preparation
        self.rate = float(raw.info["sfreq"])
        if self.rate < LOWEST_RATE:
            raise UserError(f"expected EEG at {LOWEST_RATE:g} Hz or more; this recording has {self.rate:g} Hz; tokens describe 1 to 100 Hz")
        channels = None if preparation.channels is None else list(preparation.channels)
        self.derivation: Derivation = derive(raw, preparation.montage, channels)
        self.length = round(preparation.window * self.rate)
        self.step = self.length if preparation.step is None else round(preparation.step * self.rate)
        if preparation.window < 1 or self.step < 1:
            step = preparation.window if preparation.step is None else preparation.step
            raise UserError(f"expected windows of at least 1 s and a step above 0; got {preparation.window:g} s and {step:g} s")
        if preparation.notch is not None and preparation.notch >= self.rate / 2:
            raise UserError(f"expected --notch below half the recording's {self.rate:g} Hz, or 0 for none; got {preparation.notch:g}")
        if preparation.band is not None and preparation.band[0] >= 0.45 * self.rate:
            raise UserError(f"expected a band that begins below {0.45 * self.rate:g} Hz, for this recording's rate; got {preparation.band[0]:g} Hz")
        seconds = raw.n_times / self.rate
        if raw.n_times < self.length:
            raise UserError(
                f"expected a recording of at least one window ({preparation.window:g} s); this one has {seconds:.2f} s; pass a shorter --window"
            )
        self.count = (raw.n_times - self.length) // self.step + 1
        self.notch = self._line_frequency() if preparation.notch is None else preparation.notch
        self.scale = self._recording_scale() if preparation.scale == "recording" else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the channels."""
        return self.derivation.names

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.raw.n_times / self.rate

    def __iter__(self) -> Iterator[Windows]:
        """All windows, in order."""
        margin = round(min(20.0, self.seconds) * self.rate)  # a 0.1 Hz high-pass has forgotten its beginning by then
        per_block = max(1, min(self.count, (_BLOCK_SAMPLES // max(len(self.derivation.picks), 1) - 2 * margin) // self.step))
        for first in range(0, self.count, per_block):
            last = min(first + per_block, self.count)
            start, stop = first * self.step, (last - 1) * self.step + self.length
            samples, missing = self.read(max(0, start - margin), min(self.raw.n_times, stop + margin))
            offset = start - max(0, start - margin)
            cuts = [offset + index * self.step for index in range(last - first)]
            pieces = np.stack([samples[:, cut : cut + self.length] for cut in cuts])
            holes = np.stack([missing[:, cut : cut + self.length].any(-1) for cut in cuts])
            valid = ~holes & (np.ptp(pieces, axis=-1) > _FLAT)
            target = samples_at(self.preparation.window, TARGET_RATE)
            prepared = resampled(pieces, self.length / target * TARGET_RATE, TARGET_RATE)
            divisor = channel_scale(prepared) if self.scale is None else self.scale
            prepared = (prepared / (divisor + EPS)).astype(np.float32)
            yield Windows(np.arange(first, last) * self.step / self.rate, np.where(valid[..., None], prepared, 0), valid)

    def read(self, start: int, stop: int, filtered: bool = True) -> tuple[Float[ndarray, "channels samples"], Bool[ndarray, "channels samples"]]:
        """Derived and filtered samples `start` to `stop` in microvolt, and where they are not known; filtered as if they were 0 there."""
        recorded = self.raw.get_data(picks=list(self.derivation.picks), start=start, stop=stop, verbose="error")
        holes = ~np.isfinite(recorded)
        missing = (np.abs(self.derivation.weights) > 0).astype(float) @ holes > 0 if holes.any() else np.zeros((len(self.names), stop - start), bool)
        samples = self.derivation.weights @ np.where(holes, 0, recorded * 1e6)
        if not filtered:
            return samples, missing
        flat = np.ptp(samples, axis=-1) <= _FLAT
        if self.preparation.band is not None:
            low, high = self.preparation.band
            kind, edges = ("bandpass", [low, high]) if high < 0.45 * self.rate else ("highpass", low)
            samples = signal.sosfiltfilt(signal.butter(4, edges, kind, fs=self.rate, output="sos"), samples, padlen=min(samples.shape[-1] - 1, 999))
        for harmonic in range(1, 4):
            if self.notch and harmonic * self.notch < 0.45 * self.rate:
                sections = signal.tf2sos(*signal.iirnotch(harmonic * self.notch, 30, fs=self.rate))
                samples = signal.sosfiltfilt(sections, samples, padlen=min(samples.shape[-1] - 1, 999))
        samples[flat] = 0
        return samples, missing

    def _line_frequency(self) -> float:
        """50 or 60 Hz where the spectrum of the first minute stands out there, else 0."""
        known = self.raw.info.get("line_freq")
        samples = self.read(0, min(self.raw.n_times, round(60 * self.rate)), filtered=False)[0]
        frequency, power = signal.welch(samples, self.rate, nperseg=min(samples.shape[-1], round(2 * self.rate)))
        for line in [float(known)] if known else [50.0, 60.0]:
            if line + 6 > self.rate / 2:
                continue
            on = power[:, np.abs(frequency - line) <= 0.6].max(-1)
            beside = np.median(power[:, (np.abs(frequency - line) > 2) & (np.abs(frequency - line) < 6)], axis=-1)
            if np.median(on / np.maximum(beside, 1e-30)) > 5:
                return line
        return 0.0

    def _recording_scale(self) -> Float[ndarray, "channels 1"]:
        pieces = []
        for start in np.linspace(0, max(0, self.raw.n_times - round(60 * self.rate)), 10).astype(int):
            pieces.append(self.read(int(start), min(self.raw.n_times, int(start) + round(60 * self.rate)))[0])
            if self.seconds <= 60:
                break
        return channel_scale(np.concatenate(pieces, axis=-1))
