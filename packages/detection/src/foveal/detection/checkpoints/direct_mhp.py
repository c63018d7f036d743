"""DirectMHP's keys: the layers of YOLOv5's graph by number. The authors' released ``.pt`` is a pickled network, read as YOLOv13's are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from foveal.core.systems import Adapter, System
from foveal.detection.checkpoints.naming import PartNames, official_names
from foveal.detection.models import blocks, direct_mhp
from foveal.detection.models.direct_mhp import DirectMHP, DirectMHPConfig

#: Number of each part in the authors' graph; what lies between (upsampling, joining) has no weights.
LAYERS = {
    "stem": "0.conv", "down2": "1", "stage2": "2", "down3": "3", "stage3": "4", "down4": "5", "stage4": "6", "down5": "7", "stage5": "8",
    "down6": "9", "context": "10", "stage6": "11", "reduce5": "12", "top_down5": "15", "reduce4": "16", "top_down4": "19", "reduce3": "20",
    "neck3": "23", "up4": "24", "neck4": "26", "up5": "27", "neck5": "29", "up6": "30", "neck6": "32", "head": "33",
}  # fmt: skip

_NAMES: PartNames = {
    blocks.ConvNorm: {"norm": "bn"},
    direct_mhp.PointBlock: {"first": "cv1", "second": "cv2"},
    direct_mhp.C3: {"main": "cv1", "side": "cv2", "merge": "cv3", "blocks": "m"},
    direct_mhp.PooledContext: {"reduce": "cv1", "merge": "cv2"},
    direct_mhp.PoseHead: {"anchors": "anchor_grid", "anchor_cells": "anchors", "out": "m"},
    DirectMHP: {name: f"model.{number}" for name, number in LAYERS.items()},
}


def _table(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    shapes = {"head.anchors": (4, 1, 3, 1, 1, 2)}
    return {ours: [(theirs, shapes.get(ours, tuple(value.shape)))] for ours, theirs, value in official_names(model, _NAMES)}


def sizes_of(official: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a state dict tells of its network, in the authors' keywords, as far as it has the keys."""
    state = {key.removeprefix("model."): value for key, value in official.items()}
    found: dict[str, Any] = {}
    if "11.cv3.conv.weight" in state:
        found["width_multiple"] = state["11.cv3.conv.weight"].shape[0] / 1024
    repeats = sum(f"4.m.{place}.cv1.conv.weight" in state for place in range(64))
    if repeats:
        # Of nine blocks a depth of a third is three: two thirds are six, and two of three.
        found["depth_multiple"] = {3: 0.33, 6: 0.67}.get(repeats, repeats / 9)
    return found


def _build(config: DirectMHPConfig, official: Mapping[str, Tensor] | None) -> DirectMHP:
    """Anchors are what the weights were trained with."""
    if official is not None and "model.33.anchor_grid" in official:
        pixels = official["model.33.anchor_grid"].double()
        if pixels.numel() == 24:
            config = replace(config, anchors=tuple(tuple(tuple(pair) for pair in level) for level in pixels.view(4, 3, 2).tolist()))
    return DirectMHP(config)


DIRECT_MHP = Adapter(
    system=System(
        name="direct_mhp",
        title="heads of many people and their pitch, yaw and roll over the whole circle; sizes S (width 0.5, depth 0.33) and M (0.75, 0.67)",
        paper="Zhou et al.: DirectMHP: Direct 2D Multi-Person Head Pose Estimation with Full-range Angles, 2023",
        parameters=12_375_084,
        repository="github.com/hnuzhy/DirectMHP",
        licence="GPL-3.0",
    ),
    config=DirectMHPConfig,
    build=_build,
    table=_table,
    model=DirectMHP,
    keywords={"width_multiple": "width", "depth_multiple": "depth", "anchors": "anchors"},
    renames={r"^(\d+\.)": r"model.\1"},
)
