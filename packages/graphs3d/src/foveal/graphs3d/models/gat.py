"""A graph attention network that infers each row's class from its neighbours' features and known labels: the scorer inside GAIS.

Layers are GAT's (Velickovic et al., ICLR 2018, equations 1-4) with a residual path. Two things are ours, for the published abstracts of GAIS
(arXiv 2502.20293, 2412.19201) do not go into detail: a row whose label is hidden must be inferred from rows around it, so that the attention it
pays says which rows are good examples, and its confidence is not that of having been told; and the distance along an edge enters the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from foveal.kernels.segment import CSR, segment_attention


@dataclass(frozen=True)
class SelectionGATConfig:
    """Sizes.

    Attributes:
        features: columns of a row.
        classes: number of classes.
        hidden: width, a multiple of `heads`.
        heads: attention heads of every layer.
        layers: how many neighbourhoods deep a row looks.
        dropout: of features, in training.
        edge_features: numbers an edge: its scaled distance, and how many hash levels found it.
    """

    features: int
    classes: int
    hidden: int = 32
    heads: int = 4
    layers: int = 2
    dropout: float = 0.2
    edge_features: int = 2

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads; got {self.hidden} and {self.heads}")


class Scored(NamedTuple):
    """What the network says about the rows of one graph.

    Attributes:
        logits: of each row's class.
        attention: that the target of an edge pays to its source, a mean over layers and heads; in the order of the edges.
    """

    logits: Float[Tensor, "rows classes"]
    attention: Float[Tensor, " edges"]


class GraphAttention(nn.Module):
    """One layer: logits ``LeakyReLU(a_s . W x_j + a_t . W x_i) + b . e_ij``, softmax over the neighbours j of i, sum of ``W x_j``.

    Args:
        width: of a row, in and out.
        heads: the width is split over them.
        edge_features: numbers an edge.
    """

    def __init__(self, width: int, heads: int, edge_features: int) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, width, bias=False)
        self.own = nn.Linear(width, width)
        self.by_source = nn.Parameter(torch.randn(heads, width // heads) * (heads / width) ** 0.5)
        self.by_target = nn.Parameter(torch.randn(heads, width // heads) * (heads / width) ** 0.5)
        self.by_edge = nn.Parameter(torch.zeros(edge_features, heads))

    def forward(
        self, x: Float[Tensor, "rows width"], edges: CSR, ends: Int[Tensor, "2 edges"], edge: Float[Tensor, "edges edge_features"]
    ) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "edges heads"]]:
        value = self.value(x).unflatten(-1, (self.heads, -1))
        sent, received = (value * self.by_source).sum(-1), (value * self.by_target).sum(-1)
        logits = F.leaky_relu(sent[ends[0]] + received[ends[1]], 0.2) + edge @ self.by_edge
        gathered, attention = segment_attention(None, None, value, edges, edge_bias=logits, return_weights=True)
        return gathered.flatten(1) + self.own(x), attention


class SelectionGAT(nn.Module):
    """Classes of rows from their features, their neighbours, and the labels that are not hidden."""

    def __init__(self, config: SelectionGATConfig) -> None:
        super().__init__()
        self.config = config
        self.feature = nn.Linear(config.features, config.hidden)
        self.label = nn.Embedding(config.classes + 1, config.hidden, padding_idx=config.classes)
        self.layers = nn.ModuleList(GraphAttention(config.hidden, config.heads, config.edge_features) for _ in range(config.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden) for _ in range(config.layers))
        self.classify = nn.Linear(config.hidden, config.classes)

    def forward(
        self,
        x: Float[Tensor, "rows features"],
        labels: Int[Tensor, " rows"],
        hidden: Bool[Tensor, " rows"],
        edges: CSR,
        edge: Float[Tensor, "edges edge_features"],
    ) -> Scored:
        """Infer all rows.

        Args:
            x: standardised features.
            labels: class of each row.
            hidden: rows whose label the network must not see.
            edges: neighbours; edge (j, i) lets i look at j.
            edge: features of the edges, in the caller's order.
        """
        told = torch.where(hidden, self.config.classes, labels)
        state = F.dropout(F.elu(self.feature(x)), self.config.dropout, self.training) + self.label(told)
        ends, paid = edges.edge_index(), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            out, attention = layer(norm(state), edges, ends, edge)
            state = state + F.dropout(F.elu(out), self.config.dropout, self.training)
            paid.append(attention.mean(-1))
        return Scored(self.classify(state), torch.stack(paid).mean(0))
