from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.core.tracking import Wandb

HERE = Path(__file__).parent


def test_a_runs_folder_holds_config_metrics_curves_checkpoints_and_wandb(
    fit: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(workplace / "home"))
    folder = fit("--trainer.logger", "foveal.core.tracking.Wandb", "--trainer.max_epochs", "1")
    assert folder.parent == workplace / "runs" / "toys" / "toy"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "metrics.csv", "curves.png", "checkpoints", "wandb"}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert not list(workplace.glob("wandb"))
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["train/loss_step"]) for row in rows) == 11
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["trainer"]["max_epochs"] == 1
    assert config["trainer"]["logger"]["init_args"]["offline"] is True


def test_wandb_writes_into_a_runs_folder_also_where_an_earlier_run_of_the_process_had_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Wandb(save_dir="run").experiment.log({"loss": 1.0})
        wandb.finish()
        assert list((tmp_path / name / "run" / "wandb").glob("offline-run-*/run-*.wandb")), name


def test_the_saved_config_runs_again(fit: Callable[..., Path], workplace: Path) -> None:
    first = fit("--trainer.max_epochs", "1", "--model.init_args.learning_rate", "0.003")
    cli = FovealCLI("toys", ["fit", "--config", str(first / "config.yaml"), "--experiment", "again"])
    assert cli.model.learning_rate == 0.003
    assert (cli.run_folder / "metrics.csv").read_text(encoding="utf-8") == (first / "metrics.csv").read_text(encoding="utf-8")  # type: ignore[operator]


def test_wandb_failing_ends_neither_the_run_nor_its_metrics(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise wandb.Error("the service is down")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match="wandb failed and is off .* the service is down"):
        folder = fit("--trainer.logger", "foveal.core.tracking.Wandb", "--trainer.max_epochs", "1")
    assert (folder / "metrics.csv").exists()
    logger = Wandb(save_dir=str(folder))
    with pytest.warns(UserWarning, match="the service is down"):
        logger.experiment.summary.update({"a": 1})


