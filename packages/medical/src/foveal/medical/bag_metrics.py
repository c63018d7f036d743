"""Scores of bags: both averages of F1, because the authors' code reports the micro average, which is accuracy, under the name F1."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.classification import multiclass_f1_score

from foveal.medical.classification_metrics import film_scores


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
    common = film_scores(probabilities.double(), labels, [str(number) for number in range(classes)])
    return BagScores(
        accuracy=common["accuracy"],
        balanced_accuracy=common["balanced_accuracy"],
        macro_f1=float(multiclass_f1_score(predicted, labels, classes, average="macro")),
        micro_f1=float(multiclass_f1_score(predicted, labels, classes, average="micro")),
        auroc=common["auroc"],
    )
