"""Tables cut into parts of bounded size, so that distances are only taken inside a part: by class-stratified chance, or by hashing.

A row that is near another falls into its hash bucket (random hyperplanes, Charikar 2002); how GAIS hashes is not published in detail, so what is
here is ours: rows are sorted by their code and the sorted order is cut, which merges small buckets with their neighbours and splits large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveal.kernels.segment import CSR

VARIANTS = ("mini_batch", "single_level", "multi_level", "multi_view")


@dataclass(frozen=True)
class Graph:
    """Rows of one part as a graph.

    Attributes:
        x: their features.
        labels: their classes.
        edges: neighbour j to row i.
        edge: of each edge: distance over the median one, and the share of hash levels that it was found on.
    """

    x: Float[Tensor, "rows features"]
    labels: Int[Tensor, " rows"]
    edges: CSR
    edge: Float[Tensor, "edges 2"]

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on another device."""
        return Graph(self.x.to(device), self.labels.to(device), self.edges.to(device), self.edge.to(device))


def stratified(labels: Int[np.ndarray, " rows"], size: int, random: np.random.Generator) -> list[Int[np.ndarray, " part"]]:
    """Parts of about `size` rows by chance, each with every class in its proportion."""
    count = max(1, round(len(labels) / size))
    order = random.permutation(len(labels))
    # Rows of a class stand together, so that dealing them out in turn gives each part its share of each class.
    order = order[np.argsort(labels[order], kind="stable")]
    return [np.sort(order[start::count]) for start in range(count)]


def hash_codes(x: Float[np.ndarray, "rows features"], bits: int, random: np.random.Generator) -> Int[np.ndarray, " rows"]:
    """Side of `bits` random hyperplanes through the mean that each row lies on, as a number whose first bit weighs most."""
    planes = random.standard_normal((x.shape[1], bits)).astype(x.dtype)
    offsets = x[random.permutation(len(x))[:10_000]].mean(0) @ planes
    codes = np.zeros(len(x), dtype=np.int64)
    for start in range(0, len(x), 65_536):
        sides = x[start : start + 65_536] @ planes > offsets
        codes[start : start + 65_536] = sides @ (1 << np.arange(bits)[::-1])
    return codes


def hashed(codes: Int[np.ndarray, " rows"], size: int, random: np.random.Generator) -> list[Int[np.ndarray, " part"]]:
    """Rows in order of their codes, those of one bucket in random order, cut into parts of about `size`."""
    order = random.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    return [np.sort(part) for part in np.array_split(order, max(1, round(len(codes) / size)))]


def partitions(
    x: Float[np.ndarray, "rows features"],
    labels: Int[np.ndarray, " rows"],
    *,
    variant: str,
    size: int,
    bits: int,
    levels: int,
    views: int,
    random: np.random.Generator,
) -> Iterator[tuple[list[Int[np.ndarray, " part"]], list[Int[np.ndarray, " rows"]]]]:
    """The ways in which a variant cuts the table: parts, and the codes of its finer hash levels.

    One for all variants but `multi_view`, which has `views`. Levels halve the bits: a coarse code is the beginning of a fine one.
    """
    if variant == "mini_batch":
        yield stratified(labels, size, random), []
        return
    for _ in range(views if variant == "multi_view" else 1):
        codes = hash_codes(x, bits, random)
        finer = [codes >> (bits - bits * (level + 1) // levels) for level in range(levels)] if variant == "multi_level" else []
        yield hashed(codes, size, random), finer


def graph_of(x: Float[np.ndarray, "part features"], labels: Int[np.ndarray, " part"], neighbors: int, codes: list[Int[np.ndarray, " part"]]) -> Graph:
    """The nearest neighbours of each row inside a part, on each hash level where there are levels."""
    points, classes = torch.from_numpy(x), torch.from_numpy(labels)
    distances = torch.cdist(points, points, compute_mode="use_mm_for_euclid_dist")
    count = min(neighbors, len(x) - 1)
    away = distances + torch.diag(torch.full((len(x),), torch.inf))
    found = [_nearest(away, count)]
    for code in codes:
        of = torch.from_numpy(code)
        found.append(_nearest(away.masked_fill(of[:, None] != of, torch.inf), count))
    # Column i of `votes` holds who i looks at; an edge found on several levels counts them.
    votes = torch.zeros_like(distances)
    for level in found:
        votes += level
    target, source = votes.nonzero(as_tuple=True)
    length = distances[target, source]
    scale = length.median() if len(length) else length.new_tensor(1.0)
    edge = torch.stack((length / scale.clamp(min=1e-12), votes[target, source] / len(found)), -1)
    return Graph(points, classes, CSR.from_edge_index(torch.stack((source, target)), len(x)), edge)


def _nearest(distances: Tensor, count: int) -> Tensor:
    """1 where the column is among the row's `count` nearest, at a finite distance."""
    if count < 1:
        return torch.zeros_like(distances)
    near = distances.topk(count, largest=False)
    return torch.zeros_like(distances).scatter_(1, near.indices, near.values.isfinite().to(distances.dtype))
