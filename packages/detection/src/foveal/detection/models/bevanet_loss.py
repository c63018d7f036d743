"""The loss of BEVANet, which is PIDNet's: classes where the network is unsure, detail everywhere, the boundary, and classes once more along it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveal.detection.models.bevanet import RawScene

#: Pixels with this label count nowhere.
IGNORED = 255


def hard_cross_entropy(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    threshold: float = 0.9,
    kept: int = 131_072,
    weight: Float[Tensor, " classes"] | None = None,
) -> Tensor:
    """Mean cross-entropy of the pixels whose class is given less than `threshold`, or of the `kept` least sure ones if those are fewer (OHEM).

    Args:
        logits: of every pixel.
        labels: classes; 255 counts nowhere. Without any pixel that counts, the loss is zero.
        threshold: of the probability that the true class is given.
        kept: pixels that count at least.
        weight: of each class.
    """
    valid = labels != IGNORED
    losses = F.cross_entropy(logits, labels, weight, ignore_index=IGNORED, reduction="none")[valid]
    if not len(losses):
        return logits.sum() * 0.0
    with torch.no_grad():
        given = logits.softmax(1).gather(1, labels.where(valid, 0)[:, None])[:, 0][valid]
        limit = given.kthvalue(min(kept, len(given) - 1) + 1).values.clamp_min(threshold)
        hard = given < limit
    return losses[hard].mean() if hard.any() else losses.mean()


def boundary_cross_entropy(logits: Float[Tensor, "batch height width"], boundary: Float[Tensor, "batch height width"]) -> Tensor:
    """Cross-entropy of whether a pixel is at a boundary (0 or 1), in which the rarer of the two weighs as much as the other altogether."""
    share = boundary.mean()
    return F.binary_cross_entropy_with_logits(logits, boundary, torch.where(boundary >= 0.5, 1 - share, share))


class SceneLoss(nn.Module):
    r"""The loss of a batch.

    .. math:: L = 0.4\,\mathrm{CE}(\text{detail}) + \mathrm{OHEM}(\text{classes}) + 20\,\mathrm{BCE}(\text{boundary})
              + \mathrm{OHEM}(\text{classes where the boundary is found})

    The detail's cross-entropy is a mean over all pixels, those that do not count included, as the authors'.

    Args:
        threshold: as in `hard_cross_entropy`.
        kept: likewise, over the batch of a process.
        detail: weight of the detail's cross-entropy.
        boundary: weight of the boundary's.
        along: probability of a boundary above which a pixel counts in the last term.
        class_weights: of each class; None weighs all alike.
    """

    weight: Tensor | None

    def __init__(
        self,
        threshold: float = 0.9,
        kept: int = 131_072,
        detail: float = 0.4,
        boundary: float = 20.0,
        along: float = 0.8,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.threshold, self.kept, self.detail, self.boundary, self.along = threshold, kept, detail, boundary, along
        self.register_buffer("weight", None if class_weights is None else torch.tensor(list(class_weights)), persistent=False)

    def forward(
        self, said: RawScene, labels: Int[Tensor, "batch height width"], boundary: Float[Tensor, "batch height width"]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts with their weights.

        Args:
            said: logits at any size; they are brought to that of the labels.
            labels: classes; 255 counts nowhere.
            boundary: 1 at the boundaries of classes, else 0.
        """
        classes, detail, edge = (at_size(logits, (labels.shape[1], labels.shape[2])) for logits in said)
        weight = None if self.weight is None else self.weight.to(classes.dtype)
        found = labels.where(edge[:, 0].sigmoid() > self.along, IGNORED)
        parts = {
            "detail": self.detail * F.cross_entropy(detail, labels, weight, ignore_index=IGNORED, reduction="none").mean(),
            "classes": hard_cross_entropy(classes, labels, self.threshold, self.kept, weight),
            "boundary": self.boundary * boundary_cross_entropy(edge[:, 0], boundary.to(edge.dtype)),
            "along_boundary": hard_cross_entropy(classes, found, self.threshold, self.kept, weight),
        }
        return torch.stack(list(parts.values())).sum(), {name: value.detach() for name, value in parts.items()}


def at_size(logits: Float[Tensor, "batch classes h w"], size: tuple[int, int]) -> Float[Tensor, "batch classes height width"]:
    """Logits of cells to logits of pixels: bilinear, corner on corner, as the authors train and measure."""
    return F.interpolate(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, size, mode="bilinear", align_corners=True)
