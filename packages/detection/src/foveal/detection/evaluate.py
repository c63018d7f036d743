"""``foveal detection evaluate``: how good a detector is on labelled pictures, in COCO's numbers and in pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder
from foveal.detection.data.labels import LabelledPicture, Labels, read_labels
from foveal.detection.data.pictures import read_picture
from foveal.detection.metrics import (
    Kind,
    average_precision,
    coco_ground_truth,
    coco_keypoints,
    coco_masks,
    coco_oriented,
    coco_predictions,
    turned_boxes,
)
from foveal.detection.plots import draw_confusion, draw_precision_recall
from foveal.detection.postprocess import probabilistic_overlap
from foveal.detection.predict import Detections, Detector, Options

#: What can be measured besides boxes, as an `Evaluation` and the files call it.
SHOWN = {"segm": "masks", "keypoints": "keypoints", "oriented": "oriented", "polygons": "polygons"}


@dataclass(frozen=True)
class Scores:
    """COCO's numbers of one kind of prediction.

    Attributes:
        numbers: twelve of masks and turned boxes, ten of keypoints.
        classes: AP of each class.
        predictions: as COCO's result files have them.
    """

    numbers: dict[str, float]
    classes: dict[str, float]
    predictions: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """How good a detector is.

    Attributes:
        numbers: COCO's twelve, of boxes.
        classes: AP of each class.
        curves: of each class, precision at the recalls 0, 0.01 ... 1, at an overlap of 0.5; of turned boxes if they are measured.
        confusion: objects there (rows) and found (columns), the last of each being nothing; by turned boxes if they are measured.
        predictions: as COCO's result files have them.
        masks: the same of masks, if the network finds them and every object of the labels has one.
        keypoints: the same of keypoints.
        oriented: the same of turned boxes by their probabilistic overlap, as ultralytics measures, if every object of the labels has an outline;
            `numbers` are of the upright boxes around them.
        polygons: the same turned boxes by the intersection over union of their outlines, as DOTA measures.
    """

    numbers: dict[str, float]
    classes: dict[str, float]
    curves: dict[str, Float[np.ndarray, " recalls"]]
    confusion: Float[np.ndarray, "true found"]
    predictions: list[dict[str, Any]]
    masks: Scores | None = None
    keypoints: Scores | None = None
    oriented: Scores | None = None
    polygons: Scores | None = None


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
    further = _further(detector, labels)
    more: list[dict[str, Any]] = []
    for picture in track(labels.pictures, "measuring", console=Console(stderr=True), disable=not progress):
        found = detector.detect(read_picture(picture.path), everything)
        known = [row for row, name in enumerate(found.labels) if name in numbers]
        scores, categories = found.scores[known], [numbers[found.labels[row]] for row in known]
        predictions += coco_predictions(picture.number, found.boxes[known], scores, categories)
        if further == "segm" and found.masks is not None:
            more += coco_masks(picture.number, found.masks[known], scores, categories)
        elif further == "keypoints" and found.keypoints is not None:
            more += coco_keypoints(picture.number, found.keypoints[known], scores, categories)
        elif further == "oriented" and found.oriented is not None:
            more += coco_oriented(picture.number, found.oriented[known], found.boxes[known], scores, categories)
        _confuse(confusion, _there(picture, further), picture.classes, found, labels.names, score)
    truth = coco_ground_truth(labels)
    whole, classes = average_precision(truth, predictions)
    there = {picture.number: (_there(picture, further), picture.classes) for picture in labels.pictures}
    shown = more if further == "oriented" else predictions
    curves = {name: _curve(there, shown, numbers[name], position) for position, name in enumerate(labels.names)}
    kinds: list[Kind] = [] if further is None else ["oriented", "polygons"] if further == "oriented" else [further]
    named = {SHOWN[kind]: Scores(*average_precision(coco_ground_truth(labels, kind), more, kind, labels.sigmas), more) for kind in kinds}
    return Evaluation(whole, classes, curves, confusion, predictions, **named)


def _there(picture: LabelledPicture, further: Kind | None) -> np.ndarray:
    """The picture's objects as they are compared: turned boxes if these are measured, else corners."""
    turned = turned_boxes(picture) if further == "oriented" else None
    return picture.boxes if turned is None else turned


def _further(detector: Detector, labels: Labels) -> Kind | None:
    """What can be measured besides boxes: what the network finds, and every object of the labels has."""
    task, pictures = detector.model.config.task, [picture for picture in labels.pictures if len(picture.boxes)]
    if task == "segment" and all(len(picture.masks) == len(picture.boxes) for picture in pictures):
        return "segm"
    if task == "pose" and all(picture.keypoints is not None for picture in pictures):
        wanted = detector.model.config.keypoints[0]
        other = next(
            (picture.keypoints.shape[1] for picture in pictures if picture.keypoints is not None and picture.keypoints.shape[1] != wanted), None
        )
        if other is not None:
            raise UserError(f"expected labels of {wanted} keypoints, as the detector finds; got {other}")
        return "keypoints"
    if task == "oriented" and all(len(picture.outlines) == len(picture.boxes) for picture in pictures):
        return "oriented"
    return None


