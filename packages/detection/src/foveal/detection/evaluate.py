"""``foveal detection evaluate``: how good a detector is on labelled pictures, in COCO's numbers and in pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder
from foveal.detection.data.labels import Labels, read_labels
from foveal.detection.data.pictures import read_picture
from foveal.detection.metrics import average_precision, coco_ground_truth, coco_predictions
from foveal.detection.plots import draw_confusion, draw_precision_recall
from foveal.detection.predict import Detections, Detector, Options


@dataclass(frozen=True)
class Evaluation:
    """How good a detector is.

    Attributes:
        numbers: COCO's twelve.
        classes: AP of each class.
        curves: of each class, precision at the recalls 0, 0.01 ... 1, at an overlap of 0.5.
        confusion: objects there (rows) and found (columns), the last of each being nothing.
        predictions: as COCO's result files have them.
    """

    numbers: dict[str, float]
    classes: dict[str, float]
    curves: dict[str, Float[np.ndarray, " recalls"]]
    confusion: Float[np.ndarray, "true found"]
    predictions: list[dict[str, Any]]


def evaluate(detector: Detector, labels: Labels, score: float = 0.25, progress: bool = False) -> Evaluation:
    """Measure a detector.

    Args:
        detector: with the classes of the labels, in any order.
        labels: pictures and what is in them.
        score: least score of what counts in the confusion matrix.
        progress: whether a bar is shown.

    Raises:
        UserError: classes that the detector does not know.
    """
    unknown = sorted(set(labels.names) - set(detector.names))
    if unknown:
        raise UserError(f"expected labels of the detector's classes ({', '.join(detector.names)}); got {', '.join(unknown)}")
    numbers = dict(zip(labels.names, labels.numbers or range(len(labels.names)), strict=True))
    predictions: list[dict[str, Any]] = []
    confusion = np.zeros((len(labels.names) + 1, len(labels.names) + 1))
    everything = Options(score=0.001, most=300, several=True)
    for picture in track(labels.pictures, "measuring", console=Console(stderr=True), disable=not progress):
        found = detector.detect(read_picture(picture.path), everything)
        known = [row for row, name in enumerate(found.labels) if name in numbers]
        predictions += coco_predictions(picture.number, found.boxes[known], found.scores[known], [numbers[found.labels[row]] for row in known])
        _confuse(confusion, picture.boxes, picture.classes, found, labels.names, score)
    truth = coco_ground_truth(labels)
    whole, classes = average_precision(truth, predictions)
    curves = {name: _curve(labels, predictions, numbers[name], position) for position, name in enumerate(labels.names)}
    return Evaluation(whole, classes, curves, confusion, predictions)


def overlaps(first: Float[np.ndarray, "n 4"], second: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of corners."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = np.prod(first[:, 2:] - first[:, :2], axis=1)[:, None] + np.prod(second[:, 2:] - second[:, :2], axis=1)[None]
    return common / np.maximum(areas - common, 1e-9)


def _confuse(counts: np.ndarray, boxes: np.ndarray, classes: np.ndarray, found: Detections, names: list[str], score: float) -> None:
    """Match the surest objects first, each with the free object that it overlaps most, by half or more, whatever its class."""
    free, nothing = set(range(len(boxes))), len(names)
    seen: set[bytes] = set()
    shared = overlaps(found.boxes.astype(float), boxes) if len(boxes) and len(found) else np.zeros((len(found), len(boxes)))
    for row in range(len(found)):
        if found.scores[row] < score or found.labels[row] not in names:
            continue
        if found.boxes[row].tobytes() in seen:
            continue  # a cell's second class
        seen.add(found.boxes[row].tobytes())
        best = max(free, key=lambda other: shared[row, other], default=None)
        column = names.index(found.labels[row])
        if best is not None and shared[row, best] >= 0.5:
            free.discard(best)
            counts[int(classes[best]), column] += 1
        else:
            counts[nothing, column] += 1
    for other in free:
        counts[int(classes[other]), nothing] += 1


def _curve(labels: Labels, predictions: list[dict[str, Any]], category: int, position: int) -> np.ndarray:
    """Interpolated precision of one class at an overlap of 0.5."""
    wanted = {picture.number: picture.boxes[picture.classes == position] for picture in labels.pictures}
    total = sum(len(boxes) for boxes in wanted.values())
    taken = {number: np.zeros(len(boxes), bool) for number, boxes in wanted.items()}
    right = []
    of_class: list[dict[str, Any]] = [entry for entry in predictions if entry["category_id"] == category]
    for prediction in sorted(of_class, key=lambda entry: -entry["score"]):
        number, (x, y, width, height) = prediction["image_id"], prediction["bbox"]
        boxes = wanted[number]
        shared = overlaps(np.array([[x, y, x + width, y + height]]), boxes)[0] if len(boxes) else np.zeros(0)
        shared = np.where(taken[number], -1.0, shared)
        hit = len(shared) > 0 and shared.max() >= 0.5
        if hit:
            taken[number][shared.argmax()] = True
        right.append(hit)
    if not right or not total:
        return np.zeros(101)
    hits = np.cumsum(right)
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / total
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return np.where(places < len(recall), best_from_here[np.minimum(places, len(recall) - 1)], 0.0)


def evaluate_command(
    source: Path,
    *,
    split: str = "test",
    images: Path | None = None,
    output: Path | None = None,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    score: float = 0.25,
    device: str = "auto",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal detection evaluate`` does; arguments as there.

    Raises:
        UserError: no such data, or classes that the detector does not know.
    """
    labels = read_labels(source, split, images=images)
    written = ("metrics.json", "predictions.json", "precision_recall.png", "confusion.png")
    folder = output_folder("evaluated" if output is None else output, overwrite, written)
    detector = Detector.from_pretrained(checkpoint, image_size=image_size, device=device)
    found = evaluate(detector, labels, score, progress=sys.stderr.isatty())
    summary = {"pictures": len(labels.pictures), "objects": labels.objects, **found.numbers, "classes": found.classes}
    for name, content in (("metrics.json", summary), ("predictions.json", found.predictions)):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name, figure in (
        ("precision_recall.png", draw_precision_recall(found.curves)),
        ("confusion.png", draw_confusion(found.confusion, labels.names, score)),
    ):
        with atomic_write(folder / name) as temporary:
            figure.savefig(temporary, dpi=120)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        print(f"{len(labels.pictures)} pictures, {labels.objects} objects")
        print("  ".join(f"{name} {found.numbers[name]:.3f}" for name in ("AP", "AP50", "AP75", "AR100")))
        print("  ".join(f"{name} {value:.3f}" for name, value in found.classes.items()))
        print(", ".join(str(folder / name) for name in written))
    return 0
