"""Keys of ACMIL: the authors' `ACMIL_GA` and `ACMIL_MHA`, which hold each branch's layers apart."""

from __future__ import annotations

from foveal.core.official import Source
from foveal.core.systems import Adapter, System
from foveal.medical.models.acmil import GatedACMIL, GatedACMILConfig, MultiHeadACMIL, MultiHeadACMILConfig

_WHOLE = {
    "reduce": "dimreduction.fc1", "content": "attention.attention_V.0", "gate": "attention.attention_U.0", "score": "attention.attention_weights",
    "bag_head": "Slide_classifier.fc", "bag_value": "bag_attention.v_proj", "bag_project": "bag_attention.out_proj",
    "bag_norm": "bag_attention.layer_norm",
}  # fmt: skip
_OF_A_BRANCH = {
    "branch_heads.weight": "classifier.{}.fc.weight", "branch_heads.bias": "classifier.{}.fc.bias",
    "norm_weight": "sub_attention.{}.layer_norm.weight", "norm_bias": "sub_attention.{}.layer_norm.bias",
}  # fmt: skip
for _ours, _theirs in {"to_query": "q_proj", "to_key": "k_proj", "to_value": "v_proj", "project": "out_proj"}.items():
    _OF_A_BRANCH |= {f"{_ours}.{leaf}": f"sub_attention.{{}}.{_theirs}.{leaf}" for leaf in ("weight", "bias")}


def _table(model: GatedACMIL | MultiHeadACMIL) -> dict[str, list[Source]]:
    table = {}
    for key, value in model.state_dict().items():
        shape = tuple(value.shape)
        if key == "query":
            table[key] = [Source("q", (1, *shape))]
        elif key in _OF_A_BRANCH:
            table[key] = [Source(_OF_A_BRANCH[key].format(branch), shape[1:]) for branch in range(shape[0])]
        else:
            name, _, leaf = key.rpartition(".")
            table[key] = [Source(f"{_WHOLE[name]}.{leaf}", shape)]
    return table


_PAPER = "Zhang et al.: Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, ECCV 2024 (arXiv:2311.07125)"
_KEYWORDS = {
    "D_feat": "features", "D_inner": "inner", "n_class": "classes", "n_token": "branches", "n_masked_patch": "candidates", "mask_drop": "hide",
}  # fmt: skip

ACMIL_GA = Adapter(
    system=System(
        name="acmil_ga",
        title="classification of slides as bags of tiles, gated attention; sizes as for features of a ViT-S",
        paper=_PAPER,
        parameters=84_369,
        repository="github.com/dazhangyu123/ACMIL",
        licence="MIT",
    ),
    config=GatedACMILConfig,
    build=lambda config, official: GatedACMIL(config),
    table=_table,
    model=GatedACMIL,
    keywords={**_KEYWORDS, "D": "gate"},
    ignored=("droprate",),
)

ACMIL_MHA = Adapter(
    system=System(
        name="acmil_mha",
        title="classification of slides as bags of tiles, multi-head attention; sizes as for features of a ViT-S",
        paper=_PAPER,
        parameters=416_140,
        repository="github.com/dazhangyu123/ACMIL",
        licence="MIT",
    ),
    config=MultiHeadACMILConfig,
    build=lambda config, official: MultiHeadACMIL(config),
    table=_table,
    model=MultiHeadACMIL,
    keywords={**_KEYWORDS, "heads": "heads"},
)
