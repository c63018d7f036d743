"""MPtrj as its authors publish it: one JSON file of relaxations, 11 GB, read a material at a time.

Deng et al.: CHGNet, Nat. Mach. Intell. 5, 2023; MIT. Layout: ``{material: {frame: {...}}}``; of a frame we read ``structure`` (as pymatgen writes
it), ``uncorrected_total_energy`` (eV), ``force`` (eV/A) and ``stress`` (kBar, with VASP's sign). Energies are VASP's own, as Matbench Discovery and
EquiformerV3 take them, not the corrected ones.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
import ase.units
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from foveal.core.errors import UserError
from foveal.graphs3d.data.rows import StructureRows

_CHUNK = 1 << 22
_BLANK = " \t\r\n,:{"


def materials(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Where each material's value begins and ends in the file, and the value itself.

    Raises:
        UserError: it is no JSON object.
    """
    decoder = json.JSONDecoder()
    with path.open("rb") as stream:
        text, before, place, key = stream.read(_CHUNK).decode("ascii", "replace"), 0, 0, None
        if not text.lstrip().startswith("{"):
            raise UserError(f"expected MPtrj's JSON object in {path}; it begins with {text[:20]!r}; check the file")
        while True:
            while place < len(text) and text[place] in _BLANK and not (key is not None and text[place] == "{"):
                place += 1
            if place < len(text) and text[place] == "}":
                return
            try:
                value, end = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                more = stream.read(_CHUNK)
                if not more:
                    raise UserError(f"expected MPtrj's JSON object in {path}; it breaks off or is damaged: {error.msg}; get it again") from None
                before, text, place = before + place, text[place:] + more.decode("ascii", "replace"), 0
                continue
            if key is None:
                key = value
            else:
                yield before + place, before + end, value
                key = None
            place = end


def is_mptrj(path: Path) -> bool:
    """Whether a JSON file has MPtrj's layout; ASE's own databases may be JSON too."""
    try:
        frames = next(materials(path))[2]
    except (UserError, StopIteration):
        return False
    return isinstance(frames, dict) and any(isinstance(frame, dict) and "structure" in frame for frame in frames.values())


def structure_of(frame: dict[str, Any]) -> ase.Atoms:
    """A frame's atoms with its labels.

    Raises:
        KeyError: something is missing.
        ValueError: a site that more than one element shares.
    """
    sites = frame["structure"]["sites"]
    if any(len(site["species"]) != 1 for site in sites):
        raise ValueError("a site is shared by several elements")
    symbols = [site["species"][0]["element"] for site in sites]
    atoms = ase.Atoms(symbols, scaled_positions=[site["abc"] for site in sites], cell=frame["structure"]["lattice"]["matrix"], pbc=True)
    labels: dict[str, Any] = {"energy": frame["uncorrected_total_energy"], "forces": np.asarray(frame["force"], dtype=float)}
    if frame.get("stress") is not None:
        # VASP counts compression positive; ASE tension.
        labels["stress"] = -0.1 * ase.units.GPa * np.asarray(frame["stress"], dtype=float).reshape(3, 3)
    atoms.calc = SinglePointCalculator(atoms, **{name: value for name, value in labels.items() if value is not None})
    return atoms


class JsonFrames(StructureRows):
    """All frames of an MPtrj file, in its order; the file is gone through once, then frames are read when asked for.

    Args:
        path: ``.json`` file.

    Raises:
        UserError: it is damaged, or holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = [(start, end, len(frames)) for start, end, frames in materials(path)]
        self._places = [(start, end) for start, end, _ in found]
        self._ends = np.cumsum([count for *_, count in found]).tolist()
        if not self._ends or not self._ends[-1]:
            raise UserError(f"expected at least one structure in {path}; it is empty")
        self._kept: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> ase.Atoms:
        """The structure at a place from 0 on."""
        material = bisect.bisect_right(self._ends, index)
        if self._kept[0] != material:
            start, end = self._places[material]
            with self.path.open("rb") as stream:
                stream.seek(start)
                self._kept = (material, list(json.loads(stream.read(end - start)).values()))
        try:
            return structure_of(self._kept[1][index - (self._ends[material - 1] if material else 0)])
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"expected MPtrj's structures in {self.path}; frame {index} is none: {reason}; check the file") from None
