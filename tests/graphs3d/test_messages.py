"""Features into the frames of edges and messages out of them: what is written, its gradients of both orders, and that nothing is left frozen."""

from __future__ import annotations

import pytest
import torch

from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from foveal.graphs3d.models.messages import into_frames, sum_out_of_frames

#: Five atoms, one of which nobody sends to.
TARGET = torch.tensor([0, 0, 1, 3, 3, 3, 4])
SOURCE = torch.tensor([1, 2, 0, 0, 1, 4, 3])
INDPTR = torch.tensor([0, 2, 3, 3, 6, 7])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_both_atoms_of_an_edge_are_turned_sender_first():
    frames, x = drawn(7, 3, 4), drawn(5, 4, 2)
    expected = torch.einsum("ekc,ecd->ekd", frames, torch.cat((x[SOURCE], x[TARGET]), 2))
    assert torch.allclose(into_frames(frames, x, SOURCE, TARGET, INDPTR), expected)


def test_messages_are_weighted_head_by_head_turned_back_and_summed():
    frames, messages, shares = drawn(7, 3, 4), drawn(7, 3, 6), drawn(7, 2)
    weighted = torch.einsum("ekhv,eh->ekhv", messages.unflatten(2, (2, 3)), shares).flatten(2)
    expected = torch.zeros(5, 4, 6, dtype=torch.float64).index_add(0, TARGET, torch.einsum("ekc,ekd->ecd", frames, weighted))
    assert torch.allclose(sum_out_of_frames(frames, messages, shares, TARGET, INDPTR), expected)
    assert (expected[2] == 0).all()


def test_gradients_of_both_orders_are_right():
    def turned(frames, x):
        return into_frames(frames, x, SOURCE, TARGET, INDPTR)

    def summed(frames, messages, shares):
        return sum_out_of_frames(frames, messages, shares, TARGET, INDPTR)

    for call, inputs in ((turned, (drawn(7, 2, 3), drawn(5, 3, 2))), (summed, (drawn(7, 2, 3), drawn(7, 2, 2), drawn(7, 2)))):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_parameters_that_were_learned_still_are_after_an_evaluation_without_gradients():
    config = EquiformerV3Config(
        stress=False, layers=1, channels=4, lmax=1, mmax=1, attention_hidden=2, heads=1, alpha_channels=2, value_channels=2, ffn_hidden=4,
        edge_channels=4, radial=4, attention_grid=(4, 4), ffn_grid=(4, 4),
    )  # fmt: skip
    model = EquiformerV3(config)
    model.embedding.weight.requires_grad_(False)
    graph = (torch.tensor([6, 8]), torch.tensor([[0.0, 0, 0], [0, 0, 1.1]]), torch.zeros(1, 3, 3))
    edges = (torch.tensor([[1, 0], [0, 1]]), torch.zeros(2, 3, dtype=torch.long))
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        plain = model(*graph, *edges)
        with pytest.raises(ValueError, match="apart"):
            model(graph[0], torch.zeros(2, 3), graph[2], *edges)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    kept = model(*graph, *edges)
    kept.forces.square().sum().backward()
    assert torch.allclose(kept.forces, plain.forces)
    assert model.blocks[0].attention.mix.zero.weight.grad is not None
