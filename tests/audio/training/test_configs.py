"""Every configuration of separation loads and trains two batches, with the real command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from foveal.audio.models.tiger import TIGER
from foveal.core.cli import FovealCLI

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "audio").glob("tiger*.yaml"))
SMALLER = ["channels=8", "hidden_channels=8", "blocks=1", "heads=2", "head_channels=2"]


@pytest.fixture
def data(librispeech: Path, write_mixtures: Callable[..., None], tmp_path: Path) -> dict[str, list[str]]:
    """For each data class, the options that point it at a tiny folder of its layout."""
    root = tmp_path / "echoset"
    for part in ("train", "val", "test"):
        names = {"mix": "mix.wav", "s1": "spk1_reverb.wav", "s2": "spk2_reverb.wav"}
        write_mixtures(lambda index, which, part=part, names=names: root / part / str(index) / names[which], count=2)
    return {
        "EchoSet": [f"root={root}", "seconds=1.0", "workers=0"],
        "LibriSpeechMixtures": [
            f"train_dir={librispeech}",
            f"test_dir={librispeech}",
            "mixing.seconds=1.0",
            "evaluation.seconds=1.0",
            "mixtures=4",
            "validation_speakers=3",
            "validation_mixtures=2",
            "test_mixtures=2",
        ],
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_batches(config: Path, data: dict[str, list[str]], tmp_path: Path):
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    corpus = written["data"]["class_path"].rpartition(".")[2]
    arguments = ["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "2"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    arguments += ["--trainer.enable_progress_bar", "false"]
    for option in SMALLER:
        arguments += [f"--model.init_args.network.init_args.config.{option}"]
    for option in data[corpus]:
        arguments += [f"--data.init_args.{option}"]
    cli = FovealCLI("audio", arguments)
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["val/si_sdri"])


@pytest.mark.parametrize(("name", "parameters", "blocks"), [("tiger_paper", 821_932, 8), ("tiger_small", None, None)])
def test_a_config_names_the_network_it_is_about(name: str, parameters: int | None, blocks: int | None):
    from jsonargparse import ArgumentParser
    from torch import nn

    (config,) = (path for path in CONFIGS if path.stem == name)
    parser = ArgumentParser()
    parser.add_argument("--network", type=nn.Module)
    network = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]["network"]
    model = parser.instantiate_classes(parser.parse_object({"network": network})).network
    assert isinstance(model, TIGER)
    if parameters is not None:
        assert sum(one.numel() for one in model.parameters()) == parameters
        assert model.config.blocks == blocks


def test_no_config_holds_a_path_of_one_machine():
    for config in CONFIGS:
        assert not [line for line in config.read_text(encoding="utf-8").splitlines() if ": /" in line], config
