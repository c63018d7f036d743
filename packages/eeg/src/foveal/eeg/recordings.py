"""A file of the user's becomes an mne.io.Raw, with nothing read but the header where the format allows it.

Formats by suffix: EDF, BDF, GDF, BrainVision (.vhdr), EEGLAB (.set), FIF, CNT (Neuroscan, ANT), Nihon Kohden (.eeg), Persyst (.lay), EGI (.mff),
XDF (with pyxdf), and CSV of a Muse or other headset: a ``timestamps`` column in seconds, one column a channel in microvolts.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mne
import numpy as np
import pandas as pd

from foveal.core.errors import UserError
from foveal.core.files import collect_inputs

SUFFIXES = (".edf", ".bdf", ".gdf", ".vhdr", ".set", ".fif", ".cnt", ".eeg", ".lay", ".mff", ".xdf", ".csv")


def find_recordings(place: str | Path, apart_from: str | Path | None = None) -> list[Path]:
    """The recordings that a name means: a file, an EGI folder (.mff), or all that lie below any other folder, each once.

    Of BrainVision's files the header (.vhdr) stands for all; tables of events (``*_events.csv``, or named as a recording beside them) are none, and
    neither are tables that ``tokenize`` and ``classify`` wrote of a recording beside them.

    Args:
        place: what the user named.
        apart_from: as of `foveal.core.files.collect_inputs`.

    Raises:
        UserError: no such file, or nothing to read in the folder.
    """
    named = Path(place)
    if not named.is_dir():
        return collect_inputs([named], SUFFIXES)
    if named.suffix.lower() == ".mff":
        return [named]
    found = {folder for folder in named.rglob("*") if folder.suffix.lower() == ".mff" and folder.is_dir()}
    try:
        found |= set(collect_inputs([named], SUFFIXES, apart_from))
    except UserError:
        if not found:
            raise
    stems = {file.with_suffix("") for file in found if file.suffix.lower() != ".csv"}
    named_alike = {file.with_suffix("") for file in found}
    tables = {
        file
        for file in found
        if file.suffix.lower() == ".csv"
        and (file.stem.endswith("_events") or file.with_suffix("") in stems or _recorded(file) in named_alike - {file.with_suffix("")})
    }
    return without_twins(sorted(found - tables))


def _recorded(table: Path) -> Path:
    """What a table of `tokenize` or `classify` is about, without suffix."""
    return table.with_name(table.stem.removesuffix("_motifs").removesuffix("_windows"))


def without_twins(files: Sequence[Path]) -> list[Path]:
    """`files` without the samples (.eeg) of BrainVision recordings whose header (.vhdr) is there too."""
    return [file for file in files if not (file.suffix.lower() == ".eeg" and file.with_suffix(".vhdr") in files)]


_MAGIC = {b"0       ": ".edf", b"\xffBIOSEMI": ".bdf", b"GDF ": ".gdf", b"Brain Vision": ".vhdr", b"XDF:": ".xdf", b"MATLAB 5": ".set"}


def open_recording(path: str | Path) -> mne.io.BaseRaw:
    """The recording in a file, not preloaded where the format allows it; samples in volt.

    Raises:
        UserError: no such file, an unknown format, a name that contradicts the content, or a file that cannot be read.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"expected a recording; {file} does not exist; check the path")
    suffix = file.suffix.lower()
    if file.is_dir() and suffix != ".mff":
        raise UserError(f"expected a recording; {file} is a folder; name the files in it")
    if file.is_file() and not file.stat().st_size:
        raise UserError(f"expected a recording; {file} is empty")
    real = _recognised(file)
    if real is not None and real != suffix and not (real == ".vhdr" and suffix in (".eeg", ".vmrk")):
        raise UserError(
            f"expected the suffix of what a file holds; {file} holds {real[1:].upper()} and ends in {suffix or 'nothing'}; rename it to {real}"
        )
    if suffix not in SUFFIXES:
        raise UserError(
            f"expected a recording ({', '.join(SUFFIXES)}); {file} ends in {suffix or 'nothing'}; convert it, for instance with MNE-Python"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # what they warn of, repeated names and odd headers, is looked at later
            raw = _READERS.get(suffix, _read_by_mne)(file)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"expected a recording that fits in memory in this format; {file} does not; convert it to EDF or FIF") from None
    except Exception as error:  # readers of a dozen formats fail with whatever their parsers meet
        reason = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
        raise UserError(f"expected a readable {suffix[1:].upper()} recording; {file} cannot be read: {reason}; is it complete?") from None
    if raw.n_times == 0:
        raise UserError(f"expected a recording with samples; {file} holds none")
    return raw


