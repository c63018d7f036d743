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
