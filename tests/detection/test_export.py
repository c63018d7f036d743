"""An exported file answers as torch does, for any number of pictures, and in half precision."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.apps.main import run
from foveal.core.errors import UserError
from foveal.detection import YOLOv13, YOLOv13Config
from foveal.detection.export import export_onnx


@pytest.mark.parametrize("half", [False, True], ids=["single", "half"])
def test_the_command_writes_a_file_that_takes_one_picture_and_three(
    weights: Path, tmp_path: Path, half: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "x.onnx"
    assert run(["detection", "export", str(file), "--checkpoint", str(weights), "--json", *(["--half"] if half else [])]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["differences"]["scores"] < (0.05 if half else 1e-4)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    assert entry.type == ("tensor(float16)" if half else "tensor(float)")
    for pictures in (1, 3):
        image = np.random.default_rng(0).random((pictures, 3, 64, 64)).astype(np.float16 if half else np.float32)
        assert session.run(None, {entry.name: image})[0].shape == (pictures, 7, 84)
    assert json.loads(session.get_modelmeta().custom_metadata_map["names"]) == ["cat", "dog", "hen"]
    assert file.stat().st_size < (6e6 if half else 11e6)
    assert run(["detection", "export", str(file), "--checkpoint", str(weights)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_masks_have_their_prototypes_beside_them(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    export_onnx(YOLOv13(YOLOv13Config("n", 2, task="segment")).eval(), tmp_path / "x.onnx", image_size=64)
    names = [output.name for output in onnxruntime.InferenceSession(str(tmp_path / "x.onnx")).get_outputs()]
    assert names == ["decoded", "extra", "prototypes"]


@pytest.mark.parametrize(("task", "name"), [("segment", "coefficients"), ("pose", "keypoints"), ("oriented", "angles")])
def test_a_file_whose_further_numbers_are_others_than_torchs_is_refused(
    tmp_path: Path, task: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveal.detection.models.graph_form import graph_form

    def spoilt(model: YOLOv13) -> YOLOv13:
        made = graph_form(model)
        for level in made.head.extra:
            level[-1].bias += 0.5  # type: ignore[index]
        return made

    monkeypatch.setattr("foveal.detection.export.graph_form", spoilt)
    with pytest.raises(UserError, match=name):
        export_onnx(YOLOv13(YOLOv13Config("n", 2, task=task)).eval(), tmp_path / "x.onnx", image_size=64)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("half", [False, True], ids=["single", "half"])
@pytest.mark.parametrize(("task", "name"), [("segment", "prototypes"), ("pose", "keypoints"), ("oriented", "angles")])
def test_every_head_has_a_file_in_both_precisions(tmp_path: Path, task: str, name: str, half: bool) -> None:
    found = export_onnx(YOLOv13(YOLOv13Config("n", 2, task=task)).eval(), tmp_path / "x.onnx", image_size=64, half=half)
    assert found[name] < (0.02 if half else 1e-4)


@pytest.mark.parametrize("task", ["segment", "pose", "oriented"])
def test_files_of_every_head_with_attention_in_them_answer_as_torch(tmp_path: Path, task: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 2, task=task, attend={"stage3": "eca", "neck4": "ela", "neck5": "ulsam"})).eval()
    export_onnx(model, tmp_path / "x.onnx", image_size=64)
    image = torch.rand(3, 3, 64, 64)
    found = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"]).run(None, {"image": image.numpy()})
    with torch.no_grad():
        said = model(image)
    for actual, expected in zip(found, (said.decoded, said.extra, said.prototypes), strict=False):
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-3)


def test_maps_are_not_cut_on_their_way_through_the_file_and_large_logits_keep_their_boxes(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = YOLOv13(YOLOv13Config("n", 2)).eval()
    for way in model.head.box:
        way[-1].bias.data.copy_(torch.linspace(-500, 500, 64))  # type: ignore[index]
    export_onnx(model, tmp_path / "x.onnx", image_size=64)
    count = Counter(node.op_type for node in onnx.load(str(tmp_path / "x.onnx")).graph.node)
    assert not count["Slice"]
    assert not count["Shape"]  # sizes are constants but for the number of pictures, which no node asks for
    assert count["Split"] <= 3  # of the cells' numbers alone
    image = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    found = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(torch.from_numpy(image)).decoded, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("name", "size"), [("x.pt", 64), ("x.onnx", 100)])
def test_a_target_or_size_that_cannot_be_is_refused(tmp_path: Path, name: str, size: int) -> None:
    with pytest.raises(UserError, match="expected"):
        export_onnx(YOLOv13(YOLOv13Config("n", 2)), tmp_path / name, image_size=size)


def test_latency_says_what_was_measured(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["detection", "benchmark", "--checkpoint", str(weights), "--image-size", "64", "--rounds", "2", "--batch", "2", "--threads", "1"]
    assert run([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["setting"] | {"batch": 2, "image_size": 64, "precision": "float32", "rounds": 2} == shown["setting"]
    assert {"torch, inference form", "torch, inference form + suppression"} <= set(shown["latency"])
    assert run([*command, "--precision", "int8"]) == 2
