"""BiomedCLIP's two towers: a ViT and a BERT that give every token of an image and a text, projected into one space, for an adapter to work on.

Zhang et al., BiomedCLIP, 2023 (arXiv:2303.00915): 195,902,721 parameters. Checkpoints of open_clip in this layout load, of any size. What an
adapter needs is here and nothing else: all tokens are projected, and the last layer says what its class token attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.kernels import attention
from foveal.medical.models.low_rank import LowRank

#: Number of the padding token in BERT's vocabularies.
PADDING = 0


@dataclass(frozen=True)
class BiomedCLIPConfig:
    """Sizes of both towers; the defaults are the published ones."""

    width: int = 512  # of the space that both modalities share
    image_size: int = 224
    patch: int = 16
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    vocabulary: int = 30522
    context: int = 512  # positions that the text tower knows
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_inner: int = 3072  # of the text tower's feed-forward layers

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch; got {self.image_size} and {self.patch}")
        for name in ("image", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise ValueError(f"{name}_width must be a multiple of {name}_heads; got {width} and {heads}")


class Tokens(NamedTuple):
    """What a tower gives.

    Attributes:
        tokens: projected and L2-normalised, the class token first. Padding is among them.
        attention: of the last layer's class token to every other token, mean of the heads: scores before the softmax for images, probabilities
            for texts, as ACE-LoRA reads them.
    """

    tokens: Float[Tensor, "batch tokens width"]
    attention: Float[Tensor, "batch tokens-1"]


class SelfAttention(nn.Module):
    """Multi-head self-attention whose three projections are one layer and may have a low-rank term.

    Args:
        width: of a token.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], lora: LowRank | None = None, layer: int = 0, mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch heads dim"], Float[Tensor, "batch tokens heads dim"]]:
        """Attend; beside the result come the class token's query and all keys."""
        attended, queries, keys = self.attend(x, lora, layer, mask)
        return attended, queries[:, 0], keys

    def attend(
        self, x: Float[Tensor, "batch tokens width"], lora: LowRank | None = None, layer: int = 0, mask: Tensor | None = None, causal: bool = False
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens heads dim"], Float[Tensor, "batch tokens heads dim"]]:
        """Attend; beside the result come all queries and keys."""
        projected = self.qkv(x) if lora is None else lora(layer, x, self.qkv.weight, self.qkv.bias)
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.project(attention(q, k, v, mask=mask, causal=causal, layout="bnhd").flatten(2)), q, k


class ImageBlock(nn.Module):
    """ViT's block: norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6), SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, lora: LowRank | None, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        attended, query, keys = self.attention(self.norm1(x), lora, layer)
        x = x + attended
        return x + self.mlp(self.norm2(x)), query, keys


class TextBlock(nn.Module):
    """BERT's block: norms last, no dropout."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12), SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor, lora: LowRank | None, layer: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, query, keys = self.attention(x, lora, layer, mask)
        x = self.norm1(x + attended)
        return self.norm2(x + self.mlp(x)), query, keys


class ImageTower(nn.Module):
    """ViT."""

    def __init__(self, config: BiomedCLIPConfig) -> None:
        super().__init__()
        width, patch = config.image_width, config.patch
        self.size = config.image_size
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (config.image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(ImageBlock(width, config.image_heads) for _ in range(config.image_layers))
        self.norm, self.project = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, config.width, bias=False)

    def forward(self, image: Float[Tensor, "batch 3 height width"], lora: LowRank | None = None) -> Tokens:
        if image.ndim != 4 or image.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"expected images (batch, 3, {self.size}, {self.size}); got {tuple(image.shape)}")
        x = self.patches(image).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        query = keys = x
        for layer, block in enumerate(self.blocks):
            x, query, keys = block(x, lora, layer)
        return Tokens(F.normalize(self.project(self.norm(x)), dim=-1), class_scores(query, keys).mean(1)[:, 1:])


class TextTower(nn.Module):
    """BERT without pooler, and a projection of two layers."""

    def __init__(self, config: BiomedCLIPConfig) -> None:
        super().__init__()
        width, between = config.text_width, (config.text_width + config.width) // 2
        self.words, self.positions, self.kinds = nn.Embedding(config.vocabulary, width), nn.Embedding(config.context, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(TextBlock(width, config.text_heads, config.text_inner) for _ in range(config.text_layers))
        self.project = nn.Sequential(nn.Linear(width, between, bias=False), nn.GELU(), nn.Linear(between, config.width, bias=False))

    def forward(self, text: Int[Tensor, "batch tokens"], lora: LowRank | None = None) -> Tokens:
        if text.ndim != 2 or text.shape[1] > self.positions.num_embeddings or text.is_floating_point():
            raise ValueError(f"expected numbers of tokens (batch, at most {self.positions.num_embeddings}); got {text.dtype} {tuple(text.shape)}")
        mask = text != PADDING
        x = self.norm(self.words(text) + self.positions.weight[: text.shape[1]] + self.kinds.weight[0])
        query = keys = x
        for layer, block in enumerate(self.blocks):
            x, query, keys = block(x, lora, layer, mask)
        scores = class_scores(query, keys).masked_fill(~mask[:, None], float("-inf"))
        return Tokens(F.normalize(self.project(x), dim=-1), scores.softmax(-1).mean(1)[:, 1:])


class BiomedCLIP(nn.Module):
    """Both towers. Texts are numbers of tokens of the tokenizer that belongs to the checkpoint, 0 is padding.

    Args:
        config: sizes.
    """

    def __init__(self, config: BiomedCLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BiomedCLIPConfig()
        self.image, self.text = ImageTower(config), TextTower(config)
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    def forward(
        self, image: Float[Tensor, "images 3 height width"], text: Int[Tensor, "texts tokens"]
    ) -> tuple[Float[Tensor, "images width"], Float[Tensor, "texts width"]]:
        """Embeddings without any adapter: the class tokens."""
        return self.image(image).tokens[:, 0], self.text(text).tokens[:, 0]


def class_scores(query: Float[Tensor, "batch heads dim"], keys: Float[Tensor, "batch tokens heads dim"]) -> Float[Tensor, "batch heads tokens"]:
    """Scaled scores of one query: the only row of the last layer's attention that is read."""
    return torch.einsum("bhd,bnhd->bhn", query, keys) * query.shape[-1] ** -0.5
