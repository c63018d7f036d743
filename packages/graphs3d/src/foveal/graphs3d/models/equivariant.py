"""The equivariant layers of EquiformerV3: norm, linear maps per degree and per order, and what is not linear.

Features of nodes are (nodes, (lmax + 1)^2, channels), l-major; in the frames of edges (edges, kept, channels), m-major (see `harmonics`).
Liao et al.: EquiformerV3, arXiv 2604.09130, 2026; the linear map per order is eSCN's (Passaro and Zitnick, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.graphs3d.models.harmonics import degree_index
from foveal.graphs3d.models.sphere import product_grid


class MergedLayerNorm(nn.Module):
    """One scale for all degrees: mean square over channels, orders and degrees, each degree counting alike; degree 0 is centred first.

    Args:
        lmax: largest degree.
        channels: of the features.
        eps: added to the mean square.
    """

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.lmax, self.eps = lmax, eps
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "nodes coefficients channels"]) -> Float[Tensor, "nodes coefficients channels"]:
        """Normalise each node; in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            scalar = wide[:, :1] - wide[:, :1].mean(2, keepdim=True)
            wide = torch.cat((scalar, wide[:, 1:]), 1)
            degree = degree_index(self.lmax, None, x.device)
            share = 1.0 / ((2 * degree + 1) * (self.lmax + 1)).to(wide.dtype)
            square = torch.einsum("nkc,k->n", wide * wide, share) / wide.shape[2]
            scaled = wide * torch.rsqrt(square + self.eps).view(-1, 1, 1) * self.weight[degree]
            return torch.cat((scaled[:, :1] + self.bias, scaled[:, 1:]), 1).to(x.dtype)


