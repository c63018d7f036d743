"""Learning to vocode: spectral distances to train by and, if asked for, discriminators of spectrograms at several resolutions.

Without discriminators: L1 of the mel spectrogram and multi-resolution STFT loss (Yamamoto, Song, Kim: Parallel WaveGAN, ICASSP 2020). With them:
the hinge losses and feature matching of Vocos (Siuzdak, ICLR 2024), the discriminators those of UnivNet (Jang et al., Interspeech 2021).
"""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.audio.data.waveforms import Segments, WaveformSegments
from foveal.audio.metrics import perceptual_scores
from foveal.audio.models.mel import MelConfig, griffin_lim, mel_spectrogram
from foveal.audio.models.vocos import Vocos, VocosConfig
from foveal.audio.plots import plot_synthesis
from foveal.audio.synthesis_metrics import mel_cepstral_distance
from foveal.audio.tasks.synthesis_report import SynthesisReport
from foveal.core.errors import UserError
from foveal.core.tracking import log_audio, log_figure

#: (window, hop) of the spectrograms that are compared and judged.
RESOLUTIONS = ((1024, 256), (512, 128), (256, 64))


def _magnitude(waveform: Float[Tensor, "batch samples"], window: int, hop: int) -> Float[Tensor, "batch bins frames"]:
    spectrum = torch.stft(
        waveform, window, hop, window=torch.hann_window(window, device=waveform.device), center=True, return_complex=True, pad_mode="constant"
    )
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()


def stft_loss(estimate: Float[Tensor, "batch samples"], target: Float[Tensor, "batch samples"]) -> Float[Tensor, ""]:
    """Spectral convergence plus L1 of logarithmic magnitudes, mean over the resolutions."""
    total = estimate.new_zeros(())
    for window, hop in RESOLUTIONS:
        made, real = _magnitude(estimate, window, hop), _magnitude(target, window, hop)
        total = total + (real - made).norm() / real.norm().clamp(min=1e-6) + F.l1_loss(made.log(), real.log())
    return total / len(RESOLUTIONS)


class SpectrogramDiscriminator(nn.Module):
    """Judges patches of one magnitude spectrogram.

    Args:
        window: of the Fourier transform.
        hop: of it.
        channels: of the convolutions.
    """

    def __init__(self, window: int, hop: int, channels: int = 16) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        weight_norm = nn.utils.parametrizations.weight_norm
        widths = [1, channels, channels, channels, channels]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(wide, to, (9, 3), stride=(1 if index == 0 else 2, 1), padding=(4, 1)))
            for index, (wide, to) in enumerate(itertools.pairwise(widths))
        )
        self.judge = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> list[Tensor]:
        """What each layer gives; the last is the judgement, above 0 for real."""
        x = _magnitude(waveform, self.window, self.hop).log()[:, None]
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return [*features, self.judge(x)]


