"""Scenes of every layout are read as they are, BEVANet's loss is the authors', training resumes, and pictures come out with their classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.detection import load_official, to_official
from foveal.detection.data.scenes import CAMVID, CITYSCAPES, scene_folder, scenes_of
from foveal.detection.data.segmentation import SceneSet, SegmentationData, boundaries
from foveal.detection.models.bevanet import BEVANet, BEVANetConfig
from foveal.detection.models.bevanet_inference import inference_form
from foveal.detection.models.bevanet_loss import IGNORED, SceneLoss, boundary_cross_entropy, hard_cross_entropy
from foveal.detection.segment import Segmenter
from foveal.detection.tasks.export import export
from foveal.detection.tasks.segmentation import SegmentationTask, start_from

CONFIGS = Path(__file__).parents[2] / "configs" / "detection"
TINY = BEVANetConfig(3, 8, (1, 1, 1), pyramid_channels=8, head_channels=8)


def _halves(size: tuple[int, int], left: int, right: int) -> np.ndarray:
    labels = np.full((size[1], size[0]), left, np.uint8)
    labels[:, size[0] // 2 :] = right
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Plain folders: a grey, a red and a blue band whose place changes, eight pictures to train on and three to measure."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3), ("test", 3)):
        for name in ("images", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((64, 96), np.uint8)
            first, second = sorted(generator.integers(10, 86, 2))
            labels[:, first:second], labels[:, second:] = 1, 2
            image = np.array([[90, 90, 90], [220, 40, 40], [40, 40, 220]], np.uint8)[labels]
            Image.fromarray(image).save(tmp_path / "images" / part / f"{number}.png")
            Image.fromarray(labels).save(tmp_path / "labels" / part / f"{number}.png")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------------------------------------ data


def test_cityscapes_numbers_become_the_nineteen_classes(tmp_path: Path) -> None:
    for folder, name, content in (
        ("leftImg8bit", "aachen_000000_000019_leftImg8bit.png", np.zeros((20, 40, 3), np.uint8)),
        ("gtFine", "aachen_000000_000019_gtFine_labelIds.png", _halves((40, 20), 26, 4)),
    ):
        (tmp_path / folder / "train" / "aachen").mkdir(parents=True)
        Image.fromarray(content).save(tmp_path / folder / "train" / "aachen" / name)
    kind = scene_folder(tmp_path)
    (scene,) = scenes_of(tmp_path, kind, "train")
    labels = kind.read(scene)
    assert (kind.layout, len(kind.names), kind.names[labels[0, 0]]) == ("cityscapes", 19, "car")
    assert (labels[:, 20:] == IGNORED).all()  # number 4 is static, which no benchmark counts
    assert kind.colours[13] == CITYSCAPES["car"][0]


@pytest.mark.parametrize("form", ["numbers", "colours"])
def test_camvid_is_read_as_segnet_holds_it_and_by_its_colours(tmp_path: Path, form: str) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "train" / "0001TP_006690.png")
    if form == "numbers":
        (tmp_path / "trainannot").mkdir()
        Image.fromarray(_halves((40, 20), 8, 11)).save(tmp_path / "trainannot" / "0001TP_006690.png")
    else:
        (tmp_path / "train_labels").mkdir()
        table = np.zeros((256, 3), np.uint8)
        table[1], table[2] = CAMVID["car"][0], (64, 192, 0)  # the second is a wall, which the eleven classes do not have
        Image.fromarray(table[_halves((40, 20), 1, 2)]).save(tmp_path / "train_labels" / "0001TP_006690_L.png")
    kind = scene_folder(tmp_path)
    (scene,) = scenes_of(tmp_path, kind, "train")
    labels = kind.read(scene)
    assert kind.names[labels[0, 0]] == "car"
    assert (labels[:, 20:] == IGNORED).all()


def test_faults_of_a_folder_are_named(folders: Path, tmp_path: Path) -> None:
    names = ["grey", "red", "blue"]
    with pytest.raises(UserError, match=r"expected data\.names"):
        scene_folder(folders)
    with pytest.raises(UserError, match="does not exist"):
        scene_folder(folders / "nowhere")
    with pytest.raises(UserError, match=r"found none; check data\.source"):
        scene_folder(folders / "images")
    with pytest.raises(UserError, match="auto, cityscapes, camvid or folders"):
        scene_folder(folders, "voc")
    with pytest.raises(UserError, match=r"expected no data\.names"):
        scene_folder(folders, "cityscapes", names)
    kind = scene_folder(folders, names=names)
    with pytest.raises(UserError, match="found none"):
        scenes_of(folders, kind, "holdout")
    scenes = scenes_of(folders, kind, "train")
    with pytest.raises(UserError, match=r"classes below 2.*holds 2"):
        scene_folder(folders, names=names[:2]).read(scenes[0])
    scenes[1].labels.write_bytes(scenes[1].labels.read_bytes()[:60])
    with pytest.raises(UserError, match=r"1\.png cannot be read"):
        kind.read(scenes[1])
    Image.new("RGB", (96, 64), "red").save(scenes[2].labels)
    with pytest.raises(UserError, match="is coloured"):
        kind.read(scenes[2])
    Image.new("L", (90, 64)).save(scenes[3].labels)
    with pytest.raises(UserError, match="90 x 64"):
        SceneSet(scenes, kind)[3]
    scenes[4].labels.unlink()
    with pytest.raises(UserError, match=r"1 of 8 have none"):
        scenes_of(folders, kind, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 1}, "two or more"), ({"crop": (16, 64)}, "at least 32"), ({"scale": (0.0, 1.0)}, "positive"), ({"base_size": 5}, "at least 32")],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SegmentationData("somewhere", **settings)


def test_boundaries_lie_where_classes_meet_and_not_at_the_border() -> None:
    labels = _halves((40, 30), 3, 7)
    edge = boundaries(labels)
    assert set(np.unique(edge)) == {0.0, 1.0}
    columns = edge.any(0).nonzero()[0]
    assert 17 <= columns.min() <= 20 <= columns.max() <= 23
    assert not boundaries(np.zeros((30, 40), np.uint8)).any()
    inner = boundaries(labels, margin=6)
    assert inner[:3].sum() == 0
    assert inner[10:20].any()


def test_picture_labels_and_boundary_are_cut_and_mirrored_alike(folders: Path) -> None:
    kind = scene_folder(folders, names=["grey", "red", "blue"])
    pieces = SceneSet(scenes_of(folders, kind, "train"), kind, (48, 64), None, (0.5, 2.0), True)
    colours = torch.tensor([[90, 90, 90], [220, 40, 40], [40, 40, 220]]) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for index in range(8):
        piece = pieces[index]
        assert piece["image"].shape == (3, 48, 64)
        assert piece["labels"].shape == piece["boundary"].shape == (48, 64)
        valid = (piece["labels"] != IGNORED) & (piece["boundary"] == 0)
        expected = (colours[piece["labels"][valid]] - mean) / deviation
        torch.testing.assert_close(piece["image"].permute(1, 2, 0)[valid], expected, rtol=0, atol=0.02)
        outside = piece["labels"] == IGNORED
        assert (piece["image"].permute(1, 2, 0)[outside] + mean / deviation).abs().max() < 1e-5 if outside.any() else True


# ------------------------------------------------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize(("name", "threshold", "kept"), [("a", 0.9, 1000), ("b", 0.3, 4000)])
def test_the_loss_and_its_gradients_equal_the_authors(golden: Any, draw: Any, name: str, threshold: float, kept: int) -> None:
    reference = golden("bevanet")
    model = load_official("bevanet", reference.state(reference.about["tiny"]["state_dict"])).double().train()
    labels = reference.tensor("in_labels").long().repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :9, :30] = IGNORED
    edge = torch.from_numpy(np.unpackbits(reference["in_boundary"], axis=-1))
    raw = model.raw(draw("image", (2, 3, 128, 192)).double())  # type: ignore[operator]
    loss, parts = SceneLoss(threshold, kept, class_weights=[1, 0.5, 2, 1.5, 0.8])(raw, labels, edge)
    semantic, boundary, along, total = reference.tensor(f"loss_{name}").tolist()
    assert float(parts["detail"] + parts["classes"]) == pytest.approx(semantic, rel=1e-6)
    assert float(parts["boundary"]) == pytest.approx(boundary, rel=1e-9)
    assert float(parts["along_boundary"]) == pytest.approx(along, rel=1e-6)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    if name == "a":
        loss.backward()
        norms, gradients = reference.about["tiny"]["grad_norms"], dict(model.named_parameters())
        model.load_state_dict({key: (gradients[key].grad if key in gradients else value) for key, value in model.state_dict().items()})
        theirs = to_official("bevanet", model)
        for key, norm in norms.items():
            assert float(theirs[key].norm()) == pytest.approx(norm, rel=1e-5, abs=1e-9), key


def test_only_unsure_pixels_are_learned_and_at_least_as_many_as_asked_for() -> None:
    given = torch.tensor([0.95, 0.8, 0.6, 0.99])
    logits = torch.stack((given.logit(), torch.zeros(4)))[None, :, None]
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    cost = -given.log()
    assert hard_cross_entropy(logits, labels, 0.9, 1).item() == pytest.approx(cost[[1, 2]].mean().item(), rel=1e-5)
    # below the third least sure one are two; below the fourth are three
    assert hard_cross_entropy(logits, labels, 0.0, 2).item() == pytest.approx(cost[[1, 2]].mean().item(), rel=1e-5)
    assert hard_cross_entropy(logits, labels, 0.0, 3).item() == pytest.approx(cost[[0, 1, 2]].mean().item(), rel=1e-5)
    labels[..., 2] = IGNORED
    assert hard_cross_entropy(logits, labels, 0.9, 1).item() == pytest.approx(cost[1].item(), rel=1e-5)


def test_nothing_to_learn_costs_nothing_and_one_pixel_is_learned() -> None:
    logits = torch.randn(1, 3, 1, 2, requires_grad=True)
    labels = torch.full((1, 1, 2), IGNORED)
    loss = hard_cross_entropy(logits, labels)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    labels[..., 0] = 1
    assert hard_cross_entropy(logits, labels, threshold=0.0).isfinite()


def test_a_rare_boundary_weighs_as_much_as_the_rest() -> None:
    boundary = torch.zeros(1, 10, 10, dtype=torch.float64)
    boundary[0, 0, :2] = 1
    logits = torch.zeros_like(boundary, requires_grad=True)
    boundary_cross_entropy(logits, boundary).backward()
    assert logits.grad is not None
    assert logits.grad[boundary == 1].sum().item() == pytest.approx(-logits.grad[boundary == 0].sum().item())


# ------------------------------------------------------------------------------------------------------------------------------- inference, tasks


def test_the_form_for_inference_says_the_same(golden: Any) -> None:
    reference = golden("bevanet")
    model = load_official("bevanet", reference.state(reference.about["tiny"]["state_dict"]))
    assert isinstance(model, BEVANet)
    answering = inference_form(model)
    for size in ((70, 101), (64, 128)):
        image = torch.rand(2, 3, *size)
        with torch.no_grad():
            expected, said = model(image), answering(image)
        assert ((said - expected).norm() / expected.norm()).item() < 1e-5
    exact = inference_form(model.double())
    with torch.no_grad():
        torch.testing.assert_close(exact(image.double()), model(image.double()), rtol=1e-11, atol=1e-11)
    assert sum(p.numel() for p in answering.parameters()) < sum(p.numel() for p in model.parameters())


def _arguments(folders: Path, *more: str, verb: str = "fit", config: str = "bevanet_small") -> list[str]:
    return [
        verb, "--config", str(CONFIGS / f"{config}.yaml"), "--runs", str(folders / "runs"), "--data.source", str(folders),
        "--data.names", '["grey", "red", "blue"]', "--data.crop", "[64, 64]", "--data.base_size", "96", "--data.batch_size", "2",
        "--data.workers", "0",
        "--model.config.classes", "3", "--model.config.channels", "8", "--model.config.pyramid_channels", "8", "--model.config.head_channels", "8",
        "--model.class_weights", "null", "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto",
        "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("bevanet*.yaml")))
def test_every_config_trains(folders: Path, config: str) -> None:
    cli = FovealCLI("detection", _arguments(folders, "--trainer.fast_dev_run", "2", config=config))
    assert 0 <= cli.trainer.callback_metrics["val/mIoU"] <= 1
    assert cli.trainer.callback_metrics["train/loss"].isfinite()


def test_a_training_learns_the_bands_and_its_weights_are_used(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three plain colours: after a few epochs nearly every pixel is right; exported, the network says so of files too."""
    settings = {"trainer.max_epochs": 24, "trainer.check_val_every_n_epoch": 24, "model.learning_rate": 0.003, "data.batch_size": 4}
    cli = FovealCLI("detection", _arguments(folders, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))))
    assert cli.trainer.callback_metrics["val/mIoU"] > 0.5  # a third of a class' pixels is what one answer everywhere would have
    (checkpoint,) = folders.glob("runs/detection/bevanet_small/*/checkpoints/best.ckpt")
    assert (checkpoint.parents[1] / "pictures" / "val-scene.png").exists()
    weights = export(checkpoint, tmp_path / "bands.safetensors")
    monkeypatch.chdir(tmp_path)
    assert run(["detection", "segment", str(folders / "images" / "test"), "-o", "said", "--checkpoint", str(weights), "--device", "cpu"]) == 0
    right = []
    for file in sorted((folders / "labels" / "test").glob("*.png")):
        said = Image.open(tmp_path / "said" / f"{file.stem}_classes.png")
        assert said.mode == "P"
        right.append((np.asarray(said) == np.asarray(Image.open(file))).mean())
        assert Image.open(tmp_path / "said" / f"{file.stem}_overlay.jpg").height > 64  # the legend stands below
    assert np.mean(right) > 0.6


