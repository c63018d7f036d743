"""What the tests of memes share: the authors' reference values, and the rule that makes the weights they were computed with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "memes"


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of an official tensor, drawn from its name alone."""
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    if len(shape) == 0:
        value = 0.5 + 0.1 * z
    elif len(shape) == 1:
        value = 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


class Golden:
    """One variant of the reference file: its description and its arrays."""

    def __init__(self, system: str, variant: str) -> None:
        self.about = json.loads((GOLDEN / f"{system}.json").read_text(encoding="utf-8"))["variants"][variant]
        self.arrays = np.load(GOLDEN / f"{system}_{variant}.npz")
        self.shapes = {key: tuple(shape) for key, shape in self.about["state_dict"].items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name])).to(dtype)

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(fill(key, shape)).to(dtype) for key, shape in self.shapes.items()}

    def cotangent(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(fill(f"cotangent.{name}", shape))

    def error(self, name: str, actual: torch.Tensor) -> float:
        """Relative error against the stored array, or the stored slice of it."""
        cut = self.about["arrays"][name].get("slice")
        value = actual.detach().double().numpy()
        if cut is not None:
            value = value[tuple(slice(*(int(part) if part else None for part in axis.split(":"))) for axis in cut.split(","))]
        expected = np.asarray(self.arrays[name], dtype=np.float64)
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        error = np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30)
        return float(error) if np.isfinite(error) else float("inf")


@pytest.fixture(scope="session")
def golden() -> type[Golden]:
    return Golden
