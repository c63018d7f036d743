"""What the speech synthesis tests share: the rule that makes the weights of ESPnet's reference runs."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden" / "audio"


def _fill(key: str, shape: list[int]) -> Tensor:
    """Value of one entry of ESPnet's state dict; counters and the weight of the stop loss stay as the constructor makes them."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if key.endswith("pos_weight"):
        return torch.tensor(5.0)
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape) or (1,)).astype(np.float32).reshape(shape)
    if key.endswith("running_var"):
        z = 1 + 0.1 * np.abs(z)
    elif key.endswith(("running_mean", "bias")):
        z = 0.1 * z
    elif len(shape) <= 1:
        z = 1 + 0.1 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


@pytest.fixture(scope="session")
def espnet_state():
    """`espnet_state(name, dtype)`: ESPnet's state dict of a reference file."""

    def state(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        shapes = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["state_dict"]
        return {key: value.to(dtype) if (value := _fill(key, shape)).is_floating_point() else value for key, shape in shapes.items()}

    return state


@pytest.fixture(scope="session")
def soobinseo_state():
    """`soobinseo_state(dtype)`: the state dict of soobinseo's reference runs; its tables of positions are built, as the reference's are."""

    def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        shapes = json.loads((GOLDEN / "soobinseo_transformer_tts.json").read_text(encoding="utf-8"))["state_dict"]
        values = {key: _sinusoids(*shape) if "pos_emb" in key else _fill(key, shape) for key, shape in shapes.items()}
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in values.items()}

    return state


def _sinusoids(rows: int, dim: int) -> Tensor:
    angles = np.arange(rows)[:, None] / np.power(10_000, 2 * (np.arange(dim) // 2) / dim)
    table = np.where(np.arange(dim) % 2, np.cos(angles), np.sin(angles))
    table[0] = 0.0
    return torch.from_numpy(table.astype(np.float32))


@pytest.fixture(scope="session")
def tiny_voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of a voice whose sentences end by themselves after a few steps."""
    from foveal.audio.models.transformer_tts import TransformerTTS, TransformerTTSConfig
    from foveal.audio.voice import Voice
    from foveal.core.checkpoint import save_weights

    voice = Voice()
    config = TransformerTTSConfig(
        symbols=len(voice.vocabulary), dim=16, heads=2, encoder_layers=1, encoder_hidden=16, decoder_layers=2, decoder_hidden=16,
        frame_prenet_channels=8, postnet_layers=1, postnet_channels=8, reduction=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TransformerTTS(config).eval()
    with torch.no_grad():
        model.stop.bias += 0.4  # the probability passes a half now and then
    path = tmp_path_factory.mktemp("voice") / "tiny.safetensors"
    return save_weights(path, model.state_dict(), system="transformer_tts", config=config, metadata={"voice": voice.to_json()})
