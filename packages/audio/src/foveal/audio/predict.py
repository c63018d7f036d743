"""Separate the speakers of recordings: arrays in, arrays out; files in, files out.

A recording of any sample rate, any number of channels and any length is levelled, resampled to the model's 16 kHz, separated in overlapping
chunks and brought back to its own rate, level and length. The masks are made from the mean of the channels and put on every channel, so each
speaker keeps their place in a stereo picture, and the estimates of all speakers add up to the recording. Nothing above 8 kHz (half the
model's rate) is separated: of a 44.1 or 48 kHz recording the estimates hold what is below.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from foveal.audio.audio_files import BLOCK_SECONDS, SUFFIXES, Recording, Resampler, measure_level, open_recording, wav_subtype, write_sources
from foveal.audio.checkpoints import model_from_weights
from foveal.audio.models.tiger import TIGER
from foveal.audio.stitching import SpeakerOrder, plan_chunks, separate_stream
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import collect_inputs, output_folder
from foveal.core.reports import BatchReport

#: The small trained model that ships with the package; its card stands beside it.
BUNDLED_WEIGHTS = Path(__file__).with_name("weights") / "tiger_small.safetensors"

#: Long enough for several turns of both speakers, from which the network and the voice profiles tell them apart; memory stays below 2 GiB.
CHUNK_SECONDS = 12.0
#: Share of a chunk that it has in common with the next: with 4 s, nearly every overlap holds speech that fixes the speakers' order.
OVERLAP = 1 / 3

_LEVEL = 10 ** (-25 / 20)  # root mean square that the model was trained around
_MOST_GAIN = 1e7  # what is below 24 bits is silence
_MOST_CHANNELS = 1024  # of a file in libsndfile; an array with more is lying on its side


class Separator:
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
        if not 1 <= chunk_seconds < float("inf"):
            raise UserError(f"expected chunks of at least one second; got {chunk_seconds:g}; the default is {CHUNK_SECONDS:g}")
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.model = model.to(self.device).eval()
        self.sample_rate = model.config.sample_rate
        self.sources = model.config.sources
        self._chunk = max(round(chunk_seconds * self.sample_rate), model.shortest)
        self._overlap = round(OVERLAP * self._chunk)

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
        path = BUNDLED_WEIGHTS if source is None else Path(source)
        if source is None and not path.exists():
            raise UserError(f"expected the package's own weights at {path}; they are missing; install foveal-audio again or pass --checkpoint")
        model = model_from_weights(path)
        assert isinstance(model, TIGER)  # asked for by its system's name
        return cls(model, device, chunk_seconds)

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
        if sample_rate <= 0:
            raise UserError(f"expected a sample rate above 0 Hz; got {sample_rate}")
        if isinstance(waveform, Tensor):
            signal = (waveform.float() if waveform.dtype == torch.bfloat16 else waveform).detach().cpu().numpy()
        else:
            signal = np.asarray(waveform)
        if signal.ndim not in (1, 2) or 0 in signal.shape or not np.issubdtype(signal.dtype, np.floating):
            raise UserError(f"expected a waveform (time,) or (channels, time) of floating-point samples; got {signal.shape} of {signal.dtype}")
        if signal.ndim == 2 and signal.shape[0] > _MOST_CHANNELS:
            raise UserError(f"expected a waveform (channels, time) with at most {_MOST_CHANNELS} channels; got {signal.shape}; transpose it")
        if not np.isfinite(signal).all():
            raise UserError(f"expected finite samples; {int((~np.isfinite(signal)).sum())} of {signal.size} are nan or infinite; repair the waveform")
        frames = np.atleast_2d(signal).T.astype(np.float32)
        block = max(1, round(BLOCK_SECONDS * sample_rate))
        pieces = [frames[start : start + block] for start in range(0, len(frames), block)]
        level = measure_level(float(np.square(piece.mean(axis=1, dtype=np.float64)).mean()) for piece in pieces)
        separated = np.concatenate(list(self.stream(pieces, sample_rate, frames.shape[1], len(frames), level)), axis=1).transpose(0, 2, 1)
        separated = np.ascontiguousarray(separated[:, 0] if signal.ndim == 1 else separated)
        return torch.from_numpy(separated).to(waveform.device) if isinstance(waveform, Tensor) else separated

    def stream(
        self, blocks: Iterable[Float[ndarray, "frames channels"]], sample_rate: int, channels: int, frames: int, level: float
    ) -> Iterator[Float[ndarray, "sources frames channels"]]:
        """Separate a recording as it is read; memory does not grow with its length.

        Args:
            blocks: Its samples in float32, in pieces of any length.
            sample_rate: Hz.
            channels: Their number.
            frames: Samples a channel of all blocks together.
            level: Root mean square of the speech in the mean of the channels; the network hears it at -25 dBFS. 0 is silence.

        Yields:
            The estimates in pieces, at the recording's rate and level; together `frames` long.
        """
        gain = min(_LEVEL / level, _MOST_GAIN) if level > 0 else 1.0
        inner = Resampler.length(frames, sample_rate, self.sample_rate)
        arriving = Resampler(sample_rate, self.sample_rate, channels).stream(blocks, inner)
        mixture = (torch.from_numpy(np.ascontiguousarray(block.T) * np.float32(gain)) for block in arriving)
        order = SpeakerOrder(self.sources, self.sample_rate, _LEVEL)
        separated = separate_stream(mixture, plan_chunks(inner, self._chunk, self._overlap), self._separate_chunk, order)
        columns = (piece.flatten(0, 1).T.numpy() / np.float32(gain) for piece in separated)  # (frames, sources * channels)
        for block in Resampler(self.sample_rate, sample_rate, self.sources * channels).stream(columns, frames):
            yield block.reshape(len(block), self.sources, channels).transpose(1, 0, 2)

    @torch.inference_mode()
    def _separate_chunk(self, chunk: Float[Tensor, "channels samples"]) -> Float[Tensor, "sources channels samples"]:
        channels, samples = chunk.shape
        if not chunk.any():
            return chunk.new_zeros(self.sources, channels, samples)
        chunk = torch.nn.functional.pad(chunk, (0, max(0, self.model.shortest - samples))).to(self.device)
        masks = self.model.masks(chunk.mean(0, keepdim=True))
        estimates = self.model.apply_masks(chunk, masks.expand(channels, *masks.shape[1:]))
        return estimates[..., :samples].transpose(0, 1).cpu()

    def separate_file(self, source: str | Path | Recording, targets: Sequence[str | Path], progress: Callable[[float], None] | None = None) -> int:
        """Separate a sound file into one wav file a speaker, at its own sample rate and length, in its own bit depth where wav has it.

        Args:
            source: A sound file, or what `open_recording` found in it.
            targets: A path for every speaker; existing files are replaced.
            progress: Called with the seconds of every piece that went in.

        Returns:
            How many samples were clipped at full scale.

        Raises:
            UserError: The file cannot be separated, or the results cannot be written; then none of them is there.
        """
        recording = source if isinstance(source, Recording) else open_recording(source)

        def blocks() -> Iterator[ndarray]:
            for block in recording.blocks():
                yield block
                if progress is not None:
                    progress(len(block) / recording.sample_rate)

        stream = self.stream(blocks(), recording.sample_rate, recording.channels, recording.frames, recording.level)
        subtype = wav_subtype(recording.subtype)
        return write_sources([Path(target) for target in targets], stream, recording.sample_rate, recording.channels, recording.frames, subtype)


def output_names(files: Sequence[Path]) -> list[str]:
    """A stem for the outputs of every file: its own; where two share it, with the suffix; where that is shared too, with its folders.

    >>> output_names([Path("a/call.wav"), Path("b/call.wav"), Path("b/talk.mp3")])
    ['a_call_wav', 'b_call_wav', 'talk']
    """
    names = [file.stem for file in files]
    depth = 0
    while repeated := {name for name, count in Counter(names).items() if count > 1}:
        for index, file in enumerate(files):
            if names[index] in repeated:
                folders = file.resolve().parent.parts[1:][-depth:] if depth else ()
                names[index] = "_".join([*folders, file.stem, file.suffix.removeprefix(".")]).rstrip("_")
        depth += 1
        if depth > 1 + max(len(file.resolve().parts) for file in files):
            return [f"{index + 1}_{name}" for index, name in enumerate(names)]
    return names


def separate_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    demo: bool = False,
    checkpoint: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    seed: int = 0,
    chunk_seconds: float | None = None,
    as_json: bool = False,
) -> int:
    """What ``foveal audio separate`` does: `<stem>_speaker1.wav` and so on for every file, a report at the end, and the exit code.

    Args:
        files: Sound files and folders of them.
        output: Folder for the results; None is ``separated`` here.
        demo: Separate and score the mixture that ships with the package instead of files.
        checkpoint: Weights; None is the package's own.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: Replace existing results instead of keeping them.
        seed: Of torch; separation draws nothing at random.
        chunk_seconds: As in `Separator`.
        as_json: Print the report as JSON.

    Returns:
        0, or 2 if a file could not be separated.

    Raises:
        UserError: Nothing can be done at all: no file named, no output folder, no weights, no such device.
    """
    if demo == bool(files):
        raise UserError(
            "expected sound files or --demo; got both" if demo else "expected sound files to separate; got none; name some, or try --demo"
        )
    torch.manual_seed(seed)
    folder = output_folder("separated" if output is None else output)
    separator = Separator.from_pretrained(checkpoint, device, CHUNK_SECONDS if chunk_seconds is None else chunk_seconds)
    report = BatchReport()
    if demo:
        from foveal.audio.demo import separate_demo

        with report.item("demo") as entry:
            separate_demo(separator, folder, overwrite, entry)
    else:
        _separate_batch(separator, files, folder, overwrite, report)
    return report.finish(as_json, {"seconds": ".1f", "real-time factor": ".3f", "SI-SDR improvement dB": ".2f"})


def _separate_batch(separator: Separator, files: Sequence[Path], folder: Path, overwrite: bool, report: BatchReport) -> None:
    inputs: list[Path] = []
    for file in files:
        with report.item(file) as missing:
            inputs += [found for found in collect_inputs([file], SUFFIXES) if found not in inputs]
        if missing.state == "done":
            report.entries.remove(missing)
    sources = {path.resolve() for path in inputs}

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bars:
        for path, name in zip(inputs, output_names(inputs), strict=True):
            targets = [folder / f"{name}_speaker{number + 1}.wav" for number in range(separator.sources)]
            present = [str(target) for target in targets if target.exists()]
            if present and not overwrite:
                report.kept(path, present)
                continue
            with report.item(path) as entry:
                if not sources.isdisjoint(target.resolve() for target in targets):
                    raise UserError(
                        f"expected outputs apart from the inputs; {targets[0].name} and others would replace an input; choose another -o/--output"
                    )
                recording = open_recording(path)
                bar = bars.add_task(path.name, total=recording.seconds)
                began = time.perf_counter()
                clipped = separator.separate_file(recording, targets, functools.partial(bars.advance, bar))
                bars.remove_task(bar)
                entry.outputs = [str(target) for target in targets]
                entry.numbers = {"seconds": recording.seconds, "real-time factor": (time.perf_counter() - began) / recording.seconds}
                if clipped:
                    entry.message = f"{clipped} samples beyond full scale were clipped"
