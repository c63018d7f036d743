"""The pictures of films: what MEDUSA lets through at each scale, confusions, receiver operating curves. One function a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from numpy import ndarray

from foveal.medical.plots import colour_of


def film_attention_figure(
    film: Float[ndarray, "rows columns"], maps: Mapping[str, Float[ndarray, "cells1 cells2"]], probabilities: Mapping[str, float], title: str = ""
) -> Figure:  # fmt: skip
    """A film, what of it each scale lets through, and the classes' probabilities.

    A map's colours span at least a tenth, so that attention which is nearly even does not look like a finding; its range is written above it.

    Args:
        film: grey values, 0 to 1, at any size.
        maps: scale -> mean attention there, from 0 to 1.
        probabilities: class -> probability.
        title: of the figure.
    """
    count = 1 + len(maps)
    rows, columns = film.shape
    figure = Figure(figsize=(2.9 * count + 2.6, max(2.6, 2.9 * rows / columns) + 0.7), layout="constrained")
    axes = figure.subplots(1, count + 1, width_ratios=[*[1.0] * count, 0.8], squeeze=False)[0]
    extent = (0, columns, rows, 0)
    axes[0].imshow(film, cmap="gray", vmin=0, vmax=1, extent=extent)
    axes[0].set_title("film", fontsize=9)
    for axis, (name, weights) in zip(axes[1:], maps.items(), strict=False):
        low, high = float(weights.min()), float(weights.max())
        axis.imshow(film, cmap="gray", vmin=0, vmax=1, extent=extent)
        # Bilinear, because a cell of the coarsest scale is as wide as a lung.
        lowest, highest = (low + high) / 2 - max(high - low, 0.1) / 2, (low + high) / 2 + max(high - low, 0.1) / 2
        axis.imshow(weights, cmap="inferno", alpha=0.45, vmin=lowest, vmax=highest, extent=extent, interpolation="bilinear")
        axis.set_title(f"{name}: {low:.3f} to {high:.3f}{', even' if high - low < 0.02 else ''}", fontsize=9)
    for axis in axes[:count]:
        axis.set_axis_off()
    names = list(probabilities)
    axes[-1].barh(range(len(names)), list(probabilities.values()), color=[colour_of(number + 1) for number in range(len(names))])
    axes[-1].set_yticks(range(len(names)), names, fontsize=8)
    axes[-1].set_xlim(0, 1)
    axes[-1].invert_yaxis()
    axes[-1].set_title("probability", fontsize=9)
    for number, value in enumerate(probabilities.values()):
        inside = value > 0.6
        axes[-1].text(value + (-0.02 if inside else 0.02), number, f"{value:.3f}", va="center", ha="right" if inside else "left", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def confusion_figure(table: Int[ndarray, "classes classes"], class_names: Sequence[str]) -> Figure:
    """How many films of a class were taken for which; shaded by the share of the class."""
    count = len(class_names)
    figure = Figure(figsize=(1.8 + 1.1 * count, 1.3 + 1.0 * count), layout="constrained")
    axis = figure.subplots()
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(count):
        for column in range(count):
            axis.text(column, row, f"{table[row, column]}\n{shares[row, column]:.0%}", ha="center", va="center", fontsize=9,
                      color="white" if shares[row, column] > 0.6 else "black")  # fmt: skip
    axis.set_xticks(range(count), class_names, fontsize=8, rotation=30 if count > 3 else 0)
    axis.set_yticks(range(count), class_names, fontsize=8)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    return figure


def roc_figure(probabilities: Float[ndarray, "films classes"], labels: Int[ndarray, " films"], class_names: Sequence[str]) -> Figure:
    """Receiver operating curve of each class against the rest; of two classes, of the second."""
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    shown = [1] if len(class_names) == 2 else range(len(class_names))
    for number in shown:
        wanted = labels == number
        if 0 < wanted.sum() < len(wanted):
            order = np.argsort(-probabilities[:, number], kind="stable")
            scores, hits = probabilities[order, number], wanted[order]
            last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # films of one score come all at once
            found, alarms = np.cumsum(hits)[last] / hits.sum(), np.cumsum(~hits)[last] / (~hits).sum()
            found, alarms = np.insert(found, 0, 0.0), np.insert(alarms, 0, 0.0)
            area = float(np.trapezoid(found, alarms))
            axis.plot(alarms, found, color=colour_of(number + 1), label=f"{class_names[number]}: {area:.3f}")
    axis.set_xlabel("false alarms among the others")
    axis.set_ylabel("found of the class")
    axis.set_aspect("equal")
    axis.legend(loc="lower right", fontsize=8, title="area under the curve", title_fontsize=8)
    return figure
