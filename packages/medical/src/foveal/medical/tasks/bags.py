"""Learning to classify bags with ACMIL: cross-entropy of the bag and of its branches, and the branches' attention kept apart.

The recipe is the paper's: AdamW with weight decay 1e-5, the rate falling along a cosine with every step, no warm-up. One branch with nothing hidden
is attention-based MIL, the baseline.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.processes import of_every_process, once
from foveal.medical.bag_metrics import BagScores, bag_scores
from foveal.medical.data.bags import BagBatch
from foveal.medical.models.acmil import BagsOutput, GatedACMIL, MultiHeadACMIL, acmil_loss


class _Measured(NamedTuple):
    """A bag and what it was taken for."""

    name: str
    length: int
    label: int
    probabilities: Float[Tensor, " classes"]


class BagTask(pl.LightningModule):
    """Trains ACMIL on bags and measures it on whole bags.

    Logged: ``train/loss`` and its parts ``train/bag``, ``train/branch``, ``train/diversity``; ``val/`` and ``test/`` accuracy, balanced_accuracy,
    macro_f1, micro_f1 (equal to accuracy, and what the authors report as F1) and auroc; ``val/score``, macro F1 plus AUROC, which chooses the
    checkpoint. A test writes ``bags.csv``, pictures and a page into the run's folder.

    Args:
        network: gated or multi-head ACMIL.
        learning_rate: at the start.
        weight_decay: of AdamW.
        standardise: bring each feature to mean 0 and standard deviation 1 of the training instances; for features that no network has normalised.
        diversity: weight of the diversity loss; the paper's is 1.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self, network: GatedACMIL | MultiHeadACMIL, learning_rate: float = 1e-4, weight_decay: float = 1e-5, standardise: bool = False,
        diversity: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.learning_rate, self.weight_decay = network, learning_rate, weight_decay
        self.standardise, self.diversity = standardise, diversity
        # Part of what was learned, so that a checkpoint measures any bag as it was trained to.
        self.register_buffer("feature_mean", torch.zeros(network.config.features))
        self.register_buffer("feature_scale", torch.ones(network.config.features))
        self._measured: list[_Measured] = []

    def on_fit_start(self) -> None:
        """Compare the data with the network, and measure the features where they are to be standardised."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        classes = self.network.config.classes
        if len(data.class_names) != classes:
            raise UserError(f"expected {classes} classes, as the network has; {data.root} has {len(data.class_names)}; set the network's classes")
        width = data.items("train")[0].read().shape[1]
        if width != self.network.config.features:
            raise UserError(f"expected {self.network.config.features} features, as the network reads; {data.root} has {width}; set its features")
        if self.standardise:
            mean, scale = data.statistics()
            self.feature_mean.copy_(mean)
            self.feature_scale.copy_(scale)

    def forward(self, batch: BagBatch) -> BagsOutput:
        """What each bag gives."""
        return self.network.forward_bags((batch.features - self.feature_mean) / self.feature_scale, batch.lengths)

    def training_step(self, batch: BagBatch, index: int) -> Tensor:
        """Mean loss of the bags."""
        losses = acmil_loss(self(batch), batch.labels)
        total = losses.bag + losses.branch + self.diversity * losses.diversity
        parts = {"train/loss": total, "train/bag": losses.bag, "train/branch": losses.branch, "train/diversity": losses.diversity}
        self.log_dict(parts, batch_size=len(batch.labels))
        return total

    def _measure(self, batch: BagBatch) -> None:
        shares, labels = self._probabilities_of(batch).cpu(), batch.labels.tolist()
        self._measured += [_Measured(*row) for row in zip(batch.names, batch.lengths, labels, shares, strict=True)]

    def _probabilities_of(self, batch: BagBatch) -> Float[Tensor, "bags classes"]:
        return self(batch).bag_logits.float().softmax(-1)

    def _finish(self, stage: str) -> tuple[list[_Measured], BagScores]:
        """All bags, those of other processes too, and their scores."""
        bags, self._measured = once(of_every_process(self.trainer, self._measured), attrgetter("name")), []
        scores = bag_scores(torch.stack([bag.probabilities for bag in bags]), torch.tensor([bag.label for bag in bags]))
        for name, value in scores._asdict().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "macro_f1")
        return bags, scores

    def validation_step(self, batch: BagBatch, index: int) -> None:
        """Keep a batch's predictions."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all bags."""
        _, scores = self._finish("val")
        self.log("val/score", scores.macro_f1 + (scores.auroc if scores.auroc == scores.auroc else 0.5))

    def test_step(self, batch: BagBatch, index: int) -> None:
        """Keep a batch's predictions."""
        self._measure(batch)

    def on_test_epoch_end(self) -> None:
        """Log the scores over all bags; write the table, the pictures and the page."""
        from foveal.medical.tasks.bag_report import BagReport

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        bags, _ = self._finish("test")
        probabilities, labels = np.stack([bag.probabilities.numpy() for bag in bags]), np.array([bag.label for bag in bags])
        report = BagReport([(bag.name, bag.length) for bag in bags], probabilities, labels, data.class_names)
        if self.trainer.is_global_zero:
            report.finish(self.trainer)

    def predict_step(self, batch: BagBatch, index: int) -> Tensor:
        """Probabilities of a batch's bags."""
        return self._probabilities_of(batch)

    def configure_optimizers(self) -> Any:
        """AdamW and the cosine, step by step."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, int(self.trainer.estimated_stepping_batches)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
