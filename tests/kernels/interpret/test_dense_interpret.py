"""The Triton kernels of attention in triton's interpreter, forward and backward, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import attention, explain
from foveal.kernels.testing import AttentionSample, assert_close_to_definition, attention_samples

SAMPLES = {sample.name: sample for sample in attention_samples()}
HALF = [
    "plain",
    "causal, rows without keys",
    "window",
    "one kv head, causal, bias",
    "a sequence fully padded",
    "bias over heads",
    "head dim 100, value dim 24",
]


def run(arguments: dict[str, Any], backend: str) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of all leaves for fixed random weights of both."""
    out, lse = attention(**arguments, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = (out.double() * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum()
    weights = torch.randn(lse.shape, dtype=torch.float64, generator=generator)
    loss = loss + (lse.double().masked_fill(lse == float("-inf"), 0.0) * weights).sum()
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def holds_the_error_rule(sample: AttentionSample, dtype: torch.dtype) -> None:
    actual, eager = (run(sample.to(dtype), backend) for backend in ("triton", "reference"))
    expected = run(sample.to(torch.float64), "reference")
    for name, *results in zip(["out", "lse", "dq", "dk", "dv", "dbias"], actual, eager, expected, strict=False):
        assert_close_to_definition(*results, factor=3 if name.startswith("d") else 2, name=name)


@pytest.mark.parametrize("name", SAMPLES)
def test_kernels_in_float32_hold_the_error_rule(name: str) -> None:
    holds_the_error_rule(SAMPLES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_kernels_in_half_precision_hold_the_error_rule(name: str, dtype: torch.dtype) -> None:
    holds_the_error_rule(SAMPLES[name], dtype)


def test_bias_of_plus_infinity_equals_the_definition() -> None:
    tensors = dict(SAMPLES["bias over heads"].tensors)
    tensors["bias"] = tensors["bias"].clone()
    tensors["bias"][..., 7] = float("inf")
    tensors["bias"][..., 3, 40] = float("inf")
    holds_the_error_rule(AttentionSample("plus infinity", tensors), torch.float32)


@pytest.mark.parametrize(("dim", "value_dim"), [(130, 24), (24, 256)])
def test_heads_so_wide_that_float32_products_are_taken_in_parts_hold_the_error_rule(dim: int, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"q": (1, 1, 21, dim), "k": (1, 1, 35, dim), "v": (1, 1, 35, value_dim), "bias": (1, 1, 21, 35)}
    tensors = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    holds_the_error_rule(AttentionSample("wide heads", {**tensors, "temperature": torch.rand(1, 1, 21, generator=generator) + 0.5}), torch.float32)


def test_heads_inside_lengths_are_read_and_written_through_their_strides() -> None:
    q, k, v = (torch.randn(2, 20, 3, 16, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, layout="bnhd", backend="triton")
    assert out.is_contiguous()
    expected = attention(q, k, v, layout="bnhd", backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(torch.autograd.grad(out.sum(), [q, k, v]), torch.autograd.grad(expected.sum(), [q, k, v]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "query", "key"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_batches_and_lengths_have_empty_or_zero_results_and_gradients(batch: int, query: int, key: int) -> None:
    q, k, v = (torch.randn(batch, 2, length, 16, requires_grad=True) for length in (query, key, key))
    bias = torch.randn(1, 2, query, key, requires_grad=True)
    out, lse = attention(q, k, v, bias=bias, return_lse=True, backend="triton")
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), [q, k, v, bias]))


def test_interpreter_is_preferred_while_it_is_on() -> None:
    q, k, v = (torch.randn(1, 1, 2, 16) for _ in range(3))
    assert explain(attention, q, k, v).backend == "triton"
