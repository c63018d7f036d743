"""X-ray scenes obey the law of attenuation, PIDray's folder is read as it lies, and SDANet's recipe runs on both."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.detection.data.projection import CLEAR, Crop, Scene, drawn_bag, drawn_crops, project, read_crops
from foveal.detection.data.xray import CLASSES, CocoScenes, MadeScenes, XRayData, XRaySet, pictures_of, together, write_scenes
from foveal.detection.metrics import average_precision
from foveal.detection.models.sdanet import SDANet, SDANetConfig
from foveal.detection.tasks.xray import XRayTask

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"


def empty(side: int = 64, light: float = 0.5) -> Scene:
    return Scene(np.full((side, side, 3), light, dtype=np.float32), np.zeros((0, side, side), dtype=bool), [])


def test_attenuations_add_and_nothing_else_changes() -> None:
    crop = Crop(2, np.full((20, 20, 3), 0.3, dtype=np.float32))
    after = project(empty(), crop, np.random.default_rng(0), density=(2.0, 2.0))
    mask = cv2.erode(after.masks[0].astype(np.uint8), np.ones((3, 3))) > 0  # away from the blurred border
    np.testing.assert_allclose(after.passes[mask], 0.5 * 0.3**2, rtol=1e-4)
    np.testing.assert_array_equal(after.passes[~after.masks[0]], 0.5)
    assert after.labels == [2]


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_light_never_grows_and_every_object_lies_in_its_box(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scene = drawn_bag(generator, 96)
    after = scene
    for crop in drawn_crops(CLASSES)[:3]:
        after = project(after, crop, generator)
    assert (after.passes <= scene.passes + 1e-6).all()
    for mask, (left, top, right, bottom) in zip(after.masks, after.boxes.astype(int), strict=True):
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert 0 <= left < right <= 96
        assert 0 <= top < bottom <= 96


def test_a_scene_is_the_same_whenever_it_is_asked_for_and_another_seed_makes_others() -> None:
    scenes, others = (MadeScenes(4, drawn_crops(CLASSES), CLASSES, side=64, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(scenes.scene(2).passes, scenes.scene(2).passes)
    assert np.abs(scenes.scene(2).passes - others.scene(2).passes).max() > 0.05
    assert all(1 <= len(scenes.scene(place).labels) <= 3 for place in range(4))


def write_crops(folder: Path) -> Path:
    for crop in drawn_crops(CLASSES)[:2]:
        (folder / CLASSES[crop.label]).mkdir(parents=True)
        cv2.imwrite(str(folder / CLASSES[crop.label] / "one.png"), (crop.passes * 255).astype(np.uint8)[..., ::-1])
    return folder


def test_crops_are_read_by_their_folders(tmp_path: Path) -> None:
    crops = read_crops(write_crops(tmp_path / "crops"), CLASSES)
    assert sorted(CLASSES[crop.label] for crop in crops) == ["Hammer", "Knife"]
    assert all((crop.passes.min(-1) < CLEAR).any() for crop in crops)


def test_crops_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is none"):
        read_crops(tmp_path / "nowhere", CLASSES)
    (tmp_path / "Banana").mkdir()
    with pytest.raises(UserError, match="got Banana"):
        read_crops(tmp_path, CLASSES)
    (tmp_path / "Banana").rename(tmp_path / "Gun")
    with pytest.raises(UserError, match="got none"):
        read_crops(tmp_path, CLASSES)
    cv2.imwrite(str(tmp_path / "Gun" / "white.png"), np.full((8, 8, 3), 255, np.uint8))
    with pytest.raises(UserError, match="is empty"):
        read_crops(tmp_path, CLASSES)


@pytest.fixture(scope="module")
def pidray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as PIDray's authors lay it out, with made scenes in it."""
    root = tmp_path_factory.mktemp("pidray")
    (root / "annotations").mkdir()
    for seed, (part, folder) in enumerate([("train", "train"), ("test_easy", "easy"), ("test_hard", "hard"), ("test_hidden", "hidden")]):
        file = write_scenes(MadeScenes(3, drawn_crops(CLASSES), CLASSES, side=96, seed=seed), root / folder)
        file.rename(root / "annotations" / f"xray_{part}.json")
    return root


def test_written_scenes_are_read_back_with_the_same_masks(pidray: Path) -> None:
    made, read = (
        MadeScenes(3, drawn_crops(CLASSES), CLASSES, side=96, seed=0),
        CocoScenes(pidray / "annotations" / "xray_train.json", pidray / "train"),
    )
    assert read.names == list(CLASSES)
    for place in range(3):
        ours, theirs = made.scene(place), read.scene(place)
        np.testing.assert_array_equal(ours.masks, theirs.masks)
        assert ours.labels == theirs.labels
        np.testing.assert_allclose(ours.passes, theirs.passes, atol=1 / 255)


