"""The pictures of bags and slides: confusion matrix, ROC curves, attention over a slide. One function a figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score, roc_curve

from foveal.medical.plots import colour_of


def confusion_figure(counts: Int[ndarray, "true predicted"], class_names: Sequence[str]) -> Figure:
    """Counts, coloured by the share of each true class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.6 * len(class_names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axis.text(column, row, str(count), ha="center", va="center", color="white" if shares[row, column] > 0.6 else "black")
    axis.set_xticks(range(len(class_names)), class_names, fontsize=8)
    axis.set_yticks(range(len(class_names)), class_names, fontsize=8)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    return figure


def roc_figure(probabilities: Float[ndarray, "bags classes"], labels: Int[ndarray, " bags"], class_names: Sequence[str]) -> Figure:
    """ROC curves: of the second class of two, or of each class against the rest. Classes without bags on both sides have none."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--")
    for number in [1] if len(class_names) == 2 else range(len(class_names)):
        truth = labels == number
        if truth.any() and not truth.all():
            false, true, _ = roc_curve(truth, probabilities[:, number])
            area = roc_auc_score(truth, probabilities[:, number])
            axis.plot(false, true, color=colour_of(number + 1), label=f"{class_names[number]}: {area:.3f}")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, title="area", loc="lower right")
    axis.set_xlabel("false positive rate")
    axis.set_ylabel("true positive rate")
    axis.set_aspect("equal")
    return figure


def percentile_ranks(values: Float[ndarray, " tiles"]) -> Float[ndarray, " tiles"]:
    """Ranks from 0 to 1, equal values at their mean rank: attention spans orders of magnitude, and its raw values show one hot tile alone."""
    return (rankdata(values) - 0.5) / len(values)


def attention_slide_figure(
    thumbnail: UInt8[ndarray, "rows columns 3"], extent: tuple[float, float], coords: Int[ndarray, "tiles 2"], tile: float,
    importance: Float[ndarray, " tiles"], title: str = "",
) -> Figure:  # fmt: skip
    """The slide beside the attention over it.

    Args:
        thumbnail: of the whole slide.
        extent: width and height of the slide in level-0 pixels.
        coords: left and upper corner of each tile in level-0 pixels.
        tile: side of a tile in level-0 pixels.
        importance: share of each tile in the bag's feature.
        title: above.
    """
    width, height = extent
    shape = float(np.clip(height / width, 0.3, 3))
    side = 5.2
    figure = Figure(figsize=(2 * side + 1.2, side * shape + 0.9), layout="constrained")
    plain, heat = figure.subplots(1, 2)
    colours = ScalarMappable(Normalize(0, 1), "magma")
    for axis in (plain, heat):
        axis.imshow(thumbnail, extent=(0, width, height, 0), interpolation="bilinear")
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        axis.set_axis_off()
    ranks = percentile_ranks(importance)
    for (x, y), rank in zip(coords, ranks, strict=True):
        heat.add_patch(Rectangle((float(x), float(y)), tile, tile, facecolor=colours.to_rgba(rank), alpha=0.6, linewidth=0))
    for place in np.argsort(importance)[::-1][: min(3, len(importance))]:
        x, y = coords[place]
        plain.add_patch(Rectangle((float(x), float(y)), tile, tile, facecolor="none", edgecolor="#D55E00", linewidth=1.4))
    plain.set_title(f"{len(coords)} tiles; the {min(3, len(importance))} with most attention framed", fontsize=9)
    heat.set_title(f"attention; the highest tile has {importance.max():.1%} of it", fontsize=9)
    bar = figure.colorbar(colours, ax=heat, fraction=0.04, pad=0.02)
    bar.set_label("rank among the slide's tiles", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
