"""Every configuration of the medical domain loads and trains two batches, with the real command line."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from foveal.core.cli import FovealCLI

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "medical").glob("*.yaml"))
SMALL = {
    "GuidedAttentionNet": {"blocks": [1, 1, 1, 1], "stem": 8, "groups": 4, "group_width": 4, "width": 8, "encoded": [8, 8]},
    "MHSVM": {"dims": [8, 16], "depths": [1, 1], "decoder_depths": [1, 1], "state": 2, "patch": 2},
    "RAT": {"width": 8, "middle_layers": 3, "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]},
}


def volume(generator: np.random.Generator, shape: tuple[int, int, int], classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros(shape, np.uint8)
    for label in range(1, classes):
        labels[4 * label : 4 * label + 4, 5:14, 1:-1] = label
    return (labels * 40 + generator.normal(50, 5, shape)).clip(0, 255).astype(np.float32), labels


@pytest.fixture
def corpus(tmp_path, write_chaos):
    """Write a tiny corpus of a layout; gives its root."""

    def write(layout: str, classes: int, values: dict | None) -> Path:
        generator, root = np.random.default_rng(0), tmp_path / layout
        root.mkdir()
        if layout == "chaos_mr":
            for number in range(6):
                write_chaos(root, number)
            return root
        for number in range(8):
            image, labels = volume(generator, (32, 32, 5), classes)
            if layout == "folders" and values:
                for folder, picture in (("images", image[:, :, 2]), ("masks", (labels[:, :, 2] > 0) * 255)):
                    (root / folder).mkdir(exist_ok=True)
                    Image.fromarray(picture.astype(np.uint8)).save(root / folder / f"lesion_{number}.png")
            elif layout == "folders":
                for folder, voxels in (("images", image), ("labels", labels)):
                    (root / folder).mkdir(exist_ok=True)
                    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), root / folder / f"case_{number}.nii.gz")
            elif layout == "brats":
                place = root / f"Brats18_{number}"
                place.mkdir()
                labels[labels == 3] = 4
                for sequence in ("flair", "t1", "t1ce", "t2"):
                    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), place / f"{place.name}_{sequence}.nii.gz")
                nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), place / f"{place.name}_seg.nii.gz")
            else:
                nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), root / f"training_axial_crop_pat{number}.nii.gz")
                nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), root / f"training_axial_crop_pat{number}-label.nii.gz")
        return root

    return write


@pytest.fixture
def pairs(tmp_path):
    """Write tiny pairs as the authors' folders, or a volume to degrade; gives the root."""

    def write(simulated: bool) -> Path:
        generator = np.random.default_rng(0)
        if simulated:
            nibabel.save(nibabel.Nifti1Image(generator.normal(0, 200, (80, 96, 8)).astype(np.float32), np.eye(4)), tmp_path / "ct.nii.gz")
            return tmp_path / "ct.nii.gz"
        for part in ("train", "test"):
            for folder in ("fd", "qd", "qd_seg_123456"):
                place = tmp_path / "pairs" / part / folder
                place.mkdir(parents=True)
                for number in range(5):
                    picture = generator.integers(0, 255 if folder != "qd_seg_123456" else 6, (80, 80)).astype(np.uint8)
                    if folder == "qd_seg_123456":
                        nibabel.save(nibabel.Nifti1Image(picture, np.eye(4)), place / f"{number}.nii.gz")
                    else:
                        Image.fromarray(picture).save(place / f"{number}.png")
        return tmp_path / "pairs"

    return write


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_batches(config, corpus, pairs, tmp_path):
    written = yaml.safe_load(config.read_text())
    model, data = written["model"]["init_args"], written["data"]["init_args"]
    if not written["data"]["class_path"].endswith(("LabelledScans", "RestorationPairs")):
        pytest.skip(f"{config.name} learns from no volumes or pairs: it has tests of its own")
    network = model["network"]["init_args"]
    if "config" in network:
        network["config"] |= SMALL[model["network"]["class_path"].rpartition(".")[2]]
    if written["data"]["class_path"].endswith("LabelledScans"):
        data["root"] = str(corpus(data.get("layout", "folders"), data["classes"], data.get("label_values")))
        data |= {"crop": [16, 16], "validation": 1}
    else:
        data |= {"root": str(pairs("simulate" in data)), "crop": 32}
    data["batch_size"] = 2
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(written))
    arguments = ["fit", "--config", str(changed), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu"]
    arguments += ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.enable_model_summary", "false"]
    cli = FovealCLI("medical", arguments)
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert written["best"]["monitor"] in cli.trainer.callback_metrics


def test_no_config_holds_a_path_of_one_machine():
    assert len(CONFIGS) >= 9
    for config in CONFIGS:
        assert not [line for line in config.read_text().splitlines() if ": /" in line], config
