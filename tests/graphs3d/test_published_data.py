"""The published sets in the layouts of their files: OC20's pickled rows, OMat24's ASE rows, MPtrj's JSON; and that a pickle cannot run anything."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import types
import zlib
from pathlib import Path

import ase
import ase.units
import numpy as np
import pytest
import torch
from ase.db.row import AtomsRow
from ase.io.jsonio import encode

from foveal.core.errors import UserError
from foveal.graphs3d.data import mptrj
from foveal.graphs3d.data.edge_batches import EdgeBatchLoader
from foveal.graphs3d.data.files import StructureFiles
from foveal.graphs3d.data.labelled import LabelledGraphs, collate_labelled
from foveal.graphs3d.data.oc20 import unpickled
from foveal.graphs3d.data.sources import open_structures
from foveal.graphs3d.data.structures import labels_of

GOLDEN = Path(__file__).parents[1] / "golden" / "graphs3d"
#: One row as PyTorch Geometric 2.8 pickles it: Pt, C and O in a cell of 10 A, the Pt fixed.
NEW_ROW = (GOLDEN / "oc20_row_of_geometric_2.pickle").read_bytes()


@pytest.fixture
def older_geometric(monkeypatch):
    """The module of PyTorch Geometric before version 2: attributes stand in the object itself."""
    for name in ("torch_geometric", "torch_geometric.data", "torch_geometric.data.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("Data", (), {"__module__": "torch_geometric.data.data"})
    sys.modules["torch_geometric.data.data"].Data = kind
    return kind


def written(path: Path, rows: dict[str, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as environment, environment.begin(write=True) as transaction:
        for key, row in rows.items():
            transaction.put(key.encode(), row)
    return path


def test_a_row_of_newer_geometric_is_a_structure_with_labels_and_fixed_atoms(tmp_path):
    path = written(tmp_path / "data.0000.lmdb", {"0": NEW_ROW, "1": NEW_ROW, "length": pickle.dumps(2)})
    rows = open_structures(tmp_path)
    assert len(rows) == 2
    atoms = rows[1]
    assert atoms.get_chemical_symbols() == ["Pt", "C", "O"]
    assert atoms.pbc.all()
    assert np.allclose(atoms.cell.lengths(), 10)
    assert atoms.get_tags().tolist() == [0, 1, 2]
    assert atoms.get_potential_energy() == -1.25
    assert np.array_equal(labels_of(atoms)["forces"], np.arange(9.0).reshape(3, 3))
    assert atoms.info == {"sid": 7, "fid": 3}
    item = LabelledGraphs(open_structures(path), 3.0)[0]
    assert item.free.tolist() == [False, True, True]
    loader = EdgeBatchLoader(LabelledGraphs(rows, 3.0), [1, 1], 2, None, shuffle=False, num_workers=1, collate_fn=collate_labelled)
    assert next(iter(loader)).energy.tolist() == [-1.25, -1.25]


def test_a_row_of_older_geometric_gives_the_same(tmp_path, older_geometric):
    data = older_geometric()
    data.__dict__ |= {
        "x": None, "edge_index": None, "pos": torch.tensor([[0.0, 0, 0], [0, 0, 1.5]]), "cell": 9 * torch.eye(3).unsqueeze(0),
        "atomic_numbers": torch.tensor([29.0, 1.0]), "tags": torch.tensor([0, 2]), "fixed": torch.tensor([1, 0]),
        "y_init": 0.5, "y_relaxed": -0.5, "sid": np.int64(3),
    }  # fmt: skip
    path = written(tmp_path / "data.lmdb", {"0": pickle.dumps(data, protocol=-1)})
    for name in list(sys.modules):
        if name.startswith("torch_geometric"):
            del sys.modules[name]
    atoms = open_structures(path)[0]
    assert str(atoms.symbols) == "CuH"
    assert atoms.get_potential_energy() == 0.5
    assert "forces" not in labels_of(atoms)


class Harm:
    """What an attacker would pickle."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, monkeypatch, older_geometric):
    monkeypatch.chdir(tmp_path)
    data = older_geometric()
    data.pos = Harm()
    for row in (pickle.dumps(Harm()), pickle.dumps(data), NEW_ROW.replace(b"_load_from_bytes", b"_load_from_bytez")):
        with pytest.raises(pickle.UnpicklingError, match="nothing was run"):
            unpickled(row)
    inner = torch.storage._load_from_bytes
    nested = pickle.dumps(Harm())
    data.pos = type("Stored", (), {"__reduce__": lambda self: (inner, (nested,))})()
    with pytest.raises(pickle.UnpicklingError):
        unpickled(pickle.dumps(data))
    with pytest.raises(UserError, match=r"row 0 is none: it asks for \w+.system"):
        open_structures(written(tmp_path / "bad.lmdb", {"0": pickle.dumps(Harm())}))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "empty"),
        ({"0": pickle.dumps(5)}, "it is a int"),
        ({"0": NEW_ROW[:100]}, "row 0 is none"),
        ({"0": NEW_ROW.replace(b"\x03pos", b"\x03pas")}, "it has no 'pos'"),
        ({"0": NEW_ROW, "length": pickle.dumps([2])}, "length cannot be read"),
    ],
)
def test_a_damaged_lmdb_is_refused_in_one_line(rows, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        open_structures(written(tmp_path / "a.lmdb", rows))
    assert "\n" not in str(caught.value)


def omat_row(index: int) -> bytes:
    """A row as the published shards hold it: compressed JSON of ASE's row, results beside the geometry."""
    atoms = ase.Atoms("NaCl", positions=[[0, 0, 0], [0, 0, 2.8]], cell=[5, 5, 5], pbc=True)
    row = AtomsRow(atoms)
    fields = {key: row[key] for key in row.__dict__ if key[0] != "_" and key not in row._keys and key != "id"}
    fields |= {"cell": np.asarray(fields["cell"]), "energy": -3.0 - index, "forces": np.full((2, 3), 0.1 * index), "stress": np.arange(6.0)}
    fields |= {"calculator": "unknown", "calculator_parameters": {}, "key_value_pairs": {}, "data": {"calc_id": 0, "sid": f"agm{index}"}}
    return zlib.compress(encode(fields).encode())


def test_shards_of_omat24_are_read_without_their_deleted_rows(tmp_path):
    pytest.importorskip("ase_db_backends.aselmdb")
    reserved = {"nextid": 4, "deleted_ids": [2], "metadata": {"format": "omat24"}}
    encoded = {key: zlib.compress(json.dumps(value).encode()) for key, value in reserved.items()}
    written(tmp_path / "data0000.aselmdb", {"1": omat_row(1), "3": omat_row(3), **encoded})
    written(tmp_path / "data0001.aselmdb", {"1": omat_row(5), **{**encoded, "nextid": zlib.compress(b"2"), "deleted_ids": zlib.compress(b"[]")}})
    rows = open_structures(tmp_path)
    assert [atoms.get_potential_energy() for atoms in rows] == [-4.0, -6.0, -8.0]
    assert np.allclose(labels_of(rows[1])["forces"], 0.3)
    assert labels_of(rows[2])["stress"].tolist() == list(range(6))
    assert open_structures(tmp_path / "data0001.aselmdb")[0].get_potential_energy() == -8.0
    loader = EdgeBatchLoader(LabelledGraphs(rows, 3.0), [1] * 3, 3, None, shuffle=False, num_workers=1, collate_fn=collate_labelled)
    assert next(iter(loader)).energy.tolist() == [-4.0, -6.0, -8.0]


def frame(energy: float, **changes) -> dict:
    structure = {
        "@module": "pymatgen.core.structure", "@class": "Structure", "charge": 0,
        "lattice": {"matrix": [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 5.0]], "a": 4.0},
        "sites": [
            {"species": [{"element": "Li", "occu": 1}], "abc": [0, 0, 0], "xyz": [0, 0, 0], "label": "Li", "properties": {}},
            {"species": [{"element": "F", "occu": 1}], "abc": [0.5, 0.5, 0.5], "xyz": [2, 2, 2.5], "label": "F", "properties": {}},
        ],
    }  # fmt: skip
    labels = {"uncorrected_total_energy": energy, "corrected_total_energy": energy - 1, "energy_per_atom": energy / 2, "magmom": None}
    return {"structure": structure, **labels, "force": [[0, 0, 1.0], [0, 0, -1.0]], "stress": [[10.0, 0, 0], [0, 20, 0], [0, 0, 30]], **changes}


