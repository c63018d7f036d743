"""``foveal detection``: find objects, classes of pixels and turned heads in pictures, check data, train, measure, export, convert checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.options import Device, Json, Overwrite
from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "detection", "configs/detection/yolov13n_small.yaml")
add_convert(app, "detection")

_Checkpoint = Annotated[Path | None, typer.Option(help="Weights (.safetensors); default: the package's own, which know blood cells alone.")]
_Images = Annotated[Path | None, typer.Option(help="Folder of the pictures of a COCO file; default: images beside it, or its own folder.")]
_ImageSize = Annotated[int | None, typer.Option(help="Side that pictures are made to fit, a multiple of 32; default: the weights' own.")]


@app.command()
def detect(
    sources: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: detected.")] = None,
    checkpoint: _Checkpoint = None,
    score: Annotated[float, typer.Option(help="Least score of an object.")] = 0.25,
    overlap: Annotated[float, typer.Option(help="Greatest intersection over union of two boxes of a class.")] = 0.7,
    most: Annotated[int, typer.Option(help="Objects of a picture at most.")] = 300,
    classes: Annotated[list[str] | None, typer.Option("--class", help="Look for this class only; repeatable.")] = None,
    formats: Annotated[list[str] | None, typer.Option("--format", help="json, yolo or coco; repeatable. Default: json.")] = None,
    tile: Annotated[int | None, typer.Option(help="Also look at tiles of so many pixels, for small objects in large pictures.")] = None,
    tile_overlap: Annotated[float, typer.Option(help="Share of a tile that its neighbour has too.")] = 0.25,
    image_size: _ImageSize = None,
    every: Annotated[int, typer.Option(help="Of a video, look at every so many frames.")] = 1,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Write no pictures and videos, only what was found.")] = False,
    yolo_scores: Annotated[bool, typer.Option("--yolo-scores", help="End lines of YOLO files with scores, which labels have not.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Also draw hyperedges and area attention of each picture.")] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find objects: pictures with boxes drawn on them, and what was found as JSON, YOLO labels or COCO predictions."""
    from foveal.detection.detect import detect_command
    from foveal.detection.predict import Options

    options = Options(score=score, overlap=overlap, most=most, classes=classes or None, tile=tile, tile_overlap=tile_overlap)
    raise typer.Exit(
        detect_command(
            sources,
            output=output,
            checkpoint=checkpoint,
            options=options,
            formats=formats or ["json"],
            image_size=image_size,
            pictures=not no_pictures,
            explain=explain,
            every=every,
            yolo_scores=yolo_scores,
            device=device,
            overwrite=overwrite,
            as_json=as_json,
        )
    )


