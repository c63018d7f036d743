"""From a mel spectrogram to a waveform: Griffin-Lim, which needs no weights, HiFi-GAN with its authors' weights, and Vocos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from foveal.audio.checkpoints import load_official, model_from_weights
from foveal.audio.checkpoints.hifigan import published_config, published_spectrogram
from foveal.audio.models.hifigan import HiFiGAN
from foveal.audio.models.mel import MelConfig, griffin_lim
from foveal.audio.models.vocos import Vocos
from foveal.core.checkpoint import load_weights, resolve
from foveal.core.errors import UserError

VocoderName = Literal["griffin_lim", "vocos", "hifigan"]
NAMES: tuple[str, ...] = get_args(VocoderName)

#: The small trained Vocos that ships with the package; its card stands beside it.
BUNDLED_VOCOS = Path(__file__).with_name("weights") / "vocos_small.safetensors"

#: (mels, frames) in natural or decimal logarithm, as the voice says -> (samples,)
Vocoder = Callable[[Float[Tensor, "mels frames"]], Float[Tensor, " samples"]]


def load_vocoder(name: str, mel: MelConfig, checkpoint: str | Path | None = None, device: str | torch.device = "cpu") -> Vocoder:
    """A function from the logarithmic mel spectrogram `mel` describes to a waveform at its sample rate.

    Args:
        name: ``griffin_lim``, ``vocos`` or ``hifigan``.
        mel: the spectrogram it will be given; a network must read the same.
        checkpoint: weights of ours (.safetensors), or the authors' file. None takes the bundled ones, which there are for ``vocos`` only.
        device: of the network.

    Raises:
        UserError: unknown name, no weights, or weights for another spectrogram.
    """
    if name not in NAMES:
        raise UserError(f"expected --vocoder {', '.join(NAMES)}; got {name!r}")
    if name == "griffin_lim":
        if checkpoint is not None:
            raise UserError("expected no vocoder checkpoint with griffin_lim, which has no weights; name --vocoder vocos or hifigan")
        return lambda spectrogram: griffin_lim(spectrogram, mel)
    if checkpoint is None and name == "hifigan":
        raise UserError("expected --vocoder-checkpoint with hifigan: the authors' generator file; none ships with the package")
    path = Path(checkpoint or BUNDLED_VOCOS)
    network = _network(name, path, mel).to(device)
    to_natural = 1.0 if mel.log == "natural" else 2.302585092994046

    @torch.inference_mode()
    def vocode(spectrogram: Tensor) -> Tensor:
        if spectrogram.shape[1] < 2:
            return spectrogram.new_zeros(0)
        return network(spectrogram[None].to(device) * to_natural)[0]

    return vocode


def _network(name: str, path: Path, mel: MelConfig) -> Vocos | HiFiGAN:
    path = resolve(path)
    if path.suffix == ".safetensors":
        network = model_from_weights(path, name)
        header = load_weights(path, name).metadata
        stored, known = header.get("mel"), json.loads(header.get("spectrogram", "{}"))
        if stored is not None and stored != mel_header(mel):
            raise UserError(f"expected a vocoder of the voice's mel spectrogram {mel_header(mel)}; {path} reads {stored}; choose another")
    else:
        network = load_official(name, path)
        known = published_spectrogram(published_config(path)) if name == "hifigan" else {}
    assert isinstance(network, (Vocos, HiFiGAN))
    found, wanted = (network.config.mels, network.config.hop), (mel.mels, mel.hop)
    if found != wanted:
        raise UserError(f"expected a vocoder of {wanted[0]} mel bands and hop {wanted[1]}, as the voice has; {path} has {found[0]} and {found[1]}")
    if other := ", ".join(f"{field} {value:g}" for field, value in known.items() if value != getattr(mel, field)):
        raise UserError(f"expected a vocoder of the voice's mel spectrogram ({mel_header(mel)}); {path} is published for {other}; choose another")
    return network


def mel_header(mel: MelConfig) -> str:
    """As it stands in the header of a vocoder's weights."""
    return f"{mel.sample_rate} Hz, window {mel.window}, hop {mel.hop}, {mel.mels} bands from {mel.low:g} to {mel.high:g} Hz"
