"""The pictures: contours over slices, region maps, attention maps, agreement of volumes, Dice by structure. One function a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.figure import Figure
from numpy import ndarray

from foveal.medical.preparation import Plane, Preparation
from foveal.medical.volumes import Volume

#: Okabe and Ito's colours, told apart by colour-blind readers too; the reference is always white.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")


def colour_of(label: int) -> str:
    """Of a class, from 1."""
    return COLOURS[(label - 1) % len(COLOURS)]


def overlay_figure(
    image: Volume, labels: Int[ndarray, "i j k"], class_names: Sequence[str], truth: Int[ndarray, "i j k"] | None = None,
    plane: Plane = "axial", count: int = 6, title: str = "",
) -> Figure:  # fmt: skip
    """Slices of a scan with the outlines of what was found, and of the reference in white where there is one.

    The slices are spread over the extent of the structures, upright: anterior, or superior, is above; the patient's right is on the left.
    """
    stack, spacing = _upright(image, image.voxels, plane)
    found, _ = _upright(image, labels, plane)
    wanted = None if truth is None else _upright(image, truth, plane)[0]
    shown = found > 0 if wanted is None else (found > 0) | (wanted > 0)
    where = np.flatnonzero(shown.any((1, 2)))
    first, last = (where[0], where[-1]) if len(where) else (0, len(stack) - 1)
    picked = (
        np.unique(np.linspace(first, last, min(count, last - first + 1) + 2).round().astype(int)[1:-1])
        if last - first >= count
        else np.arange(first, last + 1)
    )
    low, high = np.percentile(stack, [1, 99.5])
    columns = min(len(picked), 3)
    rows = -(-len(picked) // columns)
    aspect = spacing[1] / spacing[2]
    shape = stack.shape[1] * aspect / stack.shape[2]
    figure = Figure(figsize=(3.2 * columns, 3.2 * shape * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, index in zip(axes, picked, strict=False):
        axis.imshow(stack[index], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
        for label in range(1, len(class_names) + 1):
            if wanted is not None:
                _outline(axis, wanted[index] == label, "white", 1.6)
            _outline(axis, found[index] == label, colour_of(label), 1.1)
        axis.set_title(f"slice {index}", fontsize=8)
    for axis in axes:
        axis.set_axis_off()
    handles = [matplotlib.lines.Line2D([], [], color=colour_of(label), label=name) for label, name in enumerate(class_names, 1)]
    if truth is not None:
        handles.append(matplotlib.lines.Line2D([], [], color="white", label="reference", path_effects=_dark()))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure


def _dark() -> list[Any]:
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=3, foreground="#888888"), Normal()]


def _outline(axis: Any, mask: ndarray, colour: str, width: float) -> None:
    if mask.any() and not mask.all():
        # Padded, so that a structure at the border has a closed line too.
        axis.contour(
            np.arange(-1, mask.shape[1] + 1),
            np.arange(-1, mask.shape[0] + 1),
            np.pad(mask.astype(float), 1),
            [0.5],
            colors=[colour],
            linewidths=width,
        )


def _upright(image: Volume, voxels: Shaped[ndarray, "i j k"], plane: Plane) -> tuple[ndarray, tuple[float, float, float]]:
    """Slices as a radiologist looks at them, and the spacing along slice, row and column."""
    preparation = Preparation(plane=plane)
    if plane == "file" or image.kind == "picture":
        i, j, k = image.spacing
        stack = np.moveaxis(voxels, 2, 0)
        return (stack, (k, i, j)) if image.kind == "picture" else (stack.swapaxes(1, 2), (k, j, i))
    stack = preparation._oriented(image.like(voxels))  # (slice, a, b), both rising to R, A or S
    upright = stack.transpose(0, 2, 1)[:, ::-1]
    if plane != "sagittal":
        upright = upright[:, :, ::-1]  # the patient's right on the reader's left
    order = {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}[plane]
    axes = np.abs(image.affine[:3, :3]).argmax(0)
    by_patient = {int(axis): image.spacing[index] for index, axis in enumerate(axes)}
    return upright, tuple(by_patient.get(axis, 1.0) for axis in order)  # type: ignore[return-value]


def regions_figure(image: Float[ndarray, "rows columns"], regions: Int[ndarray, "rows columns"], title: str = "") -> Figure:
    """An image, its regions in colours, and their sizes."""
    numbers, sizes = np.unique(regions, return_counts=True)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(image, cmap="gray")
    axes[0].set_title("image", fontsize=9)
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    axes[1].imshow(image, cmap="gray")
    axes[1].imshow(shuffled[np.searchsorted(numbers, regions)], cmap="nipy_spectral", alpha=0.55, interpolation="nearest")
    axes[1].set_title(f"{len(numbers)} regions", fontsize=9)
    for axis in axes[:2]:
        axis.set_axis_off()
    axes[2].bar(range(len(sizes)), np.sort(sizes)[::-1] / regions.size, color=COLOURS[1])
    axes[2].set_xlabel("region, by size", fontsize=8)
    axes[2].set_ylabel("share of the pixels", fontsize=8)
    pairs = float((sizes.astype(float) ** 2).sum() / regions.size**2)
    axes[2].set_title(f"attention looks at {pairs:.1%} of all pairs", fontsize=9)
    figure.suptitle(title, fontsize=9)
    return figure


def attention_figure(
    image: Float[ndarray, "rows columns"], maps: Mapping[str, Float[ndarray, "rows columns"]], point: tuple[float, float], title: str = ""
) -> Figure:
    """What a position attends to: one map a name over the image; `point` is (row, column) in pixels of the image."""
    figure = Figure(figsize=(2.7 * (len(maps) + 1), 3.1), layout="constrained")
    axes = figure.subplots(1, len(maps) + 1)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    for axis, (name, attended) in zip(axes, [("image", None), *maps.items()], strict=True):
        axis.imshow(image, cmap="gray", extent=extent)
        if attended is not None:
            axis.imshow(attended, cmap="magma", alpha=0.65, extent=extent, interpolation="bilinear")
        axis.plot(point[1], point[0], "+", color="#56B4E9", markersize=11, markeredgewidth=1.6)
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure


def dice_figure(scores: Mapping[str, Sequence[float]], ylabel: str = "Dice") -> Figure:
    """A box for each name with its cases as points; the mean is written above."""
    figure = Figure(figsize=(1.6 + 1.3 * len(scores), 3.8), layout="constrained")
    axis = figure.subplots()
    generator = np.random.default_rng(0)
    for place, values in enumerate(scores.values()):
        known = np.array(values)[np.isfinite(values)]
        if not len(known):
            continue
        axis.boxplot(known, positions=[place], widths=0.55, showfliers=False, medianprops={"color": "black"})
        axis.scatter(place + generator.uniform(-0.18, 0.18, len(known)), known, s=9, alpha=0.6, color=colour_of(place + 1), linewidths=0)
        axis.text(place, 1.01, f"{known.mean():.3f}", ha="center", va="bottom", transform=axis.get_xaxis_transform(), fontsize=8)
    axis.set_xticks(range(len(scores)), list(scores), fontsize=8, rotation=20 if len(scores) > 4 else 0)
    axis.set_xlim(-0.6, len(scores) - 0.4)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", alpha=0.3)
    figure.suptitle("mean above each box", fontsize=8)
    return figure


def bland_altman_figure(measured: Mapping[str, tuple[Sequence[float], Sequence[float]]], unit: str = "ml") -> Figure:
    """Difference of two measurements against their mean, with bias and limits of agreement (1.96 standard deviations); one panel a structure."""
    figure = Figure(figsize=(4.2 * len(measured), 3.6), layout="constrained")
    axes = figure.subplots(1, len(measured), squeeze=False)[0]
    for number, (axis, (name, (found, wanted))) in enumerate(zip(axes, measured.items(), strict=True), 1):
        found_, wanted_ = np.asarray(found, float), np.asarray(wanted, float)
        difference, mean = found_ - wanted_, (found_ + wanted_) / 2
        bias, spread = float(difference.mean()), 1.96 * float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
        axis.scatter(mean, difference, s=14, alpha=0.7, color=colour_of(number), linewidths=0)
        axis.axhline(0, color="#999999", linewidth=0.8)
        for height, style in ((bias, "-"), (bias - spread, "--"), (bias + spread, "--")):
            axis.axhline(height, color="black", linewidth=1, linestyle=style)
            axis.annotate(
                f"{height:+.3g}", (1, height), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points", ha="right", fontsize=8
            )
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(f"mean of found and reference ({unit})", fontsize=8)
        axis.set_ylabel(f"found - reference ({unit})", fontsize=8)
    return figure


def restoration_figure(
    degraded: ndarray, restored: ndarray, target: ndarray | None = None, regions: ndarray | None = None, title: str = ""
) -> Figure:
    """Degraded and restored, the reference and the errors where there is one, the region map."""
    panels: list[tuple[str, ndarray, dict[str, Any]]] = []
    reference = restored if target is None else target
    low, high = np.percentile(reference, [0.5, 99.5])
    grey = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}
    panels += [("input", degraded, grey), ("restored", restored, grey)]
    if target is not None:
        errors = {"cmap": "magma", "vmin": 0, "vmax": float(np.percentile(np.abs(restored - target), 99.5)) + 1e-6}
        panels += [("reference", target, grey), ("|restored - reference|", np.abs(restored - target), errors)]
    else:
        limit = float(np.percentile(np.abs(restored - degraded), 99.5)) + 1e-6
        panels.append(("restored - input", restored - degraded, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}))
    if regions is not None:
        numbers = np.unique(regions)
        shuffled = np.random.default_rng(0).permutation(len(numbers))
        panels.append((f"{len(numbers)} regions", shuffled[np.searchsorted(numbers, regions)], {"cmap": "nipy_spectral", "interpolation": "nearest"}))
    figure = Figure(figsize=(3.0 * len(panels), 3.0 * degraded.shape[0] / degraded.shape[1] + 0.6), layout="constrained")
    for axis, (name, picture, how) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axis.imshow(picture, **how)
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    figure.suptitle(title, fontsize=9)
    return figure
