"""YOLOv13 for people who live in ultralytics: after ``import foveal.detection.ultralytics``, ``YOLO("yolov13n.yaml")`` is one of its models.

>>> import foveal.detection.ultralytics
>>> from ultralytics import YOLO
>>> YOLO("yolov13n.yaml").train(data="coco8.yaml", epochs=3)

Sizes n, s, l and x; boxes alone. Backbone and neck are ours, the head is ultralytics' own Detect, so that its training, validation, prediction
and exporters find what they look for. Checkpoints that ultralytics saves name our classes: import this module before loading them.

The other way round, what our own `Detector` finds, masks, keypoints and turned boxes too, becomes one of ultralytics' ``Results``:

>>> from foveal.detection import Detector
>>> from foveal.detection.ultralytics import to_results
>>> found = Detector.from_pretrained()("smear.jpg")[0]
>>> to_results(found, "smear.jpg").plot()  # or found.to_ultralytics("smear.jpg")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.detection.borrowed import UltralyticsDetect, engine, tasks
from foveal.detection.models.yolov13 import SCALES, YOLOv13, YOLOv13Config
from foveal.detection.results import to_results

__all__ = ["BackboneAndNeck", "install", "parse_model", "to_results", "yaml_model_load"]

_NAME = re.compile(r"^yolov13([nslx]?)\.ya?ml$")
_load, _parse = tasks.yaml_model_load, tasks.parse_model


class BackboneAndNeck(nn.Module):
    """A YOLOv13 without its head: maps of strides 8, 16 and 32."""

    def __init__(self, scale: str) -> None:
        super().__init__()
        self.network = YOLOv13(YOLOv13Config(scale))
        del self.network.head

    def forward(self, image: Tensor) -> list[Tensor]:
        """Picture to three maps."""
        return list(self.network.levels(image))


def yaml_model_load(path: Any) -> dict[str, Any]:
    """As ultralytics', with the names yolov13n.yaml, yolov13s.yaml, yolov13l.yaml and yolov13x.yaml; without a letter it is n."""
    found = _NAME.match(Path(path).name)
    if found is None or Path(path).is_file():
        return _load(path)
    scale = found[1] or "n"
    return {
        "nc": 80,
        "scale": scale,
        "foveal": "yolov13",
        "yaml_file": str(path),
        "backbone": [[-1, 1, "YOLOv13", [scale]]],
        "head": [[-1, 1, "Detect", ["nc"]]],
    }


def parse_model(d: dict[str, Any], ch: Any, verbose: bool = True) -> tuple[nn.Sequential, list[int]]:
    """As ultralytics', which reads lists of layers; a YOLOv13 is built from its scale."""
    if d.get("foveal") != "yolov13":
        return _parse(d, ch, verbose)
    if int(ch if isinstance(ch, int) else ch[0]) != 3:
        raise ValueError(f"YOLOv13 takes pictures of 3 channels; got {ch}")
    scale = SCALES[d["scale"]]
    layers = nn.Sequential(BackboneAndNeck(d["scale"]), UltralyticsDetect(d["nc"], ch=tuple(scale.channels(width) for width in (256, 512, 1024))))
    for number, layer in enumerate(layers):
        described: Any = layer
        described.i, described.f, described.type = number, -1, f"{type(layer).__module__}.{type(layer).__name__}"
        described.np = sum(parameter.numel() for parameter in layer.parameters())
    return layers, []


def install() -> None:
    """Teach ultralytics the names; importing this module does it."""
    module: Any = tasks
    module.yaml_model_load, module.parse_model = yaml_model_load, parse_model
    if hasattr(engine, "yaml_model_load"):
        part: Any = engine
        part.yaml_model_load = yaml_model_load
    torch.serialization.add_safe_globals([BackboneAndNeck])


install()
