"""Scenes and questions in, answers out: what ``foveal graphs3d ask`` does."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, output_folder, output_names
from foveal.core.reports import BatchReport, Entry
from foveal.graphs3d.data.questions import Question, answer, candidates, draw_questions, parse
from foveal.graphs3d.data.relations import asked_of, collate
from foveal.graphs3d.data.rooms import draw_room
from foveal.graphs3d.data.scenes import SUFFIXES, Scene, read_scenes
from foveal.graphs3d.models.relations import RelationDecoder, RelationDecoderConfig

SYSTEM = "relations"
BUNDLED = Path(__file__).parent / "weights" / "relations_small.safetensors"
#: Questions that are asked where none is given, and drawn.
ASKED, DRAWN = 12, 6


class Answered(NamedTuple):
    """An answer.

    Attributes:
        question: as asked.
        by_boxes: the object that the boxes say; None where they do not decide.
        by_network: the object that the network points at; None without a network.
        probability: that it gives it, among the candidates.
    """

    question: Question
    by_boxes: int | None
    by_network: int | None = None
    probability: float = 0.0


class Relations:
    """A trained decoder that answers questions about where objects stand.

    >>> relations = Relations.from_pretrained()
    >>> relations.ask(scene, "Which chair is nearest to the table?").by_network
    """

    def __init__(self, model: RelationDecoder, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, device: str = "auto") -> Relations:
        """Weights of ours; None is the small network in the package's folder of weights.

        Raises:
            UserError: missing, corrupt, or of another system.
        """
        weights = load_weights(BUNDLED if path is None else path, SYSTEM)
        model = RelationDecoder(RelationDecoderConfig(**weights.config))
        model.load_state_dict({key: value.float() for key, value in weights.state.items()})
        return cls(model, resolve_device(device))

    def save(self, path: str | Path, card: str | None = None) -> Path:
        """Write the weights in half precision."""
        return save_weights(path, self.model.state_dict(), system=SYSTEM, config=asdict(self.model.config), card=card, dtype=torch.float16)

    @torch.inference_mode()
    def probabilities(self, scene: Scene, question: Question) -> Float[np.ndarray, " objects"]:
        """Of each object as the answer; 0 for those that are no candidates.

        Raises:
            UserError: no candidate, or more classes than the network has slots.
        """
        if len(candidates(question, scene)) == 0:
            raise UserError(f"expected a {question.target} in scene {scene.name!r}; it has {', '.join(sorted(set(scene.labels)))}")
        asked = collate([asked_of(scene, question, 0, self.model.config.classes)])
        logits = self.model(type(asked)(*(value.to(self.device) for value in asked)))
        return torch.softmax(logits[0].float(), -1).cpu().numpy()

    def ask(self, scene: Scene, question: str | Question) -> Answered:
        """Answer a question in words or as a `Question`.

        Raises:
            UserError: a question that is not understood, or about objects that are not there.
        """
        asked = parse(question, scene) if isinstance(question, str) else question
        found = self.probabilities(scene, asked)
        return Answered(asked, answer(asked, scene), int(found.argmax()), float(found.max()))


def ask_command(
    sources: Sequence[Path],
    *,
    questions: Sequence[str] = (),
    demo: bool = False,
    checkpoint: Path | None = None,
    output: Path | None = None,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal graphs3d ask`` does: ``<stem>_answers.csv`` and ``<stem>_answers.png`` for every file of scenes.

    Args:
        sources: JSON and CSV files of boxes, and folders of them.
        questions: in words; none: some are drawn that the boxes answer clearly.
        demo: ask about drawn rooms instead of files.
        checkpoint: weights of ours; None is the bundled network, and where none is, the boxes alone answer.
        output: folder; None is ``answers`` here.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        seed: of what is drawn.
        overwrite: replace existing results.
        as_json: print the report for machines.

    Returns:
        The exit code: 2 where a file or a question could not be used.

    Raises:
        UserError: no inputs, no weights, or an output that cannot be written.
    """
    if demo and sources:
        raise UserError("expected files of scenes or --demo; got both")
    if not demo and not sources:
        raise UserError("expected files of scenes to ask about; got none; name some, or try --demo")
    folder = Path(output or "answers")
    inputs = [] if demo else collect_inputs(sources, SUFFIXES, apart_from=folder)
    relations = Relations.from_pretrained(checkpoint, device) if checkpoint is not None or BUNDLED.exists() else None
    output_folder(folder, overwrite)
    report = BatchReport()
    named = [Path("rooms.json")] if demo else inputs
    for path, stem in zip(named, output_names(named), strict=True):
        targets = [folder / f"{stem}_answers{ending}" for ending in (".csv", ".png")]
        if targets[0].exists() and not overwrite:
            report.kept(path, [str(target) for target in targets if target.exists()])
            continue
        with report.item(path) as entry:
            scenes = _rooms(seed) if demo else read_scenes(path)
            answered = [(scene, _ask(relations, scene, question)) for scene in scenes for question in questions or _drawn(scene, seed)]
            if not answered:
                raise UserError(f"expected scenes with several objects of a class to draw questions about in {path}; ask your own with --question")
            _write(targets, answered, entry, print_answers=bool(questions) and not as_json)
    return report.finish(as_json, {"network right %": ".1f"})


