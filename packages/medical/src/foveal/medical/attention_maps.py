"""What a position of a slice attends to in a guided-attention network, for pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from foveal.medical.inference import multiple_of, padded_to_multiple
from foveal.medical.models.guided_attention import LEVELS, GuidedAttentionNet, PositionAttention


@torch.no_grad()
def position_maps(
    network: GuidedAttentionNet, slices: Float[Tensor, "slices channels height width"], slice_index: int | None = None,
    point: tuple[int, int] | None = None,
) -> tuple[Float[ndarray, "height width"], dict[str, Float[ndarray, "rows columns"]], tuple[int, int]]:  # fmt: skip
    """The second stage's position attention of one position, at every level.

    Args:
        network: in eval mode.
        slices: of a scan.
        slice_index: which; by default the middle one.
        point: (row, column) in the slice; by default the middle of what is found there, or of the slice.

    Returns:
        The slice (its own channel), level -> map at the size of the attention, and the point.
    """
    index = len(slices) // 2 if slice_index is None else slice_index
    chosen = slices[index : index + 1]
    height, width = chosen.shape[2:]
    device = next(network.parameters()).device
    padded = padded_to_multiple(chosen.to(device), multiple_of(network))
    found: dict[str, Tensor] = {}
    hooks = []
    for level in range(LEVELS):
        branch: Any = network.stages[1].position[level]  # type: ignore[index]
        attend = branch.attend
        assert isinstance(attend, PositionAttention)
        hooks.append(attend.register_forward_hook(lambda _, inputs, __, level=level: found.update({f"level {level + 1}": inputs[0]})))
    labels = network(padded)[0, :, :height, :width].argmax(0)
    for hook in hooks:
        hook.remove()
    if point is None:
        places = labels.nonzero().float()
        middle = places.mean(0) if len(places) else torch.tensor([height / 2, width / 2])
        point = (int(middle[0]), int(middle[1]))
    maps = {}
    for level in range(LEVELS):
        x = found[f"level {level + 1}"]
        cell = tuple(min(int(at * cells / size), cells - 1) for at, cells, size in zip(point, x.shape[2:], padded.shape[2:], strict=True))
        weights = network.stages[1].position[level].attend.row(x, cell)[0]  # type: ignore[index,union-attr]
        rows, columns = (round(size * cells / whole) for size, cells, whole in zip((height, width), x.shape[2:], padded.shape[2:], strict=True))
        maps[f"level {level + 1}"] = np.asarray(weights[:rows, :columns].cpu())
    return chosen[0, chosen.shape[1] // 2].numpy(), maps, point
