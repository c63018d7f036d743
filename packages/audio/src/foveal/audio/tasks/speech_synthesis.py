"""Learning to speak, and measuring it: spectrogram error, stop loss and guided attention to train by; free-running speech to judge.

The recipe of Transformer TTS (Li et al., AAAI 2019) with the losses of ESPnet: L1, L2 or both, before and after the postnet, stop loss with
positive weight 5, guided attention on some heads of the last layers.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from foveal.audio.data.speech import SpeechBatch, SpeechClips
from foveal.audio.models.mel import griffin_lim
from foveal.audio.models.transformer_tts import TransformerTTS, TransformerTTSConfig
from foveal.audio.plots import plot_alignment, plot_synthesis
from foveal.audio.synthesis_metrics import Alignment, best_alignment, mel_cepstral_distance
from foveal.audio.tasks.synthesis_losses import guided_attention_loss, last_heads, spectrogram_losses, stop_loss
from foveal.audio.tasks.synthesis_report import SynthesisReport
from foveal.audio.voice import Voice
from foveal.core.checkpoint import start_from
from foveal.core.errors import UserError
from foveal.core.tracking import log_audio, log_figure


class SpeechSynthesisTask(pl.LightningModule):
    """Trains and tests a `TransformerTTS` on `SpeechBatch`es.

    Logged: ``train/loss`` and its terms ``mel``, ``stop``, ``guided``; the same for validation, with ``val/monotonic`` and ``val/focus`` of the
    best head; pictures of the alignment and of the first held-out clip spoken freely, and how it sounds. Testing speaks every held-out clip freely
    and gives a table: mel-cepstral distance to the recording, alignment, duration, whether the stop token came.

    Args:
        config: sizes of the network; ``symbols`` and ``mels`` follow from the data's voice.
        learning_rate: of Adam; for ``noam`` the factor of dim^-0.5 min(step^-0.5, step warmup^-1.5).
        schedule: ``noam`` as the paper; ``linear`` warms up over `warmup` steps, holds, and falls to zero over the last `cooldown` of
            ``trainer.max_steps``.
        warmup: steps.
        cooldown: share of all steps, for ``linear``.
        loss: ``L1``, ``L2`` or ``L1+L2`` of the spectrogram.
        guided_weight: of guided attention.
        guided_sigma: width of its free band.
        guided_heads: heads of a layer that it applies to.
        guided_layers: last layers that it applies to.
        weights: a ``.safetensors`` file of ours to start from.
        threshold: of the stop probability, in free-running speech.

    Raises:
        UserError: ``linear`` without ``trainer.max_steps``, or `weights` that cannot be read or do not fit.
    """

    def __init__(
        self,
        config: TransformerTTSConfig = TransformerTTSConfig(),  # noqa: B008
        learning_rate: float = 1.0,
        schedule: Literal["noam", "linear"] = "noam",
        warmup: int = 4000,
        cooldown: float = 0.25,
        loss: Literal["L1", "L2", "L1+L2"] = "L1",
        guided_weight: float = 1.0,
        guided_sigma: float = 0.4,
        guided_heads: int = 2,
        guided_layers: int = 2,
        weights: str | None = None,
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        self.network = TransformerTTS(config)
        if weights is not None:
            start_from(self.network, weights, "transformer_tts")
        self.learning_rate, self.schedule, self.warmup, self.cooldown, self.loss = learning_rate, schedule, warmup, cooldown, loss
        self.guided_weight, self.guided_sigma, self.guided_heads, self.guided_layers = guided_weight, guided_sigma, guided_heads, guided_layers
        self.threshold = threshold
        self.report = SynthesisReport()

    @property
    def voice(self) -> Voice:
        """Of the data."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.voice

    def setup(self, stage: str) -> None:
        """Check that the network fits the voice of the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SpeechClips):
            found, wanted = (self.network.config.symbols, self.network.config.mels), (len(data.voice.vocabulary), data.voice.mel.mels)
            if found != wanted:
                raise UserError(
                    f"expected a network of the data's {wanted[0]} symbols and {wanted[1]} mel bands; config.symbols and config.mels are "
                    f"{found[0]} and {found[1]}; change them"
                )

    def forward(self, batch: SpeechBatch, heads: int = 0) -> tuple[dict[str, Tensor], Any]:
        """Terms of the loss, in float32, and what the network gave."""
        reduction = self.network.config.reduction
        output = self.network(batch.tokens, batch.mel, batch.token_lengths, batch.mel_lengths, heads=max(heads, self.guided_heads))
        absolute, squared = spectrogram_losses(output._replace(after=output.after.float(), before=output.before.float()), batch.mel,
                                               batch.mel_lengths, reduction)  # fmt: skip
        maps = last_heads(output.attentions["cross"], self.guided_heads, self.guided_layers).float()
        terms = {
            "mel": {"L1": absolute, "L2": squared, "L1+L2": absolute + squared}[self.loss],
            "stop": stop_loss(output.stop_logits.float(), batch.mel_lengths, self.network.stop_weight, reduction),
            "guided": guided_attention_loss(maps, batch.token_lengths, batch.mel_lengths // reduction, self.guided_sigma),
        }
        return terms, output

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        return terms["mel"] + terms["stop"] + self.guided_weight * terms["guided"]

    def training_step(self, batch: SpeechBatch, index: int) -> Tensor:
        """Sum of the terms."""
        terms, _ = self(batch)
        loss = self._total(terms)
        size = len(batch.names)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=size)
        return loss

    def validation_step(self, batch: SpeechBatch, index: int) -> None:
        """The terms, and how well the best head reads, with known frames."""
        terms, output = self(batch, heads=self.network.config.heads)
        size = len(batch.names)
        self.log("val/loss", self._total(terms), batch_size=size, prog_bar=True, sync_dist=True)
        self.log_dict({f"val/{name}": value for name, value in terms.items()}, batch_size=size, sync_dist=True)
        maps = torch.stack(output.attentions["cross"], 1)
        steps = batch.mel_lengths // self.network.config.reduction
        read = [best_alignment(maps[row, :, :, : steps[row], : batch.token_lengths[row]]) for row in range(size)]
        for name in ("monotonic", "coverage", "focus"):
            self.log(f"val/{name}", sum(getattr(one, name) for one in read) / size, batch_size=size, sync_dist=True)
        if index == 0 and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._show(batch)

    def _show(self, batch: SpeechBatch) -> None:
        row = len(batch.names) - 1  # the longest of the batch
        tokens, mel = batch.tokens[row, : batch.token_lengths[row]], batch.mel[row, : batch.mel_lengths[row]]
        with torch.random.fork_rng(devices=[]):  # what is shown must not change what is learned
            torch.manual_seed(0)
            spoken = self.network.generate(tokens[None], threshold=self.threshold, attention=True)
            made = self.voice.denormalised(spoken.mel[0].float().cpu()).T
            sound = griffin_lim(made, self.voice.mel)
        assert spoken.cross_attention is not None
        symbols = [*(self.voice.symbols[number - 1] for number in tokens.tolist()[:-1]), "end"]
        best = best_alignment(spoken.cross_attention[0])
        log_figure(self, "val/alignment", plot_alignment(spoken.cross_attention[0], symbols, best))
        log_figure(self, "val/spectrogram", plot_synthesis(made, self.voice.denormalised(mel.float().cpu()).T, self.voice.mel))
        log_audio(self, "val/speech", sound / sound.abs().max().clamp(min=1e-8), self.voice.mel.sample_rate, batch.names[row])

    def test_step(self, batch: SpeechBatch, index: int) -> None:
        """Speak each clip's text freely and compare with the recording."""
        for row, name in enumerate(batch.names):
            tokens, mel = batch.tokens[row, : batch.token_lengths[row]], batch.mel[row, : batch.mel_lengths[row]]
            spoken = self.network.generate(tokens[None], threshold=self.threshold, attention=True)
            assert spoken.cross_attention is not None
            read: Alignment = best_alignment(spoken.cross_attention[0].cpu())
            made, reference = (self.voice.denormalised(frames.float().cpu()).T for frames in (spoken.mel[0], mel))
            natural = 1.0 if self.voice.mel.log == "natural" else 2.302585092994046
            scores = {
                "mel_cepstral_distance": mel_cepstral_distance(made * natural, reference * natural),
                "monotonic": read.monotonic,
                "coverage": read.coverage,
                "focus": read.focus,
                "duration_ratio": made.shape[1] / reference.shape[1],
                "stopped": float(spoken.stopped[0]),
            }
            sound = griffin_lim(made, self.voice.mel) if self.report.has_room and made.shape[1] > 1 else None
            self.report.add(name, scores, sound, self.voice.mel.sample_rate)
            for score, value in scores.items():
                self.log(f"test/{score}", value, batch_size=1, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Write and print the table."""
        report, self.report = self.report, SynthesisReport()
        report.gather(self.trainer)
        if self.trainer.is_global_zero:
            report.finish(self.trainer)

    def predict_step(self, batch: SpeechBatch, index: int) -> list[Tensor]:
        """Logarithmic mel spectrogram (mels, frames) of each text, spoken freely."""
        spoken = self.network.generate(batch.tokens, batch.token_lengths, threshold=self.threshold)
        return [self.voice.denormalised(mel[:length]).T for mel, length in zip(spoken.mel, spoken.lengths.tolist(), strict=True)]

    def configure_optimizers(self) -> Any:
        """Adam as the paper has it, and the schedule."""
        if self.schedule == "linear" and self.trainer.max_steps < 1:
            raise UserError("expected trainer.max_steps for the linear schedule, which ends there; got none; set it, or schedule: noam")
        betas = (0.9, 0.98) if self.schedule == "noam" else (0.9, 0.99)
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate, betas=betas, eps=1e-9)
        rate = self._noam if self.schedule == "noam" else self._linear
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, rate), "interval": "step"}}

    def _noam(self, step: int) -> float:
        return self.network.config.dim**-0.5 * min((step + 1) ** -0.5, (step + 1) * self.warmup**-1.5)

    def _linear(self, step: int) -> float:
        # the trainer is asked each time: a resumed run may be told to end at another step
        last = self.trainer.max_steps
        left = (last - step) / max(self.cooldown * last, 1.0)
        return max(min((step + 1) / max(self.warmup, 1), left, 1.0), 0.0)
