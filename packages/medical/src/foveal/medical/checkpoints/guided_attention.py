"""Keys of multi-scale guided attention (the authors' `DAF_stack`), and the modules that their code builds and never uses."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.core.official import Source
from foveal.core.systems import Adapter, System
from foveal.medical.checkpoints.prefixes import table_by_prefix
from foveal.medical.models.guided_attention import LEVELS, GuidedAttentionConfig, GuidedAttentionNet


def _table(model: GuidedAttentionNet) -> dict[str, list[Source]]:
    prefixes = {"backbone.conv": "resnext.layer0.0", "backbone.norm": "resnext.layer0.1", "fuse": "fuse1.fuse_attn"}
    for level in range(LEVELS):
        number, reverse = level + 1, LEVELS - level  # the authors count some modules from the coarsest level
        prefixes[f"backbone.stages.{level}"] = "resnext.layer1.1" if level == 0 else f"resnext.layer{number}"
        prefixes[f"reduce.{level}"] = f"down{number}"
        prefixes |= {f"heads.0.{level}": f"predict{number}", f"heads.1.{level}": f"predict{number}_2"}
        for stage in (0, 1):
            ours = f"stages.{stage}"
            prefixes[f"{ours}.merge.{level}"] = f"conv8_{'1' * stage}{reverse}"
            prefixes[f"{ours}.semantic.{level}"] = f"conv_sem_{stage + 1}_{reverse}"
            for branch, official in (("position", f"pam_attention_{stage + 1}_{number}"), ("channel", f"cam_attention_{stage + 1}_{number}")):
                for index in range(3):
                    prefixes[f"{ours}.{branch}.{level}.before.{index}"] = f"{official}.attn.{index}"
                    prefixes[f"{ours}.{branch}.{level}.after.{index}"] = f"{official}.attn.{4 + index}"
                prefixes[f"{ours}.{branch}.{level}.attend"] = f"{official}.attn.3"
                prefixes |= {f"{ours}.position.{level}.attend.{name}": f"pam_attention_{stage + 1}_{number}.attn.3.{name}_conv"
                             for name in ("query", "key", "value")}  # fmt: skip
    for stage in (0, 1):
        for ours, official in (("halve", "enc1.encode"), ("quarter", "enc2.encode"), ("enlarge", "dec2.decode"), ("restore", "dec1.decode")):
            prefixes[f"stages.{stage}.autoencoder.{ours}"] = f"semanticModule_{stage + 1}_1.{official}"
    return table_by_prefix(model, prefixes)


def unused_tensors(width: int) -> dict[str, Tensor]:
    """The authors' tensors that never enter an output: convolutions of zeros and plain norms, for their code loads no state dict without them."""
    state: dict[str, Tensor] = {}
    for level in range(1, LEVELS + 1):
        for name in (f"conv6_{level}.1", f"conv7_{level}.1"):
            state |= {f"{name}.weight": torch.zeros(width, width, 1, 1), f"{name}.bias": torch.zeros(width)}
        for name, last in ((f"attention{level}", False), (f"refine{level}", True)):
            for index, (inputs, kernel) in enumerate(((2 * width, 3), (width, 3), (width, 1))):
                place = f"{name}.fuse_attn.{3 * index}"
                state |= {f"{place}.weight": torch.zeros(width, inputs, kernel, kernel), f"{place}.bias": torch.zeros(width)}
                place = f"{name}.fuse_attn.{3 * index + 1}"
                state |= {f"{place}.{part}": torch.ones(width) for part in ("weight", "running_var")}
                state |= {f"{place}.{part}": torch.zeros(width) for part in ("bias", "running_mean")}
                state[f"{place}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
                if index < 2 or last:
                    state[f"{name}.fuse_attn.{3 * index + 2}.weight"] = torch.full((1,), 0.25)
    return state


MSA_GUIDED = Adapter(
    system=System(
        name="msa_guided",
        title="segmentation by multi-scale guided attention; sizes as for CHAOS MRI (four organs)",
        paper="Sinha, Dolz: Multi-scale Self-guided Attention for Medical Image Segmentation, IEEE JBHI 2021",
        parameters=104_511_475,
        repository="github.com/sinAshish/Multi-Scale-Attention",
        licence="none stated",
    ),
    config=GuidedAttentionConfig,
    build=lambda config, official: GuidedAttentionNet(config),
    table=_table,
    model=GuidedAttentionNet,
    keywords={"num_classes": "classes"},
    unused={r"(conv6|conv7)_\d\..*|(attention|refine)\d\..*": "their code builds it and never uses it"},
)
