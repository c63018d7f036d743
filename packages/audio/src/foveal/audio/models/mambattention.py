"""MambAttention: attention and bidirectional Mamba along time and along frequency, for speech enhancement.

Paper: Kühne, Jensen, Østergaard, Tan, "MambAttention: Mamba with Multi-Head Attention for Generalizable Single-Channel Speech Enhancement", 2025.
2,325,841 parameters (16 kHz). A network between two spectra: compressed magnitude and phase of noisy speech in, those of clean speech out.

What differs from the authors' code is layout, not numbers: inside the blocks features are channels-last, (batch, frames, bins, channels), and
inside a Mamba (channels, sequences, length), so that every projection is one matrix product and every scan reads along memory; the direction
that runs backwards does so without flipping anything; attention keeps no scores.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.kernels import attention, selective_scan

_STEP_RANGE = (1e-3, 0.1)  # of the scan's step sizes at the start, drawn evenly on a logarithmic scale
_NORM_EPS = 1e-5  # of instance and layer norms


@dataclass(frozen=True)
class MambAttentionConfig:
    """Sizes of a MambAttention; the defaults are the paper's."""

    sample_rate: int = 16_000  # Hz
    fft: int = 400  # samples of a spectrum
    window: int = 400  # samples: 25 ms, periodic Hann
    hop: int = 100  # samples
    compression: float = 0.3  # exponent of the magnitude
    channels: int = 64
    blocks: int = 4
    heads: int = 8
    state: int = 16  # of a scan, for each inner channel
    taps: int = 4  # of the convolution before a scan
    expansion: int = 4  # inner channels of a Mamba / channels
    dense_layers: int = 4  # of a dense block; layer i is dilated by 2^i frames
    largest_mask: float = 2.0
    norm_eps: float = 1e-5  # of the RMS norms
    narrowing: int = 2  # bins that the blocks see as one
    residual: bool = False  # not in the paper: the mask starts at one, the noisy phase is turned instead of made anew and starts unturned

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"channels must be a multiple of heads; got {self.channels} and {self.heads}")
        if self.narrowing < 1 or self.fft % (2 * self.narrowing) or not 0 < 2 * self.hop <= self.window <= self.fft:
            raise ValueError(
                f"fft must be a multiple of {2 * self.narrowing} (twice the narrowing), window at most fft and hop at most half a window; "
                f"got fft {self.fft}, {self.window} and {self.hop}"
            )
        if self.residual and self.largest_mask <= 1:
            raise ValueError(f"largest_mask must be above 1 for a mask that starts at one; got {self.largest_mask}")

    @property
    def bins(self) -> int:
        """Bins of the one-sided spectrum."""
        return self.fft // 2 + 1

    @property
    def inner(self) -> int:
        """Channels of a scan."""
        return self.expansion * self.channels

    @property
    def step_rank(self) -> int:
        """Channels that a scan's step sizes are made from."""
        return math.ceil(self.channels / 16)


class Enhanced(NamedTuple):
    """Spectrum of enhanced speech."""

    magnitude: Float[Tensor, "batch bins frames"]  # compressed
    phase: Float[Tensor, "batch bins frames"]  # radians
    parts: Float[Tensor, "batch bins frames 2"]  # real and imaginary part, of compressed magnitude


# What is cached is made outside inference mode: a tensor made inside could not take part in training later on.
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.hann_window(length, dtype=dtype, device=device)


class Normed(nn.Sequential):
    """A convolution, an instance norm over frames and bins, and a PReLU with a slope for each channel."""

    def __init__(self, convolution: nn.Module, channels: int) -> None:
        super().__init__(convolution, nn.InstanceNorm2d(channels, eps=_NORM_EPS, affine=True), nn.PReLU(channels))


