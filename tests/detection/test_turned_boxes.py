"""Turned boxes overlap, shut each other out, are measured and are written as boxes that are turned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor, nn

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.detection import Detections, Detector, YOLOv13, YOLOv13Config
from foveal.detection.data.labels import Labels, read_labels
from foveal.detection.data.sets import DetectionData
from foveal.detection.evaluate import evaluate
from foveal.detection.masks import Masks, outline_of
from foveal.detection.metrics import average_precision, coco_ground_truth, coco_oriented, turned_boxes
from foveal.detection.models.heads import Prediction, Segment
from foveal.detection.postprocess import corners_of_turned, probabilistic_overlap, suppress
from foveal.detection.predict import Options
from foveal.detection.tasks.detection import DetectionTask

SIZE, SIDE = (96, 64), 192


def _boxes(generator: np.random.Generator, count: int, spread: float = 100.0) -> np.ndarray:
    low, high = [0, 0, 5, 5, -np.pi / 4], [spread, spread, 60, 20, 3 * np.pi / 4]
    return generator.uniform(low, high, (count, 5)).astype(np.float32)


def test_the_overlap_is_ultralytics() -> None:
    from ultralytics.utils.metrics import batch_probiou

    generator = np.random.default_rng(0)
    first, second = torch.from_numpy(_boxes(generator, 40, 40.0)), torch.from_numpy(_boxes(generator, 50, 40.0))
    found = probabilistic_overlap(first, second)
    torch.testing.assert_close(found, batch_probiou(first, second), rtol=1e-4, atol=1e-5)
    assert 0.3 < float(found.max()) < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3.0, 3.0))
def test_turning_the_picture_leaves_the_overlaps(seed: int, angle: float) -> None:
    boxes = torch.from_numpy(_boxes(np.random.default_rng(seed), 6, 40.0)).double()
    turned = boxes.clone()
    cosine, sine = np.cos(angle), np.sin(angle)
    turned[:, 0], turned[:, 1] = boxes[:, 0] * cosine - boxes[:, 1] * sine, boxes[:, 0] * sine + boxes[:, 1] * cosine
    turned[:, 4] += angle
    torch.testing.assert_close(probabilistic_overlap(turned, turned), probabilistic_overlap(boxes, boxes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_suppression_keeps_ultralytics_boxes_in_their_order(several: bool) -> None:
    """More boxes than are compared at once, in crowds."""
    from ultralytics.utils.nms import non_max_suppression

    generator = np.random.default_rng(1)
    boxes = torch.from_numpy(_boxes(generator, 1400, 150.0))
    scores = torch.from_numpy(generator.random((3, 1400)).astype(np.float32))
    (expected,) = non_max_suppression(
        torch.cat((boxes[:, :4].T, scores, boxes[:, 4:].T))[None], 0.3, 0.4, multi_label=several, max_det=250, nc=3, rotated=True
    )
    found = suppress(torch.cat((boxes[:, :4].T, scores)), extra=boxes[:, 4:].T, oriented=True, score=0.3, overlap=0.4, most=250, several=several)
    assert len(found.scores) == len(expected) == 250
    torch.testing.assert_close(found.scores, expected[:, 4])
    torch.testing.assert_close(found.boxes, torch.cat((expected[:, :4], expected[:, 6:]), 1))
    torch.testing.assert_close(found.classes, expected[:, 5].long())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with two thin turned boxes each, in YOLO's layout; a picture's brightness tells its number."""
    root, generator = tmp_path_factory.mktemp("turned"), np.random.default_rng(0)
    for part in ("images", "labels"):
        (root / part / "test").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", SIZE, (50 * number, 0, 0)).save(root / "images" / "test" / f"{number}.png")
        boxes = np.array([[28, 32, 40, 4, 0.6 + 0.1 * number], [68, 32, 44, 4, -0.6 - 0.1 * number]]) + generator.uniform(-1, 1, (2, 5)) * 0.2
        lines = [f"{kind} " + " ".join(f"{value:.6f}" for value in (points / SIZE).ravel()) for kind, points in enumerate(corners_of_turned(boxes))]
        (root / "labels" / "test" / f"{number}.txt").write_text("\n".join(lines))
    parts = dict.fromkeys(("train", "val", "test"), "images/test")
    (root / "data.yaml").write_text(yaml.safe_dump({**parts, "names": ["ship", "plane"]}))
    return root / "data.yaml"


