"""Questions about scenes as tensors, drawn from rooms that are drawn too, or from scenes of files."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.files import collect_inputs
from foveal.core.resumable import ResumableDataLoader
from foveal.graphs3d.data.questions import ANYTHING, RELATIONS, Question, candidates, draw_questions
from foveal.graphs3d.data.rooms import draw_room
from foveal.graphs3d.data.scenes import SUFFIXES, Scene, read_scenes
from foveal.graphs3d.models.relations import Asked

#: Slots of classes: 0 is none, 1 any.
NONE, ANY = 0, 1


def asked_of(scene: Scene, question: Question, answer: int, slots: int, random: np.random.Generator | None = None) -> Asked:
    """One question as tensors without a batch axis; classes get their slots, and objects their order, at random if there is a generator.

    Raises:
        UserError: more classes than slots.
    """
    labels = sorted({label.lower() for label in scene.labels})
    if len(labels) > slots:
        raise UserError(f"expected at most {slots} different classes in a scene; {scene.name!r} has {len(labels)}; join some of them")
    numbers = np.arange(slots) if random is None else random.permutation(slots)
    slot = {label: 2 + int(number) for label, number in zip(labels, numbers, strict=False)} | {ANYTHING: ANY}
    order = np.arange(len(scene)) if random is None else random.permutation(len(scene))
    named = [slot[name.lower()] for name in (question.target, *question.others)]
    may = np.zeros(len(scene), dtype=bool)
    may[candidates(question, scene)] = True
    return Asked(
        torch.tensor(RELATIONS.index(question.relation)),
        torch.tensor(named + [NONE] * (3 - len(named))),
        torch.tensor([slot[scene.labels[index].lower()] for index in order]),
        torch.from_numpy(scene.centers[order]).float(),
        torch.from_numpy(scene.sizes[order]).float(),
        torch.ones(len(scene), dtype=torch.bool),
        torch.from_numpy(may[order]),
        torch.tensor(int(np.flatnonzero(order == answer)[0])),
    )


def collate(items: Sequence[Asked]) -> Asked:
    """Scenes of different sizes as one batch; places without an object are padded with ones, which have a logarithm."""
    most = max(len(item.classes) for item in items)

    def stacked(name: str, filling: float) -> torch.Tensor:
        parts = [getattr(item, name) for item in items]
        if parts[0].dim() == 0 or name == "slots":
            return torch.stack(parts)
        out = parts[0].new_full((len(parts), most, *parts[0].shape[1:]), filling)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out

    return Asked(**{name: stacked(name, 1 if name == "sizes" else 0) for name in Asked._fields})


class DrawnQuestions(Dataset):
    """Questions about rooms drawn once; every access assigns slots and order anew, if it is for training.

    Args:
        count: questions, an epoch.
        rooms: how many are drawn.
        least: objects of a room.
        most: objects of a room.
        slots: of classes.
        relations: asked for, each about as often.
        seed: of the draw.
        fixed: give each question the same slots and order every time.
    """

    def __init__(self, count: int, rooms: int, least: int, most: int, slots: int, relations: Sequence[str], seed: int, fixed: bool) -> None:
        self.count, self.slots, self.seed, self.fixed = count, slots, seed, fixed
        random = np.random.default_rng(seed)
        found: dict[str, list[tuple[Scene, Question, int]]] = {relation: [] for relation in relations}
        for place in range(rooms):
            scene = draw_room(random, least, most, f"room {place}")
            for question, answer in draw_questions(scene, random, tuple(relations), 24):
                found[question.relation].append((scene, question, answer))
        self.by_relation = [entries for entries in found.values() if entries]
        if not self.by_relation:
            raise UserError(
                f"expected rooms that questions can be asked about; none of {rooms} with {least} to {most} objects was; allow more objects"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Asked:
        """The relations in turn, a question of each."""
        # In training the loader seeds numpy's generator by epoch and item.
        random = np.random.default_rng((self.seed, index) if self.fixed else np.random.randint(2**31))  # noqa: NPY002
        entries = self.by_relation[index % len(self.by_relation)]
        chosen = index // len(self.by_relation) if self.fixed else int(random.integers(len(entries)))
        return asked_of(*entries[chosen % len(entries)], self.slots, random)


class SceneQuestions(Dataset):
    """All clear questions that `draws` draws a scene find."""

    def __init__(self, scenes: Sequence[Scene], slots: int, relations: Sequence[str], draws: int, seed: int) -> None:
        self.items: list[Asked] = []
        for place, scene in enumerate(scenes):
            random = np.random.default_rng((seed, place))
            self.items += [asked_of(scene, *found, slots, random) for found in draw_questions(scene, random, tuple(relations), draws)]
        if not self.items:
            raise UserError(
                f"expected scenes that questions can be asked about; none was found in {len(scenes)}; they need several objects of a class"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Asked:
        return self.items[index]


class RelationQuestions(pl.LightningDataModule):
    """Rooms and questions.

    Args:
        steps: batches of an epoch.
        batch_size: questions of a batch.
        rooms: drawn to learn from.
        held_out: questions of validation and of test, about rooms of their own.
        least: objects of a room.
        most: objects of a room.
        relations: what is asked for; None: all.
        scenes: files or folders of scenes to learn from instead of rooms.
        test_scenes: files or folders of scenes to test on instead of rooms.
        slots: of classes.
        seed: of all draws.
        workers: processes that draw.
    """

    def __init__(
        self,
        steps: int = 500,
        batch_size: int = 64,
        rooms: int = 3000,
        held_out: int = 1000,
        least: int = 6,
        most: int = 14,
        relations: list[str] | None = None,
        scenes: list[str] | None = None,
        test_scenes: list[str] | None = None,
        slots: int = 64,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        unknown = sorted(set(relations or ()) - set(RELATIONS))
        if unknown:
            raise UserError(f"expected relations among {', '.join(RELATIONS)}; got {', '.join(unknown)}")
        self.steps, self.batch_size, self.rooms, self.held_out, self.least, self.most = steps, batch_size, rooms, held_out, least, most
        self.relations, self.scenes, self.test_scenes = relations or list(RELATIONS), scenes, test_scenes
        self.slots, self.seed, self.workers = slots, seed, workers

    def setup(self, stage: str | None = None) -> None:
        """Draw or read what `stage` needs."""
        rooms = (self.least, self.most, self.slots, self.relations)
        if stage in (None, "fit") and self.scenes:
            self.train: Dataset = SceneQuestions(_read(self.scenes), self.slots, self.relations, 40, self.seed)
        elif stage in (None, "fit"):
            self.train = DrawnQuestions(self.steps * self.batch_size, self.rooms, *rooms, seed=self.seed, fixed=False)
        if stage in (None, "fit", "validate"):
            self.validation = DrawnQuestions(self.held_out, self.held_out // 3, *rooms, seed=self.seed + 1_000_001, fixed=True)
        if stage in (None, "test", "predict"):
            self.test: Dataset = self._test()

    def _test(self) -> Dataset:
        if self.test_scenes:
            return SceneQuestions(_read(self.test_scenes), self.slots, self.relations, 40, self.seed + 2)
        rooms = (self.least, self.most, self.slots, self.relations)
        return DrawnQuestions(self.held_out, self.held_out // 3, *rooms, seed=self.seed + 2_000_003, fixed=True)

    def train_dataloader(self) -> DataLoader:
        """Resumable to the bit."""
        return ResumableDataLoader(self.train, self.batch_size, shuffle=True, seed=self.seed, collate_fn=collate, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.validation, batch_size=100, collate_fn=collate)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(self.test, batch_size=100, collate_fn=collate)

    predict_dataloader = test_dataloader


def _read(paths: Sequence[str]) -> list[Scene]:
    return [scene for file in collect_inputs(paths, SUFFIXES) for scene in read_scenes(file)]
