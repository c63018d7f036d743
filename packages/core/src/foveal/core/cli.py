"""``fit``, ``validate``, ``test`` and ``predict`` of every domain: LightningCLI with a run folder, tracking and exact resuming.

    foveal audio fit --config configs/audio/tiger_small.yaml --trainer.max_epochs 20
    foveal audio fit --config configs/audio/tiger_small.yaml --ckpt_path last

A run writes ``runs/<domain>/<experiment>/<time>/`` with config.yaml, metrics.csv, curves.png, checkpoints/ and wandb/; the experiment is the
config file's name. ``--ckpt_path last`` goes on in the folder of the experiment's newest run. ``predict`` writes ``predictions/`` and config.yaml
into a new folder there, ``test`` its tables and pictures.
"""

from __future__ import annotations

import difflib
import logging
import os
import pickle
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from foveal.core import run_folder
from foveal.core.curves import DrawCurves
from foveal.core.errors import UserError
from foveal.core.predictions import WritePredictions
from foveal.core.progress import ProgressLines
from foveal.core.resume_point import ResumePoint
from foveal.core.tracking import MetricsFile, Wandb

#: Where Lightning reads a checkpoint, first for its hyperparameters.
_READING = {"_parse_ckpt_path", "resume_start"}
#: Where Lightning puts what a checkpoint holds into what the config made.
_RESTORING = {"restore_model", "restore_callbacks", "restore_loops", "restore_optimizers", "restore_lr_schedulers"}

_WANDB = f"{Wandb.__module__}.{Wandb.__qualname__}"


class BestCheckpoint(ModelCheckpoint):
    """``checkpoints/best.ckpt``: the model with the best value of a validation metric.

    Args:
        monitor: name of the metric, such as ``val/si_sdr``; None keeps the newest after each validation.
        mode: whether smaller or larger is better.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["min", "max"] = "min", dirpath: str | None = None) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False)


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, raised for the caller to print, and which takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_condense(str(message))) from ex


def _condense(message: str) -> str:
    """The one line of jsonargparse's paragraph: which key, and what is wrong with the form its value was meant to have."""
    key = re.match(r'Parser key "([^"]+)":\s*', message)
    body = message[key.end() :] if key else message
    # Of a union's alternatives the first is the class or number that was meant; the others are None and lists.
    first = re.search(r"Errors:\n\s+- (.*?)(?=\n\s+- |\n\s*Given value type|\Z)", body, re.DOTALL)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", " ".join((first[1] if first else body).split()))
    return f"{key[1]}: {text}" if key else text


def _refusal(error: BaseException | None) -> UserError | None:
    """What a constructor says against its arguments. Networks know no UserError: theirs is a ValueError that the constructor itself raises."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and frames[-1:] in (["__init__"], ["__post_init__"]):
            return UserError(f"{error}; mend the config or the option")
        error = error.__cause__
    return None


def _misfit(error: Exception, checkpoint: str) -> UserError | None:
    """What Lightning's reading of a checkpoint, or putting it into the model, says against the file."""
    called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    if called & _READING:
        # the unpickler's own advice, to load the file with less care, is not ours
        said = "" if isinstance(error, pickle.UnpicklingError) else re.split(r"\.\s|\n", str(error))[0]
        reason = f": {said}" if said else ""
        return UserError(f"expected a checkpoint that a run wrote; {checkpoint} cannot be read as one{reason}; name a run's last.ckpt or best.ckpt")
    if called & _RESTORING:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return UserError(f"expected a checkpoint of the config's model; {checkpoint} does not fit: {reason}; use that run's settings, or start anew")
    return None


def _without_float64(error: Exception) -> UserError | None:
    """What torch says where float64 is to be put on an Apple GPU, which Lightning chooses by itself where there is one."""
    if isinstance(error, TypeError) and "MPS" in str(error) and "float64" in str(error):
        return UserError("expected a device that has float64, which this computes in; an Apple GPU has none; pass --trainer.accelerator cpu")
    return None


