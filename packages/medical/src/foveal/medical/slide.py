"""``foveal medical slide``: slides to tiles, tiles to features, features to a class and a heat map; each step kept, so that a stopped run goes on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy import ndarray
from rich.console import Console
from rich.progress import track

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, output_folder, without_results
from foveal.core.reports import BatchReport, Entry
from foveal.medical.bag_classifier import BagClassifier, BagPrediction
from foveal.medical.data.bag_sources import TABLES, read_bag_table
from foveal.medical.features import HDF5, SlideFeatures, read_features, write_features
from foveal.medical.slide_encoders import TileEncoder
from foveal.medical.slide_plots import attention_slide_figure, percentile_ranks
from foveal.medical.slides import SLIDES, Slide, open_slide
from foveal.medical.tissue import Tiling, tiles_on_tissue

#: What features must share to be used again.
_SETTINGS = ("encoder", "tile", "tile_mpp", "tissue")


def extract_features(slide: Slide, encoder: TileEncoder, tiling: Tiling, batch: int = 32, progress: bool = False) -> SlideFeatures:
    """Features of a slide's tiles.

    Args:
        slide: to cut.
        encoder: of tiles.
        tiling: size, magnification and least share of tissue.
        batch: tiles that the encoder sees at once.
        progress: draw a bar on stderr.

    Raises:
        UserError: no tissue, unknown magnification, damaged pixels.
    """
    coords, side = tiles_on_tissue(slide, tiling)
    parts = [coords[start : start + batch] for start in range(0, len(coords), batch)]
    shown: Iterable[Int[ndarray, "tiles 2"]] = (
        track(parts, slide.source.name, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) if progress else parts
    )
    features = [encoder([slide.region(int(x), int(y), side, tiling.tile) for x, y in part]) for part in shown]
    about = {
        "slide": os.path.abspath(slide.source), "width": slide.width, "height": slide.height, "mpp": float(slide.mpp or 0),
        "patch_size": tiling.tile, "patch_size_level0": side, **_settings(encoder.label, tiling),
    }  # fmt: skip
    return SlideFeatures(np.concatenate(features), coords, about)


def _settings(label: str, tiling: Tiling) -> dict[str, Any]:
    return {"encoder": label, "tile": tiling.tile, "tile_mpp": tiling.mpp, "tissue": tiling.tissue}


@dataclass
class _Run:
    """What one command works with."""

    folder: Path
    classifier: BagClassifier | None
    encoder: TileEncoder | None
    tiling: Tiling
    slide_mpp: float | None
    batch: int
    pictures: bool
    overwrite: bool

    def features_of(self, place: Path, name: str, entry: Entry) -> SlideFeatures:
        """Of a file of features as they are; of a slide those of an earlier run with the same settings, or extracted now."""
        if place.suffix.lower() in HDF5:
            return read_features(place)
        target = self.folder / "features" / f"{name}.h5"
        if target.exists() and not self.overwrite:
            found = read_features(target)
            if self.encoder is not None:
                self._refuse_other(found, target)
            return found
        if self.encoder is None:
            raise UserError(f"expected an encoder for {place.name}; name one with --encoder, such as resnet50 with --encoder-weights resnet50.pth")
        if self.classifier is not None and self.classifier.width != self.encoder.width:
            told = f"{self.encoder.label} gives {self.encoder.width}"
            raise UserError(
                f"expected an encoder of width {self.classifier.width}, as {self.classifier.label} reads; {told}; choose another --encoder"
            )
        slide = open_slide(place, self.slide_mpp)
        found = extract_features(slide, self.encoder, self.tiling, self.batch, progress=True)
        entry.outputs.append(str(write_features(target, found)))
        return found

    def _refuse_other(self, found: SlideFeatures, target: Path) -> None:
        assert self.encoder is not None
        asked = _settings(self.encoder.label, self.tiling)
        other = [
            f"{name} {found.about[name]} and not {asked[name]}" for name in _SETTINGS if name in found.about and found.about[name] != asked[name]
        ]
        if other:
            raise UserError(f"expected {target} made with these settings; it has {', '.join(other)}; pass --overwrite, or choose another -o")

    def classify(self, name: str, slide: SlideFeatures, entry: Entry) -> dict[str, Any]:
        """The slide's row of the table; its attention as a table and a picture."""
        assert self.classifier is not None
        prediction = self.classifier(slide.features)
        entry.numbers |= {f"p {label}": value for label, value in prediction.probabilities.items()}
        notes = [prediction.label]
        if len(slide.features) == 1:
            notes.append("one tile only: attention says nothing")
        if slide.coords is None:
            notes.append("no coords in the file: no heat map")
        entry.message = "; ".join(notes)
        table = self.folder / f"{name}_attention.csv"
        _write_table(table, _attention_table(slide, prediction))
        entry.outputs.append(str(table))
        if self.pictures and slide.coords is not None:
            title = f"{name}: {prediction.label} ({prediction.probabilities[prediction.label]:.1%})"
            figure = _heat_map(slide, prediction, title)
            with atomic_write(self.folder / f"{name}_attention.png") as temporary:
                figure.savefig(temporary, dpi=130)
            entry.outputs.append(str(self.folder / f"{name}_attention.png"))
        return _row(name, len(slide.features), prediction, self.classifier.label)


