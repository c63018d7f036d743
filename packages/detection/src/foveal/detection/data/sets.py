"""Labelled pictures for training: read by `foveal.detection.data.labels`, augmented by ultralytics, in batches that resume to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader
from foveal.detection.borrowed import DEFAULT_CFG_DICT, IterableSimpleNamespace, YOLODataset
from foveal.detection.data.labels import LabelledPicture, Labels, read_labels

#: Our word for what a network finds -> ultralytics'.
TASK_NAMES = {"detect": "detect", "segment": "segment", "pose": "pose", "oriented": "obb"}
#: What the user may set, and how it stands: ultralytics' names and values.
AUGMENTATION = (
    "mosaic", "mixup", "cutmix", "copy_paste", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud",
    "fliplr", "bgr",
)  # fmt: skip


class LabelledSet(YOLODataset):
    """Pictures and their objects as ultralytics' networks are fed: dictionaries with img, cls, bboxes, batch_idx and, by task, more.

    Partners of a mosaic are drawn from the whole set, not from the pictures seen last, so that an item depends on its own seed alone.

    Args:
        labels: the set.
        task: "detect", "segment", "pose" or "oriented".
        image_size: side in pixels; of rectangular batches the longer side.
        augmentation: by ultralytics' names; None reads the pictures as they are.
        batch_size: of rectangular batches.
        rectangular: pictures of similar shape share a batch, with little padding; without mosaic.

    Raises:
        UserError: labels that lack what the task needs.
    """

    def __init__(
        self, labels: Labels, task: str, image_size: int, augmentation: Mapping[str, float] | None, batch_size: int = 16, rectangular: bool = False
    ) -> None:
        if not labels.pictures:
            raise UserError("expected at least one labelled picture; there is none; run foveal detection check-data")
        needed = {"segment": "outlines", "oriented": "outlines", "pose": "keypoints"}.get(task)
        lacking = [picture for picture in labels.pictures if needed and len(picture.classes) and not _has(getattr(picture, needed))]
        if lacking:
            raise UserError(f"expected {needed} of every object for task {task}; {lacking[0].path} has boxes alone; train with task detect")
        self._labels = labels
        data: dict[str, Any] = {"names": dict(enumerate(labels.names)), "channels": 3, "nc": len(labels.names)}
        if task == "pose":
            shown = next(picture.keypoints for picture in labels.pictures if picture.keypoints is not None)
            data["kpt_shape"], data["flip_idx"] = list(shown.shape[1:]), labels.flip
        hyperparameters = IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **(augmentation or {})})
        super().__init__(
            img_path=[str(picture.path) for picture in labels.pictures], imgsz=image_size, augment=augmentation is not None, hyp=hyperparameters,
            rect=rectangular, batch_size=batch_size, pad=0.0 if augmentation is not None else 0.5, data=data, task=TASK_NAMES[task],
        )  # fmt: skip
        self._draw_partners_from_everywhere()

    def _draw_partners_from_everywhere(self) -> None:
        self.max_buffer_length = 0
        pending = [self.transforms]
        while pending:
            part = pending.pop()
            if hasattr(part, "buffer_enabled"):
                part.buffer_enabled = False
            pending += [*getattr(part, "transforms", ()), *([part.pre_transform] if getattr(part, "pre_transform", None) is not None else [])]

    def load_image(self, i: int, rect_mode: bool = True, resize_short: bool = False) -> Any:
        """Read a picture; none is kept."""
        found = super().load_image(i, rect_mode, resize_short)
        self.ims[i] = None
        self.buffer.clear()
        return found

    def get_img_files(self, img_path: Any) -> list[str]:
        """The files of the labels."""
        return list(img_path)

    def get_labels(self) -> list[dict[str, Any]]:
        """The labels, in ultralytics' form."""
        return [self._entry(picture) for picture in self._labels.pictures]

    def close_mosaic(self, hyp: Any) -> None:
        """No mosaic and mixing from here on."""
        super().close_mosaic(hyp)
        self._draw_partners_from_everywhere()

    def _entry(self, picture: LabelledPicture) -> dict[str, Any]:
        scale = np.array(picture.size * 2, dtype=np.float64)
        centre, extent = (picture.boxes[:, :2] + picture.boxes[:, 2:]) / 2, picture.boxes[:, 2:] - picture.boxes[:, :2]
        keypoints = None
        if self.use_keypoints:
            shape = self.data["kpt_shape"]
            keypoints = np.zeros((0, *shape)) if picture.keypoints is None else picture.keypoints.copy()
            keypoints[..., :2] /= scale[:2]
        wanted = self.use_segments or self.use_obb
        return {
            "im_file": str(picture.path),
            "shape": (picture.size[1], picture.size[0]),
            "cls": picture.classes[:, None].astype(np.float32),
            "bboxes": (np.concatenate((centre, extent), 1) / scale).astype(np.float32),
            "segments": [(outline / scale[:2]).astype(np.float32) for outline in picture.outlines] if wanted else [],
            "keypoints": None if keypoints is None else keypoints.astype(np.float32),
            "normalized": True,
            "bbox_format": "xywh",
        }


