"""The Triton kernels of efficient attention in triton's interpreter, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import efficient_attention, explain
from foveal.kernels.testing import assert_close_to_definition


def sample(batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((queries, dim), (keys, dim), (keys, value_dim))
    return [(2 * torch.randn(batch, heads, *shape, generator=draw)).to(dtype) for shape in shapes]


def everything(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = efficient_attention(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


@pytest.mark.parametrize(
    ("shape", "dtype", "masked"),
    [
        ((2, 2, 20, 20, 8, 8), torch.float32, False),
        ((2, 1, 33, 70, 20, 5), torch.float32, True),
        ((1, 2, 1, 1, 8, 16), torch.float16, False),
        ((2, 2, 40, 40, 8, 8), torch.bfloat16, True),
        ((1, 1, 5, 9, 32, 17), torch.float32, True),
    ],
)
def test_the_kernels_are_no_worse_than_eager_torch(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    tensors = sample(*shape, dtype)
    mask = None
    if masked:
        mask = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0] = shape[0] == 1  # of the first of several sequences no key counts
    assert explain(efficient_attention, *tensors, mask=mask).backend == "triton"
    actual = everything(tensors, mask=mask, backend="triton")
    eager = everything(tensors, mask=mask, backend="reference")
    definition = everything([t.double() for t in tensors], mask=mask, backend="reference")
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=3.0 if index else 2.0, name=name)


def test_parts_of_one_projection_are_read_where_they_lie() -> None:
    joined = torch.randn(3, 20, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = joined.unbind(2)
    found = efficient_attention(q, k, v, layout="bnhd", backend="triton")
    assert found.is_contiguous()
    torch.testing.assert_close(found, efficient_attention(q, k, v, layout="bnhd", backend="reference"))


def test_logits_of_hundreds_do_not_overflow() -> None:
    q, k, v = sample(1, 1, 12, 40, 8, 8, torch.float32)
    found = efficient_attention(300 * q, 300 * k, v, backend="triton")
    torch.testing.assert_close(found, efficient_attention(300 * q, 300 * k, v, backend="reference"))


def test_empty_lengths_give_empty_or_zero_outputs_and_gradients() -> None:
    for queries, keys in ((0, 5), (5, 0)):
        out, *gradients = everything(sample(1, 2, queries, keys, 8, 8, torch.float32), backend="triton")
        assert out.shape == (1, 2, queries, 8)
        assert not any(t.any() for t in (out, *gradients))


def test_wide_heads_are_left_to_torch_in_words() -> None:
    tensors = sample(1, 1, 4, 4, 33, 8, torch.float32)
    assert "dims up to 32, these are 33 and 8" in explain(efficient_attention, *tensors, backend="reference").reasons["triton"]
