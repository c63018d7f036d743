"""Questions about where objects stand to one another, from templates, with their answers from the boxes.

Left and right are seen from the side of small y, looking along y: left is smaller x, behind is larger y. A question names classes and relations and
no attribute, so that only places can answer it; it is asked where the answer is clear by a margin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from foveal.core.errors import UserError
from foveal.graphs3d.data.scenes import Scene

#: Relation -> how it is asked, and which number of other objects it names.
TEMPLATES: dict[str, tuple[str, int]] = {
    "left": ("Which {target} is to the left of the {first}?", 1),
    "right": ("Which {target} is to the right of the {first}?", 1),
    "front": ("Which {target} is in front of the {first}?", 1),
    "behind": ("Which {target} is behind the {first}?", 1),
    "above": ("Which {target} is above the {first}?", 1),
    "below": ("Which {target} is below the {first}?", 1),
    "nearest": ("Which {target} is nearest to the {first}?", 1),
    "farthest": ("Which {target} is farthest from the {first}?", 1),
    "between": ("Which {target} is between the {first} and the {second}?", 2),
    "largest": ("Which {target} is the largest?", 0),
    "smallest": ("Which {target} is the smallest?", 0),
}
RELATIONS = tuple(TEMPLATES)
#: The target that any class answers to.
ANYTHING = "object"
#: Metres by which one object must be on a side, or nearer than the next.
MARGIN = 0.25

_WORDS = {
    "left": r"(?:to the |on the )?left of",
    "right": r"(?:to the |on the )?right of",
    "front": r"in front of",
    "behind": r"behind",
    "above": r"(?:above|over|on top of|on)",
    "below": r"(?:below|under|underneath|beneath)",
    "nearest": r"(?:the )?(?:nearest|closest)(?: to)?",
    "farthest": r"(?:the )?(?:farthest|furthest)(?: from)?",
    "between": r"between",
    "largest": r"(?:the )?(?:largest|biggest)",
    "smallest": r"(?:the )?smallest",
}


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        relation: one of `RELATIONS`.
        target: class that is asked for, or `ANYTHING`.
        others: classes that it is related to, each of one object.
    """

    relation: str
    target: str
    others: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As a person would ask."""
        return TEMPLATES[self.relation][0].format(target=self.target, **dict(zip(("first", "second"), self.others, strict=False)))


def candidates(question: Question, scene: Scene) -> Int[np.ndarray, " candidates"]:
    """Objects that the target may be."""
    same = [index for index, label in enumerate(scene.labels) if question.target.lower() in (ANYTHING, label.lower())]
    others = {label.lower() for label in question.others}
    return np.array([index for index in same if question.target != ANYTHING or scene.labels[index].lower() not in others], dtype=int)


def answer(question: Question, scene: Scene, margin: float = 0.0) -> int | None:
    """The object that answers, from the boxes; None where none does, or two do, or not by `margin` metres.

    Raises:
        UserError: a class that the scene does not have, or has several times where one is meant.
    """
    choices, others = candidates(question, scene), [_only(label, scene) for label in question.others]
    if len(choices) == 0:
        raise UserError(f"expected a {question.target} in scene {scene.name!r}; it has {', '.join(sorted(set(scene.labels)))}; ask for one of them")
    if question.relation in ("nearest", "farthest", "largest", "smallest"):
        return _extreme(question.relation, scene, choices, others, margin)
    yes, no = _holds(question.relation, scene, choices, others, margin)
    return int(choices[yes.argmax()]) if yes.sum() == 1 and no.sum() == len(choices) - 1 else None


def _only(label: str, scene: Scene) -> int:
    found = [index for index, other in enumerate(scene.labels) if other.lower() == label.lower()]
    if len(found) != 1:
        many = f"has {len(found)} of them" if found else f"has {', '.join(sorted(set(scene.labels)))}"
        raise UserError(f"expected exactly one {label} in scene {scene.name!r}; it {many}; name an object that is alone of its kind")
    return found[0]


def _extreme(relation: str, scene: Scene, choices: np.ndarray, others: list[int], margin: float) -> int | None:
    choices = np.array([index for index in choices if index not in others], dtype=int)
    if len(choices) == 0:
        return None
    if relation in ("nearest", "farthest"):
        value = np.linalg.norm(scene.centers[choices] - scene.centers[others[0]], axis=-1)
    else:
        value = np.cbrt(scene.sizes[choices].prod(-1))
        margin *= 0.4
    order = np.argsort(value if relation in ("nearest", "smallest") else -value, kind="stable")
    clear = len(order) < 2 or abs(value[order[0]] - value[order[1]]) > margin
    return int(choices[order[0]]) if clear else None


def _holds(
    relation: str, scene: Scene, choices: np.ndarray, others: list[int], margin: float
) -> tuple[Bool[np.ndarray, " choices"], Bool[np.ndarray, " choices"]]:
    """Which candidates are clearly related so, and which clearly are not."""
    away: Float[np.ndarray, "choices 3"] = scene.centers[choices] - scene.centers[others[0]]
    itself = np.isin(choices, others)
    if relation == "between":
        line = scene.centers[others[1]] - scene.centers[others[0]]
        length = max(float(np.linalg.norm(line)), 1e-9)
        along = away @ line / length**2
        aside = np.linalg.norm(away - along[:, None] * line, axis=-1) / length
        inside = (along > 0.15) & (along < 0.85) & (aside < 0.3) & ~itself
        outside = (along < 0.1) | (along > 0.9) | (aside > 0.4) | itself
        return inside, outside if margin else ~inside
    if relation in ("above", "below"):
        reach = (scene.sizes[choices, :2] + scene.sizes[others[0], :2]) / 2
        over = (np.abs(away[:, :2]) < reach).all(-1)
        up = away[:, 2] * (1 if relation == "above" else -1)
        return (over & (up > margin / 2) & ~itself), (~over | (up < -margin / 2) | itself)
    axis, sign = {"left": (0, -1), "right": (0, 1), "front": (1, -1), "behind": (1, 1)}[relation]
    side = away[:, axis] * sign
    return (side > margin) & ~itself, (side < -margin) | itself


def draw_questions(
    scene: Scene, random: np.random.Generator, relations: tuple[str, ...] = RELATIONS, tries: int = 40
) -> Iterator[tuple[Question, int]]:
    """Clear questions with at least two candidates, and their answers, in random order, until `tries` draws are used up."""
    labels, counts = np.unique(scene.labels, return_counts=True)
    single, several = labels[counts == 1], [*labels[counts > 1], ANYTHING]
    asked = set()
    for _ in range(tries):
        relation = str(random.choice(relations))
        needed = TEMPLATES[relation][1]
        if len(single) < needed:
            continue
        question = Question(relation, str(random.choice(several)), tuple(map(str, random.choice(single, needed, replace=False))))
        if question in asked or len(candidates(question, scene)) < 2:
            continue
        asked.add(question)
        found = answer(question, scene, MARGIN)
        if found is not None:
            yield question, found


def parse(text: str, scene: Scene) -> Question:
    """A question in words, as the templates ask it or near to that.

    Raises:
        UserError: no relation that is known, or classes that the scene does not have.
    """
    words = re.sub(r"\s+", " ", text.strip().rstrip("?.! ").lower())
    known = sorted({label.lower() for label in scene.labels} | {ANYTHING}, key=len, reverse=True)
    spelled = {label.lower(): label for label in scene.labels} | {ANYTHING: ANYTHING, "thing": ANYTHING, "item": ANYTHING}
    one = "(" + "|".join(map(re.escape, [*known, "thing", "item"])) + ")"
    for relation, phrase in _WORDS.items():
        count = TEMPLATES[relation][1]
        rest = "".join(f" (?:and )?(?:the |a )?{one}" for _ in range(count))
        forms = [rf"(?:which|what) {one} is {phrase}{rest}", rf"(?:the )?{one} (?:that is )?{phrase}{rest}"]
        forms.append(rf"what(?: object)?(?: is|'s) {phrase}{rest}()")
        if count == 0:
            forms.append(rf"(?:which is |what is )?{phrase} {one}")
        for form in forms:
            match = re.fullmatch(form, words)
            if match:
                groups = [group for group in match.groups() if group is not None]
                target, others = (ANYTHING, groups[:count]) if form.endswith("()") else (groups[0], groups[1:])
                return Question(relation, spelled[target], tuple(spelled[other] for other in others))
    asked = ", ".join(sorted(set(scene.labels)))
    raise UserError(
        f"expected a question such as {TEMPLATES['nearest'][0].format(target='chair', first='table')!r} with one of {', '.join(RELATIONS)} "
        f"and classes of scene {scene.name!r} ({asked}); got {text!r}; ask it that way"
    )
