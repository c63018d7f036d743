"""Threat-image projection: objects are put into X-ray pictures as X-rays would pass through both.

Where an object lies behind or before something, intensities multiply (Beer and Lambert's law: attenuations add), so a pasted knife darkens what is
under it and hides nothing. Crops are pictures of single objects on white, sorted into a folder a class; screening centres train their staff and
test their machines with pictures made so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float

from foveal.core.errors import UserError
from foveal.detection.data.pictures import PICTURES, read_picture

#: Share of the light that passes, above which a crop's pixel is its background.
CLEAR = 0.94


@dataclass(frozen=True)
class Crop:
    """One object alone.

    Attributes:
        label: its class.
        passes: share of the light that passes it, 0 to 1, one where nothing is.
    """

    label: int
    passes: Float[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Scene:
    """An X-ray picture with its objects.

    Attributes:
        passes: share of the light that passes, 0 to 1.
        masks: which pixels each object covers.
        labels: class of each.
    """

    passes: Float[np.ndarray, "height width 3"]
    masks: Bool[np.ndarray, "objects height width"]
    labels: list[int]

    @property
    def boxes(self) -> Float[np.ndarray, "objects 4"]:
        """Left, top, right, bottom of each object, by its edges."""
        found = np.zeros((len(self.masks), 4))
        for place, mask in enumerate(self.masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found[place] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return found


def read_crops(folder: str | Path, names: Sequence[str]) -> list[Crop]:
    """Crops of a folder that has a folder a class; white is empty.

    Raises:
        UserError: no such folder, a folder that is no class, a crop without an object, or none at all.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"expected a folder of crops, one folder a class; {root} is none; check the path")
    crops = []
    for part in sorted(path for path in root.iterdir() if path.is_dir()):
        if part.name not in names:
            raise UserError(f"expected folders named as the classes ({', '.join(names)}) in {root}; got {part.name}; rename it")
        for file in sorted(path for path in part.iterdir() if path.suffix.lower() in PICTURES):
            passes = read_picture(file).astype(np.float32) / 255
            if not (passes.min(-1) < CLEAR).any():
                raise UserError(f"expected an object darker than its white background in {file}; it is empty; remove it")
            crops.append(Crop(list(names).index(part.name), passes))
    if not crops:
        raise UserError(f"expected pictures ({', '.join(sorted(PICTURES))}) in folders of {root}; got none")
    return crops


def project(
    scene: Scene,
    crop: Crop,
    generator: np.random.Generator,
    size: tuple[float, float] = (0.15, 0.4),
    density: tuple[float, float] = (0.7, 1.3),
) -> Scene:
    r"""The scene with one more object, turned, scaled and put somewhere inside: :math:`I = I_{scene} \cdot I_{crop}^{k}`.

    Args:
        scene: what is there.
        crop: what is added.
        generator: of place, turn, size and density.
        size: of the object's longer side, as a share of the picture's shorter one.
        density: k, how thick the object is beside its crop.
    """
    height, width = scene.passes.shape[:2]
    longest = generator.uniform(*size) * min(height, width)
    scale = longest / max(crop.passes.shape[:2])
    turn = generator.uniform(0, 360)
    passes = _turned(crop.passes, turn, scale)
    mask = passes.min(-1) < CLEAR
    if not mask.any() or passes.shape[0] >= height or passes.shape[1] >= width:
        return scene
    top, left = (int(generator.integers(0, limit - side + 1)) for limit, side in zip((height, width), passes.shape, strict=False))
    place = (slice(top, top + passes.shape[0]), slice(left, left + passes.shape[1]))
    after = scene.passes.copy()
    after[place] *= np.where(mask[..., None], passes, 1) ** np.float32(generator.uniform(*density))
    covered = np.zeros((1, height, width), dtype=bool)
    covered[0][place] = mask
    return Scene(after, np.concatenate([scene.masks, covered]), [*scene.labels, crop.label])


