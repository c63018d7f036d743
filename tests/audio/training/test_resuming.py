"""A training of TIGER that is killed goes on to the result that it would have had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

CONFIG = Path(__file__).parents[3] / "configs" / "audio" / "tiger_small.yaml"
CONFIG_OF_NETWORK = "--model.init_args.network.init_args.config"


def command(librispeech: Path, experiment: str, *further: str) -> list[str]:
    """A fit of two short epochs of a tiny TIGER with dropout, checkpointed every three steps."""
    small = ["channels", "16", "hidden_channels", "16", "scales", "3", "dropout", "0.1", "blocks", "2"]
    settings = [f"{CONFIG_OF_NETWORK}.{name}={value}" for name, value in zip(small[::2], small[1::2], strict=True)]
    data = {"train_dir": librispeech, "test_dir": librispeech, "mixing.seconds": 1.0, "evaluation.seconds": 1.0, "mixtures": 20}
    data |= {"validation_speakers": 3, "validation_mixtures": 2, "batch_size": 2}
    settings += [f"--data.init_args.{name}={value}" for name, value in data.items()]
    trainer = {"max_steps": 20, "val_check_interval": 5, "log_every_n_steps": 1}
    settings += [f"--trainer.{name}={value}" for name, value in trainer.items()]
    script = "import sys; from foveal.apps.main import main; main(sys.argv[1:])"
    fixed = ["audio", "fit", "--config", str(CONFIG), "--experiment", experiment, "--resume_point.every_n_steps=3"]
    return [sys.executable, "-c", script, *fixed, *settings, *further]


def result(folder: Path, experiment: str) -> tuple[str, dict[str, torch.Tensor]]:
    (run,) = (folder / "runs" / "audio" / experiment).iterdir()
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=False)
    return (run / "metrics.csv").read_text(encoding="utf-8"), checkpoint["state_dict"]


@pytest.mark.slow
def test_a_training_killed_in_the_middle_of_an_epoch_ends_with_the_metrics_and_weights_of_an_uninterrupted_one(librispeech: Path, tmp_path: Path):
    quiet = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    subprocess.run(command(librispeech, "whole"), cwd=tmp_path, env=quiet, check=True, capture_output=True)
    killed = subprocess.Popen(command(librispeech, "killed"), cwd=tmp_path, env=quiet, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 300
    while sum(len(path.read_text(encoding="utf-8").splitlines()) for path in tmp_path.glob("runs/audio/killed/*/metrics.csv")) < 9:
        assert killed.poll() is None, killed.stderr.read() if killed.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = next(tmp_path.glob("runs/audio/killed/*/metrics.csv")).read_text(encoding="utf-8")
    subprocess.run(command(librispeech, "killed", "--ckpt_path", "last"), cwd=tmp_path, env=quiet, check=True, capture_output=True)
    whole, resumed = result(tmp_path, "whole"), result(tmp_path, "killed")
    assert before != whole[0], "the kill was meant to fall into the middle"
    assert resumed[0] == whole[0]
    assert all(torch.equal(resumed[1][key], value) for key, value in whole[1].items())
