"""Multi-scale guided attention: a segmentation network whose four scales attend to positions and to channels, guided by autoencoders.

Sinha & Dolz, Multi-scale Self-guided Attention for Medical Image Segmentation, IEEE JBHI 2021 (arXiv:1906.02849), as the released code computes it:
104,511,475 parameters, of which 955,412 never take part (`foveal.medical.checkpoints` keeps account of them). A ResNeXt-101 (32x8d) gives maps of
four scales; two stages of attention follow, the second looks at what the first has found. Position attention runs on `foveal.kernels.attention`:
no (position, position) map is stored, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveal.kernels import attention

LEVELS = 4


@dataclass(frozen=True)
class GuidedAttentionConfig:
    """Sizes of the network; the defaults are the published ones."""

    classes: int = 5  # background included
    channels: int = 1  # of the input: 1 for a grey image, more for sequences of one scan or neighbouring slices
    blocks: tuple[int, int, int, int] = (3, 4, 23, 3)  # of the four backbone stages
    stem: int = 64  # channels of the first convolution; the stages give 4, 8, 16 and 32 times as many
    groups: int = 32  # of the grouped convolutions
    group_width: int = 8  # channels of one group in the first stage
    stride: int = 4  # pixels of the input that one cell of the attention maps stands for: 4, 2 or 1
    width: int = 64  # channels of the attention maps
    encoded: tuple[int, int] = (256, 512)  # channels of the autoencoder at half and at a quarter of the maps' size

    def __post_init__(self) -> None:
        for name in ("blocks", "encoded"):  # lists come from YAML and from headers of checkpoints
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.blocks) != LEVELS or min(self.blocks) < 1:
            raise ValueError(f"blocks must be four positive numbers; got {self.blocks}")
        if self.stride not in (1, 2, 4):
            raise ValueError(f"stride must be 1, 2 or 4; got {self.stride}")
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8: queries have an eighth of the channels; got {self.width}")


class GuidedOutputs(NamedTuple):
    """What training needs; every tuple is ordered from level 1 (finest) to level 4.

    Attributes:
        first: logits of the plain maps, (batch, classes, height, width) each.
        second: logits of the second stage.
        codes: the autoencoders' bottlenecks, stage 1 then stage 2: (batch, encoded, height/4, width/4) of the maps' size.
        inputs: what the autoencoders were to reproduce, stage 1 then stage 2.
        reproduced: what they made of it.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    codes: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    inputs: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    reproduced: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Bottleneck(nn.Module):
    """A ResNeXt block: 1x1, grouped 3x3, 1x1, and the input added."""

    def __init__(self, inputs: int, inner: int, outputs: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.downsample = None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs height2 width2"]:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class Backbone(nn.Module):
    """ResNeXt: maps of four scales, each half as large as the one before."""

    def __init__(self, config: GuidedAttentionConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(config.channels, config.stem, 7, 2 if config.stride > 1 else 1, 3, bias=False)
        self.norm = nn.BatchNorm2d(config.stem)
        self.pool = nn.MaxPool2d(3, 2, 1) if config.stride == 4 else nn.Identity()
        self.stages, inputs = nn.ModuleList(), config.stem
        for level, depth in enumerate(config.blocks):
            inner, outputs = config.groups * config.group_width << level, 4 * config.stem << level
            blocks = []
            for index in range(depth):
                blocks.append(Bottleneck(inputs, inner, outputs, config.groups, 2 if level and not index else 1))
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        x = self.pool(F.relu(self.norm(self.conv(image))))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class PositionAttention(nn.Module):
    """Every position attends to all others, unscaled: ``gamma * softmax(q k^T) v + x``. It starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(width, width // 8, 1), nn.Conv2d(width, width // 8, 1), nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        q, k, v = (layer(x).flatten(2).mT.unsqueeze(1) for layer in (self.query, self.key, self.value))
        attended = attention(q, k, v, scale=1.0).squeeze(1).mT.view_as(x)
        return self.gamma * attended + x

    def row(self, x: Float[Tensor, "batch width rows columns"], position: tuple[int, int]) -> Float[Tensor, "batch rows columns"]:
        """What one position (row, column) of the map attends to; for pictures."""
        q = self.query(x)[:, :, position[0], position[1]]
        logits = torch.einsum("bd,bdhw->bhw", q, self.key(x))
        return logits.flatten(1).softmax(-1).view_as(logits)


class ChannelAttention(nn.Module):
    """Every channel attends to those it resembles least: ``gamma * softmax(-X X^T) X + X``. It starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def weights(self, x: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width width"]:
        """The channels' weights. The published form subtracts from the row's largest, which a softmax does not see."""
        flat = x.flatten(2)
        return (-(flat @ flat.mT)).softmax(-1)

    def forward(self, x: Float[Tensor, "batch width rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        return self.gamma * (self.weights(x) @ x.flatten(2)).view_as(x) + x


def _convolved(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs)]


class AttentionBranch(nn.Module):
    """Convolution, one of the two attentions, convolution: 2 width channels in, width out."""

    def __init__(self, width: int, attend: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(*_convolved(2 * width, width, 3), nn.PReLU())
        self.attend = attend
        self.after = nn.Sequential(*_convolved(width, width, 3), nn.PReLU())

    def forward(self, x: Float[Tensor, "batch width2 rows columns"]) -> Float[Tensor, "batch width rows columns"]:
        return self.after(self.attend(self.before(x)))


class Autoencoder(nn.Module):
    """Two halvings and back; its bottleneck and its reproduction guide the attention."""

    def __init__(self, width: int, encoded: tuple[int, int]) -> None:
        super().__init__()
        half, quarter = encoded
        self.halve, self.quarter = self._encode(width, half), self._encode(half, quarter)
        self.enlarge, self.restore = self._decode(quarter, half), self._decode(half, width)

    @staticmethod
    def _encode(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*_convolved(inputs, outputs, 3), nn.ReLU(), *_convolved(outputs, outputs, 3), nn.ReLU(), nn.MaxPool2d(2))

    @staticmethod
    def _decode(inputs: int, outputs: int) -> nn.Sequential:
        layers = [*_convolved(inputs, outputs, 3), nn.ReLU(), *_convolved(outputs, outputs, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.ConvTranspose2d(outputs, outputs, 2, 2))

    def forward(self, x: Float[Tensor, "batch width rows columns"]) -> tuple[Tensor, Float[Tensor, "batch width rows columns"]]:
        """Bottleneck and reproduction."""
        half = self.halve(x)
        code = self.quarter(half)
        return code, _resized(self.restore(_resized(self.enlarge(code), half)), x)


class GuidedStage(nn.Module):
    """One stage: at each level both attentions, their sum weighed by what the stage's one autoencoder reproduces."""

    def __init__(self, config: GuidedAttentionConfig) -> None:
        super().__init__()
        width = config.width
        self.position = nn.ModuleList(AttentionBranch(width, PositionAttention(width)) for _ in range(LEVELS))
        self.channel = nn.ModuleList(AttentionBranch(width, ChannelAttention()) for _ in range(LEVELS))
        self.autoencoder = Autoencoder(2 * width, config.encoded)
        self.semantic = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in range(LEVELS))
        self.merge = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(LEVELS))

    def forward(self, maps: list[Tensor], recompute: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Attended maps, bottlenecks and reproductions, finest level first."""
        found = []
        # The coarsest first: the autoencoder's running statistics move with every level, in the published order.
        for level in reversed(range(LEVELS)):
            if recompute and torch.is_grad_enabled():
                found.append(checkpoint(self._level, level, maps[level], use_reentrant=False, context_fn=partial(_statistics_move_once, self)))
            else:
                found.append(self._level(level, maps[level]))
        attended, codes, reproduced = (list(part) for part in zip(*found[::-1], strict=True))
        return attended, codes, reproduced

    def _level(self, level: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code, again = self.autoencoder(x)
        both = self.position[level](x) + self.channel[level](x)
        return self.merge[level](both * self.semantic[level](again)), code, again


class GuidedAttentionNet(nn.Module):
    """The whole network: image to class logits.

    Args:
        config: sizes.
        recompute: in training keep only the inputs of each level's attention and compute it again in the backward pass: much less memory,
            about a third more time, the same numbers.
    """

    def __init__(self, config: GuidedAttentionConfig | None = None, recompute: bool = False) -> None:
        super().__init__()
        config = config or GuidedAttentionConfig()
        self.config, self.recompute, width = config, recompute, config.width
        self.backbone = Backbone(config)
        self.reduce = nn.ModuleList(nn.Sequential(*_convolved(4 * config.stem << level, width, 1), nn.PReLU()) for level in range(LEVELS))
        self.fuse = nn.Sequential(
            *_convolved(LEVELS * width, width, 3), nn.PReLU(), *_convolved(width, width, 3), nn.PReLU(), *_convolved(width, width, 1), nn.PReLU()
        )
        self.stages = nn.ModuleList(GuidedStage(config) for _ in range(2))
        self.heads = nn.ModuleList(nn.ModuleList(nn.Conv2d(width, config.classes, 1) for _ in range(LEVELS)) for _ in range(2))
        self.apply(_initialise)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        """Logits: the mean of the second stage's four. Height and width are best multiples of 8 x stride; others are allowed."""
        _, (_, second), _, _ = self._attended(image)
        # One resizing of the mean: both are linear.
        return _resized(torch.stack(_headed(self.heads[1], second)).mean(0), image)

    def forward_guided(self, image: Float[Tensor, "batch channels height width"]) -> GuidedOutputs:
        """Everything that the guided loss looks at."""
        plain, (_, second), stages, inputs = self._attended(image)
        logits = [tuple(_resized(x, image) for x in _headed(heads, maps)) for heads, maps in zip(self.heads, (plain, second), strict=True)]
        codes, reproduced = ((tuple(stages[0][part]), tuple(stages[1][part])) for part in (1, 2))
        return GuidedOutputs(logits[0], logits[1], codes, (tuple(inputs[0]), tuple(inputs[1])), reproduced)

    def features(self, image: Float[Tensor, "batch channels height width"]) -> tuple[list[Tensor], Tensor]:
        """The four reduced maps at the finest one's size, finest level first, and the map fused from them."""
        maps = [reduce(x) for reduce, x in zip(self.reduce, self.backbone(image), strict=True)]
        maps = [_resized(x, maps[0]) for x in maps]
        return maps, self.fuse(torch.cat(maps[::-1], 1))

    def _attended(self, image: Tensor) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]], list[tuple], list[list[Tensor]]]:
        plain, fused = self.features(image)
        joined = [torch.cat([x, fused], 1) for x in plain]
        first = self.stages[0](joined, self.recompute)
        guided = [torch.cat([x, found * fused], 1) for x, found in zip(plain, first[0], strict=True)]
        second = self.stages[1](guided, self.recompute)
        return plain, (first[0], second[0]), [first, second], [joined, guided]


def guided_attention_small(classes: int, channels: int = 1) -> GuidedAttentionConfig:
    """A network for thousands of slices on a CPU: about 0.6 million parameters, maps of half the input's size."""
    return replace(GuidedAttentionConfig(), classes=classes, channels=channels, blocks=(1, 1, 1, 1), stem=8, groups=4, group_width=4, stride=2,
                   width=16, encoded=(32, 48))  # fmt: skip


def _statistics_move_once(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the pass, and for the second one that the backward pass makes: batch norms must not count that as another batch."""

    @contextmanager
    def still() -> Iterator[None]:
        norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:  # torch leaves by an exception as soon as it has what it needs
            for norm, (momentum, count) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, count

    return nullcontext(), still()


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def _initialise(module: nn.Module) -> None:
    """The authors' start: Xavier-normal convolutions, batch norms around one."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _headed(heads: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    assert isinstance(heads, nn.ModuleList)
    return [head(x) for head, x in zip(heads, maps, strict=True)]
