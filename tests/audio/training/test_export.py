"""From a run's checkpoint to weights that the practitioner's commands take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveal.audio.predict import Separator
from foveal.audio.tasks.export import export
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError

CONFIG = Path(__file__).parents[3] / "configs" / "audio" / "tiger_small.yaml"


@pytest.fixture(scope="module")
def run(librispeech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    runs = tmp_path_factory.mktemp("runs")
    data = {"train_dir": librispeech, "test_dir": librispeech, "validation_speakers": 3, "validation_mixtures": 2, "mixtures": 8}
    data |= {"mixing.seconds": 0.5, "evaluation.seconds": 0.5}
    options = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    network = {"channels": 8, "hidden_channels": 8, "blocks": 1, "heads": 2, "head_channels": 2}
    options += [f"--model.init_args.network.init_args.config.{name}={value}" for name, value in network.items()]
    options += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    FovealCLI("audio", ["fit", "--config", str(CONFIG), "--runs", str(runs), *options])
    (folder,) = (runs / "audio" / "tiger_small").iterdir()
    return folder


def test_exported_weights_separate_as_the_averaged_checkpoint_does(run: Path, tmp_path: Path):
    checkpoint = run / "checkpoints" / "best.ckpt"
    target = export(checkpoint, tmp_path / "tiger.safetensors", card="# a card", dtype=torch.float32)
    separator = Separator.from_pretrained(target)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    for key, value in separator.model.state_dict().items():
        assert torch.equal(value, state[f"network.{key}"]), key
    assert target.with_suffix(".md").read_text(encoding="utf-8") == "# a card"


def test_half_precision_is_close_and_half_as_large(run: Path, tmp_path: Path):
    checkpoint = run / "checkpoints" / "best.ckpt"
    full = export(checkpoint, tmp_path / "full.safetensors", dtype=torch.float32)
    half = export(checkpoint, tmp_path / "half.safetensors")
    tensors = [Separator.from_pretrained(path).model.state_dict() for path in (full, half)]
    for key, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][key].float(), value, atol=1e-4, rtol=1e-3)
    assert half.stat().st_size < 0.75 * full.stat().st_size


def test_a_checkpoint_outside_a_run_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"beside its config\.yaml"):
        export(tmp_path / "last.ckpt", tmp_path / "tiger.safetensors")
