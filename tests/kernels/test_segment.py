"""Graph attention and reductions over edges: every value and gradient against the definition, on graphs that break row walks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from foveal.kernels import CSR, explain, native, segment_attention, segment_reduce, segment_softmax
from foveal.kernels.segment import cpu, op
from foveal.kernels.testing import assert_close_to_definition

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="no compiled C kernels: the definition serves alone")

Arguments = dict[str, Tensor]


def graphs() -> Iterator[Any]:
    """Edge index, targets, sources."""
    draw = torch.Generator().manual_seed(3)

    def edges(targets: int, sources: int, count: int) -> Tensor:
        return torch.stack((torch.randint(sources, (count,), generator=draw), torch.randint(targets, (count,), generator=draw)))

    yield pytest.param(edges(20, 20, 150), 20, 20, id="random")
    yield pytest.param(edges(20, 20, 0), 20, 20, id="no edges")
    yield pytest.param(edges(1, 1, 0), 0, 0, id="no nodes")
    yield pytest.param(edges(5, 7, 40), 30, 9, id="bipartite with isolated nodes")
    yield pytest.param(torch.arange(9).expand(2, -1), 9, 9, id="self loops only")
    yield pytest.param(edges(3, 3, 6).repeat(1, 5), 3, 3, id="multi-edges")
    hub = edges(40, 40, 300)
    hub[1, :250] = 7
    yield pytest.param(hub, 40, 40, id="one node of degree 250")


def arguments(
    edges: int, targets: int, sources: int, *, heads: int = 3, dim: int = 5, value_dim: int = 4, on_edges: bool = False, seed: int = 0
) -> Arguments:
    """Float64 leaves; a third of the edges have envelope 0, so have all edges of some nodes."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    rows = edges if on_edges else sources
    made = {"q": normal(targets, heads, dim), "k": normal(rows, heads, dim), "v": normal(rows, heads, value_dim)}
    made["edge_bias"] = normal(edges, heads)
    made["edge_envelope"] = (torch.rand(edges, generator=draw, dtype=torch.float64) * 1.5 - 0.5).clamp(min=0)
    made["edge_gate"] = torch.rand(edges, heads, generator=draw, dtype=torch.float64)
    return made


def leaves(made: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: tensor.to(dtype if name in "qkv" else torch.promote_types(dtype, torch.float32)).requires_grad_() for name, tensor in made.items()}


def results(made: Arguments, edges: Any, **options: Any) -> dict[str, Tensor]:
    """Output, weights and every gradient of a sum weighted by fixed random numbers."""
    out, weights = segment_attention(edges=edges, **made, return_weights=True, **options)
    draw = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=draw)).sum() + (weights * torch.randn(weights.shape, generator=draw)).sum()
    grads = torch.autograd.grad(loss, list(made.values()))
    return {"out": out, "weights": weights, **{f"gradient of {name}": grad for name, grad in zip(made, grads, strict=True)}}


@pytest.mark.parametrize("on_edges", [False, True], ids=["keys and values on nodes", "on edges"])
@pytest.mark.parametrize(("edge_index", "targets", "sources"), list(graphs()))
def test_every_value_and_gradient_equals_the_definition(edge_index: Tensor, targets: int, sources: int, on_edges: bool) -> None:
    made = leaves(arguments(edge_index.shape[1], targets, sources, on_edges=on_edges), torch.float64)
    edges = CSR.from_edge_index(edge_index, targets, sources)
    options = {"keys_on_edges": on_edges, "values_on_edges": on_edges, "eps": 1e-3}
    ours, defined = (results(made, edges, backend=backend, **options) for backend in ("cpu", "reference"))
    for name, value in ours.items():
        torch.testing.assert_close(value, defined[name], rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(8, 16, 16), (1, 33, 7), (4, 64, 64)])
