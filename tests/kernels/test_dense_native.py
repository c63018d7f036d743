"""Attention in C beside the definition in float64, and beside the torch forms that serve where there is no library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import attention, attention_varlen
from foveal.kernels.dense import cpu_native
from foveal.kernels.dense.call import Call
from foveal.kernels.testing import assert_close_to_definition, relative_error

pytestmark = pytest.mark.skipif(cpu_native._library() is None, reason="no C compiler, or a processor without 512-bit vectors")


def heads(generator: torch.Generator, batch: int, count: int, length: int, dim: int, layout: str = "bhnd") -> Tensor:
    if layout == "bnhd":
        return torch.randn(batch, length, count, dim, generator=generator).transpose(1, 2)
    return torch.randn(batch, count, length, dim, generator=generator)


#: queries, keys, heads, key heads, dim, value dim
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (5, 3, 2, 1, 8, 8),
    (6, 32, 2, 2, 16, 16),
    (49, 49, 4, 4, 32, 32),
    (77, 131, 6, 2, 40, 72),
    (7, 1100, 2, 2, 64, 64),  # more keys than a block
    (100, 513, 1, 1, 256, 256),
    (130, 64, 3, 1, 80, 130),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 5)},
    "causal window": {"causal": True, "window": (17, 0)},
    "scale": {"scale": -0.7},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_output_and_log_sum_exp_are_the_definitions(generator: torch.Generator, sizes: tuple[int, ...], options: str, layout: str) -> None:
    queries, keys, count, kv_heads, dim, value_dim = sizes
    q = heads(generator, 2, count, queries, dim, layout)
    k, v = heads(generator, 2, kv_heads, keys, dim, layout), heads(generator, 2, kv_heads, keys, value_dim, layout)
    out, lse = attention(q, k, v, **OPTIONS[options], return_lse=True, backend="cpu")
    expected, sums = attention(q.double(), k.double(), v.double(), **OPTIONS[options], return_lse=True, backend="reference")
    eager = attention(q, k, v, **OPTIONS[options], backend="reference")
    assert_close_to_definition(out, eager, expected, slack=2e-6)
    assert torch.equal(lse.isinf(), sums.isinf())
    torch.testing.assert_close(lse, sums.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 19, 70), (1, 4, 19, 70), (2, 1, 19, 70), (1, 1, 1, 70), (2, 4, 19, 1), (1, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_bias_of_any_shared_shape_is_added(generator: torch.Generator, shape: tuple[int, ...], kv_heads: int) -> None:
    q = heads(generator, 2, 4, 19, 24)
    k, v = (heads(generator, 2, kv_heads, 70, 24) for _ in range(2))
    bias = 3 * torch.randn(shape, generator=generator)
    bias[..., :5] = float("-inf") if shape[-1] > 1 else 0.0
    expected = attention(q.double(), k.double(), v.double(), bias=bias.double(), backend="reference")
    assert relative_error(attention(q, k, v, bias=bias, backend="cpu"), expected) < 2e-6
    assert relative_error(attention(q, k, v, bias=bias.expand(2, 4, 19, 70), backend="cpu"), expected) < 2e-6


GRADIENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = {
    # queries, keys, heads, key heads, dim, value dim; shape of a bias
    "one pair": ((1, 1, 1, 1, 1, 1), None, {}),
    "windows of 49": ((49, 49, 4, 4, 32, 32), (1, 4, 49, 49), {}),
    "causal, grouped heads": ((77, 131, 6, 2, 40, 72), None, {"causal": True}),
    "a window over blocks of keys": ((300, 300, 2, 1, 16, 16), None, {"window": (17, 9)}),
    "more keys than a block": ((50, 777, 2, 2, 24, 24), (1, 1, 50, 777), {}),
    "more queries than keys": ((777, 50, 2, 2, 24, 17), None, {"causal": True}),
    "bias a head and batch, grouped heads": ((61, 260, 4, 2, 24, 24), (2, 4, 61, 260), {"causal": True}),
    "wide heads": ((33, 65, 1, 1, 256, 130), (2, 1, 33, 65), {}),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_gradients_are_the_definitions(generator: torch.Generator, name: str, layout: str) -> None:
    (queries, keys, count, kv_heads, dim, value_dim), shape, options = GRADIENTS[name]
    leaves = [heads(generator, 2, count, queries, dim, layout), heads(generator, 2, kv_heads, keys, dim, layout)]
    leaves.append(heads(generator, 2, kv_heads, keys, value_dim, layout))
    if shape is not None:
        leaves.append(torch.randn(shape, generator=generator))
    weights = torch.randn(2, count, queries, value_dim, generator=generator), torch.randn(2, count, queries, generator=generator)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        results = attention(*own[:3], bias=own[3] if shape is not None else None, **options, return_lse=True, backend=backend)
        seen = results[1] > float("-inf")
        return torch.autograd.grad((results[0], results[1][seen]), own, (weights[0].to(dtype), weights[1].to(dtype)[seen]))

    for actual, eager, expected in zip(
        gradients(torch.float32, "cpu"), gradients(torch.float32, "reference"), gradients(torch.float64, "reference"), strict=True
    ):
        assert_close_to_definition(actual, eager, expected, factor=3.0, slack=2e-6)


def test_gradients_of_sequences_in_one_call_are_those_of_each_alone(generator: torch.Generator) -> None:
    queries, keys = [5, 0, 130, 1, 64], [9, 4, 130, 0, 600]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    leaves = [torch.randn(sum(queries), 4, 24, generator=generator), *(torch.randn(sum(keys), 2, 24, generator=generator) for _ in range(2))]
    leaves += [torch.randn(4, generator=generator), torch.randn(sum(queries), 4, generator=generator)]
    weights = torch.randn(sum(queries), 4, 24, generator=generator)

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        q, k, v, sinks, gate = own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out = attention_varlen(q, k, v, cu_q, cu_k, 130, 600, causal=True, sinks=sinks, gate=gate, backend=backend)
        return torch.autograd.grad(out, own, weights.to(dtype))

    for actual, expected in zip(gradients(torch.float32, "cpu"), gradients(torch.float64, "reference"), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_rows_that_a_bias_shuts_give_zero_and_large_logits_stay_finite(generator: torch.Generator) -> None:
    q, k, v = (heads(generator, 1, 2, 20, 16) for _ in range(3))
    bias = torch.zeros(20, 20)
    bias[3] = float("-inf")
    bias[4] = 1e4
    bias[5, 7] = float("inf")
    out, lse = attention(q, k, v, bias=bias, return_lse=True, backend="cpu")
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == float("-inf")).all()
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :, 5], v[:, :, 7])
    q = 80 * q
    assert relative_error(attention(q, k, v, backend="cpu"), attention(q.double(), k.double(), v.double(), backend="reference")) < 1e-4


def test_what_is_not_a_number_is_not_hidden(generator: torch.Generator) -> None:
    q, k, v = (heads(generator, 1, 1, 8, 8) for _ in range(3))
    k[0, 0, 2, 1] = float("nan")
    assert attention(q, k, v, backend="cpu").isnan().all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 2)}], ids=str)
def test_stretches_of_queries_that_threads_share_give_the_same_bits(generator: torch.Generator, options: dict[str, Any]) -> None:
    q, k, v = (heads(generator, 1, 1, 700, 32) for _ in range(3))
    threads = torch.get_num_threads()
    outs = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outs.append(attention(q, k, v, **options, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs) if not options else relative_error(outs[0], outs[1]) < 1e-6  # blocks of keys begin at a window's edge


def test_sequences_in_one_call_give_what_each_gives_alone(generator: torch.Generator) -> None:
    queries, keys = [5, 0, 130, 1, 64], [9, 4, 130, 0, 600]
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    q = torch.randn(sum(queries), 4, 24, generator=generator)
    k, v = (torch.randn(sum(keys), 2, 24, generator=generator) for _ in range(2))
    temperature, gate = torch.rand(sum(queries), 4, generator=generator) + 0.5, torch.randn(sum(queries), 4, generator=generator)
    options = {"causal": True, "sinks": torch.randn(4, generator=generator)}
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, 130, 600, **options, temperature=temperature, gate=gate, return_lse=True, backend="cpu")
    for index in range(5):
        rows, seen = slice(cu_q[index], cu_q[index + 1]), slice(cu_k[index], cu_k[index + 1])
        alone = [t[None].double() for t in (q[rows], k[seen], v[seen])]
        part = {
            "temperature": temperature[rows].mT[None].double(),
            "gate": gate[rows][None].double(),
            "causal": True,
            "sinks": options["sinks"].double(),
        }
        expected, sums = attention(*alone, **part, layout="bnhd", return_lse=True, backend="reference")
        torch.testing.assert_close(out[rows], expected[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows], sums[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", [[0, 5, 9], [0, 12, 10], [1, 5, 10], [0, 20, 10]])
def test_boundaries_outside_the_tensors_are_refused_where_the_public_function_could_not_see_them(
    generator: torch.Generator, numbers: list[int]
) -> None:
    q = heads(generator, 1, 2, 10, 8)
    cu = torch.tensor(numbers, dtype=torch.int32)
    call = Call(q, q, q, cu_queries=cu, cu_keys=torch.tensor([0, 5, 10], dtype=torch.int32), longest_query=10, longest_key=10)
    with pytest.raises(ValueError, match="must rise from 0 to the total 10"):
        cpu_native.forward(call, torch.empty_like(q), torch.empty(1, 2, 10))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [40, 150])
def test_without_the_library_torch_gives_the_same(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, options: str, length: int) -> None:
    q, k, v = (heads(generator, 2, 4, length, 16) for _ in range(3))
    cu = torch.tensor([0, length // 3, length], dtype=torch.int32)
    packed = [t[0].transpose(0, 1).clone() for t in (q, k, v)]

    def results() -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (q, k, v, *packed)]
        outs = [attention(*leaves[:3], **OPTIONS[options]), attention_varlen(*leaves[3:], cu, cu, length, length, **OPTIONS[options])]
        return [*outs, *torch.autograd.grad([out.square().sum() for out in outs], leaves)]

    native = results()
    monkeypatch.setattr(cpu_native, "_library", lambda: None)
    assert not cpu_native.serves(Call(q, k, v))
    for one, other in zip(native, results(), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_torch(generator: torch.Generator, dtype: torch.dtype) -> None:
    q, k, v = (heads(generator, 1, 2, 9, 8).to(dtype) for _ in range(3))
    assert not cpu_native.serves(Call(q, k, v))
    assert attention(q, k, v).dtype == dtype
