"""Keys of ACE-LoRA's adapter files, whose tensors stand in nested dictionaries, and of BiomedCLIP and CLIP as open_clip saves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.core.official import Source, read_official
from foveal.core.systems import Adapter, System
from foveal.medical.checkpoints.prefixes import table_by_prefix
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig
from foveal.medical.models.biomed_clip import BiomedCLIP, BiomedCLIPConfig
from foveal.medical.models.clip import CLIP, CLIPConfig


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An adapter file's nested dictionaries as one, with dotted names; what stands beside ``weights`` in a file is left out."""
    content = content["weights"] if isinstance(content.get("weights"), Mapping) else content
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def read_adapter(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The authors' adapter, from their file or what it holds, with dotted names."""
    content = source if isinstance(source, Mapping) else read_official(source)
    return flat(content)


def nested(official: Mapping[str, Tensor], config: ACELoRAConfig) -> dict[str, Any]:
    """What the authors' file holds, from dotted names."""
    weights: dict[str, Any] = {}
    for key, value in official.items():
        place, (first, _, rest) = weights, key.partition(".")
        if first.startswith("layer_"):
            projection, _, leaf = rest.partition(".")
            place.setdefault(first, {}).setdefault(projection, {})[leaf] = value
        elif rest:
            place.setdefault(first, {})[rest] = value
        else:
            place[first] = value
    metadata = {"r": config.rank, "topk": config.neighbours, "k_nearest": config.neighbours, "params": ["q", "k", "v"], "position": "all"}
    return {"weights": weights, "metadata": {**metadata, "loss_type": "clip_loss_ace_hgat"}}


def _adapter_table(model: ACELoRA) -> dict[str, list[Source]]:
    table: dict[str, list[Source]] = {}
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "scale":
            table[key] = [Source("logit_scale", ())]
        elif part.endswith("_lora"):
            # Their layers count through both towers, the text's first.
            first, leaf = (0 if part == "text_lora" else model.config.text_layers), {"down": "A", "up": "B"}[rest]
            layers = range(first, first + value.shape[0])
            table[key] = [Source(f"layer_{layer}.{name}_proj.w_lora_{leaf}", tuple(value.shape[2:])) for layer in layers for name in "qkv"]
        else:
            side, index, leaf = rest.split(".")
            name = {"image": "img", "text": "text"}[part]
            table[key] = [Source(f"{name}_{side}_adapter.{'down' if index == '0' else 'up'}.{leaf}", tuple(value.shape))]
    return table


def _base_table(model: BiomedCLIP) -> dict[str, list[Source]]:
    bert = "text.transformer"
    prefixes = {
        "log_scale": "logit_scale", "image.patches": "visual.trunk.patch_embed.proj", "image.class_token": "visual.trunk.cls_token",
        "image.positions": "visual.trunk.pos_embed", "image.norm": "visual.trunk.norm", "image.project": "visual.head.proj",
        "text.words": f"{bert}.embeddings.word_embeddings", "text.positions": f"{bert}.embeddings.position_embeddings",
        "text.kinds": f"{bert}.embeddings.token_type_embeddings", "text.norm": f"{bert}.embeddings.LayerNorm", "text.project": "text.proj",
    }  # fmt: skip
    for layer in range(model.config.image_layers):
        ours, theirs = f"image.blocks.{layer}", f"visual.trunk.blocks.{layer}"
        prefixes |= {f"{ours}.{name}": f"{theirs}.{name}" for name in ("norm1", "norm2")}
        prefixes |= {f"{ours}.attention.qkv": f"{theirs}.attn.qkv", f"{ours}.attention.project": f"{theirs}.attn.proj"}
        prefixes |= {f"{ours}.mlp.0": f"{theirs}.mlp.fc1", f"{ours}.mlp.2": f"{theirs}.mlp.fc2"}
    for layer in range(model.config.text_layers):
        ours, theirs = f"text.blocks.{layer}", f"{bert}.encoder.layer.{layer}"
        prefixes |= {f"{ours}.norm1": f"{theirs}.attention.output.LayerNorm", f"{ours}.norm2": f"{theirs}.output.LayerNorm"}
        prefixes |= {f"{ours}.attention.qkv": f"{theirs}.attention.self", f"{ours}.attention.project": f"{theirs}.attention.output.dense"}
        prefixes |= {f"{ours}.mlp.0": f"{theirs}.intermediate.dense", f"{ours}.mlp.2": f"{theirs}.output.dense"}
    table = table_by_prefix(model, prefixes)
    for key, (source,) in list(table.items()):
        if source.key.startswith(bert) and ".attention.self." in source.key:
            place, _, leaf = source.key.rpartition(".")
            rows, *rest = source.shape
            table[key] = [Source(f"{place}.{name}.{leaf}", (rows // 3, *rest)) for name in ("query", "key", "value")]
    return table


def _clip_table(model: CLIP) -> dict[str, list[Source]]:
    prefixes = {
        "log_scale": "logit_scale", "image.patches": "visual.conv1", "image.class_token": "visual.class_embedding",
        "image.positions": "visual.positional_embedding", "image.norm_before": "visual.ln_pre", "image.norm": "visual.ln_post",
        "image.project": "visual.proj", "text.words": "token_embedding", "text.positions": "positional_embedding", "text.norm": "ln_final",
        "text.project": "text_projection",
    }  # fmt: skip
    for tower, layers in (("image", model.config.image_layers), ("text", model.config.text_layers)):
        for layer in range(layers):
            ours, theirs = f"{tower}.blocks.{layer}", f"{'visual.' if tower == 'image' else ''}transformer.resblocks.{layer}"
            prefixes |= {f"{ours}.norm1": f"{theirs}.ln_1", f"{ours}.norm2": f"{theirs}.ln_2", f"{ours}.attention.project": f"{theirs}.attn.out_proj"}
            prefixes |= {f"{ours}.attention.qkv.{leaf}": f"{theirs}.attn.in_proj_{leaf}" for leaf in ("weight", "bias")}
            prefixes |= {f"{ours}.mlp.0": f"{theirs}.mlp.c_fc", f"{ours}.mlp.2": f"{theirs}.mlp.c_proj"}
    return table_by_prefix(model, prefixes)


_SIZES = {field.name: field.name for field in fields(BiomedCLIPConfig)}

BIOMED_CLIP = Adapter(
    system=System(
        name="biomed_clip",
        title="the vision-language model that ACE-LoRA adapts, as open_clip saves it",
        paper="Zhang et al.: BiomedCLIP: a multimodal biomedical foundation model, 2023 (arXiv:2303.00915)",
        parameters=195_902_721,
        repository="huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        licence="MIT",
    ),
    config=BiomedCLIPConfig,
    build=lambda config, official: BiomedCLIP(config),
    table=_base_table,
    model=BiomedCLIP,
    keywords=_SIZES,
    unused={r"text\.transformer\.embeddings\.position_ids": "numbers of positions, which are counted", r"text\.transformer\.pooler\..*": "not used"},
)

OPEN_CLIP = Adapter(
    system=System(
        name="open_clip",
        title="vision-language models of CLIP's make, as open_clip saves them, for ACE-LoRA to adapt",
        paper="Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020)",
        parameters=151_277_313,
        repository="github.com/mlfoundations/open_clip",
        licence="MIT",
    ),
    config=CLIPConfig,
    build=lambda config, official: CLIP(config),
    table=_clip_table,
    model=CLIP,
    keywords={field.name: field.name for field in fields(CLIPConfig)},
    unused={r"attn_mask": "the causal mask, which is known"},
    renames={r"^text\.": ""},
)

ACE_LORA = Adapter(
    system=System(
        name="ace_lora",
        title="adapter of BiomedCLIP to chest films: low-rank terms and a hypergraph over tokens",
        paper="Aydin et al.: ACE-LoRA: Graph-Attentive Context Enhancement for Parameter-Efficient Adaptation, 2026 (arXiv:2603.17079)",
        parameters=969_217,
        repository="github.com/icon-lab/ACE-LoRA",
        licence="MIT",
    ),
    config=ACELoRAConfig,
    build=lambda config, official: ACELoRA(config),
    table=_adapter_table,
    model=ACELoRA,
    keywords={
        "r": "rank", "alpha": "alpha", "dropout_rate": "dropout", "topk": "neighbours", "hidden_features": "hidden", "output_dim": "width",
        **{name: name for name in ("text_layers", "text_width", "image_layers", "image_width")},
    },
    ignored=("k_nearest", "params", "position", "loss_type"),
)  # fmt: skip