def test_lower_precision_errs_no_more_than_eager_torch_does(dtype: torch.dtype, heads: int, dim: int, value_dim: int) -> None:
    edge_index = torch.randint(60, (2, 700), generator=torch.Generator().manual_seed(1))
    made = {name: tensor.to(dtype).double() for name, tensor in arguments(700, 60, 60, heads=heads, dim=dim, value_dim=value_dim).items()}
    edges = CSR.from_edge_index(edge_index, 60)
    ours = results(leaves(made, dtype), edges, backend="cpu")
    eager = results(leaves(made, dtype), edges, backend="reference")
    defined = results(leaves(made, torch.float64), edges, backend="reference")
    for name, value in ours.items():
        assert_close_to_definition(value, eager[name], defined[name], factor=2.0 if name in ("out", "weights") else 3.0, name=name)


@pytest.mark.parametrize("given", [("q", "k", "v"), ("v", "edge_bias"), ("q", "k", "v", "edge_gate"), ("v", "edge_bias", "edge_envelope")])
def test_absent_arguments_mean_what_the_formula_without_them_says(given: tuple[str, ...]) -> None:
    edge_index = torch.randint(20, (2, 90), generator=torch.Generator().manual_seed(1))
    made = {name: tensor for name, tensor in leaves(arguments(90, 20, 20), torch.float64).items() if name in given}
    both = {"q": None, "k": None} if "q" not in given else {}
    ours, defined = (results(made, edge_index, num_nodes=20, backend=backend, **both) for backend in ("cpu", "reference"))
    for name, value in ours.items():
        torch.testing.assert_close(value, defined[name], rtol=1e-10, atol=1e-12)


def small(seed: int = 0, on_edges: bool = False) -> tuple[CSR, tuple[Tensor, ...]]:
    """Six nodes, one isolated, one multi-edge; float64 leaves in the order of `call`."""
    edge_index = torch.tensor([[0, 1, 2, 3, 3, 4, 2, 2], [1, 1, 1, 0, 2, 2, 4, 4]])
    made = arguments(8, 6, 6, heads=2, dim=3, value_dim=2, on_edges=on_edges, seed=seed)
    made["edge_envelope"] = made["edge_envelope"] + 0.1
    return CSR.from_edge_index(edge_index, 6), tuple(tensor.requires_grad_() for tensor in made.values())


def call(edges: CSR, backend: str = "cpu", **options: Any) -> Callable[..., Any]:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, envelope: Tensor, gate: Tensor) -> Any:
        return segment_attention(q, k, v, edges, edge_bias=bias, edge_envelope=envelope, edge_gate=gate, backend=backend, **options)

    return attend


@pytest.mark.parametrize("on_edges", [False, True], ids=["nodes", "edges"])
def test_gradients_and_their_gradients_are_those_of_the_function(on_edges: bool) -> None:
    edges, inputs = small(on_edges=on_edges)
    attend = call(edges, return_weights=True, keys_on_edges=on_edges, values_on_edges=on_edges)
    assert gradcheck(attend, inputs)
    assert gradgradcheck(attend, inputs)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_gradients_of_a_reduction_and_their_gradients_are_those_of_the_function(reduce: str) -> None:
    index = torch.tensor([0, 3, 3, 1, 0, 3])
    src = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: segment_reduce(x, index, reduce=reduce, num_nodes=5), (src,))
    assert gradgradcheck(lambda x: segment_reduce(x, index, reduce=reduce, num_nodes=5), (src,))


def test_gradients_of_a_softmax_and_their_gradients_are_those_of_the_function() -> None:
    index = torch.tensor([0, 3, 3, 1, 0, 3])
    src = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: segment_softmax(x, index, num_nodes=5), (src,))
    assert gradgradcheck(lambda x: segment_softmax(x, index, num_nodes=5), (src,))


