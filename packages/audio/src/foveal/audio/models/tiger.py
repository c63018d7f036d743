"""TIGER: time-frequency interleaved gain extraction and reconstruction, for speech separation.

Paper: Xu, Li, Chen, Hu, "TIGER: Time-frequency Interleaved Gain Extraction and Reconstruction for Efficient Speech Separation", ICLR 2025.
821,932 parameters (speech, two sources); the block is shared over 4 (small) or 8 (large) passes. Estimates add up to the mixture.

What differs from the authors' code is layout, not numbers: features are channels-last, (batch, frames, bands, channels), so that every 1x1
convolution is a matrix product, the channel norm a LayerNorm and each sequence one contiguous piece; the twelve query, key and value
convolutions are one product; bands of equal width are split and masked together. Names in brackets are the paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from foveal.kernels import channel_norm, depthwise_norm, gated_injection

#: Band plan of the speech model at 16 kHz: (number of bands, width in Hz), low to high; what is left above is one more band.
SPEECH_BANDS = ((40, 25.0), (10, 100.0), (8, 250.0), (8, 500.0))
#: Band plan of the cinematic model (dialogue, effects, music) at 44.1 kHz.
CINEMATIC_BANDS = ((20, 50.0), (10, 100.0), (8, 250.0), (8, 500.0), (8, 1000.0), (2, 2000.0))

_FLOOR = 1e-4  # of a magnitude before compression: 100 dB under the spectrum of a full-scale tone
_BAND_EPS = torch.finfo(torch.float32).eps  # of the norm in front of the band split, in every dtype


@dataclass(frozen=True)
class TIGERConfig:
    """Sizes of a TIGER; the defaults are the paper's large speech model."""

    sample_rate: int = 16_000  # Hz
    window: int = 640  # samples: 40 ms, periodic Hann
    hop: int = 160  # samples: 10 ms
    bands: tuple[tuple[int, float], ...] = SPEECH_BANDS
    channels: int = 128  # of the features between blocks
    hidden_channels: int = 256  # inside the multi-scale block
    blocks: int = 8  # passes through the one shared block: 4 in the small model
    scales: int = 5  # of the multi-scale block, each half as long as the one before
    heads: int = 4
    head_channels: int = 4  # of queries and keys; values have channels / heads
    sources: int = 2
    dropout: float = 0.1  # in the global branch of the multi-scale block
    compression: float | None = None  # not in the paper: exponent of a compressed spectrum, whose magnitude is then a third part; see BandGroup

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple((int(count), float(hertz)) for count, hertz in self.bands))  # lists come from YAML and JSON
        for divisor in ("heads", "sources"):
            if self.channels % getattr(self, divisor):
                raise ValueError(f"channels must be a multiple of {divisor}; got {self.channels} and {getattr(self, divisor)}")
        if min(self.band_widths) < 1:
            raise ValueError(
                f"every band needs at least one bin of {self.sample_rate / self.window:g} Hz; bands {self.bands} give widths "
                f"{sorted(set(self.band_widths))}: widen the bands or lengthen the window"
            )

    @property
    def bins(self) -> int:
        """Bins of the one-sided spectrum."""
        return self.window // 2 + 1

    @property
    def band_widths(self) -> tuple[int, ...]:
        """Bins of every band, low to high; they add up to `bins`."""
        widths = [int(hertz / (self.sample_rate / 2) * self.bins) for count, hertz in self.bands for _ in range(count)]
        return (*widths, self.bins - sum(widths))

    @property
    def band_groups(self) -> tuple[tuple[int, int], ...]:
        """Runs of neighbouring bands of equal width: (number of bands, bins in each)."""
        groups: list[list[int]] = []
        for width in self.band_widths:
            if groups and groups[-1][1] == width:
                groups[-1][0] += 1
            else:
                groups.append([1, width])
        return tuple((count, width) for count, width in groups)


# What is cached is made outside inference mode: a tensor made inside could not take part in training later on.
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Periodic Hann window, made in the precision of the data: not a buffer, which float64 would only convert."""
    return torch.hann_window(length, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _pooling_matrix(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(target, source) matrix of adaptive average pooling."""
    return F.adaptive_avg_pool1d(torch.eye(source, dtype=dtype, device=device)[None], target)[0].T.contiguous()


class SequenceNorm(nn.Module):
    """Global layer norm: statistics over length and channels of one sequence, one scale and shift a channel; optionally a PReLU after it."""

    def __init__(self, channels: int, prelu: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((1,), 0.25)) if prelu else None

    def forward(self, x: Float[Tensor, "sequence length channels"]) -> Float[Tensor, "sequence length channels"]:
        """Normalised `x`."""
        return depthwise_norm(x, None, None, self.weight, self.bias, self.slope)


