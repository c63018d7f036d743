"""The authors' published checkpoints and ours: a table of keys, both ways.

One rule serves every entry: a tensor of ours holds the values of one or several official tensors, one after the other. So twelve query, key
and value convolutions become one matrix, and forty band layers one batch of layers, without a special case.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.audio.models.tiger import CINEMATIC_BANDS, TIGER, TIGERCinematic, TIGERConfig
from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.official import Conversion, read_official, state_dict_of, to_ours
from foveal.core.official import to_official as table_to_official
from foveal.core.systems import System

_PAPER = "Xu, Li, Chen, Hu: TIGER: Time-frequency Interleaved Gain Extraction and Reconstruction for Efficient Speech Separation, ICLR 2025"
_LICENCE = "MIT (the repository's README badge says Apache-2.0)"

_SYSTEMS = (
    System("tiger", "two speakers at 16 kHz; num_blocks 8 is the large model, 4 the small", _PAPER, 821_932, "github.com/JusperLee/TIGER", _LICENCE),
    System("tiger_dnr", "dialogue, effects and music at 44.1 kHz; three branches", _PAPER, 4_221_846, "github.com/JusperLee/TIGER", _LICENCE),
)

_DNR = {"window": 2048, "hop": 512, "channels": 132, "sources": 3, "sample_rate": 44_100, "bands": CINEMATIC_BANDS}

# The authors' keyword names (left), so that whoever has their yaml or config.json can pass it.
_TIGER_KEYWORDS = {
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
_TIGER_UNUSED = ("att_kernel_size", "att_stride")  # accepted by the authors' constructor, used nowhere


def systems() -> tuple[System, ...]:
    """The published systems of this domain."""
    return _SYSTEMS


def load_official(system: str, source: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Our model with the authors' weights, in eval mode.

    Args:
        system: "tiger" or "tiger_dnr". For the latter, a state dict without the prefixes ``dialog.``, ``effect.`` and ``music.`` gives one
            branch, a `TIGER` with three sources.
        source: the authors' file, a folder with their ``config.json`` and weights, or a state dict with their keys. float64 tensors give a
            float64 model.
        **config: the authors' keyword names (``out_channels``, ``num_blocks``, ``win``, ...); the published large configuration is the default.

    Raises:
        UserError: unknown system or keyword, an unreadable file, or keys that are missing, left over or misshapen.
    """
    return _load_official(system, source, config)[0]


def to_official(system: str, model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict of our model: the inverse of `load_official`.

    Raises:
        UserError: unknown system, or a model of another one.
    """
    return _to_official(system, model).state


def convert_file(system: str, source: str | Path, target: str | Path, back: bool = False) -> Conversion:
    """Convert the authors' checkpoint file to ours, or with `back` ours to theirs; the account of every key is returned.

    Raises:
        UserError: as `load_official`; or a target that cannot be written.
    """
    _require_known(system)
    if back:
        conversion = _to_official(system, model_from_weights(source, system))
        with atomic_write(target) as temporary:
            _save_official(conversion.state, temporary)
        return conversion
    model, conversion = _load_official(system, source, {})
    save_weights(target, model.state_dict(), system=system, config=asdict(model.config))
    return conversion


def model_from_weights(path: str | Path, system: str = "tiger") -> TIGER | TIGERCinematic:
    """The model that a file of ours (`foveal.core.checkpoint.save_weights`) holds, in float32 and eval mode.

    Raises:
        UserError: the file is missing, corrupt, of another program or system, or its weights do not fit its config.
    """
    weights = load_weights(path, system)
    try:
        config = TIGERConfig(**weights.config)
        model: TIGER | TIGERCinematic = TIGER(config) if system == "tiger" else TIGERCinematic(config)
        model.load_state_dict(weights.state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"expected weights that fit their config in {path}: {str(error).splitlines()[0]}; convert or train them again") from None
    return model.eval()


def _save_official(state: dict[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        import torch

        torch.save(state, path)


def _require_known(system: str) -> None:
    names = [entry.name for entry in _SYSTEMS]
    if system not in names:
        raise UserError(f"expected a system of foveal.audio ({', '.join(names)}); got {system!r}")


def _config(system: str, keywords: Mapping[str, Any]) -> TIGERConfig:
    unknown = [name for name in keywords if name not in _TIGER_KEYWORDS and name not in _TIGER_UNUSED]
    if unknown:
        raise UserError(f"expected keywords of the authors' constructor ({', '.join(_TIGER_KEYWORDS)}); got {', '.join(unknown)}")
    given = {_TIGER_KEYWORDS[name]: value for name, value in keywords.items() if name in _TIGER_KEYWORDS}
    try:
        return TIGERConfig(**{**(_DNR if system == "tiger_dnr" else {}), **given})
    except ValueError as error:
        raise UserError(f"expected a config that makes a {system}: {error}") from None


def _load_official(system: str, source: str | Path | Mapping[str, Tensor], keywords: Mapping[str, Any]) -> tuple[TIGER | TIGERCinematic, Conversion]:
    _require_known(system)
    if isinstance(source, (str, Path)) and Path(source).is_dir():  # as published on a hub: config.json beside the weights
        folder = Path(source)
        settings = folder / "config.json"
        keywords = {**(json.loads(settings.read_text()) if settings.exists() else {}), **keywords}
        found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pth")])
        if not found:
            raise UserError(f"expected the authors' weights (.safetensors, .bin or .pth) in folder {folder}; found none; name the file")
        source = found[0]
    config = _config(system, keywords)
    official = state_dict_of(source if isinstance(source, Mapping) else read_official(source))
    whole = system == "tiger_dnr" and any(key.startswith(f"{TIGERCinematic.TRACKS[0]}.") for key in official)
    model: TIGER | TIGERCinematic = TIGERCinematic(config) if whole else TIGER(config)
    conversion = to_ours(_table(model), official, {key: value.shape for key, value in model.state_dict().items()})
    dtype = next((value.dtype for value in official.values() if value.is_floating_point()), None)
    model.to(dtype).load_state_dict(conversion.state)
    return model.eval(), conversion


def _to_official(system: str, model: nn.Module) -> Conversion:
    _require_known(system)
    if isinstance(model, (TIGER, TIGERCinematic)) and model.config.compression is not None:
        raise UserError("expected a model of the paper's layout; this one reads a compressed spectrum, for which the authors' code has no place")
    if not isinstance(model, TIGER if system == "tiger" else (TIGER, TIGERCinematic)):
        raise UserError(f"expected a model of system {system}; got {type(model).__name__}")
    return table_to_official(_table(model), model.state_dict())


def _table(model: TIGER | TIGERCinematic) -> Table:
    if isinstance(model, TIGER):
        return _tiger_table(model.config)
    return {
        f"branches.{track}.{ours}": [(f"{track}.{key}", shape) for key, shape in entries]
        for track in TIGERCinematic.TRACKS
        for ours, entries in _tiger_table(model.config).items()
    }


#: key of ours -> the official entries whose values it holds, in order: (official key, official shape)
Table = dict[str, list[tuple[str, tuple[int, ...]]]]


def _tiger_table(config: TIGERConfig) -> Table:
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
