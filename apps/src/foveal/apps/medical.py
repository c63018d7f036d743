"""``foveal medical``: segmentation, restoration, classification of films and slides, zero-shot questions, training, the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveal.apps.options import Device, Json, Overwrite, Seed
from foveal.apps.verbs import add_convert, add_training

app = typer.Typer(rich_markup_mode=None)

add_training(app, "medical", "configs/medical/hippocampus_small.yaml")
add_convert(app, "medical")

_Scans = Annotated[list[Path], typer.Argument(help="NIfTI, NRRD, MetaImage, PNG, TIFF, DICOM files or series folders; or folders of them.")]
_Frame = Annotated[int | None, typer.Option(help="Which volume of 4-D files, from 0.")]
_Series = Annotated[str | None, typer.Option(help="Which series of a DICOM folder with several: its number, UID or a part of its name.")]


@app.command()
def segment(
    scans: _Scans,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: segmented.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights (.safetensors); default: the package's own, which know the hippocampus only.")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="Reference labels, a file or a folder of files of the scans' names: Dice and HD95.")] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write each structure's probabilities too.")] = False,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw overlays.")] = True,
    attention: Annotated[bool, typer.Option("--attention", help="Draw what the found structure's middle attends to.")] = False,
    views: Annotated[
        str | None,
        typer.Option(help="Also look at slices shifted, mirrored_height, mirrored_width (commas between), or none; default: as the weights want."),
    ] = None,
    device: Device = "auto",
    frame: _Frame = None,
    series: _Series = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Segment scans: labels on each scan's exact grid and in its format (NIfTI for DICOM), volumes in ml, an overlay of each."""
    from foveal.medical.segment import segment_command

    raise typer.Exit(
        segment_command(
            scans, output=output, checkpoint=checkpoint, device=device, truth=truth, probabilities=probabilities, pictures=pictures,
            attention=attention, views=views, frame=frame, series=series, overwrite=overwrite, seed=seed, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def restore(
    scans: _Scans,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of RAT (.safetensors), as fit's export or convert writes them; none ship.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: restored.")] = None,
    regions: Annotated[Path | None, typer.Option(help="Region map or segmentation, a file or a folder; default: superpixels (SLIC).")] = None,
    truth: Annotated[
        Path | None, typer.Option(help="Good images, file or folder: PSNR and SSIM, in the range given and as the authors report.")
    ] = None,
    value_range: Annotated[tuple[float, float] | None, typer.Option(help="Values that count as 0 and 1, such as -160 240 for CT.")] = None,
    device: Device = "auto",
    frame: _Frame = None,
    series: _Series = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Restore scans (denoise, enlarge) with a Region Attention Transformer: the same place in space, a picture of each."""
    from foveal.medical.restore import restore_command

    raise typer.Exit(
        restore_command(
            scans, output=output, checkpoint=checkpoint, device=device, regions=regions, truth=truth, value_range=value_range, frame=frame,
            series=series, overwrite=overwrite, seed=seed, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def classify(
    films: Annotated[list[Path], typer.Argument(help="Chest films: PNG, JPEG, TIFF or DICOM files, or folders of them.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: classified.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A run's folder, a checkpoint in it, or exported weights (.safetensors); none ship.")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="The films' classes, a table of file and label or a folder of classes: accuracy, AUROC.")] = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw what the network attends to at each scale.")] = True,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Classify films with MEDUSA: probabilities.csv, and a picture of each film with its attention."""
    from foveal.medical.classify import classify_command

    raise typer.Exit(
        classify_command(
            films, output=output, checkpoint=checkpoint, device=device, truth=truth, pictures=pictures, overwrite=overwrite, seed=seed,
            as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def slide(
    slides: Annotated[
        list[Path],
        typer.Argument(help="Slides (SVS, NDPI, TIFF, ...), pictures, HDF5 of features, or folders of them; tables of bags (.csv, .parquet)."),
    ],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: slides.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Trained ACMIL: a .safetensors file, or acmil_musk, acmil_ucsb, which know those sets only.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Network of tiles: of torchvision (resnet50), timm/NAME, or efficientnet_lite0.")] = None,
    encoder_weights: Annotated[Path | None, typer.Option(help="Its weights, a local file; without them they are random.")] = None,
    tile: Annotated[int, typer.Option(help="Side of a tile in pixels.")] = 224,
    mpp: Annotated[float, typer.Option(help="Micrometres per pixel of tiles: 0.5 is about 20x, 1.0 is 10x.")] = 0.5,
    slide_mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of the slides, where the files do not say.")] = None,
    tissue: Annotated[float, typer.Option(help="Least share of tissue in a tile.")] = 0.25,
    batch: Annotated[int, typer.Option(help="Tiles that the encoder sees at once.")] = 32,
    features_only: Annotated[bool, typer.Option("--features-only", help="Extract features (CLAM-style HDF5) and classify nothing.")] = False,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw the attention over each slide.")] = True,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Classify slides: tissue to tiles, tiles to features, a class and a heat map of each slide; what is done already is kept."""
    from foveal.medical.slide import slide_command

    raise typer.Exit(
        slide_command(
            slides, output=output, checkpoint=checkpoint, encoder=encoder, encoder_weights=encoder_weights, tile=tile, mpp=mpp,
            slide_mpp=slide_mpp, tissue=tissue, batch=batch, features_only=features_only, pictures=pictures, device=device,
            overwrite=overwrite, seed=seed, as_json=as_json,
        )
    )  # fmt: skip


@app.command("zero-shot")
def zero_shot(
    images: Annotated[list[Path] | None, typer.Argument(help="Films to classify: PNG, JPEG, TIFF or DICOM files, or folders of them.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Classes to choose from: a name a line, or YAML of names and sentences.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Instead: a table (CSV) of images and texts, to measure retrieval both ways.")] = None,
    base: Annotated[
        str, typer.Option(help="Folder or file of the model, hf-hub:OWNER/NAME, open_clip's NAME/TAG, or random:biomed_clip for a trial.")
    ] = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    adapter: Annotated[
        Path | None, typer.Option(help="ACE-LoRA: the authors' file, a run, or exported weights; without it the model as it is.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json or vocab.txt, where none lies beside the model.")] = None,
    truth: Annotated[Path | None, typer.Option(help="The films' classes, a table of file and label or a folder of classes: accuracy, AUROC.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the results; default: zero_shot.")] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Ask a vision-language model: classify films by sentences (--prompts), or find texts for images and images for texts (--pairs)."""
    from foveal.medical.zero_shot import zero_shot_command

    raise typer.Exit(
        zero_shot_command(
            images or [], prompts=prompts, pairs=pairs, output=output, base=base, tokenizer=tokenizer, adapter=adapter, truth=truth,
            device=device, overwrite=overwrite, seed=seed, as_json=as_json,
        )
    )  # fmt: skip
