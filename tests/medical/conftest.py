"""What the tests of medical share: the authors' reference values, and the rule that makes the weights they were computed with."""

from __future__ import annotations

import fnmatch
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "medical"
DATA = ROOT.parent / "shared" / "data" / "medical"


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of an official tensor, drawn from its name alone."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if leaf == "running_var":
        value = np.exp(0.1 * z)
    elif leaf in ("gamma", "beta", "gate") or leaf.startswith("lambda") or len(shape) == 0:
        value = 0.5 + 0.1 * z
    elif len(shape) == 1:
        value = 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


class Golden:
    """One variant of a reference file: its description and its arrays."""

    def __init__(self, system: str, variant: str) -> None:
        whole = json.loads((GOLDEN / f"{system}.json").read_text())
        self.about = whole["variants"][variant]
        self.arrays = np.load(GOLDEN / f"{variant if variant.startswith(system) else f'{system}_{variant}'}.npz")
        self.shapes = {key: tuple(shape) for key, shape in self.about.get("state_dict", whole.get("state_dict", {})).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name])).to(dtype)

    def state(self, dtype: torch.dtype = torch.float32, factors: Mapping[str, float] | None = None) -> dict[str, torch.Tensor]:
        """The authors' state dict by the rule; `factors` multiply the keys that a pattern fits, in single precision."""
        state = {}
        for key, shape in self.shapes.items():
            value = fill(key, shape)
            for pattern, factor in (factors or {}).items():
                if fnmatch.fnmatchcase(key, pattern):
                    value = value * np.float32(factor)
            tensor = torch.from_numpy(np.asarray(value))
            state[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return state

    def cotangent(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(fill(f"cotangent.{name}", tuple(shape))).to(dtype)

    def error(self, name: str, actual: torch.Tensor) -> float:
        """Relative error against the stored array, or the stored slice of it."""
        described = self.about["arrays"]
        cut = described.get(name, described.get(name.replace("64_", "_", 1), {})).get("slice")
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


@pytest.fixture(scope="session")
def medical_data() -> Path:
    """Real images beside the checkout; a test that needs them is skipped where they are not."""
    if not DATA.is_dir():
        pytest.skip("real medical images (../shared/data/medical) are not here")
    return DATA
