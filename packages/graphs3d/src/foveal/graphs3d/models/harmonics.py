"""Real spherical harmonics, and the rotation of features into the frame of an edge.

Features of degree 0 to lmax stand l-major, (l, m) at ``l * l + l + m``; the polar axis is y, so degree 1 is (x, y, z), and harmonics are
component-normalised: their squares average to one over the sphere. In the frame of an edge, where the edge is +y, features stand m-major and only
orders up to mmax are kept: m = 0 (l = 0 .. lmax), +1 (l = 1 ..), -1, +2, -2, ...

A rotation about y turns orders m and -m by the angle m. A rotation about x is one about y between two swaps J of the axes x and y, and J is the same
for every edge: a Wigner matrix costs products with one constant matrix. Angles are never formed, only their sines and cosines, from the direction
itself. Edges close to the polar axis, where these have no derivative, are swapped first: nothing that is invariant to a roll about the edge can
tell, so the network is smooth everywhere.
"""

from __future__ import annotations

from functools import cache
from math import factorial, sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Edges whose direction has |y| above this are swapped. Any value from 0 to 1 exclusive gives the same features.
_POLAR = 0.75
#: Where the authors' code takes an edge for parallel to the polar axis.
_SNAPPED = 0.999999


def spherical_harmonics(directions: Float[Tensor, "*points 3"], lmax: int) -> Float[Tensor, "*points coefficients"]:
    """Real harmonics of unit vectors, polynomials in their coordinates.

    Args:
        directions: unit vectors.
        lmax: largest degree.

    Returns:
        Coefficients, l-major, component-normalised: degree l has squared length 2 l + 1.
    """
    x, y, z = directions.unbind(-1)
    # Re and Im of (z + i x)^m.
    cosines, sines = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(lmax):
        cosines, sines = [*cosines, cosines[-1] * z - sines[-1] * x], [*sines, cosines[-1] * x + sines[-1] * z]
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(lmax + 1):
        legendre[m, m] = torch.full_like(y, _double_factorial(2 * m - 1))
        for degree in range(m + 1, lmax + 1):
            before = (degree + m - 1) * legendre[degree - 2, m] if degree > m + 1 else 0.0
            legendre[degree, m] = ((2 * degree - 1) * y * legendre[degree - 1, m] - before) / (degree - m)
    rows = []
    for degree in range(lmax + 1):
        for m in range(-degree, degree + 1):
            order = abs(m)
            norm = sqrt((2 * degree + 1) * (2 if m else 1) * factorial(degree - order) / factorial(degree + order))
            rows.append(norm * legendre[degree, order] * (sines if m < 0 else cosines)[order])
    return torch.stack(rows, -1)


def _double_factorial(number: int) -> float:
    return float(number * _double_factorial(number - 2)) if number > 1 else 1.0


@cache
def degrees_and_orders(lmax: int, mmax: int | None = None) -> tuple[tuple[int, int], ...]:
    """(l, m) of every coefficient: l-major without `mmax`, m-major up to order `mmax` with it."""
    if mmax is None:
        return tuple((degree, m) for degree in range(lmax + 1) for m in range(-degree, degree + 1))
    signed = [0, *(sign * m for m in range(1, mmax + 1) for sign in (1, -1))]
    return tuple((degree, m) for m in signed for degree in range(abs(m), lmax + 1))


@cache
def m_major(lmax: int, mmax: int, device: torch.device | None = None) -> Tensor:
    """Where each coefficient of the m-major order stands in the l-major one."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor([degree * degree + degree + m for degree, m in degrees_and_orders(lmax, mmax)], device=device)


@cache
def degree_index(lmax: int, mmax: int | None = None, device: torch.device | None = None) -> Tensor:
    """Degree of every coefficient, in the order of `degrees_and_orders`."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor([degree for degree, _ in degrees_and_orders(lmax, mmax)], device=device)


@cache
def truncation_rescale(lmax: int, mmax: int, dtype: torch.dtype, device: torch.device | None = None) -> Float[Tensor, " coefficients"]:
    """sqrt((2 l + 1) / (2 mmax + 1)) for degrees above mmax, else 1: what the orders left out would have added on average, l-major."""
    with torch.inference_mode(False), torch.device("cpu"):
        values = [sqrt((2 * degree + 1) / (2 * mmax + 1)) if degree > mmax else 1.0 for degree, _ in degrees_and_orders(lmax)]
        return torch.tensor(values, dtype=dtype, device=device)


