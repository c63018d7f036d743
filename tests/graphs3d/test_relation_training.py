"""Training of the relation decoder with the real command line: its configuration, what it learns, what it writes, and its weights."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.graphs3d.relations import Relations
from foveal.graphs3d.tasks.export_relations import export

CONFIG = Path(__file__).parents[2] / "configs" / "graphs3d" / "relations_small.yaml"
FEW = ["--data.init_args.rooms", "40", "--data.init_args.held_out", "60", "--trainer.enable_progress_bar", "false"]


@pytest.mark.parametrize("positions", ["rope", "official", "paper", "learned"])
def test_the_config_trains_two_batches_with_all_positions(positions, tmp_path):
    options = ["--runs", str(tmp_path), "--trainer.fast_dev_run", "2", "--model.init_args.network.positions", positions]
    cli = FovealCLI("graphs3d", ["fit", "--config", str(CONFIG), *options, *FEW])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


def test_a_run_writes_a_table_of_relations_and_becomes_weights_that_answer_the_same(tmp_path):
    run = ["--config", str(CONFIG), "--runs", str(tmp_path), *FEW]
    steps = ["--trainer.max_epochs", "1", "--data.init_args.steps", "20", "--data.init_args.relations", "[above, largest]"]
    cli = FovealCLI("graphs3d", ["fit", *run, *steps])
    assert float(cli.trainer.callback_metrics["train/loss"]) < 2.0
    FovealCLI("graphs3d", ["test", *run, *steps, "--ckpt_path", "best"])
    (table,) = tmp_path.rglob("relations.csv")
    rows = {row["relation"]: row for row in csv.DictReader(table.open())}
    assert set(rows) == {"above", "largest", "all"}
    assert int(rows["all"]["questions"]) == 60
    assert 0 < float(rows["all"]["chance"]) < 0.6
    (checkpoint,) = tmp_path.rglob("best.ckpt")
    relations = Relations.from_pretrained(export(checkpoint, tmp_path / "w.safetensors"), "cpu")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    torch.testing.assert_close(relations.model.point.weight, state["network.point.weight"], atol=1e-3, rtol=1e-2)
    with pytest.raises(UserError, match="folder of a run"):
        export(tmp_path / "w.safetensors", tmp_path / "x.safetensors")


def test_relations_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected relations among left"):
        FovealCLI("graphs3d", ["fit", "--config", str(CONFIG), "--runs", str(tmp_path), "--data.init_args.relations", "[beside]"])
