"""Transformer TTS (Li, Liu, Liu, Zhao, Liu: Neural Speech Synthesis with Transformer Network, AAAI 2019): symbols in, mel frames out.

The layout is ESPnet's, whose LJSpeech configuration (33.0 M parameters) is the default: no convolutions before the encoder, normalisation after
each sum. Options give the paper's convolutional prenet, normalisation before, and several frames a decoder step (reduction). Frames are
generated with a cache of keys and values, so a step costs the same attention as one row of the teacher-forced pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.audio.models.free_running import FreeRunning, KeyValues, StepCache, position_table, valid_positions
from foveal.kernels import attention


@dataclass(frozen=True)
class TransformerTTSConfig:
    """Sizes of `TransformerTTS`; the defaults are ESPnet's LJSpeech recipe with 78 symbols.

    Attributes:
        symbols: of the vocabulary, with padding (0) and the end (the last one).
        mels: mel bands.
        embed_channels: of the symbol embedding before the convolutional prenet; without prenet convolutions it is `dim`.
        prenet_layers: convolutions between embedding and encoder; the paper has 3, ESPnet's recipe 0.
        prenet_channels: of these.
        prenet_kernel: of these; odd.
        dim: width of encoder and decoder.
        heads: of every attention.
        encoder_layers: their number.
        encoder_hidden: inside their feed-forward part.
        decoder_layers: their number.
        decoder_hidden: inside their feed-forward part.
        frame_prenet_layers: linear layers that the previous frame goes through; a bottleneck, so that the decoder must listen to the text.
        frame_prenet_channels: of these.
        postnet_layers: convolutions that correct the whole spectrogram; 0 leaves it as it is.
        postnet_channels: of these.
        postnet_kernel: of these; odd.
        encoder_norm_first: normalise before each part of an encoder layer instead of after the sum.
        decoder_norm_first: the same for the decoder.
        scaled_positions: add the position table times a learned factor; otherwise add it to the input times sqrt(dim).
        reduction: frames that one decoder step makes.
        dropout: after embeddings, attentions and feed-forward parts.
        prenet_dropout: in the convolutional prenet.
        frame_prenet_dropout: in the frame prenet, **also when speaking**: the paper's way to a varied voice. 0 makes speaking deterministic.
        postnet_dropout: in the postnet.
    """

    symbols: int = 78
    mels: int = 80
    embed_channels: int = 0
    prenet_layers: int = 0
    prenet_channels: int = 256
    prenet_kernel: int = 5
    dim: int = 512
    heads: int = 8
    encoder_layers: int = 6
    encoder_hidden: int = 1024
    decoder_layers: int = 6
    decoder_hidden: int = 1024
    frame_prenet_layers: int = 2
    frame_prenet_channels: int = 256
    postnet_layers: int = 5
    postnet_channels: int = 256
    postnet_kernel: int = 5
    encoder_norm_first: bool = False
    decoder_norm_first: bool = False
    scaled_positions: bool = True
    reduction: int = 1
    dropout: float = 0.1
    prenet_dropout: float = 0.5
    frame_prenet_dropout: float = 0.5
    postnet_dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim must be even and a multiple of heads; got {self.dim} and {self.heads}")
        if self.symbols < 3:
            raise ValueError(f"symbols must be at least 3: padding, one to read, the end; got {self.symbols}")
        if (self.prenet_layers and self.prenet_kernel % 2 == 0) or (self.postnet_layers and self.postnet_kernel % 2 == 0):
            raise ValueError(f"kernels must be odd; got {self.prenet_kernel} and {self.postnet_kernel}")
        if self.reduction < 1 or self.encoder_layers < 1 or self.decoder_layers < 1:
            raise ValueError(f"reduction and layers must be at least 1; got {self.reduction}, {self.encoder_layers}, {self.decoder_layers}")
        if self.prenet_layers and self.embed_channels < 1:
            raise ValueError(f"embed_channels must be at least 1 with prenet_layers; got {self.embed_channels}")

    @property
    def end(self) -> int:
        """Symbol that ends every text."""
        return self.symbols - 1


class TeacherForced(NamedTuple):
    """What `TransformerTTS` gives for known frames; frames are cut to a multiple of the reduction.

    Attributes:
        after: (batch, frames, mels) after the postnet.
        before: (batch, frames, mels) before it.
        stop_logits: (batch, frames); large where speech ends.
        attentions: kind (``"cross"``, ``"encoder"``, ``"decoder"``) -> probabilities of each layer, (batch, heads asked for, query, key).
    """

    after: Float[Tensor, "batch frames mels"]
    before: Float[Tensor, "batch frames mels"]
    stop_logits: Float[Tensor, "batch frames"]
    attentions: dict[str, list[Tensor]]


class Positions(nn.Module):
    """Adds the table of positions, then drops out."""

    def __init__(self, config: TransformerTTSConfig) -> None:
        super().__init__()
        self.dim, self.scaled, self.dropout = config.dim, config.scaled_positions, config.dropout
        if self.scaled:
            self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "batch length dim"], table: Tensor | None = None) -> Float[Tensor, "batch length dim"]:
        """`table` holds the rows for x where they do not begin at 0."""
        if table is None:
            table = position_table(x.shape[1], self.dim, x.device)
        x = x + self.alpha * table.to(x.dtype) if self.scaled else x * self.dim**0.5 + table.to(x.dtype)
        return F.dropout(x, self.dropout, self.training)


def attended(
    q: Float[Tensor, "batch query head channels"], remembered: KeyValues, mask: Tensor | None, causal: bool, heads: int
) -> tuple[Float[Tensor, "batch query dim"], Float[Tensor, "batch heads query key"] | None]:
    """What the heads gather, side by side, and the probabilities of the first `heads` of them.

    They are exp(s q k - lse) of the kernel's log-sum-exp, which is differentiable: no other (query, key) array exists.
    """
    k, v = remembered
    if not heads:
        return attention(q, k, v, mask=mask, causal=causal, layout="bnhd").flatten(-2), None
    out, lse = attention(q, k, v, mask=mask, causal=causal, layout="bnhd", return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :, :heads], k[:, :, :heads]) * q.shape[-1] ** -0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    allowed = allowed.tril(scores.shape[-1] - scores.shape[-2]) if causal else allowed
    allowed = allowed if mask is None else allowed & mask[:, None, None]
    # shut before exp: a padded key may score far above the others, and infinity times the mask's zero is no gradient
    return out.flatten(-2), torch.exp((scores - lse[:, :heads, :, None]).masked_fill(~allowed, float("-inf")))


class Attention(nn.Module):
    """Multi-head attention whose probabilities can be had for the first few heads."""

    def __init__(self, dim: int, heads: int, crossed: bool) -> None:
        super().__init__()
        self.heads, self.crossed = heads, crossed
        if crossed:
            self.query = nn.Linear(dim, dim)
            self.key_value = nn.Linear(dim, 2 * dim)
        else:
            self.query_key_value = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(batch, length, parts * dim) into `parts` of (batch, length, heads, channels)."""
        return x.unflatten(-1, (parts, self.heads, -1)).unbind(-3)

    def remember(self, memory: Float[Tensor, "batch key dim"]) -> KeyValues:
        """Keys and values of what is attended to; of a crossed attention."""
        return KeyValues(*self.split(self.key_value(memory), 2))

    def attend(
        self, q: Tensor, remembered: KeyValues, mask: Tensor | None, causal: bool, heads: int
    ) -> tuple[Float[Tensor, "batch query dim"], Float[Tensor, "batch head query key"] | None]:
        """Output, and the probabilities of the first `heads` heads."""
        out, probabilities = attended(q, remembered, mask, causal, heads)
        return self.project(out), probabilities


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand, self.contract, self.dropout = nn.Linear(dim, hidden), nn.Linear(hidden, dim), dropout

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """As wide as it came."""
        return self.contract(F.dropout(self.expand(x).relu(), self.dropout, self.training))


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-12)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward part, each added to its input."""

    def __init__(self, config: TransformerTTSConfig) -> None:
        super().__init__()
        self.first, self.dropout = config.encoder_norm_first, config.dropout
        self.attention = Attention(config.dim, config.heads, crossed=False)
        self.feed_forward = FeedForward(config.dim, config.encoder_hidden, config.dropout)
        self.attention_norm, self.feed_forward_norm = _norm(config.dim), _norm(config.dim)

    def forward(self, x: Float[Tensor, "batch length dim"], mask: Tensor, heads: int = 0) -> tuple[Tensor, Tensor | None]:
        """Output and the probabilities of the first `heads` heads."""
        q, k, v = self.attention.split(self.attention.query_key_value(self.attention_norm(x) if self.first else x), 3)
        out, probabilities = self.attention.attend(q, KeyValues(k, v), mask, False, heads)
        x = x + F.dropout(out, self.dropout, self.training)
        x = x if self.first else self.attention_norm(x)
        x = x + F.dropout(self.feed_forward(self.feed_forward_norm(x) if self.first else x), self.dropout, self.training)
        return x if self.first else self.feed_forward_norm(x), probabilities


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder's output and feed-forward part, each added to its input."""

    def __init__(self, config: TransformerTTSConfig) -> None:
        super().__init__()
        self.first, self.dropout = config.decoder_norm_first, config.dropout
        self.attention = Attention(config.dim, config.heads, crossed=False)
        self.cross_attention = Attention(config.dim, config.heads, crossed=True)
        self.feed_forward = FeedForward(config.dim, config.decoder_hidden, config.dropout)
        self.attention_norm, self.cross_attention_norm, self.feed_forward_norm = _norm(config.dim), _norm(config.dim), _norm(config.dim)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        remembered: KeyValues,
        mask: Tensor,
        self_mask: Tensor | None = None,
        heads: int = 0,
        self_heads: int = 0,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output and the probabilities of the cross-attention and of the self-attention.

        Args:
            x: all steps so far; with a cache only the new one.
            remembered: keys and values of the encoder's output.
            mask: which of these are no padding.
            self_mask: which of the steps are no padding; None takes all.
            heads: of the cross-attention, whose probabilities are asked for.
            self_heads: of the self-attention.
            cache: keys and values of the steps before, to which those of this one are added.
        """
        q, k, v = self.attention.split(self.attention.query_key_value(self.attention_norm(x) if self.first else x), 3)
        before = KeyValues(k, v) if cache is None else cache.extended(k, v)
        # the only query of a cached step may see every key there is
        out, self_probabilities = self.attention.attend(q, before, self_mask, cache is None, self_heads)
        x = x + F.dropout(out, self.dropout, self.training)
        x = x if self.first else self.attention_norm(x)
        (q,) = self.cross_attention.split(self.cross_attention.query(self.cross_attention_norm(x) if self.first else x), 1)
        out, probabilities = self.cross_attention.attend(q, remembered, mask, False, heads)
        x = x + F.dropout(out, self.dropout, self.training)
        x = x if self.first else self.cross_attention_norm(x)
        x = x + F.dropout(self.feed_forward(self.feed_forward_norm(x) if self.first else x), self.dropout, self.training)
        return x if self.first else self.feed_forward_norm(x), probabilities, self_probabilities


class SymbolPrenet(nn.Module):
    """Convolutions over the embedded symbols, and a linear layer that centres them around zero again."""

    def __init__(self, config: TransformerTTSConfig) -> None:
        super().__init__()
        widths = [config.embed_channels, *[config.prenet_channels] * config.prenet_layers]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(wide, to, config.prenet_kernel, padding=config.prenet_kernel // 2, bias=False) for wide, to in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(config.prenet_channels) for _ in range(config.prenet_layers))
        self.project, self.dropout = nn.Linear(config.prenet_channels, config.dim), config.prenet_dropout

    def forward(self, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch length dim"]:
        """As long as it came; padding takes part, as in ESPnet."""
        x = x.mT
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.dropout(norm(convolution(x)).relu(), self.dropout, self.training)
        return self.project(x.mT)


class FramePrenet(nn.Module):
    """The bottleneck that previous frames go through. Its dropout is always on."""

    def __init__(self, config: TransformerTTSConfig) -> None:
        super().__init__()
        widths = [config.mels, *[config.frame_prenet_channels] * config.frame_prenet_layers]
        self.layers = nn.ModuleList(nn.Linear(wide, to) for wide, to in itertools.pairwise(widths))
        self.project, self.dropout = nn.Linear(widths[-1], config.dim), config.frame_prenet_dropout

    def forward(self, frames: Float[Tensor, "batch steps mels"]) -> Float[Tensor, "batch steps dim"]:
        """A vector for each frame."""
        for layer in self.layers:
            frames = F.dropout(layer(frames).relu(), self.dropout, training=True)
        return self.project(frames)


class Postnet(nn.Module):
    """Convolutions along time whose output is added to the spectrogram."""

    def __init__(self, config: TransformerTTSConfig) -> None:
        super().__init__()
        widths = [config.mels, *[config.postnet_channels] * (config.postnet_layers - 1), config.mels]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(wide, to, config.postnet_kernel, padding=config.postnet_kernel // 2, bias=False) for wide, to in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(to) for to in widths[1:])
        self.dropout = config.postnet_dropout

    def forward(self, mel: Float[Tensor, "batch frames mels"]) -> Float[Tensor, "batch frames mels"]:
        """The corrected spectrogram."""
        x = mel.mT
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(convolution(x))
            x = x if index == len(self.norms) - 1 else x.tanh()
            x = F.dropout(x, self.dropout, self.training)
        return mel + x.mT


class TransformerTTS(FreeRunning):
    """Encoder-decoder from symbols to mel frames.

    Args:
        config: its sizes.
    """

    def __init__(self, config: TransformerTTSConfig = TransformerTTSConfig()) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.symbols, config.embed_channels if config.prenet_layers else config.dim, padding_idx=0)
        self.symbol_prenet = SymbolPrenet(config) if config.prenet_layers else None
        self.symbol_positions = Positions(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = _norm(config.dim) if config.encoder_norm_first else None
        self.frame_prenet = FramePrenet(config)
        self.frame_positions = Positions(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = _norm(config.dim) if config.decoder_norm_first else None
        self.mel = nn.Linear(config.dim, config.mels * config.reduction)
        self.stop = nn.Linear(config.dim, config.reduction)
        self.postnet = Postnet(config) if config.postnet_layers else None
        # how much more a last frame counts than another in the stop loss; a buffer, because ESPnet's checkpoints carry it
        self.register_buffer("stop_weight", torch.tensor(5.0))
        self.stop_weight: Tensor

    def encode(
        self, tokens: Int[Tensor, "batch symbols"], mask: Bool[Tensor, "batch symbols"], heads: int = 0
    ) -> tuple[Float[Tensor, "batch symbols dim"], list[Tensor]]:
        """The encoder's output and, of the first `heads` heads of each layer, the attention probabilities."""
        x = self.embedding(tokens)
        x = self.symbol_positions(x if self.symbol_prenet is None else self.symbol_prenet(x))
        maps = []
        for layer in self.encoder:
            x, probabilities = layer(x, mask, heads)
            maps += [] if probabilities is None else [probabilities]
        return x if self.encoder_norm is None else self.encoder_norm(x), maps

    def forward(
        self,
        tokens: Int[Tensor, "batch symbols"],
        mel: Float[Tensor, "batch frames mels"],
        token_lengths: Int[Tensor, " batch"] | None = None,
        mel_lengths: Int[Tensor, " batch"] | None = None,
        *,
        heads: int = 0,
        kinds: Collection[str] = ("cross",),
    ) -> TeacherForced:
        """Predict each frame from the text and the frames before it.

        Args:
            tokens: symbols, each row with the end symbol last, 0 behind it.
            mel: the frames of the recording, normalised as the model was trained.
            token_lengths: symbols in each row, the end included; None takes all.
            mel_lengths: frames in each row; None takes all. No valid frame sees a later one before the postnet, whose window does.
            heads: return the attention probabilities of so many heads of each layer.
            kinds: of these attentions: ``"cross"``, ``"encoder"``, ``"decoder"``.

        Raises:
            ValueError: fewer frames than the reduction.
        """
        reduction, batch = self.config.reduction, len(tokens)
        if mel.shape[1] < reduction:
            raise ValueError(f"mel must have at least {reduction} frames, one decoder step; got shape {tuple(mel.shape)}")
        mask = self.mask(tokens, token_lengths)
        memory, encoder_maps = self.encode(tokens, mask, heads if "encoder" in kinds else 0)
        given = mel[:, reduction - 1 :: reduction]
        given = F.pad(given[:, :-1], (0, 0, 1, 0))
        valid = None if mel_lengths is None else valid_positions(mel_lengths // reduction, given.shape[1])
        x = self.frame_positions(self.frame_prenet(given))
        maps: dict[str, list[Tensor]] = {"encoder": encoder_maps, "cross": [], "decoder": []}
        wanted = [heads if kind in kinds else 0 for kind in ("cross", "decoder")]
        for layer in cast("list[DecoderLayer]", self.decoder):
            x, cross, own = layer(x, layer.cross_attention.remember(memory), mask, valid, *wanted)
            maps["cross"] += [] if cross is None else [cross]
            maps["decoder"] += [] if own is None else [own]
        x = x if self.decoder_norm is None else self.decoder_norm(x)
        before = self.mel(x).reshape(batch, -1, self.config.mels)
        after = before if self.postnet is None else self.postnet(before)
        return TeacherForced(after, before, self.stop(x).reshape(batch, -1), {kind: found for kind, found in maps.items() if found})
