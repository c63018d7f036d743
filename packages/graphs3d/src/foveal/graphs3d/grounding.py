"""Scores of grounding and question answering in 3D: which object a text points at, and how its box overlaps the true one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment

from foveal.core.errors import UserError
from foveal.graphs3d.data.annotations import Referral
from foveal.graphs3d.data.scenes import Scene

#: Overlaps that count, as ScanRefer has them.
THRESHOLDS = (0.25, 0.5)


def overlaps(
    low: Float[np.ndarray, "boxes 3"], high: Float[np.ndarray, "boxes 3"], other_low: Float[np.ndarray, "others 3"],
    other_high: Float[np.ndarray, "others 3"],
) -> Float[np.ndarray, "boxes others"]:  # fmt: skip
    """Intersection over union of axis-aligned boxes, given by lowest and highest corners."""
    inner = np.minimum(high[:, None], other_high) - np.maximum(low[:, None], other_low)
    shared = np.clip(inner, 0, None).prod(-1)
    own, other = (high - low).prod(-1), (other_high - other_low).prod(-1)
    return shared / np.maximum(own[:, None] + other - shared, 1e-12)


def objects_named(text: str, count: int) -> list[int]:
    """Numbers of the identifiers ``<OBJ012>`` in a model's output that a scene of `count` objects has, each once, in their order."""
    found = [int(number) for number in re.findall(r"<OBJ(\d{1,6})>", text)]
    return list(dict.fromkeys(number for number in found if number < count))


def grounding_accuracy(
    outputs: Sequence[str], referrals: Sequence[Referral], proposals: Mapping[str, Scene], truth: Mapping[str, Scene]
) -> dict[str, float]:
    """Share of texts whose first identifier has a box that overlaps the true one enough: Acc@0.25 and Acc@0.5 of ScanRefer and of ASR.

    An output without a valid identifier counts as object 0, as the authors of QuatRoPE score their Attribute-free Spatial Reasoning.

    Args:
        outputs: of the model, one a referral.
        referrals: what was described; the first object is the true one.
        proposals: scene -> the boxes that identifiers number, from a segmentation or the annotation.
        truth: scene -> annotated boxes.

    Raises:
        UserError: as many outputs as referrals, scenes and objects are expected.
    """
    if len(outputs) != len(referrals):
        raise UserError(f"expected an output for each of {len(referrals)} descriptions; got {len(outputs)}; give them in the same order")
    values = []
    for output, referral in zip(outputs, referrals, strict=True):
        boxes = _of(proposals, referral.scene)
        chosen = (objects_named(output, len(boxes)) or [0])[0]
        values.append(_pairs(boxes, [chosen], _of(truth, referral.scene), referral.objects[:1])[0, 0])
    return {f"Acc@{threshold}": float(np.mean(np.array(values) >= threshold)) if values else 0.0 for threshold in THRESHOLDS}


def multiple_grounding_f1(
    outputs: Sequence[str], referrals: Sequence[Referral], proposals: Mapping[str, Scene], truth: Mapping[str, Scene]
) -> dict[str, float]:
    """F1@0.25 and F1@0.5 of Multi3DRefer: boxes named and boxes meant are paired one to one; nothing meant and nothing named is right."""
    if len(outputs) != len(referrals):
        raise UserError(f"expected an output for each of {len(referrals)} descriptions; got {len(outputs)}; give them in the same order")
    scores: dict[float, list[float]] = {threshold: [] for threshold in THRESHOLDS}
    for output, referral in zip(outputs, referrals, strict=True):
        boxes, true = _of(proposals, referral.scene), _of(truth, referral.scene)
        named = objects_named(output, len(boxes))
        if not named or not referral.objects:
            for threshold in THRESHOLDS:
                scores[threshold].append(float(not named and not referral.objects))
            continue
        pairs = _pairs(boxes, named, true, referral.objects)
        rows, columns = linear_sum_assignment(-pairs)
        for threshold in THRESHOLDS:
            hits = int((pairs[rows, columns] >= threshold).sum())
            scores[threshold].append(2 * hits / (len(named) + len(referral.objects)))
    return {f"F1@{threshold}": float(np.mean(values)) if values else 0.0 for threshold, values in scores.items()}


def exact_match(outputs: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """EM of SQA3D, and EM-R, which also takes an answer that contains the true one or is contained in it, word by word."""
    if len(outputs) != len(answers):
        raise UserError(f"expected an output for each of {len(answers)} questions; got {len(outputs)}; give them in the same order")
    strict, refined = [], []
    for output, accepted in zip(outputs, answers, strict=True):
        said, true = _plain(output), [_plain(answer) for answer in accepted]
        strict.append(said in true)
        refined.append(any(said == one or (said and one and (f" {one} " in f" {said} " or f" {said} " in f" {one} ")) for one in true))
    return {"EM": float(np.mean(strict)) if strict else 0.0, "EM-R": float(np.mean(refined)) if refined else 0.0}


def _plain(text: str) -> str:
    return " ".join(word for word in re.sub(r"[^\w\s]", " ", text.lower()).split() if word not in ("a", "an", "the"))


def _of(scenes: Mapping[str, Scene], name: str) -> Scene:
    if name not in scenes:
        raise UserError(f"expected boxes of scene {name!r}; there are {len(scenes)} scenes without it; add it")
    return scenes[name]


def _pairs(boxes: Scene, chosen: Sequence[int], true: Scene, objects: Sequence[str]) -> Float[np.ndarray, "chosen objects"]:
    missing = [identity for identity in objects if identity not in true.ids]
    if missing:
        raise UserError(f"expected object {missing[0]} in scene {true.name!r}; it has {len(true)} others; check the annotation")
    meant = [true.ids.index(identity) for identity in objects]
    (low, high), (true_low, true_high) = boxes.corners(), true.corners()
    return overlaps(low[list(chosen)], high[list(chosen)], true_low[meant], true_high[meant])
