"""Every configuration of the EEG domain loads and trains two batches, with the real command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from foveal.core.cli import FovealCLI

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eeg").glob("*.yaml"))
TUH = [f"EEG {name}-REF" for name in ["FP1", "FP2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "F7", "F8", "T3", "T4", "T5", "T6"]]
NARROW = {"width": 16, "heads": 2, "codes": 32}
LAYERS = {"frequency_layers": 1, "temporal_layers": 1, "decoder_layers": 1}


@pytest.fixture
def corpora(tmp_path, make_raw, write_edf) -> dict[str, dict]:
    """For each data class, the settings that point it at a tiny folder of its layout."""
    for part, subjects in (("train", ["aaaaaaar", "aaaaaabs"]), ("eval", ["000"])):
        for subject in subjects:
            folder = tmp_path / "edf" / part / subject
            folder.mkdir(parents=True)
            file = write_edf(folder / f"{subject}_00000001.edf", make_raw(12, 200, TUH))
            file.with_suffix(".rec").write_text("".join(f"0,{start}.0,{start + 1}.0,{start % 6 + 1}\n" for start in range(3, 9)))
    generator = np.random.default_rng(0)
    for name, shape in (("SelfRegulationSCP1", (6, 896)), ("FingerMovements", (28, 50))):
        for part in ("TRAIN", "TEST"):
            rows = [
                ":".join([*(",".join(map(str, channel)) for channel in generator.normal(size=shape).round(3).tolist()), ("a", "b")[i % 2]])
                for i in range(10)
            ]
            (tmp_path / f"{name}_{part}.ts").write_text("@classLabel true a b\n@data\n" + "\n".join(rows))
    for subject in (1, 2, 11):
        folder = tmp_path / f"subject{subject}" / "session1"
        folder.mkdir(parents=True)
        samples = generator.normal(0, 10, (256 * 20, 4)).round(2).tolist()
        lines = [",".join(map(str, [i / 256, *row, int(i % 200 == 100) * (1 + i // 200 % 2)])) for i, row in enumerate(samples)]
        (folder / "a.csv").write_text("timestamps,TP9,AF7,AF8,TP10,Marker0\n" + "\n".join(lines))
    return {"TUEV": {"root": str(tmp_path), "workers": 0}, "TSSet": {"root": str(tmp_path)}, "N170": {"root": str(tmp_path)}}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_batches(config, corpora, tiny_weights, tmp_path):
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    model, data = written["model"]["init_args"], written["data"]
    network = model["network"]["init_args"]["config"]
    kind = model["network"]["class_path"].rpartition(".")[2]
    if kind == "TFMTokenizer":
        network |= NARROW | LAYERS
    elif kind == "TFMEncoder":
        network |= NARROW | {"layers": 1, "classes": 32 if "Masked" in written["model"]["class_path"] else network["classes"]}
        model["tokenizer"] = str(tiny_weights)
    else:
        network |= {"hidden": 16, "periods": network["periods"][:2]}
    if "corpora" in data["init_args"]:
        data["init_args"]["corpora"] = [one for one in data["init_args"]["corpora"] if "Spindles" not in one["class_path"]]
        for one in data["init_args"]["corpora"]:
            one["init_args"] |= corpora[one["class_path"].rpartition(".")[2]]
    else:
        data["init_args"] |= corpora[data["class_path"].rpartition(".")[2]]
    data["init_args"]["batch_size"] = 2
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(written))
    arguments = ["fit", "--config", str(changed), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false"]
    cli = FovealCLI("eeg", arguments)
    assert cli.trainer.global_step == 2
    monitored = written["best"]["monitor"]
    assert torch.isfinite(cli.trainer.callback_metrics[monitored])


def test_no_config_holds_a_path_of_one_machine():
    for config in CONFIGS:
        assert not [line for line in config.read_text(encoding="utf-8").splitlines() if ": /" in line], config
