"""Rows admitted one after another, each the one that covers most of what those before it left uncovered.

Facility location, greedily (Nemhauser et al., 1978: within 1 - 1/e of the best), with the lazy evaluation of Minoux, 1978.
"""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Float, Int


def cover(similarity: Float[np.ndarray, "rows rows"], demand: Float[np.ndarray, " rows"], count: int) -> Int[np.ndarray, " rows"]:
    r"""The order in which rows are admitted to maximise :math:`\sum_i w_i \max_{j \in S} s_{ij}`.

    Args:
        similarity: s, not negative.
        demand: w, how much a row wants to be covered.
        count: how many to admit so, as long as something is gained; the rest follow, those that want it most first.

    Returns:
        All rows, first admitted first.
    """
    benefit = np.ascontiguousarray(similarity.T)  # one row of memory a candidate
    covered = np.zeros(len(demand), dtype=benefit.dtype)
    heap = [(-gain, row) for row, gain in enumerate((benefit @ demand).tolist())]
    heapq.heapify(heap)
    admitted: list[int] = []
    while heap and len(admitted) < count:
        promised, row = heap[0]
        if promised >= 0:
            break  # nothing is left to gain
        gain = -float(np.maximum(benefit[row] - covered, 0) @ demand)
        if len(heap) > 1 and (gain, row) > min(heap[1:3]):
            heapq.heapreplace(heap, (gain, row))
            continue
        heapq.heappop(heap)
        admitted.append(row)
        np.maximum(covered, benefit[row], out=covered)
    rest = np.setdiff1d(np.arange(len(demand)), admitted, assume_unique=False)
    rest = rest[np.argsort(-demand[rest], kind="stable")]
    return np.concatenate((np.asarray(admitted, dtype=np.int64), rest))
