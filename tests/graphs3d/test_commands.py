"""relax, md, phonons, eos and label as a user runs them: what they write is right, and a bad file is one line and no end."""

from __future__ import annotations

import csv
import json

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT

from foveal.apps.main import run
from foveal.core.errors import UserError
from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.dynamics import energy_drift, run_dynamics
from foveal.graphs3d.equation_of_state import equation_of_state
from foveal.graphs3d.file_runs import stems
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from foveal.graphs3d.phonons import crystal_phonons, molecule_modes
from foveal.graphs3d.plots import draw_modes
from foveal.graphs3d.relax import relax
from foveal.graphs3d.tasks.potential import PotentialTask

SMALL = EquiformerV3Config(
    layers=1, channels=8, lmax=2, mmax=2, attention_hidden=4, heads=2, alpha_channels=4, value_channels=4, ffn_hidden=8, edge_channels=8, radial=8,
    attention_grid=(8, 8), ffn_grid=(8, 8), cutoff=4.0, max_elements=60,
)  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    task = PotentialTask(EquiformerV3(SMALL))
    task.references[[1, 6, 8, 29]] = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    return task.write(tmp_path / "weights.safetensors")


def copper(a: float = 3.7, rattle: float = 0.05, seed: int = 0) -> ase.Atoms:
    atoms = ase.build.bulk("Cu", "fcc", a=a, cubic=True)
    atoms.rattle(rattle, seed=seed)
    return atoms


def test_structures_relaxed_together_end_where_each_ends_alone():
    structures = [copper(seed=1), copper(3.5, seed=2), copper(3.6, 0.0)]
    together = relax(structures, EMT(), fmax=0.01, cell=True)
    for atoms, run_together in zip(structures, together, strict=True):
        alone = relax([atoms], EMT(), fmax=0.01, cell=True)[0]
        assert run_together.converged
        assert np.allclose(alone.atoms.positions, run_together.atoms.positions, atol=1e-8)
        assert run_together.atoms.get_volume() / 4 == pytest.approx(11.56, abs=0.05)
        assert run_together.forces[-1] < 0.01 < run_together.forces[0] + 0.02


