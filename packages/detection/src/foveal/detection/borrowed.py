"""What is ultralytics' own and used as it is: reading and augmenting labelled pictures, the losses of YOLO heads,
the smallest turned boxes around outlines, its model builder and its form of answers.

It is imported here alone, after it has been told to stay off the network, not to install packages by itself, and not to print.
"""

from __future__ import annotations

import os

from PIL import Image

_OPEN = Image.open

for _name, _value in {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}.items():
    os.environ.setdefault(_name, _value)

from ultralytics.cfg import DEFAULT_CFG_DICT  # noqa: E402
from ultralytics.data.dataset import YOLODataset  # noqa: E402
from ultralytics.engine import model as engine  # noqa: E402
from ultralytics.engine.results import Results  # noqa: E402
from ultralytics.nn import tasks  # noqa: E402
from ultralytics.nn.modules import Detect as UltralyticsDetect  # noqa: E402
from ultralytics.utils import IterableSimpleNamespace  # noqa: E402
from ultralytics.utils.loss import v8DetectionLoss, v8OBBLoss, v8PoseLoss, v8SegmentationLoss  # noqa: E402
from ultralytics.utils.ops import xyxyxyxy2xywhr  # noqa: E402

# It replaces Pillow's function for every program in the process, with one that fails differently on what is no picture.
Image.open = _OPEN

__all__ = [
    "DEFAULT_CFG_DICT",
    "IterableSimpleNamespace",
    "Results",
    "UltralyticsDetect",
    "YOLODataset",
    "engine",
    "tasks",
    "v8DetectionLoss",
    "v8OBBLoss",
    "v8PoseLoss",
    "v8SegmentationLoss",
    "xyxyxyxy2xywhr",
]
