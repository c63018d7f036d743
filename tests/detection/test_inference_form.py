"""The forms that only answer, that of torch and that of exported files, give the answers of the network that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.core.checkpoint import save_weights
from foveal.detection import YOLOv13, YOLOv13Config, load_official
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.checkpoints.compact import compact
from foveal.detection.models.blocks import BatchNorm
from foveal.detection.models.graph_form import GraphHyperedges, graph_form
from foveal.detection.models.inference import FoldedHyperedges, inference_form
from foveal.kernels.nn import HyperedgeAttention


@pytest.mark.parametrize("scale", ["n", "s"])
@pytest.mark.parametrize(
    ("form", "gradient"), [(inference_form, False), (inference_form, True), (graph_form, False)], ids=["fused activations", "plain", "of files"]
)
def test_the_folded_network_gives_the_same_numbers(golden: Any, scale: str, gradient: bool, form: Any) -> None:
    reference = golden("yolov13")
    model = load_official("yolov13", reference.state(reference.about["state_dict"][scale]))
    folded = form(model)
    image = torch.rand(2, 3, 64, 96)
    with torch.set_grad_enabled(gradient):
        expected, actual = model(image), folded(image)
    for mine, theirs in zip(actual.maps, expected.maps, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
    torch.testing.assert_close(actual.decoded, expected.decoded, rtol=1e-4, atol=1e-3)
    assert not [part for part in folded.modules() if isinstance(part, BatchNorm)]


def test_folding_leaves_the_network_as_it_was(golden: Any) -> None:
    reference = golden("yolov13_n")
    model = load_official("yolov13", reference.state(reference.about["state_dict"]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inference_form(model), graph_form(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weights_without_statistics_answer_the_same_and_are_below_five_megabytes(golden: Any, tmp_path: Path) -> None:
    reference = golden("yolov13_n")
    model = load_official("yolov13", reference.state(reference.about["state_dict"]))
    assert isinstance(model, YOLOv13)
    state, image = compact(model), torch.rand(1, 3, 64, 64)
    save_weights(tmp_path / "single.safetensors", state, system="yolov13", config=model.config)
    with torch.no_grad():
        expected, actual = model(image), model_from_weights(tmp_path / "single.safetensors")(image)
    for mine, theirs in zip(actual.maps, expected.maps, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
    save_weights(tmp_path / "half.safetensors", state, system="yolov13", config=model.config, dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 5_000_000


@pytest.mark.parametrize("context", ["both", "mean", "max"])
def test_folded_hyperedges_are_equal_in_double_precision(context: str) -> None:
    torch.manual_seed(0)
    module = HyperedgeAttention(32, 5, heads=2, context=context).double().eval()
    cells = torch.randn(2, 70, 32, dtype=torch.float64)
    expected = module(cells)
    torch.testing.assert_close(FoldedHyperedges(module)(cells), expected, rtol=1e-12, atol=1e-12)
    on_map = GraphHyperedges(module)(cells.transpose(1, 2).unflatten(2, (7, 10)))
    torch.testing.assert_close(on_map.flatten(2).transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def test_layer_scale_and_nested_blocks_have_a_graph_form() -> None:
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("l", 2)).eval()
    for name, value in model.named_parameters():
        if name.endswith(("gate", "layer_scale")):
            value.data.fill_(0.5)  # they start at nothing, and would hide what is wrong with them
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(graph_form(model)(image).maps, model(image).maps, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("task", ["segment", "pose", "oriented"])
@pytest.mark.parametrize("form", [inference_form, graph_form])
def test_every_head_has_a_folded_form(task: str, form: Any) -> None:
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 3, task=task, attend={"stage3": "eca", "neck4": "ela", "neck5": "ulsam"})).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, actual = model(image), form(model)(image)
    torch.testing.assert_close(actual.decoded, expected.decoded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.extra, expected.extra, rtol=1e-4, atol=1e-3)
    if task == "segment":
        torch.testing.assert_close(actual.prototypes, expected.prototypes, rtol=1e-4, atol=1e-4)
