"""The loss of DirectMHP: YOLOv5's for boxes and objectness, and the distance of the three angles.

An anchor learns an object where neither side of its box is more than four times the object's or less than a quarter, at the object's cell and at
the two nearest neighbours of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Weight of the objectness of each level, the finest first.
_BALANCE = (4.0, 1.0, 0.25, 0.06)
#: Least distance of an anchor's sides to the object's that is too far, as a ratio.
_RATIO = 4.0


@dataclass(frozen=True)
class Matches:
    """Anchors of one level that learn an object.

    Attributes:
        picture: its number in the batch.
        anchor: 0 to 2.
        row: of the cell.
        column: of the cell.
        boxes: centre from the cell's corner, width and height of the object, in cells.
        angles: pitch, yaw, roll of the object in 0..1.
    """

    picture: Int[Tensor, " matches"]
    anchor: Int[Tensor, " matches"]
    row: Int[Tensor, " matches"]
    column: Int[Tensor, " matches"]
    boxes: Float[Tensor, "matches 4"]
    angles: Float[Tensor, "matches 3"]


def match(targets: Float[Tensor, "objects 8"], anchors: Float[Tensor, "anchors 2"], height: int, width: int) -> Matches:
    """Which anchors of a level of `height` x `width` cells learn which object.

    Args:
        targets: of each object its picture's number, centre x, centre y, width and height over the picture's sides, pitch, yaw and roll in 0..1.
        anchors: widths and heights in cells.
        height: rows of cells.
        width: columns of cells.
    """
    extent = targets.new_tensor([width, height])
    centre, size = targets[:, 1:3] * extent, targets[:, 3:5] * extent
    ratio = size[None] / anchors[:, None]
    anchor, chosen = (torch.maximum(ratio, 1 / ratio).amax(-1) < _RATIO).nonzero(as_tuple=True)
    centre, size = centre[chosen], size[chosen]
    # The cell itself, and the neighbours whose border is nearer than half a cell.
    left_top, right_bottom = (centre % 1 < 0.5) & (centre > 1), ((extent - centre) % 1 < 0.5) & (extent - centre > 1)
    everywhere = torch.ones_like(left_top[:, :1])
    near = torch.cat((everywhere, left_top, right_bottom), 1).T  # (5, pairs)
    steps = targets.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    step, pair = near.nonzero(as_tuple=True)
    cell = (centre[pair] - steps[step]).long()
    column, row = cell[:, 0], cell[:, 1]
    boxes = torch.cat((centre[pair] - cell, size[pair]), 1)
    source = chosen[pair]
    return Matches(targets[source, 0].long(), anchor[pair], row.clamp(0, height - 1), column.clamp(0, width - 1), boxes, targets[source, 5:])


def complete_overlap(first: Float[Tensor, "boxes 4"], second: Float[Tensor, "boxes 4"]) -> Float[Tensor, " boxes"]:
    """Intersection over union of boxes (centre, size) less what their centres and shapes are apart (CIoU, Zheng et al., 2020)."""
    small = 1e-7
    least1, most1 = first[:, :2] - first[:, 2:] / 2, first[:, :2] + first[:, 2:] / 2
    least2, most2 = second[:, :2] - second[:, 2:] / 2, second[:, :2] + second[:, 2:] / 2
    shared = (torch.minimum(most1, most2) - torch.maximum(least1, least2)).clamp_min(0).prod(1)
    overlap = shared / (first[:, 2:].prod(1) + second[:, 2:].prod(1) - shared + small)
    diagonal = (torch.maximum(most1, most2) - torch.minimum(least1, least2)).square().sum(1) + small
    apart = (second[:, :2] - first[:, :2]).square().sum(1) / diagonal
    shapes = (second[:, 2] / (second[:, 3] + small)).atan() - (first[:, 2] / (first[:, 3] + small)).atan()
    bent = 4 / math.pi**2 * shapes.square()
    with torch.no_grad():
        weight = bent / (bent - overlap + (1 + small))
    return overlap - apart - weight * bent


class HeadPoseLoss(nn.Module):
    """The loss of a batch.

    Args:
        image_size: side of the pictures in pixels; the objectness is weighed by its square.
        box: gain of the boxes.
        objectness: gain of the objectness.
        angles: gain of the angles.
        least: raw objectness (before the sigmoid) above which an anchor's angles are learned.
        wrap_yaw: whether yaws of -180 and 180 degrees are the same; the published networks were trained without.
    """

    def __init__(
        self, image_size: int = 1280, box: float = 0.05, objectness: float = 0.7, angles: float = 0.1, least: float = 0.4, wrap_yaw: bool = False
    ) -> None:
        super().__init__()
        levels = 3 / len(_BALANCE)
        self.box, self.objectness, self.angles = box * levels, objectness * (image_size / 640) ** 2 * levels, angles * levels
        self.least, self.wrap_yaw = least, wrap_yaw

    def forward(
        self, raw: list[Float[Tensor, "batch 3 height width 9"]], targets: Float[Tensor, "objects 8"], anchors: Float[Tensor, "4 3 2"]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss times the pictures of the batch, and its parts after their gains.

        Args:
            raw: logits of every anchor, level by level.
            targets: as in `match`.
            anchors: widths and heights in cells of each level.
        """
        boxes = sure = turned = raw[0].new_zeros(())
        for level, numbers in enumerate(raw):
            found = match(targets, anchors[level].to(targets.dtype), *numbers.shape[2:4])
            objectness = torch.zeros_like(numbers[..., 4])
            if len(found.picture):
                place = (found.picture, found.anchor, found.row, found.column)
                said = numbers[place]
                centre = 2 * said[:, :2].sigmoid() - 0.5
                size = (2 * said[:, 2:4].sigmoid()) ** 2 * anchors[level].to(said.dtype)[found.anchor]
                overlap = complete_overlap(torch.cat((centre, size), 1), found.boxes.to(said.dtype))
                boxes = boxes + (1 - overlap).mean()
                objectness = objectness.index_put(place, overlap.detach().clamp_min(0).to(objectness.dtype))
                learned = said[:, 4] > self.least
                if learned.any():
                    turned = turned + self._distance(said[learned, 6:].sigmoid(), found.angles[learned].to(said.dtype)).mean()
            sure = sure + _BALANCE[level] * F.binary_cross_entropy_with_logits(numbers[..., 4], objectness)
        parts = {"boxes": self.box * boxes, "objectness": self.objectness * sure, "angles": self.angles * turned}
        return len(raw[0]) * torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}

    def _distance(self, said: Float[Tensor, "matches 3"], true: Float[Tensor, "matches 3"]) -> Float[Tensor, " matches"]:
        apart = (said - true).abs()
        if self.wrap_yaw:
            apart = torch.stack((apart[:, 0], torch.minimum(apart[:, 1], 1 - apart[:, 1]), apart[:, 2]), 1)
        return torch.linalg.vector_norm(apart, dim=1)
