"""SDANet: a cascade of three box and mask heads on a pyramid whose levels select from each other; made for X-ray baggage (PIDray).

Wang et al., Towards Real-world X-ray Security Inspection: A High-Quality Benchmark and Lightweight Framework, ICCV 2021. ResNet-101 and the
pyramid are torchvision's; the heads are those of Cascade Mask R-CNN (Cai and Vasconcelos, 2018). `convention="pixels"` is the ICCV code,
``"edges"`` the journal's (2022): see `foveal.detection.models.box_convention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from foveal.detection.models.box_convention import CONVENTIONS, BoxConvention
from foveal.detection.models.selective_attention import SelectiveDenseConfig, SelectiveDenseNeck

STRIDES = (4, 8, 16, 32, 64)
#: Levels that regions are pooled from: the coarsest serves proposals alone.
POOLED = 4
RATIOS, ANCHOR_SCALE = (0.5, 1.0, 2.0), 8.0
#: How far a box may be from its start in each stage, as a share of its size.
SPREADS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
UNIT = (1.0, 1.0, 1.0, 1.0)
DEPTHS = {18: resnet.resnet18, 34: resnet.resnet34, 50: resnet.resnet50, 101: resnet.resnet101}


@dataclass(frozen=True)
class SDANetConfig:
    """Sizes and thresholds; the defaults are the published ones.

    Attributes:
        classes: without the background; PIDray has 12.
        depth: of the ResNet: 18, 34, 50 or 101.
        selective: whether levels select from each other; without it this is Cascade Mask R-CNN.
        convention: of boxes, "pixels" or "edges".
        proposals: kept a level before and in all after suppression.
        score: least score of a detection.
        overlap: above which the worse of two detections of a class is dropped.
        detections: kept a picture.
    """

    classes: int = 12
    depth: int = 101
    selective: bool = True
    convention: str = "pixels"
    proposals: int = 1000
    score: float = 0.05
    overlap: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}; got {self.depth}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {self.convention!r}")
        if self.classes < 1:
            raise ValueError(f"classes must be positive; got {self.classes}")


class Detected(NamedTuple):
    """What is in one picture, best first.

    Attributes:
        boxes: left, top, right, bottom in pixels of the network's input, counted as the convention does.
        scores: 0 to 1.
        labels: classes from 0.
        masks: the chance that a cell of the box' 28 x 28 grid belongs to the object.
    """

    boxes: Float[Tensor, "found 4"]
    scores: Float[Tensor, " found"]
    labels: Int[Tensor, " found"]
    masks: Float[Tensor, "found 28 28"]


class ProposalHead(nn.Module):
    """Region proposal network: for every anchor, whether it holds an object, and how to move it there."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.score, self.move = nn.Conv2d(channels, len(RATIOS), 1), nn.Conv2d(channels, 4 * len(RATIOS), 1)
        for layer in (self.conv, self.score, self.move):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> tuple[Float[Tensor, "batch anchors"], Float[Tensor, "batch anchors 4"]]:
        """Logits and moves of a level's anchors."""
        hidden = F.relu(self.conv(features))
        score = self.score(hidden).permute(0, 2, 3, 1).flatten(1)
        return score, self.move(hidden).permute(0, 2, 3, 1).reshape(score.shape[0], -1, 4)


class BoxHead(nn.Module):
    """Classes of a region, and one move for all classes."""

    def __init__(self, classes: int, channels: int = 256, hidden: int = 1024) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(channels * 49, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.score, self.move = nn.Linear(hidden, classes + 1), nn.Linear(hidden, 4)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.normal_(self.move.weight, std=0.001)
        for layer in (self.score, self.move):
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Float[Tensor, "regions channels 7 7"]) -> tuple[Float[Tensor, "regions classes"], Float[Tensor, "regions 4"]]:
        """Logits, the background among them, and moves."""
        hidden = self.hidden(regions)
        return self.score(hidden), self.move(hidden)


