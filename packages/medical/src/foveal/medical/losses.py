"""Losses of the published trainings: the guided loss of multi-scale attention, the focal region loss of RAT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveal.medical.models.guided_attention import GuidedOutputs


class GuidedLoss(NamedTuple):
    """The guided loss and its parts, unweighted: sums of 8 cross entropies, 4 squared differences of codes, 8 of reproductions."""

    total: Float[Tensor, ""]
    segmentation: Float[Tensor, ""]
    semantic: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]


def guided_loss(
    outputs: GuidedOutputs,
    labels: Int[Tensor, "batch height width"],
    semantic_weight: float = 0.25,
    reconstruction_weight: float = 0.1,
) -> GuidedLoss:
    """Loss of multi-scale guided attention: cross entropy of all eight predictions, autoencoders that agree and reproduce.

    Gradients go into both sides of every squared difference, as in the released code.

    Args:
        outputs: of `GuidedAttentionNet.forward_guided`.
        labels: class of every pixel.
        semantic_weight: of the bottlenecks' differences between the two stages (the code's 0.25).
        reconstruction_weight: of the reproductions' differences (the code's 0.1).
    """
    segmentation = torch.stack([F.cross_entropy(logits, labels) for logits in (*outputs.first, *outputs.second)]).sum()
    semantic = torch.stack([F.mse_loss(first, second) for first, second in zip(*outputs.codes, strict=True)]).sum()
    pairs = [pair for stage in (0, 1) for pair in zip(outputs.inputs[stage], outputs.reproduced[stage], strict=True)]
    reconstruction = torch.stack([F.mse_loss(made, given) for given, made in pairs]).sum()
    return GuidedLoss(segmentation + semantic_weight * semantic + reconstruction_weight * reconstruction, segmentation, semantic, reconstruction)


def bce_dice_loss(probability: Float[Tensor, "batch 1 height width"], target: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, ""]:
    """Binary cross entropy plus one minus the images' mean Dice (smoothed by 1), MHS-VM's loss; targets may be soft."""
    p, y = probability.flatten(1), target.flatten(1)
    dice = (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)
    return F.binary_cross_entropy(p, y) + 1 - dice.mean()


def focal_region_loss(
    image: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    regions: Int[Tensor, "batch height width"],
    beta: float = 1e-3,
) -> Float[Tensor, ""]:
    """RAT's loss: the absolute error, weighed more in regions that are restored worse.

    ``mean(e * (1 + beta * w))`` where w is the mean of e over a pixel's region and all channels, without gradient, divided by its largest value
    in the batch.

    Args:
        image: restored.
        target: what it should be.
        regions: number of each pixel's region, from 0, with gaps or not.
        beta: how much more; the released training uses 1e-3.
    """
    error = (image - target).abs()
    with torch.no_grad():
        batch, count = regions.shape[0], int(regions.max()) + 1
        index = (regions.long().flatten(1) + count * torch.arange(batch, device=regions.device)[:, None]).flatten()
        sums = torch.zeros(batch * count, dtype=error.dtype, device=error.device).index_add_(0, index, error.detach().mean(1).flatten())
        pixels = torch.bincount(index, minlength=batch * count).clamp(min=1)
        weight = (sums / pixels)[index].view(batch, 1, *regions.shape[1:])
        weight = (weight / weight.amax().clamp(min=torch.finfo(error.dtype).tiny)).clamp(0, 1)  # equal pictures: no weight, not 0 / 0
    return (error * (1 + beta * weight)).mean()
