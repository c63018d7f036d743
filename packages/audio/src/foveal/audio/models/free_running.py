"""Speaking with a decoder that reads its own frames: step by step, each step keeping its keys and values for those after it.

What the networks that speak so have in common; `foveal.audio.models.transformer_tts` and `foveal.audio.models.concatenating_tts` are the networks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Spoken(NamedTuple):
    """What `TransformerTTS.generate` gives; behind a row's length everything is zero.

    Attributes:
        mel: (batch, frames, mels) after the postnet.
        lengths: (batch,) frames of each row.
        stop_probabilities: (batch, frames).
        cross_attention: (batch, layers, heads, steps, symbols); a step makes `reduction` frames. None where not asked for.
        stopped: (batch,) whether the row ended by its stop token rather than at the longest length allowed.
    """

    mel: Float[Tensor, "batch frames mels"]
    lengths: Int[Tensor, " batch"]
    stop_probabilities: Float[Tensor, "batch frames"]
    cross_attention: Float[Tensor, "batch layers heads steps symbols"] | None
    stopped: Bool[Tensor, " batch"]


class KeyValues(NamedTuple):
    """Keys and values of one attention, (batch, length, heads, channels)."""

    keys: Tensor
    values: Tensor


class StepCache:
    """Keys and values of the decoder steps so far, in arrays that double when they are full."""

    def __init__(self) -> None:
        self.length, self.keys, self.values = 0, torch.empty(0), torch.empty(0)

    def extended(self, key: Tensor, value: Tensor) -> KeyValues:
        """All keys and values, those of the new step last."""
        if self.length == 0:
            batch, _, heads, channels = key.shape
            self.keys, self.values = (key.new_empty(batch, 64, heads, channels) for _ in range(2))
        elif self.length == self.keys.shape[1]:
            self.keys, self.values = (torch.cat([array, torch.empty_like(array)], 1) for array in (self.keys, self.values))
        self.keys[:, self.length : self.length + 1] = key
        self.values[:, self.length : self.length + 1] = value
        self.length += 1
        return KeyValues(self.keys[:, : self.length], self.values[:, : self.length])


def position_table(length: int, dim: int, device: torch.device | None = None) -> Float[Tensor, "length dim"]:
    """Sines in the even channels, cosines in the odd ones, wavelengths from 2 pi to 20000 pi (Vaswani et al., 2017)."""
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * -(math.log(10_000.0) / dim))
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).reshape(length, dim)


def valid_positions(lengths: Int[Tensor, " batch"], longest: int) -> Bool[Tensor, "batch longest"]:
    """True before each row's length."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


class FreeRunning(nn.Module, ABC):
    """A network of an encoder and a decoder that can `generate`.

    It has a `config` with mels, dim, heads and reduction; an `encode`; `decoder` layers, each with a `cross_attention` that can `remember`;
    `frame_prenet`, `frame_positions`, `mel` and `stop`; `decoder_norm` and `postnet` may be None.
    """

    config: Any
    decoder: nn.ModuleList
    frame_prenet: Any
    frame_positions: Any
    mel: Any
    stop: Any
    decoder_norm: Any
    postnet: Any
    #: Row of the table of positions that belongs to the first symbol and to the first frame.
    first_position = 0

    @abstractmethod
    def encode(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """The encoder's output, first."""

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch symbols"],
        token_lengths: Int[Tensor, " batch"] | None = None,
        *,
        threshold: float = 0.5,
        minimum_ratio: float = 0.0,
        maximum_ratio: float = 10.0,
        attention: bool = False,
        cache: bool = True,
    ) -> Spoken:
        """Speak: each step's last frame is the next step's input, until the stop probability of a frame reaches `threshold`.

        Args:
            tokens: as of `forward`.
            token_lengths: as of `forward`.
            threshold: of the stop probability; above 1 it never stops early.
            minimum_ratio: frames a symbol (the end counts as one) before which it does not stop.
            maximum_ratio: frames a symbol at which it stops anyhow.
            attention: return the probabilities of the cross-attention.
            cache: keep keys and values of the steps so far; without, all steps are computed again for each new one, with the same result.
        """
        config, batch = self.config, len(tokens)
        mask = self.mask(tokens, token_lengths)
        memory, _ = self.encode(tokens, mask)
        layers: list[Any] = list(self.decoder)
        remembered = [layer.cross_attention.remember(memory) for layer in layers]
        caches = [StepCache() if cache else None for _ in layers]
        symbols = mask.sum(1)
        shortest = (symbols * minimum_ratio / config.reduction).long()
        longest = (symbols * maximum_ratio / config.reduction).long().clamp(min=1)
        table = position_table(self.first_position + int(longest.max()), config.dim, memory.device)[self.first_position :]
        frame, steps = memory.new_zeros(batch, 1, config.mels), symbols.new_zeros(batch)
        stopped = torch.zeros_like(mask[:, 0])
        mels, stops, maps, embedded = [], [], [], memory[:, :0]
        for step in range(int(longest.max())):
            x = self.frame_positions(self.frame_prenet(frame), table[step : step + 1])
            embedded = x if cache else torch.cat([embedded, x], 1)
            x, crossed = embedded, []
            for layer, keys, kept in zip(layers, remembered, caches, strict=True):
                x, probabilities, _ = layer(x, keys, mask, heads=config.heads if attention else 0, cache=kept)
                crossed += [] if probabilities is None else [probabilities[:, :, -1]]
            last = x[:, -1] if self.decoder_norm is None else self.decoder_norm(x[:, -1])
            made = self.mel(last).reshape(batch, config.reduction, config.mels)
            stop = self.stop(last).sigmoid()
            mels.append(made)
            stops.append(stop)
            maps += [torch.stack(crossed, 1)] if attention else []
            frame = made[:, -1:]
            running = steps == 0
            ends = running & (stop >= threshold).any(1) & (step + 1 >= shortest)
            stopped |= ends
            steps = torch.where(running & (ends | (step + 1 >= longest)), step + 1, steps)
            if bool((steps > 0).all()):
                break
        lengths = steps * config.reduction
        inside = valid_positions(lengths, int(lengths.max()))
        mel, probability = torch.cat(mels, 1), torch.cat(stops, 1).masked_fill(~inside, 0.0)
        if self.postnet is not None:  # a row's end is the end of its spectrogram: what is behind must not reach it
            rows = [self.postnet(row[None, :length])[0] for row, length in zip(mel, lengths.tolist(), strict=True)]
            mel = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mel = mel.masked_fill(~inside[..., None], 0.0)
        return Spoken(mel, lengths, probability, torch.stack(maps, 3) if attention else None, stopped)

    def mask(self, tokens: Tensor, lengths: Tensor | None) -> Bool[Tensor, "batch symbols"]:
        """True for what is no padding."""
        if lengths is None:
            return torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
        return valid_positions(lengths, tokens.shape[1])
