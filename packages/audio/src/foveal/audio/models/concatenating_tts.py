"""Transformer TTS in the layout of github.com/soobinseo/Transformer-TTS (MIT): attention whose output stands beside its input before it is projected.

Paper: Li, Liu, Liu, Zhao, Liu, "Neural Speech Synthesis with Transformer Network", AAAI 2019. 9,542,307 parameters with the two tables of positions.
Against `foveal.audio.models.transformer_tts`: three layers of width 256, convolutions before the encoder, no biases in queries, keys and values,
positions that count from 1, and a postnet that sees no later frame. `forward` is fed its frames as they are, the first one being zeros; `generate`
feeds itself. Its authors never trained the stop token: speak with a `maximum_ratio`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.audio.models.free_running import FreeRunning, KeyValues, StepCache, position_table, valid_positions
from foveal.audio.models.transformer_tts import TeacherForced, attended

_TABLE = 1024  # rows of the table of positions that a checkpoint carries


@dataclass(frozen=True)
class ConcatenatingTTSConfig:
    """Sizes of `ConcatenatingTTS`; the defaults are the published ones.

    Attributes:
        symbols: of the vocabulary, with padding (0).
        mels: mel bands.
        embed_channels: of the symbol embedding.
        dim: width of encoder and decoder.
        heads: of every attention.
        layers: of the encoder, and of the decoder.
        reduction: frames a step; the decoder reads one, so it is 1.
        dropout: after positions.
        prenet_dropout: in the convolutions before the encoder.
        frame_prenet_dropout: of the previous frames, in training.
        postnet_dropout: in the postnet.
    """

    symbols: int = 149
    mels: int = 80
    embed_channels: int = 512
    dim: int = 256
    heads: int = 4
    layers: int = 3
    reduction: int = 1
    dropout: float = 0.1
    prenet_dropout: float = 0.2
    frame_prenet_dropout: float = 0.2
    postnet_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim must be even and a multiple of heads; got {self.dim} and {self.heads}")
        if self.reduction != 1:
            raise ValueError(f"reduction must be 1: a step reads one frame; got {self.reduction}")


class JoinedAttention(nn.Module):
    """Attention, its output beside its input through a linear layer, sum and layer norm."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.project, self.norm = nn.Linear(2 * dim, dim), nn.LayerNorm(dim)

    def remember(self, memory: Float[Tensor, "batch key dim"]) -> KeyValues:
        """Keys and values of what is attended to."""
        return KeyValues(*self.key_value(memory).unflatten(-1, (2, self.heads, -1)).unbind(-3))

    def forward(
        self,
        x: Float[Tensor, "batch query dim"],
        remembered: KeyValues,
        keys: Bool[Tensor, "batch key"] | None = None,
        queries: Bool[Tensor, "batch query"] | None = None,
        causal: bool = False,
        heads: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and the probabilities of the first `heads` heads; keys that are padding are not seen, queries that are see nothing."""
        out, probabilities = attended(self.query(x).unflatten(-1, (self.heads, -1)), remembered, keys, causal, heads)
        if queries is not None:
            out = out * queries[..., None]
            probabilities = None if probabilities is None else probabilities * queries[:, None, :, None]
        return self.norm(self.project(torch.cat([x, out], -1)) + x), probabilities


class FeedForward(nn.Module):
    """Two linear layers, sum and layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.contract, self.norm = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """As wide as it came."""
        return self.norm(self.contract(self.expand(x).relu()) + x)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward part."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        self.attention, self.feed_forward = JoinedAttention(config), FeedForward(config.dim)

    def forward(self, x: Float[Tensor, "batch length dim"], valid: Tensor | None, heads: int = 0) -> tuple[Tensor, Tensor | None]:
        """Output and the probabilities of the first `heads` heads."""
        x, probabilities = self.attention(x, self.attention.remember(x), valid, valid, heads=heads)
        return self.feed_forward(x), probabilities


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output and feed-forward part."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        self.attention, self.cross_attention = JoinedAttention(config), JoinedAttention(config)
        self.feed_forward = FeedForward(config.dim)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        remembered: KeyValues,
        mask: Tensor | None,
        valid: Tensor | None = None,
        heads: int = 0,
        self_heads: int = 0,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output and the probabilities of the cross-attention and of the self-attention; arguments as of `transformer_tts.DecoderLayer`."""
        before = self.attention.remember(x)
        before = before if cache is None else cache.extended(*before)
        x, own = self.attention(x, before, valid, valid, causal=cache is None, heads=self_heads)
        x, cross = self.cross_attention(x, remembered, mask, valid, heads=heads)
        return self.feed_forward(x), cross, own


class Positions(nn.Module):
    """Adds the table of positions times a learned factor, then drops out; padding has no position."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        self.dim, self.dropout, self.alpha = config.dim, config.dropout, nn.Parameter(torch.ones(1))
        table = position_table(_TABLE, config.dim)
        table[0] = 0.0
        self.register_buffer("table", table)  # kept because the authors' checkpoints carry it: it is computed, for any length
        self.table: Tensor

    def forward(self, x: Float[Tensor, "batch length dim"], table: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """`table` holds the rows for x where they do not begin at 1."""
        if table is None:
            table = position_table(x.shape[1] + 1, self.dim, x.device)[1:]
        rows = table.to(x.dtype) if valid is None else table.to(x.dtype) * valid[..., None]
        return F.dropout(x + self.alpha * rows, self.dropout, self.training)


class SymbolPrenet(nn.Module):
    """Embedding, three convolutions and a linear layer."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.symbols, config.embed_channels, padding_idx=0)
        widths = [config.embed_channels, *[config.dim] * 3]
        self.convolutions = nn.ModuleList(nn.Conv1d(wide, to, 5, padding=2) for wide, to in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(config.dim) for _ in range(3))
        self.project, self.dropout = nn.Linear(config.dim, config.dim), config.prenet_dropout

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """A vector for each symbol; padding takes part in the convolutions."""
        x = self.embedding(tokens).mT
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.dropout(norm(convolution(x)).relu(), self.dropout, self.training)
        return self.project(x.mT)


class FramePrenet(nn.Module):
    """Previous frames through two layers with dropout, which is off when speaking, and a linear one."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(config.mels, 2 * config.dim), nn.Linear(2 * config.dim, config.dim)])
        self.project, self.dropout = nn.Linear(config.dim, config.dim), config.frame_prenet_dropout

    def forward(self, frames: Float[Tensor, "batch steps mels"]) -> Float[Tensor, "batch steps dim"]:
        """A vector for each frame."""
        for layer in self.layers:
            frames = F.dropout(layer(frames).relu(), self.dropout, self.training)
        return self.project(frames)


class Postnet(nn.Module):
    """Convolutions over each frame and the four before it, whose output is added to the spectrogram."""

    def __init__(self, config: ConcatenatingTTSConfig) -> None:
        super().__init__()
        widths = [config.mels, *[config.dim] * 4, config.mels]
        self.convolutions = nn.ModuleList(nn.Conv1d(wide, to, 5) for wide, to in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(config.dim) for _ in range(4))
        self.dropout = config.postnet_dropout

    def forward(self, mel: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch frames mels"]:
        """The corrected spectrogram."""
        x = mel.mT
        for index, convolution in enumerate(self.convolutions):
            x = convolution(F.pad(x, (4, 0)))
            if index < len(self.norms):
                x = F.dropout(self.norms[index](x).tanh(), self.dropout, self.training)
        return mel + x.mT


class ConcatenatingTTS(FreeRunning):
    """Encoder-decoder from symbols to mel frames.

    Args:
        config: its sizes.
    """

    first_position = 1
    decoder_norm = None

    def __init__(self, config: ConcatenatingTTSConfig = ConcatenatingTTSConfig()) -> None:
        super().__init__()
        self.config = config
        self.symbol_prenet, self.symbol_positions = SymbolPrenet(config), Positions(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.frame_prenet, self.frame_positions = FramePrenet(config), Positions(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.mel, self.stop = nn.Linear(config.dim, config.mels), nn.Linear(config.dim, 1)
        self.postnet = Postnet(config)

    def encode(
        self, tokens: Int[Tensor, "batch symbols"], mask: Bool[Tensor, "batch symbols"] | None, heads: int = 0, masked: bool = True
    ) -> tuple[Float[Tensor, "batch symbols dim"], list[Tensor]]:
        """The encoder's output and, of the first `heads` heads of each layer, the attention probabilities; `masked` as of `forward`."""
        x, maps = self.symbol_positions(self.symbol_prenet(tokens), valid=mask), []
        for layer in self.encoder:
            x, probabilities = layer(x, mask if masked else None, heads)
            maps += [] if probabilities is None else [probabilities]
        return x, maps

    def forward(
        self,
        tokens: Int[Tensor, "batch symbols"],
        mel: Float[Tensor, "batch frames mels"],
        token_lengths: Int[Tensor, " batch"] | None = None,
        mel_lengths: Int[Tensor, " batch"] | None = None,
        *,
        heads: int = 0,
        masked: bool = True,
    ) -> TeacherForced:
        """Predict the frame after each of those given.

        Args:
            tokens: symbols, 0 behind each row's end.
            mel: frames to read: zeros first, then the recording without its last one.
            token_lengths: symbols in each row; None takes all.
            mel_lengths: frames in each row; None takes all.
            heads: return the attention probabilities of so many heads of each layer.
            masked: keep padding out of the attentions. The authors' code does so in training alone, and otherwise only leaves out its positions.
        """
        mask = None if token_lengths is None else valid_positions(token_lengths, tokens.shape[1])
        valid = None if mel_lengths is None else valid_positions(mel_lengths, mel.shape[1])
        memory, encoder_maps = self.encode(tokens, mask, heads, masked)
        x: Any = self.frame_positions(self.frame_prenet(mel), valid=valid)
        mask, valid = (mask, valid) if masked else (None, None)
        maps: dict[str, list[Tensor]] = {"encoder": encoder_maps, "cross": [], "decoder": []}
        for layer in self.decoder:
            remembered = layer.cross_attention.remember(memory)  # type: ignore[operator, union-attr]
            x, cross, own = layer(x, remembered, mask, valid, heads, heads)
            maps["cross"] += [] if cross is None else [cross]
            maps["decoder"] += [] if own is None else [own]
        before = self.mel(x)
        return TeacherForced(self.postnet(before), before, self.stop(x)[..., 0], {kind: found for kind, found in maps.items() if found})
