"""What a potential must obey, in float64: it turns with its atoms, forces and stress are its derivatives, and it is smooth everywhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import ase
import ase.build
import numpy as np
import pytest
import torch

from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.data.neighbors import NeighborList, collate
from foveal.graphs3d.dynamics import run_dynamics
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config, symmetric_matrix
from foveal.graphs3d.models.harmonics import spherical_harmonics
from foveal.kernels import CSR, segment_attention

CONFIG = EquiformerV3Config(
    layers=2, channels=8, lmax=3, attention_hidden=8, heads=2, alpha_channels=6, value_channels=4, ffn_hidden=12, edge_channels=8, radial=8,
    attention_grid=(10, 8), ffn_grid=(10, 10), cutoff=4.0, max_elements=20,
)  # fmt: skip


def network(**changes) -> EquiformerV3:
    torch.manual_seed(0)
    model = EquiformerV3(replace(CONFIG, **changes)).double().eval()
    with torch.no_grad():
        # Biases of zero and norms of one would hide mistakes.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def graph_of(atoms: ase.Atoms):
    return NeighborList(CONFIG.cutoff)(atoms)


def crystal() -> ase.Atoms:
    atoms = ase.build.bulk("NaCl", "rocksalt", a=4.1, cubic=True)[:5]
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.04 * np.random.default_rng(1).standard_normal((3, 3))), scale_atoms=True)
    atoms.rattle(0.1, seed=2)
    return atoms


def molecule() -> ase.Atoms:
    atoms = ase.build.molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=3)
    return atoms


STRUCTURES = {"crystal": crystal, "molecule": molecule}
FORMS = {"gradient": {}, "direct": {"direct": True}}


def rotation(seed: int) -> torch.Tensor:
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return matrix * torch.linalg.det(matrix)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form", FORMS)
def test_rotating_the_atoms_rotates_forces_and_stress_and_leaves_the_energy(form, structure, seed):
    model, atoms, turn = network(**FORMS[form]), STRUCTURES[structure](), rotation(seed)
    before = model(*graph_of(atoms))
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.numpy().T)
    turned.positions = atoms.positions @ turn.numpy().T
    after = model(*graph_of(turned))
    assert error(after.energy, before.energy) < 1e-10
    assert error(after.forces, before.forces @ turn.T) < 1e-10
    if structure == "crystal":
        assert error(after.stress, turn @ before.stress @ turn.T) < 1e-10


@pytest.mark.parametrize("form", FORMS)
def test_moving_and_reordering_atoms_changes_nothing_else(form):
    model, atoms = network(**FORMS[form]), crystal()
    before = model(*graph_of(atoms))
    order = np.array([3, 0, 4, 2, 1])
    moved = atoms[order]
    moved.positions += [0.7, -1.3, 9.0]
    moved.wrap()
    after = model(*graph_of(moved))
    assert error(after.energy, before.energy) < 1e-11
    assert error(after.forces, before.forces[order]) < 1e-10
    assert error(after.stress, before.stress) < 1e-10


def test_a_network_without_enough_points_on_the_sphere_would_not_be_equivariant(monkeypatch):
    """The tests above have power: two latitudes fewer break them."""
    from foveal.graphs3d.models import equivariant
    from foveal.graphs3d.models.sphere import product_grid, sphere_grid

    exact = sphere_grid(3, None, 10, 10)
    coarse = sphere_grid(3, None, 10, 10)[0].reshape(10, 10, 16)[::2].reshape(50, 16)
    back = torch.linalg.pinv(coarse)
    assert torch.allclose(back @ coarse, exact[1] @ exact[0], atol=1e-10)
    model, atoms, turn = network(), molecule(), rotation(0)
    monkeypatch.setattr(equivariant, "product_grid", lambda lmax, mmax, *rest: (coarse, back) if mmax is None else product_grid(lmax, mmax, *rest))
    before = model(*graph_of(atoms))
    atoms.positions = atoms.positions @ turn.numpy().T
    assert error(model(*graph_of(atoms)).energy, before.energy) > 1e-8


def test_a_supercell_has_as_many_times_the_energy_and_the_same_forces():
    model, atoms = network(), crystal()
    one, two = model(*graph_of(atoms)), model(*graph_of(atoms.repeat((2, 1, 1))))
    assert error(two.energy, 2 * one.energy) < 1e-11
    assert error(two.forces, one.forces.repeat(2, 1)) < 1e-10
    assert error(two.stress, one.stress) < 1e-10


def test_structures_of_a_batch_do_not_know_each_other():
    model = network()
    graphs = [graph_of(crystal()), graph_of(molecule()), graph_of(ase.Atoms("Na", positions=[[0, 0, 0]]))]
    together, alone = model(*collate(graphs)), [model(*graph) for graph in graphs]
    for name in ("energy", "forces", "stress", "node_energy"):
        assert torch.allclose(getattr(together, name), torch.cat([getattr(single, name) for single in alone]), atol=1e-12), name
    assert (together.forces[-1] == 0).all()


def axis_aligned() -> ase.Atoms:
    """Every kind of edge along y: inside the cell, and to an atom's own images."""
    return ase.Atoms("NaClNa", positions=[[0, 0, 0], [0, 2.1, 0], [1.9, 0.3, 0.2]], cell=np.diag([3.9, 3.7, 3.8]), pbc=True)


