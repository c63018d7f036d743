"""Selective dense attention equals the authors', and behaves as its weights say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foveal.detection import load_official, to_official
from foveal.detection.models.selective_attention import SelectiveDenseConfig, SelectiveDenseNeck

SIZES = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]


def test_every_level_of_a_pyramid_is_the_authors(golden: Any) -> None:
    reference = golden("sdanet_sda")
    neck = load_official("sdanet_neck", reference.state(reference.about["state_dict"]))
    assert sum(parameter.numel() for parameter in neck.parameters()) == reference.about["parameters"]
    generator = np.random.default_rng(0)
    maps = [torch.from_numpy(generator.standard_normal((1, 256, *size)).astype(np.float32)) for size in SIZES]
    with torch.inference_mode():
        for level, refined in enumerate(neck(maps)):
            assert reference.error(f"l{level}_c0", refined[0, :2]) < 1e-5
            np.testing.assert_allclose([refined.mean(), refined.std(), refined.abs().max()], reference[f"l{level}_stat"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", range(5))
def test_weights_of_levels_outputs_and_gradients_are_the_authors(golden: Any, draw: Any, level: int) -> None:
    reference = golden("sdanet_sda_parts")
    neck = load_official("sdanet_neck", reference.state(reference.about["state_dict"]))
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    maps = [draw(f"in:map_{place}", (2, 256, *size), "").requires_grad_() for place, size in enumerate(sizes)]
    selection, kept = neck.selections[level], {}
    for name in ("channel", "place", "context"):
        getattr(selection, name).register_forward_hook(lambda module, inputs, output, name=name: kept.update({name: output}))
    refined = selection(maps)
    name = f"out_level_{level}"
    assert reference.error(name, refined) < 1e-5
    if f"mid_level_{level}_channel_att" in reference:
        assert reference.error(f"mid_level_{level}_channel_att", kept["channel"]) < 1e-5
        assert reference.error(f"mid_level_{level}_spatial_att", kept["place"]) < 1e-5
        assert reference.error(f"mid_level_{level}_refine", kept["context"]) < 1e-5
    probe = (refined * draw(f"level_{level}", tuple(refined.shape), "r:")).sum()
    assert float(probe.detach()) == pytest.approx(float(reference[f"level_{level}.loss_probe"]), rel=1e-4, abs=1e-3)
    probe.backward()
    for place, x in enumerate(maps):
        assert x.grad is not None
        assert float(x.grad.norm()) == pytest.approx(float(reference[f"level_{level}.grad_in_map_{place}"]), rel=1e-3)
    context = f"level_{level}.grad_selective_attention_{level}.refine.conv_mask.weight"
    assert float(selection.context.place.weight.grad.norm()) == pytest.approx(float(reference[context]), rel=1e-3)


def test_the_authors_keys_come_back_as_they_went_in(golden: Any) -> None:
    reference = golden("sdanet_sda")
    official = reference.state(reference.about["state_dict"])
    back = to_official("sdanet_neck", load_official("sdanet_neck", official))
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], value) for key, value in official.items())


def test_a_fresh_neck_of_any_width_keeps_shapes_and_has_gradients_everywhere() -> None:
    neck = SelectiveDenseNeck(SelectiveDenseConfig(channels=32, levels=3, hidden=8, kernel=3))
    maps = [torch.randn(2, 32, *size) for size in ((12, 9), (6, 5), (3, 3))]
    refined = neck(maps)
    assert [x.shape for x in refined] == [x.shape for x in maps]
    sum(x.square().sum() for x in refined).backward()
    silent = [name for name, parameter in neck.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # behind a last layer of zeros nothing moves in the first step
    assert all("context" in name for name in silent)


@pytest.mark.parametrize("wrong", [2, 4])
def test_another_number_of_levels_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="expected 3 maps"):
        SelectiveDenseNeck(SelectiveDenseConfig(channels=16, levels=3))([torch.zeros(1, 16, 4, 4)] * wrong)
