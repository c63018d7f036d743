"""Muon: singular values near one, directions kept, and parameters that are no matrices treated as Adam treats them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.audio.tasks.separation import SeparationTask
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


def test_every_parameter_of_the_network_is_trained_once():
    task = SeparationTask(TIGER(TIGERConfig(channels=8, hidden_channels=8, blocks=1, heads=2)), matrix_learning_rate=0.01)
    optimizer = task._optimizer()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(trained) == len(set(trained)) == len(list(task.parameters()))
    matrices, _ = optimizer.param_groups
    assert {id(one) for one in matrices["params"]} == {id(module.weight) for module in task.modules() if isinstance(module, nn.Linear)}


def test_a_convolutions_kernel_is_turned_as_the_matrix_of_outputs_and_all_else():
    torch.manual_seed(0)
    kernel, matrix = nn.Parameter(torch.zeros(6, 4, 3, 3)), nn.Parameter(torch.zeros(6, 36))
    kernel.grad = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    matrix.grad = kernel.grad.reshape(6, 36)
    Muon([matrix], [], kernels=[kernel]).step()
    torch.testing.assert_close(kernel.reshape(6, 36), matrix)