class DepthwiseNorm(nn.Module):
    """Depthwise convolution along the sequence (kernel 5), then the norm of `SequenceNorm`."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        convolution = nn.Conv1d(channels, channels, 5, groups=channels)
        self.taps = nn.Parameter(convolution.weight.detach()[:, 0])
        self.bias = convolution.bias
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "sequence length channels"]) -> Float[Tensor, "sequence shorter channels"]:
        """Convolved and normalised `x`."""
        return depthwise_norm(x, self.taps, self.bias, self.norm_weight, self.norm_bias, stride=self.stride)


class Injection(nn.Module):
    """Local features gated and shifted by features of another resolution, which nearest-neighbour interpolation brings to their length."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        layers = [nn.Conv1d(channels, channels, kernel_size, groups=channels) for _ in range(3)]
        self.taps = nn.Parameter(torch.stack([layer.weight.detach()[:, 0] for layer in layers]))  # local, gate, shift
        self.norm_weight = nn.Parameter(torch.ones(3, channels))
        self.norm_bias = nn.Parameter(torch.zeros(3, channels))

    def forward(
        self, local: Float[Tensor, "sequence length channels"], other: Float[Tensor, "sequence other channels"]
    ) -> Float[Tensor, "sequence length channels"]:
        """norm(conv(local)) * sigmoid(norm(conv(other))) + norm(conv(other)), at the length of `local`."""
        return gated_injection(local, other, self.taps, self.norm_weight, self.norm_bias)


