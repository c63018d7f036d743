"""What films are, where the user knows it: from a table or from folders named as classes; and how good probabilities are against it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.reports import BatchReport
from foveal.medical.classification_metrics import film_scores
from foveal.medical.data.film_tables import find_films


def truth_of(source: Path, places: Sequence[Path], class_names: Sequence[str]) -> dict[Path, str]:
    """The class of each film that `source` knows.

    Args:
        source: a table with columns for file and label, or a folder with a folder of films for each class.
        places: films.
        class_names: that may be.

    Raises:
        UserError: no such file, other classes, or none of the films.
    """
    if not source.exists():
        raise UserError(f"expected the films' classes; {source} does not exist; check --truth")
    cases = find_films(source, "folders" if source.is_dir() else "table")
    known = {case.file.resolve(): case.label for case in cases if case.file is not None}
    found = {place: known[place.resolve()] for place in places if place.resolve() in known}
    if not found:
        raise UserError(f"expected classes of the films in {source}; it names {len(cases)} films, none of these; check --truth")
    unknown = sorted(set(found.values()) - set(class_names))
    if unknown:
        raise UserError(f"expected classes {', '.join(class_names)} in {source}; it also has {', '.join(unknown[:5])}; rename them")
    return found


def report_scores(
    report: BatchReport, shares: Mapping[Path, Mapping[str, float]], truth: Mapping[Path, str], class_names: Sequence[str], target: Path
) -> None:
    """Add a line with accuracy, AUROC and so on of the films whose class is known, and write all of it as JSON."""
    both = [place for place in truth if place in shares]
    if not both:
        return
    probabilities = torch.tensor([[shares[place][name] for name in class_names] for place in both], dtype=torch.float64)
    scores = film_scores(probabilities, torch.tensor([list(class_names).index(truth[place]) for place in both]), class_names)
    with report.item(f"{len(both)} films of known class") as entry, atomic_write(target) as temporary:
        known = {name: None if math.isnan(value) else value for name, value in scores.items()}
        temporary.write_text(json.dumps({"films": len(both), **known}, indent=1) + "\n", encoding="utf-8")
        entry.numbers |= {name.replace("_", " "): scores[name] for name in ("accuracy", "balanced_accuracy", "auroc")}
        entry.outputs.append(str(target))
