"""Every config trains; a run resumes where it stopped, becomes weights, and is taken on with another number of classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from foveal.core.checkpoint import save_weights
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.detection import Detector, YOLOv13, YOLOv13Config
from foveal.detection.data.labels import read_labels
from foveal.detection.data.sets import DetectionData, LabelledSet
from foveal.detection.evaluate import evaluate
from foveal.detection.tasks.averaging import RampedAverage
from foveal.detection.tasks.detection import DetectionTask, start_from
from foveal.detection.tasks.export import export
from foveal.detection.tasks.starting import layers_of

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares and dark discs on grey, eight pictures a part, in the YOLO layout."""
    root, generator = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for folder in ("images", "labels"):
            (root / folder / part).mkdir(parents=True)
        for number in range(8):
            image, lines = Image.new("RGB", (96, 64), "gray"), []
            pen = ImageDraw.Draw(image)
            for kind in range(2):
                side = int(generator.integers(14, 24))
                x, y = int(generator.integers(0, 48 - side)) + 48 * kind, int(generator.integers(0, 64 - side))
                box = (x, y, x + side, y + side)
                pen.rectangle(box, fill="white") if kind == 0 else pen.ellipse(box, fill="black")
                lines.append(f"{kind} {(x + side / 2) / 96} {(y + side / 2) / 64} {side / 96} {side / 64}")
            image.save(root / "images" / part / f"{number}.png")
            (root / "labels" / part / f"{number}.txt").write_text("\n".join(lines))
    settings = {"train": "images/train", "val": "images/val", "test": "images/test", "names": ["square", "disc"]}
    (root / "data.yaml").write_text(yaml.safe_dump(settings))
    return root / "data.yaml"


def _arguments(config: str, shapes: Path, runs: Path, *more: str, verb: str = "fit") -> list[str]:
    return [
        verb, "--config", str(CONFIGS / f"{config}.yaml"), "--runs", str(runs), "--data.source", str(shapes), "--data.image_size", "64",
        "--data.batch_size", "2", "--data.workers", "0", "--model.config.classes", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.strategy", "auto", "--trainer.precision", "32", "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("yolov13*.yaml")))
def test_every_config_runs_for_two_batches(config: str, shapes: Path, tmp_path: Path) -> None:
    cli = FovealCLI("detection", _arguments(config, shapes, tmp_path, "--trainer.fast_dev_run", "2"))
    assert torch.isfinite(cli.trainer.callback_metrics["train/box_loss"])
    assert 0 <= float(cli.trainer.callback_metrics["val/AP"]) <= 1


def test_muon_turns_all_kernels_and_leaves_answers_and_norms_to_adam() -> None:
    task = DetectionTask(YOLOv13Config("n", classes=2), optimizer="muon")
    groups = task.configure_optimizers().param_groups
    kinds = {id(parameter): group["kind"] for group in groups for parameter in group["params"]}
    trained = dict(task.network.named_parameters())
    trained.pop("head.bins")
    assert sum(len(group["params"]) for group in groups) == len(kinds) == len(trained)
    expected = {
        "head.box.0.1.conv.weight": "kernels", "hyperace.first_branch.hypergraph.pre_head_proj.weight": "kernels",
        "head.box.0.2.weight": "others", "head.score.0.2.weight": "others", "head.score.0.0.0.conv.weight": "kernels",
        "head.box.0.0.norm.bias": "others",
    }  # fmt: skip
    assert {name: kinds[id(trained[name])] for name in expected} == expected


def test_both_rates_of_muon_follow_the_schedule(shapes: Path, tmp_path: Path) -> None:
    rates = ("--model.learning_rate", "0.002", "--model.matrix_learning_rate", "0.05")
    cli = FovealCLI("detection", _arguments("yolov13n_small", shapes, tmp_path, *rates, "--trainer.fast_dev_run", "2"))
    now = {group["kind"]: group["lr"] for group in cli.trainer.optimizers[0].param_groups}
    assert 0 < now["others"] < 0.002
    assert now["kernels"] == pytest.approx(25 * now["others"])


