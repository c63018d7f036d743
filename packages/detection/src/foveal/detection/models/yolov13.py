"""YOLOv13: a detector that correlates many places at once, and spreads what it found through the whole network.

Lei et al., YOLOv13: Real-Time Object Detection with Hypergraph-Enhanced Adaptive Visual Perception, 2025 (arXiv:2506.17733).
Four scales, 2,494,151 / 9,055,527 / 27,627,783 / 64,057,511 parameters with 80 classes. Three levels of a backbone go through HyperACE, whose
result is carried back by gated tunnels into backbone, neck and head (FullPAD). Heads for masks, keypoints and turned boxes are additions: the
authors published boxes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveal.detection.models.blocks import AreaStage, ConvNorm, DSC3k2, DSConv
from foveal.detection.models.heads import Detect, OrientedDetect, Pose, Prediction, RawPrediction, Segment
from foveal.detection.models.hyperace import HyperACE, Shrink, Tunnel
from foveal.kernels.nn import ECA, ELA, ULSAM


@dataclass(frozen=True)
class Scale:
    """How wide and deep a published size is."""

    width: float
    depth: float
    max_channels: int
    hyperedges: int
    large: bool  # nested blocks in the backbone; layer scale and a narrower perceptron in attention

    def channels(self, published: int) -> int:
        """Width of a layer that has `published` channels at width 1, rounded up to a multiple of eight."""
        return -int(-min(published, self.max_channels) * self.width // 8) * 8

    def repeats(self, published: int) -> int:
        """Blocks of a stage that has `published` of them at depth 1."""
        return max(round(published * self.depth), 1)


SCALES = {
    "n": Scale(0.25, 0.5, 1024, 4, False),
    "s": Scale(0.5, 0.5, 1024, 8, False),
    "l": Scale(1.0, 1.0, 512, 8, True),
    "x": Scale(1.5, 1.0, 512, 12, True),
}
TASKS = ("detect", "segment", "pose", "oriented")
#: Stages after which a block of channel or place attention may stand.
STAGES = ("stage2", "stage3", "stage4", "stage5", "neck3", "neck4", "neck5")
CHANNEL_ATTENTION: dict[str, Callable[[int], nn.Module]] = {"eca": ECA, "ela": ELA, "ulsam": lambda channels: ULSAM(channels, 4)}


@dataclass(frozen=True)
class YOLOv13Config:
    """Sizes of a network.

    Attributes:
        scale: "n", "s", "l" or "x"; the authors have no medium one.
        classes: number of classes.
        task: "detect", "segment", "pose" or "oriented".
        keypoints: of "pose": number of keypoints, and numbers each (2, or 3 with visibility).
        attend: stage -> "eca", "ela" or "ulsam": a block of channel or place attention behind that stage; not published, none by default.

    Raises:
        ValueError: a value that is none of these.
    """

    scale: str = "n"
    classes: int = 80
    task: str = "detect"
    keypoints: tuple[int, int] = (17, 3)
    attend: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keypoints", tuple(self.keypoints))
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}; got {self.scale!r}")
        if self.classes < 1:
            raise ValueError(f"classes must be positive; got {self.classes}")
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}")
        if len(self.keypoints) != 2 or self.keypoints[0] < 1 or self.keypoints[1] not in (2, 3):
            raise ValueError(f"keypoints must be (number, 2 or 3); got {self.keypoints}")
        for stage, block in self.attend.items():
            if stage not in STAGES or block not in CHANNEL_ATTENTION:
                raise ValueError(f"attend maps {', '.join(STAGES)} to {', '.join(CHANNEL_ATTENTION)}; got {stage}: {block}")


class YOLOv13(nn.Module):
    """The network of section 3 of the paper: pictures (batch, 3, height, width) in, what is in them out, as `Prediction` has it.

    Args:
        config: sizes; by default the smallest, of COCO's 80 classes.

    Raises:
        ValueError: from a call, pictures whose sides are no multiples of 32, or that have not three channels.
    """

    def __init__(self, config: YOLOv13Config | None = None) -> None:
        super().__init__()
        self.config = config = config or YOLOv13Config()
        scale = SCALES[config.scale]
        c1, c2, c3, c4, c5 = (scale.channels(published) for published in (64, 128, 256, 512, 1024))
        two, four = scale.repeats(2), scale.repeats(4)
        mlp_ratio = 1.5 if scale.large else 2.0

        # Backbone, strides 2 to 32.
        self.stem = ConvNorm(3, c1, 3, 2)
        self.down2 = ConvNorm(c1, c2, 3, 2, groups=2)
        self.stage2 = DSC3k2(c2, c3, two, scale.large, 0.25)
        self.down3 = ConvNorm(c3, c3, 3, 2, groups=4)
        self.stage3 = DSC3k2(c3, c4, two, scale.large, 0.25)
        self.down4 = DSConv(c4, c4, 3, 2)
        self.stage4 = AreaStage(c4, c4, four, 4, scale.large, mlp_ratio)
        self.down5 = DSConv(c4, c5, 3, 2)
        self.stage5 = AreaStage(c5, c5, four, 1, scale.large, mlp_ratio)

        # Correlations of three levels, for every part.
        self.hyperace = HyperACE((c4, c4, c5), c4, two, scale.hyperedges)
        self.correlations5 = Shrink(c4, c5)
        self.correlations3 = ConvNorm(c4, c3)
        self.backbone_tunnel3, self.backbone_tunnel4, self.backbone_tunnel5 = Tunnel(), Tunnel(), Tunnel()
        self.neck_tunnel4, self.neck_tunnel3 = Tunnel(), Tunnel()
        self.head_tunnel4, self.head_tunnel5 = Tunnel(), Tunnel()

        # Neck: down the pyramid, and up again.
        self.top_down4 = DSC3k2(c5 + c4, c4, two, True)
        self.neck3 = DSC3k2(c4 + c4, c3, two, True)
        self.up4 = ConvNorm(c3, c3, 3, 2)
        self.neck4 = DSC3k2(c3 + c4, c4, two, True)
        self.up5 = ConvNorm(c4, c4, 3, 2)
        self.neck5 = DSC3k2(c4 + c5, c5, two, True)

        levels = (c3, c4, c5)
        widths = {"stage2": c3, "stage3": c4, "stage4": c4, "stage5": c5, "neck3": c3, "neck4": c4, "neck5": c5}
        self.attend = nn.ModuleDict({stage: CHANNEL_ATTENTION[block](widths[stage]) for stage, block in config.attend.items()})
        self.head: Detect
        if config.task == "segment":
            self.head = Segment(levels, config.classes, hidden=c3)
        elif config.task == "pose":
            self.head = Pose(levels, config.classes, config.keypoints)
        else:
            self.head = (OrientedDetect if config.task == "oriented" else Detect)(levels, config.classes)

    def _stage(self, name: str, *maps: Tensor) -> Tensor:
        y = getattr(self, name)(*maps)
        return self.attend[name](y) if name in self.attend else y

    def levels(self, image: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of strides 8, 16 and 32, as the head reads them."""
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % 32 or image.shape[3] % 32 or 0 in image.shape:
            raise ValueError(f"image must have shape (batch, 3, height, width) with sides that are multiples of 32; got {tuple(image.shape)}")
        fine = self._stage("stage2", self.down2(self.stem(image)))
        p3 = self._stage("stage3", self.down3(fine))
        p4 = self._stage("stage4", self.down4(p3))
        p5 = self._stage("stage5", self.down5(p4))

        found = self.hyperace(p3, p4, p5)
        found5 = self.correlations5(found)
        finer = _double(found)

        p4 = self.backbone_tunnel4(p4, found)
        p3 = self.backbone_tunnel3(p3, finer)
        p5 = self.backbone_tunnel5(p5, found5)

        # The level below takes what stands before the tunnel, both on the way down and up.
        down4 = self.top_down4(p5, p4)
        inner4 = self.neck_tunnel4(down4, found)
        # Doubling and a 1 x 1 convolution commute; the authors convolve afterwards, at four times the places.
        level3 = self.neck_tunnel3(self._stage("neck3", down4, p3), _double(self.correlations3(found)))
        up4 = self._stage("neck4", self.up4(level3), inner4)
        level4 = self.head_tunnel4(up4, found)
        level5 = self.head_tunnel5(self._stage("neck5", self.up5(up4), p5), found5)
        return level3, level4, level5

    def raw(self, image: Float[Tensor, "batch 3 height width"]) -> RawPrediction:
        """Logits, for the losses. Pixels are in 0..1, red first."""
        return self.head.raw(self.levels(image))

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Prediction:
        """What is in pictures whose pixels are in 0..1, red first: boxes in pixels, scores, and what else was found."""
        return self.head(self.levels(image))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)
