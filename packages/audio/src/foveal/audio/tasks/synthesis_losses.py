"""What Transformer TTS is trained by: spectrogram error, stop loss, and guided attention.

Guided attention (Tachibana, Uenoyama, Aihara, ICASSP 2018) charges an attention head for weight far from the diagonal of (symbol, frame), which
is where speech has it; applied to a few heads of the last layers it teaches the alignment early, and the other heads stay free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveal.audio.models.free_running import valid_positions
from foveal.audio.models.transformer_tts import TeacherForced


def guided_attention_mask(
    symbols: Int[Tensor, " batch"], steps: Int[Tensor, " batch"], sigma: float = 0.4, size: tuple[int, int] | None = None
) -> Float[Tensor, "batch step symbol"]:
    """1 - exp(-(symbol / symbols - step / steps)^2 / (2 sigma^2)) where both are valid, 0 elsewhere.

    Args:
        symbols: in each row.
        steps: decoder steps in each row.
        sigma: width of the free band around the diagonal, as a share of the length.
        size: (steps, symbols) of the result; None takes the longest row's.
    """
    rows, columns = size or (int(steps.max()), int(symbols.max()))
    step = torch.arange(rows, device=steps.device)[None, :, None] / steps[:, None, None]
    symbol = torch.arange(columns, device=symbols.device)[None, None, :] / symbols[:, None, None]
    valid = valid_positions(steps, rows)[:, :, None] & valid_positions(symbols, columns)[:, None, :]
    return (1.0 - torch.exp(-((symbol - step) ** 2) / (2 * sigma**2))).masked_fill(~valid, 0.0)


def guided_attention_loss(
    maps: Float[Tensor, "batch head step symbol"], symbols: Int[Tensor, " batch"], steps: Int[Tensor, " batch"], sigma: float = 0.4
) -> Float[Tensor, ""]:
    """Mean of mask times attention over heads and valid (step, symbol)."""
    mask = guided_attention_mask(symbols, steps, sigma, (maps.shape[2], maps.shape[3])).to(maps.dtype)
    return (maps * mask[:, None]).sum() / ((symbols * steps).sum() * maps.shape[1])


def last_heads(attentions: Sequence[Tensor], heads: int, layers: int) -> Float[Tensor, "batch head query key"]:
    """The first `heads` heads of the last `layers` layers, as one."""
    return torch.cat([layer[:, :heads] for layer in attentions[-layers:]], 1)


def spectrogram_losses(
    output: TeacherForced, mel: Float[Tensor, "batch frames mels"], lengths: Int[Tensor, " batch"], reduction: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean absolute and mean squared error over valid frames, each summed over before and after the postnet."""
    mel = mel[:, : output.after.shape[1]]
    valid = valid_positions(lengths - lengths % reduction, mel.shape[1])[..., None]
    count = valid.sum() * mel.shape[2]
    errors = [torch.where(valid, guess - mel, 0.0) for guess in (output.after, output.before)]
    absolute, squared = (torch.stack([measure(error).sum() for error in errors]).sum() / count for measure in (torch.abs, torch.square))
    return absolute, squared


def stop_loss(
    logits: Float[Tensor, "batch frames"], lengths: Int[Tensor, " batch"], positive_weight: Tensor, reduction: int = 1
) -> Float[Tensor, ""]:
    """Binary cross-entropy of "this is the last frame" over valid frames; the last frame counts `positive_weight` times."""
    lengths = lengths - lengths % reduction
    last = F.one_hot(lengths - 1, logits.shape[1]).to(logits.dtype)
    valid = valid_positions(lengths, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits[valid], last[valid], pos_weight=positive_weight)
