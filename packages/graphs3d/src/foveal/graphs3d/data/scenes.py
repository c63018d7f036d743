"""Scenes as boxes: what a detector, an annotator or a user's own table says stands where. JSON and CSV.

Coordinates are metres, axes x to the right, y away from the viewer, z up. A box is its centre and its extents along the axes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from foveal.core.errors import UserError

SUFFIXES = (".json", ".csv")
_LABEL = ("class", "label", "category", "class_name", "object_name", "name")
_ID = ("id", "object_id", "instance_id", "objectId")
_SCENE = ("scene", "scene_id", "scan", "scan_id", "room")
_CENTRE = ("center", "centre", "position", "centroid")
_SIZE = ("size", "extent", "dimensions", "axesLengths")
_CENTRE_COLUMNS = (("x", "y", "z"), ("cx", "cy", "cz"), ("center_x", "center_y", "center_z"), ("centre_x", "centre_y", "centre_z"))
_SIZE_COLUMNS = (("dx", "dy", "dz"), ("size_x", "size_y", "size_z"), ("sx", "sy", "sz"), ("width", "depth", "height"))


@dataclass(frozen=True)
class Scene:
    """Objects of one place.

    Attributes:
        name: of the scene.
        ids: of the objects.
        labels: their classes, as written.
        centers: in metres.
        sizes: extents along x, y and z in metres.
    """

    name: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    centers: Float[np.ndarray, "objects 3"]
    sizes: Float[np.ndarray, "objects 3"]

    def __len__(self) -> int:
        return len(self.labels)

    def corners(self) -> tuple[Float[np.ndarray, "objects 3"], Float[np.ndarray, "objects 3"]]:
        """Lowest and highest corner of each box."""
        return self.centers - self.sizes / 2, self.centers + self.sizes / 2


def scene_of(name: str, boxes: Sequence[Mapping[str, Any]]) -> Scene:
    """A scene from mappings with class, centre and size under any of their usual names; ``bbox`` may hold all six numbers.

    Raises:
        UserError: no box at all, a box without a class or a number, a size that is not positive.
    """
    if not boxes:
        raise UserError(f"expected at least one object in scene {name!r}; it is empty")
    ids, labels, centers, sizes = [], [], [], []
    for place, box in enumerate(boxes):
        where = f"object {place} of scene {name!r}"
        label = _first(box, _LABEL)
        if label is None or not str(label).strip():
            raise UserError(f"expected a class for {where} under one of {', '.join(_LABEL[:3])}; it has {', '.join(map(str, box))}; add one")
        center, size = _numbers(box, _CENTRE, _CENTRE_COLUMNS, slice(0, 3)), _numbers(box, _SIZE, _SIZE_COLUMNS, slice(3, 6))
        for what, values, columns in (("centre", center, _CENTRE_COLUMNS), ("size", size, _SIZE_COLUMNS)):
            if values is None:
                raise UserError(f"expected the {what} of {where} as a list of three numbers or as {', '.join(columns[0])}; there is none; add it")
            if not np.isfinite(values).all():
                raise UserError(f"expected three finite numbers for the {what} of {where}; got {values.tolist()}; mend the file")
        assert center is not None
        assert size is not None
        if (size <= 0).any():
            raise UserError(f"expected positive sizes in metres for {where} ({label}); got {size.tolist()}; mend the file")
        identity = _first(box, _ID)
        ids.append(str(place if identity is None else identity))
        labels.append(str(label).strip())
        centers.append(center)
        sizes.append(size)
    return Scene(name, tuple(ids), tuple(labels), np.array(centers), np.array(sizes))


def read_scenes(path: str | Path) -> list[Scene]:
    """Scenes of a file.

    JSON: ``{"scene": "kitchen", "objects": [{"class": "chair", "center": [x, y, z], "size": [dx, dy, dz]}]}``, a list of such, or a list of boxes.
    CSV: a row a box, columns class, x, y, z, dx, dy, dz, and optionally scene and id.

    Raises:
        UserError: the file cannot be read, or a scene in it is not one.
    """
    file = Path(path)
    try:
        if file.suffix.lower() == ".csv":
            table = pd.read_csv(file)
            groups = next((column for column in _SCENE if column in table.columns), None)
            if table.empty:
                raise UserError(f"expected at least one object in {file}; it is empty")
            parts = [(file.stem, table)] if groups is None else [(str(name), part) for name, part in table.groupby(groups, sort=False)]
            return [scene_of(name, [dict(row.dropna()) for _, row in part.iterrows()]) for name, part in parts]
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected scenes in JSON or CSV; {file} cannot be read: {error}; check the file") from None
    return scenes_of(content, file.stem)


def scenes_of(content: Any, name: str) -> list[Scene]:
    """Scenes of parsed JSON; see `read_scenes`."""
    if isinstance(content, Mapping):
        if "objects" in content:
            return [scene_of(str(_first(content, _SCENE) or name), content["objects"])]
        if content and all(isinstance(value, list) for value in content.values()):
            return [scene_of(str(key), value) for key, value in content.items()]
    elif isinstance(content, list) and all(isinstance(entry, Mapping) for entry in content):
        if content and all("objects" in entry for entry in content):
            return [scene_of(str(_first(entry, _SCENE) or f"{name}_{place}"), entry["objects"]) for place, entry in enumerate(content)]
        return [scene_of(name, content)]
    raise UserError(f'expected {{"scene": ..., "objects": [...]}}, a list of such, or a list of boxes in {name}; it is none of them; see the docs')


def _first(box: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((box[name] for name in names if name in box), None)


def _numbers(box: Mapping[str, Any], names: Sequence[str], columns: Sequence[tuple[str, ...]], part: slice) -> Float[np.ndarray, "3"] | None:
    found = _first(box, names)
    if found is None:
        found = next(([box[column] for column in three] for three in columns if all(column in box for column in three)), None)
    if found is None and len(_first(box, ("bbox", "box")) or ()) >= 6:
        found = _first(box, ("bbox", "box"))[part]
    try:
        values = np.asarray(found, dtype=np.float64) if found is not None else None
    except (TypeError, ValueError):
        return None
    return values if values is not None and values.shape == (3,) else None
