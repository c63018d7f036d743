"""``foveal memes``: score pictures and tables, fit thresholds, train and evaluate, convert the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.options import Checkpoint, Device, Json, Overwrite
from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "memes", "configs/memes/harmeme_small.yaml")
add_convert(app, "memes")

_Sources = Annotated[list[Path] | None, typer.Argument(help="Pictures, folders of them, or tables (csv, tsv, jsonl, xlsx).")]
_Images = Annotated[Path | None, typer.Option(help="Folder that a table's pictures are in; default: the table's own.")]
_ImageColumn = Annotated[str, typer.Option(help="A table's column with the picture's file.")]
_TextColumn = Annotated[str, typer.Option(help="A table's column with the meme's text; where it is missing the picture is read.")]
_ReasonColumn = Annotated[str | None, typer.Option(help="A table's column with explanations.")]
_Cache = Annotated[Path | None, typer.Option(help="File of what was computed once; default: in the user's cache folder.")]


@app.command()
def score(
    sources: _Sources = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for scores.csv, scores.jsonl and review.html; default: scored.")
    ] = None,
    checkpoint: Checkpoint = None,
    calibration: Annotated[Path | None, typer.Option(help="Thresholds written by foveal memes calibrate.")] = None,
    image_column: _ImageColumn = "image",
    text_column: _TextColumn = "text",
    reason_column: _ReasonColumn = None,
    images: _Images = None,
    explain: Annotated[str | None, typer.Option(metavar="MODEL", help="Ask a chat-completions server for reasons, with this model.")] = None,
    server: Annotated[str | None, typer.Option(help="Its address; default: OPENAI_BASE_URL, or http://localhost:8000/v1.")] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="Let pictures be sent to a server outside this network.")] = False,
    rounds: Annotated[int, typer.Option(help="Role reversals of each explanation.")] = 2,
    concurrency: Annotated[int, typer.Option(help="Requests at the same time.")] = 2,
    requests_per_minute: Annotated[float, typer.Option(help="No more than these; 0: no limit.")] = 0.0,
    nsfw: Annotated[bool, typer.Option("--nsfw", help="Add OpenNSFW's signal as a column; needs foveal-memes[nsfw].")] = False,
    cache: _Cache = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score memes: probabilities, a decision and a reason for each, a table and a page to review them with."""
    from foveal.core.errors import UserError
    from foveal.memes.explain.server import Server
    from foveal.memes.predict import score_command

    asking = {"--server": server, "--allow-remote": allow_remote, "--rounds": rounds != 2, "--concurrency": concurrency != 2,
              "--requests-per-minute": requests_per_minute}  # fmt: skip
    if explain is None and (beside := [option for option, given in asking.items() if given]):
        raise UserError(f"expected --explain MODEL beside {' and '.join(beside)}; without it no server is asked")
    settings = {"model": explain, "allow_remote": allow_remote, "concurrency": concurrency, "requests_per_minute": requests_per_minute}
    asked = None if explain is None else Server.from_environment(**settings, **({"base_url": server} if server else {}))
    raise typer.Exit(
        score_command(
            sources or [],
            output=output,
            checkpoint=checkpoint,
            calibration_file=calibration,
            columns={"image_column": image_column, "text_column": text_column, "reason_column": reason_column},
            images=images,
            server=asked,
            rounds=rounds,
            nsfw=nsfw,
            cache=cache,
            device=device,
            overwrite=overwrite,
            as_json=as_json,
        )
    )


@app.command()
def calibrate(
    sources: _Sources = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="File for the thresholds.")] = Path("calibration.json"),
    label_column: Annotated[str, typer.Option(help="The tables' column with 0 or 1.")] = "label",
    image_column: _ImageColumn = "image",
    text_column: _TextColumn = "text",
    reason_column: _ReasonColumn = None,
    images: _Images = None,
    precision: Annotated[float, typer.Option(help="Of what is flagged, at least.")] = 0.9,
    recall: Annotated[float, typer.Option(help="Of what is flagged or reviewed, at least.")] = 0.9,
    review_share: Annotated[float | None, typer.Option(help="Share of memes that people can look at; it replaces --recall.")] = None,
    checkpoint: Checkpoint = None,
    cache: _Cache = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Fit temperature and thresholds to your own labelled memes (at least 30, of both classes)."""
    from foveal.memes.predict import calibrate_command

    raise typer.Exit(
        calibrate_command(
            sources or [],
            output=output,
            label_column=label_column,
            columns={"image_column": image_column, "text_column": text_column, "reason_column": reason_column},
            precision=precision,
            recall=recall,
            review_share=review_share,
            checkpoint=checkpoint,
            images=images,
            cache=cache,
            device=device,
            overwrite=overwrite,
        )
    )
