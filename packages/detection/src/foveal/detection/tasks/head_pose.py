"""Learning heads and their angles with DirectMHP: the authors' loss and schedule, and their measure of the angles.

Their recipe is YOLOv5's: SGD at 0.01 with Nesterov momentum 0.937, weight decay 5e-4 on weights alone, a warm-up of three epochs in which the
biases' rate falls from 0.1, half a cosine to a fifth, a running mean of the weights, 300 epochs of AGORA-HPE at 1,280 pixels, 120 pictures a step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from foveal.core.checkpoint import load_weights
from foveal.core.errors import UserError
from foveal.core.tracking import log_figure
from foveal.detection.checkpoints.direct_mhp import DIRECT_MHP
from foveal.detection.checkpoints.released import read_released
from foveal.detection.data.head_labels import coco_of_heads
from foveal.detection.data.head_pose import HeadBatch, HeadPoseData
from foveal.detection.head_pictures import show_heads
from foveal.detection.head_pose import Heads, angle_errors, heads_of
from foveal.detection.metrics import average_precision, coco_predictions
from foveal.detection.models.direct_mhp import DirectMHP, DirectMHPConfig
from foveal.detection.models.direct_mhp_loss import HeadPoseLoss
from foveal.detection.tasks.starting import say_start


class HeadPoseTask(pl.LightningModule):
    """Trains and measures a `DirectMHP`.

    Logged: ``train/<part of the loss>``; ``val/AP`` and ``val/AP50`` of the boxes; ``val/MAE`` and its ``pitch``, ``yaw`` and ``roll`` in degrees
    over the heads that are found (box overlap above 0.5, score above `measured_score`), ``val/found``, the share of heads that are, and the MAE
    of heads that face the viewer (yaw within 90 degrees) and do not; so for ``test``.

    Args:
        config: of the network.
        weights: file to start from: ours (.safetensors), or a released ``.pt`` of DirectMHP or YOLOv5 (release 5.0, s6 and m6). Tensors of
            another name or shape keep their random start.
        optimizer: "sgd" or "adamw".
        learning_rate: highest.
        final_share: last learning rate over the highest.
        momentum: of SGD, and beta1 of AdamW, after the warm-up, which starts at 0.8 of SGD.
        weight_decay: of all but biases and norms.
        warmup_epochs: of the warm-up.
        warmup_bias_rate: learning rate that biases start with.
        image_size: side of the data's pictures, by which the objectness is weighed.
        angles: gain of the angles' loss.
        least: raw objectness above which an anchor's angles are learned.
        wrap_yaw: whether yaws of -180 and 180 degrees are the same in the loss; not published.
        measured_score: score above which a head is taken for found when angles are measured.

    Raises:
        UserError: weights that cannot be read, or of which less than half fits.
    """

    def __init__(
        self,
        config: DirectMHPConfig = DirectMHPConfig(),  # noqa: B008  (frozen)
        weights: str | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float = 0.01,
        final_share: float = 0.2,
        momentum: float = 0.937,
        weight_decay: float = 5e-4,
        warmup_epochs: float = 3.0,
        warmup_bias_rate: float = 0.1,
        image_size: int = 1280,
        angles: float = 0.1,
        least: float = 0.4,
        wrap_yaw: bool = False,
        measured_score: float = 0.7,
    ) -> None:
        super().__init__()
        self.network = DirectMHP(config)
        self.weights = weights
        self.left_at_random = [] if weights is None else start_from(self.network, weights)
        self.image_size = image_size
        self.loss = HeadPoseLoss(image_size, angles=angles, least=least, wrap_yaw=wrap_yaw)
        self.optimizer_name, self.learning_rate, self.final_share = optimizer, learning_rate, final_share
        self.momentum, self.weight_decay = momentum, weight_decay
        self.warmup_epochs, self.warmup_bias_rate, self.measured_score = warmup_epochs, warmup_bias_rate, measured_score
        self._found: list[tuple[int, Heads]] = []

    def on_fit_start(self) -> None:
        """Say what was taken over of the weights."""
        say_start(self.trainer, self.network, self.weights, self.left_at_random)

    def setup(self, stage: str) -> None:
        """The loss is for the data's pictures."""
        if self._data.image_size != self.image_size:
            raise UserError(f"expected model.image_size {self._data.image_size}, as the data's; got {self.image_size}")

    @property
    def _data(self) -> HeadPoseData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, HeadPoseData):
            raise UserError(f"expected data of class foveal.detection.data.head_pose.HeadPoseData; got {type(data).__name__}")
        return data

    # ------------------------------------------------------------------------------------------------------------------------------ training

    def training_step(self, batch: HeadBatch, index: int) -> Tensor:
        """The loss of a batch, times its pictures, as the authors'."""
        self._follow_schedule()
        loss, parts = self.loss(self.network.raw(batch.images), batch.targets, self.network.head.anchor_cells)
        self.log("train/loss", loss.detach() / len(batch.images), prog_bar=True, batch_size=len(batch.images))
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(batch.images))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Three groups: weights, which decay; norms' weights and biases, which do not."""
        norms = {id(module.weight) for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)}
        groups: dict[str, list[Tensor]] = {"weights": [], "norms": [], "biases": []}
        for name, parameter in self.network.named_parameters():
            groups["biases" if name.endswith("bias") else "norms" if id(parameter) in norms else "weights"].append(parameter)
        listed: list[dict[str, Any]] = [
            {"params": parameters, "weight_decay": self.weight_decay if kind == "weights" else 0.0, "kind": kind}
            for kind, parameters in groups.items()
        ]
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(listed, self.learning_rate, (self.momentum, 0.999))
        return torch.optim.SGD(listed, self.learning_rate, self.momentum, nesterov=True)

    def _follow_schedule(self) -> None:
        """Rates and momentum of this step: a function of its number alone, so that a resumed run goes on the same way."""
        total, epochs = max(int(self.trainer.estimated_stepping_batches), 1), max(self.trainer.max_epochs or 1, 1)
        warmup = min(round(self.warmup_epochs * total / epochs), total // 2)
        fallen = self.final_share + (1 - self.final_share) * (1 + math.cos(math.pi * min(self.global_step / total, 1.0))) / 2
        risen = min(self.global_step / warmup, 1.0) if warmup else 1.0
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            start = self.warmup_bias_rate if group["kind"] == "biases" and self.optimizer_name == "sgd" else 0.0
            group["lr"] = start + (self.learning_rate * fallen - start) * risen
            if "momentum" in group:
                group["momentum"] = 0.8 + (self.momentum - 0.8) * risen

    # ----------------------------------------------------------------------------------------------------------------------------- measuring

    def _measure(self, batch: HeadBatch, index: int, part: str) -> None:
        said = self.network(batch.images)
        places = {id(picture): place for place, picture in enumerate(self._data.pictures(part))}
        for row, (picture, (factor, padding)) in enumerate(zip(batch.pictures, batch.factors, strict=True)):
            found = heads_of(said, row, factor, padding, picture.size, score=0.001, overlap=0.65)
            place = places.get(id(picture), next(n for n, other in enumerate(self._data.pictures(part)) if other.number == picture.number))
            self._found.append((place, found))
            if index == 0 and row == 0:
                log_figure(
                    self, f"{part}/heads", show_heads(picture.read(), found.above(min(self.measured_score, 0.3)), picture.boxes, picture.angles)
                )

    def validation_step(self, batch: HeadBatch, index: int) -> None:
        """Collect what is found."""
        self._measure(batch, index, "val")

    def test_step(self, batch: HeadBatch, index: int) -> None:
        """Collect what is found."""
        self._measure(batch, index, "test")

    def predict_step(self, batch: HeadBatch, index: int) -> list[Heads]:
        """Heads of each picture, in its own pixels."""
        said = self.network(batch.images)
        return [heads_of(said, row, *batch.factors[row], batch.pictures[row].size) for row in range(len(batch.pictures))]

    def on_validation_epoch_start(self) -> None:
        """Nothing is found yet."""
        self._found = []

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """COCO's numbers of boxes, and errors of angles."""
        self._report("val")

    def on_test_epoch_end(self) -> None:
        """COCO's numbers of boxes, and errors of angles."""
        self._report("test")

    def _report(self, part: str) -> None:
        found = self._found
        if self.trainer.world_size > 1:
            shares: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(shares, found)
            # Lightning fills up the last processes' shares with pictures that others have too.
            found = list({place: (place, heads) for share in shares for place, heads in share}.values())
        pictures = self._data.pictures(part)
        boxes = [entry for place, heads in found for entry in coco_predictions(place, heads.boxes, heads.scores, [1] * len(heads.scores))]
        truth = coco_of_heads(pictures)
        numbers = {picture.number: place for place, picture in enumerate(pictures)}
        for entries, name in ((truth["images"], "id"), (truth["annotations"], "image_id")):
            for entry in entries:
                entry[name] = numbers[entry[name]]  # pycocotools wants numbers; AGORA-HPE's may be words
        seen = {place for place, _ in found}
        truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in seen]
        whole, _ = average_precision(truth, boxes)
        for name in ("AP", "AP50"):
            self.log(f"{part}/{name}", whole[name], prog_bar=name == "AP")
        matched = [angle_errors(heads.above(self.measured_score), pictures[place].boxes, pictures[place].angles) for place, heads in found]
        errors = np.concatenate([error for error, _ in matched]) if matched else np.zeros((0, 3))
        true = np.concatenate([angles for _, angles in matched]) if matched else np.zeros((0, 3))
        heads = sum(len(pictures[place].boxes) for place in seen)
        self.log(f"{part}/found", len(errors) / max(heads, 1))
        # Without a head that is found the error is what guessing the middle of every range gives on a full circle: the worst a mean can be read as.
        middle = (np.array([[45.0, 90.0, 45.0]]), np.zeros((1, 3)))
        errors, true = (errors, true) if len(errors) else middle
        self.log(f"{part}/MAE", float(errors.mean()), prog_bar=True)
        for column, name in enumerate(("pitch", "yaw", "roll")):
            self.log(f"{part}/MAE_{name}", float(errors[:, column].mean()))
        facing = np.abs(true[:, 1]) <= 90
        for name, chosen in (("facing", facing), ("turned_away", ~facing)):
            if chosen.any():
                self.log(f"{part}/MAE_{name}", float(errors[chosen].mean()))


