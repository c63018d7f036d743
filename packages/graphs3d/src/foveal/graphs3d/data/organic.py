"""The structures that the bundled potential learned from: ``python -m foveal.graphs3d.data.organic BOTNET FOLDER``.

BOTNET is a checkout of the BOTNet datasets (Batatia et al., 2022; github.com/davkovacs/BOTNet-datasets, MIT), whose geometries of acetylacetone,
ethanol and 3BPA are labelled anew with GFN2-xTB, so that one method stands behind all labels. To them come closed-shell molecules of H, C, N and O
of ASE's G2 set, 48 geometries each from dynamics at 300, 600 and 1000 K. Seven of these molecules are kept for testing: no geometry of theirs is
learned from. Takes some minutes and needs ``foveal-graphs3d[label]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.collections import g2

from foveal.core.files import atomic_write
from foveal.graphs3d.label import sample
from foveal.graphs3d.methods import label, labeller

#: Molecules of G2 that are only tested on.
HELD_OUT = ("CH3CONH2", "CH3OCH3", "isobutane", "C4H4O", "CH3CH2NH2", "HCOOCH3", "CH3CHO")
#: Molecules that GFN2-xTB describes as something else.
_LEFT_OUT = ("O3", "CH2_s1A1d")
_VALIDATION = 150


def molecules() -> list[str]:
    """Names of the closed-shell molecules of H, C, N and O in ASE's G2 set."""
    names = [name for name in g2.names if set(g2[name].get_chemical_symbols()) <= set("HCNO") and len(g2[name]) > 1]
    return sorted(name for name in names if not g2[name].get_initial_magnetic_moments().any() and name not in _LEFT_OUT)


def write_organic(botnet: Path, folder: Path) -> None:
    """Write ``train``, ``validation`` and four ``test_*`` files (extxyz) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    calculator = labeller("gfn2")

    def relabelled(place: str, step: int = 1, most: int | None = None) -> list[ase.Atoms]:
        frames = []
        for atoms in ase.io.read(botnet / place, ":")[::step][:most]:
            bare = ase.Atoms(atoms.numbers, atoms.positions)
            frames.append(_named(label(bare, calculator), place.split("/")[0].removeprefix("dataset_")))
        return frames

    learned = relabelled("dataset_acac/train_300K.xyz") + relabelled("dataset_ethanol/train.xyz") + relabelled("dataset_3BPA/train_300K.xyz")
    tested: list[ase.Atoms] = []
    for place, name in enumerate(molecules()):
        start = ase.Atoms(g2[name].numbers, g2[name].positions)
        for kelvin in (300, 600, 1000):
            frames = sample(start, calculator, 16, float(kelvin), 0.0, 25, 0.5, np.random.default_rng([0, place, kelvin]))
            (tested if name in HELD_OUT else learned).extend(_named(frame, name) for frame in frames)
    order = np.random.default_rng(0).permutation(len(learned)).tolist()
    files = {
        "train": [learned[index] for index in sorted(order[_VALIDATION:])],
        "validation": [learned[index] for index in sorted(order[:_VALIDATION])],
        "test_molecules": tested,
        "test_acac_300K": relabelled("dataset_acac/test_MD_300K.xyz", 3, 200),
        "test_acac_600K": relabelled("dataset_acac/test_MD_600K.xyz", 3, 200),
        "test_ethanol": relabelled("dataset_ethanol/test_MD.xyz", 5, 200),
    }
    for name, structures in files.items():
        _write(folder / f"{name}.extxyz", structures)


def _named(frame: ase.Atoms, name: str) -> ase.Atoms:
    frame.info = {"structure": name, "method": "GFN2-xTB"}
    return frame


def _write(path: Path, frames: Sequence[ase.Atoms]) -> None:
    with atomic_write(path) as temporary:
        ase.io.write(temporary, list(frames), format="extxyz")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Label the structures that the bundled potential learned from.")
    parser.add_argument("botnet", type=Path, help="checkout of the BOTNet datasets")
    parser.add_argument("folder", type=Path, help="where the files are written")
    given = parser.parse_args()
    write_organic(given.botnet, given.folder)