def _has(values: list[np.ndarray] | np.ndarray | None) -> bool:
    return values is not None and len(values) > 0


class DetectionData(pl.LightningDataModule):
    """A labelled set in the YOLO, COCO or Pascal VOC format.

    Args:
        source: YOLO ``data.yaml``, or a Pascal VOC folder; their parts are named by `train`, `val` and `test`.
        train: name of the part to train on; of COCO, the file itself, and so for the others.
        val: part to measure on while training.
        test: part to measure on in the end.
        images: folder of the pictures of COCO files.
        names: names of the classes of a VOC folder, in order.
        task: "detect", "segment", "pose" or "oriented".
        image_size: side in pixels, a multiple of 32.
        batch_size: pictures a step, of each process.
        augmentation: what differs from ultralytics' defaults, by its names (mosaic, mixup, copy_paste, hsv_h, scale, fliplr, ...).
        close_mosaic: last epochs that go without mosaic and mixing.
        workers: processes that read pictures.
        seed: of order and augmentation.

    Raises:
        UserError: a size that is no multiple of 32, an unknown augmentation, or data that cannot be read.
    """

    def __init__(
        self,
        source: str | None = None,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        images: str | None = None,
        names: list[str] | None = None,
        task: str = "detect",
        image_size: int = 640,
        batch_size: int = 16,
        augmentation: dict[str, float] | None = None,
        close_mosaic: int = 10,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        unknown = sorted(set(augmentation or {}) - set(AUGMENTATION))
        if unknown:
            raise UserError(f"expected augmentation among {', '.join(AUGMENTATION)}; got {', '.join(unknown)}")
        if image_size < 32 or image_size % 32:
            raise UserError(f"expected data.image_size a multiple of 32; got {image_size}")
        if task not in TASK_NAMES:
            raise UserError(f"expected data.task among {', '.join(TASK_NAMES)}; got {task!r}")
        self.source, self.parts = source, {"train": train, "val": val, "test": test}
        self.images, self.names, self.task = images, names, task
        self.image_size, self.batch_size = image_size, batch_size
        self.augmentation, self.close_mosaic = dict(augmentation or {}), close_mosaic
        self.workers, self.seed = workers, seed
        self._read: dict[str, Labels] = {}
        self._training: LabelledSet | None = None

    def labels(self, part: str) -> Labels:
        """Labels of "train", "val" or "test", read once."""
        if part not in self._read:
            named = self.parts[part]
            if self.source is None:
                self._read[part] = read_labels(named, images=self.images, names=self.names)
            else:
                self._read[part] = read_labels(self.source, named, images=self.images, names=self.names)
        return self._read[part]

    def train_dataloader(self) -> ResumableDataLoader:
        """Augmented, in an order of its own each epoch; the last, smaller batch is left out where there are others."""
        labels = self.labels("train")
        self._training = LabelledSet(labels, self.task, self.image_size, self.augmentation, self.batch_size)
        return ResumableDataLoader(
            self._training, self.batch_size, shuffle=True, seed=self.seed, drop_last=len(labels.pictures) > self.batch_size,
            collate_fn=YOLODataset.collate_fn, num_workers=self.workers,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Pictures as they are, padded to rectangles."""
        return self._plain("val")

    def test_dataloader(self) -> DataLoader:
        """As `val_dataloader`."""
        return self._plain("test")

    def predict_dataloader(self) -> DataLoader:
        """As `test_dataloader`."""
        return self._plain("test")

    def calm(self, epoch: int, epochs: int) -> None:
        """Leave mosaic and mixing out of the last epochs; called at the start of each."""
        if self._training is not None and 0 < self.close_mosaic >= epochs - epoch:
            self._training.close_mosaic(IterableSimpleNamespace(**{**DEFAULT_CFG_DICT, **self.augmentation}))

    def _plain(self, part: str) -> DataLoader:
        chosen = LabelledSet(self.labels(part), self.task, self.image_size, None, self.batch_size, rectangular=True)
        return DataLoader(chosen, batch_size=self.batch_size, shuffle=False, collate_fn=YOLODataset.collate_fn, num_workers=self.workers)
