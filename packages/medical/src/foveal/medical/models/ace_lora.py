"""ACE-LoRA: adapts a frozen vision-language model to chest films with low-rank terms and a hypergraph over its tokens; 969,217 parameters.

Aydin et al., ACE-LoRA: Graph-Attentive Context Enhancement for Parameter-Efficient Adaptation of Medical Vision-Language Models, 2026
(arXiv:2603.17079), as the released code computes it. Every token opens a hyperedge with the few tokens it is most alike (the class token: those
it attends to most); edges gather their tokens, tokens gather their edges. Only the class token is used afterwards, and only six hyperedges reach
it: the others are never made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.medical.models.biomed_clip import BiomedCLIP, Tokens
from foveal.medical.models.clip import CLIP
from foveal.medical.models.low_rank import LowRank


@dataclass(frozen=True)
class ACELoRAConfig:
    """Sizes of the adapter; the defaults are the published ones, for BiomedCLIP."""

    text_layers: int = 12
    text_width: int = 768
    image_layers: int = 12
    image_width: int = 768
    width: int = 512  # of the space that both modalities share
    hidden: int = 128  # of the hypergraph's layers
    rank: int = 4
    alpha: float = 1.0
    dropout: float = 0.1
    neighbours: int = 5  # of a token in its hyperedge

    def __post_init__(self) -> None:
        for name in ("rank", "neighbours", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


class Embeddings(NamedTuple):
    """Unit vectors of images and texts."""

    image: Float[Tensor, "images width"]
    text: Float[Tensor, "texts width"]


def label_guided_loss(
    image: Float[Tensor, "pairs width"],
    text: Float[Tensor, "pairs width"],
    scale: Float[Tensor, ""] | float,
    labels: Float[Tensor, "pairs findings"] | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE. With labels, pairs that have the same findings are not held against each other.

    Args:
        image: unit vectors.
        text: unit vectors, one for each image.
        scale: what cosines are multiplied by.
        labels: findings of each pair; uncertain and missing ones count as 0 (CheXpert's -1 and NaN are taken for that). None: plain InfoNCE.

    Returns:
        The mean of both directions; exactly 0 where all pairs have the same findings.
    """
    logits = scale * image @ text.mT
    if labels is not None:
        findings = labels.nan_to_num(0.0).clamp_min(0) if labels.is_floating_point() else labels.clamp_min(0)
        same = (findings[:, None] == findings[None]).all(-1)
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


