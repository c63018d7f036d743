"""Features as functions on a grid of points of the sphere, where a product of two is a product of numbers, and back.

Latitudes at (i + 1/2) pi / n with the weights of Driscoll and Healy (1994), longitudes equally spaced. A product of two functions of degree L has
degree 2 L; taking from it degrees up to L is exact from 3 L + 1 latitudes (rounded up to even) and 3 M + 1 longitudes on, M the largest order. With
fewer points equivariance is lost.

The authors' points are these; `product_grid` has fewer, by Gauss and Legendre's latitudes, on which the same products are exact too.
"""

from __future__ import annotations

from functools import cache
from math import pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from foveal.graphs3d.models.harmonics import degrees_and_orders, gauss_legendre, spherical_harmonics


@cache
def sphere_grid(
    lmax: int, mmax: int | None, latitudes: int, longitudes: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> tuple[Float[Tensor, "points coefficients"], Float[Tensor, "coefficients points"]]:
    """Matrices from coefficients to values on the grid, and from values to coefficients.

    Args:
        lmax: largest degree.
        mmax: largest order, coefficients m-major; None: all orders, l-major.
        latitudes: even.
        longitudes: of each latitude.
        dtype: of the matrices; they are made in float64.
        device: of the matrices.

    Raises:
        ValueError: a grid on which a product of two functions is not exact.
    """
    orders = lmax if mmax is None else mmax
    if latitudes % 2 or latitudes < 3 * lmax + 1 or longitudes < 3 * orders + 1:
        needed = 3 * lmax + 1 + (3 * lmax + 1) % 2
        raise ValueError(
            f"expected an even number of at least {needed} latitudes and at least {3 * orders + 1} longitudes for lmax {lmax}, mmax {orders}; "
            f"got {latitudes} by {longitudes}: on a coarser grid equivariance is lost"
        )
    with torch.inference_mode(False), torch.device("cpu"):
        polar = (torch.arange(latitudes, dtype=torch.float64) + 0.5) * (pi / latitudes)
        odd = 2 * torch.arange(latitudes // 2, dtype=torch.float64) + 1
        weights = polar.sin() * (torch.sin(polar.unsqueeze(1) * odd) / odd).sum(1)
        to_grid, from_grid = _matrices(lmax, mmax, polar.cos(), weights / weights.sum(), longitudes)
        return to_grid.to(dtype=dtype, device=device), from_grid.to(dtype=dtype, device=device)


@cache
def product_grid(
    lmax: int, mmax: int | None, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> tuple[Float[Tensor, "points coefficients"], Float[Tensor, "coefficients points"]]:
    """As `sphere_grid`, with the fewest latitudes on which a product of two functions is exact.

    n latitudes of Gauss and Legendre integrate polynomials up to degree 2 n - 1, and a product that is projected has degree 3 lmax. For lmax 4 that
    is 91 points instead of 196, and with mmax 2 it is 49 instead of 112.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        cosines, weights = gauss_legendre((3 * lmax + 2) // 2)
        to_grid, from_grid = _matrices(lmax, mmax, cosines, weights, 3 * (lmax if mmax is None else mmax) + 1)
        return to_grid.to(dtype=dtype, device=device), from_grid.to(dtype=dtype, device=device)


def _matrices(
    lmax: int, mmax: int | None, cosines: Float[Tensor, " latitudes"], weights: Float[Tensor, " latitudes"], longitudes: int
) -> tuple[Float[Tensor, "points coefficients"], Float[Tensor, "coefficients points"]]:
    orders = lmax if mmax is None else mmax
    azimuth = torch.arange(longitudes, dtype=torch.float64) * (2 * pi / longitudes)
    cosine, sine = cosines.unsqueeze(1), torch.sqrt(1 - cosines * cosines).unsqueeze(1)
    points = torch.stack((sine * azimuth.sin(), cosine.expand(-1, longitudes), sine * azimuth.cos()), -1).reshape(-1, 3)
    table = degrees_and_orders(lmax, mmax)
    harmonics = spherical_harmonics(points, lmax)[:, [degree * degree + degree + m for degree, m in table]]
    # Component normalisation: unit coefficients give values of variance 1; degrees that lost orders are raised, both ways.
    norm = torch.tensor([sqrt((2 * degree + 1) * (lmax + 1)) for degree, _ in table], dtype=torch.float64)
    raised = torch.tensor([sqrt((2 * degree + 1) / (2 * orders + 1)) if degree > orders else 1.0 for degree, _ in table], dtype=torch.float64)
    shares = (weights / longitudes).repeat_interleave(longitudes).unsqueeze(1)
    return harmonics * (raised / norm), (harmonics * (raised * norm) * shares).T.contiguous()