def test_a_batch_of_a_network_gives_each_structures_own_results():
    torch.manual_seed(0)
    calculator = FovealCalculator(EquiformerV3(SMALL), device="cpu", dtype="float64", scale=2.0, references={"Cu": -3.0})
    structures = [copper(seed=index) for index in range(3)] + [ase.build.molecule("H2O")]
    for limit in (50_000, 1):
        for atoms, found in zip(structures, calculator.batch(structures, max_edges=limit), strict=True):
            atoms.calc = calculator
            assert found["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
            assert np.allclose(found["forces"], atoms.get_forces(), atol=1e-9)
            assert ("stress" in found) == atoms.pbc.all()
            if "stress" in found:
                assert np.allclose(found["stress"], atoms.get_stress(), atol=1e-9)


def test_relax_writes_the_relaxed_structures_their_steps_and_a_picture(tmp_path, capsys):
    ase.io.write(tmp_path / "cu.extxyz", [copper(seed=1), copper(seed=2)])
    assert run(["graphs3d", "relax", str(tmp_path / "cu.extxyz"), "-o", str(tmp_path / "out"), "--method", "emt", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"][0]["numbers"]["converged"] == 2
    relaxed = ase.io.read(tmp_path / "out" / "cu_relaxed.extxyz", ":")
    assert all(np.abs(atoms.get_forces()).max() < 0.02 for atoms in relaxed)
    rows = list(csv.DictReader((tmp_path / "out" / "cu_relaxation.csv").open()))
    assert len(rows) == len(ase.io.read(tmp_path / "out" / "cu_relaxation.traj", ":"))
    assert (tmp_path / "out" / "cu_relaxation.png").stat().st_size > 1000


def test_relaxation_that_does_not_converge_is_told_of_and_written(tmp_path, capsys):
    ase.io.write(tmp_path / "cu.extxyz", copper())
    assert run(["graphs3d", "relax", str(tmp_path / "cu.extxyz"), "-o", str(tmp_path), "--method", "emt", "--steps", "1"]) == 2
    assert "not so in structure 0" in capsys.readouterr().err
    assert (tmp_path / "cu_relaxed.extxyz").exists()


def test_dynamics_by_forces_that_are_derivatives_keeps_the_energy():
    moved = run_dynamics(copper(3.61), EMT(), time=1.0, timestep=2.0, temperature=300, equilibration=0.1, every=5)
    assert abs(moved.drift) < 1.0
    assert moved.fluctuation < 1.0
    assert moved.rows[1:, 2].min() > 0
    hot = run_dynamics(copper(3.61).repeat(2), EMT(), time=1.0, timestep=4.0, ensemble="nvt", temperature=600, equilibration=0.5, friction=20.0)
    assert 400 < hot.temperature < 800


def test_drift_is_the_slope_an_atom():
    times = np.linspace(0, 10, 50)
    assert energy_drift(times, 5 + 0.012 * times, 4) == pytest.approx((3.0, 0.0), abs=1e-9)


def test_md_writes_a_trajectory_with_velocities_energies_and_the_drift(tmp_path, capsys, weights):
    ase.io.write(tmp_path / "water.xyz", ase.build.molecule("H2O"))
    command = ["graphs3d", "md", str(tmp_path / "water.xyz"), "-o", str(tmp_path), "--checkpoint", str(weights), "--time", "0.02"]
    assert run([*command, "--equilibration", "0.005", "--every", "4", "--temperature", "50", "--device", "cpu"]) == 0
    frames = ase.io.read(tmp_path / "water_md.traj", ":")
    assert len(frames) == 11
    assert np.abs(frames[-1].get_velocities()).max() > 0
    summary = json.loads((tmp_path / "water_md.json").read_text())
    assert abs(summary["runs"][0]["drift meV/atom/ps"]) < 50
    assert len((tmp_path / "water_md.csv").read_text().splitlines()) == 12


def test_equation_of_state_finds_the_volume_and_bulk_modulus_from_a_wrong_cell():
    fit = equation_of_state(copper(3.75, 0.0), EMT())
    assert fit.volume / 4 == pytest.approx(11.565, abs=0.005)
    assert fit.bulk_modulus == pytest.approx(134.4, abs=1.5)
    with pytest.raises(UserError, match="periodic in all directions"):
        equation_of_state(ase.build.molecule("H2O"), EMT())


def test_eos_command_writes_numbers_and_a_picture(tmp_path):
    ase.io.write(tmp_path / "cu.cif", copper(3.6, 0.0))
    assert run(["graphs3d", "eos", str(tmp_path / "cu.cif"), "-o", str(tmp_path), "--method", "emt", "--points", "7"]) == 0
    assert json.loads((tmp_path / "cu_eos.json").read_text())["structures"][0]["bulk modulus GPa"] == pytest.approx(134.4, abs=1.5)


def test_phonons_of_a_crystal_are_real_and_start_at_zero():
    pytest.importorskip("phonopy")
    bands = crystal_phonons(ase.build.bulk("Cu", "fcc", a=3.59), EMT(), supercell=(3, 3, 3), points=9, mesh=15.0)
    every = np.concatenate(bands.frequencies)
    assert every.min() > -0.02
    assert 6.0 < every.max() < 8.5  # 7.2 THz measured in copper
    assert bands.marks[0][1] == "G"
    assert abs(bands.frequencies[0][0]).max() < 0.02
    heat = bands.thermal[np.argmin(abs(bands.thermal[:, 0] - 300)), 3]
    assert 22.0 < heat < 24.94  # Dulong and Petit from below


def test_molecules_have_six_modes_of_no_frequency():
    torch.manual_seed(0)
    calculator = FovealCalculator(EquiformerV3(SMALL), device="cpu", dtype="float64")
    water = relax([ase.build.molecule("H2O")], calculator, fmax=1e-5, steps=3000, optimizer="bfgs")[0]
    energies = abs(1000 * molecule_modes(water.atoms, calculator).get_energies())
    assert (np.sort(energies)[:6] < 1.0).all()
    assert water.converged


def test_label_makes_data_that_training_reads(tmp_path):
    ase.io.write(tmp_path / "cu.xyz", copper())
    command = ["graphs3d", "label", str(tmp_path / "cu.xyz"), "-o", str(tmp_path), "--method", "emt", "--frames", "3"]
    assert run([*command, "--temperature", "500", "--every", "5"]) == 0
    frames = ase.io.read(tmp_path / "cu_labelled.extxyz", ":")
    assert len(frames) == 3
    for frame in frames:
        again = frame.copy()
        again.calc = EMT()
        assert frame.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-5)
        assert np.allclose(frame.get_forces(), again.get_forces(), atol=1e-5)
        assert np.allclose(frame.get_stress(), again.get_stress(), atol=1e-6)
    assert abs(frames[0].positions - frames[2].positions).max() > 1e-3


def test_label_by_gfn2_gives_energy_and_forces_of_molecules(tmp_path):
    pytest.importorskip("tblite")
    ase.io.write(tmp_path / "water.xyz", ase.build.molecule("H2O"))
    assert run(["graphs3d", "label", str(tmp_path / "water.xyz"), "-o", str(tmp_path)]) == 0
    water = ase.io.read(tmp_path / "water_labelled.extxyz")
    assert water.get_potential_energy() == pytest.approx(-137.9678, abs=1e-3)
    assert np.abs(water.get_forces().sum(0)).max() < 1e-6


BAD = {
    "unknown element": (lambda: ase.Atoms("Fe", positions=[[0, 0, 0]]), "trained on"),
    "overlapping atoms": (lambda: ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.01]]), "at least 0.05 A apart"),
    "cell without volume": (lambda: ase.Atoms("Cu", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 3]], pbc=True), "independent lattice vectors"),
    "positions that are no numbers": (lambda: ase.Atoms("H", positions=[[np.nan, 0, 0]]), "finite positions"),
}


