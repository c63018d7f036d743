"""Heads are read as AGORA-HPE and CMU-HPE hold them, drawn where their angles say, moved with their boxes, learned, measured and written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.detection.data.head_labels import HeadPicture, coco_of_heads, draw_head, draw_people, read_heads
from foveal.detection.data.head_pose import HeadPoseData, HeadSet, collate
from foveal.detection.head_pictures import draw_heads
from foveal.detection.head_pose import HeadPoser, Heads, angle_errors, heads_of
from foveal.detection.models.direct_mhp import DirectMHP, DirectMHPConfig, HeadPoses, axes, to_degrees
from foveal.detection.tasks.export import export
from foveal.detection.tasks.head_pose import start_from

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
SKIN, HAIR = (0.9, 0.75, 0.6), (0.05, 0.9, 0.05)  # green, so that it is told from everything else


@pytest.fixture(scope="module")
def drawn() -> list[HeadPicture]:
    return [draw_people(number, 128) for number in range(6)]


@pytest.fixture
def folder(drawn: list[HeadPicture], tmp_path: Path) -> Path:
    """The layout of AGORA-HPE."""
    for part in ("train", "validation"):
        (tmp_path / "images" / part).mkdir(parents=True)
        for picture in drawn:
            assert picture.image is not None
            Image.fromarray(picture.image).save(tmp_path / "images" / part / picture.path.name)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"coco_style_{part}.json").write_text(json.dumps(coco_of_heads(drawn)))
    return tmp_path


# ------------------------------------------------------------------------------------------------------------------------------------------ data


def test_what_is_written_in_cocos_form_is_read_again(drawn: list[HeadPicture], folder: Path) -> None:
    read = read_heads(folder / "annotations" / "coco_style_train.json", folder / "images" / "train")
    assert [picture.number for picture in read] == [picture.number for picture in drawn]
    for ours, theirs in zip(read, drawn, strict=True):
        np.testing.assert_allclose(ours.boxes, theirs.boxes)
        np.testing.assert_allclose(ours.angles, theirs.angles)
        assert theirs.image is not None
        assert np.array_equal(ours.read(), theirs.image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"euler_angles": [0, 0]}, "euler_angles of 3 numbers"),
        ({"euler_angles": None}, "euler_angles of 3 numbers"),
        ({"euler_angles": [95, 0, 0]}, "pitch and roll in -90..90"),
        ({"euler_angles": [0, 190, 0]}, "yaw in -180..180"),
        ({"euler_angles": [0, float("nan"), 0]}, "euler_angles of 3 numbers"),
        ({"bbox": [5, 5, 0, 10]}, "a width and a height"),
        ({"image_id": 77}, "KeyError"),
    ],
)
def test_a_fault_of_the_labels_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    file = folder / "annotations" / "coco_style_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_heads(file, folder / "images" / "train")


def test_missing_files_are_named(folder: Path) -> None:
    file = folder / "annotations" / "coco_style_train.json"
    with pytest.raises(UserError, match=r"6 of 6 are missing"):
        read_heads(file, folder)
    with pytest.raises(UserError, match="does not exist"):
        read_heads(folder / "none.json", folder)
    file.write_text("{")
    with pytest.raises(UserError, match="images and annotations of COCO's form"):
        read_heads(file, folder)


@pytest.mark.parametrize(("pitch", "yaw", "roll"), [(0, 0, 0), (20, 60, 0), (-15, -100, 20), (10, 170, -10), (0, 90, 30)])
def test_a_drawn_head_looks_where_its_angles_say(pitch: float, yaw: float, roll: float) -> None:
    """Skin lies to the side that the nose points to, and hair to the other."""
    head = draw_head(40, (pitch, yaw, roll), SKIN, HAIR).astype(float)
    side = head.shape[0]
    row, column = np.mgrid[:side, :side] - side // 2
    covered = head[..., 3] > 0
    hair = covered & (head[..., 1] > 1.5 * head[..., 0])
    skin = covered & ~hair
    nose = axes(torch.tensor([pitch, yaw, roll], dtype=torch.float64))[:2, 2].numpy()
    if np.linalg.norm(nose) > 0.3:
        towards = [(column[mask].mean() * nose[0] + row[mask].mean() * nose[1]) for mask in (skin, hair)]
        assert towards[0] > towards[1]
    seen = skin.sum() / covered.sum()
    assert seen > 0.5 if abs(yaw) < 45 else seen < 0.5 if abs(yaw) > 135 else 0.1 < seen < 0.9


def test_drawn_heads_lie_in_their_boxes_and_another_number_is_another_picture(drawn: list[HeadPicture]) -> None:
    again = draw_people(0, 128)
    assert again.image is not None
    assert np.array_equal(again.image, drawn[0].image)  # type: ignore[arg-type]
    assert not np.array_equal(drawn[0].image, drawn[1].image)  # type: ignore[arg-type]
    for picture in drawn:
        assert len(picture.boxes) == len(picture.angles) >= 1
        assert (picture.boxes[:, 2:] > picture.boxes[:, :2]).all()
        assert picture.boxes.min() >= 0
        assert picture.boxes.max() <= 128


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_boxes_move_with_their_heads(mosaic: float) -> None:
    """A white head on black: whatever is done to the picture, its box is where the white is."""
    image = np.zeros((100, 140, 3), np.uint8)
    image[30:60, 50:90] = 255
    picture = HeadPicture(0, Path("a.png"), (140, 100), np.array([[50.0, 30, 90, 60]]), np.array([[10.0, 20, 30]]), image)
    items = HeadSet([picture], 128, mosaic, scale=0.5, translate=0.2, hue=0, saturation=0, brightness=0, flip=0.5)
    random.seed(0)  # of 500 pictures one has a head so small that its grey edges are most of it
    checked = 0
    for _ in range(20):
        pixels, targets, _, _ = items[0]
        white = (pixels[0] > 0.7).numpy()
        inside = np.zeros_like(white)
        for _, x, y, width, height, *turned in targets.tolist():
            left, top, right, bottom = ((x - width / 2) * 128, (y - height / 2) * 128, (x + width / 2) * 128, (y + height / 2) * 128)
            inside[max(round(top) - 1, 0) : round(bottom) + 1, max(round(left) - 1, 0) : round(right) + 1] = True
            area = white[round(top) : round(bottom), round(left) : round(right)]
            assert area.mean() > 0.7  # edges of a small head are half grey
            degrees = to_degrees(torch.tensor(turned)).tolist()
            assert degrees == pytest.approx([10, 20, 30], abs=1e-3) or degrees == pytest.approx([10, -20, -30], abs=1e-3)
            checked += 1
        assert (white & ~inside).sum() <= 0.12 * 128 * 128 * 0.2  # what is left of heads that were cut off
    assert checked > 10


def test_a_picture_to_measure_on_keeps_its_shape_and_goes_back(drawn: list[HeadPicture]) -> None:
    picture = HeadPicture(3, Path("a.png"), (140, 100), np.array([[50.0, 30, 90, 60]]), np.zeros((1, 3)), np.zeros((100, 140, 3), np.uint8))
    batch = collate([HeadSet([picture], 256)[0]])
    assert batch.images.shape == (1, 3, 192, 256)
    size = torch.tensor([256, 192, 256, 192])
    boxes = batch.targets[:, 1:5] * size
    said = HeadPoses(boxes[None], torch.ones(1, 1), torch.zeros(1, 1, 3))
    np.testing.assert_allclose(heads_of(said, 0, *batch.factors[0], picture.size).boxes, picture.boxes, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"image_size": 100}, {"mosaic": 2.0}, {"scale": 1.0}, {"made": 2}])
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected data"):
        HeadPoseData(**wrong)


# ------------------------------------------------------------------------------------------------------------------------------------- measuring


def test_errors_go_round_the_circle_and_only_found_heads_count() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 70, 70]])
    true = np.array([[10.0, 175, 0], [0, -30, 5], [0, 0, 0]])
    found = Heads(
        (100, 100), np.array([[21.0, 21, 40, 40], [0, 0, 10, 9], [0, 0, 10, 4], [80, 80, 90, 90]]), np.array([0.9, 0.8, 0.7, 0.6]),
        np.array([[2.0, -32, 5], [7, -175, -1], [90, 0, 90], [0, 0, 0]]),
    )  # fmt: skip
    errors, labels = angle_errors(found, boxes, true)
    np.testing.assert_allclose(errors, [[3, 10, 1], [2, 2, 0]])
    np.testing.assert_allclose(labels, true[:2])
    assert len(angle_errors(found.above(0.95), boxes, true)[0]) == 0
    assert len(angle_errors(found, np.zeros((0, 4)), np.zeros((0, 3)))[0]) == 0


def test_of_heads_that_overlap_the_surest_is_kept() -> None:
    boxes = torch.tensor([[[50.0, 50, 20, 20], [51, 50, 20, 20], [90, 50, 20, 20], [10, 10, 5, 5]]])
    said = HeadPoses(boxes, torch.tensor([[0.5, 0.8, 0.4, 0.1]]), torch.arange(12.0).view(1, 4, 3))
    found = heads_of(said, 0, 0.5, (10, 0), (200, 100))
    assert found.scores.tolist() == pytest.approx([0.8, 0.4])
    np.testing.assert_allclose(found.boxes[0], [62, 80, 102, 100])  # out of the padding, twice as large, and within the picture
    assert found.angles[0].tolist() == [3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------------------- tasks, command


def _arguments(runs: Path, *more: str, config: str = "direct_mhp_small") -> list[str]:
    return [
        "fit", "--config", str(CONFIGS / f"{config}.yaml"), "--runs", str(runs), "--data.image_size", "64", "--model.image_size", "64",
        "--data.batch_size", "2", "--data.workers", "0", "--model.config.width", "0.125", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
        "--trainer.strategy", "auto", "--trainer.precision", "32", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("direct_mhp*.yaml")))
def test_every_config_trains(folder: Path, config: str) -> None:
    cli = FovealCLI("detection", _arguments(folder, "--data.source", str(folder), "--trainer.fast_dev_run", "2", config=config))
    assert cli.trainer.callback_metrics["train/loss"].isfinite()
    assert {"val/AP", "val/MAE", "val/MAE_yaw", "val/found"} <= cli.trainer.callback_metrics.keys()


def test_an_interrupted_training_goes_on_to_the_same_result_and_is_exported(tmp_path: Path) -> None:
    common = (
        "--data.made", "8", "--trainer.max_epochs", "1", "--resume_point.every_n_steps", "1", "--model.warmup_epochs", "0",
        "--model.final_share", "1", "--data.mosaic", "1.0",
    )  # fmt: skip
    whole = FovealCLI("detection", _arguments(tmp_path / "whole", *common, "--trainer.check_val_every_n_epoch", "1"))
    FovealCLI("detection", _arguments(tmp_path / "cut", *common, "--trainer.max_steps", "2"))
    resumed = FovealCLI("detection", _arguments(tmp_path / "cut", *common, "--ckpt_path", "last"))
    assert resumed.trainer.global_step == whole.trainer.global_step == 4
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    (checkpoint,) = tmp_path.glob("whole/detection/*/*/checkpoints/best.ckpt")
    poser = HeadPoser.from_pretrained(export(checkpoint, tmp_path / "heads.safetensors"), device="cpu")
    assert poser.image_size == 64
    assert poser(np.zeros((40, 90, 3), np.uint8), score=0.0).size == (90, 40)


def test_the_verb_predict_gives_the_heads_of_every_picture(folder: Path) -> None:
    arguments = _arguments(folder, "--data.source", str(folder))
    cli = FovealCLI("detection", ["predict", *arguments[1:], "--return_predictions", "true"])
    found = cli.trainer.predict_loop.predictions
    assert found
    assert all(heads.boxes.shape[1] == 4 for (heads,) in found)


def test_data_of_another_size_than_the_losss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.image_size 64"):
        FovealCLI("detection", _arguments(tmp_path, "--model.image_size", "128", "--data.made", "4", "--trainer.fast_dev_run", "1"))


def test_weights_of_yolov5_are_taken_over_but_for_the_head(tmp_path: Path) -> None:
    from foveal.detection import to_official

    torch.manual_seed(0)
    theirs = to_official("direct_mhp", DirectMHP(DirectMHPConfig(0.125)))
    eighty = {key: torch.zeros(255, *value.shape[1:]) if key.startswith("model.33.m") else value for key, value in theirs.items()}
    torch.save(eighty, tmp_path / "yolov5s6.pt")
    network = DirectMHP(DirectMHPConfig(0.125))
    left = start_from(network, str(tmp_path / "yolov5s6.pt"))
    assert left == sorted(f"head.out.{level}.{name}" for level in range(4) for name in ("weight", "bias"))
    assert torch.equal(network.stage4.merge.conv.weight, theirs["model.6.cv3.conv.weight"])
    torch.save({"model.0.conv.conv.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="nothing in"):
        start_from(network, str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"do not fit; choose another file, or model\.config\.width"):
        start_from(DirectMHP(DirectMHPConfig(0.25)), str(tmp_path / "yolov5s6.pt"))


def test_sizes_that_a_file_does_not_tell_are_the_pictures(folder: Path) -> None:
    file = next((folder / "annotations").glob("*.json"))
    content = json.loads(file.read_text())
    told = [(entry.pop("width"), entry.pop("height")) for entry in content["images"]]
    file.write_text(json.dumps(content))
    pictures = next(path for path in (folder / "images").iterdir() if (path / content["images"][0]["file_name"]).is_file())
    assert [picture.size for picture in read_heads(file, pictures)] == told


def test_a_picture_is_not_replaced_by_its_own_result(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    command = ["detection", "head-pose", str(tmp_path / "a.jpg"), "-o", str(tmp_path), "--checkpoint", str(weights), "--device", "cpu", "--overwrite"]
    assert run(command) == 2
    assert "would be replaced" in capsys.readouterr().err
    assert (tmp_path / "a.jpg").read_bytes() == before


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A network at random that finds heads almost everywhere."""
    torch.manual_seed(0)
    model = DirectMHP(DirectMHPConfig(0.125))
    for layer in model.head.out:
        torch.nn.init.normal_(layer.weight, std=0.4)  # type: ignore[arg-type]
        torch.nn.init.constant_(layer.bias, 2.0)  # type: ignore[arg-type]
    return save_weights(
        tmp_path / "random.safetensors", model.state_dict(), system="direct_mhp", config=model.config, metadata={"image_size": "128"}
    )  # fmt: skip