@pytest.mark.parametrize("make", [crystal, molecule, axis_aligned])
def test_forces_and_stress_are_derivatives_of_the_energy(make):
    model, atoms = network(), make()
    graph = graph_of(atoms)
    with torch.no_grad():
        prediction = model(*graph)

    def energy(positions: torch.Tensor, cell: torch.Tensor) -> float:
        with torch.no_grad():
            return float(model(*graph._replace(positions=positions, cell=cell)).energy)

    step = 1e-4
    for atom in range(2):
        for axis in range(3):
            shift = torch.zeros_like(graph.positions)
            shift[atom, axis] = step
            slope = (energy(graph.positions + shift, graph.cell) - energy(graph.positions - shift, graph.cell)) / (2 * step)
            assert float(prediction.forces[atom, axis]) == pytest.approx(-slope, abs=3e-7 * float(prediction.forces.abs().max()))
    if atoms.pbc.all():
        volume = atoms.get_volume()
        for row, column in ((0, 0), (1, 1), (0, 1), (1, 2)):
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[row, column] += step / 2
            strain[column, row] += step / 2
            bent = [energy(*(tensor @ (torch.eye(3, dtype=torch.float64) + sign * strain) for tensor in graph[1:3])) for sign in (1, -1)]
            slope = (bent[0] - bent[1]) / (2 * step) / volume
            assert float(prediction.stress[0, row, column]) == pytest.approx(slope, abs=1e-6 * float(prediction.stress.abs().max()))


def test_energy_jumps_near_the_polar_axis_only_where_edges_are_snapped_as_by_the_authors():
    """The defect that is mended by default, and that the flag brings back: at 1.41 mrad from the axis the energy jumps."""
    jumps, forces = {}, {}
    for snap in (False, True):
        model, energies = network(snap_axis=snap), []
        for angle in (1.4142e-3 - 1e-7, 1.4142e-3 + 1e-7):
            atoms = ase.Atoms("NaClNa", positions=[[0, 0, 0], [2.1 * np.sin(angle), 2.1 * np.cos(angle), 0], [1.9, 0.3, 0.2]])
            prediction = model(*graph_of(atoms))
            energies.append(prediction.energy.item())
            forces.setdefault(snap, prediction.forces.detach())
        jumps[snap] = abs(energies[1] - energies[0])
    slope = 2.1 * 2e-7 * float(forces[False].abs().max())
    assert jumps[False] < slope
    assert jumps[True] > 10 * slope
    assert error(forces[True], forces[False]) > 1e-3


def test_nothing_jumps_while_an_edge_passes_the_polar_axis_and_the_swap_of_axes():
    model = network()
    angles = torch.cat(
        (torch.linspace(-3e-3, 3e-3, 13, dtype=torch.float64), 0.7227342478134157 + torch.linspace(-1e-6, 1e-6, 3, dtype=torch.float64))
    )
    found = []
    for angle in angles.tolist():
        atoms = ase.Atoms("NaClNa", positions=[[0, 0, 0], [2.1 * np.sin(angle), 2.1 * np.cos(angle), 0], [1.9, 0.3, 0.2]])
        prediction = model(*graph_of(atoms))
        found.append(torch.cat((prediction.energy, prediction.forces.flatten())).detach())
    values = torch.stack(found)
    # Second differences over equal steps of a smooth function are of the order of the squared step.
    bends = (values[2:13] - 2 * values[1:12] + values[:11]).abs().max() / values.abs().max()
    assert bends < 1e-5
    assert (values[13:] - values[14]).abs().max() / values.abs().max() < 1e-5