def test_the_verb_predict_gives_a_class_for_every_place(folders: Path) -> None:
    cli = FovealCLI("detection", _arguments(folders, "--return_predictions", "true", verb="predict"))
    assert {len(found) for found in cli.trainer.predict_loop.predictions} == {1}


def test_an_interrupted_training_goes_on_to_the_same_result(folders: Path) -> None:
    common = [
        "--trainer.check_val_every_n_epoch", "9", "--resume_point.every_n_steps", "1", "--trainer.max_epochs", "2", "--data.batch_size", "4",
        # the rate stays, for a run that is told to end earlier lets it fall faster; without Adam, whose first steps blow up the last digits
        "--model.power", "0", "--model.optimizer", "sgd", "--model.learning_rate", "0.001",
    ]  # fmt: skip
    whole = FovealCLI("detection", _arguments(folders, *common, "--experiment", "whole"))
    FovealCLI("detection", _arguments(folders, *common, "--experiment", "cut", "--trainer.max_steps", "3"))
    resumed = FovealCLI("detection", _arguments(folders, *common, "--experiment", "cut", "--ckpt_path", "last"))
    assert resumed.trainer.global_step == whole.trainer.global_step == 4
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_a_network_of_other_classes_than_the_data_is_refused(folders: Path) -> None:
    with pytest.raises(UserError, match=r"model\.config\.classes 3"):
        FovealCLI("detection", _arguments(folders, "--model.config.classes", "4", "--trainer.fast_dev_run", "1"))
    with pytest.raises(UserError, match="auxiliary true"):
        SegmentationTask(BEVANetConfig(3, 8, auxiliary=False))


