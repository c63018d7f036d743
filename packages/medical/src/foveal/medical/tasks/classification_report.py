"""What a test of classification leaves in the run's folder: a table of films, confusions, curves, the most wrong films' attention, and a page."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.medical.classification_metrics import confusion, film_scores
from foveal.medical.data.films import Films
from foveal.medical.film_plots import confusion_figure, film_attention_figure, roc_figure
from foveal.medical.tasks.segmentation_report import page


class FilmReport:
    """The films of a test together.

    Args:
        films: of the test.
        probabilities: of the classes.
        labels: numbers of the classes.
        index: of each row among the films.
    """

    def __init__(self, films: Films, probabilities: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], index: Int[Tensor, " rows"]) -> None:
        self.films, self.probabilities, self.labels, self.index = films, probabilities, labels, index

    def table(self) -> pd.DataFrame:
        """One row a film, the most wrong one first."""
        names, rows = self.films.class_names, []
        for values, label, index in zip(self.probabilities.tolist(), self.labels.tolist(), self.index.tolist(), strict=True):
            case = self.films.cases[index]
            row = {"film": case.name, "patient": case.patient, "source": case.source, "is": names[label], "taken for": names[int(np.argmax(values))]}
            rows.append({**row, **dict(zip(names, values, strict=True)), "of its class": values[label]})
        return pd.DataFrame(rows).sort_values("of its class", kind="stable").drop(columns="of its class")

    def scores(self) -> dict[str, float]:
        """See `film_scores`."""
        return film_scores(self.probabilities, self.labels, self.films.class_names)

    def figures(self, network: nn.Module | None = None, overlays: int = 6) -> dict[str, Figure]:
        """Confusions, curves and, of a network with attention, the most wrong films."""
        names = self.films.class_names
        out = {
            "confusion": confusion_figure(confusion(self.probabilities, self.labels).numpy(), names),
            "roc": roc_figure(self.probabilities.numpy(), self.labels.numpy(), names),
        }
        if network is None or not hasattr(network, "attended"):
            return out
        device = next(network.parameters()).device
        own = self.probabilities.gather(1, self.labels[:, None])[:, 0]
        for row in own.argsort()[:overlays].tolist():
            case = self.films.cases[int(self.index[row])]
            film = case.read()
            with torch.no_grad():
                maps = network.attended(self.films.preparation(film)[None].to(device))  # type: ignore[operator]
            shares = dict(zip(names, self.probabilities[row].tolist(), strict=True))
            shown = {stage: weights[0].float().cpu().numpy() for stage, weights in maps.items()}
            title = f"{case.name} is {names[int(self.labels[row])]}"
            name = f"film_{case.name}".replace("/", "_")
            out[name] = film_attention_figure(self.films.preparation.shown(film), shown, shares, title)
        return out

    def finish(self, trainer: pl.Trainer, network: nn.Module, overlays: int) -> Path:
        """Write everything into the run's folder; gives the page."""
        return self.write(run_folder.current(trainer.default_root_dir), network, overlays)

    def write(self, folder: Path, network: nn.Module | None = None, overlays: int = 6) -> Path:
        """Write ``films.csv``, the pictures and ``report.html`` into `folder`."""
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        table, figures = self.table(), self.figures(network, overlays)
        with atomic_write(folder / "films.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.5f")
        for name, figure in figures.items():
            with atomic_write(folder / "pictures" / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=110)
        with atomic_write(folder / "report.html") as temporary:
            temporary.write_text(page(f"{len(table)} films classified", self.scores(), table, figures, "Films"), encoding="utf-8")
        return folder / "report.html"
