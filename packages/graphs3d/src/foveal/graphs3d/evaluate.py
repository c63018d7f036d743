"""Structures in, energies, forces and stress out, held against the labels that the files carry."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator

from foveal.core.files import atomic_write
from foveal.core.reports import Entry
from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.data.structures import UNITS, labels_of, without_labels
from foveal.graphs3d.file_runs import Going, run_files
from foveal.graphs3d.plots import draw_parity

Pairs = dict[str, list[tuple[np.ndarray, np.ndarray]]]


def predict(atoms: ase.Atoms, calculator: FovealCalculator) -> ase.Atoms:
    """The structure with the network's energy, forces and, where it is periodic throughout, stress.

    Raises:
        UserError: as `FovealCalculator.calculate`.
    """
    done = without_labels(atoms)
    calculator.calculate(done)
    done.calc = SinglePointCalculator(done, **{name: calculator.results[name] for name in UNITS if name in calculator.results})
    return done


def errors_of(pairs: Pairs) -> dict[str, float]:
    """Mean absolute and root mean square error of each property that has labels."""
    numbers = {}
    for name, rows in pairs.items():
        if rows:
            difference = np.concatenate([(predicted - label).ravel() for label, predicted in rows])
            numbers[f"{name} MAE {UNITS[name]}"] = float(np.abs(difference).mean())
            numbers[f"{name} RMSE {UNITS[name]}"] = float(np.sqrt(np.square(difference).mean()))
    return numbers


def compare(labels: Mapping[str, np.ndarray], predicted: ase.Atoms) -> Pairs:
    """Label and prediction of each property that has both; energies are of one atom."""
    results = predicted.calc.results
    per = {"energy": len(predicted), "forces": 1, "stress": 1}
    return {name: [(np.atleast_1d(label) / per[name], np.atleast_1d(results[name]) / per[name])] for name, label in labels.items() if name in results}


def evaluate_command(
    files: Sequence[Path],
    *,
    checkpoint: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d evaluate`` does: ``<stem>_predicted.extxyz``, and with labels ``<stem>_errors.csv`` and ``<stem>_parity.png``.

    Args:
        files: of any format that ASE reads, and folders of them.
        checkpoint: weights of ours; None: the package's.
        output: folder for the results; None is ``evaluated`` here.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        dtype: ``float32`` or ``float64``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a file could not be evaluated.

    Raises:
        UserError: no inputs, weights that cannot be loaded, or an output folder that cannot be written.
    """
    calculator = FovealCalculator.from_pretrained(checkpoint, device=device, dtype=dtype)

    def work(structures: list[ase.Atoms], target: Path, entry: Entry) -> None:
        pairs: Pairs = {name: [] for name in UNITS}
        predicted, rows, going = [], [], Going()
        for index, atoms in enumerate(structures):
            with going.past(index):
                predicted.append(predict(atoms, calculator))
                own = compare(labels_of(atoms), predicted[-1])
                rows.append({"structure": index, "atoms": len(atoms), **errors_of(own)})
                for name, found in own.items():
                    pairs[name] += found
        going.refuse_all(len(structures))
        going.number([int(row["structure"]) for row in rows], predicted)
        with atomic_write(target) as temporary:
            ase.io.write(temporary, predicted, format="extxyz")
        entry.outputs = [str(target)]
        entry.numbers = {"structures": float(len(predicted)), **errors_of(pairs)}
        if any(pairs.values()):
            entry.outputs += _write_errors(target.with_name(target.name.removesuffix("_predicted.extxyz")), rows, pairs)
        going.tell()

    return run_files(files, output or Path("evaluated"), "predicted.extxyz", work, overwrite, as_json, {"structures": ".0f"})


def _write_errors(stem: Path, rows: Sequence[Mapping[str, float]], pairs: Pairs) -> list[str]:
    table, summary, picture = (stem.with_name(f"{stem.name}_{ending}") for ending in ("errors.csv", "errors.json", "parity.png"))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(summary) as temporary:
        temporary.write_text(json.dumps(errors_of(pairs), indent=2), encoding="utf-8")
    with atomic_write(picture) as temporary:
        draw_parity(pairs, UNITS).savefig(temporary, dpi=150)
    return [str(table), str(summary), str(picture)]
