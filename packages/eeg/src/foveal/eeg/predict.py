"""Recordings in, tokens out: what a practitioner calls, from Python and from the command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import all_or_none, atomic_write, each_once, output_folder, output_names, without_results
from foveal.core.reports import BatchReport, Entry
from foveal.eeg import events as event_files
from foveal.eeg.analysis import codebook_use
from foveal.eeg.checkpoints import model_from_weights
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer
from foveal.eeg.preprocessing import samples_at
from foveal.eeg.recordings import find_recordings, open_recording, without_twins
from foveal.eeg.streaming import Preparation, WindowedRecording

#: The tokenizer that ships with the package; its card stands beside it.
BUNDLED_TOKENIZER = Path(__file__).with_name("weights") / "tfm_tokenizer_small.safetensors"

_BATCH = 64  # windows that go through the network together
_EXAMPLES = 8  # one-second pieces kept of every token, for the picture


@dataclass
class Tokens:
    """The tokens of a recording.

    Attributes:
        ids: (windows, channels, frames); -1 where samples are missing or the channel is flat.
        starts: seconds at which the windows begin.
        channels: names.
        vectors: (codes, width), what the ids stand for.
        window: seconds of a window.
        frame_seconds: seconds of a frame.
        hop_seconds: from one frame to the next.
        seconds: length of the recording.
        examples: token -> one-second pieces of signal, as the tokenizer read them.
        spectra: for the picture: (channels,) a mean spectrum of every window, (windows, bins).
        notes: what a user should know: bad channels, time at the end that no window covers.
    """

    ids: Int[ndarray, "windows channels frames"]
    starts: Float[ndarray, " windows"]
    channels: tuple[str, ...]
    vectors: Float[ndarray, "codes width"]
    window: float
    frame_seconds: float
    hop_seconds: float
    seconds: float
    examples: dict[int, list[ndarray]] = field(default_factory=dict, repr=False)
    spectra: Float[ndarray, "windows channels bins"] | None = field(default=None, repr=False)
    notes: list[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """One row a token: time (seconds, of the frame's beginning), channel, window, frame, token."""
        windows, channels, frames = self.ids.shape
        times = self.starts[:, None] + np.arange(frames) * self.hop_seconds
        return pd.DataFrame(
            {
                "time": np.broadcast_to(times[:, None], self.ids.shape).ravel(),
                "channel": pd.Categorical.from_codes(np.tile(np.repeat(np.arange(channels), frames), windows), categories=list(self.channels)),
                "window": np.repeat(np.arange(windows), channels * frames).astype(np.int32),
                "frame": np.tile(np.arange(frames), windows * channels).astype(np.int16),
                "token": self.ids.ravel().astype(np.int32),
            }
        )

    def save(self, stem: str | Path) -> list[Path]:
        """Write ``<stem>.npz`` (ids, times, channel names, code vectors) and ``<stem>.parquet`` (`table`)."""
        targets = [Path(f"{stem}.npz"), Path(f"{stem}.parquet")]
        with atomic_write(targets[0]) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream, ids=self.ids, window_starts=self.starts, frame_offsets=np.arange(self.ids.shape[2]) * self.hop_seconds,
                channels=np.array(self.channels), codebook=self.vectors, window_seconds=self.window, frame_seconds=self.frame_seconds,
                recording_seconds=self.seconds,
            )  # fmt: skip
        with atomic_write(targets[1]) as temporary:
            self.table().to_parquet(temporary, index=False)
        return targets