def _refuse_unwritable(parent: Path) -> None:
    """What a run writes goes below this folder; it is made."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"expected a folder for runs that can be written; {parent}: {error.strerror}; choose another with --runs") from None


def _hush() -> None:
    """Leave out what Lightning 2.6 says that a user can do nothing about, or that a resumed run does on purpose."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").addFilter(lambda record: "weights_only" not in record.getMessage())
    warnings.filterwarnings("ignore", message=r".*Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r".*You have overridden `transfer_batch_to_device`")
    warnings.filterwarnings("ignore", message=r".*Couldn't infer the batch indices")
    warnings.filterwarnings("ignore", message=r".*`isinstance\(treespec, LeafSpec\)` is deprecated")


class FovealCLI(LightningCLI):
    """Runs a verb of a domain.

    Args:
        domain: names the folder below ``runs/`` and wandb's project.
        model: base class of the config's ``model``; the config's ``class_path`` names the class.
        data: base class of the config's ``data``.
        args: command line, starting with the verb.
        monitor: the metric that chooses best.ckpt, unless ``--best.monitor`` says otherwise.
        mode: whether its smaller or its larger values are better.
        **kwargs: further arguments of LightningCLI.

    Raises:
        UserError: unknown key, bad value, unreadable config or checkpoint.
        KeyboardInterrupt: the user stopped the run.
    """

    def __init__(
        self,
        domain: str,
        args: list[str],
        *,
        model: type[LightningModule] | Callable[..., LightningModule] | None = None,
        data: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        **kwargs: Any,
    ) -> None:
        _hush()
        self.domain = domain
        self._verb = args[0] if args else ""
        self._best = {"monitor": monitor, "mode": mode}
        self.run_folder: Path | None = None
        kwargs.setdefault("subclass_mode_model", True)
        kwargs.setdefault("subclass_mode_data", True)
        kwargs.setdefault("seed_everything_default", 0)
        try:
            super().__init__(
                model,
                data,
                args=args,
                parser_class=OneLineParser,
                parser_kwargs={"prog": f"foveal {domain}", "description": f"Train and evaluate the models of foveal.{domain}."},
                save_config_kwargs={"overwrite": True},
                **kwargs,
            )
        except (MisconfigurationException, yaml.YAMLError) as error:
            raise UserError(str(error)) from error

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb asked for alone: building a parser takes half a second, and the others' would not be used."""
        every = super().subcommands()
        return {self._verb: every[self._verb]} if self._verb in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str | None, default=None, help="Name of the experiment (default: the config file's name).")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_lightning_class_args(ResumePoint, "resume_point")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        logger = {"class_path": _WANDB, "init_args": {"offline": True}}
        parser.set_defaults({"trainer.logger": logger, "best.monitor": self._best["monitor"], "best.mode": self._best["mode"]})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except UserError as error:
            verb = next((word for word in args if word in self._subcommand_parsers), None)
            refused = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.]+)", str(error))
            hint = ""
            if verb is not None and refused:
                known = [action.dest for action in self._subcommand_parsers[verb]._actions]
                near = difflib.get_close_matches(refused[1] or refused[2], known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
            command = f"foveal {self.domain} {verb}" if verb else f"foveal {self.domain}"
            raise UserError(f"{error}{hint}; see {command} --help") from None

    def _parse_ckpt_path(self) -> None:
        try:
            super()._parse_ckpt_path()
        except UserError:
            raise
        except Exception as error:
            refusal = _misfit(error, str(self.config[self._verb].get("ckpt_path")))
            assert refusal is not None  # it is Lightning's reading that failed
            raise refusal from error

    @property
    def settings(self) -> Namespace:
        """The config of the chosen verb."""
        return self.config[str(self.subcommand)]

    def instantiate_classes(self) -> None:
        """What a task, a data module or a network's config says is wrong with its arguments is said as it is, not inside the parser's account."""
        try:
            super().instantiate_classes()
        except BaseException as error:
            os.environ.pop(run_folder.VARIABLE, None)  # no run begins: the next one of this process has a folder of its own
            refusal = _refusal(error) if isinstance(error, ValueError) else None
            if refusal is None:
                raise
            raise refusal from None

    def before_instantiate_classes(self) -> None:
        settings, fitting = self.settings, self.subcommand == "fit"
        experiment = settings.experiment or self._experiment_of_config()
        wanted = settings.get("ckpt_path")
        resumed = None
        if wanted in ("last", "best"):
            found = run_folder.newest_checkpoint(settings.runs, self.domain, experiment, f"{wanted}.ckpt")
            if found is None:
                where = Path(settings.runs) / self.domain / experiment
                if not (fitting and wanted == "last"):
                    raise UserError(f"expected a run with checkpoints/{wanted}.ckpt below {where}; there is none; run fit first or name a file")
                print(f"no interrupted run below {where}: starting a new one", file=sys.stderr)
            settings.ckpt_path = None if found is None else str(found)
        elif wanted and not Path(wanted).exists():
            raise UserError(f"expected a checkpoint file, 'last' or 'best'; {wanted} does not exist; check --ckpt_path")
        if fitting and settings.ckpt_path:
            resumed = run_folder.run_of(settings.ckpt_path)
        if self.subcommand in ("fit", "predict") and not settings.trainer.get("fast_dev_run"):
            _refuse_unwritable(Path(settings.runs) / self.domain / experiment)
        told = run_folder.VARIABLE in os.environ
        folder = resumed if resumed and not told else run_folder.new_run_folder(settings.runs, self.domain, experiment)
        if not settings.trainer.get("fast_dev_run"):
            os.environ[run_folder.VARIABLE] = str(folder)
        self.run_folder = folder
        if self.subcommand == "predict":
            settings.return_predictions = bool(settings.return_predictions)  # they are written as they come: all together may be more than memory
            settings.trainer.default_root_dir = settings.trainer.default_root_dir or str(folder)  # config.yaml goes there
        elif not fitting:
            self.save_config_callback = None  # it would replace a config.yaml of the working folder
        if not fitting and not settings.ckpt_path and not told:
            print(
                f"no --ckpt_path: this is the network as the config makes it, without what a run learned; see foveal {self.domain} fit",
                file=sys.stderr,
            )
        settings.resume_point.folder = settings.best.dirpath = str(folder / "checkpoints") if fitting else None
        self._place_logger(settings, folder, experiment)
        if resumed and not told:
            print(f"resuming {folder} from {Path(settings.ckpt_path).name}", file=sys.stderr)

    def _experiment_of_config(self) -> str:
        files = self.settings.get("config") or self.config.get("config") or []
        return Path(str(files[-1])).stem if files else "unnamed"

    def _place_logger(self, settings: Namespace, folder: Path, experiment: str) -> None:
        logger = settings.trainer.logger
        if isinstance(logger, Namespace) and logger.class_path == _WANDB:
            if self.subcommand != "fit":
                settings.trainer.logger = False  # validation prints its table; wandb follows trainings
                return
            init = logger.init_args
            init.save_dir = init.save_dir or str(folder)
            init.project = init.project or f"foveal-{self.domain}"
            init.name = init.name or f"{experiment} {folder.name}"
            init.run_id = init.run_id or f"{experiment}-{folder.name}"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.run_folder is not None
        chosen = self._get(self.config_init, "trainer")
        quiet = chosen.get("fast_dev_run") or self.subcommand != "fit"
        loggers = chosen.get("logger")
        listed = loggers if isinstance(loggers, list) else [loggers] if loggers not in (None, True, False) else []
        callbacks: list[Callback] = list(chosen.get("callbacks") or [])
        if not quiet:
            kwargs["logger"] = [*listed, MetricsFile(self.run_folder)]
            callbacks.append(DrawCurves(self.run_folder))
        if self.subcommand == "predict" and not chosen.get("fast_dev_run"):
            callbacks.append(WritePredictions(self.run_folder / "predictions"))
        if chosen.get("enable_progress_bar") is not False:
            on_terminal = sys.stderr.isatty()
            kwargs["enable_progress_bar"] = on_terminal
            callbacks.append(RichProgressBar() if on_terminal else ProgressLines())
        try:
            return super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except ValueError as error:  # the trainer's own checks: accelerator, devices, strategy, precision
            raise UserError(f"{error}; see foveal {self.domain} {self.subcommand} --help") from error

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            # Lightning turns Ctrl-C into exit code 1 after tidying up.
            if self.trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
        except (MisconfigurationException, UserError):
            raise
        except Exception as error:
            refusal = _without_float64(error) or _misfit(error, str(self.settings.get("ckpt_path")))
            if refusal is None:
                raise
            raise refusal from error
        finally:
            os.environ.pop(run_folder.VARIABLE, None)