@pytest.mark.parametrize("verb", ["evaluate", "relax", "md", "phonons"])
@pytest.mark.parametrize("name", BAD)
def test_structure_that_cannot_be_computed_is_one_line_and_does_not_stop_the_others(verb, name, weights, tmp_path, capsys):
    make, message = BAD[name]
    ase.io.write(tmp_path / "bad.traj", make())
    ase.io.write(tmp_path / "good.xyz", ase.Atoms("H", positions=[[0, 0, 0]]))
    command = ["graphs3d", verb, str(tmp_path / "bad.traj"), str(tmp_path / "good.xyz"), "-o", str(tmp_path), "--checkpoint", str(weights)]
    more = ["--time", "0.002", "--equilibration", "0"] if verb == "md" else []
    assert run([*command, *more, "--device", "cpu", "--json"]) == 2
    files = json.loads(capsys.readouterr().out)["files"]
    assert [entry["state"] for entry in files] == ["failed", "done"]
    assert message in files[0]["message"]
    assert "\n" not in files[0]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["relax", "--method", "dft"], "--method gfn2, gfn1, emt"),
        (["relax", "--method", "emt", "--optimizer", "sgd"], "--optimizer"),
        (["relax", "--method", "emt", "--fmax", "0"], "--fmax"),
        (["md", "--method", "emt", "--ensemble", "npt"], "nve or nvt"),
        (["md", "--method", "emt", "--timestep", "-1"], "--timestep"),
        (["eos", "--method", "emt", "--span", "0.7"], "--span"),
        (["eos", "--method", "emt", "--equation", "linear"], "--equation"),
        (["label", "--frames", "-1"], "--frames"),
        (["phonons", "--method", "emt", "--displacement", "0"], "--displacement"),
        (["evaluate", "--dtype", "float16"], "float32 or float64"),
    ],
)
def test_option_that_cannot_be_is_one_line(arguments, message, tmp_path, capsys, weights):
    ase.io.write(tmp_path / "cu.xyz", copper())
    checkpoint = ["--checkpoint", str(weights)] if arguments[0] == "evaluate" else []
    assert run(["graphs3d", arguments[0], str(tmp_path / "cu.xyz"), "-o", str(tmp_path / "o"), *arguments[1:], *checkpoint]) == 2
    error = capsys.readouterr()
    assert message in error.err + error.out


