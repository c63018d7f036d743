"""``foveal audio convert``: the authors' file to ours and back."""

from __future__ import annotations

import pytest
import torch

from foveal.apps.main import run
from foveal.audio import TIGER, TIGERConfig, to_official
from foveal.audio.checkpoints import model_from_weights


@pytest.fixture
def official(tmp_path):
    """A checkpoint as the authors' trainer writes it: the state dict inside, with a prefix on every key."""
    torch.manual_seed(0)
    state = to_official("tiger", TIGER(TIGERConfig(blocks=4)))
    file = tmp_path / "best_model.pth"
    torch.save({"model_name": "TIGER", "state_dict": {f"audio_model.{key}": value for key, value in state.items()}}, file)
    return file, state


def test_a_checkpoint_goes_to_ours_and_back_to_the_same_bits(official, tmp_path, capsys):
    file, state = official
    ours, back = tmp_path / "tiger.safetensors", tmp_path / "back.pth"
    assert run(["audio", "convert", "tiger", str(file), str(ours), "--set", "num_blocks=4"]) == 0
    assert "838 official tensors" in capsys.readouterr().out
    assert model_from_weights(ours).config.blocks == 4
    assert run(["audio", "convert", "tiger", str(ours), str(back), "--back"]) == 0
    again = torch.load(back, weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_keywords_on_the_way_back_are_refused_since_our_file_says_them(official, tmp_path, capsys):
    ours, back = tmp_path / "tiger.safetensors", tmp_path / "back.pth"
    assert run(["audio", "convert", "tiger", str(official[0]), str(ours), "--set", "num_blocks=4"]) == 0
    assert run(["audio", "convert", "tiger", str(ours), str(back), "--back", "--set", "num_blocks=8"]) == 2
    assert "expected no keywords on the way back, since our file holds its config; got num_blocks" in capsys.readouterr().err
    assert not back.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "num_blocks=four"], "expected a number for num_blocks, such as 8; got 'four'"),
        (["--set", "num_blocks"], "expected --set NAME=VALUE"),
        (["--set", "back=true"], "expected --set NAME=VALUE"),
        (["--set", "depth=4"], "expected keywords of the authors' constructor"),
        (["--set", "out_channels=64"], "misshapen"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(official, tmp_path, capsys, arguments, message):
    target = tmp_path / "tiger.safetensors"
    assert run(["audio", "convert", "tiger", str(official[0]), str(target), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not target.exists()
