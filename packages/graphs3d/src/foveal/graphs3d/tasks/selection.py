"""Training of GAIS' network on the parts of a table, under Lightning, in seconds: labels of a random share of rows are hidden and inferred."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from foveal.core.resumable import seeded_by
from foveal.graphs3d.data.partitions import Graph
from foveal.graphs3d.models.gat import SelectionGAT, SelectionGATConfig


class HiddenLabels(pl.LightningModule):
    """Cross entropy on the rows of a graph whose labels were hidden.

    Args:
        network: sizes.
        learning_rate: of Adam, falling to nothing along a cosine.
        steps: of training.
        hide: share of labels hidden in a step.
    """

    def __init__(self, network: SelectionGATConfig, learning_rate: float = 0.01, steps: int = 100, hide: float = 0.5) -> None:
        super().__init__()
        self.network = SelectionGAT(network)
        self.learning_rate, self.steps, self.hide = learning_rate, steps, hide
        self.losses: list[float] = []

    def training_step(self, graph: Graph, index: int) -> Tensor:
        hidden = torch.rand(len(graph.x), device=self.device) < self.hide
        hidden[torch.randint(len(hidden), (1,), device=self.device)] = True
        scored = self.network(graph.x, graph.labels, hidden, graph.edges, graph.edge)
        loss = F.cross_entropy(scored.logits[hidden], graph.labels[hidden])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate, weight_decay=5e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def train(graphs: Sequence[Graph], network: SelectionGATConfig, *, steps: int, learning_rate: float, seed: int, device: torch.device) -> HiddenLabels:
    """A network trained on some parts of a table; the same for the same seed, whatever the state of the global generators."""
    with seeded_by(seed), _quietly():
        task = HiddenLabels(network, learning_rate, steps)
        loader: DataLoader = DataLoader(list(graphs), batch_size=None, shuffle=True)  # type: ignore[arg-type]
        on_gpu = device.type == "cuda"
        trainer = pl.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=[device.index or 0] if on_gpu else 1,
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        if steps:
            trainer.fit(task, loader)
    return task.eval().to(device)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Lightning's lines about devices and loaders: this is a step inside an estimator, which may run hundreds of times."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
