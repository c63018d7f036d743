"""Learning to find objects: the loss of a step, the authors' optimiser and schedule, and COCO's average precision on what was held out.

The recipe of YOLOv8 to YOLOv13: SGD at 0.01 with Nesterov momentum 0.937, weight decay 5e-4 on all but biases and norms, a warm-up of three
epochs in which the biases' rate falls and the others' rises, then a straight line to a hundredth. Small sets learn better with AdamW.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from foveal.core.checkpoint import load_weights
from foveal.core.errors import UserError
from foveal.core.muon import Muon
from foveal.core.processes import of_every_process, once
from foveal.detection.checkpoints.compact import completed
from foveal.detection.data.labels import Labels
from foveal.detection.data.sets import DetectionData
from foveal.detection.losses import DetectionLoss
from foveal.detection.metrics import Kind, average_precision, coco_ground_truth, coco_keypoints, coco_masks, coco_oriented, coco_predictions
from foveal.detection.models.heads import Prediction
from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config
from foveal.detection.postprocess import Found, back_to_picture, masks_in_picture, suppress, turned_in_picture
from foveal.detection.tasks.starting import say_start

#: What a network of a task finds besides boxes.
FURTHER: dict[str, Kind] = {"segment": "segm", "pose": "keypoints", "oriented": "oriented"}
#: What each is measured by, and how that is called in the log.
MEASURED: dict[Kind, dict[Kind, str]] = {
    "bbox": {"bbox": ""},
    "segm": {"segm": "mask_"},
    "keypoints": {"keypoints": "keypoint_"},
    "oriented": {"oriented": "oriented_", "polygons": "polygon_"},
}


class DetectionTask(pl.LightningModule):
    """Trains and measures a YOLOv13.

    Logged: ``train/<part of the loss>``, ``val/AP``, ``val/AP50``, ``val/AP75`` and so for ``test``, with the AP of every class. Of masks and
    keypoints as well: ``val/mask_AP``, ``val/mask_AP50``, ``val/mask_AP75``, ``val/mask_AP_<class>``, and so ``val/keypoint_AP``. Of turned boxes
    ``val/oriented_AP`` by their probabilistic overlap and ``val/polygon_AP`` by the intersection over union of their outlines; ``val/AP`` is then of
    the upright boxes around them.

    Args:
        config: of the network; its classes must be as many as the data's.
        weights: file to start from. Layers of another shape, such as those of another number of classes, keep their random start.
        optimizer: "sgd", "adamw", or "muon": Muon for all kernels but those of the layers that answer, Adam for all else.
        learning_rate: highest.
        matrix_learning_rate: highest of Muon.
        final_share: last learning rate over the highest.
        momentum: of SGD and Muon, and beta1 of AdamW, after the warm-up, which starts at 0.8 of SGD.
        weight_decay: of all but biases and norms.
        warmup_epochs: of the warm-up.
        warmup_bias_rate: learning rate that biases start with.
        box: gain of the boxes' loss.
        cls: gain of the classes' loss.
        dfl: gain of the distributions' loss.
        channels_last: memory layout of training; saves the copies before attention.

    Raises:
        UserError: weights that are not a YOLOv13's of this scale.
    """

    def __init__(
        self,
        config: YOLOv13Config,
        weights: str | None = None,
        optimizer: Literal["sgd", "adamw", "muon"] = "sgd",
        learning_rate: float = 0.01,
        matrix_learning_rate: float = 0.02,
        final_share: float = 0.01,
        momentum: float = 0.937,
        weight_decay: float = 5e-4,
        warmup_epochs: float = 3.0,
        warmup_bias_rate: float = 0.0,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.network = YOLOv13(config)
        self.weights = weights
        self.left_at_random = [] if weights is None else start_from(self.network, weights)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.loss = DetectionLoss(config, box, cls, dfl)
        self.optimizer_name, self.learning_rate, self.final_share = optimizer, learning_rate, final_share
        self.matrix_learning_rate, self.momentum, self.weight_decay = matrix_learning_rate, momentum, weight_decay
        self.warmup_epochs, self.warmup_bias_rate = warmup_epochs, warmup_bias_rate
        self._found: dict[Kind, list[dict[str, Any]]] = {}

    # ------------------------------------------------------------------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Say what was taken over of the weights."""
        say_start(self.trainer, self.network, self.weights, self.left_at_random)

    def setup(self, stage: str) -> None:
        """The head must have the data's classes."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DetectionData):
            part = "train" if stage == "fit" else "val" if stage == "validate" else "test"
            names = data.labels(part).names
            if len(names) != self.network.config.classes:
                raise UserError(
                    f"expected model.config.classes {len(names)}, as the data has ({', '.join(names[:5])}); got {self.network.config.classes}"
                )
            if data.task != self.network.config.task:
                raise UserError(f"expected data.task {self.network.config.task}, as the network's; got {data.task}")

    def on_train_start(self) -> None:
        """A run that goes on in the middle of its last epochs does so without mosaic."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """The last epochs go without mosaic."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, DetectionData) and self.trainer.max_epochs and self.trainer.max_epochs > 0:
            data.calm(self.current_epoch, self.trainer.max_epochs)

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        """The loss of a batch, times its pictures, as the authors'."""
        self._follow_schedule()
        loss, parts = self.loss(self.network.raw(_pixels(batch)), batch)
        for name, value in parts.items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=len(batch["im_file"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Three groups: weights, which decay; norms' weights and biases, which do not. With Muon its kernels, which decay, and the others."""
        if self.optimizer_name == "muon":
            return self._muon()
        norms = {
            id(parameter)
            for module in self.network.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for parameter in module.parameters()
        }
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        biases: list[Tensor] = []
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                (biases if name.endswith("bias") else plain if id(parameter) in norms else decayed).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay, "kind": "weights"},
            {"params": plain, "weight_decay": 0.0, "kind": "norms"},
            {"params": biases, "weight_decay": 0.0, "kind": "biases"},
        ]
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(groups, self.learning_rate, (self.momentum, 0.999))
        return torch.optim.SGD(groups, self.learning_rate, self.momentum, nesterov=True)

    def _muon(self) -> Muon:
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        # The layers that answer have biases where all others have norms. A depthwise kernel is turned as (channels, places) and learns much faster.
        answering = {id(module.weight) for module in self.network.modules() if isinstance(module, nn.Conv2d) and module.bias is not None}
        kernels = {
            id(parameter): parameter
            for parameter in parameters
            if parameter.dim() > 1 and len(parameter) >= 16 and parameter[0].numel() > 3 and id(parameter) not in answering
        }
        others = [parameter for parameter in parameters if id(parameter) not in kernels]
        made = Muon(
            [], others, self.matrix_learning_rate, self.learning_rate, self.momentum, weight_decay=self.weight_decay, kernels=kernels.values()
        )
        for group in made.param_groups:
            group["kind"] = "kernels" if group["matrices"] else "others"
        return made

    def _follow_schedule(self) -> None:
        """Rates and momentum of this step: a function of its number alone, so that a resumed run goes on the same way."""
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        epochs = max(self.trainer.max_epochs or 1, 1)
        warmup = min(max(round(self.warmup_epochs * total / epochs), 100 if self.warmup_epochs else 0), total // 2)
        line = self.final_share + (1 - self.final_share) * max(1 - self.global_step / total, 0.0)
        risen = min(self.global_step / warmup, 1.0) if warmup else 1.0
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            start = self.warmup_bias_rate if group["kind"] == "biases" else 0.0
            highest = self.matrix_learning_rate if group["kind"] == "kernels" else self.learning_rate
            group["lr"] = start + (highest * line - start) * risen
            if "momentum" in group:
                group["momentum"] = 0.8 + (self.momentum - 0.8) * risen

    # ----------------------------------------------------------------------------------------------------------------------------- measuring

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        """Collect what is found."""
        self._collect(batch, self._labels("val"))

    def test_step(self, batch: dict[str, Any], index: int) -> None:
        """Collect what is found."""
        self._collect(batch, self._labels("test"))

    def predict_step(self, batch: dict[str, Any], index: int) -> list[Found]:
        """What is found in each picture, in the pixels that the network saw."""
        said = self.network(_pixels(batch))
        return [self._suppressed(said, row, score=0.25) for row in range(len(said.decoded))]

    def on_validation_epoch_start(self) -> None:
        """Nothing is found yet."""
        self._found = {kind: [] for kind in self._kinds()}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """COCO's numbers."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """COCO's numbers."""
        self._report("test")

    def _labels(self, part: str) -> Labels:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DetectionData):
            raise UserError(f"expected data of class foveal.detection.data.sets.DetectionData; got {type(data).__name__}")
        return data.labels("val" if self.trainer.state.fn == "validate" else part)

    def _kinds(self) -> list[Kind]:
        further = FURTHER.get(self.network.config.task)
        return ["bbox", *([further] if further else [])]

    def _suppressed(self, said: Prediction, row: int, **how: Any) -> Found:
        """The objects of a picture of the batch, in the pixels that the network saw."""
        extra = None if said.extra is None else said.extra[row].float()
        return suppress(said.decoded[row].float(), extra=extra, oriented=self.network.config.task == "oriented", **how)

    def _collect(self, batch: dict[str, Any], labels: Labels) -> None:
        """Boxes, masks, keypoints and turned boxes of every picture in its own pixels."""
        images = _pixels(batch)
        found = self.network(images)
        pictures = {str(picture.path): picture for picture in labels.pictures}
        for row, file in enumerate(batch["im_file"]):
            number = pictures[file].number
            objects = self._suppressed(found, row, score=0.001, overlap=0.7, most=300, several=True)
            (height, width), factor_padding = batch["ori_shape"][row], batch["ratio_pad"][row]
            factor, padding = factor_padding[0][0], factor_padding[1]
            scores, categories = objects.scores.cpu().numpy(), [labels.numbers[int(kind)] for kind in objects.classes]
            if "oriented" in self._found:
                turned, boxes = turned_in_picture(objects.boxes, factor, padding, (width, height))
                self._found["oriented"] += coco_oriented(number, turned.cpu().numpy(), boxes.cpu().numpy(), scores, categories)
            else:
                boxes = back_to_picture(objects.boxes, factor, padding, (width, height))
            self._found["bbox"] += coco_predictions(number, boxes.cpu().numpy(), scores, categories)
            if "segm" in self._found:
                assert objects.extra is not None
                seen, whole_padding = (images.shape[2], images.shape[3]), (round(padding[0]), round(padding[1]))
                masks = masks_in_picture(found.prototypes[row].float(), objects.extra, boxes, seen, factor, whole_padding, (width, height))
                self._found["segm"] += coco_masks(number, masks, scores, categories)
            if "keypoints" in self._found:
                assert objects.extra is not None
                points = objects.extra.unflatten(1, self.network.config.keypoints).clone()
                points[..., :2] = (points[..., :2] - points.new_tensor(padding)) / factor
                self._found["keypoints"] += coco_keypoints(number, points.cpu().numpy(), scores, categories)

    def _report(self, part: str) -> None:
        labels = self._labels(part)
        for kind, own in self._found.items():
            found = once(of_every_process(self.trainer, own), itemgetter("image_id"))
            for measure, prefix in MEASURED[kind].items():
                whole, classes = average_precision(coco_ground_truth(labels, measure), found, measure, labels.sigmas)
                for name in ("AP", "AP50", "AP75"):
                    self.log(f"{part}/{prefix}{name}", whole[name], prog_bar=name == "AP")
                for name, value in classes.items():
                    self.log(f"{part}/{prefix}AP_{name}", value)


def _pixels(batch: dict[str, Any]) -> Tensor:
    """The batch's pictures in 0..1."""
    image: Tensor = batch["img"]
    return image.float().div_(255).contiguous(memory_format=torch.channels_last) if image.dtype == torch.uint8 else image


def start_from(network: YOLOv13, weights: str) -> list[str]:
    """Take over every tensor that fits; the keys that did not are given back, and keep their random start.

    Raises:
        UserError: not weights of a YOLOv13, or of another scale.
    """
    saved = load_weights(weights, "yolov13")
    if saved.config.get("scale", "n") != network.config.scale:
        raise UserError(f"expected weights of scale {network.config.scale}; {weights} has scale {saved.config.get('scale')}; choose another file")
    own = network.state_dict()
    state = completed(YOLOv13(network.config), saved.state)
    fitting = {key: value.to(own[key].dtype) for key, value in state.items() if key in own and value.shape == own[key].shape}
    network.load_state_dict({**own, **fitting})
    return sorted(own.keys() - fitting.keys())
