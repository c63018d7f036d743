"""EquiformerV3 as an ASE calculator: relaxation, dynamics, phonons and whatever else ASE does with energies and forces."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.data import atomic_numbers, chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.graphs3d.checkpoints import bundled_weights, energy_terms, model_from_weights
from foveal.graphs3d.data.neighbors import AtomGraph, NeighborList, collate
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3


class FovealCalculator(Calculator):
    """Energy (eV), forces (eV/A), stress (eV/A^3) and each atom's energy by a network.

    >>> atoms.calc = FovealCalculator.from_pretrained("potential.safetensors")
    >>> atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()

    The network's answers times `scale` are in eV; the references of the elements are added to the energy. Stress exists for structures that are
    periodic in all three directions, with ASE's sign (tension positive). Answers are kept until the structure changes.

    Args:
        model: the network; it is moved to `device` and `dtype`.
        device: "auto", "cpu" or "cuda[:N]".
        dtype: "float32", or "float64" for phonons and other small differences.
        skin: A; the neighbour list is kept until an atom has moved by half of it.
        scale: eV of one unit of the network's energy.
        references: eV of each element, by symbol or atomic number; elements that are left out count as 0.
        known_elements_only: refuse elements that have no reference, as those that were not trained on.
        forces_scale: eV/A of one unit of the network's forces, and of stress; None is `scale`, the only right one where forces are derivatives.

    Raises:
        UserError: an unknown dtype, device or element, or a negative skin.
    """

    def __init__(
        self,
        model: EquiformerV3,
        device: str = "auto",
        dtype: str = "float32",
        skin: float = 0.5,
        scale: float = 1.0,
        references: Mapping[str | int, float] | None = None,
        known_elements_only: bool = False,
        forces_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dtype not in ("float32", "float64"):
            raise UserError(f"expected dtype float32 or float64; got {dtype!r}")
        if not skin >= 0:
            raise UserError(f"expected a skin of 0 A or more; got {skin}")
        config = model.config
        self.device, self.dtype, self.scale = resolve_device(device), getattr(torch, dtype), scale
        self.forces_scale = scale if forces_scale is None else forces_scale
        self.model = model.to(device=self.device, dtype=self.dtype).eval()
        self.neighbors = NeighborList(config.cutoff, skin, config.max_neighbors)
        self.references = np.zeros(config.max_elements)
        for element, value in (references or {}).items():
            number = atomic_numbers.get(element, -1) if isinstance(element, str) else element
            if not 0 < number < config.max_elements:
                raise UserError(f"expected elements below atomic number {config.max_elements} in references; got {element!r}")
            self.references[number] = value
        #: Atomic numbers that the potential was trained on; empty where its weights do not say so.
        self.elements = frozenset(np.flatnonzero(self.references).tolist()) if known_elements_only else frozenset()
        self.implemented_properties = ["energy", "free_energy", "energies"]
        self.implemented_properties += ["forces"] if config.forces else []
        self.implemented_properties += ["stress"] if config.stress else []

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, **options: Any) -> FovealCalculator:
        """A calculator from weights of ours (.safetensors) with the scale and references in their header; `options` are the constructor's.

        Args:
            source: the file; None: the small potential of the package, for molecules of H, C, N and O (its card lies beside the weights).
            **options: of the constructor.

        Raises:
            UserError: missing, corrupt or foreign weights, or as the constructor.
        """
        path = bundled_weights() if source is None else Path(source)
        model = model_from_weights(path)
        assert isinstance(model, EquiformerV3)  # asked for by its system's name
        return cls(model, **{**energy_terms(path)._asdict(), **options})

    def calculate(self, atoms: ase.Atoms | None = None, properties: Sequence[str] = ("energy",), system_changes: Sequence[str] = all_changes) -> None:
        """Fill ``results``; all properties come from one evaluation.

        Raises:
            UserError: a structure without atoms, with an unknown element, without finite positions, with overlapping atoms, or with a periodic
                cell that has no volume.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None  # set by ASE
        self.results = self.batch([self.atoms], [self.neighbors])[0]

    def batch(
        self, structures: Sequence[ase.Atoms], neighbors: Sequence[NeighborList] | None = None, max_edges: int = 50_000
    ) -> list[dict[str, Any]]:
        """Results of many structures, evaluated together as far as `max_edges` goes.

        Args:
            structures: to evaluate; their own calculators are not asked.
            neighbors: a list a structure, kept by the caller while atoms move; None lists anew.
            max_edges: in one evaluation, which bounds memory; a structure that alone has more is evaluated alone.

        Raises:
            UserError: as `calculate`.
        """
        lists = neighbors or [self.new_neighbors() for _ in structures]
        graphs: list[AtomGraph] = []
        done: list[dict[str, Any]] = []
        room = max_edges
        for atoms, listed in zip(structures, lists, strict=True):
            graph = self._graph(atoms, listed)
            room -= graph.edge_index.shape[1]
            if graphs and room < 0:
                done += self._evaluate(graphs, structures[len(done) :])
                graphs, room = [], max_edges - graph.edge_index.shape[1]
            graphs.append(graph)
        return done + (self._evaluate(graphs, structures[len(done) :]) if graphs else [])

    def new_neighbors(self, skin: float = 0.0) -> NeighborList:
        """A neighbour list with the network's cutoff."""
        return NeighborList(self.model.config.cutoff, skin, self.model.config.max_neighbors)

    def _graph(self, atoms: ase.Atoms, listed: NeighborList) -> AtomGraph:
        known = self.elements
        wrong = sorted({int(number) for number in atoms.numbers if not (number in known if known else 0 < number < self.model.config.max_elements)})
        if wrong:
            if known:
                names, strange = ([chemical_symbols[number] for number in numbers] for numbers in (sorted(known), wrong))
                raise UserError(f"expected the elements that the potential was trained on ({', '.join(names)}); got {', '.join(strange)}")
            raise UserError(f"expected elements with atomic numbers 1 to {self.model.config.max_elements - 1}; got {', '.join(map(str, wrong))}")
        graph = listed(atoms)
        if listed.truncated and not self.model.config.direct:
            warnings.warn(
                f"an atom has more than {listed.max_neighbors} neighbours within {listed.cutoff} A and the farthest are left out: "
                "energies may jump where neighbours change places",
                stacklevel=4,
            )
        return graph

    def _evaluate(self, graphs: Sequence[AtomGraph], structures: Sequence[ase.Atoms]) -> list[dict[str, Any]]:
        with torch.no_grad():
            prediction = self.model(*collate(graphs).to(self.device, self.dtype))
        node_energy, energy = (self.scale * part.double().cpu().numpy() for part in (prediction.node_energy, prediction.energy))
        forces, stress = (
            None if part is None else self.forces_scale * part.double().cpu().numpy() for part in (prediction.forces, prediction.stress)
        )
        results, start = [], 0
        for index, (graph, atoms) in enumerate(zip(graphs, structures, strict=False)):
            place = slice(start, start := start + len(graph.numbers))
            references = self.references[atoms.numbers]
            total = float(energy[index] + references.sum())
            found: dict[str, Any] = {"energy": total, "free_energy": total, "energies": node_energy[place] + references}
            if forces is not None:
                found["forces"] = forces[place]
            if stress is not None and atoms.pbc.all():
                found["stress"] = full_3x3_to_voigt_6_stress(stress[index])
            results.append(found)
        return results
