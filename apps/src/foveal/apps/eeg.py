"""``foveal eeg``: recordings to tokens and classes, training and evaluation, the authors' checkpoints, envelope-following responses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.options import Checkpoint, Device, Json, Overwrite, Seed
from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "eeg", "configs/eeg/tfm_tokenizer_small.yaml")
add_convert(app, "eeg")

_Window = Annotated[float | None, typer.Option(help="Seconds of a window; default: what the weights were trained on.")]
_Montage = Annotated[str, typer.Option(help="auto, bipolar (the clinical sixteen) or single (channels as they are).")]
_Channels = Annotated[list[str] | None, typer.Option("--channels", metavar="NAME", help="A channel to keep; repeatable; default: all EEG.")]
_Band = Annotated[tuple[float, float] | None, typer.Option(help="Band-pass in Hz, such as 0.5 45.")]
_Notch = Annotated[float | None, typer.Option(help="Mains hum to take out in Hz; 0 for none; default: looked for.")]


@app.command()
def tokenize(
    files: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them: EDF, BDF, BrainVision, EEGLAB, FIF, GDF, CNT, XDF, Muse CSV.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: tokens.")] = None,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    window: _Window = None,
    montage: _Montage = "auto",
    channels: _Channels = None,
    band: _Band = None,
    notch: _Notch = None,
    events: Annotated[Path | None, typer.Option(help="Events (TSV, CSV, EDF+) that tell classes apart; default: the annotations.")] = None,
    as_json: Json = False,
) -> None:
    """Turn recordings into tokens: ids with times and channels (npz, parquet), a table of motifs, and a picture of each recording."""
    from foveal.eeg.predict import tokenize_command

    raise typer.Exit(
        tokenize_command(
            files, output=output, checkpoint=checkpoint, device=device, overwrite=overwrite, seed=seed, window=window, montage=montage,
            channels=channels or (), band=band, notch=notch, events=events, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def classify(
    files: Annotated[list[Path], typer.Argument(help="Recordings, or folders of them, as for tokenize.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: classes.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a classifier; default: the small trained one of the package.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Weights of its tokenizer; default: the file that the classifier names, beside it or in the package.")
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    step: Annotated[float | None, typer.Option(help="Seconds from one window to the next; default: the window.")] = None,
    montage: _Montage = "auto",
    channels: _Channels = None,
    band: _Band = None,
    notch: _Notch = None,
    as_json: Json = False,
) -> None:
    """Tell the class of every window: probabilities (csv), events (tsv, EDF+ annotations) and a picture of each recording."""
    from foveal.eeg.classify import classify_command

    raise typer.Exit(
        classify_command(
            files, output=output, checkpoint=checkpoint, tokenizer=tokenizer, device=device, overwrite=overwrite, seed=seed, step=step,
            montage=montage, channels=channels or (), band=band, notch=notch, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def efr(
    recording: Annotated[Path, typer.Argument(help="EEG recorded while the stimulus was heard.")],
    stimulus: Annotated[Path, typer.Argument(help="The stimulus: a wav file, or .npy of its envelope with --stimulus-rate.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: efr.")] = None,
    start: Annotated[str | None, typer.Option(help="When the stimulus began: seconds, or the word of an annotation; default: 0.")] = None,
    stimulus_rate: Annotated[float | None, typer.Option(help="Hz of a .npy envelope.")] = None,
    highest: Annotated[float, typer.Option(help="Highest frequency in Hz.")] = 100.0,
    surrogates: Annotated[int, typer.Option(help="Circular shifts of the envelope that significance is told by.")] = 200,
    channels: _Channels = None,
    notch: Annotated[float, typer.Option(help="Mains hum to take out in Hz; 0 for none: it lies beside the responses around 53 and 62 Hz.")] = 0.0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """How EEG follows a stimulus envelope: transfer function, coherence, cross-spectra, lagged correlation, with surrogate significance."""
    from foveal.eeg.efr import efr_command

    raise typer.Exit(
        efr_command(
            recording, stimulus, output=output, start=start, stimulus_rate=stimulus_rate, highest=highest, surrogates=surrogates,
            channels=channels or (), notch=notch, seed=seed, overwrite=overwrite, as_json=as_json,
        )
    )  # fmt: skip
