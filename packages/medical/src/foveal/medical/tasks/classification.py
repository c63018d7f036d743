"""Learning to classify films: cross entropy, measured by accuracy, sensitivity, predictive value and AUROC."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import CatMetric

from foveal.core.errors import UserError
from foveal.medical.classification_metrics import film_scores
from foveal.medical.data.films import LabelledFilm
from foveal.medical.tasks.schedules import rising_then_cosine


class FilmTask(pl.LightningModule):
    """Trains a classifier of films.

    Logged: ``train/loss``; ``val/loss``, ``val/accuracy``, ``val/auroc`` and each class' sensitivity, predictive value and AUROC. A test writes
    ``films.csv``, pictures and a page into the run's folder.

    Args:
        network: films to logits.
        class_weights: of the cross entropy, one a class; none where the data are balanced already.
        optimizer: "adam" or "adamw".
        learning_rate: highest.
        weight_decay: of the optimiser.
        schedule: "cosine" (rises for `warmup` of the steps, falls to 0) or "constant".
        warmup: share of the steps.
        overlays: how many films a test draws the attention of: the most wrong ones first.
    """

    def __init__(
        self, network: nn.Module, class_weights: list[float] | None = None, optimizer: Literal["adam", "adamw"] = "adam", learning_rate: float = 2e-4,
        weight_decay: float = 0.0, schedule: Literal["cosine", "constant"] = "constant", warmup: float = 0.05, overlays: int = 6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.schedule, self.warmup, self.overlays = schedule, warmup, overlays
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights), persistent=False)
        # Logits, label and index of every film; a metric because those of all processes belong together.
        self.seen = CatMetric(nan_strategy="disable")

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.network(image)

    def on_fit_start(self) -> None:
        """Refuse a network of another number of classes before the first step."""
        self._class_names()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the weights go the classes' names, which the data may have told."""
        checkpoint["class_names"] = list(self._class_names())

    def training_step(self, batch: LabelledFilm, index: int) -> Tensor:
        """Cross entropy of a batch."""
        loss = F.cross_entropy(self(batch.image).float(), batch.label, self.class_weights)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.image))
        return loss

    def validation_step(self, batch: LabelledFilm, index: int) -> None:
        """Keep what the scores need."""
        self.seen.update(torch.cat([self(batch.image), batch.label[:, None], batch.index[:, None]], 1).float())

    def on_validation_epoch_end(self) -> None:
        """Scores of the whole set."""
        logits, labels, _ = self._all_seen()
        for name, value in self._scores(logits, labels).items():
            self.log(f"val/{name}", value, prog_bar=name in ("auroc", "accuracy"))
        weights = None if self.class_weights is None else self.class_weights.cpu()
        self.log("val/loss", F.cross_entropy(logits.float(), labels, weights))

    def test_step(self, batch: LabelledFilm, index: int) -> None:
        """Keep what the report needs."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Log the scores; write the table, the pictures and the page."""
        from foveal.medical.tasks.classification_report import FilmReport

        logits, labels, index = self._all_seen()
        for name, value in self._scores(logits, labels).items():
            self.log(f"test/{name}", value)
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            films = self.trainer.datamodule.films("test")  # type: ignore[attr-defined]
            FilmReport(films, logits.softmax(1), labels, index).finish(self.trainer, self.network, self.overlays)

    def predict_step(self, batch: LabelledFilm, index: int) -> Tensor:
        """Probabilities."""
        return self(batch.image).softmax(1)

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule."""
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, rising_then_cosine(int(self.trainer.estimated_stepping_batches), self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _all_seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and indices of the set, on the CPU; a sampler that evens out processes' shares by repeating films does not count them twice.

        The logits are of float64: in float32 the probabilities of sure films are all 1, and AUROC could not tell them apart.
        """
        seen: Any = self.seen.compute().cpu().double()  # not every GPU has float64
        self.seen.reset()
        index, first = seen[:, -1].long().unique(return_inverse=True)
        rows = torch.empty(len(index), dtype=torch.long).scatter_(0, first, torch.arange(len(seen)))
        seen = seen[rows]
        return seen[:, :-2], seen[:, -2].long(), index

    def _scores(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        return film_scores(logits.softmax(1), labels, self._class_names())

    def _class_names(self) -> list[str]:
        names: list[str] = self.trainer.datamodule.class_names  # type: ignore[attr-defined]
        classes = getattr(getattr(self.network, "config", None), "classes", len(names))
        if classes != len(names):
            raise UserError(
                f"expected a network of {len(names)} classes, as the films have ({', '.join(names)}); it has {classes}; set config.classes"
            )
        return names
