"""Two ways to count pixels in a box, each of which a published detector was trained with.

mmdetection 1 takes corners as the centres of a box' first and last pixel: a box from 3 to 5 is three wide. mmdetection 2, like everybody today,
takes them as edges: two wide. Anchors, coded boxes, overlaps and pooled regions all follow, so weights of one give wrong boxes under the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, roi_align

#: Boxes grow or shrink at most this much in one step.
_LARGEST_CHANGE = abs(log(16 / 1000))


@dataclass(frozen=True)
class BoxConvention:
    """How boxes (left, top, right, bottom) in pixels are measured, coded and pooled.

    Attributes:
        name: "pixels" (mmdetection 1) or "edges" (mmdetection 2).
        extra: what is added to right - left for a width.
        background_first: whether class 0 of the scores is the background; else it is the last one.
        aligned: whether pooled regions are shifted by half a cell.
        samples: of pooling, a side of each cell; 0 takes as many as the region's size asks for.
    """

    name: str
    extra: float
    background_first: bool
    aligned: bool
    samples: int

    def anchors(
        self, size: tuple[int, int], stride: int, scale: float, ratios: Sequence[float], device: torch.device
    ) -> Float[Tensor, "places*ratios 4"]:
        """Boxes around every cell of a map of (height, width), row by row, the ratios of a cell together."""
        root = torch.tensor(ratios, device=device, dtype=torch.float64).sqrt()
        width, height = stride * scale / root, stride * scale * root
        centre = 0.5 * (stride - self.extra) if self.extra else 0.0
        half = torch.stack([width - self.extra, height - self.extra], -1) / 2
        boxes = torch.cat([centre - half, centre + half], -1)
        boxes = boxes.round() if self.extra else boxes
        rows, columns = torch.meshgrid(*(torch.arange(length, device=device) * stride for length in size), indexing="ij")
        shifts = torch.stack([columns, rows, columns, rows], -1).reshape(-1, 1, 4)
        return (shifts + boxes).reshape(-1, 4).float()

    def _centres(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2] + self.extra

    def encode(self, boxes: Float[Tensor, "boxes 4"], targets: Float[Tensor, "boxes 4"], spread: Sequence[float]) -> Float[Tensor, "boxes 4"]:
        """What `decode` must be told to get from boxes to targets."""
        (centre, size), (aim, aim_size) = self._centres(boxes), self._centres(targets)
        return torch.cat([(aim - centre) / size, (aim_size / size).log()], -1) / boxes.new_tensor(spread)

    def decode(
        self, boxes: Float[Tensor, "boxes 4"], deltas: Float[Tensor, "boxes 4"], spread: Sequence[float], size: tuple[int, int]
    ) -> Float[Tensor, "boxes 4"]:
        """Boxes moved and stretched by `deltas` times `spread`, cut to a picture of (height, width)."""
        centre, extent = self._centres(boxes)
        moved, stretched = (deltas * deltas.new_tensor(spread)).chunk(2, -1)
        centre, extent = centre + extent * moved, extent * stretched.clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE).exp()
        corners = torch.stack([centre - (extent - self.extra) / 2, centre + (extent - self.extra) / 2], -2)
        limit = corners.new_tensor([size[1] - self.extra, size[0] - self.extra])
        return torch.minimum(corners.clamp(min=0), limit).flatten(-2)

    def edges(self, boxes: Float[Tensor, "boxes 4"]) -> Float[Tensor, "boxes 4"]:
        """The same boxes by their edges: where a width is right - left."""
        return boxes + boxes.new_tensor([0, 0, self.extra, self.extra])

    def overlap(self, first: Float[Tensor, "m 4"], second: Float[Tensor, "n 4"]) -> Float[Tensor, "m n"]:
        """Intersection over union of every pair."""
        return box_iou(self.edges(first), self.edges(second))

    def suppress(
        self, boxes: Float[Tensor, "boxes 4"], scores: Float[Tensor, " boxes"], groups: Int[Tensor, " boxes"], threshold: float
    ) -> Int[Tensor, " kept"]:
        """Indices of the boxes that no better one of their group overlaps by more than `threshold`, best first."""
        return batched_nms(self.edges(boxes), scores, groups, threshold)

    def level_of(self, boxes: Float[Tensor, "boxes 4"], levels: int, finest: float = 56.0) -> Int[Tensor, " boxes"]:
        """The pyramid level that a box is pooled from: the finest below twice `finest` pixels a side, one coarser with each doubling."""
        width, height = self._centres(boxes)[1].clamp(min=0).unbind(-1)
        return ((width * height).sqrt() / finest + 1e-6).log2().floor().clamp(0, levels - 1).long()

    def pool(
        self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Float[Tensor, "boxes 4"], picture: Int[Tensor, " boxes"], size: int
    ) -> Float[Tensor, "boxes channels size size"]:
        """Regions of (size, size) cells, each from its level."""
        level = self.level_of(boxes, len(maps))
        pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
        regions = torch.cat([picture.unsqueeze(-1).to(boxes.dtype), self.edges(boxes)], -1)
        for place, (features, stride) in enumerate(zip(maps, strides, strict=True)):
            chosen = (level == place).nonzero().squeeze(1)
            if len(chosen):
                part = roi_align(features, regions[chosen], size, 1 / stride, sampling_ratio=self.samples or -1, aligned=self.aligned)
                pooled = pooled.index_put((chosen,), part)
        return pooled


PIXELS = BoxConvention("pixels", 1.0, True, False, 2)
EDGES = BoxConvention("edges", 0.0, False, True, 0)
CONVENTIONS = {convention.name: convention for convention in (PIXELS, EDGES)}
