"""YOLOv13 is the authors': their weights load, and outputs, losses' inputs and gradients are theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foveal.core.errors import UserError
from foveal.detection import YOLOv13, YOLOv13Config, load_official, systems, to_official
from foveal.detection.checkpoints.yolov13 import LAYERS, official_names
from foveal.detection.models.blocks import AreaAttention, AreaBlock, AreaStage, DSBottleneck, DSC3k, DSC3k2, DSConv
from foveal.detection.models.heads import Detect
from foveal.detection.models.hyperace import C3AH, HyperACE, Shrink, Tunnel
from foveal.kernels.nn import HyperedgeAttention

COUNTS = {"n": 2_494_151, "s": 9_055_527, "l": 27_627_783, "x": 64_057_511}


def _layers(model: YOLOv13) -> dict[int, torch.Tensor]:
    """Outputs of the parts of the next run, by the authors' number."""
    found: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        return lambda module, inputs, output: found.__setitem__(number, output)

    for name, number in LAYERS.items():
        if name != "head":
            getattr(model, name).register_forward_hook(keep(number))
    return found


@pytest.mark.parametrize("scale", COUNTS)
def test_parameters_are_as_many_as_published(scale: str) -> None:
    with torch.device("meta"):
        model = YOLOv13(YOLOv13Config(scale))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[scale]
    assert len(model.state_dict()) == (898 if scale in "ns" else 1568)


@pytest.mark.parametrize("scale", ["n", "s"])
def test_every_layer_and_the_prediction_of_the_small_scales_are_the_authors(golden: Any, scale: str) -> None:
    reference = golden("yolov13")
    model = load_official("yolov13", reference.state(reference.about["state_dict"][scale]))
    assert model.config == YOLOv13Config(scale, 80)
    layers = _layers(model)
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 128, 160)).astype("float32"))
    with torch.no_grad():
        decoded = model(image).decoded
    assert reference.error(f"{scale}_pred", decoded) < 1e-5
    assert np.abs(decoded[:, 4:].numpy() - reference[f"{scale}_pred"][:, 4:]).max() < 1e-5
    for number in (4, 6, 8, 9, 11, 14, 18, 23, 27, 31):
        value = layers[number]
        statistics = np.array([value.mean(), value.std(), value.abs().max()])
        np.testing.assert_allclose(statistics, reference[f"{scale}_l{number}_meanstd"], rtol=1e-4, atol=1e-5)
    assert reference.error(f"{scale}_l9_c0", layers[9][0, :2]) < 1e-5


