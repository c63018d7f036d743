"""OC20's LMDB files (S2EF, IS2RE; OC22 too): rows are pickled Data objects of PyTorch Geometric, older and newer, read without it and without risk.

A pickle can name any function to be called when it is read. Here only what such rows need is answered: tensors, numpy arrays and the containers, of
which the attributes are kept and nothing is run; whatever else a row names is refused.

Layout (Chanussot et al., 2021): keys are "0", "1", ... and sometimes "length". A row has ``atomic_numbers``, ``pos`` (A), ``cell``, ``fixed`` (0, 1),
``tags`` (0 below, 1 surface, 2 adsorbate), ``y`` or ``y_init`` (eV) and ``force`` (eV/A). Energies are taken as they stand: those of the released
S2EF files are relative to slab and gas, which is not what EquiformerV3 was trained on.
"""

from __future__ import annotations

import io
import os
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from foveal.core.errors import UserError
from foveal.graphs3d.data.rows import StructureRows


class _Record:
    """Stands for a container of PyTorch Geometric: keeps the attributes it was pickled with."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _storage(stored: bytes) -> Any:
    # torch's own function for this reads without any restriction.
    return torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)


_GEOMETRIC = {"Data", "DataEdgeAttr", "DataTensorAttr", "GlobalStorage", "BaseStorage"}
_ANSWERED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{
        (f"numpy.{core}.multiarray", name): getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch_geometric.data") and name in _GEOMETRIC:
            return _Record
        answered = _ANSWERED.get((module, name))
        if answered is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which structures do not need; nothing was run")
        return answered


def unpickled(row: bytes) -> dict[str, Any]:
    """The attributes of a pickled Data object of PyTorch Geometric, of its versions 1 and 2.

    Raises:
        pickle.UnpicklingError: it asks for anything that such an object does not need, or is something else.
    """
    found = _Unpickler(io.BytesIO(row)).load()
    if not isinstance(found, _Record):
        raise pickle.UnpicklingError(f"it is a {type(found).__name__}, not a Data object")
    attributes = vars(found)
    store = attributes.get("_store")
    return dict(vars(store)["_mapping"]) if isinstance(store, _Record) else attributes


def structure_of(row: dict[str, Any]) -> ase.Atoms:
    """A row's atoms, with energy and forces where it has them, and its fixed atoms."""
    numbers, positions, cell = (np.asarray(row[name], dtype=float) for name in ("atomic_numbers", "pos", "cell"))
    atoms = ase.Atoms(numbers.astype(int).ravel(), positions=positions.reshape(-1, 3), cell=cell.reshape(3, 3), pbc=True)
    if row.get("tags") is not None:
        atoms.set_tags(np.asarray(row["tags"]).astype(int).ravel())
    if row.get("fixed") is not None:
        atoms.set_constraint(FixAtoms(np.flatnonzero(np.asarray(row["fixed"]).ravel())))
    labels: dict[str, Any] = {}
    energy = row["y"] if row.get("y") is not None else row.get("y_init")
    if energy is not None:
        labels["energy"] = float(np.asarray(energy).ravel()[0])
    if row.get("force") is not None:
        labels["forces"] = np.asarray(row["force"], dtype=float).reshape(-1, 3)
    atoms.calc = SinglePointCalculator(atoms, **labels) if labels else None
    atoms.info.update({name: row[name] for name in ("sid", "fid") if isinstance(row.get(name), (int, str))})
    return atoms


class PickledRows(StructureRows):
    """Rows of an OC20 LMDB file, each read when asked for.

    Args:
        path: ``.lmdb`` file.

    Raises:
        UserError: lmdb is not installed; it is no such file, holds nothing, or its first row is no structure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open = _opened(path)
        with self._open.rows() as rows:
            stated = rows.get(b"length")
            try:
                self._count = int(_Unpickler(io.BytesIO(stated)).load()) if stated is not None else int(rows.stat()["entries"])
            except (pickle.UnpicklingError, TypeError, ValueError) as error:
                raise UserError(f"expected a number of rows in {path}; its length cannot be read: {error}; check the file") from None
        if not self._count:
            raise UserError(f"expected at least one structure in {path}; it is empty")
        self[0]

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> ase.Atoms:
        """The structure at a place from 0 on."""
        if self._open.process != os.getpid():
            self._open = _opened(self.path)
        with self._open.rows() as rows:
            row = rows.get(str(index).encode("ascii"))
        try:
            if row is None:
                raise KeyError(f"no row {index}")
            return structure_of(unpickled(row))
        except Exception as error:  # a damaged pickle raises whatever its bytes make it
            reason = f"it has no {error}" if isinstance(error, KeyError) and row is not None else " ".join(str(error).split())[:150]
            raise UserError(
                f"expected OC20's pickled structures in {self.path}; row {index} is none: {reason}; take the extended xyz files of the same release"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        # An environment must not be shared with a worker process.
        return {"path": self.path, "_count": self._count}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = _opened(self.path)


class _Open:
    """An LMDB environment of one process."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.process = environment, os.getpid()

    def rows(self) -> Any:
        return self.environment.begin()


#: LMDB lets a process open a file only once.
_OPEN: weakref.WeakValueDictionary[tuple[str, int], _Open] = weakref.WeakValueDictionary()


def _opened(path: Path) -> _Open:
    try:
        import lmdb
    except ImportError:
        raise UserError(f"expected lmdb to read {path}; it is not installed; pip install 'foveal-graphs3d[lmdb]'") from None
    key = (str(path.resolve()), os.getpid())
    opened = _OPEN.get(key)
    if opened is None:
        # A forked worker inherits its parent's, which it can neither use nor open beside.
        for (name, _), inherited in list(_OPEN.items()):
            if name == key[0]:
                inherited.environment.close()
        try:
            opened = _Open(lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, meminit=False))
        except lmdb.Error as error:
            raise UserError(f"expected an LMDB file; {path} cannot be read: {' '.join(str(error).split())[:150]}; check the file") from None
        _OPEN[key] = opened
    return opened
