"""Geometry survives: whatever orientation, type and format comes in, a prediction lies exactly where the image does."""

from __future__ import annotations

import itertools
from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image
from pydicom.uid import JPEGLosslessSV1, generate_uid

from foveal.core.errors import UserError
from foveal.medical.preparation import Preparation
from foveal.medical.volumes import Volume, from_array, read_volume, write_volume

ORIENTATIONS = ["".join(letters) for order in itertools.permutations(("LR", "AP", "IS")) for letters in itertools.product(*order)]
SPACING = (0.7, 1.3, 2.9)


def phantom(codes: str, dtype="int16", oblique: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (with no symmetry) and affine of one and the same object, stored in the given orientation; half of the codes are left-handed."""
    generator = np.random.default_rng(0)
    voxels = generator.integers(0, 200, (5, 7, 4)).astype(dtype)
    angle = np.array([[np.cos(oblique), -np.sin(oblique), 0], [np.sin(oblique), np.cos(oblique), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = angle * SPACING
    affine[:3, 3] = (-31.5, 12.25, 8.0)
    transform = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    return apply_orientation(voxels, transform), affine @ inv_ornt_aff(transform, voxels.shape)


def at(volume: Volume, millimetres: np.ndarray) -> float:
    """The voxel that lies at a place in space."""
    index = np.round(np.linalg.inv(volume.affine) @ [*millimetres, 1.0])[:3].astype(int)
    return float(volume.voxels[tuple(index)])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(codes=st.sampled_from(ORIENTATIONS), dtype=st.sampled_from(["int16", "uint8", "float32"]), oblique=st.sampled_from([0.0, 0.3]))
def test_a_prediction_written_like_a_volume_overlays_it_exactly(tmp_path, suffix, codes, dtype, oblique):
    voxels, affine = phantom(codes, dtype, oblique)
    source = tmp_path / f"scan{suffix}"
    if suffix.startswith(".nii"):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), source)
    else:
        write_volume(Volume(voxels, affine, "itk"), source)
    volume = read_volume(source)
    assert volume.voxels.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    labels = volume.like((voxels > 100).astype(np.uint8))
    back = read_volume(write_volume(labels, tmp_path / f"labels{suffix}"))
    np.testing.assert_array_equal(back.affine, volume.affine)
    np.testing.assert_array_equal(back.voxels, labels.voxels)
    if suffix.startswith(".nii"):
        theirs, ours = (nibabel.load(tmp_path / f"{name}{suffix}").header for name in ("scan", "labels"))
        for key in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "qoffset_x", "quatern_b", "xyzt_units"):
            np.testing.assert_array_equal(theirs[key], ours[key], err_msg=key)


@settings(max_examples=48, deadline=None)
@given(
    codes=st.sampled_from(ORIENTATIONS),
    plane=st.sampled_from(["axial", "coronal", "sagittal", "file"]),
    neighbours=st.sampled_from([0, 1]),
)
def test_slices_go_to_the_network_and_back_onto_the_same_voxels(codes, plane, neighbours):
    voxels, affine = phantom(codes)
    volume = Volume(voxels, affine)
    preparation = Preparation(plane=plane, neighbours=neighbours, intensity="byte")
    slices = preparation.slices([volume])
    own = slices[:, neighbours][None] * 255  # a network that gives its input back
    np.testing.assert_allclose(preparation.restore(own, volume)[0], voxels, atol=1e-4)
    np.testing.assert_array_equal(preparation.label_slices(volume), own[0].round().long())


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL"])
def test_the_network_sees_the_same_slices_whatever_way_a_scan_is_stored(codes):
    reference = Preparation(plane="coronal").slices([Volume(*phantom("RAS"))])
    torch.testing.assert_close(Preparation(plane="coronal").slices([Volume(*phantom(codes))]), reference)


def test_resampled_slices_come_back_on_the_scans_own_grid_without_a_shift():
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in (24, 30, 16)), indexing="ij"))
    centre, radius = np.array([11.0, 16.0, 7.0])[:, None, None, None], 1.0
    ball = (((grid - centre) * np.array([1.0, 0.8, 2.0])[:, None, None, None]) ** 2).sum(0) < 64 * radius
    volume = from_array(ball.astype(np.float32), (1.0, 0.8, 2.0))
    preparation = Preparation(plane="axial", spacing=(1.5, 1.5, 1.5), intensity="byte")
    slices = preparation.slices([volume])
    assert tuple(slices.shape) == (21, 1, 16, 16)
    back = preparation.restore(slices[:, 0][None] * 255, volume)[0] > 0.5
    assert back.shape == ball.shape
    places = [np.argwhere(mask).mean(0) for mask in (back, ball)]
    np.testing.assert_allclose(*places, atol=0.1)
    assert 2 * (back & ball).sum() / (back.sum() + ball.sum()) > 0.93


@pytest.mark.parametrize("codes", ["LPS", "LSA", "PSR", "RAS"])
def test_a_dicom_series_gives_the_same_array_and_place_as_its_nifti(write_series, tmp_path, codes):
    voxels, affine = phantom(codes)
    if np.linalg.det(affine[:3, :3]) < 0:  # slices of a series stand along their normal: DICOM has no left-handed grids
        voxels, affine = voxels[:, :, ::-1], affine @ inv_ornt_aff([[0, 1], [1, 1], [2, -1]], voxels.shape)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    series, nifti = read_volume(write_series(voxels, affine)), read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(series.voxels, nifti.voxels)
    np.testing.assert_allclose(series.affine, nifti.affine, atol=1e-4)
    labels = series.like((series.voxels > 90).astype(np.uint8))
    written = read_volume(write_volume(labels, tmp_path / "labels.nii.gz"))
    np.testing.assert_allclose(written.affine, nifti.affine, atol=1e-4)
    np.testing.assert_array_equal(written.voxels, nifti.voxels > 90)


def test_jpeg_compressed_dicom_is_decoded_to_the_same_voxels(write_series):
    voxels, affine = phantom("LPS", "uint16")
    plain = read_volume(write_series(voxels, affine, "plain"))
    folder = write_series(voxels, affine, "compressed", compressed=True)
    syntax = pydicom.dcmread(next(folder.iterdir()), stop_before_pixels=True).file_meta.TransferSyntaxUID
    assert syntax == JPEGLosslessSV1, "the test must compress"
    compressed = read_volume(folder)
    np.testing.assert_array_equal(compressed.voxels, plain.voxels)
    np.testing.assert_allclose(compressed.affine, plain.affine, atol=1e-4)


def test_a_folder_with_two_series_is_refused_by_name_and_opened_by_choice(write_series):
    voxels, affine = phantom("LPS")
    folder = write_series(voxels, affine, number=3, description="T1 MPRAGE")
    write_series(voxels[:, :, :3] // 2, affine, number=8, description="FLAIR")
    with pytest.raises(UserError, match=r"holds 2: .*3 T1 MPRAGE \(4 files\).*--series"):
        read_volume(folder)
    np.testing.assert_array_equal(read_volume(folder, series="8").voxels, voxels[:, :, :3] // 2)
    np.testing.assert_array_equal(read_volume(folder, series="mprage").voxels, voxels)
    with pytest.raises(UserError, match="fits 0 of 2"):
        read_volume(folder, series="T2")


def test_missing_doubled_and_unequal_slices_of_a_series_are_refused(write_series):
    voxels, affine = phantom("LPS")
    with pytest.raises(UserError, match=r"every 2\.90 mm .*missing or uneven at"):
        read_volume(write_series(np.concatenate([voxels, voxels], 2), affine, "missing", skip=(3,)))
    folder = write_series(voxels, affine, "doubled")
    for path in list(folder.iterdir()):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.save_as(folder / f"again_{path.name}")
    with pytest.raises(UserError, match=r"one slice at each position .* 4 are doubled"):
        read_volume(folder)
    folder = write_series(voxels, affine, "unequal")
    smaller = write_series(voxels[:4], affine, "smaller")
    uid = pydicom.dcmread(next(folder.iterdir())).SeriesInstanceUID
    for path in list(smaller.iterdir())[:1]:
        data = pydicom.dcmread(path)
        data.SeriesInstanceUID = uid
        data.save_as(folder / "other.dcm")
    with pytest.raises(UserError, match="slices of one size"):
        read_volume(folder)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match="expected DICOM images in folder"):
        read_volume(tmp_path)


def test_four_dimensional_nifti_needs_a_frame(tmp_path):
    voxels, affine = phantom("RAS")
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels, voxels + 1], 3), affine), tmp_path / "bold.nii.gz")
    with pytest.raises(UserError, match=r"holds 2 \(4-D\); choose one with --frame 0 to 1"):
        read_volume(tmp_path / "bold.nii.gz")
    with pytest.raises(UserError, match="--frame from 0 to 1"):
        read_volume(tmp_path / "bold.nii.gz", frame=2)
    np.testing.assert_array_equal(read_volume(tmp_path / "bold.nii.gz", frame=1).voxels, voxels + 1)
    nibabel.save(nibabel.Nifti1Image(voxels[..., None], affine), tmp_path / "one.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "one.nii.gz").voxels, voxels)


def test_a_volume_without_voxels_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((0, 5, 5), np.int16), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(UserError, match=r"empty\.nii\.gz"):
        read_volume(tmp_path / "empty.nii.gz")
    with pytest.raises(UserError, match="0 x 5 x 5"):
        from_array(np.zeros((0, 5, 5)))


def test_nan_voxels_become_the_lowest_value_and_are_told_of(tmp_path):
    voxels, affine = phantom("RAS", "float32")
    voxels[0, 0, 0], voxels[1, 2, 3] = np.nan, np.inf
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "nan.nii.gz")
    volume = read_volume(tmp_path / "nan.nii.gz")
    assert volume.voxels[0, 0, 0] == volume.voxels[1, 2, 3] == np.nanmin(voxels)
    assert volume.notes == ("2 voxels are NaN or infinite: taken as the lowest value",)
    with pytest.raises(UserError, match="every one is NaN"):
        from_array(np.full((2, 2, 2), np.nan))


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "scan.nrrd", "scan.png", "scan.dcm", "scan.xyz"])
def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no image" * 40)
    with pytest.raises(UserError, match=name):
        read_volume(tmp_path / name)


def test_sixteen_bit_and_palette_pictures_are_read_as_grey(tmp_path):
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    Image.fromarray(values).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "deep.png").voxels[:, :, 0], values)
    Image.fromarray((values // 256).astype(np.uint8)).convert("P").save(tmp_path / "palette.png")
    assert read_volume(tmp_path / "palette.png").voxels.shape == (6, 8, 1)


def test_sequences_on_different_grids_are_refused():
    voxels, affine = phantom("RAS")
    first = Volume(voxels, affine)
    moved = affine.copy()
    moved[0, 3] += 5
    with pytest.raises(UserError, match="on one grid"):
        Preparation().slices([first, replace(first, affine=moved)])
