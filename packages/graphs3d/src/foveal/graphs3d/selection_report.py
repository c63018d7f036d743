"""Whether a selection was any good: what classifiers reach on held-out rows after it, after all rows, after as many by chance; and its picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

#: Classifiers that a subset is judged by. Boosting's leaves are small, or it could learn nothing from a few dozen rows.
CLASSIFIERS: dict[str, Callable[[], ClassifierMixin]] = {
    "kNN": lambda: KNeighborsClassifier(3),
    "SVM": lambda: SVC(),
    "random forest": lambda: RandomForestClassifier(100, random_state=0),
    "gradient boosting": lambda: HistGradientBoostingClassifier(max_iter=50, min_samples_leaf=5, early_stopping=False, random_state=0),
}

#: Rows of a larger table that the report is made on.
MOST_ROWS = 10_000
#: Points that are drawn.
MOST_POINTS = 4_000
#: Classes that get a colour and a bar; the others share one.
MOST_CLASSES = 10


def accuracies(
    x: Float[np.ndarray, "rows features"],
    y: Int[np.ndarray, " rows"],
    held_x: Float[np.ndarray, "held features"],
    held_y: Int[np.ndarray, " held"],
    names: Sequence[str] = tuple(CLASSIFIERS),
) -> dict[str, float]:
    """Share of held-out rows that each classifier gets right after learning from `x` and `y`. One class alone is always answered."""
    found = {}
    for name in names:
        if len(np.unique(y)) < 2:
            found[name] = float((held_y == y[0]).mean())
            continue
        model: Any = CLASSIFIERS[name]()
        if name == "kNN" and len(y) < model.n_neighbors:
            model.set_params(n_neighbors=len(y))
        found[name] = float((model.fit(x, y).predict(held_x) == held_y).mean())
    return found


def stratified_sample(y: Int[np.ndarray, " rows"], count: int, random: np.random.Generator) -> Int[np.ndarray, " kept"]:
    """`count` rows by chance in their classes' proportions, at least one a class."""
    order = random.permutation(len(y))
    place = np.empty(len(y))
    for one in np.unique(y):
        members = order[y[order] == one]
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
        place[members[0]] = -1
    return np.sort(np.argsort(place, kind="stable")[: max(count, len(np.unique(y)))])


def before_and_after(
    x: Float[np.ndarray, "rows features"], y: Int[np.ndarray, " rows"], select: Callable[[np.ndarray], np.ndarray], seed: int
) -> dict[str, dict[str, float]]:
    """Accuracy on 30 % of the rows, held out, of classifiers that learn from the others: all, those that `select` keeps, as many by chance.

    Args:
        x: the encoded table.
        y: codes of its classes.
        select: some rows, to those of them that it keeps without seeing the others.
        seed: of the split.
    """
    random = np.random.default_rng(seed)
    some = stratified_sample(y, MOST_ROWS, random) if len(x) > MOST_ROWS else np.arange(len(y))
    common = some[np.bincount(y[some])[y[some]] > 1]
    stratify = y[common] if 0.3 * len(common) >= len(np.unique(y[common])) else None
    learn, held = train_test_split(common, test_size=0.3, stratify=stratify, random_state=seed)
    kept = select(np.sort(learn))
    chance = learn[stratified_sample(y[learn], len(kept), random)]
    return {name: accuracies(x[rows], y[rows], x[held], y[held]) for name, rows in (("all", learn), ("kept", kept), ("by chance", chance))}


def draw_selection(
    x: Float[np.ndarray, "rows features"],
    y: Int[np.ndarray, " rows"],
    classes: Sequence[Any],
    kept: Int[np.ndarray, " kept"],
    accuracy: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Kept and dropped rows in two dimensions, the classes' shares, and accuracy before and after.

    Args:
        x: the encoded table.
        y: codes of its classes.
        classes: their names.
        kept: indices.
        accuracy: as `before_and_after` gives it.
    """
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    points, balance, scores = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    frequent = np.argsort(-np.bincount(y, minlength=len(classes)), kind="stable")[:MOST_CLASSES]
    random = np.random.default_rng(0)
    shown_all = random.permutation(len(x))[:MOST_POINTS]
    shown_kept = random.permutation(kept)[: MOST_POINTS // 2]
    plane = PCA(2, random_state=0).fit(x[shown_all]) if min(x.shape) >= 2 else None

    def place(rows: np.ndarray) -> np.ndarray:
        return plane.transform(x[rows]) if plane is not None else np.column_stack((x[rows, 0], np.zeros(len(rows))))

    for rows, style in ((shown_all, {"s": 7, "alpha": 0.25, "linewidths": 0}), (shown_kept, {"s": 24, "edgecolors": "black", "linewidths": 0.7})):
        at, colour = place(rows), np.full(len(rows), "0.7", dtype=object)
        for index, one in enumerate(frequent):
            colour[y[rows] == one] = f"C{index}"
        points.scatter(at[:, 0], at[:, 1], c=colour.tolist(), rasterized=True, **style)
    points.set_title(f"{len(kept):,} of {len(x):,} rows kept (outlined)", loc="left")
    points.set(xlabel="first principal component", ylabel="second")
    points.tick_params(labelbottom=False, labelleft=False)

    width, names = 0.4, [str(classes[one])[:18] for one in frequent]
    for shift, rows, label, alpha in ((-width / 2, np.arange(len(y)), "before", 0.45), (width / 2, kept, "after", 1.0)):
        shares = np.bincount(y[rows], minlength=len(classes))[frequent] / len(rows)
        colours = [f"C{index}" for index in range(len(frequent))]
        balance.bar(np.arange(len(frequent)) + shift, 100 * shares, width, color=colours, alpha=alpha, label=label)
    balance.set_xticks(
        np.arange(len(frequent)), names, rotation=30 if max(map(len, names)) > 4 else 0, ha="right" if max(map(len, names)) > 4 else "center"
    )
    more = f", {len(frequent)} most frequent classes" if len(classes) > len(frequent) else ""
    balance.set_title(f"Class shares, pale before, full after (%){more}", loc="left")

    places, width = np.arange(len(CLASSIFIERS)), 0.27
    for index, (name, shade) in enumerate((("all", "0.75"), ("kept", "C0"), ("by chance", "C1"))):
        values = [100 * accuracy[name][classifier] for classifier in CLASSIFIERS]
        bars = scores.bar(
            places + (index - 1) * width, values, width, color=shade, label={"all": "all rows", "kept": "selected"}.get(name, "as many by chance")
        )
        scores.bar_label(bars, fmt="%.1f", fontsize=6.5)
    scores.set_xticks(places, list(CLASSIFIERS), fontsize=8)
    scores.set_ylim(0, 118)
    scores.legend(fontsize=8, ncols=3, loc="upper center", frameon=False)
    scores.set_title("Accuracy on held-out rows (%)", loc="left")
    return figure
