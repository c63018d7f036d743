"""The Triton walk of the gated delta rule and of Titans in triton's interpreter, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveal.kernels import explain, gated_delta_rule, titans
from foveal.kernels.testing import assert_close_to_definition


def sample(length: int, dim: int, value_dim: int, dtype: torch.dtype, gated: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    tensors = {"q": normal(length, dim), "k": F.normalize(normal(length, dim), dim=-1), "v": normal(length, value_dim)}
    tensors = {name: t.to(dtype) for name, t in tensors.items()} | {"beta": torch.rand(1, 2, length, generator=generator)}
    if gated:
        tensors["g"] = -0.3 * torch.rand(1, 2, length, generator=generator)
    return {**tensors, "initial_state": normal(dim, value_dim)}


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out, state = gated_delta_rule(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, state)]
    return [out, state, *torch.autograd.grad([out, state], list(leaves.values()), weights)]


@pytest.mark.parametrize(
    ("length", "dim", "value_dim", "chunk_size", "dtype", "gated"),
    [
        (37, 16, 40, 16, torch.float32, True),
        (20, 20, 17, 8, torch.float32, False),
        (16, 16, 16, 16, torch.bfloat16, True),
        (1, 8, 8, 16, torch.float16, True),
    ],
)
def test_the_kernels_are_no_worse_than_eager_torch(length: int, dim: int, value_dim: int, chunk_size: int, dtype: torch.dtype, gated: bool) -> None:
    tensors = sample(length, dim, value_dim, dtype, gated)
    assert explain(gated_delta_rule, **tensors).backend == "triton"
    actual = everything(tensors, chunk_size=chunk_size, backend="triton")
    eager = everything(tensors, backend="reference")
    definition = everything({name: t.double() for name, t in tensors.items()}, backend="reference")
    for index, name in enumerate(("out", "state", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index < 2 else 3.0, name=name)


@pytest.mark.parametrize(
    ("length", "dim", "value_dim", "chunk_size", "dtype"),
    [(37, 16, 40, 16, torch.float32), (20, 20, 17, 8, torch.float32), (16, 16, 16, 16, torch.bfloat16), (1, 8, 8, 16, torch.float16)],
)
def test_memory_and_momentum_of_titans_are_no_worse_than_eager_torch(
    length: int, dim: int, value_dim: int, chunk_size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {name: t for name, t in sample(length, dim, value_dim, dtype, gated=False).items() if name in "qkv"}
    tensors |= {name: most * torch.rand(1, 2, length, generator=generator) for name, most in (("theta", 1.0), ("alpha", 0.3), ("eta", 0.9))}
    tensors |= {name: torch.randn(1, 2, dim, value_dim, generator=generator) for name in ("memory", "momentum")}

    def results(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        rates = {name: t for name, t in leaves.items() if name not in ("memory", "momentum")}
        out, states = titans(**rates, initial_state=(leaves["memory"], leaves["momentum"]), output_final_state=True, **options)
        draw = torch.Generator().manual_seed(7)
        weights = [torch.randn(t.shape, generator=draw).to(t.dtype) for t in (out, *states)]
        return [out, *states, *torch.autograd.grad([out, *states], list(leaves.values()), weights)]

    assert explain(titans, *(tensors[name] for name in ("q", "k", "v", "theta", "alpha", "eta")), chunk_size=chunk_size).backend == "triton"
    actual = results(tensors, chunk_size=chunk_size, backend="triton")
    eager = results(tensors, backend="reference")
    definition = results({name: t.double() for name, t in tensors.items()}, backend="reference")
    for index, name in enumerate(("out", "last memory", "last momentum", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index < 3 else 3.0, name=name)


def test_an_empty_sequence_launches_nothing() -> None:
    tensors = sample(0, 8, 8, torch.float32)
    out, state = gated_delta_rule(**tensors, output_final_state=True, backend="triton")
    assert out.shape == (1, 2, 0, 8)
    assert torch.equal(state, tensors["initial_state"])
