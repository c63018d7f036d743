"""Trained networks out of a run's checkpoint: ``python -m foveal.detection.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

The run's config.yaml, which lies beside the checkpoints folder, says what the network is, the size it was trained at and where its classes' names
are read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.core.exporting import export_command, read_run
from foveal.detection.checkpoints.compact import compact
from foveal.detection.data.labels import read_labels
from foveal.detection.data.scenes import scene_folder
from foveal.detection.models.bevanet import BEVANet, BEVANetConfig
from foveal.detection.models.direct_mhp import DirectMHP, DirectMHPConfig
from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config


class _Trained(NamedTuple):
    """What a file of weights holds."""

    system: str
    config: Any
    state: Mapping[str, Tensor]
    metadata: dict[str, str]


def _detector(config: dict[str, Any], data: dict[str, Any], state: dict[str, Tensor]) -> _Trained:
    labels = read_labels(data["source"] or data["train"], data["train"], images=data.get("images"), names=data.get("names"))
    network = YOLOv13(YOLOv13Config(**config))
    network.load_state_dict(state)
    return _Trained("yolov13", network.config, compact(network), {"names": json.dumps(labels.names), "image_size": str(data["image_size"])})


def _segmenter(config: dict[str, Any], data: dict[str, Any], state: dict[str, Tensor]) -> _Trained:
    """Without the heads that only training needs."""
    kind = scene_folder(data["source"], data["layout"], data["names"])
    network = BEVANet(replace(BEVANetConfig(**config), auxiliary=False))
    own = network.state_dict()
    network.load_state_dict({key: value for key, value in state.items() if key in own})
    return _Trained("bevanet", network.config, network.state_dict(), {"names": json.dumps(kind.names), "colours": json.dumps(kind.colours)})


def _head_poser(config: dict[str, Any], data: dict[str, Any], state: dict[str, Tensor]) -> _Trained:
    network = DirectMHP(DirectMHPConfig(**config))
    network.load_state_dict(state)
    learned_from = "labelled pictures" if data.get("source") else "drawn heads"
    return _Trained("direct_mhp", network.config, network.state_dict(), {"image_size": str(data["image_size"]), "learned_from": learned_from})


_KINDS: dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Tensor]], _Trained]] = {
    "DetectionTask": _detector,
    "SegmentationTask": _segmenter,
    "HeadPoseTask": _head_poser,
}


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a checkpoint as safetensors: the running mean of its weights, where the run kept one.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another network.
    """
    run = read_run(checkpoint)
    if run.task not in _KINDS:
        raise UserError(f"expected a run of {', '.join(_KINDS)}; {run.folder} is one of {run.task}, whose weights are used from its checkpoint")
    trained = _KINDS[run.task](run.settings["model"]["init_args"]["config"], run.settings["data"]["init_args"], run.weights)
    metadata = {**trained.metadata, "steps": str(run.steps)}
    return save_weights(target, trained.state, system=trained.system, config=trained.config, card=card, dtype=dtype, metadata=metadata)


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained network of a run as safetensors, in half precision."))