def test_stored_masks_and_boxes_score_an_ap_of_one(pidray: Path) -> None:
    scenes = CocoScenes(pidray / "annotations" / "xray_test_easy.json", pidray / "easy")
    perfect = [{**part, "score": 0.9} for part in scenes.truth["annotations"]]
    for kind in ("bbox", "segm"):
        found = [{key: part[key] for key in ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")} for part in perfect]
        assert average_precision(scenes.truth, found, kind)[0]["AP"] == pytest.approx(1.0)  # type: ignore[arg-type]


def test_flipped_pictures_have_flipped_boxes_and_masks(pidray: Path) -> None:
    scenes = CocoScenes(pidray / "annotations" / "xray_train.json", pidray / "train")
    plain, mirrored = XRaySet(scenes, 64, "pixels")[0], XRaySet(scenes, 64, "pixels", flip=1.0)[0]
    torch.testing.assert_close(plain[0].flip(-1), mirrored[0])
    torch.testing.assert_close(plain[3].masks.flip(-1), mirrored[3].masks)
    torch.testing.assert_close(64 - plain[3].boxes[:, [2, 0]], mirrored[3].boxes[:, [0, 2]])
    for box, mask in zip(mirrored[3].boxes, mirrored[3].masks, strict=True):
        columns = mask.any(0).nonzero()
        assert abs(float(box[0]) - float(columns.min())) <= 1.0


def test_pictures_of_a_batch_are_filled_up_with_zeros_to_multiples_of_32() -> None:
    scenes = [XRaySet(MadeScenes(1, drawn_crops(CLASSES), CLASSES, side=64), side, "edges")[0] for side in (40, 70)]
    batch = together(scenes)
    assert batch.images.shape == (2, 3, 96, 96)
    assert batch.sizes == [(40, 40), (70, 70)]
    assert not batch.images[0, :, 40:].any()
    assert not batch.images[0, :, :, 40:].any()


def test_a_folder_that_is_not_pidrays_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a COCO file"):
        XRayData(str(tmp_path)).train_dataloader()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "xray_train.json").write_text("{")
    with pytest.raises(UserError, match="export it again"):
        XRayData(str(tmp_path)).train_dataloader()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="expected an empty folder"):
        write_scenes(MadeScenes(1, drawn_crops(CLASSES), CLASSES, side=64), tmp_path / "full")


