"""Recordings on disk: checked and measured once, read in blocks, resampled as they flow, written so that no half file can be left.

Whatever its length, a recording is never held in memory whole. Formats are libsndfile's: wav, flac, ogg, mp3, aiff and more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float
from numpy import ndarray

from foveal.core.errors import UserError
from foveal.core.files import atomic_write

#: Suffixes looked for in folders; a file named directly may have any.
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".rf64")

#: Of a block that is read, and of a level measurement (the gating block of ITU-R BS.1770).
BLOCK_SECONDS = 0.4
_WAV_LIMIT = 2**32 - 2**16  # bytes: the length field of a wav file has 32 bits; above, its 64-bit form is written


@dataclass(frozen=True)
class Recording:
    """What a first reading of a sound file found.

    Attributes:
        path: The file.
        sample_rate: Hz.
        channels: Their number.
        frames: Samples a channel, counted, not taken from the header.
        subtype: libsndfile's name of the sample format, such as ``"PCM_24"``.
        level: Root mean square of the mean over channels, over the blocks within 10 dB of the mean power: pauses do not count. 0 is silence.
    """

    path: Path
    sample_rate: int
    channels: int
    frames: int
    subtype: str
    level: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.frames / self.sample_rate

    def blocks(self) -> Iterator[Float[ndarray, "frames channels"]]:
        """The samples in float32, full scale is 1, in blocks of 0.4 s."""
        with _open(self.path) as file:
            yield from _blocks(file, self.path)


def _open(path: Path) -> soundfile.SoundFile:
    if path.is_dir():
        raise UserError(f"expected a sound file; {path} is a folder; name the files in it")
    if not path.exists():
        raise UserError(f"expected a sound file; {path} does not exist; check the path")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"expected a sound file; {path} is empty (0 bytes); record or copy it again")
        return soundfile.SoundFile(path)
    except OSError as error:
        raise UserError(f"expected a sound file that can be read; {path}: {error.strerror}") from None
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a .raw file without its rate and channels
        reason = getattr(error, "error_string", "a raw file does not say its rate and channels").strip(". ")
        raise UserError(f"expected a wav, flac, ogg or mp3 file; {path} is none that can be read: {reason}; export it again as wav") from None


def _blocks(file: soundfile.SoundFile, path: Path) -> Iterator[ndarray]:
    try:
        yield from file.blocks(max(1, round(BLOCK_SECONDS * file.samplerate)), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"expected a sound file that decodes to its end; {path}: {error.error_string.strip('. ')}; copy or export it again") from None


def measure_level(powers: Iterable[float]) -> float:
    """Root mean square over the blocks whose power is within 10 dB of the mean power, so that pauses do not count.

    Args:
        powers: Mean square of each block.
    """
    power = np.fromiter(powers, np.float64)
    loud = power[power >= 0.1 * power.mean()] if power.size else power
    return float(np.sqrt(loud.mean())) if loud.size else 0.0


def open_recording(path: str | Path) -> Recording:
    """Read a sound file once through: check that it can be separated, count it and measure its level.

    Raises:
        UserError: Missing, empty, no sound file, corrupt, without samples, or with samples that are not finite numbers.
    """
    path = Path(path)
    frames, powers = 0, []
    with _open(path) as file:
        for block in _blocks(file, path):
            if not np.isfinite(block).all():
                row = int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
                value, second = block[row][~np.isfinite(block[row])][0], (frames + row) / file.samplerate
                raise UserError(f"expected finite samples; {path} has {value} at {second:.3f} s; repair it or export it again")
            powers.append(float(block.mean(axis=1, dtype=np.float64).__pow__(2).mean()))
            frames += len(block)
        if frames == 0:
            raise UserError(f"expected sound; {path} holds no samples; record or export it again")
        return Recording(path, file.samplerate, file.channels, frames, file.subtype, measure_level(powers))


class Resampler:
    """Changes the sample rate of a stream; from `frames` frames it makes exactly ceil(frames * to_rate / from_rate).

    The filter is soxr's high-quality one, delay compensated: what went in at a time comes out at that time.
    """

    def __init__(self, from_rate: float, to_rate: float, channels: int) -> None:
        self._stream = None if from_rate == to_rate else soxr.ResampleStream(from_rate, to_rate, channels, dtype="float32")
        self._channels = channels

    @staticmethod
    def length(frames: int, from_rate: int, to_rate: int) -> int:
        """Frames that `frames` become."""
        return -(-frames * to_rate // from_rate)

    def stream(self, blocks: Iterable[Float[ndarray, "frames channels"]], length: int) -> Iterator[Float[ndarray, "frames channels"]]:
        """Resample blocks as they come; all together are `length` frames, the last of them zeros where the filter gave fewer."""
        given = 0
        for block in self._resampled(blocks):
            block = block[: length - given]
            given += len(block)
            if len(block):
                yield block
        if given < length:
            yield np.zeros((length - given, self._channels), np.float32)

    def _resampled(self, blocks: Iterable[ndarray]) -> Iterator[ndarray]:
        if self._stream is None:
            yield from blocks
            return
        for block in blocks:
            yield self._stream.resample_chunk(np.ascontiguousarray(block, np.float32))
        yield self._stream.resample_chunk(np.zeros((0, self._channels), np.float32), last=True)


def wav_subtype(subtype: str) -> str:
    """Sample format of the wav file written for an input of `subtype`: the same depth where wav has it, else 16 bit."""
    if subtype == "PCM_S8":
        return "PCM_U8"
    return subtype if subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE") else "PCM_16"


def write_sources(
    targets: list[Path], blocks: Iterable[Float[ndarray, "sources frames channels"]], sample_rate: int, channels: int, frames: int, subtype: str
) -> int:
    """Write one wav file a source from a stream of blocks; all appear together at the end, or none.

    Args:
        targets: A path for every source.
        blocks: Samples, full scale is 1; what is beyond is clipped in integer formats.
        sample_rate: Hz.
        channels: Of each file.
        frames: Expected, to choose between wav and its 64-bit form.
        subtype: As `wav_subtype` gives it.

    Returns:
        How many samples were clipped.

    Raises:
        UserError: A file cannot be written, or the disk is full.
    """
    bytes_each = frames * channels * {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "DOUBLE": 8}.get(subtype, 4)
    container = "WAV" if bytes_each < _WAV_LIMIT else "RF64"
    clips = not subtype.startswith(("FLOAT", "DOUBLE"))
    clipped = 0
    with ExitStack() as written:
        places = [written.enter_context(atomic_write(target)) for target in targets]
        try:
            with ExitStack() as opened:
                files = [opened.enter_context(soundfile.SoundFile(place, "w", sample_rate, channels, subtype, format=container)) for place in places]
                for block in blocks:
                    clipped += int((np.abs(block) > 1).sum()) if clips else 0
                    for file, source in zip(files, block, strict=True):
                        file.write(source)
        except soundfile.LibsndfileError as error:
            raise UserError(f"expected to be able to write {targets[0].parent}; {error.error_string.strip('. ')}; is the disk full?") from None
    return clipped
