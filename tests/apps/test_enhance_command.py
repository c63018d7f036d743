"""`foveal audio enhance` as a user runs it: files, report, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from foveal.apps.main import run
from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig
from foveal.core.checkpoint import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained network, small enough for tests."""
    config = MambAttentionConfig(fft=64, window=64, hop=32, channels=8, heads=2, blocks=1, state=4, expansion=2, dense_layers=2)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return save_weights(path, MambAttention(config).state_dict(), system="mambattention", config=config)


@pytest.fixture
def enhance(weights, tmp_path, capfd):
    """Run the command with output folder `out`; gives the exit code, its report and what it complained of."""

    def command(*arguments, checkpoint=weights, output=tmp_path / "out"):
        capfd.readouterr()
        code = run(["audio", "enhance", "-o", str(output), "--checkpoint", str(checkpoint), "--device", "cpu", "--json", *map(str, arguments)])
        printed = capfd.readouterr()
        return code, json.loads(printed.out)["files"] if printed.out else [], printed.err

    return command


def talk(path: Path, rate: int = 16_000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.05 * np.random.default_rng(0).standard_normal((rate // 2, channels)), rate)
    return path


def test_files_and_folders_give_one_file_each_and_a_report(enhance, tmp_path):
    talk(tmp_path / "in" / "a.flac", 44_100, 2)
    code, files, _ = enhance(tmp_path / "in", talk(tmp_path / "b.wav", 8000))
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_enhanced.wav", "b_enhanced.wav"]
    assert [file["state"] for file in files] == ["done", "done"]
    assert soundfile.info(tmp_path / "out" / "a_enhanced.wav").channels == 2
    assert files[1]["numbers"]["seconds"] == pytest.approx(0.5)


def test_results_in_the_folder_of_the_recordings_are_not_enhanced_again_and_hidden_files_are_no_recordings(enhance, tmp_path):
    folder = talk(tmp_path / "Größe 1" / "ä b.wav").parent
    (folder / "._ä b.wav").write_bytes(b"of another system")
    assert [file["state"] for file in enhance(folder, output=folder)[1]] == ["done"]
    assert [file["state"] for file in enhance(folder, output=folder)[1]] == ["kept"]
    assert sorted(path.name for path in folder.iterdir()) == ["._ä b.wav", "ä b.wav", "ä b_enhanced.wav"]
    assert [file["state"] for file in enhance(folder / "ä b_enhanced.wav", output=folder)[1]] == ["done"], "named alone it is a recording"


def test_existing_outputs_are_kept_until_overwrite(enhance, tmp_path):
    source, kept = talk(tmp_path / "a.wav"), tmp_path / "out" / "a_enhanced.wav"
    enhance(source)
    kept.write_bytes(b"mine")
    assert enhance(source)[1][0]["state"] == "kept"
    assert kept.read_bytes() == b"mine"
    assert enhance(source, "--overwrite")[1][0]["state"] == "done"
    assert soundfile.info(kept).frames == 8000


def test_one_bad_file_is_named_and_the_others_are_done(enhance, tmp_path):
    (tmp_path / "text.wav").write_text("dear diary")
    code, files, _ = enhance(tmp_path / "text.wav", tmp_path / "gone.wav", talk(tmp_path / "good.wav"))
    assert code == 2
    assert {Path(file["source"]).name: file["state"] for file in files} == {"text.wav": "failed", "gone.wav": "failed", "good.wav": "done"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [([], "none"), (["a.wav", "--demo"], "both"), (["a.wav", "--device", "tpu"], "tpu"), (["a.wav", "--chunk-seconds", "0.1"], "one second")],
)
def test_what_stops_everything_is_one_line_and_exit_code_2(enhance, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    talk(tmp_path / "a.wav")
    code, files, complaints = enhance(*arguments)
    assert (code, files) == (2, [])
    assert len(complaints.strip().splitlines()) == 1
    assert complaint in complaints
    assert not list(tmp_path.rglob("*enhanced*.wav"))


def test_the_demo_writes_sounds_and_a_picture_and_scores_them(enhance, tmp_path):
    code, files, _ = enhance("--demo")
    assert code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["demo_clean.wav", "demo_enhanced.wav", "demo_enhancement.png", "demo_noisy.wav"]
    assert {"seconds", "SI-SDR improvement dB", "real-time factor"} <= set(files[0]["numbers"])
