"""What the audio tests share: reference values of the authors' code with the rule that makes their weights and inputs, and stand-ins for a
trained network whose separation is known exactly.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from foveal.audio.enhance import Enhancer
from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig
from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.audio.predict import Separator
from foveal.audio.recordings import RecordingProcessor
from foveal.core.checkpoint import save_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "audio"


def _normal(text: str, shape) -> np.ndarray:
    generator = np.random.RandomState(zlib.crc32(text.encode()))
    return generator.standard_normal(tuple(shape) or (1,)).astype(np.float32).reshape(shape)


def fill(key: str, shape) -> torch.Tensor:
    """Value of one entry of an official state dict: a standard normal draw named by the key, scaled by what the key is."""
    z = _normal(key, shape)
    if key.endswith("A_log"):
        z = np.log(np.arange(1, shape[1] + 1, dtype=np.float32))[None].repeat(shape[0], 0) + 0.01 * z
    elif len(shape) > 1 and not key.endswith(("gamma", "beta")):
        z = z / np.sqrt(np.prod(shape[1:]))
    elif key.endswith("act.weight"):
        z = 0.25 + 0.05 * z
    elif key.endswith(("bias", "beta")):
        z = 0.1 * z
    else:
        z = 1 + 0.1 * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def signal(samples: int, seed: int) -> torch.Tensor:
    """A 220 Hz tone beating at 3 Hz in white noise."""
    t = np.arange(samples) / 16000.0
    noise = 0.05 * np.random.RandomState(seed).standard_normal(samples)
    return torch.from_numpy((0.1 * np.sin(2 * np.pi * 220 * t) * (1 + np.sin(2 * np.pi * 3 * t)) + noise).astype(np.float32))


def draw(name: str, shape, salt: str = "", kind: str = "in") -> torch.Tensor:
    """Any other input, by its name."""
    return torch.from_numpy(_normal(f"{salt}{kind}:{name}", shape))


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected||, infinite where a value is not finite or the shapes differ."""
    actual = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    if actual.shape != expected.shape:
        return float("inf")
    error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


class Golden:
    """One reference file: `about` (json) and its arrays."""

    def __init__(self, name: str) -> None:
        self.about = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
        self.arrays = np.load(GOLDEN / f"{name}.npz")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def error(self, name: str, actual: torch.Tensor) -> float:
        """Relative error of `actual` against the stored array, or against its stored sample where only that is kept."""
        if name in self.arrays:
            return relative_error(actual, self.arrays[name])
        if f"{name}__sample" not in self.arrays:  # float64 runs keep the sample alone
            raise KeyError(name)
        single = name.replace("out64_", "out_").replace("mid64_", "mid_")
        if tuple(actual.shape) != tuple(self.arrays[f"{single}__shape"]):
            return float("inf")
        return relative_error(actual.detach().reshape(-1)[:: int(self.arrays[f"{single}__stride"])], self.arrays[f"{name}__sample"])

    def state(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """The authors' state dict by the rule."""
        shapes = (
            self.about.get("state_dict") or json.loads((GOLDEN / self.about["state_dict_of"].split()[0]).read_text(encoding="utf-8"))["state_dict"]
        )
        return {key: fill(key, shape).to(dtype) for key, shape in shapes.items()}


@pytest.fixture(scope="session")
def golden():
    """Everything the parity tests need: `golden.load(name)`, `golden.signal`, `golden.draw`, `golden.fill`, `golden.relative_error`."""
    return SimpleNamespace(load=Golden, signal=signal, draw=draw, fill=fill, relative_error=relative_error)


#: A TIGER with everything in it, small enough for tests.
TINY = TIGERConfig(channels=8, hidden_channels=8, blocks=1, scales=3, heads=2, head_channels=2)


class BandSplitter(TIGER):
    """Gives one speaker what is below 1 kHz and the other what is above: local in time, so chunks cannot matter.

    Args:
        shuffle: Swap the two at random from call to call, as a network may.
    """

    def __init__(self, shuffle: bool = False) -> None:
        super().__init__(TINY)
        self.generator = torch.Generator().manual_seed(1)
        self.shuffle, self.swaps = shuffle, []

    def masks(self, mixture: Tensor) -> Tensor:
        frames, bins = mixture.shape[-1] // self.config.hop + 1, self.config.bins
        low = torch.sigmoid((1000 - torch.linspace(0, self.config.sample_rate / 2, bins)) / 50)
        masks = torch.stack([low, 1 - low]).to(torch.complex64)[None, :, :, None].expand(len(mixture), -1, -1, frames)
        self.swaps.append(self.shuffle and bool(torch.rand((), generator=self.generator) < 0.5))
        return masks.flip(1) if self.swaps[-1] else masks


@pytest.fixture
def band_splitter() -> type[BandSplitter]:
    return BandSplitter


@pytest.fixture(scope="session")
def tiny_tiger() -> TIGER:
    """An untrained network with real layers."""
    torch.manual_seed(0)
    return TIGER(TINY).eval()


@pytest.fixture(scope="session")
def tiny_separator(tiny_tiger: TIGER) -> Separator:
    return Separator(tiny_tiger, "cpu", chunk_seconds=2)


@pytest.fixture(scope="session")
def tiny_weights(tiny_tiger: TIGER, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint file of it."""
    return save_weights(tmp_path_factory.mktemp("weights") / "tiny.safetensors", tiny_tiger.state_dict(), system="tiger", config=TINY)


@pytest.fixture(scope="session")
def tiny_mambattention() -> MambAttention:
    """An untrained network with real layers."""
    torch.manual_seed(0)
    return MambAttention(MambAttentionConfig(fft=64, window=64, hop=32, channels=8, heads=2, blocks=1, state=4, expansion=2, dense_layers=2)).eval()


@pytest.fixture(params=["separator", "enhancer"])
def processor(request: pytest.FixtureRequest, tiny_separator: Separator, tiny_mambattention: MambAttention) -> RecordingProcessor:
    """Either of those that take a user's recordings."""
    return tiny_separator if request.param == "separator" else Enhancer(tiny_mambattention, "cpu", chunk_seconds=2)
