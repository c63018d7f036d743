"""BEVANet's keys: the names of the authors' modules, as their training files (with ``model.`` before them) and their own have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from foveal.core.errors import UserError
from foveal.core.systems import Adapter, System
from foveal.detection.checkpoints.naming import PartNames, official_names
from foveal.detection.models import bevanet, large_kernel
from foveal.detection.models.bevanet import BEVANet, BEVANetConfig


def _norm_conv(ours: str, theirs: str, first: int = 0, last: str = "") -> dict[str, str]:
    """Batch norm, ReLU and convolution in a row, from the authors' place `first` on."""
    return {f"{ours}.norm": f"{theirs}.{first}", f"{ours}.conv": f"{theirs}.{first + 2}{last}"}


def _each(ours: str, theirs: str, endings: Sequence[str], first: int = 0, last: str = "") -> dict[str, str]:
    """`_norm_conv` of a list of ours, whose parts the authors tell apart by `endings`."""
    pairs = (_norm_conv(f"{ours}.{place}", f"{theirs}{ending}", first, last) for place, ending in enumerate(endings))
    return {name: known for pair in pairs for name, known in pair.items()}


def _attention_stage(ours: str, down: str, block: str, norm: str, repeats: int) -> dict[str, str]:
    """`block` and `norm` hold "{}" where the authors count from one."""
    parts = {f"{ours}.blocks.{place}": block.format(place + 1) for place in range(repeats)}
    return {f"{ours}.down": f"{down}.0", **parts, **{f"{ours}.norms.{place}": norm.format(place + 1) for place in range(repeats)}}


_RESIDUAL = {"first.0": "conv1", "first.1": "bn1", "second.0": "conv2", "second.1": "bn2", "shortcut": "downsample"}

_NAMES: PartNames = {
    large_kernel.SeparableKernel: {
        "row": "DW_conv_h.dwconv", "column": "DW_conv_v.dwconv", "far_row": "DW_D_conv_h.dwconv", "far_column": "DW_D_conv_v.dwconv",
        "mix": "pwconv.pwconv",
    },
    large_kernel.GateLayer: {"pointwise": "0.pwconv", "depthwise": "1.dwconv", "norm": "2"},
    large_kernel.KernelSelection: {
        "reduce": "fc_reduce", "expand.0": "fc_expand_small", "expand.1": "fc_expand_big_h", "expand.2": "fc_expand_big_v", "place": "conv_squeeze",
    },
    large_kernel.SelectedKernel: {
        "dense": "DW_conv.dwconv", "wide": "DW_D_conv_h.dwconv", "tall": "DW_D_conv_v.dwconv", "select": "FS_kernel", "mix": "pwconv.pwconv",
    },
    large_kernel.KernelAttention: {"enter": "proj_1.pwconv", "kernel": "spatial_gating_unit", "leave": "proj_2.pwconv"},
    large_kernel.ConvPerceptron: {"expand": "fc1.pwconv", "depthwise": "dwconv.dwconv", "project": "fc2.pwconv"},
    large_kernel.EfficientAttentionBlock: {"attention": "attn", "perceptron": "mlp", "scale1": "layer_scale_1", "scale2": "layer_scale_2"},
    bevanet.Residual: _RESIDUAL,
    bevanet.Bottleneck: {**_RESIDUAL, "third.0": "conv3", "third.1": "bn3"},
    bevanet.Meeting: {"detail": "f_x", "meaning": "f_y"},
    bevanet.KernelPyramid: {
        **_norm_conv("place", "scale0", last=".pwconv"),
        **_each("pools", "scale", ("1", "2", "4", "5"), 1, ".pwconv"), **_each("process", "process", ("1", "2", "_lska", "4", "5")),
        "norm": "bn", "scale": "layer_scale_lska", "attention": "lska",
        **_norm_conv("merge", "compression", last=".pwconv"), **_norm_conv("shortcut", "shortcut", last=".pwconv"),
    },
    bevanet.BoundaryFusion: {**_norm_conv("detail", "conv_p"), **_norm_conv("meaning", "conv_i"), **_norm_conv("merge", "out")},
    bevanet.Head: {"first.norm": "bn1", "first.conv": "conv1", "second.norm": "bn2", "second.conv": "conv2"},
    BEVANet: {
        "stem.0.0": "conv1.0", "stem.0.1": "conv1.1", "stem.2.0": "conv1.3", "stem.2.1": "conv1.4",
        "quarter": "layer1", "eighth": "layer2", "semantic3": "layer3_semantic", "detail3": "layer3_detail",
        **_attention_stage("semantic4", "layer4_down_semantic", "layer4_semantic_{}", "norm4_semantic_{}", 2),
        **_attention_stage("semantic5", "layer5_down_semantic_seg", "layer5_semantic_{}_seg", "norm5_semantic_{}_seg", 2),
        **_attention_stage("detail4", "layer4_detail_conv", "layer4_detail", "norm4_detail", 1),
        "told3": "compression3", "told4": "compression4", "meeting3": "fuse_sd_3", "meeting4": "fuse_sd_4",
        "detail5": "layer5_detail_semantic.0", "boundary5": "layer5_detail_boundary.0", "pyramid": "spp", "fusion": "dfm",
        "detail_head": "seghead_ds", "boundary_head": "seghead_db",
    },
}  # fmt: skip


