"""What convex outlines share is exact: by hand, by the area of the union in pixels, and by what must hold of every pair."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.detection.data.labels import LabelledPicture, Labels
from foveal.detection.evaluate import overlaps
from foveal.detection.metrics import average_precision, coco_ground_truth, coco_oriented
from foveal.detection.polygons import is_convex, polygon_overlap, shared_areas
from foveal.detection.postprocess import corners_of_turned

_BOXES = st.lists(
    st.tuples(st.floats(-50, 50), st.floats(-50, 50), st.floats(0.5, 60), st.floats(0.5, 60), st.floats(-math.pi, math.pi)), min_size=1, max_size=6
).map(np.array)
_SQUARE = np.array([[0, 0], [2, 0], [2, 2], [0, 2.0]])


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return polygon_overlap(corners_of_turned(first), corners_of_turned(second))


@pytest.mark.parametrize(
    ("other", "area"),
    [
        (_SQUARE, 4.0),
        (_SQUARE[::-1], 4.0),  # the other way round
        (1 + _SQUARE, 1.0),
        (_SQUARE + np.array([2, 0]), 0.0),  # touches along a side
        (_SQUARE + np.array([5, 0]), 0.0),
        (_SQUARE / 4 + 1, 0.25),  # inside
        (_SQUARE * 3 - 1, 4.0),  # around
        (np.array([[1, 1 - 2], [1 + 2, 1], [1, 1 + 2], [1 - 2, 1.0]]), 4.0),  # a square on its tip whose sides touch the corners
        (np.array([[1, 0], [2, 1], [1, 2], [0, 1.0]]), 2.0),  # and one within
        (np.array([[1, 1 - math.sqrt(2)], [1 + math.sqrt(2), 1], [1, 1 + math.sqrt(2)], [1 - math.sqrt(2), 1.0]]), 8 * (math.sqrt(2) - 1)),  # octagon
        (np.array([[0, 0], [2, 0], [0, 2.0]]), 2.0),  # a triangle
        (np.array([[1, 1], [1, 1], [1, 1], [1, 1.0]]), 0.0),  # a point
    ],
)
def test_areas_known_by_hand(other: np.ndarray, area: float) -> None:
    assert shared_areas(_SQUARE[None], other[None])[0] == pytest.approx(area, abs=1e-12)
    assert shared_areas(other[None], _SQUARE[None])[0] == pytest.approx(area, abs=1e-12)


def test_a_square_on_its_tip_shares_an_octagon_with_itself_upright() -> None:
    """Of side 2: the octagon has 8 (sqrt 2 - 1) square pixels, and the union the rest of 8."""
    octagon = 8 * (math.sqrt(2) - 1)
    found = _overlap(np.array([[7.0, 9, 2, 2, 0]]), np.array([[7.0, 9, 2, 2, math.pi / 4]]))
    assert found.item() == pytest.approx(octagon / (8 - octagon), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(_BOXES, _BOXES)
def test_overlap_is_symmetric_and_a_share(first: np.ndarray, second: np.ndarray) -> None:
    found = _overlap(first, second)
    np.testing.assert_allclose(found, _overlap(second, first).T, atol=1e-9)
    assert ((found >= 0) & (found <= 1 + 1e-9)).all()


@settings(max_examples=100, deadline=None)
@given(_BOXES)
def test_a_box_is_all_of_itself_however_its_sides_are_named(boxes: np.ndarray) -> None:
    again = np.column_stack((boxes[:, :2], boxes[:, 3], boxes[:, 2], boxes[:, 4] + math.pi / 2))
    np.testing.assert_allclose(np.diag(_overlap(boxes, boxes)), 1, atol=1e-9)
    np.testing.assert_allclose(np.diag(_overlap(boxes, again)), 1, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(_BOXES, _BOXES, st.floats(-math.pi, math.pi), st.floats(-1000, 1000), st.floats(0.1, 10))
def test_turning_moving_and_stretching_both_changes_nothing(first: np.ndarray, second: np.ndarray, angle: float, shift: float, factor: float) -> None:
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

    def changed(boxes: np.ndarray) -> np.ndarray:
        return np.column_stack((boxes[:, :2] @ turn * factor + shift, boxes[:, 2:4] * factor, boxes[:, 4] + angle))

    np.testing.assert_allclose(_overlap(changed(first), changed(second)), _overlap(first, second), atol=1e-8)


@settings(max_examples=100, deadline=None)
@given(_BOXES, _BOXES)
def test_upright_boxes_share_what_their_corners_say(first: np.ndarray, second: np.ndarray) -> None:
    for boxes in (first, second):
        boxes[:, 4] = 0
    corners = [np.column_stack((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2)) for boxes in (first, second)]
    np.testing.assert_allclose(_overlap(first, second), overlaps(*corners), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(_BOXES, _BOXES)
def test_shared_areas_are_those_of_points_that_lie_in_both(first: np.ndarray, second: np.ndarray) -> None:
    points = np.stack(np.meshgrid(np.arange(-100, 100, 0.5), np.arange(-100, 100, 0.5)), -1).reshape(-1, 2) + 0.25

    def within(box: np.ndarray) -> np.ndarray:
        cosine, sine = math.cos(box[4]), math.sin(box[4])
        along = (points - box[:2]) @ np.array([[cosine, -sine], [sine, cosine]])
        return (np.abs(along) <= box[2:4] / 2).all(1)

    area = float((within(first[0]) & within(second[0])).sum()) / 4
    found = shared_areas(corners_of_turned(first[:1]), corners_of_turned(second[:1]))[0]
    assert found == pytest.approx(area, abs=0.5 * 240)  # half a cell along an outline of 240 at most


def test_nothing_shares_nothing_and_outlines_that_turn_both_ways_are_not_convex() -> None:
    assert polygon_overlap(np.zeros((0, 4, 2)), _SQUARE[None]).shape == (0, 1)
    assert polygon_overlap(np.zeros((1, 4, 2)), np.zeros((1, 4, 2))).tolist() == [[0.0]]
    assert is_convex(_SQUARE)
    assert is_convex(_SQUARE[::-1])
    assert not is_convex(np.array([[0, 0], [2, 0], [0.5, 0.5], [0, 2.0]]))


def test_a_turned_square_is_right_by_its_gaussian_and_half_right_by_its_outline(tmp_path: Path) -> None:
    """A square has no angle as a Gaussian. By its outline it shares sqrt(1/2) with itself turned by 45 degrees: enough for five of ten thresholds."""
    picture = LabelledPicture(tmp_path / "a.png", (100, 100), np.array([[30.0, 30, 70, 70]]), np.array([0]), number=3)
    picture.outlines = [np.array([[30, 30], [70, 30], [70, 70], [30, 70.0]])]
    labels = Labels(["ship"], [picture])
    tip = coco_oriented(3, np.array([[50.0, 50, 40, 40, math.pi / 4]]), picture.boxes, np.array([0.9]), [0])
    assert average_precision(coco_ground_truth(labels, "oriented"), tip, "oriented")[0]["AP"] == pytest.approx(1.0)
    numbers, classes = average_precision(coco_ground_truth(labels, "polygons"), tip, "polygons")
    assert (numbers["AP50"], numbers["AP75"]) == pytest.approx((1.0, 0.0))
    assert numbers["AP"] == classes["ship"] == pytest.approx(0.5)


def test_outlines_of_four_corners_are_measured_as_they_are_and_others_by_the_box_around_them(tmp_path: Path) -> None:
    leaning = np.array([[10, 10], [50, 10], [70, 40], [30, 40.0]])
    five = np.array([[10, 60], [50, 60], [50, 80], [30, 90], [10, 80.0]])
    picture = LabelledPicture(tmp_path / "a.png", (100, 100), np.array([[10.0, 10, 70, 40], [10, 60, 50, 90]]), np.array([0, 0]), number=0)
    picture.outlines = [leaning, five]
    first, second = coco_ground_truth(Labels(["ship"], [picture]), "polygons")["annotations"]
    assert first["segmentation"] == [leaning.ravel().tolist()]
    around = np.array(second["segmentation"][0]).reshape(4, 2)
    assert sorted(map(tuple, around.round(3).tolist())) == [(10, 60), (10, 90), (50, 60), (50, 90)]