class GlobalContext(nn.Module):
    """Two pointwise layers around a depthwise convolution, on the shortest scale."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, channels, bias=False)
        self.expand_norm = SequenceNorm(channels)
        self.depthwise = nn.Conv1d(channels, channels, 5, padding=2, groups=channels)
        self.project = nn.Linear(channels, channels, bias=False)
        self.project_norm = SequenceNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "sequence length channels"]) -> Float[Tensor, "sequence length channels"]:
        """Context of the whole sequence, at the same length."""
        x = self.expand_norm(self.expand(x)).transpose(1, 2)
        x = self.dropout(F.relu(self.depthwise(x))).transpose(1, 2)
        return self.dropout(self.project_norm(self.project(x)))


class MultiScaleSelectiveAttention(nn.Module):
    """Downsample a sequence to several lengths, mix them through a global context, and fuse from coarse to fine (MSA, section 3.3).

    The coarsest scale is fused with the context and then not used, and the first of the coarse-to-fine steps reads a finer scale: both as in
    the authors' code, whose weights need it.
    """

    def __init__(self, channels: int, hidden_channels: int, scales: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, hidden_channels)
        self.expand_norm = SequenceNorm(hidden_channels, prelu=True)
        self.downsample = nn.ModuleList(DepthwiseNorm(hidden_channels, stride=1 if scale == 0 else 2) for scale in range(scales))
        self.context = GlobalContext(hidden_channels, dropout)
        self.inject = nn.ModuleList(Injection(hidden_channels, 1) for _ in range(scales))
        self.merge = nn.ModuleList(Injection(hidden_channels, 5) for _ in range(scales - 1))
        self.project = nn.Linear(hidden_channels, channels)

    def forward(self, x: Float[Tensor, "sequence length channels"]) -> Float[Tensor, "sequence length channels"]:
        """X plus what was seen at all scales."""
        scale = self.expand_norm(self.expand(x))
        scales = []
        for downsample in self.downsample:
            scale = downsample(scale)
            scales.append(scale)
        shortest = scales[-1].shape[1]
        pooled = scales[-1]
        for scale in scales[:-1]:
            pooled = pooled + torch.matmul(_pooling_matrix(scale.shape[1], shortest, scale.dtype, scale.device), scale)
        context = self.context(pooled)

        fused = [inject(scale, context) for inject, scale in zip(self.inject[:-1], scales[:-1], strict=True)]
        merged = fused[max(len(fused) - 2, -1)]
        for merge, finer in zip(reversed(self.merge), reversed(fused), strict=True):
            merged = merge(finer, merged)
        return self.project(merged).add_(x)


class ChannelNorm(nn.Module):
    """PReLU and a LayerNorm over groups of channels at every position, after a pointwise convolution; `groups` are their channel counts."""

    def __init__(self, groups: tuple[int, ...]) -> None:
        super().__init__()
        self.groups = groups
        self.slope = nn.Parameter(torch.full((len(groups),), 0.25))
        self.weight = nn.Parameter(torch.ones(sum(groups)))
        self.bias = nn.Parameter(torch.zeros(sum(groups)))

    def forward(self, x: Float[Tensor, "*position channels"]) -> Float[Tensor, "*position channels"]:
        """PReLU and norm of each group, scaled and shifted a channel."""
        return channel_norm(x, self.slope, self.weight, self.bias, self.groups)


class FullFrequencyFrameAttention(nn.Module):
    """Attention along one axis whose vectors hold all positions of the other axis (F3A, section 3.3)."""

    def __init__(self, channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self.heads, self.head_channels, self.value_channels = heads, head_channels, channels // heads
        groups = (head_channels,) * (2 * heads) + (self.value_channels,) * heads
        self.qkv = nn.Linear(channels, sum(groups))
        self.qkv_norm = ChannelNorm(groups)
        self.project = nn.Linear(channels, channels)
        self.project_norm = ChannelNorm((channels,))

    def forward(self, x: Float[Tensor, "batch other axis channels"]) -> Float[Tensor, "batch other axis channels"]:
        """X plus attention along `axis`."""
        batch, other, axis, _ = x.shape
        sizes = [self.heads * self.head_channels] * 2 + [self.heads * self.value_channels]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).permute(0, 3, 2, 1, 4).reshape(batch * self.heads, axis, -1)
            for part in self.qkv_norm(self.qkv(x)).split(sizes, dim=-1)
        )
        # Query and value widths grow with the other axis (1,604 and 12,832 at 4 s): two matrix products, not a flash kernel's case.
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        mixed = torch.bmm(torch.softmax(scores, dim=-1), v)
        mixed = mixed.view(batch, self.heads, axis, other, self.value_channels).permute(0, 3, 2, 1, 4).flatten(-2)
        return self.project_norm(self.project(mixed)).add_(x)


class Path(nn.Module):
    """MSA, F3A and a channel norm along one axis, with a residual around the three."""

    def __init__(self, config: TIGERConfig) -> None:
        super().__init__()
        self.msa = MultiScaleSelectiveAttention(config.channels, config.hidden_channels, config.scales, config.dropout)
        self.attention = FullFrequencyFrameAttention(config.channels, config.heads, config.head_channels)
        self.norm = nn.LayerNorm(config.channels)

    def forward(self, x: Float[Tensor, "batch other axis channels"]) -> Float[Tensor, "batch other axis channels"]:
        """X plus the path along `axis`, every position of `other` a sequence of its own in the MSA."""
        # sums in place, here and in the parts: one array less through memory each
        return self.norm(self.attention(self.msa(x.flatten(0, 1)).view_as(x))).add_(x)


class FrequencyFrameInterleaved(nn.Module):
    """Bands, then frames, several times with the same weights; every pass after the first sees the mixture's features again (FFI)."""

    def __init__(self, config: TIGERConfig) -> None:
        super().__init__()
        self.blocks = config.blocks
        self.frequency = Path(config)
        self.frame = Path(config)
        blend = nn.Conv2d(config.channels, config.channels, 1, groups=config.channels)
        self.blend_weight = nn.Parameter(blend.weight.detach().flatten())
        self.blend_bias = nn.Parameter(blend.bias.detach())  # type: ignore[union-attr]
        self.blend_slope = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, mixture: Float[Tensor, "batch frames bands channels"]) -> Float[Tensor, "batch frames bands channels"]:
        """Separated features."""
        x = mixture
        for index in range(self.blocks):
            if index > 0:
                x = F.prelu(torch.addcmul(self.blend_bias, mixture + x, self.blend_weight), self.blend_slope)
            x = self.frequency(x)
            x = self.frame(x.transpose(1, 2).contiguous()).transpose(1, 2).contiguous()
        return x


class BandGroup(nn.Module):
    """Band split of neighbouring bands of equal width: norm over a band's bins and all frames, then one linear layer a band.

    The paper's parts are the real and the imaginary part of each bin, from which a network has to learn what a magnitude is. With a compressed
    spectrum, |X|^c e^(i arg X), the magnitude |X|^c is given as a third part. The bundled weights use the paper's parts.
    """

    def __init__(self, bands: int, width: int, channels: int, parts: int = 2) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(bands, parts * width))
        self.norm_bias = nn.Parameter(torch.zeros(bands, parts * width))
        layers = [nn.Conv1d(parts * width, channels, 1) for _ in range(bands)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach()[..., 0] for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))  # type: ignore[union-attr]

    def forward(self, x: Float[Tensor, "batch bands parts frames"]) -> Float[Tensor, "batch frames bands channels"]:
        """Features of each band; `parts` are the real parts of its bins, then the imaginary parts, then magnitudes if there are."""
        x = F.layer_norm(x, x.shape[2:], eps=_BAND_EPS)
        # the norm's scale and shift go into the layer that follows: one pass over the data less
        weight = self.weight * self.norm_weight[:, None]
        bias = self.bias + (self.weight * self.norm_bias[:, None]).sum(-1)
        return torch.einsum("bnpt,ncp->btnc", x, weight) + bias