class ContextEnhancement(nn.Module):
    """The hypergraph of one modality: what its class token becomes in the context of the others.

    Args:
        width: of a token.
        hidden: of both layers.
        neighbours: tokens of a hyperedge beside the one that opens it.
    """

    def __init__(self, width: int, hidden: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.edge, self.node = _mlp(width, hidden), _mlp(width, hidden)

    def forward(self, tokens: Float[Tensor, "batch tokens width"], attention: Float[Tensor, "batch tokens-1"]) -> Float[Tensor, "batch width"]:
        """The class token's unit vector, by the hyperedges that reach it: its own and those of the tokens it attends to most.

        Equal to node 0 of `nodes`, at `neighbours` + 1 hyperedges instead of one a token.

        Args:
            tokens: unit vectors or means of some, the class token first.
            attention: of the class token to the others.

        Raises:
            ValueError: shapes that do not fit, or fewer tokens than a hyperedge needs.
        """
        self._check(tokens, attention)
        score, index = attention.topk(self.neighbours, -1)
        weight = score.softmax(-1)
        others, width = tokens[:, 1:], tokens.shape[-1]
        reached = others.gather(1, index[..., None].expand(-1, -1, width))
        likeness = (F.normalize(reached, dim=-1) @ F.normalize(others, dim=-1).mT).scatter(-1, index[..., None], float("-inf"))
        score, place = likeness.topk(self.neighbours, -1)
        members = others.gather(1, place.flatten(1)[..., None].expand(-1, -1, width)).unflatten(1, place.shape[1:])
        gathered = (score.softmax(-1)[..., None] * members).sum(2) + reached + weight[..., None] * tokens[:, :1]
        own = (weight[..., None] * reached).sum(1, keepdim=True) + tokens[:, :1]
        edges = self.edge(torch.cat([own, gathered], 1))
        return F.normalize(self.node(edges[:, 0] + (weight[..., None] * edges[:, 1:]).sum(1)), dim=-1)

    def incidence(
        self, tokens: Float[Tensor, "batch tokens width"], attention: Float[Tensor, "batch tokens-1"]
    ) -> Float[Tensor, "batch tokens tokens"]:
        """How much each hyperedge (row) holds of each token: the whole graph, for pictures and as the definition that `forward` shortens."""
        self._check(tokens, attention)
        directions = F.normalize(tokens, dim=-1)  # averages of several prompts are no unit vectors
        scores = directions @ directions.mT
        scores = torch.cat([torch.cat([torch.zeros_like(attention[:, :1]), attention], 1)[:, None], scores[:, 1:]], 1)
        barred = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        barred[:, 0] = True
        score, index = scores.masked_fill(barred, float("-inf")).topk(self.neighbours, -1)
        shares = torch.zeros_like(scores).scatter(-1, index, score.softmax(-1))
        first = torch.cat([torch.ones_like(shares[:, :1, 0]), shares[:, 0, 1:]], 1)
        shares = torch.cat([first[..., None], shares[..., 1:]], -1)
        return shares + torch.diag_embed(1 - shares.diagonal(dim1=-2, dim2=-1))

    def nodes(self, tokens: Float[Tensor, "batch tokens width"], attention: Float[Tensor, "batch tokens-1"]) -> Float[Tensor, "batch tokens width"]:
        """What every token becomes, by the whole graph."""
        incidence = self.incidence(tokens, attention)
        return self.node(incidence.mT @ self.edge(incidence @ tokens))

    def _check(self, tokens: Tensor, attention: Tensor) -> None:
        if tokens.ndim != 3 or attention.shape != (tokens.shape[0], tokens.shape[1] - 1):
            raise ValueError(f"expected tokens (batch, n, width) and attention (batch, n - 1); got {tuple(tokens.shape)}, {tuple(attention.shape)}")
        if tokens.shape[1] < self.neighbours + 2:
            raise ValueError(f"expected at least {self.neighbours + 2} tokens for hyperedges of {self.neighbours} neighbours; got {tokens.shape[1]}")


class ACELoRA(nn.Module):
    """The adapter: low-rank terms for both towers, a hypergraph for each modality, and the scale of the logits.

    Args:
        config: sizes.
    """

    def __init__(self, config: ACELoRAConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ACELoRAConfig()
        self.text_lora = LowRank(config.text_layers, config.text_width, config.rank, config.alpha, config.dropout)
        self.image_lora = LowRank(config.image_layers, config.image_width, config.rank, config.alpha, config.dropout)
        self.image = ContextEnhancement(config.width, config.hidden, config.neighbours)
        self.text = ContextEnhancement(config.width, config.hidden, config.neighbours)
        self.scale = nn.Parameter(torch.tensor(1 / 0.07))

    def forward(
        self,
        image_tokens: Float[Tensor, "images patches width"],
        image_attention: Float[Tensor, "images patches-1"],
        text_tokens: Float[Tensor, "texts tokens width"],
        text_attention: Float[Tensor, "texts tokens-1"],
    ) -> Embeddings:
        """Embeddings from what the adapted towers give; `AdaptedCLIP` runs the towers too."""
        return Embeddings(self.image(image_tokens, image_attention), self.text(text_tokens, text_attention))


class AdaptedCLIP(nn.Module):
    """A frozen vision-language model and its adapter: embeddings, similarity, zero-shot classification.

    Args:
        base: the model; its parameters are frozen.
        adapter: what is trained.

    Raises:
        ValueError: sizes of the two that do not fit.
    """

    def __init__(self, base: BiomedCLIP | CLIP, adapter: ACELoRA) -> None:
        super().__init__()
        for name in ("text_layers", "text_width", "image_layers", "image_width", "width"):
            of_base, of_adapter = getattr(base.config, name), getattr(adapter.config, name)
            if of_base != of_adapter:
                raise ValueError(f"expected an adapter with {name} = {of_base}, as the model it adapts; got {of_adapter}")
        self.base, self.adapter = base.requires_grad_(False), adapter

    def forward(self, image: Float[Tensor, "images 3 height width"], text: Int[Tensor, "texts tokens"]) -> Embeddings:
        """Embeddings of images and texts."""
        return Embeddings(self.images(image), self.adapter.text(*self.text_tokens(text)))

    def images(self, image: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images width"]:
        """Unit vectors of images, scaled as the base model wants them."""
        return self.adapter.image(*self.image_tokens(image))

    def image_tokens(self, image: Float[Tensor, "images 3 height width"]) -> Tokens:
        """What the adapted image tower gives."""
        tokens: Tokens = self.base.image(image, self.adapter.image_lora)
        return tokens

    def text_tokens(self, text: Int[Tensor, "texts tokens"]) -> Tokens:
        """What the adapted text tower gives."""
        tokens: Tokens = self.base.text(text, self.adapter.text_lora)
        return tokens

    def classes(self, prompts: Int[Tensor, "classes templates tokens"]) -> Float[Tensor, "classes width"]:
        """Unit vectors of classes, each said in several sentences: their tokens are averaged place by place before the hypergraph."""
        tokens, attention = self.text_tokens(prompts.flatten(0, 1))
        size = prompts.shape[:2]
        return self.adapter.text(tokens.unflatten(0, size).mean(1), attention.unflatten(0, size).mean(1))

    def zero_shot(
        self, image: Float[Tensor, "images 3 height width"], prompts: Int[Tensor, "classes templates tokens"]
    ) -> Float[Tensor, "images classes"]:
        """Probabilities of classes that were never trained; logits have the base model's scale, as in the released evaluation."""
        return (self.base.log_scale.exp() * self.images(image) @ self.classes(prompts).mT).softmax(-1)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    down, up = nn.Linear(width, hidden), nn.Linear(hidden, width)
    for layer in (down, up):
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(down, nn.LeakyReLU(0.2), up)
