"""Heads with boxes and Euler angles in COCO's form, as AGORA-HPE and CMU-HPE are written, and drawn ones that need no data.

A drawn head is an ellipsoid with a nose, seen from infinitely far: skin in front with eyes, brows and a mouth, hair above and behind, an ear a side.
Its axes are those of `foveal.detection.models.direct_mhp.axes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from foveal.core.errors import UserError
from foveal.detection.data.pictures import read_picture, size_of
from foveal.detection.models.direct_mhp import axes

#: Half the width, height and depth of a drawn head over half its height.
_AXES = np.array([0.78, 1.0, 0.9])


@dataclass(frozen=True)
class HeadPicture:
    """A picture and its heads.

    Attributes:
        number: its id in the file.
        path: of the picture; of a drawn one a name alone.
        size: width and height in pixels.
        boxes: left, top, right, bottom in pixels.
        angles: pitch, yaw, roll in degrees.
        image: the pixels of a drawn one.
    """

    number: int | str
    path: Path
    size: tuple[int, int]
    boxes: Float[np.ndarray, "heads 4"]
    angles: Float[np.ndarray, "heads 3"]
    image: UInt8[np.ndarray, "height width 3"] | None = None

    def read(self) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels.

        Raises:
            UserError: a file that cannot be read.
        """
        return read_picture(self.path) if self.image is None else self.image


def read_heads(file: str | Path, images: str | Path) -> list[HeadPicture]:
    """Pictures of a COCO file whose annotations have ``bbox`` (left, top, width, height) and ``euler_angles`` (pitch, yaw, roll in degrees).

    Args:
        file: the annotations.
        images: folder of the pictures.

    Raises:
        UserError: not such a file, pictures that are missing, or values out of range: pitch and roll in -90..90, yaw in -180..180.
    """
    path, folder = Path(file), Path(images)
    if not path.is_file():
        raise UserError(f"expected a COCO file of heads; {path} does not exist; check data.train, data.val and data.test")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {entry["id"]: entry for entry in content["images"]}
        listed: dict[Any, list[dict[str, Any]]] = {number: [] for number in entries}
        for annotation in content["annotations"]:
            listed[annotation["image_id"]].append(annotation)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"expected images and annotations of COCO's form in {path}; {type(error).__name__}: {str(error)[:100]}") from None
    pictures = []
    for number, entry in entries.items():
        place = folder / str(entry.get("file_name", ""))
        boxes, angles = [], []
        for annotation in listed[number]:
            if annotation.get("iscrowd"):
                continue
            box, turned = (_numbers(annotation.get(name), count, name, path) for name, count in (("bbox", 4), ("euler_angles", 3)))
            if min(box[2:]) <= 0:
                raise UserError(f"expected boxes with a width and a height in {path}; annotation {annotation.get('id')} has {box}; remove it")
            if max(abs(turned[0]), abs(turned[2])) > 90 or abs(turned[1]) > 180:
                raise UserError(
                    f"expected pitch and roll in -90..90 and yaw in -180..180 degrees in {path}; annotation {annotation.get('id')} has {turned}"
                )
            boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            angles.append(turned)
        size = (int(entry.get("width") or 0), int(entry.get("height") or 0))
        pictures.append(HeadPicture(number, place, size, np.array(boxes).reshape(-1, 4), np.array(angles).reshape(-1, 3)))
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if missing:
        raise UserError(f"expected the pictures of {path} in {folder}; {len(missing)} of {len(pictures)} are missing, {missing[0].name} first")
    if not pictures:
        raise UserError(f"expected pictures in {path}; it lists none")
    # A file that does not tell sizes leaves it to the pictures: found boxes end at their edges.
    return [picture if all(picture.size) else replace(picture, size=size_of(picture.path)) for picture in pictures]


def _numbers(value: Any, count: int, name: str, file: Path) -> list[float]:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(part, (int, float)) and math.isfinite(part) for part in value):
        raise UserError(f"expected {name} of {count} numbers for every annotation of {file}; got {value}; see AGORA-HPE's and CMU-HPE's form")
    return [float(part) for part in value]