def _misread_gradients_of_attention(model: YOLOv13) -> None:
    """Shuffle the gradients of the norms before attention as they were when those of L and X were stored.

    They are of one picture. On a CPU torch's backward of a batch norm takes a gradient whose strides are (channels, 1, width * channels, channels),
    as the authors' order of reshaping gives for one picture, for one that lies in memory as its map does. Shuffled so, our gradients are the stored
    ones; as they are, they have the slopes of the outputs.
    """

    def misread(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.permute(0, 2, 3, 1).reshape(gradient.shape)

    def shuffle(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(misread)

    for module in model.modules():
        if isinstance(module, AreaAttention):
            module.query_key.register_forward_hook(shuffle)
            if module.areas > 1:  # of a single area the gradient of the position's convolution comes first, and with it its strides
                module.value.register_forward_hook(shuffle)


@pytest.mark.parametrize(("name", "shape"), [("yolov13_n", (2, 3, 64, 96)), ("yolov13_l", None), ("yolov13_x", None)])
def test_maps_layers_and_gradients_of_every_size_are_the_authors(golden: Any, draw: Any, name: str, shape: tuple[int, ...] | None) -> None:
    reference = golden(name)
    official = reference.state(reference.about["state_dict"])
    model = load_official("yolov13", official)
    names = {theirs: ours for ours, theirs, _ in official_names(model)}
    layers = _layers(model)
    if name != "yolov13_n":
        _misread_gradients_of_attention(model)
    image = (reference.tensor("in_x") if shape is None else draw("x", shape)).requires_grad_()
    found = model(image)
    for level, logits in enumerate(found.maps):
        assert reference.error(f"out_raw_{level}", logits) < 1e-5
    assert reference.error("out_pred", found.decoded) < 1e-5
    for number, value in layers.items():
        if f"mid_layer{number}_stats" in reference:
            wide = value.detach().double().numpy()
            np.testing.assert_allclose([wide.mean(), wide.std(), np.abs(wide).max()], reference[f"mid_layer{number}_stats"], rtol=1e-4, atol=1e-6)
    assert reference.error("mid_layer9_channel01", layers[9][0, :2]) < 1e-5

    probe = sum((logits * draw(f"raw_{level}", tuple(logits.shape), "r:")).sum() for level, logits in enumerate(found.maps))
    assert float(probe.detach()) == pytest.approx(float(reference["loss_probe"]), rel=1e-4)
    parameters = dict(model.named_parameters())
    wanted = [key.removeprefix("grad_") for key in reference.arrays if key.startswith("grad_model.")]
    assert sum(int(key.split(".")[1]) < 9 for key in wanted) >= 5
    leaves = [*(parameters[names[key]] for key in wanted), image]
    for key, grad in zip([*wanted, "in_x"], torch.autograd.grad(probe, leaves), strict=True):
        assert float(grad.norm()) == pytest.approx(float(reference[f"grad_{key}"]), rel=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov13_l", "yolov13_x"])
@pytest.mark.parametrize("key", ["model.6.m.0.0.attn.qk.conv.weight", "model.6.m.0.0.attn.pe.conv.weight", "model.1.conv.weight"])
def test_gradients_behind_the_attention_of_a_large_scale_are_slopes_of_its_outputs(golden: Any, draw: Any, name: str, key: str) -> None:
    """Along our gradient the stored outputs rise as steeply as its norm says."""
    reference = golden(name)
    model = load_official("yolov13", {name: value.double() for name, value in reference.state(reference.about["state_dict"]).items()})
    parameter = dict(model.named_parameters())[{theirs: ours for ours, theirs, _ in official_names(model)}[key]]
    image = reference.tensor("in_x").double()

    def probe() -> torch.Tensor:
        maps = model.raw(image).maps
        return torch.stack([(logits * draw(f"raw_{level}", tuple(logits.shape), "r:").double()).sum() for level, logits in enumerate(maps)]).sum()

    (grad,) = torch.autograd.grad(probe(), [parameter])
    step, norm = 1e-3, float(grad.norm())
    with torch.no_grad():
        parameter += step / norm * grad
        above = float(probe())
        parameter -= 2 * step / norm * grad
        below = float(probe())
    assert (above - below) / (2 * step) == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("training", [False, True], ids=["answering", "training"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_two_equal_pictures_have_twice_the_gradients_of_one(training: bool, layout: torch.memory_format) -> None:
    """Which they have not where a norm's gradient of one picture is misread."""
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 3)).double().train(training).to(memory_format=layout)  # type: ignore[call-overload]
    for module in model.modules():
        if isinstance(module, HyperedgeAttention):
            module.dropout = 0.0
        elif isinstance(module, Tunnel):
            torch.nn.init.ones_(module.gate)
    image = torch.rand(1, 3, 64, 96, dtype=torch.double).contiguous(memory_format=layout)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cotangents = [torch.randn_like(logits) for logits in model.raw(image).maps]

    def gradients(count: int) -> tuple[torch.Tensor, ...]:
        maps = model.raw(image.expand(count, -1, -1, -1).contiguous(memory_format=layout)).maps
        total = torch.stack([(logits * cotangent).sum() for logits, cotangent in zip(maps, cotangents, strict=True)]).sum()
        return torch.autograd.grad(total, parameters)

    for one, two in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(2 * one, two, rtol=1e-6, atol=1e-9)


def test_the_published_size_gives_the_authors_prediction(golden: Any, draw: Any) -> None:
    reference = golden("yolov13_n_640")
    model = load_official("yolov13", reference.state(reference.about["state_dict"]))
    shape = (int(reference["out_pred__shape"][0]), 3, 640, 640)
    with torch.no_grad():
        found = model(draw("x", shape).to(memory_format=torch.channels_last))
    assert reference.error("out_pred", found.decoded) < 1e-5
    for level, logits in enumerate(found.maps):
        assert reference.error(f"out_raw_{level}", logits) < 1e-5


def test_double_precision_gives_the_authors_numbers_to_nine_places(golden: Any, draw: Any) -> None:
    reference = golden("yolov13_n")
    model = load_official("yolov13", {key: value.double() for key, value in reference.state(reference.about["state_dict"]).items()})
    with torch.no_grad():
        found = model(draw("x", (2, 3, 64, 96)).double())
    assert reference.error("out64_raw_2", found.maps[2]) < 1e-9
    assert reference.error("out64_pred", found.decoded) < 1e-9


_BLOCKS = {
    "dsconv_stride2": lambda: DSConv(6, 10, 3, 2),
    "dsconv_k7": lambda: DSConv(8, 8, 7),
    "dsbottleneck": lambda: DSBottleneck(8, 8, True, 0.5, (3, 5)),
    "dsc3k": lambda: DSC3k(8, 8, 2, True, 0.5, (3, 7)),
    "dsc3k2_bottleneck": lambda: DSC3k2(8, 16, 1, False, 0.25),
    "dsc3k2_dsc3k": lambda: DSC3k2(12, 16, 2, True, 0.5),
    "aattn_area1": lambda: AreaAttention(16, 2, 1),
    "aattn_area4": lambda: AreaAttention(16, 1, 4),
    "ablock": lambda: AreaBlock(16, 2, 1.5, 4),
    "a2c2f": lambda: AreaStage(24, 64, 1, 4),
    "a2c2f_residual": lambda: AreaStage(64, 64, 1, 4, scaled=True, mlp_ratio=1.5),
    "hypergraph_conv": lambda: HyperedgeAttention(16, 4, heads=4),
    "c3ah": lambda: C3AH(12, 16, 3),
    "hyperace": lambda: HyperACE((16, 16, 32), 32, 1, 4),
    "hyperace_equal_width": lambda: HyperACE((16, 16, 16), 32, 2, 3),
    "downsample": lambda: Shrink(8, 16),
    "downsample_equal_width": lambda: Shrink(8, 8),
    "tunnel": Tunnel,
}


@pytest.mark.parametrize("name", _BLOCKS)
def test_a_block_alone_has_the_authors_output_and_gradients(golden: Any, draw: Any, name: str) -> None:
    reference = golden("yolov13_blocks")
    block = _BLOCKS[name]().eval()
    official = reference.state(reference.about["state_dict"][name])
    names = {theirs: ours for ours, theirs, _ in official_names(block)}
    block.load_state_dict({names[key]: value for key, value in official.items()})
    several = f"in_{name}_0" in reference
    inputs = [reference.tensor(f"in_{name}_{index}") for index in range(4) if f"in_{name}_{index}" in reference] if several else []
    inputs = inputs or [reference.tensor(f"in_{name}")]
    output = block(*(value.requires_grad_() for value in inputs))
    assert reference.error(f"out_{name}", output) < 1e-5
    grads = [key for key in reference.arrays if key.startswith(f"{name}.grad_") and ".grad_in_" not in key]
    if grads:
        parameters = dict(block.named_parameters())
        probe = (output * draw(name, tuple(output.shape), "r:")).sum()
        found = torch.autograd.grad(probe, [parameters[names[key.partition(".grad_")[2]]] for key in grads])
        for key, grad in zip(grads, found, strict=True):
            assert float(grad.norm()) == pytest.approx(float(reference[key]), rel=1e-3), key


@pytest.mark.parametrize(("name", "context"), [("hyperedge_generator", "both"), ("hyperedge_generator_mean", "mean")])
def test_the_incidence_of_cells_and_hyperedges_is_the_authors(golden: Any, name: str, context: str) -> None:
    reference = golden("yolov13_blocks")
    module = HyperedgeAttention(16, 3, heads=4, context=context).eval()
    module.load_state_dict(reference.state(reference.about["state_dict"][name]), strict=False)
    incidence = module.incidence(reference.tensor(f"in_{name}"))
    assert reference.error(f"out_{name}", incidence) < 1e-5
    torch.testing.assert_close(incidence.sum(1), torch.ones(2, 3))


def test_the_head_alone_decodes_as_the_authors(golden: Any) -> None:
    reference = golden("yolov13_blocks")
    head = Detect((8, 16, 24), 3).eval()
    names = {theirs: ours for ours, theirs, _ in official_names(head)}
    official = reference.state(reference.about["state_dict"]["detect"])
    head.load_state_dict({names[key]: value.flatten() if "dfl" in key else value for key, value in official.items()})
    found = head([reference.tensor(f"in_detect_{level}") for level in range(3)])
    assert reference.error("out_detect_pred", found.decoded) < 1e-5
    for level, logits in enumerate(found.maps):
        assert reference.error(f"out_detect_raw_{level}", logits) < 1e-5


@pytest.mark.parametrize("scale", ["n", "l"])
def test_the_authors_keys_come_back_as_they_went_in(golden: Any, scale: str) -> None:
    reference = golden("yolov13_l" if scale == "l" else "yolov13")
    shapes = reference.about["state_dict"]
    official = reference.state(shapes if scale == "l" else shapes[scale])
    back = to_official("yolov13", load_official("yolov13", official))
    assert back.keys() == official.keys()
    assert len(back) == (1568 if scale == "l" else 898)
    assert all(torch.equal(back[key], value) for key, value in official.items())


def test_weights_of_another_scale_or_class_count_are_refused(golden: Any) -> None:
    reference = golden("yolov13_n")
    official = reference.state(reference.about["state_dict"])
    with pytest.raises(UserError, match="misshapen"):
        load_official("yolov13", official, scale="s")
    with pytest.raises(UserError, match="misshapen"):
        load_official("yolov13", official, nc=6)
    with pytest.raises(UserError, match="published scales"):
        load_official("yolov13", official, depth=0.33)


def test_the_system_is_listed() -> None:
    assert {system.name: system.parameters for system in systems()}["yolov13"] == COUNTS["n"]


@pytest.mark.parametrize("shape", [(1, 3, 100, 128), (1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 32)])
def test_a_picture_that_does_not_fit_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 32; got"):
        YOLOv13(YOLOv13Config("n", 2)).eval()(torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong", [{"scale": "m"}, {"classes": 0}, {"task": "boxes"}, {"keypoints": (0, 3)}, {"attend": {"stage9": "eca"}}, {"attend": {"neck3": "se"}}]
)
def test_a_config_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        YOLOv13Config(**wrong)