class MaskHead(nn.Sequential):
    """Four convolutions, one doubling, one map a class."""

    def __init__(self, maps: int, channels: int = 256) -> None:
        convolutions = [layer for _ in range(4) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
        super().__init__(*convolutions, nn.ConvTranspose2d(channels, channels, 2, 2), nn.ReLU(), nn.Conv2d(channels, maps, 1))
        for layer in self:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class SDANet(nn.Module):
    """The whole detector. Sides of a batch of pictures are multiples of 32; what a picture lacks of its batch's size is zero.

    Args:
        config: sizes.
    """

    def __init__(self, config: SDANetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SDANetConfig()
        body = DEPTHS[config.depth](weights=None)
        widths = [body.layer4[-1].bn1.num_features * (4 if config.depth >= 50 else 1) // 2**halvings for halvings in (3, 2, 1, 0)]
        layers = {f"layer{place + 1}": str(place) for place in range(4)}
        self.backbone = BackboneWithFPN(body, layers, widths, 256)
        self.neck = SelectiveDenseNeck(SelectiveDenseConfig()) if config.selective else None
        self.proposal = ProposalHead()
        self.boxes = nn.ModuleList(BoxHead(config.classes) for _ in SPREADS)
        self.masks = nn.ModuleList(MaskHead(config.classes + int(self.convention.background_first)) for _ in SPREADS)

    @property
    def convention(self) -> BoxConvention:
        """How boxes are measured."""
        return CONVENTIONS[self.config.convention]

    def pyramid(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Five levels, strides 4 to 64.

        Raises:
            ValueError: another shape, or sides that are no multiples of 32.
        """
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % 32 or images.shape[3] % 32 or 0 in images.shape:
            raise ValueError(f"images must have shape (batch, 3, height, width) with sides that are multiples of 32; got {tuple(images.shape)}")
        levels = list(self.backbone(images).values())
        return levels if self.neck is None else self.neck(levels)

    def anchors(self, levels: Sequence[Tensor]) -> list[Float[Tensor, "anchors 4"]]:
        """Of every level."""
        return [
            self.convention.anchors((x.shape[2], x.shape[3]), stride, ANCHOR_SCALE, RATIOS, x.device)
            for x, stride in zip(levels, STRIDES, strict=True)
        ]

    def propose(
        self, answers: Sequence[tuple[Tensor, Tensor]], anchors: Sequence[Tensor], sizes: Sequence[tuple[int, int]], count: int
    ) -> list[Float[Tensor, "proposals 4"]]:
        """Boxes of each picture that may hold an object, best first.

        Args:
            answers: of the proposal head, a level.
            anchors: of each level.
            sizes: height and width of each picture in the batch.
            count: kept a level before suppression, and in all behind it.
        """
        proposals = []
        for picture, size in enumerate(sizes):
            boxes, scores, groups = [], [], []
            for level, ((score, move), places) in enumerate(zip(answers, anchors, strict=True)):
                best, chosen = score[picture].topk(min(count, score.shape[1]))
                boxes.append(self.convention.decode(places[chosen], move[picture, chosen], UNIT, size))
                scores.append(best)
                groups.append(torch.full_like(chosen, level))
            together = torch.cat(boxes)
            kept = self.convention.suppress(together, torch.cat(scores), torch.cat(groups), 0.7)
            proposals.append(together[kept[:count]])
        return proposals

    def pool(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Float[Tensor, "boxes channels size size"]:
        """Regions of all pictures' boxes, picture by picture."""
        picture = torch.cat([torch.full((len(part),), place, device=part.device) for place, part in enumerate(boxes)])
        return self.convention.pool(levels[:POOLED], STRIDES[:POOLED], torch.cat(list(boxes)), picture, size)

    @torch.no_grad()
    def detect(self, images: Float[Tensor, "batch 3 height width"], sizes: Sequence[tuple[int, int]] | None = None) -> list[Detected]:
        """What is in each picture.

        Args:
            images: normalised as in training, filled up with zeros at the right and below.
            sizes: height and width of each picture inside the batch; by default the whole.
        """
        sizes = sizes or [(images.shape[2], images.shape[3])] * images.shape[0]
        levels = self.pyramid(images)
        boxes = self.propose([self.proposal(x) for x in levels], self.anchors(levels), sizes, self.config.proposals)
        counts = [len(part) for part in boxes]
        logits = torch.zeros((), device=images.device)
        for head, spread in zip(self.boxes, SPREADS, strict=True):
            score, move = head(self.pool(levels, boxes, 7))
            logits = logits + score / len(self.boxes)
            parts = zip(boxes, move.split(counts), sizes, strict=True)
            boxes = [self.convention.decode(part, moves, spread, size) for part, moves, size in parts]
        scores = logits.softmax(-1)
        scores = scores[:, 1:] if self.convention.background_first else scores[:, :-1]
        return self._with_masks(levels, [self._best(*part) for part in zip(boxes, scores.split(counts), strict=True)])

    def _best(self, boxes: Tensor, scores: Float[Tensor, "boxes classes"]) -> tuple[Tensor, Tensor, Tensor]:
        box, label = (scores > self.config.score).nonzero().unbind(1)
        best = scores[box, label]
        kept = self.convention.suppress(boxes[box], best, label, self.config.overlap)[: self.config.detections]
        return boxes[box[kept]], best[kept], label[kept]

    def _with_masks(self, levels: Sequence[Tensor], found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Detected]:
        labels = torch.cat([label for _, _, label in found])
        masks = levels[0].new_zeros(len(labels), 28, 28)
        if len(labels):
            regions = self.pool(levels, [boxes for boxes, _, _ in found], 14)
            every, channel = torch.arange(len(labels), device=labels.device), labels + int(self.convention.background_first)
            for head in self.masks:
                masks = masks + head(regions)[every, channel].sigmoid() / len(self.masks)
        return [Detected(*part, mask) for part, mask in zip(found, masks.split([len(part[0]) for part in found]), strict=True)]

    forward = detect


def paste(
    masks: Float[Tensor, "found 28 28"], boxes: Float[Tensor, "found 4"], size: tuple[int, int], threshold: float = 0.5
) -> Bool[Tensor, "found height width"]:
    """Masks on a picture of (height, width), from boxes given by their edges.

    A pixel belongs to the object where the mask, read between its cells' centres, is above the threshold.
    """
    rows, columns = (torch.arange(length, device=boxes.device) + 0.5 for length in size)
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)
    across, down = ((columns - left) / (right - left) * 2 - 1), ((rows - top) / (bottom - top) * 2 - 1)
    grid = torch.stack([across[:, None, :].expand(-1, size[0], -1), down[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(masks.unsqueeze(1), grid, align_corners=False).squeeze(1) >= threshold
