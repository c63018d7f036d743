"""`foveal audio separate` as a user runs it: files, report, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from foveal.apps.main import run
from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.core.checkpoint import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained network, small enough for tests."""
    config = TIGERConfig(channels=8, hidden_channels=8, blocks=1, scales=3, heads=2, head_channels=2)
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", TIGER(config).state_dict(), system="tiger", config=config)


@pytest.fixture
def separate(weights, tmp_path, capfd):
    """Run the command with output folder `out`; gives the exit code, its report and what it complained of."""

    def command(*arguments, checkpoint=weights, output=tmp_path / "out"):
        capfd.readouterr()
        code = run(["audio", "separate", "-o", str(output), "--checkpoint", str(checkpoint), "--device", "cpu", "--json", *map(str, arguments)])
        printed = capfd.readouterr()
        return code, json.loads(printed.out)["files"] if printed.out else [], printed.err

    return command


def talk(path: Path, seconds: float = 0.5, rate: int = 16_000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.05 * np.random.default_rng(seed).standard_normal(round(seconds * rate)), rate)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_gives_one_file_a_speaker_and_a_report(separate, tmp_path):
    code, files, _ = separate(talk(tmp_path / "call.wav", rate=8000))
    assert code == 0
    assert names(tmp_path / "out") == ["call_speaker1.wav", "call_speaker2.wav"]
    assert soundfile.info(tmp_path / "out" / "call_speaker1.wav").samplerate == 8000
    (file,) = files
    assert file["state"] == "done"
    assert file["outputs"] == [str(tmp_path / "out" / name) for name in names(tmp_path / "out")]
    assert file["numbers"]["seconds"] == pytest.approx(0.5)
    assert file["numbers"]["real-time factor"] > 0


def test_existing_outputs_are_kept_and_reported_until_overwrite(separate, tmp_path):
    source = talk(tmp_path / "call.wav")
    separate(source)
    kept = tmp_path / "out" / "call_speaker1.wav"
    kept.write_bytes(b"mine")
    code, files, _ = separate(source)
    assert (code, files[0]["state"], kept.read_bytes()) == (0, "kept", b"mine")
    code, files, _ = separate(source, "--overwrite")
    assert (code, files[0]["state"], soundfile.info(kept).frames) == (0, "done", 8000)


def test_one_bad_file_of_a_batch_is_named_and_the_others_are_done(separate, tmp_path):
    talk(tmp_path / "in" / "good.wav")
    (tmp_path / "in" / "text.wav").write_text("dear diary")
    (tmp_path / "in" / "empty.mp3").touch()
    code, files, _ = separate(tmp_path / "in", tmp_path / "gone.wav", talk(tmp_path / "more.flac"))
    assert code == 2
    states = {Path(file["source"]).name: file["state"] for file in files}
    assert states == {"good.wav": "done", "text.wav": "failed", "empty.mp3": "failed", "gone.wav": "failed", "more.flac": "done"}
    assert all("\n" not in file["message"] and file["message"].startswith("expected") for file in files if file["state"] == "failed")
    assert names(tmp_path / "out") == [f"{stem}_speaker{number}.wav" for stem in ("good", "more") for number in (1, 2)]


def test_files_with_the_same_name_do_not_overwrite_each_other(separate, tmp_path):
    code, files, _ = separate(talk(tmp_path / "a" / "call.wav"), talk(tmp_path / "b" / "call.wav", seed=1), talk(tmp_path / "b" / "call.flac"))
    assert code == 0
    assert len({output for file in files for output in file["outputs"]}) == len(names(tmp_path / "out")) == 6


def test_the_same_file_named_twice_is_separated_once(separate, tmp_path):
    source = talk(tmp_path / "call.wav")
    _, files, _ = separate(source, source, tmp_path)
    assert len(files) == 1


def test_an_output_never_replaces_an_input(separate, tmp_path):
    source, other = talk(tmp_path / "call.wav"), talk(tmp_path / "call_speaker1.wav", seed=1)
    before = other.read_bytes()
    code, files, _ = separate(source, other, "--overwrite", output=tmp_path)
    assert code == 2
    assert {Path(file["source"]).name: file["state"] for file in files} == {"call.wav": "failed", "call_speaker1.wav": "done"}
    assert other.read_bytes() == before


def foreign(folder: Path) -> Path:
    torch.save({"weights": torch.zeros(3)}, folder / "model.pth")
    return folder / "model.pth"


def unwritable(folder: Path) -> Path:
    (folder / "locked").write_text("a file stands where the folder should be")
    return folder / "locked"


@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        ([], {}, "none"),
        (["call.wav", "--demo"], {}, "both"),
        (["call.wav"], {"checkpoint": lambda folder: folder / "gone.safetensors"}, "does not exist"),
        (["call.wav"], {"checkpoint": foreign}, "model.pth"),
        (["call.wav"], {"output": unwritable}, "locked"),
        (["call.wav"], {"output": lambda folder: unwritable(folder) / "below"}, "below"),
        (["call.wav", "--device", "tpu"], {}, "tpu"),
        (["call.wav", "--chunk-seconds", "0.1"], {}, "one second"),
        (["call.wav", "--chunk-secondz", "3"], {}, "--chunk-secondz"),
    ],
)
def test_what_stops_everything_is_one_line_and_exit_code_2(separate, tmp_path, monkeypatch, arguments, options, complaint):
    monkeypatch.chdir(tmp_path)
    source = talk(tmp_path / "call.wav")
    before = source.read_bytes()
    code, files, complaints = separate(*arguments, **{name: make(tmp_path) for name, make in options.items()})
    assert (code, files) == (2, [])
    assert len(complaints.strip().splitlines()) == 1
    assert complaint in complaints
    assert source.read_bytes() == before
    assert not list(tmp_path.rglob("*speaker*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(separate, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    code, _, complaints = separate(talk(tmp_path / "call.wav"))
    assert code == 2
    assert str(tmp_path / "out") in complaints


def test_the_demo_writes_sounds_and_a_picture_and_scores_them(separate, tmp_path):
    code, files, _ = separate("--demo")
    assert code == 0
    assert names(tmp_path / "out") == ["demo.png", "demo_mixture.wav", "demo_speaker1.wav", "demo_speaker2.wav"]
    (file,) = files
    assert set(file["numbers"]) == {"seconds", "SI-SDR improvement dB", "real-time factor"}
    mixture, one, two = (soundfile.read(tmp_path / "out" / f"demo_{name}.wav")[0] for name in ("mixture", "speaker1", "speaker2"))
    np.testing.assert_allclose(one + two, mixture, atol=1e-4)
    (tmp_path / "out" / "demo.png").write_bytes(b"mine")
    code, files, _ = separate("--demo")
    assert code == 0
    assert "kept" in files[0]["message"]
    assert (tmp_path / "out" / "demo.png").read_bytes() == b"mine"


def test_the_report_for_people_names_every_output(weights, tmp_path, capsys):
    code = run(["audio", "separate", str(talk(tmp_path / "call.wav")), "-o", str(tmp_path / "out"), "--checkpoint", str(weights), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "call_speaker2.wav" in printed
    assert "real-time factor" in printed
