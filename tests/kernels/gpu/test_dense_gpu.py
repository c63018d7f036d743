"""The Triton kernels of attention on a GPU: every tiling's numbers, the whole range of head dimensions and lengths, and determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import attention, explain
from foveal.kernels.testing import AttentionSample, assert_close_to_definition, attention_samples, bhnd
from foveal.kernels.testing.samples import HEAD_DIMS, LENGTHS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(arguments: dict[str, Any], backend: str | None) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of all leaves for fixed random weights of both."""
    out, lse = attention(**arguments, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device) for t in (out, lse)]
    loss = (out.double() * weights[0]).sum() + (lse.double().masked_fill(lse == float("-inf"), 0.0) * weights[1]).sum()
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def holds_the_error_rule(sample: AttentionSample, dtype: torch.dtype) -> None:
    actual, eager = (run(sample.to(dtype, "cuda"), backend) for backend in ("triton", "reference"))
    expected = run(sample.to(torch.float64, "cuda"), "reference")
    # A bias per query moves no weight: its gradient is what rounding the output leaves over, of which eager torch has none.
    slack = torch.finfo(dtype).eps if sample.name == "bias per query" else 1e-5
    for name, *results in zip(["out", "lse", "dq", "dk", "dv", "dbias"], actual, eager, expected, strict=False):
        assert_close_to_definition(*results, factor=3 if name.startswith("d") else 2, slack=slack, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in attention_samples()])
def test_every_option_holds_the_error_rule(sample: AttentionSample, dtype: torch.dtype) -> None:
    holds_the_error_rule(sample, dtype)


def _sample(query: int, key: int, dim: int, *, biased: bool, **options: Any) -> AttentionSample:
    generator = torch.Generator().manual_seed(7)
    tensors = {name: bhnd(2, 2, length, dim, generator=generator) for name, length in (("q", query), ("k", key), ("v", key))}
    if biased:
        tensors["bias"] = torch.randn(1, 2, query, key, generator=generator)
    return AttentionSample("grid", tensors, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dimension_holds_the_error_rule(dim: int, biased: bool, dtype: torch.dtype) -> None:
    holds_the_error_rule(_sample(200, 300, dim, biased=biased, causal=True), dtype)


@pytest.mark.parametrize("length", [*LENGTHS, 1000])
def test_every_length_holds_the_error_rule(length: int) -> None:
    holds_the_error_rule(_sample(length, length, 64, biased=True), torch.float16)
    holds_the_error_rule(_sample(length, 2 * length + 1, 64, biased=False, window=(50, 20)), torch.bfloat16)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_two_runs_give_the_same_bits(biased: bool) -> None:
    sample = _sample(1000, 1000, 64, biased=biased, causal=True)
    first, second = (run(sample.to(torch.bfloat16, "cuda"), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 4, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        bias = torch.randn(1, 4, 1, length, device="cuda", requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(q, k, v, bias=bias).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 5 * peak(2048)


def test_more_windows_than_a_grid_axis_has_blocks() -> None:
    q, k, v = (torch.randn(20000, 4, 49, 32, device="cuda", dtype=torch.float16) for _ in range(3))
    out = attention(q, k, v)
    torch.testing.assert_close(out[-1:], attention(q[-1:], k[-1:], v[-1:], backend="reference"), rtol=2e-2, atol=2e-3)


def test_triton_is_the_first_choice_on_a_gpu() -> None:
    q = torch.randn(1, 1, 4, 16, device="cuda")
    assert explain(attention, q, q, q).backend == "triton"
