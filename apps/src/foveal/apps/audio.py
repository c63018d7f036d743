"""``foveal audio``: separate and enhance recordings, speak texts, train and evaluate the models, convert the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.options import Checkpoint, Device, Json, Overwrite, Seed
from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "audio", "configs/audio/tiger_small.yaml")
add_convert(app, "audio")

_Recordings = Annotated[list[Path] | None, typer.Argument(help="Recordings, or folders of them: wav, flac, ogg, mp3; any rate; mono or stereo.")]
_ChunkSeconds = Annotated[float | None, typer.Option(help="Length of the overlapping chunks that long recordings are cut into.")]


@app.command()
def separate(
    files: _Recordings = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: separated.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Separate a mixture of two real speakers that ships with the package, and score it.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    chunk_seconds: _ChunkSeconds = None,
    as_json: Json = False,
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
def enhance(
    files: _Recordings = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: enhanced.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Enhance noisy speech that ships with the package, and score it.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    chunk_seconds: _ChunkSeconds = None,
    as_json: Json = False,
) -> None:
    """Take the noise from recordings of speech: one file each, at the recording's own sample rate and length."""
    from foveal.audio.enhance import enhance_command

    raise typer.Exit(
        enhance_command(
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
def speak(
    text: Annotated[str | None, typer.Argument(help="What to say; - or nothing reads standard input.")] = None,
    files: Annotated[
        list[Path] | None, typer.Option("-f", "--file", metavar="FILE", help="Text file, or folder of .txt files, to say instead; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .wav file to write, for several files the folder; default: speech.wav or spoken.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the attention to write: how the text was read.")] = None,
    vocoder: Annotated[str, typer.Option(help="griffin_lim, vocos or hifigan.")] = "griffin_lim",
    vocoder_checkpoint: Annotated[Path | None, typer.Option(help="Its weights; default: for vocos those of the package.")] = None,
    voice: Annotated[Path | None, typer.Option(help="JSON file that describes the voice of converted weights.")] = None,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say a text: foveal audio speak "Hello." -o hello.wav; long texts are said sentence by sentence."""
    from foveal.audio.speak import speak_command

    raise typer.Exit(
        speak_command(
            text,
            files=files or [],
            output=output,
            plot=plot,
            vocoder=vocoder,
            vocoder_checkpoint=vocoder_checkpoint,
            voice=voice,
            checkpoint=checkpoint,
            device=device,
            overwrite=overwrite,
            seed=seed,
            as_json=as_json,
        )
    )
