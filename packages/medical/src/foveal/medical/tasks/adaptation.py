"""Adapting a frozen vision-language model to pairs of images and texts with ACE-LoRA: 0.97 million parameters on BiomedCLIP."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.processes import of_every_process
from foveal.medical.data.image_texts import ImageText
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig, AdaptedCLIP, label_guided_loss
from foveal.medical.retrieval_metrics import recalls
from foveal.medical.tasks.schedules import rising_then_cosine
from foveal.medical.vision_language import BaseChoice, load_base


@dataclass(frozen=True)
class AdapterChoice:
    """The adapter's own sizes; the others are the model's. The defaults are the published ones.

    Attributes:
        rank: of the low-rank terms.
        alpha: their strength.
        dropout: on what they read.
        hidden: of the hypergraph's layers.
        neighbours: of a token in its hyperedge.
    """

    rank: int = 4
    alpha: float = 1.0
    dropout: float = 0.1
    hidden: int = 128
    neighbours: int = 5


class AdaptationTask(pl.LightningModule):
    """Trains ACE-LoRA on a model of open_clip's. Checkpoints hold the adapter alone.

    Logged: ``train/loss``; ``val/recall_at_1`` and at 5 and 10 (mean of both directions), each direction's, and median ranks.

    Args:
        base: what to adapt.
        adapter: sizes of the adapter.
        label_guided: whether pairs with the same findings are not held against each other; without findings it is plain InfoNCE anyway.
        gathered: whether each process' pairs are held against those of all processes; the released code holds them against its own.
        learning_rate: highest.
        weight_decay: of AdamW.
        warmup: share of the steps in which the rate rises; 1/40 is one of the published 40 epochs.
    """

    def __init__(
        self, base: BaseChoice = BaseChoice(), adapter: AdapterChoice = AdapterChoice(), label_guided: bool = True, gathered: bool = True,  # noqa: B008
        learning_rate: float = 1e-3, weight_decay: float = 0.01, warmup: float = 0.025,
    ) -> None:  # fmt: skip
        super().__init__()
        loaded = load_base(base)
        self.base, self.tokenizer, self.preparation = base, loaded.tokenizer, loaded.preparation
        of_base = {name: getattr(loaded.network.config, name) for name in ("text_layers", "text_width", "image_layers", "image_width", "width")}
        try:
            self.network = AdaptedCLIP(loaded.network, ACELoRA(ACELoRAConfig(**of_base, **asdict(adapter))))
        except ValueError as error:
            raise UserError(f"expected sizes of an adapter: {error}") from None
        self.label_guided, self.gathered = label_guided, gathered
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.strict_loading = False  # of the frozen model nothing is in a checkpoint; on_load_checkpoint looks at the rest
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._texts: list[str] = []

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter's tensors alone."""
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if ".base." not in key}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The adapter's sizes and the model's name go with it."""
        checkpoint["adapter"], checkpoint["base"] = asdict(self.network.adapter.config), self.base.source

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an adapter of other sizes."""
        own, found = self.state_dict(), checkpoint["state_dict"]
        wrong = [key for key in own.keys() | found.keys() if key not in own or key not in found or own[key].shape != found[key].shape]
        if wrong:
            raise UserError(f"expected a checkpoint of the same model and adapter; {len(wrong)} tensors differ, such as {sorted(wrong)[0]}")

    def training_step(self, batch: ImageText, index: int) -> Tensor:
        """The label-guided loss of a batch."""
        image, text = self.network(batch.image, self.tokenizer(batch.text).to(self.device))
        findings = batch.findings if self.label_guided and batch.findings.shape[1] else None
        if self.gathered and self.trainer.world_size > 1:
            image, text = (self.all_gather(part, sync_grads=True).flatten(0, 1) for part in (image, text))  # type: ignore[union-attr]
            findings = None if findings is None else self.all_gather(findings).flatten(0, 1)  # type: ignore[union-attr]
        loss = label_guided_loss(image.float(), text.float(), self.network.adapter.scale, findings)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.image))
        self.log("train/scale", self.network.adapter.scale)
        return loss

    def validation_step(self, batch: ImageText, index: int) -> None:
        """Keep the embeddings."""
        image, text = self.network(batch.image, self.tokenizer(batch.text).to(self.device))
        self._seen.append((image.float(), text.float()))
        self._texts += batch.text

    def on_validation_epoch_end(self) -> None:
        """Recall@k over the whole set."""
        self._log_recalls("val")

    def test_step(self, batch: ImageText, index: int) -> None:
        """Keep the embeddings."""
        self.validation_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Recall@k over the whole set."""
        self._log_recalls("test")

    def configure_optimizers(self) -> Any:
        """AdamW on the adapter, a rise and a cosine."""
        optimizer = torch.optim.AdamW(self.network.adapter.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, rising_then_cosine(int(self.trainer.estimated_stepping_batches), self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _log_recalls(self, stage: str) -> None:
        own_image, own_text = (torch.cat(parts).cpu() for parts in zip(*self._seen, strict=True))
        shares = of_every_process(self.trainer, list(zip(own_image, own_text, self._texts, strict=True)))
        self._seen, self._texts = [], []
        pairs = [pair for turn in zip(*shares, strict=True) for pair in turn]
        if len(shares) > 1:  # pairs are dealt out in turn, and the last turn is filled up with the first ones again
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            pairs = pairs[: len(data.pairs("validation" if stage == "val" else "test"))]
        images, said, texts = zip(*pairs, strict=True)
        image, text = torch.stack(images), torch.stack(said)
        found = recalls(image, text, texts)
        for name, value in found.items():
            self.log(f"{stage}/{name}", value)
        for k in (1, 5, 10):
            both = [found[name] for name in found if name.endswith(f"recall_at_{k}")]
            # Sets of no more than k pairs cannot miss; best.ckpt may still be chosen by this name.
            self.log(f"{stage}/recall_at_{k}", sum(both) / len(both) if both else 1.0, prog_bar=k == 1)
