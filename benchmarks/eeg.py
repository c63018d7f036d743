"""How fast does the tokenizer turn EEG into ids beside the authors' sequence of operations, at the same weights and the same ids?

python benchmarks/eeg.py [--rounds 9] [--threads 1] writes benchmarks/results/eeg.json.

The baseline does, operation by operation, what the released code does: convolutions with group norms, linear attention with its transposes, and the
whole table of distances to the codes. Published sizes; weights are drawn at random, because the released tokenizers cannot be redistributed, and as
many codes are alive as in them: 1728 of 8192 in the TUEV model, 261 in the one for several data sets; `all` keeps 8192.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveal.eeg import TFMTokenizer, TokenizerConfig, to_official
from foveal.eeg.preprocessing import prepared
from foveal.kernels.bench import Contestants, comparison, main


def recording(batch: int, channels: int, samples: int) -> Tensor:
    """(batch, channels, samples): pink noise with a rhythm in every channel, prepared as recordings are."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.fft.rfft(torch.randn(batch, channels, samples, generator=generator))
    pink = torch.fft.irfft(spectrum / torch.fft.rfftfreq(samples, 1 / 200).clamp(min=0.5).sqrt(), samples)
    rhythm = torch.sin(2 * torch.pi * torch.arange(samples) / 200 * torch.randint(4, 30, (batch, channels, 1), generator=generator))
    return torch.from_numpy(prepared((pink / pink.std() + 0.7 * rhythm).numpy(), 200.0))


def tokenizer(live: int) -> TFMTokenizer:
    """A tokenizer of the published size; codes beyond `live`, at random places, have faded as the released ones have."""
    torch.manual_seed(0)
    model = TFMTokenizer(TokenizerConfig(mode="official")).eval()
    signal = recording(64, 16, 1000)
    with torch.no_grad():
        features = model.features(signal.flatten(0, 1)).flatten(0, 1)
    chosen = torch.randperm(8192)[:live]
    model.codebook.weight.fill_(7e-39)
    model.codebook.weight[chosen] = features[torch.randperm(len(features))[:live]] + 0.05 * torch.randn(live, 64)
    return model


class AuthorsSequence(nn.Module):
    """The released code's operations on its own state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.state = state

    def _path(self, x: Tensor, name: str, stride: int) -> Tensor:
        for index in (0, 3, 6):
            x = functional.conv1d(x, self.state[f"{name}.{index}.weight"], self.state[f"{name}.{index}.bias"], stride if index == 0 else 1)
            x = functional.group_norm(functional.gelu(x), 16, self.state[f"{name}.{index + 2}.weight"], self.state[f"{name}.{index + 2}.bias"])
        return x

    def _layers(self, x: Tensor, name: str) -> Tensor:
        for layer in range(2):
            at = lambda key, layer=layer: self.state[f"{name}.transformer.layers.layers.{layer}.{key}"]
            normed = functional.layer_norm(x, (64,), at("0.norm.weight"), at("0.norm.bias"))
            q, k, v = (functional.linear(normed, at(f"0.fn.to_{part}.weight")) for part in "qkv")
            q, k, v = (t.reshape(*t.shape[:2], 8, 8).transpose(1, 2) for t in (q, k, v))
            q, k = q.softmax(-1) * 8**-0.5, k.softmax(-2)
            context = torch.einsum("bhnd,bhne->bhde", k, v)
            attended = torch.einsum("bhnd,bhde->bhne", q, context).transpose(1, 2).reshape(*normed.shape)
            x = x + functional.linear(attended, at("0.fn.to_out.weight"), at("0.fn.to_out.bias"))
            normed = functional.layer_norm(x, (64,), at("1.norm.weight"), at("1.norm.bias"))
            hidden = functional.gelu(functional.linear(normed, at("1.fn.fn.w1.weight"), at("1.fn.fn.w1.bias")))
            x = x + functional.linear(hidden, at("1.fn.fn.w2.weight"), at("1.fn.fn.w2.bias"))
        return x

    @torch.inference_mode()
    def forward(self, signal: Tensor) -> Tensor:
        segments = signal.flatten(0, 1)
        spectrum = torch.stft(segments, 200, 100, window=torch.hann_window(200), center=False, return_complex=True).abs()[:, :100]
        count, bins, frames = spectrum.shape
        x = self._path(spectrum.permute(0, 2, 1).reshape(-1, 1, bins), "freq_patch_embedding", 5).permute(0, 2, 1)
        x = self._layers(x, "trans_freq_encoder").permute(0, 2, 1)
        gate, value = (
            functional.conv1d(x, self.state[f"{name}.0.weight"], self.state[f"{name}.0.bias"], 5)
            for name in ("freq_patch_embedding_2_atten", "freq_patch_embedding_2")
        )
        x = (value * gate.sigmoid()).reshape(count, frames, -1)
        sampled = self._path(segments[:, None], "temporal_patch_embedding", 100).transpose(1, 2)
        flat = functional.normalize(self._layers(torch.cat([x, sampled], -1), "trans_temporal_encoder"), dim=-1).reshape(-1, 64)
        codes = self.state["quantizer.embedding.weight"]
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ codes.t() + codes.pow(2).sum(1, keepdim=True).t()
        return distance.argmin(1).view(*signal.shape[:2], frames)


def contestants(batch: int, live: int) -> Contestants:
    """Both on the same windows; refuses to compare where an id differs."""
    model, signal = tokenizer(live), recording(batch, 16, 1000)
    authors = AuthorsSequence(to_official("tfm_tokenizer", model))
    ours, theirs = model.tokenize(signal), authors(signal)
    share = (ours == theirs).double().mean().item()
    if share < 0.999:
        raise RuntimeError(f"ids differ: only {share:.4%} are the same")
    if share < 1:
        print(f"{share:.4%} of the ids are the same; the others are ties within rounding")
    return {"authors' operations": lambda: authors(signal), "foveal": lambda: model.tokenize(signal)}


@comparison("tokenize 1 x 16 channels x 5 s, 1728 codes alive", baseline="authors' operations")
def one_window() -> Contestants:
    """What the TUEV model does with a single window: everything fits the cache, and most of the time is matrix products that both do."""
    return contestants(1, 1728)


@comparison("tokenize 8 x 16 channels x 5 s, 1728 codes alive", baseline="authors' operations", promise=3.0)
def batch() -> Contestants:
    """A batch, as in a long recording."""
    return contestants(8, 1728)


@comparison("tokenize 8 x 16 channels x 5 s, 261 codes alive", baseline="authors' operations", promise=3.0)
def few_codes() -> Contestants:
    """The model for several data sets."""
    return contestants(8, 261)


@comparison("tokenize 8 x 16 channels x 5 s, all codes alive", baseline="authors' operations")
def all_codes() -> Contestants:
    """Nothing to leave out of the search."""
    return contestants(8, 8192)


if __name__ == "__main__":
    main("eeg", Path(__file__).parent / "results")