def test_validate_measures_the_best_checkpoint_of_the_newest_run(fit: Callable[..., Path], workplace: Path) -> None:
    folder = fit("--trainer.max_epochs", "2", "--best.monitor", "val/loss")
    with (folder / "metrics.csv").open() as file:
        best = min(float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"])
    cli = FovealCLI("toys", ["validate", "--config", "toy.yaml", "--ckpt_path", "best"])
    assert float(cli.trainer.callback_metrics["val/loss"]) == pytest.approx(best, rel=1e-6)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "validating is no new run"


def test_predict_writes_every_answer_with_what_it_is_the_answer_to(
    fit: Callable[..., Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = fit("--trainer.max_epochs", "1")
    cli = FovealCLI("toys", ["predict", "--config", "toy.yaml", "--ckpt_path", "last", "--data.init_args.batch_size", "2"])
    assert cli.run_folder is not None
    assert cli.run_folder != trained.relative_to(workplace)
    folder = cli.run_folder / "predictions"
    assert capsys.readouterr().out.rstrip().endswith(f"predictions of 3 batches: {folder}")
    assert yaml.safe_load((cli.run_folder / "config.yaml").read_text(encoding="utf-8"))["ckpt_path"] == str(
        (trained / "checkpoints" / "last.ckpt").relative_to(workplace)
    )
    batches = list(cli.datamodule.predict_dataloader())
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["batch_00000.safetensors", "batch_00001.safetensors", "batch_00002.safetensors"]
    for number, (file, batch) in enumerate(zip(files, batches, strict=True)):
        with safe_open(file, "pt") as stored, torch.inference_mode():
            assert set(stored.keys()) == {"value", "more.0.array"}
            assert torch.equal(stored.get_tensor("value"), cli.model.net.eval()(batch.inputs))
            assert stored.get_tensor("more.0.array").tolist() == [0.0, 1.0, 2.0]
            header = {name: json.loads(text) for name, text in stored.metadata().items()}
        assert header == {
            "items": list(range(5))[2 * number : 2 * number + 2], "names": batch.names, "values": {"more.0.kind": "sum", "more.0.sure": None}
        }  # fmt: skip


@pytest.mark.slow
def test_two_processes_predict_every_item_once_and_say_which_is_which(workplace: Path) -> None:
    command = ["predict", "--config", "toy.yaml", "--data.init_args.batch_size", "2"]
    alone = FovealCLI("toys", [*command, "--experiment", "alone"])
    assert alone.run_folder is not None
    arguments = [*command, "--experiment", "both", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    (workplace / "both.py").write_text(f"from foveal.core.cli import FovealCLI\nFovealCLI('toys', {arguments!r})\n")
    done = subprocess.run(
        [sys.executable, "both.py"], env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True, timeout=500, check=True
    )
    (folder,) = (workplace / "runs" / "toys" / "both").glob("*/predictions")
    assert done.stdout.rstrip().endswith(f"predictions of 3 batches: {folder.relative_to(workplace)}"), "of both, and said once"
    assert done.stderr.count("no --ckpt_path") == 1

    def answers(place: Path) -> dict[int, float]:
        found: list[tuple[int, float]] = []
        for file in place.iterdir():
            with safe_open(file, "pt") as stored:
                found += zip(json.loads(stored.metadata()["items"]), stored.get_tensor("value").flatten().tolist(), strict=True)
        assert len({item for item, _ in found}) == len(found), "an item is in one file"
        return dict(found)

    expected = answers(alone.run_folder / "predictions")
    assert answers(folder) == pytest.approx(expected, rel=1e-6)
    assert sorted(expected) == [0, 1, 2, 3, 4]


def test_evaluating_leaves_the_working_folders_own_config_alone_and_says_where_no_checkpoint_was_named(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (workplace / "toy.yaml").rename(workplace / "config.yaml").read_text(encoding="utf-8")
    FovealCLI("toys", ["validate", "--config", "config.yaml"])
    assert (workplace / "config.yaml").read_text(encoding="utf-8") == own
    assert "no --ckpt_path: this is the network as the config makes it" in capsys.readouterr().err


def test_float64_on_an_apple_gpu_is_one_line_that_says_what_to_pass(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead.")

    monkeypatch.setattr("toy_training.ToyTask.training_step", fail)
    with pytest.raises(UserError, match=r"an Apple GPU has none; pass --trainer\.accelerator cpu"):
        fit()


MISTAKES = {
    "an unknown trainer key": (["--trainer.max_epoch", "3"], "max_epoch"),
    "an unknown key of the model": (["--model.init_args.rate", "3"], "rate"),
    "a word for a number": (["--model.init_args.learning_rate", "fast"], "learning_rate: Expected a float"),
    "a number that the model refuses": (["--model.init_args.learning_rate", "-1"], "learning_rate must be above 0; got -1.0"),
    "a class that is not there": (["--model", "toy_training.Tory"], "no attribute 'Tory'"),
    "an accelerator that is not there": (["--trainer.accelerator", "abacus"], "abacus"),
    "a config file that is not there": (["--config", "gone.yaml"], "gone.yaml"),
    "a checkpoint that is not there": (["--ckpt_path", "gone.ckpt"], "gone.ckpt does not exist"),
    "runs below a file": (["--runs", "toy.yaml"], "--runs"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(fit: Callable[..., Path], mistake: str) -> None:
    arguments, named = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        fit(*arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


UNFIT = {
    "no checkpoint at all": (b"garbage", [], "cannot be read as one"),
    "a state dict alone": ({"weight": torch.zeros(1)}, [], "does not fit|cannot be read as one"),
    "a run of another width": (None, ["--model.init_args.width", "7"], "does not fit"),
}


@pytest.mark.parametrize("verb", ["fit", "validate"])
@pytest.mark.parametrize("kind", UNFIT)
def test_a_checkpoint_that_cannot_be_read_or_does_not_fit_is_one_line_that_names_it(
    fit: Callable[..., Path], workplace: Path, kind: str, verb: str
) -> None:
    content, arguments, said = UNFIT[kind]
    path = workplace / "some.ckpt"
    if content is None:
        path = fit() / "checkpoints" / "last.ckpt"
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=said) as caught:
        FovealCLI("toys", [verb, "--config", "toy.yaml", "--ckpt_path", str(path), *arguments])
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_a_config_is_named_with_the_likely_one(fit: Callable[..., Path], workplace: Path) -> None:
    (workplace / "toy.yaml").write_text((workplace / "toy.yaml").read_text(encoding="utf-8").replace("max_epochs", "max_epoch"))
    with pytest.raises(UserError, match=r"trainer\.max_epoch'; did you mean trainer\.max_epochs\?"):
        fit()
    (workplace / "toy.yaml").write_text("model: [\n a: b")
    with pytest.raises(UserError, match="parsing"):
        fit()


def test_print_config_shows_a_config_that_parses(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        FovealCLI("toys", ["fit", "--config", "toy.yaml", "--print_config"])
    assert stop.value.code in (0, None)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["class_path"] == "toy_training.ToyTask"
    assert shown["resume_point"]["every_n_steps"] == 3


def test_ctrl_c_ends_the_fit_as_ctrl_c_and_leaves_the_curves(fit: Callable[..., Path], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toy_training

    step = toy_training.ToyTask.training_step

    def interrupted(task: toy_training.ToyTask, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if task.global_step == 6:
            raise KeyboardInterrupt
        return step(task, batch, batch_idx)

    monkeypatch.setattr(toy_training.ToyTask, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit()
    (folder,) = workplace.glob("runs/toys/toy/*")
    assert (folder / "curves.png").exists()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_refused_fit_leaves_the_next_one_a_folder_of_its_own(fit: Callable[..., Path], workplace: Path) -> None:
    with pytest.raises(UserError):
        FovealCLI("toys", ["fit", "--config", "toy.yaml", "--experiment", "refused", "--trainer.accelerator", "abacus"])
    fit()
    (folder,) = workplace.glob("runs/toys/toy/*")
    assert (folder / "checkpoints" / "last.ckpt").exists()
