"""TCRNet's keys: where each tensor of ours stands in the authors' state dict.

Their encoders carry the names of the transformers release of the day (4.x); version 5 renamed the parts of ViT, and both are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel, ViTConfig, ViTModel

from foveal.core.systems import Adapter, System
from foveal.memes.models.published import PublishedConfig, PublishedFusion, PublishedTCRNet

#: The authors' word for each stream, in the names of projections and attentions.
_WORDS = {"text": "text", "image": "vis", "reason": "reason"}
_ENCODERS = {"text": "bert", "image": "vit", "reason": "llm_encoder"}

#: transformers 5 -> transformers 4, inside ViT.
_VIT_NAMES = {
    r"^(vit\.)layers\.(\d+)\.attention\.q_proj\.": r"\1encoder.layer.\2.attention.attention.query.",
    r"^(vit\.)layers\.(\d+)\.attention\.k_proj\.": r"\1encoder.layer.\2.attention.attention.key.",
    r"^(vit\.)layers\.(\d+)\.attention\.v_proj\.": r"\1encoder.layer.\2.attention.attention.value.",
    r"^(vit\.)layers\.(\d+)\.attention\.o_proj\.": r"\1encoder.layer.\2.attention.output.dense.",
    r"^(vit\.)layers\.(\d+)\.mlp\.fc1\.": r"\1encoder.layer.\2.intermediate.dense.",
    r"^(vit\.)layers\.(\d+)\.mlp\.fc2\.": r"\1encoder.layer.\2.output.dense.",
    r"^(vit\.)layers\.(\d+)\.layernorm_": r"\1encoder.layer.\2.layernorm_",
}


def _encoders(config: PublishedConfig) -> dict[str, nn.Module]:
    """The three encoders, with weights drawn at random."""
    mpnet = {"vocab_size": 30527, "max_position_embeddings": 514, "layer_norm_eps": 1e-5, **config.mpnet}
    return {
        "text": BertModel(BertConfig(**config.bert)),
        "image": ViTModel(ViTConfig(**config.vit)),
        "reason": MPNetModel(MPNetConfig(**mpnet)),
    }


def _build(config: PublishedConfig, official: Mapping[str, Tensor] | None) -> nn.Module:
    """The whole model; without its encoders where the state dict has none."""
    whole = official is None or any(key.startswith(tuple(f"{word}." for word in _ENCODERS.values())) for key in official)
    return PublishedTCRNet(config, _encoders(config)) if whole else PublishedFusion(config)


def _restored(config: PublishedConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """As `_build`, of our keys."""
    whole = any(key.startswith("encoders.") for key in state)
    return PublishedTCRNet(config, _encoders(config)) if whole else PublishedFusion(config)


def _official_name(key: str) -> str:
    """The authors' name of a tensor of ours."""
    if key.startswith("encoders."):
        _, stream, rest = key.split(".", 2)
        name = f"{_ENCODERS[stream]}.{rest}"
        for pattern, replacement in _VIT_NAMES.items():
            name = re.sub(pattern, replacement, name)
        return name
    _, part, stream, rest = key.split(".", 3)
    if part == "heads":
        return f"fc.{rest}"
    word = _WORDS[stream]
    if part == "project":
        return f"{word}_proj.{rest}"
    return f"cross_attn_{word}." + rest.replace("inputs.", "in_proj_").replace("output.", "out_proj.")


def _table(model: nn.Module) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    return {key: [(_official_name(key), tuple(value.shape))] for key, value in model.state_dict().items()}


TCRNET = Adapter(
    system=System(
        name="tcrnet",
        title="dark humour, target and intensity of memes from text, picture and a written reason",
        paper="Kasu, Biradar, Saumya: D-HUMOR: Dark Humor Understanding via Multimodal Open-ended Reasoning, 2025",
        parameters=315_402_626,
        repository="github.com/Sai-Kartheek-Reddy/D-Humor-Dark-Humor-Understanding-via-Multimodal-Open-ended-Reasoning",
        licence="none stated: only its facts are used here",
    ),
    config=PublishedConfig,
    build=_build,
    table=_table,
    model=(PublishedFusion, PublishedTCRNet),
    keywords={"num_labels": "classes", "hidden": "width", "heads": "heads", "bert": "bert", "vit": "vit", "mpnet": "mpnet"},
    unused={r".*\.position_ids": "a constant table of positions"},
    renames=_VIT_NAMES,
    restored=_restored,
)
