"""Scores of classifiers that say what a reader of films asks: of the sick, how many are found; of those found, how many are sick."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_confusion_matrix


def confusion(probabilities: Float[Tensor, "films classes"], labels: Int[Tensor, " films"]) -> Int[Tensor, "classes classes"]:
    """How many films of a class (row) were taken for which (column): the likeliest."""
    return multiclass_confusion_matrix(probabilities.argmax(1), labels, probabilities.shape[1])


def film_scores(probabilities: Float[Tensor, "films classes"], labels: Int[Tensor, " films"], class_names: Sequence[str]) -> dict[str, float]:
    """Accuracy, their mean by class, sensitivity and positive predictive value of each class, AUROC of each against the rest and their mean.

    What a set of films cannot tell is NaN: the sensitivity of a class it has no film of, the predictive value of a class nothing was taken for.
    """
    table = confusion(probabilities, labels).double()
    right, there, taken = table.diagonal(), table.sum(1), table.sum(0)
    sensitivity, predictive = right / there, right / taken
    areas = [
        float(binary_auroc(probabilities[:, number], (labels == number).long())) if 0 < int((labels == number).sum()) < len(labels) else float("nan")
        for number in range(len(class_names))
    ]
    known = torch.tensor(areas, dtype=torch.float64)
    out = {"accuracy": float(right.sum() / table.sum()), "balanced_accuracy": float(sensitivity.nanmean()), "auroc": float(known.nanmean())}
    for number, name in enumerate(class_names):
        key = name.replace(" ", "_")
        out |= {f"sensitivity_{key}": float(sensitivity[number]), f"ppv_{key}": float(predictive[number]), f"auroc_{key}": areas[number]}
    return out
