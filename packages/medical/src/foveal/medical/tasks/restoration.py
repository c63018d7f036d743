"""Learning to restore with RAT: the focal region loss, Adam at 2e-4 with betas (0.5, 0.999), a cosine to 1e-6 over all steps."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from foveal.core.tracking import log_figure
from foveal.medical.data.pairs import Pair
from foveal.medical.losses import focal_region_loss
from foveal.medical.models.rat import RAT
from foveal.medical.plots import restoration_figure
from foveal.medical.restoration_metrics import Fidelity, fidelity


class RestorationTask(pl.LightningModule):
    """Trains RAT on pairs and measures whole images.

    Logged: ``train/loss``; ``val/psnr``, ``val/ssim`` in the range of the data, ``val/authors_psnr``, ``val/authors_ssim`` as the paper's code
    measures, ``val/input_psnr`` of the degraded image; the first image as a picture. The same names for tests.

    Args:
        network: RAT.
        beta: of the focal region loss.
        learning_rate: at the start.
        final_learning_rate: at the end.
        betas: of Adam.
    """

    def __init__(
        self,
        network: RAT,
        beta: float = 1e-3,
        learning_rate: float = 2e-4,
        final_learning_rate: float = 1e-6,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        super().__init__()
        self.network, self.beta, self.learning_rate, self.final_learning_rate, self.betas = network, beta, learning_rate, final_learning_rate, betas
        self._measured: list[tuple[Fidelity, float]] = []

    def forward(self, pair: Pair) -> Tensor:
        """Restored images."""
        return self.network(pair.degraded, pair.regions)

    def training_step(self, pair: Pair, index: int) -> Tensor:
        """The focal region loss of a batch."""
        loss = focal_region_loss(self(pair).float(), pair.target, pair.regions, self.beta)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(pair.target))
        return loss

    def _measure(self, pair: Pair, index: int, stage: str) -> None:
        restored = self(pair).float()
        pictures = [image[0, 0].cpu().numpy() for image in (pair.degraded, restored, pair.target)]
        before = fidelity(pictures[0], pictures[2], 0.0, 1.0).psnr if pictures[0].shape == pictures[2].shape else float("nan")
        self._measured.append((fidelity(pictures[1], pictures[2], 0.0, 1.0), before))
        if index == 0:
            scale = pictures[2].shape[0] // pictures[0].shape[0]
            degraded = pictures[0].repeat(scale, 0).repeat(scale, 1)
            log_figure(self, f"{stage}/restored", restoration_figure(degraded, pictures[1], pictures[2], pair.regions[0].cpu().numpy()))

    def _log(self, stage: str) -> None:
        measured, self._measured = self._measured, []
        for name in ("psnr", "ssim", "authors_psnr", "authors_ssim"):
            self.log(f"{stage}/{name}", float(np.mean([getattr(one, name) for one, _ in measured])), prog_bar=name == "psnr", sync_dist=True)
        self.log(f"{stage}/input_psnr", float(np.mean([before for _, before in measured])), sync_dist=True)

    def validation_step(self, pair: Pair, index: int) -> None:
        """Measure an image."""
        self._measure(pair, index, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        self._log("val")

    def test_step(self, pair: Pair, index: int) -> None:
        """Measure an image."""
        self._measure(pair, index, "test")

    def on_test_epoch_end(self) -> None:
        """Log the means."""
        self._log("test")

    def predict_step(self, pair: Pair, index: int) -> Tensor:
        """Restored images."""
        return self(pair)

    def configure_optimizers(self) -> Any:
        """Adam and the cosine, step by step."""
        optimizer = torch.optim.Adam(self.network.parameters(), self.learning_rate, self.betas)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches), self.final_learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
