"""The authors' published checkpoints and ours, both ways: one file a system says how, this one offers it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.errors import UserError
from foveal.core.official import Conversion, read_official, state_dict_of
from foveal.core.systems import PublishedSystems, System
from foveal.detection.checkpoints import bevanet, direct_mhp, sdanet, yolov13
from foveal.detection.checkpoints.compact import completed
from foveal.detection.checkpoints.released import Released, read_released
from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config


class _Systems(PublishedSystems):
    """Files of ours may leave out the statistics of batch norms, as `foveal.detection.checkpoints.compact` writes them."""

    def from_weights(self, path: str | Path, system: str) -> nn.Module:
        if system != "yolov13":
            return super().from_weights(path, system)
        weights = load_weights(path, system)
        try:
            model = YOLOv13(YOLOv13Config(**weights.config))
            model.load_state_dict(completed(model, weights.state))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"expected weights of {system} that fit the config in their header; those in {path} do not: {reason}") from None
        return model.eval()


_PUBLISHED = _Systems("detection", yolov13.YOLOV13, sdanet.SDANET, sdanet.SDANET_NECK, bevanet.BEVANET, direct_mhp.DIRECT_MHP)
#: Systems whose state dicts tell the sizes of their networks -> how they do.
_SIZES: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Any]]] = {
    "yolov13": yolov13.sizes_of,
    "bevanet": bevanet.sizes_of,
    "direct_mhp": direct_mhp.sizes_of,
}


def systems() -> tuple[System, ...]:
    """The published systems of this domain, with paper, parameter count and licence of the original."""
    return _PUBLISHED.list()


def load_official(system: str, source: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Our model with the authors' weights, in eval mode.

    Args:
        system: "yolov13", "sdanet", "sdanet_neck", "bevanet" or "direct_mhp".
        source: the authors' released file (``yolov13n.pt``), or a state dict with their keys. float64 tensors give a float64 model.
        **config: of "yolov13" ``scale`` ("n", "s", "l", "x") and ``nc``, the number of classes; by default what the weights themselves say.
            Of "sdanet" ``depth`` and ``classes``; the keys tell which of the two published codes wrote them. Of "bevanet" and "direct_mhp" the
            sizes by the authors' names (``planes``, ``num_classes``; ``width_multiple``, ``depth_multiple``); by default what the weights say.

    Raises:
        UserError: unknown system or keyword, an unreadable file, or keys that are missing, left over or misshapen.
    """
    return _load(system, source, config)[0]


def _load(system: str, source: str | Path | Mapping[str, Tensor], config: dict[str, Any]) -> tuple[nn.Module, Conversion, list[str]]:
    """The model, the account of every key, and the names of the classes where the file tells them."""
    if system not in _SIZES:
        return *_PUBLISHED.load_official(system, source, config), []
    if isinstance(source, Mapping):
        found = Released(dict(source))
    elif system == "bevanet":
        found = Released(state_dict_of(read_official(source)))
    else:
        found = read_released(source)
    return *_PUBLISHED.load_official(system, found.state, {**_SIZES[system](found.state), **config}), found.names


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
    if back:
        return _PUBLISHED.convert(system, source, target, back, config)
    model, conversion, names = _load(system, source, config)
    sizes: Any = model.config
    save_weights(target, model.state_dict(), system=system, config=asdict(sizes), metadata={"names": json.dumps(names)} if names else None)
    return conversion


def model_from_weights(path: str | Path, system: str = "yolov13") -> nn.Module:
    """The model that a file of ours holds, in float32 and eval mode.

    Raises:
        UserError: the file is missing, corrupt, of another program or system, or its weights do not fit its config.
    """
    return _PUBLISHED.from_weights(path, system)
