"""MEDUSA: one encoder-decoder gives a global attention map of the whole film, light heads make of it attention at each scale of a backbone.

After Aboutalebi et al., MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis, 2021. The
authors published neither code nor weights in a form that can be read, and no widths of the layers: this is built from the description, and
sized to within 2 % of the published 29.2 million parameters with a ResNet-50. Published accuracies are not claimed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of the attention body and heads; the defaults come within 2 % of the published size with a ResNet-50."""

    channels: int = 1  # of the image that the body sees
    width: int = 28  # of the body at full size; doubles with every halving
    halvings: int = 4
    map_width: int = 16  # channels of the global attention map
    size: int = 256  # side at which the body sees the image

    def __post_init__(self) -> None:
        if self.size % (1 << self.halvings):
            raise ValueError(f"size must be a multiple of {1 << self.halvings}; got {self.size}")


class AttentionBody(nn.Module):
    """The encoder-decoder: an image to a global attention map of its size."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        widths = [config.width << level for level in range(config.halvings + 1)]
        self.down = nn.ModuleList(_double(first, second) for first, second in zip([config.channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, 2) for width in widths[-2::-1])
        self.merge = nn.ModuleList(_double(2 * width, width) for width in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], config.map_width, 1)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch map height width"]:
        skips: list[Tensor] = []
        x = image
        for level, block in enumerate(self.down):
            x = block(x if not level else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        out: Tensor = self.head(x)
        return out


class ScaleHead(nn.Module):
    """Attention of one scale from the global map: between 0 and 1 for every channel and place. Starts near 1/2, even everywhere."""

    def __init__(self, map_width: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(map_width, map_width, 3, padding=1), nn.ReLU(), nn.Conv2d(map_width, channels, 1))

    def forward(self, attention: Float[Tensor, "batch map height width"], size: Sequence[int]) -> Float[Tensor, "batch channels rows columns"]:
        return self.layers(F.interpolate(attention, tuple(size), mode="bilinear", align_corners=False)).sigmoid()


class Medusa(nn.Module):
    """A backbone with global-to-local attention at several of its scales.

    Args:
        backbone: any classifier of images whose named stages give maps (batch, channels, height, width), such as those of torchvision and timm.
        stages: names of those submodules, as ``("layer1", "layer2", "layer3", "layer4")`` of a ResNet.
        config: sizes of the attention.
        example: an input of the backbone, from which the stages' channels are read; (1, 3, 64, 64) of zeros by default.

    Raises:
        ValueError: a stage that the backbone has not, or one that gives no map.
    """

    def __init__(self, backbone: nn.Module, stages: Sequence[str], config: MedusaConfig | None = None, example: Tensor | None = None) -> None:
        super().__init__()
        self.config = config = config or MedusaConfig()
        modules = dict(backbone.named_modules())
        missing = [stage for stage in stages if stage not in modules]
        if missing or not stages:
            children = ", ".join(name for name, _ in backbone.named_children())
            raise ValueError(f"expected names of the backbone's stages, such as {children}; got {', '.join(missing) or 'none'}")
        self.backbone, self.stages = backbone, tuple(stages)
        self.body = AttentionBody(config)
        channels = self._channels(modules, torch.zeros(1, 3, 64, 64) if example is None else example)
        self.heads = nn.ModuleList(ScaleHead(config.map_width, count) for count in channels)

    def forward(self, image: Float[Tensor, "batch 3 height width"], view: Float[Tensor, "batch channels rows columns"] | None = None) -> Tensor:
        """Classify.

        Args:
            image: as the backbone wants it.
            view: what the body sees; without it the image, grey where the body has one channel, at the body's size and normalised film by film.

        Returns:
            What the backbone returns.
        """
        return self._run(image, self.attention(image, view))[0]

    def attended(self, image: Float[Tensor, "batch 3 height width"], view: Tensor | None = None) -> dict[str, Float[Tensor, "batch rows columns"]]:
        """Stage -> its attention, mean of its channels: how much of each place passes on, from 0 to 1; for pictures."""
        return self._run(image, self.attention(image, view))[1]

    def _run(self, image: Tensor, attention: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The backbone with its stages weighted, and the mean weights of each stage."""
        modules, means = dict(self.backbone.named_modules()), {}

        def weighted(stage: str, head: nn.Module) -> Any:
            def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
                weights = head(attention, out.shape[-2:])
                means[stage] = weights.detach().mean(1)
                return out * weights

            return hook

        hooks = [modules[stage].register_forward_hook(weighted(stage, head)) for stage, head in zip(self.stages, self.heads, strict=True)]
        try:
            out: Tensor = self.backbone(image)
        finally:
            for hook in hooks:
                hook.remove()
        return out, means

    def attention(self, image: Float[Tensor, "batch 3 height width"], view: Tensor | None = None) -> Float[Tensor, "batch map rows columns"]:
        """The global attention map, before the heads."""
        if view is None:
            grey = image.mean(1, keepdim=True) if self.config.channels == 1 else image
            view = F.interpolate(grey, (self.config.size, self.config.size), mode="bilinear", align_corners=False, antialias=True)
            view = (view - view.mean((1, 2, 3), keepdim=True)) / view.std((1, 2, 3), keepdim=True).clamp_min(1e-6)
        found: Tensor = self.body(view)
        return found

    def _channels(self, modules: dict[str, nn.Module], example: Tensor) -> list[int]:
        shapes: dict[str, Any] = {}

        def noted(stage: str) -> Any:
            return lambda _, __, out: shapes.update({stage: getattr(out, "shape", None)})

        hooks = [modules[stage].register_forward_hook(noted(stage)) for stage in self.stages]
        training = self.backbone.training
        with torch.no_grad():
            self.backbone.eval()(example)
        self.backbone.train(training)
        for hook in hooks:
            hook.remove()
        for stage in self.stages:
            if shapes.get(stage) is None or len(shapes[stage]) != 4:
                raise ValueError(f"expected stages that give maps (batch, channels, height, width); {stage} gives {shapes.get(stage)}")
        return [shapes[stage][1] for stage in self.stages]


def _double(first: int, second: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (first, second):
        layers += [nn.Conv2d(inputs, second, 3, padding=1, bias=False), nn.BatchNorm2d(second), nn.ReLU()]
    return nn.Sequential(*layers)
