"""Scores of segmentations and restorations that count what others drop: missed structures, and the range a PSNR is taken in."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from monai.metrics import compute_hausdorff_distance
from numpy import ndarray


def dice_scores(predicted: Int[ndarray, "i j k"], truth: Int[ndarray, "i j k"], classes: int) -> Float[ndarray, " foreground"]:
    """Dice of each class but the background. A class that is in neither is NaN (no structure to find), one that is in one of them is 0."""
    scores = []
    for label in range(1, classes):
        found, wanted = predicted == label, truth == label
        size = int(found.sum()) + int(wanted.sum())
        scores.append(2 * int((found & wanted).sum()) / size if size else np.nan)
    return np.array(scores)


def hausdorff95(
    predicted: Int[ndarray, "i j k"], truth: Int[ndarray, "i j k"], classes: int, spacing: Sequence[float]
) -> Float[ndarray, " foreground"]:
    """95th percentile of the surfaces' distances in millimetres, of each class but the background.

    A class that was missed, or invented, counts with the volume's diagonal: a mean over cases must not profit from misses. NaN where there is
    none to find and none found.
    """
    labels = range(1, classes)
    here = [(bool((predicted == label).any()), bool((truth == label).any())) for label in labels]
    diagonal = float(np.linalg.norm(np.array(truth.shape) * np.array(spacing)))
    both = [label for label, (found, wanted) in zip(labels, here, strict=True) if found and wanted]
    distances = {}
    if both:
        first, second = (torch.from_numpy(np.stack([volume == label for label in both])[None].astype(np.float32)) for volume in (predicted, truth))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of an argument that it passes to itself
            values = compute_hausdorff_distance(first, second, include_background=True, percentile=95, spacing=list(spacing))
        distances = dict(zip(both, values[0].tolist(), strict=True))
    return np.array([distances.get(label, diagonal if any(seen) else np.nan) for label, seen in zip(labels, here, strict=True)])


def mean_known(values: Float[ndarray, "..."]) -> float:
    """Mean of the values that are not NaN; NaN where all are."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
