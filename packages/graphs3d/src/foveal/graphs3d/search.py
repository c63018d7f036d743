"""Bayesian search of GAIS' settings on a table with Optuna: what ``foveal graphs3d search`` does.

The published abstracts say that the hashing variants want it. A trial selects from three quarters of the rows and is scored on the last quarter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from sklearn.model_selection import train_test_split

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, output_folder
from foveal.graphs3d.data.partitions import VARIANTS
from foveal.graphs3d.data.tables import encode, read_table
from foveal.graphs3d.select import features_and_target
from foveal.graphs3d.selection import GAIS
from foveal.graphs3d.selection_report import CLASSIFIERS, accuracies, stratified_sample

if TYPE_CHECKING:
    import optuna

#: Rows of a larger table that trials run on.
MOST_ROWS = 5_000


def suggest(trial: optuna.Trial | optuna.trial.FixedTrial, reduction: float | None, variant: str | None) -> dict[str, Any]:
    """Settings of one trial; what a variant does not have is not asked for."""
    chosen = trial.suggest_categorical("variant", VARIANTS) if variant is None else variant
    found: dict[str, Any] = {
        "variant": chosen,
        "batch_size": trial.suggest_categorical("batch_size", [128, 256, 512, 1024]),
        "n_neighbors": trial.suggest_int("n_neighbors", 4, 32, log=True),
        "hidden": trial.suggest_categorical("hidden", [16, 32, 64]),
        "n_layers": trial.suggest_int("n_layers", 1, 3),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 3e-2, log=True),
        "scoring": trial.suggest_categorical("scoring", ["both", "confidence", "attention"]),
        "reduction": trial.suggest_float("reduction", 0.8, 0.98) if reduction is None else reduction,
    }
    if chosen != "mini_batch":
        found["n_bits"] = trial.suggest_int("n_bits", 4, 24)
    if chosen == "multi_level":
        found["n_levels"] = trial.suggest_int("n_levels", 2, 5)
    if chosen == "multi_view":
        found["n_views"] = trial.suggest_int("n_views", 2, 6)
    return found


def search(
    features: pd.DataFrame,
    codes: Int[np.ndarray, " rows"],
    *,
    trials: int,
    reduction: float | None,
    variant: str | None,
    classifier: str,
    seed: int,
    storage: str | None = None,
) -> tuple[dict[str, Any], optuna.Study]:
    """The best settings found, and the study.

    With a `reduction` the accuracy on held-out rows is maximised; without one, accuracy times reduction. Ctrl-C ends the search; what was found
    until then counts.

    Raises:
        UserError: Optuna is not installed, the table is too small to hold rows out, or `storage` cannot be opened.
        KeyboardInterrupt: before the first trial was done.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise UserError('expected optuna to be installed; it is not; run: pip install "foveal-graphs3d[search]"') from None
    random = np.random.default_rng(seed)
    rows = stratified_sample(codes, MOST_ROWS, random) if len(codes) > MOST_ROWS else np.arange(len(codes))
    rows = rows[np.bincount(codes[rows])[codes[rows]] > 1]
    if len(rows) < 20:
        raise UserError(f"expected at least 20 rows of classes with several members to search on; got {len(rows)}; select without a search")
    stratify = codes[rows] if len(rows) // 4 >= len(np.unique(codes[rows])) else None
    learn, held = train_test_split(rows, test_size=0.25, stratify=stratify, random_state=seed)
    x = encode(features)

    def objective(trial: optuna.Trial) -> float:
        settings = suggest(trial, reduction, variant)
        sampler = GAIS(**settings, missing="impute", random_state=seed)
        sampler.fit_resample(features.iloc[learn], codes[learn])
        kept = learn[sampler.sample_indices_]
        accuracy = accuracies(x[kept], codes[kept], x[held], codes[held], [classifier])[classifier]
        share = 1 - len(kept) / len(learn)
        trial.set_user_attr("accuracy", accuracy)
        trial.set_user_attr("reduction", share)
        return accuracy if reduction is not None else accuracy * share

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed), storage=storage, study_name="gais", load_if_exists=True
        )
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UserError(f"expected --study to be a search's file, or a new one in an existing folder; {storage}: {reason}; name another") from None
    try:
        study.optimize(objective, n_trials=trials, callbacks=[_say])
    except KeyboardInterrupt:
        if not _done(study):
            raise
        study.set_user_attr("stopped", True)
    else:
        study.set_user_attr("stopped", False)
    return suggest(optuna.trial.FixedTrial(study.best_params), reduction, variant), study