def test_a_force_through_the_gradient_trains_the_same_as_with_the_definition() -> None:
    edges, inputs = small()

    def trained(backend: str) -> tuple[Tensor, ...]:
        energy = call(edges, backend)(*inputs).square().sum()
        force = torch.autograd.grad(energy, inputs[0], create_graph=True)[0]
        return torch.autograd.grad(force.square().sum(), inputs)

    for ours, defined in zip(trained("cpu"), trained("reference"), strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(200,), (200, 4), (200, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_softmax_and_reductions_equal_the_definition_for_any_trailing_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    src = torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    index = torch.randint(30, (200,), generator=draw)
    tight = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(segment_softmax(src, index, num_nodes=33), segment_softmax(src, index, num_nodes=33, backend="reference"), **tight)
    for how in ("sum", "mean", "max", "min"):
        ours = segment_reduce(src, index, reduce=how, num_nodes=33)
        torch.testing.assert_close(ours, segment_reduce(src, index, reduce=how, num_nodes=33, backend="reference"), **tight)


def test_ptr_and_index_of_sorted_edges_mean_the_same() -> None:
    ptr, index = torch.tensor([0, 2, 2, 6]), torch.tensor([0, 0, 2, 2, 2, 2])
    src = torch.randn(6, 3)
    torch.testing.assert_close(segment_softmax(src, ptr=ptr), segment_softmax(src, index))
    torch.testing.assert_close(segment_reduce(src, ptr=ptr, reduce="max"), segment_reduce(src, index, reduce="max"))


def test_the_gradient_of_a_maximum_is_shared_by_ties() -> None:
    src = torch.tensor([2.0, 2.0, 1.0], requires_grad=True)
    segment_reduce(src, torch.zeros(3, dtype=torch.long), reduce="max").sum().backward()
    assert src.grad is not None
    assert src.grad.tolist() == [0.5, 0.5, 0.0]


@settings(max_examples=25, deadline=None)
@given(nodes=st.integers(1, 12), count=st.integers(0, 40), seed=st.integers(0, 2**16))
def test_relabelling_nodes_only_relabels_the_output_and_reordering_edges_only_reorders_the_weights(nodes: int, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(nodes, (2, count), generator=draw)
    made = arguments(count, nodes, nodes, seed=seed)
    relabel, reorder = torch.randperm(nodes, generator=draw), torch.randperm(count, generator=draw)
    moved = {
        name: tensor[reorder] if name.startswith("edge") else torch.empty_like(tensor).index_copy(0, relabel, tensor) for name, tensor in made.items()
    }
    out, weights = segment_attention(edges=edge_index, **made, return_weights=True)
    moved_out, moved_weights = segment_attention(edges=relabel[edge_index[:, reorder]], **moved, return_weights=True)
    torch.testing.assert_close(moved_out[relabel], out, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moved_weights, weights[reorder], rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(nodes=st.integers(1, 9), count=st.integers(0, 30), seed=st.integers(0, 2**16))
def test_a_csr_gives_back_its_edge_index_and_so_does_its_transpose(nodes: int, count: int, seed: int) -> None:
    edge_index = torch.randint(nodes, (2, count), generator=torch.Generator().manual_seed(seed))
    edges = CSR.from_edge_index(edge_index, nodes)
    assert torch.equal(edges.edge_index(), edge_index)
    assert torch.equal(edges.transposed.edge_index(), edge_index.flip(0))
    assert edges.transposed is edges.transposed


def test_weights_of_a_node_sum_to_one_without_a_gate() -> None:
    edge_index = torch.randint(10, (2, 60), generator=torch.Generator().manual_seed(1))
    made = arguments(60, 10, 10)
    _, weights = segment_attention(made["q"], made["k"], made["v"], edge_index, return_weights=True)
    reached = segment_reduce(weights, edge_index[1], num_nodes=10)
    torch.testing.assert_close(reached, torch.bincount(edge_index[1], minlength=10).clamp(max=1).double().unsqueeze(1).expand(-1, 3))


def test_an_edge_with_envelope_zero_is_as_if_it_were_not_there() -> None:
    edge_index = torch.randint(10, (2, 60), generator=torch.Generator().manual_seed(1))
    made = arguments(60, 10, 10)
    there = made["edge_envelope"] > 0
    kept = {name: tensor[there] if name.startswith("edge") else tensor for name, tensor in made.items()}
    torch.testing.assert_close(segment_attention(edges=edge_index, **made), segment_attention(edges=edge_index[:, there], **kept))


def test_a_node_whose_edges_are_all_shut_gives_zero_and_gradient_zero() -> None:
    edges, inputs = small()
    q, k, v, bias, _, gate = inputs
    shut = torch.full_like(bias, -torch.inf).requires_grad_()
    out = segment_attention(q, k, v, edges, edge_bias=shut, edge_gate=gate)
    grads = torch.autograd.grad(out.sum(), (q, k, v, shut, gate))
    assert all((value == 0).all() for value in (out, *grads))


def test_logits_of_some_hundreds_overflow_nothing() -> None:
    edges, inputs = small()
    q, k, v = (tensor.detach().float() for tensor in inputs[:3])
    out = segment_attention(100 * q, 100 * k, v, edges, scale=1.0)
    defined = segment_attention(100 * q.double(), 100 * k.double(), v.double(), edges, scale=1.0, backend="reference")
    torch.testing.assert_close(out.double(), defined, rtol=1e-3, atol=1e-3)


def test_a_nan_value_reaches_the_output_of_its_neighbours_only() -> None:
    edges, inputs = small()
    q, k, v = (tensor.detach().clone() for tensor in inputs[:3])
    k[4] = torch.nan
    assert segment_attention(q, k, v, edges).isnan().any(-1).any(-1).tolist() == [False, False, True, False, False, False]


def test_a_smooth_cutoff_lets_the_last_neighbour_fade() -> None:
    edges = torch.tensor([[1], [0]])
    v = torch.ones(2, 1, 1, dtype=torch.float64)
    for u in (1.0, 0.1, 1e-6):
        fade = torch.tensor([u], dtype=torch.float64)
        out = segment_attention(None, None, v, edges, edge_bias=torch.zeros(1, dtype=torch.float64), edge_envelope=fade, edge_gate=fade)
        torch.testing.assert_close(out[0, 0, 0].item(), u)


def test_two_runs_give_the_same_bits_on_any_number_of_threads() -> None:
    edge_index = torch.randint(500, (2, 20000), generator=torch.Generator().manual_seed(1))
    made = leaves(arguments(20000, 500, 500, heads=4, dim=16, value_dim=16), torch.float32)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            runs.append(results(made, CSR.from_edge_index(edge_index, 500)))
    finally:
        torch.set_num_threads(before)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
        assert torch.equal(value, runs[2][name]), name


def test_the_operators_obey_torchs_rules_for_custom_operators() -> None:
    edges, inputs = small()
    rows, turned = op._rows_of(edges), op._rows_of(edges.transposed)
    q, k, v, bias, envelope, gate = inputs
    envelope = envelope.detach().unsqueeze(1).expand(-1, 2).contiguous().requires_grad_()
    arguments_ = (q, k, v, bias, envelope, gate, *rows, *turned, 0.5, 0.0, False, False, True, "cpu")
    torch.library.opcheck(torch.ops.foveal.segment_attention_forward.default, arguments_)
    results_ = [tensor.detach() for tensor in torch.ops.foveal.segment_attention_forward(*arguments_)]
    plain = [tensor.detach() for tensor in (q, k, v, bias, envelope, gate)]
    flow = torch.randn_like(results_[0])
    torch.library.opcheck(
        torch.ops.foveal.segment_attention_backward.default,
        (flow, None, *plain, *results_, *rows, *turned, 0.5, 0.0, False, False, [True, True, True, True, False, True], "cpu"),
    )
    torch.library.opcheck(torch.ops.foveal.segment_edge_dot.default, (q, k, *rows, *turned, "cpu"))
    torch.library.opcheck(torch.ops.foveal.segment_weighted_sum.default, (bias, v, *rows, *turned, "cpu"))
    src = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    for how in ("sum", "max"):
        torch.library.opcheck(torch.ops.foveal.segment_reduce.default, (src, edges.indptr, edges.permutation, how, "cpu"))
    torch.library.opcheck(torch.ops.foveal.segment_softmax.default, (src, edges.indptr, edges.permutation, "cpu"))
    torch.library.opcheck(torch.ops.foveal.segment_csr.default, (edges.target, edges.source, 6, 6))


@pytest.mark.parametrize("sorted_before", [True, False], ids=["CSR", "edge index"])
def test_a_model_around_it_compiles_whole_and_keeps_its_gradients(sorted_before: bool) -> None:
    edges, inputs = small()
    graph = edges if sorted_before else edges.edge_index()

    def model(*tensors: Tensor) -> Tensor:
        q, k, v, bias, envelope, gate = tensors
        out = segment_attention(q, k, v.sin(), graph, edge_bias=bias, edge_envelope=envelope, edge_gate=gate)
        weights = segment_softmax(bias, edges.edge_index()[1], num_nodes=6)
        return out.cos().sum() + segment_reduce(weights * gate, edges.edge_index()[1], reduce="mean", num_nodes=6).sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = torch.autograd.grad(model(*inputs), inputs)
    for ours, expected in zip(torch.autograd.grad(compiled(*inputs), inputs), plain, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_inductor_compiles_a_model_around_it() -> None:
    edges, inputs = small()
    attend = call(edges)
    compiled = torch.compile(lambda *tensors: attend(*tensors).square().sum(), fullgraph=True)
    plain = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    for ours, expected in zip(torch.autograd.grad(compiled(*inputs), inputs), plain, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_batch_of_calls_on_one_graph_folds_into_heads() -> None:
    edges, inputs = small()
    q, k, v = (torch.stack([tensor.detach(), 2 * tensor.detach(), tensor.detach().flip(0)]) for tensor in inputs[:3])
    batched = torch.func.vmap(lambda q, k, v: segment_attention(q, k, v, edges))(q, k, v)
    torch.testing.assert_close(batched, torch.stack([segment_attention(*one, edges) for one in zip(q, k, v, strict=True)]))


def test_autocast_lowers_queries_keys_and_values_and_keeps_weights_in_float32() -> None:
    edges, inputs = small()
    q, k, v, bias, _, _ = (tensor.detach().float() for tensor in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = segment_attention(q, k, v, edges, edge_bias=bias, return_weights=True)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    lowered = segment_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), edges, edge_bias=bias)
    assert torch.equal(out, lowered)


def test_inputs_with_any_strides_are_read_right() -> None:
    edges, inputs = small()
    q, k, v = (tensor.detach() for tensor in inputs[:3])
    joined = torch.cat((q, k), -1)
    strided = segment_attention(joined[..., :3], joined[..., 3:], v.transpose(0, 1).contiguous().transpose(0, 1), edges)
    torch.testing.assert_close(strided, segment_attention(q, k, v, edges))


def test_explain_says_why_triton_does_not_run_here() -> None:
    edges, inputs = small()
    told = explain(segment_attention, *inputs[:3], edges)
    assert told.backend == "cpu"
    assert "triton" in told.reasons


def test_the_definition_serves_where_c_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, inputs = small()
    expected = segment_attention(*inputs[:3], edges)
    monkeypatch.setenv("FOVEAL_NATIVE", "0")
    native.load.cache_clear()
    try:
        told = explain(segment_attention, *inputs[:3], edges)
        unsorted = CSR.from_edge_index(edges.edge_index(), 6)
        torch.testing.assert_close(segment_attention(*inputs[:3], unsorted), expected)
        assert torch.equal(unsorted.transposed.source, edges.transposed.source)
    finally:
        native.load.cache_clear()
    assert told.backend == "reference"
    assert "FOVEAL_NATIVE" in told.reasons["cpu"]


def test_loading_the_c_kernels_leaves_denormal_numbers_alone() -> None:
    assert cpu.why_not() is None
    assert (torch.tensor([1e-40]) * 1.0).item() > 0


Q, EDGES = torch.zeros(4, 2, 3), torch.tensor([[0, 1, 2], [1, 1, 3]])


@pytest.mark.parametrize(
    ("arguments_", "options", "error", "says"),
    [
        ((Q, Q, Q, torch.tensor([[0, 1], [1, 4]])), {}, ValueError, "target of edge 1 is 4"),
        ((Q, Q, Q, torch.tensor([[0, -1], [1, 2]])), {}, ValueError, "source of edge 1 is -1"),
        ((Q, Q, Q, EDGES.T), {}, ValueError, r"edge_index must have shape \(2, edges\)"),
        ((Q, Q, Q, EDGES.float()), {}, TypeError, "tensor of integers"),
        ((Q, Q, Q, [[0], [1]]), {}, TypeError, "CSR or an edge index"),
        ((Q[0], Q, Q, EDGES), {}, ValueError, r"q must have shape \(nodes, heads, dim\)"),
        ((Q, Q[..., :2], Q, EDGES), {}, ValueError, "same head dim"),
        ((Q, Q[:, :1], Q, EDGES), {}, ValueError, "as many heads"),
        ((Q, Q.double(), Q, EDGES), {}, TypeError, "share dtype"),
        ((Q, None, Q, EDGES), {}, ValueError, "together"),
        ((None, None, Q, EDGES), {}, ValueError, "edge_bias"),
        ((Q, Q[:3], Q, EDGES), {}, ValueError, "k must have one row a source, 4"),
        ((Q, Q, Q, EDGES), {"edge_bias": torch.zeros(4, 2)}, ValueError, r"edge_bias must have shape \(3,\) or \(3, 2\)"),
        ((Q, Q, Q, EDGES), {"edge_gate": torch.zeros(3, dtype=torch.long)}, TypeError, "edge_gate"),
        ((Q, Q, Q, EDGES), {"num_nodes": 5}, ValueError, "leave it out"),
        ((None, None, Q[:3], EDGES), {"values_on_edges": True, "edge_bias": torch.zeros(3)}, ValueError, "give num_nodes"),
        ((Q, Q, Q, EDGES), {"values_on_edges": True}, ValueError, "one row an edge, 3"),
        ((Q, Q, Q, EDGES), {"backend": "cuda"}, ValueError, "no backend 'cuda'"),
    ],
)
def test_bad_input_is_refused_with_a_line_that_says_what_to_do(arguments_: Any, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        segment_attention(*arguments_, **options)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "neither"),
        ({"index": torch.tensor([0, 1, 1]), "ptr": torch.tensor([0, 3])}, ValueError, "both"),
        ({"index": torch.tensor([0, 1])}, ValueError, "one entry an edge"),
        ({"index": torch.tensor([0.0, 1.0, 1.0])}, TypeError, "integers"),
        ({"index": torch.tensor([0, 1, 7]), "num_nodes": 3}, ValueError, "target of edge 2 is 7"),
        ({"ptr": torch.tensor([0, 2])}, ValueError, "rise from 0 to the number of edges 3"),
        ({"ptr": torch.tensor([0, 9, 3])}, ValueError, "falling"),
        ({"ptr": torch.tensor([0, 3]), "num_nodes": 4}, ValueError, "ptr must have shape"),
    ],
)
@pytest.mark.parametrize("operator", [segment_softmax, segment_reduce])
def test_bad_segments_are_refused(operator: Callable[..., Tensor], options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        operator(torch.zeros(3, 2), **options)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="'sum', 'mean', 'max' or 'min'"):
        segment_reduce(torch.zeros(3), torch.zeros(3, dtype=torch.long), reduce="product")
