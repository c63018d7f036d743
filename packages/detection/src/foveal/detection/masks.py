"""Masks of a picture's objects, kept as run lengths of their boxes: hundreds of them in a large picture take no memory to speak of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import cv2
import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask


class Masks(Sequence["np.ndarray"]):
    """Where the objects of one picture are, pixel by pixel.

    A mask becomes an array of the whole picture only when it is asked for: ``masks[0]`` is (height, width), True where the object is, iterating
    gives one after the other, and ``np.asarray(masks)`` all of them, (objects, height, width). A slice, a list of numbers, or True and False for
    every object choose some of them, as of an array.

    Args:
        size: width and height of the picture, in pixels.
        crops: of each object left and top of a rectangle in the picture, and what is inside it, (rows, columns), True where the object is.

    Raises:
        ValueError: a rectangle that reaches out of the picture.
    """

    def __init__(self, size: tuple[int, int], crops: Iterable[tuple[int, int, Bool[np.ndarray, "rows columns"]]] = ()) -> None:
        self.size = size
        self._kept: list[tuple[int, int, Any]] = []
        for left, top, inside in crops:
            rows, columns = inside.shape
            if left < 0 or top < 0 or left + columns > size[0] or top + rows > size[1]:
                raise ValueError(f"expected a mask within {size[0]} x {size[1]} pixels; got {columns} x {rows} from {left}, {top}")
            self._kept.append((left, top, coco_mask.encode(np.asfortranarray(inside, dtype=np.uint8))))

    @classmethod
    def of(cls, whole: Bool[np.ndarray, "objects height width"]) -> Masks:
        """Those that an array holds."""
        return cls((whole.shape[2], whole.shape[1]), (_cropped(mask) for mask in whole))

    @classmethod
    def joined(cls, several: Sequence[Masks]) -> Masks:
        """Those of several parts, one after the other, of a picture of one size."""
        if len({masks.size for masks in several}) != 1:
            raise ValueError(f"expected masks of a picture of one size; got {sorted({masks.size for masks in several})}")
        found = cls(several[0].size)
        found._kept = [kept for masks in several for kept in masks._kept]
        return found

    def moved(self, left: int, top: int, size: tuple[int, int]) -> Masks:
        """Those of a tile in the picture of `size` (width, height) that it was cut from at `left` and `top`."""
        if left < 0 or top < 0 or left + self.size[0] > size[0] or top + self.size[1] > size[1]:
            raise ValueError(f"expected a tile within {size[0]} x {size[1]} pixels; got {self.size[0]} x {self.size[1]} from {left}, {top}")
        found = Masks(size)
        found._kept = [(left + x, top + y, inside) for x, y, inside in self._kept]
        return found

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the array that holds them all: objects, height, width."""
        return len(self), self.size[1], self.size[0]

    @overload
    def __getitem__(self, chosen: int | np.integer[Any]) -> Bool[np.ndarray, "height width"]: ...
    @overload
    def __getitem__(self, chosen: slice | Sequence[int] | np.ndarray) -> Masks: ...
    def __getitem__(self, chosen: Any) -> Any:
        if isinstance(chosen, int | np.integer):
            left, top, inside = self.crop(int(chosen))
            whole = np.zeros((self.size[1], self.size[0]), bool)
            whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
            return whole
        found = Masks(self.size)
        rows = np.arange(len(self))[chosen if isinstance(chosen, slice) or len(chosen) else []]
        found._kept = [self._kept[row] for row in rows]
        return found

    def __iter__(self) -> Iterator[Bool[np.ndarray, "height width"]]:
        return (self[row] for row in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("masks are kept as run lengths; an array of them is always a copy")
        whole = np.zeros(self.shape, bool if dtype is None else dtype)
        for row, mask in enumerate(self):
            whole[row] = mask
        return whole

    def __repr__(self) -> str:
        return f"Masks({len(self)} of {self.size[0]} x {self.size[1]} pixels)"

    def crop(self, row: int) -> tuple[int, int, Bool[np.ndarray, "rows columns"]]:
        """Left and top of a rectangle around one object, and what is inside it."""
        left, top, inside = self._kept[row]
        return left, top, coco_mask.decode(inside).astype(bool)

    def run_lengths(self, row: int) -> dict[str, Any]:
        """One mask of the whole picture as COCO's run lengths, fit for JSON."""
        left, top, inside = self.crop(row)
        width, height = self.size
        # Run lengths go down the columns: only those of the rectangle are looked at.
        columns = np.zeros((inside.shape[1], height), bool)
        columns[:, top : top + inside.shape[0]] = inside.T
        pixels = columns.ravel()
        turns = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        counts = np.diff(np.concatenate(([0], turns, [pixels.size]))).tolist()
        if pixels.size and pixels[0]:
            counts.insert(0, 0)  # the first run is of nothing
        counts[0] += left * height
        after = (width - left - inside.shape[1]) * height
        if len(counts) % 2:
            counts[-1] += after
        elif after:
            counts.append(after)
        return _fit_for_json(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))

    def outline(self, row: int) -> list[list[float]]:
        """The longest outline of one mask, as points x, y in pixels; none of a mask of nothing."""
        left, top, inside = self.crop(row)
        return [[x + left, y + top] for x, y in outline_of(inside)]


def _cropped(mask: np.ndarray) -> tuple[int, int, np.ndarray]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, np.zeros((0, 0), bool)
    return int(columns[0]), int(rows[0]), mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def outline_of(mask: Bool[np.ndarray, "height width"]) -> list[list[float]]:
    """The longest outline of a mask, as points x, y; none of a mask of nothing."""
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE) if mask.size else ((), None)
    return [] if not lines else max(lines, key=len)[:, 0].astype(float).tolist()


def encoded(mask: Bool[np.ndarray, "height width"]) -> dict[str, Any]:
    """A mask as COCO's run lengths, fit for JSON."""
    return _fit_for_json(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def _fit_for_json(found: Any) -> dict[str, Any]:
    return {"size": [int(value) for value in found["size"]], "counts": found["counts"].decode("ascii")}