def _recognised(file: Path) -> str | None:
    """The suffix that the first bytes call for, or None where they say nothing."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        head = stream.read(16)
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)


def _read_by_mne(file: Path) -> mne.io.BaseRaw:
    if file.suffix.lower() == ".eeg":
        header = file.with_suffix(".vhdr")
        if header.exists():
            return mne.io.read_raw(header, preload=False, verbose="error")
        return mne.io.read_raw_nihon(file, preload=False, verbose="error")
    return mne.io.read_raw(file, preload=False, verbose="error")


def _read_csv(file: Path) -> mne.io.BaseRaw:
    """Timestamps in seconds, channels in microvolts, perhaps a marker column whose whole numbers become annotations."""
    table = pd.read_csv(file, comment="%")
    time = next((name for name in table if str(name).strip().lower() in ("timestamps", "timestamp", "time")), None)
    if time is None:
        raise UserError(f"expected a column timestamps (seconds) in {file}; got {', '.join(map(str, list(table)[:6]))}; add one")
    column = table.pop(time)
    seconds = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
    if not np.isfinite(seconds).any():  # Mind Monitor writes the time of day
        moments = pd.to_datetime(column, errors="coerce")
        seconds = (moments - moments.min()).dt.total_seconds().to_numpy()
    steps = np.diff(seconds[np.isfinite(seconds)])
    if not len(steps) or np.median(steps) <= 0:
        raise UserError(f"expected timestamps in {file} that rise, in seconds; they do not; mend the column")
    rate = (np.isfinite(seconds).sum() - 1) / (np.nanmax(seconds) - np.nanmin(seconds))
    rate = round(rate) if abs(rate - round(rate)) < 0.02 * rate else rate
    markers = next((name for name in table if re.match(r"marker|stim|event", str(name), re.IGNORECASE)), None)
    events = None if markers is None else pd.to_numeric(table.pop(markers), errors="coerce").fillna(0).to_numpy()
    recorded = [name for name in table if str(name).startswith("RAW_")]
    chosen = table[recorded].rename(columns=lambda name: name.removeprefix("RAW_")) if recorded else table
    samples = chosen.apply(pd.to_numeric, errors="coerce").dropna(axis=1, how="all")
    if samples.shape[1] == 0:
        raise UserError(f"expected columns of numbers beside the timestamps in {file}; found none")
    raw = mne.io.RawArray(
        samples.to_numpy(dtype=float).T * 1e-6, mne.create_info([str(name).strip() for name in samples], float(rate), "eeg"), verbose="error"
    )
    if events is not None and events.any():
        at = np.flatnonzero(events)
        raw.set_annotations(mne.Annotations(at / rate, 0.0, [f"{events[index]:g}" for index in at]))
    return raw


def _read_xdf(file: Path) -> mne.io.BaseRaw:
    """The first stream of type EEG, in microvolts, and the markers of all marker streams."""
    try:
        import pyxdf
    except ModuleNotFoundError:
        raise UserError(f"expected pyxdf to read {file}; it is not installed; run: pip install pyxdf") from None
    streams, _ = pyxdf.load_xdf(str(file))
    eeg = next((stream for stream in streams if stream["info"]["type"][0].lower() == "eeg"), None)
    if eeg is None:
        kinds = ", ".join(stream["info"]["type"][0] for stream in streams) or "none"
        raise UserError(f"expected a stream of type EEG in {file}; found {kinds}")
    count, rate = eeg["time_series"].shape[1], float(eeg["info"]["nominal_srate"][0])
    described: Any = eeg["info"]["desc"][0]
    try:
        names = [channel["label"][0] for channel in described["channels"][0]["channel"]]
    except (KeyError, TypeError, IndexError):
        names = [f"EEG {index + 1}" for index in range(count)]
    raw = mne.io.RawArray(eeg["time_series"].T.astype(float) * 1e-6, mne.create_info(names, rate, "eeg"), verbose="error")
    onsets, words = [], []
    for stream in streams:
        if stream["info"]["type"][0].lower() in ("markers", "marker", "events"):
            for stamp, value in zip(stream["time_stamps"], stream["time_series"], strict=True):
                onsets.append(stamp - eeg["time_stamps"][0])
                words.append(str(value[0]))
    if onsets:
        raw.set_annotations(mne.Annotations(onsets, 0.0, words))
    return raw


_READERS = {".csv": _read_csv, ".xdf": _read_xdf}
