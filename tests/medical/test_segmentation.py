"""Segmenting: training data, the practitioner's call and command, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from foveal.apps.main import run
from foveal.core.errors import UserError
from foveal.core.exporting import TrainedRun
from foveal.medical import Segmenter, read_volume
from foveal.medical.data.cases import Case, check_labels, find_cases
from foveal.medical.data.slices import LabelledScans, Slices, folds_of
from foveal.medical.inference import View, run_slices
from foveal.medical.models.guided_attention import GuidedAttentionConfig, GuidedAttentionNet
from foveal.medical.models.mhs_vm import MHSVM, MHSVMConfig
from foveal.medical.preparation import Preparation
from foveal.medical.tasks.export import _about
from foveal.medical.tasks.segmentation import SegmentationTask
from foveal.medical.tasks.segmentation_report import SegmentationReport, measured
from foveal.medical.volumes import from_array

TINY = GuidedAttentionConfig(classes=3, channels=3, blocks=(1, 1, 1, 1), stem=8, groups=4, group_width=4, stride=2, width=8, encoded=(8, 8))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    network = GuidedAttentionNet(TINY).eval()
    with torch.no_grad():  # every class has the same mean logit, so that an untrained network finds all of them somewhere
        means = network(torch.randn(4, 3, 24, 24)).mean((0, 2, 3))
        for head in network.heads[1]:
            head.bias -= means
    return Segmenter(network, Preparation(plane="axial", neighbours=1), ("left", "right side"), "cpu")


@pytest.fixture
def scan(tmp_path) -> Path:
    affine = np.array([[0, 0, 2.0, -10], [-0.8, 0, 0, 30], [0, -0.9, 0, 5], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).normal(100, 20, (20, 24, 9)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "knee.nii.gz")
    return tmp_path / "knee.nii.gz"


def test_labels_lie_on_the_scans_grid_and_probabilities_agree_with_them(segmenter, scan):
    volume = read_volume(scan)
    labels = segmenter(scan)
    assert labels.voxels.shape == volume.voxels.shape
    np.testing.assert_array_equal(labels.affine, volume.affine)
    probabilities = segmenter.probabilities(scan)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), labels.voxels)
    tensor = MetaTensor(torch.from_numpy(volume.voxels)[None], affine=torch.from_numpy(volume.affine))
    np.testing.assert_array_equal(segmenter(tensor).voxels, labels.voxels)


def test_a_scan_stored_another_way_gets_the_same_labels(segmenter, scan):
    image = nibabel.load(scan)
    turned = nibabel.as_closest_canonical(image)
    nibabel.save(turned, scan.with_name("turned.nii.gz"))
    straight = nibabel.as_closest_canonical(nibabel.Nifti1Image(segmenter(scan).voxels, image.affine))
    np.testing.assert_array_equal(segmenter(scan.with_name("turned.nii.gz")).voxels, np.asarray(straight.dataobj))


def test_weights_keep_what_a_users_scan_needs(segmenter, scan, tmp_path):
    segmenter = Segmenter(segmenter.network, segmenter.preparation, segmenter.class_names, "cpu", views=("shifted", "mirrored_height"))
    again = Segmenter.from_pretrained(segmenter.save(tmp_path / "tiny.safetensors"), "cpu")
    assert (again.preparation, again.class_names, again.views) == (segmenter.preparation, segmenter.class_names, ("shifted", "mirrored_height"))
    assert Segmenter.from_pretrained(tmp_path / "tiny.safetensors", "cpu", views=()).views == ()
    np.testing.assert_array_equal(again(scan).voxels, segmenter(scan).voxels)


def test_one_class_of_mhs_vm_is_the_half_that_its_probability_says():
    torch.manual_seed(0)
    config = MHSVMConfig(classes=1, channels=1, dims=(8, 16), depths=(1, 1), decoder_depths=(1, 1), state=2, patch=2)
    segmenter = Segmenter(MHSVM(config), Preparation(plane="file", intensity="minmax"), ("lesion",), "cpu")
    scan = from_array(np.random.default_rng(0).normal(size=(18, 14, 2)))
    np.testing.assert_array_equal(segmenter.probabilities(scan)[1] >= 0.5, segmenter(scan).voxels == 1)


def test_large_slices_go_through_in_windows_that_agree_with_the_whole(monkeypatch):
    from foveal.medical import inference

    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 2, 3, padding=1).eval()
    slices = torch.randn(2, 1, 70, 90)
    whole = inference.run_slices(network, slices)
    monkeypatch.setattr(inference, "WINDOW", 48)
    torch.testing.assert_close(inference.run_slices(network, slices)[..., 1:-1, 1:-1][..., :20, :20], whole[..., 1:-1, 1:-1][..., :20, :20])


def test_views_are_averaged_where_they_belong():
    """A network of single pixels sees the same in every view; one that looks to the left sees the slice and its mirror image."""
    torch.manual_seed(0)
    slices = torch.randn(3, 2, 21, 30)
    points = torch.nn.Conv2d(2, 3, 1).eval()
    plain = run_slices(points, slices)
    for views in (("shifted",), ("mirrored_height", "mirrored_width"), get_args(View)):
        torch.testing.assert_close(run_slices(points, slices, views=views).softmax(0), plain.softmax(0))
    single = torch.nn.Conv2d(2, 1, 1).eval()
    torch.testing.assert_close(run_slices(single, slices, views=get_args(View)), run_slices(single, slices), atol=1e-5, rtol=1e-4)
    neighbour = torch.nn.Conv2d(2, 3, 3, padding=1).eval()
    alone, turned = run_slices(neighbour, slices).softmax(0), run_slices(neighbour, slices.flip(3)).softmax(0).flip(3)
    torch.testing.assert_close(run_slices(neighbour, slices, views=("mirrored_width",)).softmax(0), (alone + turned) / 2)


def test_the_command_takes_views_by_their_names(segmenter, scan, tmp_path, capsys):
    weights = segmenter.save(tmp_path / "tiny.safetensors")
    command = ["medical", "segment", str(scan), "--checkpoint", str(weights), "--no-pictures", "--probabilities", "-o"]
    assert run([*command, str(tmp_path / "seen"), "--views", "shifted, mirrored_width"]) == 0
    several = Segmenter(segmenter.network, segmenter.preparation, segmenter.class_names, "cpu", views=("shifted", "mirrored_width"))
    (written,) = (tmp_path / "seen").glob("*_left_probability.nii.gz")
    np.testing.assert_allclose(read_volume(written).voxels, several.probabilities(scan)[1], atol=1e-5)
    assert run([*command, str(tmp_path / "turned"), "--views", "turned"]) == 2
    assert "got turned" in capsys.readouterr().err


def test_muon_turns_kernels_and_leaves_heads_and_norms_to_adam():
    task = SegmentationTask(GuidedAttentionNet(TINY), loss="guided", optimizer="muon")
    optimizer = task.configure_optimizers()
    groups = {bool(group["matrices"]): {id(parameter) for parameter in group["params"]} for group in optimizer.param_groups}
    named = dict(task.network.named_parameters())
    assert id(named["stages.0.autoencoder.halve.0.weight"]) in groups[True]
    assert all(id(parameter) in groups[False] for name, parameter in named.items() if name.startswith("heads") or parameter.dim() == 1)
    assert sum(map(len, groups.values())) == len(named)


def test_a_view_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="got turned"):
        run_slices(torch.nn.Conv2d(1, 2, 1), torch.randn(1, 1, 4, 4), views=("turned",))  # type: ignore[arg-type]


def test_the_attention_of_a_point_sums_to_at_most_one_at_each_level(segmenter, scan):
    picture, maps, point = segmenter.attention(scan, slice_index=4)
    assert list(maps) == ["level 1", "level 2", "level 3", "level 4"]
    assert all(0 < float(attended.sum()) <= 1 + 1e-5 for attended in maps.values())
    assert 0 <= point[0] < picture.shape[0]
    assert 0 <= point[1] < picture.shape[1]


def test_the_command_writes_labels_overlays_and_scores_and_keeps_what_is_there(segmenter, scan, tmp_path, capsys):
    weights, out = segmenter.save(tmp_path / "tiny.safetensors"), tmp_path / "out"
    truth = tmp_path / "truth"
    truth.mkdir()
    nibabel.save(nibabel.Nifti1Image(segmenter(scan).voxels, nibabel.load(scan).affine), truth / "knee.nii.gz")
    command = ["medical", "segment", str(scan), "-o", str(out), "--checkpoint", str(weights), "--truth", str(truth), "--probabilities", "--json"]
    assert run(command) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert entry["numbers"]["Dice"] == pytest.approx(1.0)
    assert entry["numbers"]["HD95 mm"] == 0.0
    millilitres = (read_volume(out / "knee_labels.nii.gz").voxels == 1).sum() * 0.8 * 0.9 * 2.0 / 1000
    assert entry["numbers"]["left ml"] == pytest.approx(millilitres)
    assert {path.name for path in out.iterdir()} == {
        "knee_labels.nii.gz", "knee_overlay.png", "knee_left_probability.nii.gz", "knee_right_side_probability.nii.gz",
    }  # fmt: skip
    assert Image.open(out / "knee_overlay.png").size[0] > 300
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"


def test_a_bad_file_does_not_stop_the_others(segmenter, scan, tmp_path, capsys):
    weights = segmenter.save(tmp_path / "tiny.safetensors")
    bad = tmp_path / "broken.nii.gz"
    bad.write_bytes(b"no image")
    assert run(["medical", "segment", str(bad), str(scan), "-o", str(tmp_path / "out"), "--checkpoint", str(weights), "--json", "--no-pictures"]) == 2
    states = {Path(entry["source"]).name: entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]}
    assert states == {"broken.nii.gz": "failed", "knee.nii.gz": "done"}


def test_a_dicom_folder_among_files_is_one_scan(segmenter, scan, write_series, tmp_path, capsys):
    series = write_series(np.random.default_rng(1).integers(0, 99, (20, 16, 4)).astype(np.int16), np.diag([1.0, 1, 3, 1]), "dicom")
    weights = segmenter.save(tmp_path / "tiny.safetensors")
    assert run(["medical", "segment", str(series), "-o", str(tmp_path / "out"), "--checkpoint", str(weights), "--no-pictures"]) == 0
    assert read_volume(tmp_path / "out" / "dicom_labels.nii.gz").voxels.shape == (20, 16, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.nii.gz"], "nowhere.nii.gz does not exist"),
        (["{scan}", "--truth", "nowhere"], "check --truth"),
        (["{scan}", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["{folder}/blank.nii.gz"], "every voxel of"),
        (["{scan}", "{folder}/blank.nii.gz", "--truth", "{scan}"], "expected a folder of reference labels for 2 scans"),
        (["{scan}", "--truth", "{folder}/blank.nii.gz"], "expected reference labels on the grid of"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_two(scan, tmp_path, capsys, monkeypatch, arguments, message):
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 4), np.int16), np.eye(4)), tmp_path / "blank.nii.gz")
    given = [part.format(scan=scan, folder=tmp_path) for part in arguments]
    monkeypatch.setattr(Segmenter, "logits", lambda *_: pytest.fail("the network worked for nothing"))
    assert run(["medical", "segment", *given, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_labels_with_unexpected_values_are_refused_with_the_values(tmp_path):
    with pytest.raises(UserError, match=r"labels from 0 to 2 .* also holds 4, 7"):
        check_labels(from_array(np.array([[[0, 1, 4, 7]]])), 3)
    with pytest.raises(UserError, match=r"also holds 0\.5"):
        check_labels(from_array(np.array([[[0, 0.5]]])), 3)
    for name, value in (("images", 30), ("labels", 99)):
        (tmp_path / name).mkdir()
        nibabel.save(nibabel.Nifti1Image(np.full((3, 3, 3), value, np.uint8), np.eye(4)), tmp_path / name / "a.nii.gz")
    (case,) = find_cases(tmp_path, label_values={63: 1})
    with pytest.raises(UserError, match=r"values 0, 63 .* also holds 99"):
        case.read()


def test_chaos_pictures_of_labels_lie_on_the_slices_of_their_series(tmp_path, write_chaos):
    write_chaos(tmp_path, 1)
    (case,) = find_cases(tmp_path, "chaos_mr")
    (image,), labels = case.read()
    np.testing.assert_array_equal(np.unique(labels.voxels), [0, 1, 2, 3, 4])
    assert (image.voxels[labels.voxels > 0] >= 100).all()
    for index in range(4):
        wanted = int(image.voxels[0, 0, index]) - 600  # the marker, with the organ's 100
        assert wanted == index


def test_folds_are_fixed_disjoint_and_complete():
    cases = [Case(f"case_{number:03d}", (Path("a"),), None) for number in range(23)]
    parts = folds_of(cases, 5, 0)
    assert sorted(case.name for part in parts for case in part) == [case.name for case in cases]
    assert parts == folds_of(cases[::-1], 5, 0)


def test_augmentation_depends_on_the_seed_alone_and_moves_labels_with_images(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    blob = np.zeros((24, 24, 6), np.uint8)
    blob[6:15, 9:20, 1:5] = 1
    nibabel.save(nibabel.Nifti1Image(blob * 100.0, np.eye(4)), tmp_path / "images" / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(blob, np.eye(4)), tmp_path / "labels" / "a.nii.gz")
    slices = Slices(find_cases(tmp_path), Preparation(intensity="byte"), 2, crop=(16, 16), flips=(0, 1), rotation=30, scaling=0.2, augmented=1.0)
    torch.manual_seed(3)
    image, label = slices[3]
    torch.manual_seed(3)
    again = slices[3]
    assert torch.equal(image, again[0])
    assert torch.equal(label, again[1])
    agree = ((image[0] > 50 / 255) == (label == 1)).float().mean()
    assert label.any()
    assert agree > 0.93
    assert image.shape == (1, 16, 16)


def test_fold_and_names_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="fold from 0 to 4"):
        LabelledScans(str(tmp_path), 2, fold=5)
    with pytest.raises(UserError, match="2 class_names"):
        LabelledScans(str(tmp_path), 3, class_names=["one"])
    with pytest.raises(UserError, match="folders images and labels"):
        LabelledScans(str(tmp_path), 3).setup()


def test_the_report_counts_misses_and_holds_every_picture(tmp_path):
    generator, cases = np.random.default_rng(0), []
    for number in range(3):
        truth = np.zeros((12, 12, 6), np.uint8)
        truth[2:6, 2:9, 1:5], truth[7:10, 2:9, 1:5] = 1, 2
        found = truth.copy()
        found[generator.random(truth.shape) < 0.02] = 0
        if number == 2:
            found[found == 2] = 0
        cases.append(measured(f"case {number}", from_array(generator.normal(size=truth.shape), (1, 1, 2)), found, truth, ["one", "two"]))
    report = SegmentationReport(cases, ["one", "two"])
    means = report.means()
    assert means["missed"] == 1
    assert means["dice_two"] < 0.7 < means["dice_one"]
    assert means["hd95_two"] > np.linalg.norm([12, 12, 12]) / 3 - 1e-6
    page = report.write(tmp_path).read_text()
    assert page.count("<img") == 3 + 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert len((tmp_path / "cases.csv").read_text().splitlines()) == 4
    assert {"dice.png", "hd95.png", "volumes.png"} < {path.name for path in (tmp_path / "pictures").iterdir()}


def test_labels_stored_in_another_order_are_brought_onto_their_scans_grid(segmenter, scan, tmp_path, capsys):
    """A converter may flip axes and say so in the affine: the same places of space, other indices."""
    assert run(["medical", "segment", str(scan), "-o", str(tmp_path / "out"), "--device", "cpu", "--checkpoint", saved(segmenter, tmp_path)]) == 0
    labels = nibabel.load(tmp_path / "out" / "knee_labels.nii.gz")
    flipped = nibabel.as_closest_canonical(labels)
    assert flipped.shape != labels.shape
    nibabel.save(flipped, tmp_path / "truth.nii.gz")
    capsys.readouterr()
    command = ["medical", "segment", str(scan), "-o", str(tmp_path / "again"), "--device", "cpu", "--checkpoint", saved(segmenter, tmp_path)]
    assert run([*command, "--truth", str(tmp_path / "truth.nii.gz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["numbers"]["Dice"] == pytest.approx(1.0)
    case = Case("knee", (scan,), tmp_path / "truth.nii.gz")
    np.testing.assert_array_equal(case.read()[1].voxels, labels.get_fdata())


def saved(segmenter: Segmenter, folder: Path) -> str:
    return str(segmenter.save(folder / "tiny.safetensors"))


def test_labels_without_an_orientation_stay_in_their_order(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 2, (4, 4, 4)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1])), tmp_path / "image.nii.gz")
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(Case("a", (tmp_path / "image.nii.gz",), tmp_path / "labels.nii.gz").read()[1].voxels, voxels)


def test_results_inside_the_named_folder_are_no_scans(segmenter, scan, tmp_path, capsys):
    command = ["medical", "segment", str(tmp_path), "-o", str(tmp_path / "segmented"), "--device", "cpu", "--no-pictures", "--json"]
    for state in ("done", "kept"):
        assert run([*command, "--checkpoint", saved(segmenter, tmp_path)]) == 0
        assert [entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]] == [state]


def test_results_beside_the_scans_are_no_scans_and_labels_that_lie_there_are_not_replaced(segmenter, scan, tmp_path, capsys):
    folder = tmp_path / "Köpfe 1"
    folder.mkdir()
    beside = folder / scan.name
    beside.write_bytes(scan.read_bytes())
    command = ["medical", "segment", str(folder), "-o", str(folder), "--device", "cpu", "--json", "--checkpoint", saved(segmenter, tmp_path)]
    assert run([*command, "--probabilities"]) == 0
    there = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(there) >= 4
    capsys.readouterr()
    assert run(command) == 0
    assert [(file["source"], file["state"]) for file in json.loads(capsys.readouterr().out)["files"]] == [(str(beside), "kept")]
    assert run([*command, "--overwrite"]) == 2
    assert "would be replaced" in json.loads(capsys.readouterr().out)["files"][0]["message"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == there


def test_a_run_that_names_no_classes_is_exported(tmp_path):
    settings = {"data": {"init_args": {"classes": 3, "class_names": None, "preparation": None}}, "model": {"init_args": {}}}
    assert _about("msa_guided", TrainedRun(tmp_path, settings, {}))["classes"] == "class 1|class 2"


def test_several_processes_are_measured_on_all_scans(monkeypatch):
    task = SegmentationTask(GuidedAttentionNet(TINY))
    task._scores = [("a", np.array([0.5, 1.0])), ("b", np.array([1.0, np.nan]))]
    logged: dict[str, float] = {}

    class Trainer:
        world_size = 2
        datamodule = type("Data", (), {"class_names": ["one", "two"]})()

    task._trainer = Trainer()
    monkeypatch.setattr(task, "log", lambda name, value, **how: logged.update({name: float(value)}))
    other = [("c", np.array([0.0, 0.4])), ("a", np.array([0.5, 1.0]))]
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), [own, other]))
    task.on_validation_epoch_end()
    assert logged == pytest.approx({"val/dice_one": 0.5, "val/dice_two": 0.7, "val/dice": 2.9 / 5})
