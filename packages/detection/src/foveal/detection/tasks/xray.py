"""Learning to find prohibited items with SDANet: the authors' recipe, and COCO's AP of boxes and masks on every split.

Their recipe: SGD at 0.02 with momentum 0.9 and weight decay 1e-4, gradients cut at a norm of 35, 12 epochs with a tenth of the rate after the 8th and
the 11th, a warm-up of 500 steps from a third, ResNet-101 pretrained on ImageNet with its first stage frozen.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from foveal.core.checkpoint import load_weights, start_from
from foveal.core.errors import UserError
from foveal.core.processes import of_every_process, once
from foveal.detection.data.xray import XRayBatch, XRayData
from foveal.detection.masks import encoded
from foveal.detection.metrics import average_precision
from foveal.detection.models.sdanet import Detected, SDANet, SDANetConfig, paste
from foveal.detection.models.sdanet_loss import losses

#: What the keys of those parts begin with whose shape depends on the number of classes.
_OF_CLASSES = tuple(f"boxes.{stage}.score." for stage in range(3)) + tuple(f"masks.{stage}.10." for stage in range(3))


_picture = itemgetter("image_id")


class XRayTask(pl.LightningModule):
    """Trains and measures an `SDANet`.

    Logged: ``train/loss`` and its parts; ``val/AP`` (boxes) and ``val/mask_AP``; in a test the same of every split and their mean ("overall").

    Args:
        config: of the network.
        weights: file of ours to start from or to measure, such as ``convert sdanet`` writes; parts that depend on the number of classes are taken
            over where it is the same.
        backbone: file with a state dict of torchvision's ResNet to start from, such as one pretrained on ImageNet; None starts at random.
        frozen_stages: of the ResNet that keep their weights: 1 is the stem and the first stage; 0 trains all.
        learning_rate: highest.
        momentum: of SGD.
        weight_decay: of all parameters.
        steps: epochs after which the rate falls to a tenth.
        warmup_steps: from a third of the rate.

    Raises:
        UserError: weights or a backbone that cannot be read or do not fit.
    """

    def __init__(
        self,
        config: SDANetConfig = SDANetConfig(),  # noqa: B008  (frozen)
        weights: str | None = None,
        backbone: str | None = None,
        frozen_stages: int = 0,
        learning_rate: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        steps: tuple[int, ...] = (8, 11),
        warmup_steps: int = 500,
    ) -> None:
        super().__init__()
        self.network = SDANet(config)
        if backbone is not None:
            self._start_from(backbone)
        if weights is not None:
            convention = load_weights(weights, "sdanet").config.get("convention")
            if convention != config.convention:
                raise UserError(f"expected model.config.convention and data.convention {convention}, as {weights} has it; got {config.convention}")
            start_from(self.network, weights, "sdanet", heads=_OF_CLASSES)
        for name, parameter in self.network.backbone.body.named_parameters():
            stage = 1 if name.startswith(("conv1", "bn1")) else int(name[5]) if name.startswith("layer") else 9
            parameter.requires_grad_(stage > frozen_stages)
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.steps, self.warmup_steps = tuple(steps), warmup_steps
        self._boxes: dict[int, list[dict[str, Any]]] = {}
        self._masks: dict[int, list[dict[str, Any]]] = {}

    def setup(self, stage: str) -> None:
        """The heads must have the data's classes, and pictures be prepared as boxes are counted."""
        data, config = self._data, self.network.config
        if data.convention != config.convention:
            raise UserError(f"expected data.convention {config.convention}, as the network's; got {data.convention}")
        for name, scenes in data.scenes("train" if stage == "fit" else "validate" if stage == "validate" else "test").items():
            if len(scenes.categories) != config.classes:
                raise UserError(f"expected model.config.classes {len(scenes.categories)}, as the pictures of {name} have; got {config.classes}")

    def _start_from(self, file: str) -> None:
        if not Path(file).is_file():
            raise UserError(f"expected a state dict of torchvision's ResNet at {file}; there is none; check the path, or leave it out")
        state = torch.load(file, map_location="cpu", weights_only=True)
        body = self.network.backbone.body
        missing = body.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")}, strict=False)[0]
        if missing:
            raise UserError(f"expected the weights of this ResNet in {file}; {len(missing)} are missing, {missing[0]} first; take the same depth")

    def forward(self, images: Tensor) -> Any:
        """What is in pictures, see `SDANet.detect`."""
        return self.network(images)

    def training_step(self, batch: XRayBatch, index: int) -> Tensor:
        """The sum of all parts."""
        parts = losses(self.network, batch.images, batch.objects, batch.sizes)
        total = torch.stack(list(parts.values())).sum()
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch.sizes))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(batch.sizes))
        return total

    def _measure(self, batch: XRayBatch, split: int) -> None:
        categories = list(self._data.measured.values())[split].categories
        for found, number, size, original in zip(
            self.network.detect(batch.images, batch.sizes), batch.numbers, batch.sizes, batch.originals, strict=True
        ):
            ratio = found.boxes.new_tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
            boxes = self.network.convention.edges(found.boxes) * ratio
            covered = paste(found.masks, boxes, original).cpu().numpy()
            for box, score, label, mask in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), covered, strict=True):
                entry = {"image_id": number, "category_id": categories[label], "score": score}
                self._boxes.setdefault(split, []).append({**entry, "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})
                self._masks.setdefault(split, []).append({**entry, "segmentation": encoded(mask)})

    @property
    def _data(self) -> XRayData:
        data: XRayData = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def validation_step(self, batch: XRayBatch, index: int, dataloader_idx: int = 0) -> None:
        """Collect what is found."""
        self._measure(batch, dataloader_idx)

    test_step = validation_step

    def predict_step(self, batch: XRayBatch, index: int, dataloader_idx: int = 0) -> list[Detected]:
        """What is found in each picture, in the pixels that the network saw."""
        return self.network.detect(batch.images, batch.sizes)

    def _figures(self, stage: str) -> None:
        figures: dict[str, list[float]] = {"AP": [], "mask_AP": []}
        shares = of_every_process(self.trainer, (self._boxes, self._masks))
        for place, (split, scenes) in enumerate(self._data.measured.items()):
            truth = scenes.truth
            measured = {
                "AP": average_precision(truth, once([boxes.get(place, []) for boxes, _ in shares], _picture))[0],
                "mask_AP": average_precision(truth, once([masks.get(place, []) for _, masks in shares], _picture), "segm")[0],
            }
            for name, value in measured.items():
                figures[name].append(value["AP"])
                if stage == "test":
                    self.log(f"test/{split}/{name}", value["AP"])
                    self.log(f"test/{split}/{name}50", value["AP50"])
        for name, values in figures.items():
            self.log(f"{stage}/{name}", sum(values) / len(values), prog_bar=True)
        self._boxes, self._masks = {}, {}

    def on_validation_epoch_end(self) -> None:
        """Log AP of boxes and masks."""
        self._figures("val")

    def on_test_epoch_end(self) -> None:
        """Log AP of every split, and the mean over them that the paper calls overall."""
        self._figures("test")

    def configure_optimizers(self) -> Any:
        """SGD, its warm-up and its steps."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, self.learning_rate, self.momentum, weight_decay=self.weight_decay)
        epoch_steps = max(int(self.trainer.estimated_stepping_batches) // max(self.trainer.max_epochs or 1, 1), 1)

        def share(step: int) -> float:
            warm = 1 / 3 + 2 / 3 * min(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
            return warm * 0.1 ** sum(step >= epoch * epoch_steps for epoch in self.steps)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, share), "interval": "step"}}
