"""Separate the speakers of recordings: arrays in, arrays out; files in, files out.

A recording of any sample rate, any number of channels and any length is levelled, resampled to the model's 16 kHz, separated in overlapping
chunks and brought back to its own rate, level and length. The masks are made from the mean of the channels and put on every channel, so each
speaker keeps their place in a stereo picture, and the estimates of all speakers add up to the recording. Nothing above 8 kHz (half the
model's rate) is separated: of a 44.1 or 48 kHz recording the estimates hold what is below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import overload

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from foveal.audio.audio_files import Recording
from foveal.audio.batches import Demo, Verb, run_command
from foveal.audio.models.tiger import TIGER
from foveal.audio.recordings import LEVEL, RecordingProcessor, trained_model
from foveal.audio.stitching import SpeakerOrder

#: The small trained model that ships with the package; its card stands beside it.
BUNDLED_WEIGHTS = Path(__file__).with_name("weights") / "tiger_small.safetensors"

#: Long enough for several turns of both speakers, from which the network and the voice profiles tell them apart; memory stays below 2 GiB.
CHUNK_SECONDS = 12.0
#: Share of a chunk that it has in common with the next: with 4 s, nearly every overlap holds speech that fixes the speakers' order.
OVERLAP = 1 / 3


class Separator(RecordingProcessor):
    """Separates the speakers of a recording.

    >>> separator = Separator.from_pretrained()
    >>> speakers = separator(waveform, sample_rate=44_100)  # (channels, time) -> (sources, channels, time)

    Args:
        model: A `TIGER`, or any module with its `config`, `shortest`, `masks` and `apply_masks`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        chunk_seconds: Longest piece that the network sees at once; neighbours share a third of it. Memory grows with it, not with the recording.

    Raises:
        UserError: No such device, or a chunk under one second.
    """

    def __init__(self, model: TIGER, device: str | torch.device = "auto", chunk_seconds: float = CHUNK_SECONDS) -> None:
        super().__init__(model, model.config.sources, device, chunk_seconds, OVERLAP)
        self.sources = model.config.sources

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, device: str | torch.device = "auto", chunk_seconds: float = CHUNK_SECONDS
    ) -> Separator:
        """Load trained weights.

        Args:
            source: A ``.safetensors`` file, or a folder with one; None is the small model that ships with the package.
            device: ``auto``, ``cpu`` or ``cuda[:N]``.
            chunk_seconds: As in the constructor.

        Raises:
            UserError: Missing, corrupt or foreign weights.
        """
        return cls(trained_model(source, BUNDLED_WEIGHTS, "tiger"), device, chunk_seconds)

    @overload
    def __call__(self, waveform: Tensor, sample_rate: int) -> Tensor: ...

    @overload
    def __call__(self, waveform: ndarray, sample_rate: int) -> ndarray: ...

    def __call__(self, waveform: Tensor | ndarray, sample_rate: int) -> Tensor | ndarray:
        """Separate a waveform.

        Args:
            waveform: (time,) or (channels, time), floating point, array or tensor.
            sample_rate: Hz.

        Returns:
            (sources, time) or (sources, channels, time): float32, same kind, rate and length.

        Raises:
            UserError: Another shape, no samples, samples that are not finite or not floating point, or no sample rate.
        """
        return self.process(waveform, sample_rate)

    def _order(self) -> SpeakerOrder:
        return SpeakerOrder(self.sources, self.sample_rate, LEVEL)

    def _process_chunk(self, chunk: Float[Tensor, "channels samples"]) -> Float[Tensor, "sources channels samples"]:
        masks = self.model.masks(chunk.mean(0, keepdim=True))
        return self.model.apply_masks(chunk, masks.expand(len(chunk), *masks.shape[1:])).transpose(0, 1)

    def separate_file(self, source: str | Path | Recording, targets: Sequence[str | Path], progress: Callable[[float], None] | None = None) -> int:
        """Separate a sound file into one wav file a speaker; see `RecordingProcessor.process_file`."""
        return self.process_file(source, targets, progress)


def _demo() -> Demo:
    from foveal.audio.demo import separate_demo

    return separate_demo


def _load(checkpoint: Path | None, device: str, chunk_seconds: float | None) -> Separator:
    return Separator.from_pretrained(checkpoint, device, CHUNK_SECONDS if chunk_seconds is None else chunk_seconds)


def _endings(separator: RecordingProcessor) -> list[str]:
    return [f"speaker{number + 1}" for number in range(separator.outputs)]


#: ``foveal audio separate``: `<stem>_speaker1.wav` and so on for every file; arguments as of `foveal.audio.batches.run_command`.
separate_command = functools.partial(run_command, Verb("separate", "separated", _load, _endings, _demo))
