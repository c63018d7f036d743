"""How EEG follows the envelope of a sound: transfer function, coherence, cross-spectra, lagged correlation, each against shifted surrogates.

After Hasan et al., "Envelope-following responses ... speech" (arXiv 2507.05635), who regard envelope and EEG as input and output of a linear
system whose time-averaged transfer function, and whose cross-spectra between electrodes, show peaks. With Welch's averages, x the envelope, y a
channel:

    H(f) = P_xy / P_xx      C(f) = |P_xy|^2 / (P_xx P_yy)      r(lag) = corr(x(t), y(t + lag))

A value is significant where it exceeds what circular shifts of the envelope give, which keep both signals' spectra and break their alignment. The
surrogates of all frequencies (or lags) of a channel are one distribution, because coherence and correlation are normalised; p values are corrected
over frequencies (or lags) and channels together by Benjamini and Hochberg's false discovery rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mne
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from numpy import ndarray
from scipy import signal
from scipy.fft import next_fast_len
from scipy.io import wavfile

from foveal.core.errors import UserError
from foveal.core.files import all_or_none, output_folder
from foveal.core.reports import BatchReport
from foveal.eeg.events import relative_annotations
from foveal.eeg.montages import derive
from foveal.eeg.recordings import open_recording

#: Length of Welch's segments: bins of half a hertz. The paper reports responses at 8-11, 53-56 and 78-81 Hz.
SEGMENT_SECONDS = 2.0
LARGEST_LAG = 0.5
#: Names of more channels stand beside the picture, where they hide no curve.
_BESIDE = 8


@dataclass
class FollowingResponse:
    """What was found.

    Attributes:
        channels: names.
        frequency: Hz.
        transfer: H, complex, EEG units a unit of envelope.
        coherence: C, 0 to 1.
        coherence_p: p values corrected for all channels and frequencies.
        cross: one-sided cross-spectral density of every pair of channels, complex, (pairs, frequency), in the square of the EEG's unit per Hz.
        pairs: names of the pairs.
        imaginary: imaginary part of the coherency of every pair: what volume conduction cannot make.
        lags: seconds; positive where the EEG comes after the envelope.
        correlation: r.
        correlation_p: p values corrected for all channels and lags.
        seconds: of signal that was used.
    """

    channels: tuple[str, ...]
    frequency: Float[ndarray, " frequency"]
    transfer: ndarray
    coherence: Float[ndarray, "channels frequency"]
    coherence_p: Float[ndarray, "channels frequency"]
    cross: ndarray
    pairs: list[str]
    imaginary: Float[ndarray, "pairs frequency"]
    lags: Float[ndarray, " lags"]
    correlation: Float[ndarray, "channels lags"]
    correlation_p: Float[ndarray, "channels lags"]
    seconds: float

    def table(self) -> pd.DataFrame:
        """One row a channel and frequency."""
        rows = [
            pd.DataFrame(
                {"channel": name, "frequency_hz": self.frequency, "gain": np.abs(self.transfer[c]), "phase_rad": np.angle(self.transfer[c]),
                 "coherence": self.coherence[c], "p_corrected": self.coherence_p[c]}
            )
            for c, name in enumerate(self.channels)
        ]  # fmt: skip
        return pd.concat(rows, ignore_index=True)

    def lag_table(self) -> pd.DataFrame:
        """One row a channel and lag."""
        rows = [
            pd.DataFrame({"channel": name, "lag_s": self.lags, "correlation": self.correlation[c], "p_corrected": self.correlation_p[c]})
            for c, name in enumerate(self.channels)
        ]
        return pd.concat(rows, ignore_index=True)

    def pair_table(self) -> pd.DataFrame:
        """One row a pair of channels and frequency."""
        rows = [
            pd.DataFrame({"pair": name, "frequency_hz": self.frequency, "csd": np.abs(self.cross[p]), "imaginary_coherency": self.imaginary[p]})
            for p, name in enumerate(self.pairs)
        ]
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["pair", "frequency_hz", "csd", "imaginary_coherency"])


def envelope(samples: Float[ndarray, " samples"], rate: float, target: float) -> Float[ndarray, " resampled"]:
    """Magnitude of the analytic signal, low-passed below half of `target` and sampled at `target` Hz; mean 0, standard deviation 1."""
    magnitude = np.abs(signal.hilbert(np.asarray(samples, dtype=float), next_fast_len(len(samples))))[: len(samples)]
    sections = signal.butter(4, 0.4 * min(target, rate), fs=rate, output="sos")
    smooth = signal.sosfiltfilt(sections, magnitude, padlen=min(len(magnitude) - 1, 999))
    at = np.arange(0, len(samples) / rate, 1 / target)
    found = np.interp(at, np.arange(len(smooth)) / rate, smooth)
    return (found - found.mean()) / (found.std() + 1e-12)


def following_response(
    stimulus: Float[ndarray, " samples"], eeg: Float[ndarray, "channels samples"], rate: float, channels: Sequence[str],
    highest: float = 100.0, surrogates: int = 200, seed: int = 0,
) -> FollowingResponse:  # fmt: skip
    """The response of `eeg` to the envelope `stimulus`; both sampled at `rate` Hz and aligned.

    Args:
        stimulus: envelope.
        eeg: any unit.
        rate: Hz.
        channels: names.
        highest: Hz up to which spectra go.
        surrogates: circular shifts.
        seed: of the shifts.

    Raises:
        UserError: less than eight segments in common, no variation, or too few surrogates.
    """
    length = min(stimulus.shape[-1], eeg.shape[-1])
    segment = round(SEGMENT_SECONDS * rate)
    _refuse_short(length, rate)
    if surrogates < 19:
        raise UserError(f"expected at least 19 surrogates; got {surrogates}")
    x, y = stimulus[:length] - stimulus[:length].mean(), eeg[:, :length] - eeg[:, :length].mean(-1, keepdims=True)
    if x.std() < 1e-12 or (y.std(-1) < 1e-15).any():
        flat = "the stimulus" if x.std() < 1e-12 else channels[int(np.argmin(y.std(-1)))]
        raise UserError(f"expected signals that vary; {flat} is constant; leave it out")
    frequency = np.fft.rfftfreq(segment, 1 / rate)
    shown = frequency <= min(highest, rate / 2)
    window = signal.windows.hann(segment, sym=False)

    def spectra(values: ndarray) -> ndarray:
        pieces = np.lib.stride_tricks.sliding_window_view(values, segment, axis=-1)[..., :: segment // 2, :]
        return np.fft.rfft((pieces - pieces.mean(-1, keepdims=True)) * window)[..., shown]

    seen = spectra(y)  # (channels, segments, frequency)
    power = np.mean(np.abs(seen) ** 2, axis=1)

    def coherent(values: ndarray) -> tuple[ndarray, ndarray, ndarray]:
        asked = spectra(values)
        cross, own = np.mean(np.conj(asked) * seen, axis=1), np.mean(np.abs(asked) ** 2, axis=0)
        return cross, own, np.abs(cross) ** 2 / np.maximum(own * power, 1e-300)

    lags = np.arange(-round(0.1 * rate), round(LARGEST_LAG * rate) + 1)
    scaled = y / y.std(-1, keepdims=True)
    spectrum = np.fft.rfft(scaled, axis=-1)

    def correlated(values: ndarray) -> ndarray:
        circular = np.fft.irfft(np.conj(np.fft.rfft(values / values.std())) * spectrum, length, axis=-1) / length
        return circular[:, lags % length]

    cross, own, coherence = coherent(x)
    correlation = correlated(x)
    generator = np.random.default_rng(seed)
    least = min(round(2 * rate), length // 4)
    shifts = generator.integers(least, length - least, surrogates)
    moved = [np.roll(x, int(shift)) for shift in shifts]
    coherence_p = _exceeded(coherence, np.concatenate([coherent(one)[2] for one in moved], axis=-1))
    correlation_p = _exceeded(np.abs(correlation), np.concatenate([np.abs(correlated(one)) for one in moved], axis=-1))
    pairs = [(a, b) for a in range(len(channels)) for b in range(a + 1, len(channels))]
    density = 2 / (rate * np.square(window).sum())  # one-sided
    between = np.array([np.mean(np.conj(seen[a]) * seen[b], axis=0) for a, b in pairs]).reshape(len(pairs), shown.sum())
    geometric = np.array([np.sqrt(power[a] * power[b]) for a, b in pairs]).reshape(len(pairs), shown.sum())
    return FollowingResponse(
        tuple(channels), frequency[shown], cross / np.maximum(own, 1e-300), coherence, false_discovery_rate(coherence_p),
        density * between, [f"{channels[a]}-{channels[b]}" for a, b in pairs], between.imag / np.maximum(geometric, 1e-300), lags / rate, correlation,
        false_discovery_rate(correlation_p), length / rate,
    )  # fmt: skip


def _refuse_short(length: int, rate: float) -> None:
    if length < 8 * round(SEGMENT_SECONDS * rate) // 2:
        raise UserError(f"expected at least {4 * SEGMENT_SECONDS:g} s of stimulus and EEG in common; got {length / rate:.1f} s")


def _exceeded(values: Float[ndarray, "channels n"], surrogates: Float[ndarray, "channels m"]) -> Float[ndarray, "channels n"]:
    """P of each value: the share of its channel's surrogate values, of all frequencies or lags, that reach it."""
    count = surrogates.shape[1]
    order = np.sort(surrogates, axis=1)
    reached = np.stack([count - np.searchsorted(row, one, "left") for row, one in zip(order, values, strict=True)])
    return (reached + 1) / (count + 1)


