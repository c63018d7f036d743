"""The authors' published checkpoints and ours, both ways: one file a system says how, this one offers it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.audio.checkpoints import hifigan, mambattention, tiger, transformer_tts, vocos
from foveal.core.errors import UserError
from foveal.core.official import Conversion, read_official, state_dict_of
from foveal.core.systems import PublishedSystems, System, hub_folder

_LAYOUTS = {"espnet": transformer_tts.SPEECH, "soobinseo": transformer_tts.CONCATENATING}


class _Systems(PublishedSystems):
    """Those of this domain; HiFi-GAN's authors publish weights with their normalisation, which ours have folded in.

    Transformer TTS has two layouts: ``layout="soobinseo"`` among the keywords of ``transformer_tts`` asks for the other.
    """

    def load_official(
        self, system: str, source: str | Path | Mapping[str, Tensor], keywords: Mapping[str, Any] | None = None
    ) -> tuple[nn.Module, Conversion]:
        system, keywords = _of_layout(system, keywords)
        if system == hifigan.VOCODER.system.name:
            if not isinstance(source, Mapping):
                file, published = _published(source)
                source, keywords = state_dict_of(read_official(file)), {**published, **keywords}
            source = hifigan.fold_weight_norm(source)
        return super().load_official(system, source, keywords)

    def convert(
        self, system: str, source: str | Path, target: str | Path, back: bool = False, keywords: Mapping[str, Any] | None = None
    ) -> Conversion:
        system, keywords = _of_layout(system, keywords)
        return super().convert(system, source, target, back, keywords)

    def header(self, system: str, source: str | Path, keywords: Mapping[str, Any]) -> dict[str, str]:
        if system != hifigan.VOCODER.system.name:
            return {}
        said = hifigan.published_spectrogram({**_published(source)[1], **keywords})
        return {"spectrogram": json.dumps(said)} if said else {}

    def to_official(self, system: str, model: nn.Module) -> Conversion:
        conversion = super().to_official(system, model)
        return replace(conversion, state=hifigan.unfold_weight_norm(conversion.state)) if system == hifigan.VOCODER.system.name else conversion


def _published(source: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """HiFi-GAN's file of weights, and what the config.json beside it says."""
    return hub_folder(source) if Path(source).is_dir() else (source, hifigan.published_config(source))


def _of_layout(system: str, keywords: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The system that a layout among the keywords asks for, and the other keywords."""
    others = dict(keywords or {})
    if system == transformer_tts.SPEECH.system.name and "layout" in others:
        layout = others.pop("layout")
        if layout not in _LAYOUTS:
            raise UserError(f"expected a layout of {system} ({', '.join(_LAYOUTS)}); got {layout!r}")
        system = _LAYOUTS[layout].system.name
    return system, others


_PUBLISHED = _Systems("audio", tiger.SPEECH, tiger.CINEMATIC, mambattention.MAMBATTENTION, *_LAYOUTS.values(), hifigan.VOCODER, vocos.VOCODER)


def systems() -> tuple[System, ...]:
    """The published systems of this domain, with paper, parameter count and licence of the original."""
    return _PUBLISHED.list()


def load_official(system: str, source: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Our model with the authors' weights, in eval mode.

    Args:
        system: "tiger", "tiger_dnr", "mambattention", "transformer_tts" (``layout="soobinseo"`` asks for that form), "hifigan" or "vocos"; `systems`
            lists them. For "tiger_dnr", a state dict without the prefixes ``dialog.``, ``effect.`` and ``music.`` gives one branch, a `TIGER`
            with three sources.
        source: the authors' file, a folder with their ``config.json`` and weights, or a state dict with their keys. float64 tensors give a
            float64 model.
        **config: the authors' keyword names (``out_channels``, ``num_blocks``, ``win``, ...); the published large configuration is the default.

    Raises:
        UserError: unknown system or keyword, an unreadable file, or keys that are missing, left over or misshapen.
    """
    return _PUBLISHED.load_official(system, source, config)[0]


def to_official(system: str, model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict of our model: the inverse of `load_official`.

    Raises:
        UserError: unknown system, or a model of another one.
    """
    return _PUBLISHED.to_official(system, model).state


def convert_file(system: str, source: str | Path, target: str | Path, back: bool = False, **config: Any) -> Conversion:
    """Convert the authors' checkpoint file to ours, or with `back` ours to theirs; the account of every key is returned.

    `config` is as in `load_official`; with `back` the file of ours holds its own.

    Raises:
        UserError: as `load_official`; or a target that cannot be written.
    """
    return _PUBLISHED.convert(system, source, target, back, config)


def model_from_weights(path: str | Path, system: str = "tiger") -> nn.Module:
    """The model that a file of ours holds, in float32 and eval mode.

    Raises:
        UserError: the file is missing, corrupt, of another program or system, or its weights do not fit its config.
    """
    return _PUBLISHED.from_weights(path, system)
