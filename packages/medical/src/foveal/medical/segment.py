"""Scans in, labels out: what a practitioner calls, from Python and from the command line. Labels have the scan's exact grid."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import nn

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import all_or_none, each_once, output_folder, outside, refuse_replacing, without_results
from foveal.core.reports import BatchReport
from foveal.medical.checkpoints import model_from_weights
from foveal.medical.inference import View, check_views, run_slices
from foveal.medical.metrics import dice_scores, hausdorff95, mean_known
from foveal.medical.plots import attention_figure, overlay_figure
from foveal.medical.preparation import Preparation
from foveal.medical.tasks.segmentation import labels_of
from foveal.medical.volumes import (
    DICOM,
    ITK,
    NIFTI,
    PICTURES,
    Volume,
    names_of,
    on_grid_of,
    output_suffix,
    read_volume,
    refuse_blank,
    stem_of,
    suffix_of,
    write_volume,
)

#: What ships with the package; the card stands beside it.
BUNDLED = Path(__file__).with_name("weights") / "hippocampus_small.safetensors"

SYSTEMS = ("msa_guided", "mhs_vm")


class Segmenter:
    """Segments scans.

    >>> segmenter = Segmenter.from_pretrained()
    >>> labels = segmenter("scan.nii.gz")  # a Volume of labels on the scan's grid
    >>> labels.voxels, labels.affine

    Args:
        network: of slices.
        preparation: that it was trained with.
        class_names: of the classes but the background.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        sequences: names of the sequences that one scan consists of; usually one.
        views: that each slice is seen in besides as it stands; their probabilities are averaged, see `foveal.medical.inference.run_slices`.
    """

    def __init__(
        self, network: nn.Module, preparation: Preparation, class_names: Sequence[str], device: str | torch.device = "auto",
        sequences: Sequence[str] = ("image",), views: Sequence[View] = (),
    ) -> None:  # fmt: skip
        self.device = device if isinstance(device, torch.device) else resolve_device(device)
        self.network, self.preparation = network.to(self.device).eval(), preparation
        self.class_names, self.sequences, self.views = tuple(class_names), tuple(sequences), tuple(views)
        check_views(self.views)
        channels = getattr(getattr(network, "config", None), "channels", None)
        expected = preparation.channels * len(self.sequences)
        if channels is not None and channels != expected and expected != 1:
            raise UserError(f"expected a network of {expected} channels for {len(self.sequences)} sequences with neighbours; it takes {channels}")

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, device: str | torch.device = "auto", classes: Sequence[str] | None = None,
        views: Sequence[View] | None = None,
    ) -> Segmenter:  # fmt: skip
        """Load trained weights: a ``.safetensors`` file or a folder with one; None is the small model that ships with the package.

        Weights that `convert` made of the authors' carry no preparation: they get the authors' (slices as stored, values / 255 for guided
        attention, 0 to 255 for MHS-VM), and `classes` name their classes. `views` are those that the weights were measured with, unless given.

        Raises:
            UserError: missing, corrupt or foreign weights.
        """
        place = BUNDLED if source is None else Path(source)
        weights = load_weights(place)
        if weights.system not in SYSTEMS:
            raise UserError(f"expected weights of a segmentation network ({', '.join(SYSTEMS)}); {place} holds {weights.system}; choose another file")
        network: Any = model_from_weights(place, weights.system)
        about = weights.metadata
        if "preparation" in about:
            preparation = Preparation(**json.loads(about["preparation"]))
        else:
            preparation = Preparation(plane="file", intensity="byte" if weights.system == "msa_guided" else "minmax")
        count = max(1, network.config.classes - 1)
        names = classes or (about["classes"].split("|") if about.get("classes") else [f"class {label}" for label in range(1, count + 1)])
        if len(names) != count:
            raise UserError(f"expected {count} names of classes for {place}; got {len(names)}: {', '.join(names)}")
        sequences = about["sequences"].split("|") if about.get("sequences") else ("image",)
        measured: Any = [view for view in about.get("views", "").split("|") if view]
        return cls(network, preparation, names, device, sequences, measured if views is None else views)

    def __call__(self, scan: str | Path | Volume | Any | Sequence[str | Path | Volume]) -> Volume:
        """Labels of a scan, on its own grid.

        Args:
            scan: a file, a folder with a DICOM series, a `Volume`, a MONAI MetaTensor of shape (1, i, j, k), or a list of its sequences.

        Raises:
            UserError: nothing that can be read, or another number of sequences than the weights want.
        """
        volumes = self._volumes(scan)
        return volumes[0].like(labels_of(self.logits(volumes)))

    def logits(self, volumes: Sequence[Volume]) -> Float[ndarray, "classes i j k"]:
        """Logits on the scan's own grid."""
        slices = self.preparation.slices(volumes)
        return self.preparation.restore(run_slices(self.network, slices, views=self.views), volumes[0])

    def probabilities(self, scan: Any) -> Float[ndarray, "classes i j k"]:
        """Probabilities of every class, the background first, on the scan's own grid."""
        logits = torch.from_numpy(self.logits(self._volumes(scan)))
        if len(logits) == 1:
            found = logits.sigmoid()
            return torch.cat([1 - found, found]).numpy()
        return logits.softmax(0).numpy()

    def attention(
        self, scan: Any, slice_index: int | None = None, point: tuple[int, int] | None = None
    ) -> tuple[ndarray, dict[str, ndarray], tuple[int, int]]:
        """What one position attends to at the four levels of the second stage: the slice, a map a level, and the point; for pictures.

        Raises:
            UserError: of a network without position attention.
        """
        from foveal.medical.attention_maps import position_maps
        from foveal.medical.models.guided_attention import GuidedAttentionNet

        if not isinstance(self.network, GuidedAttentionNet):
            raise UserError(f"expected a guided-attention network for attention maps; these weights hold {type(self.network).__name__}")
        return position_maps(self.network, self.preparation.slices(self._volumes(scan)), slice_index, point)

    def _volumes(self, scan: Any) -> list[Volume]:
        parts = list(scan) if isinstance(scan, (list, tuple)) else [scan]
        volumes = [part if isinstance(part, Volume) else read_volume(part) if isinstance(part, (str, Path)) else _of_tensor(part) for part in parts]
        if len(volumes) != len(self.sequences):
            raise UserError(f"expected {len(self.sequences)} sequences of a scan ({', '.join(self.sequences)}); got {len(volumes)}")
        return volumes

    def save(self, path: str | Path, card: str | None = None, dtype: torch.dtype | None = None) -> Path:
        """Write the network with its preparation and class names, as `from_pretrained` reads them."""
        from foveal.core.checkpoint import save_weights
        from foveal.medical.models.mhs_vm import MHSVM

        system = "mhs_vm" if isinstance(self.network, MHSVM) else "msa_guided"
        metadata = {
            "preparation": json.dumps(self.preparation.to_dict()),
            "classes": "|".join(self.class_names),
            "sequences": "|".join(self.sequences),
            "views": "|".join(self.views),
        }
        network: Any = self.network
        return save_weights(path, network.state_dict(), system=system, config=network.config, card=card, dtype=dtype, metadata=metadata)


