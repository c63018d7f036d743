"""Degraded scans in, restored ones out: denoising and enlargement on the input's grid; an enlarged scan covers the same place with finer voxels."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from glob import escape
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch.nn import functional as F

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import all_or_none, output_folder, refuse_replacing, without_results
from foveal.core.reports import BatchReport
from foveal.medical.checkpoints import model_from_weights
from foveal.medical.models.rat import RAT
from foveal.medical.plots import regions_figure, restoration_figure
from foveal.medical.regions import region_volume, superpixels
from foveal.medical.restoration_metrics import fidelity
from foveal.medical.segment import collect_scans, results_of
from foveal.medical.volumes import Volume, names_of, on_grid_of, output_suffix, read_volume, refuse_blank, stem_of, write_volume


class Restorer:
    """Restores scans slice by slice.

    >>> restorer = Restorer.from_pretrained("rat.safetensors")
    >>> restored = restorer("low_dose.nii.gz")

    Args:
        network: RAT.
        value_range: values of the images that the network's 0 and 1 stand for; None takes 0 and 255 (or 65535) of whole-number pictures and the
            image's own lowest and highest value of all others.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
    """

    def __init__(self, network: RAT, value_range: tuple[float, float] | None = None, device: str | torch.device = "auto") -> None:
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.network, self.value_range = network.to(self.device).eval(), value_range
        if network.config.channels != 1:
            raise UserError(f"expected a network of grey images; these weights want {network.config.channels} channels")

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "auto", value_range: tuple[float, float] | None = None) -> Restorer:
        """Load trained weights, such as ``foveal medical convert rat`` or a training makes. None ships with the package: the data that the
        authors trained on may not be passed on.

        Raises:
            UserError: missing, corrupt or foreign weights.
        """
        weights = load_weights(source, "rat")
        network = model_from_weights(source, "rat")
        assert isinstance(network, RAT)  # asked for by its system's name
        stored = json.loads(weights.metadata["value_range"]) if "value_range" in weights.metadata else None
        return cls(network, value_range or (None if stored is None else (float(stored[0]), float(stored[1]))), device)

    @property
    def scale(self) -> int:
        """Output voxels of an input voxel, along rows and columns."""
        return self.network.config.scale

    def __call__(self, scan: str | Path | Volume, regions: str | Path | Int[ndarray, "i j k"] | None = None) -> Volume:
        """Restore a scan.

        Args:
            scan: a file, a folder with a DICOM series, or a `Volume`.
            regions: a region map or segmentation: a file, or an array on the output's grid; by default superpixels of every slice.

        Raises:
            UserError: nothing that can be read, or regions that do not fit.
        """
        volume = scan if isinstance(scan, Volume) else read_volume(scan)
        return self.restored(volume, self.regions(volume, regions))

    def regions(self, volume: Volume, regions: str | Path | Int[ndarray, "i j k"] | None = None) -> Int[ndarray, "i j k"]:
        """The region map that a volume is restored with, on the output's grid.

        Raises:
            UserError: of another size.
        """
        if isinstance(regions, (str, Path)):
            return region_volume(regions, volume, self.scale)
        i, j, k = volume.voxels.shape
        shape = (i * self.scale, j * self.scale, k)
        if regions is not None:
            if regions.shape != shape:
                raise UserError(f"expected regions of shape {shape}; got {regions.shape}")
            return regions
        low, high = self.range_of(volume)
        slices = [superpixels((volume.voxels[:, :, index].astype(np.float64) - low) / (high - low)) for index in range(k)]
        return np.stack(slices, 2).repeat(self.scale, 0).repeat(self.scale, 1)

    def range_of(self, volume: Volume) -> tuple[float, float]:
        """Values that 0 and 1 stand for in this volume."""
        if self.value_range is not None:
            return self.value_range
        if volume.kind == "picture" and volume.voxels.dtype in (np.uint8, np.uint16):
            return 0.0, float(np.iinfo(volume.voxels.dtype).max)
        low, high = float(volume.voxels.min()), float(volume.voxels.max())
        return low, high if high > low else low + 1.0

    @torch.no_grad()
    def restored(self, volume: Volume, regions: Int[ndarray, "i j k"]) -> Volume:
        """Restore with a region map on the output's grid. Whole numbers come out as whole numbers of the same type, all else as float32."""
        low, high = self.range_of(volume)
        scale = self.scale
        multiple = self.network.config.multiple // gcd(self.network.config.multiple, scale)
        turn = (lambda x: x) if volume.kind == "picture" else (lambda x: x.T)  # rows before columns
        slices = []
        for index in range(volume.voxels.shape[2]):
            picture = torch.from_numpy(np.ascontiguousarray(turn(volume.voxels[:, :, index])).astype(np.float32))[None, None]
            parts = torch.from_numpy(np.ascontiguousarray(turn(regions[:, :, index])).astype(np.int64))[None]
            rows, columns = picture.shape[2:]
            down, right = -rows % multiple, -columns % multiple
            padded = F.pad((picture - low) / (high - low), (0, right, 0, down), mode="replicate")
            parts = F.pad(parts[:, None].double(), (0, right * scale, 0, down * scale), mode="replicate")[:, 0].long()
            out = self.network(padded.to(self.device), parts.to(self.device))[0, 0, : rows * scale, : columns * scale].float().cpu()
            slices.append(turn((out * (high - low) + low).numpy()))
        values = np.stack(slices, 2)
        if np.issubdtype(volume.voxels.dtype, np.integer):
            limits = np.iinfo(volume.voxels.dtype)
            values = np.clip(np.round(values), limits.min, limits.max).astype(volume.voxels.dtype)
        return enlarged_grid(volume, values, scale)


