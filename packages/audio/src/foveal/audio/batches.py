"""Many sound files, one after the other: which ones were named, what their results are called, and what became of each."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from foveal.audio.audio_files import SUFFIXES, open_recording
from foveal.audio.recordings import RecordingProcessor
from foveal.core.errors import UserError
from foveal.core.files import collect_inputs, each_once, output_folder, output_names, without_results
from foveal.core.reports import BatchReport, Entry

#: Makes a practitioner's `--demo`: what applies the network, the output folder, whether to overwrite, and what to note.
Demo = Callable[[RecordingProcessor, Path, bool, Entry], None]


@dataclass(frozen=True)
class Verb:
    """What a practitioner's verb does to a sound file.

    Attributes:
        name: of the verb.
        folder: where results go if nothing else is said.
        load: what applies the network, of a checkpoint (None is the package's own), a device and the longest chunk (None is the usual one).
        endings: what follows a file's stem in the name of each output.
        demo: gives what ``--demo`` runs.
    """

    name: str
    folder: str
    load: Callable[[Path | None, str, float | None], RecordingProcessor]
    endings: Callable[[RecordingProcessor], Sequence[str]]
    demo: Callable[[], Demo]


def run_command(
    verb: Verb,
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
    """What ``foveal audio separate`` and ``enhance`` do, in the order in which things can be wrong: results, a report at the end, the exit code.

    Args:
        verb: Which of them.
        files: Sound files and folders of them.
        output: Folder for the results; None is the verb's own, here.
        demo: Process and score what ships with the package instead of files.
        checkpoint: Weights; None is the package's own.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: Replace existing results instead of keeping them.
        seed: Of torch; neither verb draws anything at random.
        chunk_seconds: Longest piece that the network sees at once; None is the usual one.
        as_json: Print the report as JSON.

    Returns:
        0, or 2 if a file could not be processed.

    Raises:
        UserError: Nothing can be done at all: no file named, no output folder, no weights, no such device.
    """
    torch.manual_seed(seed)
    if demo and files:
        raise UserError("expected sound files or --demo; got both")
    if not demo and not files:
        raise UserError(f"expected sound files to {verb.name}; got none; name some, or try --demo")
    folder = output_folder(verb.folder if output is None else output)
    processor = verb.load(checkpoint, device, chunk_seconds)
    report = BatchReport()
    if demo:
        with report.item("demo") as entry:
            verb.demo()(processor, folder, overwrite, entry)
    else:
        _process_files(processor, files, folder, verb.endings(processor), overwrite, report)
    return report.finish(as_json, {"seconds": ".1f", "real-time factor": ".3f", "SI-SDR improvement dB": ".2f", "PESQ improvement": ".2f"})


def _process_files(
    processor: RecordingProcessor, files: Sequence[Path], folder: Path, endings: Sequence[str], overwrite: bool, report: BatchReport
) -> None:
    inputs: list[Path] = []
    for file in files:
        with report.item(file) as missing:
            inputs += collect_inputs([file], SUFFIXES, apart_from=folder)
        if missing.state == "done":
            report.entries.remove(missing)
    inputs = each_once(inputs)
    sources = {path.resolve() for path in inputs}

    def targets_of(name: str) -> list[Path]:
        return [folder / f"{name}_{ending}.wav" for ending in endings]

    inputs = without_results(inputs, output_names, targets_of, files)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bars:
        for path, name in zip(inputs, output_names(inputs), strict=True):
            targets = targets_of(name)
            present = [str(target) for target in targets if target.exists()]
            if present and not overwrite:
                report.kept(path, present)
                continue
            with report.item(path) as entry:
                if not sources.isdisjoint(target.resolve() for target in targets):
                    raise UserError(f"expected outputs apart from the inputs; {targets[0].name} would replace an input; choose another -o/--output")
                recording = open_recording(path)
                bar = bars.add_task(path.name, total=recording.seconds)
                began = time.perf_counter()
                clipped = processor.process_file(recording, targets, functools.partial(bars.advance, bar))
                bars.remove_task(bar)
                entry.outputs = [str(target) for target in targets]
                entry.numbers = {"seconds": recording.seconds, "real-time factor": (time.perf_counter() - began) / recording.seconds}
                if clipped:
                    entry.message = f"{clipped} samples beyond full scale were clipped"