class Tokenizer:
    """Turns recordings into tokens.

    >>> tokenizer = Tokenizer.from_pretrained()
    >>> tokens = tokenizer(raw)  # an mne.io.Raw of any montage and rate
    >>> tokens.ids.shape  # windows, channels, frames

    Args:
        model: trained.
        preparation: how recordings are cut; the window should be as long as those that the model was trained on.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
    """

    def __init__(self, model: TFMTokenizer, preparation: Preparation | None = None, device: str | torch.device = "auto") -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.model, self.preparation = model.to(self.device).eval(), preparation or Preparation()

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, device: str | torch.device = "auto") -> Tokenizer:
        """Load trained weights: a ``.safetensors`` file or a folder with one; None is the small model that ships with the package.

        Raises:
            UserError: missing, corrupt or foreign weights.
        """
        path = BUNDLED_TOKENIZER if source is None else Path(source)
        if source is None and not path.exists():
            raise UserError(f"expected the package's own weights at {path}; they are missing; install foveal-eeg again or pass --checkpoint")
        model = model_from_weights(path, "tfm_tokenizer")
        assert isinstance(model, TFMTokenizer)  # asked for by its system's name
        return cls(model, preparation_of(path), device)

    def __call__(self, raw: mne.io.BaseRaw, preparation: Preparation | None = None, progress: Callable[[float, float], None] | None = None) -> Tokens:
        """The tokens of a recording, read block by block; memory does not grow with the samples, only with the tokens.

        Args:
            raw: need not be preloaded.
            preparation: None is the tokenizer's own.
            progress: called with the seconds of every piece that is done, and with those of the whole.

        Raises:
            UserError: the recording cannot be cut or has no valid window; see `WindowedRecording`.
        """
        recording = WindowedRecording(raw, preparation or self.preparation)
        config, model = self.model.config, self.model
        window = recording.preparation.window
        ids = np.full((recording.count, len(recording.names), config.frames(samples_at(window, config.sample_rate))), -1, dtype=np.int32)
        spectra = np.zeros((recording.count, len(recording.names), config.bins), dtype=np.float16)
        examples: dict[int, list[ndarray]] = {}
        starts, bad = np.zeros(recording.count), np.zeros(len(recording.names), dtype=int)
        done = 0
        for block in recording:
            for first in range(0, len(block.starts), _BATCH):
                signal, valid = (part[first : first + _BATCH] for part in (block.signal, block.valid))
                place = slice(done, done + len(signal))
                if valid.any():
                    heard = torch.from_numpy(signal[valid]).to(self.device)
                    with torch.inference_mode():
                        found = model.tokenize(heard).cpu().numpy()
                        spectra[place][valid] = model.spectrum(heard).mean(-1).cpu().numpy()
                    ids[place][valid] = found
                    _collect(examples, found, signal[valid], config.window, config.hop)
                bad += (~valid).sum(0)
                starts[place] = block.starts[first : first + _BATCH]
                done += len(signal)
                if progress is not None:
                    progress(len(signal) * recording.step / recording.rate, recording.count * recording.step / recording.rate)
        if (ids < 0).all():
            raise UserError("expected samples that vary; every channel is flat or missing in every window; check the channels and the units")
        notes = [
            f"{name}: {'flat or missing throughout' if count == recording.count else f'{count} of {recording.count} windows flat or missing'}"
            for name, count in zip(recording.names, bad.tolist(), strict=True)
            if count
        ]
        rest = recording.seconds - (starts[-1] + window)
        if rest > 0.5:
            notes.append(f"the last {rest:.1f} s are shorter than a window and have no tokens")
        return Tokens(
            ids, starts, recording.names, model.codebook.weight.float().cpu().numpy(), window, config.window / config.sample_rate,
            config.hop / config.sample_rate, recording.seconds, examples, spectra, notes,
        )  # fmt: skip


def preparation_of(path: str | Path) -> Preparation:
    """How the recordings were cut that weights were trained on, as their header says; the paper's five seconds where it does not."""
    header = load_weights(path).metadata
    band = tuple(float(edge) for edge in header["band"].split()) if "band" in header else (0.1, 75.0)
    channels = tuple(header["channels"].split("|")) if "channels" in header else None
    montage: Any = header.get("montage", "auto")
    scale: Any = header.get("scale", "window")
    return Preparation(window=float(header.get("window_seconds", 5.0)), montage=montage, channels=channels, band=(band[0], band[1]), scale=scale)


def _collect(examples: dict[int, list[ndarray]], ids: ndarray, signal: ndarray, window: int, hop: int) -> None:
    """Keep the first few pieces of signal of every token."""
    for token in np.unique(ids):
        kept = examples.setdefault(int(token), [])
        if len(kept) < _EXAMPLES:
            for segment, frame in np.argwhere(ids == token)[: _EXAMPLES - len(kept)]:
                kept.append(signal[segment, frame * hop : frame * hop + window].copy())


def batch(
    files: Sequence[Path], report: BatchReport, targets_of: Callable[[str], list[Path]], overwrite: bool,
    work: Callable[[Path, Path, Entry, Callable[[float, float], None]], None],
) -> None:  # fmt: skip
    """Run `work(path, stem, entry, progress)` over recordings with a progress bar; one that fails does not stop the others.

    What `work` writes, to names that begin with `stem`, is there all together or not at all.
    """
    inputs: list[Path] = []
    folder = targets_of("")[0].parent
    for file in files:
        with report.item(file) as missing:
            inputs += find_recordings(file, apart_from=folder)
        if missing.state == "done":
            report.entries.remove(missing)
    inputs = without_results(without_twins(each_once(inputs)), output_names, targets_of, files)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bars:
        for path, stem in zip(inputs, output_names(inputs), strict=True):
            targets = targets_of(stem)
            present = [str(target) for target in targets if target.exists()]
            if present and not overwrite:
                report.kept(path, present)
                continue
            with report.item(path) as entry, all_or_none(folder) as place:
                bar = bars.add_task(path.name, total=None)
                work(path, place / stem, entry, lambda seconds, whole, bar=bar: bars.update(bar, advance=seconds, total=whole))  # type: ignore[misc]
                bars.remove_task(bar)
                entry.outputs = [str(target) for target in targets]


