"""The envelope-following response of a system whose response is known."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy import signal
from scipy.io import wavfile

from foveal.core.errors import UserError
from foveal.eeg.efr import efr_command, envelope, false_discovery_rate, following_response

RATE = 256.0


@pytest.fixture(scope="module")
def known():
    """One channel that follows a 10 Hz band of the envelope 100 ms later at gain 3, and one of noise."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal(int(60 * RATE))
    band = signal.sosfiltfilt(signal.butter(2, [8, 12], "bandpass", fs=RATE, output="sos"), x)
    late = np.roll(band, round(0.1 * RATE))
    eeg = np.stack([3 * late + 0.5 * generator.standard_normal(len(x)), generator.standard_normal(len(x))])
    return x, eeg, following_response(x, eeg, RATE, ["Cz", "Oz"], highest=60, surrogates=99)


def test_gain_delay_and_significance_of_a_known_system_are_found(known):
    found = known[2]
    at = int(np.abs(found.frequency - 10).argmin())
    assert abs(found.transfer[0, at]) == pytest.approx(3, rel=0.15)
    slope = np.polyfit(found.frequency[at - 3 : at + 4], np.unwrap(np.angle(found.transfer[0, at - 3 : at + 4])), 1)[0]
    assert -slope / (2 * np.pi) == pytest.approx(0.1, abs=0.01)
    assert found.coherence[0, at] > 0.8
    assert found.coherence_p[0, at] < 0.05
    assert (found.coherence_p[1] < 0.05).sum() == 0
    assert found.lags[found.correlation[0].argmax()] == pytest.approx(0.1, abs=0.008)
    assert found.pairs == ["Cz-Oz"]


def test_coherence_and_transfer_equal_scipys(known):
    x, eeg, found = known
    options = {"fs": RATE, "nperseg": 512, "noverlap": 256, "window": "hann"}
    frequency, expected = signal.coherence(x, eeg[0], **options)
    np.testing.assert_allclose(found.coherence[0], expected[frequency <= 60], atol=1e-9)
    transfer = signal.csd(x, eeg[0], **options)[1] / signal.welch(x, **options)[1]
    np.testing.assert_allclose(found.transfer[0][1:], transfer[frequency <= 60][1:], rtol=1e-9)
    cross = signal.csd(eeg[0], eeg[1], **options)[1]
    np.testing.assert_allclose(found.cross[0][1:], cross[frequency <= 60][1:], rtol=1e-9)


def test_unrelated_signals_are_rarely_significant():
    generator = np.random.default_rng(1)
    found = [
        following_response(generator.standard_normal(5000), generator.standard_normal((2, 5000)), RATE, ["a", "b"], surrogates=99, seed=seed)
        for seed in range(4)
    ]
    assert np.mean([(one.coherence_p < 0.05).any() for one in found]) <= 0.25


def test_false_discovery_rate_equals_scipys():
    p = np.random.default_rng(0).random((3, 20)) ** 2
    np.testing.assert_allclose(false_discovery_rate(p).ravel(), signal_fdr(p.ravel()))


def signal_fdr(p):
    from scipy.stats import false_discovery_control

    return false_discovery_control(p)


def test_the_envelope_of_a_modulated_tone_is_its_modulation():
    time = np.arange(0, 4, 1 / 8000)
    found = envelope((1 + 0.8 * np.sin(2 * np.pi * 5 * time)) * np.sin(2 * np.pi * 900 * time), 8000, RATE)
    expected = np.sin(2 * np.pi * 5 * np.arange(len(found)) / RATE)
    assert np.corrcoef(found[50:-50], expected[50:-50])[0, 1] > 0.999


