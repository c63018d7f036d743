"""``foveal audio``: separate recordings, train and evaluate the models, convert the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)

_TO_LIGHTNING = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def _lightning(verb: str, arguments: list[str]) -> None:
    from foveal.core.cli import FovealCLI

    FovealCLI("audio", [verb, *arguments])


@app.command(context_settings=_TO_LIGHTNING, help="Train: --config configs/audio/tiger_small.yaml; --ckpt_path last resumes; --help for all.")
def fit(context: typer.Context) -> None:
    _lightning("fit", context.args)


@app.command(context_settings=_TO_LIGHTNING, help="Measure a checkpoint on the validation data: --config FILE --ckpt_path FILE.")
def validate(context: typer.Context) -> None:
    _lightning("validate", context.args)


@app.command(context_settings=_TO_LIGHTNING, help="Measure a checkpoint on the test data: --config FILE --ckpt_path FILE.")
def test(context: typer.Context) -> None:
    _lightning("test", context.args)


@app.command(context_settings=_TO_LIGHTNING, help="Run a checkpoint over a config's data: --config FILE --ckpt_path FILE.")
def predict(context: typer.Context) -> None:
    _lightning("predict", context.args)


@app.command()
def separate(
    files: Annotated[list[Path] | None, typer.Argument(help="Recordings, or folders of them: wav, flac, ogg, mp3; any rate; mono or stereo.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the separated files.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Separate a mixture of two real speakers that ships with the package, and score it.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights (.safetensors); default: the small trained model of the package.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda[:N].")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs instead of keeping them.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    chunk_seconds: Annotated[float | None, typer.Option(help="Length of the overlapping chunks that long recordings are cut into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for machines.")] = False,
) -> None:
    """Separate the speakers of recordings: one file a speaker, at the recording's own sample rate and length."""
    from foveal.audio.predict import separate_command

    raise typer.Exit(
        separate_command(
            files or [],
            output=output,
            demo=demo,
            checkpoint=checkpoint,
            device=device,
            overwrite=overwrite,
            seed=seed,
            chunk_seconds=chunk_seconds,
            as_json=as_json,
        )
    )


@app.command()
def convert(
    system: Annotated[str, typer.Argument(help="Name of the system, such as tiger.")],
    source: Annotated[Path, typer.Argument(help="The authors' checkpoint (.safetensors, .pt, .pth, .bin, .ckpt); with --back: ours.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    back: Annotated[bool, typer.Option("--back", help="From ours to the authors' keys.")] = False,
    keywords: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A keyword of the authors' constructor, such as num_blocks=4; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Convert the authors' published checkpoint to ours, every key accounted for; --back converts ours to theirs."""
    from foveal.audio.checkpoints import convert_file
    from foveal.core.errors import UserError

    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists; pass --overwrite to replace it, or choose another file")
    typer.echo(convert_file(system, source, target, back=back, **_keywords(keywords or [])))


def _keywords(settings: list[str]) -> dict[str, int]:
    from foveal.core.errors import UserError

    pairs = [setting.partition("=") for setting in settings]
    wrong = [name + equals + value for name, equals, value in pairs if not name or not value.isdecimal()]
    if wrong:
        raise UserError(f"expected --set NAME=VALUE with a whole number, such as num_blocks=4; got {', '.join(wrong)}")
    return {name: int(value) for name, _, value in pairs}
