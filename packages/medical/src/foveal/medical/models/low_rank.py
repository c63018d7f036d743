"""Low-rank terms (LoRA; Hu et al., 2022) on the query, key and value projections of a stack of attention layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def merged(
    weight: Float[Tensor, "parts*outputs inputs"], down: Float[Tensor, "parts rank inputs"], up: Float[Tensor, "parts outputs rank"], scale: float
) -> Float[Tensor, "parts*outputs inputs"]:
    """One weight that does what a frozen weight and its low-rank terms do together."""
    return weight + scale * (up @ down).flatten(0, 1)


def adapted_linear(
    x: Float[Tensor, "*batch inputs"],
    weight: Float[Tensor, "parts*outputs inputs"],
    bias: Float[Tensor, " parts*outputs"] | None,
    down: Float[Tensor, "parts rank inputs"],
    up: Float[Tensor, "parts outputs rank"],
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "*batch parts*outputs"]:
    """A linear layer and the low-rank term of each of its parts: W x + b + scale * B A dropout(x); each part drops out on its own."""
    terms = [F.linear(F.linear(F.dropout(x, dropout), first), second) for first, second in zip(down, up, strict=True)]
    return F.linear(x, weight, bias) + scale * torch.cat(terms, -1)


class LowRank(nn.Module):
    """The terms of all layers of one tower. They start as nothing: the second factor is zero.

    The scale is alpha / sqrt(rank), as in rank-stabilised LoRA (Kalajdzievski, 2023) and in ACE-LoRA's released code.

    Args:
        layers: attention layers of the tower.
        width: of its tokens.
        rank: of a term.
        alpha: strength.
        dropout: on what the terms read, in training.
    """

    def __init__(self, layers: int, width: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = alpha * rank**-0.5, dropout
        bound = width**-0.5
        self.down = nn.Parameter(torch.empty(layers, 3, rank, width).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(layers, 3, width, rank))

    def forward(
        self, layer: int, x: Float[Tensor, "batch tokens width"], weight: Float[Tensor, "3*width width"], bias: Float[Tensor, " 3*width"]
    ) -> Float[Tensor, "batch tokens 3*width"]:
        """Queries, keys and values of one layer, side by side. Outside training the terms are merged into the weight: one product."""
        down, up = self.down[layer], self.up[layer]
        if self.training:
            return adapted_linear(x, weight, bias, down, up, self.scale, self.dropout)
        return F.linear(x, merged(weight, down, up, self.scale), bias)