def _turned(passes: Float[np.ndarray, "height width 3"], degrees: float, scale: float) -> Float[np.ndarray, "turned_height turned_width 3"]:
    """Turned and scaled inside a frame that holds it whole."""
    height, width = passes.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale)
    cosine, sine = abs(matrix[0, 0]), abs(matrix[0, 1])
    across, down = int(np.ceil(height * sine + width * cosine)), int(np.ceil(height * cosine + width * sine))
    matrix[:, 2] += (across / 2 - width / 2, down / 2 - height / 2)
    shrinks = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    turned = cv2.warpAffine(passes, matrix, (max(across, 1), max(down, 1)), flags=shrinks, borderValue=(1.0, 1.0, 1.0))
    return np.clip(turned, 0, 1)


#: Shapes of the drawn crops: polygons on a field of 100 by 100, with how much light passes in red, green and blue.
_DRAWN: dict[str, tuple[list[list[tuple[int, int]]], tuple[float, float, float]]] = {
    "Knife": ([[(4, 44), (62, 38), (62, 56), (20, 56)], [(62, 42), (96, 42), (96, 53), (62, 53)]], (0.25, 0.4, 0.8)),
    "Hammer": ([[(8, 46), (80, 46), (80, 54), (8, 54)], [(74, 24), (92, 24), (92, 78), (74, 78)]], (0.2, 0.3, 0.7)),
    "Wrench": ([[(20, 45), (90, 45), (90, 55), (20, 55)], [(2, 34), (22, 34), (22, 66), (2, 66), (12, 50)]], (0.2, 0.35, 0.75)),
    "Powerbank": ([[(12, 22), (88, 22), (88, 78), (12, 78)]], (0.45, 0.7, 0.45)),
    "Sprayer": ([[(30, 20), (70, 20), (70, 98), (30, 98)], [(42, 4), (58, 4), (58, 20), (42, 20)]], (0.85, 0.6, 0.35)),
}  # fmt: skip


def drawn_crops(names: Sequence[str]) -> list[Crop]:
    """Plain shapes of five of PIDray's classes, for trials without data: of metal (blue), of mixed (green) and of organic matter (orange)."""
    crops = []
    for name, (polygons, colour) in _DRAWN.items():
        if name in names:
            picture = np.ones((100, 100, 3), dtype=np.float32)
            for polygon in polygons:
                cv2.fillPoly(picture, [np.array(polygon, dtype=np.int32)], colour)
            crops.append(Crop(list(names).index(name), picture))
    return crops


def drawn_bag(generator: np.random.Generator, side: int) -> Scene:
    """A bag with harmless things: boxes and bottles of organic matter that lie over each other."""
    passes = np.full((side, side, 3), 0.97, dtype=np.float32)
    margin = side // 12
    cv2.rectangle(passes, (margin, margin), (side - margin, side - margin), (0.88, 0.84, 0.76), -1)
    for _ in range(int(generator.integers(5, 12))):
        thing = np.ones_like(passes)
        centre = tuple(int(value) for value in generator.integers(2 * margin, side - 2 * margin, 2))
        axes = tuple(int(value) for value in generator.integers(side // 20, side // 5, 2))
        light = float(generator.uniform(0.65, 0.92))
        colour = (light, light * float(generator.uniform(0.85, 0.97)), light * float(generator.uniform(0.6, 0.85)))
        if generator.random() < 0.5:
            cv2.ellipse(thing, centre, axes, float(generator.uniform(0, 180)), 0, 360, colour, -1)  # type: ignore[call-overload]
        else:
            corners = cv2.boxPoints((centre, (2.0 * axes[0], 2.0 * axes[1]), float(generator.uniform(0, 180))))  # type: ignore[call-overload]
            cv2.fillPoly(thing, [corners.astype(np.int32)], colour)
        passes *= thing
    noise = generator.normal(0, 0.01, passes.shape).astype(np.float32)
    return Scene(np.clip(cv2.GaussianBlur(passes, (3, 3), 0) + noise, 0.02, 1), np.zeros((0, side, side), dtype=bool), [])
