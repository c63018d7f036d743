"""The authors' published checkpoints and ours, both ways: one file a system says how, this one offers it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.core.official import Conversion
from foveal.core.systems import PublishedSystems, System
from foveal.detection.checkpoints import yolov13

_PUBLISHED = PublishedSystems("detection", yolov13.YOLOV13)


def systems() -> tuple[System, ...]:
    """The published systems of this domain, with paper, parameter count and licence of the original."""
    return _PUBLISHED.list()


def load_official(system: str, source: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Our model with the authors' weights, in eval mode.

    Args:
        system: "yolov13".
        source: the authors' file, or a state dict with their keys. float64 tensors give a float64 model.
        **config: ``scale`` ("n", "s", "l", "x") and ``nc``, the number of classes; by default what the weights themselves say.

    Raises:
        UserError: unknown system or keyword, an unreadable file, or keys that are missing, left over or misshapen.
    """
    if system == "yolov13" and isinstance(source, Mapping):
        config = {**yolov13.sizes_of(source), **config}
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
