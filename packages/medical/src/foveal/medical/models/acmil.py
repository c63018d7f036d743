"""ACMIL: classifies a bag of instances, such as the tiles of a slide, with several attention branches that must look at different instances.

Zhang et al., Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, ECCV 2024 (arXiv:2311.07125), as the released
code computes it, in both its forms: gated attention (84,369 parameters for 384 features) and multi-head attention (416,140). In training the
instances that a branch likes best are hidden from it at random, so that it looks for more of them.

A bag has one query a branch (and head), so nothing of the size (instances, width) is made but the reduced features themselves: keys are folded
into the queries and values into what was pooled, and the bag's own pooling is the mean of its branches'. Both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

#: What a hidden instance's attention is set to: nothing beside others, an even share where all are hidden.
HIDDEN = -1e9


@dataclass(frozen=True)
class ACMILConfig:
    """Sizes that both forms have; the defaults are those for features of a ViT-S."""

    features: int = 384  # of an instance
    inner: int = 128  # after reduction
    classes: int = 2
    branches: int = 5
    candidates: int = 10  # instances that a branch likes best, of which some are hidden in training
    hide: float = 0.6  # share of the candidates that are hidden; 0 switches it off

    def __post_init__(self) -> None:
        for name in ("features", "inner", "classes", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.candidates < 0 or not 0 <= self.hide <= 1:
            raise ValueError(f"candidates must not be negative and hide be from 0 to 1; got {self.candidates} and {self.hide}")


@dataclass(frozen=True)
class GatedACMILConfig(ACMILConfig):
    """Sizes of the gated form."""

    gate: int = 128  # width of the gated layer


@dataclass(frozen=True)
class MultiHeadACMILConfig(ACMILConfig):
    """Sizes of the multi-head form."""

    heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.inner % self.heads:
            raise ValueError(f"inner must be a multiple of heads; got {self.inner} and {self.heads}")


class BagOutput(NamedTuple):
    """What a bag gives.

    Attributes:
        branch_logits: of each branch; for training only.
        bag_logits: the prediction.
        attention: logits over instances; the first axis is 1 (gated) or the heads. In training hidden instances have -1e9.
    """

    branch_logits: Float[Tensor, "branches classes"]
    bag_logits: Float[Tensor, "1 classes"]
    attention: Float[Tensor, "heads branches instances"]

    @property
    def importance(self) -> Float[Tensor, " instances"]:
        """Share of each instance in the bag's feature, mean of the branches and heads; sums to 1."""
        return self.attention.softmax(-1).mean((0, 1))


class BagLosses(NamedTuple):
    """The parts of the loss, and their sum."""

    bag: Float[Tensor, ""]
    branch: Float[Tensor, ""]
    diversity: Float[Tensor, ""]
    total: Float[Tensor, ""]


def acmil_loss(output: BagOutput, label: Int[Tensor, "1"]) -> BagLosses:
    """Cross-entropy of the bag, mean cross-entropy of its branches, and mean cosine between the attention of any two of them; each weighs 1.

    With one branch only the first is there, as in the released code.
    """
    branches = output.branch_logits.shape[0]
    bag = F.cross_entropy(output.bag_logits, label)
    if branches == 1:
        zero = torch.zeros_like(bag)
        return BagLosses(bag, zero, zero, bag)
    branch = F.cross_entropy(output.branch_logits, label.expand(branches))
    first, second = zip(*combinations(range(branches), 2), strict=True)
    shares = output.attention.softmax(-1)
    diversity = F.cosine_similarity(shares[:, list(first)], shares[:, list(second)], dim=-1).mean()
    return BagLosses(bag, branch, diversity, bag + branch + diversity)


def hide_best(attention: Float[Tensor, "heads branches instances"], candidates: int, share: float) -> Float[Tensor, "heads branches instances"]:
    """Hide a share of each branch's best instances, drawn anew with every call (stochastic top-K instance masking, the paper's section 3.3).

    Args:
        attention: logits.
        candidates: the best instances that may be hidden; all in a smaller bag.
        share: of the candidates; rounded down to whole instances.
    """
    count = min(candidates, attention.shape[-1])
    hidden = int(count * share)
    if not hidden:
        return attention
    best = attention.topk(count, dim=-1).indices
    drawn = torch.rand(best.shape, device=best.device).argsort(-1)[..., :hidden]
    return attention.scatter(-1, best.gather(-1, drawn), HIDDEN)


class BranchLinear(nn.Module):
    """One linear layer a branch, each with its own weights, computed together."""

    def __init__(self, branches: int, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, outputs) for _ in range(branches)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, x: Float[Tensor, "branches inputs"]) -> Float[Tensor, "branches outputs"]:
        return torch.einsum("koi,ki->ko", self.weight, x) + self.bias


