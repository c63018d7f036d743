"""Scores that mean what they say, and decisions that leave the doubtful to people.

A network's probabilities are made honest by one number (temperature scaling, Guo et al., ICML 2017), fitted on labelled memes that it was not
trained on. Two thresholds then make three zones: below the lower a meme passes, above the upper it is flagged, between them somebody looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from sklearn.metrics import precision_recall_curve

from foveal.core.errors import UserError
from foveal.core.files import atomic_write

DECISIONS = ("pass", "review", "flag")
#: Labelled memes below which thresholds would be noise.
FEWEST = 30


@dataclass(frozen=True)
class Calibration:
    """How a task's log-odds become a probability and a decision.

    Attributes:
        task: what is decided.
        temperature: log-odds are divided by it.
        pass_below: probability below which a meme passes.
        flag_above: probability from which a meme is flagged.
        fitted_on: labelled memes that temperature and thresholds were fitted on; 0: they are defaults.
        goal: what the thresholds were chosen for.
    """

    task: str
    temperature: float = 1.0
    pass_below: float = 0.35
    flag_above: float = 0.65
    fitted_on: int = 0
    goal: str = "defaults"

    def __post_init__(self) -> None:
        if not 0 <= self.pass_below <= self.flag_above <= 1 or self.temperature <= 0:
            raise UserError(
                f"expected 0 <= pass_below <= flag_above <= 1 and a temperature above 0; got {self.pass_below}, {self.flag_above}, {self.temperature}"
            )

    def probability(self, log_odds: Float[ndarray, " memes"]) -> Float[ndarray, " memes"]:
        """Probability of the task's class 1."""
        return expit(np.asarray(log_odds, dtype=np.float64) / self.temperature)

    def decide(self, probability: float) -> str:
        """pass, review or flag."""
        return "flag" if probability >= self.flag_above else "pass" if probability < self.pass_below else "review"

    def save(self, path: str | Path) -> None:
        """Write as JSON.

        Raises:
            UserError: it cannot be written.
        """
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or one of another form.
        """
        file = Path(path)
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"expected a calibration file; {file}: {error.strerror}; check the path") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"expected a calibration file written by foveal memes calibrate; {file}: {str(error)[:100]}; fit it again") from None


def fit_temperature(log_odds: Float[ndarray, " memes"], labels: Int[ndarray, " memes"]) -> float:
    """The temperature at which the labels are likeliest, from 1/20 to 20."""
    signed = np.where(np.asarray(labels) > 0, 1.0, -1.0) * np.asarray(log_odds, dtype=np.float64)
    found = minimize_scalar(lambda power: -log_expit(signed / np.exp(power)).mean(), bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))


def fit(
    task: str,
    log_odds: Float[ndarray, " memes"],
    labels: Int[ndarray, " memes"],
    *,
    precision: float | None = 0.9,
    recall: float | None = 0.9,
    review_share: float | None = None,
) -> Calibration:
    """Temperature and thresholds from labelled memes.

    Args:
        task: what is decided.
        log_odds: of class 1.
        labels: 0 or 1.
        precision: of what is flagged, at least; where no threshold reaches it nothing is flagged.
        recall: of what is flagged or reviewed, at least.
        review_share: share of memes that people can look at; it replaces `recall`: the memes nearest to the flagged ones are reviewed.

    Raises:
        UserError: fewer than 30 memes, or only one class among them; a share that is none.
    """
    for name, share in (("precision", precision), ("recall", recall), ("review share", review_share)):
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"expected a {name} from 0 to 1; got {share:g}")
    labels = np.asarray(labels).astype(int)
    if len(labels) < FEWEST or len(np.unique(labels)) < 2:
        raise UserError(
            f"expected at least {FEWEST} labelled memes of both classes to fit thresholds; got {len(labels)} of {len(np.unique(labels))}; label more"
        )
    temperature = fit_temperature(log_odds, labels)
    probability = Calibration(task, temperature).probability(log_odds)
    precisions, recalls, thresholds = precision_recall_curve(labels, probability)
    enough = np.flatnonzero(precisions[:-1] >= (precision or 0.0))
    flag = float(thresholds[enough[0]]) if len(enough) else 1.0
    if review_share is not None:
        count = round(review_share * len(labels))
        rest = np.sort(probability[probability < flag])[::-1]
        low = flag if count == 0 or not len(rest) else float(rest[min(count, len(rest)) - 1])
        goal = f"precision of flags {precision:g}, {review_share:.0%} reviewed"
    else:
        kept = np.flatnonzero(recalls[:-1] >= (recall or 0.0))
        low = float(thresholds[kept[-1]]) if len(kept) else 0.0
        goal = f"precision of flags {precision:g}, recall of flags and reviews {recall:g}"
    return Calibration(task, temperature, min(low, flag), flag, len(labels), goal)


def expected_calibration_error(probability: Float[ndarray, " memes"], labels: Int[ndarray, " memes"], bins: int = 10) -> float:
    """Mean distance between what was predicted and what happened, over bins of equally many memes."""
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    return float(sum(len(part) * abs(probability[part].mean() - np.asarray(labels)[part].mean()) for part in parts) / max(1, len(order)))


def bootstrap(
    statistic: Callable[[Bool[ndarray, " memes"]], float], memes: int, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of a figure over memes drawn again with replacement; draws for which the figure is undefined are left out.

    Args:
        statistic: indices of memes -> the figure.
        memes: how many there are.
        draws: how often.
        level: share of the draws inside.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        try:
            values.append(statistic(generator.integers(memes, size=memes)))
        except ValueError:  # one class only
            continue
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
