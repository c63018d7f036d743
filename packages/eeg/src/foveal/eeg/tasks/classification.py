"""Learning to classify tokenized EEG, and to fill in hidden tokens before that.

The tokenizer is frozen and stays in evaluation mode whatever the trainer does. Fine-tuning in the authors' recipe: AdamW at 1e-3, betas (0.9, 0.999),
five epochs of warm-up of fifty; cross entropy with labels smoothed by 0.1, binary cross entropy, or focal loss for rare seizures. Pretraining: every
token is hidden with probability one half, then the others; cross entropy of the hidden ones.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassCohenKappa,
    MulticlassF1Score,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from foveal.core.checkpoint import start_from
from foveal.core.errors import UserError
from foveal.core.tracking import log_figure
from foveal.eeg.checkpoints import model_from_weights
from foveal.eeg.data.windows import Window
from foveal.eeg.losses import focal_loss, masked_token_loss
from foveal.eeg.models.tfm_encoder import TFMEncoder
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer
from foveal.eeg.plots import draw_confusion
from foveal.eeg.tasks.schedules import cosine_steps

Kind = Literal["single_label", "binary", "multi_label"]


class _BalancedBinaryAccuracy(MulticlassAccuracy):
    """Mean of sensitivity and specificity of one logit, at probability 0.5."""

    def __init__(self) -> None:
        super().__init__(num_classes=2, average="macro")

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds > 0.5).long(), target)


def metrics_for(kind: Kind, classes: int) -> MetricCollection:
    """What is reported: balanced accuracy, kappa and weighted F1 of classes; AUROC, AUC-PR and balanced accuracy of one; macro means of labels."""
    if kind == "binary":
        chosen: dict[str, Any] = {
            "auroc": BinaryAUROC(), "auc_pr": BinaryAveragePrecision(), "balanced_accuracy": _BalancedBinaryAccuracy(), "accuracy": BinaryAccuracy(),
        }  # fmt: skip
    elif kind == "multi_label":
        chosen = {"auroc": MultilabelAUROC(classes), "auc_pr": MultilabelAveragePrecision(classes), "f1": MultilabelF1Score(classes)}
    else:
        chosen = {
            "balanced_accuracy": MulticlassAccuracy(classes, average="macro"),
            "kappa": MulticlassCohenKappa(classes),
            "weighted_f1": MulticlassF1Score(classes, average="weighted"),
            "accuracy": MulticlassAccuracy(classes, average="micro"),
        }
    return MetricCollection(chosen)


class FrozenTokenizer(nn.Module):
    """A tokenizer that never learns: in evaluation mode, without gradients, and not among the saved weights."""

    def __init__(self, model: TFMTokenizer) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenTokenizer:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, signal: Float[Tensor, "*batch samples"]) -> Int[Tensor, "*batch frames"]:
        """Ids."""
        with torch.autocast(signal.device.type, enabled=False):
            return self.model.tokenize(signal.float())


def _frozen(tokenizer: str) -> FrozenTokenizer:
    model = model_from_weights(tokenizer, "tfm_tokenizer")
    assert isinstance(model, TFMTokenizer)  # asked for by its system's name
    return FrozenTokenizer(model)


class _TokenTask(pl.LightningModule):
    """What both tasks share: a frozen tokenizer, an encoder that starts from its codes, AdamW and the schedule."""

    def __init__(
        self, tokenizer: str, network: TFMEncoder, learning_rate: float, final_learning_rate: float, warmup: float, weight_decay: float,
        betas: tuple[float, float], weights: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokenizer, self.network = _frozen(tokenizer), network
        config = self.tokenizer.model.config
        if (network.config.codes, network.config.width) != (config.codes, config.width):
            raise UserError(
                f"expected an encoder of the tokenizer's {config.codes} codes and width {config.width}; "
                f"got {network.config.codes} and {network.config.width}; set them in network.init_args.config"
            )
        network.start_from(self.tokenizer.model.codebook.weight)
        if weights is not None:
            start_from(network, weights, "tfm_encoder", heads=("head.",))
        self.learning_rate, self.final_learning_rate, self.warmup = learning_rate, final_learning_rate, warmup
        self.weight_decay, self.betas = weight_decay, betas

    def _tokens(self, batch: Window) -> Int[Tensor, "batch channels frames"]:
        config, (_, channels, _) = self.network.config, batch.signal.shape
        if channels > config.channels:
            raise UserError(
                f"expected windows of up to {config.channels} channels, as the network has; got {channels} ({batch.name[0]}); "
                "set network.init_args.config.channels, or choose channels of the data"
            )
        return self.tokenizer(batch.signal)

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule, step by step."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, self.betas, weight_decay=self.weight_decay)
        return cosine_steps(self, optimizer, self.final_learning_rate / self.learning_rate, self.warmup)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer has a file of its own."""
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("tokenizer.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The tokenizer comes from its own file."""
        own = {key: value for key, value in self.state_dict().items() if key.startswith("tokenizer.")}
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}


