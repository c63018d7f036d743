"""The definitions of the multi-scale operators: plain torch, any dtype, differentiable any number of times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def sequence_norm(x: Float[Tensor, "sequences length channels"], scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over length and channels of each sequence, scaled and shifted a channel (gLN)."""
    shape = x.shape[-2:]
    return F.layer_norm(x, shape, scale.expand(shape), shift.expand(shape), eps)


def depthwise(x: Float[Tensor, "sequences length channels"], taps: Float[Tensor, "channels kernel"], bias: Tensor | None, stride: int) -> Tensor:
    """y[t, c] = sum_k taps[c, k] x[t stride + k - kernel // 2, c] + bias[c], zero outside."""
    image = x[:, None].permute(0, 3, 1, 2)  # a channels-last image of height one: no copy on the way in or out
    image = F.conv2d(image, taps[:, None, None], bias, (1, stride), (0, taps.shape[1] // 2), groups=x.shape[-1])
    return image.permute(0, 2, 3, 1)[:, 0]


def depthwise_norm(
    x: Float[Tensor, "sequences length channels"],
    taps: Float[Tensor, "channels kernel"] | None,
    bias: Float[Tensor, " channels"] | None,
    scale: Float[Tensor, " channels"],
    shift: Float[Tensor, " channels"],
    slope: Float[Tensor, 1] | None,
    stride: int,
    eps: float,
) -> Float[Tensor, "sequences shorter channels"]:
    """prelu(norm(conv(x)))."""
    y = sequence_norm(x if taps is None else depthwise(x, taps, bias, stride), scale, shift, eps)
    return y if slope is None else F.prelu(y, slope)


def gated_injection(
    local: Float[Tensor, "sequences length channels"],
    other: Float[Tensor, "sequences other_length channels"],
    taps: Float[Tensor, "3 channels kernel"],
    scale: Float[Tensor, "3 channels"],
    shift: Float[Tensor, "3 channels"],
    index: Int[Tensor, " length"],
    eps: float,
) -> Float[Tensor, "sequences length channels"]:
    """norm(conv(local)) * sigmoid(norm(conv(other)))[index] + norm(conv(other))[index]."""
    parts = [depthwise_norm(x, taps[i], None, scale[i], shift[i], None, 1, eps) for i, x in enumerate((local, other, other))]
    return torch.addcmul(parts[2].index_select(1, index), parts[0], torch.sigmoid(parts[1]).index_select(1, index))


def channel_norm(
    x: Float[Tensor, "rows channels"], slope: Float[Tensor, " groups"], scale: Tensor, shift: Tensor, sizes: tuple[int, ...], eps: float
) -> Float[Tensor, "rows channels"]:
    """PReLU and layer norm of each group of neighbouring channels, then one scale and shift a channel."""
    if len(sizes) == 1:
        return F.layer_norm(F.prelu(x, slope), (x.shape[-1],), scale, shift, eps)
    x = torch.where(x > 0, x, x * _slope_of_channels(slope, sizes))
    pieces, start = [], 0
    while start < len(sizes):  # equal neighbours are normalised in one call
        stop = start
        while stop < len(sizes) and sizes[stop] == sizes[start]:
            stop += 1
        piece = x.narrow(-1, sum(sizes[:start]), sizes[start] * (stop - start)).unflatten(-1, (stop - start, sizes[start]))
        pieces.append(F.layer_norm(piece, piece.shape[-1:], eps=eps).flatten(-2))
        start = stop
    return torch.addcmul(shift, torch.cat(pieces, -1), scale)


def _slope_of_channels(slope: Float[Tensor, " groups"], sizes: tuple[int, ...]) -> Float[Tensor, " channels"]:
    return slope.repeat_interleave(torch.tensor(sizes, device=slope.device), output_size=sum(sizes))
