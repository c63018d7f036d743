"""ACMIL: classifies a bag of instances, such as the tiles of a slide, with several attention branches that must look at different instances.

Zhang et al., Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification, ECCV 2024 (arXiv:2311.07125), as the released
code computes it, in both its forms: gated attention (84,369 parameters for 384 features) and multi-head attention (416,140). In training the
instances that a branch likes best are hidden from it at random, so that it looks for more of them.

A bag has one query a branch (and head), so nothing of the size (instances, width) is made but the reduced features themselves: keys are folded
into the queries and values into what was pooled, and the bag's own pooling is the mean of its branches'. Both are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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


class BagsOutput(NamedTuple):
    """What several bags give whose instances stand one bag behind the other.

    Attributes:
        branch_logits: of each branch of each bag; for training only.
        bag_logits: the predictions.
        attention: logits over the instances of all bags; see `BagOutput`.
        lengths: instances of each bag.
    """

    branch_logits: Float[Tensor, "bags branches classes"]
    bag_logits: Float[Tensor, "bags classes"]
    attention: Float[Tensor, "heads branches instances"]
    lengths: tuple[int, ...]

    def bags(self) -> list[BagOutput]:
        """Each bag's own output."""
        parts = self.attention.split(list(self.lengths), dim=-1)
        return [BagOutput(branch, bag[None], part) for branch, bag, part in zip(self.branch_logits, self.bag_logits, parts, strict=True)]


class BagLosses(NamedTuple):
    """The parts of the loss, and their sum; means over bags."""

    bag: Float[Tensor, ""]
    branch: Float[Tensor, ""]
    diversity: Float[Tensor, ""]
    total: Float[Tensor, ""]


def acmil_loss(output: BagOutput | BagsOutput, labels: Int[Tensor, " bags"]) -> BagLosses:
    """Cross-entropy of the bag, mean cross-entropy of its branches, and mean cosine between the attention of any two of them; each weighs 1.

    With one branch only the first is there, as in the released code. Of several bags each part is the mean over them.
    """
    if isinstance(output, BagOutput):
        output = BagsOutput(output.branch_logits[None], output.bag_logits, output.attention, (output.attention.shape[-1],))
    branches = output.branch_logits.shape[1]
    bag = F.cross_entropy(output.bag_logits, labels)
    if branches == 1:
        zero = torch.zeros_like(bag)
        return BagLosses(bag, zero, zero, bag)
    branch = F.cross_entropy(output.branch_logits.flatten(0, 1), labels.repeat_interleave(branches))
    shares = [logits.softmax(-1) for logits in output.attention.split(list(output.lengths), dim=-1)]
    products = torch.stack([share @ share.mT for share in shares])
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    first, second = zip(*combinations(range(branches), 2), strict=True)
    cosines = products[..., first, second] / (lengths[..., first] * lengths[..., second])
    diversity = cosines.mean()
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

    def forward(self, x: Float[Tensor, "*bags branches inputs"]) -> Float[Tensor, "*bags branches outputs"]:
        return torch.einsum("koi,...ki->...ko", self.weight, x) + self.bias


class _ACMIL(nn.Module, ABC):
    """What both forms share: reduction before the attention, heads after it, one bag or several at once."""

    config: ACMILConfig

    def __init__(self, config: ACMILConfig) -> None:
        super().__init__()
        self.config = config
        self.reduce = nn.Linear(config.features, config.inner, bias=False)
        self.branch_heads = BranchLinear(config.branches, config.inner, config.classes)
        self.bag_head = nn.Linear(config.inner, config.classes)

    @abstractmethod
    def _scores(self, x: Float[Tensor, "instances inner"]) -> Float[Tensor, "heads branches instances"]:
        """Attention logits of instances, whichever bag they are in."""

    @abstractmethod
    def _classified(self, pooled: Float[Tensor, "bags heads branches inner"]) -> tuple[Float[Tensor, "bags branches classes"], Tensor]:
        """Logits of the branches and (bags, classes) of the bags, from what each head of each branch pooled."""

    def forward(self, bag: Float[Tensor, "1 instances features"]) -> BagOutput:
        """Classify one bag of any length.

        Raises:
            ValueError: an empty bag, several bags, or features of another width.
        """
        features = self.config.features
        if bag.ndim != 3 or bag.shape[0] != 1 or bag.shape[1] == 0 or bag.shape[2] != features:
            raise ValueError(f"expected one bag (1, instances, {features}) with at least one instance; got {tuple(bag.shape)}")
        return self.forward_bags(bag[0], [bag.shape[1]]).bags()[0]

    def forward_bags(self, features: Float[Tensor, "instances features"], lengths: Sequence[int]) -> BagsOutput:
        """Classify bags of different lengths whose instances stand one bag behind the other: nothing is padded.

        Args:
            features: of the instances of all bags.
            lengths: instances of each bag.

        Raises:
            ValueError: an empty bag, lengths that do not add up to the instances, or features of another width.
        """
        counts, width = tuple(lengths), self.config.features
        if features.ndim != 2 or features.shape[1] != width or min(counts, default=0) < 1 or sum(counts) != len(features):
            raise ValueError(f"expected (instances, {width}) and lengths >= 1 that add up to them; got {tuple(features.shape)} and {counts[:8]}")
        x = F.relu(self.reduce(features))
        attention = list(self._scores(x).split(counts, dim=-1))
        if self.training:
            attention = [hide_best(logits, self.config.candidates, self.config.hide) for logits in attention]
        pooled = [logits.softmax(-1).to(x.dtype) @ instances for logits, instances in zip(attention, x.split(counts), strict=True)]
        branch, bag = self._classified(torch.stack(pooled))
        return BagsOutput(branch, bag, torch.cat(attention, dim=-1), counts)


