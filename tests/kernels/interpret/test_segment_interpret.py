"""Segment kernels in triton's interpreter: outputs, weights and gradients against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import CSR, segment_attention, segment_reduce, segment_softmax
from foveal.kernels.testing import assert_close_to_definition

#: heads, dim, value_dim: one tile; dims that are no powers of two; more heads than one tile holds; a single head.
SIZES = [(8, 16, 16), (3, 5, 7), (3, 64, 32), (1, 1, 40)]


def graph(name: str) -> tuple[CSR, Tensor]:
    draw = torch.Generator().manual_seed(5)
    edge_index = torch.randint(9, (2, 24), generator=draw)
    if name == "hub":
        edge_index = torch.randint(6, (2, 80), generator=draw)
        edge_index[1, :60] = 2
    if name == "no edges":
        edge_index = edge_index[:, :0]
    return CSR.from_edge_index(edge_index, 12), edge_index


def leaves(edges: CSR, dtype: torch.dtype, sizes: tuple[int, int, int], given: tuple[str, ...], on_edges: bool, wide: bool = False) -> dict[str, Any]:
    """Arguments whose numbers are the same in `dtype` and (`wide`) in float64."""
    heads, dim, value_dim = sizes
    draw = torch.Generator().manual_seed(7)
    rows = edges.num_edges if on_edges else edges.num_sources
    shapes = {"q": (edges.num_nodes, heads, dim), "k": (rows, heads, dim), "v": (rows, heads, value_dim)}
    made: dict[str, Any] = {"q": None, "k": None}
    for name in ("q", "k", "v", "edge_bias", "edge_envelope", "edge_gate"):
        values = torch.randn(*shapes.get(name, (edges.num_edges, heads)), generator=draw)
        values = values.abs() if name in ("edge_envelope", "edge_gate") else values
        if name in given:
            made[name] = values.to(dtype).to(torch.float64 if wide else dtype if name in "qkv" else torch.float32).requires_grad_()
    return made


def results(made: dict[str, Any], edges: CSR, **options: Any) -> dict[str, Tensor]:
    out, weights = segment_attention(edges=edges, **made, return_weights=True, **options)
    draw = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=draw)).sum() + (weights * torch.randn(weights.shape, generator=draw)).sum()
    given = {name: tensor for name, tensor in made.items() if tensor is not None}
    grads = torch.autograd.grad(loss, list(given.values()))
    return {"out": out, "weights": weights, **{f"gradient of {name}": grad for name, grad in zip(given, grads, strict=True)}}


ALL = ("q", "k", "v", "edge_bias", "edge_envelope", "edge_gate")


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "given", "on_edges"),
    [
        *(("random", sizes, torch.float32, ALL, False) for sizes in SIZES),
        ("random", SIZES[1], torch.float32, ALL, True),
        ("hub", SIZES[0], torch.float32, ALL, False),
        ("no edges", SIZES[1], torch.float32, ALL, False),
        ("random", SIZES[1], torch.float32, ("q", "k", "v"), False),
        ("random", SIZES[1], torch.float32, ("v", "edge_bias", "edge_envelope"), True),
        ("random", SIZES[0], torch.float16, ALL, False),
        ("random", SIZES[0], torch.bfloat16, ALL, False),
    ],
)
def test_every_value_and_gradient_equals_the_definition(
    name: str, sizes: tuple[int, int, int], dtype: torch.dtype, given: tuple[str, ...], on_edges: bool
) -> None:
    edges, _ = graph(name)
    options = {"keys_on_edges": on_edges, "values_on_edges": on_edges, "eps": 1e-3}
    ours = results(leaves(edges, dtype, sizes, given, on_edges), edges, backend="triton", **options)
    eager = results(leaves(edges, dtype, sizes, given, on_edges), edges, backend="reference", **options)
    defined = results(leaves(edges, dtype, sizes, given, on_edges, wide=True), edges, backend="reference", **options)
    for key, value in ours.items():
        assert_close_to_definition(value, eager[key], defined[key], factor=2.0 if key in ("out", "weights") else 3.0, name=key)


def test_nodes_whose_edges_are_all_shut_give_zero() -> None:
    edges, _ = graph("random")
    made = leaves(edges, torch.float32, SIZES[1], ("q", "k", "v"), False)
    shut = torch.full((edges.num_edges, 3), -torch.inf)
    out, weights = segment_attention(edges=edges, **made, edge_bias=shut, return_weights=True, backend="triton")
    grads = torch.autograd.grad(out.sum(), list(made.values()))
    assert all((value == 0).all() for value in (out, weights, *grads))


def test_gradients_of_gradients_equal_the_definition() -> None:
    edges, _ = graph("random")

    def trained(backend: str, wide: bool) -> tuple[Tensor, ...]:
        made = leaves(edges, torch.float32, SIZES[1], ALL, False, wide)
        energy = segment_attention(edges=edges, **made, backend=backend).square().sum()
        force = torch.autograd.grad(energy, made["q"], create_graph=True)[0]
        return torch.autograd.grad(force.square().sum(), list(made.values()))

    triples = zip(trained("triton", False), trained("reference", False), trained("reference", True), strict=True)
    for ours, eager, defined in triples:
        assert_close_to_definition(ours, eager, defined, factor=3.0, slack=1e-4)


@pytest.mark.parametrize("shape", [(80,), (80, 3), (80, 150)])
@pytest.mark.parametrize("operator", ["softmax", "sum", "mean", "max", "min"])
def test_softmax_and_reductions_equal_the_definition(operator: str, shape: tuple[int, ...]) -> None:
    _, edge_index = graph("hub")
    src = torch.randn(*shape, generator=torch.Generator().manual_seed(2))

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = src.to(dtype).requires_grad_()
        if operator == "softmax":
            out = segment_softmax(x, edge_index[1], num_nodes=12, backend=backend)
        else:
            out = segment_reduce(x, edge_index[1], reduce=operator, num_nodes=12, backend=backend)
        return out, torch.autograd.grad((out * out.detach().cos()).sum(), x)[0]

    for ours, eager, defined in zip(run("triton", torch.float32), run("reference", torch.float32), run("reference", torch.float64), strict=True):
        assert_close_to_definition(ours, eager, defined)


def test_a_nan_wins_a_maximum() -> None:
    src = torch.tensor([1.0, torch.nan, 3.0])
    reduced = segment_reduce(src, ptr=torch.tensor([0, 3]), reduce="max", backend="triton")
    assert reduced.isnan().all()
