"""Segment kernels on a GPU: the same numbers as the definition, the same bits in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import CSR, segment_attention, segment_reduce, segment_softmax
from foveal.kernels.dispatch import has_triton
from foveal.kernels.testing import assert_close_to_definition

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available() or not has_triton(), reason="needs a GPU and triton")]

NODES, EDGES = 3000, 60000


def edge_index() -> Tensor:
    drawn = torch.randint(NODES - 5, (2, EDGES), generator=torch.Generator().manual_seed(1))
    drawn[1, :9000] = 17
    return drawn.cuda()


def leaves(dtype: torch.dtype, sizes: tuple[int, int, int], on_edges: bool, wide: bool = False) -> dict[str, Tensor]:
    heads, dim, value_dim = sizes
    draw = torch.Generator().manual_seed(7)
    rows = EDGES if on_edges else NODES
    shapes = {"q": (NODES, heads, dim), "k": (rows, heads, dim), "v": (rows, heads, value_dim)}
    made = {}
    for name in ("q", "k", "v", "edge_bias", "edge_envelope", "edge_gate"):
        values = torch.randn(*shapes.get(name, (EDGES, heads)), generator=draw)
        values = values.abs() if name in ("edge_envelope", "edge_gate") else values
        target = torch.float64 if wide else dtype if name in "qkv" else torch.float32
        made[name] = values.to(dtype).to(device="cuda", dtype=target).requires_grad_()
    return made


def results(made: dict[str, Tensor], edges: CSR, **options: Any) -> dict[str, Tensor]:
    out, weights = segment_attention(edges=edges, **made, return_weights=True, **options)
    draw = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=draw).cuda()).sum() + (weights * torch.randn(weights.shape, generator=draw).cuda()).sum()
    grads = torch.autograd.grad(loss, list(made.values()))
    return {"out": out, "weights": weights, **{f"gradient of {name}": grad for name, grad in zip(made, grads, strict=True)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(8, 16, 16), (3, 5, 7), (5, 64, 32), (8, 4, 464)])
@pytest.mark.parametrize("on_edges", [False, True], ids=["nodes", "edges"])
def test_every_value_and_gradient_equals_the_definition(dtype: torch.dtype, sizes: tuple[int, int, int], on_edges: bool) -> None:
    edges = CSR.from_edge_index(edge_index(), NODES)
    options = {"keys_on_edges": on_edges, "values_on_edges": on_edges}
    ours = results(leaves(dtype, sizes, on_edges), edges, backend="triton", **options)
    eager = results(leaves(dtype, sizes, on_edges), edges, backend="reference", **options)
    defined = results(leaves(dtype, sizes, on_edges, wide=True), edges, backend="reference", **options)
    for key, value in ours.items():
        assert_close_to_definition(value, eager[key], defined[key], factor=2.0 if key in ("out", "weights") else 3.0, name=key)


def test_two_runs_give_the_same_bits() -> None:
    edges = CSR.from_edge_index(edge_index(), NODES)
    made = leaves(torch.float32, (8, 16, 16), False)
    first, second = results(made, edges), results(made, edges)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("operator", ["softmax", "sum", "mean", "max", "min"])
def test_softmax_and_reductions_equal_the_definition(operator: str) -> None:
    index = edge_index()[1]
    src = torch.randn(EDGES, 8, generator=torch.Generator().manual_seed(2)).cuda()

    def run(backend: str, dtype: torch.dtype) -> Tensor:
        if operator == "softmax":
            return segment_softmax(src.to(dtype), index, num_nodes=NODES, backend=backend)
        return segment_reduce(src.to(dtype), index, reduce=operator, num_nodes=NODES, backend=backend)

    assert_close_to_definition(run("triton", torch.float32), run("reference", torch.float32), run("reference", torch.float64))


def test_gradients_of_gradients_equal_the_definition() -> None:
    edges = CSR.from_edge_index(edge_index(), NODES)

    def trained(backend: str, wide: bool) -> tuple[Tensor, ...]:
        made = leaves(torch.float32, (8, 16, 16), False, wide)
        energy = segment_attention(edges=edges, **made, backend=backend).square().sum()
        force = torch.autograd.grad(energy, made["q"], create_graph=True)[0]
        return torch.autograd.grad(force.square().sum(), list(made.values()))

    for ours, eager, defined in zip(trained("triton", False), trained("reference", False), trained("reference", True), strict=True):
        assert_close_to_definition(ours, eager, defined, factor=3.0, slack=1e-4)


def test_a_model_around_it_compiles_whole() -> None:
    edges = CSR.from_edge_index(edge_index(), NODES)
    made = leaves(torch.float32, (8, 16, 16), False)
    compiled = torch.compile(lambda **given: segment_attention(edges=edges, **given).square().sum(), fullgraph=True)
    plain = torch.autograd.grad(segment_attention(edges=edges, **made).square().sum(), list(made.values()))
    for ours, expected in zip(torch.autograd.grad(compiled(**made), list(made.values())), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
