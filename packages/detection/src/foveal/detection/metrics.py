"""Average precision of boxes, masks, keypoints and turned boxes as COCO defines it, by pycocotools itself, of predictions in memory or in a file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from foveal.core.errors import UserError
from foveal.detection.data.labels import LabelledPicture, Labels
from foveal.detection.masks import Masks, encoded
from foveal.detection.polygons import is_convex, polygon_overlap
from foveal.detection.postprocess import corners_of_turned, probabilistic_overlap

#: The twelve numbers of COCO, in its order.
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
#: Its ten of keypoints.
KEYPOINT_NAMES = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")
#: What predictions are compared by.
Kind = Literal["bbox", "segm", "keypoints", "oriented", "polygons"]
#: How much of its box an object fills where nothing says so: ultralytics' value, by which its own keypoints are measured.
_FILLED = 0.53


def coco_ground_truth(labels: Labels, kind: Kind = "bbox") -> dict[str, Any]:
    """The labels as a COCO file has them: images, annotations and categories.

    Args:
        labels: of the pictures.
        kind: what will be compared. Where the labels do not give an object's area it is for "bbox" the box's, for "segm" the mask's, and for
            "keypoints" 0.53 of the box's. Of "oriented" and "polygons" it is the turned box's, which is the smallest around the object's outline.

    Raises:
        ValueError: masks, keypoints or turned boxes are asked for, and objects lack masks, keypoints or outlines.
    """
    numbers = labels.numbers or list(range(len(labels.names)))
    annotations: list[dict[str, Any]] = []
    for picture in labels.pictures:
        turned = turned_boxes(picture) if kind in ("oriented", "polygons") else None
        if (
            (kind == "segm" and len(picture.masks) != len(picture.boxes))
            or (kind == "keypoints" and len(picture.boxes) and picture.keypoints is None)
            or (kind in ("oriented", "polygons") and turned is None)
        ):
            raise ValueError(f"{kind} of every object are needed; {picture.path} has boxes alone")
        groups = (
            (picture.boxes, picture.classes, picture.areas, picture.masks, picture.keypoints, 0),
            (picture.ignored, picture.ignored_classes, None, picture.ignored_masks, None, 1),
        )
        for boxes, classes, areas, masks, keypoints, crowd in groups:
            for row, (box, category) in enumerate(zip(boxes, classes, strict=True)):
                width, height = float(box[2] - box[0]), float(box[3] - box[1])
                entry: dict[str, Any] = {
                    "id": len(annotations) + 1, "image_id": picture.number, "category_id": numbers[category],
                    "bbox": [float(box[0]), float(box[1]), width, height], "area": width * height, "iscrowd": crowd,
                }  # fmt: skip
                if kind == "segm":
                    entry["segmentation"] = masks[row] if len(masks) == len(boxes) else [_polygon(box)]
                    entry["area"] = _area(entry["segmentation"], picture.size)
                elif kind == "keypoints":
                    entry |= _keypoints(keypoints[row] if keypoints is not None else np.zeros((1, 3)))
                    entry["area"] *= _FILLED
                elif turned is not None:
                    entry["rbox"] = turned[row].tolist() if not crowd else [*((box[:2] + box[2:]) / 2).tolist(), width, height, 0.0]
                    entry["segmentation"] = [_quadrilateral(picture.outlines[row], turned[row]) if not crowd else _polygon(box)]
                    entry["area"] = entry["rbox"][2] * entry["rbox"][3]
                if areas is not None and np.isfinite(areas[row]):
                    entry["area"] = float(areas[row])
                annotations.append(entry)
    return {
        "info": {},
        "images": [
            {"id": picture.number, "file_name": picture.path.name, "width": picture.size[0], "height": picture.size[1]} for picture in labels.pictures
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in zip(numbers, labels.names, strict=True)],
    }


def _polygon(box: np.ndarray) -> list[float]:
    left, top, right, bottom = (float(value) for value in box)
    return [left, top, right, top, right, bottom, left, bottom]


def _quadrilateral(outline: np.ndarray, turned: np.ndarray) -> list[float]:
    """An outline of four corners as it is, which DOTA measures by; of any other the smallest turned box around it."""
    corners = outline if len(outline) == 4 and is_convex(outline) else corners_of_turned(turned[None])[0]
    return corners.ravel().tolist()


def _area(mask: Any, size: tuple[int, int]) -> float:
    """Pixels of a mask as COCO has it."""
    if isinstance(mask, list):
        return float(run_lengths.area(run_lengths.merge(run_lengths.frPyObjects(mask, size[1], size[0]))))
    return float(run_lengths.area(run_lengths.frPyObjects(mask, size[1], size[0]) if isinstance(mask["counts"], list) else mask))


def _keypoints(points: np.ndarray) -> dict[str, Any]:
    """x, y and visibility one after the other. Labels without visibility say by a negative number that a point is not labelled."""
    seen = points[:, 2] if points.shape[1] == 3 else np.where((points < 0).any(1), 0.0, 2.0)
    numbers = np.column_stack((points[:, :2], seen)) * (seen > 0)[:, None]
    return {"keypoints": numbers.ravel().tolist(), "num_keypoints": int((seen > 0).sum())}


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


def coco_masks(number: int, masks: Masks | Iterable[np.ndarray], scores: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Masks found in picture `number` as COCO's result files have them; `masks` may be arrays (height, width) too."""
    lengths = (masks.run_lengths(row) for row in range(len(masks))) if isinstance(masks, Masks) else (encoded(mask) for mask in masks)
    return [
        {"image_id": number, "category_id": int(category), "score": float(score), "segmentation": mask}
        for mask, score, category in zip(lengths, scores, categories, strict=True)
    ]