def tokenize_command(
    files: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    seed: int = 0,
    window: float | None = None,
    montage: str = "auto",
    channels: Sequence[str] = (),
    band: tuple[float, float] | None = None,
    notch: float | None = None,
    events: Path | None = None,
    as_json: bool = False,
) -> int:
    """What ``foveal eeg tokenize`` does: ``<stem>.npz``, ``<stem>.parquet``, ``<stem>_motifs.csv`` and ``<stem>.png`` for every recording.

    Args:
        files: recordings, and folders of them.
        output: folder for the results; None is ``tokens`` here.
        checkpoint: weights; None is the package's own.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results instead of keeping them.
        seed: of torch; tokenizing draws nothing at random.
        window: seconds; None is what the weights were trained on.
        montage: ``auto``, ``bipolar`` or ``single``.
        channels: names to keep; none keeps all EEG.
        band: Hz of the band-pass; None is the weights' own.
        notch: Hz of mains hum; 0 takes none out, None looks for it.
        events: table of events for all files; None takes each recording's own annotations.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a file could not be tokenized.

    Raises:
        UserError: nothing can be done at all: no file named, no output folder, no weights, no such device, unreadable events.
    """
    if not files:
        raise UserError("expected recordings to tokenize; got none; name some files or folders")
    torch.manual_seed(seed)
    folder = output_folder("tokens" if output is None else output)
    tokenizer = Tokenizer.from_pretrained(checkpoint, device)
    preparation = adjusted(tokenizer.preparation, window, montage, channels, band, notch)
    table = None if events is None else event_files.read_events(events)
    report = BatchReport()

    def work(path: Path, stem: Path, entry: Entry, progress: Callable[[float, float], None]) -> None:
        from foveal.eeg.report import draw_report, motif_table

        raw, began = open_recording(path), time.perf_counter()
        tokens = tokenizer(raw, preparation, progress)
        marks = event_files.relative_annotations(raw) if table is None else table
        marks, outside = event_files.inside(marks, tokens.seconds)
        if outside:
            tokens.notes.append(f"{outside} events outside the recording were left out")
        labels, classes = event_files.window_labels(marks, tokens.starts, tokens.window)
        motifs = motif_table(tokens, tokenizer.model, labels, classes)
        tokens.save(stem)
        for name in ("_motifs.csv", ".png"):
            with atomic_write(f"{stem}{name}") as temporary:
                if name == ".png":
                    draw_report(tokens, tokenizer.model, motifs, labels, classes, title=path.name).savefig(temporary, dpi=130)
                else:
                    motifs.to_csv(temporary, index=False, float_format="%.4g")
        use = codebook_use(tokens.ids, tokenizer.model.config.codes)
        entry.message = "; ".join(tokens.notes)
        entry.numbers = {"seconds": tokens.seconds, "channels": len(tokens.channels), "tokens": use["tokens"], "ids in use": use["used"],
                         "perplexity": use["perplexity"], "real-time factor": (time.perf_counter() - began) / tokens.seconds}  # fmt: skip

    suffixes = (".npz", ".parquet", "_motifs.csv", ".png")
    batch(files, report, lambda stem: [folder / f"{stem}{suffix}" for suffix in suffixes], overwrite, work)
    formats = {"seconds": ".1f", "channels": ".0f", "tokens": ".0f", "ids in use": ".0f", "perplexity": ".0f", "real-time factor": ".4f"}
    return report.finish(as_json, formats)


def adjusted(
    preparation: Preparation,
    window: float | None,
    montage: str,
    channels: Sequence[str],
    band: tuple[float, float] | None,
    notch: float | None,
    step: float | None = None,
) -> Preparation:
    """A preparation with what the user asked for on the command line; montage ``auto`` and no channels leave those of the weights.

    Raises:
        UserError: no such montage, a band that is none, or a number that cannot be.
    """
    if montage not in ("auto", "bipolar", "single"):
        raise UserError(f"expected --montage auto, bipolar or single; got {montage}")
    if band is not None and not 0 < band[0] < band[1]:
        raise UserError(f"expected a band from a lower to a higher frequency above 0; got {band[0]:g} to {band[1]:g}")
    if notch is not None and not 0 <= notch < np.inf:
        raise UserError(f"expected --notch in Hz, or 0 for none; got {notch:g}")
    for name, seconds in (("--window", window), ("--step", step)):
        if seconds is not None and not 0 < seconds < np.inf:
            raise UserError(f"expected {name} in seconds above 0; got {seconds:g}")
    kept = montage if montage != "auto" else preparation.montage
    changed = replace(preparation, montage=kept, channels=tuple(channels) or preparation.channels, notch=notch)  # type: ignore[arg-type]
    if band is not None:
        changed = replace(changed, band=band)
    if step is not None:
        changed = replace(changed, step=step)
    return changed if window is None else replace(changed, window=window)
