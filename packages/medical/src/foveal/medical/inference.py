"""A network over the slices of a scan: padded to the sizes it takes, in batches, large slices in overlapping windows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import product
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.core.errors import UserError

#: Another look at a slice: one pixel further down and to the right, or mirrored along its height or its width.
View = Literal["shifted", "mirrored_height", "mirrored_width"]

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


def check_views(views: Collection[str]) -> None:
    """Refuse names of views that there are not."""
    if unknown := sorted(set(views) - set(get_args(View))):
        raise UserError(f"expected views of {', '.join(get_args(View))}, or none; got {', '.join(unknown)}")


@torch.no_grad()
def run_slices(
    network: nn.Module, slices: Float[Tensor, "slices channels height width"], batch: int = 16, device: torch.device | None = None,
    views: Collection[View] = (),
) -> Float[Tensor, "classes slices height width"]:  # fmt: skip
    """Logits of every slice, on the CPU in float32.

    Args:
        network: of slices.
        slices: any number, of any size.
        batch: slices at once.
        device: of the network, where it has no parameters that tell.
        views: that each slice is seen in besides as it stands, alone and together: one doubles the work, two make it four times as much. The
            logits are then those of the mean probabilities. "shifted" gives a network that works at half the resolution the other half of the
            places; mirrors are for networks that were trained with them.

    Raises:
        UserError: a view that there is not.
    """
    check_views(views)
    device = device or next(network.parameters()).device
    out = []
    for part in slices.split(batch):
        part = part.to(device)
        if not views:
            out.append(_logits(network, part).float().cpu())
            continue
        seen = [_seen(network, part, *view) for view in product(*((False, True) if view in views else (False,) for view in get_args(View)))]
        out.append(_as_logits(torch.stack([_probabilities(logits.float()) for logits in seen]).mean(0)).cpu())
    return torch.cat(out).transpose(0, 1)


def _seen(network: nn.Module, part: Tensor, shifted: bool, mirrored_height: bool, mirrored_width: bool) -> Tensor:
    """The logits of one view, back in place."""
    axes = [axis for axis, mirrored in ((2, mirrored_height), (3, mirrored_width)) if mirrored]
    part = part.flip(axes)
    logits = _logits(network, F.pad(part, (1, 0, 1, 0), mode="replicate"))[:, :, 1:, 1:] if shifted else _logits(network, part)
    return logits.flip(axes)


def _logits(network: nn.Module, part: Tensor) -> Tensor:
    height, width = part.shape[2:]
    multiple = multiple_of(network)
    padded = in_cpu_order(padded_to_multiple(part, multiple))
    if max(height, width) > WINDOW:
        from monai.inferers import sliding_window_inference

        side = WINDOW - WINDOW % multiple
        logits: Any = sliding_window_inference(padded, (side, side), 4, logits_of(network), overlap=0.25, mode="gaussian")
    else:
        logits = logits_of(network)(padded)
    return logits[:, :, :height, :width]


def _probabilities(logits: Tensor) -> Tensor:
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _as_logits(probabilities: Tensor) -> Tensor:
    """Logits that have these probabilities."""
    smallest = torch.finfo(probabilities.dtype).tiny
    logs = probabilities.clamp(min=smallest).log()
    return logs - (1 - probabilities).clamp(min=smallest).log() if probabilities.shape[1] == 1 else logs


def in_cpu_order(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """The same values in the order in which a CPU convolves fastest: all channels of a pixel side by side. Other devices keep theirs."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def padded_to_multiple(x: Float[Tensor, "batch channels height width"], multiple: int) -> Float[Tensor, "batch channels height2 width2"]:
    """The edge repeated to the right and below."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple), mode="replicate")
