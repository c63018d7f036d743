"""Pictures and videos go in, objects come out, and bad input is named without stopping the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.detection import Detections, Detector, YOLOv13, YOLOv13Config
from foveal.detection.data.pictures import read_picture, size_of
from foveal.detection.detect import result_names
from foveal.detection.models.inference import inference_form
from foveal.detection.plots import draw, draw_areas, draw_confusion, draw_hyperedges, draw_precision_recall
from foveal.detection.predict import Options, _starts


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def detector(weights: Path) -> Detector:
    return Detector.from_pretrained(weights)


# ---------------------------------------------------------------------------------------------------------------------------------- bad input


def test_a_truncated_jpeg_is_refused_in_one_line(tmp_path: Path) -> None:
    Image.fromarray(_noise(64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:800])
    with pytest.raises(UserError, match="damaged"):
        read_picture(tmp_path / "cut.jpg")


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 3)])
def test_a_tiny_picture_is_looked_at(detector: Detector, shape: tuple[int, int]) -> None:
    found = detector.detect(_noise(*shape))
    assert found.size == (shape[1], shape[0])
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [shape[1], shape[0], shape[1], shape[0]]).all()


def test_a_panorama_of_20000_pixels_is_looked_at_whole_and_in_tiles(detector: Detector, tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 300), "gray").save(tmp_path / "wide.png")
    image = read_picture(tmp_path / "wide.png")
    assert image.shape == (300, 20_000, 3)
    assert detector.detect(image).size == (20_000, 300)
    found = detector.detect(image, Options(tile=2_000))
    assert (found.boxes[:, 2] <= 20_000).all()


@pytest.mark.parametrize(
    ("mode", "fill", "expected"),
    [("L", 100, (100, 100, 100)), ("1", 1, (255, 255, 255)), ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
     ("P", 0, (0, 0, 0)), ("CMYK", (0, 0, 0, 0), (255, 255, 255))],
)  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, fill: Any, expected: tuple[int, int, int]) -> None:
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 6), fill).save(file)
    image = read_picture(file)
    assert image.shape == (6, 8, 3)
    assert image.dtype == np.uint8
    assert tuple(image[0, 0]) == expected


def test_sixteen_bits_are_stretched_not_cut(tmp_path: Path) -> None:
    values = np.linspace(1000, 5000, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.png")
    image = read_picture(tmp_path / "x.png")
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image[..., 0].ravel().astype(int)) >= 0).all()


def test_the_rotation_that_a_camera_noted_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter clockwise to stand upright
    image.save(tmp_path / "x.jpg", exif=exif, quality=95)
    upright = read_picture(tmp_path / "x.jpg")
    assert upright.shape == (40, 20, 3)
    assert size_of(tmp_path / "x.jpg") == (20, 40)
    assert upright[5].mean() > 200
    assert upright[-5].mean() < 50


def test_an_empty_folder_and_a_video_without_frames_are_named(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["detection", "detect", str(tmp_path / "empty"), "--checkpoint", str(weights)]) == 2
    assert "found none" in capsys.readouterr().err
    cv2.VideoWriter(str(tmp_path / "none.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 64)).release()
    (tmp_path / "broken.avi").write_bytes(b"RIFF")
    Image.fromarray(_noise(32, 32)).save(tmp_path / "good.png")
    assert run(["detection", "detect", str(tmp_path), "--checkpoint", str(weights), "-o", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("expected a video with frames") == 2
    assert "good.png" in shown.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.jpg", "good.json"}


@pytest.mark.parametrize(
    "wrong",
    [["--score", "2"], ["--most", "0"], ["--tile", "8"], ["--tile-overlap", "1"], ["--format", "xml"], ["--class", "cow"], ["--image-size", "100"]],
)
def test_options_out_of_range_are_refused(weights: Path, tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(_noise(32, 32)).save(tmp_path / "x.png")
    assert run(["detection", "detect", str(tmp_path / "x.png"), "--checkpoint", str(weights), "-o", str(tmp_path / "out"), *wrong]) == 2
    assert "expected" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------------------- what is found


def test_a_shrunk_picture_has_the_same_objects_in_its_own_pixels(detector: Detector) -> None:
    """Boxes are found at the network's size, and scaled back: twice the pixels, twice the numbers."""
    image = np.kron(_noise(64, 48), np.ones((2, 2, 1), np.uint8))
    small, large = detector.detect(image[::2, ::2], Options(score=0.3)), detector.detect(image, Options(score=0.3))
    assert len(small) > 0
    np.testing.assert_allclose(2 * small.boxes[0], large.boxes[0], atol=4)