def test_mptrj_as_published_is_read_frame_by_frame_with_stress_of_ases_sign(tmp_path, monkeypatch):
    path = tmp_path / "MPtrj.json"
    path.write_text(json.dumps({"mp-1": {"mp-1-0-0": frame(-1.0), "mp-1-0-1": frame(-2.0)}, "mp-2": {"mp-2-0-0": frame(-3.0, stress=None)}}))
    # Smaller than a material, so that every value is cut.
    monkeypatch.setattr(mptrj, "_CHUNK", 150)
    frames = open_structures(path)
    assert [atoms.get_potential_energy() for atoms in frames] == [-1.0, -2.0, -3.0]
    assert frames[-1].positions[1].tolist() == [2, 2, 2.5]
    labels = labels_of(frames[1])
    assert np.allclose(np.diag(labels["stress"].reshape(3, 3)) / ase.units.GPa, [-1, -2, -3])
    assert labels["forces"][0].tolist() == [0, 0, 1]
    assert "stress" not in labels_of(frames[2])
    item = LabelledGraphs(frames, 4.0)[0]
    assert torch.allclose(item.stress[0].diagonal() / ase.units.GPa, torch.tensor([-1.0, -2, -3], dtype=torch.float64))
    data = StructureFiles(str(path), validation=0.34)
    data.setup("fit")
    assert len(data.train_structures) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"mp-1": {"a": frame(-1.0)}})[:-40], "breaks off"),
        (json.dumps({"mp-1": {"a": {"structure": {"sites": []}}}}), "it has no 'lattice'"),
    ],
)
def test_a_damaged_mptrj_file_is_refused_in_one_line(text, message, tmp_path, monkeypatch):
    path = tmp_path / "MPtrj.json"
    path.write_text(text)
    monkeypatch.setattr(mptrj, "is_mptrj", lambda path: True)
    monkeypatch.setattr(importlib.import_module("foveal.graphs3d.data.sources"), "is_mptrj", lambda path: True)
    with pytest.raises(UserError, match=message) as caught:
        open_structures(path)[0]
    assert "\n" not in str(caught.value)


def test_other_json_is_left_to_ase(tmp_path):
    database = pytest.importorskip("ase.db").connect(tmp_path / "a.json")
    database.write(ase.Atoms("He"))
    assert str(open_structures(tmp_path / "a.json")[0].symbols) == "He"