class VocodingTask(pl.LightningModule):
    """Trains and tests a `Vocos` on `Segments`.

    Logged: ``train/mel``, ``train/stft`` and, with discriminators, ``train/adversarial``, ``train/features``, ``train/discriminator``;
    ``val/loss`` (L1 of the mel spectrogram plus STFT loss), the first held-out clip as sound and picture; testing gives a table of held-out clips.

    Args:
        config: sizes of the network.
        learning_rate: of AdamW.
        mel_weight: of the mel spectrogram's L1.
        stft_weight: of the STFT loss.
        adversarial_weight: of the discriminators' judgement and of feature matching; 0 trains without them.
        adversarial_from: step at which they begin. With them Lightning counts the steps of both sides: ``trainer.max_steps`` is twice the batches.
        warmup: steps to the full rate; it falls to zero along a cosine until ``trainer.max_steps``.

    Raises:
        UserError: no ``trainer.max_steps``.
    """

    def __init__(
        self,
        config: VocosConfig = VocosConfig(),  # noqa: B008
        learning_rate: float = 5e-4,
        mel_weight: float = 1.0,
        stft_weight: float = 1.0,
        adversarial_weight: float = 0.0,
        adversarial_from: int = 0,
        warmup: int = 200,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimisers
        self.network = Vocos(config)
        self.discriminators = nn.ModuleList(SpectrogramDiscriminator(*size) for size in RESOLUTIONS) if adversarial_weight else None
        self.learning_rate, self.mel_weight, self.stft_weight, self.warmup = learning_rate, mel_weight, stft_weight, warmup
        self.adversarial_weight, self.adversarial_from = adversarial_weight, adversarial_from
        self.report = SynthesisReport()

    @property
    def mel(self) -> MelConfig:
        """Of the data."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.mel

    def setup(self, stage: str) -> None:
        """Check that the network reads the spectrogram of the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, WaveformSegments):
            config = self.network.config
            if (config.mels, config.hop) != (data.mel.mels, data.mel.hop):
                raise UserError(
                    f"expected a vocoder of the data's {data.mel.mels} bands and hop {data.mel.hop}; its config has {config.mels} and {config.hop}"
                )

    def forward(self, waveform: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch samples"]:
        """The waveform again, from its mel spectrogram; as many samples as whole hops fit."""
        return self.network(mel_spectrogram(waveform, self.mel))

    def _distances(self, made: Tensor, real: Tensor) -> dict[str, Tensor]:
        return {"mel": F.l1_loss(mel_spectrogram(made, self.mel), mel_spectrogram(real, self.mel)), "stft": stft_loss(made, real)}

    def training_step(self, batch: Segments, index: int) -> None:
        """One step of the generator and, where they take part, one of the discriminators."""
        optimizers: Any = self.optimizers()
        generator, judge = optimizers if isinstance(optimizers, list) else (optimizers, None)
        made = self(batch.waveform)
        real = batch.waveform[:, : made.shape[1]]
        terms = self._distances(made, real)
        loss = self.mel_weight * terms["mel"] + self.stft_weight * terms["stft"]
        adversarial = self.discriminators is not None and judge is not None and self.global_step // 2 >= self.adversarial_from
        if adversarial:
            terms["discriminator"] = self._discriminate(judge, made.detach(), real)
            terms["adversarial"], terms["features"] = self._convince(made, real)
            loss = loss + self.adversarial_weight * (terms["adversarial"] + terms["features"])
        generator.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(generator, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        generator.step()
        if judge is not None and not adversarial:
            judge.step()  # with no gradients it changes nothing; Lightning counts steps of all optimisers
        for schedule in self._schedules():
            schedule.step()
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, prog_bar=True, batch_size=len(real))

    def _schedules(self) -> list[Any]:
        found: Any = self.lr_schedulers()
        return found if isinstance(found, list) else [found]

    def _discriminate(self, optimizer: Any, made: Tensor, real: Tensor) -> Tensor:
        assert self.discriminators is not None
        loss = made.new_zeros(())
        for judge in self.discriminators:
            loss = loss + F.relu(1 - judge(real)[-1]).mean() + F.relu(1 + judge(made)[-1]).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()

    def _convince(self, made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        assert self.discriminators is not None
        adversarial, matching = made.new_zeros(()), made.new_zeros(())
        for judge in self.discriminators:
            features = judge(made)
            with torch.no_grad():
                targets = judge(real)
            adversarial = adversarial + F.relu(1 - features[-1]).mean()
            matching = matching + sum(F.l1_loss(a, b) for a, b in zip(features[:-1], targets[:-1], strict=True)) / (len(features) - 1)
        return adversarial / len(self.discriminators), matching / len(self.discriminators)

    def validation_step(self, batch: Segments, index: int) -> None:
        """Distances of a held-out clip; the first one is shown."""
        made = self(batch.waveform)
        real = batch.waveform[:, : made.shape[1]]
        terms = self._distances(made, real)
        self.log("val/loss", terms["mel"] + terms["stft"], prog_bar=True, batch_size=1, sync_dist=True)
        self.log_dict({f"val/{name}": value for name, value in terms.items()}, batch_size=1, sync_dist=True)
        if index == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            pair = [mel_spectrogram(signal[0].float().cpu(), self.mel) for signal in (made, real)]
            log_figure(self, "val/spectrogram", plot_synthesis(pair[0], pair[1], self.mel))
            log_audio(self, "val/speech", made[0] / made[0].abs().max().clamp(min=1e-8), self.mel.sample_rate, batch.names[0])

    def test_step(self, batch: Segments, index: int) -> None:
        """Distances of a held-out clip to what the vocoder makes of its mel spectrogram, and to Griffin-Lim's."""
        real = batch.waveform
        mel = mel_spectrogram(real[0], self.mel)
        made, plain = self.network(mel[None])[0], griffin_lim(mel, self.mel)
        scores = {}
        for name, signal in (("vocos", made), ("griffin_lim", plain)):
            heard = mel_spectrogram(signal.float().cpu(), self.mel)
            reference = mel.cpu()[:, : heard.shape[1]]
            scores[f"{name}_mel_l1"] = F.l1_loss(heard, reference).item()
            scores[f"{name}_mel_cepstral_distance"] = mel_cepstral_distance(heard, reference)
            scores[f"{name}_stft"] = stft_loss(signal[None], real[:, : signal.shape[0]]).item()
            scores[f"{name}_pesq"] = perceptual_scores(signal, real[0, : signal.shape[0]], self.mel.sample_rate)["pesq"]
        self.report.add(batch.names[0], scores, made, self.mel.sample_rate)
        for name, value in scores.items():
            self.log(f"test/{name}", value, batch_size=1, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Write and print the table."""
        report, self.report = self.report, SynthesisReport()
        report.gather(self.trainer)
        if self.trainer.is_global_zero:
            report.finish(self.trainer)

    def predict_step(self, batch: Segments, index: int) -> Tensor:
        """Waveforms made again from their mel spectrograms."""
        return self(batch.waveform)

    def configure_optimizers(self) -> Any:
        """AdamW with betas 0.8 and 0.99 for each side, one schedule."""
        if self.trainer.max_steps < 1:
            raise UserError("expected trainer.max_steps, where the learning rate reaches zero; got none; set it")
        sides: list[nn.Module] = [self.network] + ([self.discriminators] if self.discriminators is not None else [])
        optimizers = [torch.optim.AdamW(side.parameters(), lr=self.learning_rate, betas=(0.8, 0.99), weight_decay=0.01) for side in sides]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate) for optimizer in optimizers]

    def _share_of_rate(self, step: int) -> float:
        last = self.trainer.max_steps / (1 if self.discriminators is None else 2)  # Lightning counts the steps of every optimiser
        return min((step + 1) / self.warmup, 1.0) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(step / last, 1.0))).item())
