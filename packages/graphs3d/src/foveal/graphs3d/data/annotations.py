"""Annotation files of ScanRefer, Multi3DRefer, SQA3D and ASR, and object features as Chat-Scene keeps them, as users download them themselves.

None of these is shipped: ScanRefer is CC BY-NC-SA, the scans are ScanNet's. The readers take the files as published.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foveal.core.errors import UserError
from foveal.graphs3d.data.scenes import Scene


@dataclass(frozen=True)
class Referral:
    """A description and what it means.

    Attributes:
        scene: name, such as scene0011_00.
        text: description or prompt.
        objects: ids of the objects that are meant; none where nothing in the scene is.
        label: class, where the file says it.
        kind: Multi3DRefer's case (``zt_w_d``, ``st_wo_d``, ``mt``, ...), where the file says it.
    """

    scene: str
    text: str
    objects: tuple[str, ...]
    label: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Situated:
    """A question of SQA3D, asked by somebody who stands in the scene.

    Attributes:
        scene: name.
        situation: where the person is, in words.
        question: as asked.
        answers: accepted ones; none in files without annotations.
        position: of the person in metres.
        rotation: of the person, a unit quaternion (x, y, z, w).
    """

    scene: str
    situation: str
    question: str
    answers: tuple[str, ...] = ()
    position: tuple[float, ...] = ()
    rotation: tuple[float, ...] = ()


def read_scanrefer(path: str | Path) -> list[Referral]:
    """``ScanRefer_filtered_val.json``: one object a description.

    Raises:
        UserError: not such a file.
    """
    fields = ("scene_id", "object_id", "description")
    return [
        Referral(row["scene_id"], row["description"], (str(row["object_id"]),), str(row.get("object_name", "")).replace("_", " "))
        for row in _rows(path, fields, "ScanRefer")
    ]


def read_multi3drefer(path: str | Path) -> list[Referral]:
    """``multi3drefer_val.json``: none, one or several objects a description.

    Raises:
        UserError: not such a file.
    """
    return [
        Referral(
            row["scene_id"], row["description"], tuple(map(str, row["object_ids"])), str(row.get("object_name", "")).replace("_", " "),
            str(row.get("eval_type", "")),
        )
        for row in _rows(path, ("scene_id", "object_ids", "description"), "Multi3DRefer")
    ]  # fmt: skip


def read_asr(path: str | Path) -> list[Referral]:
    """``asr_gt_val.json`` of QuatRoPE: attribute-free questions with one object each.

    Raises:
        UserError: not such a file.
    """
    return [Referral(row["scene_id"], row["prompt"], (str(row["obj_id"]),)) for row in _rows(path, ("scene_id", "obj_id", "prompt"), "ASR")]


def read_sqa3d(questions: str | Path, annotations: str | Path | None = None) -> list[Situated]:
    """``v1_balanced_questions_val_scannetv2.json``, and ``v1_balanced_sqa_annotations_val_scannetv2.json`` with the answers.

    Raises:
        UserError: not such files, or a question without annotation.
    """
    asked = _rows(questions, ("scene_id", "situation", "question", "question_id"), "SQA3D", "questions")
    if annotations is None:
        return [Situated(row["scene_id"], row["situation"], row["question"]) for row in asked]
    known = {row["question_id"]: row for row in _rows(annotations, ("question_id", "answers"), "SQA3D", "annotations")}
    found = []
    for row in asked:
        if row["question_id"] not in known:
            raise UserError(f"expected an annotation of question {row['question_id']}; {annotations} has none; take the files of one split")
        note = known[row["question_id"]]
        place, turn = note.get("position", {}), note.get("rotation", {})
        found.append(
            Situated(
                row["scene_id"], row["situation"], row["question"], tuple(answer["answer"] for answer in note["answers"]),
                tuple(float(place[axis]) for axis in "xyz" if axis in place), tuple(float(turn[f"_{axis}"]) for axis in "xyzw" if f"_{axis}" in turn),
            )
        )  # fmt: skip
    return found


def read_object_features(path: str | Path) -> dict[str, dict[int, Float[Tensor, " dim"]]]:
    """Chat-Scene's features of segmented objects: scene -> object -> vector. The file maps ``scene0011_00_07`` to a vector.

    Raises:
        UserError: the file cannot be read without unpickling code, or holds something else.
    """
    content = _load(path)
    found: dict[str, dict[int, Tensor]] = {}
    for key, value in content.items():
        scene, _, number = str(key).rpartition("_")
        if not number.isdigit() or not scene or not isinstance(value, Tensor) or value.dim() != 1:
            raise UserError(f"expected vectors under keys such as scene0011_00_07 in {path}; got {key!r}; is it a file of features?")
        found.setdefault(scene, {})[int(number)] = value
    return found


def read_object_boxes(path: str | Path) -> dict[str, Scene]:
    """Chat-Scene's ``scannet_*_attributes.pt``: scene -> its objects, ``locs`` as centre and size and ``objects`` as classes.

    Raises:
        UserError: as `read_object_features`.
    """
    scenes = {}
    for name, entry in _load(path).items():
        boxes = entry.get("locs") if isinstance(entry, Mapping) else None
        if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 6:
            raise UserError(f"expected locs of shape (objects, 6) for scene {name!r} in {path}; is it a file of attributes?")
        numbers, labels = boxes.double().numpy(), entry.get("objects") or ["object"] * len(boxes)
        # Parts of a scan that the segmentation gave no points have no extent.
        sizes = np.maximum(numbers[:, 3:], 1e-3)
        scenes[str(name)] = Scene(str(name), tuple(map(str, range(len(numbers)))), tuple(map(str, labels)), numbers[:, :3], sizes)
    return scenes


def _load(path: str | Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever it meets
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"expected a file of tensors; {path} cannot be read as one: {reason}; check the file") from None
    if not isinstance(content, Mapping):
        raise UserError(f"expected a mapping by scene in {path}; it holds {type(content).__name__}; check the file")
    return content


def _rows(path: str | Path, fields: tuple[str, ...], what: str, key: str | None = None) -> list[dict[str, Any]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected {what}'s JSON; {path} cannot be read: {error}; check the file") from None
    rows = content.get(key) if key is not None and isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"expected a list{f' under {key!r}' if key else ''} in {path} as {what} publishes it; check the file")
    for place, row in enumerate(rows):
        missing = [field for field in fields if field not in row]
        if missing:
            raise UserError(f"expected {', '.join(fields)} in entry {place} of {path}; {', '.join(missing)} is missing; is it {what}'s file?")
    return rows
