"""Learning to score memes from frozen encoders' vectors, and measuring it so that the figures mean something.

D-HUMOR's recipe is AdamW at 2e-5, weight decay 1e-4, cross entropy, five epochs, all encoders trained (``tcrnet_paper.yaml`` keeps its numbers for
what stands on the encoders). Small corpora want a faster, shorter schedule, label smoothing and noise on the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.processes import of_every_process
from foveal.memes.calibration import expected_calibration_error, fit_temperature
from foveal.memes.data.features import NO_LABEL, Batch, Encoding, MemeFeatures
from foveal.memes.models.tcrnet import Fused, TCRNet, TCRNetConfig, Tokens
from foveal.memes.tasks.report import MemeReport, scores_of


def tokens_of(batch: Batch) -> dict[str, Tokens]:
    """A batch's vectors as streams of one token each; a meme without the stream has none."""
    return {stream: Tokens(vectors.unsqueeze(1), batch.present[stream].unsqueeze(1)) for stream, vectors in batch.vectors.items()}


class MemeTask(pl.LightningModule):
    """Trains and tests `TCRNet` on `Batch`es.

    Logged: ``train/loss``; ``val/loss``, ``val/<task>/macro_f1`` and, for two classes, ``val/<task>/auroc``; the same for test with
    intervals, calibration and a table, in the run's folder; confusion, curves and calibration as pictures. No text and no meme is logged.

    Args:
        network: sizes.
        classes: task -> names of its classes, in order.
        encoding: how memes become vectors; it is kept with the weights, for a score means nothing with other vectors.
        weights: task -> share of its loss; 1 by default.
        learning_rate: of AdamW.
        weight_decay: of all parameters, as the authors have it.
        schedule: ``constant``, or ``one_cycle``: up for 30 % of the steps, then down to nothing.
        label_smoothing: share of a label that is spread over all classes.
        balanced: weigh classes by the inverse of their frequency in training.
        noise: standard deviation of Gaussian noise on the unit vectors, over all their dimensions together.
        stream_dropout: chance that a present stream is left out in training, where at least one other remains.

    Raises:
        UserError: names of other classes than the network's, or an unknown schedule.
    """

    def __init__(
        self,
        network: TCRNetConfig,
        classes: dict[str, list[str]],
        encoding: Encoding = Encoding(),  # noqa: B008  (frozen)
        weights: dict[str, float] | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 1e-4,
        schedule: str = "constant",
        label_smoothing: float = 0.0,
        balanced: bool = False,
        noise: float = 0.0,
        stream_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if {task: len(names) for task, names in classes.items()} != dict(network.classes):
            named = {task: len(names) for task, names in classes.items()}
            raise UserError(f"expected classes of the tasks and numbers in network.classes, {dict(network.classes)}; got names for {named}; mend one")
        if schedule not in ("constant", "one_cycle"):
            raise UserError(f"expected schedule constant or one_cycle; got {schedule!r}")
        self.network = TCRNet(network)
        self.classes, self.encoding, self.weights = classes, encoding, weights or {}
        self.learning_rate, self.weight_decay, self.schedule = learning_rate, weight_decay, schedule
        self.label_smoothing, self.balanced, self.noise, self.stream_dropout = label_smoothing, balanced, noise, stream_dropout
        self.class_weights: dict[str, Tensor] = {}
        self._collected: list[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]] = []  # place, logits and labels of each batch, on the CPU
        self._validated: MemeReport | None = None

    def setup(self, stage: str) -> None:
        """Compare the data's vectors, tasks and labels with the network's."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MemeFeatures):
            return
        if data.encoding != self.encoding:
            raise UserError(f"expected one encoding in model and data, which weights and vectors share; got {self.encoding} and {data.encoding}")
        asked, given = set(self.network.config.streams), set(self.encoding.streams)
        if given - asked or (asked - given and not self.network.config.absent):
            raise UserError(
                f"expected network.widths of the encoding's streams, {', '.join(sorted(given))}; got {', '.join(sorted(asked))}; mend one"
            )
        missing = [task for task in self.classes if task not in data.tasks]
        if missing:
            raise UserError(f"expected the data's tasks ({', '.join(data.tasks)}) to hold those of the network; {', '.join(missing)} lack; mend one")
        for part in (getattr(data, name, None) for name in ("train", "validation", "test")):
            for task, names in self.classes.items():
                if part is not None and len(part) and int(part.labels[task].max()) >= len(names):
                    raise UserError(f"expected labels of {task} from 0 to {len(names) - 1}, as it has classes; got {int(part.labels[task].max())}")

    def forward(self, batch: Batch) -> Fused:
        """Logits of every task."""
        return self.network(**tokens_of(batch))

    def on_fit_start(self) -> None:
        """Count classes, where they are balanced."""
        if self.balanced:
            labels: Mapping[str, Tensor] = self.trainer.datamodule.train.labels  # type: ignore[attr-defined]
            for task, count in self.network.config.classes.items():
                counts = torch.bincount(labels[task][labels[task] != NO_LABEL], minlength=count).clamp(min=1)
                self.class_weights[task] = (counts.sum() / (count * counts)).to(self.device)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Cross entropy of all tasks that a meme is labelled for."""
        loss = self._loss(self(self._disturbed(batch)).logits, batch.labels, self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.place))
        return loss

    def _disturbed(self, batch: Batch) -> Batch:
        vectors, present = dict(batch.vectors), dict(batch.present)
        if self.noise:
            vectors = {stream: value + self.noise * value.shape[-1] ** -0.5 * torch.randn_like(value) for stream, value in vectors.items()}
        if self.stream_dropout:
            for stream in present:
                others = torch.stack([there for name, there in present.items() if name != stream]).any(0)
                present[stream] = present[stream] & ~((torch.rand(len(others), device=others.device) < self.stream_dropout) & others)
        return batch._replace(vectors=vectors, present=present)

    def _loss(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], smoothing: float = 0.0) -> Float[Tensor, ""]:
        total: Tensor = next(iter(logits.values())).sum() * 0.0
        for task, scores in logits.items():
            known = labels[task] != NO_LABEL
            if known.any():
                one = F.cross_entropy(scores[known].float(), labels[task][known], self.class_weights.get(task), label_smoothing=smoothing)
                total = total + self.weights.get(task, 1.0) * one
        return total

    def validation_step(self, batch: Batch, index: int) -> None:
        """Collect logits and labels."""
        logits = self(batch).logits
        self.log("val/loss", self._loss(logits, batch.labels), prog_bar=True, batch_size=len(batch.place), sync_dist=True)
        self._collect(batch, logits)

    def test_step(self, batch: Batch, index: int) -> None:
        """Collect logits and labels."""
        self._collect(batch, self(batch).logits)

    def predict_step(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """Probabilities of every task."""
        return {task: torch.softmax(logits.float(), -1) for task, logits in self(batch).logits.items()}

    def _collect(self, batch: Batch, logits: Mapping[str, Tensor]) -> None:
        said, known = ({task: side[task].cpu() for task in self.classes} for side in (logits, batch.labels))
        self._collected.append((batch.place.cpu(), said, known))

    def _gathered(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Logits and labels of all processes' memes, each once, in the order of their split."""
        shares, self._collected = of_every_process(self.trainer, self._collected), []
        parts = [part for share in shares for part in share]
        _, first = np.unique(torch.cat([place for place, _, _ in parts]).numpy(), return_index=True)
        logits = {task: torch.cat([said[task] for _, said, _ in parts]) for task in self.classes}
        labels = {task: torch.cat([known[task] for _, _, known in parts]) for task in self.classes}
        return {task: value.float().numpy()[first] for task, value in logits.items()}, {task: value.numpy()[first] for task, value in labels.items()}

    def on_validation_epoch_end(self) -> None:
        """Log the scores of each task."""
        logits, labels = self._gathered()
        self._validated = MemeReport(self.classes, logits, labels, np.zeros(0, dtype=bool))
        for task, names in self.classes.items():
            for name, value in scores_of(logits[task], labels[task], names).items():
                if name in ("macro_f1", "auroc"):
                    self.log(f"val/{task}/{name}", value, prog_bar=True)

    def on_train_end(self) -> None:
        """Log the pictures of the last validation."""
        if self._validated is not None and self.trainer.is_global_zero:
            self._validated.show(self, "val")

    def on_test_epoch_end(self) -> None:
        """Write figures with intervals, the table of groups and the pictures."""
        logits, labels = self._gathered()
        leaks: Tensor = getattr(self.trainer.datamodule, "leaks", torch.zeros(0, dtype=torch.bool))  # type: ignore[attr-defined]
        report = MemeReport(self.classes, logits, labels, leaks.numpy())
        for name, value in report.figures().items():
            self.log(f"test/{name}", value)
        if self.trainer.is_global_zero:
            report.finish(self)

    def configure_optimizers(self) -> Any:
        """AdamW, and the cycle if there is one."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        if self.schedule == "constant":
            return optimizer
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def log_odds(logits: Float[np.ndarray, "memes classes"]) -> Float[np.ndarray, " memes"]:
    """Of class 1 against all others."""
    shifted = logits - logits.max(-1, keepdims=True)
    others = np.log(np.exp(np.delete(shifted, 1, axis=-1)).sum(-1))
    return shifted[:, 1] - others


def calibrated(logits: Float[np.ndarray, "memes 2"], labels: Sequence[int]) -> tuple[float, float, float]:
    """Temperature of two-class logits, and their expected calibration error before and after."""
    odds, marks = log_odds(np.asarray(logits)), np.asarray(labels)
    temperature = fit_temperature(odds, marks)
    before, after = (expected_calibration_error(1 / (1 + np.exp(-odds / value)), marks) for value in (1.0, temperature))
    return temperature, before, after
