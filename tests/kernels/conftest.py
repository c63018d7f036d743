"""What every kernel test shares: uninitialised memory is poisoned, and triton's interpreter is off unless a test asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from foveal.kernels.testing import poisoned_empty


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """A kernel that forgets to write part of its result gives NaN instead of a lucky zero."""
    with poisoned_empty("foveal.kernels"):
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20261121)