def _ask(relations: Relations | None, scene: Scene, question: str | Question) -> Answered:
    if relations is not None:
        return relations.ask(scene, question)
    asked = parse(question, scene) if isinstance(question, str) else question
    return Answered(asked, answer(asked, scene))


def _rooms(seed: int) -> list[Scene]:
    random = np.random.default_rng(seed)
    return [draw_room(random, name=f"room {place}") for place in range(DRAWN)]


def _drawn(scene: Scene, seed: int) -> list[Question]:
    return [question for question, _ in draw_questions(scene, np.random.default_rng(seed))][:ASKED]


def _write(targets: list[Path], answered: list[tuple[Scene, Answered]], entry: Entry, print_answers: bool) -> None:
    with atomic_write(targets[0]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["scene", "question", "by_boxes", "by_boxes_class", "by_network", "by_network_class", "probability"])
        for scene, one in answered:
            found = [("", "") if index is None else (scene.ids[index], scene.labels[index]) for index in (one.by_boxes, one.by_network)]
            sure = "" if one.by_network is None else f"{one.probability:.3f}"
            writer.writerow([scene.name, one.question.text, *found[0], *found[1], sure])
            if print_answers:
                said = (
                    f"the boxes say {' '.join(found[0][::-1])}" if one.by_boxes is not None else "the boxes do not decide: none does, or several do"
                )
                guess = "" if one.by_network is None else f"; the network says {' '.join(found[1][::-1])} ({100 * one.probability:.0f} %)"
                print(f"{scene.name}: {one.question.text} {said}{guess}")
    with atomic_write(targets[1]) as temporary:
        draw_answers(answered[:6]).savefig(temporary, dpi=110)
    decided = [one for _, one in answered if one.by_boxes is not None and one.by_network is not None]
    entry.outputs = [str(target) for target in targets]
    entry.numbers = {"scenes": float(len({scene.name for scene, _ in answered})), "questions": float(len(answered))}
    if decided:
        entry.numbers["network right %"] = 100 * float(np.mean([one.by_network == one.by_boxes for one in decided]))


def draw_answers(answered: Sequence[tuple[Scene, Answered]]) -> Figure:
    """Scenes from above: the object that the network points at is filled, the one that the boxes say has a thick frame."""
    columns = min(3, len(answered))
    rows = -(-len(answered) // columns)
    corners = [scene.corners() for scene, _ in answered]
    # rooms keep their proportions: rows as high as the longest room needs
    tall = max(float((np.ptp(high[:, 1]) + 1) / (np.ptp(high[:, 0]) + 1)) for _, high in corners)
    figure = Figure(figsize=(4.6 * columns, (4.0 * min(tall, 1.5) + 0.9) * rows), layout="constrained")
    for axes, (scene, one) in zip(figure.subplots(rows, columns, squeeze=False).flat, answered, strict=False):
        low, high = scene.corners()
        named = {label.lower() for label in one.question.others}
        for index in np.argsort(high[:, 2], kind="stable"):
            size = high[index] - low[index]
            face = "C1" if index == one.by_network else "C0" if scene.labels[index].lower() in named else "0.88"
            edge, width = ("C2", 3.0) if index == one.by_boxes else ("0.45", 0.8)
            axes.add_patch(Rectangle((low[index, 0], low[index, 1]), size[0], size[1], facecolor=face, edgecolor=edge, linewidth=width, alpha=0.8))
            if len(scene) <= 40:
                axes.annotate(scene.labels[index], scene.centers[index, :2], ha="center", va="center", fontsize=7)
        axes.set(xlim=(low[:, 0].min() - 0.3, high[:, 0].max() + 0.3), ylim=(low[:, 1].min() - 0.3, high[:, 1].max() + 0.3), aspect="equal")
        axes.set_title(one.question.text, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("x (m)", fontsize=8)
        axes.set_ylabel("y (m)", fontsize=8)
    for axes in list(figure.axes)[len(answered) :]:
        axes.set_axis_off()
    figure.suptitle(
        "From above. Blue: what the question names. Green frame: the boxes' answer. Orange: the network's, where there is one.", fontsize=9
    )
    return figure
