"""EquiformerV3's keys: where each tensor of ours stands in the authors' state dict. Their constant tables (grids, orders, offsets) are made anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.official import Source
from foveal.core.systems import Adapter, System
from foveal.graphs3d.checkpoints.terms import EnergyTerms
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config

#: Ours -> theirs, applied in this order.
_NAMES = {
    r"^embedding\.": "sphere_embedding.",
    r"^degree\.": "edge_degree_embedding.",
    r"^force_head\.": "force_block.",
    r"^stress_head\.": "stress_block.",
    r"^denoising_head\.": "dens_block.",
    r"^energy\.0\.": "energy_block.linear_1.",
    r"^energy\.2\.": "energy_block.linear_2.",
    r"\.attention_norm\.": ".norm_1.affine_",
    r"\.feed_norm\.": ".norm_2.affine_",
    r"^norm\.": "norm.affine_",
    r"\.attention\.": ".ga.",
    r"\.feed\.": ".ffn.",
    r"\.invariants\.(source|target)\.": r".\1_embedding.",
    r"\.invariants\.radial\.": ".rad_func.",
    r"\.mix\.": ".so2_linear_1.",
    r"\.value\.": ".so2_linear_2.",
    r"\.zero\.": ".fc_m0.",
    r"\.orders\.(\d+)\.": r".so2_m_linear.\1.fc.",
    r"\.logit_norm\.": ".alpha_norm.",
    r"\.logit$": ".alpha_dot",
    r"\.project\.": ".proj.",
    r"\.expand\.": ".so3_linear_1.",
    r"\.contract\.": ".so3_linear_2.",
    r"^stress_block\.gate\.": "stress_block.gating_linear.",
    r"\.scalar\.": ".scalar_mlp.0.linear.",
    r"\.gate\.": ".grid_mlp.gating_linear.",
    r"\.before\.": ".grid_mlp.grid_linear_1.",
    r"\.after\.": ".grid_mlp.grid_linear_2.",
}

#: Their keyword -> the values with which a published model is this one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "norm_type": ("merge_layer_norm",),
    "use_atom_edge_embedding": (True,),
    "use_envelope": (True,),
    "attn_activation": ("sep-merge_gates2_swiglu", "sep-merge_gates2_swiglu_mem"),
    "ffn_activation": ("sep-merge_gates2_swiglu", "sep-merge_gates2_swiglu_mem"),
    "use_attn_renorm": (True,),
    "use_add_merge": (False,),
    "use_rad_l_parametrization": (True,),
    "softcap": (None,),
    "use_grid_mlp": (True,),
    "alpha_drop": (0, 0.0),
    "attn_mask_rate": (0, 0.0),
    "value_drop": (0, 0.0),
    "proj_drop": (0, 0.0),
    "ffn_drop": (0, 0.0),
    "use_head_reg": (False,),
    "enforce_max_neighbors_strictly": (True,),
}


class _Published(Adapter):
    """Refuses the variants of the authors' code that no published model uses, instead of ignoring what they say."""

    def config_of(self, keywords: Mapping[str, Any]) -> EquiformerV3Config:
        for name, allowed in _FIXED.items():
            if name in keywords and keywords[name] not in allowed:
                raise UserError(f"expected {name} {allowed[0]!r}, as in every published EquiformerV3; got {keywords[name]!r}")
        if keywords.get("direct_prediction") and keywords.get("use_gate_force_head") is False:
            raise UserError("expected use_gate_force_head True in the direct form, as published; got False")
        return super().config_of(keywords)


def official_name(key: str) -> str:
    """The authors' name of a tensor of ours."""
    for pattern, replacement in _NAMES.items():
        key = re.sub(pattern, replacement, key)
    return key


def published_terms(content: Any) -> EnergyTerms | None:
    """Scale and references that a training checkpoint of the authors holds beside the weights; None where it holds neither.

    ``normalizers`` is {"energy": {"mean": 0, "rmsd": r}, "forces": {"rmsd": r}}; ``elementrefs`` {"energy": {"element_references": (elements,)}}.

    Raises:
        UserError: a mean that is not 0, or stress of another scale than forces, which no published model has.
    """
    if not isinstance(content, Mapping) or not any(isinstance(content.get(name), Mapping) for name in ("normalizers", "elementrefs")):
        return None
    normalizers = content.get("normalizers") or {}
    scales = {name: float(_number(state, ("rmsd", "std"), 1.0)) for name, state in normalizers.items()}
    means = [float(_number(state, ("mean",), 0.0)) for state in normalizers.values()]
    others = {scale for name, scale in scales.items() if name != "energy"}
    if any(means) or len(others) > 1:
        raise UserError(f"expected labels of mean 0, and one scale of forces and stress, as published; got means {means} and scales {scales}")
    scale = scales.get("energy", 1.0)
    references = (content.get("elementrefs") or {}).get("energy") or {}
    table = torch.as_tensor(references.get("element_references", references.get("coeff", []))).double().flatten().tolist()
    named = {chemical_symbols[number]: value for number, value in enumerate(table) if number and number < len(chemical_symbols) and value}
    return EnergyTerms(scale, named, forces_scale=None if others <= {scale} else others.pop())


