from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from foveal.core.errors import UserError
from foveal.core.resume_point import ResumePoint
from foveal.core.tracking import MetricsFile

#: What can be due when the power goes out: name -> (trainer's settings, workers of the loader).
SCHEDULES: dict[str, tuple[dict[str, Any], int]] = {
    "epochs and a plateau schedule": ({}, 0),
    "two workers": ({}, 2),
    "a step limit, validation across epochs": ({"max_epochs": -1, "max_steps": 27, "val_check_interval": 4, "check_val_every_n_epoch": None}, 0),
    "averaged weights": ({"callbacks": [lambda: EMAWeightAveraging(decay=0.7, use_buffers=False)]}, 0),
    "accumulated gradients": ({"accumulate_grad_batches": 2}, 0),
    "half of each epoch": ({"limit_train_batches": 6}, 0),
    "a schedule that asks for the number of steps": ({"one_cycle": True}, 0),
    "the same with two workers": ({"one_cycle": True}, 2),
}


class PowerCut(Callback):
    """Ends a fit after some batches, without letting it tidy up its checkpoint."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_start(self, *_: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the power went out")


def train(folder: Path, settings: dict[str, Any], workers: int, cut: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    """Fit the toy in `folder`; gives its weights after the last step."""
    from toy_training import ToyData, ToyTask

    pl.seed_everything(0)
    settings = {"max_epochs": 3, **settings}
    task = ToyTask(one_cycle=settings.pop("one_cycle", False))
    callbacks = [ResumePoint(3, str(folder)), *(make() for make in settings.pop("callbacks", ())), *([PowerCut(cut)] if cut else [])]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    trainer = pl.Trainer(logger=MetricsFile(folder), callbacks=callbacks, **quiet, **settings)  # type: ignore[arg-type]
    trainer.fit(task, ToyData(workers), ckpt_path=str(folder / "last.ckpt") if resume else None)
    return task.state_dict()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_interrupted_fit_resumes_to_the_metrics_and_weights_of_an_uninterrupted_one(workplace: Path, schedule: str) -> None:
    settings, workers = SCHEDULES[schedule]
    expected = train(workplace / "whole", settings, workers)
    with pytest.raises(ConnectionError):
        train(workplace / "cut", settings, workers, cut=14)
    assert len((workplace / "cut" / "metrics.csv").read_text(encoding="utf-8").splitlines()) < len(
        (workplace / "whole" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    )
    resumed = train(workplace / "cut", settings, workers, resume=True)
    assert (workplace / "cut" / "metrics.csv").read_text(encoding="utf-8") == (workplace / "whole" / "metrics.csv").read_text(encoding="utf-8")
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())


def assert_same_result(whole: Path, resumed: Path) -> None:
    assert (resumed / "metrics.csv").read_text(encoding="utf-8") == (whole / "metrics.csv").read_text(encoding="utf-8")
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (whole, resumed))
        assert first["global_step"] == second["global_step"]
        assert all(torch.equal(first["state_dict"][key], value) for key, value in second["state_dict"].items())


def test_a_fit_killed_in_the_middle_of_an_epoch_resumes_to_the_same_result(fit: Callable[..., Path], start: Callable, workplace: Path) -> None:
    whole = fit("--experiment", "whole")
    arguments = ["fit", "--config", "toy.yaml", "--experiment", "killed", "--model.init_args.step_seconds", "0.1"]
    process = start(f"from foveal.core.cli import FovealCLI; FovealCLI('toys', {arguments})")
    deadline = time.monotonic() + 120
    while (
        len(logged := [line for path in workplace.glob("runs/toys/killed/*/metrics.csv") for line in path.read_text(encoding="utf-8").splitlines()])
        < 18
    ):
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
    fit("--trainer.max_epochs", "1")
    with pytest.raises(UserError, match=r"batch_size 4.*batch_size 3"):
        fit("--ckpt_path", "last", "--data.init_args.batch_size", "3")
