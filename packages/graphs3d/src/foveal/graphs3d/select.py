"""A table in, the rows worth keeping out: what ``foveal graphs3d select`` does, and the search of its settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder, refuse_replacing
from foveal.core.reports import BatchReport
from foveal.graphs3d.data.tables import SUFFIXES, encode, read_table, write_table
from foveal.graphs3d.selection import GAIS
from foveal.graphs3d.selection_report import CLASSIFIERS, before_and_after, draw_selection


def features_and_target(table: pd.DataFrame, target: str, ignore: Sequence[str] = ()) -> tuple[pd.DataFrame, Int[np.ndarray, " rows"], list[Any]]:
    """Columns to select by, codes of the target's classes, and the classes; rows must all have a target.

    Raises:
        UserError: a column that is not there or holds infinity, one class alone, or a target that is no class.
    """
    for name in (target, *ignore):
        if name not in table.columns:
            raise UserError(f"expected a column {name!r}; the table has {', '.join(map(str, table.columns[:12]))}; name one of them")
    features = table.drop(columns=[target, *ignore])
    if features.shape[1] == 0:
        raise UserError(f"expected columns beside {target!r}; there is none; leave fewer out with --ignore")
    endless = [name for name in features.select_dtypes("number") if np.isinf(features[name].to_numpy(dtype=float, na_value=np.nan)).any()]
    if endless:
        raise UserError(f"expected finite numbers or gaps; column {endless[0]!r} holds infinity; mend it, or leave it out with --ignore")
    column = table[target]
    codes, classes = pd.factorize(column, sort=True)
    if len(classes) < 2:
        raise UserError(f"expected at least two classes in column {target!r}; it holds {classes[0]!r} alone; choose another --target")
    numbers = pd.api.types.is_float_dtype(column) and not (np.asarray(classes, dtype=float) % 1 == 0).all()
    if numbers or (len(classes) > 20 and len(classes) > len(column) / 2):
        raise UserError(
            f"expected classes in column {target!r}; it holds {len(classes)} different values in {len(column)} rows; group it into classes"
        )
    return features, codes, list(classes)


def read_settings(path: Path | None) -> dict[str, Any]:
    """Parameters of `GAIS` as ``foveal graphs3d search`` writes them.

    Raises:
        UserError: not such a file.
    """
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        GAIS(**settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected settings written by foveal graphs3d search; {path} cannot be taken: {error}; write it again") from None
    return settings


def select_command(
    source: Path,
    *,
    target: str,
    output: Path | None = None,
    ignore: Sequence[str] = (),
    settings: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    report: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d select`` does: the kept rows in the table's own columns, order and types, and beside them ``<stem>_report.png``.

    Args:
        source: csv, tsv or parquet.
        target: column of the classes.
        output: table to write; None is ``<stem>_selected`` with the suffix of `source`, here.
        ignore: columns not to select by; they are kept in the output.
        settings: file of ``foveal graphs3d search``.
        parameters: of `GAIS`, over those of `settings`.
        report: measure accuracy before and after on held-out rows, and draw.
        seed: of everything.
        overwrite: replace an existing output.
        as_json: print the report for machines.

    Returns:
        The exit code.

    Raises:
        UserError: the table, a column, a parameter or the output cannot be used.
    """
    place = output or Path(f"{source.stem}_selected{source.suffix}")
    if place.suffix.lower() not in SUFFIXES:
        raise UserError(f"expected an output ending in {', '.join(SUFFIXES)}; got {place.name}; choose another -o/--output")
    refuse_replacing([source], [place])
    summary = BatchReport()
    if place.exists() and not overwrite:
        summary.kept(source, [str(place)])
        return summary.finish(as_json)
    output_folder(place.parent)
    chosen = {**read_settings(settings), **{name: value for name, value in (parameters or {}).items() if value is not None}}
    table = read_table(source)
    if target not in table.columns:
        features_and_target(table, target, ignore)
    known = table[target].notna().to_numpy()
    labelled = table[known]
    features, codes, classes = features_and_target(labelled, target, ignore)
    sampler = GAIS(**{**chosen, "missing": "impute", "random_state": seed})
    with summary.item(source) as entry:
        try:
            sampler.fit_resample(features, codes)
            kept = sampler.sample_indices_
            entry.numbers = {"rows": float(len(labelled)), "kept": float(len(kept)), "reduction %": 100 * (1 - len(kept) / len(labelled))}
            with atomic_write(place) as temporary:
                write_table(labelled.iloc[kept], temporary)
            entry.outputs = [str(place)]
            if not known.all():
                entry.message = f"{int((~known).sum())} rows without a target were left out"
            if report:
                _report(entry, place, features, codes, classes, kept, sampler)
        except ValueError as error:  # what the sampler or the encoding says about the table
            raise UserError(_said(error)) from error
    return summary.finish(as_json, {"rows": ",.0f", "kept": ",.0f", "reduction %": ".1f"} | dict.fromkeys(_columns(), ".1f"))


def _said(error: ValueError) -> str:
    """What scikit-learn says of a parameter, in the words of the command line."""
    told = re.fullmatch(r"The '(\w+)' parameter of GAIS must be (.+?)\. Got (.+) instead\.", str(error))
    if told is None:
        return str(error)
    option = {"n_samples": "size"}.get(told[1], told[1])
    return f"expected --{option} to be {told[2].removesuffix(' or None')}; got {told[3]}"


def _columns() -> list[str]:
    return [f"{name} {side}" for name in CLASSIFIERS for side in ("all %", "kept %")]


def _report(entry: Any, place: Path, features: pd.DataFrame, codes: np.ndarray, classes: list[Any], kept: np.ndarray, sampler: GAIS) -> None:
    x = encode(features)
    share = len(kept) / len(codes)
    again = GAIS(**{**sampler.get_params(), "tolerance": None, "n_samples": None, "reduction": 1 - share})

    def select(rows: np.ndarray) -> np.ndarray:
        again.fit_resample(features.iloc[rows], codes[rows])
        return rows[again.sample_indices_]

    try:
        accuracy = before_and_after(x, codes, select, int(sampler.random_state))
    except ValueError:  # a split of a tiny table may leave one class alone on a side
        entry.message = "; ".join(part for part in (entry.message, "too few rows to hold some out for a report") if part)
        return
    for name in CLASSIFIERS:
        entry.numbers |= {f"{name} all %": 100 * accuracy["all"][name], f"{name} kept %": 100 * accuracy["kept"][name]}
    picture = place.with_name(f"{place.stem}_report.png")
    with atomic_write(picture) as temporary:
        draw_selection(x, codes, classes, kept, accuracy).savefig(temporary, dpi=110)
    entry.outputs.append(str(picture))
