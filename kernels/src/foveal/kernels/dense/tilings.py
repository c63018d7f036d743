"""Tile sizes of attention's kernels: a table, chosen from by architecture, element size and head width. Nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from foveal.kernels.dispatch import interpreting
from foveal.kernels.gpu import width


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and launch options of one kernel; `split`: its gradients in two launches, each with a part of the accumulators."""

    queries: int
    keys: int
    warps: int
    stages: int
    split: bool = False


#: (kernel, architecture, bytes of an element) -> tilings for head widths up to 64, 128 and 256.
TILINGS: dict[tuple[str, str, int], tuple[Tiling, Tiling, Tiling]] = {
    ("forward", "ampere", 2): (Tiling(128, 32, 4, 2), Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    ("forward", "hopper", 2): (Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2)),
    ("forward", "cdna", 2): (Tiling(128, 64, 4, 1), Tiling(128, 64, 8, 1), Tiling(64, 32, 8, 1)),
    ("forward", "ampere", 4): (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 1)),
    ("forward", "hopper", 4): (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 1)),
    ("forward", "cdna", 4): (Tiling(64, 32, 4, 1), Tiling(64, 32, 8, 1), Tiling(32, 16, 4, 1)),
    ("key_gradients", "ampere", 2): (Tiling(64, 64, 4, 2), Tiling(32, 64, 8, 2), Tiling(32, 64, 8, 1, True)),
    ("key_gradients", "hopper", 2): (Tiling(64, 64, 8, 2), Tiling(32, 64, 8, 2), Tiling(32, 32, 8, 1, True)),
    ("key_gradients", "cdna", 2): (Tiling(32, 64, 4, 1), Tiling(32, 64, 8, 1), Tiling(16, 32, 4, 1, True)),
    ("key_gradients", "ampere", 4): (Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1, True), Tiling(32, 32, 8, 1, True)),
    ("key_gradients", "hopper", 4): (Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1, True), Tiling(32, 32, 8, 1, True)),
    ("key_gradients", "cdna", 4): (Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1, True), Tiling(16, 16, 4, 1, True)),
    ("query_gradients", "ampere", 2): (Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 1)),
    ("query_gradients", "hopper", 2): (Tiling(64, 64, 4, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 1)),
    ("query_gradients", "cdna", 2): (Tiling(64, 32, 4, 1), Tiling(64, 32, 8, 1), Tiling(32, 16, 4, 1)),
    ("query_gradients", "ampere", 4): (Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1), Tiling(32, 32, 8, 1)),
    ("query_gradients", "hopper", 4): (Tiling(32, 32, 4, 1), Tiling(16, 16, 4, 1), Tiling(32, 32, 8, 1)),
    ("query_gradients", "cdna", 4): (Tiling(32, 32, 4, 1), Tiling(32, 16, 4, 1), Tiling(16, 16, 4, 1)),
    ("shared_gradient", "ampere", 2): (Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 2)),
    ("shared_gradient", "hopper", 2): (Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    ("shared_gradient", "cdna", 2): (Tiling(64, 16, 4, 1), Tiling(64, 16, 8, 1), Tiling(32, 16, 4, 1)),
    ("shared_gradient", "ampere", 4): (Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1)),
    ("shared_gradient", "hopper", 4): (Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1), Tiling(32, 32, 8, 1)),
    ("shared_gradient", "cdna", 4): (Tiling(32, 16, 4, 1), Tiling(32, 16, 4, 1), Tiling(32, 16, 4, 1)),
}


def tiling(kernel: str, architecture: str, itemsize: int, width: int, *, modified: bool) -> Tiling:
    """The table's entry for a kernel.

    What changes the logits takes as many registers as they do, and what it loads a second stage of the pipeline would hold twice. So the
    tile is halved for it, forward on both sides where it is large or a wide head's sums leave less room. Forward and `key_gradients` run in one
    stage then, and `key_gradients`, which holds two sums, spreads over eight warps besides.
    """
    if interpreting():  # a tile costs the same whatever its size
        return Tiling(64, 64, 4, 1, split=width > 64)
    entry = TILINGS[kernel, architecture, itemsize][0 if width <= 64 else 1 if width <= 128 else 2]
    if not modified or kernel == "shared_gradient":  # that kernel is only there for what changes the logits
        return entry
    if kernel == "query_gradients":
        return replace(entry, keys=max(16, entry.keys // 2))
    if kernel == "forward":
        rows, keys = entry.queries // 2, entry.keys // 2 if entry.keys > 32 or width > 64 else entry.keys
        return replace(entry, queries=max(16, rows if width <= 128 else min(32, rows)), keys=max(16, keys), stages=1)
    least, warps = (32, 8) if itemsize == 2 else (16, entry.warps)
    return replace(entry, queries=min(entry.queries, max(least, entry.queries // 2)), warps=warps, stages=1)


def shortened(tiles: Tiling, queries: int, keys: int) -> Tiling:
    """The tiles, no longer than the sequences need; 16 is the least that a matrix instruction takes."""
    return replace(tiles, queries=min(tiles.queries, width(queries)), keys=min(tiles.keys, width(keys)))


#: Rows, or columns, of a short sequence's pairs that a program of its own takes where the backward pass is split.
STRIP = 16


def window_tiling(queries: int, keys: int, itemsize: int, architecture: str, *, backward: bool) -> Tiling:
    """Tiles of one short sequence: all of it.

    Backward, three gradients and a shared sum are at hand at once: twice the warps hold them, but on CDNA, whose threads have twice the
    registers. In float32 each operand of a product is there twice besides, for its three TF32 products: 64 x 64 pairs spilled 7.6 KB of
    registers a thread. So `split`: one launch in strips of rows for dq and the shared sum, one in strips of columns for dk and dv.
    """
    rows, columns = width(queries), width(keys)
    crowded = rows * columns >= 4096 and architecture != "cdna" and (backward or itemsize == 4)
    split = backward and itemsize == 4 and max(rows, columns) > STRIP
    return Tiling(rows, columns, 8 if crowded else 4, 1 if backward else 2, split)
