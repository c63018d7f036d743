"""Objects in pictures and videos: YOLOv13, whose hyperedges correlate many places at once, trained, exported and applied.

>>> from foveal.detection import Detector
>>> for detections in Detector.from_pretrained()(["street.jpg"]):
...     print(detections.boxes, detections.names)

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveal.core.faces import loaded_when_asked

if TYPE_CHECKING:
    from foveal.detection.checkpoints import load_official, systems, to_official
    from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config
    from foveal.detection.predict import Detections, Detector

__all__ = ["Detections", "Detector", "YOLOv13", "YOLOv13Config", "load_official", "systems", "to_official"]

_HOME = {
    "Detections": "predict",
    "Detector": "predict",
    "YOLOv13": "models.yolov13",
    "YOLOv13Config": "models.yolov13",
    "load_official": "checkpoints",
    "systems": "checkpoints",
    "to_official": "checkpoints",
}

__getattr__, __dir__ = loaded_when_asked(__name__, _HOME)