def test_authors_weights_of_other_classes_are_taken_over_but_for_the_heads(golden: Any, tmp_path: Path) -> None:
    reference = golden("bevanet")
    torch.save(reference.state(reference.about["tiny"]["state_dict"]), tmp_path / "imagenet.pth")
    network = BEVANet(BEVANetConfig(7, 16, (2, 2, 3), pyramid_channels=24, head_channels=16))
    left = start_from(network, str(tmp_path / "imagenet.pth"))
    assert left == ["detail_head.second.conv.bias", "detail_head.second.conv.weight", "head.second.conv.bias", "head.second.conv.weight"]
    with pytest.raises(UserError, match="nothing in"):
        start_from(BEVANet(TINY), _other(tmp_path))


def test_weights_of_another_width_are_refused_although_their_counters_fit(tmp_path: Path) -> None:
    wider = BEVANet(replace(TINY, channels=2 * TINY.channels))
    file = save_weights(tmp_path / "wider.safetensors", wider.state_dict(), system="bevanet", config=wider.config)
    with pytest.raises(UserError, match=r"do not fit; choose another file, or model\.config\.channels"):
        start_from(BEVANet(TINY), str(file))


def _other(folder: Path) -> str:
    return str(save_weights(folder / "other.safetensors", {"x": torch.zeros(3)}, system="bevanet", config=TINY))


