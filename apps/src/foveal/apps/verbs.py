"""The verbs that every domain has in the same words: ``fit``, ``validate``, ``test``, ``predict`` and ``convert``; and how help lists verbs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

#: What every domain has; a domain's help lists its own verbs first.
SHARED = ("fit", "validate", "test", "predict", "convert")

_TO_LIGHTNING = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


class WholeSentences(TyperGroup):
    """Commands whose help gives the whole first sentence of each, over several lines where it is long, and what every domain has apart."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sentences = {name: command.get_short_help_str(limit=1000) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))}
        own = [(name, sentence) for name, sentence in sentences.items() if name not in SHARED]
        shared = [(name, sentences[name]) for name in SHARED if name in sentences]
        for title, rows in (("Commands", own), ("Training, evaluation and the authors' checkpoints", shared)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def add_training(app: typer.Typer, domain: str, example: str) -> None:
    """Give a domain's commands Lightning's own verbs; `example` is a config file to name in the help."""
    purposes = {
        "fit": f"Train: --config {example}; --ckpt_path last resumes; --help for all.",
        "validate": "Measure a checkpoint on the validation data: --config FILE --ckpt_path FILE.",
        "test": "Measure a checkpoint on the test data: --config FILE --ckpt_path FILE.",
        "predict": "Run a checkpoint over a config's data and keep the answers (runs/.../predictions): --config FILE --ckpt_path FILE.",
    }
    for verb, purpose in purposes.items():
        _add_lightning_verb(app, domain, verb, purpose)


def _add_lightning_verb(app: typer.Typer, domain: str, verb: str, purpose: str) -> None:
    @app.command(verb, context_settings=_TO_LIGHTNING, help=purpose)
    def run(context: typer.Context) -> None:
        from foveal.core.cli import FovealCLI

        FovealCLI(domain, [verb, *context.args])


def add_convert(app: typer.Typer, domain: str) -> None:
    """Give a domain's commands ``convert``, which calls `convert_file` of its ``checkpoints``."""

    @app.command()
    def convert(
        system: Annotated[str, typer.Argument(help="Name of the published system; the answer to any other word lists them.")],
        source: Annotated[Path, typer.Argument(help="The authors' checkpoint (.safetensors, .pt, .pth, .bin, .ckpt); with --back: ours.")],
        target: Annotated[Path, typer.Argument(help="File to write.")],
        back: Annotated[bool, typer.Option("--back", help="From ours to the authors' keys.")] = False,
        keywords: Annotated[
            list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A keyword of the authors' constructor; repeatable.")
        ] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    ) -> None:
        """Convert the authors' published checkpoint to ours, every key accounted for; --back converts ours to theirs."""
        from foveal.core.errors import UserError

        given = _keywords(keywords or [])
        if target.exists() and not overwrite:
            raise UserError(f"{target} already exists; pass --overwrite to replace it, or choose another file")
        convert_file = importlib.import_module(f"foveal.{domain}.checkpoints").convert_file
        typer.echo(convert_file(system, source, target, back=back, **given))


def _keywords(settings: list[str]) -> dict[str, Any]:
    """NAME=VALUE as keywords; numbers, true, false, null and lists are JSON, all else is text."""
    from foveal.core.errors import UserError

    pairs = [setting.partition("=") for setting in settings]
    own = ("system", "source", "target", "back")  # of the command itself
    wrong = [name + equals + value for name, equals, value in pairs if not name.isidentifier() or not value or name in own]
    if wrong:
        raise UserError(f"expected --set NAME=VALUE, such as num_blocks=4; got {', '.join(wrong)}")
    return {name: _value(text) for name, _, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
