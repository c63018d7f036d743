"""Pictures whose every pixel has a class, as Cityscapes, CamVid and plain folders hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from foveal.core.errors import UserError
from foveal.detection.data.pictures import PICTURES
from foveal.detection.models.bevanet_loss import IGNORED

Colour = tuple[int, int, int]

#: Class -> its colour in the benchmark's pictures, and its number in the label files, of Cityscapes.
CITYSCAPES: dict[str, tuple[Colour, int]] = {
    "road": ((128, 64, 128), 7), "sidewalk": ((244, 35, 232), 8), "building": ((70, 70, 70), 11), "wall": ((102, 102, 156), 12),
    "fence": ((190, 153, 153), 13), "pole": ((153, 153, 153), 17), "traffic light": ((250, 170, 30), 19), "traffic sign": ((220, 220, 0), 20),
    "vegetation": ((107, 142, 35), 21), "terrain": ((152, 251, 152), 22), "sky": ((70, 130, 180), 23), "person": ((220, 20, 60), 24),
    "rider": ((255, 0, 0), 25), "car": ((0, 0, 142), 26), "truck": ((0, 0, 70), 27), "bus": ((0, 60, 100), 28), "train": ((0, 80, 100), 31),
    "motorcycle": ((0, 0, 230), 32), "bicycle": ((119, 11, 32), 33),
}  # fmt: skip

#: Class -> its colour in CamVid's colour-coded labels, and its number in SegNet's copy of the set, in the order of PIDNet's and BEVANet's networks.
CAMVID: dict[str, tuple[Colour, int]] = {
    "bicyclist": ((0, 128, 192), 10), "building": ((128, 0, 0), 1), "car": ((64, 0, 128), 8), "pole": ((192, 192, 128), 2),
    "fence": ((64, 64, 128), 7), "pedestrian": ((64, 64, 0), 9), "road": ((128, 64, 128), 3), "sidewalk": ((0, 0, 192), 4),
    "sign": ((192, 128, 128), 6), "sky": ((128, 128, 128), 0), "tree": ((128, 128, 0), 5),
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """A picture and the file of its labels."""

    picture: Path
    labels: Path


@dataclass(frozen=True)
class SceneFolder:
    """A set on disk.

    Attributes:
        layout: "cityscapes", "camvid" or "folders".
        names: of the classes.
        colours: of the classes; of plain folders empty.
        numbers: number in a label file -> class; of plain folders empty, where they are the same.
        margin: pixels at the picture's border where no boundary is looked for.
    """

    layout: str
    names: tuple[str, ...]
    colours: tuple[Colour, ...] = ()
    numbers: Mapping[int, int] | None = None
    margin: int = 0

    def read(self, scene: Scene) -> UInt8[np.ndarray, "height width"]:
        """Classes of a picture's pixels; 255 where there is none.

        Raises:
            UserError: a file that cannot be read, or classes that are not the set's.
        """
        try:
            with Image.open(scene.labels) as image:
                values = np.asarray(image.convert("RGB") if image.mode in ("RGB", "RGBA") else image)
        except (UnidentifiedImageError, ImportError, OSError, SyntaxError, ValueError) as error:
            raise UserError(f"expected a picture of labels; {scene.labels} cannot be read: {str(error)[:120]}; copy it again") from None
        if values.ndim == 3:
            return self._of_colours(values, scene.labels)
        if self.numbers is not None:
            table = np.full(256, IGNORED, np.uint8)
            for number, kind in self.numbers.items():
                table[number] = kind
            return table[values.astype(np.uint8)]
        wrong = (values >= len(self.names)) & (values != IGNORED)
        if wrong.any():
            raise UserError(
                f"expected classes below {len(self.names)}, or {IGNORED} for none; {scene.labels} holds {int(values[wrong].max())}; "
                "give data.names all classes, or mend the file"
            )
        return values.astype(np.uint8)

    def _of_colours(self, values: np.ndarray, file: Path) -> UInt8[np.ndarray, "height width"]:
        if not self.colours:
            raise UserError(f"expected a picture of class numbers (one channel); {file} is coloured; write numbers, or name the layout of the set")
        codes = (values.astype(np.int32) * (65536, 256, 1)).sum(-1)
        labels = np.full(codes.shape, IGNORED, np.uint8)
        for kind, (red, green, blue) in enumerate(self.colours):
            labels[codes == red * 65536 + green * 256 + blue] = kind
        return labels


def scene_folder(root: str | Path, layout: str = "auto", names: Sequence[str] | None = None) -> SceneFolder:
    """What a folder of labelled scenes is.

    Args:
        root: Cityscapes (``leftImg8bit``, ``gtFine``), CamVid (``train`` with ``trainannot`` or ``train_labels``), or plain folders
            (``images/<part>``, ``labels/<part>`` with PNG files of class numbers).
        layout: "cityscapes", "camvid", "folders", or "auto", which looks.
        names: of the classes; plain folders need them.

    Raises:
        UserError: no such folder, or none of the layouts.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"expected a folder of labelled scenes; {folder} {'is a file' if folder.exists() else 'does not exist'}; check data.source")
    if layout == "auto":
        if (folder / "leftImg8bit").is_dir():
            layout = "cityscapes"
        elif (folder / "images").is_dir() and (folder / "labels").is_dir():
            layout = "folders"
        elif any(folder.glob("*annot")) or any(folder.glob("*_labels")):
            layout = "camvid"
        else:
            raise UserError(
                f"expected Cityscapes (leftImg8bit, gtFine), CamVid (train, trainannot) or plain folders (images, labels) in {folder}; found none; "
                "check data.source"
            )
    if layout == "folders":
        if not names:
            raise UserError("expected data.names, the names of the classes in the order of their numbers; plain folders do not tell them")
        return SceneFolder("folders", tuple(names))
    if layout not in ("cityscapes", "camvid"):
        raise UserError(f"expected data.layout auto, cityscapes, camvid or folders; got {layout!r}")
    classes = CITYSCAPES if layout == "cityscapes" else CAMVID
    if names and tuple(names) != tuple(classes):
        raise UserError(f"expected no data.names for {layout}, whose classes are known ({', '.join(classes)})")
    numbers = {number: kind for kind, (_, number) in enumerate(classes.values())}
    return SceneFolder(layout, tuple(classes), tuple(colour for colour, _ in classes.values()), numbers, 6 if layout == "cityscapes" else 0)


