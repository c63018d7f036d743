"""Learning to segment slices, measured on whole scans in their own geometry.

Guided attention's recipe is its guided loss and Adam at 1e-3, betas (0.9, 0.99), the rate halved when nothing improves; MHS-VM's is binary
cross entropy plus Dice and AdamW. Any other network of (batch, channels, height, width) trains with cross entropy plus Dice, as the MONAI U-Net does
that the bundled weights are held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn

from foveal.core.errors import UserError
from foveal.core.muon import Muon
from foveal.core.processes import of_every_process, once
from foveal.medical.data.slices import Scan
from foveal.medical.inference import View, check_views, in_cpu_order, logits_of, run_slices
from foveal.medical.losses import bce_dice_loss, guided_loss
from foveal.medical.metrics import dice_scores, mean_known
from foveal.medical.tasks.schedules import rising_then_cosine
from foveal.medical.volumes import Volume, output_suffix, write_volume

#: Smaller sides, as matrices, of the kernels that are Muon's. Heads have fewer rows: classes need not be of equal strength. Turning a larger matrix
#: takes longer than the pass through the network does.
_KERNELS = range(8, 129)

Loss = Literal["guided", "dice_ce", "bce_dice"]


class SegmentationTask(pl.LightningModule):
    """Trains a network on slices and measures it on scans.

    Logged: ``train/loss`` and its parts; ``val/dice`` (mean over scans and structures, each scan on its own grid) and ``val/dice_<structure>``.
    A test writes ``cases.csv``, pictures and a page into the run's folder.

    Args:
        network: slices to logits.
        loss: "guided" (needs `GuidedAttentionNet`), "dice_ce", or "bce_dice" for one class with targets 0 and 1.
        dice_weight: of a soft Dice loss of the second stage's mean logits, added to the guided loss; the paper has none.
        optimizer: "adam", "adamw", or "muon": Muon for the convolutions' kernels (up to 128 channels), Adam for all else.
        learning_rate: highest.
        matrix_learning_rate: of Muon, highest.
        betas: of the optimiser.
        weight_decay: of the optimiser.
        schedule: "cosine" (rises for `warmup` of the steps, falls to 0), "halving" (by 2 when ``val/dice`` has not risen for `patience`
            validations) or "constant".
        warmup: share of the steps.
        patience: of "halving".
        slices_at_once: in validation and tests.
        views: of each slice in validation and tests, see `run_slices`; exported weights keep them.
    """

    def __init__(
        self, network: nn.Module, loss: Loss = "dice_ce", dice_weight: float = 0.0, optimizer: Literal["adam", "adamw", "muon"] = "adam",
        learning_rate: float = 1e-3, matrix_learning_rate: float = 0.02, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
        schedule: Literal["cosine", "halving", "constant"] = "constant", warmup: float = 0.05, patience: int = 50, slices_at_once: int = 16,
        views: Sequence[View] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if loss == "guided" and not hasattr(network, "forward_guided"):
            raise UserError(f"expected a GuidedAttentionNet for the guided loss; got {type(network).__name__}; set loss to dice_ce")
        check_views(views)
        self.network, self.loss, self.dice_weight = network, loss, dice_weight
        self.optimizer, self.learning_rate, self.betas, self.weight_decay = optimizer, learning_rate, betas, weight_decay
        self.matrix_learning_rate = matrix_learning_rate
        self.schedule, self.warmup, self.patience, self.slices_at_once, self.views = schedule, warmup, patience, slices_at_once, tuple(views)
        self.dice_ce = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        self.dice = DiceLoss(to_onehot_y=True, softmax=True, include_background=False)
        self._scores: list[tuple[str, np.ndarray]] = []
        self._cases: list[Any] = []

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return logits_of(self.network)(image)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Of a scan only the slices; its geometry stays as it is."""
        if isinstance(batch, Scan):
            return batch._replace(slices=batch.slices.to(device))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch of slices."""
        image, label = in_cpu_order(batch[0]), batch[1]
        if self.loss == "guided":
            outputs = self.network.forward_guided(image)  # type: ignore[operator]
            parts = guided_loss(outputs, label)
            total = parts.total
            for name in ("segmentation", "semantic", "reconstruction"):
                self.log(f"train/{name}", getattr(parts, name), batch_size=len(image))
            if self.dice_weight:
                total = total + self.dice_weight * self.dice(torch.stack(outputs.second).mean(0), label[:, None])
        elif self.loss == "bce_dice":
            total = bce_dice_loss(self(image).float().sigmoid(), label[:, None].float())
        else:
            total = self.dice_ce(self(image).float(), label[:, None])
        self.log("train/loss", total, prog_bar=True, batch_size=len(image))
        return total

    def segmented(self, scan: Scan) -> np.ndarray:
        """Labels of a scan on its own grid."""
        preparation = self.trainer.datamodule.preparation  # type: ignore[attr-defined]
        logits = run_slices(self.network, scan.slices, self.slices_at_once, self.device, self.views)
        return labels_of(preparation.restore(logits, scan.image))

    def validation_step(self, scan: Scan, index: int) -> None:
        """Dice of each structure of a scan."""
        classes = self.trainer.datamodule.classes  # type: ignore[attr-defined]
        self._scores.append((scan.name, dice_scores(self.segmented(scan), scan.labels.voxels, classes)))

    def on_validation_epoch_end(self) -> None:
        """Mean over scans."""
        scores = once(of_every_process(self.trainer, self._scores), itemgetter(0))
        table, self._scores = np.array([row for _, row in scores]), []
        names = self.trainer.datamodule.class_names  # type: ignore[attr-defined]
        for name, column in zip(names, table.T, strict=True):
            self.log(f"val/dice_{name.replace(' ', '_')}", np.nan_to_num(mean_known(column)))
        self.log("val/dice", np.nan_to_num(mean_known(table)), prog_bar=True)

    def test_step(self, scan: Scan, index: int) -> None:
        """Segment a scan and keep what the report needs."""
        from foveal.medical.tasks.segmentation_report import measured

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        case = measured(scan.name, scan.image, self.segmented(scan), scan.labels.voxels, data.class_names)
        self._cases.append(case)

    def on_test_epoch_end(self) -> None:
        """Log the means; write the table, the pictures and the page."""
        from foveal.medical.tasks.segmentation_report import SegmentationReport

        cases = once(of_every_process(self.trainer, self._cases), attrgetter("name"))
        report = SegmentationReport(cases, self.trainer.datamodule.class_names)  # type: ignore[attr-defined]
        self._cases = []
        for name, value in report.means().items():
            self.log(f"test/{name}", value)
        if self.trainer.is_global_zero:
            report.finish(self.trainer)

    def predict_step(self, scan: Scan, index: int) -> Volume:
        """Labels as a volume like the scan."""
        return scan.image.like(self.segmented(scan).astype(np.uint8))

    def write_prediction(self, labels: Volume, scan: Scan, folder: Path) -> None:
        """``<name of the scan>_labels`` in the scan's own format and place, as ``foveal medical segment`` writes it."""
        write_volume(labels, folder / f"{scan.name.replace('/', '_')}_labels{output_suffix(labels)}")

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule."""
        optimizer = self._optimizer()
        if self.schedule == "constant":
            return optimizer
        if self.schedule == "halving":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=self.patience)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/dice", "strict": False}}
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, rising_then_cosine(steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.network.parameters())
        if self.optimizer == "muon":
            kernels = [parameter for parameter in parameters if parameter.dim() > 2 and min(len(parameter), parameter[0].numel()) in _KERNELS]
            others = [parameter for parameter in parameters if not any(parameter is kernel for kernel in kernels)]
            return Muon([], others, self.matrix_learning_rate, self.learning_rate, 0.9, self.betas, self.weight_decay, kernels)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        # Hundreds of small parameters: on a CPU one call for all of them is four times as fast as one for each.
        fused = all(parameter.device.type == "cpu" for parameter in parameters) or None
        return kind(parameters, self.learning_rate, self.betas, weight_decay=self.weight_decay, fused=fused)


def labels_of(logits: np.ndarray) -> np.ndarray:
    """The likeliest class of every voxel; a single logit is one class against the background, at one half."""
    return (logits[0] >= 0).astype(np.uint8) if len(logits) == 1 else logits.argmax(0).astype(np.uint8 if len(logits) < 256 else np.uint16)