def coco_keypoints(number: int, keypoints: np.ndarray, scores: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Keypoints (objects, keypoints, 2 or 3) found in picture `number` as COCO's result files have them."""
    found = np.concatenate((keypoints[..., :2], keypoints[..., 2:] if keypoints.shape[2] == 3 else np.ones((*keypoints.shape[:2], 1))), 2)
    return [
        {"image_id": number, "category_id": int(category), "score": float(score), "keypoints": points.astype(float).ravel().tolist()}
        for points, score, category in zip(found, scores, categories, strict=True)
    ]


def turned_boxes(picture: LabelledPicture) -> np.ndarray | None:
    """Centre x, centre y, width, height in pixels and angle in radians of the smallest turned box around each object's outline, (objects, 5), as
    ultralytics makes them of labels to train on; None where an object has no outline.
    """
    if len(picture.outlines) != len(picture.boxes):
        return None
    from foveal.detection.borrowed import xyxyxyxy2xywhr

    return np.concatenate([np.zeros((0, 5)), *(xyxyxyxy2xywhr(outline[None]) for outline in picture.outlines)])


def coco_oriented(number: int, oriented: np.ndarray, boxes: np.ndarray, scores: np.ndarray, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Turned boxes found in picture `number` as result files have them: COCO's upright box and outline, and ``rbox`` as ultralytics writes it.

    Args:
        number: of the picture.
        oriented: (objects, 5), centre x, centre y, width, height in pixels and angle in radians.
        boxes: (objects, 4), corners of the upright boxes around them.
        scores: (objects,).
        categories: of the objects.
    """
    found = coco_predictions(number, boxes, scores, categories)
    for entry, box, points in zip(found, oriented.astype(float), corners_of_turned(oriented.astype(float)), strict=True):
        entry |= {"rbox": box.tolist(), "segmentation": [points.ravel().tolist()]}
    return found


class _TurnedEvaluation(COCOeval):
    """COCO's evaluation of boxes that are turned: by their probabilistic overlap, all else as of upright boxes.

    A crowd, which may hold many objects, takes the share of the upright box that lies in its own, as COCO has it.
    """

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        """Overlaps of the surest predictions (rows) with the objects of a picture and a class."""
        objects, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not objects or not found:
            return []
        found = sorted(found, key=lambda entry: -entry["score"])[: self.params.maxDets[-1]]
        shared = self.overlap(found, objects)
        crowds = np.array([bool(entry["iscrowd"]) for entry in objects])
        if crowds.any():
            upright = run_lengths.iou([entry["bbox"] for entry in found], [entry["bbox"] for entry in objects], crowds.astype(np.uint8).tolist())
            shared[:, crowds] = upright[:, crowds]
        return shared

    def overlap(self, found: list[dict[str, Any]], objects: list[dict[str, Any]]) -> np.ndarray:
        """Of predictions (rows) with objects."""
        turned = [torch.tensor([entry["rbox"] for entry in entries], dtype=torch.float64) for entries in (found, objects)]
        return probabilistic_overlap(*turned).numpy()


class _PolygonEvaluation(_TurnedEvaluation):
    """The same by the intersection over union of the outlines, which have four corners each, as DOTA's evaluation has it."""

    def overlap(self, found: list[dict[str, Any]], objects: list[dict[str, Any]]) -> np.ndarray:
        """Of predictions (rows) with objects."""
        outlines = [np.array([entry["segmentation"][0] for entry in entries]).reshape(-1, 4, 2) for entries in (found, objects)]
        return polygon_overlap(*outlines)


def average_precision(
    truth: dict[str, Any], predictions: list[dict[str, Any]], kind: Kind = "bbox", sigmas: Sequence[float] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """COCO's twelve numbers, ten of keypoints, and the AP of each class by its name; -1 where there is nothing to find.

    Args:
        truth: as `coco_ground_truth` gives it for this kind.
        predictions: of all pictures, as `coco_predictions`, `coco_masks`, `coco_keypoints` or `coco_oriented` give them.
        kind: "bbox" compares boxes and "segm" masks by what they share, "keypoints" keypoints by COCO's similarity (OKS), "oriented" turned boxes
            by their probabilistic overlap, as ultralytics does, and "polygons" by the intersection over union of their outlines, as DOTA does.
        sigmas: of the keypoints; by default COCO's where they are its 17, else 1 / keypoints for each, as ultralytics has it.
    """
    names = KEYPOINT_NAMES if kind == "keypoints" else NAMES
    if not predictions:
        asked = {
            annotation["category_id"] for annotation in truth["annotations"] if annotation.get("num_keypoints", 1) and not annotation.get("iscrowd")
        }
        listed = {category["id"]: category["name"] for category in truth["categories"]}
        return dict.fromkeys(names, 0.0 if asked else -1.0), {name: (0.0 if number in asked else -1.0) for number, name in listed.items()}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its steps
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        results = reference.loadRes([dict(entry) for entry in predictions])  # it writes into what it is given
        if kind in ("oriented", "polygons"):
            for entry in results.dataset["annotations"]:
                entry["area"] = entry["rbox"][2] * entry["rbox"][3]
            evaluation: COCOeval = (_TurnedEvaluation if kind == "oriented" else _PolygonEvaluation)(reference, results, "bbox")
        else:
            evaluation = COCOeval(reference, results, kind)
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = _sigmas(sigmas, len(predictions[0]["keypoints"]) // 3)
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
    return dict(zip(names, map(float, evaluation.stats), strict=True)), classes


def _sigmas(given: Sequence[float] | None, count: int) -> np.ndarray:
    if given:
        if len(given) != count:
            raise UserError(f"expected a sigma for each of the {count} keypoints; got {len(given)}; correct kpt_sigmas of the data")
        return np.asarray(given, dtype=float)
    published = Params("keypoints").kpt_oks_sigmas
    return published if count == len(published) else np.full(count, 1 / count)
