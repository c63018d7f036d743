"""What training does: losses of every kind of task, what is saved, and the way of a trained network into a file."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml

from foveal.core.checkpoint import load_weights
from foveal.core.errors import UserError
from foveal.core.exporting import export_command
from foveal.eeg.checkpoints import model_from_weights
from foveal.eeg.data.windows import ArrayWindows, Splits, WindowsDataModule, collate
from foveal.eeg.models.codebook import Codebook
from foveal.eeg.models.pointwise import group_norm, linear_add, linear_gelu
from foveal.eeg.models.tfm_encoder import EncoderConfig, TFMEncoder
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer, TokenizerConfig
from foveal.eeg.tasks.classification import ClassificationTask, MaskedTokenTask
from foveal.eeg.tasks.export import _export_described, _options, export, of_run
from foveal.eeg.tasks.schedules import share_of_rate
from foveal.eeg.tasks.tokenizer import TokenizerTask


class Rhythms(WindowsDataModule):
    """Windows of 5 Hz and of 20 Hz; `label` makes a label of the class."""

    def __init__(self, label=lambda classes: classes, count: int = 48) -> None:
        super().__init__(batch_size=16)
        self.label, self.count = label, count

    def find(self) -> Splits:
        generator = np.random.default_rng(0)
        classes = np.arange(self.count) % 2
        time = np.arange(600) / 200
        phase = generator.uniform(0, 6.28, (self.count, 2, 1))
        signals = np.sin(2 * np.pi * np.where(classes, 20, 5)[:, None, None] * time + phase) + 0.1 * generator.standard_normal((self.count, 2, 600))
        windows = ArrayWindows(signals, self.label(classes), ["one"] * self.count, ["w"] * self.count)
        return Splits(windows, windows, windows, ("slow", "fast"))


def encoder(classes: int) -> TFMEncoder:
    torch.manual_seed(0)
    return TFMEncoder(EncoderConfig(classes=classes, codes=32, width=16, heads=2, layers=1))


def trainer(folder, epochs: int = 8, **settings) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **{**quiet, **settings})


@pytest.mark.parametrize(
    ("kind", "classes", "label", "metric", "loss"),
    [
        ("single_label", 2, lambda c: c, "test/balanced_accuracy", "default"),
        ("binary", 1, lambda c: c, "test/auroc", "default"),
        ("binary", 1, lambda c: c, "test/auroc", "focal"),
        ("multi_label", 2, lambda c: np.stack([c, 1 - c], 1), "test/auroc", "default"),
    ],
)
def test_every_kind_of_task_learns_to_tell_slow_from_fast_rhythms(kind, classes, label, metric, loss, tiny_weights, tmp_path):
    task = ClassificationTask(str(tiny_weights), encoder(classes), kind=kind, loss=loss, learning_rate=1e-2)
    data, runner = Rhythms(label), trainer(tmp_path)
    runner.fit(task, data)
    assert runner.test(task, data, verbose=False)[0][metric] > 0.7  # the tokens are of an untrained network


@pytest.mark.parametrize(("kind", "classes"), [("single_label", 3), ("multi_label", 5)])
def test_data_of_other_classes_than_the_network_has_are_refused_before_training(kind, classes, tiny_weights, tmp_path):
    task = ClassificationTask(str(tiny_weights), encoder(classes), kind=kind)
    with pytest.raises(UserError, match=f"expected data of {classes} classes.*got 2 \\(slow, fast\\)"):
        trainer(tmp_path).fit(task, Rhythms())


@pytest.mark.parametrize("task", [ClassificationTask, MaskedTokenTask])
def test_windows_of_more_channels_than_the_network_has_are_refused(task, tiny_weights, tmp_path):
    torch.manual_seed(0)
    sizes = {"codes": 32, "width": 16, "heads": 2, "layers": 1, "channels": 1}
    network = TFMEncoder(EncoderConfig(classes=32 if task is MaskedTokenTask else 2, **sizes))
    with pytest.raises(UserError, match=r"up to 1 channels.*got 2 \(w\)"):
        trainer(tmp_path).fit(task(str(tiny_weights), network), Rhythms())


def test_the_tokenizer_never_learns_and_is_not_saved(tiny_weights, tmp_path):
    task = ClassificationTask(str(tiny_weights), encoder(2), learning_rate=1e-2)
    before = {key: value.clone() for key, value in task.tokenizer.state_dict().items()}
    runner = trainer(tmp_path, 1)
    runner.fit(task, Rhythms())
    assert all(torch.equal(value, before[key]) for key, value in task.tokenizer.state_dict().items())
    assert not task.tokenizer.model.training
    runner.save_checkpoint(tmp_path / "c.ckpt")
    saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert not any(key.startswith("tokenizer.") for key in saved)
    other = ClassificationTask(str(tiny_weights), encoder(2))
    trainer(tmp_path, 1).validate(other, Rhythms(), ckpt_path=tmp_path / "c.ckpt", verbose=False)
    assert torch.equal(other.network.head.weight, task.network.head.weight)


def test_windows_without_a_label_are_not_learned_from(tiny_weights):
    task = ClassificationTask(str(tiny_weights), encoder(2))
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    windows = Rhythms().splits.train
    batch = next(iter(torch.utils.data.DataLoader(windows, 4, collate_fn=collate)))
    unknown = batch._replace(label=torch.full_like(batch.label, -1))
    assert task.training_step(unknown, 0) == 0
    half = batch._replace(label=torch.where(torch.arange(4) < 2, batch.label, -1))
    first = batch._replace(signal=batch.signal[:2], label=batch.label[:2], present=batch.present[:2])
    task.eval()
    assert task.training_step(half, 0).item() == pytest.approx(task.training_step(first, 0).item(), rel=1e-5)


def test_settings_that_do_not_fit_are_refused(tiny_weights):
    with pytest.raises(UserError, match="focal loss with kind binary"):
        ClassificationTask(str(tiny_weights), encoder(2), loss="focal")
    with pytest.raises(UserError, match="one class for kind binary; got 2"):
        ClassificationTask(str(tiny_weights), encoder(2), kind="binary")
    with pytest.raises(UserError, match="tokenizer's 32 codes and width 16"):
        ClassificationTask(str(tiny_weights), TFMEncoder(EncoderConfig(classes=2, codes=64, width=16, heads=2, layers=1)))
    with pytest.raises(UserError, match="head of 32 classes"):
        MaskedTokenTask(str(tiny_weights), encoder(2))


def test_hidden_tokens_are_learned_and_the_encoder_starts_the_next_task(tiny_weights, tmp_path):
    task, data = MaskedTokenTask(str(tiny_weights), encoder(32), learning_rate=1e-2), Rhythms()
    before = trainer(tmp_path, 1).validate(task, data, verbose=False)[0]["val/loss"]
    trainer(tmp_path, 6).fit(task, data)
    assert trainer(tmp_path, 1).validate(task, data, verbose=False)[0]["val/loss"] < 0.8 * before
    from foveal.core.checkpoint import save_weights

    save_weights(tmp_path / "p.safetensors", task.network.state_dict(), system="tfm_encoder", config=task.network.config, dtype=torch.float32)
    tuned = ClassificationTask(str(tiny_weights), encoder(2), weights=str(tmp_path / "p.safetensors"))
    assert torch.equal(tuned.network.layers[0].qkv.weight, task.network.layers[0].qkv.weight)
    assert tuned.network.head.out_features == 2


def test_the_codebook_begins_when_it_is_told_to_and_is_in_use_at_the_end(tmp_path):
    torch.manual_seed(0)
    config = TokenizerConfig(width=16, heads=2, codes=32, frequency_layers=1, temporal_layers=1, decoder_layers=1, dropout=0.0, decay=0.9)
    task, seen = TokenizerTask(TFMTokenizer(config), quantize_from=0.5, settle=0.25), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(bool(task.network.codebook.counts.any()))

    runner = trainer(tmp_path, 10, callbacks=[Watch()])
    runner.fit(task, Rhythms())
    assert seen == [False] * 15 + [True] * 15
    assert runner.validate(task, Rhythms(), verbose=False)[0]["val/alive"] > 0.5


def test_births_go_where_the_codebook_is_coarsest():
    torch.manual_seed(0)
    codebook = Codebook(20, 4).train()
    dense, far = torch.randn(400, 4) * 0.01, torch.randn(8, 4) * 0.01 + 3
    codebook.weight.copy_(dense[:20])
    codebook.sums.copy_(dense[:20])
    codebook.counts.fill_(1.0)
    codebook.counts[:5], codebook.weight[:5] = 0.0, -50.0  # where no vector is
    codebook(torch.cat([dense, far]))
    assert (codebook.weight[:5].mean(1) > 2).sum() == 5


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (9, 1.0), (79, 0.1), (99, 0.1)])
def test_the_rate_has_come_down_before_the_codebook_settles(step, share):
    assert share_of_rate(step, 100, 0.1, 0.1, settle=0.2) == pytest.approx(share, abs=0.01)


def test_fused_maps_equal_their_definitions_and_have_gradients():
    torch.manual_seed(0)
    linear, norm, x = torch.nn.Linear(8, 16), torch.nn.GroupNorm(4, 16), torch.randn(3, 5, 8)
    residual = torch.randn(3, 5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(linear_gelu(x, linear), torch.nn.functional.gelu(linear(x)))
        torch.testing.assert_close(linear_add(x, linear, residual), residual + linear(x))
        torch.testing.assert_close(group_norm(residual, norm), norm(residual.transpose(1, 2)).transpose(1, 2))
    linear_add(linear_gelu(x, linear), torch.nn.Linear(16, 16), residual).sum().backward()
    assert linear.weight.grad is not None
    assert torch.autograd.gradcheck(lambda t: group_norm(t, norm.double()), residual.double().requires_grad_())


def test_a_trained_network_goes_into_a_file_with_what_its_users_need(tmp_path, tiny_weights):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    network = encoder(2)
    described = {"class_path": "foveal.eeg.models.tfm_encoder.TFMEncoder", "init_args": {"config": vars(network.config)}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"network": described}}}))
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 7}, run / "checkpoints" / "best.ckpt")
    file = export(run / "checkpoints" / "best.ckpt", tmp_path / "c.safetensors", {"classes": "a|b", "window_seconds": "3.5"}, "# card\n")
    header = load_weights(file).metadata
    assert (header["classes"], header["window_seconds"], header["steps"]) == ("a|b", "3.5", "7")
    loaded = model_from_weights(file, "tfm_encoder")
    ids = torch.randint(0, 32, (2, 3, 5))
    torch.testing.assert_close(loaded(ids), network.eval()(ids), atol=5e-3, rtol=5e-3)
    assert (tmp_path / "c.md").read_text(encoding="utf-8") == "# card\n"
    with pytest.raises(UserError, match="checkpoints folder of a run"):
        export(tmp_path / "nowhere.ckpt", tmp_path / "x.safetensors", {})


def test_what_a_runs_config_says_of_its_data_is_exported_and_what_it_does_not_say_is_asked_for(tmp_path, capsys):
    network = encoder(2)
    described = {"class_path": "foveal.eeg.models.tfm_encoder.TFMEncoder", "init_args": {"config": vars(network.config)}}
    model = {"init_args": {"network": described, "kind": "single_label", "tokenizer": "somewhere/t.safetensors"}}
    data = {"init_args": {"root": "mine", "window": 3.0, "band": [0.5, 45.0], "classes": ["left", "right"]}}
    settings = {"model": model, "data": data}
    said = {"window_seconds": "3", "band": "0.5 45", "classes": "left|right", "kind": "single_label", "tokenizer": "t.safetensors"}
    assert of_run(settings) == said
    chosen = {"init_args": {**data["init_args"], "montage": "single", "channels": ["C3", "C4"]}}
    assert of_run({"model": model, "data": chosen}) == {**said, "montage": "single", "channels": "C3|C4"}
    tokenizer = {"init_args": {"network": described}}
    assert not {"montage", "channels"} & of_run({"model": tokenizer, "data": chosen}).keys(), "a tokenizer reads any channel"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": {"init_args": {"root": "mine", "window": 3.0}}}))
    torch.save(
        {"state_dict": {f"network.{key}": value for key, value in network.state_dict().items()}, "global_step": 7}, run / "checkpoints/best.ckpt"
    )
    command = [str(run / "checkpoints" / "best.ckpt"), str(tmp_path / "c.safetensors")]
    assert export_command(_export_described, "", _options, command) == 2
    assert "expected --band and --classes" in capsys.readouterr().err
    assert export_command(_export_described, "", _options, [*command, "--band", "1 30", "--classes", "a|b"]) == 0
    header = load_weights(tmp_path / "c.safetensors").metadata
    assert (header["window_seconds"], header["band"], header["classes"], header["tokenizer"]) == ("3", "1 30", "a|b", "t.safetensors")
