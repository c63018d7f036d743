"""Training: what is optimised is what is promised, it can learn, it runs in lower precision and in two processes."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from foveal.audio.data.example import Example
from foveal.audio.data.librispeech import LibriSpeechMixtures, find_utterances
from foveal.audio.data.mixing import MixingRule, SpeakerMixtures
from foveal.audio.losses import pairwise_si_sdr, pairwise_snr, pit
from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.audio.tasks.mixture_report import MixtureReport
from foveal.audio.tasks.separation import SeparationTask
from foveal.audio.tasks.synthesis_report import SynthesisReport
from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError

TINY = TIGERConfig(channels=16, hidden_channels=16, blocks=2, scales=3, window=512, hop=256, bands=((8, 187.5), (4, 500.0), (4, 1000.0)), dropout=0.0)
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Scaled(nn.Module):
    """Knows the answer up to a scale and the order: gives `factor` times the sources of the batch, swapped."""

    def __init__(self, sources: Tensor, factor: float) -> None:
        super().__init__()
        self.sources, self.factor = sources, factor
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, mixture: Tensor) -> Tensor:
        return self.factor * self.sources.flip(1)


@pytest.fixture
def data(librispeech: Path) -> LibriSpeechMixtures:
    short = MixingRule(seconds=1.0)
    return LibriSpeechMixtures(
        str(librispeech),
        str(librispeech),
        mixing=short,
        evaluation=short,
        batch_size=2,
        mixtures=4,
        validation_speakers=3,
        validation_mixtures=2,
        test_mixtures=6,
    )


@pytest.fixture
def batch(librispeech: Path) -> Example:
    mixtures = SpeakerMixtures(find_utterances(librispeech), MixingRule(seconds=1.0), 2, seed=0)
    return torch.utils.data.default_collate([mixtures[0], mixtures[1]])


def test_training_minds_the_level_and_validation_does_not(batch: Example):
    task = SeparationTask(Scaled(batch.sources, 0.5))
    # half the level leaves half of each source as error: 6 dB, whatever the order
    assert task.training_step(batch, 0).item() == pytest.approx(-6.02, abs=0.01)
    si_sdr, _ = pit(pairwise_si_sdr(task(batch.mixture), batch.sources))
    assert (si_sdr > 60).all()


def test_one_batch_can_be_learnt(batch: Example):
    torch.manual_seed(0)
    task = SeparationTask(TIGER(TINY))
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # 3 dB is what giving both speakers half the mixture earns; more needs telling them apart
    assert losses[-1] < -5.0 < losses[0]


def test_rate_warms_up_holds_and_ends_at_zero_where_the_trainer_ends(batch: Example):
    task = SeparationTask(nn.Linear(1, 1), schedule="linear", warmup=10, cooldown=0.25)
    trainer = pl.Trainer(max_steps=200, **QUIET)
    task.trainer = trainer
    share = [task._share_of_rate(step) for step in range(201)]
    assert share[0] == pytest.approx(0.1)
    assert share[9:151] == [1.0] * 142
    assert share[175] == pytest.approx(0.5)
    assert share[200] == 0.0
    trainer.fit_loop.epoch_loop.max_steps = 100  # resumed with less time
    assert task._share_of_rate(100) == 0.0
    assert task._share_of_rate(75) == 1.0


def test_a_linear_schedule_without_an_end_is_refused():
    task = SeparationTask(nn.Linear(1, 1), schedule="linear")
    task.trainer = pl.Trainer(max_epochs=1, **QUIET)
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        task.configure_optimizers()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_changes_every_used_weight(data: LibriSpeechMixtures, precision: str, tmp_path: Path):
    torch.manual_seed(0)
    task = SeparationTask(TIGER(TINY), learning_rate=1e-2)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = pl.Trainer(max_steps=2, precision=precision, default_root_dir=tmp_path, **QUIET)
    trainer.fit(task, data)
    after = task.state_dict()
    unchanged = {name for name, value in after.items() if torch.equal(value, before[name])}
    # the coarsest scale is fused and then not used, as in the authors' code
    dead = {name for name in after if f".inject.{TINY.scales - 1}." in name}
    assert unchanged == dead
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_lower_precision_of_the_network_leaves_the_loss_in_float32(batch: Example):
    torch.manual_seed(0)
    task = SeparationTask(TIGER(TINY))
    full = task.training_step(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        half = task.training_step(batch, 0)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), abs=0.1)


def test_validation_leaves_sounds_and_a_picture(data: LibriSpeechMixtures, tmp_path: Path):
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, **QUIET)
    trainer.fit(SeparationTask(TIGER(TINY)), data)
    assert {path.name for path in (tmp_path / "examples").iterdir()} == {"mixture.wav", "speaker1.wav", "speaker2.wav", "separation.png"}


def test_testing_tells_every_mixture_and_the_mean_of_each_group(data: LibriSpeechMixtures, tmp_path: Path, capsys: pytest.CaptureFixture):
    trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)
    trainer.test(SeparationTask(TIGER(TINY)), data)
    with (tmp_path / "test_mixtures.csv").open() as file:
        mixtures = list(csv.DictReader(file))
    with (tmp_path / "test_summary.csv").open() as file:
        summary = {row["group"]: row for row in csv.DictReader(file)}
    assert len(mixtures) == 6
    assert summary["all"]["mixtures"] == "6"
    mean = sum(float(row["si_sdri"]) for row in mixtures) / 6
    assert float(summary["all"]["si_sdri"]) == pytest.approx(mean, abs=1e-4)
    assert trainer.callback_metrics["test/si_sdri"] == pytest.approx(mean, abs=1e-3)
    assert set(summary) - {"all"} == {row["group"] for row in mixtures}
    assert "standard error" in capsys.readouterr().out


@pytest.mark.parametrize("report", [MixtureReport(), SynthesisReport()])
def test_the_table_of_a_test_holds_what_all_processes_measured_each_once(report, monkeypatch: pytest.MonkeyPatch):
    report.rows = [("a", "", {"snr": 1.0}), ("c", "", {"snr": 2.0})]
    other = [("b", "", {"snr": 3.0}), ("a", "", {"snr": 1.0})]  # the last share is filled up with the first mixture again
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), [own, other]))
    report.gather(type("Trainer", (), {"world_size": 2}))
    assert [row[0] for row in report.rows] == ["a", "c", "b"]


def test_standard_error_is_that_of_the_mean():
    report = MixtureReport()
    for value in (1.0, 2.0, 3.0, float("nan")):
        report.add("a", "", {"si_sdri": value})
    (row,) = report.summary()
    assert row["si_sdri"] == pytest.approx(2.0)
    assert row["si_sdri_standard_error"] == pytest.approx(1 / 3**0.5)


_TWO_PROCESSES = """
import sys, torch, lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from foveal.audio.data.librispeech import LibriSpeechMixtures
from foveal.audio.data.mixing import MixingRule
from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.audio.tasks.separation import SeparationTask

