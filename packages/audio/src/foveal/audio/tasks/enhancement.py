"""Learning to enhance, and measuring it: MP-SENet's losses to train by, PESQ and SI-SDR to validate and test by.

The recipe of MambAttention (Kühne et al., 2025): AdamW at 5e-4 with betas (0.8, 0.99), decayed by 0.99 an epoch, on crops of 2 s, selected by
validation PESQ (see ``configs/audio/mambattention_paper.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor

from foveal.audio.data.example import Example
from foveal.audio.enhancement_losses import LossWeights, MetricDiscriminator, enhancement_losses
from foveal.audio.metrics import has_perceptual_extras
from foveal.audio.models.mambattention import MambAttention, unit_gain
from foveal.audio.plots import plot_enhancement
from foveal.audio.speech_quality import SCORES, Scorers, enhancement_scores, result_or
from foveal.audio.tasks.metric_discriminator import DiscriminatorTraining
from foveal.audio.tasks.mixture_report import MixtureReport, show_example
from foveal.core.checkpoint import start_from
from foveal.core.errors import UserError

_NO_SCORES = dict.fromkeys(SCORES, math.nan)


class EnhancementTask(pl.LightningModule):
    """Trains and tests an enhancement network on `Example` batches of one source, the clean speech.

    Logged: ``train/<term>`` of every term of the loss and ``train/total``; with a discriminator its loss and the PESQ of what it learns from;
    ``val/<score>`` and ``val/<score>_improvement`` over the noisy speech for PESQ, ESTOI, SI-SDR, segmental SNR and the composite scores, and the
    first validation example as sounds and spectrograms; the same scores as ``test/...``, with a table of all test examples and groups.
    Scores are computed by other processes; those that cannot be had (silence) are left out of the means.

    Args:
        network: the network.
        learning_rate: of AdamW.
        betas: of AdamW.
        decay: factor of the rate after each epoch, for ``exponential``.
        schedule: ``exponential`` as in the paper. ``linear`` warms up over `warmup` steps, holds, and falls to zero over the last `cooldown` of
            ``trainer.max_steps``; an interrupted run may be resumed with another ``max_steps`` to end earlier or later.
        warmup: steps, for ``linear``.
        cooldown: share of all steps, for ``linear``.
        loss: weights of its terms. With a metric weight a discriminator learns beside the network, from PESQ that `scorers` compute: when they
            are ready is not the same in every run, so such a run repeats to the bit only with ``scorers: 0``.
        scorers: processes that compute scores; 0 computes them in the training process.
        weights: a ``.safetensors`` file of ours to start from, such as the bundled one: fine-tuning on one's own noise. None starts anew.

    Raises:
        UserError: ``linear`` without ``trainer.max_steps``, a metric weight without the extra that computes PESQ, or `weights` that cannot be
            read or do not fit `network`.
    """

    def __init__(
        self,
        network: MambAttention,
        learning_rate: float = 5e-4,
        betas: tuple[float, float] = (0.8, 0.99),
        decay: float = 0.99,
        schedule: Literal["exponential", "linear"] = "exponential",
        warmup: int = 200,
        cooldown: float = 0.25,
        loss: LossWeights = LossWeights(),  # noqa: B008  (frozen)
        scorers: int = 2,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        if weights is not None:
            start_from(network, weights)
        self.learning_rate, self.betas, self.decay = learning_rate, betas, decay
        self.schedule, self.warmup, self.cooldown = schedule, warmup, cooldown
        self.loss = loss
        self.scorers = Scorers(scorers)
        self.discriminator: MetricDiscriminator | None = None
        if loss.metric:
            if not has_perceptual_extras():
                raise UserError("expected PESQ for loss.metric; it is not installed; pip install 'foveal-audio[metrics]', or set loss.metric to 0")
            # no gradients but in its own training: the Trainer and DDP see a network alone
            self.discriminator = MetricDiscriminator().requires_grad_(False)
        self._discriminator_training: DiscriminatorTraining | None = None
        self._discriminator_state: dict[str, Any] | None = None
        self._scored: list[tuple[str, str, Future, Future | dict[str, float]]] = []
        self._noisy_scores: dict[str, dict[str, float]] = {}

    def forward(self, noisy: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch samples"]:
        """Enhanced signals, float32."""
        return self.network.enhance(noisy).float()

    def training_step(self, batch: Example, index: int) -> Tensor:
        """The weighted sum of the losses, each of which is logged."""
        gain = unit_gain(batch.mixture)
        clean = batch.sources[:, 0] * gain
        enhanced = self.network(*self.network.spectrum(batch.mixture * gain))
        logged = {}
        if self.discriminator is not None:
            with torch.no_grad():
                magnitude, _ = self.network.spectrum(clean)
                signal = self.network.signal(enhanced.magnitude, enhanced.phase, clean.shape[-1])
            rate = self.network.config.sample_rate
            logged = self._train_discriminator().step(magnitude, enhanced.magnitude, clean, signal, rate)
        logged |= (terms := enhancement_losses(self.network, clean, enhanced, self.loss, self.discriminator))
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, batch_size=len(gain))
        return terms["total"]

    def _train_discriminator(self) -> DiscriminatorTraining:
        if self._discriminator_training is None:
            assert self.discriminator is not None
            self._discriminator_training = DiscriminatorTraining(self.discriminator, self.scorers, self.learning_rate, self.betas)
            if self._discriminator_state is not None:
                self._discriminator_training.load_state_dict(self._discriminator_state)
        return self._discriminator_training

    def on_train_epoch_end(self) -> None:
        """The discriminator's rate decays with the network's."""
        if self._discriminator_training is not None and self.schedule == "exponential":
            for group in self._discriminator_training.optimizer.param_groups:
                group["lr"] *= self.decay

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the discriminator's optimiser."""
        if self._discriminator_training is not None:
            checkpoint["discriminator_optimizer"] = self._discriminator_training.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the discriminator's optimiser until it is made."""
        self._discriminator_state = checkpoint.get("discriminator_optimizer")

    def validation_step(self, batch: Example, index: int) -> None:
        """Have the scores computed; the first example is shown."""
        estimates = self._send(batch)
        if index == 0 and self.trainer.is_global_zero:
            noisy, enhanced, clean = batch.mixture[0], estimates[0], batch.sources[0, 0]
            picture = plot_enhancement(noisy, enhanced, clean, self.network.config.sample_rate)
            sounds = {"noisy": noisy, "enhanced": enhanced, "clean": clean}
            show_example(self.trainer, sounds, picture, "enhancement", self.network.config.sample_rate)

    def on_validation_epoch_end(self) -> None:
        """Log the means of the scores and of their improvements."""
        self._log_means("val", self._collect())

    def test_step(self, batch: Example, index: int) -> None:
        """Have the scores computed."""
        self._send(batch)

    def on_test_epoch_end(self) -> None:
        """Log the means; write and print the table."""
        rows = self._collect()
        self._log_means("test", rows)
        report = MixtureReport()
        for name, group, scores, noisy in rows:
            report.add(name, group, scores | {f"noisy_{score}": noisy[score] for score in ("pesq", "estoi", "si_sdr")})
        report.gather(self.trainer)
        if self.trainer.is_global_zero:
            report.finish(self.trainer)

    def predict_step(self, batch: Example, index: int) -> Tensor:
        """Enhanced signals."""
        return self(batch.mixture)

    def _send(self, batch: Example) -> Tensor:
        """Enhance a batch and have it scored; noisy speech is scored once, since evaluation examples stay the same."""
        estimates, rate = self(batch.mixture), self.network.config.sample_rate
        for row, (name, group) in enumerate(zip(batch.name, batch.group, strict=True)):
            estimate, noisy, clean = (signal[row].float().cpu().numpy() for signal in (estimates, batch.mixture, batch.sources[:, 0]))
            before: Future | dict[str, float] | None = self._noisy_scores.get(name)
            if before is None:
                before = self.scorers.submit(enhancement_scores, noisy, clean, rate)
            self._scored.append((name, group, self.scorers.submit(enhancement_scores, estimate, clean, rate), before))
        return estimates

    def _collect(self) -> list[tuple[str, str, dict[str, float], dict[str, float]]]:
        """Name, group, scores and scores of the noisy speech of all that was sent."""
        rows = []
        for name, group, after, before in self._scored:
            self._noisy_scores[name] = result_or(before, _NO_SCORES) if isinstance(before, Future) else before
            rows.append((name, group, result_or(after, _NO_SCORES), self._noisy_scores[name]))
        self._scored = []
        return rows

    def _log_means(self, stage: str, rows: list[tuple[str, str, dict[str, float], dict[str, float]]]) -> None:
        for score in SCORES:
            after, before = (torch.tensor([row[score] for row in side], device=self.device) for side in ([r[2] for r in rows], [r[3] for r in rows]))
            values: Mapping[str, Tensor] = {f"{stage}/{score}": after.nanmean(), f"{stage}/{score}_improvement": (after - before).nanmean()}
            self.log_dict(values, batch_size=len(rows), sync_dist=True, prog_bar=score in ("pesq", "si_sdr") and stage == "val")

    def teardown(self, stage: str) -> None:
        """End the scoring processes."""
        self.scorers.close()

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, self.betas)
        if self.schedule == "exponential":
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay)]
        if self.trainer.max_steps < 1:
            raise UserError("expected trainer.max_steps for the linear schedule, which ends there; got none; set it, or schedule: exponential")
        linear = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": linear, "interval": "step"}}

    def _share_of_rate(self, step: int) -> float:
        # the trainer is asked each time: a resumed run may be told to end at another step
        last = self.trainer.max_steps
        left = (last - step) / max(self.cooldown * last, 1.0)
        return max(min((step + 1) / max(self.warmup, 1), left, 1.0), 0.0)
