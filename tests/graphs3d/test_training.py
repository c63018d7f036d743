"""Training with the real command line: every configuration runs, a run resumes, fine-tuning starts right, and what is written computes in eV."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from safetensors import safe_open
from safetensors.torch import load_file

from foveal.core.checkpoint import save_weights
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.checkpoints.terms import EnergyTerms
from foveal.graphs3d.data.labelled import Corruption, LabelledGraphs, collate_labelled
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from foveal.graphs3d.tasks.export import export
from foveal.graphs3d.tasks.potential import PotentialTask

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "graphs3d").glob("*.yaml"))
#: The others have a test of their own.
POTENTIALS = [path for path in CONFIGS if "relations" not in path.name]
SMALL = {
    "layers": 1, "channels": 8, "lmax": 2, "mmax": 2, "attention_hidden": 4, "heads": 2, "alpha_channels": 4, "value_channels": 4,
    "ffn_hidden": 8, "edge_channels": 8, "radial": 8, "attention_grid": [8, 8], "ffn_grid": [8, 8], "cutoff": 4.0,
}  # fmt: skip
QUIET = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false"]


def copper(count: int, seed: int = 0) -> list[ase.Atoms]:
    frames = []
    for index in range(count):
        atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True)
        atoms.rattle(0.1, seed=seed + index)
        atoms.calc = EMT()
        frame = atoms.copy()
        frame.calc = SinglePointCalculator(frame, energy=atoms.get_potential_energy(), forces=atoms.get_forces(), stress=atoms.get_stress())
        frames.append(frame)
    return frames


@pytest.fixture
def files(tmp_path) -> Path:
    ase.io.write(tmp_path / "train.extxyz", copper(8), format="extxyz")
    ase.io.write(tmp_path / "hot.extxyz", copper(3, 100), format="extxyz")
    return tmp_path


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    task = PotentialTask(EquiformerV3(EquiformerV3Config(**SMALL, max_elements=60)))
    task.references[29] = -3.0
    task.scale.fill_(2.0)
    return task.write(tmp_path / "start.safetensors")


def settings(folder: Path, changes: dict | None = None) -> dict:
    return {
        "model": {
            "class_path": "foveal.graphs3d.tasks.potential.PotentialTask",
            "init_args": {
                "network": {"class_path": f"{EquiformerV3.__module__}.EquiformerV3", "init_args": {"config": {**SMALL, "max_elements": 60}}},
                "learning_rate": 0.005, "warmup": 0.1, **(changes or {}),
            },
        },
        "data": {
            "class_path": "foveal.graphs3d.data.files.StructureFiles",
            "init_args": {"train": str(folder / "train.extxyz"), "validation": 0.25, "test": {"hot": str(folder / "hot.extxyz")}, "batch_size": 2},
        },
        "trainer": {"num_sanity_val_steps": 0, "log_every_n_steps": 1, "logger": False},
        "best": {"monitor": "val/forces_mae"},
    }  # fmt: skip


def run(folder: Path, verb: str, config: dict, *more: str) -> FovealCLI:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return FovealCLI("graphs3d", [verb, "--config", str(path), "--runs", str(folder / "runs"), *QUIET, *more])


@pytest.mark.parametrize("path", POTENTIALS, ids=lambda path: path.stem)
def test_a_config_trains_two_batches(path, files, weights):
    config = yaml.safe_load(path.read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    if model.get("network") is None:
        model["weights"] = str(weights)
    else:
        network = model["network"]["init_args"]["config"]
        network |= {**SMALL, "max_elements": 60}
    data |= {"train": str(files / "train.extxyz"), "validation": 0.25, "test": None, "batch_size": 2, "workers": 0}
    cli = run(files, "fit", config, "--trainer.fast_dev_run", "2")
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics[config["best"]["monitor"]])


def test_muon_has_every_map_between_channels_and_adam_every_other_parameter():
    task = PotentialTask(EquiformerV3(EquiformerV3Config(**SMALL, max_elements=60)), matrix_learning_rate=0.02)
    matrices, others = task._optimizer().param_groups
    trained = [id(parameter) for group in (matrices, others) for parameter in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(task.network.parameters()))
    names = {id(parameter): name for name, parameter in task.network.named_parameters()}
    left = {names[id(parameter)].rpartition(".")[2] for parameter in others["params"] if parameter.dim() > 1 and min(parameter.shape) > 1}
    tables = [parameter for parameter in others["params"] if parameter.dim() == 2 and parameter.shape[0] == 60]
    assert left <= {"weight", "logit"}
    assert all(names[id(one)].endswith(("embedding.weight", "source.weight", "target.weight")) for one in tables)
    assert {id(task.network.blocks[0].attention.project.weight), id(task.network.energy[0].weight)} <= {id(one) for one in matrices["params"]}
    assert id(task.network.energy[2].weight) not in {id(one) for one in matrices["params"]}, "a map to one number has no singular vectors to keep"


def test_no_config_holds_a_path_of_one_machine():
    assert CONFIGS
    for config in CONFIGS:
        assert not [line for line in config.read_text().splitlines() if ": /" in line], config


def test_training_learns_and_what_it_writes_is_a_calculator_in_ev(files):
    cli = run(files, "fit", settings(files), "--trainer.max_epochs", "30")
    written = cli.run_folder / "potential.safetensors"
    calculator, atoms = FovealCalculator.from_pretrained(written, device="cpu"), copper(1)[0]
    zero = np.abs(atoms.get_forces()).mean()
    assert np.abs(calculator.batch([atoms])[0]["forces"] - atoms.get_forces()).mean() < 0.8 * zero
    assert abs(calculator.batch([atoms])[0]["energy"] - atoms.get_potential_energy()) < 0.5
    with pytest.raises(UserError, match=r"trained on \(Cu\); got Al"):
        calculator.batch([ase.build.bulk("Al", "fcc", a=4.0)])
    tested = run(files, "test", settings(files), "--ckpt_path", "best")
    assert set(tested.trainer.callback_metrics) >= {"test/hot/energy_mae", "test/hot/forces_mae", "test/hot/stress_mae"}


def test_a_run_that_was_stopped_ends_with_the_same_weights(files, monkeypatch):
    config = settings(files)
    limits = ["--trainer.max_steps", "7", "--resume_point.every_n_steps", "1"]
    whole = run(files, "fit", config, "--experiment", "whole", *limits)
    learn = PotentialTask.training_step

    def stopped(self, batch, index):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return learn(self, batch, index)

    monkeypatch.setattr(PotentialTask, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(files, "fit", config, "--experiment", "parts", *limits)
    monkeypatch.setattr(PotentialTask, "training_step", learn)
    resumed = run(files, "fit", config, "--experiment", "parts", "--ckpt_path", "last", *limits)
    assert resumed.trainer.global_step == 7
    for one, other in zip(whole.model.network.parameters(), resumed.model.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fine_tuning_starts_with_the_right_mean_energy(files, weights):
    config = settings(files, {"network": None, "weights": str(weights), "learning_rate": 0.0})
    cli = run(files, "fit", config, "--trainer.max_steps", "1")
    assert float(cli.model.scale) == 2.0
    frames = copper(8)
    found = [one["energy"] for one in FovealCalculator.from_pretrained(cli.run_folder / "potential.safetensors", device="cpu").batch(frames)]
    labels = [atoms.get_potential_energy() for atoms in frames]
    assert np.mean(found) == pytest.approx(np.mean(labels), abs=0.3)
    kept = run(files, "fit", settings(files, {"network": None, "weights": str(weights), "references": "keep"}), "--trainer.max_steps", "1")
    assert float(kept.model.references[29]) == -3.0


def test_fine_tuning_trains_with_the_networks_dropout(files, tmp_path):
    task = PotentialTask(EquiformerV3(EquiformerV3Config(**SMALL, max_elements=60, drop_path=0.5)))
    file = task.write(tmp_path / "dropping.safetensors")
    assert all(module.training for module in PotentialTask(weights=str(file)).network.modules()), "Lightning leaves the mode as it is"


def test_weights_are_measured_in_ev_without_training(files, weights):
    """`validate` and `test` without a checkpoint answer for the weights that the config names."""
    config = settings(files, {"network": None, "weights": str(weights)})
    tested = run(files, "test", config).trainer.callback_metrics
    calculator, frames = FovealCalculator.from_pretrained(weights, device="cpu"), copper(3, 100)
    errors = [abs(calculator.batch([atoms])[0]["energy"] - atoms.get_potential_energy()) / len(atoms) for atoms in frames]
    assert float(tested["test/hot/energy_mae"]) == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("edges", [None, 60])
def test_what_predict_keeps_is_what_the_calculator_says_in_ev(files, weights, edges):
    config = settings(files, {"network": None, "weights": str(weights)})
    config["data"]["init_args"]["max_edges"] = edges
    run(files, "predict", config)
    kept = [load_file(file) for file in sorted((files / "runs").glob("**/predictions/batch_*.safetensors"))]
    expected = FovealCalculator.from_pretrained(weights, device="cpu").batch(copper(3, 100))
    np.testing.assert_allclose(torch.cat([batch["energy"] for batch in kept]), [one["energy"] for one in expected], rtol=1e-5)
    forces = [one for batch in kept for one in batch["forces"].split(batch["atoms"].tolist())]
    assert [len(one) for one in forces] == [len(atoms) for atoms in copper(3, 100)]
    assert torch.cat([batch["numbers"] for batch in kept]).tolist() == [number for atoms in copper(3, 100) for number in atoms.numbers]
    for one, other in zip(forces, expected, strict=True):
        np.testing.assert_allclose(one, other["forces"], atol=1e-4, err_msg="forces of a structure are told from those of the next")


def test_the_direct_form_keeps_a_scale_of_forces_of_its_own(files, tmp_path):
    """As converted OC20 checkpoints have it: their forces are divided by another number than their energies."""
    torch.manual_seed(0)
    config = EquiformerV3Config(**SMALL, max_elements=60, direct=True)
    header = EnergyTerms(20.0, {"Cu": -3.0}, forces_scale=3.0).header()
    file = save_weights(tmp_path / "oc20.safetensors", EquiformerV3(config).state_dict(), system="equiformer_v3", config=config, metadata=header)
    cli = run(files, "fit", settings(files, {"network": None, "weights": str(file), "learning_rate": 0.0}), "--trainer.max_epochs", "1")
    before, after = (FovealCalculator.from_pretrained(one, device="cpu") for one in (file, cli.run_folder / "potential.safetensors"))
    atoms = copper(1)[0]
    assert np.allclose(before.batch([atoms])[0]["forces"], after.batch([atoms])[0]["forces"], rtol=1e-6, atol=1e-9)
    assert (after.scale, after.forces_scale) == (20.0, 3.0)
    exported = FovealCalculator.from_pretrained(export(cli.run_folder / "checkpoints" / "best.ckpt", tmp_path / "half.safetensors"), device="cpu")
    assert (exported.scale, exported.forces_scale) == (20.0, 3.0)


def test_a_checkpoint_from_before_forces_had_a_scale_of_their_own_loads(weights):
    task = PotentialTask(weights=str(weights))
    state = task.state_dict()
    del state["forces_scale"]
    task.forces_scale.fill_(7.0)
    task.load_state_dict(state)
    assert float(task.forces_scale) == float(task.scale) == 2.0


def test_rare_elements_have_references_after_fine_tuning(files, weights, monkeypatch):
    monkeypatch.setattr("foveal.graphs3d.tasks.potential._FITTED", 3)
    frames = copper(8)
    frames[1].symbols[0] = "Ag"
    frames[1].calc = SinglePointCalculator(frames[1], energy=-1.0, forces=np.zeros((4, 3)))
    ase.io.write(files / "train.extxyz", [frames[index] for index in (0, 2, 3, 1, 4, 5, 6, 7)], format="extxyz")
    config = settings(files, {"network": None, "weights": str(weights)})
    config["data"]["init_args"]["validation"] = str(files / "hot.extxyz")
    cli = run(files, "fit", config, "--trainer.max_steps", "1")
    calculator = FovealCalculator.from_pretrained(cli.run_folder / "potential.safetensors", device="cpu")
    assert np.isfinite(calculator.batch([frames[1]])[0]["energy"]), "silver was trained on and must not be refused"


def test_a_run_that_was_stopped_while_fine_tuning_is_exported(files, weights, tmp_path, monkeypatch):
    learn = PotentialTask.training_step

    def stopped(self, batch, index):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return learn(self, batch, index)

    monkeypatch.setattr(PotentialTask, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(files, "fit", settings(files, {"network": None, "weights": str(weights)}), "--resume_point.every_n_steps", "1")
    (last,) = (files / "runs").rglob("last.ckpt")
    exported = FovealCalculator.from_pretrained(export(last, tmp_path / "half.safetensors"), device="cpu")
    assert exported.scale == 2.0
    assert exported.elements == {29}


def test_the_gradient_form_goes_on_from_the_direct_forms_weights_and_back_with_new_heads(tmp_path):
    torch.manual_seed(0)
    direct = EquiformerV3Config(**SMALL, max_elements=60, direct=True, denoising=True)
    learned = PotentialTask(EquiformerV3(direct))
    file = learned.write(tmp_path / "direct.safetensors")
    gradient = PotentialTask(EquiformerV3(EquiformerV3Config(**SMALL, max_elements=60)), weights=str(file)).network
    assert gradient.state_dict().keys() < learned.network.state_dict().keys()
    for key, value in gradient.state_dict().items():
        assert torch.equal(value, learned.network.state_dict()[key]), key
    body = PotentialTask(gradient).write(tmp_path / "gradient.safetensors")
    back = EquiformerV3(direct)
    own = back.force_head.logit.detach().clone()
    back = PotentialTask(back, weights=str(body)).network
    assert torch.equal(back.force_head.logit, own)
    with pytest.raises(UserError, match="expected weights that fit"):
        PotentialTask(EquiformerV3(EquiformerV3Config(**{**SMALL, "layers": 2}, max_elements=60)), weights=str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "neither"), ({"network": EquiformerV3(EquiformerV3Config(**SMALL)), "references": "keep"}, "without weights")],
)
def test_task_without_what_it_needs_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        PotentialTask(**options)


def test_denoising_has_the_noise_as_target_for_moved_atoms_and_forces_for_the_others():
    torch.manual_seed(0)
    config = EquiformerV3Config(**SMALL, max_elements=60, direct=True, denoising=True)
    task = PotentialTask(EquiformerV3(config), forces_weight=3.0, denoising_weight=7.0)
    batch = collate_labelled([LabelledGraphs(copper(2), 4.0, corruption=Corruption(1.0, 0.5, 0.05, max_ratio=1.0))[index] for index in range(2)])
    prediction = task(batch).detach()
    moved = batch.noise.corrupted
    assert 0 < moved.sum() < len(moved)
    error = torch.where(moved.unsqueeze(1), prediction.forces - batch.noise.shift, prediction.forces - batch.forces).norm(dim=1)
    expected = (torch.where(moved, 7.0, 3.0) * error).mean()
    assert float(task._losses(batch, prediction)["forces"]) == pytest.approx(float(expected), rel=1e-5)
    assert "stress" not in task._losses(batch, prediction)


def test_forces_of_fixed_atoms_are_not_learned():
    task = PotentialTask(EquiformerV3(EquiformerV3Config(**SMALL, max_elements=60)))
    batch = collate_labelled([LabelledGraphs(copper(1), 4.0)[0]])
    prediction = task(batch).detach()
    fixed = batch._replace(free=torch.tensor([True, False, True, True]))
    wrong = fixed._replace(forces=batch.forces + 100 * (~fixed.free).unsqueeze(1))
    assert torch.equal(task._losses(fixed, prediction)["forces"], task._losses(wrong, prediction)["forces"])
    assert not torch.equal(task._losses(fixed, prediction)["forces"], task._losses(batch, prediction)["forces"])


def test_weight_decay_leaves_embeddings_norms_and_biases_alone():
    network = EquiformerV3(replace(EquiformerV3Config(**SMALL), max_elements=10))
    task = PotentialTask(network)

    class Steps:
        estimated_stepping_batches = 100

    task._trainer = Steps()  # type: ignore[assignment]
    groups = task.configure_optimizers()["optimizer"].param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    plain = {names[id(parameter)] for parameter in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0
    assert {"embedding.weight", "norm.weight", "blocks.0.attention.logit_norm.weight", "blocks.0.feed.contract.bias"} <= plain
    assert not {"blocks.0.attention.logit", "blocks.0.feed.contract.weight", "energy.0.weight"} & plain
    assert len(names) == sum(len(group["params"]) for group in groups)


def test_rate_rises_and_falls_to_a_hundredth_along_a_cosine():
    task = PotentialTask(EquiformerV3(EquiformerV3Config(**SMALL)), warmup=0.1)

    class Steps:
        estimated_stepping_batches = 100

    task._trainer = Steps()  # type: ignore[assignment]
    rates = [task._rate(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[50] == pytest.approx(0.01 + 0.99 * 0.5)
    assert rates[100] == pytest.approx(0.01)


@pytest.mark.parametrize("direct", [False, True])
def test_two_batches_in_mixed_precision_give_finite_losses_and_master_weights_in_full(files, direct):
    config = settings(files)
    config["model"]["init_args"]["network"]["init_args"]["config"]["direct"] = direct
    cli = run(files, "fit", config, "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "2")
    assert cli.trainer.global_step == 2
    assert np.isfinite(float(cli.trainer.callback_metrics["train/loss"]))
    assert all(parameter.dtype == torch.float32 and torch.isfinite(parameter).all() for parameter in cli.model.network.parameters())


@pytest.mark.slow
def test_two_processes_train_one_potential_on_shares_of_the_data(files):
    path = files / "config.yaml"
    path.write_text(yaml.safe_dump(settings(files)))
    options = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.enable_progress_bar", "false"]
    command = [sys.executable, "-m", "foveal.apps.main", "graphs3d", "fit", "--config", str(path), "--runs", str(files / "runs"), *options]
    done = subprocess.run([*command, "--trainer.max_epochs", "2"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    written = list((files / "runs").rglob("potential.safetensors"))
    assert len(written) == 1, "every process made a run of its own"
    # Six structures, two a batch, two processes: one whole round of batches an epoch.
    with safe_open(written[0], "pt") as weights:
        assert weights.metadata()["steps"] == "2"


def test_elements_that_the_network_has_no_room_for_are_refused_in_a_sentence(files, weights):
    frames = copper(8)
    frames[3].symbols[0] = "Au"
    frames[3].calc = SinglePointCalculator(frames[3], energy=-1.0, forces=np.zeros((4, 3)))
    ase.io.write(files / "train.extxyz", frames, format="extxyz")
    with pytest.raises(UserError, match=r"elements up to Pr, .* \(max_elements 60\); got Au"):
        run(files, "fit", settings(files, {"network": None, "weights": str(weights)}), "--trainer.max_steps", "1")
