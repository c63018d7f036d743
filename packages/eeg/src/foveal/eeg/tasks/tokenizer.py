"""Learning a vocabulary: the spectrum restored from masked views through the codebook, and how much of the codebook is in use.

The authors' recipe: AdamW at 1e-3 with weight decay 1e-5 and betas (0.9, 0.99), ten epochs of warm-up, half a cosine. Their final rate lies above the
first one; here `final_learning_rate` says where it ends.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from foveal.core.tracking import log_figure
from foveal.eeg.data.windows import Window
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer
from foveal.eeg.plots import draw_codebook, draw_reconstruction
from foveal.eeg.tasks.schedules import cosine_steps


class TokenizerTask(pl.LightningModule):
    """Trains a tokenizer on the channels of `Window` batches.

    Logged: ``train/loss`` and its parts; ``val/reconstruction`` (mean squared error of the unmasked spectrum), ``val/alive`` (share of the codebook
    that the validation windows use), ``val/perplexity`` (of the ids); pictures of spectra before and after, and of the codebook.

    Args:
        network: what is trained.
        learning_rate: highest.
        final_learning_rate: last. The released configs have 5e-3, above `learning_rate`.
        warmup: share of all steps.
        weight_decay: of AdamW.
        betas: of AdamW.
        quantize_from: share of all steps after which vectors go through the codebook; until then they pass as they are. The released recipe has 0.
            A codebook is an average over many steps: it follows features that change slowly, once the learning rate has come down.
        settle: share of all steps, at the end, with `final_learning_rate`: the features stand almost still, and the codes find their places.
    """

    def __init__(
        self,
        network: TFMTokenizer,
        learning_rate: float = 1e-3,
        final_learning_rate: float = 1e-5,
        warmup: float = 0.1,
        weight_decay: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        quantize_from: float = 0.0,
        settle: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.final_learning_rate, self.warmup = learning_rate, final_learning_rate, warmup
        self.weight_decay, self.betas, self.quantize_from, self.settle = weight_decay, betas, quantize_from, settle
        self.register_buffer("used", torch.zeros(network.config.codes), persistent=False)
        self.used: Tensor

    def forward(self, signal: Tensor) -> Tensor:
        """Ids."""
        return self.network.tokenize(signal)

    def training_step(self, batch: Window, index: int) -> Tensor:
        """Both masked views of all channels that are there."""
        signal = batch.signal[batch.present]
        self.network.codebook.quantizing = self.global_step >= self.quantize_from * self.trainer.estimated_stepping_batches
        keep = self.network.draw_mask(len(signal), self.network.config.frames(signal.shape[-1]), signal.device)
        losses = self.network.losses(signal, keep)
        self.log("train/loss", losses.total, prog_bar=True, batch_size=len(signal))
        self.log("train/reconstruction", losses.reconstruction.sum(), batch_size=len(signal))
        self.log("train/commitment", losses.commitment.sum(), batch_size=len(signal))
        return losses.total

    def on_validation_epoch_start(self) -> None:
        """Count ids anew."""
        self.used.zero_()

    def validation_step(self, batch: Window, index: int) -> None:
        """Restore unmasked spectra and count the ids."""
        signal = batch.signal[batch.present]
        output, target = self.network(signal), self.network.spectrum(signal)
        error = (output.reconstruction.float() - target.float()).square().mean()
        self.log("val/reconstruction", error, batch_size=len(signal), prog_bar=True, sync_dist=True)
        self.log("val/explained", 1 - error / target.float().var(), batch_size=len(signal), sync_dist=True)
        self.used += torch.bincount(output.codes.flatten(), minlength=len(self.used))
        if index == 0 and self.trainer.is_global_zero:
            config = self.network.config
            figure = draw_reconstruction(target[0].float().cpu(), output.reconstruction[0].float().cpu(), output.codes[0].cpu(), config)
            log_figure(self, "reconstruction", figure)

    def on_validation_epoch_end(self) -> None:
        """Log how much of the codebook is in use."""
        gathered = self.all_gather(self.used)
        assert isinstance(gathered, Tensor)  # as what was given
        used = gathered.reshape(-1, len(self.used)).sum(0)
        share = used / used.sum().clamp(min=1)
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
        self.log("val/alive", (used > 0).float().mean(), prog_bar=True, rank_zero_only=True)
        self.log("val/perplexity", perplexity, rank_zero_only=True)
        if self.trainer.is_global_zero:
            log_figure(self, "codebook", draw_codebook(used.cpu()))

    test_step = validation_step
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Window, index: int) -> Tensor:
        """Ids, (windows, channels, frames)."""
        return self(batch.signal)

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule, step by step."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, self.betas, weight_decay=self.weight_decay)
        return cosine_steps(self, optimizer, self.final_learning_rate / self.learning_rate, self.warmup, self.settle)
