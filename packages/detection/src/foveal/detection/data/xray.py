"""PIDray, and X-ray scenes made by projection: pictures with boxes, masks and classes of prohibited items.

PIDray (Wang et al., ICCV 2021): 47,677 pictures, 29,457 of them for training; tests "easy" (one item), "hard" (several) and "hidden" (deliberately
hidden). For academic use, from github.com/bywang2018/security-dataset; in its folder lie annotations/xray_train.json and
xray_test_{easy,hard,hidden}.json, and the folders train, easy, hard and hidden. Any COCO file with masks is read alike.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.files import all_or_none, output_folder
from foveal.core.resumable import ResumableDataLoader
from foveal.detection.data.pictures import PICTURES, read_picture
from foveal.detection.data.projection import Crop, Scene, drawn_bag, drawn_crops, project, read_crops
from foveal.detection.masks import encoded
from foveal.detection.models.sdanet_loss import Objects

CLASSES = ("Baton", "Pliers", "Hammer", "Powerbank", "Scissors", "Wrench", "Gun", "Bullet", "Sprayer", "HandCuffs", "Knife", "Lighter")
SPLITS = ("easy", "hard", "hidden")
#: Mean and deviation that pictures of 0 to 1 are normalised with, by the convention of boxes that the weights were trained in.
NORMALISATION = {
    "pixels": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "edges": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class XRayBatch(NamedTuple):
    """Pictures filled up to one size.

    Attributes:
        images: normalised.
        sizes: height and width of each picture inside the batch.
        originals: height and width of each picture in its file.
        numbers: ids of the pictures.
        objects: what they are labelled with, in pixels of the batch.
    """

    images: Float[Tensor, "batch 3 height width"]
    sizes: list[tuple[int, int]]
    originals: list[tuple[int, int]]
    numbers: list[int]
    objects: list[Objects]


@dataclass
class CocoScenes:
    """Pictures of a COCO file.

    Attributes:
        file: the JSON.
        folder: of the pictures.
    """

    file: Path
    folder: Path

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise UserError(f"expected a COCO file at {self.file}; there is none; check the folder (annotations/ and the splits' folders)")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its steps
                self.coco = COCO(str(self.file))
        except (ValueError, KeyError, AssertionError) as error:
            raise UserError(f"expected a COCO file in {self.file}: {' '.join(str(error).split())[:100]}; export it again") from None
        self.numbers = sorted(self.coco.imgs)
        self.categories = sorted(self.coco.cats)

    @property
    def names(self) -> list[str]:
        """Of the classes, in their order."""
        return [self.coco.cats[number]["name"] for number in self.categories]

    @property
    def truth(self) -> dict[str, Any]:
        """The file's content, for an evaluation."""
        return self.coco.dataset

    def __len__(self) -> int:
        return len(self.numbers)

    def scene(self, place: int) -> Scene:
        """A picture with its masks; crowds and empty masks are left out."""
        number = self.numbers[place]
        entry = self.coco.imgs[number]
        picture = read_picture(self.folder / entry["file_name"]).astype(np.float32) / 255
        annotations = [part for part in self.coco.imgToAnns[number] if not part.get("iscrowd")]
        pairs = [(self.coco.annToMask(part).astype(bool), self.categories.index(part["category_id"])) for part in annotations]
        pairs = [(mask, label) for mask, label in pairs if mask.any() and mask.shape == picture.shape[:2]]
        masks = np.stack([mask for mask, _ in pairs]) if pairs else np.zeros((0, *picture.shape[:2]), dtype=bool)
        return Scene(picture, masks, [label for _, label in pairs])