class ClassificationTask(_TokenTask):
    """Trains and tests a classifier of `Window` batches; windows without a label are left out.

    Logged: ``train/loss``, ``val/...`` and ``test/...`` of `metrics_for`, and a confusion matrix.

    Args:
        tokenizer: weights of a tokenizer (.safetensors).
        network: the classifier; one class for ``binary``.
        kind: ``single_label``, ``binary`` or ``multi_label``.
        loss: ``focal`` only for ``binary``; ``default`` is cross entropy with smoothed labels, or binary cross entropy.
        label_smoothing: of ``single_label``.
        learning_rate: highest.
        final_learning_rate: last.
        warmup: share of all steps.
        weight_decay: of AdamW.
        betas: of AdamW.
        weights: of an encoder to start from, for instance a pretrained one; its head is taken where it fits.

    Raises:
        UserError: no such weights, or an encoder that does not fit the tokenizer.
    """

    def __init__(
        self, tokenizer: str, network: TFMEncoder, kind: Kind = "single_label", loss: Literal["default", "focal"] = "default",
        label_smoothing: float = 0.1, learning_rate: float = 1e-3, final_learning_rate: float = 1e-5, warmup: float = 0.1,
        weight_decay: float = 1e-5, betas: tuple[float, float] = (0.9, 0.999), weights: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, network, learning_rate, final_learning_rate, warmup, weight_decay, betas, weights)
        if loss == "focal" and kind != "binary":
            raise UserError(f"expected the focal loss with kind binary; got {kind}; use loss: default")
        self.kind, self.loss, self.label_smoothing = kind, loss, label_smoothing
        classes = network.head.out_features
        if kind == "binary" and classes != 1:
            raise UserError(f"expected a network with one class for kind binary; got {classes}")
        self.measured = nn.ModuleDict({part: metrics_for(kind, classes) for part in ("val", "test")})
        self._confusion = torch.zeros(max(classes, 2), max(classes, 2), dtype=torch.long)

    def setup(self, stage: str) -> None:
        """Compare the data's classes with the network's."""
        data: Any = getattr(self.trainer, "datamodule", None)
        classes = getattr(getattr(data, "splits", None), "classes", None)
        expected = 2 if self.kind == "binary" else self.network.head.out_features
        if classes is not None and len(classes) != expected:
            raise UserError(
                f"expected data of {expected} classes, as the network and kind {self.kind} have; got {len(classes)} "
                f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); set network.init_args.config.classes"
            )

    def forward(self, batch: Window) -> Float[Tensor, "batch classes"]:
        """Logits, float32."""
        return self.network(self._tokens(batch), batch.present).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(batch, classes), or (batch,) of the positive class."""
        if self.kind == "single_label":
            return logits.softmax(-1)
        return logits.sigmoid()[:, 0] if self.kind == "binary" else logits.sigmoid()

    def training_step(self, batch: Window, index: int) -> Tensor:
        """The loss of the labelled windows."""
        logits, labels = self._labelled(batch)
        value = self._loss(logits, labels)
        self.log("train/loss", value, prog_bar=True, batch_size=len(logits))
        return value

    def validation_step(self, batch: Window, index: int) -> None:
        """Count."""
        self._measure(batch, "val")

    def test_step(self, batch: Window, index: int) -> None:
        """Count."""
        self._measure(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Draw the confusion matrix."""
        self._show("val")

    def on_test_epoch_end(self) -> None:
        """Draw the confusion matrix."""
        self._show("test")

    def predict_step(self, batch: Window, index: int) -> Tensor:
        """Probabilities."""
        return self.probabilities(self(batch))

    def _labelled(self, batch: Window) -> tuple[Tensor, Tensor]:
        known = batch.label >= 0 if batch.label.ndim == 1 else (batch.label >= 0).all(-1)
        return self(batch)[known], batch.label[known]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not len(logits):
            return logits.sum()
        if self.kind == "single_label":
            return functional.cross_entropy(logits, labels.long(), label_smoothing=self.label_smoothing)
        if self.loss == "focal":
            return focal_loss(logits[:, 0], labels)
        return functional.binary_cross_entropy_with_logits(logits[:, 0] if self.kind == "binary" else logits, labels.to(logits.dtype))

    def _measure(self, batch: Window, part: str) -> None:
        logits, labels = self._labelled(batch)
        if not len(logits):
            return
        self.log(f"{part}/loss", self._loss(logits, labels), batch_size=len(logits), sync_dist=True)
        found = self.probabilities(logits)
        measured: Any = self.measured[part]
        measured.update(found, labels.long())
        self.log_dict({f"{part}/{name}": metric for name, metric in measured.items()}, batch_size=len(logits))
        if self.kind != "multi_label":
            said = found.argmax(-1) if found.ndim == 2 else (found > 0.5).long()
            pairs = labels.long().cpu() * len(self._confusion) + said.cpu()
            self._confusion += torch.bincount(pairs, minlength=self._confusion.numel()).view_as(self._confusion)

    def _show(self, part: str) -> None:
        if self.kind != "multi_label" and self.trainer.is_global_zero and self._confusion.sum():
            data: Any = getattr(self.trainer, "datamodule", None)
            classes = data.splits.classes if data is not None and hasattr(data, "splits") else ()
            names = list(classes) if len(classes) == len(self._confusion) else [str(index) for index in range(len(self._confusion))]
            log_figure(self, f"{part}-confusion", draw_confusion(self._confusion, names))
        self._confusion.zero_()


