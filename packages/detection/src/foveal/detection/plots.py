"""The pictures: objects drawn on their picture, precision over recall, what was taken for what, and what the network attended to."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from foveal.detection.models.blocks import AreaAttention
from foveal.detection.models.yolov13 import YOLOv13
from foveal.detection.postprocess import corners_of_turned, letterbox
from foveal.kernels.nn import HyperedgeAttention

if TYPE_CHECKING:
    from foveal.detection.predict import Detections


#: Classes beyond which their names and numbers are drawn small.
_MANY = 12


def colour_of(number: int) -> tuple[int, int, int]:
    """A bright colour, far from those of the classes before it."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + number * 0.618034) % 1.0, 0.75, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(image: UInt8[np.ndarray, "height width 3"], found: Detections) -> UInt8[np.ndarray, "height width 3"]:
    """A copy of the picture with its objects: boxes, names and scores, and masks or keypoints where there are any."""
    canvas = Image.fromarray(image).convert("RGB")
    if found.masks is not None:
        shaded = np.array(canvas)
        for row, number in enumerate(found.classes):
            start, first, inside = found.masks.crop(row)
            part = shaded[first : first + inside.shape[0], start : start + inside.shape[1]]
            for channel, value in enumerate(colour_of(int(number))):
                lighter = (0.55 * np.arange(256) + 0.45 * value).round().astype(np.uint8)
                part[..., channel][inside] = lighter[part[..., channel][inside]]
        canvas = Image.fromarray(shaded)
    pen = ImageDraw.Draw(canvas)
    shorter = min(canvas.size)
    width, size = max(2, round(shorter / 300)), max(11, round(shorter / 45))
    font = ImageFont.load_default(size)
    # The surest last, so that it lies on top.
    for row in reversed(range(len(found))):
        colour = colour_of(int(found.classes[row]))
        if found.oriented is not None:
            pen.polygon([tuple(point) for point in corners_of_turned(found.oriented[row : row + 1])[0]], outline=colour, width=width)
        else:
            pen.rectangle([float(value) for value in found.boxes[row]], outline=colour, width=width)
        if found.keypoints is not None:
            for point in found.keypoints[row]:
                if len(point) < 3 or point[2] > 0.5:
                    pen.circle((float(point[0]), float(point[1])), width + 1, fill=colour)
    for row in reversed(range(len(found))):
        colour, text = colour_of(int(found.classes[row])), f"{found.labels[row]} {found.scores[row]:.2f}"
        left, top = float(found.boxes[row][0]), float(found.boxes[row][1])
        bounds = pen.textbbox((0, 0), text, font=font)
        across, down = bounds[2] + 4, bounds[3] + 3
        left = max(min(left, canvas.width - across), 0)
        top = top - down if top >= down else top  # inside the box where there is no room above it
        pen.rectangle((left, top, left + across, top + down), fill=colour)
        pen.text((left + 2, top + 1), text, fill="black" if sum(colour) > 380 else "white", font=font)
    return np.asarray(canvas)