class Knows(nn.Module):
    """A network that recognises the pictures, and says where their turned boxes are, in the pixels that it sees; upright ones if `blunt`."""

    def __init__(self, labels: Labels, blunt: bool) -> None:
        super().__init__()
        self.labels, self.blunt, self.config = labels, blunt, YOLOv13Config("n", 2, "oriented")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Prediction:
        batch, _, height, width = image.shape
        factor = SIDE / max(SIZE)
        shift = np.array([(width - SIZE[0] * factor) // 2, (height - SIZE[1] * factor) // 2])
        decoded, extra = torch.zeros(batch, 6, 2), torch.zeros(batch, 1, 2)
        for row in range(batch):
            picture = self.labels.pictures[round(float(image[row, 0, height // 2, width // 2]) * 255 / 50)]
            turned = turned_boxes(picture)
            assert turned is not None
            if self.blunt:
                low, high = picture.boxes[:, :2], picture.boxes[:, 2:]
                turned = np.concatenate(((low + high) / 2, high - low, np.zeros((2, 1))), 1)
            decoded[row, :4] = torch.from_numpy(np.concatenate((turned[:, :2] * factor + shift, turned[:, 2:4] * factor), 1)).T
            decoded[row, 4, 0] = decoded[row, 5, 1] = 0.9
            extra[row, 0] = torch.from_numpy(turned[:, 4])
        return Prediction(decoded, (), extra)


@pytest.mark.parametrize("blunt", [False, True], ids=["turned", "upright"])
def test_only_turned_boxes_are_right_where_objects_are_turned(folder: Path, blunt: bool) -> None:
    """Upright boxes around thin turned objects are right as upright boxes and wrong as turned ones."""
    labels = read_labels(folder, "test")
    network: Any = Knows(labels, blunt)
    by_command = evaluate(Detector(network, labels.names, SIDE), labels)
    assert by_command.oriented is not None
    assert by_command.numbers["AP"] == pytest.approx(1.0)
    assert by_command.oriented.numbers["AP"] == pytest.approx(0.0 if blunt else 1.0)
    assert by_command.confusion.diagonal().tolist() == ([0, 0, 0] if blunt else [4, 4, 0])
    assert float(by_command.curves["ship"][100]) == (0.0 if blunt else 1.0)
    learner = DetectionTask(network.config)
    learner.network = network
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = DetectionData(source=str(folder), task="oriented", image_size=SIDE, batch_size=3)
    (logged,) = trainer.test(learner, data, verbose=False)
    assert logged["test/AP"] == pytest.approx(1.0)
    assert by_command.polygons is not None
    assert by_command.polygons.numbers["AP"] == pytest.approx(0.0 if blunt else 1.0)
    for name in ("oriented_AP", "oriented_AP50", "oriented_AP75", "oriented_AP_ship", "polygon_AP", "polygon_AP50", "polygon_AP_ship"):
        assert logged[f"test/{name}"] == pytest.approx(0.0 if blunt else 1.0), name
    (first, *_) = trainer.predict(learner, data)
    assert [found.boxes.shape for found in first] == [(2, 5)] * 3


def test_stored_turned_boxes_are_measured_nearly_as_ultralytics_measures_them(folder: Path) -> None:
    """The same matches; the curves are read off at recalls of 0, 0.01 ... 1 by COCO, and between them by ultralytics."""
    from ultralytics.models.yolo.obb.val import OBBValidator
    from ultralytics.utils.metrics import ap_per_class

    generator, labels = np.random.default_rng(3), read_labels(folder, "test")
    validator: Any = OBBValidator.__new__(OBBValidator)
    validator.iouv, validator.niou = torch.linspace(0.5, 0.95, 10), 10
    predictions, hits, scores, kinds, asked = [], [], [], [], []
    for picture in labels.pictures:
        true = turned_boxes(picture)
        assert true is not None
        found = np.concatenate([true + generator.normal(0, 1, true.shape) * [s, s, s, s, s / 20] for s in (0.3, 1.0, 3.0)]).astype(np.float32)
        sure, classes = -np.sort(-generator.random(6)), np.tile(picture.classes, 3)
        predictions += coco_oriented(picture.number, found, np.zeros((6, 4)), sure, classes)
        matched = validator._process_batch(
            {"bboxes": torch.from_numpy(found), "cls": torch.from_numpy(classes)},
            {"bboxes": torch.from_numpy(true.astype(np.float32)), "cls": torch.from_numpy(picture.classes)},
        )
        hits, scores, kinds, asked = [*hits, matched["tp"]], [*scores, sure], [*kinds, classes], [*asked, picture.classes]
    whole, _ = average_precision(coco_ground_truth(labels, "oriented"), predictions, "oriented")
    theirs = ap_per_class(np.concatenate(hits), np.concatenate(scores), np.concatenate(kinds), np.concatenate(asked))[5]
    assert whole["AP"] == pytest.approx(theirs.mean(), abs=0.02)
    assert whole["AP50"] == pytest.approx(theirs[:, 0].mean(), abs=0.02)
    assert 0.2 < whole["AP"] < 0.9


def test_objects_without_outlines_are_measured_by_upright_boxes_and_crowds_are_not_asked_for(folder: Path) -> None:
    labels = read_labels(folder, "test")
    network: Any = Knows(read_labels(folder, "test"), False)
    truth = coco_ground_truth(labels, "oriented")
    crowd = {**truth["annotations"][1], "id": 99, "iscrowd": 1, "bbox": [0.0, 0.0, 96.0, 64.0]}
    truth["annotations"] = [truth["annotations"][0], crowd]
    turned = turned_boxes(labels.pictures[0])
    assert turned is not None
    found = coco_oriented(0, turned, labels.pictures[0].boxes, np.array([0.5, 0.9]), [0, 1])
    assert average_precision(truth, found, "oriented")[1] == {"ship": pytest.approx(1.0), "plane": -1.0}
    labels.pictures[0].outlines = []
    assert turned_boxes(labels.pictures[0]) is None
    assert evaluate(Detector(network, labels.names, SIDE), labels).oriented is None
    with pytest.raises(ValueError, match="boxes alone"):
        coco_ground_truth(labels, "oriented")


def test_turned_boxes_are_learned_and_measured_by_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = DetectionTask(YOLOv13Config("n", 2, "oriented"))
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, fast_dev_run=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(task, DetectionData(source=str(folder), task="oriented", image_size=64, batch_size=2))
    assert 0 <= float(trainer.callback_metrics["val/oriented_AP"]) <= 1
    for level in task.network.head.score:
        nn.init.normal_(level[-1].weight, std=0.4)  # type: ignore[index]
        nn.init.constant_(level[-1].bias, 0.0)  # type: ignore[index]
    metadata = {"names": json.dumps(["ship", "plane"]), "image_size": "64"}
    weights = save_weights(tmp_path / "x.safetensors", task.network.state_dict(), system="yolov13", config=task.network.config, metadata=metadata)
    assert run(["detection", "evaluate", str(folder), "--checkpoint", str(weights), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "oriented: AP " in printed
    assert "polygons: AP " in printed
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())["oriented"]
    predictions = json.loads((tmp_path / "out" / "predictions_oriented.json").read_text())
    again, _ = average_precision(coco_ground_truth(read_labels(folder, "test"), "oriented"), predictions, "oriented")
    assert measured["AP"] == pytest.approx(again["AP"])
    assert len(predictions[0]["rbox"]) == 5


class _Neighbours(YOLOv13):
    """Finds two long boxes side by side, both turned by 45 degrees, whose upright boxes cover each other, wherever the picture is bright."""

    def forward(self, image: Tensor) -> Prediction:
        rows, columns = (image[0, 0] > 0.9).nonzero(as_tuple=True)
        decoded, extra = torch.zeros(1, 7, 2), torch.full((1, 1, 2), torch.pi / 4)
        if len(rows):
            x, y, side = columns.float().mean(), rows.float().mean(), float(len(rows)) ** 0.5
            decoded[0, :5, 0] = torch.tensor([x - side / 3, y + side / 3, 6 * side, side / 2, 0.9])
            decoded[0, :5, 1] = torch.tensor([x + side / 3, y - side / 3, 6 * side, side / 2, 0.8])
        return Prediction(decoded, (), extra)


def test_turned_neighbours_in_tiles_stay_two() -> None:
    detector = Detector(_Neighbours(YOLOv13Config("n", 3, "oriented")).eval(), ["cat", "dog", "hen"], image_size=256)
    image = np.full((512, 512, 3), 40, np.uint8)
    image[246:266, 246:266] = 255
    found = detector.detect(image, Options(tile=448, tile_overlap=0.8))
    assert len(found) == 2
    assert found.oriented is not None
    np.testing.assert_allclose(found.oriented[:, 2:4], [[120, 10]] * 2, rtol=0.2)


@pytest.mark.parametrize("task", ["detect", "segment", "pose", "oriented"])
def test_what_detect_writes_is_read_again_as_labels_and_by_pycocotools(task: str, tmp_path: Path) -> None:
    """Masks as outlines, keypoints behind boxes, corners of turned boxes."""
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 2, task, (3, 3))).eval()
    for level in model.head.score:
        nn.init.constant_(level[-1].bias, 1.0)  # type: ignore[index]
    if isinstance(model.head, Segment):  # masks of something: prototypes and coefficients above nothing
        nn.init.ones_(model.head.prototypes[-1].norm.bias)  # type: ignore[union-attr]
        for extra in model.head.extra:
            nn.init.ones_(extra[-1].bias)  # type: ignore[index]
    metadata = {"names": json.dumps(["cat", "dog"]), "image_size": "64"}
    weights = save_weights(tmp_path / "x.safetensors", model.state_dict(), system="yolov13", config=model.config, metadata=metadata)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    formats = ["--format", "json", "--format", "yolo", "--format", "coco"]
    command = ["detection", "detect", str(tmp_path / "images"), "--checkpoint", str(weights), "-o", str(tmp_path), "--most", "5", "--no-pictures"]
    assert run([*command, *formats, "--device", "cpu"]) == 0
    told = json.loads((tmp_path / "a.json").read_text())["objects"]
    parts = {"train": "images", "names": ["cat", "dog"], **({"kpt_shape": [3, 3]} if task == "pose" else {})}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(parts))
    labels = read_labels(tmp_path / "data.yaml", "train")
    assert not [problem for problem in labels.problems if problem.kind not in ("box outside", "duplicate box")]
    (picture,) = labels.pictures
    assert len(picture.classes) == len(told) > 0
    images = COCO(str(tmp_path / "predictions_images.json"))
    results = images.loadRes(str(tmp_path / "predictions.json"))
    entries = results.loadAnns(results.getAnnIds())
    assert len(entries) == len(told)
    if task == "segment":
        for entry, outline, object_ in zip(entries, picture.outlines, told, strict=True):
            mask = results.annToMask(entry)
            assert mask.shape == (90, 120)
            assert outline_of(mask) == object_["outline"]
            if len(object_["outline"]) > 2:
                np.testing.assert_allclose(outline, object_["outline"], atol=0.01)
        assert any(len(object_["outline"]) > 2 for object_ in told)
    elif task == "pose":
        assert picture.keypoints is not None
        for entry, points, object_ in zip(entries, picture.keypoints, told, strict=True):
            np.testing.assert_allclose(np.array(entry["keypoints"]).reshape(3, 3), points, atol=0.01)
            np.testing.assert_allclose(object_["keypoints"], points, atol=0.01)
    elif task == "oriented":
        turned = turned_boxes(picture)
        assert turned is not None
        for entry, again, object_ in zip(entries, turned, told, strict=True):
            np.testing.assert_allclose(entry["rbox"], object_["oriented_box"], atol=0.01)
            assert float(probabilistic_overlap(torch.tensor([entry["rbox"]]), torch.tensor(again[None], dtype=torch.float32))) > 0.95
    else:
        np.testing.assert_allclose(picture.boxes, [object_["box"] for object_ in told], atol=0.01)


def test_a_mask_of_nothing_is_written_as_its_box() -> None:
    found = Detections(
        (100, 50), np.array([[10.0, 10, 30, 40]]), np.array([0.5]), np.array([1]), ["cat", "dog"], masks=Masks.of(np.zeros((1, 50, 100), bool))
    )
    assert found.to_yolo() == "1 0.100000 0.200000 0.300000 0.200000 0.300000 0.800000 0.100000 0.800000\n"
