"""Classifying utterances: any labelled folder is read, parts share nobody, padding changes nothing, and it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
import yaml

from foveal.audio.data.labelled_folders import LabelledFolders
from foveal.audio.models.utterance_classifier import UtteranceClassifier, UtteranceClassifierConfig
from foveal.audio.tasks.utterance_classification import UtteranceClassificationTask
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError

CONFIG = Path(__file__).parents[3] / "configs" / "audio" / "utterance_small.yaml"
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
SMALL = UtteranceClassifierConfig(classes=2, channels=16, heads=2, gaussians=2, dropout=0.0)


@pytest.fixture(scope="module")
def emotions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels that a spectrum tells apart, five speakers, three utterances each, of several rates and lengths."""
    root, generator = tmp_path_factory.mktemp("emotions"), np.random.default_rng(0)
    for label, pitch in (("calm", 300), ("excited", 2500)):
        for number in range(15):
            rate, seconds = (8000, 16_000)[number % 2], 0.5 + 0.1 * (number % 5)
            time = np.arange(int(rate * seconds)) / rate
            signal = 0.2 * np.sin(2 * np.pi * pitch * time) * (1 + np.sin(2 * np.pi * 4 * time)) + 0.01 * generator.standard_normal(len(time))
            (root / label).mkdir(exist_ok=True)
            soundfile.write(root / label / f"s{number // 3}_{number:02d}.wav", 0.3 * signal, rate)
    return root


def test_no_speaker_is_in_two_parts_even_under_two_labels(emotions: Path):
    data = LabelledFolders(str(emotions), speaker=r"^(s\d)_")
    data.setup()
    speakers = {part: {path.stem[:2] for path, _ in files.files} for part, files in data.parts.items()}
    assert set(speakers) == {"train", "validation", "test"}
    assert sum(map(len, speakers.values())) == len(set.union(*speakers.values())) == 5
    assert sum(map(len, data.parts.values())) == 30
    assert data.labels == ["calm", "excited"]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda root: LabelledFolders(str(root / "calm")), "subfolder a class"),
        (lambda root: LabelledFolders(str(root), speaker=r"^nobody(\d)"), "speaker to match"),
        (lambda root: LabelledFolders(str(root), test=0.6, validation=0.6), "to split"),
    ],
)
def test_folders_that_cannot_be_split_are_named(emotions: Path, make, complaint: str):
    with pytest.raises(UserError, match=complaint):
        make(emotions).setup()


def test_what_a_batch_fills_in_changes_no_logit():
    torch.manual_seed(0)
    model = UtteranceClassifier(SMALL).eval()
    signal = 0.1 * torch.randn(1, 8192)
    padded = torch.cat([signal, torch.zeros(1, 8000)], dim=1)
    with torch.inference_mode():
        alone, beside = (
            model(signal[:, :7700], torch.tensor([7700])),
            model(torch.cat([padded, torch.randn(1, 16_192)]), torch.tensor([7700, 16_192])),
        )
        cut = model(torch.nn.functional.pad(signal[:, :7700], (0, 8492)), torch.tensor([7700]))
    assert alone.shape == (1, 2)
    assert beside.shape == (2, 2)
    torch.testing.assert_close(cut, model(torch.nn.functional.pad(signal[:, :7700], (0, 4000)), torch.tensor([7700])), atol=1e-4, rtol=1e-3)


def test_level_changes_no_logit():
    torch.manual_seed(0)
    model, signal = UtteranceClassifier(SMALL).eval(), torch.randn(2, 8000)
    with torch.inference_mode():
        torch.testing.assert_close(model(0.1 * signal), model(signal), atol=1e-2, rtol=1e-2)


def test_labels_that_spectra_tell_apart_are_learnt(emotions: Path, tmp_path: Path):
    torch.manual_seed(0)
    task = UtteranceClassificationTask(UtteranceClassifier(SMALL), learning_rate=5e-3)
    trainer = pl.Trainer(max_epochs=6, default_root_dir=tmp_path, num_sanity_val_steps=0, enable_model_summary=False, **QUIET)
    data = LabelledFolders(str(emotions), speaker=r"^(s\d)_", seconds=0.6)
    trainer.fit(task, data)
    (scores,) = trainer.test(task, data, verbose=False)
    assert scores["test/f1"] > 0.9
    gaussians = [parameter for name, parameter in task.named_parameters() if "mean_offsets" in name]
    assert all(parameter.detach().abs().max() > 0 for parameter in gaussians), "the Gaussians did not learn"


def test_data_of_another_number_of_classes_is_refused(emotions: Path, tmp_path: Path):
    task = UtteranceClassificationTask(UtteranceClassifier(UtteranceClassifierConfig(classes=3, channels=16)))
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, **QUIET)
    with pytest.raises(UserError, match="3 classes"):
        trainer.fit(task, LabelledFolders(str(emotions)))


def test_the_config_trains_two_batches(emotions: Path, tmp_path: Path):
    assert yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]["init_args"]["network"]["init_args"]["config"]["classes"] == 10
    arguments = ["fit", "--config", str(CONFIG), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run=2", "--trainer.enable_progress_bar=false"]
    arguments += [f"--data.init_args.root={emotions}", "--model.init_args.network.init_args.config.classes=2"]
    cli = FovealCLI("audio", arguments)
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])
