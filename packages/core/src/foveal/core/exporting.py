"""A trained network out of a run: the weights of a checkpoint, and what the run's config.yaml says about them.

Every domain's ``python -m foveal.<domain>.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors`` stands on this. With weight averaging in the
config, a checkpoint's weights are the averaged ones, and so are those that are written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor, nn

from foveal.core.errors import UserError
from foveal.core.official import read_official
from foveal.core.run_folder import run_of


class Kind(NamedTuple):
    """A network that runs may train: its system's name in weight files, its class, and the class of its config."""

    system: str
    build: Callable[[Any], nn.Module]
    config: Callable[..., Any]


@dataclass(frozen=True)
class TrainedRun:
    """What a checkpoint and the config.yaml of its run hold.

    Attributes:
        folder: of the run.
        settings: the config.
        checkpoint: all that Lightning and the task wrote.
    """

    folder: Path
    settings: dict[str, Any]
    checkpoint: dict[str, Any]

    @property
    def state(self) -> dict[str, Tensor]:
        """The task's whole state dict."""
        return self.checkpoint["state_dict"]

    @property
    def steps(self) -> int:
        """That the optimiser had made."""
        return int(self.checkpoint["global_step"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those of the task's ``network``, without that prefix."""
        return {key.removeprefix("network."): value for key, value in self.state.items() if key.startswith("network.")}

    @property
    def task(self) -> str:
        """Name of the task's class."""
        return self.settings["model"]["class_path"].rpartition(".")[2]

    def trained(self, kinds: Mapping[str, Kind]) -> tuple[str, Any]:
        """System and config of the network that the config names, its weights held against the class.

        Args:
            kinds: by the name of the network's class.

        Raises:
            UserError: the run trains another network.
        """
        network = self.settings["model"]["init_args"]["network"]
        name = network["class_path"].rpartition(".")[2]
        if name not in kinds:
            raise UserError(f"expected a run that trains {' or '.join(kinds)}; {self.folder} trains {network['class_path']}; choose another run")
        kind = kinds[name]
        config = kind.config(**(network.get("init_args", {}).get("config") or {}))
        kind.build(config).load_state_dict(self.weights)  # every key and shape is looked at
        return kind.system, config


def read_run(checkpoint: str | Path) -> TrainedRun:
    """Read ``last.ckpt`` or ``best.ckpt`` of a run's folder; nothing that is pickled in it runs.

    Raises:
        UserError: not a checkpoint in a run's folder.
    """
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"expected a checkpoint in the checkpoints folder of a run, beside its config.yaml; got {checkpoint}")
    if not Path(checkpoint).is_file():
        raise UserError(f"expected a checkpoint of {run.name}; {checkpoint} does not exist; check the path")
    return TrainedRun(run, yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")), read_official(checkpoint))


def export_command(
    export: Callable[..., Path],
    description: str,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    arguments: list[str] | None = None,
) -> int:
    """The command line of an `export` function: checkpoint, target, ``--card FILE``, and what `options` adds, each passed on by its name.

    What it would write, weights and card, is not replaced without ``--overwrite``.

    Returns:
        The exit code: 2 for what the user can mend, said in one line.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path, help="last.ckpt or best.ckpt in a run's folder")
    parser.add_argument("target", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument("--card", type=Path, help="Markdown file to put beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options(parser)
    asked = vars(parser.parse_args(arguments))
    try:
        card, overwrite, target = asked.pop("card"), asked.pop("overwrite"), asked["target"]
        if card is not None and not card.is_file():
            raise UserError(f"expected a Markdown file for --card; {card} is none")
        beside = target.with_suffix(".md")
        written = [target] if card is None or card.resolve() == beside.resolve() else [target, beside]
        existing = next((file for file in written if file.exists()), None)
        if existing is not None and not overwrite:
            raise UserError(f"{existing} already exists; pass --overwrite to replace it, or choose another file")
        print(export(**asked, card=None if card is None else card.read_text(encoding="utf-8")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
