"""The Triton kernels of three-way attention in triton's interpreter, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import explain, kronecker_attention
from foveal.kernels.testing import assert_close_to_definition

NAMES = ("q", "k1", "k2", "v1", "v2")


def sample(lengths: tuple[int, int, int], dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    queries, first, second = lengths
    shapes = ((queries, dim), (first, dim), (second, dim), (first, value_dim), (second, value_dim))
    return {name: torch.randn(2, 1, *shape, generator=draw).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out, lse = kronecker_attention(**leaves, return_lse=True, **options)
    draw = torch.Generator().manual_seed(7)
    weights = [torch.randn(out.shape, generator=draw).to(out.dtype), torch.randn(lse.shape, generator=draw).to(lse.dtype)]
    weights[1] = weights[1].masked_fill(lse.isinf(), 0)
    return [out, lse, *torch.autograd.grad([out, lse], list(leaves.values()), weights)]


@pytest.mark.parametrize(
    ("lengths", "dims", "dtype", "options"),
    [
        ((5, 40, 35), (16, 16), torch.float32, {}),
        ((4, 6, 9), (20, 7), torch.float32, {"causal": True}),
        ((6, 5, 4), (8, 8), torch.float16, {"causal": True, "masked": True}),
        ((3, 10, 20), (16, 16), torch.bfloat16, {"masked": True}),
        ((1, 1, 1), (8, 8), torch.float32, {}),
    ],
)
def test_the_kernels_are_no_worse_than_eager_torch(
    lengths: tuple[int, int, int], dims: tuple[int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    tensors = sample(lengths, *dims, dtype)
    options = dict(options)
    if options.pop("masked", False):
        draw = torch.Generator().manual_seed(1)
        options["mask1"], options["mask2"] = (torch.rand(2, length, generator=draw) < 0.7 for length in lengths[1:])
        options["mask1"][0] = False  # nothing counts in the first of the batch
    assert explain(kronecker_attention, **tensors, **options).backend == "triton"
    actual = everything(tensors, backend="triton", **options)
    eager = everything(tensors, backend="reference", **options)
    definition = everything({name: t.double() for name, t in tensors.items()}, backend="reference", **options)
    for index, name in enumerate(("out", "lse", *NAMES)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index < 2 else 3.0, name=name)


def test_logits_of_hundreds_do_not_overflow() -> None:
    tensors = sample((3, 9, 9), 8, 8, torch.float32)
    tensors["q"] = 300 * tensors["q"]
    torch.testing.assert_close(kronecker_attention(**tensors, backend="triton"), kronecker_attention(**tensors, backend="reference"))


def test_empty_lengths_give_empty_or_zero_outputs_and_gradients() -> None:
    for lengths in ((0, 3, 3), (3, 0, 3), (3, 3, 0)):
        out, lse, *gradients = everything(sample(lengths, 8, 8, torch.float32), backend="triton")
        assert lse.isinf().all()
        assert not any(t.any() for t in (out, *gradients))
