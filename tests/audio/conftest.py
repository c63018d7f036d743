"""Stand-ins for a trained network, with its face: what they separate is known exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.audio.predict import Separator
from foveal.core.checkpoint import save_weights

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
