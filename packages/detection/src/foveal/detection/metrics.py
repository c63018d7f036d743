"""Average precision as COCO defines it, by pycocotools itself, of predictions in memory or in a file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from foveal.detection.data.labels import Labels

#: The twelve numbers of COCO, in its order.
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def coco_ground_truth(labels: Labels) -> dict[str, Any]:
    """The labels as a COCO file has them: images, annotations and categories."""
    numbers = labels.numbers or list(range(len(labels.names)))
    annotations: list[dict[str, Any]] = []
    for picture in labels.pictures:
        groups = ((picture.boxes, picture.classes, 0), (picture.ignored, picture.ignored_classes, 1))
        for boxes, classes, crowd in groups:
            for box, kind in zip(boxes, classes, strict=True):
                width, height = float(box[2] - box[0]), float(box[3] - box[1])
                annotations.append({
                    "id": len(annotations) + 1, "image_id": picture.number, "category_id": numbers[kind],
                    "bbox": [float(box[0]), float(box[1]), width, height], "area": width * height, "iscrowd": crowd,
                })  # fmt: skip
    return {
        "info": {},
        "images": [
            {"id": picture.number, "file_name": picture.path.name, "width": picture.size[0], "height": picture.size[1]} for picture in labels.pictures
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in zip(numbers, labels.names, strict=True)],
    }


def coco_predictions(number: int, boxes: np.ndarray, scores: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Objects found in picture `number` as COCO's result files have them; `boxes` are corners in pixels."""
    return [
        {
            "image_id": number,
            "category_id": int(category),
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "score": float(score),
        }
        for box, score, category in zip(boxes, scores, categories, strict=True)
    ]


def average_precision(
    truth: dict[str, Any], predictions: list[dict[str, Any]], kind: Literal["bbox", "segm"] = "bbox"
) -> tuple[dict[str, float], dict[str, float]]:
    """COCO's twelve numbers, and the AP of each class by its name; -1 where there is nothing to find.

    Args:
        truth: as `coco_ground_truth` gives it.
        predictions: as `coco_predictions` gives them, of all pictures; for masks with ``segmentation`` in place of ``bbox``.
        kind: "bbox" compares boxes, "segm" masks.
    """
    if not predictions:
        asked = {annotation["category_id"] for annotation in truth["annotations"]}
        names = {category["id"]: category["name"] for category in truth["categories"]}
        return dict.fromkeys(NAMES, 0.0 if asked else -1.0), {name: (0.0 if number in asked else -1.0) for number, name in names.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its steps
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(predictions), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: (overlap thresholds, recalls, classes, areas, numbers of detections)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_number = {category["id"]: category["name"] for category in truth["categories"]}
    classes = {}
    for position, number in enumerate(evaluation.params.catIds):
        values = precision[:, :, position]
        values = values[values > -1]
        classes[by_number[number]] = float(values.mean()) if values.size else -1.0
    return dict(zip(NAMES, map(float, evaluation.stats), strict=True)), classes
