"""Volumes and pictures from files, and back into files of the same geometry: NIfTI, NRRD and other ITK formats, DICOM series, PNG and TIFF.

A volume's voxels stand in the file's own order and its affine maps their indices to millimetres in RAS+, whatever the format's convention; nothing
is resampled or reoriented on the way in. What is written like a volume has its grid to the bit.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from foveal.core.errors import UserError
from foveal.core.files import atomic_write

NIFTI = (".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh")
ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
DICOM = (".dcm", ".ima")

#: Between ITK's and DICOM's millimetres (left, posterior, superior) and nibabel's (right, anterior, superior).
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

Kind = Literal["nifti", "itk", "dicom", "picture"]


@dataclass(frozen=True)
class Volume:
    """Voxels with where they are.

    Attributes:
        voxels: (i, j, k) in the file's order; a picture is (row, column, 1).
        affine: voxel index to millimetres, RAS+.
        kind: what it was read from, hence what is written like it.
        source: file or folder; empty for arrays.
        header: what its format keeps besides (nibabel header, SimpleITK metadata).
        notes: what a user should know of the reading.
    """

    voxels: Shaped[ndarray, "i j k"]
    affine: Float[ndarray, "4 4"]
    kind: Kind = "nifti"
    source: str = ""
    header: Any = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3:
            raise UserError(f"expected a volume of three dimensions in {self.source or 'the array'}; got shape {self.voxels.shape}")
        if min(self.voxels.shape) == 0:
            raise UserError(f"expected voxels in {self.source or 'the array'}; its size is {' x '.join(map(str, self.voxels.shape))}; write it again")

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along each axis."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def millilitres_of_a_voxel(self) -> float:
        """Of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def like(self, voxels: Shaped[ndarray, "i j k"]) -> Volume:
        """Other voxels on the same grid.

        Raises:
            ValueError: of another shape.
        """
        if voxels.shape != self.voxels.shape:
            raise ValueError(f"voxels must have the volume's shape {self.voxels.shape}; got {voxels.shape}")
        return replace(self, voxels=voxels, notes=())


def suffix_of(path: str | Path) -> str:
    """The suffix in lower case; ``.nii.gz`` is one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def stem_of(path: str | Path) -> str:
    """The name without its suffix."""
    name = Path(path).name
    suffix = suffix_of(path)
    return name[: -len(suffix)] if suffix in (*NIFTI, *ITK, *PICTURES, *DICOM) else name


def read_volume(path: str | Path, frame: int | None = None, series: str | None = None) -> Volume:
    """Read a volume, whatever the format.

    Args:
        path: a file, or a folder with one DICOM series.
        frame: which volume of a 4-D file, from 0.
        series: which DICOM series of a folder with several: its UID, its number or a part of its description.

    Raises:
        UserError: nothing readable there, or a file that holds something else than one volume; the message says what to do.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"expected an image; {place} does not exist; check the path")
    suffix = suffix_of(place)
    if place.is_dir() or suffix in DICOM or (suffix not in (*NIFTI, *ITK, *PICTURES) and _is_dicom(place)):
        from foveal.medical.dicom import read_dicom

        volume = read_dicom(place, series)
    elif suffix in NIFTI:
        volume = _read_nifti(place, frame)
    elif suffix in PICTURES:
        volume = _read_picture(place)
    else:
        volume = _read_itk(place, frame)
    return _finite(volume)


def write_volume(volume: Volume, path: str | Path) -> Path:
    """Write a volume; the suffix of `path` chooses the format. NIfTI keeps the source's header but for type and scaling.

    Raises:
        UserError: `path` cannot be written, or the format has no such type.
    """
    target, suffix = Path(path), suffix_of(path)
    if suffix in (".nii", ".nii.gz"):
        header = _nifti_header(volume)
        unmoved = header is not None and np.array_equal(volume.affine, header.get_best_affine())
        # Without an affine nibabel leaves the header's two forms and their codes as they are, to the bit.
        image = nibabel.Nifti1Image(volume.voxels, None if unmoved else volume.affine, header)
        content = image.to_bytes()
        with atomic_write(target) as temporary:  # whose name would hide the .nii before the .gz from nibabel
            temporary.write_bytes(gzip.compress(content, 6, mtime=0) if suffix == ".nii.gz" else content)
    elif suffix in ITK:
        import SimpleITK

        if suffix in (".nhdr", ".mhd"):
            raise UserError(f"expected a format of one file, .nrrd or .mha, for {target.name}: a header and its data cannot be renamed together")
        with atomic_write(target) as temporary:
            SimpleITK.WriteImage(_to_itk(volume), str(temporary), useCompression=True)
    elif suffix in PICTURES:
        if volume.voxels.shape[2] != 1:
            raise UserError(f"expected one slice to write {target.name}; got {volume.voxels.shape[2]}; choose .nii.gz or .nrrd")
        with atomic_write(target) as temporary:
            Image.fromarray(volume.voxels[:, :, 0]).save(temporary)
    else:
        raise UserError(f"expected an output ending in .nii.gz, .nii, .nrrd, .mha or .png; got {target.name}")
    return target


def on_grid_of(volume: Volume, like: Volume) -> Volume:
    """`volume` with its axes in the order and directions of `like`'s, where it lies on `like`'s grid then; otherwise as it is.

    Labels that another program wrote may hold the same voxels in another order, which only their affine tells.
    """
    if "picture" in (volume.kind, like.kind) or np.allclose(volume.affine, like.affine, atol=1e-3):
        return volume
    turn = ornt_transform(io_orientation(volume.affine), io_orientation(like.affine))
    affine = volume.affine @ inv_ornt_aff(turn, volume.voxels.shape)
    voxels = apply_orientation(volume.voxels, turn)
    if voxels.shape != like.voxels.shape or not np.allclose(affine, like.affine, atol=0.1 * min(like.spacing)):
        return volume
    return replace(volume, voxels=voxels, affine=like.affine)


