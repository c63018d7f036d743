"""Structures to learn from: every kind of file gives the same labels, batches stay within their edges, and a stopped epoch goes on."""

from __future__ import annotations

import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from foveal.core.errors import UserError
from foveal.graphs3d.data.edge_batches import EdgeBatches, EdgeBatchLoader, EdgeCounts
from foveal.graphs3d.data.files import StructureFiles
from foveal.graphs3d.data.labelled import Corruption, LabelledGraphs, collate_labelled
from foveal.graphs3d.data.sources import open_structures
from foveal.graphs3d.data.structures import labels_of
from foveal.graphs3d.tasks.references import element_references, force_scale


def labelled(count: int = 4, stress: bool = True) -> list[ase.Atoms]:
    frames = []
    for index in range(count):
        atoms = ase.build.bulk("Cu", "fcc", a=3.6 + 0.01 * index, cubic=True)
        atoms.rattle(0.05, seed=index)
        forces = np.random.default_rng(index).normal(size=(len(atoms), 3))
        given = {"energy": -1.5 * index, "forces": forces} | ({"stress": np.arange(6.0)} if stress else {})
        atoms.calc = SinglePointCalculator(atoms, **given)
        frames.append(atoms)
    return frames


def write(path, frames):
    if path.suffix == ".db":
        with ase.db.connect(path) as database:
            for atoms in frames:
                database.write(atoms)
    elif path.suffix == ".aselmdb":
        aselmdb = pytest.importorskip("ase_db_backends.aselmdb")
        with aselmdb.LMDBDatabase(path) as database:
            for atoms in frames:
                database.write(atoms)
    else:
        ase.io.write(path, frames, format="extxyz")
    return path


@pytest.mark.parametrize("name", ["a.extxyz", "a.extxyz.xz", "a.db", "a.aselmdb"])
def test_every_kind_of_file_gives_the_same_labels(name, tmp_path):
    frames = labelled()
    found = open_structures(write(tmp_path / name, frames))
    assert len(found) == len(frames)
    for index, atoms in enumerate(frames):
        for label, value in labels_of(atoms).items():
            assert np.allclose(labels_of(found[index])[label], value, atol=1e-7), (label, index)
        assert np.allclose(found[index].positions, atoms.positions, atol=1e-7)


def test_a_folder_holds_the_structures_of_its_files_in_the_order_of_names(tmp_path):
    frames = labelled(5)
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "1.extxyz", frames[:2])
    write(tmp_path / "deep" / "2.db", frames[2:])
    energies = [atoms.get_potential_energy() for atoms in open_structures(tmp_path)]
    assert energies == pytest.approx([atoms.get_potential_energy() for atoms in frames])
    assert open_structures([str(tmp_path / "deep" / "2.db"), str(tmp_path / "deep" / "1.extxyz")])[3].get_potential_energy() == pytest.approx(0.0)


def test_database_rows_are_read_in_a_worker_process(tmp_path):
    rows = open_structures(write(tmp_path / "a.db", labelled(6)))
    loader = EdgeBatchLoader(LabelledGraphs(rows, 3.0), [1] * 6, 2, None, shuffle=False, num_workers=1, collate_fn=collate_labelled)
    assert torch.cat([batch.energy for batch in loader]).tolist() == pytest.approx([-1.5 * index for index in range(6)])


