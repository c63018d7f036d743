"""A domain's published systems: what they are, and their authors' checkpoints to our models and back.

A domain says what is its own, one `Adapter` a system: the config and model, the authors' keyword names, and the table of keys. What every domain
promises in the same words (`load_official`, `to_official`, `systems`, ``convert``) is here, once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.official import Conversion, Table, read_official, state_dict_of, to_official, to_ours


@dataclass(frozen=True)
class System:
    """A published system that a domain re-makes.

    Attributes:
        name: the word that `load_official` and ``foveal <domain> convert`` take.
        title: what it does, and for which data.
        paper: authors, title, venue.
        parameters: of the published main configuration.
        repository: where the authors' code is.
        licence: of the authors' code.
    """

    name: str
    title: str
    paper: str
    parameters: int
    repository: str
    licence: str


@dataclass(frozen=True)
class Adapter:
    """How the authors' form of a system and ours go into each other.

    Attributes:
        system: what it is.
        config: our config dataclass; it may raise ValueError for sizes that cannot be.
        build: our model of a config; it is also given the authors' state dict where there is one, whose keys may tell which form is meant.
        table: where each tensor of a model stands in the authors' state dict.
        model: class that models of this system are instances of, to refuse others by.
        keywords: the authors' keyword name -> field of our config.
        defaults: fields of our config that the published main configuration sets otherwise than our dataclass.
        ignored: keywords that the authors' constructor takes and does not use.
        unused: regular expression of an official key -> why ours has no place for it.
        renames: regular expression of a name that a tensor also goes by, as libraries rename their modules -> the table's name for it.
        restored: our model of a config and of a state dict of ours, whose keys may tell which form is meant; None is `build` without a state dict.
    """

    system: System
    config: Callable[..., Any]
    build: Callable[[Any, Mapping[str, Tensor] | None], nn.Module]
    table: Callable[[Any], Table]
    model: type[nn.Module] | tuple[type[nn.Module], ...]
    keywords: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    restored: Callable[[Any, Mapping[str, Tensor]], nn.Module] | None = None

    def renamed(self, official: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state dict under the table's names."""
        names = {key: key for key in official}
        for pattern, name in self.renames.items():
            names = {key: re.sub(pattern, name, value) for key, value in names.items()}
        return {names[key]: value for key, value in official.items()}

    def config_of(self, keywords: Mapping[str, Any]) -> Any:
        """Our config from the authors' keywords.

        Raises:
            UserError: an unknown keyword, or sizes that cannot be.
        """
        unknown = [name for name in keywords if name not in self.keywords and name not in self.ignored]
        if unknown:
            raise UserError(f"expected keywords of the authors' constructor ({', '.join(self.keywords)}); got {', '.join(unknown)}")
        given = {self.keywords[name]: value for name, value in keywords.items() if name in self.keywords}
        self._refuse_other_types(keywords)
        try:
            return self.config(**{**self.defaults, **given})
        except (TypeError, ValueError) as error:
            raise UserError(f"expected a config that makes a {self.system.name}: {error}") from None

    def _refuse_other_types(self, keywords: Mapping[str, Any]) -> None:
        """A dataclass takes text for a number and fails far from here."""
        usual = {field.name: field.default for field in fields(self.config)} if is_dataclass(self.config) else {}
        for name, value in keywords.items():
            default = usual.get(self.keywords.get(name, ""))
            numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
            if numeric and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UserError(f"expected a number for {name}, such as {default}; got {value!r}")


