"""TIGER's keys: where each tensor of ours stands in the authors' state dict.

A tensor of ours holds the values of one or several official tensors, one after the other: twelve query, key and value convolutions are one
matrix, forty band layers one batch of layers.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from foveal.audio.models.tiger import CINEMATIC_BANDS, TIGER, TIGERCinematic, TIGERConfig
from foveal.core.errors import UserError
from foveal.core.systems import Adapter, System

_PAPER = "Xu, Li, Chen, Hu: TIGER: Time-frequency Interleaved Gain Extraction and Reconstruction for Efficient Speech Separation, ICLR 2025"
_LICENCE = "MIT (the repository's README badge says Apache-2.0)"

_KEYWORDS = {
    "out_channels": "channels",
    "in_channels": "hidden_channels",
    "num_blocks": "blocks",
    "upsampling_depth": "scales",
    "att_n_head": "heads",
    "att_hid_chan": "head_channels",
    "win": "window",
    "stride": "hop",
    "num_sources": "sources",
    "sample_rate": "sample_rate",
}
_IGNORED = ("att_kernel_size", "att_stride")

#: key of ours -> the official entries whose values it holds, in order: (official key, official shape)
Table = dict[str, list[tuple[str, tuple[int, ...]]]]


def _table_of_one(config: TIGERConfig) -> Table:
    """Where every parameter of `TIGER` stands in the authors' state dict."""
    table: Table = {}

    def entry(ours: str, *official: tuple[str, tuple[int, ...]]) -> None:
        table[ours] = list(official)

    channels, hidden, sources = config.channels, config.hidden_channels, config.sources
    first = 0
    for group, (bands, width) in enumerate(config.band_groups):
        indices = range(first, first + bands)
        entry(f"band_split.{group}.norm_weight", *((f"BN.{i}.0.weight", (2 * width,)) for i in indices))
        entry(f"band_split.{group}.norm_bias", *((f"BN.{i}.0.bias", (2 * width,)) for i in indices))
        entry(f"band_split.{group}.weight", *((f"BN.{i}.1.weight", (channels, 2 * width, 1)) for i in indices))
        entry(f"band_split.{group}.bias", *((f"BN.{i}.1.bias", (channels,)) for i in indices))
        outputs = 4 * sources * width
        entry(f"mask.{group}.slope", *((f"mask.{i}.0.weight", (1,)) for i in indices))
        entry(f"mask.{group}.weight", *((f"mask.{i}.1.weight", (outputs, channels // sources, 1)) for i in indices))
        entry(f"mask.{group}.bias", *((f"mask.{i}.1.bias", (outputs,)) for i in indices))
        first += bands

    entry("separator.blend_weight", ("separator.concat_block.0.weight", (channels, 1, 1, 1)))
    entry("separator.blend_bias", ("separator.concat_block.0.bias", (channels,)))
    entry("separator.blend_slope", ("separator.concat_block.1.weight", (1,)))

    for path, official_path in (("frequency", "freq_path"), ("frame", "frame_path")):
        msa, official = f"separator.{path}.msa", f"separator.{official_path}.0"

        def norm(ours: str, theirs: str, size: int) -> None:
            entry(f"{ours}.weight", (f"{theirs}.weight", (size,)))
            entry(f"{ours}.bias", (f"{theirs}.bias", (size,)))

        entry(f"{msa}.expand.weight", (f"{official}.proj_1x1.conv.weight", (hidden, channels, 1)))
        entry(f"{msa}.expand.bias", (f"{official}.proj_1x1.conv.bias", (hidden,)))
        norm(f"{msa}.expand_norm", f"{official}.proj_1x1.norm", hidden)
        entry(f"{msa}.expand_norm.slope", (f"{official}.proj_1x1.act.weight", (1,)))
        for scale in range(config.scales):
            entry(f"{msa}.downsample.{scale}.taps", (f"{official}.spp_dw.{scale}.conv.weight", (hidden, 1, 5)))
            entry(f"{msa}.downsample.{scale}.bias", (f"{official}.spp_dw.{scale}.conv.bias", (hidden,)))
            entry(f"{msa}.downsample.{scale}.norm_weight", (f"{official}.spp_dw.{scale}.norm.weight", (hidden,)))
            entry(f"{msa}.downsample.{scale}.norm_bias", (f"{official}.spp_dw.{scale}.norm.bias", (hidden,)))
        for layer in ("expand", "project"):
            theirs = f"{official}.globalatt.{'fc1' if layer == 'expand' else 'fc2'}"
            entry(f"{msa}.context.{layer}.weight", (f"{theirs}.conv.weight", (hidden, hidden, 1)))
            norm(f"{msa}.context.{layer}_norm", f"{theirs}.norm", hidden)
        entry(f"{msa}.context.depthwise.weight", (f"{official}.globalatt.dwconv.weight", (hidden, 1, 5)))
        entry(f"{msa}.context.depthwise.bias", (f"{official}.globalatt.dwconv.bias", (hidden,)))
        for ours, theirs, count, size in (("inject", "loc_glo_fus", config.scales, 1), ("merge", "last_layer", config.scales - 1, 5)):
            for index in range(count):
                parts = [f"{official}.{theirs}.{index}.{part}" for part in ("local_embedding", "global_act", "global_embedding")]
                entry(f"{msa}.{ours}.{index}.taps", *((f"{part}.conv.weight", (hidden, 1, size)) for part in parts))
                entry(f"{msa}.{ours}.{index}.norm_weight", *((f"{part}.norm.weight", (hidden,)) for part in parts))
                entry(f"{msa}.{ours}.{index}.norm_bias", *((f"{part}.norm.bias", (hidden,)) for part in parts))
        entry(f"{msa}.project.weight", (f"{official}.res_conv.weight", (channels, hidden, 1)))
        entry(f"{msa}.project.bias", (f"{official}.res_conv.bias", (channels,)))

        attention, official = f"separator.{path}.attention", f"separator.{official_path}.1"
        heads = [
            (f"{official}.{part}.{head}", size)
            for part, size in (("Queries", config.head_channels), ("Keys", config.head_channels))
            for head in range(config.heads)
        ]
        heads += [(f"{official}.Values.{head}", channels // config.heads) for head in range(config.heads)]
        for ours, layers in ((f"{attention}.qkv", heads), (f"{attention}.project", [(f"{official}.attn_concat_proj", channels)])):
            entry(f"{ours}.weight", *((f"{part}.conv.weight", (size, channels, 1, 1)) for part, size in layers))
            entry(f"{ours}.bias", *((f"{part}.conv.bias", (size,)) for part, size in layers))
            entry(f"{ours}_norm.slope", *((f"{part}.act.weight", (1,)) for part, _ in layers))
            entry(f"{ours}_norm.weight", *((f"{part}.norm.gamma", (1, size, 1, 1)) for part, size in layers))
            entry(f"{ours}_norm.bias", *((f"{part}.norm.beta", (1, size, 1, 1)) for part, size in layers))
        entry(f"separator.{path}.norm.weight", (f"separator.{official_path}.2.gamma", (1, channels, 1, 1)))
        entry(f"separator.{path}.norm.bias", (f"separator.{official_path}.2.beta", (1, channels, 1, 1)))
    return table


def _table(model: TIGER | TIGERCinematic) -> Table:
    if model.config.compression is not None:
        raise UserError("expected a model of the paper's layout; this one reads a compressed spectrum, for which the authors' code has no place")
    if isinstance(model, TIGER):
        return _table_of_one(model.config)
    return {
        f"branches.{track}.{ours}": [(f"{track}.{key}", shape) for key, shape in entries]
        for track in TIGERCinematic.TRACKS
        for ours, entries in _table_of_one(model.config).items()
    }


def _build_cinematic(config: TIGERConfig, official: Mapping[str, Tensor] | None) -> TIGER | TIGERCinematic:
    """The whole model, or the one branch whose keys come without a branch's prefix."""
    one = official is not None and not any(key.startswith(f"{TIGERCinematic.TRACKS[0]}.") for key in official)
    return TIGER(config) if one else TIGERCinematic(config)


def _restored_cinematic(config: TIGERConfig, state: Mapping[str, Tensor]) -> TIGER | TIGERCinematic:
    """As `_build_cinematic`, of our keys."""
    return TIGERCinematic(config) if any(key.startswith("branches.") for key in state) else TIGER(config)


SPEECH = Adapter(
    system=System(
        name="tiger",
        title="two speakers at 16 kHz; num_blocks 8 is the large model, 4 the small",
        paper=_PAPER,
        parameters=821_932,
        repository="github.com/JusperLee/TIGER",
        licence=_LICENCE,
    ),
    config=TIGERConfig,
    build=lambda config, official: TIGER(config),
    table=_table,
    model=TIGER,
    keywords=_KEYWORDS,
    ignored=_IGNORED,
)

CINEMATIC = Adapter(
    system=System(
        name="tiger_dnr",
        title="dialogue, effects and music at 44.1 kHz; three branches",
        paper=_PAPER,
        parameters=4_221_846,
        repository="github.com/JusperLee/TIGER",
        licence=_LICENCE,
    ),
    config=TIGERConfig,
    build=_build_cinematic,
    table=_table,
    model=(TIGER, TIGERCinematic),
    keywords=_KEYWORDS,
    defaults={"window": 2048, "hop": 512, "channels": 132, "sources": 3, "sample_rate": 44_100, "bands": CINEMATIC_BANDS},
    ignored=_IGNORED,
    restored=_restored_cinematic,
)
