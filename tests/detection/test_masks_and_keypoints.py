"""Masks and keypoints are measured as pycocotools measures the stored files, in the pictures' own pixels, by `evaluate` and by the test step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.detection import Detector, YOLOv13, YOLOv13Config
from foveal.detection.data.labels import Labels, read_labels
from foveal.detection.data.sets import DetectionData
from foveal.detection.evaluate import evaluate
from foveal.detection.metrics import average_precision, coco_ground_truth, coco_keypoints, coco_masks
from foveal.detection.models.heads import Prediction
from foveal.detection.tasks.detection import DetectionTask

SIGMAS = [0.05, 0.1, 0.2]
SIZE, SIDE = (96, 64), 192


def _polygons(generator: np.random.Generator) -> list[np.ndarray]:
    """A triangle on the left and a hexagon on the right, as shares of the picture."""
    found = []
    for middle, corners in ((0.27, 3), (0.73, 6)):
        turn = generator.random() * np.pi + np.arange(corners) * 2 * np.pi / corners
        centre = np.array([middle, 0.5]) + generator.uniform(-0.03, 0.03, 2)
        found.append(centre + np.array([0.2, 0.3]) * np.column_stack((np.cos(turn), np.sin(turn))))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same four pictures with outlines and with three keypoints an object, in YOLO's layout; a picture's brightness tells its number."""
    made = {}
    for task in ("segment", "pose"):
        root, generator = tmp_path_factory.mktemp(task), np.random.default_rng(0)
        for part in ("images", "labels"):
            (root / part / "test").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", SIZE, (50 * number, 0, 0)).save(root / "images" / "test" / f"{number}.png")
            lines = []
            for kind, points in enumerate(_polygons(generator)):
                if task == "segment":
                    lines.append(f"{kind} " + " ".join(f"{value:.6f}" for value in points.ravel()))
                else:
                    low, high = points.min(0), points.max(0)
                    seen = [*(f"{value:.6f}" for value in (*(low + high) / 2, *(high - low)))]
                    marks = [f"{x:.6f} {y:.6f} {2 if order != 2 or number else 0}" for order, (x, y) in enumerate(points[:3])]
                    lines.append(f"{kind} " + " ".join(seen + marks))
            (root / "labels" / "test" / f"{number}.txt").write_text("\n".join(lines))
        settings: dict[str, Any] = {"train": "images/test", "val": "images/test", "test": "images/test", "names": ["triangle", "hexagon"]}
        if task == "pose":
            settings |= {"kpt_shape": [3, 3], "kpt_sigmas": SIGMAS, "flip_idx": [0, 1, 2]}
        (root / "data.yaml").write_text(yaml.safe_dump(settings))
        made[task] = root / "data.yaml"
    return made