@pytest.mark.parametrize("verb", ["label", "relax", "md", "phonons", "evaluate"])
def test_atoms_on_one_another_are_named_also_where_a_method_would_answer_with_nan(verb, weights, tmp_path, capsys):
    atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True)
    atoms.positions[2] = atoms.positions[1]
    ase.io.write(tmp_path / "twice.xyz", atoms)
    chosen = ["--checkpoint", str(weights), "--device", "cpu"] if verb == "evaluate" else ["--method", "emt"]
    assert run(["graphs3d", verb, str(tmp_path / "twice.xyz"), "-o", str(tmp_path / "o"), "--json", *chosen]) == 2
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert "expected atoms at least 0.05 A apart; atoms 1 and 2 are 0 A apart" in entry["message"].replace("atoms 2 and 1", "atoms 1 and 2")
    assert not (tmp_path / "o").exists()


def test_the_picture_of_a_molecules_vibrations_leaves_the_motions_of_the_whole_apart():
    waves = np.array([-150.0, -0.3, 0.1, 900.0])
    figure = draw_modes(waves, np.array([False, True, True, False]), "HCl")
    whole, real, imaginary = figure.axes[0].collections
    assert [len(lines.get_segments()) for lines in (whole, real, imaginary)] == [2, 1, 1]
    assert figure.axes[0].get_title(loc="left") == "HCl, 2 vibrations (grey: the 2 motions of the whole)"


def test_an_empty_file_is_named_and_what_exists_is_kept(tmp_path, capsys):
    (tmp_path / "empty.xyz").write_text("")
    ase.io.write(tmp_path / "cu.xyz", copper(3.6, 0.0))
    command = ["graphs3d", "relax", str(tmp_path / "empty.xyz"), str(tmp_path / "cu.xyz"), "-o", str(tmp_path / "o"), "--method", "emt", "--json"]
    assert run(command) == 2
    assert "empty.xyz" in json.loads(capsys.readouterr().out)["files"][1]["message"]
    assert run(command) == 2
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"


def test_files_of_one_stem_get_results_of_their_own(tmp_path):
    paths = [tmp_path / "a" / "cu.cif", tmp_path / "b" / "cu.cif", tmp_path / "cu.xyz", tmp_path / "al.xyz"]
    assert stems(paths) == ["cu_cif_1", "cu_cif_2", "cu_xyz", "al"]


@pytest.mark.parametrize("verb", ["evaluate", "relax", "md", "label", "eos"])
def test_a_structure_that_cannot_be_computed_does_not_stop_the_others_of_its_file(verb, weights, tmp_path, capsys):
    """EMT knows no iron, the network of the tests no element above its own."""
    good = ase.build.bulk("Cu", "fcc", a=3.6) if verb in ("label", "eos") else ase.Atoms("H", positions=[[0, 0, 0]])
    bad = ase.build.bulk("Fe", "bcc", a=2.9) if verb in ("label", "eos") else ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.001]])
    ase.io.write(tmp_path / "mixed.traj", [good, bad, good])
    more = {"md": ["--time", "0.002", "--equilibration", "0"], "label": ["--method", "emt"], "eos": ["--method", "emt", "--no-relax"]}.get(verb, [])
    more += [] if verb in ("label", "eos") else ["--checkpoint", str(weights), "--device", "cpu"]
    assert run(["graphs3d", verb, str(tmp_path / "mixed.traj"), "-o", str(tmp_path / "out"), *more, "--json"]) == 2
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert "structure 1: expected" in entry["message"]
    assert "the other structures are written" in entry["message"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    endings = {"evaluate": "predicted.extxyz", "relax": "relaxed.extxyz", "label": "labelled.extxyz"}
    if verb in endings:
        frames = ase.io.read(tmp_path / "out" / f"mixed_{endings[verb]}", ":")
        assert [frame.info["structure"] for frame in frames] == [0, 2]
    else:
        assert {f"mixed_0_{verb}.csv", f"mixed_2_{verb}.csv", f"mixed_{verb}.json"} <= written
        assert f"mixed_1_{verb}.csv" not in written
        json.loads((tmp_path / "out" / f"mixed_{verb}.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