class DenseBlock(nn.Module):
    """3x3 convolutions, each of which sees the outputs of all before it, newest first, and twice as many frames as the one before."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Normed(nn.Conv2d(channels * (index + 1), channels, 3, dilation=(2**index, 1), padding=(2**index, 1)), channels) for index in range(layers)
        )

    def forward(self, x: Float[Tensor, "batch channels frames bins"]) -> Float[Tensor, "batch channels frames bins"]:
        """Output of the last layer."""
        seen = x
        for layer in self.layers:
            x = layer(seen)
            if layer is not self.layers[-1]:
                seen = torch.cat([x, seen], dim=1)
        return x


class DenseEncoder(nn.Module):
    """Magnitude and phase to features of fewer bins."""

    def __init__(self, config: MambAttentionConfig) -> None:
        super().__init__()
        channels, narrowing = config.channels, config.narrowing
        self.expand = Normed(nn.Conv2d(2, channels, 1), channels)
        self.dense = DenseBlock(channels, config.dense_layers)
        self.narrow = Normed(nn.Conv2d(channels, channels, (1, narrowing + 1), stride=(1, narrowing)), channels)

    def forward(self, x: Float[Tensor, "batch 2 frames bins"]) -> Float[Tensor, "batch channels frames bands"]:
        """Features at (bins - 1) / narrowing bands."""
        return self.narrow(self.dense(self.expand(x)))


class MaskDecoder(nn.Module):
    """Features to a mask for the compressed magnitude, between 0 and `largest_mask`; every bin has its own steepness."""

    def __init__(self, config: MambAttentionConfig) -> None:
        super().__init__()
        channels, narrowing = config.channels, config.narrowing
        self.dense = DenseBlock(channels, config.dense_layers)
        self.widen = nn.ConvTranspose2d(channels, channels, (1, narrowing + 1), stride=(1, narrowing))
        self.reduce = Normed(nn.Conv2d(channels, 1, 1), 1)
        self.last = nn.Conv2d(1, 1, 1)
        self.steepness = nn.Parameter(torch.ones(config.bins))
        self.largest = config.largest_mask
        if config.residual:
            nn.init.zeros_(self.last.weight)
            self.last.bias = nn.Parameter(torch.tensor([-math.log(self.largest - 1)]))  # the sigmoid of which is 1 / largest

    def forward(self, x: Float[Tensor, "batch channels frames bands"]) -> Float[Tensor, "batch frames bins"]:
        """The mask."""
        x = self.last(self.reduce(self.widen(self.dense(x))))[:, 0]
        return self.largest * torch.sigmoid(self.steepness * x)


class PhaseDecoder(nn.Module):
    """Features to the phase of clean speech, or to what the noisy phase is turned by, as the direction of a pair of numbers."""

    def __init__(self, config: MambAttentionConfig) -> None:
        super().__init__()
        channels, narrowing = config.channels, config.narrowing
        self.dense = DenseBlock(channels, config.dense_layers)
        self.widen = Normed(nn.ConvTranspose2d(channels, channels, (1, narrowing + 1), stride=(1, narrowing)), channels)
        self.parts = nn.Conv2d(channels, 2, 1)
        if config.residual:
            nn.init.zeros_(self.parts.weight)
            self.parts.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Float[Tensor, "batch channels frames bands"]) -> Float[Tensor, "batch 2 frames bins"]:
        """Real and imaginary part, of any length."""
        return self.parts(self.widen(self.dense(x)))


class MultiHeadAttention(nn.Module):
    """Attention of every position to all others of its sequence, after a layer norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, eps=_NORM_EPS)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Float[Tensor, "sequences length channels"]) -> Float[Tensor, "sequences length channels"]:
        """What was attended to; the residual is the caller's."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(attention(q, k, v).transpose(1, 2).flatten(-2))


class Mamba(nn.Module):
    """A selective state-space model along a sequence, forwards or backwards (Gu and Dao, 2023, figure 3), without norm and residual."""

    def __init__(self, config: MambAttentionConfig, reverse: bool) -> None:
        super().__init__()
        channels, inner, rank, state = config.channels, config.inner, config.step_rank, config.state
        self.reverse, self.sizes = reverse, [rank, state, state]
        self.expand = nn.Linear(channels, 2 * inner, bias=False)
        convolution = nn.Conv1d(inner, inner, config.taps, groups=inner)
        self.taps = nn.Parameter(convolution.weight.detach()[:, 0])
        self.taps_bias = nn.Parameter(torch.zeros(inner))
        self.select = nn.Linear(inner, rank + 2 * state, bias=False)  # step sizes, what enters the state, what is read from it
        self.step = nn.Linear(rank, inner)
        self.log_rate = nn.Parameter(torch.log(torch.arange(1, state + 1, dtype=torch.float32)).repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.project = nn.Linear(inner, channels, bias=False)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        low, high = (math.log(step) for step in _STEP_RANGE)
        steps = torch.empty(inner).uniform_(low, high).exp()
        self.step.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def convolve(self, x: Float[Tensor, "inner sequences length"]) -> Float[Tensor, "inner sequences length"]:
        """Depthwise convolution over this position and those that the scan has passed before it, then SiLU."""
        last, length = self.taps.shape[1] - 1, x.shape[-1]
        padded = F.pad(x, (0, last) if self.reverse else (last, 0))
        taps = self.taps.flip(1) if self.reverse else self.taps
        out = self.taps_bias[:, None, None]
        for index in range(last + 1):
            out = torch.addcmul(out, padded[..., index : index + length], taps[:, index, None, None])
        return F.silu(out)

    def forward(self, x: Float[Tensor, "sequences length channels"]) -> Float[Tensor, "sequences length channels"]:
        """The filtered sequences."""
        rows = x.shape[:2]
        # weight @ x^T gives (channels, sequences, length): one product for all sequences, each of which lies along memory
        inside, gate = (self.expand.weight @ x.reshape(-1, x.shape[-1]).T).unflatten(1, rows).chunk(2)
        inside = self.convolve(inside)
        step, entering, reading = (self.select.weight @ inside.flatten(1)).split(self.sizes)
        delta = (self.step.weight @ step).unflatten(1, rows)
        entering, reading = (part.unflatten(1, rows).transpose(0, 1) for part in (entering, reading))
        scanned = selective_scan(
            inside.transpose(0, 1),
            delta.transpose(0, 1),
            -torch.exp(self.log_rate),
            entering,
            reading,
            self.skip,
            gate.transpose(0, 1),
            self.step.bias,
            delta_softplus=True,
            reverse=self.reverse,
        )
        assert isinstance(scanned, Tensor)  # no last state was asked for
        return self.project(scanned.transpose(1, 2))


class Direction(nn.Module):
    """A Mamba after an RMS norm, with a residual around both."""

    def __init__(self, config: MambAttentionConfig, reverse: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.channels, eps=config.norm_eps)
        self.mamba = Mamba(config, reverse)

    def forward(self, x: Float[Tensor, "sequences length channels"]) -> Float[Tensor, "sequences length channels"]:
        """`x` and what the Mamba makes of it."""
        return self.mamba(self.norm(x)) + x


class BidirectionalMamba(nn.Module):
    """One direction and the other, joined by a linear layer, with a residual around all."""

    def __init__(self, config: MambAttentionConfig) -> None:
        super().__init__()
        self.forwards = Direction(config, reverse=False)
        self.backwards = Direction(config, reverse=True)
        self.join = nn.Linear(2 * config.channels, config.channels)

    def forward(self, x: Float[Tensor, "sequences length channels"]) -> Float[Tensor, "sequences length channels"]:
        """`x` and what both directions make of it."""
        return self.join(torch.cat([self.forwards(x), self.backwards(x)], dim=-1)) + x


class Block(nn.Module):
    """Attention and Mamba along time, then along frequency; the attention's weights are the same on both axes."""

    def __init__(self, config: MambAttentionConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.channels, config.heads)
        self.time = BidirectionalMamba(config)
        self.frequency = BidirectionalMamba(config)

    def forward(self, x: Float[Tensor, "batch frames bins channels"]) -> Float[Tensor, "batch frames bins channels"]:
        """Features after this block."""
        batch = x.shape[0]
        for axis in (self.time, self.frequency):
            x = x.transpose(1, 2).flatten(0, 1)  # to (batch x bins) sequences of frames, and back to (batch x frames) of bins
            x = axis(self.attention(x) + x).unflatten(0, (batch, -1))
        return x


