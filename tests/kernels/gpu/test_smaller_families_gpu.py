"""The Triton kernels of the families with few options on a GPU: numbers by the error rule, and the same bits twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.kernels import efficient_attention, explain, gated_delta_rule, kronecker_attention, local_linear_attention, titans
from foveal.kernels.testing import assert_close_to_definition

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

#: Tensors by name in float32 on the CPU; those of `SIGNALS` take the dtype under test.
Tensors = dict[str, Tensor]
SIGNALS = ("q", "k", "v", "k1", "k2", "v1", "v2")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def evaluated(call: Callable[..., Sequence[Tensor]], tensors: Tensors, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Results, and the gradients of their sum with fixed random weights."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {name: t.to("cuda", dtype if name in SIGNALS else wide).requires_grad_() for name, t in tensors.items()}
    results = list(call(**leaves, **options))
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(r.shape, generator=draw).to(r).masked_fill(r.detach().isinf(), 0) for r in results]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, list(leaves.values()), weights)]


def holds_the_rule(call: Callable[..., Sequence[Tensor]], tensors: Tensors, dtype: torch.dtype, results: int, **ours: Any) -> None:
    actual, again = (evaluated(call, tensors, dtype, backend="triton", **ours) for _ in range(2))
    eager, definition = evaluated(call, tensors, dtype, backend="reference"), evaluated(call, tensors, torch.float64, backend="reference")
    for index, name in enumerate((*(f"result {i}" for i in range(results)), *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index < results else 3.0, name=name)
        assert torch.equal(actual[index], again[index]), f"{name} differs between two runs"


def recurrent(length: int, dim: int, value_dim: int) -> Tensors:
    return {
        "q": normal(2, 3, length, dim),
        "k": F.normalize(normal(2, 3, length, dim + 1)[..., :dim], dim=-1),
        "v": normal(2, 3, length, value_dim),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "dim", "value_dim"), [(1, 8, 8), (37, 20, 17), (300, 64, 64), (130, 64, 50)])
def test_the_delta_rule_and_titans_walk_like_their_recurrences(length: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tensors, rate = recurrent(length, dim, value_dim), uniform(2, 3, length)
    holds_the_rule(lambda **a: [gated_delta_rule(**a)], {**tensors, "beta": rate, "g": -0.3 * uniform(2, 3, length + 1)[..., 1:]}, dtype, 1)
    rates = {"theta": rate, "alpha": 0.3 * uniform(2, 3, length + 2)[..., 2:], "eta": 0.9 * uniform(2, 3, length + 3)[..., 3:]}
    holds_the_rule(lambda **a: [titans(**a)], {**tensors, **rates}, dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"), [(100, 100, 16, 16), (40, 90, 32, 20), (30, 12, 8, 8), (130, 130, 64, 64), (33, 65, 50, 60)]
)
def test_local_regressions_are_the_direct_solves(queries: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype) -> None:
    tensors = {"q": 0.7 * normal(2, 2, queries, dim), "k": 0.7 * normal(2, 2, keys, dim + 1)[..., :dim], "v": normal(2, 2, keys, value_dim)}
    tensors["ridge"] = 1 + uniform(2)
    solved = {"cg_iters": 60, "tol": 1e-7}

    def call(backend: str, **given: Any) -> list[Tensor]:
        return [local_linear_attention(**given, **(solved if backend == "triton" else {}), backend=backend)]

    holds_the_rule(call, tensors, dtype, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "dim"), [((40, 40, 40), 16), ((5, 70, 33), 24), ((33, 20, 64), 64), ((17, 40, 40), 50)])
def test_three_way_attention_is_the_sum_over_all_triples(lengths: tuple[int, int, int], dim: int, causal: bool, dtype: torch.dtype) -> None:
    queries, first, second = lengths
    sizes = {"q": queries, "k1": first, "k2": second, "v1": first, "v2": second}
    tensors = {name: normal(2, 2, size, dim + place)[..., :dim] for place, (name, size) in enumerate(sizes.items())}
    masks = [(uniform(2, size) < 0.8).cuda() for size in (first, second)]
    holds_the_rule(lambda **a: kronecker_attention(**a, mask1=masks[0], mask2=masks[1], causal=causal, return_lse=True), tensors, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "dim"), [(512, 8, 20, 20, 8), (2, 3, 100, 333, 20), (1, 2, 1, 1, 8), (4, 2, 65, 64, 32)]
)
def test_softmaxes_over_features_and_keys_are_those_of_torch(
    batch: int, heads: int, queries: int, keys: int, dim: int, masked: bool, dtype: torch.dtype
) -> None:
    tensors = {"q": normal(batch, heads, queries, dim), "k": normal(batch, heads, keys, dim + 1)[..., :dim], "v": normal(batch, heads, keys, dim)}
    mask = (uniform(batch, keys) < 0.7).cuda() if masked else None
    holds_the_rule(lambda **a: [efficient_attention(**a, mask=mask)], tensors, dtype, 1)


def test_each_runs_its_triton_kernels_by_default() -> None:
    x = normal(1, 2, 32, 16).cuda()
    rate = uniform(1, 2, 32).cuda()
    for operator, arguments in (
        (gated_delta_rule, (x, x, x, rate)),
        (titans, (x, x, x, rate, rate, rate)),
        (kronecker_attention, (x, x, x, x, x)),
        (efficient_attention, (x, x, x)),
    ):
        assert explain(operator, *arguments).backend == "triton"
    assert explain(local_linear_attention, x, x, x, ridge=1.0).backend == "triton"
