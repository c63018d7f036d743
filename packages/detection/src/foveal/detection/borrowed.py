"""What is ultralytics' own and used as it is: reading and augmenting labelled pictures, and the losses of YOLO heads.

It is imported here alone, after it has been told to stay off the network, not to install packages by itself, and not to print.
"""

from __future__ import annotations

import os

for _name, _value in {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}.items():
    os.environ.setdefault(_name, _value)

from ultralytics.cfg import DEFAULT_CFG_DICT  # noqa: E402
from ultralytics.data.dataset import YOLODataset  # noqa: E402
from ultralytics.utils import IterableSimpleNamespace  # noqa: E402
from ultralytics.utils.loss import v8DetectionLoss, v8OBBLoss, v8PoseLoss, v8SegmentationLoss  # noqa: E402

__all__ = [
    "DEFAULT_CFG_DICT",
    "IterableSimpleNamespace",
    "YOLODataset",
    "v8DetectionLoss",
    "v8OBBLoss",
    "v8PoseLoss",
    "v8SegmentationLoss",
]