def _of_tensor(tensor: Any) -> Volume:
    """A MONAI MetaTensor, channel first."""
    affine = getattr(tensor, "affine", None)
    if not isinstance(tensor, torch.Tensor) or affine is None or tensor.dim() != 4 or tensor.shape[0] != 1:
        shape = tuple(tensor.shape) if hasattr(tensor, "shape") else type(tensor).__name__
        raise UserError(f"expected a file, a folder, a Volume or a MetaTensor of shape (1, i, j, k); got {shape}")
    return Volume(
        tensor[0].detach().cpu().numpy(), np.asarray(affine, dtype=np.float64), source=str(getattr(tensor, "meta", {}).get("filename_or_obj", ""))
    )


def collect_scans(paths: Sequence[Path], apart_from: Path | None = None) -> list[Path]:
    """What the user named as scans: files, folders that hold a DICOM series themselves, and all such files and folders below other folders.

    `apart_from` is the folder for the results: where it lies in one that was named, what an earlier call left there is no scan.

    Raises:
        UserError: nothing there.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"expected an existing file or folder; {path} does not exist; check the path")
        inside = outside(_scans_below(path), path, apart_from) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"expected images (NIfTI, NRRD, DICOM, PNG) in folder {path}; found none; name another folder or the files")
        found += inside
    return sorted(each_once(found))


def results_of(folder: Path, name: str, endings: Sequence[str]) -> list[Path]:
    """What a command may write of a scan: ``<name>_<ending>`` in every format that is written."""
    return [folder / f"{name}_{ending}{suffix}" for ending in endings for suffix in (".nii", ".nii.gz", ".nrrd", ".mha", ".png")]


def _scans_below(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    if any(suffix_of(path) in DICOM or _dicom_without_suffix(path) for path in files):
        return [folder]
    scans = [path for path in files if suffix_of(path) in (*NIFTI, *ITK, *PICTURES) and suffix_of(path) != ".img"]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        scans += _scans_below(inner)
    return scans


def _dicom_without_suffix(path: Path) -> bool:
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def segment_command(
    scans: Sequence[Path], *, output: Path | None, checkpoint: Path | None, device: str, truth: Path | None = None, probabilities: bool = False,
    pictures: bool = True, attention: bool = False, views: str | None = None, frame: int | None = None, series: str | None = None,
    overwrite: bool = False, seed: int = 0, as_json: bool = False,
) -> int:  # fmt: skip
    """Segment files; one that fails does not stop the others. Returns the exit code."""
    torch.manual_seed(seed)
    folder = output or Path("segmented")
    named = collect_scans(scans, folder)
    if truth is not None and not truth.exists():
        raise UserError(f"expected reference labels; {truth} does not exist; check --truth")
    segmenter = Segmenter.from_pretrained(checkpoint, device, views=None if views is None else _views_of(views))
    if len(segmenter.sequences) > 1:
        raise UserError(
            f"expected weights of one sequence; these want {', '.join(segmenter.sequences)}: call Segmenter from Python with a list of files"
        )
    output_folder(folder, overwrite=True)
    endings = ["labels", "overlay", "attention", *(f"{structure.replace(' ', '_')}_probability" for structure in segmenter.class_names)]
    places = without_results(named, names_of, lambda name: results_of(folder, name, endings), scans)
    if truth is not None and truth.is_file() and len(places) > 1:
        raise UserError(f"expected a folder of reference labels for {len(places)} scans; --truth {truth} is one file")
    report, names = BatchReport(), names_of(places)
    for place, name in zip(places, names, strict=True):
        existing = sorted(folder.glob(f"{escape(name)}_labels.*"))
        if existing and not overwrite:
            report.kept(place, [str(path) for path in existing])
            continue
        with report.item(place) as entry, all_or_none(folder) as made:
            started = time.perf_counter()
            volume = read_volume(place, frame, series)
            refuse_blank(volume, place)
            entry.message = "; ".join(volume.notes)
            reference = None if truth is None else _reference(truth, name, volume)  # looked at before the network works for nothing
            logits = segmenter.logits([volume])
            labels = volume.like(labels_of(logits))
            target = made / f"{name}_labels{output_suffix(volume)}"
            refuse_replacing(named, [folder / target.name])
            written = [write_volume(labels, target)]
            if probabilities:
                written += _write_probabilities(volume, logits, segmenter.class_names, made, name)
            for label, structure in enumerate(segmenter.class_names, 1):
                unit, size = ("ml", volume.millilitres_of_a_voxel) if volume.kind != "picture" else ("pixels", 1.0)
                entry.numbers[f"{structure} {unit}"] = float((labels.voxels == label).sum()) * size
            if reference is not None:
                classes = len(segmenter.class_names) + 1
                entry.numbers["Dice"] = mean_known(dice_scores(labels.voxels, reference, classes))
                entry.numbers["HD95 mm"] = mean_known(hausdorff95(labels.voxels, reference, classes, volume.spacing))
            if pictures:
                plane = "file" if segmenter.preparation.plane == "file" else segmenter.preparation.plane
                figure = overlay_figure(volume, labels.voxels, segmenter.class_names, reference, plane, title=name)
                written.append(made / f"{name}_overlay.png")
                figure.savefig(written[-1], dpi=120)
            if attention:
                picture, maps, point = segmenter.attention(volume)
                written.append(made / f"{name}_attention.png")
                attention_figure(picture, maps, point, f"{name}, as the network reads it: what the cross attends to").savefig(written[-1], dpi=120)
            entry.outputs = [str(folder / path.name) for path in written]
            entry.numbers["seconds"] = time.perf_counter() - started
    columns = {"seconds": ".1f", "Dice": ".3f", "HD95 mm": ".1f"} | {f"{name} ml": ".2f" for name in segmenter.class_names}
    columns |= {f"{name} pixels": ".0f" for name in segmenter.class_names}
    return report.finish(as_json, columns)


def _views_of(text: str) -> list[Any]:
    """From the command line: names with commas between them, or "none"."""
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def _write_probabilities(volume: Volume, logits: ndarray, names: Sequence[str], folder: Path, name: str) -> list[Path]:
    values = torch.from_numpy(logits)
    shares = torch.cat([1 - values.sigmoid(), values.sigmoid()]).numpy() if len(values) == 1 else values.softmax(0).numpy()
    suffix = ".nii.gz" if volume.kind == "picture" else output_suffix(volume)
    outputs = []
    for structure, share in zip(names, shares[1:], strict=True):
        target = folder / f"{name}_{structure.replace(' ', '_')}_probability{suffix}"
        outputs.append(write_volume(volume.like(share.astype(np.float32)), target))
    return outputs


def _reference(truth: Path, name: str, volume: Volume) -> ndarray | None:
    """The reference labels of a scan: the file itself, or the file of its name in a folder; None where the folder has none."""
    if truth.is_dir():
        fitting = [path for path in sorted(truth.iterdir()) if stem_of(path) in (name, f"{name}_labels", f"{name}_seg", f"{name}-label")]
        if not fitting:
            return None
        truth = fitting[0]
    labels = on_grid_of(read_volume(truth), volume)
    if labels.voxels.shape != volume.voxels.shape:
        raise UserError(f"expected reference labels on the grid of {volume.source} {volume.voxels.shape}; {truth} has {labels.voxels.shape}")
    return labels.voxels