class Knows(nn.Module):
    """A network that recognises the pictures, and says where their objects are, in the pixels that it sees."""

    def __init__(self, labels: Labels, task: str) -> None:
        super().__init__()
        self.labels, self.config = labels, YOLOv13Config("n", 2, task, (3, 3))
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> Prediction:
        batch, _, height, width = image.shape
        factor = SIDE / max(SIZE)
        shift = np.array([(width - SIZE[0] * factor) // 2, (height - SIZE[1] * factor) // 2])
        decoded, extra = torch.zeros(batch, 6, 2), torch.zeros(batch, 32 if self.config.task == "segment" else 9, 2)
        prototypes = torch.full((batch, 32, height // 4, width // 4), -10.0)
        for row in range(batch):
            picture = self.labels.pictures[round(float(image[row, 0, height // 2, width // 2]) * 255 / 50)]
            for number, box in enumerate(picture.boxes):
                low, high = box[:2] * factor + shift, box[2:] * factor + shift
                decoded[row, :4, number] = torch.from_numpy(np.concatenate(((low + high) / 2, high - low)))
                decoded[row, 4 + number, number] = 0.9
                if self.config.task == "segment":
                    fine = (picture.outlines[number] * factor + shift) / 4 - 0.5  # centres of cells have whole numbers there
                    y, x = np.mgrid[: height // 4, : width // 4]
                    prototypes[row, number] = torch.from_numpy(np.where(_inside(fine, x, y), 10.0, -10.0))
                    extra[row, number, number] = 1.0
                else:
                    assert picture.keypoints is not None
                    points = picture.keypoints[number].copy()
                    points[:, :2] = points[:, :2] * factor + shift
                    extra[row, :, number] = torch.from_numpy(points.ravel())
        return Prediction(decoded, (), extra, prototypes if self.config.task == "segment" else None)


def _inside(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a convex polygon."""
    sides = [
        (second[0] - first[0]) * (y - first[1]) - (second[1] - first[1]) * (x - first[0])
        for first, second in zip(polygon, np.roll(polygon, -1, 0), strict=True)
    ]
    return np.all(np.array(sides) >= 0, 0) | np.all(np.array(sides) <= 0, 0)


def _by_pycocotools(truth: dict[str, Any], predictions: Path, kind: str, folder: Path, sigmas: list[float] | None = None) -> list[float]:
    (folder / "truth.json").write_text(json.dumps(truth))
    reference = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(reference, reference.loadRes(str(predictions)), kind)
    if sigmas:
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def _truth(folder: Path) -> dict[str, Any]:
    """The text files as a COCO file, read here without the package."""
    images, annotations = [], []
    for number in range(4):
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE[0], "height": SIZE[1]})
        for line in (folder / "labels" / "test" / f"{number}.txt").read_text().splitlines():
            values = np.array([float(word) for word in line.split()])
            entry: dict[str, Any] = {"id": len(annotations) + 1, "image_id": number, "category_id": int(values[0]), "iscrowd": 0}
            if len(values) == 14:
                extent, marks = values[3:5] * SIZE, values[5:].reshape(3, 3) * np.array([*SIZE, 1])
                marks[marks[:, 2] == 0] = 0
                entry |= {"bbox": [*(values[1:3] * SIZE - extent / 2), *extent], "area": 0.53 * extent.prod()}
                entry |= {"keypoints": marks.ravel().tolist(), "num_keypoints": int((marks[:, 2] > 0).sum())}
            else:
                points = values[1:].reshape(-1, 2) * SIZE
                entry |= {"segmentation": [points.ravel().tolist()], "bbox": [*points.min(0), *(points.max(0) - points.min(0))]}
                entry["area"] = float(run_lengths.decode(run_lengths.frPyObjects(entry["segmentation"], SIZE[1], SIZE[0])).sum())
            annotations.append(entry)
    return {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "triangle"}, {"id": 1, "name": "hexagon"}]}


def test_stored_masks_are_measured_as_pycocotools_measures_them(folders: dict[str, Path], tmp_path: Path) -> None:
    """Masks moved about at random, some twice, with chance scores, and one run-length mask of a crowd."""
    generator, labels = np.random.default_rng(1), read_labels(folders["segment"], "test")
    truth, found = _truth(folders["segment"].parent), []
    for entry in truth["annotations"]:
        mask = run_lengths.decode(run_lengths.frPyObjects(entry["segmentation"], SIZE[1], SIZE[0]))[..., 0]
        for _ in range(2):
            moved = np.roll(mask, tuple(generator.integers(-6, 7, 2)), (0, 1)).astype(bool)
            found += coco_masks(entry["image_id"], [moved], generator.random(1), [int(generator.random() < 0.8) ^ 1 ^ entry["category_id"]])
    (tmp_path / "found.json").write_text(json.dumps(found))
    whole, classes = average_precision(coco_ground_truth(labels, "segm"), found, "segm")
    assert list(whole.values()) == pytest.approx(_by_pycocotools(truth, tmp_path / "found.json", "segm", tmp_path))
    assert 0.1 < whole["AP"] < 0.9
    assert np.mean(list(classes.values())) == pytest.approx(whole["AP"])


@pytest.mark.parametrize("sigmas", [SIGMAS, None], ids=["of the data", "one over their number"])
def test_stored_keypoints_are_measured_as_pycocotools_measures_them(folders: dict[str, Path], tmp_path: Path, sigmas: list[float] | None) -> None:
    generator, labels = np.random.default_rng(2), read_labels(folders["pose"], "test")
    assert labels.sigmas == SIGMAS
    found = []
    for picture in labels.pictures:
        assert picture.keypoints is not None
        points = np.concatenate([picture.keypoints + generator.normal(0, spread, picture.keypoints.shape) for spread in (2, 8)])
        found += coco_keypoints(picture.number, points, generator.random(len(points)), [*picture.classes, *picture.classes])
    (tmp_path / "found.json").write_text(json.dumps(found))
    whole, _ = average_precision(coco_ground_truth(labels, "keypoints"), found, "keypoints", sigmas)
    expected = _by_pycocotools(_truth(folders["pose"].parent), tmp_path / "found.json", "keypoints", tmp_path, sigmas or [1 / 3] * 3)
    assert list(whole.values()) == pytest.approx(expected)
    assert 0.1 < whole["AP"] < 0.99


@pytest.mark.parametrize(("task", "least"), [("segment", 0.8), ("pose", 1.0)])
def test_what_a_network_that_knows_says_lands_on_the_objects(folders: dict[str, Path], task: str, least: float) -> None:
    """Through padding and scale: masks of a quarter's grain overlap the outlines nearly wholly, keypoints stand on theirs."""
    labels = read_labels(folders[task], "test")
    network: Any = Knows(labels, task)
    by_command = evaluate(Detector(network, labels.names, SIDE), labels)
    scores = by_command.masks if task == "segment" else by_command.keypoints
    assert scores is not None
    assert scores.numbers["AP"] >= least - 1e-9
    assert by_command.numbers["AP"] == pytest.approx(1.0)
    learner = DetectionTask(network.config)
    learner.network = network
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = DetectionData(source=str(folders[task]), task=task, image_size=SIDE, batch_size=3)
    (logged,) = trainer.test(learner, data, verbose=False)
    prefix = "mask_" if task == "segment" else "keypoint_"
    assert logged[f"test/{prefix}AP"] >= least - 1e-6
    assert logged["test/AP"] == pytest.approx(1.0)
    assert {f"test/{prefix}AP50", f"test/{prefix}AP75", f"test/{prefix}AP_triangle"} <= set(logged)


@pytest.mark.parametrize("task", ["segment", "pose"])
def test_the_command_writes_what_pycocotools_reads_and_measures_alike(
    folders: dict[str, Path], task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = YOLOv13(YOLOv13Config("n", 2, task, (3, 3)))
    for level in model.head.score:
        nn.init.normal_(level[-1].weight, std=0.4)  # type: ignore[index]
        nn.init.constant_(level[-1].bias, 0.0)  # type: ignore[index]
    metadata = {"names": json.dumps(["triangle", "hexagon"]), "image_size": "64"}
    weights = save_weights(tmp_path / "x.safetensors", model.state_dict(), system="yolov13", config=model.config, metadata=metadata)
    command = ["detection", "evaluate", str(folders[task]), "--checkpoint", str(weights), "-o", str(tmp_path / "out")]
    assert run(command) == 0
    name, kind = ("masks", "segm") if task == "segment" else ("keypoints", "keypoints")
    assert f"{name}: AP " in capsys.readouterr().out
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())[name]
    stored = tmp_path / "out" / f"predictions_{name}.json"
    expected = _by_pycocotools(_truth(folders[task].parent), stored, kind, tmp_path, SIGMAS if task == "pose" else None)
    assert [value for key, value in measured.items() if key != "classes"] == pytest.approx(expected, abs=1e-6)
    assert len(json.loads(stored.read_text())) == len(json.loads((tmp_path / "out" / "predictions.json").read_text())) > 100


@pytest.mark.parametrize("task", ["segment", "pose"])
def test_masks_and_keypoints_are_learned_from_a_folder(folders: dict[str, Path], task: str) -> None:
    """A step of training, and a validation, on augmented pictures of the folder."""
    data = DetectionData(source=str(folders[task]), task=task, image_size=64, batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, fast_dev_run=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(DetectionTask(YOLOv13Config("n", 2, task, (3, 3))), data)
    part = {"segment": ("seg_loss", "mask_AP"), "pose": ("pose_loss", "keypoint_AP")}[task]
    assert np.isfinite(float(trainer.callback_metrics[f"train/{part[0]}"]))
    assert 0 <= float(trainer.callback_metrics[f"val/{part[1]}"]) <= 1


def test_several_processes_are_measured_on_all_pictures_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes have three pictures each of four, two of them the same; a wrong picture's second copy would cost precision."""
    labels = read_labels(folders["segment"], "test")
    task = DetectionTask(YOLOv13Config("n", 2, "segment"))
    logged: dict[str, float] = {}

    class Trainer:
        world_size, datamodule = 2, DetectionData(source=str(folders["segment"]), task="segment")
        state = type("State", (), {"fn": "test"})()

    def found(kind: Any, numbers: tuple[int, ...]) -> list[dict[str, Any]]:
        truth = coco_ground_truth(labels, kind)["annotations"]
        kept = ("image_id", "category_id", "bbox", "segmentation")
        return [
            {**{key: entry[key] for key in kept if key in entry}, "score": 0.5}
            if kind == "bbox"
            else coco_masks(entry["image_id"], [_mask(entry)], np.array([0.5]), [entry["category_id"]])[0]
            for entry in truth
            if entry["image_id"] in numbers
        ]

    def gather(shares: list[Any], own: list[dict[str, Any]]) -> None:
        kind = "bbox" if "bbox" in own[0] else "segm"
        shares[:] = [own, found(kind, (2, 3, 0))]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr(task, "log", lambda name, value, **how: logged.update({name: value}))
    task._trainer = Trainer()  # type: ignore[assignment]
    task._found = {"bbox": found("bbox", (0, 1, 2)), "segm": found("segm", (0, 1, 2))}
    task._report("test")
    assert logged["test/AP"] == logged["test/mask_AP"] == pytest.approx(1.0)


def _mask(entry: dict[str, Any]) -> np.ndarray:
    return run_lengths.decode(run_lengths.frPyObjects(entry["segmentation"], SIZE[1], SIZE[0]))[..., 0]


def test_labels_without_masks_are_measured_by_their_boxes_and_the_user_is_told(folders: dict[str, Path]) -> None:
    labels = read_labels(folders["segment"], "test")
    network: Any = Knows(labels, "segment")
    bare = read_labels(folders["segment"], "test")
    for picture in bare.pictures:
        picture.masks = []
    assert evaluate(Detector(network, labels.names, SIDE), bare).masks is None
    with pytest.raises(ValueError, match="boxes alone"):
        coco_ground_truth(bare, "segm")


def test_masks_of_several_parts_crowds_and_areas_of_a_coco_file_are_kept(tmp_path: Path) -> None:
    """What COCO's own file says is measured, not its longest outline or its box."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    crowd: Any = run_lengths.encode(np.asfortranarray(np.eye(30, 40, dtype=np.uint8)))
    parts = [[2, 2, 10, 2, 10, 10, 2, 10], [20, 2, 30, 2, 30, 20, 20, 20]]
    annotations = [
        {"id": 1, "image_id": 5, "category_id": 3, "bbox": [2, 2, 28, 18], "area": 244.0, "iscrowd": 0, "segmentation": parts},
        {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 30, 30], "area": 30.0, "iscrowd": 1,
         "segmentation": {"size": [30, 40], "counts": crowd["counts"].decode()}},
    ]  # fmt: skip
    content = {"images": [{"id": 5, "file_name": "a.png"}], "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}
    (tmp_path / "c.json").write_text(json.dumps(content))
    truth = coco_ground_truth(read_labels(tmp_path / "c.json"), "segm")
    assert [entry["segmentation"] for entry in truth["annotations"]] == [parts, annotations[1]["segmentation"]]
    assert truth["annotations"][0]["area"] == 244.0
    assert truth["annotations"][1]["iscrowd"] == 1
