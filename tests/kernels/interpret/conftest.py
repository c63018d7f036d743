"""Kernels in triton's interpreter: their numbers without a GPU. Where there is a GPU, tests/kernels/gpu runs them for real instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from foveal.kernels.dispatch import has_triton
from foveal.kernels.testing import use_interpreter


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    if not has_triton():
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/kernels/gpu runs these kernels on it")
    with use_interpreter("foveal.kernels"):
        yield