def _done(study: optuna.Study) -> int:
    return sum(trial.value is not None for trial in study.trials)


def _say(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    accuracy, reduction = (100 * trial.user_attrs[name] for name in ("accuracy", "reduction"))
    best = ", the best so far" if study.best_trial.number == trial.number else ""
    variant = trial.params.get("variant")
    chosen = f" by {variant}" if variant else ""
    print(f"trial {_done(study)}: {accuracy:.1f} % right with {reduction:.1f} % left out{chosen}{best}", file=sys.stderr)


def search_command(
    source: Path,
    *,
    target: str,
    output: Path | None = None,
    trials: int = 30,
    reduction: float | None = None,
    variant: str | None = None,
    classifier: str = "random forest",
    ignore: Sequence[str] = (),
    study: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """What ``foveal graphs3d search`` does: a JSON file that ``foveal graphs3d select --settings`` takes.

    Args:
        source: csv, tsv or parquet.
        target: column of the classes.
        output: file to write; None is ``<stem>_settings.json``, here.
        trials: how many settings are tried, beside those that `study` holds.
        reduction: share of the rows to leave out; None searches it, too.
        variant: None searches it, too.
        classifier: that accuracy is measured with.
        ignore: columns not to select by.
        study: SQLite file that keeps the trials, so that a search can go on.
        seed: of everything.
        overwrite: replace an existing file.

    Returns:
        The exit code; 130 where Ctrl-C ended the search: the best settings until then are written all the same.

    Raises:
        UserError: the table, a column, or an option cannot be used.
        KeyboardInterrupt: before the first trial was done.
    """
    place = output or Path(f"{source.stem}_settings.json")
    if place.exists() and not overwrite:
        raise UserError(f"{place} already exists; pass --overwrite to replace it, or choose another -o/--output")
    if classifier not in CLASSIFIERS:
        raise UserError(f"expected a classifier among {', '.join(CLASSIFIERS)}; got {classifier!r}")
    if reduction is not None and not 0 <= reduction < 1:
        raise UserError(f"expected --reduction from 0 to below 1; got {reduction:g}")
    if variant is not None and variant not in VARIANTS:
        raise UserError(f"expected a variant among {', '.join(VARIANTS)}; got {variant!r}")
    if trials < 1:
        raise UserError(f"expected at least one trial; got --trials {trials}")
    output_folder(place.parent)
    table = read_table(source)
    known = table[table[target].notna()] if target in table.columns else table
    features, codes, _ = features_and_target(known, target, ignore)
    settings, found = search(
        features, codes, trials=trials, reduction=reduction, variant=variant, classifier=classifier, seed=seed,
        storage=None if study is None else f"sqlite:///{study}",
    )  # fmt: skip
    best = found.best_trial
    document = {
        "settings": settings,
        "accuracy": best.user_attrs["accuracy"],
        "reduction": best.user_attrs["reduction"],
        "classifier": classifier,
        "trials": _done(found),
        "seed": seed,
    }
    with atomic_write(place) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(
        f"best of {_done(found)} trials: {100 * document['accuracy']:.1f} % of held-out rows right ({classifier}) "
        f"with {100 * document['reduction']:.1f} % of the rows left out"
    )
    print(f"{place}: use it with foveal graphs3d select {source} --target {target} --settings {place}")
    return 130 if found.user_attrs["stopped"] else 0