def _row(name: str, count: int, prediction: BagPrediction, checkpoint: str) -> dict[str, Any]:
    shares = {f"p {label}": value for label, value in prediction.probabilities.items()}
    return {"slide": name, "tiles": count, "predicted": prediction.label, **shares, "checkpoint": checkpoint}


def _attention_table(slide: SlideFeatures, prediction: BagPrediction) -> pd.DataFrame:
    """One row a tile, the one with most attention first."""
    columns: dict[str, Any] = {"tile": np.arange(len(slide.features))}
    if slide.coords is not None:
        columns |= {"x": slide.coords[:, 0], "y": slide.coords[:, 1]}
    columns |= {"attention": prediction.importance, "rank": percentile_ranks(prediction.importance)}
    return pd.DataFrame(columns).sort_values("attention", ascending=False, kind="stable")


def _heat_map(slide: SlideFeatures, prediction: BagPrediction, title: str) -> Any:
    """Over the slide where it still is at its place, else over white."""
    assert slide.coords is not None
    corners, about = slide.coords, slide.about
    steps = np.diff(np.unique(corners[:, 0]))
    tile = float(about.get("patch_size_level0") or (steps.min() if len(steps) else about.get("patch_size", 256)))
    extent = tuple(float(about.get(name) or corners[:, axis].max() + tile) for axis, name in enumerate(("width", "height")))
    source = Path(str(about.get("slide", "")))
    try:
        thumbnail = open_slide(source).thumbnail(1024) if source.is_file() else np.full((64, 64, 3), 255, np.uint8)
    except UserError:
        thumbnail = np.full((64, 64, 3), 255, np.uint8)
    return attention_slide_figure(thumbnail, (extent[0], extent[1]), corners, tile, prediction.importance, title)