def test_labels_with_the_prefix_of_other_tools_are_taken():
    atoms = ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]])
    atoms.info["REF_energy"] = -2.0
    atoms.arrays["REF_forces"] = np.ones((2, 3))
    item = LabelledGraphs([atoms], 3.0)[0]
    assert item.energy.item() == -2.0
    assert torch.equal(item.forces, torch.ones(2, 3, dtype=torch.float64))
    assert torch.isnan(item.stress).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.extxyz", "does not exist"),
        (lambda path: path, "found none"),
        (lambda path: _text(path / "a.xyz", ""), "cannot be read|empty"),
        (lambda path: _text(path / "a.lmdb", "x"), "cannot be read"),
        (lambda path: _text(path / "a.db", "not a database"), "cannot be read"),
        (lambda path: [], "list is empty"),
    ],
)
def test_what_holds_no_structures_is_refused_in_one_line(make, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        open_structures(make(tmp_path))
    assert "\n" not in str(caught.value)


def _text(path, text):
    path.write_text(text)
    return path


def test_fixed_atoms_are_told_apart():
    atoms = labelled(1)[0]
    atoms.set_constraint(FixAtoms([0, 2]))
    assert LabelledGraphs([atoms], 3.0)[0].free.tolist() == [False, True, False, True]


def test_batches_stay_within_their_edges_and_hold_every_structure_once():
    edges = np.random.default_rng(0).integers(1, 60, 100).tolist()
    packing = EdgeBatches(edges, 8, 100)
    for epoch in range(3):
        packing.set_epoch(epoch)
        batches = packing.batches()
        assert sorted(index for batch in batches for _, index in batch) == list(range(100))
        assert all(sum(edges[index] for _, index in batch) <= 100 and len(batch) <= 8 for batch in batches)
    assert len(EdgeBatches([500, 500], 8, 100)) == 2


def test_every_epoch_has_as_many_batches_as_the_first():
    """Lightning counts them once: an epoch with fewer would go without its validation, one with more without its last batches."""
    edges = np.random.default_rng(1).integers(1, 60, 60).tolist()
    packing = EdgeBatches(edges, 8, 100)
    counts, orders = set(), set()
    for epoch in range(12):
        packing.set_epoch(epoch)
        batches = packing.batches()
        counts.add(len(batches))
        orders.add(tuple(index for batch in batches for _, index in batch))
        assert sorted(index for batch in batches for _, index in batch) == list(range(60))
        assert all(sum(edges[index] for _, index in batch) <= 100 and len(batch) <= 8 for batch in batches)
    assert len(counts) == 1
    assert len(orders) == 12
    resumed = EdgeBatches(edges, 8, 100)
    resumed.set_epoch(5)
    packing.set_epoch(5)
    assert resumed.batches() == packing.batches()


def crowd(count: int, seed: int = 0) -> list[ase.Atoms]:
    """Rows of 2 to 12 atoms, 1 A apart: a cutoff of 1.5 A gives two edges fewer than twice the atoms."""
    sizes = np.random.default_rng(seed).integers(2, 13, count)
    return [ase.Atoms("H" * size, positions=np.stack([np.arange(size), np.zeros(size), np.zeros(size)], 1)) for size in sizes]


@pytest.mark.parametrize("seed", range(6))
def test_a_large_set_is_packed_as_it_comes_within_its_edges_into_as_many_batches_as_were_said(seed):
    structures = crowd(300, seed)
    edges = [2 * len(atoms) - 2 for atoms in structures]
    for shuffle in (True, False):
        counts = EdgeCounts(LabelledGraphs(structures, 1.5))
        packing = EdgeBatches(counts, 8, 40, shuffle=shuffle, seed=seed, sample=40)
        said = len(packing)
        assert counts.listed == 40, "more was listed than the sample"
        stream = iter(packing)
        next(stream)
        assert counts.listed <= 60, "more was listed than the first batch asks for"
        for epoch in range(3):
            packing.set_epoch(epoch)
            batches = list(packing)
            assert len(batches) == said == len(packing)
            items = [index for batch in batches for _, index in batch]
            assert len(items) == len(set(items))
            assert len(items) >= (0.85 if shuffle else 1.0) * len(structures), "what a rough sample is wrong by"
            assert all(sum(edges[index] for _, index in batch) <= 40 and 0 < len(batch) <= 8 for batch in batches)


def test_a_stopped_epoch_of_a_large_set_goes_on_without_listing_what_is_done():
    def loader():
        counts = EdgeCounts(LabelledGraphs(crowd(900), 1.5))
        return counts, EdgeBatchLoader(LabelledGraphs(crowd(900), 1.5), counts, 8, 40, collate_fn=collate_labelled)

    _, first = loader()
    stream = iter(first)
    for _ in range(60):
        next(stream)
    state = first.state_dict()
    rest = [batch.graph.numbers.tolist() for batch in stream]
    counts, second = loader()
    second.load_state_dict(state)
    resumed = iter(second)
    again = [next(resumed).graph.numbers.tolist() for _ in range(5)]
    assert again == rest[:5]
    assert counts.listed < 500 + 60, "of what is done no more than the sample is listed"
    assert again + [batch.graph.numbers.tolist() for batch in resumed] == rest
    older = {name: value for name, value in state.items() if name != "begin"}
    _, third = loader()
    third.load_state_dict(older)
    assert [batch.graph.numbers.tolist() for batch in third] == rest, "as a run of several processes does"


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_a_large_set_and_have_equally_many_batches(shares, shuffle):
    found = shares(EdgeCounts(LabelledGraphs(crowd(302), 1.5)), 8, 40, shuffle=shuffle, sample=60)
    assert len({len(share) for share in found}) == 1
    items = [index for share in found for batch in share for index in batch]
    assert len(items) == len(set(items))
    assert len(items) >= (0.85 if shuffle else 1.0) * 302


@pytest.fixture
def shares(monkeypatch):
    """What each of three processes is given."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 3)

    def of_each(*arguments, **options) -> list[list[list[int]]]:
        found = []
        for rank in range(3):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
            found.append([[index for _, index in batch] for batch in EdgeBatches(*arguments, **options).batches()])
        return found

    return of_each


def test_processes_take_turns_at_the_batches_and_have_equally_many(shares):
    found = shares(list(range(1, 42)), 4, 60)
    assert len({len(share) for share in found}) == 1
    items = [index for share in found for batch in share for index in batch]
    assert len(items) == len(set(items))


@pytest.mark.parametrize(("structures", "batch_size"), [(3, 4), (5, 4), (8, 4), (41, 4), (4, 1)])
def test_processes_measure_every_structure(shares, structures, batch_size):
    found = shares([1] * structures, batch_size, None, shuffle=False)
    assert len({len(share) for share in found}) == 1
    items = [index for share in found for batch in share for index in batch]
    assert set(items) == set(range(structures))
    assert len(items) == structures or batch_size == 1, "only single structures that do not come out even are measured twice"


def test_every_process_has_something_to_learn_from(shares):
    assert sorted(index for share in shares([1] * 4, 4) for batch in share for index in batch) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="at least 3 structures, one for each process; got 2; use fewer processes"):
        shares([1, 1], 4)


def test_a_stopped_epoch_goes_on_with_the_batches_that_were_left():
    def loader():
        return EdgeBatchLoader(LabelledGraphs(labelled(7), 3.0, corruption=Corruption()), [3, 1, 2, 3, 1, 2, 3], 4, 5, collate_fn=collate_labelled)

    whole = [batch.graph.positions for batch in loader()]
    first = loader()
    stream = iter(first)
    next(stream)
    next(stream)
    second = loader()
    second.load_state_dict(first.state_dict())
    rest = [batch.graph.positions for batch in second]
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[2:], strict=True))


def test_other_packing_than_the_stopped_one_is_refused():
    loaders = [EdgeBatchLoader(LabelledGraphs(labelled(3), 3.0), [1, 1, 1], 2, limit, collate_fn=collate_labelled) for limit in (2, 3)]
    with pytest.raises(UserError, match="max_edges 2"):
        loaders[1].load_state_dict(loaders[0].state_dict())


def test_corruption_moves_free_atoms_by_what_it_says():
    atoms = labelled(1)[0].repeat((3, 3, 3))
    atoms.calc = SinglePointCalculator(atoms, forces=np.zeros((len(atoms), 3)))
    atoms.set_constraint(FixAtoms(range(40)))
    torch.manual_seed(0)
    item = LabelledGraphs([atoms], 3.0, corruption=Corruption(probability=1.0, ratio=0.5, std=0.1))[0]
    moved = item.graph.positions - torch.from_numpy(atoms.positions)
    assert torch.allclose(moved, 0.1 * item.noise.shift)
    assert not item.noise.corrupted[:40].any()
    assert 0.3 < item.noise.corrupted[40:].double().mean() < 0.7
    assert 0.8 < item.noise.shift[item.noise.corrupted].std() < 1.2
    assert (item.noise.shift[~item.noise.corrupted] == 0).all()
    assert not LabelledGraphs([atoms], 3.0, corruption=Corruption(probability=0.0))[0].noise.corrupted.any()


def test_references_are_the_energies_that_structures_were_made_of():
    structures = [ase.Atoms(formula, positions=np.zeros((len(ase.Atoms(formula)), 3))) for formula in ("H2O", "CH4", "C2H6O", "CO2")]
    true = {1: -13.0, 6: -1030.0, 8: -2040.0}
    energies = [sum(true[number] for number in atoms.numbers) for atoms in structures]
    references = element_references(structures, [*energies[:3], float("nan")], 20)
    assert [references[number] for number in true] == pytest.approx(list(true.values()))
    assert np.count_nonzero(references) == 3


def test_scale_is_the_force_components_root_mean_square():
    frames = labelled(3)
    forces = np.concatenate([atoms.get_forces() for atoms in frames])
    assert force_scale(frames) == pytest.approx(np.sqrt(np.square(forces).mean()))
    with pytest.raises(UserError, match="REF_energy"):
        force_scale([ase.Atoms("H")])


def test_held_out_structures_are_not_trained_on(tmp_path):
    write(tmp_path / "a.extxyz", labelled(20, stress=False))
    data = StructureFiles(str(tmp_path / "a.extxyz"), validation=0.25, frames=12)
    data.setup("fit")
    energies = [{float(atoms.get_potential_energy()) for atoms in part} for part in (data.train_structures, data.validation_structures)]
    assert [len(part) for part in energies] == [9, 3]
    assert not energies[0] & energies[1]
    with pytest.raises(UserError, match="share"):
        StructureFiles(str(tmp_path / "a.extxyz"), validation=1.5).setup("fit")
    with pytest.raises(UserError, match=r"data\.test"):
        StructureFiles(str(tmp_path / "a.extxyz")).setup("test")
