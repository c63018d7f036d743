"""The orders in which the heads of MHS-VM walk over a grid: continuous rows, anti-diagonals, a spiral, and plain raster order, two routes each.

Yang et al., MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba (arXiv:2406.05992). The routes of any height and width are made
when first needed and kept; the authors ship a table for one image size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

#: The heads in their order: continuous serpentines, crossing anti-diagonals, a spiral, raster order.
PATTERNS = ("C", "X", "S", "Z")

Cell = tuple[int, int]


def _serpentine(height: int, width: int) -> list[Cell]:
    """Row by row, every other row backwards."""
    return [(i, j if i % 2 == 0 else width - 1 - j) for i in range(height) for j in range(width)]


def _diagonals(height: int, width: int) -> list[Cell]:
    """Anti-diagonals i + j = 0, 1, ...: the even ones upwards, the odd ones downwards."""
    cells = []
    for total in range(height + width - 1):
        rows = range(max(0, total - width + 1), min(total, height - 1) + 1)
        cells += [(i, total - i) for i in (reversed(rows) if total % 2 == 0 else rows)]
    return cells


def _spiral(height: int, width: int) -> list[Cell]:
    """Clockwise and inwards from the top left."""
    cells: list[Cell] = []
    top, left, bottom, right = 0, 0, height - 1, width - 1
    while top <= bottom and left <= right:
        cells += [(top, j) for j in range(left, right + 1)]
        cells += [(i, right) for i in range(top + 1, bottom + 1)]
        if top < bottom:
            cells += [(bottom, j) for j in range(right - 1, left - 1, -1)]
        if left < right:
            cells += [(i, left) for i in range(bottom - 1, top, -1)]
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1
    return cells


def _routes_of(pattern: str, height: int, width: int) -> tuple[list[Cell], list[Cell]]:
    if pattern == "C":
        return _serpentine(height, width), [(i, j) for j, i in _serpentine(width, height)]
    if pattern == "X":
        cells = _diagonals(height, width)
        return cells, [(i, width - 1 - j) for i, j in cells]
    if pattern == "S":
        cells = _spiral(height, width)
        return cells, [(height - 1 - i, j) for i, j in cells]
    return [(i, j) for i in range(height) for j in range(width)], [(i, j) for j in range(width) for i in range(height)]


@lru_cache(maxsize=64)
def scan_routes(height: int, width: int, heads: int, device: torch.device) -> tuple[Int[Tensor, "heads 2 cells"], Int[Tensor, "heads 2 cells"]]:
    """Where each route goes, and where each cell comes on it.

    Args:
        height: rows of the grid.
        width: columns.
        heads: how many of `PATTERNS`, from the first.
        device: where the tables shall be.

    Returns:
        (head, route, step) -> raster index of the cell visited, and (head, route, cell) -> its step.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        order = torch.tensor([[[i * width + j for i, j in route] for route in _routes_of(name, height, width)] for name in PATTERNS[:heads]])
        return order.to(device), order.argsort(-1).to(device)
