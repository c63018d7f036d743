"""HyperACE and FullPAD: correlations of many places at once through hyperedges, and the tunnels that carry them to every part of the network.

A hyperedge is a soft group of places: its weights over the map's cells sum to one. Cells speak to their hyperedges and hear them back, so that
what the map holds in many places is correlated at a cost linear in their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import ConvNorm, DSC3k
from foveal.kernels.nn import HyperedgeAttention

#: Channels a head of the incidence; its heads are averaged before the softmax, so that they only set the scale.
_HEAD_DIM = 16


def hyperedge_attention_on_map(
    hyperedges: nn.Module, x: Float[Tensor, "batch dim height width"]
) -> Float[Tensor, "batch dim height width"]:  # fmt: skip
    """A module of tokens, on the cells of a map. In channels_last memory nothing is copied."""
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    return hyperedges(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class C3AH(nn.Module):
    """Two ways side by side, one through adaptive hypergraph convolution, and a convolution that merges them."""

    def __init__(self, inputs: int, outputs: int, hyperedges: int, context: str = "both") -> None:
        super().__init__()
        self.main = ConvNorm(inputs, outputs)
        self.side = ConvNorm(inputs, outputs)
        self.hypergraph = HyperedgeAttention(outputs, hyperedges, heads=outputs // _HEAD_DIM, context=context, dropout=0.1)
        self.merge = ConvNorm(2 * outputs, outputs)

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height width"]:
        """Map to map."""
        return self.merge(torch.cat((hyperedge_attention_on_map(self.hypergraph, self.main(x)), self.side(x)), 1))


class Fuse(nn.Module):
    """Three levels of the pyramid on the grid of the middle one, merged to its width."""

    def __init__(self, channels: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        self.channels = channels
        self.merge = ConvNorm(sum(channels), outputs)

    def forward(
        self,
        fine: Float[Tensor, "batch fine_channels 2*height 2*width"],
        middle: Float[Tensor, "batch channels height width"],
        coarse: Float[Tensor, "batch coarse_channels height/2 width/2"],
    ) -> Float[Tensor, "batch outputs height width"]:
        """Three maps to one."""
        return self.merge(torch.cat((F.avg_pool2d(fine, 2), middle, F.interpolate(coarse, scale_factor=2.0)), 1))


class HyperACE(nn.Module):
    """Correlations of three levels: a third of the fused channels through two hypergraph branches, a third through convolutions, a third as it is.

    Args:
        channels: of the three levels.
        outputs: channels out; the three parts have half of it each.
        repeats: links of the convolutional chain.
        hyperedges: number of hyperedges of a branch.
        context: what of the cells shifts the prototypes: "both", "mean" or "max".
    """

    def __init__(
        self,
        channels: tuple[int, int, int],
        outputs: int,
        repeats: int,
        hyperedges: int,
        context: str = "both",
    ) -> None:
        super().__init__()
        part = outputs // 2
        self.fuse = Fuse(channels, channels[1])
        self.split = ConvNorm(channels[1], 3 * part)
        self.local = nn.ModuleList(DSC3k(part, part, 2, True, 0.5, (3, 7)) for _ in range(repeats))
        self.first_branch = C3AH(part, part, hyperedges, context)
        self.second_branch = C3AH(part, part, hyperedges, context)
        self.merge = ConvNorm((4 + repeats) * part, outputs)

    def forward(
        self,
        fine: Float[Tensor, "batch fine_channels 2*height 2*width"],
        middle: Float[Tensor, "batch channels height width"],
        coarse: Float[Tensor, "batch coarse_channels height/2 width/2"],
    ) -> Float[Tensor, "batch outputs height width"]:
        """Three maps to one on the grid of the middle one."""
        kept, high, low = self.split(self.fuse(fine, middle, coarse)).chunk(3, 1)
        parts = [kept, self.first_branch(high), low]
        for block in self.local:
            parts.append(block(parts[-1]))
        return self.merge(torch.cat((*parts, self.second_branch(high)), 1))


class Shrink(nn.Module):
    """The mean of two by two cells, and a convolution where the width must change."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.adjust = ConvNorm(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height/2 width/2"]:
        """Map to map."""
        return self.adjust(F.avg_pool2d(x, 2))


class Tunnel(nn.Module):
    """What HyperACE found, added to a map by a learned gate that starts shut (FullPAD)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.0))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], correlations: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The map, and the correlations scaled by the gate."""
        return x + self.gate * correlations