def draw_precision_recall(
    curves: dict[str, Float[np.ndarray, " recalls"]], title: str = "Precision over recall at an overlap of 0.5"
) -> matplotlib.figure.Figure:
    """One line a class, with its area in the legend; `curves` as `foveal.detection.evaluate.Evaluation` has them."""
    many = len(curves) > _MANY
    figure = matplotlib.figure.Figure(figsize=(12, 7) if many else (7, 5), layout="constrained")
    axes = figure.subplots()
    recalls = np.linspace(0, 1, 101)
    for number, (name, precision) in enumerate(curves.items()):
        colour = tuple(value / 255 for value in colour_of(number))
        axes.plot(recalls, precision, color=colour, linewidth=1 if many else 2, label=f"{name}, AP50 {precision.mean():.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    if many:
        figure.legend(loc="outside right upper", fontsize=6, ncols=-(-len(curves) // 45))
    elif curves:
        axes.legend(loc="lower left")
    return figure


def draw_confusion(counts: Float[np.ndarray, "true found"], names: Sequence[str], score: float) -> matplotlib.figure.Figure:
    """What was taken for what: rows are what is there, columns what was found, the last of each is nothing. Of many classes those that occur."""
    if len(names) > _MANY:
        kept = [*np.flatnonzero(counts.sum(0)[:-1] + counts.sum(1)[:-1]), len(names)]
        counts, names = counts[np.ix_(kept, kept)], [names[row] for row in kept[:-1]]
    labels = [*names, "nothing"]
    many = len(names) > _MANY
    side = 0.35 * len(labels) if many else max(4.5, 1.1 * len(labels))
    figure = matplotlib.figure.Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shares[-1] = 0  # nothing has no number of its own to be a share of
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(labels)):
        for column in range(len(labels)):
            if counts[row, column]:
                dark = shares[row, column] > 0.5
                axes.text(
                    column,
                    row,
                    f"{int(counts[row, column])}",
                    ha="center",
                    va="center",
                    color="white" if dark else "black",
                    fontsize=6 if many else None,
                )
    axes.set_xticks(range(len(labels)), labels, rotation=90 if many else 45, ha="center" if many else "right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="found", ylabel="there", title=f"Objects at an overlap of 0.5, score {score:g} and more")
    return figure


def _seen(model: YOLOv13, image: np.ndarray, image_size: int, modules: dict[str, torch.nn.Module]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The picture as the network reads it, and what goes into some of its parts."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    fitted, _, _ = letterbox(pixels, image_size)
    kept: dict[str, torch.Tensor] = {}
    hooks = [module.register_forward_pre_hook(lambda part, inputs, name=name: kept.__setitem__(name, inputs[0])) for name, module in modules.items()]
    try:
        with torch.no_grad():
            model(fitted[None])
    finally:
        for hook in hooks:
            hook.remove()
    return fitted.permute(1, 2, 0).numpy(), kept


def draw_hyperedges(model: YOLOv13, image: UInt8[np.ndarray, "height width 3"], image_size: int = 640) -> matplotlib.figure.Figure:
    """What each hyperedge gathers: its weight on every cell, over the picture. `model` is the trained form."""
    branches: dict[str, Any] = {
        "first branch": model.hyperace.first_branch.hypergraph,
        "second branch": model.hyperace.second_branch.hypergraph,
    }
    shown, cells = _seen(model, image, image_size, branches)
    columns = model.hyperace.first_branch.hypergraph.edges
    figure = matplotlib.figure.Figure(figsize=(2.6 * columns, 2 * 2.6 * shown.shape[0] / shown.shape[1] + 0.8), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    for row, (name, module) in enumerate(branches.items()):
        assert isinstance(module, HyperedgeAttention)
        weights = module.incidence(cells[name])[0].detach()
        height = shown.shape[0] // 16
        for column in range(columns):
            axes = grid[row][column]
            _heat(axes, shown, weights[:, column].view(height, -1).numpy())
            axes.set_title(f"{name}, {column + 1}", fontsize=8)
    figure.suptitle("Hyperedges: where each gathers from. Bright is most, in each picture by its own scale", fontsize=10)
    return figure


def draw_areas(model: YOLOv13, image: UInt8[np.ndarray, "height width 3"], image_size: int = 640, at: tuple[float, float] = (0.5, 0.5)) -> Any:
    """What one place attends to in the first and last block of both attention stages; lines are the edges of the areas.

    Args:
        model: the trained form.
        image: the picture.
        image_size: side that it is made to fit.
        at: the place, as shares of the picture's width and height.
    """
    blocks = {name: part for name, part in model.named_modules() if isinstance(part, AreaAttention)}
    titles: dict[str, str] = {}
    for stage in ("stage4", "stage5"):
        inside = [name for name in blocks if name.startswith(stage)]
        titles |= {inside[0]: f"stage {stage[-1]}, first block", inside[-1]: f"stage {stage[-1]}, last block"}
    chosen: dict[str, torch.nn.Module] = {name: blocks[name] for name in titles}
    shown, maps = _seen(model, image, image_size, chosen)
    figure = matplotlib.figure.Figure(figsize=(3 * len(chosen), 3 * shown.shape[0] / shown.shape[1] + 0.8), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(chosen), squeeze=False)[0], maps.items(), strict=True):
        block = blocks[name]
        with torch.no_grad():
            query, key = block.query_key(x).chunk(2, 1)
        height, width = x.shape[2:]
        cells = height * width // block.areas
        place = min(int(at[1] * height), height - 1) * width + min(int(at[0] * width), width - 1)
        area = place // cells
        by_head = key[0].unflatten(0, (block.heads, -1)).flatten(2)[:, :, area * cells : (area + 1) * cells]
        asked = query[0].unflatten(0, (block.heads, -1)).flatten(2)[:, :, place]
        weights = torch.softmax(torch.einsum("hd,hdc->hc", asked, by_head) * asked.shape[1] ** -0.5, -1).mean(0)
        whole = torch.zeros(height * width)
        whole[area * cells : (area + 1) * cells] = weights
        _heat(axes, shown, whole.view(height, width).numpy())
        for edge in range(1, block.areas):
            axes.axhline(edge * shown.shape[0] / block.areas, color="white", linewidth=1, linestyle=":")
        axes.plot((place % width + 0.5) / width * shown.shape[1], (place // width + 0.5) / height * shown.shape[0], "x", color="lime", markersize=9)
        axes.set_title(titles[name], fontsize=8)
    figure.suptitle("What the marked place attends to, mean over heads. Bright is most; dotted lines are the edges of the areas", fontsize=10)
    return figure


def _heat(axes: Any, shown: np.ndarray, weights: np.ndarray) -> None:
    axes.imshow(shown.mean(2), cmap="gray", vmin=0, vmax=1)
    top = max(float(np.quantile(weights, 0.995)), 1e-12)
    axes.imshow(weights, cmap="inferno", alpha=0.6, vmin=0, vmax=top, extent=(0, shown.shape[1], shown.shape[0], 0), interpolation="bilinear")
    axes.set_axis_off()
