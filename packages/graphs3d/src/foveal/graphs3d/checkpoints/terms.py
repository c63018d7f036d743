"""What stands between a network's answers and eV: one scale of all labels, and the energy that each element brings by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple


class EnergyTerms(NamedTuple):
    """Keyword arguments of `FovealCalculator` that belong to the weights.

    Attributes:
        scale: eV of one unit of the network's energy.
        references: eV of each element, by symbol.
        forces_scale: eV/A of one unit of forces and stress where it is not `scale`, as in the direct form trained on OC20.
        known_elements_only: the elements with a reference are all that the network was trained on.
    """

    scale: float
    references: dict[str, float]
    known_elements_only: bool = False
    forces_scale: float | None = None

    def header(self) -> dict[str, str]:
        """As strings, for the header of a weights file."""
        header = {"scale": repr(self.scale), "references": json.dumps(self.references), "known_elements_only": json.dumps(self.known_elements_only)}
        return header if self.forces_scale is None else {**header, "forces_scale": repr(self.forces_scale)}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> EnergyTerms:
        """The inverse of `header`; where it says nothing the network's answers are eV."""
        said = {name: json.loads(header[name]) for name in cls._fields if name in header}
        return cls(**{"scale": 1.0, "references": {}, **said})
