"""What the tests of medical share: the authors' reference values, and the rule that makes the weights they were computed with."""

from __future__ import annotations

import fnmatch
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "medical"
DATA = ROOT.parent / "shared" / "data" / "medical"


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of an official tensor, drawn from its name alone."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    if leaf == "running_var":
        value = np.exp(0.1 * z)
    elif leaf in ("gamma", "beta", "gate") or leaf.startswith("lambda") or len(shape) == 0:
        value = 0.5 + 0.1 * z
    elif len(shape) == 1:
        value = 1 + 0.1 * z if leaf == "weight" else 0.1 * z
    else:
        value = z / np.sqrt(np.prod(shape[1:]))
    return np.asarray(value, dtype=np.float32)


class Golden:
    """One variant of a reference file: its description and its arrays."""

    def __init__(self, system: str, variant: str) -> None:
        whole = json.loads((GOLDEN / f"{system}.json").read_text())
        self.about = whole["variants"][variant]
        self.arrays = np.load(GOLDEN / f"{variant if variant.startswith(system) else f'{system}_{variant}'}.npz")
        self.shapes = {key: tuple(shape) for key, shape in self.about.get("state_dict", whole.get("state_dict", {})).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name])).to(dtype)

    def state(self, dtype: torch.dtype = torch.float32, factors: Mapping[str, float] | None = None) -> dict[str, torch.Tensor]:
        """The authors' state dict by the rule; `factors` multiply the keys that a pattern fits, in single precision."""
        state = {}
        for key, shape in self.shapes.items():
            value = fill(key, shape)
            for pattern, factor in (factors or {}).items():
                if fnmatch.fnmatchcase(key, pattern):
                    value = value * np.float32(factor)
            tensor = torch.from_numpy(np.asarray(value))
            state[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return state

    def cotangent(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(fill(f"cotangent.{name}", tuple(shape))).to(dtype)

    def error(self, name: str, actual: torch.Tensor) -> float:
        """Relative error against the stored array, or the stored slice of it."""
        described = self.about["arrays"]
        cut = described.get(name, described.get(name.replace("64_", "_", 1), {})).get("slice")
        value = actual.detach().double().numpy()
        if cut is not None:
            value = value[tuple(slice(*(int(part) if part else None for part in axis.split(":"))) for axis in cut.split(","))]
        expected = np.asarray(self.arrays[name], dtype=np.float64)
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        error = np.linalg.norm(value - expected) / max(np.linalg.norm(expected), 1e-30)
        return float(error) if np.isfinite(error) else float("inf")


@pytest.fixture(scope="session")
def golden() -> type[Golden]:
    return Golden


@pytest.fixture(scope="session")
def medical_data() -> Path:
    """Real images beside the checkout; a test that needs them is skipped where they are not."""
    if not DATA.is_dir():
        pytest.skip("real medical images (../shared/data/medical) are not here")
    return DATA


@pytest.fixture
def write_series(tmp_path):
    """Write voxels as a DICOM series whose files are named in no useful order; gives the folder."""

    def write(voxels: np.ndarray, affine: np.ndarray, folder="series", number=3, description="T1", skip=(), compressed=False, in_order=False):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        lps = np.diag([-1.0, -1, 1, 1]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        direction = lps[:3, :3] / spacing
        uid, study = generate_uid(), generate_uid()
        for index in range(voxels.shape[2]):
            if index in skip:
                continue
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            name = place / (f"{index:03d}.dcm" if in_order else f"{(index * 7919) % 101:03d}_{number}.dcm")
            data = FileDataset(str(name), {}, file_meta=meta, preamble=b"\0" * 128)
            data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
            data.SeriesInstanceUID, data.StudyInstanceUID, data.SeriesNumber, data.SeriesDescription = uid, study, number, description
            data.Modality, data.PatientName, data.PatientID, data.InstanceNumber = "MR", "Phantom", "0", index + 1
            data.ImagePositionPatient = [float(x) for x in (lps @ [0, 0, index, 1])[:3]]
            data.ImageOrientationPatient = [float(x) for x in (*direction[:, 0], *direction[:, 1])]
            data.PixelSpacing, data.SliceThickness = [float(spacing[1]), float(spacing[0])], float(spacing[2])
            pixels = np.ascontiguousarray(voxels[:, :, index].T)
            data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *pixels.shape, 1, "MONOCHROME2"
            data.BitsAllocated = data.BitsStored = 16
            data.HighBit, data.PixelRepresentation = 15, 1 if pixels.dtype == np.int16 else 0
            data.PixelData = pixels.tobytes()
            data.save_as(name, enforce_file_format=True)
            if compressed:
                image = SimpleITK.ReadImage(str(name))
                writer = SimpleITK.ImageFileWriter()
                writer.SetFileName(str(name))
                writer.SetUseCompression(True)
                writer.SetCompressor("JPEG")
                writer.KeepOriginalImageUIDOn()
                writer.Execute(image)
        return place

    return write


@pytest.fixture
def write_chaos(write_series):
    """Write a tiny case as CHAOS lays its MRI out: a DICOM series, and one PNG a slice with an organ's grey value."""

    def write(root: Path, number: int) -> None:
        generator = np.random.default_rng(number)
        voxels = generator.integers(0, 90, (32, 32, 4)).astype(np.int16)
        case = root / "Train_Sets" / "MR" / str(number) / "T1DUAL"
        (case / "Ground").mkdir(parents=True)
        (case / "DICOM_anon").mkdir()
        labels = np.zeros((32, 32, 4), np.uint8)
        for index, value in enumerate((63, 126, 189, 252)):
            labels[4 + 6 * index : 9 + 6 * index, 6:12, :] = value
            labels[0, 0, index] = 63  # slices can be told apart
            voxels[0, 0, index] = 500 + index
        voxels[labels > 0] += 100
        series = write_series(voxels, np.diag([-1.5, -1.5, 4.0, 1.0]), f"chaos_{number}", in_order=True)
        series.rename(case / "DICOM_anon" / "InPhase")
        for index in range(4):
            Image.fromarray(labels[:, :, index].T).save(case / "Ground" / f"IMG-{index:05d}.png")

    return write
