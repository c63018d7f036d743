"""What a detector finds is the same as ultralytics' Results: numbers, names, picture, and what ultralytics makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveal.core.errors import UserError
from foveal.detection import Detections
from foveal.detection.masks import Masks

NAMES = ["cat", "dog"]
BOXES = np.array([[10.0, 5, 40, 30], [20.5, 10, 59, 39]], np.float32)


def _found(**more: Any) -> Detections:
    return Detections((60, 40), BOXES, np.array([0.9, 0.4], np.float32), np.array([1, 0]), NAMES, **more)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_boxes_names_path_and_picture_are_ultralytics(picture: Path, tmp_path: Path) -> None:
    results = _found().to_ultralytics(picture)
    assert type(results).__module__ == "ultralytics.engine.results"
    assert results.names == {0: "cat", 1: "dog"}
    assert results.path == str(picture)
    assert results.orig_shape == (40, 60)
    np.testing.assert_array_equal(results.orig_img[..., ::-1], np.asarray(Image.open(picture)))
    assert results.boxes is not None
    np.testing.assert_array_equal(results.boxes.xyxy, BOXES)
    assert [results.names[int(number)] for number in results.boxes.cls] == ["dog", "cat"]
    assert [entry["name"] for entry in results.summary()] == ["dog", "cat"]
    assert (results.plot() != results.orig_img).any()
    results.save_txt(tmp_path / "a.txt")
    ours = [line.split() for line in _found().to_yolo().splitlines()]
    theirs = [line.split() for line in (tmp_path / "a.txt").read_text().splitlines()]
    np.testing.assert_allclose(np.array(theirs, float), np.array(ours, float), atol=1e-5)


def test_masks_keypoints_and_turned_boxes_go_along(picture: Path) -> None:
    image = np.asarray(Image.open(picture))
    whole = np.zeros((2, 40, 60), bool)
    whole[0, 6:20, 12:30], whole[1, 12:30, 25:50] = True, True
    masks = _found(masks=Masks.of(whole)).to_ultralytics(image)
    assert masks.path == "image0.jpg"
    assert masks.masks is not None
    np.testing.assert_array_equal(np.asarray(masks.masks.data).astype(bool), whole)
    assert masks.masks.xy[0].max(0).tolist() == [29, 19]
    points = np.array([[[20, 10, 0.9], [30, 20, 0.2]], [[40, 30, 0.8], [45, 35, 0.7]]], np.float32)
    posed = _found(keypoints=points).to_ultralytics(image)
    assert posed.keypoints is not None
    np.testing.assert_array_equal(posed.keypoints.data, points)
    turned = np.array([[25, 20, 30, 10, 0.5], [40, 25, 20, 20, 0.0]], np.float32)
    oriented = _found(oriented=turned).to_ultralytics(image)
    assert oriented.boxes is None
    assert oriented.obb is not None
    np.testing.assert_array_equal(oriented.obb.xywhr, turned)
    np.testing.assert_allclose(oriented.obb.conf, [0.9, 0.4])
    for results in (masks, posed, oriented):
        assert (results.plot() != results.orig_img).any()
        assert len(results.summary()) == len(results) == 2


def test_nothing_found_is_an_empty_answer_and_another_picture_is_refused(picture: Path) -> None:
    none = Detections((60, 40), BOXES[:0], np.zeros(0), np.zeros(0, int), NAMES, Masks((60, 40)))
    results = none.to_ultralytics(picture)
    assert len(results) == 0
    np.testing.assert_array_equal(results.plot(), results.orig_img)
    with pytest.raises(UserError, match="60 x 40 pixels that these objects were found in; got 40 x 60"):
        none.to_ultralytics(np.zeros((60, 40, 3), np.uint8))
    with pytest.raises(UserError, match="expected a"):
        none.to_ultralytics(picture.parent / "missing.png")