class GatedACMIL(_ACMIL):
    """ACMIL with gated attention: the branches share the gated layer, each has its own score of it.

    With one branch and nothing hidden this is gated attention-based MIL (ABMIL, Ilse et al., ICML 2018) behind one reducing layer.

    Args:
        config: sizes.
    """

    config: GatedACMILConfig

    def __init__(self, config: GatedACMILConfig | None = None) -> None:
        config = config or GatedACMILConfig()
        super().__init__(config)
        self.content, self.gate = nn.Linear(config.inner, config.gate), nn.Linear(config.inner, config.gate)
        self.score = nn.Linear(config.gate, config.branches)

    def _scores(self, x: Float[Tensor, "instances inner"]) -> Float[Tensor, "heads branches instances"]:
        return _wide(self.score(self.content(x).tanh() * self.gate(x).sigmoid())).mT[None]

    def _classified(self, pooled: Float[Tensor, "bags 1 branches inner"]) -> tuple[Float[Tensor, "bags branches classes"], Tensor]:
        branch = pooled[:, 0]
        return self.branch_heads(branch), self.bag_head(branch.mean(1))


class MultiHeadACMIL(_ACMIL):
    """ACMIL with multi-head attention: each branch has a learned query and projections of its own.

    Args:
        config: sizes.
    """

    config: MultiHeadACMILConfig

    def __init__(self, config: MultiHeadACMILConfig | None = None) -> None:
        config = config or MultiHeadACMILConfig()
        super().__init__(config)
        branches, inner = config.branches, config.inner
        self.query = nn.Parameter(1e-6 * torch.randn(branches, inner))
        self.to_query, self.to_key = BranchLinear(branches, inner, inner), BranchLinear(branches, inner, inner)
        self.to_value, self.project = BranchLinear(branches, inner, inner), BranchLinear(branches, inner, inner)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(branches, inner)), nn.Parameter(torch.zeros(branches, inner))
        self.bag_value, self.bag_project, self.bag_norm = nn.Linear(inner, inner), nn.Linear(inner, inner), nn.LayerNorm(inner, eps=1e-6)
        self.dropout = nn.Dropout(0.1)

    @property
    def _by_head(self) -> tuple[int, int]:
        return self.config.heads, self.config.inner // self.config.heads

    def _scores(self, x: Float[Tensor, "instances inner"]) -> Float[Tensor, "heads branches instances"]:
        query = self.to_query(self.query).unflatten(1, self._by_head)
        # q . (W x + b) = (q W) . x + q . b: keys of all instances are never made.
        direction = torch.einsum("khd,khdi->hki", query, self.to_key.weight.unflatten(1, self._by_head))
        offset = (query * self.to_key.bias.unflatten(1, self._by_head)).sum(-1).mT
        return _wide((direction @ x.mT + offset[..., None]) * self._by_head[1] ** -0.5)

    def _classified(self, pooled: Float[Tensor, "bags heads branches inner"]) -> tuple[Float[Tensor, "bags branches classes"], Tensor]:
        inner = (self.config.inner,)
        value = torch.einsum("bhki,khdi->bkhd", pooled, self.to_value.weight.unflatten(1, self._by_head)).flatten(2) + self.to_value.bias
        branch = F.layer_norm(self.dropout(self.project(value)), inner, eps=1e-6) * self.norm_weight + self.norm_bias
        value = torch.einsum("bhi,hdi->bhd", pooled.mean(2), self.bag_value.weight.unflatten(0, self._by_head)).flatten(1) + self.bag_value.bias
        return self.branch_heads(branch), self.bag_head(self.bag_norm(self.dropout(self.bag_project(value))))


def _wide(logits: Tensor) -> Tensor:
    """Attention logits in at least single precision, whatever the layers compute in: half precision cannot hold `HIDDEN`."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