def scenes_of(root: str | Path, kind: SceneFolder, part: str) -> list[Scene]:
    """Pictures of a part of a set, with their labels, in the order of their names.

    Raises:
        UserError: no such part, or pictures without labels.
    """
    folder = Path(root)
    if kind.layout == "cityscapes":
        pictures = sorted((folder / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        pairs = [
            Scene(file, folder / "gtFine" / part / file.parent.name / file.name.replace("_leftImg8bit", "_gtFine_labelIds")) for file in pictures
        ]
        where = folder / "leftImg8bit" / part
    else:
        where = folder / "images" / part if kind.layout == "folders" else folder / part
        pictures = sorted(file for file in where.glob("*") if file.suffix.lower() in PICTURES)
        if kind.layout == "folders":
            pairs = [Scene(file, folder / "labels" / part / f"{file.stem}.png") for file in pictures]
        elif (folder / f"{part}annot").is_dir():
            pairs = [Scene(file, folder / f"{part}annot" / file.name) for file in pictures]
        else:
            pairs = [Scene(file, folder / f"{part}_labels" / f"{file.stem}_L{file.suffix}") for file in pictures]
    if not pairs:
        raise UserError(f"expected pictures in {where}; found none; check data.source and the name of the part")
    lacking = [pair for pair in pairs if not pair.labels.is_file()]
    if lacking:
        raise UserError(
            f"expected labels of every picture; {len(lacking)} of {len(pairs)} have none, such as {lacking[0].labels}; add or remove them"
        )
    return pairs
