"""SDANet's keys: mmdetection's names, in the form of the ICCV paper's code (version 1) and of the journal's (version 2)."""

from __future__ import annotations

from torch import nn

from foveal.core.systems import Adapter, System
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
