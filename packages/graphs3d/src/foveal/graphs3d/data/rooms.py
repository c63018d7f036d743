"""Rooms drawn at random with furniture of realistic sizes: scenes without anybody's licence, as many as training wants.

Sizes are everyday ones in metres (a chair is about half a metre wide and 0.9 m high), spread by a tenth. Things stand on the floor without overlap,
hang on walls or ceiling, or stand on something that carries.
"""

from __future__ import annotations

import numpy as np

from foveal.graphs3d.data.scenes import Scene

#: Class -> width, depth and height in metres, and where it is: floor, wall (at a height), ceiling, or top (of what carries).
FURNITURE: dict[str, tuple[float, float, float, str]] = {
    "chair": (0.5, 0.55, 0.9, "floor"),
    "armchair": (0.85, 0.85, 0.9, "floor"),
    "sofa": (2.0, 0.95, 0.85, "floor"),
    "table": (1.4, 0.85, 0.75, "floor"),
    "coffee table": (1.1, 0.6, 0.45, "floor"),
    "desk": (1.3, 0.65, 0.75, "floor"),
    "bed": (1.6, 2.05, 0.55, "floor"),
    "nightstand": (0.45, 0.4, 0.55, "floor"),
    "wardrobe": (1.2, 0.6, 2.0, "floor"),
    "bookcase": (0.9, 0.35, 1.8, "floor"),
    "dresser": (1.1, 0.5, 0.85, "floor"),
    "stool": (0.35, 0.35, 0.5, "floor"),
    "plant": (0.4, 0.4, 0.9, "floor"),
    "bin": (0.3, 0.3, 0.4, "floor"),
    "floor lamp": (0.35, 0.35, 1.6, "floor"),
    "refrigerator": (0.7, 0.7, 1.75, "floor"),
    "picture": (0.6, 0.05, 0.45, "wall"),
    "clock": (0.3, 0.05, 0.3, "wall"),
    "shelf": (0.8, 0.25, 0.05, "wall"),
    "window": (1.2, 0.1, 1.2, "wall"),
    "ceiling lamp": (0.5, 0.5, 0.3, "ceiling"),
    "laptop": (0.35, 0.25, 0.22, "top"),
    "table lamp": (0.25, 0.25, 0.45, "top"),
    "cup": (0.08, 0.08, 0.1, "top"),
    "box": (0.35, 0.25, 0.2, "top"),
    "monitor": (0.55, 0.2, 0.42, "top"),
    "vase": (0.15, 0.15, 0.3, "top"),
}
CARRIERS = ("table", "coffee table", "desk", "nightstand", "dresser", "bookcase")
_STANDING = tuple(label for label, (*_, place) in FURNITURE.items() if place == "floor")
_OTHERS = tuple(label for label in FURNITURE if label not in _STANDING)


def draw_room(random: np.random.Generator, least: int = 6, most: int = 14, name: str = "room") -> Scene:
    """A room of 3.5 to 8 m; some classes come several times, so that questions have something to tell apart."""
    room = np.array([random.uniform(3.5, 8), random.uniform(3.5, 8), random.uniform(2.4, 3.0)])
    wanted = int(random.integers(least, most + 1))
    pool = list(random.choice(_STANDING, size=max(3, wanted // 2), replace=False)) + list(random.choice(_OTHERS, size=3, replace=False))
    labels: list[str] = []
    centers: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    for _ in range(20 * wanted):
        if len(labels) == wanted:
            break
        label = str(random.choice(pool))
        *usual, place = FURNITURE[label]
        size = np.array(usual) * random.normal(1, 0.1, 3).clip(0.7, 1.3)
        if place != "ceiling" and random.random() < 0.5:
            size = size[[1, 0, 2]]
        center = _place(place, size, room, labels, centers, sizes, random)
        if center is not None and not _overlaps(center, size, centers, sizes):
            labels.append(label)
            centers.append(center)
            sizes.append(size)
    origin = random.uniform(-20, 20, 3) * [1, 1, 0]  # scans start anywhere
    return Scene(name, tuple(map(str, range(len(labels)))), tuple(labels), np.array(centers) + origin, np.array(sizes))


def _place(
    place: str, size: np.ndarray, room: np.ndarray, labels: list[str], centers: list[np.ndarray], sizes: list[np.ndarray], random: np.random.Generator
) -> np.ndarray | None:
    if (size > room).any():
        return None
    if place == "top":
        carriers = [index for index, label in enumerate(labels) if label in CARRIERS]
        if not carriers:
            return None
        under = int(random.choice(carriers))
        slack = np.maximum(sizes[under][:2] - size[:2], 0) / 2
        spot = centers[under][:2] + random.uniform(-slack, slack)
        return np.append(spot, centers[under][2] + sizes[under][2] / 2 + size[2] / 2 + 0.005)
    spot = np.append(random.uniform(size[:2] / 2, room[:2] - size[:2] / 2), size[2] / 2)
    if place == "wall":
        side = int(random.integers(2))
        spot[side] = size[side] / 2 if random.random() < 0.5 else room[side] - size[side] / 2
        spot[2] = random.uniform(1.2, room[2] - size[2] / 2 - 0.1) if room[2] - size[2] / 2 > 1.4 else room[2] / 2
    elif place == "ceiling":
        spot[2] = room[2] - size[2] / 2
    return spot


def _overlaps(center: np.ndarray, size: np.ndarray, centers: list[np.ndarray], sizes: list[np.ndarray]) -> bool:
    if not centers:
        return False
    return bool((np.abs(np.array(centers) - center) < (np.array(sizes) + size) / 2).all(-1).any())