@app.command()
def segment(
    sources: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: segmented.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a BEVANet (.safetensors); none come with the package.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Longer side that the network looks at; default: the picture's own, up to 2048.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Tell the class of every pixel: pictures under their classes' colours, and PNG files of class numbers."""
    from foveal.detection.segment import segment_command

    raise typer.Exit(
        segment_command(sources, output=output, checkpoint=checkpoint, image_size=image_size, device=device, overwrite=overwrite, as_json=as_json)
    )


@app.command()
def head_pose(
    sources: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: head_poses.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a DirectMHP (.safetensors); none come with the package.")] = None,
    score: Annotated[float, typer.Option(help="Least score of a head.")] = 0.3,
    overlap: Annotated[float, typer.Option(help="Greatest intersection over union of two heads.")] = 0.45,
    image_size: Annotated[int | None, typer.Option(help="Side that pictures are made to fit, a multiple of 64; default: the weights' own.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find heads and where they are turned: pictures with each head's axes, and pitch, yaw and roll in degrees as JSON."""
    from foveal.detection.head_pose import head_pose_command

    raise typer.Exit(
        head_pose_command(
            sources,
            output=output,
            checkpoint=checkpoint,
            score=score,
            overlap=overlap,
            image_size=image_size,
            device=device,
            overwrite=overwrite,
            as_json=as_json,
        )
    )


@app.command()
def check_data(
    source: Annotated[Path, typer.Argument(help="A YOLO data.yaml, a COCO .json, or a Pascal VOC folder.")],
    splits: Annotated[list[str] | None, typer.Option("--split", help="Part to look at; repeatable. Default: all that the set names.")] = None,
    images: _Images = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for problems.csv and summary.json.")] = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Decode every picture, not only its header.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Look for what is wrong with labels: degenerate boxes, missing and damaged files, unknown classes, pictures in two parts."""
    from foveal.detection.check import check_data_command

    raise typer.Exit(
        check_data_command(source, splits=splits or [], images=images, output=output, thorough=thorough, overwrite=overwrite, as_json=as_json)
    )


@app.command()
def evaluate(
    source: Annotated[Path, typer.Argument(help="A YOLO data.yaml, a COCO .json, or a Pascal VOC folder.")],
    split: Annotated[str, typer.Option(help="Its part to measure on.")] = "test",
    images: _Images = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: evaluated.")] = None,
    checkpoint: _Checkpoint = None,
    image_size: _ImageSize = None,
    score: Annotated[float, typer.Option(help="Least score of what counts in the confusion matrix.")] = 0.25,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure a detector on labelled pictures: COCO's average precision, precision over recall, what was taken for what."""
    from foveal.detection.evaluate import evaluate_command

    raise typer.Exit(
        evaluate_command(
            source,
            split=split,
            images=images,
            output=output,
            checkpoint=checkpoint,
            image_size=image_size,
            score=score,
            device=device,
            overwrite=overwrite,
            as_json=as_json,
        )
    )


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="File to write, ending in .onnx.")],
    checkpoint: _Checkpoint = None,
    image_size: _ImageSize = None,
    half: Annotated[bool, typer.Option("--half", help="Half precision: weights, input and layers.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a network as ONNX, with any number of pictures a call, and hold it against torch."""
    from foveal.detection.export import export_command

    raise typer.Exit(export_command(output, checkpoint=checkpoint, image_size=image_size, half=half, overwrite=overwrite, as_json=as_json))


@app.command()
def benchmark(
    checkpoint: Annotated[Path | None, typer.Option(help="Weights (.safetensors); default: a network of --scale drawn at random.")] = None,
    scale: Annotated[str, typer.Option(help="n, s, l or x.")] = "n",
    onnx: Annotated[Path | None, typer.Option(help="File of foveal detection export to measure beside it.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the pictures, a multiple of 32; default: what --onnx was exported for, or 640.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures a call.")] = 1,
    rounds: Annotated[int, typer.Option(help="Calls of each, after three that do not count.")] = 20,
    precision: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    as_json: Json = False,
) -> None:
    """Measure latency here, with and without suppression, and say what exactly was measured."""
    from foveal.detection.latency import benchmark_command

    raise typer.Exit(
        benchmark_command(
            checkpoint=checkpoint,
            scale=scale,
            onnx=onnx,
            image_size=image_size,
            batch=batch,
            rounds=rounds,
            precision=precision,
            device=device,
            threads=threads,
            as_json=as_json,
        )
    )


@app.command()
def project(
    output: Annotated[Path, typer.Option("-o", "--output", help="Empty folder for the pictures and their annotations.json (COCO, with masks).")],
    crops: Annotated[Path | None, typer.Option(help="Pictures of single objects on white, a folder a class of PIDray; default: drawn ones.")] = None,
    bags: Annotated[Path | None, typer.Option(help="Folder of X-ray pictures of harmless bags; default: drawn ones.")] = None,
    count: Annotated[int, typer.Option(help="Scenes.", min=1)] = 50,
    most: Annotated[int, typer.Option(help="Objects of a scene at most.", min=1)] = 3,
    side: Annotated[int, typer.Option(help="Side of drawn bags, in pixels.", min=32)] = 320,
    seed: Annotated[int, typer.Option(help="Another seed makes other scenes.")] = 0,
) -> None:
    """Project prohibited items into X-ray pictures of bags: labelled scenes to train and to test with."""
    from foveal.detection.data.xray import project_command

    raise typer.Exit(project_command(output, crops=crops, bags=bags, count=count, most=most, side=side, seed=seed))
