"""``foveal graphs3d evaluate``: what it writes for structures with labels, without, and for files that are no structures."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from foveal.apps import main
from foveal.core.checkpoint import save_weights
from foveal.graphs3d import EquiformerV3, EquiformerV3Config, FovealCalculator

CONFIG = EquiformerV3Config(
    layers=1, channels=8, lmax=2, attention_hidden=4, heads=2, alpha_channels=4, value_channels=4, ffn_hidden=8, edge_channels=8, radial=8,
    attention_grid=(8, 8), ffn_grid=(8, 8), cutoff=4.0, max_elements=20,
)  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "potential.safetensors"
    save_weights(path, EquiformerV3(CONFIG).state_dict(), system="equiformer_v3", config=asdict(CONFIG))
    return path


def labelled(weights, shift: float) -> ase.Atoms:
    """Labels that differ from the network's answers by known amounts."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=4.1, cubic=True)
    atoms.rattle(0.1, seed=1)
    calculator = FovealCalculator.from_pretrained(weights, device="cpu")
    calculator.calculate(atoms)
    results = calculator.results
    labels = {"energy": results["energy"] + 8 * shift, "forces": results["forces"] - shift, "stress": results["stress"]}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def run(weights, folder, *arguments) -> int:
    return main.run(["graphs3d", "evaluate", *map(str, arguments), "--checkpoint", str(weights), "-o", str(folder), "--device", "cpu"])


def test_errors_against_the_labels_are_what_the_labels_were_shifted_by(weights, tmp_path):
    source, folder = tmp_path / "crystals.extxyz", tmp_path / "out"
    ase.io.write(source, [labelled(weights, 0.25), labelled(weights, -0.25), ase.build.molecule("H2O")])
    assert run(weights, folder, source) == 0
    errors = json.loads((folder / "crystals_errors.json").read_text())
    assert errors["energy MAE eV/atom"] == pytest.approx(0.25, abs=1e-5)
    assert errors["forces RMSE eV/A"] == pytest.approx(0.25, abs=1e-5)
    assert errors["stress MAE eV/A^3"] == pytest.approx(0, abs=1e-6)
    rows = list(csv.DictReader((folder / "crystals_errors.csv").open()))
    assert [row["atoms"] for row in rows] == ["8", "8", "3"]
    assert rows[2]["forces MAE eV/A"] == ""
    predicted = ase.io.read(folder / "crystals_predicted.extxyz", index=":")
    assert np.allclose(predicted[0].get_forces(), predicted[1].get_forces(), atol=1e-6)
    assert predicted[2].get_potential_energy() != 0
    assert (folder / "crystals_parity.png").stat().st_size > 5000


def test_structures_without_labels_get_predictions_alone(weights, tmp_path):
    source, folder = tmp_path / "water.xyz", tmp_path / "out"
    ase.io.write(source, ase.build.molecule("H2O"))
    assert run(weights, folder, source) == 0
    assert [path.name for path in folder.iterdir()] == ["water_predicted.extxyz"]


def test_what_exists_is_kept_unless_told_otherwise(weights, tmp_path, capsys):
    source, folder = tmp_path / "water.xyz", tmp_path / "out"
    ase.io.write(source, ase.build.molecule("H2O"))
    run(weights, folder, source)
    (folder / "water_predicted.extxyz").write_text("mine")
    assert run(weights, folder, source) == 0
    assert (folder / "water_predicted.extxyz").read_text() == "mine"
    assert run(weights, folder, source, "--overwrite") == 0
    assert (folder / "water_predicted.extxyz").read_text() != "mine"


def test_a_bad_file_does_not_stop_the_others(weights, tmp_path, capsys):
    good, empty, noise, gold = (tmp_path / name for name in ("good.xyz", "empty.extxyz", "noise.cif", "gold.xyz"))
    ase.io.write(good, ase.build.molecule("H2O"))
    empty.write_text("")
    noise.write_text("not a structure")
    ase.io.write(gold, ase.Atoms("Au"))
    assert run(weights, tmp_path / "out", good, empty, noise, gold, "--json") == 2
    states = {entry["source"].rsplit("/", 1)[-1]: entry for entry in json.loads(capsys.readouterr().out)["files"]}
    assert {name: entry["state"] for name, entry in states.items()} == {
        "good.xyz": "done", "empty.extxyz": "failed", "noise.cif": "failed", "gold.xyz": "failed",
    }  # fmt: skip
    assert "got 79" in states["gold.xyz"]["message"]
