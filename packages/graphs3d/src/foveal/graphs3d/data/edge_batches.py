"""Batches of about equal cost: as many structures as fit a number of edges, whatever their sizes. Resumable in the middle of an epoch.

Of a large set no structure's neighbours are listed before its batch is due: how many batches an epoch has is told from a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from foveal.core.errors import UserError
from foveal.core.resumable import SeededItems
from foveal.graphs3d.data.labelled import LabelledGraphs

#: Batches that a structure may still go into where batches are packed closely.
_OPEN = 64
#: Structures whose edges tell how many batches a larger set makes.
_SAMPLE = 500
#: More batches than the sample tells, in standard errors of what it tells: too few would leave structures out, which matters most in measuring.
_SPARE = {"learning": 1.5, "measuring": 4.0}


class EdgeCounts(Sequence[int]):
    """Edges of each structure of a set, listed when they are first asked for.

    Args:
        graphs: of the structures; without corruption.
    """

    def __init__(self, graphs: LabelledGraphs) -> None:
        self._graphs = graphs
        self._known = np.full(len(graphs), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def listed(self) -> int:
        """How many structures' edges were asked for until now."""
        return int((self._known >= 0).sum())

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if self._known[index] < 0:
            self._known[index] = self._graphs[index].graph.edge_index.shape[1]
        return int(self._known[index])


