"""The losses of YOLO heads: ultralytics' own, given what our networks say.

Task-aligned assignment (10 best cells a box, score^0.5 * CIoU^6), binary cross entropy of the classes, CIoU and the distribution's cross entropy
of the boxes; of masks, keypoints and angles what ultralytics has for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foveal.detection.borrowed import DEFAULT_CFG_DICT, v8DetectionLoss, v8OBBLoss, v8PoseLoss, v8SegmentationLoss
from foveal.detection.models.heads import BINS, STRIDES, RawPrediction
from foveal.detection.models.yolov13 import YOLOv13Config

_LOSSES = {"detect": v8DetectionLoss, "segment": v8SegmentationLoss, "pose": v8PoseLoss, "oriented": v8OBBLoss}
_EXTRA = {"segment": "mask_coefficient", "pose": "kpts", "oriented": "angle"}


class _AsUltralyticsSeesIt:
    """What ultralytics' losses read of a network: its device, its gains and the sizes of its head."""

    def __init__(self, config: YOLOv13Config, gains: Mapping[str, float], device: torch.device) -> None:
        self._device = device
        self.args = SimpleNamespace(**{**DEFAULT_CFG_DICT, **gains})
        head = SimpleNamespace(nc=config.classes, reg_max=BINS, stride=torch.tensor(STRIDES, dtype=torch.float32, device=device))
        head.kpt_shape = list(config.keypoints)
        self.model = [head]

    def parameters(self) -> Iterator[Tensor]:
        yield torch.empty(0, device=self._device)


class DetectionLoss(nn.Module):
    """Loss of a batch.

    Args:
        config: of the network.
        box: gain of the boxes' CIoU (and of the masks).
        cls: gain of the classes.
        dfl: gain of the distances' distributions.
        pose: gain of keypoints.
        kobj: gain of their visibility.
        angle: gain of angles.
    """

    def __init__(
        self, config: YOLOv13Config, box: float = 7.5, cls: float = 0.5, dfl: float = 1.5, pose: float = 12.0, kobj: float = 1.0, angle: float = 1.0
    ) -> None:
        super().__init__()
        self.config = config
        self.gains = {"box": box, "cls": cls, "dfl": dfl, "pose": pose, "kobj": kobj, "angle": angle}
        self._made: tuple[torch.device, Any] | None = None

    def criterion(self, device: torch.device) -> Any:
        """Ultralytics' loss on this device, with its assigner."""
        if self._made is None or self._made[0] != device:
            seen: Any = _AsUltralyticsSeesIt(self.config, self.gains, device)
            made = _LOSSES[self.config.task](seen)
            # Later ultralytics widens boxes smaller than 16 pixels before it looks for cells inside them; the authors' does not.
            made.assigner.stride_val = 0
            self._made = (device, made)
        return self._made[1]

    def forward(self, raw: RawPrediction, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, times the number of pictures as the authors have it, and its parts by name, of one picture.

        Args:
            raw: what the network says.
            batch: batch_idx, cls and bboxes (centre and size, as shares of the picture), and masks or keypoints by task.
        """
        maps = [level.float() for level in raw.maps]
        boxes, scores = torch.cat([level.flatten(2) for level in maps], 2).split((4 * BINS, self.config.classes), 1)
        said: dict[str, Any] = {"boxes": boxes, "scores": scores, "feats": maps}
        if raw.extra is not None:
            said[_EXTRA[self.config.task]] = raw.extra.float()
        if raw.prototypes is not None:
            said["proto"] = raw.prototypes.float()
        with torch.autocast(boxes.device.type, enabled=False):
            loss, parts = self.criterion(boxes.device)(said, batch)
        return loss.sum(), parts
