"""The pictures: one function a figure, numbers in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure


def draw_parity(pairs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], units: Mapping[str, str]) -> Figure:
    """Predictions against labels, a panel a property; properties without labels are left out.

    Args:
        pairs: property -> labels and predictions of each structure.
        units: property -> its unit.
    """
    shown = {name: rows for name, rows in pairs.items() if rows}
    figure = Figure(figsize=(3.6 * len(shown), 3.4), layout="constrained")
    for axes, (name, rows) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown.items(), strict=True):
        labels, predicted = (np.concatenate([row[side].ravel() for row in rows]) for side in (0, 1))
        low, high = min(labels.min(), predicted.min()), max(labels.max(), predicted.max())
        margin = 0.05 * (high - low) or 1.0
        axes.plot([low - margin, high + margin], [low - margin, high + margin], color="0.6", linewidth=1)
        axes.plot(labels, predicted, ".", markersize=3, rasterized=True)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        axes.set_xlabel(f"Label ({units[name]})")
        axes.set_ylabel(f"Predicted ({units[name]})")
        axes.set_title(f"{name.capitalize()}, MAE {np.abs(labels - predicted).mean():.3g}", loc="left")
    return figure