def overlaps(first: Float[np.ndarray, "n numbers"], second: Float[np.ndarray, "m numbers"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of corners; of turned boxes, which have five numbers, their probabilistic overlap."""
    if first.shape[1] == 5:
        return probabilistic_overlap(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = np.prod(first[:, 2:] - first[:, :2], axis=1)[:, None] + np.prod(second[:, 2:] - second[:, :2], axis=1)[None]
    return common / np.maximum(areas - common, 1e-9)


def _confuse(counts: np.ndarray, boxes: np.ndarray, classes: np.ndarray, found: Detections, names: list[str], score: float) -> None:
    """Match the surest objects first, each with the free object that it overlaps most, by half or more, whatever its class."""
    free, nothing = set(range(len(boxes))), len(names)
    seen: set[bytes] = set()
    places = found.oriented if boxes.shape[1] == 5 and found.oriented is not None else found.boxes
    shared = overlaps(places.astype(float), boxes) if len(boxes) and len(found) else np.zeros((len(found), len(boxes)))
    for row in range(len(found)):
        if found.scores[row] < score or found.labels[row] not in names:
            continue
        if places[row].tobytes() in seen:
            continue  # a cell's second class
        seen.add(places[row].tobytes())
        best = max(free, key=lambda other: shared[row, other], default=None)
        column = names.index(found.labels[row])
        if best is not None and shared[row, best] >= 0.5:
            free.discard(best)
            counts[int(classes[best]), column] += 1
        else:
            counts[nothing, column] += 1
    for other in free:
        counts[int(classes[other]), nothing] += 1


def _curve(there: dict[int, tuple[np.ndarray, np.ndarray]], predictions: list[dict[str, Any]], category: int, position: int) -> np.ndarray:
    """Interpolated precision of one class at an overlap of 0.5. `there` has the boxes and classes of every picture."""
    wanted = {number: boxes[classes == position] for number, (boxes, classes) in there.items()}
    total = sum(len(boxes) for boxes in wanted.values())
    taken = {number: np.zeros(len(boxes), bool) for number, boxes in wanted.items()}
    right = []
    of_class: list[dict[str, Any]] = [entry for entry in predictions if entry["category_id"] == category]
    for prediction in sorted(of_class, key=lambda entry: -entry["score"]):
        number, (x, y, width, height) = prediction["image_id"], prediction["bbox"]
        boxes = wanted[number]
        place = np.array([prediction["rbox"] if boxes.shape[1] == 5 else [x, y, x + width, y + height]])
        shared = overlaps(place, boxes)[0] if len(boxes) else np.zeros(0)
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
    detector = Detector.from_pretrained(checkpoint, image_size=image_size, device=device)
    further = _further(detector, labels)
    more = [f"predictions_{SHOWN[further]}.json"] if further else []
    written = ("metrics.json", "predictions.json", *more, "precision_recall.png", "confusion.png")
    folder = output_folder("evaluated" if output is None else output, overwrite, written)
    found = evaluate(detector, labels, score, progress=sys.stderr.isatty())
    summary: dict[str, Any] = {"pictures": len(labels.pictures), "objects": labels.objects, **found.numbers, "classes": found.classes}
    files: dict[str, Any] = {"metrics.json": summary, "predictions.json": found.predictions}
    measured = {name: scores for name in SHOWN.values() if (scores := getattr(found, name)) is not None}
    for name, scores in measured.items():
        summary[name] = {**scores.numbers, "classes": scores.classes}
        if name != "polygons":  # the same predictions, measured otherwise
            files[f"predictions_{name}.json"] = scores.predictions
    for name, content in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name, figure in (
        ("precision_recall.png", draw_precision_recall({name: curve for name, curve in found.curves.items() if found.classes[name] >= 0})),
        ("confusion.png", draw_confusion(found.confusion, labels.names, score)),
    ):
        with atomic_write(folder / name) as temporary:
            figure.savefig(temporary, dpi=120)
    if as_json:
        print(json.dumps(summary, indent=1))
        return 0
    print(f"{len(labels.pictures)} pictures, {labels.objects} objects")
    _print_scores("", found.numbers, found.classes, ("AP", "AP50", "AP75", "AR100"))
    for name, scores in measured.items():
        _print_scores(f"{name}: ", scores.numbers, scores.classes, ("AP", "AP50", "AP75", "AR" if name == "keypoints" else "AR100"))
    lacking = {"segment": "masks", "pose": "keypoints", "oriented": "turned boxes"}.get(detector.model.config.task)
    if lacking and not measured:
        print(f"{lacking} are not measured: not every object of the labels has {'an outline' if lacking == 'turned boxes' else 'them'}")
    print(", ".join(str(folder / name) for name in written))
    return 0


def _print_scores(title: str, numbers: dict[str, float], classes: dict[str, float], shown: tuple[str, ...]) -> None:
    print(title + "  ".join(f"{name} {numbers[name]:.3f}" for name in shown))
    asked = {name: value for name, value in classes.items() if value >= 0}
    absent = len(classes) - len(asked)
    print(title + "  ".join(f"{name} {value:.3f}" for name, value in asked.items()) + (f"  ({absent} classes without objects)" if absent else ""))