def start_from(network: DirectMHP, weights: str) -> list[str]:
    """Take over every tensor that fits by name and shape; the keys that did not are given back, and keep their random start.

    Raises:
        UserError: a file that cannot be read, or of which less than half fits.
    """
    own = network.state_dict()
    if weights.endswith(".safetensors"):
        given = load_weights(weights, "direct_mhp").state
    else:
        theirs = DIRECT_MHP.renamed(read_released(weights).state)
        given = {ours: theirs[sources[0][0]] for ours, sources in DIRECT_MHP.table(network).items() if sources[0][0] in theirs}
    given = {key: value for key, value in given.items() if "anchor" not in key}
    fitting = {key: value.to(own[key].dtype) for key, value in given.items() if key in own and value.shape == own[key].shape}
    if not fitting:
        raise UserError(
            f"expected weights of a DirectMHP or YOLOv5 of this size; nothing in {weights} fits; choose another file or model.config.width"
        )
    # Counters of norms have one shape in every network: most of what is named must fit.
    if 2 * len(fitting) <= len(given):
        raise UserError(
            f"expected weights of a DirectMHP or YOLOv5 of this size; of {len(given)} tensors in {weights} that have its names "
            f"{len(given) - len(fitting)} do not fit; choose another file, or model.config.width and depth"
        )
    network.load_state_dict({**own, **fitting})
    return sorted(key for key in own.keys() - fitting.keys() if "anchor" not in key)