class MambAttention(nn.Module):
    """Enhances the spectrum of noisy speech; `enhance` does so from signal to signal.

    The result is not causal and depends on the whole input: norms, attention and one direction of each Mamba see every frame.
    """

    def __init__(self, config: MambAttentionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MambAttentionConfig()
        self.encoder = DenseEncoder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.mask_decoder = MaskDecoder(config)
        self.phase_decoder = PhaseDecoder(config)

    @property
    def shortest(self) -> int:
        """Samples that a signal needs at least: reflection at the ends reads half a spectrum's worth."""
        return self.config.fft // 2 + 1

    def forward(self, magnitude: Float[Tensor, "batch bins frames"], phase: Float[Tensor, "batch bins frames"]) -> Enhanced:
        """Enhance a spectrum.

        Args:
            magnitude: Compressed magnitude of a signal whose mean square is one, as `spectrum` gives it.
            phase: Its phase in radians.

        Returns:
            The same of the enhanced signal, and its real and imaginary parts.

        Raises:
            ValueError: Shapes that differ, or another number of bins than the config's.
        """
        if magnitude.ndim != 3 or magnitude.shape != phase.shape or magnitude.shape[1] != self.config.bins:
            raise ValueError(
                f"magnitude and phase must both be (batch, {self.config.bins} bins, frames); got {tuple(magnitude.shape)} and {tuple(phase.shape)}"
            )
        x = self.encoder(torch.stack([magnitude, phase], dim=1).mT).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        x = x.permute(0, 3, 1, 2).contiguous()
        wide = magnitude.dtype  # angles and magnitudes are not for half precision
        real, imaginary = self.phase_decoder(x).to(wide).mT.unbind(1)
        turn = torch.atan2(imaginary, real)
        phase = phase + turn if self.config.residual else turn
        magnitude = magnitude * self.mask_decoder(x).to(wide).mT
        return Enhanced(magnitude, phase, torch.stack([magnitude * phase.cos(), magnitude * phase.sin()], dim=-1))

    def spectrum(self, signal: Float[Tensor, "batch samples"], floor: float = 0.0) -> tuple[Tensor, Tensor]:
        """Compressed magnitude and phase, both (batch, bins, frames), of frames centred every `hop` samples.

        Args:
            signal: At `config.sample_rate`, at least `shortest` samples.
            floor: Added inside the square root and to both arguments of the angle: gradients of silence stay finite with 1e-10.
        """
        window = _hann(self.config.window, signal.dtype, signal.device)
        spectrum = torch.stft(signal, self.config.fft, self.config.hop, self.config.window, window, return_complex=True)
        if floor:
            magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + floor)
            return magnitude**self.config.compression, torch.atan2(spectrum.imag + floor, spectrum.real + floor)
        return spectrum.abs() ** self.config.compression, spectrum.angle()

    def signal(self, magnitude: Tensor, phase: Tensor, samples: int) -> Float[Tensor, "batch samples"]:
        """The signal of a compressed magnitude and a phase."""
        window = _hann(self.config.window, magnitude.dtype, magnitude.device)
        spectrum = torch.polar(magnitude ** (1 / self.config.compression), phase)
        return torch.istft(spectrum, self.config.fft, self.config.hop, self.config.window, window, length=samples)

    def enhance(self, noisy: Float[Tensor, "batch samples"], least_level: float = 0.0) -> Float[Tensor, "batch samples"]:
        """Enhance signals, each brought to mean square one for the network and back to its level; silence stays silence.

        Args:
            noisy: At `config.sample_rate`.
            least_level: Root mean square; a signal below it is raised as if it had it, and stays fainter than others for the network.

        Raises:
            ValueError: Fewer samples than `shortest`.
        """
        if noisy.ndim != 2 or noisy.shape[-1] < self.shortest:
            raise ValueError(f"noisy must be (batch, samples) with at least {self.shortest} samples; got {tuple(noisy.shape)}")
        gain = unit_gain(noisy, least_level)
        magnitude, phase, _ = self(*self.spectrum(noisy * gain))
        return self.signal(magnitude, phase, noisy.shape[-1]) / gain * (noisy != 0).any(-1, keepdim=True)


def unit_gain(signal: Float[Tensor, "batch samples"], least_level: float = 0.0) -> Float[Tensor, "batch 1"]:
    """What brings each signal to mean square one, or less where its root mean square is below `least_level`; 1 for silence."""
    power = signal.square().mean(-1, keepdim=True).clamp_min(least_level**2)
    return torch.where(power > 0, power, 1.0).rsqrt()
