"""ECA, ELA and ULSAM stand behind any stage of a YOLOv13: they learn, start from a network without them, are saved, folded and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveal.core.checkpoint import save_weights
from foveal.detection import YOLOv13, YOLOv13Config
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.checkpoints.compact import compact
from foveal.detection.models.inference import inference_form
from foveal.detection.models.yolov13 import CHANNEL_ATTENTION, STAGES
from foveal.detection.tasks.detection import start_from

EVERYWHERE = dict(zip(STAGES, ("eca", "ela", "ulsam", "eca", "ela", "ulsam", "ela"), strict=True))


@pytest.fixture(scope="module")
def attending() -> YOLOv13:
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 3, attend=EVERYWHERE))
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)  # tunnels start shut, and would hide what lies behind them
    return model


@pytest.mark.parametrize("block", sorted(CHANNEL_ATTENTION))
@pytest.mark.parametrize("stage", ["stage2", "stage5", "neck3"])
def test_a_block_changes_the_answer_keeps_its_shape_and_learns(stage: str, block: str) -> None:
    torch.manual_seed(0)
    plain = YOLOv13(YOLOv13Config("n", 3))
    model = YOLOv13(YOLOv13Config("n", 3, attend={stage: block}))
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    image, answers = torch.rand(2, 3, 64, 96), []
    for network in (plain, model):  # in training, where norms keep what is drawn at random from dying away
        torch.manual_seed(1)
        answers.append(network.levels(image))
    expected, said = answers
    assert [level.shape for level in said] == [level.shape for level in expected]
    assert (said[0] - expected[0]).abs().max() > 1e-3
    said[0].square().sum().backward()
    silent = [name for name, parameter in model.attend.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert silent == []


def test_blocks_behind_every_stage_are_saved_and_folded(attending: YOLOv13, tmp_path: Path) -> None:
    attending.eval()
    file = save_weights(tmp_path / "attending.safetensors", compact(attending), system="yolov13", config=attending.config)
    model = model_from_weights(file)
    assert model.config == attending.config  # type: ignore[comparison-overlap]
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, read, folded = (network(image).decoded for network in (attending, model, inference_form(attending)))
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-3)


def test_a_training_with_blocks_starts_from_a_network_without(attending: YOLOv13, tmp_path: Path) -> None:
    torch.manual_seed(1)
    plain = YOLOv13(YOLOv13Config("n", 3))
    file = save_weights(tmp_path / "plain.safetensors", plain.state_dict(), system="yolov13", config=plain.config)
    left = start_from(attending, str(file))
    assert left
    assert all(key.startswith("attend.") for key in left)
    assert torch.equal(attending.stage4.reduce.conv.weight, plain.stage4.reduce.conv.weight)
