"""Labelled sets are read in three formats, and what is wrong in them is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from foveal.apps.main import run
from foveal.core.errors import UserError
from foveal.detection.data.labels import label_file, read_labels

BLOOD_CELLS = Path(__file__).parents[3] / "shared" / "data" / "detection" / "bccd"
COCO_MINI = BLOOD_CELLS.parent / "coco_mini"
needs_blood_cells = pytest.mark.skipif(not BLOOD_CELLS.is_dir(), reason="the blood-cell pictures are not beside the checkout")
needs_coco = pytest.mark.skipif(not COCO_MINI.is_dir(), reason="the few COCO pictures are not beside the checkout")


def _yolo(root: Path, labels: dict[str, str], names: list[str] | None = None, **settings: object) -> Path:
    """A set of pictures of 100 x 50 with these label files."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for name, text in labels.items():
        Image.new("RGB", (100, 50), "gray").save(root / "images" / f"{name}.png")
        (root / "labels" / f"{name}.txt").write_text(text)
    file = root / "data.yaml"
    file.write_text(yaml.safe_dump({"train": "images", "names": names or ["cat", "dog"], **settings}))
    return file


def _voc(root: Path, objects: str, size: tuple[int, int] = (100, 50)) -> Path:
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    Image.new("RGB", size, "gray").save(root / "JPEGImages" / "a.jpg")
    head = "<annotation><filename>a.jpg</filename><size><width>100</width><height>50</height></size>"
    (root / "Annotations" / "a.xml").write_text(f"{head}{objects}</annotation>")
    return root


def _object(name: str, *box: float) -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"


def _kinds(problems: object) -> list[str]:
    return [problem.kind for problem in problems]  # type: ignore[attr-defined]


def test_a_yolo_box_is_a_share_of_its_picture(tmp_path: Path) -> None:
    labels = read_labels(_yolo(tmp_path, {"a": "1 0.5 0.5 0.2 0.4\n"}))
    np.testing.assert_allclose(labels.pictures[0].boxes, [[40, 15, 60, 35]])
    assert labels.pictures[0].classes.tolist() == [1]
    assert labels.problems == []


def test_a_class_out_of_range_is_left_out_and_named_with_its_line(tmp_path: Path) -> None:
    labels = read_labels(_yolo(tmp_path, {"a": "0 .5 .5 .2 .2\n2 .5 .5 .1 .1\n-1 .5 .5 .1 .1\n"}))
    assert labels.objects == 1
    assert _kinds(labels.problems) == ["class out of range"] * 2
    assert labels.problems[0].place.endswith("a.txt, line 2")


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 .5 .5 0 .2", "degenerate box"), ("0 nan .5 .2 .2", "degenerate box"), ("0 .95 .5 .3 .2", "box outside"), ("0 .5 .5 .2", "damaged labels"),
        ("cat .5 .5 .2 .2", "damaged labels"), ("0.5 .5 .5 .2 .2", "class out of range"), ("0 .5 .5 .2 .2 .1 .1 .1", "damaged labels"),
        ("1e999 .5 .5 .2 .2", "class out of range"), ("nan .5 .5 .2 .2", "class out of range"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, line: str, kind: str) -> None:
    assert _kinds(read_labels(_yolo(tmp_path, {"a": f"{line}\n"})).problems) == [kind]


def test_missing_pictures_and_labels_and_wrong_counts_are_named(tmp_path: Path) -> None:
    file = _yolo(tmp_path, {"a": "0 .5 .5 .2 .2\n0 .5 .5 .2 .2\n", "b": ""}, nc=3)
    (tmp_path / "labels" / "b.txt").unlink()
    (tmp_path / "images" / "c.png").write_bytes(b"not a picture")
    kinds = _kinds(read_labels(file).problems)
    assert sorted(kinds) == ["class mismatch", "damaged picture", "duplicate box", "missing labels"]


def test_polygons_keep_their_points_and_become_boxes(tmp_path: Path) -> None:
    labels = read_labels(_yolo(tmp_path, {"a": "0 .1 .2 .5 .2 .5 .8 .1 .6\n"}))
    np.testing.assert_allclose(labels.pictures[0].boxes, [[10, 10, 50, 40]])
    np.testing.assert_allclose(labels.pictures[0].outlines[0], [[10, 10], [50, 10], [50, 40], [10, 30]])


def test_keypoints_are_read_where_the_file_says_how_many(tmp_path: Path) -> None:
    labels = read_labels(_yolo(tmp_path, {"a": "0 .5 .5 .2 .2 .1 .2 2 .3 .4 0\n"}, kpt_shape=[2, 3]))
    assert labels.pictures[0].keypoints is not None
    np.testing.assert_allclose(labels.pictures[0].keypoints, [[[10, 10, 2], [30, 20, 0]]])


def test_the_last_folder_called_images_becomes_labels() -> None:
    assert label_file(Path("images/a/images/b.png")) == Path("images/a/labels/b.txt")
    assert label_file(Path("x/b.png")) == Path("x/b.txt")


