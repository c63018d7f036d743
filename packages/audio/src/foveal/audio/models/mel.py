"""The mel spectrogram that speech synthesis models write and vocoders read, as HiFi-GAN defines it (Kong et al., 2020), and Griffin-Lim.

Natural logarithm of the magnitude in slaney's mel bands, not below 1e-5.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torchaudio.functional as audio
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class MelConfig:
    """How a waveform becomes a mel spectrogram.

    Attributes:
        sample_rate: Hz.
        window: samples of the Hann window and of the Fourier transform.
        hop: samples between frames.
        mels: bands.
        low: Hz, lower end of the first band.
        high: Hz, upper end of the last band.
        log: ``"natural"`` or ``"10"``: base of the logarithm.
        floor: of the magnitude, below which it is not followed.
    """

    sample_rate: int = 16_000
    window: int = 1024
    hop: int = 256
    mels: int = 80
    low: float = 0.0
    high: float = 8000.0
    log: str = "natural"
    floor: float = 1e-5

    def __post_init__(self) -> None:
        if self.log not in ("natural", "10"):
            raise ValueError(f"log must be 'natural' or '10'; got {self.log!r}")
        if not 0 <= self.low < self.high <= self.sample_rate / 2:
            raise ValueError(f"bands must lie between 0 and {self.sample_rate / 2:g} Hz, half the sample rate; got {self.low:g} to {self.high:g}")


@functools.lru_cache(maxsize=8)
def _bands(config: MelConfig) -> Tensor:
    with torch.inference_mode(False):
        bands = audio.melscale_fbanks(
            config.window // 2 + 1, config.low, config.high, config.mels, config.sample_rate, norm="slaney", mel_scale="slaney"
        )
        return bands.T.contiguous()


@functools.lru_cache(maxsize=8)
def _inverse(config: MelConfig) -> Tensor:
    with torch.inference_mode(False):
        return torch.linalg.pinv(_bands(config))


def mel_spectrogram(waveform: Float[Tensor, "*batch samples"], config: MelConfig) -> Float[Tensor, "*batch mels frames"]:
    """Logarithmic mel spectrogram of a waveform with full scale 1; samples // hop + 1 frames, the first centred on the first sample."""
    window = torch.hann_window(config.window, device=waveform.device, dtype=waveform.dtype)
    padding = "reflect" if waveform.shape[-1] > config.window // 2 else "constant"
    spectrum = torch.stft(waveform, config.window, config.hop, window=window, center=True, pad_mode=padding, return_complex=True)
    # the square root's slope at zero is infinite; the floor is far above this
    magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()
    log = (_bands(config).to(magnitude) @ magnitude).clamp(min=config.floor).log()
    return log if config.log == "natural" else log * 0.43429448190325182


def linear_magnitude(mel: Float[Tensor, "*batch mels frames"], config: MelConfig) -> Float[Tensor, "*batch bins frames"]:
    """Magnitudes whose mel spectrogram is nearest to `mel`, none below zero."""
    magnitude = (mel if config.log == "natural" else mel / 0.43429448190325182).exp()
    return (_inverse(config).to(magnitude) @ magnitude).clamp(min=0.0)


def griffin_lim(
    mel: Float[Tensor, "*batch mels frames"], config: MelConfig, iterations: int = 32, momentum: float = 0.99
) -> Float[Tensor, "*batch samples"]:
    """A waveform by Griffin and Lim's alternation between magnitude and consistent phase (1984; momentum: Perraudin et al., 2013).

    Args:
        mel: spectrogram as `config` makes it, with its logarithm.
        config: its window, hop and bands.
        iterations: of the alternation; the first phase is drawn at random.
        momentum: how far each goes beyond the last; 0 is the method of 1984.

    Returns:
        (frames - 1) * hop samples.
    """
    window = torch.hann_window(config.window, device=mel.device, dtype=mel.dtype)
    magnitude, samples = linear_magnitude(mel, config), (mel.shape[-1] - 1) * config.hop
    if not samples:
        return magnitude.new_zeros(*mel.shape[:-2], 0)
    # its transforms reflect half a window at both ends
    lacking = max(config.window // (2 * config.hop) + 2 - mel.shape[-1], 0)
    if lacking:
        magnitude = torch.cat([magnitude, magnitude[..., -1:].expand(*magnitude.shape[:-1], lacking)], -1)
    waveform = audio.griffinlim(
        magnitude,
        window=window,
        n_fft=config.window,
        hop_length=config.hop,
        win_length=config.window,
        power=1.0,
        n_iter=iterations,
        momentum=momentum,
        length=None,
        rand_init=True,
    )
    return waveform[..., :samples]
