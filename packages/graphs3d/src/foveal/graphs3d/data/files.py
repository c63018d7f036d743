"""Training data of one's own, or of OMat24, sAlex, MPtrj and OC20: files and folders of labelled structures.

Labels are energy (eV), forces (eV/A) and stress (eV/A^3), under ASE's names or with the prefix ``REF_``; what a structure lacks is not learned.
The published sets, each a folder that is named as `train`:

- OMat24 (Barroso-Luque et al., 2024; 110 M structures, CC BY 4.0) and sAlex: folders of ``.aselmdb`` shards.
- MPtrj (Deng et al., 2023; 1.6 M structures, MIT): ``MPtrj_2022.9_full.json`` as published, ``.aselmdb`` shards, or extended xyz as Matbench
  Discovery gives them out.
- OC20 S2EF (Chanussot et al., 2021; CC BY 4.0): the unpacked ``s2ef_train_2M`` folder of ``.extxyz`` (or ``.extxyz.xz``) files, whose energies are
  total ones, or its LMDB shards, whose energies are what their makers chose. Fixed atoms are marked and their forces not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ase
import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from foveal.core.errors import UserError
from foveal.graphs3d.data.edge_batches import EdgeBatchLoader, EdgeCounts
from foveal.graphs3d.data.labelled import Corruption, LabelledGraphs, collate_labelled
from foveal.graphs3d.data.sources import Joined, open_structures

#: So many structures are enough to know how many edges an atom has, and to fit references and scale.
_SAMPLE = 20_000


class Chosen(Sequence[ase.Atoms]):
    """Some structures of a source, in a given order, read when asked for."""

    def __init__(self, source: Sequence[ase.Atoms], places: Sequence[int]) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return Chosen(self.source, self.places[index]) if isinstance(index, slice) else self.source[self.places[index]]


class StructureFiles(pl.LightningDataModule):
    """Labelled structures to train, validate and test on. Cutoff and neighbours are the network's own.

    Args:
        train: file, folder, or several of them.
        validation: the same, or the share of `train` that is held out for it, such as 0.1.
        test: the same, or by name, such as ``{hot: test_600K.xyz}``: errors are told apart by it. None: no test.
        frames: of `train` only so many, drawn at random; None: all.
        batch_size: structures in a training batch, at most, for each process.
        max_edges: edges in a batch, at most: memory is bounded whatever the sizes of structures; None: no limit.
        corruption: moves atoms for denoising (DeNS); for networks of the denoising form.
        workers: processes that read and list neighbours; 0: the training process does.
        seed: of the held-out share, of the order and of what is corrupted.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: float | str | list[str] = 0.1,
        test: str | list[str] | dict[str, str] | None = None,
        frames: int | None = None,
        batch_size: int = 8,
        max_edges: int | None = None,
        corruption: Corruption | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.train_files, self.validation_files, self.test_files = train, validation, test
        self.frames, self.batch_size, self.max_edges = frames, batch_size, max_edges
        self.corruption, self.workers, self.seed = corruption, workers, seed

    def setup(self, stage: str | None = None) -> None:
        """Open the files of `stage`; see `open_structures` for what may be wrong with them."""
        if stage in (None, "fit", "validate"):
            self.train_structures, self.validation_structures = self._split()
        if stage in (None, "test", "predict"):
            self.tests = self._tests()

    def _split(self) -> tuple[Sequence[ase.Atoms], Sequence[ase.Atoms]]:
        structures = open_structures(self.train_files)
        order = np.random.default_rng(self.seed).permutation(len(structures)).tolist()[: self.frames]
        if not isinstance(self.validation_files, float):
            return Chosen(structures, order), open_structures(self.validation_files)
        held = round(self.validation_files * len(order))
        if not 0 < held < len(order):
            raise UserError(
                f"expected a share of the {len(order)} training structures for validation, above 0 and below 1; got {self.validation_files}; "
                "change data.validation"
            )
        return Chosen(structures, order[held:]), Chosen(structures, order[:held])

    def _tests(self) -> dict[str, Sequence[ase.Atoms]]:
        if self.test_files is None:
            raise UserError("expected test structures; data.test is not set; name a file or folder")
        if isinstance(self.test_files, dict):
            return {name: open_structures(files) for name, files in self.test_files.items()}
        return {"test": open_structures(self.test_files)}

    def sample(self, most: int = _SAMPLE) -> list[ase.Atoms]:
        """Training structures, evenly spaced where there are more than `most`."""
        structures = self.train_structures
        return [structures[index] for index in np.linspace(0, len(structures) - 1, min(most, len(structures))).astype(int).tolist()]

    def graphs(self, structures: Sequence[ase.Atoms], corruption: Corruption | None = None) -> LabelledGraphs:
        """Structures as the network takes them."""
        config = self._network_config()
        return LabelledGraphs(structures, config.cutoff, config.max_neighbors, corruption, config.max_elements)

    def _network_config(self) -> Any:
        assert self.trainer is not None  # asked for while it runs
        task: Any = self.trainer.lightning_module
        return task.network.config

    def _edges(self, structures: Sequence[ase.Atoms]) -> Sequence[int]:
        """Edges of each structure; without a limit on them, 1 each."""
        return [1] * len(structures) if self.max_edges is None else EdgeCounts(self.graphs(structures))

    def train_dataloader(self) -> DataLoader:
        """A new order each epoch; resumable to the bit."""
        config = self._network_config()
        if self.corruption is not None and not config.denoising:
            raise UserError("expected a network of the denoising form (denoising: true) for data.corruption; set it, or corruption: null")
        dataset = self.graphs(self.train_structures, self.corruption)
        edges = self._edges(self.train_structures)
        return EdgeBatchLoader(dataset, edges, self.batch_size, self.max_edges, seed=self.seed, num_workers=self.workers, collate_fn=collate_labelled)

    def val_dataloader(self) -> DataLoader:
        """Structures that training never sees."""
        return self._ordered(self.validation_structures)

    def test_dataloader(self) -> list[DataLoader]:
        """One loader a test set, in the order of their names' appearance."""
        return [self._ordered(structures) for structures in self.tests.values()]

    def predict_dataloader(self) -> DataLoader:
        """The structures of all test sets, one after the other; without a limit on edges, as Lightning rebuilds a loader that it predicts with."""
        structures = Joined(list(self.tests.values()))
        return DataLoader(self.graphs(structures), batch_size=self.batch_size, num_workers=self.workers, collate_fn=collate_labelled)

    def _ordered(self, structures: Sequence[ase.Atoms]) -> DataLoader:
        edges = self._edges(structures)
        return EdgeBatchLoader(
            self.graphs(structures), edges, self.batch_size, self.max_edges, shuffle=False, num_workers=self.workers, collate_fn=collate_labelled
        )
