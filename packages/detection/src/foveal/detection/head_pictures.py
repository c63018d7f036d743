"""Heads drawn on their picture: a box, and the three axes that a head's angles turn."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import matplotlib.figure
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from foveal.detection.models.direct_mhp import axes

if TYPE_CHECKING:
    from foveal.detection.head_pose import Heads

#: Of the head's right-hand side of the picture, its chin and its nose.
AXIS_COLOURS = ((230, 50, 50), (40, 170, 60), (40, 90, 255))


def draw_heads(image: UInt8[np.ndarray, "height width 3"], found: Heads, doubt: str | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """A copy of the picture with a box for each head and its axes from the middle: red to its side, green to its chin, blue to its nose.

    Args:
        image: upright.
        found: what to draw.
        doubt: why it is not to be trusted, written across the top.
    """
    canvas = Image.fromarray(image).convert("RGB")
    pen = ImageDraw.Draw(canvas)
    shorter = min(canvas.size)
    width, size = max(2, round(shorter / 300)), max(10, round(shorter / 50))
    font = ImageFont.load_default(size)
    for box, score, angles in reversed(list(zip(found.boxes, found.scores, found.angles, strict=True))):
        left, top, right, bottom = (float(value) for value in box)
        pen.rectangle((left, top, right, bottom), outline=(255, 255, 255), width=width)
        middle = np.array([(left + right) / 2, (top + bottom) / 2])
        length = 0.75 * max(right - left, bottom - top)
        turned = axes(torch.from_numpy(np.asarray(angles, dtype=np.float64))).numpy()
        # The axis that points away from the viewer first, so that the nearest lies on top.
        for axis in np.argsort(turned[2]):
            tip = middle + length * turned[:2, axis]
            pen.line((*middle, *tip), fill=AXIS_COLOURS[axis], width=2 * width)
        text = "  ".join((f"{score:.2f}", *(f"{name} {round(float(angle))}" for name, angle in zip("pyr", angles, strict=True))))
        bounds = pen.textbbox((0, 0), text, font=font)
        x = max(min(left, canvas.width - bounds[2] - 4), 0)
        y = top - bounds[3] - 3 if top > bounds[3] + 3 else bottom
        pen.rectangle((x, y, x + bounds[2] + 4, y + bounds[3] + 3), fill=(255, 255, 255))
        pen.text((x + 2, y + 1), text, fill="black", font=font)
    if doubt:
        lines = textwrap.fill(doubt, max(20, round(canvas.width / (0.55 * size))))
        bounds = pen.multiline_textbbox((6, 4), lines, font=font)
        pen.rectangle((0, 0, canvas.width, bounds[3] + 6), fill=(180, 20, 20))
        pen.multiline_text((6, 4), lines, fill="white", font=font)
    return np.asarray(canvas)


def show_heads(
    image: UInt8[np.ndarray, "height width 3"], found: Heads, boxes: Float[np.ndarray, "heads 4"], angles: Float[np.ndarray, "heads 3"]
) -> matplotlib.figure.Figure:
    """A picture with its labelled heads beside the same with those that were found."""
    from foveal.detection.head_pose import Heads

    figure = matplotlib.figure.Figure(figsize=(10, 5), layout="constrained")
    labelled = Heads(found.size, boxes, np.ones(len(boxes)), angles)
    for place, (title, heads) in zip(figure.subplots(1, 2), (("labels", labelled), ("answer", found)), strict=True):
        place.imshow(draw_heads(image, heads))
        place.set_title(title)
        place.set_axis_off()
    return figure