# ---------------------------------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = BEVANet(BEVANetConfig(19, 8, (1, 1, 1), pyramid_channels=8, head_channels=8))
    return save_weights(tmp_path / "random.safetensors", model.state_dict(), system="bevanet", config=model.config)


def test_a_batch_goes_on_past_a_bad_picture_and_keeps_what_is_there(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (50, 30), "green").save(pictures / "good.png")
    Image.new("LA", (1, 1)).save(pictures / "one.png")
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    command = ["detection", "segment", str(pictures), "-o", str(tmp_path / "out"), "--checkpoint", str(weights), "--device", "cpu", "--json"]
    assert run(command) == 2
    report = {Path(entry["source"]).name: entry for entry in json.loads(capsys.readouterr().out)["files"]}
    assert [report[name]["state"] for name in ("good.png", "one.png", "broken.jpg")] == ["done", "done", "failed"]
    assert np.asarray(Image.open(tmp_path / "out" / "good_classes.png")).shape == (30, 50)
    assert run(command) == 2
    assert {entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]} == {"kept", "failed"}


def test_the_network_can_look_at_a_smaller_picture(weights: Path) -> None:
    segmenter = Segmenter.from_pretrained(weights, device="cpu")
    assert segmenter.names == list(CITYSCAPES)  # nineteen classes without names
    image = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    assert segmenter(image, image_size=45).shape == (40, 90)
    assert segmenter(np.zeros((20, 5000, 3), np.uint8)).shape == (20, 5000)  # beyond what it looks at
    with pytest.raises(UserError, match="picture of bytes"):
        segmenter(image.astype(float))  # type: ignore[arg-type]


def test_without_weights_it_is_said_where_they_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert run(["detection", "segment", str(tmp_path / "a.png")]) == 2
    assert "foveal detection convert bevanet" in capsys.readouterr().err


def test_the_paper_config_says_what_the_authors_do() -> None:
    settings = yaml.safe_load((CONFIGS / "bevanet_paper.yaml").read_text())
    model, data, trainer = settings["model"]["init_args"], settings["data"]["init_args"], settings["trainer"]
    assert (model["learning_rate"], model["weight_decay"], len(model["class_weights"])) == (0.008, 0.0004, 19)
    assert (data["batch_size"] * trainer["devices"], data["crop"], trainer["max_epochs"]) == (12, [1024, 1024], 500)