class MadeScenes:
    """Scenes by projection, each the same whenever it is asked for.

    Args:
        count: of scenes.
        crops: what is projected.
        names: of the classes.
        bags: pictures of harmless bags; drawn ones by default.
        side: of drawn bags, in pixels.
        most: items in a scene; at least one.
        seed: another seed makes other scenes.
    """

    def __init__(
        self, count: int, crops: Sequence[Crop], names: Sequence[str], bags: Sequence[Path] = (), side: int = 320, most: int = 3, seed: int = 0
    ) -> None:
        self.count, self.crops, self.names, self.bags = count, list(crops), list(names), list(bags)
        self.side, self.most, self.seed = side, most, seed
        self.numbers = list(range(1, count + 1))
        self.categories = list(range(1, len(self.names) + 1))

    def __len__(self) -> int:
        return self.count

    def scene(self, place: int) -> Scene:
        """One of them."""
        generator = np.random.default_rng((self.seed, place))
        if self.bags:
            picture = read_picture(self.bags[int(generator.integers(len(self.bags)))]).astype(np.float32) / 255
            scene = Scene(picture, np.zeros((0, *picture.shape[:2]), dtype=bool), [])
        else:
            scene = drawn_bag(generator, self.side)
        wanted = int(generator.integers(1, self.most + 1))
        for _ in range(4 * wanted):
            if len(scene.labels) == wanted:
                break
            scene = project(scene, self.crops[int(generator.integers(len(self.crops)))], generator)
        return scene

    @property
    def truth(self) -> dict[str, Any]:
        """All scenes as a COCO file has them."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for place, number in enumerate(self.numbers):
            scene = self.scene(place)
            images.append({"id": number, "file_name": f"{number:06d}.png", "height": scene.passes.shape[0], "width": scene.passes.shape[1]})
            for mask, label, box in zip(scene.masks, scene.labels, scene.boxes, strict=True):
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "area": int(mask.sum()), "iscrowd": 0,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "segmentation": encoded(mask),
                })  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in zip(self.categories, self.names, strict=True)]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


class XRaySet(Dataset):
    """Scenes at the network's size, normalised.

    Args:
        scenes: what they are.
        side: the longer side of a picture becomes this, in pixels.
        convention: "pixels" or "edges": how pictures are normalised.
        flip: chance of a mirrored picture.
        threats: projected onto training pictures as augmentation, with this chance each.
        chance: of one more item.
    """

    def __init__(
        self,
        scenes: CocoScenes | MadeScenes,
        side: int,
        convention: str,
        flip: float = 0.0,
        threats: Sequence[Crop] = (),
        chance: float = 0.5,
    ) -> None:
        self.scenes, self.side, self.flip, self.threats, self.chance = scenes, side, flip, list(threats), chance
        self.mean, self.deviation = (np.array(values, dtype=np.float32) for values in NORMALISATION[convention])

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, place: int) -> tuple[Tensor, tuple[int, int], int, Objects]:
        scene = self.scenes.scene(place)
        # torch's state is what a resumed run restores
        generator = np.random.default_rng(int(torch.randint(2**31, ())) if self.flip or self.threats else 0)
        if self.threats and generator.random() < self.chance:
            scene = project(scene, self.threats[int(generator.integers(len(self.threats)))], generator)
        original = scene.passes.shape[:2]
        factor = self.side / max(original)
        size = (max(round(original[1] * factor), 1), max(round(original[0] * factor), 1))
        picture = cv2.resize(scene.passes, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
        masks = [cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0 for mask in scene.masks]
        boxes = scene.boxes * np.tile(np.array(size) / np.array(original[::-1]), 2)
        if self.flip and generator.random() < self.flip:
            picture, masks = picture[:, ::-1], [mask[:, ::-1] for mask in masks]
            boxes[:, [0, 2]] = size[0] - boxes[:, [2, 0]]
        image = torch.from_numpy(np.ascontiguousarray(((picture - self.mean) / self.deviation).transpose(2, 0, 1)))
        stack = torch.from_numpy(np.ascontiguousarray(np.stack(masks))) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.bool)
        objects = Objects(torch.from_numpy(boxes).float(), torch.tensor(scene.labels, dtype=torch.long), stack)
        return image, (original[0], original[1]), self.scenes.numbers[place], objects


def together(items: Sequence[tuple[Tensor, tuple[int, int], int, Objects]]) -> XRayBatch:
    """A batch: zeros at the right and below up to a common multiple of 32."""
    height, width = (max(32 * -(-item[0].shape[axis] // 32) for item in items) for axis in (1, 2))
    images = torch.zeros(len(items), 3, height, width)
    objects, sizes = [], []
    for place, (image, _, _, part) in enumerate(items):
        images[place, :, : image.shape[1], : image.shape[2]] = image
        assert part.masks is not None
        masks = torch.zeros(len(part.labels), height, width, dtype=torch.bool)
        masks[:, : image.shape[1], : image.shape[2]] = part.masks
        objects.append(Objects(part.boxes, part.labels, masks))
        sizes.append((image.shape[1], image.shape[2]))
    return XRayBatch(images, sizes, [item[1] for item in items], [item[2] for item in items], objects)


class XRayData(pl.LightningDataModule):
    """PIDray in its folder, scenes that ``foveal detection project`` wrote, or, without a folder, scenes made by projection.

    Args:
        source: PIDray's folder; or one with an ``annotations.json`` beside its pictures, as ``project`` writes it; None makes scenes.
        test_source: folder of the second kind to validate and test on; with it PIDray's own splits are not asked for.
        crops: folder of crops, a folder a class, for projection; None: drawn shapes for made scenes, and no projection onto PIDray.
        bags: folder of pictures of harmless bags for made scenes; None draws them.
        made: made scenes for training; a quarter as many each for validation and test.
        side: the longer side of pictures.
        convention: "pixels" or "edges", as the network's.
        batch_size: pictures of a training batch.
        workers: processes that read.
        seed: of made scenes and augmentation.
    """

    def __init__(
        self,
        source: str | None = None,
        test_source: str | None = None,
        crops: str | None = None,
        bags: str | None = None,
        made: int = 200,
        side: int = 500,
        convention: str = "pixels",
        batch_size: int = 2,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise UserError(f"expected at least 2 pictures a batch, for batch norm over whole pictures; got {batch_size}")
        if convention not in NORMALISATION:
            raise UserError(f"expected a convention of {', '.join(NORMALISATION)}; got {convention!r}")
        if source is None and test_source is not None:
            raise UserError("expected data.source beside data.test_source; made scenes are measured on made ones")
        self.source, self.test_source, self.side, self.convention = source, test_source, side, convention
        self._read: dict[str, dict[str, CocoScenes | MadeScenes]] = {}
        self.batch_size, self.workers, self.seed, self.made = batch_size, workers, seed, made
        self.names = list(CLASSES)
        self.threats = read_crops(crops, self.names) if crops else []
        self.bags = pictures_of(bags) if bags else []

    def scenes(self, part: str) -> dict[str, CocoScenes | MadeScenes]:
        """Name -> scenes of "train", "validate" or "test", opened once. PIDray has no validation pictures: a test's easy ones stand in."""
        if part not in self._read:
            self._read[part] = self._scenes(part)
        return self._read[part]

    def _scenes(self, part: str) -> dict[str, CocoScenes | MadeScenes]:
        if self.source is None:
            items = self.threats or drawn_crops(self.names)
            count, seed = {"train": (self.made, 0), "validate": (self.made // 4, 1), "test": (self.made // 4, 2)}[part]
            return {"made": MadeScenes(max(count, 1), items, self.names, self.bags, self.side, seed=3 * self.seed + seed)}
        root = Path(self.source)
        written = (root / "annotations.json").is_file()
        if part != "train" and self.test_source is not None:
            return {"scenes": CocoScenes(Path(self.test_source) / "annotations.json", Path(self.test_source))}
        if written and part != "train":
            raise UserError(
                f"expected data.test_source, other scenes than those of {root} to measure on; got none; make them with another seed: "
                "foveal detection project --seed 1 -o FOLDER"
            )
        if written:
            return {"scenes": CocoScenes(root / "annotations.json", root)}
        if part == "train":
            return {"train": CocoScenes(root / "annotations" / "xray_train.json", root / "train")}
        splits = SPLITS if part == "test" else SPLITS[:1]
        return {name: CocoScenes(root / "annotations" / f"xray_test_{name}.json", root / name) for name in splits}

    def train_dataloader(self) -> DataLoader:
        """Resumable to the bit, mirrored by halves, with projected items where there are crops.

        A last batch of one picture is left out: batch norm over one value is undefined.
        """
        (scenes,) = self.scenes("train").values()
        threats = self.threats if self.source is not None else []
        data = XRaySet(scenes, self.side, self.convention, 0.5, threats)
        return ResumableDataLoader(
            data, self.batch_size, shuffle=True, seed=self.seed, drop_last=len(data) > self.batch_size, collate_fn=together, num_workers=self.workers
        )

    def _plain(self, part: str) -> list[DataLoader]:
        self.measured = self.scenes(part)
        return [DataLoader(XRaySet(scenes, self.side, self.convention), batch_size=1, collate_fn=together) for scenes in self.measured.values()]

    def val_dataloader(self) -> list[DataLoader]:
        """In order, one picture at a time."""
        return self._plain("validate")

    def test_dataloader(self) -> list[DataLoader]:
        """Each split."""
        return self._plain("test")

    predict_dataloader = test_dataloader


def write_scenes(scenes: MadeScenes, folder: str | Path) -> Path:
    """Write made scenes as PNG files and ``annotations.json`` (COCO, with masks) into a folder, and return the JSON's path.

    Raises:
        UserError: the folder holds something already or cannot be written, or a picture of a bag cannot be read. Nothing is left in it then.
    """
    root = output_folder(folder)
    if root.is_dir() and any(root.iterdir()):
        raise UserError(f"expected an empty folder for the scenes; {root} holds files; name another one")
    with all_or_none(root) as made:  # scenes without labels would only be in the way of the next call
        for place, number in enumerate(scenes.numbers):
            pixels = np.round(scenes.scene(place).passes * 255).astype(np.uint8)
            (made / f"{number:06d}.png").write_bytes(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes())
        (made / "annotations.json").write_text(json.dumps(scenes.truth), encoding="utf-8")
    return root / "annotations.json"


def project_command(
    output: Path, crops: Path | None = None, bags: Path | None = None, count: int = 50, most: int = 3, side: int = 320, seed: int = 0
) -> int:
    """``foveal detection project``: what `write_scenes` writes, and one line that says where."""
    items = read_crops(crops, CLASSES) if crops else drawn_crops(CLASSES)
    file = write_scenes(MadeScenes(count, items, CLASSES, pictures_of(bags) if bags else (), side, most, seed), output)
    print(f"{count} scene{'s' if count > 1 else ''} with labels and masks: {file}")
    return 0


def pictures_of(folder: str | Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        UserError: no such folder, or none in it.
    """
    root = Path(folder)
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in PICTURES) if root.is_dir() else []
    if not found:
        raise UserError(f"expected a folder with pictures of bags; {root} has none; check the path")
    return found
