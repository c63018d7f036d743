"""Learning the class of every pixel with BEVANet: the authors' loss and schedule, and the mean intersection over union of what was held out.

Their recipe: SGD at 0.008 with momentum 0.9 and weight decay 4e-4 on everything, falling with the power 0.9 of the steps left, 500 epochs of
Cityscapes in pieces of 1,024 pixels, twelve a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from foveal.core.checkpoint import load_weights
from foveal.core.errors import UserError
from foveal.core.official import read_official, state_dict_of
from foveal.core.tracking import log_figure
from foveal.detection.checkpoints.bevanet import BEVANET
from foveal.detection.data.segmentation import SegmentationData
from foveal.detection.models.bevanet import BEVANet, BEVANetConfig
from foveal.detection.models.bevanet_loss import IGNORED, SceneLoss, at_size
from foveal.detection.scene_pictures import compare_scenes
from foveal.detection.tasks.starting import say_start


class SegmentationTask(pl.LightningModule):
    """Trains and measures a `BEVANet`.

    Logged: ``train/loss`` and its parts; ``val/mIoU``, ``val/accuracy`` (of pixels), ``val/IoU_<class>`` and so for ``test``; the first
    picture of a validation beside its labels. A class that neither labels nor answers hold does not count in the mean.

    Args:
        config: of the network; its classes must be as many as the data's.
        weights: file to start from: ours (.safetensors), or the authors', such as those pretrained on ImageNet. Tensors of another name or
            shape keep their random start.
        optimizer: "sgd" or "adamw".
        learning_rate: first.
        momentum: of SGD.
        weight_decay: of all parameters.
        power: of the share of steps left.
        threshold: pixels whose class is given less than this are learned, see `foveal.detection.models.bevanet_loss.hard_cross_entropy`.
        kept: pixels of a batch that are learned at least.
        class_weights: of each class in the loss; None weighs all alike.

    Raises:
        UserError: weights that cannot be read, or of which less than half fits; a network without the heads of training.
    """

    def __init__(
        self,
        config: BEVANetConfig,
        weights: str | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float = 0.008,
        momentum: float = 0.9,
        weight_decay: float = 4e-4,
        power: float = 0.9,
        threshold: float = 0.9,
        kept: int = 131_072,
        class_weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        if not config.auxiliary:
            raise UserError("expected model.config.auxiliary true: training needs the heads of detail and boundary")
        self.network = BEVANet(config)
        self.weights = weights
        self.left_at_random = [] if weights is None else start_from(self.network, weights)
        self.loss = SceneLoss(threshold, kept, class_weights=class_weights)
        self.optimizer, self.learning_rate, self.momentum = optimizer, learning_rate, momentum
        self.weight_decay, self.power = weight_decay, power
        self.measured = MetricCollection({
            "pairs": MulticlassConfusionMatrix(config.classes, ignore_index=IGNORED),
            "accuracy": MulticlassAccuracy(config.classes, average="micro", ignore_index=IGNORED),
        })  # fmt: skip

    def on_fit_start(self) -> None:
        """Say what was taken over of the weights."""
        say_start(self.trainer, self.network, self.weights, self.left_at_random)

    def setup(self, stage: str) -> None:
        """The head must have the data's classes, and the loss weights for them."""
        names = self._data.kind.names
        if len(names) != self.network.config.classes:
            raise UserError(
                f"expected model.config.classes {len(names)}, as the data has ({', '.join(names[:5])}, ...); got {self.network.config.classes}"
            )
        if self.loss.weight is not None and len(self.loss.weight) != len(names):
            raise UserError(f"expected {len(names)} class weights, one a class; got {len(self.loss.weight)}")

    @property
    def _data(self) -> SegmentationData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, SegmentationData):
            raise UserError(f"expected data of class foveal.detection.data.segmentation.SegmentationData; got {type(data).__name__}")
        return data

    def forward(self, image: Tensor) -> Tensor:
        """Classes of every pixel of normalised pictures."""
        return at_size(self.network(image), (image.shape[2], image.shape[3])).argmax(1)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """The sum of all parts."""
        self._follow_schedule()
        loss, parts = self.loss(self.network.raw(batch["image"]), batch["labels"], batch["boundary"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(batch["image"]))
        return loss

    def _measure(self, batch: dict[str, Any], index: int, part: str) -> None:
        said = self(batch["image"])
        self.measured.update(said, batch["labels"])
        if index == 0:
            kind = self._data.kind
            figure = compare_scenes(batch["file"][0], batch["labels"][0].cpu().numpy(), said[0].cpu().numpy(), kind.names, kind.colours)
            log_figure(self, f"{part}/scene", figure)

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Count pixels."""
        self._measure(batch, index, "val")

    def test_step(self, batch: dict[str, Any], index: int) -> None:
        """Count pixels."""
        self._measure(batch, index, "test")

    def predict_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """Classes of every pixel."""
        classes: Tensor = self(batch["image"])
        return classes

    def _report(self, part: str) -> None:
        counted = self.measured.compute()
        self.measured.reset()
        pairs = counted["pairs"].double()
        union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
        overlap = (pairs.diagonal() / union.clamp_min(1))[union > 0]
        present = [name for name, held in zip(self._data.kind.names, (union > 0).tolist(), strict=True) if held]
        self.log(f"{part}/mIoU", overlap.mean().float() if len(overlap) else 0.0, prog_bar=True)
        self.log(f"{part}/accuracy", counted["accuracy"])
        self.log_dict({f"{part}/IoU_{name}": value.float() for name, value in zip(present, overlap, strict=True)})

    def on_validation_epoch_end(self) -> None:
        """Intersection over union."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """Intersection over union."""
        self._report("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One group; the rate falls with every step."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(self.network.parameters(), self.learning_rate, self.momentum, weight_decay=self.weight_decay)

    def _follow_schedule(self) -> None:
        """The rate of this step, from its number: asked for earlier, the number of all steps would make the data forget where a run stopped."""
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            group["lr"] = self.learning_rate * max(1 - self.global_step / total, 0.0) ** self.power


def start_from(network: BEVANet, weights: str) -> list[str]:
    """Take over every tensor that fits by name and shape; the keys that did not are given back, and keep their random start.

    Raises:
        UserError: a file that cannot be read, or of which less than half fits.
    """
    own = network.state_dict()
    if Path(weights).suffix == ".safetensors":
        given = load_weights(weights, "bevanet").state
    else:
        theirs = BEVANET.renamed(state_dict_of(read_official(weights)))
        given = {ours: theirs[sources[0][0]] for ours, sources in BEVANET.table(network).items() if sources[0][0] in theirs}
    fitting = {key: value.to(own[key].dtype) for key, value in given.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise UserError(f"expected weights of a BEVANet of this size; nothing in {weights} fits; choose another file or model.config.channels")
    # Counters of norms have one shape in every network, and a convolution here and there may fit: most of what is named must.
    if 2 * len(fitting) <= len(given):
        raise UserError(
            f"expected weights of a BEVANet of this size; of {len(given)} tensors in {weights} that have its names {len(given) - len(fitting)} do "
            "not fit; choose another file, or model.config.channels and blocks"
        )
    network.load_state_dict({**own, **fitting})
    return sorted(own.keys() - fitting.keys())