def test_voc_objects_of_unknown_classes_and_without_area_are_named(tmp_path: Path) -> None:
    root = _voc(tmp_path, _object("cat", 10, 5, 30, 25) + _object("dog", 5, 5, 5, 9) + _object("hen", 1, 1, 9, 9), (100, 60))
    labels = read_labels(root, "all", names=["cat", "dog"])
    np.testing.assert_allclose(labels.pictures[0].boxes, [[10, 5, 30, 25]])
    assert _kinds(labels.problems) == ["wrong size", "degenerate box", "unknown class"]


def test_coco_crowds_are_neither_asked_for_nor_wrong(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 9, "bbox": [10, 5, 20, 20], "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 9, "bbox": [40, 5, 20, 20], "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 8, "bbox": [40, 5, 20, 20]},
        {"id": 4, "image_id": 6, "category_id": 9, "bbox": [40, 5, 20, 20]},
    ]
    images = [{"id": 5, "file_name": "a.png", "width": 100, "height": 50}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 9, "name": "cat"}]}))
    labels = read_labels(tmp_path / "x.json")
    assert labels.numbers == [9]
    np.testing.assert_allclose(labels.pictures[0].boxes, [[10, 5, 30, 25]])
    np.testing.assert_allclose(labels.pictures[0].ignored, [[40, 5, 60, 25]])
    assert _kinds(labels.problems) == ["unknown picture", "unknown class"]


def test_a_number_that_two_pictures_of_a_coco_file_have_is_the_first_ones(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (100, 50)).save(tmp_path / f"{name}.png")
    images = [{"id": 5, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}]
    annotations = [{"id": 1, "image_id": 5, "category_id": 9, "bbox": [10, 5, 20, 20]}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 9, "name": "cat"}]}))
    labels = read_labels(tmp_path / "x.json")
    assert [picture.path.name for picture in labels.pictures] == ["a.png"]
    assert labels.objects == 1
    assert _kinds(labels.problems) == ["duplicate number"]


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "Expecting property name"), ("[]", "arranged otherwise"), ('{"images": []}', "lacks 'categories'")]
)
def test_a_json_that_is_no_coco_file_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=f"expected a COCO file.*{reason}"):
        read_labels(tmp_path / "x.json")


def test_classes_without_objects_are_counted_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _yolo(tmp_path, {"a": "0 .5 .5 .2 .2\n"})
    settings = yaml.safe_load((tmp_path / "data.yaml").read_text())
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**settings, "names": ["cat", *(f"kind {number}" for number in range(30))], "nc": 31}))
    assert run(["detection", "check-data", str(tmp_path / "data.yaml"), "--split", "train", "-o", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "1 objects: cat 1; none of 30 further classes" in printed
    assert str(tmp_path / "report" / "problems.csv") in printed


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has: train"):
        read_labels(_yolo(tmp_path, {"a": ""}), "val")


@needs_blood_cells
def test_the_blood_cells_have_their_two_degenerate_boxes() -> None:
    parts = {part: read_labels(BLOOD_CELLS, part) for part in ("train", "val", "test")}
    assert {part: len(labels.pictures) for part, labels in parts.items()} == {"train": 205, "val": 87, "test": 72}
    problems = [problem for labels in parts.values() for problem in labels.problems if problem.kind == "degenerate box"]
    assert sorted(Path(problem.place.partition(",")[0]).stem for problem in problems) == ["BloodImage_00338", "BloodImage_00343"]
    assert sum(labels.objects for labels in parts.values()) == 4888 - 2
    assert all(labels.names == ["Platelets", "RBC", "WBC"] for labels in parts.values())


@needs_coco
def test_the_few_coco_pictures_keep_their_categories() -> None:
    labels = read_labels(COCO_MINI / "annotations.json")
    assert (len(labels.pictures), len(labels.names), labels.numbers[:3]) == (6, 80, [1, 2, 3])
    assert labels.objects + sum(len(picture.ignored) for picture in labels.pictures) == 36


def test_the_command_finds_a_picture_in_two_parts_and_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _yolo(tmp_path / "set", {"a": "0 .5 .5 .2 .2\n7 .5 .5 .2 .2\n"}, val="images")
    assert run(["detection", "check-data", str(file), "-o", str(tmp_path / "report")]) == 2
    shown = capsys.readouterr().out
    assert "1 x shared picture" in shown
    assert "2 x class out of range" in shown
    assert "train: 1 pictures (0 without objects), 1 objects: cat 1; none of dog" in shown
    assert (tmp_path / "report" / "problems.csv").read_text().count("\n") == 4
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["parts"]["train"]["objects"] == 1


def test_a_set_without_problems_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["detection", "check-data", str(_yolo(tmp_path, {"a": "0 .5 .5 .2 .2\n"})), "--thorough", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == {}
