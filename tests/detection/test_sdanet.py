"""SDANet: boxes are coded as each convention says, the losses fall where the labels are, the authors' keys have their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.detection import load_official, to_official
from foveal.detection.models.box_convention import EDGES, PIXELS, BoxConvention
from foveal.detection.models.sdanet import SDANet, SDANetConfig, paste
from foveal.detection.models.sdanet_loss import NOTHING, Objects, assign, losses, sample


@pytest.fixture(scope="module")
def small() -> SDANet:
    torch.manual_seed(0)
    return SDANet(SDANetConfig(classes=3, depth=18, proposals=8, detections=3, score=0.0)).eval()


@pytest.mark.parametrize(("convention", "first"), [(PIXELS, [-21.0, -9.0, 24.0, 12.0]), (EDGES, [-22.627417, -11.313708, 22.627417, 11.313708])])
def test_anchors_are_those_of_each_version(convention: BoxConvention, first: list[float]) -> None:
    anchors = convention.anchors((2, 3), 4, 8.0, (0.5, 1.0, 2.0), torch.device("cpu"))
    assert anchors.shape == (2 * 3 * 3, 4)
    # 32 pixels a side at ratio 1; at ratio 0.5, of equal area, 45.25 by 22.63: around the middle 1.5 of four pixels, or around their corner
    torch.testing.assert_close(anchors[0], torch.tensor(first))
    torch.testing.assert_close(anchors[9] - anchors[0], torch.tensor([0.0, 4, 0, 4]))  # the next row, ratios and columns before it


@given(st.integers(0, 2**31 - 1), st.sampled_from([PIXELS, EDGES]))
@settings(max_examples=30, deadline=None)
def test_a_coded_box_is_decoded_to_itself(seed: int, convention: BoxConvention) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = 200 * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners, corners + 5 + 60 * torch.rand(6, 2, generator=generator, dtype=torch.float64)], -1)
    spread = (0.1, 0.1, 0.2, 0.2)
    codes = convention.encode(boxes[:3], boxes[3:], spread)
    torch.testing.assert_close(convention.decode(boxes[:3], codes, spread, (400, 400)), boxes[3:])


def test_a_box_of_one_pixel_has_an_overlap_where_pixels_count() -> None:
    one, two = torch.tensor([[3.0, 3, 3, 3]]), torch.tensor([[3.0, 3, 4, 3]])
    assert PIXELS.overlap(one, two).item() == 0.5  # one of two pixels
    assert EDGES.overlap(one, two).isnan().item() or EDGES.overlap(one, two).item() == 0.0  # nothing lies between its edges


@pytest.mark.parametrize(("side", "level"), [(20, 0), (111, 0), (113, 1), (224, 2), (500, 3), (5000, 3)])
def test_regions_come_from_the_level_of_their_size(side: float, level: int) -> None:
    assert EDGES.level_of(torch.tensor([[0.0, 0, side, side]]), 4).item() == level


def test_a_level_pools_what_lies_under_the_box() -> None:
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)  # the value is the column, of 4 pixels each
    boxes = torch.tensor([[16.0, 16, 48, 48]])
    pooled = EDGES.pool([ramp], [4], boxes, torch.zeros(1, dtype=torch.long), 2)
    # columns 4 to 12 in two halves, read at their cells' centres: middles 6 and 10, half a cell to the left of the value's place
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[5.5, 9.5], [5.5, 9.5]]))


def test_boxes_between_the_thresholds_teach_nothing_and_the_nearest_one_always_does() -> None:
    overlap = torch.tensor([[0.8, 0.5, 0.1, 0.2], [0.1, 0.4, 0.2, 0.35]])
    assert assign(overlap, 0.7, 0.3).tolist() == [0, -2, NOTHING, -2]
    assert assign(overlap, 0.7, 0.3, 0.3).tolist() == [0, 1, NOTHING, -2]  # of the second object 0.4 is the most
    assert assign(torch.zeros(0, 3), 0.5, 0.5).tolist() == [NOTHING] * 3


def test_samples_hold_no_more_objects_than_their_share() -> None:
    match = torch.tensor([0] * 50 + [NOTHING] * 50 + [-2] * 20)
    chosen = sample(match, 40, 0.25)
    assert (match[chosen] >= 0).sum() == 10
    assert (match[chosen] == NOTHING).sum() == 30
    assert len(chosen.unique()) == 40


def test_a_mask_is_pasted_where_its_box_is() -> None:
    masks = torch.zeros(1, 28, 28)
    masks[:, :, 14:] = 1.0  # the right half of the object
    pasted = paste(masks, torch.tensor([[10.0, 5, 20, 15]]), (20, 30))
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[5:15, 15:20] = True
    assert torch.equal(pasted[0], expected)


@pytest.mark.parametrize("convention", ["pixels", "edges"])
def test_a_step_lowers_the_loss_and_reaches_every_parameter(convention: str) -> None:
    torch.manual_seed(0)
    model = SDANet(SDANetConfig(classes=2, depth=18, convention=convention, proposals=6)).train()
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    image[:, :, 20:44, 16:48] = -2.0
    mask[:, 20:44, 16:48] = True
    objects, sizes = [Objects(torch.tensor([[16.0, 20, 48, 44]]), torch.tensor([1]), mask)] * 2, [(64, 64)] * 2
    torch.manual_seed(1)
    parts = losses(model, image, objects, sizes)
    assert set(parts) == {"proposals/objects", "proposals/boxes", *(f"stage{n}/{part}" for n in (1, 2, 3) for part in ("classes", "boxes", "masks"))}
    total = sum(parts.values())
    total.backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(name.startswith("backbone.body.fc") or "layer_blocks.3" in name for name in silent), silent
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.optim.SGD(model.parameters(), 1.0).step()
    torch.manual_seed(1)
    assert sum(losses(model, image, objects, sizes).values()) < total


def test_a_picture_without_objects_teaches_the_background_alone(small: SDANet) -> None:
    empty = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 64, 64, dtype=torch.bool))
    parts = losses(small, torch.rand(1, 3, 64, 64), [empty], [(64, 64)])
    assert all(value.isfinite() for value in parts.values())
    assert parts["stage1/boxes"] == parts["stage1/masks"] == 0


def test_detections_are_sorted_inside_the_picture_and_as_many_as_asked_for(small: SDANet) -> None:
    (found,) = small(torch.rand(1, 3, 64, 96), [(60, 90)])
    assert len(found.scores) == 3
    assert (found.scores.diff() <= 0).all()
    assert found.boxes.min() >= 0
    assert found.boxes[:, 2].max() <= 89  # the last pixel's centre
    assert found.boxes[:, 3].max() <= 59
    assert ((found.masks >= 0) & (found.masks <= 1)).all()


@pytest.mark.parametrize(("convention", "version"), [("pixels", 1), ("edges", 2)])
def test_the_authors_layout_loads_and_comes_back(convention: str, version: int) -> None:
    model = SDANet(SDANetConfig(classes=12, depth=50, convention=convention))
    generator = np.random.default_rng(0)
    official = to_official("sdanet", model)
    places = {"selective_attention_0.channel_att.fcs.4.weight", "bbox_head.2.fc_reg.bias", "mask_head.0.upsample.weight", "rpn_head.rpn_conv.weight"}
    if version == 2:
        places = {
            "neck.selective_attention_0.channel_att.fcs.4.weight", "roi_head.bbox_head.2.fc_reg.bias", "roi_head.mask_head.0.upsample.weight",
            "rpn_head.rpn_conv.weight",
        }  # fmt: skip
    assert places | {"backbone.layer3.5.bn3.running_var", "neck.lateral_convs.3.conv.bias", "neck.fpn_convs.0.conv.weight"} <= set(official)
    official["rpn_head.rpn_cls.bias"] = torch.from_numpy(generator.standard_normal(3).astype(np.float32))
    back = load_official("sdanet", official, depth=50)
    assert torch.equal(back.proposal.score.bias, official["rpn_head.rpn_cls.bias"])
    assert back.convention.name == convention  # the keys told the version


@pytest.mark.parametrize("wrong", [{"depth": 20}, {"convention": "corners"}, {"classes": 0}])
def test_a_config_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        SDANetConfig(**wrong)


def test_pictures_that_do_not_fit_are_refused_with_their_shape(small: SDANet) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        small(torch.zeros(1, 3, 50, 64))
