"""Reference methods that label structures and that potentials are compared with: GFN2-xTB and GFN1-xTB by tblite, effective medium theory by ASE."""

from __future__ import annotations

from typing import Any

import ase
from ase.calculators.calculator import Calculator, CalculatorError, InputError, PropertyNotImplementedError, all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from foveal.core.errors import UserError
from foveal.graphs3d.data.neighbors import check_structure, refuse_overlap
from foveal.graphs3d.data.structures import UNITS, without_labels

#: Word on the command line -> the method's name.
METHODS = {"gfn2": "GFN2-xTB", "gfn1": "GFN1-xTB", "emt": "EMT"}


def labeller(method: str) -> Calculator:
    """An ASE calculator of `METHODS`.

    Raises:
        UserError: an unknown method, or tblite is not installed.
    """
    if method not in METHODS:
        raise UserError(f"expected --method {', '.join(METHODS)}; got {method!r}")
    if method == "emt":
        return _careful(EMT)()
    try:
        from tblite.ase import TBLite
    except ImportError:
        raise UserError(f"expected tblite for {METHODS[method]}; it is not installed; pip install 'foveal-graphs3d[label]'") from None
    return _careful(TBLite)(method=METHODS[method], verbosity=0)


def _careful(kind: type[Calculator]) -> type[Calculator]:
    """`kind` that refuses what it would answer with NaN, or by ending the program."""

    class Careful(kind):  # type: ignore[misc, valid-type]
        def calculate(self, atoms: ase.Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
            if atoms is not None:
                check_structure(atoms)
                refuse_overlap(atoms)
            super().calculate(atoms, properties, system_changes)

    return Careful


def label(atoms: ase.Atoms, calculator: Calculator) -> ase.Atoms:
    """A copy with energy, forces and, where it is periodic throughout, stress as the calculator gives them.

    Raises:
        UserError: the method fails on this structure.
    """
    check_structure(atoms)
    done = without_labels(atoms)
    done.calc = calculator
    labels: dict[str, Any] = {}
    try:
        labels |= {"energy": done.get_potential_energy(), "forces": done.get_forces()}
        if done.pbc.all():
            labels["stress"] = done.get_stress()
    except (CalculatorError, InputError, NotImplementedError, PropertyNotImplementedError, RuntimeError, KeyError) as error:
        if "stress" not in str(error):
            raise UserError(f"expected a structure that the method can compute; {_reason(error)}") from None
    done.calc = SinglePointCalculator(done, **{name: labels[name] for name in UNITS if name in labels})
    return done


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
