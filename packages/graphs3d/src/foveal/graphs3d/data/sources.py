"""Where labelled structures lie: files, databases and folders, opened as sequences of `ase.Atoms`.

- Whatever ASE reads at once: extended xyz (``.xz`` and ``.gz`` too), trajectories, vasprun.xml.
- ASE databases (``.db``), read row by row.
- LMDB databases in ASE's layout (``.aselmdb``), alone or as a folder of shards, as OMat24, sAlex, MPtrj and OC20 are published today; read row by
  row with ``foveal-graphs3d[lmdb]``.
- The older LMDB files of OC20 (``.lmdb``), whose rows are pickles; nothing but structures is taken from them, see `oc20`.
- MPtrj's JSON file; see `mptrj`.
- Folders of any of these, subfolders included.
"""

from __future__ import annotations

import bisect
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase
import ase.db
import numpy as np

from foveal.core.errors import UserError
from foveal.graphs3d.data.mptrj import JsonFrames, is_mptrj
from foveal.graphs3d.data.oc20 import PickledRows
from foveal.graphs3d.data.rows import StructureRows
from foveal.graphs3d.data.structures import SUFFIXES, read_structures

_DATABASES = (".db", ".aselmdb")
_FOLDER = (*SUFFIXES, ".aselmdb", ".lmdb", ".extxyz.xz", ".extxyz.gz", ".xyz.xz", ".xyz.gz")


class DatabaseRows(StructureRows):
    """Rows of an ASE database, each read when asked for.

    Args:
        path: ``.db`` or ``.aselmdb``.

    Raises:
        UserError: it cannot be opened, or holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database, self._process = _connect(path), os.getpid()
        try:
            ids = self._database.ids if path.suffix == ".aselmdb" else [row.id for row in self._database.select(columns=["id"])]
        except Exception as error:  # the backends raise whatever their file makes them
            raise UserError(f"expected an ASE database; {path} cannot be read: {' '.join(str(error).split())[:150]}; check the file") from None
        self._ids = np.asarray(list(ids), dtype=np.int64)
        if not len(self._ids):
            raise UserError(f"expected at least one structure in {path}; it is empty")

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int) -> ase.Atoms:
        """The structure at a place from 0 on."""
        if self._process != os.getpid():
            self._database, self._process = _connect(self.path), os.getpid()
        return self._database.get(id=int(self._ids[index])).toatoms()

    def __getstate__(self) -> dict:
        # A connection must not be shared with a worker process.
        return {"path": self.path, "_ids": self._ids}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._database, self._process = _connect(self.path), os.getpid()


#: LMDB lets a process open a file only once.
_OPEN: weakref.WeakValueDictionary[tuple[str, int], Any] = weakref.WeakValueDictionary()


def _connect(path: Path) -> Any:
    if path.suffix != ".aselmdb":
        return ase.db.connect(path)
    try:
        from ase_db_backends.aselmdb import LMDBDatabase
    except ImportError:
        raise UserError(f"expected ase-db-backends to read {path}; it is not installed; pip install 'foveal-graphs3d[lmdb]'") from None
    key = (str(path.resolve()), os.getpid())
    opened = _OPEN.get(key)
    if opened is None:
        inherited = [database for (name, _), database in list(_OPEN.items()) if name == key[0]]
        if inherited:
            # A forked worker can neither use its parent's environment nor open another beside it; closed, the database opens its own.
            inherited[0]._env.close()
        _OPEN[key] = opened = inherited[0] if inherited else LMDBDatabase(path, readonly=True)
    return opened


class Joined(StructureRows):
    """Several sources as one."""

    def __init__(self, sources: Sequence[Sequence[ase.Atoms]]) -> None:
        self.sources = list(sources)
        self.ends = np.cumsum([len(source) for source in self.sources]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, index: int) -> ase.Atoms:
        """The structure at a place from 0 on."""
        source = bisect.bisect_right(self.ends, index)
        return self.sources[source][index - (self.ends[source - 1] if source else 0)]


def open_structures(place: str | Path | Sequence[str]) -> Sequence[ase.Atoms]:
    """The structures of a file, of a folder (subfolders too, in the order of names), or of several of them.

    Raises:
        UserError: nothing there, an unreadable file, or an empty one.
    """
    if not isinstance(place, (str, Path)):
        if not place:
            raise UserError("expected a file or folder of structures; the list is empty")
        return Joined([open_structures(one) for one in place])
    path = Path(place)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(_FOLDER))
        if not found:
            raise UserError(f"expected files of structures ({', '.join(_FOLDER)}) in folder {path}; found none; name another folder")
        return Joined([open_structures(file) for file in found])
    if not path.exists():
        raise UserError(f"expected structures in {path}; it does not exist; check the path")
    if path.suffix == ".lmdb":
        return PickledRows(path)
    if path.suffix == ".json" and is_mptrj(path):
        return JsonFrames(path)
    return DatabaseRows(path) if path.suffix in _DATABASES else read_structures(path)
