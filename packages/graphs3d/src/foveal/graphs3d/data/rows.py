"""Structures that are read one at a time when asked for: what every such source shares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

import ase


class StructureRows(Sequence[ase.Atoms]):
    """A sequence of structures; a source says how many there are and how the one at a place from 0 on is read."""

    @abstractmethod
    def read(self, index: int) -> ase.Atoms:
        """The structure at `index`, which is from 0 to the length minus one."""

    @overload
    def __getitem__(self, index: int) -> ase.Atoms: ...
    @overload
    def __getitem__(self, index: slice) -> list[ase.Atoms]: ...
    def __getitem__(self, index: int | slice) -> ase.Atoms | list[ase.Atoms]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.read(index % len(self))
