"""Scores of bags: both averages of F1, because the authors' code reports the micro average, which is accuracy, under the name F1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_f1_score


class BagScores(NamedTuple):
    """Scores over bags.

    Attributes:
        accuracy: share of the bags that are classified rightly.
        balanced_accuracy: mean recall of the classes that are there.
        macro_f1: mean F1 of the classes.
        micro_f1: F1 of all decisions together: the accuracy.
        auroc: area under the ROC curve; of more than two classes the mean of one against the rest. NaN where bags of one class only are there.
    """

    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    micro_f1: float
    auroc: float


def bag_scores(probabilities: Float[Tensor, "bags classes"], labels: Int[Tensor, " bags"]) -> BagScores:
    """Score predictions; classes that are in neither labels nor predictions count in no mean."""
    classes, predicted = probabilities.shape[1], probabilities.argmax(1)
    present = [number for number in range(classes) if bool((labels == number).any())]
    recalls = multiclass_accuracy(predicted, labels, classes, average="none")
    areas = [
        float(binary_auroc(probabilities[:, number].double(), (labels == number).long()))
        for number in (present if classes > 2 else present[-1:])
        if len(present) > 1
    ]
    return BagScores(
        accuracy=float((predicted == labels).double().mean()),
        balanced_accuracy=float(recalls[present].mean()),
        macro_f1=float(multiclass_f1_score(predicted, labels, classes, average="macro")),
        micro_f1=float(multiclass_f1_score(predicted, labels, classes, average="micro")),
        auroc=float(torch.tensor(areas).mean()) if areas else float("nan"),
    )