@pytest.mark.parametrize("config", ["sdanet_small", "sdanet_paper"])
def test_the_recipe_trains_and_every_split_is_measured(config: str, pidray: Path, tmp_path: Path) -> None:
    options = ["--config", str(CONFIGS / f"{config}.yaml"), "--runs", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    options += ["--data.init_args.side", "64", "--trainer.accelerator", "cpu", "--data.init_args.workers", "0", "--data.init_args.batch_size", "2"]
    options += ["--model.init_args.config.depth", "18", "--model.init_args.config.proposals", "4", "--model.init_args.config.detections", "2"]
    options += ["--model.init_args.config.score", "0.0", "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    options += ["--data.init_args.source", str(pidray)] if config == "sdanet_paper" else ["--data.init_args.made", "4"]
    cli = FovealCLI("detection", ["fit", *options])
    figures = cli.trainer.callback_metrics
    assert np.isfinite(float(figures["train/loss"]))
    assert 0 <= float(figures["val/AP"]) <= 1
    if config == "sdanet_paper":
        assert not cli.model.network.backbone.body.layer1[0].conv1.weight.requires_grad
        tested = FovealCLI("detection", ["test", *options, "--ckpt_path", "best"]).trainer.callback_metrics
        assert {f"test/{split}/mask_AP" for split in ("easy", "hard", "hidden")} <= set(tested)
        assert float(tested["test/AP"]) == pytest.approx(np.mean([float(tested[f"test/{split}/AP"]) for split in ("easy", "hard", "hidden")]))


def test_the_verb_predict_gives_what_is_found_in_every_split(pidray: Path, tmp_path: Path) -> None:
    options = _options("--runs", str(tmp_path), "--data.source", str(pidray), "--return_predictions", "true")
    cli = FovealCLI("detection", ["predict", *options])
    assert len(cli.trainer.predict_dataloaders) == 3
    assert all(len(found.scores) == len(found.masks) == 2 for split in cli.trainer.predict_loop.predictions for (found,) in split)


def test_labels_of_crowds_and_empty_masks_are_left_out(pidray: Path, tmp_path: Path) -> None:
    content = json.loads((pidray / "annotations" / "xray_train.json").read_text())
    first = content["annotations"][0]
    extra = [{**first, "id": 1001, "iscrowd": 1}, {**first, "id": 1002, "segmentation": [[5.0, 5.0, 5.0, 5.0, 5.0, 5.0]]}]
    (tmp_path / "labels.json").write_text(json.dumps({**content, "annotations": [*content["annotations"], *extra]}))
    before = CocoScenes(pidray / "annotations" / "xray_train.json", pidray / "train").scene(0)
    assert CocoScenes(tmp_path / "labels.json", pidray / "train").scene(0).labels == before.labels


def _options(*more: str, config: str = "sdanet_small") -> list[str]:
    options = ["--config", str(CONFIGS / f"{config}.yaml"), "--trainer.enable_progress_bar", "false", "--data.init_args.side", "64"]
    options += ["--trainer.accelerator", "cpu", "--data.init_args.workers", "0", "--data.init_args.batch_size", "2"]
    options += ["--model.init_args.config.depth", "18", "--model.init_args.config.proposals", "4", "--model.init_args.config.detections", "2"]
    return [*options, "--model.init_args.config.score", "0.0", *more]


def test_scenes_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    """A file in the folder's place, and a bag that cannot be read after others could."""
    (tmp_path / "file").write_text("x")
    assert run(["detection", "project", "-o", str(tmp_path / "file"), "--count", "1"]) == 2
    (tmp_path / "bags").mkdir()
    Image.new("RGB", (64, 64), "white").save(tmp_path / "bags" / "a.png")
    (tmp_path / "bags" / "b.png").write_text("no picture")
    scenes = MadeScenes(20, drawn_crops(CLASSES), CLASSES, pictures_of(tmp_path / "bags"), 64)
    with pytest.raises(UserError, match="none that Pillow can read"):
        write_scenes(scenes, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")), "made or not, it is empty"


def test_scenes_that_project_writes_are_trained_and_measured_on(tmp_path: Path) -> None:
    for seed, name in enumerate(("scenes", "more scenes")):
        assert run(["detection", "project", "-o", str(tmp_path / name), "--count", "3", "--side", "64", "--seed", str(seed)]) == 0
    data = ["--data.source", str(tmp_path / "scenes")]
    with pytest.raises(UserError, match=r"data\.test_source"):
        FovealCLI("detection", ["test", *_options(*data)])
    data += ["--data.test_source", str(tmp_path / "more scenes")]
    cli = FovealCLI("detection", ["fit", *_options(*data, "--trainer.fast_dev_run", "1")])
    assert np.isfinite(float(cli.trainer.callback_metrics["train/loss"]))
    assert 0 <= float(cli.trainer.callback_metrics["val/AP"]) <= 1


def test_converted_weights_are_measured_and_other_conventions_and_classes_are_refused(pidray: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SDANet(SDANetConfig(depth=18))
    file = save_weights(tmp_path / "sdanet.safetensors", network.state_dict(), system="sdanet", config=network.config)
    task = XRayTask(SDANetConfig(depth=18), weights=str(file))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in task.network.state_dict().items())
    fewer = XRayTask(SDANetConfig(depth=18, classes=3), weights=str(file)).network
    assert torch.equal(fewer.boxes[0].hidden[1].weight, network.boxes[0].hidden[1].weight)
    with pytest.raises(UserError, match="convention pixels"):
        XRayTask(SDANetConfig(depth=18, convention="edges"), weights=str(file))
    source = ["--data.source", str(pidray)]
    with pytest.raises(UserError, match=r"data\.convention edges"):
        FovealCLI("detection", ["fit", *_options(*source, "--model.init_args.config.convention", "edges")])
    with pytest.raises(UserError, match=r"model\.config\.classes 12"):
        FovealCLI("detection", ["fit", *_options(*source, "--model.init_args.config.classes", "3")])


def test_several_processes_are_measured_on_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    task, scenes = XRayTask(SDANetConfig(depth=18)), MadeScenes(3, drawn_crops(CLASSES), CLASSES, side=64)
    perfect = [{**part, "score": 0.9} for part in scenes.truth["annotations"]]
    boxes = [{key: part[key] for key in ("image_id", "category_id", "score", "bbox")} for part in perfect]
    masks = [{key: part[key] for key in ("image_id", "category_id", "score", "segmentation")} for part in perfect]
    dealt = ((1, 3), (2, 1))
    shares = [tuple({0: [one for one in found if one["image_id"] in part]} for found in (boxes, masks)) for part in dealt]
    logged: dict[str, float] = {}

    class Trainer:
        world_size = 2
        datamodule = type("Data", (), {"measured": {"made": scenes}})()

    task._trainer = Trainer()  # type: ignore[assignment]
    monkeypatch.setattr(task, "log", lambda name, value, **how: logged.update({name: value}))
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), shares))
    task._figures("val")
    assert logged == {"val/AP": pytest.approx(1.0), "val/mask_AP": pytest.approx(1.0)}
