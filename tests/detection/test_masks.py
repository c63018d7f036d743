"""Masks kept as run lengths of their boxes are those of the whole picture, in every form in which they are asked for."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from foveal.detection import Detections, Detector, YOLOv13, YOLOv13Config
from foveal.detection.masks import Masks, encoded, outline_of
from foveal.detection.models.heads import Prediction, masks_of
from foveal.detection.plots import colour_of, draw
from foveal.detection.postprocess import letterbox, masks_in_picture
from foveal.detection.predict import Options

_WHOLE = arrays.arrays(bool, arrays.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7))


@settings(max_examples=60, deadline=None)
@given(_WHOLE)
def test_masks_are_the_arrays_that_they_were_made_of(whole: np.ndarray) -> None:
    masks = Masks.of(whole)
    assert masks.shape == whole.shape
    np.testing.assert_array_equal(np.asarray(masks), whole)
    np.testing.assert_array_equal(np.stack(list(masks)), whole)
    for row, mask in enumerate(whole):
        np.testing.assert_array_equal(masks[row], mask)
        assert masks.run_lengths(row) == encoded(mask)
        assert masks.outline(row) == outline_of(mask)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rectangles_anywhere_in_the_picture_are_the_same_masks(data: st.DataObject) -> None:
    """Also rectangles of nothing, without rows or columns, and of the whole picture."""
    width, height = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    left, top = data.draw(st.integers(0, width)), data.draw(st.integers(0, height))
    inside = data.draw(arrays.arrays(bool, (data.draw(st.integers(0, height - top)), data.draw(st.integers(0, width - left)))))
    whole = np.zeros((height, width), bool)
    whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    masks = Masks((width, height), [(left, top, inside)])
    np.testing.assert_array_equal(masks[0], whole)
    assert masks.run_lengths(0) == encoded(whole)
    assert masks.outline(0) == outline_of(whole)


def test_masks_are_chosen_joined_and_moved_as_arrays_are() -> None:
    whole = np.random.default_rng(0).random((4, 5, 6)) < 0.5
    masks = Masks.of(whole)
    choices: list[Any] = [[2, 0], [True, False, False, True], np.array([3]), np.zeros(0, int), np.zeros(4, bool), slice(1, 3)]
    for chosen in choices:
        picked = masks[chosen]
        assert isinstance(picked, Masks)
        np.testing.assert_array_equal(np.asarray(picked), whole[chosen])
    assert len(masks[[]]) == 0
    np.testing.assert_array_equal(np.asarray(Masks.joined([masks[[1]], masks])), whole[[1, 0, 1, 2, 3]])
    moved = np.zeros((4, 20, 30), bool)
    moved[:, 7:12, 3:9] = whole
    np.testing.assert_array_equal(np.asarray(masks.moved(3, 7, (30, 20))), moved)
    for wrong in (lambda: masks.moved(25, 0, (30, 20)), lambda: Masks((6, 5), [(5, 0, np.ones((1, 2), bool))])):
        with pytest.raises(ValueError, match=r"expected a (tile|mask) within"):
            wrong()
    with pytest.raises(ValueError, match="one size"):
        Masks.joined([masks, Masks((1, 1))])


@pytest.mark.parametrize("size", [(64, 48), (333, 217), (90, 700), (1, 40)])
def test_cropped_masks_are_those_of_the_whole_picture_cut_to_their_boxes(size: tuple[int, int]) -> None:
    """Held against the interpolation of all logits to the whole picture; but for rounding where the logits are nothing."""
    generator = torch.Generator().manual_seed(0)
    image, factor, padding = letterbox(torch.zeros(3, size[1], size[0]), 160)
    seen = (image.shape[1], image.shape[2])
    prototypes, coefficients = torch.randn(8, seen[0] // 4, seen[1] // 4, generator=generator), torch.randn(21, 8, generator=generator)
    ends = torch.rand(21, 2, 2, generator=generator).sort(1).values * torch.tensor(size)
    boxes = torch.cat((ends[:, 0], ends[:, 1]), 1)
    boxes[0] = torch.tensor([0, 0, *size])
    masks = masks_in_picture(prototypes, coefficients, boxes, seen, factor, padding, size)
    inner = (max(round(size[1] * factor), 1), max(round(size[0] * factor), 1))
    logits = masks_of(prototypes, coefficients, seen)[:, padding[1] : padding[1] + inner[0], padding[0] : padding[0] + inner[1]]
    whole = F.interpolate(logits[None], (size[1], size[0]), mode="bilinear", align_corners=False)[0]
    for row, (left, top, right, bottom) in enumerate(boxes.round().int().tolist()):
        expected = np.zeros((size[1], size[0]), bool)
        expected[top:bottom, left:right] = whole[row, top:bottom, left:right] > 0
        differ = masks[row] != expected
        assert not (differ & (whole[row].abs().numpy() > 1e-5)).any()
        assert differ.sum() <= 2


class _Everywhere(YOLOv13):
    """Finds five objects in every picture; their masks are where its colours are bright."""

    def forward(self, image: torch.Tensor) -> Any:
        height, width = image.shape[2:]
        decoded = torch.zeros(1, 6, 5)
        for number in range(5):
            decoded[0, :5, number] = torch.tensor([width * (3 + number) / 10, height / 2, width / 3, height * (2 + number) / 8, 0.9 - number / 20])
        return Prediction(decoded, (), torch.eye(3, 5)[None] - 0.2, F.avg_pool2d(image, 4) - 0.4)


def test_masks_of_tiles_are_those_of_each_tile_alone_put_in_its_place() -> None:
    detector = Detector(_Everywhere(YOLOv13Config("n", 2, "segment")).eval(), ["cat", "dog"], image_size=64)
    image = np.random.default_rng(0).integers(0, 256, (150, 130, 3), dtype=np.uint8)
    found = detector.detect(image, Options(tile=100, overlap=1.0))
    assert found.masks is not None
    assert len(found.masks) == len(found) == 25  # of the whole picture and of four tiles
    alone = [np.asarray(detector.detect(image, Options(overlap=1.0)).masks)]
    for top in (0, 50):
        for left in (0, 30):
            part = np.asarray(detector.detect(image[top : top + 100, left : left + 100], Options(overlap=1.0)).masks)
            whole = np.zeros((len(part), 150, 130), bool)
            whole[:, top : top + 100, left : left + 100] = part
            alone.append(whole)
    known = {mask.tobytes() for mask in np.concatenate(alone)}
    assert all(mask.tobytes() in known for mask in found.masks)
    assert len({mask.tobytes() for mask in found.masks}) > 12
    wide = detector.detect(np.zeros((40, 60, 3), np.uint8), Options(score=1.0))
    assert wide.masks is not None
    assert np.asarray(wide.masks).shape == (0, 40, 60)


def test_many_masks_in_a_large_picture_need_less_memory_than_one_array_of_it() -> None:
    size = (5000, 4000)
    image, factor, padding = letterbox(torch.zeros(3, size[1], size[0]), 640)
    corners = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([4800, 3800])
    boxes = torch.cat((corners, corners + 200), 1)
    tracemalloc.start()
    try:
        masks = masks_in_picture(torch.ones(4, image.shape[1] // 4, 160), torch.ones(60, 4), boxes, (image.shape[1], 640), factor, padding, size)
        found = Detections(size, boxes.numpy(), np.ones(60), np.zeros(60, int), ["cell"], masks)
        assert all(entry["outline"] for entry in found.to_dicts())
        assert len(found.to_yolo().splitlines()) == 60
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert highest < size[0] * size[1]
    assert masks[0].sum() == 200 * 200


def test_masks_are_shaded_where_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    whole = np.zeros((2, 40, 60), bool)
    whole[0, 5:20, 10:30], whole[1, 15:38, 25:50] = True, True
    boxes = np.array([[10, 5, 30, 20], [25, 15, 50, 38]], float)
    names = ["a", "b"]
    bare = draw(image, Detections((60, 40), boxes, np.ones(2), np.arange(2), names))
    drawn = draw(image, Detections((60, 40), boxes, np.ones(2), np.arange(2), names, Masks.of(whole)))
    expected = image.astype(float)
    for number, mask in enumerate(whole):
        expected[mask] = 0.55 * expected[mask] + 0.45 * np.array(colour_of(number))
    untouched = (bare == image).all(2) & ((drawn != bare).any(2) | ~whole.any(0))
    assert (untouched & whole.any(0)).sum() > 100
    np.testing.assert_allclose(drawn[untouched], expected[untouched], atol=1.1)
