"""The Triton kernels of local linear attention in triton's interpreter, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import explain, local_linear_attention
from foveal.kernels.testing import assert_close_to_definition


def sample(queries: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (queries, dim), "k": (keys, dim), "v": (keys, value_dim)}
    tensors = {name: (0.7 * torch.randn(1, 2, *shape, generator=draw)).to(dtype) for name, shape in shapes.items()}
    return {**tensors, "ridge": 1 + torch.rand(2, generator=draw)}


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = local_linear_attention(**leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out, *torch.autograd.grad(out, list(leaves.values()), weights)]


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim", "causal", "dtype"),
    [
        (40, 40, 16, 16, True, torch.float32),
        (17, 35, 8, 20, False, torch.float32),
        (12, 5, 6, 3, True, torch.float32),  # the first queries see no key
        (9, 20, 8, 8, True, torch.bfloat16),
        (3, 16, 8, 8, False, torch.float16),
    ],
)
def test_the_kernels_are_no_worse_than_eager_torch(queries: int, keys: int, dim: int, value_dim: int, causal: bool, dtype: torch.dtype) -> None:
    tensors = sample(queries, keys, dim, value_dim, dtype)
    assert explain(local_linear_attention, **tensors, causal=causal).backend == "triton"
    actual = everything(tensors, causal=causal, cg_iters=40, tol=1e-7, backend="triton")
    eager = everything(tensors, causal=causal, backend="reference")
    definition = everything({name: t.double() for name, t in tensors.items()}, causal=causal, backend="reference")
    for index, name in enumerate(("out", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=3.0 if index else 2.0, name=name)


def test_a_few_iterations_give_what_the_torch_form_gives_after_as_many() -> None:
    tensors = sample(20, 20, 16, 4, torch.float32)
    for iterations in (1, 4):
        found, expected = (local_linear_attention(**tensors, cg_iters=iterations, backend=backend) for backend in ("triton", "torch"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # the orders of summation differ, and conjugate gradients feed on it


def test_empty_lengths_give_empty_or_zero_outputs_and_gradients() -> None:
    for queries, keys in ((0, 4), (4, 0)):
        out, *gradients = everything(sample(queries, keys, 8, 8, torch.float32), backend="triton")
        assert out.shape == (1, 2, queries, 8)
        assert not any(t.any() for t in (out, *gradients))
