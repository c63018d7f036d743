from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

CONFIG = """
model:
  class_path: toy_training.ToyTask
data:
  class_path: toy_training.ToyData
trainer:
  accelerator: cpu
  devices: 1
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
  logger: false
  max_epochs: 3
resume_point:
  every_n_steps: 3
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run commands in, with toy.yaml, where toy_training can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "toy.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def fit(workplace: Path) -> Callable[..., Path]:
    """Train the toy in this process; gives the run's folder."""
    from foveal.core.cli import FovealCLI

    def run(*arguments: str) -> Path:
        cli = FovealCLI("toys", ["fit", "--config", "toy.yaml", *arguments])
        assert cli.run_folder is not None
        return workplace / cli.run_folder

    return run


@pytest.fixture
def start(workplace: Path) -> Callable[..., subprocess.Popen]:
    """Start a Python program in its own process, as the leader of a group."""

    def run(code: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, start_new_session=True, text=True)

    return run
