"""Spherical harmonics, frames of edges and grids of the sphere, against the authors' tables and by their meaning."""

from __future__ import annotations

import pytest
import torch

from foveal.graphs3d.models.harmonics import (
    axis_swap,
    degree_index,
    degrees_and_orders,
    edge_frames,
    m_major,
    spherical_harmonics,
    swap_axes,
    truncation_rescale,
    wigner_matrices,
)
from foveal.graphs3d.models.sphere import product_grid, sphere_grid

GRIDS = [("l4_m2_14x8", 4, 2, 14, 8), ("l6_m2_20x8", 6, 2, 20, 8), ("l4_m4_14x14", 4, None, 14, 14), ("l2_m2_8x8", 2, None, 8, 8)]


def directions(count: int) -> torch.Tensor:
    vectors = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return vectors / vectors.norm(dim=1, keepdim=True)


def rotations(count: int) -> torch.Tensor:
    matrices, _ = torch.linalg.qr(torch.randn(count, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    return matrices * torch.linalg.det(matrices).view(-1, 1, 1)


@pytest.mark.parametrize(("name", "lmax", "mmax", "latitudes", "longitudes"), GRIDS)
def test_grid_matrices_are_those_of_the_published_settings(golden, name, lmax, mmax, latitudes, longitudes):
    reference = golden("constants")
    to_grid, from_grid = sphere_grid(lmax, mmax, latitudes, longitudes)
    assert reference.error(f"out64_to_grid_{name}", to_grid) < 1e-12
    assert reference.error(f"out64_from_grid_{name}", from_grid) < 1e-12


@pytest.mark.parametrize(("name", "lmax", "mmax"), [("l4_m2_14x8", 4, 2), ("l6_m2_20x8", 6, 2)])
def test_orders_stand_where_the_authors_put_them(golden, name, lmax, mmax):
    reference = golden("constants")
    order = torch.nn.functional.one_hot(m_major(lmax, mmax), (lmax + 1) ** 2)
    assert reference.error(f"out64_order_{name}", order) == 0
    rescale = truncation_rescale(lmax, mmax, torch.float64)
    kept = torch.from_numpy(reference[f"out64_inverse_rescale_{name}"])[0] * order.T
    assert torch.allclose(order.T * rescale.unsqueeze(1), kept, atol=1e-14)


def test_grid_too_coarse_for_a_product_is_refused():
    with pytest.raises(ValueError, match="at least 14 latitudes and at least 7 longitudes"):
        sphere_grid(4, 2, 14, 6)
    with pytest.raises(ValueError, match="at least 14 latitudes"):
        sphere_grid(4, None, 12, 14)


@pytest.mark.parametrize(("lmax", "mmax", "latitudes", "longitudes", "points"), [(2, 2, 8, 8, 28), (4, 2, 14, 8, 49), (4, None, 14, 14, 91)])
def test_products_on_fewer_points_are_those_on_the_authors_grid(lmax, mmax, latitudes, longitudes, points):
    def product(to_grid, from_grid):
        return from_grid @ ((to_grid @ first) * (to_grid @ second))

    (fewer, back), authors = product_grid(lmax, mmax), sphere_grid(lmax, mmax, latitudes, longitudes)
    first, second = torch.randn(2, fewer.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert len(fewer) == points
    assert torch.allclose(product(fewer, back), product(*authors), rtol=0, atol=1e-12)


def test_values_on_the_grid_go_back_to_their_coefficients():
    to_grid, from_grid = sphere_grid(5, None, 16, 16)
    assert torch.allclose(from_grid @ to_grid, torch.eye(36, dtype=torch.float64), atol=1e-13)


def test_harmonics_are_the_authors(golden):
    reference = golden("parts")
    vectors = reference.tensor("in_vectors")
    assert reference.error("out64_spherical_harmonics", spherical_harmonics(vectors / vectors.norm(dim=1, keepdim=True), 3)) < 1e-12


def test_swapping_axes_turns_harmonics_by_the_constant_matrix():
    points = directions(50)
    swap = axis_swap(8)
    assert torch.allclose(spherical_harmonics(swap_axes(points), 8), spherical_harmonics(points, 8) @ swap.T, atol=1e-12)
    assert torch.allclose(swap @ swap, torch.eye(81, dtype=torch.float64), atol=1e-13)


def test_wigner_matrices_are_the_authors_and_turn_harmonics(golden):
    reference = golden("parts")
    given = reference.tensor("in_rotations")
    matrices = wigner_matrices(given, 3)[:, m_major(3, 2)]
    assert reference.error("out64_wigner", matrices) < 1e-10
    assert reference.error("out64_wigner_inverse", matrices.transpose(1, 2) * truncation_rescale(3, 2, torch.float64).view(1, -1, 1)) < 1e-10
    turn, points = rotations(1), directions(20)
    expected = spherical_harmonics(points, 6) @ wigner_matrices(turn, 6)[0].T
    assert torch.allclose(spherical_harmonics(points @ turn[0].T, 6), expected, atol=1e-12)


POLES = torch.tensor([[0.0, 1, 0], [0, -1, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 1], [0, 0, -1], [1e-9, 1, 0], [1e-5, -1, 1e-5]], dtype=torch.float64)


@pytest.mark.parametrize("snap", [False, True])
def test_frame_is_a_rotation_that_takes_the_edge_to_plus_y(snap):
    edges = torch.cat((directions(40), POLES / POLES.norm(dim=1, keepdim=True)))
    frames = edge_frames(edges, 5, 5, snap)
    assert torch.allclose(frames @ frames.transpose(1, 2), torch.eye(36, dtype=torch.float64).expand_as(frames), atol=1e-12)
    turned = torch.einsum("eij,ej->ei", frames, spherical_harmonics(edges, 5))
    along = torch.tensor([(2 * degree + 1) ** 0.5 if m == 0 else 0.0 for degree, m in degrees_and_orders(5, 5)], dtype=torch.float64)
    # A snapped edge is up to 1.4 mrad off.
    assert torch.allclose(turned, along.expand_as(turned), atol=1e-3 if snap else 1e-12)


def test_frames_have_finite_first_and_second_derivatives_everywhere():
    edges = (POLES / POLES.norm(dim=1, keepdim=True)).requires_grad_()
    probe = torch.randn(len(POLES), 19, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (first,) = torch.autograd.grad((edge_frames(edges, 4, 2) * probe).sum(), edges, create_graph=True)
    (second,) = torch.autograd.grad((first * first).sum(), edges)
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_snapped_edges_are_not_differentiated():
    edges = (POLES / POLES.norm(dim=1, keepdim=True)).requires_grad_()
    (slope,) = torch.autograd.grad(edge_frames(edges, 4, 2, snap=True).sum(), edges)
    assert (slope[[0, 1, 6, 7]] == 0).all()
    assert (slope[2:6] != 0).any(1).all()


def test_tables_that_were_first_asked_for_while_a_model_was_built_without_memory_hold_numbers() -> None:
    degree_index.cache_clear()
    sphere_grid.cache_clear()
    with torch.device("meta"):
        degree_index(3)
        sphere_grid(2, None, 8, 8)
    assert degree_index(3).device.type == "cpu"
    assert {matrix.device.type for matrix in sphere_grid(2, None, 8, 8)} == {"cpu"}
