"""The picture of a slide: attention over it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray
from scipy.stats import rankdata


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
    colours = ScalarMappable(Normalize(0, 1), "viridis")  # no colour of it is a stain's
    grey = np.repeat(thumbnail.mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    for axis, picture in ((plain, thumbnail), (heat, grey)):
        axis.imshow(picture, extent=(0, width, height, 0), interpolation="bilinear")
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