def slide_command(
    slides: Sequence[Path], *, output: Path | None, checkpoint: str | None = None, encoder: str | None = None, encoder_weights: Path | None = None,
    tile: int = 224, mpp: float = 0.5, slide_mpp: float | None = None, tissue: float = 0.25, batch: int = 32, features_only: bool = False,
    pictures: bool = True, device: str = "auto", overwrite: bool = False, seed: int = 0, as_json: bool = False,
) -> int:  # fmt: skip
    """Extract and classify; a slide that fails does not stop the others. Returns the exit code."""
    folder = output or Path("slides")
    named = collect_inputs(slides, (*SLIDES, *HDF5), apart_from=folder)
    extracted = [path for path in named if path.resolve().parent == (folder / "features").resolve()]
    stems = {path.stem for path in named if path not in extracted}
    named = [path for path in named if path not in extracted or path.stem not in stems]  # an earlier call's features of a slide that is here too
    places = without_results(named, _names, lambda name: [folder / f"{name}_attention.png"], slides)
    if batch < 1:
        raise UserError(f"expected --batch of at least 1; got {batch}")
    if features_only == (checkpoint is not None):
        given = "both" if features_only else "neither"
        raise UserError(f"expected --checkpoint with trained ACMIL, or --features-only to extract features that one is trained on; got {given}")
    if encoder_weights is not None and encoder is None:
        raise UserError("expected the network of --encoder-weights; name it with --encoder, such as resnet50")
    torch.manual_seed(seed)
    tiling = Tiling(tile, mpp, tissue)
    run = _Run(
        folder=output_folder(folder, overwrite=True),
        classifier=None if checkpoint is None else BagClassifier.from_pretrained(checkpoint, device),
        encoder=None if encoder is None else TileEncoder(encoder, encoder_weights, device, tile, seed),
        tiling=tiling, slide_mpp=slide_mpp, batch=batch, pictures=pictures, overwrite=overwrite,
    )  # fmt: skip
    if run.encoder is not None and run.encoder.random:
        print(f"foveal: {encoder} has random weights: give trained ones with --encoder-weights for features worth learning from", file=sys.stderr)
    report, rows = BatchReport(), _known_rows(run.folder / "slides.csv")
    for place, name in zip(places, _names(places), strict=True):
        done = _done(run, place, name, rows)
        if done and not overwrite:
            report.kept(place, done)
            continue
        with report.item(place) as entry:
            started = time.perf_counter()
            if place.suffix.lower() in TABLES:
                _classify_table(run, place, name, entry)
            else:
                features = run.features_of(place, name, entry)
                entry.numbers["tiles"] = float(len(features.features))
                if run.classifier is not None:
                    rows[name] = run.classify(name, features, entry)
                    _write_table(run.folder / "slides.csv", pd.DataFrame(list(rows.values())))
            entry.numbers["seconds"] = time.perf_counter() - started
    names = [] if run.classifier is None else run.classifier.class_names
    return report.finish(as_json, {"tiles": ".0f", "bags": ".0f", "right": ".3f", "seconds": ".1f"} | {f"p {name}": ".3f" for name in names})


def _classify_table(run: _Run, place: Path, name: str, entry: Entry) -> None:
    """Every bag of a table of instances."""
    if run.classifier is None:
        raise UserError(f"expected slides to extract features of; {place.name} holds features already; leave out --features-only")
    items = read_bag_table(place)
    predictions = [run.classifier(item.read()) for item in items]
    rows = [
        {**_row(item.name, len(found.importance), found, run.classifier.label), "label": item.label}
        for item, found in zip(items, predictions, strict=True)
    ]
    table = pd.DataFrame(rows).rename(columns={"slide": "bag", "tiles": "instances"})
    _write_table(run.folder / f"{name}_bags.csv", table)
    entry.outputs.append(str(run.folder / f"{name}_bags.csv"))
    entry.numbers["bags"] = float(len(items))


def _done(run: _Run, place: Path, name: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What an earlier run left of this input, if that is all that is asked for."""
    features = run.folder / "features" / f"{name}.h5"
    if run.classifier is None:
        if not features.exists():
            return []
        if run.encoder is not None:
            try:
                run._refuse_other(read_features(features), features)
            except UserError:
                return []  # said where it is worked on
        return [str(features)]
    attention = run.folder / f"{name}_attention.csv"
    same = name in rows and rows[name].get("checkpoint") == run.classifier.label
    return [str(run.folder / "slides.csv"), str(attention)] if same and attention.exists() else []


def _known_rows(file: Path) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    try:
        table = pd.read_csv(file, dtype={"slide": str})
    except (ValueError, OSError) as error:
        raise UserError(f"expected {file} as an earlier call wrote it; it cannot be read: {error}; remove it, or choose another -o") from None
    if "slide" not in table:
        raise UserError(f"expected a column 'slide' in {file}, as an earlier call wrote it; it has none; remove it, or choose another -o")
    return {str(row["slide"]): {str(key): value for key, value in row.items()} for row in table.to_dict("records")}


def _write_table(file: Path, table: pd.DataFrame) -> None:
    with atomic_write(file) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def _names(places: Sequence[Path]) -> list[str]:
    """The files' stems, with the folder's name before those that are not alone, and a number behind those that are still alike."""
    stems = [place.stem for place in places]
    names = [stem if stems.count(stem) == 1 else f"{place.resolve().parent.name}_{stem}" for place, stem in zip(places, stems, strict=True)]
    return [name if names.count(name) == 1 else f"{name}_{names[:index].count(name) + 1}" for index, name in enumerate(names)]