def test_tiles_cover_a_picture_and_share_what_they_should() -> None:
    for length, tile, overlap in ((1000, 300, 0.25), (301, 300, 0.0), (5000, 640, 0.5)):
        starts = _starts(length, tile, overlap)
        assert starts[0] == 0
        assert starts[-1] + tile == length
        assert max(np.diff(starts)) <= tile * (1 - overlap) + 1


class _OneObject(YOLOv13):
    """Finds white pixels: one box around them, as the network would say it."""

    def forward(self, image: torch.Tensor) -> Any:
        from foveal.detection.models.heads import Prediction

        rows, columns = (image[0, 0] > 0.9).nonzero(as_tuple=True)
        decoded = torch.zeros(1, 7, 4)
        if len(rows):
            left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
            decoded[0, :, 0] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, 0.9, 0, 0])
        return Prediction(decoded, ())


def test_an_object_in_a_large_picture_is_found_once_and_where_it_is_by_tiles() -> None:
    detector = Detector(_OneObject(YOLOv13Config("n", 3)).eval(), ["cat", "dog", "hen"], image_size=128)
    image = np.full((700, 1100, 3), 40, np.uint8)
    image[400:460, 560:640] = 255
    found = detector.detect(image, Options(tile=256, tile_overlap=0.4))
    assert len(found) == 1
    np.testing.assert_allclose(found.boxes[0], [560, 400, 640, 460], atol=10)


def test_figures_of_eighty_classes_stay_of_a_size_that_can_be_looked_at() -> None:
    names = [f"class {number}" for number in range(80)]
    counts = np.zeros((81, 81))
    counts[3, 3], counts[5, 80] = 4, 2
    confusion = draw_confusion(counts, names, 0.25)
    assert [label.get_text() for label in confusion.axes[0].get_yticklabels()] == ["class 3", "class 5", "nothing"]
    full = draw_confusion(np.ones((81, 81)), names, 0.25)
    assert max(full.get_size_inches()) < 32
    curves = draw_precision_recall(dict.fromkeys(names, np.linspace(1, 0, 101)))
    (legend,) = curves.legends
    assert len(legend.get_texts()) == 80
    assert not draw_precision_recall({}).axes[0].lines


def test_classes_that_the_network_does_not_know_are_refused_once_before_anything_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    assert run(["detection", "detect", str(tmp_path), "--class", "unicorn", "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.count("unicorn") == 1
    assert "blood cells alone" in told.err


def test_yolo_lines_and_json_say_the_same() -> None:
    found = Detections((100, 50), np.array([[10.0, 10, 30, 40]]), np.array([0.5]), np.array([1]), ["cat", "dog"])
    assert found.to_yolo() == "1 0.200000 0.500000 0.200000 0.600000\n"
    assert found.to_yolo(scores=True) == "1 0.200000 0.500000 0.200000 0.600000 0.5000\n"
    assert found.to_dicts() == [{"class": "dog", "score": 0.5, "box": [10.0, 10.0, 30.0, 40.0]}]


@pytest.mark.parametrize("task", ["segment", "pose", "oriented"])
def test_masks_keypoints_and_turned_boxes_are_in_the_pictures_pixels(task: str) -> None:
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 2, task=task, keypoints=(3, 3))).eval()
    for level in model.head.score:
        torch.nn.init.constant_(level[-1].bias, 1.0)  # type: ignore[index]
    image = _noise(90, 120)
    found = Detector(inference_form(model), ["cat", "dog"], 64).detect(image, Options(most=5))
    assert 1 <= len(found) <= 5
    if task == "segment":
        assert found.masks is not None
        assert found.masks.shape == (len(found), 90, 120)
        outside = found.masks[0].copy()
        left, top, right, bottom = found.boxes[0].round().astype(int)
        outside[top:bottom, left:right] = False
        assert not outside.any()
    elif task == "pose":
        assert found.keypoints is not None
        assert found.keypoints.shape == (len(found), 3, 3)
    else:
        assert found.oriented is not None
        assert found.oriented.shape == (len(found), 5)
    assert draw(image, found).shape == image.shape
    assert len(found.to_dicts()) == len(found)


def test_drawing_leaves_the_picture_and_its_size(detector: Detector) -> None:
    image = _noise(40, 60)
    before = image.copy()
    drawn = draw(image, detector.detect(image, Options(score=0.1)))
    assert drawn.shape == image.shape
    assert (image == before).all()
    assert (drawn != image).any()


