"""Faces and houses seen with a Muse headband: 5 people, 4 electrodes (TP9, AF7, AF8, TP10) at 256 Hz, 1413 houses and 1370 faces.

NeuroTechX eeg-notebooks (github.com/NeuroTechX/eeg-notebooks_v0.1, data/visual/N170), BSD-3, (c) 2017 A. Barachant; 27 MB of
``subjectN/sessionM/*.csv`` with a marker column: 1 house, 2 face. The N170 is a negative wave at the temporal electrodes 170 ms after a face.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import signal as scipy_signal

from foveal.core.errors import UserError
from foveal.eeg.data.windows import TARGET_RATE, ArrayWindows, Scale, Splits, WindowsDataModule, prepare_array, split_groups
from foveal.eeg.preprocessing import channel_scale

RATE = 256.0
CHANNELS = ("TP9", "AF7", "AF8", "TP10")
CLASSES = ("house", "face")


class N170(WindowsDataModule):
    """Epochs around the pictures, or with `continuous` the recordings cut in pieces.

    Args:
        root: folder with subjectN/sessionM/*.csv.
        before: seconds of an epoch before the picture.
        after: seconds of it behind the picture.
        band: Hz; Butterworth of order 4, forward and backward over the whole recording.
        reject: leave out epochs with more than so many microvolts from lowest to highest; None keeps all.
        test_subjects: people to report on.
        validation_subjects: people to choose by; the others are trained on.
        continuous: cut the recordings into pieces of `before` + `after` seconds without labels, for a tokenizer.
        scale: see `Scale`.
        batch_size: epochs in a batch.
        workers: processes that read.
        seed: of the order.
    """

    def __init__(
        self,
        root: str = "../shared/data/eeg/n170",
        before: float = 0.1,
        after: float = 0.9,
        band: tuple[float, float] = (0.5, 40.0),
        reject: float | None = 150.0,
        test_subjects: list[str] | None = None,
        validation_subjects: list[str] | None = None,
        continuous: bool = False,
        scale: Scale = "window",
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, workers, seed)
        self.root, self.before, self.after, self.band, self.reject, self.continuous, self.scale = root, before, after, band, reject, continuous, scale
        self.test_subjects, self.validation_subjects = test_subjects, validation_subjects

    def find(self) -> Splits:
        """Epochs of the training, validation and test people."""
        windows = self.epochs()
        subjects = sorted(set(windows.groups))
        if self.test_subjects is None:
            inside, test = split_groups(windows.groups, 0.2, self.seed)
        else:
            self._known(self.test_subjects, subjects)
            inside, test = ([i for i, name in enumerate(windows.groups) if (name in self.test_subjects) == kept] for kept in (False, True))
        if self.validation_subjects is None:
            chosen, held = split_groups([windows.groups[i] for i in inside], 0.2, self.seed + 1)
            train, validation = [inside[i] for i in chosen], [inside[i] for i in held]
        else:
            self._known(self.validation_subjects, subjects)
            train = [i for i in inside if windows.groups[i] not in self.validation_subjects]
            validation = [i for i in inside if windows.groups[i] in self.validation_subjects]
        return Splits(windows.subset(train), windows.subset(validation), windows.subset(test), () if self.continuous else CLASSES)

    def epochs(self) -> ArrayWindows:
        """All windows, in the order of subject, session and time.

        Raises:
            UserError: no recordings, or one without the Muse's columns.
        """
        files = sorted(Path(self.root).glob("subject*/session*/*.csv"))
        if not files:
            raise UserError(f"expected subjectN/sessionM/*.csv of the N170 experiment below {self.root}; found none; name its folder")
        length = round((self.before + self.after) * RATE)
        signals, groups, names = [], [], []
        labels: list[int] = []
        for file in files:
            table = pd.read_csv(file)
            marker = next((name for name in table if str(name).lower().startswith("marker")), None)
            if marker is None or not set(CHANNELS) <= set(table):
                raise UserError(f"expected the columns {', '.join(CHANNELS)} and Marker0 in {file}; got {', '.join(map(str, table))}")
            filtered = scipy_signal.butter(4, self.band, "bandpass", fs=RATE, output="sos")
            samples = scipy_signal.sosfiltfilt(filtered, table[list(CHANNELS)].to_numpy(dtype=float).T)
            events = table[marker].to_numpy()
            starts = (
                np.arange(0, samples.shape[1] - length + 1, length) if self.continuous else np.flatnonzero(events > 0) - round(self.before * RATE)
            )
            starts = starts[(starts >= 0) & (starts + length <= samples.shape[1])]
            pieces = np.stack([samples[:, start : start + length] for start in starts]) if len(starts) else np.zeros((0, 4, length))
            if self.reject is not None:
                quiet = np.ptp(pieces, axis=-1).max(-1) <= self.reject if len(pieces) else np.zeros(0, dtype=bool)
                pieces, starts = pieces[quiet], starts[quiet]
            if not len(pieces):
                continue
            divisor = channel_scale(samples) if self.scale == "recording" else None
            signals.append(prepare_array(pieces, RATE, self.scale, divisor))
            labels += [-1] * len(starts) if self.continuous else (events[starts + round(self.before * RATE)].astype(int) - 1).tolist()
            groups += [file.parent.parent.name] * len(starts)
            names += [f"{file.parent.parent.name}/{file.parent.name}/{file.name} {start / RATE:.2f} s" for start in starts]
        if not signals:
            raise UserError(f"expected epochs in {self.root}; all were left out; raise reject, or shorten before and after")
        assert signals[0].shape[-1] == round(length * TARGET_RATE / RATE)
        return ArrayWindows(np.concatenate(signals), labels, groups, names)

    @staticmethod
    def _known(named: list[str], subjects: list[str]) -> None:
        unknown = sorted(set(named) - set(subjects))
        if unknown:
            raise UserError(f"expected some of the subjects {', '.join(subjects)}; got {', '.join(unknown)}")
