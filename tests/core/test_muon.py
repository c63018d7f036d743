"""Muon: singular values near one, directions kept, and parameters that are no matrices treated as Adam treats them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveal.core.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 8), (16, 6), (6, 16)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]):
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    size = min(shape)
    matrix = u @ torch.diag(torch.logspace(0, -1.5, size, dtype=torch.float64)) @ vh
    inside = u.T @ orthogonalised(matrix) @ vh.T
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-9


def test_other_parameters_move_as_under_adam():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    muon, adam = Muon([], [ours], learning_rate=0.1), torch.optim.Adam([theirs], lr=0.1)
    for step in range(5):
        gradient = torch.randn(5) * 10.0 ** (step - 2)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(ours, theirs)


def test_a_step_is_as_long_as_the_rate_says_whatever_the_gradient():
    for scale in (1e-6, 1.0, 1e6):
        torch.manual_seed(0)
        matrix = nn.Parameter(torch.zeros(6, 6))
        matrix.grad = scale * torch.randn(6, 6)
        Muon([matrix], [], matrix_learning_rate=0.02).step()
        assert torch.linalg.matrix_norm(matrix.detach(), 2) == pytest.approx(0.02, rel=0.3)


def test_a_resumed_optimizer_goes_on_as_the_uninterrupted_one():
    def steps(count: int, start: int, matrix: nn.Parameter, vector: nn.Parameter, optimizer: Muon) -> None:
        for step in range(start, start + count):
            generator = torch.Generator().manual_seed(step)
            matrix.grad, vector.grad = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
            optimizer.step()

    def fresh() -> tuple[nn.Parameter, nn.Parameter, Muon]:
        matrix, vector = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(3))
        return matrix, vector, Muon([matrix], [vector])

    whole = fresh()
    steps(6, 0, *whole)
    first = fresh()
    steps(3, 0, *first)
    second = fresh()
    second[0].data.copy_(first[0].data)
    second[1].data.copy_(first[1].data)
    second[2].load_state_dict(first[2].state_dict())
    steps(3, 3, *second)
    assert torch.equal(whole[0], second[0])
    assert torch.equal(whole[1], second[1])


def test_a_convolutions_kernel_is_turned_as_the_matrix_of_outputs_and_all_else():
    torch.manual_seed(0)
    kernel, matrix = nn.Parameter(torch.zeros(6, 4, 3, 3)), nn.Parameter(torch.zeros(6, 36))
    kernel.grad = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    matrix.grad = kernel.grad.reshape(6, 36)
    Muon([matrix], [], kernels=[kernel]).step()
    torch.testing.assert_close(kernel.reshape(6, 36), matrix)


def test_a_stack_moves_as_its_matrices_would_and_those_of_one_shape_as_if_alone():
    torch.manual_seed(0)
    stack, alone = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(6, 4))
    single = [nn.Parameter(matrix.detach().clone()) for matrix in (*stack, alone)]
    options = {"matrix_learning_rate": 0.05, "weight_decay": 0.1}
    together, apart = Muon([stack, alone], [], **options), [Muon([matrix], [], **options) for matrix in single]
    for _ in range(3):
        stack.grad, alone.grad = torch.randn(3, 6, 4), torch.randn(6, 4)
        together.step()
        for matrix, optimizer, gradient in zip(single, apart, (*stack.grad, alone.grad), strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(torch.cat((stack, alone.unsqueeze(0))), torch.stack(single))


def test_decay_shrinks_matrices_by_its_share_of_the_rate():
    matrix = nn.Parameter(torch.ones(4, 4))
    matrix.grad = torch.zeros(4, 4)
    Muon([matrix], [], matrix_learning_rate=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 4), 0.95))
