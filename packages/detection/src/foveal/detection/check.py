"""``foveal detection check-data``: what is in a labelled set, and what is wrong with it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder
from foveal.detection.data.labels import Labels, Problem, read_labels
from foveal.detection.data.pictures import read_picture


def check_data_command(
    source: Path,
    *,
    splits: Sequence[str] = (),
    images: Path | None = None,
    output: Path | None = None,
    thorough: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal detection check-data`` does.

    Args:
        source: a YOLO data.yaml, a COCO .json or a Pascal VOC folder.
        splits: parts to look at; by default all that the set names.
        images: folder of a COCO file's pictures.
        output: folder for ``problems.csv`` and ``summary.json``; None writes nothing.
        thorough: decode every picture, not only its header.
        overwrite: replace an existing report.
        as_json: print the summary as JSON.

    Returns:
        0, or 2 if there are problems.

    Raises:
        UserError: not a labelled set at all.
    """
    folder = None if output is None else output_folder(output, overwrite, ("problems.csv", "summary.json"))
    parts = list(splits) or _parts(source)
    read = {part: read_labels(source, part, images=images) for part in parts}
    if thorough:
        for labels in read.values():
            _decode(labels)
    problems = [(part, problem) for part, labels in read.items() for problem in labels.problems]
    problems += [("", problem) for problem in _shared(read)]
    summary = {"parts": {part: _summary(labels) for part, labels in read.items()}, "problems": Counter(problem.kind for _, problem in problems)}
    if folder is not None:
        with atomic_write(folder / "problems.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("part", "problem", "place", "detail"))
            writer.writerows((part, problem.kind, problem.place, problem.detail) for part, problem in problems)
        with atomic_write(folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if as_json:
        listed = [{"part": part, **vars(problem)} for part, problem in problems]
        print(json.dumps({**summary, "listed": listed}, indent=1))
    else:
        _show(summary, problems, folder)
    return 2 if problems else 0


def _parts(source: Path) -> list[str]:
    """The parts that a set names."""
    if source.is_dir() and (source / "ImageSets" / "Main").is_dir():
        named = {file.stem for file in (source / "ImageSets" / "Main").glob("*.txt")}
        return [part for part in ("train", "val", "test") if part in named] or sorted(named) or ["all"]
    if source.is_dir() and (source / "Annotations").is_dir():
        return ["all"]
    file = source
    if source.is_dir():
        file = next(iter(sorted([*source.glob("*.yaml"), *source.glob("*.yml")])), source)
    if file.suffix in (".yaml", ".yml") and file.is_file():
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"expected a YOLO data file; {file} is none: {error}") from None
        named = {part for part in ("train", "val", "test") if isinstance(settings, dict) and settings.get(part)}
        return [part for part in ("train", "val", "test") if part in named] or ["train"]
    return ["all"]


def _decode(labels: Labels) -> None:
    for picture in labels.pictures:
        try:
            read_picture(picture.path)
        except UserError as error:
            labels.problems.append(Problem("damaged picture", str(picture.path), str(error)))


def _shared(read: dict[str, Labels]) -> list[Problem]:
    """Pictures that stand in more than one part."""
    places: dict[Path, list[str]] = {}
    for part, labels in read.items():
        for picture in labels.pictures:
            places.setdefault(picture.path.resolve(), []).append(part)
    return [Problem("shared picture", str(path), f"is in {' and '.join(parts)}") for path, parts in sorted(places.items()) if len(parts) > 1]


def _summary(labels: Labels) -> dict[str, Any]:
    boxes = [picture.boxes[:, 2:] - picture.boxes[:, :2] for picture in labels.pictures if len(picture.boxes)]
    sides = np.sqrt(np.prod(np.concatenate(boxes), axis=1)) if boxes else np.zeros(1)
    counts = Counter(labels.names[int(number)] for picture in labels.pictures for number in picture.classes)
    return {
        "pictures": len(labels.pictures),
        "without objects": sum(not len(picture.classes) for picture in labels.pictures),
        "objects": labels.objects,
        "classes": {name: counts.get(name, 0) for name in labels.names},
        "sizes": {f"{width}x{height}": count for (width, height), count in Counter(picture.size for picture in labels.pictures).most_common(5)},
        "side of objects in pixels (5, 50, 95 %)": [round(float(value), 1) for value in np.quantile(sides, (0.05, 0.5, 0.95))],
    }


def _show(summary: dict[str, Any], problems: list[tuple[str, Problem]], folder: Path | None) -> None:
    for part, numbers in summary["parts"].items():
        present = {name: count for name, count in numbers["classes"].items() if count}
        absent = [name for name in numbers["classes"] if name not in present]
        classes = ", ".join(f"{name} {count}" for name, count in present.items()) or "none"
        if absent:
            classes += "; none of " + (", ".join(absent) if len(absent) <= 5 else f"{len(absent)} further classes")
        print(f"{part}: {numbers['pictures']} pictures ({numbers['without objects']} without objects), {numbers['objects']} objects: {classes}")
    for kind, count in summary["problems"].items():
        print(f"{count} x {kind}")
        shown = [(part, problem) for part, problem in problems if problem.kind == kind]
        for part, problem in shown[:5]:
            print(f"    {part + ': ' if part else ''}{problem.place} {problem.detail}")
        if len(shown) > 5:
            print(f"    and {len(shown) - 5} more" + (f", in {folder / 'problems.csv'}" if folder else "; -o FOLDER writes them all"))
    if not problems:
        print("no problems")
    if folder:
        print(f"{folder / 'problems.csv'}, {folder / 'summary.json'}")
