"""Classes of pixels as colours: laid over their picture with a legend, and as files of class numbers that show their colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from foveal.detection.data.pictures import read_picture
from foveal.detection.plots import colour_of

Colour = tuple[int, int, int]


def palette(classes: int, colours: Sequence[Colour] = ()) -> UInt8[np.ndarray, "256 3"]:
    """A colour for every number of a class, the given ones first; 255, where there is no class, is black."""
    table = np.zeros((256, 3), np.uint8)
    for number in range(min(classes, 255)):
        table[number] = colours[number] if number < len(colours) else colour_of(number)
    return table


def label_picture(labels: Int[np.ndarray, "height width"], table: UInt8[np.ndarray, "256 3"]) -> Image.Image:
    """A PNG's picture whose values are the classes themselves, shown in their colours."""
    image = Image.fromarray(labels.astype(np.uint8), mode="P")
    image.putpalette(table.reshape(-1).tolist())
    return image


def overlay(
    image: UInt8[np.ndarray, "height width 3"], labels: Int[np.ndarray, "height width"], names: Sequence[str], table: UInt8[np.ndarray, "256 3"]
) -> Image.Image:
    """The picture under its classes' colours, and below it a legend of the classes in it with their shares, the largest first."""
    mixed = Image.fromarray((0.45 * image + 0.55 * table[labels]).round().astype(np.uint8))
    counts = np.bincount(labels.reshape(-1), minlength=len(names))[: len(names)]
    shown = [int(number) for number in np.argsort(-counts, kind="stable") if counts[number]]
    size = max(11, round(mixed.width / 55))
    font, line = ImageFont.load_default(size), round(size * 1.7)
    texts = [f"{names[number]} {100 * counts[number] / labels.size:.0f} %" for number in shown]
    widths = [line + round(font.getlength(text)) + line for text in texts]
    rows: list[list[int]] = [[]]
    for place, width in enumerate(widths):
        if rows[-1] and sum(widths[other] for other in rows[-1]) + width > mixed.width:
            rows.append([])
        rows[-1].append(place)
    canvas = Image.new("RGB", (mixed.width, mixed.height + line * len(rows)), "white")
    canvas.paste(mixed)
    pen = ImageDraw.Draw(canvas)
    for row, places in enumerate(rows):
        left, top = 0, mixed.height + row * line
        for place in places:
            margin = round(size * 0.35)
            colour = tuple(int(value) for value in table[shown[place]])
            pen.rectangle((left + margin, top + margin, left + line - margin, top + line - margin), fill=colour, outline="black")
            pen.text((left + line, top + line / 2), texts[place], fill="black", font=font, anchor="lm")
            left += widths[place]
    return canvas


def compare_scenes(
    file: str | Path, true: Int[np.ndarray, "height width"], said: Int[np.ndarray, "height width"], names: Sequence[str], colours: Sequence[Colour]
) -> matplotlib.figure.Figure:
    """A picture beside its labels and the network's answer."""
    table = palette(len(names), colours)
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout="constrained")
    image = read_picture(file)
    for axes, (title, shown) in zip(
        figure.subplots(1, 3), (("picture", image), ("labels", table[true]), ("answer", table[said])), strict=True
    ):  # fmt: skip
        axes.imshow(shown)
        axes.set_title(title)
        axes.set_axis_off()
    return figure