def test_nothing_jumps_while_an_atom_crosses_the_cutoff():
    model = network()

    def at(distance: float) -> torch.Tensor:
        atoms = ase.Atoms("NaClNa", positions=[[0, 0, 0], [0.3, 2.0, 0.4], [distance, 0, 0]])
        prediction = model(*graph_of(atoms))
        return torch.cat((prediction.energy, prediction.forces.flatten())).detach()

    values = torch.stack([at(CONFIG.cutoff + offset) for offset in np.arange(-5, 6) * 1e-4])
    assert (values[1:] - values[:-1]).abs().max() < 1e-6
    lone = [float(network()(*graph_of(ase.Atoms("Na2", positions=[[0, 0, 0], [distance, 0, 0]]))).energy) for distance in (3.9999, 4.0001)]
    assert abs(lone[0] - lone[1]) < 1e-6


def test_forces_can_be_trained_on_and_cost_no_graph_without_gradients():
    model, graph = network().train(), graph_of(molecule())
    loss = model(*graph).forces.square().sum()
    loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if "energy.2.bias" not in name
    )
    expected = model(*graph).forces.detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            forces = model(*(tensor.clone() for tensor in graph)).forces
        assert not forces.requires_grad
        assert torch.allclose(forces, expected)


def test_the_stress_heads_matrix_is_symmetric_and_turns_with_its_parts():
    """A scalar and a degree-2 feature of a direction n are I and n n^T - I / 3, up to a factor."""
    turn = rotation(4)
    matrix = symmetric_matrix(torch.tensor([0.0], dtype=torch.float64), spherical_harmonics(turn[:1], 2)[:, 4:])
    expected = torch.outer(turn[0], turn[0]) - torch.eye(3, dtype=torch.float64) / 3
    assert error(matrix[0] / matrix[0].norm(), expected / expected.norm()) < 1e-12
    assert torch.allclose(symmetric_matrix(torch.ones(1), torch.zeros(1, 5))[0], torch.eye(3) / 3**0.5)


def test_attention_over_edges_has_right_first_and_second_derivatives():
    """Forces that are learned are differentiated twice, through softmax, envelope and the frames of edges."""
    target = torch.tensor([0, 0, 0, 1, 1, 3])
    csr = CSR.from_edge_index(torch.stack((torch.tensor([1, 2, 3, 0, 2, 1]), target)), 4)
    values, logits, inside = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 2, 3), (6, 2), (6,)))

    def attend(values, logits, inside):
        weight = torch.sigmoid(inside)
        return segment_attention(None, None, values, csr, edge_bias=logits, edge_envelope=weight, edge_gate=weight, values_on_edges=True, eps=1e-8)

    assert torch.autograd.gradcheck(attend, (values, logits, inside))
    assert torch.autograd.gradgradcheck(attend, (values, logits, inside))


def test_the_hessian_is_symmetric_and_moving_the_whole_molecule_costs_nothing():
    model = network(layers=1)
    numbers, positions, *rest = graph_of(molecule()[:4])

    def forces(positions):
        return model(numbers, positions, *rest).forces.flatten()

    matrix = torch.autograd.functional.jacobian(forces, positions).reshape(12, 12)
    assert error(matrix, matrix.T) < 1e-9
    assert matrix.reshape(12, 4, 3).sum(1).abs().max() < 1e-9 * matrix.abs().max()


@pytest.mark.slow
def test_five_thousand_atoms_fit_in_two_gigabytes():
    """A narrow network; in a process of its own, whose peak is then its."""
    code = """
import resource, torch, ase.build
from dataclasses import replace
from foveal.graphs3d.data.neighbors import NeighborList
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
atoms = ase.build.bulk("Cu", "fcc", a=3.6, cubic=True).repeat((10, 25, 5))
assert len(atoms) == 5000
config = EquiformerV3Config(layers=1, channels=8, lmax=2, attention_hidden=4, heads=2, alpha_channels=4, value_channels=4, ffn_hidden=8,
    edge_channels=8, radial=8, attention_grid=(8, 8), ffn_grid=(8, 8), cutoff=4.0)
graph = NeighborList(4.0)(atoms).to(dtype=torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    found = EquiformerV3(config)(*graph)
assert found.forces.abs().max() < 1e-3
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 2.0


@pytest.mark.slow
def test_ethanol_keeps_its_energy_by_the_bundled_potential():
    drift = run_dynamics(ase.build.molecule("CH3CH2OH"), FovealCalculator.from_pretrained(device="cpu"), time=1.0, equilibration=0.2).drift
    assert abs(drift) < 1.0
