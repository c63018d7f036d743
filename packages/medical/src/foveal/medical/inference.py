"""A network over the slices of a scan: padded to the sizes it takes, in batches, large slices in overlapping windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

#: Slices that are larger go through the network in windows of this side, weighed towards their middles where they overlap.
WINDOW = 512


def logits_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The call that gives a network's logits, also where a single class comes out as a probability."""
    return getattr(network, "logits", network)


def multiple_of(network: nn.Module) -> int:
    """What sides of slices must be multiples of."""
    config: Any = getattr(network, "config", None)
    if hasattr(config, "multiple"):
        return config.multiple
    return 8 * config.stride if hasattr(config, "stride") else 16


@torch.no_grad()
def run_slices(
    network: nn.Module, slices: Float[Tensor, "slices channels height width"], batch: int = 16, device: torch.device | None = None
) -> Float[Tensor, "classes slices height width"]:
    """Logits of every slice, on the CPU in float32."""
    device = device or next(network.parameters()).device
    height, width = slices.shape[2:]
    multiple = multiple_of(network)
    out = []
    for part in slices.split(batch):
        padded = padded_to_multiple(part.to(device), multiple)
        if max(height, width) > WINDOW:
            from monai.inferers import sliding_window_inference

            side = WINDOW - WINDOW % multiple
            logits: Any = sliding_window_inference(padded, (side, side), 4, logits_of(network), overlap=0.25, mode="gaussian")
        else:
            logits = logits_of(network)(padded)
        out.append(logits[:, :, :height, :width].float().cpu())
    return torch.cat(out).transpose(0, 1)


def padded_to_multiple(x: Float[Tensor, "batch channels height width"], multiple: int) -> Float[Tensor, "batch channels height2 width2"]:
    """The edge repeated to the right and below."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple), mode="replicate")
