"""What a test of bags leaves in the run's folder: a table of predictions, the confusion matrix, ROC curves, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from numpy import ndarray

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.medical.bag_metrics import bag_scores
from foveal.medical.classification_metrics import confusion
from foveal.medical.film_plots import confusion_figure, roc_figure
from foveal.medical.tasks.segmentation_report import page


class BagReport:
    """The bags of a test together.

    Args:
        names: name and number of instances of each bag.
        probabilities: of each class.
        labels: true classes.
        class_names: of the classes.
    """

    def __init__(
        self, names: Sequence[tuple[str, int]], probabilities: Float[ndarray, "bags classes"], labels: Int[ndarray, " bags"],
        class_names: Sequence[str],
    ) -> None:  # fmt: skip
        self.names, self.probabilities, self.labels, self.class_names = list(names), probabilities, labels, list(class_names)

    def table(self) -> pd.DataFrame:
        """One row a bag."""
        predicted = self.probabilities.argmax(1)
        columns = {
            "bag": [name for name, _ in self.names],
            "instances": [count for _, count in self.names],
            "label": [self.class_names[label] for label in self.labels],
            "predicted": [self.class_names[label] for label in predicted],
            "right": predicted == self.labels,
        }
        return pd.DataFrame(columns | {f"p {name}": self.probabilities[:, number] for number, name in enumerate(self.class_names)})

    def means(self) -> dict[str, float]:
        """The scores over all bags."""
        return bag_scores(torch.from_numpy(self.probabilities), torch.from_numpy(self.labels))._asdict()

    def figures(self) -> dict[str, Figure]:
        """Confusion matrix and ROC curves."""
        counts = confusion(torch.from_numpy(self.probabilities), torch.from_numpy(self.labels)).numpy()
        return {"confusion": confusion_figure(counts, self.class_names), "roc": roc_figure(self.probabilities, self.labels, self.class_names)}

    def finish(self, trainer: pl.Trainer) -> Path | None:
        """Write ``bags.csv``, the pictures and ``report.html`` into the run's folder."""
        if getattr(trainer, "fast_dev_run", False) or not self.names:
            return None
        return self.write(run_folder.current(trainer.default_root_dir))

    def write(self, folder: Path) -> Path:
        """Write everything into `folder`; gives the page."""
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        table, figures = self.table(), self.figures()
        with atomic_write(folder / "bags.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.4f")
        for name, figure in figures.items():
            with atomic_write(folder / "pictures" / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=110)
        with atomic_write(folder / "report.html") as temporary:
            temporary.write_text(page(f"{len(self.names)} bags classified", self.means(), table, figures), encoding="utf-8")
        return folder / "report.html"