@cache
def axis_swap(lmax: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Float[Tensor, "coefficients coefficients"]:
    """J: how features turn when the axes x and y are swapped and z is turned round (half a turn about x + y); symmetric, its own inverse.

    The integral of Y(J r) Y(r)^T over the sphere, exact by quadrature.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        points, weights = _quadrature(lmax + 1)
        harmonics = spherical_harmonics(points, lmax)
        swapped = spherical_harmonics(swap_axes(points), lmax)
        matrix = (swapped * weights.unsqueeze(1)).T @ harmonics
        degree = degree_index(lmax)
        matrix = torch.where(degree.unsqueeze(0) == degree.unsqueeze(1), matrix, 0.0)
        # Entries that are zero by parity come out at rounding level.
        return torch.where(matrix.abs() > 1e-13, (matrix + matrix.T) / 2, 0.0).to(dtype=dtype, device=device)


def gauss_legendre(order: int) -> tuple[Float[Tensor, " order"], Float[Tensor, " order"]]:
    """Nodes in [-1, 1] and weights (sum 1) that integrate polynomials up to degree 2 order - 1 exactly; float64.

    Golub and Welsch (1969): the nodes are eigenvalues of the recurrence's matrix.
    """
    step = torch.arange(1, order, dtype=torch.float64)
    off = step / torch.sqrt(4 * step * step - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def _quadrature(order: int) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
    """Points and weights (sum 1) that integrate products of two harmonics of degree below `order` exactly: Gauss-Legendre by equal longitudes."""
    nodes, weights = gauss_legendre(order)
    longitudes = torch.arange(2 * order, dtype=torch.float64) * (torch.pi / order)
    sine = torch.sqrt(1 - nodes * nodes).unsqueeze(1)
    points = torch.stack((sine * longitudes.sin(), nodes.unsqueeze(1).expand(-1, 2 * order), sine * longitudes.cos()), -1)
    return points.reshape(-1, 3), (weights / (2 * order)).repeat_interleave(2 * order)


def swap_axes(directions: Float[Tensor, "*points 3"]) -> Float[Tensor, "*points 3"]:
    """The rotation J of vectors: (x, y, z) to (y, x, -z)."""
    x, y, z = directions.unbind(-1)
    return torch.stack((y, x, -z), -1)


@cache
def _signs_and_partners(lmax: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every coefficient, l-major: |m|, minus the sign of m, and where (l, -m) stands."""
    with torch.inference_mode(False), torch.device("cpu"):
        table = degrees_and_orders(lmax)
        order = torch.tensor([abs(m) for _, m in table], device=device)
        sign = torch.tensor([-float((m > 0) - (m < 0)) for _, m in table], dtype=dtype, device=device)
        return order, sign, torch.tensor([degree * degree + degree - m for degree, m in table], device=device)


def edge_frames(directions: Float[Tensor, "edges 3"], lmax: int, mmax: int, snap: bool = False) -> Float[Tensor, "edges kept coefficients"]:
    """Wigner matrices that rotate features into the frame of each edge, where the edge is +y.

    Which way the frame is rolled about the edge is a choice that changes between edges; it must not matter to what is computed there.

    Args:
        directions: unit vectors.
        lmax: largest degree.
        mmax: largest order that is kept.
        snap: take edges within 1.4 mrad of the polar axis for parallel to it, without derivative, as the authors' code does. Energies then jump
            where an edge comes that close, and forces are off by a part in a thousand.

    Returns:
        Rows m-major, columns l-major. The transpose rotates back.
    """
    order, sign, partner = _signs_and_partners(lmax, directions.dtype, directions.device)
    swap = axis_swap(lmax, directions.dtype, directions.device)
    if snap:
        pole = torch.zeros_like(directions)
        pole[:, 1] = directions[:, 1].detach().sign()
        directions = torch.where((directions[:, 1:2].abs() > _SNAPPED), pole, directions)
    polar: Bool[Tensor, "edges 1"] = directions[:, 1:2].abs() > _POLAR
    x, y, z = torch.where(polar, swap_axes(directions), directions).unbind(-1)
    radius = torch.sqrt(x * x + z * z)
    # With the direction at azimuth a and polar angle b: Y -> J X(b)^T J X(a)^T Y, then J once more where the axes were swapped.
    frames = _turn_back(swap[m_major(lmax, mmax, directions.device)].unsqueeze(0), y, radius, order, sign, partner) @ swap
    frames = _turn_back(frames, z / radius, x / radius, order, sign, partner)
    return torch.where(polar.unsqueeze(-1), frames @ swap, frames)


def _turn_back(
    matrix: Float[Tensor, "edges rows coefficients"],
    cosine: Float[Tensor, " edges"],
    sine: Float[Tensor, " edges"],
    order: Tensor,
    sign: Tensor,
    partner: Tensor,
) -> Float[Tensor, "edges rows coefficients"]:
    """Matrix @ X(angle)^T, X the rotation about y."""
    cosines, sines = [torch.ones_like(cosine)], [torch.zeros_like(sine)]
    for _ in range(int(order[-1])):
        cosines, sines = [*cosines, cosines[-1] * cosine - sines[-1] * sine], [*sines, cosines[-1] * sine + sines[-1] * cosine]
    same, crossed = torch.stack(cosines, 1)[:, order], torch.stack(sines, 1)[:, order] * sign
    return matrix * same.unsqueeze(1) + matrix[:, :, partner] * crossed.unsqueeze(1)


def wigner_matrices(rotations: Float[Tensor, "rotations 3 3"], lmax: int) -> Float[Tensor, "rotations coefficients coefficients"]:
    """D(R) of rotation matrices: ``spherical_harmonics(r @ R.T) == spherical_harmonics(r) @ D(R).T``, l-major. For tests of equivariance.

    Args:
        rotations: orthogonal, determinant 1.
        lmax: largest degree.
    """
    points, weights = _quadrature(lmax + 1)
    points, weights = points.to(rotations), weights.to(rotations)
    turned = spherical_harmonics(torch.einsum("pj,rij->rpi", points, rotations), lmax)
    return torch.einsum("rpi,p,pj->rij", turned, weights, spherical_harmonics(points, lmax))
