"""HiFi-GAN: where each tensor of ours stands in the authors' generator, and their weight normalisation folded in and out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.audio.models.hifigan import HiFiGAN, HiFiGANConfig
from foveal.core.systems import Adapter, System

_KEYWORDS = {
    "num_mels": "mels",
    "upsample_initial_channel": "channels",
    "upsample_rates": "upsample_rates",
    "upsample_kernel_sizes": "upsample_kernels",
    "resblock_kernel_sizes": "block_kernels",
    "resblock_dilation_sizes": "block_dilations",
    "resblock": "block",
}
#: What else the authors' config.json says: training, and the mel spectrogram (`foveal.audio.models.mel.MelConfig` is theirs at 22,050 Hz).
_OTHERS = (
    "num_gpus", "batch_size", "learning_rate", "adam_b1", "adam_b2", "lr_decay", "seed", "segment_size", "num_freq", "n_fft", "hop_size", "win_size",
    "sampling_rate", "fmin", "fmax", "fmax_for_loss", "fmax_loss", "num_workers", "dist_config",
)  # fmt: skip
#: What is said there of the mel spectrogram that is read -> field of `MelConfig`.
_SPECTROGRAM = {"sampling_rate": "sample_rate", "win_size": "window", "hop_size": "hop", "num_mels": "mels", "fmin": "low", "fmax": "high"}

Table = dict[str, list[tuple[str, tuple[int, ...]]]]


def _config(**fields: Any) -> HiFiGANConfig:
    return HiFiGANConfig(**{**fields, **({"block": int(fields["block"])} if "block" in fields else {})})  # the authors write "1"


def _table(model: HiFiGAN) -> Table:
    config, table = model.config, Table()

    def entry(ours: str, theirs: str, *shape: int, outputs: int | None = None) -> None:
        table[f"{ours}.weight"] = [(f"{theirs}.weight", shape)]
        table[f"{ours}.bias"] = [(f"{theirs}.bias", (shape[0] if outputs is None else outputs,))]

    widths, count = config.widths(), len(config.block_kernels)
    entry("first", "conv_pre", widths[0], config.mels, 7)
    for stage, ((wide, to), kernel) in enumerate(zip(itertools.pairwise(widths), config.upsample_kernels, strict=True)):
        entry(f"upsample.{stage}", f"ups.{stage}", wide, to, kernel, outputs=to)
        for number, (size, dilations) in enumerate(zip(config.block_kernels, config.block_dilations, strict=True)):
            ours, theirs = f"blocks.{stage}.{number}", f"resblocks.{stage * count + number}"
            for index in range(len(dilations)):
                entry(f"{ours}.dilated.{index}", f"{theirs}.{'convs1' if config.block == 1 else 'convs'}.{index}", to, to, size)
                if config.block == 1:
                    entry(f"{ours}.plain.{index}", f"{theirs}.convs2.{index}", to, to, size)
    entry("last", "conv_post", 1, widths[-1], 7)
    return table


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights g v / |v| in the place of every pair ``weight_g``, ``weight_v``; the norm is taken over all axes but the first."""
    folded = {key: value for key, value in state.items() if not key.endswith(("weight_g", "weight_v"))}
    for key, scale in state.items():
        direction = state.get(f"{key[:-1]}v")
        if key.endswith("weight_g") and direction is not None:
            norm = direction.flatten(1).norm(dim=1).reshape(scale.shape)
            folded[key.removesuffix("_g")] = scale * direction / norm
    return folded


def unfold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' pairs again: the inverse of `fold_weight_norm`, with directions as long as the weights."""
    pairs: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".weight"):
            pairs[f"{key}_g"] = value.flatten(1).norm(dim=1).reshape(-1, *[1] * (value.ndim - 1))
            pairs[f"{key}_v"] = value
        else:
            pairs[key] = value
    return pairs


def published_config(weights: str | Path) -> dict[str, Any]:
    """What the config.json beside the authors' file says; nothing where there is none."""
    settings = Path(weights).parent / "config.json"
    try:
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "upsample_rates" in found else {}


def published_spectrogram(settings: Mapping[str, Any]) -> dict[str, float]:
    """What the authors' keywords say of the mel spectrogram that the generator reads, by the names of `MelConfig`; of the rest nothing is known."""
    return {ours: settings[theirs] for theirs, ours in _SPECTROGRAM.items() if isinstance(settings.get(theirs), (int, float))}


VOCODER = Adapter(
    system=System(
        name="hifigan",
        title="mel spectrogram to waveform; version 1 is the default",
        paper="Kong, Kim, Bae: HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis, NeurIPS 2020",
        parameters=13_926_017,
        repository="github.com/jik876/hifi-gan",
        licence="MIT",
    ),
    config=_config,
    build=lambda config, official: HiFiGAN(config),
    table=_table,
    model=HiFiGAN,
    keywords=_KEYWORDS,
    ignored=_OTHERS,
)