def enlarged_grid(volume: Volume, voxels: ndarray, scale: int) -> Volume:
    """A volume of `scale` times finer rows and columns over the same place: the outer edges of the voxels coincide."""
    if scale == 1:
        return volume.like(voxels)
    finer = np.diag([1 / scale, 1 / scale, 1.0, 1.0])
    finer[:2, 3] = (1 / scale - 1) / 2
    affine = volume.affine if volume.kind == "picture" else volume.affine @ finer
    return replace(volume, voxels=voxels, affine=affine, notes=())


def restore_command(
    scans: Sequence[Path], *, output: Path | None, checkpoint: Path | None, device: str, regions: Path | None = None, truth: Path | None = None,
    value_range: tuple[float, float] | None = None, frame: int | None = None, series: str | None = None, overwrite: bool = False, seed: int = 0,
    as_json: bool = False,
) -> int:  # fmt: skip
    """Restore files; one that fails does not stop the others. Returns the exit code."""
    torch.manual_seed(seed)
    if checkpoint is None:
        raise UserError(
            "expected --checkpoint: no restoration weights ship with foveal; train them (configs/medical/rat_small.yaml) "
            "or convert the authors' with: foveal medical convert rat SOURCE OUT.safetensors"
        )
    if value_range is not None and not (np.isfinite(value_range).all() and value_range[0] < value_range[1]):
        raise UserError(f"expected --value-range from a lower to a higher value; got {value_range[0]:g} to {value_range[1]:g}")
    folder = output or Path("restored")
    named = collect_scans(scans, folder)
    places = without_results(named, names_of, lambda name: results_of(folder, name, ("restored", "restored_picture", "regions")), scans)
    for option, path in (("--regions", regions), ("--truth", truth)):
        if path is not None and not path.exists():
            raise UserError(f"expected an existing file or folder; {path} does not exist; check {option}")
        if path is not None and path.is_file() and len(places) > 1:
            raise UserError(f"expected a folder for {len(places)} scans; {option} {path} is one file")
    restorer = Restorer.from_pretrained(checkpoint, device, value_range)
    output_folder(folder, overwrite=True)
    report = BatchReport()
    for place, name in zip(places, names_of(places), strict=True):
        existing = sorted(folder.glob(f"{escape(name)}_restored.*"))
        if existing and not overwrite:
            report.kept(place, [str(path) for path in existing])
            continue
        with report.item(place) as entry, all_or_none(folder) as made:
            started = time.perf_counter()
            volume = read_volume(place, frame, series)
            refuse_blank(volume, place)
            low, high = restorer.range_of(volume)
            entry.message = "; ".join([*volume.notes, f"values from {low:g} to {high:g}"])
            parts = restorer.regions(volume, _beside(regions, name))
            restored = restorer.restored(volume, parts)
            written = made / f"{name}_restored{output_suffix(volume)}"
            refuse_replacing(named, [folder / written.name])
            write_volume(restored, written)
            reference = _beside(truth, name)
            target = None if reference is None else _same_grid(read_volume(reference, frame), restored, reference)
            entry.numbers["regions"] = float(len(np.unique(parts)))
            if target is not None:
                entry.numbers |= scored(restored.voxels, target, low, high, "")
                if restorer.scale == 1:
                    entry.numbers |= {
                        key: value for key, value in scored(volume.voxels, target, low, high, " before").items() if "authors" not in key
                    }
            pictures = made / f"{name}_restored_picture.png", made / f"{name}_regions.png"
            _draw(volume, restored, target, parts, *pictures, name)
            entry.outputs = [str(folder / path.name) for path in (written, *pictures)]
            entry.numbers["seconds"] = time.perf_counter() - started
    forms = {"PSNR dB": ".2f", "SSIM": ".4f", "RMSE": ".4g", "authors' PSNR dB": ".2f", "authors' SSIM": ".4f"}
    columns = {"regions": ".0f", "seconds": ".1f", **forms, **{f"{name} before": form for name, form in forms.items()}}
    return report.finish(as_json, columns)


