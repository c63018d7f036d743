"""What convex outlines share, exactly: the measure of DOTA, beside the Gaussians that ultralytics measures turned boxes by."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def shared_areas(first: Float[np.ndarray, "pairs n 2"], second: Float[np.ndarray, "pairs m 2"]) -> Float[np.ndarray, " pairs"]:
    """Areas that pairs of convex polygons share, in square pixels.

    The first polygon is cut by each side of the second, all pairs at once (Sutherland and Hodgman, Reentrant Polygon Clipping, CACM 1974).

    Args:
        first: corners x, y in pixels, one after the other round each polygon, either way.
        second: the same.
    """
    if not len(first):
        return np.zeros(0)
    middle = first.mean(1, keepdims=True)  # products of small numbers lose less
    left, right = _one_way_round(first - middle), _one_way_round(second - middle)
    for side in range(right.shape[1]):
        left = _cut(left, right[:, side - 1], right[:, side])
    return np.where(_areas(right) > 0, np.abs(_areas(left)), 0.0)


def polygon_overlap(first: Float[np.ndarray, "n corners 2"], second: Float[np.ndarray, "m corners 2"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every convex polygon of the first with every one of the second; nothing where neither has an area.

    Args:
        first: corners x, y in pixels, one after the other round each polygon, either way.
        second: the same.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    low, high = np.maximum(first.min(1)[:, None], second.min(1)), np.minimum(first.max(1)[:, None], second.max(1))
    rows, columns = np.nonzero((low < high).all(2))  # only these can share anything
    shared = np.zeros((len(first), len(second)))
    shared[rows, columns] = shared_areas(first[rows], second[columns])
    whole = np.abs(_areas(first))[:, None] + np.abs(_areas(second)) - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def is_convex(polygon: Float[np.ndarray, "corners 2"]) -> bool:
    """Whether a polygon without crossing sides turns one way at all its corners."""
    sides = np.roll(polygon, -1, 0) - polygon
    turns = _cross(sides, np.roll(sides, -1, 0))
    return bool((turns >= 0).all() or (turns <= 0).all())


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]


def _areas(polygons: np.ndarray) -> np.ndarray:
    """Positive where the corners go from the x axis to the y axis."""
    around = polygons - polygons[:, :1]
    return _cross(around, np.roll(around, -1, 1)).sum(1) / 2


def _one_way_round(polygons: np.ndarray) -> np.ndarray:
    return np.where((_areas(polygons) < 0)[:, None, None], polygons[:, ::-1], polygons)


def _cut(polygons: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """What lies left of the line from `start` to `end`; polygons with fewer corners than others repeat their first."""
    line = (end - start)[:, None]
    side = _cross(np.broadcast_to(line, polygons.shape), polygons - start[:, None])
    following, next_side = np.roll(polygons, -1, 1), np.roll(side, -1, 1)
    inside = side >= 0
    crosses = inside != (next_side >= 0)
    share = np.divide(side, side - next_side, out=np.zeros_like(side), where=crosses)
    crossing = polygons + (following - polygons) * share[..., None]
    count = len(polygons), 2 * polygons.shape[1]
    points, kept = np.stack((polygons, crossing), 2).reshape(*count, 2), np.stack((inside, crosses), 2).reshape(count)
    # A line adds one corner to a convex polygon; rounding may make two of it.
    order = np.argsort(~kept, axis=1, kind="stable")[:, : polygons.shape[1] + 2]
    points, kept = np.take_along_axis(points, order[..., None], 1), np.take_along_axis(kept, order, 1)
    return np.where(kept[..., None], points, points[:, :1])
