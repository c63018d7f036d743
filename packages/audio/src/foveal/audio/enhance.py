"""Enhance noisy recordings: arrays in, arrays out; files in, files out.

A recording of any sample rate, any number of channels and any length is resampled to the model's 16 kHz and enhanced channel by channel, whole
if it is short and in overlapping chunks if it is long, and brought back to its own rate, level and length. Nothing above 8 kHz (half the model's
rate) is enhanced: of a 44.1 or 48 kHz recording the result holds what is below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from foveal.audio.audio_files import Recording
from foveal.audio.batches import Demo, Verb, run_command
from foveal.audio.models.mambattention import MambAttention
from foveal.audio.recordings import LEVEL, RecordingProcessor, trained_model

#: The small trained model that ships with the package; its card stands beside it.
BUNDLED_WEIGHTS = Path(__file__).with_name("weights") / "mambattention_small.safetensors"

#: Longer than most utterances, which the authors' code takes whole; with the paper's model memory stays below 2 GiB.
CHUNK_SECONDS = 10.0
#: Share of a chunk that fades into the next: 1 s.
OVERLAP = 1 / 10

_LEAST_LEVEL = LEVEL / 10  # chunks 20 dB under the recording's speech are pauses, and are not raised to where the network hears speech


class Enhancer(RecordingProcessor):
    """Takes noise from recordings of speech.

    >>> enhancer = Enhancer.from_pretrained()
    >>> clean = enhancer(waveform, sample_rate=44_100)  # (channels, time) -> (channels, time)

    Args:
        model: A `MambAttention`, or any module with its `config`, `shortest` and `enhance`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        chunk_seconds: Longest piece that the network sees at once. Memory grows with it, not with the recording.

    Raises:
        UserError: No such device, or a chunk under one second.
    """

    def __init__(self, model: MambAttention, device: str | torch.device = "auto", chunk_seconds: float = CHUNK_SECONDS) -> None:
        super().__init__(model, 1, device, chunk_seconds, OVERLAP)

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, device: str | torch.device = "auto", chunk_seconds: float = CHUNK_SECONDS) -> Enhancer:
        """Load trained weights.

        Args:
            source: A ``.safetensors`` file, or a folder with one; None is the small model that ships with the package.
            device: ``auto``, ``cpu`` or ``cuda[:N]``.
            chunk_seconds: As in the constructor.

        Raises:
            UserError: Missing, corrupt or foreign weights.
        """
        return cls(trained_model(source, BUNDLED_WEIGHTS, "mambattention"), device, chunk_seconds)

    @overload
    def __call__(self, waveform: Tensor, sample_rate: int) -> Tensor: ...

    @overload
    def __call__(self, waveform: ndarray, sample_rate: int) -> ndarray: ...

    def __call__(self, waveform: Tensor | ndarray, sample_rate: int) -> Tensor | ndarray:
        """Enhance a waveform.

        Args:
            waveform: (time,) or (channels, time), floating point, array or tensor.
            sample_rate: Hz.

        Returns:
            Float32, of the same kind, shape and rate.

        Raises:
            UserError: Another shape, no samples, samples that are not finite or not floating point, or no sample rate.
        """
        return self.process(waveform, sample_rate)[0]

    def _process_chunk(self, chunk: Float[Tensor, "channels samples"]) -> Float[Tensor, "1 channels samples"]:
        # one channel after the other: memory is that of one
        return torch.cat([self.model.enhance(channel[None], _LEAST_LEVEL) for channel in chunk])[None]

    def enhance_file(self, source: str | Path | Recording, target: str | Path, progress: Callable[[float], None] | None = None) -> int:
        """Enhance a sound file into a wav file; see `RecordingProcessor.process_file`."""
        return self.process_file(source, [target], progress)


def _demo() -> Demo:
    from foveal.audio.demo.noisy import enhance_demo

    return enhance_demo


def _load(checkpoint: Path | None, device: str, chunk_seconds: float | None) -> Enhancer:
    return Enhancer.from_pretrained(checkpoint, device, CHUNK_SECONDS if chunk_seconds is None else chunk_seconds)


#: ``foveal audio enhance``: `<stem>_enhanced.wav` for every file; arguments as of `foveal.audio.batches.run_command`.
enhance_command = functools.partial(run_command, Verb("enhance", "enhanced", _load, lambda enhancer: ["enhanced"], _demo))