class EdgeBatches(DistributedSampler):
    """Lists of (epoch, index): a new order each epoch, packed in that order; processes take turns at the batches, so all have equally many.

    In training every epoch has as many batches as the first, because Lightning counts them once and else would leave out a validation or the last
    batches: where an epoch's order packs into fewer, the largest are halved; where into more, it is packed closer.

    `EdgeCounts` of more structures than `sample` are packed as they come: the epoch has as many batches as the sample makes expected, and a few more;
    what these are too many for is in batches of single structures at the epoch's end. Each process packs its own share of the structures.

    Args:
        edges: of each structure.
        batch_size: structures in a batch, at most.
        max_edges: in a batch, at most; a structure that alone has more is a batch of its own. None: no limit.
        shuffle: a new order each epoch.
        seed: of the order.
        sample: structures that are counted at once.
    """

    def __init__(
        self, edges: Sequence[int], batch_size: int, max_edges: int | None = None, shuffle: bool = True, seed: int = 0, sample: int = _SAMPLE
    ) -> None:
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        size, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if joined else (1, 0)
        super().__init__(range(len(edges)), size, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.streamed = isinstance(edges, EdgeCounts) and len(edges) > sample
        self.edges: Sequence[int] = edges if self.streamed else list(edges)
        self.batch_size, self.max_edges, self.sample = batch_size, max_edges, sample
        #: Batches to leave out at the beginning of an epoch, and, where it is known, how many structures are in them.
        self.start, self.begin = 0, 0
        #: Where the edges are counted as they come: structures in the epoch's first so many batches.
        self.ends = [0]
        self._first: int | None = None

    def batches(self) -> list[list[tuple[int, int]]]:
        """The epoch's batches of this process.

        Raises:
            UserError: fewer structures than processes.
        """
        if len(self.edges) < self.num_replicas:
            raise UserError(f"expected at least {self.num_replicas} structures, one for each process; got {len(self.edges)}; use fewer processes")
        if self.streamed:
            return list(self._stream(0, 0))
        packed = self._packed(self.epoch)
        if self.shuffle:
            if self._first is None:
                self._first = len(packed if self.epoch == 0 else self._packed(0))
            packed = self._as_many(packed, max(self._first // self.num_replicas, 1) * self.num_replicas)
        else:
            packed = self._shared(packed)
        return packed[self.rank :: self.num_replicas]

    def _packed(self, epoch: int, among: int = 1) -> list[list[tuple[int, int]]]:
        """Each structure in the first of the last `among` batches that has room, or in a new one."""
        return self._pack(self._order(epoch), epoch, among)

    def _order(self, epoch: int) -> Sequence[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.edges)).tolist() if self.shuffle else range(len(self.edges))

    def _limit(self) -> float:
        return float("inf") if self.max_edges is None else float(self.max_edges)

    def _pack(self, order: Sequence[int], epoch: int, among: int = 1) -> list[list[tuple[int, int]]]:
        packed: list[list[tuple[int, int]]] = []
        rooms: list[float] = []
        for index in order:
            recent = range(max(len(packed) - among, 0), len(packed))
            place = next((one for one in recent if len(packed[one]) < self.batch_size and self.edges[index] <= rooms[one]), len(packed))
            if place == len(packed):
                packed.append([])
                rooms.append(self._limit())
            packed[place].append((epoch, index))
            rooms[place] -= self.edges[index]
        return packed

    def _as_many(self, packed: list[list[tuple[int, int]]], count: int) -> list[list[tuple[int, int]]]:
        """The epoch's structures in so many batches; what even a closer packing leaves over is left out."""
        if len(packed) > count:
            packed = self._packed(self.epoch, among=_OPEN)
        return _halved(packed, count)[:count]

    def _shared(self, packed: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        """In measuring: a multiple of the processes, with no structure left out."""
        packed = _halved(packed, len(packed) + -len(packed) % self.num_replicas)
        # Single structures alone are left: some are measured twice, as torch's own sampler does.
        return packed + packed[: -len(packed) % self.num_replicas]

    def _expected(self) -> int:
        """Batches of this process, as a sample tells: the same number in every process and epoch."""
        if self._first is None:
            # In training the first ones of the first epoch: their edges are asked for again at once.
            places = np.linspace(0, len(self.edges) - 1, self.sample).astype(int).tolist()
            sample = self._order(0)[: self.sample] if self.shuffle else places
            edges = np.array([self.edges[place] for place in sample], dtype=float)
            error = edges.std() / max(edges.mean(), 1.0) / math.sqrt(len(sample))
            spare = 1 + error * _SPARE["learning" if self.shuffle else "measuring"]
            expected = spare * len(self._pack(sample, 0)) / len(sample) * len(self.edges) / self.num_replicas
            self._first = min(math.ceil(expected), len(self.edges) // self.num_replicas)
        return self._first

    def _stream(self, given: int, begin: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of this process from the `given`-th on, which begins with the `begin`-th of its structures; packed when asked for."""
        share, count = self._order(self.epoch)[self.rank :: self.num_replicas], self._expected()
        batch: list[tuple[int, int]] = []
        room = self._limit()
        self.ends = [*self.ends[:given], begin]
        for place in range(begin, len(share)):
            edges, last = self.edges[share[place]], given == count - 1
            full = len(batch) == self.batch_size or edges > room
            if batch and ((full and not (last and not self.shuffle)) or len(share) - place < count - given):
                yield batch
                given, batch, room = given + 1, [], self._limit()
                self.ends.append(place)
                if given == count:
                    return
            batch.append((self.epoch, share[place]))
            room -= edges
        yield batch

    def __iter__(self) -> Iterator[Any]:
        if not self.streamed:
            return iter(self.batches()[self.start :])
        return self._stream(self.start, self.begin) if self.begin else islice(self._stream(0, 0), self.start, None)

    def __len__(self) -> int:
        return self._expected() if self.streamed else len(self.batches())


def _halved(packed: list[list[tuple[int, int]]], count: int) -> list[list[tuple[int, int]]]:
    """At least `count` batches, as far as there are structures: the largest are cut in two."""
    while (missing := count - len(packed)) > 0:
        largest = sorted(range(len(packed)), key=lambda place: -len(packed[place]))[:missing]
        cut = {place for place in largest if len(packed[place]) > 1}
        if not cut:
            break
        halves = ([batch[: len(batch) // 2], batch[len(batch) // 2 :]] if place in cut else [batch] for place, batch in enumerate(packed))
        packed = [part for parts in halves for part in parts]
    return packed


class EdgeBatchLoader(DataLoader):
    """A data loader over `EdgeBatches` that goes on where it stopped.

    Args:
        dataset: its items may draw from the global generators.
        edges: of each item.
        batch_size: structures in a batch, at most.
        max_edges: in a batch, at most; None: no limit.
        shuffle: a new order each epoch.
        seed: of order and items.
        **kwargs: as of DataLoader.
    """

    def __init__(
        self, dataset: Dataset, edges: Sequence[int], batch_size: int, max_edges: int | None, shuffle: bool = True, seed: int = 0, **kwargs: Any
    ) -> None:
        self._packing = EdgeBatches(edges, batch_size, max_edges, shuffle, seed)
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
        super().__init__(SeededItems(dataset, seed), batch_sampler=self._packing, **kwargs)
        # Lightning looks here for the sampler whose epoch it sets, and replaces one that does not share between processes.
        object.__setattr__(self, "sampler", self._packing)
        self._done = 0
        self._resumed: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is drawn before the first batch is asked for: Lightning sets the epoch only after iter().
        packing, self._done, packing.begin = self._packing, 0, 0
        if self._resumed is not None and self._resumed["epoch"] == packing.epoch:
            self._done, packing.begin = self._resumed["batches"], self._resumed.get("begin", 0)
        self._resumed = None
        packing.start = self._done
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches were handed out, and what must be the same for that to mean the same."""
        packing = self._packing
        same = {"items": len(packing.edges), "batch_size": packing.batch_size, "max_edges": packing.max_edges, "seed": packing.seed}
        state = {"epoch": packing.epoch, "batches": self._done, **same}
        if packing.streamed and packing.num_replicas == 1 and 0 < self._done < len(packing.ends):
            state["begin"] = packing.ends[self._done]  # spares a resumed run the counting of what is done; the other processes' is another
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state` at the next iteration.

        Raises:
            UserError: the data or its packing differ from the interrupted run's.
        """
        now = self.state_dict()
        for name in ("items", "batch_size", "max_edges", "seed"):
            if state[name] != now[name]:
                raise UserError(
                    f"expected the interrupted run's training data ({name} {state[name]}) to resume it; got {name} {now[name]}; "
                    "restore the setting, or start a new run from the weights alone"
                )
        self._resumed = dict(state)
        self._packing.set_epoch(state["epoch"])