def false_discovery_rate(p: Float[ndarray, "..."]) -> Float[ndarray, "..."]:
    """Benjamini and Hochberg's adjusted p values over all entries."""
    flat = p.ravel()
    order = np.argsort(flat)
    adjusted = np.minimum.accumulate((flat[order] * len(flat) / np.arange(1, len(flat) + 1))[::-1])[::-1]
    result = np.empty_like(flat)
    result[order] = np.minimum(adjusted, 1)
    return result.reshape(p.shape)


def draw_response(found: FollowingResponse, title: str = "") -> Figure:
    """Gain, coherence with its significant part, lagged correlation, and the cross-spectra between channels, of EEG in microvolt."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    (gain, coherence), (lagged, cross) = figure.subplots(2, 2)
    shown: Bool[ndarray, " frequency"] = found.frequency >= 1
    at = found.frequency[shown]
    for c, name in enumerate(found.channels):
        colour = f"C{c % 10}"
        gain.semilogy(at, np.abs(found.transfer[c])[shown], color=colour, lw=1, label=name)
        coherence.plot(at, found.coherence[c][shown], color=colour, lw=1)
        sure = shown & (found.coherence_p[c] < 0.05)
        coherence.plot(found.frequency[sure], found.coherence[c][sure], "o", color=colour, ms=4)
        lagged.plot(found.lags * 1000, found.correlation[c], color=colour, lw=1)
        told = found.correlation_p[c] < 0.05
        lagged.plot(found.lags[told] * 1000, found.correlation[c][told], ".", color=colour, ms=4)
    for p, name in enumerate(found.pairs[:10]):
        cross.semilogy(at, np.abs(found.cross[p])[shown], lw=1, color=f"C{p % 10}", label=name)
    for axes, what, unit in (
        (gain, "Transfer function", "Gain (µV per s.d. of the envelope)"), (coherence, "Coherence with the envelope (dots: p < 0.05)", "Coherence"),
        (lagged, "Lagged correlation (dots: p < 0.05)", "r"), (cross, "Between channels", "Cross-spectral density (µV²/Hz)"),
    ):  # fmt: skip
        axes.set_title(what, loc="left", fontsize=10)
        axes.set_ylabel(unit)
        axes.set_xlabel("Frequency (Hz)" if axes is not lagged else "EEG after the envelope (ms)")
        axes.grid(alpha=0.25)
    if len(found.channels) > _BESIDE:
        figure.legend(*gain.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right center")
    else:
        gain.legend(fontsize=7, frameon=False, ncols=2)
    if found.pairs:
        cross.legend(fontsize=7, frameon=False, ncols=2)
    figure.suptitle(f"{title}  {found.seconds:.0f} s", fontsize=11, x=0.01, ha="left")
    return figure


def _read_stimulus(path: Path, rate: float | None, target: float) -> ndarray:
    if not path.is_file():
        raise UserError(f"expected a stimulus; {path} {'is a folder; name a file in it' if path.is_dir() else 'does not exist; check the path'}")
    if path.suffix.lower() == ".npy":
        if rate is None:
            raise UserError(f"expected --stimulus-rate with the envelope {path}; an array holds none")
        if not 1 <= rate < np.inf:
            raise UserError(f"expected --stimulus-rate of 1 Hz or more; got {rate:g}")
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise UserError(f"expected an array of numbers in {path}; it cannot be read: {error}; write it with numpy.save") from None
        if values.dtype.kind not in "biuf" or values.ndim < 1 or values.size != max(values.shape):
            raise UserError(
                f"expected one row of real numbers in {path}; got {values.dtype} of shape {values.shape}; choose a row, and its magnitude"
            )
        values = values.astype(float).ravel()
        _refuse_unusable(values, path)
        at = np.arange(0, len(values) / rate, 1 / target)
        found = np.interp(at, np.arange(len(values)) / rate, values)
        return (found - found.mean()) / (found.std() + 1e-12)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that are no samples
            own, samples = wavfile.read(path)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).split(". ")[0].rstrip(".")
        raise UserError(f"expected a wav file or .npy as stimulus; {path} cannot be read: {reason}; convert it to wav") from None
    sound = samples.astype(float).mean(1) if samples.ndim == 2 else samples.astype(float)
    _refuse_unusable(sound, path)
    return envelope(sound, own, target)


def _refuse_unusable(samples: Float[ndarray, " samples"], path: Path) -> None:
    if not len(samples):
        raise UserError(f"expected samples in {path}; it holds none; name another stimulus")
    if not np.isfinite(samples).all():
        raise UserError(f"expected finite samples in {path}; {int((~np.isfinite(samples)).sum())} of {len(samples)} are not; mend the stimulus")
    if np.ptp(samples) == 0:
        raise UserError(f"expected a stimulus that varies; {path} is {samples[0]:g} throughout; name another")


def _start_of(raw: mne.io.BaseRaw, start: str | None) -> float:
    if start is None:
        return 0.0
    try:
        return float(start)
    except ValueError:
        marks = relative_annotations(raw)
        found = [float(onset) for onset, word in zip(marks.onset, marks.description, strict=True) if word == start]
        if not found:
            words = ", ".join(sorted(set(marks.description))[:8]) or "none"
            raise UserError(f"expected seconds or an annotation of the recording as --start ({words}); got {start}") from None
        return found[0]


def efr_command(
    recording: Path,
    stimulus: Path,
    *,
    output: Path | None = None,
    start: str | None = None,
    stimulus_rate: float | None = None,
    highest: float = 100.0,
    surrogates: int = 200,
    channels: Sequence[str] = (),
    notch: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal eeg efr`` does: ``<stem>_efr.csv``, ``_lags.csv``, ``_pairs.csv`` and ``_efr.png``.

    Args:
        recording: EEG.
        stimulus: wav, or .npy with its envelope.
        output: folder; None is ``efr`` here.
        start: when the stimulus began, in seconds or as the word of an annotation (its first).
        stimulus_rate: Hz of a .npy.
        highest: Hz.
        surrogates: circular shifts.
        channels: names to keep.
        notch: Hz of mains hum to take out; 0 none.
        seed: of the shifts.
        overwrite: replace existing results.
        as_json: print the report as JSON.

    Returns:
        0, or 2 where it could not be done.

    Raises:
        UserError: an output folder that cannot be written, or a highest frequency that is none.
    """
    if not highest >= 1:
        raise UserError(f"expected --highest of 1 Hz or more; got {highest:g}")
    folder, report = output_folder("efr" if output is None else output), BatchReport()
    targets = [folder / f"{recording.stem}{suffix}" for suffix in ("_efr.csv", "_lags.csv", "_pairs.csv", "_efr.png")]
    present = [str(target) for target in targets if target.exists()]
    if present and not overwrite:
        report.kept(recording, present)
        return report.finish(as_json)
    with report.item(recording) as entry:
        raw = open_recording(recording)
        chosen, rate = derive(raw, "single", list(channels) or None), float(raw.info["sfreq"])
        begin = _start_of(raw, start)
        if not 0 <= begin < raw.n_times / rate:
            raise UserError(f"expected a start inside the recording of {raw.n_times / rate:.1f} s; got {begin:g} s; choose another --start")
        if not 0 <= notch < rate / 2:
            raise UserError(f"expected --notch below half the recording's {rate:g} Hz, or 0 for none; got {notch:g}")
        first = min(round(begin * rate), raw.n_times - 1)
        asked = _read_stimulus(stimulus, stimulus_rate, rate)
        samples = raw.get_data(picks=list(chosen.picks), start=first, stop=min(raw.n_times, first + len(asked)), verbose="error") * 1e6
        if not np.isfinite(samples).all():
            raise UserError(f"expected finite samples; {int((~np.isfinite(samples)).sum())} are not; choose channels or another start")
        _refuse_short(min(len(asked), samples.shape[-1]), rate)
        samples = signal.sosfiltfilt(signal.butter(2, 0.5, "highpass", fs=rate, output="sos"), samples)
        if notch:
            samples = signal.filtfilt(*signal.iirnotch(notch, 30, fs=rate), samples)
        found = following_response(asked, samples, rate, chosen.names, highest, surrogates, seed)
        with all_or_none(folder) as made:
            for target, table in zip(targets[:3], (found.table(), found.lag_table(), found.pair_table()), strict=True):
                table.to_csv(made / target.name, index=False, float_format="%.6g")
            draw_response(found, recording.name).savefig(made / targets[3].name, dpi=130)
        entry.outputs = [str(target) for target in targets]
        place = np.unravel_index(found.coherence.argmax(), found.coherence.shape)
        entry.numbers = {"seconds": found.seconds, "channels": len(found.channels), "significant bins": float((found.coherence_p < 0.05).sum()),
                         "highest coherence": float(found.coherence.max()), "at Hz": float(found.frequency[place[1]])}  # fmt: skip
        if notch:
            entry.message = f"what lies within 2 Hz of {notch:g} Hz was taken out and cannot be told"
    return report.finish(as_json, {"seconds": ".1f", "channels": ".0f", "significant bins": ".0f", "highest coherence": ".3f", "at Hz": ".1f"})
