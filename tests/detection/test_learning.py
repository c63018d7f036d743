"""Losses, assignment and suppression give the authors' numbers; what is measured is what pycocotools measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveal.detection import load_official
from foveal.detection.borrowed import v8DetectionLoss
from foveal.detection.checkpoints.yolov13 import official_names
from foveal.detection.losses import DetectionLoss
from foveal.detection.metrics import average_precision, coco_ground_truth
from foveal.detection.models.heads import Detect, RawPrediction, anchor_points
from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config
from foveal.detection.postprocess import suppress


def _batch(boxes: torch.Tensor, pictures: int) -> dict[str, Any]:
    return {"batch_idx": boxes[:, 0], "cls": boxes[:, 1], "bboxes": boxes[:, 2:], "im_file": [""] * pictures}


@pytest.mark.parametrize("name", ["yolov13_n", "yolov13_l"])
def test_loss_and_its_parts_are_the_authors(golden: Any, draw: Any, name: str) -> None:
    reference = golden(name)
    model = load_official("yolov13", reference.state(reference.about["state_dict"]))
    image = draw("x", (2, 3, 64, 96)) if name == "yolov13_n" else reference.tensor("in_x")
    boxes = reference.tensor("in_boxes").float()
    total, parts = DetectionLoss(model.config)(model.raw(image), _batch(boxes, len(image)))
    assert float(total.detach()) == pytest.approx(float(reference["loss_total"]), rel=1e-4)
    found = [float(parts[part]) for part in ("box_loss", "cls_loss", "dfl_loss")]
    np.testing.assert_allclose(found, reference["loss_parts"], rtol=1e-4)
    if name == "yolov13_n":
        names = {theirs: ours for ours, theirs, _ in official_names(model)}
        wanted = [key.removeprefix("grad_of_loss_total_") for key in reference.arrays if key.startswith("grad_of_loss_total_")]
        parameters = dict(model.named_parameters())
        for key, grad in zip(wanted, torch.autograd.grad(total, [parameters[names[key]] for key in wanted]), strict=True):
            assert float(grad.norm()) == pytest.approx(float(reference[f"grad_of_loss_total_{key}"]), rel=1e-2), key


def test_cells_stand_where_the_authors_have_them(golden: Any) -> None:
    reference = golden("yolov13_assignment")
    strides = reference["out_strides"].ravel()
    sizes = [int((strides == stride).sum()) for stride in (8, 16, 32)]
    shapes = next(
        [(height, sizes[0] // height), (height // 2, sizes[1] // (height // 2)), (max(height // 4, 1), sizes[2] // max(height // 4, 1))]
        for height in range(2, sizes[0])
        if sizes[0] % height == 0
        and np.allclose(anchor_points([(height, sizes[0] // height)], torch.zeros(1), (8,))[0].numpy().T, reference["out_anchor_points"][: sizes[0]])
    )
    points, found = anchor_points(shapes, torch.zeros(1))
    np.testing.assert_allclose(points.numpy().T, reference["out_anchor_points"])
    np.testing.assert_array_equal(found.numpy(), strides)


def test_assignment_of_cells_to_boxes_is_the_authors(golden: Any) -> None:
    reference = golden("yolov13_assignment")
    criterion = DetectionLoss(YOLOv13Config("n", classes=reference["in_scores"].shape[-1])).criterion(torch.device("cpu"))
    assert isinstance(criterion, v8DetectionLoss)
    boxes = reference.tensor("in_boxes").float()
    _, _, scores, positive, index = criterion.assigner(
        reference.tensor("in_scores").float(), reference.tensor("mid_predicted_boxes").float(),
        reference.tensor("out_anchor_points").float() * reference.tensor("out_strides").float(),
        reference.tensor("in_labels")[..., None], boxes, boxes.sum(2, keepdim=True) > 0,
    )  # fmt: skip
    wanted = reference["out_positive"].astype(bool)
    np.testing.assert_array_equal(positive.numpy().astype(bool), wanted)
    np.testing.assert_array_equal(index.numpy()[wanted], reference["out_box_index"][wanted])
    assert np.abs(scores.numpy() - reference["out_target_scores"])[wanted].max() < 1e-4


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("predict", {"score": 0.25, "overlap": 0.7}),
        ("validate", {"score": 0.001, "overlap": 0.7, "several": True, "most": 50}),
        ("agnostic", {"score": 0.3, "overlap": 0.5, "across_classes": True}),
    ],
)
@pytest.mark.parametrize("picture", [0, 1])
def test_suppression_keeps_the_authors_boxes_in_their_order(golden: Any, mode: str, options: dict[str, Any], picture: int) -> None:
    reference = golden("yolov13_assignment")
    found = suppress(reference.tensor("in_predictions")[picture].float(), **options)
    actual = torch.cat((found.boxes, found.scores[:, None], found.classes[:, None].float()), 1).numpy()
    np.testing.assert_allclose(actual, reference[f"out_{mode}_{picture}"], rtol=1e-5, atol=1e-4)


def test_suppression_of_nothing_gives_nothing() -> None:
    assert suppress(torch.zeros(6, 21)).boxes.shape == (0, 4)
    assert suppress(torch.zeros(6, 21), several=True).boxes.shape == (0, 4)


def test_turned_boxes_shut_each_other_out_only_where_they_overlap() -> None:
    """Two long boxes crossing at a right angle overlap little; the same box twice overlaps wholly."""
    decoded = torch.tensor([[50.0, 50, 40, 6, 0.9], [50, 50, 40, 6, 0.8], [50.5, 50, 40, 6, 0.7]]).T
    angles = torch.tensor([[0.0, torch.pi / 2, 0.0]])
    found = suppress(decoded, extra=angles, oriented=True, overlap=0.5)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])
    assert found.boxes.shape == (2, 5)


@pytest.mark.parametrize(("task", "extra"), [("segment", 32), ("pose", 51), ("oriented", 1)])
def test_the_heads_that_were_never_published_learn(task: str, extra: int) -> None:
    """One step down the gradient of the loss of one picture lowers it."""
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 2, task=task)).eval()  # without dropout, so that the loss is a function
    boxes = torch.tensor([[0.0, 1, 0.5, 0.5, 0.5, 0.4], [0, 0, 0.3, 0.6, 0.2, 0.3]])
    batch = _batch(boxes, 1)
    if task == "segment":
        masks = torch.zeros(1, 16, 16)
        masks[0, 5:11, 4:12] = 1
        masks[0, 8:12, 3:6] = 2
        batch["masks"] = masks
    elif task == "pose":
        batch["keypoints"] = torch.rand(2, 17, 3)
        batch["keypoints"][..., 2] = 2
    else:
        batch["bboxes"] = torch.cat((boxes[:, 2:], torch.tensor([[0.3], [1.2]])), 1)
    image, loss = torch.rand(1, 3, 64, 64), DetectionLoss(model.config)
    raw = model.raw(image)
    assert raw.extra is not None
    assert raw.extra.shape == (1, extra, 84)
    before, parts = loss(raw, batch)
    assert all(torch.isfinite(value) for value in parts.values())
    parameters = [value for value in model.parameters() if value.requires_grad]
    grads = torch.autograd.grad(before, parameters, allow_unused=True)
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)
    norm = sum(float((grad**2).sum()) for grad in grads if grad is not None) ** 0.5
    with torch.no_grad():
        for value, grad in zip(parameters, grads, strict=True):
            assert grad is not None
            value -= 0.001 / norm * grad
    assert loss(model.raw(image), batch)[0] < before
    found = model(image)
    assert found.decoded.shape == (1, 6, 84)
    assert found.extra is not None


def _two_pictures(tmp_path: Path) -> Any:
    from foveal.detection.data.labels import LabelledPicture, Labels

    boxes = [np.array([[10.0, 10, 50, 60], [60, 20, 90, 80]]), np.array([[5.0, 5, 40, 40]])]
    classes = [np.array([0, 1]), np.array([1])]
    pictures = [LabelledPicture(Path(f"{n}.png"), (100, 100), boxes[n], classes[n], number=n) for n in (0, 1)]
    return Labels(["cat", "dog"], pictures, numbers=[7, 9])


def test_perfect_predictions_have_a_precision_of_one_and_none_of_zero(tmp_path: Path) -> None:
    labels = _two_pictures(tmp_path)
    truth = coco_ground_truth(labels)
    perfect = [{**{key: value[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9} for value in truth["annotations"]]
    whole, classes = average_precision(truth, perfect)
    assert whole["AP"] == pytest.approx(1.0)
    assert classes == pytest.approx({"cat": 1.0, "dog": 1.0})
    assert average_precision(truth, [])[0]["AP"] == 0.0


def test_our_evaluation_is_pycocotools_on_the_stored_files(tmp_path: Path) -> None:
    """The same figures as pycocotools gives when it reads labels and predictions from disk by itself."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = np.random.default_rng(0)
    truth = coco_ground_truth(_two_pictures(tmp_path))
    predictions = []
    for annotation in truth["annotations"]:
        for spread in (2.0, 8.0, 20.0):
            box = (np.array(annotation["bbox"]) + generator.normal(0, spread, 4)).clip(1).tolist()
            kind = int(generator.choice([7, 9]))
            predictions.append({"image_id": annotation["image_id"], "category_id": kind, "bbox": box, "score": float(generator.random())})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(predictions))
    reference = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(reference, reference.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    whole, _ = average_precision(truth, predictions)
    assert list(whole.values()) == pytest.approx(evaluation.stats.tolist())
    assert 0 < whole["AP"] < 1


def test_the_head_reads_maps_of_any_size() -> None:
    head = Detect((8, 16, 24), 3)
    raw = RawPrediction(tuple(torch.randn(1, 67, 4 * n, 5 * n) for n in (4, 2, 1)))
    assert head.decode(raw).decoded.shape == (1, 7, 20 * 21)
