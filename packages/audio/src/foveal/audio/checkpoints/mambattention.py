"""MambAttention's keys: where each tensor of ours stands in the authors' state dict, which is one to one."""

from __future__ import annotations

from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig
from foveal.core.errors import UserError
from foveal.core.official import Source
from foveal.core.systems import Adapter, System

_KEYWORDS = {
    "hid_feature": "channels",
    "compress_factor": "compression",
    "num_tfmamba": "blocks",
    "d_state": "state",
    "d_conv": "taps",
    "expand": "expansion",
    "beta": "largest_mask",
    "sampling_rate": "sample_rate",
    "norm_epsilon": "norm_eps",
    "n_fft": "fft",
    "win_size": "window",
    "hop_size": "hop",
}
#: Magnitude and phase in, one mask out: there is no other network.
_IGNORED = ("input_channel", "output_channel")


def _table(model: MambAttention) -> dict[str, list[Source]]:
    config = model.config
    if config.residual or config.narrowing != 2:
        raise UserError("expected a model of the paper's layout; this one is residual or narrows otherwise, for which the authors' code has no place")
    channels, inner, rank, state = config.channels, config.inner, config.step_rank, config.state
    table: dict[str, list[Source]] = {}

    def entry(ours: str, theirs: str, *shape: int, order: tuple[int, ...] | None = None) -> None:
        table[ours] = [Source(theirs, shape, order)]

    def layer(ours: str, theirs: str, *shape: int) -> None:
        """Weight, and a bias for each output."""
        entry(f"{ours}.weight", f"{theirs}.weight", *shape)
        entry(f"{ours}.bias", f"{theirs}.bias", shape[0])

    def normed(ours: str, theirs: str, *shape: int) -> None:
        for index in (0, 1):
            layer(f"{ours}.{index}", f"{theirs}.{index}", *(shape if index == 0 else shape[:1]))
        entry(f"{ours}.2.weight", f"{theirs}.2.weight", shape[0])

    def dense(ours: str, theirs: str) -> None:
        for index in range(config.dense_layers):
            normed(f"{ours}.layers.{index}", f"{theirs}.dense_block.{index}", channels, channels * (index + 1), 3, 3)

    normed("encoder.expand", "dense_encoder.dense_conv_1", channels, 2, 1, 1)
    dense("encoder.dense", "dense_encoder.dense_block")
    normed("encoder.narrow", "dense_encoder.dense_conv_2", channels, channels, 1, 3)
    for index in range(config.blocks):
        block, official = f"blocks.{index}", f"TFMambAttention.{index}"
        layer(f"{block}.attention.norm", f"{official}.attention.layernorm", channels)
        entry(f"{block}.attention.qkv.weight", f"{official}.attention.attn.in_proj_weight", 3 * channels, channels)
        entry(f"{block}.attention.qkv.bias", f"{official}.attention.attn.in_proj_bias", 3 * channels)
        layer(f"{block}.attention.project", f"{official}.attention.attn.out_proj", channels, channels)
        for axis, short in (("time", "t"), ("frequency", "f")):
            # a transposed convolution of one tap: its weight is the linear layer's, inputs first
            entry(f"{block}.{axis}.join.weight", f"{official}.{short}linear.weight", 2 * channels, channels, 1, order=(1, 0, 2))
            entry(f"{block}.{axis}.join.bias", f"{official}.{short}linear.bias", channels)
            for direction in ("forward", "backward"):
                ours = f"{block}.{axis}.{direction}s"
                theirs = f"{official}.{'time' if axis == 'time' else 'freq'}_mamba.{direction}_blocks.0"
                entry(f"{ours}.norm.weight", f"{theirs}.norm.weight", channels)
                ours, theirs = f"{ours}.mamba", f"{theirs}.mixer"
                entry(f"{ours}.expand.weight", f"{theirs}.in_proj.weight", 2 * inner, channels)
                entry(f"{ours}.taps", f"{theirs}.conv1d.weight", inner, 1, config.taps)
                entry(f"{ours}.taps_bias", f"{theirs}.conv1d.bias", inner)
                entry(f"{ours}.select.weight", f"{theirs}.x_proj.weight", rank + 2 * state, inner)
                layer(f"{ours}.step", f"{theirs}.dt_proj", inner, rank)
                entry(f"{ours}.log_rate", f"{theirs}.A_log", inner, state)
                entry(f"{ours}.skip", f"{theirs}.D", inner)
                entry(f"{ours}.project.weight", f"{theirs}.out_proj.weight", channels, inner)
    dense("mask_decoder.dense", "mask_decoder.dense_block")
    layer("mask_decoder.widen", "mask_decoder.mask_conv.0", channels, channels, 1, 3)
    layer("mask_decoder.reduce.0", "mask_decoder.mask_conv.1", 1, channels, 1, 1)
    layer("mask_decoder.reduce.1", "mask_decoder.mask_conv.2", 1)
    entry("mask_decoder.reduce.2.weight", "mask_decoder.mask_conv.3.weight", 1)
    layer("mask_decoder.last", "mask_decoder.mask_conv.4", 1, 1, 1, 1)
    entry("mask_decoder.steepness", "mask_decoder.lsigmoid.slope", config.bins, 1)
    dense("phase_decoder.dense", "phase_decoder.dense_block")
    normed("phase_decoder.widen", "phase_decoder.phase_conv", channels, channels, 1, 3)
    for part in ("weight", "bias"):
        shape = (1, channels, 1, 1) if part == "weight" else (1,)
        table[f"phase_decoder.parts.{part}"] = [Source(f"phase_decoder.phase_conv_{letter}.{part}", shape) for letter in ("r", "i")]
    return table


MAMBATTENTION = Adapter(
    system=System(
        name="mambattention",
        title="speech enhancement at 16 kHz",
        paper=(
            "Kühne, Jensen, Østergaard, Tan: MambAttention: Mamba with Multi-Head Attention for Generalizable Single-Channel Speech Enhancement, 2025"
        ),
        parameters=2_325_841,
        repository="github.com/NikolaiKyhne/MambAttention",
        licence="MIT",
    ),
    config=MambAttentionConfig,
    build=lambda config, official: MambAttention(config),
    table=_table,
    model=MambAttention,
    keywords=_KEYWORDS,
    ignored=_IGNORED,
)