def linear_per_degree(
    x: Float[Tensor, "nodes coefficients inputs"], weight: Float[Tensor, "degrees outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "nodes coefficients outputs"]:
    """Each degree has its own matrix between channels; degree 0 has the bias."""
    parts = [F.linear(x[:, degree**2 : (degree + 1) ** 2], matrix, None if degree else bias) for degree, matrix in enumerate(weight)]
    return torch.cat(parts, 1)


class DegreeLinear(nn.Module):
    """A linear map of channels for each degree, the same for its orders; bias on degree 0.

    Args:
        lmax: largest degree.
        inputs: channels.
        outputs: channels.
    """

    def __init__(self, lmax: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(lmax + 1, outputs, inputs).uniform_(-1 / sqrt(inputs), 1 / sqrt(inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "nodes coefficients inputs"]) -> Float[Tensor, "nodes coefficients outputs"]:
        """Map the channels."""
        return linear_per_degree(x, self.weight, self.bias)


class OrderLinear(nn.Module):
    """A linear map that commutes with turns about the edge: degrees and channels of one order mix freely, orders m and -m as a complex number.

    Args:
        lmax: largest degree.
        mmax: largest order.
        inputs: channels.
        outputs: channels.
        extra: channels of a second, invariant output, made of order 0.
    """

    def __init__(self, lmax: int, mmax: int, inputs: int, outputs: int, extra: int = 0) -> None:
        super().__init__()
        self.lmax, self.outputs, self.extra = lmax, outputs, extra
        self.zero = nn.Linear((lmax + 1) * inputs, extra + (lmax + 1) * outputs)
        nn.init.zeros_(self.zero.bias)
        orders = [nn.Linear((lmax + 1 - m) * inputs, 2 * (lmax + 1 - m) * outputs, bias=False) for m in range(1, mmax + 1)]
        with torch.no_grad():
            for order in orders:
                # Real and imaginary part add two terms.
                order.weight /= sqrt(2)
        self.orders = nn.ModuleList(orders)

    def forward(self, parts: Sequence[Tensor]) -> tuple[Float[Tensor, "edges kept outputs"], Float[Tensor, "edges extra"]]:
        """Features in the frame of the edge, m-major; and the invariant output.

        Args:
            parts: of each order, as `by_order` gives them.
        """
        extra, zero = self.zero(parts[0].flatten(1)).split([self.extra, (self.lmax + 1) * self.outputs], 1)
        mixed = [zero.unflatten(1, (self.lmax + 1, self.outputs))]
        for m, (order, part) in enumerate(zip(self.orders, parts[1:], strict=True), 1):
            real, imaginary = cast(nn.Linear, order).weight.chunk(2)
            # A complex product as a real one, on +m and -m side by side.
            matrix = torch.cat((torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)))
            mixed.append(F.linear(part.flatten(1), matrix).unflatten(1, (2 * (self.lmax + 1 - m), self.outputs)))
        return torch.cat(mixed, 1), extra


def by_order(x: Float[Tensor, "edges kept channels"], lmax: int, mmax: int) -> list[Tensor]:
    """Views of m-major features: order 0 (edges, lmax + 1, channels), then of each order m the pair +m, -m: (edges, 2, lmax + 1 - m, channels)."""
    zero, *pairs = x.split([lmax + 1, *(2 * (lmax + 1 - m) for m in range(1, mmax + 1))], 1)
    return [zero, *(pair.unflatten(1, (2, pair.shape[1] // 2)) for pair in pairs)]


class RadialFunction(nn.Module):
    """Weights of an edge from what is invariant about it: three linear maps with layer norm and SiLU between.

    Args:
        inputs: numbers that describe the edge.
        hidden: width.
        outputs: weights.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, outputs),
        )  # fmt: skip
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def forward(self, edge: Float[Tensor, "edges inputs"]) -> Float[Tensor, "edges outputs"]:
        """Weights of each edge."""
        return self.net(edge)


def swiglu(x: Float[Tensor, "*batch twice"]) -> Float[Tensor, "*batch half"]:
    """SiLU of the first half of the channels, times the second."""
    first, second = x.chunk(2, -1)
    return F.silu(first) * second


def sphere_product(x: Float[Tensor, "items coefficients twice"], lmax: int, mmax: int | None) -> Float[Tensor, "items coefficients half"]:
    """The two halves of the channels multiplied as functions on the sphere, up to degree lmax; exact, so equivariant."""
    to_grid, from_grid = product_grid(lmax, mmax, x.dtype, x.device)
    first, second = torch.matmul(to_grid, x).chunk(2, -1)
    return torch.matmul(from_grid, first * second)


def gated_sphere_product(
    x: Float[Tensor, "items coefficients twice"], scalars: Float[Tensor, "items thrice"], lmax: int, mmax: int | None
) -> Float[Tensor, "items coefficients half"]:
    """SwiGLU-S2: the product on the sphere, gated by invariants, plus the invariants' own SwiGLU on degree 0.

    Args:
        x: two halves of channels.
        scalars: the input of the SwiGLU (two halves), then the gate.
        lmax: largest degree.
        mmax: largest order where `x` is m-major.
    """
    half = x.shape[2] // 2
    product = sphere_product(x, lmax, mmax) * torch.sigmoid(scalars[:, 2 * half :]).unsqueeze(1)
    return torch.cat((product[:, :1] + swiglu(scalars[:, : 2 * half]).unsqueeze(1), product[:, 1:]), 1)


def gated(
    x: Float[Tensor, "items coefficients channels"], gates: Float[Tensor, "items gates"], lmax: int, mmax: int | None
) -> Float[Tensor, "items coefficients channels"]:
    """SiLU of degree 0; every other degree and channel times the sigmoid of its own gate.

    Args:
        x: features.
        gates: lmax times as many as channels, degree by degree.
        lmax: largest degree.
        mmax: largest order where `x` is m-major.
    """
    gate = torch.sigmoid(gates).view(len(x), lmax, x.shape[2])
    return torch.cat((F.silu(x[:, :1]), x[:, 1:] * gate[:, degree_index(lmax, mmax, x.device)[1:] - 1]), 1)