def scored(voxels: ndarray, target: ndarray, low: float, high: float, suffix: str) -> dict[str, float]:
    """Means over the slices: in the range given, and as the authors report."""
    values = np.array([fidelity(voxels[:, :, index], target[:, :, index], low, high) for index in range(voxels.shape[2])])
    names = ("PSNR dB", "SSIM", "authors' PSNR dB", "authors' SSIM", "RMSE")
    return {f"{name}{suffix}": float(value) for name, value in zip(names, values.mean(0), strict=True)}


def _beside(place: Path | None, name: str) -> Path | None:
    """The file itself, or the one of this name in a folder."""
    if place is None or place.is_file():
        return place
    fitting = [path for path in sorted(place.iterdir()) if stem_of(path) == name]
    if not fitting:
        raise UserError(f"expected a file named {name} in {place}; there is none; add it, or leave the option out")
    return fitting[0]


def _same_grid(target: Volume, restored: Volume, path: Any) -> ndarray:
    target = on_grid_of(target, restored)
    if target.voxels.shape != restored.voxels.shape:
        raise UserError(f"expected a reference of shape {restored.voxels.shape}; {path} has {target.voxels.shape}")
    return target.voxels


def _draw(volume: Volume, restored: Volume, target: ndarray | None, parts: ndarray, picture: Path, region_map: Path, title: str) -> None:
    """The middle slice, rows before columns; beside it its region map."""
    middle, scale = volume.voxels.shape[2] // 2, restored.voxels.shape[0] // volume.voxels.shape[0]
    turn = (lambda x: x[:, :, middle]) if volume.kind == "picture" else (lambda x: x[:, :, middle].T)
    degraded = turn(volume.voxels).astype(float).repeat(scale, 0).repeat(scale, 1)
    pictures = [turn(restored.voxels).astype(float), None if target is None else turn(target).astype(float), turn(parts)]
    figure = restoration_figure(degraded, pictures[0], pictures[1], pictures[2], title)
    maps = regions_figure(degraded, pictures[2], title)
    figure.savefig(picture, dpi=120)
    maps.savefig(region_map, dpi=120)
