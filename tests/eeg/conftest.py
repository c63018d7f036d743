"""What the EEG tests share: reference values of the authors' code with the rule that makes their weights and inputs, and where real data lie."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "eeg"
DATA = ROOT.parent / "shared" / "data" / "eeg"


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(text.encode()))


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of one entry of an official state dict: a standard normal draw named by the key, scaled by what the key is."""
    z, leaf = _generator(key).standard_normal(shape), key.rsplit(".", 1)[-1]
    if len(shape) == 1:
        return 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    return z / np.sqrt(np.prod(shape[1:]))


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

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def error(self, name: str, actual: torch.Tensor) -> float:
        """Relative error of `actual` against the stored array, or against its stored sample where only that is kept."""
        if name in self.arrays:
            return relative_error(actual, self.arrays[name])
        if tuple(actual.shape) != tuple(self.arrays[f"{name}__shape"]):
            return float("inf")
        return relative_error(actual.detach().reshape(-1)[:: int(self.arrays[f"{name}__stride"])], self.arrays[f"{name}__sample"])

    def state(self, kept: dict[str, torch.Tensor] | None = None, dtype: torch.dtype = torch.float32, **shapes) -> dict[str, torch.Tensor]:
        """The authors' state dict by the rule; `kept` gives the constants that their constructor builds."""
        state = {}
        for key, shape in {**self.about["state_dict"], **shapes}.items():
            if key in self.about["kept"]:
                state[key] = kept[key]
                continue
            offset, factor = self.about["adjust"].get(key, (0.0, 1.0))
            rule = np.asarray(fill(key, tuple(shape)), dtype=np.float32)
            value = np.asarray(offset + factor * rule.astype(np.float64), dtype=np.float32)
            state[key] = torch.from_numpy(value).to(dtype)
        return state

    def probe(self, **outputs: torch.Tensor) -> torch.Tensor:
        """Sum of the outputs times fixed random numbers."""
        return sum((value * torch.from_numpy(_generator(f"r:{name}").standard_normal(tuple(value.shape)).astype(np.float32))).sum()
                   for name, value in outputs.items())  # fmt: skip


@pytest.fixture(scope="session")
def golden():
    """`golden.load(name)` and `golden.relative_error`."""
    return SimpleNamespace(load=Golden, relative_error=relative_error)


@pytest.fixture(scope="session")
def eeg_data() -> Path:
    """Real recordings beside the checkout; a test that needs them is skipped where they are not."""
    if not DATA.is_dir():
        pytest.skip("real EEG recordings (../shared/data/eeg) are not here")
    return DATA


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """An untrained tokenizer with real layers, for windows of three seconds."""
    from foveal.eeg import TFMTokenizer, TokenizerConfig
    from foveal.eeg.predict import Tokenizer
    from foveal.eeg.streaming import Preparation

    torch.manual_seed(0)
    model = TFMTokenizer(TokenizerConfig(width=16, codes=32, frequency_layers=1, temporal_layers=1, decoder_layers=1))
    model.codebook.weight.copy_(torch.nn.functional.normalize(torch.randn(32, 16), dim=1))
    return Tokenizer(model, Preparation(window=3.0), "cpu")


@pytest.fixture(scope="session")
def tiny_weights(tiny_tokenizer, tmp_path_factory) -> Path:
    """A checkpoint file of it."""
    from foveal.core.checkpoint import save_weights

    model, path = tiny_tokenizer.model, tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return save_weights(path, model.state_dict(), system="tfm_tokenizer", config=model.config, metadata={"window_seconds": "3.0"})


@pytest.fixture(scope="session")
def make_raw():
    """Pink noise with a 10 Hz rhythm in 20 microvolt, as an mne.io.Raw."""
    import mne

    def make(seconds: float = 20.0, rate: float = 256.0, names=("Fp1", "C3", "O1"), seed: int = 0):
        generator = np.random.default_rng(seed)
        count = round(seconds * rate)
        spectrum = np.fft.rfft(generator.standard_normal((len(names), count)))
        spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(count, 1 / rate), 0.5))
        noise = np.fft.irfft(spectrum, count)
        noise = noise / noise.std() + 0.5 * np.sin(2 * np.pi * 10 * np.arange(count) / rate)
        return mne.io.RawArray(noise * 20e-6, mne.create_info(list(names), rate, "eeg"), verbose="error")

    return make


@pytest.fixture(scope="session")
def write_edf():
    """Write an mne.io.Raw, or arrays with any channel names, as EDF."""
    from edfio import Edf, EdfSignal

    def write(path: Path, raw, names=None) -> Path:
        rate = raw.info["sfreq"]
        signals = [
            EdfSignal(samples * 1e6, rate, label=name, physical_dimension="uV", physical_range=(-3000, 3000))
            for samples, name in zip(raw.get_data(), names or raw.ch_names, strict=True)
        ]
        Edf(signals).write(path)
        return path

    return write
