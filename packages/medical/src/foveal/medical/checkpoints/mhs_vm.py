"""Keys of MHS-VM (the authors' `VMUNet`), whose checkpoints hold the tensors of every scan head twice."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.official import Source
from foveal.core.systems import Adapter, System
from foveal.medical.models.mhs_vm import MHSVM, MHSVMConfig
from foveal.medical.models.scan_routes import PATTERNS

#: Where an official tensor stands a second time: pattern of the name that counts on loading -> the other.
SECOND_NAMES = {r"scanning\.seq2seq_engine\.": "mambaeng.", r"mhs\.x_ssproj\.weight$": "mhs.x_ssproj_W"}

#: Parameter of ours, of all heads -> the authors' of one head.
_OF_A_HEAD = {"to_scan": "x_proj_weight", "step": "dt_projs_weight", "step_bias": "dt_projs_bias", "rate_log": "A_logs", "skip": "Ds"}
_OF_A_BLOCK = {
    "norm": "ln_1", "expand": "self_attention.in_proj", "conv": "self_attention.conv2d", "scan.split": "self_attention.mhs.x_ssproj",
    "scan.norm": "self_attention.mhs.cat_norm", "scan.join": "self_attention.mhs.y_proj", "out_norm": "self_attention.out_norm",
}  # fmt: skip


def _table(model: MHSVM) -> dict[str, list[Source]]:
    if model.config.patch != 4:
        raise UserError(f"expected a network with patches of 4 pixels, the only ones the authors' code has; got {model.config.patch}")
    table: dict[str, list[Source]] = {}
    for key, value in model.state_dict().items():
        shape = tuple(value.shape)
        block = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(\d+)\.(.+)", key)
        if block:
            place = f"vmunet.{'layers' if block[1] == 'encoder' else 'layers_up'}.{block[2]}.blocks.{block[3]}"
            name, _, leaf = block[4].rpartition(".")
            if name == "scan" and leaf in _OF_A_HEAD:
                heads, _, *rest = shape
                # Their A_logs and Ds are route-major in one axis, the others have an axis of routes.
                one = (4 * rest[0], *rest[1:]) if leaf in ("rate_log", "skip") else (4, *rest)
                engine = f"{place}.self_attention.mhs.scanhead_{{}}.scanning.seq2seq_engine.{_OF_A_HEAD[leaf]}"
                table[key] = [Source(engine.format(pattern), one) for pattern in PATTERNS[:heads]]
            else:
                table[key] = [Source(f"{place}.{_OF_A_BLOCK[name]}.{leaf}", shape)]
            continue
        name, _, leaf = key.rpartition(".")
        official = {"embed": "patch_embed.proj", "embed_norm": "patch_embed.norm", "head": "final_conv"}.get(name)
        if official is None:
            kind, *number = name.split(".")
            if kind == "merge":
                official = f"layers.{number[0]}.downsample.{number[1]}"
            elif kind == "expand":
                official = f"layers_up.{int(number[0]) + 1}.upsample.{number[1]}"
            else:
                official = f"final_up.{number[0]}"
        table[key] = [Source(f"vmunet.{official}.{leaf}", shape)]
    return table


def with_second_names(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict with every tensor that stands in it twice."""
    doubled = dict(official)
    for pattern, other in SECOND_NAMES.items():
        doubled |= {re.sub(pattern, other, key): value.clone() for key, value in official.items() if re.search(pattern, key)}
    return doubled


MHS_VM = Adapter(
    system=System(
        name="mhs_vm",
        title="segmentation by multi-head scans; sizes as for skin lesions (ISIC)",
        paper="Yang et al.: MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba, 2024 (arXiv:2406.05992)",
        parameters=17_257_129,
        repository="github.com/PixDeep/MHS-VM",
        licence="Apache-2.0",
    ),
    config=MHSVMConfig,
    build=lambda config, official: MHSVM(config),
    table=_table,
    model=MHSVM,
    keywords={
        "num_classes": "classes", "dims": "dims", "depths": "depths", "depths_decoder": "decoder_depths", "head_num": "heads",
        "gfu_t": "threshold", "with_proj": "project", "d_state": "state", "drop_path_rate": "drop_path", "in_chans": "channels",
        "input_channels": "channels",
    },
    ignored=("dims_decoder", "load_ckpt_path"),
    unused={
        r".*\.mambaeng\..*": "the same tensor as scanning.seq2seq_engine's",
        r".*\.x_ssproj_W": "the same tensor as x_ssproj.weight",
        r".*total_(ops|params)": "a count that a profiler left",
    },
    renames={r"^(?!vmunet\.)": "vmunet."},
)  # fmt: skip