def output_suffix(volume: Volume) -> str:
    """The suffix that suits a volume's format: that of its file where it can be written, NIfTI for DICOM."""
    suffix = suffix_of(volume.source)
    if volume.kind == "picture":
        return ".png"
    if volume.kind == "itk":
        return ".mha" if suffix in (".mha", ".mhd") else ".nrrd"
    return suffix if suffix in (".nii", ".nii.gz") else ".nii.gz"


def refuse_blank(volume: Volume, place: Path) -> None:
    """Make sure that a scan shows something.

    Raises:
        UserError: all its voxels are the same.
    """
    if np.ptp(volume.voxels) == 0:
        raise UserError(f"expected a scan with something in it; every voxel of {place} is {volume.voxels.flat[0]:g}; export it again")


def names_of(places: Sequence[Path]) -> list[str]:
    """Names of outputs: the file's, with its folder's before it where two are alike."""
    stems = [stem_of(place.resolve()) for place in places]
    names = [stem if stems.count(stem) == 1 else f"{place.resolve().parent.name}_{stem}" for place, stem in zip(places, stems, strict=True)]
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out


def from_array(voxels: Shaped[ndarray, "i j k"], spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> Volume:
    """A volume of an array in RAS order."""
    return _finite(Volume(np.asarray(voxels), np.diag([*map(float, spacing), 1.0])))


def _finite(volume: Volume) -> Volume:
    """NaN and infinite voxels, as registrations leave outside the field of view, get the lowest value; a note says so."""
    voxels = volume.voxels
    if not np.issubdtype(voxels.dtype, np.floating):
        return volume
    wrong = ~np.isfinite(voxels)
    count = int(wrong.sum())
    if not count:
        return volume
    if count == voxels.size:
        raise UserError(f"expected finite voxels in {volume.source or 'the array'}; every one is NaN or infinite; export it again")
    mended = np.where(wrong, voxels[~wrong].min(), voxels)
    return replace(volume, voxels=mended, notes=(*volume.notes, f"{count} voxels are NaN or infinite: taken as the lowest value"))


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_nifti(path: Path, frame: int | None) -> Volume:
    try:
        image: Any = nibabel.load(path)
        if len(image.shape) == 4 and image.shape[3] == 1 and frame is None:
            frame = 0
        if len(image.shape) == 4:
            voxels = np.asarray(image.dataobj[..., _frame(path, image.shape[3], frame)])
        elif len(image.shape) == 3:
            voxels = np.asarray(image.dataobj)
        elif len(image.shape) == 2:
            voxels = np.asarray(image.dataobj)[:, :, None]
        else:
            raise UserError(f"expected a volume of three dimensions in {path}; it has shape {tuple(image.shape)}; extract one volume")
    except (ImageFileError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"expected a NIfTI volume; {path} cannot be read: {_line(error)}; is it complete?") from None
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
        raise UserError(f"expected an orientation in the header of {path}; its affine is {image.affine[:3, :3].round(3).tolist()}; write it again")
    return Volume(voxels, np.asarray(image.affine, dtype=np.float64), "nifti", str(path), image.header)


def _frame(path: Path, count: int, frame: int | None) -> int:
    if frame is None:
        raise UserError(f"expected one volume; {path} holds {count} (4-D); choose one with --frame 0 to {count - 1}")
    if not 0 <= frame < count:
        raise UserError(f"expected --frame from 0 to {count - 1} for {path}; got {frame}")
    return frame


def _nifti_header(volume: Volume) -> Any:
    if volume.kind != "nifti" or not isinstance(volume.header, nibabel.Nifti1Header):
        return None
    header = volume.header.copy()
    header.set_data_dtype(volume.voxels.dtype)
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    header["cal_max"] = header["cal_min"] = 0
    return header


def _read_itk(path: Path, frame: int | None) -> Volume:
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"expected an image that ITK reads (NRRD, MetaImage); {path} cannot be read: {_line(error)}") from None
    if image.GetDimension() == 4:
        size = list(image.GetSize())
        chosen = _frame(path, size[3], 0 if size[3] == 1 and frame is None else frame)
        image = SimpleITK.Extract(image, [*size[:3], 0], [0, 0, 0, chosen])
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise UserError(f"expected one number a voxel in {path}; it has {image.GetNumberOfComponentsPerPixel()}; extract one channel")
    return from_itk(image, "itk", str(path))


def from_itk(image: Any, kind: Kind, source: str) -> Volume:
    """A volume of a SimpleITK image of two or three dimensions."""
    import SimpleITK

    if image.GetDimension() == 2:
        image = SimpleITK.JoinSeries(image)
    voxels = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(voxels, LPS @ affine, kind, source, {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()})


def _to_itk(volume: Volume) -> Any:
    import SimpleITK

    voxels = volume.voxels.astype(np.uint8) if volume.voxels.dtype == bool else volume.voxels
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.transpose(2, 1, 0)))
    affine = LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def _read_picture(path: Path) -> Volume:
    try:
        with Image.open(path) as picture:
            picture.load()
            grey = picture.mode in ("L", "I", "I;16", "I;16B", "I;16L", "F", "1")
            voxels = np.asarray(picture if grey else picture.convert("L"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"expected a picture; {path} cannot be read: {_line(error)}; is it complete?") from None
    voxels = voxels.astype(np.uint8) if voxels.dtype == bool else voxels.astype(np.uint16) if voxels.dtype == np.int32 else voxels
    return Volume(voxels[:, :, None], np.eye(4), "picture", str(path))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
