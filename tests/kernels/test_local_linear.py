"""Local linear attention: the definition against weighted ridge regression, the iterations against the definition, torch's own checks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import explain, local_linear_attention
from foveal.kernels.local_linear import op, tiled
from foveal.kernels.testing import assert_close_to_definition


def sample(batch: int = 2, heads: int = 2, queries: int = 9, keys: int = 12, dim: int = 4, value_dim: int = 3, **to: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to.get("dtype", torch.float64))

    tensors = {"q": normal(batch, heads, queries, dim), "k": normal(batch, heads, keys, dim), "v": normal(batch, heads, keys, value_dim)}
    ridge = 0.05 + torch.rand(heads, generator=generator, dtype=torch.float64)
    return {**tensors, "ridge": ridge.to(torch.promote_types(tensors["q"].dtype, torch.float32))}


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = local_linear_attention(**leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, list(leaves.values()), weights)]


EXACT = {"cg_iters": 60, "tol": 1e-14}


@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_is_the_intercept_of_a_weighted_ridge_regression(causal: bool) -> None:
    """Minimise sum_j p_j |v_j - b - W (k_j - q)|^2 + ridge |W|^2 and read b: solved as one augmented least-squares problem."""
    tensors = sample(1, 1)
    q, k, v, ridge = (tensors[name] for name in ("q", "k", "v", "ridge"))
    out = local_linear_attention(**tensors, causal=causal, scale=0.7, backend="reference")
    for i in range(9):
        keys = 12 - 9 + i + 1 if causal else 12
        weights = (0.7 * k[0, 0, :keys] @ q[0, 0, i]).softmax(0)
        features = torch.cat([torch.ones(keys, 1, dtype=torch.float64), k[0, 0, :keys] - q[0, 0, i]], 1) * weights.sqrt()[:, None]
        penalty = torch.cat([torch.zeros(4, 1, dtype=torch.float64), ridge.sqrt() * torch.eye(4, dtype=torch.float64)], 1)
        targets = torch.cat([v[0, 0, :keys] * weights.sqrt()[:, None], torch.zeros(4, 3, dtype=torch.float64)])
        fitted = torch.linalg.lstsq(torch.cat([features, penalty]), targets).solution
        torch.testing.assert_close(out[0, 0, i], fitted[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (9, 12), (17, 17), (12, 9)], ids=str)
@pytest.mark.parametrize("dim", [1, 4, 16])
def test_the_iterations_equal_the_direct_solve_with_all_gradients(shape: tuple[int, int], causal: bool, dim: int) -> None:
    tensors = sample(queries=shape[0], keys=shape[1], dim=dim)
    expected = everything(tensors, causal=causal, backend="reference")
    for actual, wanted in zip(everything(tensors, causal=causal, **EXACT), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)


def test_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = sample()
    whole = everything(tensors, **EXACT)
    monkeypatch.setattr(tiled, "_TILE", 2 * 2 * 12 * 2)
    for actual, wanted in zip(everything(tensors, **EXACT), whole, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_equal_finite_differences(backend: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in sample(1, 1, 4, 5, 3, 2).items()}
    names = list(tensors)

    def call(*values: Tensor) -> Tensor:
        return local_linear_attention(**dict(zip(names, values, strict=True)), backend=backend, **EXACT)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


def test_second_gradients_equal_finite_differences() -> None:
    tensors = {name: t.requires_grad_() for name, t in sample(1, 1, 3, 3, 2, 2).items()}
    names = list(tensors)

    def call(*values: Tensor) -> Tensor:
        return local_linear_attention(**dict(zip(names, values, strict=True)), **EXACT)

    assert torch.autograd.gradgradcheck(call, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_no_worse_than_eager_torch(dtype: torch.dtype) -> None:
    tensors = sample(queries=40, keys=40, dim=16, dtype=dtype)
    actual, eager = everything(tensors, cg_iters=40, tol=1e-7), everything(tensors, backend="reference")
    definition = everything({name: t.double() for name, t in tensors.items()}, backend="reference")
    for index, name in enumerate(("out", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index == 0 else 3.0, name=name)


def test_every_eight_iterations_bring_the_output_closer() -> None:
    tensors = {**sample(1, 2, 64, 64, 32, 8), "ridge": 0.1}
    exact = local_linear_attention(**tensors, backend="reference")
    errors = [(local_linear_attention(**tensors, tol=0.0, cg_iters=n) - exact).norm() / exact.norm() for n in (8, 16, 24, 32, 40)]
    assert all(later < 0.5 * before for before, later in itertools.pairwise(errors))
    assert errors[1] < 5e-3
    assert errors[-1] < 1e-6


def test_iterations_after_convergence_do_no_harm() -> None:
    """Unguarded, the step length of a solved row is 0 / 0."""
    tensors = sample()
    out = local_linear_attention(**tensors, cg_iters=500, tol=0.0)
    torch.testing.assert_close(out, local_linear_attention(**tensors, backend="reference"), rtol=1e-9, atol=1e-9)
    same = {**tensors, "k": tensors["q"][:, :, :1].expand(2, 2, 12, 4), "q": tensors["q"][:, :, :1].expand(2, 2, 9, 4)}
    out = everything(same)
    assert all(t.isfinite().all() for t in out)
    torch.testing.assert_close(out[0][:, :, -1], tensors["v"].mean(2))


def test_a_linear_function_of_the_keys_is_reproduced_where_attention_is_biased() -> None:
    tensors = sample(keys=40, queries=40)
    slope = torch.randn(4, 3, dtype=torch.float64)
    out = local_linear_attention(tensors["q"], tensors["k"], tensors["k"] @ slope, ridge=1e-9, causal=False, **EXACT)
    torch.testing.assert_close(out, tensors["q"] @ slope, rtol=1e-4, atol=1e-4)


def test_a_large_ridge_gives_softmax_attention_back() -> None:
    tensors = sample()
    out = local_linear_attention(tensors["q"], tensors["k"], tensors["v"], ridge=1e9, causal=False)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_query_without_keys_gives_zero_and_no_gradient(backend: str) -> None:
    out, dq, dk, dv, dridge = everything(sample(queries=12, keys=9), backend=backend)
    assert torch.equal(out[:, :, :3], torch.zeros(2, 2, 3, 3, dtype=torch.float64))
    assert torch.equal(dq[:, :, :3], torch.zeros(2, 2, 3, 4, dtype=torch.float64))
    assert all(t.isfinite().all() for t in (out, dq, dk, dv, dridge))


def test_no_queries_give_an_empty_output() -> None:
    assert everything(sample(queries=0))[0].shape == (2, 2, 0, 3)
    assert everything(sample(batch=0))[0].shape == (0, 2, 9, 3)


def test_layouts_and_memory_orders_give_the_same() -> None:
    tensors = sample()
    expected = local_linear_attention(**tensors)
    swapped = {name: t if name == "ridge" else t.transpose(1, 2) for name, t in tensors.items()}
    torch.testing.assert_close(local_linear_attention(**swapped, layout="bnhd").transpose(1, 2), expected)
    strided = {name: t if name == "ridge" else t.mT.contiguous().mT for name, t in tensors.items()}
    torch.testing.assert_close(local_linear_attention(**strided), expected)


def test_two_runs_give_the_same_bits() -> None:
    tensors = sample(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(everything(tensors), everything(tensors), strict=True))


def test_the_custom_operators_obey_torch() -> None:
    tensors = {name: t.requires_grad_() for name, t in sample(dtype=torch.float32).items()}
    arguments = (*tensors.values(), True, 0.5, 16, 1e-6, "torch")
    torch.library.opcheck(op.local_linear_forward.overload, arguments)
    out, slopes = op.local_linear_forward(*arguments)
    backward = (torch.randn_like(out), slopes.detach(), *arguments)
    torch.library.opcheck(op.local_linear_backward.overload, backward, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_it_compiles_without_a_graph_break() -> None:
    tensors = {name: t.requires_grad_() for name, t in sample(dtype=torch.float32).items()}
    compiled = torch.compile(lambda **named: local_linear_attention(**named), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(local_linear_attention(**tensors).square().sum(), list(tensors.values()))
    for a, e in zip(torch.autograd.grad(compiled(**tensors).square().sum(), list(tensors.values())), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("mapped", [("q",), ("k", "v"), ("ridge",)])
def test_vmap_equals_a_loop(mapped: tuple[str, ...]) -> None:
    tensors = sample()
    stacked = {name: torch.stack([tensors[name], 0.5 * tensors[name], 2 * tensors[name]]) for name in mapped}

    def call(values: dict[str, Tensor]) -> Tensor:
        return local_linear_attention(**{**tensors, **values})

    expected = torch.stack([call({name: value[i] for name, value in stacked.items()}) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(call)(stacked), expected, rtol=1e-10, atol=1e-10)


def test_autocast_casts_the_signals_and_not_the_ridge() -> None:
    tensors = sample(dtype=torch.float32)
    cast = {name: t if name == "ridge" else t.bfloat16() for name, t in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = local_linear_attention(**tensors)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, local_linear_attention(**cast))


def test_explain_says_why_torch_runs_on_the_cpu() -> None:
    explanation = explain(local_linear_attention, **sample())
    assert explanation.backend == "torch"
    assert explanation.reasons["triton"] in ("it needs tensors on a GPU, these are on cpu", "triton is not installed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, "q must have 4 dimensions"),
        ({"k": torch.zeros(2, 2, 12, 5)}, "q and k must have one batch, heads and dim"),
        ({"v": torch.zeros(2, 2, 11, 3)}, "k and v must have one batch, heads and length"),
        ({"ridge": 0.0}, "ridge must be > 0"),
        ({"ridge": torch.ones(3)}, r"ridge must be a number or a floating-point tensor \(heads,\) = \(2,\)"),
        ({"cg_iters": 0}, "cg_iters must be at least 1"),
        ({"layout": "nhd"}, "layout must be"),
        ({"backend": "triton"}, "it needs tensors on a GPU|triton is not installed"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_linear_attention(**{**sample(dtype=torch.float32), **change})
