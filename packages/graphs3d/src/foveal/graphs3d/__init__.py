"""Atoms as graphs: EquiformerV3, an interatomic potential that conserves energy, for ASE.

>>> from foveal.graphs3d import FovealCalculator
>>> atoms.calc = FovealCalculator.from_pretrained("potential.safetensors")  # then relaxation, dynamics, phonons with ASE

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveal.core.faces import loaded_when_asked

if TYPE_CHECKING:
    from foveal.graphs3d.calculator import FovealCalculator
    from foveal.graphs3d.checkpoints import load_official, systems, to_official
    from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
    from foveal.graphs3d.selection import GAIS

__all__ = ["GAIS", "EquiformerV3", "EquiformerV3Config", "FovealCalculator", "load_official", "systems", "to_official"]

_HOME = {
    "EquiformerV3": "models.equiformer_v3",
    "EquiformerV3Config": "models.equiformer_v3",
    "FovealCalculator": "calculator",
    "GAIS": "selection",
    "load_official": "checkpoints",
    "systems": "checkpoints",
    "to_official": "checkpoints",
}

__getattr__, __dir__ = loaded_when_asked(__name__, _HOME)
