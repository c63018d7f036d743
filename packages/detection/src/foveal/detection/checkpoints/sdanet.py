"""SDANet's keys: mmdetection's names, in the form of the ICCV paper's code (version 1) and of the journal's (version 2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from foveal.core.systems import Adapter, System
from foveal.detection.models.sdanet import SDANet, SDANetConfig
from foveal.detection.models.selective_attention import SelectiveDenseConfig, SelectiveDenseNeck

_PAPER = "Wang et al.: Towards Real-world X-ray Security Inspection: A High-Quality Benchmark and Lightweight Framework, ICCV 2021"

#: Part of a selection of ours -> the authors' name.
_PARTS = {
    "channel.reduce": "channel_att.fc",
    "context.place": "refine.conv_mask",
    "context.transform": "refine.channel_add_conv",
}


def neck_table(neck: SelectiveDenseNeck, ours: str = "", theirs: str = "") -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Where each tensor of a neck stands in the authors' state dict: they have one layer a level where ours has one of all levels' outputs.

    Args:
        neck: ours.
        ours: what stands before its keys in a larger model of ours.
        theirs: what stands before their keys.
    """
    table, levels = {}, len(neck.selections)
    for key, value in neck.state_dict().items():
        _, level, rest = key.split(".", 2)
        before = f"{theirs}selective_attention_{level}."
        if rest.startswith(("channel.expand", "place.score")):
            kind, leaf = ("channel_att.fcs" if rest.startswith("channel") else "spatial_att.conv"), rest.rsplit(".", 1)[1]
            shape = (value.shape[0] // levels, *value.shape[1:])
            table[ours + key] = [(f"{before}{kind}.{place}.{leaf}", shape) for place in range(levels)]
        else:
            part = next(name for name in _PARTS if rest.startswith(name))
            table[ours + key] = [(before + _PARTS[part] + rest.removeprefix(part), tuple(value.shape))]
    return table


def _table(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    assert isinstance(model, SelectiveDenseNeck)
    return neck_table(model)


SDANET_NECK = Adapter(
    system=System(
        name="sdanet_neck",
        title="selective dense attention behind any feature pyramid",
        paper=_PAPER,
        parameters=1_036_935,
        repository="github.com/bywang2018/security-dataset",
        licence="Apache-2.0",
    ),
    config=SelectiveDenseConfig,
    build=lambda config, official: SelectiveDenseNeck(config),
    table=_table,
    model=SelectiveDenseNeck,
    keywords={name: name for name in ("channels", "levels")},
)


def _detector_table(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    assert isinstance(model, SDANet)
    journal = model.config.convention == "edges"
    roi = "roi_head." if journal else ""
    names = [
        (r"backbone\.body\.", "backbone."),
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"proposal\.conv\.", "rpn_head.rpn_conv."),
        (r"proposal\.score\.", "rpn_head.rpn_cls."),
        (r"proposal\.move\.", "rpn_head.rpn_reg."),
        (r"boxes\.(\d)\.hidden\.1\.", rf"{roi}bbox_head.\1.shared_fcs.0."),
        (r"boxes\.(\d)\.hidden\.3\.", rf"{roi}bbox_head.\1.shared_fcs.1."),
        (r"boxes\.(\d)\.score\.", rf"{roi}bbox_head.\1.fc_cls."),
        (r"boxes\.(\d)\.move\.", rf"{roi}bbox_head.\1.fc_reg."),
        *((rf"masks\.(\d)\.{2 * place}\.", rf"{roi}mask_head.\1.convs.{place}.conv.") for place in range(4)),
        (r"masks\.(\d)\.8\.", rf"{roi}mask_head.\1.upsample."),
        (r"masks\.(\d)\.10\.", rf"{roi}mask_head.\1.conv_logits."),
    ]
    table = {} if model.neck is None else neck_table(model.neck, "neck.", "neck." if journal else "")
    for key, value in model.state_dict().items():
        if not key.startswith("neck."):
            pattern, replacement = next(pair for pair in names if re.match(pair[0], key))
            table[key] = [(re.sub(f"^{pattern}", replacement, key), tuple(value.shape))]
    return table


def _detector(config: SDANetConfig, official: Mapping[str, Tensor] | None) -> SDANet:
    """The keys of the boxes' heads tell which of the two codes wrote them."""
    if official is not None:
        journal = any(key.startswith("roi_head.") for key in official)
        selective = any("selective_attention_" in key for key in official)
        config = replace(config, convention="edges" if journal else "pixels", selective=selective)
    return SDANet(config)


SDANET = Adapter(
    system=System(
        name="sdanet",
        title="prohibited items in X-ray pictures of baggage: boxes, masks and classes",
        paper=_PAPER,
        parameters=97_092_912,
        repository="github.com/bywang2018/security-dataset",
        licence="Apache-2.0 (code); the PIDray pictures are for academic use",
    ),
    config=SDANetConfig,
    build=_detector,
    table=_detector_table,
    model=SDANet,
    keywords={"classes": "classes", "depth": "depth", "convention": "convention"},
)
