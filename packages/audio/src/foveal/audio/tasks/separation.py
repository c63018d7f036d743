"""Training and evaluation of a separation model: PIT SNR to learn by, PIT SI-SDR improvement to judge by."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveal.audio.losses import pairwise_si_sdr, pairwise_snr, pit, pit_loss


class SeparationTask(pl.LightningModule):
    """Learns to separate.

    Args:
        network: takes (batch, samples), gives (batch, sources, samples).
        learning_rate: of Adam.
        schedule: ``plateau`` halves the rate when validation has not improved for 10 validations (the paper); ``linear`` warms up over
            `warmup` steps, holds, and falls to zero over the last `cooldown` of trainer.max_steps.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 1e-3,
        schedule: Literal["plateau", "linear"] = "plateau",
        warmup: int = 200,
        cooldown: float = 0.25,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.schedule, self.warmup, self.cooldown = learning_rate, schedule, warmup, cooldown

    def forward(self, mixture: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch sources samples"]:
        """Separated sources."""
        return self.network(mixture)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Negative SNR in dB under the best order of the sources."""
        mixture, sources, *_ = batch
        loss, _ = pit_loss(self(mixture), sources, pairwise=pairwise_snr)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """SI-SDR and its improvement over the mixture."""
        si_sdr, improvement = self._si_sdr(batch)
        size = len(improvement)
        self.log("val/si_sdr", si_sdr.mean(), batch_size=size, on_epoch=True)
        self.log("val/si_sdri", improvement.mean(), batch_size=size, on_epoch=True, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """As validation."""
        _, improvement = self._si_sdr(batch)
        self.log("test/si_sdri", improvement.mean(), batch_size=len(improvement), on_epoch=True)

    def _si_sdr(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mixture, sources, *_ = batch
        best, _ = pit(pairwise_si_sdr(self(mixture), sources))
        baseline = pairwise_si_sdr(mixture[:, None], sources)[:, 0].mean(-1)
        return best, best - baseline

    def configure_optimizers(self) -> Any:
        """Adam, and the schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        if self.schedule == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        # asked of the trainer each time: a resumed run may be told to end earlier or later
        last = self.trainer.max_steps
        rest = (last - step) / max(self.cooldown * last, 1) if last > 0 else 1.0
        return max(min((step + 1) / self.warmup, rest, 1.0), 0.0)
