"""Restoring: geometry of the output, region maps from everywhere, simulated pairs, the command."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from foveal.apps.main import run
from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.medical import Restorer, read_volume
from foveal.medical.data.pairs import RestorationPairs, degrade
from foveal.medical.models.rat import RAT, RATConfig
from foveal.medical.regions import region_volume, superpixels
from foveal.medical.volumes import Volume, from_array


def tiny(scale: int = 1) -> RAT:
    """An untrained network; its last convolution is 0, so that it gives its input back (enlarged bilinearly)."""
    torch.manual_seed(0)
    model = RAT(RATConfig(scale=scale, width=8, middle_layers=3, encoder_blocks=(1, 1), decoder_blocks=(1, 1)))
    torch.nn.init.zeros_(model.ending.weight)
    torch.nn.init.zeros_(model.ending.bias)
    return model


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32"])
def test_a_network_that_changes_nothing_gives_every_voxel_back_in_type_and_place(dtype):
    voxels = np.random.default_rng(0).integers(0, 200, (21, 18, 3)).astype(dtype)
    affine = np.array([[0, 0, 2.0, -10], [-0.8, 0, 0, 30], [0, -0.9, 0, 5], [0, 0, 0, 1]])
    out = Restorer(tiny(), (0.0, 255.0), "cpu")(Volume(voxels, affine))
    assert out.voxels.dtype == np.dtype(dtype)
    np.testing.assert_allclose(out.voxels, voxels, atol=1e-3)
    np.testing.assert_array_equal(out.affine, affine)


def test_an_enlarged_scan_covers_the_same_place():
    ramp = np.add.outer(np.arange(20.0), 2 * np.arange(24.0))[:, :, None].repeat(2, 2)
    volume = from_array(ramp, (1.5, 0.5, 4.0))
    out = Restorer(tiny(2), device="cpu")(volume)
    assert out.voxels.shape == (40, 48, 2)
    np.testing.assert_allclose(out.spacing, (0.75, 0.25, 4.0))
    for corner in (0, 1):
        edges = [v.affine @ [corner * v.voxels.shape[0] - 0.5, corner * v.voxels.shape[1] - 0.5, 0, 1] for v in (volume, out)]
        np.testing.assert_allclose(*edges)
    inside = out.affine @ [11, 20, 0, 1]
    expected = inside[0] / 1.5 + 2 * inside[1] / 0.5
    assert out.voxels[11, 20, 0] == pytest.approx(expected, abs=1e-3)


def test_regions_come_from_a_map_a_segmentation_or_the_image(tmp_path, medical_data):
    folder = medical_data / "rat_example" / "example_img"
    picture = read_volume(folder / "input_img.png")
    regions = region_volume(folder / "indexed_mask.nii", picture)
    assert regions.shape == (512, 512, 1)
    assert regions.max() + 1 == len(np.unique(regions)) == 39
    within = []
    for found in (regions, regions.swapaxes(0, 1)):
        numbers, pixels = np.unique(found, return_counts=True)
        within.append(np.average([picture.voxels[found == number].std() for number in numbers], weights=pixels))
    assert within[0] < 0.6 * within[1], "the map lies on the picture, not on its transpose"
    parts = superpixels(picture.voxels[:, :, 0] / 255.0)
    assert 10 < len(np.unique(parts)) <= 80
    assert parts.min() == 0
    inside = [picture.voxels[:, :, 0][parts == number].std() for number in np.unique(parts)]
    assert np.average(inside) < 0.7 * picture.voxels.std(), "superpixels follow the image"


def test_regions_that_do_not_fit_are_refused(tmp_path):
    volume = from_array(np.zeros((8, 10, 2)))
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 2), np.int16), np.eye(4)), tmp_path / "small.nii.gz")
    with pytest.raises(UserError, match=r"regions of size \(8, 10, 2\)"):
        region_volume(tmp_path / "small.nii.gz", volume)
    nibabel.save(nibabel.Nifti1Image(np.full((8, 10, 2), 0.5, np.float32), np.eye(4)), tmp_path / "soft.nii.gz")
    with pytest.raises(UserError, match="whole numbers"):
        region_volume(tmp_path / "soft.nii.gz", volume)
    assert superpixels(np.ones((6, 6))).max() == 0


def test_simulated_noise_has_the_variance_that_is_stated():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((400, 400), 0.5)
    noisy = degrade(flat, "low_dose", 100.0, 1, generator)
    assert noisy.var().item() == pytest.approx(np.exp(0.5) / 100, rel=0.03)
    counts = degrade(flat, "low_count", 50.0, 1, generator)
    assert counts.mean().item() == pytest.approx(0.5, rel=0.01)
    assert counts.var().item() == pytest.approx(0.5 / 50, rel=0.03)
    assert degrade(flat, "enlarge", 1.0, 4, generator).shape == (100, 100)


def test_the_command_scores_in_both_ranges_and_draws_a_picture(tmp_path, capsys):
    weights = save_weights(
        tmp_path / "rat.safetensors",
        tiny().state_dict(),
        system="rat",
        config=RATConfig(width=8, middle_layers=3, encoder_blocks=(1, 1), decoder_blocks=(1, 1)),
    )
    generator = np.random.default_rng(0)
    good = np.kron(generator.integers(40, 200, (6, 5)), np.ones((8, 8))).astype(np.uint8)
    noisy = (good + generator.normal(0, 8, good.shape)).clip(0, 255).astype(np.uint8)
    for name, picture in (("noisy", noisy), ("good", good)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    command = ["medical", "restore", str(tmp_path / "noisy.png"), "-o", str(out), "--checkpoint", str(weights), "--truth", str(tmp_path / "good.png")]
    assert run([*command, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    numbers = entry["numbers"]
    expected = 10 * np.log10(255**2 / np.mean((noisy.astype(float) - good) ** 2))
    assert numbers["PSNR dB"] == pytest.approx(expected, abs=1e-3)
    assert numbers["PSNR dB before"] == pytest.approx(expected, abs=1e-3)
    assert numbers["authors' PSNR dB"] - numbers["PSNR dB"] == pytest.approx(1.32, abs=0.01)
    np.testing.assert_array_equal(np.asarray(Image.open(out / "noisy_restored.png")), noisy)
    assert {Path(path).name for path in entry["outputs"]} == {"noisy_restored.png", "noisy_restored_picture.png", "noisy_regions.png"}


def test_without_weights_the_command_says_how_to_get_some(tmp_path, capsys):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")
    assert run(["medical", "restore", str(tmp_path / "a.png")]) == 2
    assert "no restoration weights ship" in capsys.readouterr().err


def test_a_blank_scan_and_a_range_that_is_none_are_refused(tmp_path, capsys):
    weights = save_weights(
        tmp_path / "rat.safetensors",
        tiny().state_dict(),
        system="rat",
        config=RATConfig(width=8, middle_layers=3, encoder_blocks=(1, 1), decoder_blocks=(1, 1)),
    )
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")
    command = ["medical", "restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--checkpoint", str(weights)]
    for options, message in (([], "every voxel of"), (["--value-range", "5", "5"], "got 5 to 5"), (["--value-range", "nan", "5"], "got nan to 5")):
        assert run([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_slice_of_paired_volumes_is_learned_from(tmp_path):
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("fd", "qd"):
            (tmp_path / part / name).mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(generator.uniform(0, 255, (20, 32, 3)), np.eye(4)), tmp_path / part / name / "a.nii.gz")
    data = RestorationPairs(str(tmp_path), crop=None)
    data.setup()
    assert len(data._sets["train"]) == 3
    for index, pair in enumerate(data._sets["train"]):
        voxels = read_volume(tmp_path / "train" / "fd" / "a.nii.gz").voxels
        np.testing.assert_allclose(pair.target[0].numpy() * 255, voxels[:, :, index].T, rtol=1e-4, atol=1e-3)
    nibabel.save(nibabel.Nifti1Image(generator.uniform(0, 255, (20, 32, 2)), np.eye(4)), tmp_path / "train" / "qd" / "a.nii.gz")
    with pytest.raises(UserError, match="as many slices"):
        RestorationPairs(str(tmp_path)).setup()
    nibabel.save(nibabel.Nifti1Image(generator.uniform(0, 255, (10, 16, 3)), np.eye(4)), tmp_path / "train" / "qd" / "a.nii.gz")
    with pytest.raises(UserError, match="set scale"):
        RestorationPairs(str(tmp_path)).setup()