def test_heat_maps_of_hyperedges_and_areas_have_a_panel_each() -> None:
    model = YOLOv13(YOLOv13Config("n", 2)).eval()
    hyperedges = draw_hyperedges(model, _noise(50, 80), 64)
    assert len(hyperedges.axes) == 2 * 4
    assert len(draw_areas(model, _noise(50, 80), 64, at=(0.9, 0.1)).axes) == 4


# --------------------------------------------------------------------------------------------------------------------------------- the command


def test_a_folder_with_a_video_gives_every_format_and_is_kept_the_second_time(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.fromarray(_noise(48, 64)).save(tmp_path / "in" / "a.png")
    Image.fromarray(_noise(48, 64)).save(tmp_path / "in" / "sub" / "a.png")
    writer = cv2.VideoWriter(str(tmp_path / "in" / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(5):
        writer.write(_noise(48, 64))
    writer.release()
    command = [
        "detection",
        "detect",
        str(tmp_path / "in"),
        "--checkpoint",
        str(weights),
        "-o",
        str(tmp_path / "out"),
        "--score",
        "0.3",
        "--every",
        "2",
    ]
    assert run([*command, "--format", "json", "--format", "yolo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["state"] for entry in report["files"]] == ["done"] * 3
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    stems = ("_".join((tmp_path.name, "in", "a", "png")), "in_sub_a_png")
    assert names == {"v.jsonl", "v.mp4", *(f"{stem}.{end}" for stem in stems for end in ("jpg", "json")), *(f"labels/{stem}.txt" for stem in stems)}
    frames = [json.loads(line) for line in (tmp_path / "out" / "v.jsonl").read_text().splitlines()]
    assert [frame["frame"] for frame in frames] == [0, 2, 4]
    content = json.loads((tmp_path / "out" / "in_sub_a_png.json").read_text())
    assert (content["width"], content["height"]) == (64, 48)
    assert all(entry["score"] >= 0.3 for entry in content["objects"])
    assert run([*command, "--format", "json", "--format", "yolo", "--json"]) == 0
    assert {entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]} == {"kept"}


def test_what_was_looked_at_is_never_replaced_nor_removed(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(_noise(48, 64)).save(tmp_path / "a.jpg")
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for _ in range(3):
        writer.write(_noise(48, 64))
    writer.release()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = ["--checkpoint", str(weights), "-o", str(tmp_path), "--device", "cpu"]
    for file, more in (("a.jpg", []), ("a.jpg", ["--overwrite"]), ("clip.mp4", ["--overwrite"])):
        assert run(["detection", "detect", str(tmp_path / file), *options, *more]) == 2
        assert "would be replaced" in capsys.readouterr().err
    assert run(["detection", "detect", str(tmp_path / "clip.mp4"), *options, "--no-pictures"]) == 0
    assert (tmp_path / "clip.jsonl").exists()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_results_inside_the_named_folder_are_no_pictures_to_look_at(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(_noise(48, 64)).save(tmp_path / "a.png")
    command = ["detection", "detect", str(tmp_path), "--checkpoint", str(weights), "-o", str(tmp_path / "found"), "--device", "cpu", "--json"]
    for state in ("done", "kept"):
        assert run(command) == 0
        assert [entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]] == [state]


def test_every_file_has_results_of_its_own_name(tmp_path: Path) -> None:
    files = [tmp_path / top / "day" / "left" / name for top in ("one", "two") for name in ("a.jpg", "A.jpg")]
    names = [name.lower() for name in result_names(files).values()]
    assert len(set(names)) == 4


def test_coco_output_is_read_by_pycocotools(weights: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    Image.fromarray(_noise(48, 64)).save(tmp_path / "a.png")
    options = ["--checkpoint", str(weights), "-o", str(tmp_path / "out"), "--score", "0.2", "--format", "coco", "--no-pictures"]
    assert run(["detection", "detect", str(tmp_path / "a.png"), *options]) == 0
    images = COCO(str(tmp_path / "out" / "predictions_images.json"))
    found = images.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert len(found.getAnnIds()) > 0


def test_an_installation_without_weights_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveal.detection.predict.WEIGHTS", tmp_path)
    with pytest.raises(UserError, match="--checkpoint"):
        Detector.from_pretrained()


def test_weights_without_names_number_their_classes(tmp_path: Path) -> None:
    model = YOLOv13(YOLOv13Config("n", 2))
    save_weights(tmp_path / "x.safetensors", model.state_dict(), system="yolov13", config=model.config)
    assert Detector.from_pretrained(tmp_path / "x.safetensors", image_size=64).names == ["0", "1"]
