"""What a test of segmentation leaves in the run's folder: a table of cases, box plots, agreement of volumes, the worst overlays, and a page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from numpy import ndarray

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.medical.metrics import dice_scores, hausdorff95, mean_known
from foveal.medical.plots import bland_altman_figure, dice_figure, overlay_figure
from foveal.medical.volumes import Volume


@dataclass(frozen=True)
class MeasuredCase:
    """A scan, what was found in it and how good that is.

    Attributes:
        name: of the scan.
        image: the scan.
        labels: found.
        truth: reference.
        dice: of each structure; NaN where there is none and none was found.
        hd95: millimetres; a missed structure counts with the diagonal.
        millilitres: (structures, 2): found, reference.
    """

    name: str
    image: Volume
    labels: Int[ndarray, "i j k"]
    truth: Int[ndarray, "i j k"]
    dice: Float[ndarray, " structures"]
    hd95: Float[ndarray, " structures"]
    millilitres: Float[ndarray, "structures 2"]

    @property
    def missed(self) -> int:
        """Structures that are there and were not found."""
        return sum(bool((self.truth == label).any()) and not (self.labels == label).any() for label in range(1, len(self.dice) + 1))


def measured(name: str, image: Volume, labels: Int[ndarray, "i j k"], truth: Int[ndarray, "i j k"], class_names: Sequence[str]) -> MeasuredCase:
    """Score one scan on its own grid."""
    classes = len(class_names) + 1
    volume = image.millilitres_of_a_voxel
    sizes = np.array([[(labels == label).sum() * volume, (truth == label).sum() * volume] for label in range(1, classes)])
    distances = hausdorff95(labels, truth, classes, image.spacing)
    return MeasuredCase(name, image, labels, truth, dice_scores(labels, truth, classes), distances, sizes)


class SegmentationReport:
    """The cases of a test together.

    Args:
        cases: measured.
        class_names: of the structures.
    """

    def __init__(self, cases: Sequence[MeasuredCase], class_names: Sequence[str]) -> None:
        self.cases, self.class_names = list(cases), list(class_names)

    def table(self) -> pd.DataFrame:
        """One row a case."""
        rows = []
        for case in self.cases:
            row: dict[str, Any] = {"case": case.name, "missed": case.missed}
            for index, name in enumerate(self.class_names):
                row |= {f"dice {name}": case.dice[index], f"hd95 {name} (mm)": case.hd95[index]}
                row |= {f"{name} found (ml)": case.millilitres[index, 0], f"{name} reference (ml)": case.millilitres[index, 1]}
            rows.append(row)
        return pd.DataFrame(rows)

    def means(self) -> dict[str, float]:
        """Mean Dice and HD95 over cases, of each structure and of all; and how many structures were missed."""
        dice, hd95 = (np.array([getattr(case, name) for case in self.cases]) for name in ("dice", "hd95"))
        out = {"dice": mean_known(dice), "hd95": mean_known(hd95), "missed": float(sum(case.missed for case in self.cases))}
        for index, name in enumerate(self.class_names):
            key = name.replace(" ", "_")
            out |= {f"dice_{key}": mean_known(dice[:, index]), f"hd95_{key}": mean_known(hd95[:, index])}
        return out

    def figures(self, overlays: int = 4) -> dict[str, Figure]:
        """Box plots, agreement of volumes, and the scans with the lowest Dice."""
        dice = {name: [float(case.dice[index]) for case in self.cases] for index, name in enumerate(self.class_names)}
        hd95 = {name: [float(case.hd95[index]) for case in self.cases] for index, name in enumerate(self.class_names)}
        sizes = {name: ([float(case.millilitres[index, 0]) for case in self.cases], [float(case.millilitres[index, 1]) for case in self.cases])
                 for index, name in enumerate(self.class_names)}  # fmt: skip
        out = {"dice": dice_figure(dice), "hd95": dice_figure(hd95, "HD95 (mm)"), "volumes": bland_altman_figure(sizes)}
        worst = sorted(self.cases, key=lambda case: mean_known(case.dice))
        for case in worst[:overlays]:
            title = f"{case.name}: Dice {mean_known(case.dice):.3f}"
            out[f"overlay_{case.name}"] = overlay_figure(case.image, case.labels, self.class_names, case.truth, title=title)
        return out

    def finish(self, trainer: pl.Trainer) -> Path | None:
        """Write ``cases.csv``, the pictures and ``report.html`` into the run's folder."""
        if getattr(trainer, "fast_dev_run", False) or not self.cases:
            return None
        return self.write(run_folder.current(trainer.default_root_dir))

    def write(self, folder: Path) -> Path:
        """Write everything into `folder`; gives the page."""
        folder.mkdir(parents=True, exist_ok=True)
        table, figures = self.table(), self.figures()
        with atomic_write(folder / "cases.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.4f")
        (folder / "pictures").mkdir(exist_ok=True)
        for name, figure in figures.items():
            with atomic_write(folder / "pictures" / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=110)
        with atomic_write(folder / "report.html") as temporary:
            temporary.write_text(page(f"{len(self.cases)} scans segmented", self.means(), table, figures), encoding="utf-8")
        return folder / "report.html"


def page(title: str, means: dict[str, float], table: pd.DataFrame, figures: dict[str, Figure], heading: str = "Cases") -> str:
    """One HTML file that needs no other."""
    pictures = []
    for name, figure in figures.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=110)
        encoded = base64.b64encode(stream.getvalue()).decode()
        caption = html.escape(name.replace("_", " ", 1))
        pictures.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{encoded}"><figcaption>{caption}</figcaption></figure>')
    numbers = "".join(f"<tr><th>{html.escape(name)}</th><td>{value:.4g}</td></tr>" for name, value in means.items())
    cells = "td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}th{text-align:left}"
    style = (
        "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}table{border-collapse:collapse;font-size:13px}"
        f"{cells}figure{{display:inline-block;margin:1em 1em 1em 0}}img{{max-width:100%}}.wide{{overflow-x:auto}}figcaption{{color:#555}}"
    )
    cases = table.to_html(index=False, float_format=lambda value: f"{value:.3f}", border=0, na_rep="")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    body = (
        f"<h1>{html.escape(title)}</h1><table>{numbers}</table>{''.join(pictures)}<h2>{html.escape(heading)}</h2><div class=wide>{cases}</div></html>"
    )
    return head + body