class _ACMIL(nn.Module):
    """What both forms share: reduction before the attention, heads after it."""

    def __init__(self, config: ACMILConfig) -> None:
        super().__init__()
        self.reduce = nn.Linear(config.features, config.inner, bias=False)
        self.branch_heads = BranchLinear(config.branches, config.inner, config.classes)
        self.bag_head = nn.Linear(config.inner, config.classes)

    def _reduced(self, bag: Tensor, features: int) -> Float[Tensor, "instances inner"]:
        if bag.ndim != 3 or bag.shape[0] != 1 or bag.shape[1] == 0 or bag.shape[2] != features:
            raise ValueError(f"expected one bag (1, instances, {features}) with at least one instance; got {tuple(bag.shape)}")
        return F.relu(self.reduce(bag[0]))


class GatedACMIL(_ACMIL):
    """ACMIL with gated attention: the branches share the gated layer, each has its own score of it.

    Args:
        config: sizes.
    """

    def __init__(self, config: GatedACMILConfig | None = None) -> None:
        config = config or GatedACMILConfig()
        super().__init__(config)
        self.config = config
        self.content, self.gate = nn.Linear(config.inner, config.gate), nn.Linear(config.inner, config.gate)
        self.score = nn.Linear(config.gate, config.branches)

    def forward(self, bag: Float[Tensor, "1 instances features"]) -> BagOutput:
        """Classify one bag of any length.

        Raises:
            ValueError: an empty bag, several bags, or features of another width.
        """
        x = self._reduced(bag, self.config.features)
        attention = _wide(self.score(self.content(x).tanh() * self.gate(x).sigmoid())).mT[None]
        if self.training:
            attention = hide_best(attention, self.config.candidates, self.config.hide)
        branch = attention[0].softmax(-1).to(x.dtype) @ x
        return BagOutput(self.branch_heads(branch), self.bag_head(branch.mean(0, keepdim=True)), attention)


class MultiHeadACMIL(_ACMIL):
    """ACMIL with multi-head attention: each branch has a learned query and projections of its own.

    Args:
        config: sizes.
    """

    def __init__(self, config: MultiHeadACMILConfig | None = None) -> None:
        config = config or MultiHeadACMILConfig()
        super().__init__(config)
        self.config = config
        branches, inner = config.branches, config.inner
        self.query = nn.Parameter(1e-6 * torch.randn(branches, inner))
        self.to_query, self.to_key = BranchLinear(branches, inner, inner), BranchLinear(branches, inner, inner)
        self.to_value, self.project = BranchLinear(branches, inner, inner), BranchLinear(branches, inner, inner)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(branches, inner)), nn.Parameter(torch.zeros(branches, inner))
        self.bag_value, self.bag_project, self.bag_norm = nn.Linear(inner, inner), nn.Linear(inner, inner), nn.LayerNorm(inner, eps=1e-6)
        self.dropout = nn.Dropout(0.1)

    def forward(self, bag: Float[Tensor, "1 instances features"]) -> BagOutput:
        """Classify one bag of any length.

        Raises:
            ValueError: an empty bag, several bags, or features of another width.
        """
        heads, x = self.config.heads, self._reduced(bag, self.config.features)
        by_head = (heads, self.config.inner // heads)
        query = self.to_query(self.query).unflatten(1, by_head)
        # q . (W x + b) = (q W) . x + q . b: keys of all instances are never made.
        direction = torch.einsum("khd,khdi->hki", query, self.to_key.weight.unflatten(1, by_head))
        offset = (query * self.to_key.bias.unflatten(1, by_head)).sum(-1).mT
        attention = _wide((direction @ x.mT + offset[..., None]) * by_head[1] ** -0.5)
        if self.training:
            attention = hide_best(attention, self.config.candidates, self.config.hide)
        pooled = attention.softmax(-1).to(x.dtype) @ x
        value = torch.einsum("hki,khdi->khd", pooled, self.to_value.weight.unflatten(1, by_head)).flatten(1) + self.to_value.bias
        branch = F.layer_norm(self.dropout(self.project(value)), (self.config.inner,), eps=1e-6) * self.norm_weight + self.norm_bias
        value = torch.einsum("hi,hdi->hd", pooled.mean(1), self.bag_value.weight.unflatten(0, by_head)).flatten() + self.bag_value.bias
        whole = self.bag_norm(self.dropout(self.bag_project(value)))
        return BagOutput(self.branch_heads(branch), self.bag_head(whole[None]), attention)


def _wide(logits: Tensor) -> Tensor:
    """Attention logits in at least single precision, whatever the layers compute in: half precision cannot hold `HIDDEN`."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