def content_of(terms: EnergyTerms) -> dict[str, Any]:
    """What stands beside the weights in a training checkpoint of the authors: the inverse of `published_terms`."""
    forces = terms.scale if terms.forces_scale is None else terms.forces_scale
    scales = {"energy": terms.scale, "forces": forces, "stress": forces}
    table = torch.zeros(len(chemical_symbols), dtype=torch.float64)
    for symbol, value in terms.references.items():
        table[chemical_symbols.index(symbol)] = value
    return {
        "normalizers": {
            name: {"mean": torch.zeros(1, dtype=torch.float64), "rmsd": torch.tensor(scale, dtype=torch.float64)} for name, scale in scales.items()
        },
        "elementrefs": {"energy": {"element_references": table}},
    }


def _number(state: Mapping[str, Any], names: tuple[str, ...], default: float) -> float:
    found = [state[name] for name in names if name in state]
    return float(torch.as_tensor(found[0], dtype=torch.float64).flatten()[0]) if found else default


def _build(config: EquiformerV3Config, official: Mapping[str, Tensor] | None) -> EquiformerV3:
    if official is not None and any(key.startswith("dens_block.") for key in official):
        config = replace(config, denoising=True)
    return EquiformerV3(config)


def _table(model: EquiformerV3) -> dict[str, list[Source]]:
    table = {}
    for key, value in model.state_dict().items():
        official, shape = official_name(key), tuple(value.shape)
        # Biases of linear maps per degree are stored as (1, 1, outputs).
        if re.search(r"(so3_linear_[12]|\bproj|force_embedding)\.bias$", official):
            shape = (1, 1, *shape)
        table[key] = [Source(official, shape)]
    return table


EQUIFORMER_V3 = _Published(
    system=System(
        name="equiformer_v3",
        title="energy, forces and stress of molecules and materials, direct or by differentiation",
        paper="Liao, Hoffman, Shen, Duval, Norwood, Smidt: EquiformerV3: Scaling Efficient, Expressive, and General SE(3)-Equivariant Graph "
        "Attention Transformers, arXiv 2604.09130, 2026",
        parameters=30_333_409,
        repository="github.com/atomicarchitects/equiformer_v3",
        licence="MIT",
    ),
    config=EquiformerV3Config,
    build=_build,
    table=_table,
    model=EquiformerV3,
    keywords={
        "direct_prediction": "direct",
        "regress_forces": "forces",
        "regress_stress": "stress",
        "num_layers": "layers",
        "num_channels": "channels",
        "lmax": "lmax",
        "mmax": "mmax",
        "attn_hidden_channels": "attention_hidden",
        "num_heads": "heads",
        "attn_alpha_channels": "alpha_channels",
        "attn_value_channels": "value_channels",
        "ffn_hidden_channels": "ffn_hidden",
        "edge_channels": "edge_channels",
        "num_radial_basis": "radial",
        "attn_grid_resolution_list": "attention_grid",
        "ffn_grid_resolution_list": "ffn_grid",
        "max_radius": "cutoff",
        "max_neighbors": "max_neighbors",
        "max_num_elements": "max_elements",
        "avg_degree": "average_degree",
        "avg_num_nodes": "atoms_per_structure",
        "attn_eps": "attention_eps",
        "attn_weights_drop": "attention_dropout",
        "drop_path_rate": "drop_path",
    },
    ignored=("use_pbc", "otf_graph", "use_pbc_single", "gradient_checkpointing_block_list", "use_gate_force_head", *_FIXED),
    unused={
        r"(.*\.)?so3_rotation\.wigner_(index_to_m_array|inv_rescale)": "a constant table of orders",
        r".*\.so3_grid\.(to|from)_grid_mat": "a constant grid",
        r"(.*\.)?expand_index": "a constant index",
        r".*\.balance_degree_weight": "constant weights of degrees",
        r"distance_expansion\.offset": "constant centres of the Gaussians",
        r"stress_block\.zero_padded_change_matrix": "a constant change of basis",
    },
)