class PublishedSystems:
    """The systems of one domain.

    Args:
        domain: its name, for messages.
        *adapters: one a system.
    """

    def __init__(self, domain: str, *adapters: Adapter) -> None:
        self._domain = domain
        self._adapters = {adapter.system.name: adapter for adapter in adapters}

    def list(self) -> tuple[System, ...]:
        """What there is."""
        return tuple(adapter.system for adapter in self._adapters.values())

    def load_official(
        self, system: str, source: str | Path | Mapping[str, Tensor], keywords: Mapping[str, Any] | None = None
    ) -> tuple[nn.Module, Conversion]:
        """Our model with the authors' weights, in eval mode and in their dtype, and the account of every key.

        Args:
            system: its name.
            source: the authors' file, a folder with their ``config.json`` and weights, or a state dict with their keys.
            keywords: in the authors' names; the published main configuration is the default.

        Raises:
            UserError: unknown system or keyword, an unreadable file, or keys that are missing, left over or misshapen.
        """
        adapter, keywords = self._adapter(system), dict(keywords or {})
        if isinstance(source, (str, Path)) and Path(source).is_dir():
            source, published = hub_folder(source)
            keywords = {**published, **keywords}
        config = adapter.config_of(keywords)
        official = adapter.renamed(state_dict_of(source if isinstance(source, Mapping) else read_official(source)))
        model = adapter.build(config, official)
        conversion = to_ours(adapter.table(model), official, {key: value.shape for key, value in model.state_dict().items()}, adapter.unused)
        dtype = next((value.dtype for value in official.values() if value.is_floating_point()), None)
        model.to(dtype).load_state_dict(conversion.state)
        return model.eval(), conversion

    def to_official(self, system: str, model: nn.Module) -> Conversion:
        """The authors' state dict of our model, and the account of every key.

        Raises:
            UserError: unknown system, or a model that is not of it or has parts that the authors' has not.
        """
        adapter = self._adapter(system)
        if not isinstance(model, adapter.model):
            raise UserError(f"expected a model of system {system}; got {type(model).__name__}")
        return to_official(adapter.table(model), model.state_dict())

    def from_weights(self, path: str | Path, system: str) -> nn.Module:
        """The model that a file of ours (`foveal.core.checkpoint.save_weights`) holds, in float32 and eval mode.

        Raises:
            UserError: the file is missing, corrupt, of another program or system, or its weights do not fit its config.
        """
        adapter, weights = self._adapter(system), load_weights(path, system)
        try:
            config = adapter.config(**weights.config)
            model = adapter.build(config, None) if adapter.restored is None else adapter.restored(config, weights.state)
            model.load_state_dict(weights.state)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"expected weights of {system} that fit the config in their header; those in {path} do not: {reason}") from None
        return model.eval()

    def convert(
        self, system: str, source: str | Path, target: str | Path, back: bool = False, keywords: Mapping[str, Any] | None = None
    ) -> Conversion:
        """Convert the authors' checkpoint file to ours, or with `back` ours to theirs; the account of every key is returned.

        Raises:
            UserError: as `load_official` and `from_weights`; keywords with `back`, where our file says them; or a target that cannot be written.
        """
        if back and keywords:
            raise UserError(f"expected no keywords on the way back, since our file holds its config; got {', '.join(keywords)}; leave them out")
        if back:
            conversion = self.to_official(system, self.from_weights(source, system))
            with atomic_write(target) as temporary:
                save_file(conversion.state, temporary) if temporary.suffix == ".safetensors" else torch.save(conversion.state, temporary)
            return conversion
        model, conversion = self.load_official(system, source, keywords)
        config: Any = model.config
        about = self.header(system, source, keywords or {})
        save_weights(target, model.state_dict(), system=system, config=asdict(config), metadata=about)
        return conversion

    def header(self, system: str, source: str | Path, keywords: Mapping[str, Any]) -> dict[str, str]:
        """What the header of a converted file says besides system and config; a domain may know more of what was converted."""
        return {}

    def _adapter(self, system: str) -> Adapter:
        if system not in self._adapters:
            raise UserError(f"expected a system of foveal.{self._domain} ({', '.join(self._adapters)}); got {system!r}")
        return self._adapters[system]


#: Names that hubs give a folder's weights, the one to read first where there are several forms of them.
_HUB_NAMES = ("model.safetensors", "pytorch_model.bin")


def hub_folder(place: str | Path) -> tuple[Path, dict[str, Any]]:
    """Weights and keywords of a folder as a hub publishes it: config.json beside the weights.

    Of several files of weights the one of the hub's own name is meant.

    Raises:
        UserError: no weights in it, several of other names, or a config.json that is none.
    """
    folder = Path(place)
    settings = folder / "config.json"
    found = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth", ".pt") and not file.name.startswith("."))
    if not found:
        raise UserError(f"expected the authors' weights (.safetensors, .bin, .pth or .pt) in folder {folder}; found none; name the file")
    weights = found[0] if len(found) == 1 else next((folder / name for name in _HUB_NAMES if folder / name in found), None)
    if weights is None:
        listed = ", ".join(file.name for file in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
        raise UserError(f"expected one file of weights in folder {folder}, or one named {' or '.join(_HUB_NAMES)}; found {listed}; name the file")
    try:
        return weights, json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"expected JSON in {settings}: {error}; download it again") from None