class MaskGroup(nn.Module):
    """Masks of neighbouring bands of equal width.

    The convolution has one group a source, but its outputs are ordered value/gate, real/imaginary, source, bin: a group of inputs does not
    belong to a source. So it is in the authors' code, and so it stays.
    """

    def __init__(self, bands: int, width: int, channels: int, sources: int) -> None:
        super().__init__()
        self.sources, self.width = sources, width
        self.slope = nn.Parameter(torch.full((bands,), 0.25))
        layers = [nn.Conv1d(channels, 4 * sources * width, 1, groups=sources) for _ in range(bands)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach()[..., 0] for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))  # type: ignore[union-attr]

    def forward(self, x: Float[Tensor, "batch frames bands channels"]) -> Float[Tensor, "batch frames bands 2 sources width"]:
        """Real and imaginary masks; real parts add up to one over the sources, imaginary parts to zero."""
        bands = x.shape[2]
        x = torch.where(x > 0, x, x * self.slope[:, None])
        weight = self.weight.unflatten(1, (self.sources, -1))
        out = torch.einsum("btngc,ngoc->btngo", x.unflatten(-1, (self.sources, -1)), weight).flatten(-2) + self.bias
        value, gate = out.view(*x.shape[:2], bands, 2, 2, self.sources, self.width).unbind(3)
        mask = value * torch.sigmoid(gate)
        total = mask.sum(4, keepdim=True)
        share = total.new_tensor([1.0, 0.0]).view(2, 1, 1)
        return mask - (total - share) / self.sources


