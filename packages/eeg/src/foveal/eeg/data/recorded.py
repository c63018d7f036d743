"""Windows read from recordings when they are asked for, and the corpora of recordings with a table of events beside each.

Recordings stay on disk; a window is read with ten seconds on either side, filtered, derived, cut, resampled and scaled.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from foveal.core.errors import UserError
from foveal.eeg import events as event_files
from foveal.eeg.data.windows import TARGET_RATE, Splits, Window, WindowsDataModule, prepare_array, split_groups
from foveal.eeg.recordings import find_recordings, open_recording
from foveal.eeg.streaming import Preparation, WindowedRecording

_OPEN = 8  # recordings kept open
_MARGIN = 10.0  # seconds on either side of a window that filters get to settle


class Piece(NamedTuple):
    """Where a window lies: file, seconds, what it is labelled, whose it is."""

    file: Path
    start: float
    label: Any
    group: str


class RecordedWindows(Dataset):
    """Windows of recordings.

    Args:
        pieces: where they are.
        preparation: how they are read; all have its window's length. A window that would leave its recording is moved inside.
    """

    def __init__(self, pieces: Sequence[Piece], preparation: Preparation) -> None:
        self.pieces, self.preparation = list(pieces), preparation
        self._open: OrderedDict[Path, WindowedRecording] = OrderedDict()

    def __len__(self) -> int:
        return len(self.pieces)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files: each worker opens its own."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, index: int) -> Window:
        piece = self.pieces[index]
        recording = self._recording(piece.file)
        rate, length = recording.rate, recording.length
        start = min(max(0, round(piece.start * rate)), recording.raw.n_times - length)
        first, last = max(0, start - round(_MARGIN * rate)), min(recording.raw.n_times, start + length + round(_MARGIN * rate))
        samples, missing = recording.read(first, last)
        cut = slice(start - first, start - first + length)
        target = round(self.preparation.window * TARGET_RATE)
        signal = prepare_array(np.where(missing, 0, samples)[:, cut], length / target * TARGET_RATE, self.preparation.scale, recording.scale)
        present = torch.from_numpy(~missing[:, cut].any(-1) & (np.ptp(samples[:, cut], axis=-1) > 0))
        return Window(torch.from_numpy(signal), torch.as_tensor(piece.label), present, piece.group, f"{piece.file.name} {piece.start:.2f} s")

    def _recording(self, file: Path) -> WindowedRecording:
        if file not in self._open:
            self._open[file] = WindowedRecording(open_recording(file), self.preparation)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]


def edf_seconds(file: Path) -> float:
    """Length of an EDF or BDF recording in seconds, from its header alone.

    Raises:
        UserError: it has no such header.
    """
    with file.open("rb") as stream:
        header = stream.read(256)
    try:
        return int(header[236:244]) * float(header[244:252])
    except ValueError:
        raise UserError(f"expected the header of an EDF file in {file}; it has none; download it again") from None


def by_group(pieces: Sequence[Piece], held_out: float, seed: int) -> tuple[list[Piece], list[Piece]]:
    """Pieces of most subjects, and of a share of others."""
    inside, outside = split_groups([piece.group for piece in pieces], held_out, seed)
    return [pieces[i] for i in inside], [pieces[i] for i in outside]


class EventsTable(WindowsDataModule):
    """Recordings of any format with a table of events beside each: BIDS, or ``name.edf`` with ``name_events.tsv`` (or ``name.tsv``, ``name.csv``).

    Subjects are BIDS' ``sub-XX``, else the folder that a recording lies in, else its name; no subject is in two of the three sets.

    Args:
        root: folder.
        classes: words that count; None takes all that occur.
        window: seconds.
        before: seconds of the window that lie before an event's onset; None cuts recordings from end to end instead, and labels each window by the
            event that covers most of it.
        multi_label: of end-to-end windows, a vector of all classes whose events touch the window.
        validation: share of the subjects to choose by.
        test: share of the subjects to report on.
        montage: ``auto``, ``bipolar`` or ``single``.
        channels: names to keep; None keeps all EEG.
        band: Hz.
        batch_size: windows in a batch.
        workers: processes that read.
        seed: of the split and the order.
    """

    def __init__(
        self, root: str, classes: list[str] | None = None, window: float = 5.0, before: float | None = 0.5, multi_label: bool = False,
        validation: float = 0.2, test: float = 0.2, montage: str = "auto", channels: list[str] | None = None,
        band: tuple[float, float] = (0.5, 45.0), batch_size: int = 64, workers: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(batch_size, workers, seed)
        self.root, self.classes, self.before, self.multi_label = root, classes, before, multi_label
        self.held_out = (validation, test)
        self.preparation = Preparation(window=window, montage=montage, channels=None if channels is None else tuple(channels), band=band)  # type: ignore[arg-type]
        if multi_label and before is not None:
            raise UserError("expected before: null with multi_label, which looks at windows from end to end; got a number")

    def find(self) -> Splits:
        """Every event, or every window, of the recordings that have a table."""
        marked = [(file, table) for file in find_recordings(self.root) if (table := self._table(file)) is not None]
        if not marked:
            raise UserError(f"expected recordings with NAME_events.tsv beside them below {self.root}; found none; add the tables")
        events = {file: event_files.read_events(table) for file, table in marked}
        classes = self.classes or sorted({word for one in events.values() for word in one.description})
        pieces: list[Piece] = []
        for file, marks in events.items():
            raw = open_recording(file)
            group, seconds = self._subject(file), raw.n_times / raw.info["sfreq"]
            inside, _ = event_files.inside(marks, seconds)
            if self.before is not None:
                known = [(float(onset), word) for onset, word in zip(inside.onset, inside.description, strict=True) if word in classes]
                pieces += [Piece(file, onset - self.before, classes.index(word), group) for onset, word in known]
                continue
            window = self.preparation.window
            starts = np.arange(0, seconds - window + 1e-9, window)
            if self.multi_label:
                touched = np.stack([event_files.window_labels(inside, starts, window, [word])[0] == 0 for word in classes], axis=1)
                pieces += [Piece(file, start, row.astype(np.int64), group) for start, row in zip(starts, touched, strict=True)]
            else:
                labels, _ = event_files.window_labels(inside, starts, window, classes)
                pieces += [Piece(file, start, int(label), group) for start, label in zip(starts, labels, strict=True) if label >= 0]
        if not pieces:
            raise UserError(f"expected events of the classes {', '.join(classes)} in the tables below {self.root}; found none")
        validation, test = self.held_out
        rest, tested = by_group(pieces, test, self.seed)
        train, chosen = by_group(rest, validation / max(1 - test, 1e-9), self.seed + 1)
        training, choosing, testing = (RecordedWindows(part, self.preparation) for part in (train, chosen, tested))
        return Splits(training, choosing, testing, tuple(classes))

    @staticmethod
    def _table(file: Path) -> Path | None:
        stem = re.sub(r"_(eeg|meg|ieeg)$", "", file.stem)
        names = (f"{stem}_events.tsv", f"{stem}_events.csv", f"{file.stem}.tsv", f"{file.stem}.csv")
        return next((table for name in names if (table := file.with_name(name)) != file and table.exists()), None)

    def _subject(self, file: Path) -> str:
        named = re.search(r"sub-[A-Za-z0-9]+", str(file))
        if named:
            return named[0]
        return file.parent.name if file.parent.resolve() != Path(self.root).resolve() else file.stem