def _table(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    return {ours: [(theirs, tuple(value.shape))] for ours, theirs, value in official_names(model, _NAMES)}


class _Published(Adapter):
    """The authors' lists of kernels and blocks hold zeros and numbers that their network does not use; here what they mean is taken."""

    def config_of(self, keywords: Mapping[str, Any]) -> BEVANetConfig:
        given = dict(keywords)
        semantic, detail = given.pop("semantic_kernel_size", (0, 35, 35)), given.pop("detail_kernel_size", (0, 23))
        for name, value, length in (("semantic_kernel_size", semantic, 3), ("detail_kernel_size", detail, 2)):
            if not _numbers(value, length) or value[0] != 0 or 0 in value[1:]:
                raise UserError(f"expected {name} a zero and then window sizes, as every published config has it; got {value}")
        given["windows"] = (*semantic[1:], detail[1])
        if "n_blocks" in given:
            blocks = given["n_blocks"]
            if not _numbers(blocks, 5):
                raise UserError(f"expected n_blocks five numbers, such as [2, 2, 4, 4, 2]; got {blocks}")
            given["n_blocks"] = tuple(blocks[:3])
        if "mlp_expand" in given:
            expansions = given["mlp_expand"]
            if not _numbers(expansions, 3) or len(set(expansions)) > 1:
                raise UserError(f"expected mlp_expand three equal numbers, as every published config has it; got {expansions}")
            given["mlp_expand"] = float(expansions[0])
        config: BEVANetConfig = super().config_of(given)
        return config


def _numbers(value: Any, length: int) -> bool:
    return isinstance(value, Sequence) and len(value) == length and all(isinstance(number, (int, float)) for number in value)


def sizes_of(official: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a state dict tells of its network, in the authors' keywords, as far as it has the keys."""
    state = {key.removeprefix("model."): value for key, value in official.items()}
    found: dict[str, Any] = {}
    for name, key in (
        ("planes", "conv1.0.weight"), ("num_classes", "head.conv2.weight"), ("head_planes", "head.conv1.weight"), ("ppm_planes", "spp.bn.weight"),
    ):  # fmt: skip
        if key in state:
            found[name] = state[key].shape[0]
    blocks = [sum(f"{layer}.{place}.conv1.weight" in state for place in range(64)) for layer in ("layer1", "layer2", "layer3_semantic")]
    if all(blocks):
        found["n_blocks"] = [*blocks, blocks[2], 2]
    return found


def _build(config: BEVANetConfig, official: Mapping[str, Tensor] | None) -> BEVANet:
    """Files for inference alone lack the heads of training."""
    if official is not None:
        config = replace(config, auxiliary=any(key.startswith("seghead_") for key in official))
    return BEVANet(config)


BEVANET = _Published(
    system=System(
        name="bevanet",
        title="the class of every pixel, in real time; sizes base (planes=64) and small (planes=32)",
        paper="Huang et al.: BEVANet: Bilateral Efficient Visual Attention Network for Real-time Semantic Segmentation, ICIP 2025",
        parameters=58_599_296,
        repository="github.com/maomao0819/BEVANet",
        licence="MIT",
    ),
    config=BEVANetConfig,
    build=_build,
    table=_table,
    model=BEVANet,
    keywords={
        "num_classes": "classes",
        "planes": "channels",
        "n_blocks": "blocks",
        "windows": "windows",
        "mlp_expand": "expansion",
        "ppm_planes": "pyramid_channels",
        "head_planes": "head_channels",
        "seg_augment": "auxiliary",
    },
    unused={r"sem_loss\..*": "weights of the classes in the authors' training loss"},
    renames={r"^model\.": ""},
)
