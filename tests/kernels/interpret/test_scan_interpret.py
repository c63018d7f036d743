"""The Triton scan in triton's interpreter, in chunks of 8 steps (the interpreter scans element by element)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import explain, selective_scan
from foveal.kernels.scan import inputs
from foveal.kernels.testing import assert_close_to_definition

LENGTH = 19


@pytest.fixture(scope="module", autouse=True)
def _short_chunks(_interpreter: None) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(inputs, "CHUNK", 8)
    yield
    patch.undo()


def sample(dtype: torch.dtype, b: int, c: int, state: int, optional: bool, length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    matrix = {2: (2, state), 3: (1, state, length), 4: (1, 2, state, length)}
    tensors = {"u": normal(1, 2, length), "delta": normal(1, 2, length), "A": -3 * torch.rand(2, state, generator=generator)}
    tensors |= {"B": normal(*matrix[b]), "C": normal(*matrix[c])}
    if optional:
        tensors |= {"D": torch.randn(2), "z": normal(1, 2, length), "delta_bias": torch.randn(2), "initial_state": torch.randn(1, 2, state)}
    return tensors


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {key: value.detach().requires_grad_() for key, value in tensors.items()}
    out, last_state = selective_scan(**leaves, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, last_state)]
    return [out, last_state, *torch.autograd.grad([out, last_state], list(leaves.values()), weights)]


@pytest.mark.parametrize(
    ("b", "c", "state", "optional", "reverse", "dtype", "length"),
    [
        (3, 3, 4, True, False, torch.float32, LENGTH),
        (3, 3, 16, True, True, torch.float32, LENGTH),
        (4, 3, 3, False, False, torch.float32, 16),
        (2, 3, 3, True, True, torch.float32, 11),
        (3, 2, 3, False, False, torch.float32, 11),
        (3, 3, 3, True, False, torch.bfloat16, 11),
        (3, 3, 3, True, False, torch.float16, 1),
        (3, 3, 33, True, False, torch.float32, 11),
    ],
)
def test_the_kernel_is_no_worse_than_eager_torch(b: int, c: int, state: int, optional: bool, reverse: bool, dtype: torch.dtype, length: int) -> None:
    tensors = sample(dtype, b, c, state, optional, length)
    options: dict[str, Any] = {"delta_softplus": optional, "reverse": reverse}
    assert explain(selective_scan, **tensors).backend == "triton"
    actual = everything(tensors, **options, backend="triton")
    eager = everything(tensors, **options, backend="reference")
    definition = everything({key: value.double() for key, value in tensors.items()}, **options, backend="reference")
    slack = 2**-7 if dtype == torch.bfloat16 else 1e-5  # the interpreter cuts bfloat16 off where hardware rounds
    for index, name in enumerate(("out", "last_state", *tensors)):
        factor = 2.0 if index < 2 else 3.0
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=factor, slack=slack, name=name)


def test_an_empty_sequence_launches_nothing() -> None:
    tensors = sample(torch.float32, 3, 3, 3, True, 0)
    out, last_state = selective_scan(**tensors, return_last_state=True, backend="triton")
    assert out.shape == (1, 2, 0)
    assert torch.equal(last_state, tensors["initial_state"])


def test_several_channels_of_a_program_share_one_gradient_of_b_and_c(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.kernels.scan import triton

    monkeypatch.setattr(triton, "_PROGRAMS", 1)
    tensors = sample(torch.float32, 3, 3, 3, True, 11)
    definition = everything({key: value.double() for key, value in tensors.items()}, delta_softplus=True, backend="reference")
    for actual, wanted in zip(everything(tensors, delta_softplus=True, backend="triton"), definition, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_forget_the_one_before(reverse: bool) -> None:
    tensors = sample(torch.float32, 3, 3, 3, True, LENGTH)
    options: dict[str, Any] = {"delta_softplus": True, "reverse": reverse, "cu_seqlens": torch.tensor([0, 1, 8, 8, 13, LENGTH])}
    actual, eager = (everything(tensors, **options, backend=backend) for backend in ("triton", "reference"))
    definition = everything({key: value.double() for key, value in tensors.items()}, **options, backend="reference")
    for index, name in enumerate(("out", "last_state", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index < 2 else 3.0, name=name)
