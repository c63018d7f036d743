"""What SDANet learns by: proposals against anchors, then three stages of classes, boxes and masks, each asking for more overlap than the last.

Thresholds, samples and weights are those of the authors' configuration (Cascade Mask R-CNN's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import roi_align

from foveal.detection.models.sdanet import SPREADS, UNIT, SDANet

#: Overlap that makes a box an object, and the share of the loss, of each stage.
STAGES = ((0.5, 1.0), (0.6, 0.5), (0.7, 0.25))
NOTHING = -1
_IGNORED = -2


class Objects(NamedTuple):
    """What a picture is labelled with.

    Attributes:
        boxes: left, top, right, bottom by their edges, in pixels of the network's input.
        labels: classes from 0.
        masks: which pixels belong to each object; None where there are no masks: their loss is left out.
    """

    boxes: Float[Tensor, "objects 4"]
    labels: Int[Tensor, " objects"]
    masks: Bool[Tensor, "objects height width"] | None = None


def losses(
    model: SDANet, images: Float[Tensor, "batch 3 height width"], objects: Sequence[Objects], sizes: Sequence[tuple[int, int]]
) -> dict[str, Float[Tensor, ""]]:
    """Every part of the loss by its name; their sum is what is learnt.

    Args:
        model: in training mode.
        images: normalised.
        objects: of each picture.
        sizes: height and width of each picture inside the batch.
    """
    convention = model.convention
    levels = model.pyramid(images)
    answers, anchors = [model.proposal(x) for x in levels], model.anchors(levels)
    # labels are drawn by edges; a convention that counts pixels ends one earlier
    aims = [part.boxes - part.boxes.new_tensor([0, 0, convention.extra, convention.extra]) for part in objects]
    found = _proposal_losses(model, answers, torch.cat(anchors), aims, sizes)
    with torch.no_grad():
        boxes = model.propose(answers, anchors, sizes, 2 * model.config.proposals)
    for number, ((threshold, weight), head, mask_head, spread) in enumerate(zip(STAGES, model.boxes, model.masks, SPREADS, strict=True)):
        picked, matched = [], []
        for part, aim in zip(boxes, aims, strict=True):
            candidates = torch.cat([aim, part]).detach()  # the labels themselves are among what a stage learns from
            match = assign(convention.overlap(aim, candidates), threshold, threshold)
            rows = sample(match, 512, 0.25)
            picked.append(candidates[rows])
            matched.append(match[rows])
        score, move = head(model.pool(levels, picked, 7))
        counts, object_of = [len(part) for part in picked], torch.cat(matched)
        labels = torch.cat([_labels(part.labels, match, model) for part, match in zip(objects, matched, strict=True)])
        found[f"stage{number + 1}/classes"] = weight * F.cross_entropy(score.float(), labels)
        positive = (object_of >= 0).nonzero().squeeze(1)
        goal = torch.cat([aim[match[match >= 0]] for aim, match in zip(aims, matched, strict=True)])
        codes = convention.encode(torch.cat(picked)[positive], goal, spread)
        found[f"stage{number + 1}/boxes"] = weight * F.smooth_l1_loss(move[positive].float(), codes, reduction="sum") / max(len(labels), 1)
        if all(part.masks is not None for part in objects):
            found[f"stage{number + 1}/masks"] = weight * _mask_loss(model, levels, mask_head, picked, matched, objects)
        with torch.no_grad():  # the next stage starts where this one ends; labels are added to it anew
            moved = zip(picked, move.split(counts), sizes, aims, strict=True)
            boxes = [convention.decode(part, moves, spread, size)[~_among(part, aim)] for part, moves, size, aim in moved]
    return found


def assign(overlap: Float[Tensor, "objects boxes"], positive: float, negative: float, closest: float | None = None) -> Int[Tensor, " boxes"]:
    """The object of each box; `NOTHING` below `negative`; ignored between the thresholds.

    Args:
        overlap: of every pair.
        positive: overlap from which a box is an object.
        negative: overlap below which it is none.
        closest: if given, the boxes nearest to an object are its own from this overlap on.
    """
    if not overlap.shape[0]:
        return torch.full((overlap.shape[1],), NOTHING, device=overlap.device)
    best, match = overlap.max(0)
    match = torch.where(best >= positive, match, torch.where(best < negative, NOTHING, _IGNORED))
    if closest is not None:
        nearest = overlap.amax(1, keepdim=True)
        row, box = ((overlap == nearest) & (nearest >= closest)).nonzero().unbind(1)
        match[box] = row
    return match


def sample(match: Int[Tensor, " boxes"], count: int, share: float) -> Int[Tensor, " chosen"]:
    """Indices of `count` boxes drawn at random, at most `share` of them objects; objects come first."""
    chosen: list[Tensor] = []
    for rows, most in (((match >= 0).nonzero().squeeze(1), int(count * share)), ((match == NOTHING).nonzero().squeeze(1), count)):
        room = most - sum(len(part) for part in chosen)
        chosen.append(rows[torch.randperm(len(rows), device=rows.device)[:room]])
    return torch.cat(chosen)


def _labels(labels: Tensor, match: Tensor, model: SDANet) -> Tensor:
    first = int(model.convention.background_first)
    background = 0 if first else model.config.classes
    return torch.where(match >= 0, labels[match.clamp(min=0)] + first, background) if len(labels) else torch.full_like(match, background)


def _among(boxes: Tensor, others: Tensor) -> Tensor:
    return (boxes[:, None] == others).all(-1).any(-1)


def _proposal_losses(
    model: SDANet,
    answers: Sequence[tuple[Tensor, Tensor]],
    anchors: Float[Tensor, "anchors 4"],
    aims: Sequence[Float[Tensor, "objects 4"]],
    sizes: Sequence[tuple[int, int]],
) -> dict[str, Tensor]:
    score, move = (torch.cat([answer[place] for answer in answers], 1).float() for place in (0, 1))
    kind, shift, count = score.new_zeros(()), score.new_zeros(()), 0
    for picture, (aim, size) in enumerate(zip(aims, sizes, strict=True)):
        match = assign(model.convention.overlap(aim, anchors), 0.7, 0.3, 0.3)
        if model.convention.background_first:  # version 1 leaves out anchors that reach over the border
            limit = anchors.new_tensor([size[1], size[0]])
            match[(anchors[:, :2] < 0).any(-1) | (anchors[:, 2:] >= limit).any(-1)] = _IGNORED
        rows = sample(match, 256, 0.5)
        positive = rows[match[rows] >= 0]
        kind = kind + F.binary_cross_entropy_with_logits(score[picture, rows], (match[rows] >= 0).float(), reduction="sum")
        codes = model.convention.encode(anchors[positive], aim[match[positive]], UNIT)
        shift = shift + F.smooth_l1_loss(move[picture, positive], codes, reduction="sum", beta=1 / 9)
        count += len(rows)
    return {"proposals/objects": kind / max(count, 1), "proposals/boxes": shift / max(count, 1)}


def _mask_loss(
    model: SDANet, levels: Sequence[Tensor], head: torch.nn.Module, picked: Sequence[Tensor], matched: Sequence[Tensor], objects: Sequence[Objects]
) -> Tensor:
    boxes = [part[match >= 0] for part, match in zip(picked, matched, strict=True)]
    own = [match[match >= 0] for match in matched]
    labels = torch.cat([part.labels[match] for part, match in zip(objects, own, strict=True)])
    if not len(labels):
        return levels[0].sum() * 0.0
    goals = []
    for part, region, match in zip(objects, boxes, own, strict=True):
        assert part.masks is not None
        rows = torch.cat([match.unsqueeze(-1).to(region.dtype), model.convention.edges(region)], -1)
        goals.append(roi_align(part.masks.unsqueeze(1).to(region.dtype), rows, 28, aligned=True).squeeze(1) >= 0.5)
    logits = head(model.pool(levels, boxes, 14))
    channel = labels + int(model.convention.background_first)
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), channel].float(), torch.cat(goals).float())
