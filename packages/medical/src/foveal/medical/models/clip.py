"""CLIP's two towers as open_clip builds them, ViT and causal transformer, for an adapter to work on: all tokens, and what the class token attends to.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020). A text's class token is its last one,
which is put first here: an adapter finds both modalities' class tokens in the same place. BiomedCLIP's towers are of another make: `biomed_clip`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.medical.models.biomed_clip import SelfAttention, Tokens, class_scores
from foveal.medical.models.low_rank import LowRank


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; the defaults are those of ViT-B/32."""

    width: int = 512  # of the space that both modalities share
    image_size: int = 224
    patch: int = 32
    image_width: int = 768
    image_layers: int = 12
    image_heads: int = 12
    vocabulary: int = 49408
    context: int = 77  # positions that the text tower knows
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    quick: bool = False  # x sigmoid(1.702 x) for GELU, as OpenAI's own weights and those after them

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise ValueError(f"image_size must be a multiple of patch; got {self.image_size} and {self.patch}")
        for name in ("image", "text"):
            width, heads = getattr(self, f"{name}_width"), getattr(self, f"{name}_heads")
            if width % heads:
                raise ValueError(f"{name}_width must be a multiple of {name}_heads; got {width} and {heads}")


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class Block(nn.Module):
    """Norms first; both towers have it."""

    def __init__(self, width: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), SelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELU() if quick else nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, lora: LowRank | None, layer: int, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What comes out, and the attention's queries and keys."""
        attended, queries, keys = self.attention.attend(self.norm1(x), lora, layer, causal=causal)
        x = x + attended
        return x + self.mlp(self.norm2(x)), queries, keys


class ImageTower(nn.Module):
    """ViT with a norm before its blocks."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.image_width
        self.size = config.image_size
        self.patches = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positions = nn.Parameter(width**-0.5 * torch.randn(1 + (config.image_size // config.patch) ** 2, width))
        self.norm_before, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, config.image_heads, config.quick) for _ in range(config.image_layers))
        self.project = nn.Parameter(width**-0.5 * torch.randn(width, config.width))

    def forward(self, image: Float[Tensor, "batch 3 height width"], lora: LowRank | None = None) -> Tokens:
        if image.ndim != 4 or image.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"expected images (batch, 3, {self.size}, {self.size}); got {tuple(image.shape)}")
        x = self.patches(image).flatten(2).mT
        x = self.norm_before(torch.cat([self.class_token.expand(len(x), 1, -1), x], 1) + self.positions)
        queries = keys = x
        for layer, block in enumerate(self.blocks):
            x, queries, keys = block(x, lora, layer)
        return Tokens(F.normalize(self.norm(x) @ self.project, dim=-1), class_scores(queries[:, 0], keys).mean(1)[:, 1:])


class TextTower(nn.Module):
    """A causal transformer; its last token, which has the highest number, has read the whole text and stands for it."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.text_width
        self.words = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(0.01 * torch.randn(config.context, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, config.quick) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Parameter(width**-0.5 * torch.randn(width, config.width))

    def forward(self, text: Int[Tensor, "batch tokens"], lora: LowRank | None = None) -> Tokens:
        if text.ndim != 2 or text.shape[1] > len(self.positions) or text.is_floating_point():
            raise ValueError(f"expected numbers of tokens (batch, at most {len(self.positions)}); got {text.dtype} {tuple(text.shape)}")
        x = self.words(text) + self.positions[: text.shape[1]]
        queries = keys = x
        for layer, block in enumerate(self.blocks):
            x, queries, keys = block(x, lora, layer, causal=True)
        place, last = torch.arange(text.shape[1], device=text.device), text.argmax(-1, keepdim=True)
        # The last token first, the others as they were; what comes after it is padding, which it cannot have read.
        order = place.expand(len(text), -1).masked_fill(place == last, -1).argsort(-1)
        query = queries.gather(1, last[..., None, None].expand(-1, 1, *queries.shape[2:]))[:, 0]
        scores = class_scores(query, keys).masked_fill((place > last)[:, None], float("-inf"))
        tokens = F.normalize(self.norm(x) @ self.project, dim=-1)
        attention = scores.softmax(-1).mean(1).gather(1, order)
        return Tokens(tokens.gather(1, order[..., None].expand_as(tokens)), attention[:, 1:])


class CLIP(nn.Module):
    """Both towers. Texts are numbers of tokens of open_clip's tokenizer.

    Args:
        config: sizes.
    """

    def __init__(self, config: CLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CLIPConfig()
        self.image, self.text = ImageTower(config), TextTower(config)
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.07)))

    def forward(
        self, image: Float[Tensor, "images 3 height width"], text: Int[Tensor, "texts tokens"]
    ) -> tuple[Float[Tensor, "images width"], Float[Tensor, "texts width"]]:
        """Embeddings without any adapter: the class tokens."""
        return self.image(image).tokens[:, 0], self.text(text).tokens[:, 0]
