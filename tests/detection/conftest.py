"""What the tests of detection share: the authors' reference values, and the rule that makes the weights they were computed with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden" / "detection"


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of an official tensor, drawn from its name alone."""
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        value = np.exp(0.1 * z)
    elif leaf in ("gamma", "gate") or len(shape) == 0:
        value = 0.5 + 0.1 * z
    elif len(shape) == 1:
        value = 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


class Golden:
    """A reference file: its description and its arrays."""

    def __init__(self, name: str) -> None:
        self.about: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
        self.arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def state(self, shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """The official state dict that the arrays were computed with."""
        state = {}
        for key, shape in shapes.items():
            if key.endswith("num_batches_tracked"):
                state[key] = torch.tensor(0)
            elif "dfl.conv" in key:
                state[key] = torch.arange(16.0).view(1, 16, 1, 1)
            else:
                offset, factor = self.about.get("adjust", {}).get(key, (0.0, 1.0))
                state[key] = torch.from_numpy(np.asarray(offset + factor * fill(key, tuple(shape)).astype("float64"), dtype="float32"))
        return state

    def error(self, name: str, actual: torch.Tensor) -> float:
        """Relative error against the stored array, or against the stored sample of it."""
        value = actual.detach().double().numpy()
        if f"{name}__sample" in self.arrays:
            assert value.shape == tuple(self.arrays[f"{name}__shape"]), name
            value, name = value.reshape(-1)[:: int(self.arrays[f"{name}__stride"])], f"{name}__sample"
        expected = np.asarray(self.arrays[name], dtype=np.float64)
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        error = np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30)
        return float(error) if np.isfinite(error) else float("inf")


def drawn(name: str, shape: tuple[int, ...], prefix: str = "in:") -> torch.Tensor:
    """An input that the reference files name instead of storing: uniform pictures, or with prefix "r:" the normal cotangent of an output."""
    generator = np.random.default_rng(zlib.crc32((prefix + name).encode()))
    return torch.from_numpy((generator.random(shape) if prefix == "in:" else generator.standard_normal(shape)).astype("float32"))


@pytest.fixture(scope="session")
def golden() -> type[Golden]:
    return Golden


@pytest.fixture(scope="session")
def draw() -> Any:
    return drawn


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network at random that finds something almost everywhere, with three classes, as a file."""
    from foveal.core.checkpoint import save_weights
    from foveal.detection import YOLOv13, YOLOv13Config

    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 3))
    for level in model.head.score:
        torch.nn.init.normal_(level[-1].weight, std=0.4)  # type: ignore[index]
        torch.nn.init.constant_(level[-1].bias, 0.0)  # type: ignore[index]
    file = tmp_path_factory.mktemp("weights") / "random.safetensors"
    metadata = {"names": json.dumps(["cat", "dog", "hen"]), "image_size": "64"}
    return save_weights(file, model.state_dict(), system="yolov13", config=model.config, metadata=metadata)