class Task(SeparationTask):
    def on_train_end(self):
        state = torch.cat([p.detach().flatten() for p in self.parameters()])
        both = self.all_gather(state)
        assert torch.equal(both[0], both[1]), "the processes' weights differ"
        names = self.all_gather(torch.stack(self.heard))
        assert not torch.equal(names[0], names[1]), "both processes trained on the same mixtures"

    def training_step(self, batch, index):
        self.heard = [*getattr(self, "heard", []), batch.mixture[0, :100].double().sum()]
        return super().training_step(batch, index)

if __name__ == "__main__":
    torch.manual_seed(0)
    config = TIGERConfig(channels=8, hidden_channels=8, blocks=1, scales=3, heads=2, window=512, hop=256, bands=((4, 500.0), (4, 1000.0)))
    short = MixingRule(seconds=0.5)
    data = LibriSpeechMixtures(sys.argv[1], sys.argv[1], mixing=short, evaluation=short, mixtures=4, validation_speakers=3, validation_mixtures=2)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[2])
    trainer.fit(Task(TIGER(config)), data)
    # in one piece: the processes share their output
    print(f"trained {trainer.global_step} {float(trainer.callback_metrics['val/loss'])}\\n", end="", flush=True)
"""


@pytest.mark.slow
def test_two_processes_train_one_model_on_different_mixtures(librispeech: Path, tmp_path: Path):
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    done = subprocess.run([sys.executable, str(script), str(librispeech), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = re.findall(r"trained 2 \S+", done.stdout)
    assert len(lines) == 2, done.stdout
    assert len(set(lines)) == 1, "the validation loss is that of both"


def test_snr_of_validation_and_training_are_not_confused(batch: Example):
    noisy = batch.sources + 0.1 * batch.sources.flip(1)
    snr, _ = pit(pairwise_snr(noisy, batch.sources))
    task = SeparationTask(nn.Identity())
    task.network.forward = lambda mixture: noisy  # type: ignore[method-assign]
    assert task.training_step(batch, 0).item() == pytest.approx(-snr.mean().item(), abs=1e-4)


def test_fine_tuning_starts_from_the_weights_of_a_file_and_refuses_those_of_another_network(tmp_path: Path):
    torch.manual_seed(0)
    trained = TIGER(TINY)
    file = save_weights(tmp_path / "trained.safetensors", trained.state_dict(), system="tiger", config=TINY)
    started = SeparationTask(TIGER(TINY), weights=str(file)).network.state_dict()
    assert all(torch.equal(started[key], value) for key, value in trained.state_dict().items())
    with pytest.raises(UserError, match="expected weights that fit the config's network"):
        SeparationTask(TIGER(dataclasses.replace(TINY, hidden_channels=24)), weights=str(file))
