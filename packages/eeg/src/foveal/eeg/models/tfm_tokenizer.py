"""TFM-Tokenizer: one EEG channel, half a second at a time, as a word from a learned vocabulary of time-frequency motifs.

Pradeepkumar et al., "Tokenizing Single-Channel EEG with Time-Frequency Motif Learning", ICLR 2026 (arXiv 2502.16060). Two paths look at every
one-second frame: its magnitude spectrum in bands, and its samples. A transformer over the frames joins them, a codebook turns each into an id,
and a decoder has to restore the spectrum, of which bands and frames were hidden. 1,166,100 parameters.

`mode="official"` computes what the released code computes. `mode="fixed"` mends what is wrong with that: the commitment term has a gradient; the
codebook starts from data, follows whole segments, and forgotten codes are born again; hidden bands and frames are hidden from the sample path too,
and are all that the loss of a masked view looks at; each segment draws its own mask; the spectrum is compressed; and the sample path is normalised
frame by frame, so that what happens in one frame does not change the features of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveal.eeg.models.codebook import Codebook
from foveal.eeg.models.linear_attention import LinearAttentionStack
from foveal.eeg.models.pointwise import group_norm, linear_gelu

#: Frames that go through the frequency path together when no gradient is wanted: enough that calls cost little, few enough for the cache.
_CHUNK = 192


@dataclass(frozen=True)
class TokenizerConfig:
    """What makes a tokenizer.

    Attributes:
        mode: ``official`` or ``fixed``; see the module.
        sample_rate: Hz of the signals that it reads.
        window: samples of a frame.
        hop: samples from one frame to the next.
        bins: of the magnitude spectrum, from 0 Hz; at most window // 2 + 1.
        patch: neighbouring bins that are one token of the frequency path, and neighbouring tokens that are joined behind it.
        width: features of a token.
        codes: size of the vocabulary.
        heads: of every attention layer.
        frequency_layers: of the transformer over a frame's bands.
        temporal_layers: of the transformer over the frames.
        decoder_layers: of the decoder.
        commitment: weight of the commitment term.
        dropout: behind every attention.
        revive_below: see `Codebook`.
        decay: of the codebook's moving averages.
        in_channels: 1; the tokenizer reads channels one by one.
    """

    mode: Literal["official", "fixed"] = "fixed"
    sample_rate: int = 200
    window: int = 200
    hop: int = 100
    bins: int = 100
    patch: int = 5
    width: int = 64
    codes: int = 8192
    heads: int = 8
    frequency_layers: int = 2
    temporal_layers: int = 2
    decoder_layers: int = 8
    commitment: float = 1.0
    dropout: float = 0.2
    revive_below: float = 0.1
    decay: float = 0.99
    in_channels: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("official", "fixed"):
            raise ValueError(f"mode must be official or fixed; got {self.mode}")
        if self.in_channels != 1:
            raise ValueError(f"channels are read one by one: in_channels must be 1; got {self.in_channels}")
        if self.bins % self.patch or self.bins > self.window // 2 + 1:
            raise ValueError(f"bins must be a multiple of patch {self.patch} and at most {self.window // 2 + 1}; got {self.bins}")
        if self.bins < self.patch**2 or self.width % (2 * self.joined) or self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of 4, of heads and of twice {self.joined} bands, of at least patch**2 bins; got {self.width}")

    @property
    def joined(self) -> int:
        """Positions that are left of a frame's spectrum behind the frequency path."""
        return self.bins // self.patch // self.patch

    def frames(self, samples: int) -> int:
        """How many frames a signal of so many samples has."""
        return max(0, (samples - self.window) // self.hop + 1)


class TokenizerOutput(NamedTuple):
    """What `TFMTokenizer.forward` gives; channels are folded into the segments.

    Attributes:
        reconstruction: magnitude spectrum, (segments, bins, frames); compressed in fixed mode.
        codes: (segments, frames).
        quantizer_output: (segments, frames, width), the code vectors with the gradient of what they stand for.
        quantizer_input: (segments, frames, width), of unit length.
    """

    reconstruction: Float[Tensor, "segments bins frames"]
    codes: Int[Tensor, "segments frames"]
    quantizer_output: Float[Tensor, "segments frames width"]
    quantizer_input: Float[Tensor, "segments frames width"]


class TokenizerLosses(NamedTuple):
    """Their sum, a scalar; the mean squared errors of every view; and the commitment terms of every view."""

    total: Tensor
    reconstruction: Tensor
    commitment: Tensor


def magnitude_spectrum(
    signal: Float[Tensor, "*batch samples"], window: int = 200, hop: int = 100, bins: int = 100
) -> Float[Tensor, "*batch bins frames"]:
    """Magnitude of the short-time Fourier transform: periodic Hann window, no padding, neither logarithm nor power; the first `bins` bins."""
    hann = torch.hann_window(window, dtype=signal.dtype, device=signal.device)
    return torch.fft.rfft(signal.unfold(-1, window, hop) * hann).abs()[..., :bins].transpose(-1, -2)


class PointwisePath(nn.Module):
    """Frames or bands to features: linear map, GELU, group norm, three times.

    The group norm has `width` / 4 groups and takes its statistics over the features of a group and all positions.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        sizes = (inputs, width, width, outputs)
        self.linears = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(width // 4, sizes[i + 1]) for i in range(3))

    def forward(self, x: Float[Tensor, "batch positions inputs"]) -> Float[Tensor, "batch positions outputs"]:
        """Features of every position."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            assert isinstance(linear, nn.Linear)
            assert isinstance(norm, nn.GroupNorm)
            x = group_norm(linear_gelu(x, linear), norm)
        return x


class GatedJoin(nn.Module):
    """Neighbouring bands joined: value times sigmoid(gate), both linear maps of `patch` neighbours; (features, position) flattened in that order."""

    def __init__(self, width: int, outputs: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.gate = nn.Linear(patch * width, outputs)
        self.value = nn.Linear(patch * width, outputs)

    def forward(self, x: Float[Tensor, "frames bands width"]) -> Float[Tensor, "frames features"]:
        """What is left of each frame."""
        whole = x.shape[1] // self.patch * self.patch
        neighbours = x[:, :whole].unflatten(1, (-1, self.patch)).flatten(2)
        return (self.value(neighbours) * self.gate(neighbours).sigmoid()).transpose(1, 2).flatten(1)


class TFMTokenizer(nn.Module):
    """Reads signals of `config.sample_rate` Hz, scaled by the 95th percentile of their magnitude (`foveal.eeg.preprocessing`).

    >>> tokenizer = TFMTokenizer(TokenizerConfig(codes=1024))
    >>> tokenizer.tokenize(torch.randn(2, 16, 1000)).shape  # batch, channels, frames
    torch.Size([2, 16, 9])
    """

    def __init__(self, config: TokenizerConfig = TokenizerConfig()) -> None:
        super().__init__()
        self.config = config
        width, layers = config.width, (config.heads, config.dropout)
        self.frequency_path = PointwisePath(config.patch, width, width)
        self.frequency_transformer = LinearAttentionStack(config.frequency_layers, width, *layers)
        self.join = GatedJoin(width, width // (2 * (config.bins // config.patch**2)), config.patch)
        self.sample_path = PointwisePath(config.window, width, width // 2)
        self.temporal_transformer = LinearAttentionStack(config.temporal_layers, width, *layers)
        self.codebook = Codebook(config.codes, width, config.mode, config.decay, revive_below=config.revive_below)
        self.decoder_transformer = LinearAttentionStack(config.decoder_layers, width, *layers)
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.bins))

    def spectrum(self, signal: Float[Tensor, "*batch samples"]) -> Float[Tensor, "*batch bins frames"]:
        """What the frequency path reads and the decoder restores: the magnitude spectrum, in fixed mode as log(1 + magnitude)."""
        magnitude = magnitude_spectrum(signal, self.config.window, self.config.hop, self.config.bins)
        return magnitude if self.config.mode == "official" else magnitude.log1p()

    def features(
        self, signal: Float[Tensor, "segments samples"], keep: Bool[Tensor, "segments|1 bins frames"] | None = None
    ) -> Float[Tensor, "segments frames width"]:
        """What the codebook is asked about: one vector of unit length a frame.

        Args:
            signal: at least `config.window` samples.
            keep: true where the spectrum is to be seen; None shows all of it.

        Raises:
            ValueError: a signal that is too short.
        """
        if signal.shape[-1] < self.config.window:
            raise ValueError(f"signal must have at least {self.config.window} samples; got {signal.shape[-1]}")
        spectrum, frames = self.spectrum(signal), signal.unfold(-1, self.config.window, self.config.hop)
        if keep is not None:
            spectrum = spectrum * keep
            if self.config.mode == "fixed":
                frames = self._hide(frames, keep)
        sampled = self._sampled(frames)
        joint = torch.cat([self._banded(spectrum.transpose(1, 2)), sampled], dim=-1)
        return nn.functional.normalize(self.temporal_transformer(joint), dim=-1)

    def forward(self, signal: Float[Tensor, "*batch samples"], keep: Bool[Tensor, "segments|1 bins frames"] | None = None) -> TokenizerOutput:
        """Signal to codes to spectrum, with gradients straight through the codebook.

        Args:
            signal: (segments, samples), or with more dimensions, which are folded.
            keep: as in `features`.
        """
        features = self.features(signal.reshape(-1, signal.shape[-1]), keep)
        # what the codebook will be asked about are whole segments; the released code lets it follow masked ones
        quantized, codes = self.codebook(features, follow=keep is None or self.config.mode == "official")
        passed = features + (quantized - features).detach()
        return TokenizerOutput(self.decode(passed), codes, passed, features)

    def losses(self, signal: Float[Tensor, "*batch samples"], keep: Bool[Tensor, "segments|1 bins frames"]) -> TokenizerLosses:
        """What training lowers: errors of the spectrum restored from the kept part, and from its complement, and the commitment of both.

        Official mode looks at all bins, and its codebook and commitment terms, both taken on the straight-through vectors, have gradients that
        cancel: they are added for their value. Fixed mode looks at the hidden bins, and its commitment term draws features to their codes; a
        third view shows everything and restores everything, and is the one that the codebook follows.
        """
        signal = signal.reshape(-1, signal.shape[-1])
        target, errors, commitments = self.spectrum(signal), [], []
        views = (keep, ~keep) if self.config.mode == "official" else (None, keep, ~keep)
        for view in views:
            output = self(signal, view)
            squared = (output.reconstruction - target).square()
            if self.config.mode == "official":
                errors.append(squared.mean())
                passed, given = output.quantizer_output, output.quantizer_input
                codebook, commitment = (passed - given.detach()).square().mean(), (passed.detach() - given).square().mean()
                commitments.append(codebook + self.config.commitment * commitment)
            else:
                hidden = torch.ones_like(squared) if view is None else (~view).to(squared.dtype).expand_as(squared)
                errors.append((squared * hidden).sum() / hidden.sum().clamp(min=1))
                apart = output.quantizer_input - output.quantizer_output.detach()
                commitments.append(self.config.commitment * apart.square().sum(-1).mean())
        reconstruction, commitment = torch.stack(errors), torch.stack(commitments)
        return TokenizerLosses(reconstruction.sum() + commitment.sum(), reconstruction, commitment)

    def draw_mask(self, segments: int, frames: int, device: torch.device | str = "cpu") -> Bool[Tensor, "segments|1 bins frames"]:
        """What one view keeps: half of the bands, in half of the frames; official mode draws one mask for the whole batch."""
        bands, count = self.config.bins // self.config.patch, segments if self.config.mode == "fixed" else 1
        kept_bands = torch.rand(count, bands, device=device).argsort(1) >= bands // 2
        kept_frames = torch.rand(count, frames, device=device).argsort(1) >= frames // 2
        return kept_bands.repeat_interleave(self.config.patch, 1)[:, :, None] & kept_frames[:, None, :]

    @torch.no_grad()
    def tokenize(self, signal: Float[Tensor, "*batch samples"]) -> Int[Tensor, "*batch frames"]:
        """Ids of every frame; nothing learns, whatever mode the module is in."""
        features = self.features(signal.reshape(-1, signal.shape[-1]))
        return self.codebook.lookup(features.flatten(0, 1)).view(*signal.shape[:-1], -1)

    def vectors(self, codes: Int[Tensor, "*batch frames"]) -> Float[Tensor, "*batch frames width"]:
        """The code vectors of ids."""
        return self.codebook.weight[codes]

    def decode(self, vectors: Float[Tensor, "segments frames width"]) -> Float[Tensor, "segments bins frames"]:
        """The spectrum that code vectors stand for."""
        return self.decoder(self.decoder_transformer(vectors)).transpose(1, 2)

    def _banded(self, spectrum: Float[Tensor, "segments frames bins"]) -> Float[Tensor, "segments frames half"]:
        bands = spectrum.reshape(-1, self.config.bins // self.config.patch, self.config.patch)
        chunks = (bands,) if torch.is_grad_enabled() or bands.device.type != "cpu" else bands.split(_CHUNK)
        joined = torch.cat([self.join(self.frequency_transformer(self.frequency_path(chunk))) for chunk in chunks])
        return joined.view(*spectrum.shape[:2], -1)

    def _sampled(self, frames: Float[Tensor, "segments frames window"]) -> Float[Tensor, "segments frames half"]:
        if self.config.mode == "official":
            return self.sample_path(frames)
        return self.sample_path(frames.reshape(-1, 1, frames.shape[-1])).view(*frames.shape[:2], -1)

    def _hide(self, frames: Float[Tensor, "segments frames window"], keep: Bool[Tensor, "segments|1 bins frames"]) -> Tensor:
        """Frames without the frequencies that are hidden; those above the last bin go with it."""
        kept = keep.transpose(1, 2).to(frames.dtype)
        above = frames.shape[-1] // 2 + 1 - self.config.bins
        return torch.fft.irfft(torch.fft.rfft(frames) * torch.cat([kept, kept[..., -1:].expand(-1, -1, above)], dim=-1), n=frames.shape[-1])
