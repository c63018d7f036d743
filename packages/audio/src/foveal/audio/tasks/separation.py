"""Learning to separate, and measuring it: PIT SNR to train by, PIT SI-SDR to validate by, improvements over the mixture to report.

The recipe of TIGER (Xu et al., ICLR 2025): Adam at 1e-3, halved when validation has not improved for ten epochs; gradients are clipped and
training is stopped early by the Trainer (see ``configs/audio/tiger_paper.yaml``).
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveal.audio.data.example import Example
from foveal.audio.losses import pairwise_si_sdr, pairwise_snr, pit, pit_loss
from foveal.audio.metrics import has_perceptual_extras, perceptual_scores, reorder, sdr_improvement, si_sdr_improvement
from foveal.audio.plots import plot_separation
from foveal.audio.tasks.mixture_report import MixtureReport, show_example
from foveal.core.checkpoint import start_from
from foveal.core.errors import UserError
from foveal.core.muon import Muon


class SeparationTask(pl.LightningModule):
    """Trains and tests a separation network on `Example` batches.

    Logged: ``train/loss`` (negative SNR, dB); ``val/loss`` (negative SI-SDR, dB), ``val/si_sdri`` (its improvement over the mixture), and the
    first validation mixture as sounds and spectrograms; ``test/si_sdri`` and ``test/sdri``, also for each group, PESQ and STOI where installed,
    and a table of all test mixtures. Losses and metrics are computed in float32 whatever the precision of the network.

    Args:
        network: takes (batch, samples), gives (batch, sources, samples).
        learning_rate: of Adam.
        matrix_learning_rate: trains the matrices with `Muon` at this rate; None trains all parameters with Adam, as the paper does.
        schedule: ``plateau`` halves the rate after `patience` validations without a better ``val/loss``, as the paper does. ``linear`` warms
            up over `warmup` steps, holds, and falls to zero over the last `cooldown` of ``trainer.max_steps``; an interrupted run may be
            resumed with another ``max_steps`` to end earlier or later.
        patience: validations, for ``plateau``.
        warmup: steps, for ``linear``.
        cooldown: share of all steps, for ``linear``.
        sample_rate: Hz, for what is played and scored.
        weights: a ``.safetensors`` file of ours to start from, such as the bundled one: fine-tuning on one's own mixtures. None starts anew.

    Raises:
        UserError: ``linear`` without ``trainer.max_steps``, or `weights` that cannot be read or do not fit `network`.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 1e-3,
        matrix_learning_rate: float | None = None,
        schedule: Literal["plateau", "linear"] = "plateau",
        patience: int = 10,
        warmup: int = 200,
        cooldown: float = 0.25,
        sample_rate: int = 16_000,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        if weights is not None:
            start_from(network, weights)
        self.learning_rate, self.matrix_learning_rate = learning_rate, matrix_learning_rate
        self.schedule, self.patience = schedule, patience
        self.warmup, self.cooldown, self.sample_rate = warmup, cooldown, sample_rate
        self.report = MixtureReport()

    def forward(self, mixture: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch sources samples"]:
        """Separated sources, float32."""
        return self.network(mixture).float()

    def training_step(self, batch: Example, index: int) -> Tensor:
        """Negative SNR in dB under the best order of the sources."""
        loss, _ = pit_loss(self(batch.mixture), batch.sources, pairwise=pairwise_snr)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.mixture))
        return loss

    def validation_step(self, batch: Example, index: int) -> None:
        """SI-SDR and its improvement over the mixture; the first mixture is shown."""
        estimates, size = self(batch.mixture), len(batch.mixture)
        si_sdr, order = pit(pairwise_si_sdr(estimates, batch.sources))
        before = pairwise_si_sdr(batch.mixture[:, None], batch.sources)[:, 0].mean(-1)
        self.log("val/loss", -si_sdr.mean(), batch_size=size, sync_dist=True)
        self.log("val/si_sdri", (si_sdr - before).mean(), batch_size=size, prog_bar=True, sync_dist=True)
        if index == 0 and self.trainer.is_global_zero:
            mixture, separated, sources = batch.mixture[0], reorder(estimates, order)[0], batch.sources[0]
            sounds = {"mixture": mixture} | {f"speaker{number}": speaker for number, speaker in enumerate(separated, 1)}
            show_example(self.trainer, sounds, plot_separation(mixture, separated, sources, self.sample_rate), "separation", self.sample_rate)

    def test_step(self, batch: Example, index: int) -> None:
        """SI-SDRi, SDRi and, where installed, PESQ and STOI of each mixture."""
        estimates = self(batch.mixture)
        si_sdri, order = si_sdr_improvement(estimates, batch.sources, batch.mixture)
        scores = {"si_sdri": si_sdri, "sdri": sdr_improvement(estimates, batch.sources, batch.mixture)[0]}
        if has_perceptual_extras():
            pairs = zip(reorder(estimates, order), batch.sources, strict=True)
            heard = [[perceptual_scores(one, other, self.sample_rate) for one, other in zip(*pair, strict=True)] for pair in pairs]
            for name in ("pesq", "stoi"):
                scores[name] = torch.tensor([sum(source[name] for source in sources) / len(sources) for sources in heard])
        for row, (name, group) in enumerate(zip(batch.name, batch.group, strict=True)):
            self.report.add(name, group, {score: float(values[row]) for score, values in scores.items()})
        for score, values in scores.items():
            self.log(f"test/{score}", values.nanmean(), batch_size=len(values), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Write and print the table."""
        rows, self.report = self.report, MixtureReport()
        rows.gather(self.trainer)
        if self.trainer.is_global_zero:
            rows.finish(self.trainer)

    def predict_step(self, batch: Example, index: int) -> Tensor:
        """Separated sources."""
        return self(batch.mixture)

    def configure_optimizers(self) -> Any:
        """Adam and the schedule."""
        optimizer = self._optimizer()
        if self.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=self.patience)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        if self.trainer.max_steps < 1:
            raise UserError("expected trainer.max_steps for the linear schedule, which ends there; got none; set it, or schedule: plateau")
        linear = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": linear, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.matrix_learning_rate is None:
            return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        # a bias of several bands has two dimensions too, but is no map from vectors to vectors
        matrices = {module.weight: None for module in self.modules() if isinstance(module, nn.Linear)}
        others = [parameter for parameter in self.parameters() if parameter not in matrices]
        return Muon(matrices, others, self.matrix_learning_rate, self.learning_rate)

    def _share_of_rate(self, step: int) -> float:
        # the trainer is asked each time: a resumed run may be told to end at another step
        last = self.trainer.max_steps
        left = (last - step) / max(self.cooldown * last, 1.0)
        return max(min((step + 1) / max(self.warmup, 1), left, 1.0), 0.0)
