"""Selective dense attention: every level of a feature pyramid picks, per channel and per place, from all levels what it needs.

Wang et al., Towards Real-world X-ray Security Inspection: A High-Quality Benchmark and Lightweight Framework, ICCV 2021 (SDANet). 207,387
parameters a level of 256 channels. It stands behind any pyramid: maps in, maps of the same shapes out.

The authors stack all levels, weigh the stack by channel, weigh it by place and add up. Here each level is weighed once, by the sum of both
weights, and nothing is stacked: equal, with a third of the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ChannelSelection(nn.Module):
    """Weight of each level for each channel, from the average of all levels; over the levels they sum to one."""

    def __init__(self, channels: int, levels: int, hidden: int) -> None:
        super().__init__()
        self.levels = levels
        self.reduce = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.expand = nn.Conv2d(hidden, levels * channels, 1)

    def forward(self, total: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch levels channels 1 1"]:
        logits = self.expand(self.reduce(total.mean((2, 3), keepdim=True)))
        return logits.unflatten(1, (self.levels, -1)).softmax(1)


class PlaceSelection(nn.Module):
    """Weight of each level at each place, from mean and maximum over the channels of all levels' sum."""

    def __init__(self, levels: int, kernel: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(2, levels, kernel, padding=kernel // 2, bias=False)

    def forward(self, total: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch levels 1 height width"]:
        return self.score(torch.stack([total.mean(1), total.amax(1)], 1)).softmax(1).unsqueeze(2)


class GlobalContext(nn.Module):
    """What the whole map holds, gathered by one softmax over its places and added to each of them (GCNet, Cao et al., 2019)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )  # fmt: skip
        nn.init.kaiming_normal_(self.place.weight, nonlinearity="relu")
        nn.init.zeros_(self.place.bias)  # type: ignore[arg-type]
        for parameter in self.transform[-1].parameters():  # starts as the identity
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        weights = self.place(x).flatten(2).softmax(-1)
        context = (x.flatten(2) @ weights.mT).unsqueeze(-1)
        return x + self.transform(context)


class SelectiveDenseAttention(nn.Module):
    """One level's selection from all levels.

    Args:
        level: whose selection it is; 0 is the finest.
        channels: of every level.
        levels: of the pyramid.
        hidden: of the channel weights.
        kernel: side of the convolution behind the place weights.
    """

    def __init__(self, level: int, channels: int = 256, levels: int = 5, hidden: int = 128, kernel: int = 7) -> None:
        super().__init__()
        self.level = level
        self.channel, self.place = ChannelSelection(channels, levels, hidden), PlaceSelection(levels, kernel)
        self.context = GlobalContext(channels, channels // 16)

    def forward(self, maps: Sequence[Float[Tensor, "batch channels height_l width_l"]]) -> Float[Tensor, "batch channels height width"]:
        """The refined map of this level, at its size."""
        size = maps[self.level].shape[-2:]
        # finer levels keep their strongest answer, coarser ones are repeated
        levels = [F.adaptive_max_pool2d(x, size) if place < self.level else F.interpolate(x, size) for place, x in enumerate(maps)]
        levels[self.level] = maps[self.level]
        total = sum(levels[1:], levels[0])
        by_channel, by_place = self.channel(total).unbind(1), self.place(total).unbind(1)
        parts = (x * (channel + place) for x, channel, place in zip(levels, by_channel, by_place, strict=True))
        return maps[self.level] + self.context(sum(parts, torch.zeros_like(total)))


@dataclass(frozen=True)
class SelectiveDenseConfig:
    """Sizes of a neck; the defaults are the published ones."""

    channels: int = 256
    levels: int = 5
    hidden: int = 128  # of the channel weights
    kernel: int = 7  # side of the convolution behind the place weights


class SelectiveDenseNeck(nn.Module):
    """A selection for each level of a pyramid, each with its own weights.

    Args:
        config: sizes.
    """

    def __init__(self, config: SelectiveDenseConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SelectiveDenseConfig()
        sizes = (config.channels, config.levels, config.hidden, config.kernel)
        self.selections = nn.ModuleList(SelectiveDenseAttention(level, *sizes) for level in range(config.levels))

    def forward(self, maps: Sequence[Float[Tensor, "batch channels height_l width_l"]]) -> list[Float[Tensor, "batch channels height_l width_l"]]:
        """Refined maps, finest first.

        Raises:
            ValueError: another number of levels or of channels.
        """
        channels = self.config.channels
        if len(maps) != len(self.selections) or any(x.dim() != 4 or x.shape[1] != channels for x in maps):
            raise ValueError(
                f"expected {len(self.selections)} maps of shape (batch, {channels}, height, width); got {[tuple(x.shape) for x in maps]}"
            )
        return [selection(maps) for selection in self.selections]
