"""`foveal eeg` as a user runs it: files, report, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edfio import Edf, EdfSignal

from foveal.apps.main import run


@pytest.fixture
def recording(tmp_path) -> Path:
    """Twelve seconds of noise on two electrodes."""
    samples = 20 * np.random.default_rng(0).standard_normal((2, 12 * 256))
    path = tmp_path / "in" / "r.edf"
    path.parent.mkdir()
    signals = [
        EdfSignal(one, 256, label=name, physical_dimension="uV", physical_range=(-500, 500)) for one, name in zip(samples, ("C3", "C4"), strict=True)
    ]
    Edf(signals).write(path)
    return path


def test_a_recording_becomes_tokens_with_the_bundled_weights(recording, tmp_path, capfd):
    assert run(["eeg", "tokenize", str(recording), "-o", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    entry = json.loads(capfd.readouterr().out)["files"][0]
    assert entry["numbers"]["channels"] == 2
    with np.load(tmp_path / "out" / "r.npz") as found:
        assert found["ids"].shape[1] == 2
        assert list(found["channels"]) == ["C3", "C4"]
        assert found["ids"].max() < len(found["codebook"])


def test_options_reach_the_tokenizer(recording, tmp_path, capfd):
    arguments = ["eeg", "tokenize", str(recording), "-o", str(tmp_path / "out"), "--device", "cpu", "--json"]
    assert run([*arguments, "--channels", "C4", "--window", "4", "--band", "1", "30", "--notch", "0", "--montage", "single"]) == 0
    with np.load(tmp_path / "out" / "r.npz") as found:
        assert list(found["channels"]) == ["C4"]
        assert found["window_starts"].tolist() == [0, 4, 8]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--montage", "bipolar"], "clinical bipolar montage"),
        (["--channels", "Pz"], "expected channels of the recording"),
        (["--band", "30", "1"], "expected a band"),
        (["--montage", "round"], "auto, bipolar or single"),
        (["--notch", "9999"], "--notch below half the recording's 256 Hz"),
        (["--notch", "nan"], "--notch in Hz, or 0 for none; got nan"),
        (["--window", "nan"], "--window in seconds above 0; got nan"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line_and_exits_with_2(recording, tmp_path, capfd, arguments, complaint):
    assert run(["eeg", "tokenize", str(recording), "-o", str(tmp_path / "out"), "--device", "cpu", *arguments]) == 2
    printed = capfd.readouterr()
    assert complaint in " ".join((printed.err + printed.out).split())
    assert "Traceback" not in printed.err


def test_no_files_and_a_folder_without_recordings_are_refused(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert run(["eeg", "tokenize", str(tmp_path / "empty"), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "Traceback" not in capfd.readouterr().err
