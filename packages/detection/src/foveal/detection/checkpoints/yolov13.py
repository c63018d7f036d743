"""YOLOv13's keys: where each tensor of ours stands in the authors' state dict, and their released files.

The authors number the layers of their graph; ours have names. A released ``.pt`` is a pickled module, which `foveal.detection.checkpoints.released`
reads without its classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from foveal.core.errors import UserError
from foveal.core.systems import Adapter, System
from foveal.detection.checkpoints import naming
from foveal.detection.models import blocks, heads, hyperace
from foveal.detection.models.yolov13 import SCALES, YOLOv13, YOLOv13Config
from foveal.kernels.nn import HyperedgeAttention

#: Number of each part in the authors' graph; what lies between (upsampling, joining) has no weights.
LAYERS = {
    "stem": 0, "down2": 1, "stage2": 2, "down3": 3, "stage3": 4, "down4": 5, "stage4": 6, "down5": 7, "stage5": 8, "hyperace": 9,
    "correlations5": 11, "backbone_tunnel4": 12, "backbone_tunnel3": 13, "backbone_tunnel5": 14, "top_down4": 17, "neck_tunnel4": 18,
    "neck3": 21, "correlations3": 22, "neck_tunnel3": 23, "up4": 24, "neck4": 26, "head_tunnel4": 27, "up5": 28, "neck5": 30,
    "head_tunnel5": 31, "head": 32,
}  # fmt: skip

#: Class of ours -> what its children are called by the authors.
_CHILDREN: naming.PartNames = {
    blocks.ConvNorm: {"norm": "bn"},
    blocks.DSConv: {"depthwise": "dw", "pointwise": "pw", "norm": "bn"},
    blocks.DSBottleneck: {"first": "cv1", "second": "cv2"},
    blocks.DSC3k: {"main": "cv1", "side": "cv2", "blocks": "m", "merge": "cv3"},
    blocks.DSC3k2: {"split": "cv1", "blocks": "m", "merge": "cv2"},
    blocks.AreaAttention: {"query_key": "qk", "value": "v", "project": "proj", "position": "pe"},
    blocks.AreaBlock: {"attention": "attn"},
    blocks.AreaStage: {"reduce": "cv1", "blocks": "m", "merge": "cv2", "layer_scale": "gamma"},
    HyperedgeAttention: {
        **{name: f"edge_generator.{name}" for name in ("prototype_base", "context_net", "pre_head_proj")},
        **{name: f"{name}.0" for name in ("edge_proj", "node_proj")},
    },
    hyperace.C3AH: {"main": "cv1", "side": "cv2", "hypergraph": "m.hgnn", "merge": "cv3"},
    hyperace.Fuse: {"merge": "conv_out"},
    hyperace.HyperACE: {"split": "cv1", "local": "m", "first_branch": "branch1", "second_branch": "branch2", "merge": "cv2"},
    hyperace.Shrink: {"adjust": "channel_adjust"},
    heads.Detect: {"box": "cv2", "score": "cv3", "bins": "dfl.conv.weight"},
    YOLOv13: {name: f"model.{number}" for name, number in LAYERS.items()},
}


def official_names(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(key of ours, the authors' key, tensor) of everything in the module's state dict."""
    return naming.official_names(module, _CHILDREN)


def _table(model: YOLOv13) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    if model.config.task != "detect" or model.config.attend:
        raise UserError(
            "expected a network as the authors have it: boxes alone and no added attention; got one with more; their keys have no place for it"
        )
    frozen = {"head.bins": (1, heads.BINS, 1, 1)}
    return {ours: [(theirs, frozen.get(ours, tuple(value.shape)))] for ours, theirs, value in official_names(model)}


def sizes_of(official: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a state dict tells of its network: {"scale": ..., "nc": ...}, as far as it has the keys."""
    found: dict[str, Any] = {}
    stem, classes = (
        next((official[start + key] for start in ("model.", "") if start + key in official), None) for key in ("0.conv.weight", "32.cv3.0.2.weight")
    )
    stems = {scale.channels(64): name for name, scale in SCALES.items()}
    if stem is not None and stem.shape[0] in stems:
        found["scale"] = stems[stem.shape[0]]
    if classes is not None:
        found["nc"] = classes.shape[0]
    return found


class _Published(Adapter):
    """Takes depth, width and max_channels too, which the authors' yaml holds beside the scale, and refuses others than the scale's."""

    def config_of(self, keywords: Mapping[str, Any]) -> YOLOv13Config:
        config: YOLOv13Config = super().config_of({key: value for key, value in keywords.items() if key not in ("depth", "width", "max_channels")})
        scale = SCALES[config.scale]
        for name in ("depth", "width", "max_channels"):
            if keywords.get(name, getattr(scale, name)) != getattr(scale, name):
                raise UserError(
                    f"expected {name} {getattr(scale, name)} of scale {config.scale}; got {keywords[name]}; name one of the published scales"
                )
        return config


YOLOV13 = _Published(
    system=System(
        name="yolov13",
        title="objects in pictures: boxes and classes; scales n, s, l, x",
        paper="Lei et al.: YOLOv13: Real-Time Object Detection with Hypergraph-Enhanced Adaptive Visual Perception, 2025",
        parameters=2_494_151,
        repository="github.com/iMoonLab/yolov13",
        licence="AGPL-3.0",
    ),
    config=YOLOv13Config,
    build=lambda config, official: YOLOv13(config),
    table=_table,
    model=YOLOv13,
    keywords={"scale": "scale", "nc": "classes"},
    renames={r"^(\d+\.)": r"model.\1"},
)
