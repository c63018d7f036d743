from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

SCHEDULES = {
    "epochs and a plateau schedule": [],
    "two workers": ["--data.init_args.workers", "2"],
    "a step limit, validation across epochs": [
        "--trainer.max_epochs=-1", "--trainer.max_steps", "27", "--trainer.val_check_interval", "4", "--trainer.check_val_every_n_epoch", "null",
    ],
    "averaged weights": [
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay", "0.7", "--trainer.callbacks.use_buffers", "false",
    ],
    "accumulated gradients": ["--trainer.accumulate_grad_batches", "2"],
    "half of each epoch": ["--trainer.limit_train_batches", "6"],
}  # fmt: skip


class PowerCut(Callback):
    """Ends the process' interest in the fit after some batches, as rudely as one process can with itself."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_start(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the power went out")


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def assert_same_result(whole: Path, resumed: Path) -> None:
    assert (resumed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    for name in ("last.ckpt", "best.ckpt"):
        first, second = weights(whole, name), weights(resumed, name)
        assert first["global_step"] == second["global_step"]
        assert all(torch.equal(first["state_dict"][key], value) for key, value in second["state_dict"].items())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("after", [8, 17])
def test_an_interrupted_fit_resumes_to_the_metrics_and_weights_of_an_uninterrupted_one(
    fit: Callable[..., Path], schedule: str, after: int
) -> None:
    options = SCHEDULES[schedule]
    whole = fit("--experiment", "whole", *options)
    with pytest.raises(ConnectionError):
        fit("--experiment", "cut", *options, "--trainer.callbacks+", f"{__name__}.PowerCut", "--trainer.callbacks.after", str(after))
    resumed = fit("--experiment", "cut", *options, "--ckpt_path", "last")
    assert_same_result(whole, resumed)


def test_a_fit_killed_in_the_middle_of_an_epoch_resumes_to_the_same_result(
    fit: Callable[..., Path], start: Callable, workplace: Path
) -> None:
    whole = fit("--experiment", "whole")
    arguments = ["fit", "--config", "toy.yaml", "--experiment", "killed", "--model.init_args.step_seconds", "0.2"]
    process = start(f"from foveal.core.cli import FovealCLI; FovealCLI('toys', {arguments})")
    deadline = time.monotonic() + 120
    while len(logged := [line for path in workplace.glob("runs/toys/killed/*/metrics.csv") for line in path.read_text().splitlines()]) < 18:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert logged[-1].startswith("1,"), "the kill was meant to fall into the second epoch"
    resumed = fit("--experiment", "killed", "--ckpt_path", "last")
    assert_same_result(whole, resumed)


def test_last_without_an_interrupted_run_starts_a_new_one_and_says_so(fit: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    folder = fit("--ckpt_path", "last", "--trainer.max_epochs", "1")
    assert (folder / "metrics.csv").exists()
    assert "no interrupted run" in capfd.readouterr().err


def test_resuming_with_other_training_data_is_refused(fit: Callable[..., Path]) -> None:
    from foveal.core.errors import UserError

    fit("--trainer.max_epochs", "1")
    with pytest.raises(UserError, match="batch_size 4.*batch_size 3"):
        fit("--ckpt_path", "last", "--data.init_args.batch_size", "3")
