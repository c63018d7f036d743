"""A small decoder that answers questions about where objects stand: question tokens, object tokens, one answer token that points at an object.

What is compared in it is how places reach attention: not at all (`rope`), as features of the objects (`coordinates`), or by QuatRoPE. Classes are
slots that every scene assigns anew, so that a question and an object share a vector and any vocabulary of classes will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveal.graphs3d.models.quatrope import LearnedExtension, QuatRoPEConfig, centred, extension, object_logits
from foveal.kernels import attention, rotary

POSITIONS = ("rope", "official", "paper", "learned")


@dataclass(frozen=True)
class RelationDecoderConfig:
    """Sizes.

    Attributes:
        relations: number of relations that are asked about.
        classes: slots of classes; a scene may have as many different ones.
        width: of the states.
        heads: of the attention.
        layers: number of them.
        positions: how points enter attention: "rope" (not at all), "official" or "paper" QuatRoPE as in `QuatRoPEConfig`, or "learned", the paper's
            form with vectors that are projections of the states.
        coordinates: give objects their coordinates about the scene's mean as features.
        dims: channels of "paper" and "learned"; 12 are one frequency.
        shortest: their shortest period in metres; the longest is 24.
        dropout: in training.
    """

    relations: int = 11
    classes: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 4
    positions: str = "learned"
    coordinates: bool = False
    dims: int = 36
    shortest: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {self.positions!r}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 * heads; got {self.width} and {self.heads}")

    @property
    def quatrope(self) -> QuatRoPEConfig:
        """How points become logits."""
        mode = "official" if self.positions == "official" else "paper"
        return QuatRoPEConfig(mode, self.width // self.heads, dims=self.dims, shortest=self.shortest)


class Asked(NamedTuple):
    """Questions about scenes; class slot 0 means none, 1 any class.

    Attributes:
        relation: of each question.
        slots: of the target and the two others.
        classes: slot of each object.
        centers: in metres.
        sizes: in metres.
        objects: which places hold an object.
        candidates: objects that may be the answer.
        answer: the object that is.
    """

    relation: Int[Tensor, " batch"]
    slots: Int[Tensor, "batch 3"]
    classes: Int[Tensor, "batch objects"]
    centers: Float[Tensor, "batch objects 3"]
    sizes: Float[Tensor, "batch objects 3"]
    objects: Bool[Tensor, "batch objects"]
    candidates: Bool[Tensor, "batch objects"]
    answer: Int[Tensor, " batch"]


class Layer(nn.Module):
    """Attention with rotary positions and what objects' places add, then a feed-forward part; norms before both."""

    def __init__(self, config: RelationDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.before_attention, self.before_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width))
        self.igre = LearnedExtension(config.width, config.heads, config.quatrope) if config.positions == "learned" else None

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        points: Float[Tensor, "batch length 3"],
        objects: Bool[Tensor, "batch length"],
        visible: Bool[Tensor, "batch 1 length length"],
        order: Int[Tensor, "batch length"],
        added: Float[Tensor, "batch 1 length length"] | None,
    ) -> Float[Tensor, "batch length width"]:
        state = self.before_attention(x)
        q, k, v = self.qkv(state).unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotary(q, k, positions=order)
        scale = self.config.quatrope.scale
        if self.igre is not None:
            more_q, more_k = self.igre(state, points, objects)
            q, k = torch.cat((q, more_q), -1), torch.cat((k, more_k), -1)
        y = attention(q, k, v, bias=added, mask=visible, scale=scale).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(y), self.config.dropout, self.training)
        return x + F.dropout(self.mlp(self.before_mlp(x)), self.config.dropout, self.training)


class RelationDecoder(nn.Module):
    """Logits of the objects of a scene as the answer to a question about it."""

    def __init__(self, config: RelationDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.relation = nn.Embedding(config.relations + 1, config.width)  # the last asks for the answer
        self.slot = nn.Embedding(config.classes + 2, config.width)
        self.role = nn.Embedding(4, config.width)  # target, first and second other, object
        self.size = nn.Sequential(nn.Linear(3, config.width), nn.GELU(), nn.Linear(config.width, config.width))
        self.place = nn.Sequential(nn.Linear(3, config.width), nn.GELU(), nn.Linear(config.width, config.width)) if config.coordinates else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.point = nn.Linear(config.width, config.width, bias=False)

    def forward(self, asked: Asked) -> Float[Tensor, "batch objects"]:
        """One logit an object, -inf for those that may not be the answer."""
        batch = len(asked.classes)
        question = torch.cat((self.relation(asked.relation).unsqueeze(1), self.slot(asked.slots) + self.role.weight[:3]), 1)
        things = self.slot(asked.classes) + self.role.weight[3] + self.size(asked.sizes.log())
        if self.place is not None:
            things = things + self.place(centred(asked.centers, asked.objects))
        end = self.relation.weight[-1].expand(batch, 1, -1)
        x = torch.cat((question, things, end), 1)
        before = question.shape[1]
        present = F.pad(asked.objects, (before, 1), value=True)
        objects, points = F.pad(asked.objects, (before, 1)), F.pad(asked.centers, (0, 0, before, 1))
        # Causal, but for objects, which see one another: their order means nothing.
        place = torch.arange(x.shape[1], device=x.device)
        together = objects[:, :, None] & objects[:, None, :]
        visible = (((place[:, None] >= place) | together) & present[:, None, :]).unsqueeze(1)
        # The answer comes right after the last object, however many places a longer scene of the batch needs.
        order = torch.where(place == x.shape[1] - 1, before + asked.objects.sum(-1, keepdim=True), place)
        added = None
        if self.config.positions in ("official", "paper"):
            vectors = extension(points, self.config.quatrope, objects)
            added = object_logits(vectors, vectors, self.config.quatrope)
        for layer in self.layers:
            x = layer(x, points, objects, visible, order, added)
        x = self.norm(x)
        scores = (x[:, before:-1] @ self.point(x[:, -1]).unsqueeze(-1)).squeeze(-1) * self.config.width**-0.5
        return scores.masked_fill(~(asked.candidates & asked.objects), -torch.inf)
