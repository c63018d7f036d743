"""The console script ``foveal``: one group of commands a domain, one line for what the user can mend.

Nothing here imports torch: help must answer at once. A command imports what it needs when it runs.

Exit codes: 0 all done; 2 the user can mend it; 130 stopped with Ctrl-C; 1 a bug, with its traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence

import typer

from foveal.apps.options import Json
from foveal.apps.verbs import WholeSentences
from foveal.core.errors import UserError

#: Domain -> what it is for. A domain has a module foveal.apps.<domain> with a typer `app`, and is installed by the extra of its name.
DOMAINS = {
    "audio": "Separate speakers, take noise from speech, speak a text.",
    "eeg": "Turn EEG into tokens and classes, measure how it follows a sound.",
    "detection": "Find objects in pictures and videos, heads and where they are turned, the class of every pixel.",
    "memes": "Score memes for dark humour and harm, with reasons.",
    "medical": "Segment and restore volumes and pictures in their own geometry, classify chest films and slides.",
    "graphs3d": "Predict energy, forces and stress of molecules and materials; keep the rows of a table worth learning from; place objects.",
}


def build() -> typer.Typer:
    """The whole command tree; domains that are not installed stand in it with the way to install them."""
    app = typer.Typer(
        name="foveal",
        cls=WholeSentences,
        help="Attention models that hear, see and measure: trained, checked and applied to your own files.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    app.command("doctor", help="Show versions, devices, and which backend each kernel uses and why.")(_doctor)
    for domain, purpose in DOMAINS.items():
        if importlib.util.find_spec(f"foveal.{domain}") is not None:
            app.add_typer(importlib.import_module(f"foveal.apps.{domain}").app, name=domain, cls=WholeSentences, help=purpose)
        else:
            _add_missing(app, domain, purpose)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"foveal {importlib.metadata.version('foveal')}")
        raise typer.Exit


def _add_missing(app: typer.Typer, domain: str, purpose: str) -> None:
    install = f'pip install "foveal[{domain}]"'

    @app.command(
        domain,
        help=f"{purpose} Not installed: {install}",
        short_help=f"{purpose} Not installed: {install}",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    )
    def missing() -> None:
        raise UserError(f"expected foveal-{domain} to be installed; it is not; run: {install}")


def _options(version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version)) -> None:
    pass


def _doctor(as_json: Json = False) -> None:
    from foveal.apps.doctor import show

    show(as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line (default: the process' own) and exit."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run a command line.

    Returns:
        The exit code. A bug is raised, so that Python prints its traceback and exits with 1.
    """
    if list(arguments) in ([], *([domain] for domain in DOMAINS)):
        arguments = [*arguments, "--help"]
    try:
        code = build()(args=list(arguments), prog_name="foveal", standalone_mode=False)
        return _stopped() if code == 130 else code if isinstance(code, int) else 0
    except UserError as error:
        return _complain(str(error))
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        # Typer's own complaints (unknown option, missing argument) are not in its public names.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "foveal"
        return _complain(f"{message().rstrip('.')}; see {where} --help")


def _stopped() -> int:
    print("foveal: stopped", file=sys.stderr)
    return 130


def _complain(message: str) -> int:
    print(f"foveal: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
