"""The classifier of films that a config names: a backbone of torchvision or timm, with MEDUSA's attention at its scales or as a baseline without."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveal.core.errors import UserError
from foveal.medical.models.medusa import Medusa, MedusaConfig

#: Stages of torchvision's families, by the beginning of the name; timm's say them themselves.
_STAGES = {
    "resnet": ("layer1", "layer2", "layer3", "layer4"),
    "resnext": ("layer1", "layer2", "layer3", "layer4"),
    "wide_resnet": ("layer1", "layer2", "layer3", "layer4"),
    "densenet": ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features.denseblock4"),
    "convnext": ("features.1", "features.3", "features.5", "features.7"),
    "efficientnet": ("features.2", "features.3", "features.5", "features.7"),
    "mobilenet_v3_small": ("features.1", "features.3", "features.8", "features.12"),
    "mobilenet_v3_large": ("features.3", "features.6", "features.12", "features.16"),
    "vgg": (),
}


@dataclass(frozen=True)
class FilmNetConfig:
    """What the network is.

    Attributes:
        classes: to tell apart.
        backbone: a name of torchvision.models, such as resnet50, or of timm with that before it, such as timm/convnext_tiny.
        stages: names of the backbone's submodules that get attention; none takes the family's four scales.
        attention: sizes of MEDUSA's attention; None is the backbone alone.
    """

    classes: int = 2
    backbone: str = "resnet50"
    stages: tuple[str, ...] = ()
    attention: MedusaConfig | None = field(default_factory=MedusaConfig)

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(f"expected at least 2 classes; got {self.classes}")
        object.__setattr__(self, "stages", tuple(self.stages))
        if isinstance(self.attention, Mapping):  # out of a header in JSON
            object.__setattr__(self, "attention", MedusaConfig(**self.attention))


class FilmNet(nn.Module):
    """Films to logits.

    Args:
        config: what it is.
        initial: weights that the backbone starts from: "published" has torchvision or timm fetch theirs, a file holds a state dict of theirs whose
            last layer may be of other classes; None starts at random.

    Raises:
        UserError: an unknown backbone or stage, a library that is not installed, or weights that do not fit.
    """

    def __init__(self, config: FilmNetConfig | None = None, initial: str | None = None) -> None:
        super().__init__()
        self.config = config = config or FilmNetConfig()
        backbone = _backbone(config, initial == "published")
        if initial not in (None, "published"):
            _start_from(backbone, Path(str(initial)))
        self.network: Medusa | nn.Module = backbone
        if config.attention is not None:
            try:
                self.network = Medusa(backbone, config.stages or _stages_of(config.backbone, backbone), config.attention)
            except ValueError as error:
                raise UserError(f"{error}; set stages") from None

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        out: Tensor = self.network(image)
        return out

    @torch.no_grad()
    def attended(self, image: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, "batch rows columns"]]:
        """Stage -> how much of each place passes on, from 0 to 1, mean of the channels; for pictures. Empty without attention."""
        return self.network.attended(image) if isinstance(self.network, Medusa) else {}


def _backbone(config: FilmNetConfig, published: bool) -> nn.Module:
    library, _, name = config.backbone.rpartition("/")
    package = {"": "torchvision.models", "torchvision": "torchvision.models", "timm": "timm"}.get(library)
    if package is None:
        raise UserError(f"expected a backbone of torchvision, such as resnet50, or timm/NAME; got {config.backbone}")
    try:
        models: Any = importlib.import_module(package)
    except ModuleNotFoundError:
        raise UserError(f"expected {package.partition('.')[0]} for backbone {config.backbone}; install foveal-medical[films]") from None
    known = models.list_models()
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, 3)
        raise UserError(f"expected a name of {package} for the backbone; got {name}{'; did you mean ' + ', '.join(near) + '?' if near else ''}")
    if library == "timm":
        return models.create_model(name, pretrained=published, num_classes=config.classes)
    if not published:
        return models.get_model(name, weights=None, num_classes=config.classes)
    fetched = models.get_model(name, weights="DEFAULT").state_dict()
    network: nn.Module = models.get_model(name, weights=None, num_classes=config.classes)
    _load_all_but_the_last_layer(network, fetched, name)
    return network


def _stages_of(name: str, backbone: nn.Module) -> tuple[str, ...]:
    described: Any = getattr(backbone, "feature_info", None)
    if described is not None:
        own = dict(backbone.named_modules())
        modules = [entry["module"] for entry in (described if isinstance(described, list) else described.info)]
        return tuple(dict.fromkeys(module for module in modules if module in own))[-4:]
    family = max((family for family in _STAGES if name.rpartition("/")[2].startswith(family)), key=len, default="")
    if not _STAGES.get(family):
        children = ", ".join(module for module, _ in backbone.named_children())
        raise UserError(f"expected stages for backbone {name}, names of its submodules that give maps (it has {children}); set stages")
    return _STAGES[family]


def _start_from(backbone: nn.Module, path: Path) -> None:
    from foveal.core.official import read_official, state_dict_of

    if not path.is_file():
        raise UserError(f"expected initial weights of the backbone, a file or published; {path} does not exist")
    _load_all_but_the_last_layer(backbone, state_dict_of(read_official(path)), str(path))


def _load_all_but_the_last_layer(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    own = backbone.state_dict()
    last = list(backbone.named_parameters())[-1][0].rpartition(".")[0]
    wrong = [key for key, value in own.items() if not key.startswith(f"{last}.") and (key not in state or state[key].shape != value.shape)]
    if wrong:
        raise UserError(f"expected weights of the backbone in {source}; {len(wrong)} tensors are missing or misshapen, such as {wrong[0]}")
    backbone.load_state_dict({key: state[key] if key in state and state[key].shape == value.shape else value for key, value in own.items()})