def test_a_run_becomes_weights_that_the_detector_and_other_classes_take(shapes: Path, tmp_path: Path) -> None:
    cli = FovealCLI(
        "detection", _arguments("yolov13n_small", shapes, tmp_path, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1")
    )
    losses = cli.trainer.callback_metrics
    assert {"val/AP", "val/AP50", "val/AP75", "val/AP_square", "val/AP_disc"} <= set(losses)
    weights = export(next(tmp_path.rglob("best.ckpt")), tmp_path / "w.safetensors")
    detector = Detector.from_pretrained(weights)
    assert (detector.names, detector.image_size) == (["square", "disc"], 64)
    found = evaluate(detector, read_labels(shapes, "test"))
    assert found.confusion[:2].sum() == 16
    assert set(found.classes) == {"square", "disc"}

    other = YOLOv13(YOLOv13Config("n", 5))
    left = start_from(other, str(weights))
    assert left
    assert all(name.startswith("head.score.") for name in left)
    with pytest.raises(UserError, match="scale s"):
        start_from(YOLOv13(YOLOv13Config("s", 5)), str(weights))


def test_a_training_says_once_what_it_takes_over_and_what_starts_at_random(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = YOLOv13(YOLOv13Config("n", 5))
    weights = save_weights(tmp_path / "five.safetensors", network.state_dict(), system="yolov13", config=network.config)
    arguments = _arguments("yolov13n_small", shapes, tmp_path, "--trainer.fast_dev_run", "1", "--model.weights", str(weights))
    FovealCLI("detection", arguments)
    told = [line for line in capsys.readouterr().err.splitlines() if "tensors are taken over" in line]
    total = len(network.state_dict())
    assert told == [
        f"five.safetensors: {total - 6} of {total} tensors are taken over; 6 start at random, which the file lacks or has in another shape: "
        "head.score.0.2, head.score.1.2, head.score.2.2"
    ]


def test_layers_are_named_one_by_one_or_by_the_parts_that_hold_them() -> None:
    assert layers_of(["head.score.0.2.bias", "head.score.0.2.weight", "stem.conv.weight"]) == ["head.score.0.2", "stem.conv"]
    assert layers_of([f"head.extra.{level}.{part}.conv.weight" for level in range(3) for part in range(3)]) == [
        "head.extra.0", "head.extra.1", "head.extra.2"
    ]  # fmt: skip
    assert layers_of([f"stage{number}.conv.weight" for number in range(9)]) == [f"stage{number}" for number in range(9)]
    assert layers_of([]) == []


@pytest.mark.slow
def test_an_interrupted_run_ends_as_one_that_was_not(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ("--resume_point.every_n_steps", "1", "--data.augmentation", "{mosaic: 1.0}", "--data.close_mosaic", "1", "--trainer.max_epochs", "3")
    whole = FovealCLI("detection", _arguments("yolov13n_small", shapes, tmp_path / "whole", *common))
    step = DetectionTask.training_step

    def cut(self: DetectionTask, batch: dict[str, Any], index: int) -> torch.Tensor:
        if self.global_step == 6:
            raise ConnectionError("the power went out")
        return step(self, batch, index)

    # A limit of steps instead would also change the schedule, which ends where the steps do.
    monkeypatch.setattr(DetectionTask, "training_step", cut)
    with pytest.raises(ConnectionError):
        FovealCLI("detection", _arguments("yolov13n_small", shapes, tmp_path / "cut", *common))
    monkeypatch.setattr(DetectionTask, "training_step", step)
    resumed = FovealCLI("detection", _arguments("yolov13n_small", shapes, tmp_path / "cut", *common, "--ckpt_path", "last"))
    assert resumed.trainer.global_step == whole.trainer.global_step == 12
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key


def test_data_of_another_number_of_classes_is_refused_with_its_names(shapes: Path, tmp_path: Path) -> None:
    arguments = _arguments("yolov13n_small", shapes, tmp_path, "--model.config.classes", "3", "--trainer.fast_dev_run", "1")
    with pytest.raises(UserError, match=r"classes 2, as the data has \(square, disc\)"):
        FovealCLI("detection", arguments)


@pytest.mark.parametrize("wrong", [{"image_size": 100}, {"augmentation": {"blur": 0.1}}, {"task": "boxes"}])
def test_settings_of_the_data_that_cannot_be_are_refused(wrong: dict[str, object], shapes: Path) -> None:
    with pytest.raises(UserError, match="expected"):
        DetectionData(source=str(shapes), **wrong)  # type: ignore[arg-type]


def test_boxes_without_outlines_cannot_train_masks(shapes: Path) -> None:
    with pytest.raises(UserError, match="outlines of every object"):
        LabelledSet(read_labels(shapes), "segment", 64, {})


def test_a_mosaic_is_drawn_from_its_own_seed_alone(shapes: Path) -> None:
    """The same epoch gives the same pictures whatever was drawn before it."""
    first, second = (DetectionData(source=str(shapes), image_size=64, batch_size=4, augmentation={"mosaic": 1.0}) for _ in range(2))
    for _ in second.train_dataloader():  # another loader of the same data has been read before
        pass
    for one, other in zip(first.train_dataloader(), second.train_dataloader(), strict=True):
        assert torch.equal(one["img"], other["img"])
        assert torch.equal(one["bboxes"], other["bboxes"])


def test_the_running_mean_follows_fast_at_first_and_slowly_later() -> None:
    average = RampedAverage(decay=0.9, ramp=10)
    early = average._mix(torch.zeros(1), torch.ones(1), 1)
    late = average._mix(torch.zeros(1), torch.ones(1), 1000)
    assert float(early) > 0.9
    assert float(late) == pytest.approx(0.1)


def test_ultralytics_trains_and_predicts_with_the_bridge(tmp_path: Path, shapes: Path) -> None:
    """In a process of its own, with ultralytics' settings in a folder of its own."""
    code = (
        "import sys, foveal.detection.ultralytics\n"
        "from ultralytics import YOLO\n"
        "import numpy as np\n"
        "model = YOLO('yolov13n.yaml')\n"
        "assert sum(p.numel() for p in model.model.parameters()) == 2_494_151, sum(p.numel() for p in model.model.parameters())\n"
        "model.train(data=sys.argv[1], epochs=1, imgsz=64, batch=4, workers=0, device='cpu', plots=False, verbose=False, project=sys.argv[2])\n"
        "found = model.predict(np.zeros((48, 64, 3), np.uint8), imgsz=64, verbose=False)\n"
        "assert found[0].names == {0: 'square', 1: 'disc'}\n"
        "assert type(YOLO('yolo11n.yaml').model.model[0]).__name__ == 'Conv'\n"
    )
    settings = yaml.safe_load(shapes.read_text())
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**settings, "path": str(shapes.parent)}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "data.yaml"), str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