def test_a_batch_goes_on_past_a_bad_picture_and_keeps_what_is_there(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(pictures / "good.png")
    Image.new("L", (1, 1)).save(pictures / "one.png")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    command = ["detection", "head-pose", str(pictures), "-o", str(tmp_path / "out"), "--checkpoint", str(weights), "--device", "cpu", "--json"]
    assert run(command) == 2
    report = {Path(entry["source"]).name: entry for entry in json.loads(capsys.readouterr().out)["files"]}
    assert [report[name]["state"] for name in ("good.png", "one.png", "broken.jpg")] == ["done", "done", "failed"]
    written = json.loads((tmp_path / "out" / "good.json").read_text())
    assert (written["width"], written["height"]) == (70, 50)
    assert len(written["heads"]) == report["good.png"]["numbers"]["heads"] > 0
    head = written["heads"][0]
    assert abs(head["pitch"]) <= 90
    assert abs(head["yaw"]) <= 180
    assert np.asarray(Image.open(tmp_path / "out" / "good.jpg")).shape == (50, 70, 3)
    assert run(command) == 2
    assert {entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]} == {"kept", "failed"}


@pytest.mark.parametrize(
    ("start", "metadata", "said"),
    [(True, {}, "no training has touched them"), (False, {"learned_from": "drawn heads"}, "drawn heads alone"), (False, {}, None)],
)
def test_weights_that_cannot_know_heads_are_said_to_be_such_on_the_screen_and_in_the_file(
    start: bool, metadata: dict[str, str], said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DirectMHP(DirectMHPConfig(0.125))
    if not start:
        model.train()(torch.rand(2, 3, 64, 64))
    metadata = {"image_size": "64", **metadata}
    file = save_weights(tmp_path / "x.safetensors", model.state_dict(), system="direct_mhp", config=model.config, metadata=metadata)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    assert run(["detection", "head-pose", str(tmp_path / "a.png"), "-o", str(tmp_path), "--checkpoint", str(file), "--device", "cpu"]) == 0
    warned, written = capsys.readouterr().err, json.loads((tmp_path / "a.json").read_text())
    assert ("warning:" in warned) == ("warning" in written) == (said is not None)
    assert said is None or (said in warned and said in written["warning"])
    top = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)[1, :, :].mean(0)
    assert (top[0] > top[1] + 60) == (said is not None)  # a red strip across the picture


def test_without_weights_and_with_wrong_ones_it_is_said_what_to_do(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for options, message in (
        ([], "foveal detection convert direct_mhp"),
        (["--checkpoint", str(weights), "--image-size", "100"], "multiple of 64"),
        (["--checkpoint", str(weights), "--score", "2"], "--score in 0..1"),
    ):
        assert run(["detection", "head-pose", str(tmp_path / "a.png"), *options]) == 2
        assert message in capsys.readouterr().err


def test_the_blue_axis_is_drawn_to_the_nose() -> None:
    image = np.full((200, 200, 3), 128, np.uint8)
    for yaw, side in ((90.0, -1), (-90.0, 1)):
        drawn = draw_heads(image, Heads((200, 200), np.array([[70.0, 70, 130, 130]]), np.array([1.0]), np.array([[0.0, yaw, 0.0]]))).astype(int)
        blue = (drawn[..., 2] > 240) & (drawn[..., 0] < 80)
        assert np.sign(blue.nonzero()[1].mean() - 100) == side