def test_recording_and_wav_go_in_and_tables_and_a_picture_come_out(tmp_path, make_raw, write_edf, capsys):
    raw = make_raw(40)
    time = np.arange(0, 30, 1 / 8000)
    modulation = 1 + 0.9 * np.sin(2 * np.pi * 20 * time + np.sin(2 * np.pi * 0.7 * time))
    wavfile.write(tmp_path / "s.wav", 8000, (8000 * modulation * np.random.default_rng(0).uniform(-1, 1, len(time))).astype(np.int16))
    at = np.arange(0, 30, 1 / 256)
    raw._data[1, 5 * 256 : 5 * 256 + len(at)] += 8e-6 * np.sin(2 * np.pi * 20 * at + np.sin(2 * np.pi * 0.7 * at))
    path = write_edf(tmp_path / "r.edf", raw)
    assert efr_command(path, tmp_path / "s.wav", output=tmp_path / "out", start="5", surrogates=39, as_json=True) == 0
    entry = json.loads(capsys.readouterr().out)["files"][0]
    assert entry["numbers"]["at Hz"] == pytest.approx(20, abs=1.5)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"r_efr.csv", "r_lags.csv", "r_pairs.csv", "r_efr.png"}
    assert efr_command(path, tmp_path / "s.wav", output=tmp_path / "bad", start="99", as_json=True) == 2
    assert "inside the recording" in json.loads(capsys.readouterr().out)["files"][0]["message"]
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("envelope", "rate", "start", "complaint"),
    [(b"no array", 100.0, None, "expected an array of numbers"), (np.full(4000, np.nan), 100.0, None, "4000 of 4000 are not"),
     (np.ones(4000), 0.0, None, "1 Hz or more; got 0"), (np.arange(4000.0), 100.0, "39.99", "at least 8 s of stimulus and EEG in common; got 0.0 s")],
)  # fmt: skip
def test_an_envelope_that_is_none_or_lies_at_the_recordings_end_is_one_line(tmp_path, make_raw, write_edf, capsys, envelope, rate, start, complaint):
    path = tmp_path / "e.npy"
    path.write_bytes(envelope) if isinstance(envelope, bytes) else np.save(path, envelope)
    recording = write_edf(tmp_path / "r.edf", make_raw(40))
    assert efr_command(recording, path, output=tmp_path / "out", stimulus_rate=rate, start=start, as_json=True) == 2
    assert complaint in json.loads(capsys.readouterr().out)["files"][0]["message"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"stimulus": np.ones(5000)}, "the stimulus is constant"), ({"eeg": np.ones((1, 5000))}, "a is constant"),
     ({"stimulus": np.arange(300.0)}, "in common"), ({"surrogates": 3}, "19 surrogates")],
)  # fmt: skip
def test_signals_that_cannot_be_compared_are_refused(change, complaint):
    generator = np.random.default_rng(0)
    arguments = {"stimulus": generator.standard_normal(5000), "eeg": generator.standard_normal((1, 5000)), **change}
    with pytest.raises(UserError, match=complaint):
        following_response(**arguments, rate=RATE, channels=["a"])


@pytest.fixture
def heard(tmp_path, make_raw, write_edf):
    """A recording of 40 s, and stimuli by name."""
    random = np.random.default_rng(0)
    envelope = random.uniform(0, 1, 3000)
    broken = envelope.copy()
    broken[7] = np.nan
    arrays = {
        "good": envelope,
        "nan": broken,
        "still": np.ones(3000),
        "none": np.zeros(0),
        "two": random.uniform(0, 1, (2, 1500)),
        "complex": 1j * envelope,
    }
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values)
    wavfile.write(tmp_path / "nan.wav", 8000, np.where(np.arange(80_000) == 9, np.nan, random.standard_normal(80_000)).astype(np.float32))
    wavfile.write(tmp_path / "silent.wav", 8000, np.zeros(80_000, np.int16))
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "folder.wav").mkdir()
    return write_edf(tmp_path / "r.edf", make_raw(40))


@pytest.mark.parametrize(
    ("stimulus", "options", "message"),
    [
        ("nan.npy", {}, "expected finite samples"),
        ("nan.wav", {}, "expected finite samples"),
        ("still.npy", {}, "that varies; .* is 1 throughout"),
        ("silent.wav", {}, "that varies; .* is 0 throughout"),
        ("none.npy", {}, "it holds none"),
        ("two.npy", {}, r"one row of real numbers .* shape \(2, 1500\)"),
        ("complex.npy", {}, "one row of real numbers .* complex128"),
        ("text.wav", {}, "convert it to wav"),
        ("folder.wav", {}, "is a folder"),
        ("good.npy", {"stimulus_rate": float("nan")}, "1 Hz or more; got nan"),
        ("good.npy", {"start": "nan"}, "expected a start inside the recording"),
        ("good.npy", {"notch": -5.0}, "--notch below half"),
        ("good.npy", {"notch": 200.0}, "--notch below half"),
    ],
)
def test_a_stimulus_or_an_option_that_cannot_be_is_named_and_nothing_is_made(heard, tmp_path, capsys, stimulus, options, message):
    asked = {"stimulus_rate": 100.0, "surrogates": 19, **options}
    assert efr_command(heard, tmp_path / stimulus, output=tmp_path / "out", as_json=True, **asked) == 2
    assert re.search(message, json.loads(capsys.readouterr().out)["files"][0]["message"])
    assert not (tmp_path / "out").exists()


def test_one_channel_alone_has_a_response_and_an_empty_table_of_pairs(heard, tmp_path, capsys):
    options = {"output": tmp_path / "out", "surrogates": 19, "stimulus_rate": 100.0, "channels": ["C3"]}
    assert efr_command(heard, tmp_path / "good.npy", **options) == 0
    assert (tmp_path / "out" / "r_pairs.csv").read_text().splitlines() == ["pair,frequency_hz,csd,imaginary_coherency"]
    with pytest.raises(UserError, match="--highest of 1 Hz or more; got -3"):
        efr_command(heard, tmp_path / "good.npy", **{**options, "highest": -3.0})