class TIGER(nn.Module):
    """Separates the sources of a single-channel mixture by complex masks, one a source, that add up to one.

    The result is not causal and depends on the whole input: norms and attention see every frame.
    """

    def __init__(self, config: TIGERConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TIGERConfig()
        parts = 2 if config.compression is None else 3
        self.band_split = nn.ModuleList(BandGroup(bands, width, config.channels, parts) for bands, width in config.band_groups)
        self.separator = FrequencyFrameInterleaved(config)
        self.mask = nn.ModuleList(MaskGroup(bands, width, config.channels, config.sources) for bands, width in config.band_groups)

    @property
    def shortest(self) -> int:
        """Samples that a mixture needs at least: reflection at the ends reads half a window."""
        return self.config.window // 2 + 1

    def spectrum(self, signal: Float[Tensor, "batch samples"]) -> Complex[Tensor, "batch bins frames"]:
        """Short-time spectrum, frames centred every `hop` samples."""
        window = _hann(self.config.window, signal.dtype, signal.device)
        return torch.stft(signal, self.config.window, self.config.hop, window=window, return_complex=True)

    def band_features(self, spectrum: Complex[Tensor, "batch bins frames"]) -> Float[Tensor, "batch frames bands channels"]:
        """Normalised features of every band."""
        parts = torch.stack([spectrum.real, spectrum.imag], dim=1)
        if self.config.compression is not None:
            magnitude = torch.linalg.vector_norm(parts, dim=1, keepdim=True).clamp_min(_FLOOR)
            compressed = magnitude**self.config.compression
            parts = torch.cat([parts * (compressed / magnitude), compressed], dim=1)
        features, start = [], 0
        for group, (bands, width) in zip(self.band_split, self.config.band_groups, strict=True):
            piece = parts[:, :, start : start + bands * width].unflatten(2, (bands, width))
            features.append(group(piece.transpose(1, 2).flatten(2, 3)))
            start += bands * width
        return torch.cat(features, dim=2)

    def masks_of_features(self, separated: Float[Tensor, "batch frames bands channels"]) -> Complex[Tensor, "batch sources bins frames"]:
        """Complex masks from separated features."""
        masks, start = [], 0
        for head, (bands, _) in zip(self.mask, self.config.band_groups, strict=True):
            mask = head(separated[:, :, start : start + bands])
            masks.append(mask.permute(0, 4, 2, 5, 1, 3).flatten(2, 3))
            start += bands
        joined = torch.cat(masks, dim=2)
        return torch.view_as_complex(joined if joined.dtype == torch.float64 else joined.float())  # there is no complex bfloat16

    def masks_of_spectrum(self, spectrum: Complex[Tensor, "batch bins frames"]) -> Complex[Tensor, "batch sources bins frames"]:
        """Complex masks from the mixture's spectrum."""
        return self.masks_of_features(self.separator(self.band_features(spectrum)))

    def masks(self, mixture: Float[Tensor, "batch samples"]) -> Complex[Tensor, "batch sources bins frames"]:
        """Complex masks of every source for the mixture's spectrum."""
        return self.masks_of_spectrum(self.spectrum(mixture))

    def apply_masks(
        self, signal: Float[Tensor, "batch samples"], masks: Complex[Tensor, "batch sources bins frames"]
    ) -> Float[Tensor, "batch sources samples"]:
        """Sources of `signal` under `masks`, for instance another channel of the mixture that the masks were made from."""
        return self._masked(self.spectrum(signal), masks, signal.shape[-1])

    def _masked(self, spectrum: Tensor, masks: Tensor, samples: int) -> Tensor:
        masked = spectrum[:, None] * masks
        window = _hann(self.config.window, masked.real.dtype, masked.device)
        signal = torch.istft(masked.flatten(0, 1), self.config.window, self.config.hop, window=window, length=samples)
        return signal.view(*masks.shape[:2], samples)

    def forward(self, mixture: Float[Tensor, "... samples"]) -> Float[Tensor, "rows sources samples"]:
        """Separate mixtures.

        Args:
            mixture: (samples,), (batch, samples) or (batch, channels, samples) at `config.sample_rate`; channels are separated one by one.

        Returns:
            (batch * channels, sources, samples), same scale as the mixture.

        Raises:
            ValueError: fewer samples than `shortest`, or more than three dimensions.
        """
        if mixture.ndim not in (1, 2, 3) or mixture.shape[-1] < self.shortest:
            raise ValueError(
                f"mixture must be (samples,), (batch, samples) or (batch, channels, samples) with at least {self.shortest} samples; "
                f"got {tuple(mixture.shape)}"
            )
        rows = mixture.reshape(-1, mixture.shape[-1])
        spectrum = self.spectrum(rows)
        return self._masked(spectrum, self.masks_of_spectrum(spectrum), rows.shape[-1])


def overlap_average(
    network: Callable[[Tensor], Tensor], mixture: Float[Tensor, "rows samples"], chunk: int, hop: int
) -> Float[Tensor, "rows sources samples"]:
    """Separate in overlapping chunks and average them, as the authors do for film sound.

    (chunk - hop) zeros stand on both sides, every sum is divided by chunk / hop, and the last chunk is filled with zeros.

    Args:
        network: (rows, samples) -> (rows, sources, samples).
        mixture: any length.
        chunk: samples of a chunk.
        hop: samples between the starts of two chunks; at most `chunk`.
    """
    margin = chunk - hop
    count = (mixture.shape[-1] + 2 * margin - chunk) // hop + 2
    padded = F.pad(mixture, (margin, margin))
    total: Tensor | None = None
    for start in range(0, count * hop, hop):
        piece = padded[:, start : start + chunk]
        if piece.shape[-1] == 0:
            break
        estimate = network(F.pad(piece, (0, chunk - piece.shape[-1])))[..., : piece.shape[-1]]
        if total is None:
            total = estimate.new_zeros(*estimate.shape[:-1], padded.shape[-1])
        total[..., start : start + piece.shape[-1]] += estimate
    assert total is not None  # count is at least one
    return total[..., margin : margin + mixture.shape[-1]] * (hop / chunk)


class TIGERCinematic(nn.Module):
    """Three TIGERs with three sources each for film sound (the paper's DnR model): of each, the track it was trained for is kept."""

    TRACKS = ("music", "effect", "dialog")  # order of the sources inside each branch

    def __init__(self, config: TIGERConfig) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleDict({track: TIGER(config) for track in self.TRACKS})

    def forward(
        self, mixture: Float[Tensor, "... samples"], chunk_seconds: float = 12.0, hop_seconds: float = 4.0
    ) -> Float[Tensor, "rows 3 samples"]:
        """(batch * channels, 3, samples): music, effects and dialogue of a mixture at 44.1 kHz, shapes as in `TIGER.forward`."""
        rows = mixture.reshape(-1, mixture.shape[-1])
        chunk, hop = int(self.config.sample_rate * chunk_seconds), int(self.config.sample_rate * hop_seconds)
        return torch.stack([overlap_average(branch, rows, chunk, hop)[:, track] for track, branch in enumerate(self.branches.values())], dim=1)