def coco_of_heads(pictures: Sequence[HeadPicture]) -> dict[str, Any]:
    """Pictures and heads in COCO's form, with their angles."""
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        for box, turned in zip(picture.boxes, picture.angles, strict=True):
            left, top, width, height = float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])
            annotations.append({
                "id": len(annotations) + 1, "image_id": picture.number, "category_id": 1, "bbox": [left, top, width, height],
                "area": width * height, "iscrowd": 0, "euler_angles": [float(angle) for angle in turned],
            })  # fmt: skip
    listed = [{"id": picture.number, "file_name": picture.path.name, "width": picture.size[0], "height": picture.size[1]} for picture in pictures]
    return {"info": {}, "images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


# -------------------------------------------------------------------------------------------------------------------------------------- drawing


def draw_head(radius: float, angles: Sequence[float], skin: Sequence[float], hair: Sequence[float]) -> UInt8[np.ndarray, "side side 4"]:
    """A head turned by pitch, yaw and roll in degrees, on nothing: red, green, blue and how much of a pixel it covers.

    Args:
        radius: half its height in pixels.
        angles: pitch, yaw, roll.
        skin: red, green, blue in 0..1.
        hair: likewise.
    """
    turned = axes(torch.tensor(list(angles), dtype=torch.float64)).numpy()
    side = 2 * math.ceil(1.3 * radius) + 1
    grid = (np.arange(side) - side // 2) / radius
    x, y = np.meshgrid(grid, grid)
    colour = np.zeros((side, side, 3))
    depth = np.full((side, side), -np.inf)
    nose_tip, nose_axes = np.array([0.0, 0.12, 0.93]), np.array([0.13, 0.2, 0.22])
    for centre, half, part in ((np.zeros(3), _AXES, "head"), (nose_tip, nose_axes, "nose")):
        # The nearest point to the viewer, at depth t, of the ellipsoid on the ray through each pixel, in the head's own axes.
        start = np.stack((x, y, np.zeros_like(x)), -1) @ turned - centre
        along = turned[2]
        a = (along**2 / half**2).sum()
        b, c = 2 * (start * along / half**2).sum(-1), (start**2 / half**2).sum(-1) - 1
        inside = b**2 - 4 * a * c >= 0
        t = np.where(inside, (-b + np.sqrt(np.maximum(b**2 - 4 * a * c, 0))) / (2 * a), -np.inf)
        nearer = inside & (t > depth)
        point = start[nearer] + t[nearer][:, None] * along
        normal = point / half**2
        normal = (normal / np.linalg.norm(normal, axis=-1, keepdims=True)) @ turned.T
        shade = 0.55 + 0.45 * np.clip(normal @ np.array([-0.35, -0.5, 0.79]), 0, None)
        paint = np.asarray(skin) * np.ones_like(point) if part == "nose" else _paint(point, np.asarray(skin), np.asarray(hair))
        colour[nearer], depth[nearer] = paint * shade[:, None], t[nearer]
    covered = np.isfinite(depth)
    return (np.concatenate((np.clip(colour, 0, 1), covered[..., None]), -1) * 255).round().astype(np.uint8)


def _paint(point: Float[np.ndarray, "points 3"], skin: np.ndarray, hair: np.ndarray) -> Float[np.ndarray, "points 3"]:
    """Colours of places on the head; x to its side, y to its chin, z to its face."""
    x, y, z = point.T
    colours = np.tile(skin, (len(point), 1))
    colours[(z < 0.12 - 0.5 * (y + 0.2)) & (y < 0.55) | (y < -0.62) | ((z < -0.1) & (y < 0.75))] = hair
    front = z > 0.2
    for side in (-1, 1):
        eye = ((x - side * 0.3) / 0.14) ** 2 + ((y + 0.14) / 0.075) ** 2
        colours[front & (eye < 1)] = 0.95
        colours[front & (((x - side * 0.3) / 0.07) ** 2 + ((y + 0.14) / 0.07) ** 2 < 1)] = 0.1
        colours[front & (np.abs(x - side * 0.3) < 0.17) & (np.abs(y + 0.3) < 0.03)] = hair * 0.7
        ear = ((y - 0.02) / 0.2) ** 2 + ((z + 0.02) / 0.13) ** 2
        colours[(np.sign(x) == side) & (np.abs(x) > 0.5) & (ear < 1)] = skin * 0.8
    colours[front & ((x / 0.27) ** 2 + ((y - 0.5) / 0.07) ** 2 < 1)] = (0.7, 0.2, 0.22)
    return colours


def draw_people(number: int, side: int, seed: int = 0, most: int = 4) -> HeadPicture:
    """A picture of one to `most` drawn heads, turned any way round a circle, before a background of waves and noise.

    Args:
        number: of the picture; another one is another picture.
        side: of the picture in pixels.
        seed: of the set.
        most: heads at most.
    """
    generator = np.random.default_rng([seed, number])
    y, x = np.mgrid[:side, :side] / side
    waves = sum(
        generator.normal() * np.sin(2 * np.pi * (generator.uniform(0, 4) * x + generator.uniform(0, 4) * y) + generator.uniform(0, 6))
        for _ in range(4)
    )
    base = generator.uniform(0.2, 0.8, 3) + 0.12 * np.asarray(waves)[..., None] * generator.uniform(0.3, 1, 3)
    image = np.clip(base + generator.normal(0, 0.04, base.shape), 0, 1) * 255
    boxes: list[list[float]] = []
    angles: list[list[float]] = []
    for _ in range(int(generator.integers(1, most + 1))):
        radius = float(generator.uniform(0.07, 0.16)) * side
        turned = [float(generator.normal(0, 15)), float(generator.uniform(-180, 180)), float(generator.normal(0, 12))]
        turned[0], turned[2] = float(np.clip(turned[0], -60, 60)), float(np.clip(turned[2], -50, 50))
        tone = float(generator.uniform(0.35, 1))
        skin, hair = np.array([0.95, 0.78, 0.66]) * tone, generator.uniform(0.03, 0.5) * np.array([1, 0.8, 0.6])
        head = draw_head(radius, turned, skin.tolist(), hair.tolist())
        rows, columns = (np.flatnonzero(head[..., 3].max(axis)) for axis in (1, 0))
        head = head[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = head.shape[:2]
        left, top = int(generator.integers(0, side - width)), int(generator.integers(0, side - height))
        box = [left, top, left + width, top + height]
        if any(min(box[2], other[2]) > max(box[0], other[0]) and min(box[3], other[3]) > max(box[1], other[1]) for other in boxes):
            continue  # heads hide each other less than people do
        part = image[top : top + height, left : left + width]
        part[head[..., 3] > 0] = head[head[..., 3] > 0][:, :3]
        boxes.append([float(value) for value in box])
        angles.append(turned)
    pixels = image.round().astype(np.uint8)
    return HeadPicture(number, Path(f"drawn_{seed}_{number}.png"), (side, side), np.array(boxes), np.array(angles), pixels)
