"""Learning to answer questions about relations in space, and the table of how well, relation by relation."""

from __future__ import annotations

import csv
import json
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveal.core import run_folder
from foveal.core.files import atomic_write
from foveal.core.processes import of_every_process
from foveal.graphs3d.data.questions import RELATIONS
from foveal.graphs3d.models.relations import Asked, RelationDecoder, RelationDecoderConfig


class RelationTask(pl.LightningModule):
    """Cross entropy over the candidates of each question.

    Logged: ``train/loss``; ``val/loss``, ``val/accuracy``; in testing ``relations.csv`` and ``test.json`` in the run's folder, with accuracy, chance
    (one over the number of candidates) and count of each relation.

    Args:
        network: sizes, and how places enter attention.
        learning_rate: of AdamW, the peak of one cycle.
        weight_decay: of AdamW.
    """

    def __init__(self, network: RelationDecoderConfig, learning_rate: float = 2e-3, weight_decay: float = 0.01) -> None:
        super().__init__()
        self.network = RelationDecoder(network)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._answered: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, asked: Asked) -> Float[Tensor, "batch objects"]:
        """Logits of the objects."""
        return self.network(asked)

    def training_step(self, batch: Asked, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch).float(), batch.answer)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.answer))
        return loss

    def validation_step(self, batch: Asked, index: int) -> None:
        logits = self(batch).float()
        self.log("val/loss", F.cross_entropy(logits, batch.answer), prog_bar=True, batch_size=len(batch.answer), sync_dist=True)
        right = (logits.argmax(-1) == batch.answer).float().mean()
        self.log("val/accuracy", right, prog_bar=True, batch_size=len(batch.answer), sync_dist=True)

    def test_step(self, batch: Asked, index: int) -> None:
        right = self(batch).argmax(-1) == batch.answer
        self._answered.append((batch.relation.cpu(), right.cpu(), 1 / batch.candidates.sum(-1).cpu()))

    def predict_step(self, batch: Asked, index: int) -> Tensor:
        """Probabilities of the objects."""
        return torch.softmax(self(batch).float(), -1)

    def on_test_epoch_end(self) -> None:
        """Write the table."""
        # Questions that fill up the last share are counted twice: they are too few to matter, and nothing tells them apart.
        shares = of_every_process(self.trainer, self._answered)
        relation, right, chance = (torch.cat(parts) for parts in zip(*(batch for share in shares for batch in share), strict=True))
        self._answered = []
        rows: list[dict[str, Any]] = []
        for index, name in [*enumerate(RELATIONS), (None, "all")]:
            those = torch.ones_like(right) if index is None else relation == index
            if those.any():
                figures = {"accuracy": float(right[those].float().mean()), "chance": float(chance[those].mean())}
                rows.append({"relation": name, **figures, "questions": int(those.sum())})
                self.log(f"test/{name}", figures["accuracy"])
        if self.trainer.is_global_zero:
            folder = run_folder.current(self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / "relations.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            with atomic_write(folder / "test.json") as temporary:
                temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    def configure_optimizers(self) -> Any:
        """AdamW along one cycle."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}