class MaskedTokenTask(_TokenTask):
    """Pretrains an encoder: each token is hidden with probability `hide`, then its complement; both views are predicted.

    Logged: ``train/loss`` and ``val/loss`` (nats a hidden token) and ``val/accuracy``.

    Args:
        tokenizer: weights of a tokenizer (.safetensors).
        network: encoder whose head has as many classes as the tokenizer has codes.
        hide: probability.
        learning_rate: highest.
        final_learning_rate: last.
        warmup: share of all steps.
        weight_decay: of AdamW.
        betas: of AdamW.
        weights: of an encoder to go on from.

    Raises:
        UserError: as `ClassificationTask`, or a head of another size.
    """

    def __init__(
        self, tokenizer: str, network: TFMEncoder, hide: float = 0.5, learning_rate: float = 1e-3, final_learning_rate: float = 1e-5,
        warmup: float = 0.1, weight_decay: float = 1e-5, betas: tuple[float, float] = (0.9, 0.99), weights: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, network, learning_rate, final_learning_rate, warmup, weight_decay, betas, weights)
        if network.head.out_features != network.config.codes:
            raise UserError(f"expected a head of {network.config.codes} classes, one a code; got {network.head.out_features}")
        self.hide = hide

    def forward(self, batch: Window) -> Tensor:
        """Logits of every token, none hidden."""
        return self.network.predict_tokens(self._tokens(batch), batch.present)

    def training_step(self, batch: Window, index: int) -> Tensor:
        """Both views."""
        loss, _ = self._both(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.signal))
        return loss

    def validation_step(self, batch: Window, index: int) -> None:
        """The same masks every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            loss, accuracy = self._both(batch)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch.signal), sync_dist=True)
        self.log("val/accuracy", accuracy, prog_bar=True, batch_size=len(batch.signal), sync_dist=True)

    test_step = validation_step

    def _both(self, batch: Window) -> tuple[Tensor, Tensor]:
        ids = self._tokens(batch)
        there = batch.present[..., None].expand_as(ids)
        hidden = torch.rand(ids.shape).to(ids.device) < self.hide
        losses, right, count = [], 0.0, 0
        for view in (hidden, ~hidden):
            logits = self.network.predict_tokens(ids.masked_fill(view, self.network.hidden_id), batch.present)
            asked = (view & there).flatten(1)
            losses.append(masked_token_loss(logits, ids.flatten(1), asked))
            right += float((logits[asked].argmax(-1) == ids.flatten(1)[asked]).sum())
            count += int(asked.sum())
        return torch.stack(losses).mean(), torch.tensor(right / max(count, 1))
