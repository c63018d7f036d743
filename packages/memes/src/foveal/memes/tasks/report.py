"""What a test says of a model: scores of each task with intervals, with and without leaked memes, in a table and in pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import partial

import lightning.pytorch as pl
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from rich.console import Console
from rich.table import Table
from scipy.special import softmax
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, roc_auc_score

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.core.tracking import log_figure
from foveal.memes.calibration import bootstrap, expected_calibration_error
from foveal.memes.data.features import NO_LABEL
from foveal.memes.plots import calibration_figure, confusion_figure, curves_figure

#: Tasks whose classes are in order: how far a wrong answer is off counts.
ORDINAL = ("intensity",)


def scores_of(
    logits: Float[ndarray, "memes classes"], labels: Int[ndarray, " memes"], names: Sequence[str], ordinal: bool = False
) -> dict[str, float]:
    """Scores of one task over the memes that are labelled for it; empty where none is.

    ``accuracy``, ``majority`` (accuracy of the commonest class), ``macro_f1``, ``weighted_f1``, ``f1/<class>``; of two classes ``auroc`` and
    ``calibration_error``; of ordered classes ``pearson`` and ``quadratic_kappa``. What is undefined (one class only) is left out.
    """
    known = labels != NO_LABEL
    logits, labels = logits[known], labels[known]
    if not len(labels):
        return {}
    chosen, every = logits.argmax(-1), np.arange(len(names))
    single = f1_score(labels, chosen, labels=every, average=None, zero_division=0)
    scores = {
        "accuracy": float(accuracy_score(labels, chosen)),
        "majority": float(np.bincount(labels).max() / len(labels)),
        "macro_f1": float(f1_score(labels, chosen, labels=np.unique(labels), average="macro", zero_division=0)),
        "weighted_f1": float(f1_score(labels, chosen, average="weighted", zero_division=0)),
        **{f"f1/{name}": float(value) for name, value in zip(names, single, strict=True)},
    }
    if len(names) == 2:
        probability = softmax(logits, -1)[:, 1]
        scores["calibration_error"] = expected_calibration_error(probability, labels)
        if len(np.unique(labels)) == 2:
            scores["auroc"] = float(roc_auc_score(labels, probability))
    if ordinal and len(np.unique(labels)) > 1 and len(np.unique(chosen)) > 1:
        scores["pearson"] = float(pearsonr(labels, chosen).statistic)
        scores["quadratic_kappa"] = float(cohen_kappa_score(labels, chosen, weights="quadratic"))
    return scores


class MemeReport:
    """Figures of a test.

    Args:
        classes: task -> names of its classes.
        logits: task -> (memes, classes).
        labels: task -> class, or `NO_LABEL`.
        leaks: memes whose text stands in the training data; they are counted and left out of a second set of figures. Empty: unknown.
    """

    def __init__(
        self, classes: Mapping[str, Sequence[str]], logits: Mapping[str, ndarray], labels: Mapping[str, ndarray], leaks: Bool[ndarray, " memes"]
    ) -> None:
        self.classes, self.logits, self.labels = classes, logits, labels
        memes = len(next(iter(logits.values())))
        self.leaks = leaks if len(leaks) == memes else np.zeros(memes, dtype=bool)

    def figures(self, rows: ndarray | None = None) -> dict[str, float]:
        """``<task>/<score>`` over all memes, or over some rows."""
        chosen = slice(None) if rows is None else rows
        return {
            f"{task}/{name}": value
            for task, names in self.classes.items()
            for name, value in scores_of(self.logits[task][chosen], self.labels[task][chosen], names, task in ORDINAL).items()
        }

    def intervals(self, draws: int = 1000) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals over memes of macro-F1 and AUROC."""
        found = {}
        for task, names in self.classes.items():
            known = np.flatnonzero(self.labels[task] != NO_LABEL)
            logits, labels = self.logits[task][known], self.labels[task][known]
            for score in ("macro_f1", "auroc"):
                if score in scores_of(logits, labels, names):
                    found[f"{task}/{score}"] = bootstrap(partial(_single, logits, labels, score), len(known), draws)
        return found

    def show(self, module: pl.LightningModule, stage: str) -> None:
        """Log the pictures of every task as ``<stage>/<task>/<picture>``: confusion, and of two classes curves and calibration."""
        for task, names in self.classes.items():
            known = self.labels[task] != NO_LABEL
            if not known.any():
                continue
            logits, labels = self.logits[task][known], self.labels[task][known]
            log_figure(module, f"{stage}/{task}/confusion", confusion_figure(labels, logits.argmax(-1), names, task))
            if len(names) == 2 and len(np.unique(labels)) == 2:
                probability = softmax(logits, -1)[:, 1]
                log_figure(module, f"{stage}/{task}/curves", curves_figure(labels, probability, task))
                log_figure(module, f"{stage}/{task}/calibration", calibration_figure(labels, probability, task))

    def finish(self, module: pl.LightningModule) -> None:
        """Write ``test.json``, ``test.csv`` and the pictures into the run's folder, and print the main figures."""
        trainer = module.trainer
        if getattr(trainer, "fast_dev_run", False):
            return
        self.show(module, "test")
        folder = run_folder.current(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        every, clean = self.figures(), self.figures(np.flatnonzero(~self.leaks)) if self.leaks.any() else {}
        intervals = self.intervals()
        with atomic_write(folder / "test.json") as temporary:
            content = {"memes": len(self.leaks), "leaked": int(self.leaks.sum()), "all": every, "without_leaks": clean, "intervals": intervals}
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        with atomic_write(folder / "test.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["figure", "all", "low", "high", "without_leaks"])
            for name, value in every.items():
                writer.writerow([name, value, *intervals.get(name, ("", "")), clean.get(name, "")])
        table = Table("figure", "all", "95 %", "without leaks")
        for name in (
            name for name in every if name.rpartition("/")[2] in ("macro_f1", "auroc", "accuracy", "majority", "pearson", "calibration_error")
        ):
            low, high = intervals.get(name, (float("nan"), float("nan")))
            spread = f"{low:.3f} - {high:.3f}" if np.isfinite(low) else ""
            table.add_row(name, f"{every[name]:.3f}", spread, f"{clean[name]:.3f}" if name in clean else "")
        Console().print(table)


def _single(logits: ndarray, labels: ndarray, score: str, rows: ndarray) -> float:
    logits, labels = logits[rows], labels[rows]
    if score == "auroc":
        if len(np.unique(labels)) < 2:
            raise ValueError("the area under a ROC curve needs both classes")
        return float(roc_auc_score(labels, softmax(logits, -1)[:, 1]))
    return float(f1_score(labels, logits.argmax(-1), labels=np.unique(labels), average="macro", zero_division=0))
