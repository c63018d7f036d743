"""GAIS, graph attention-based instance selection, as a sampler of imbalanced-learn: a small part of a table that teaches a classifier as well.

Rustamov, Zaitouny and Zaki, arXiv 2502.20293 (and 2412.19201): build graphs on the rows (inside class-stratified mini-batches, or hash buckets),
train a graph attention network on the labels, keep the rows that its attention and confidence single out. No code and no details are published;
what the abstracts leave open is this package's own design: how labels are hidden, what importance is, and that rows are admitted by coverage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from imblearn.under_sampling.base import BaseCleaningSampler
from imblearn.utils import check_sampling_strategy, check_target_type
from jaxtyping import Float, Int
from sklearn.base import clone
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.random_projection import GaussianRandomProjection
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from foveal.core.device import resolve_device
from foveal.graphs3d.coverage import cover
from foveal.graphs3d.data.partitions import VARIANTS, Graph, graph_of, partitions
from foveal.graphs3d.data.tables import WIDEST, encode
from foveal.graphs3d.models.gat import SelectionGAT, SelectionGATConfig
from foveal.graphs3d.tasks.selection import train

#: Parts that the network is trained on; a larger table only has more of them scored.
TRAINING_PARTS = 32
#: Passes over a part, each of which hides a share of its labels, so that each row is inferred once without its own.
FOLDS = 4
#: Shares of the rows that a tolerance is tried at.
LADDER = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)
#: Rows that a tolerance is measured on, or about: a small table is split anew until there are as many, at most so often.
HELD_OUT, MOST_SPLITS = 400, 5


class GAIS(BaseCleaningSampler):
    """Graph attention-based instance selection.

    >>> X_small, y_small = GAIS(reduction=0.9, random_state=0).fit_resample(X, y)

    How much is kept: `n_samples` if given, else what `tolerance` needs if given, else ``1 - reduction``. Classes keep their proportions, and at
    least one row each. Time and memory are linear in the rows, memory beyond the table's own is that of one part.

    Args:
        sampling_strategy: classes that are thinned, as in imbalanced-learn ("all", "not minority", a list, ...); rows of others all stay.
        variant: how the table is cut into parts. "mini_batch": by class-stratified chance, distances inside a part. "single_level": by a hash of
            random hyperplanes. "multi_level": the same, neighbours sought in buckets of several granularities. "multi_view": several hashes,
            ranks averaged.
        reduction: share of the rows to leave out, 0 to 1.
        n_samples: rows to keep.
        tolerance: points of accuracy (0.01 is one in a hundred) that may be lost on held-out rows; the smallest subset that keeps to it is taken.
            Small tables are split several times to measure it.
        estimator: classifier that `tolerance` is measured with; None is three nearest neighbours on the encoded table.
        scoring: "attention" that rows of the same class pay to a row, "confidence" in its class without having been told it, or "both".
        coverage: admit rows so that together they cover the others of their class (facility location), the more the higher those score; False takes
            the best scores.
        batch_size: rows in a part.
        n_neighbors: of a row in the graph.
        n_bits: of a hash.
        n_levels: of "multi_level".
        n_views: of "multi_view".
        hidden: width of the network.
        n_heads: attention heads.
        n_layers: graph attention layers.
        dropout: of the network.
        learning_rate: of Adam.
        n_steps: of training.
        missing: "raise" refuses missing values, "impute" takes the median and, for categories, a value of their own. Kept rows are as given.
        device: "cpu", "cuda[:N]" or "auto".
        random_state: seed; two runs with the same one are equal.

    Attributes:
        sample_indices_: kept rows, ascending.
        importance_: of each row by `scoring`, 0 to 1.
        ranking_: all rows, those that are admitted first coming first; the first of each class for any smaller subset.
        confidence_: the network's probability of each row's own class, its label hidden.
        attention_: that each row gets from rows of its class, over the most of its part.
        losses_: of training.
        tolerance_curve_: with `tolerance`: (share kept, accuracy on held-out rows, mean of the splits); the last is of all rows.
    """

    _parameter_constraints: ClassVar[dict] = {
        "sampling_strategy": BaseCleaningSampler._parameter_constraints["sampling_strategy"],
        "variant": [StrOptions(set(VARIANTS))],
        "reduction": [Interval(Real, 0, 1, closed="left")],
        "n_samples": [Interval(Integral, 1, None, closed="left"), None],
        "tolerance": [Interval(Real, 0, 1, closed="left"), None],
        "estimator": [HasMethods(["fit", "predict"]), None],
        "scoring": [StrOptions({"attention", "confidence", "both"})],
        "coverage": ["boolean"],
        "batch_size": [Interval(Integral, 16, None, closed="left")],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "n_bits": [Interval(Integral, 1, 62, closed="both")],
        "n_levels": [Interval(Integral, 1, None, closed="left")],
        "n_views": [Interval(Integral, 1, None, closed="left")],
        "hidden": [Interval(Integral, 1, None, closed="left")],
        "n_heads": [Interval(Integral, 1, None, closed="left")],
        "n_layers": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "n_steps": [Interval(Integral, 0, None, closed="left")],
        "missing": [StrOptions({"raise", "impute"})],
        "device": [str],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        *,
        sampling_strategy: Any = "all",
        variant: str = "mini_batch",
        reduction: float = 0.9,
        n_samples: int | None = None,
        tolerance: float | None = None,
        estimator: Any = None,
        scoring: str = "both",
        coverage: bool = True,
        batch_size: int = 512,
        n_neighbors: int = 12,
        n_bits: int = 12,
        n_levels: int = 3,
        n_views: int = 3,
        hidden: int = 32,
        n_heads: int = 4,
        n_layers: int = 2,
        dropout: float = 0.2,
        learning_rate: float = 0.01,
        n_steps: int = 120,
        missing: str = "raise",
        device: str = "cpu",
        random_state: Any = None,
    ) -> None:
        super().__init__(sampling_strategy=sampling_strategy)
        self.variant = variant
        self.reduction = reduction
        self.n_samples = n_samples
        self.tolerance = tolerance
        self.estimator = estimator
        self.scoring = scoring
        self.coverage = coverage
        self.batch_size = batch_size
        self.n_neighbors = n_neighbors
        self.n_bits = n_bits
        self.n_levels = n_levels
        self.n_views = n_views
        self.hidden = hidden
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.n_steps = n_steps
        self.missing = missing
        self.device = device
        self.random_state = random_state

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, Any]:
        """Keep the rows that matter.

        Args:
            X: (rows, features): an array, a sparse matrix, or a DataFrame of any column types.
            y: (rows,): classes, numbers or text; or their one-vs-all indicators.

        Returns:
            Kept rows of X and of y, of the types given; a DataFrame's index says which they were.

        Raises:
            ValueError: fewer than two classes, missing values, shapes that do not fit, or parameters out of range.
        """
        self._validate_params()
        check_classification_targets(y)
        checked, labels, _ = self._check_X_y(X, y)
        classes, codes = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"expected rows of at least two classes; all {len(codes)} are of class {classes[:1].tolist()[0]!r}: there is nothing to tell apart"
            )
        self.sampling_strategy_ = check_sampling_strategy(self.sampling_strategy, labels, self._sampling_type)
        random = np.random.default_rng(check_random_state(self.random_state).randint(2**31))
        x = self._encoded(checked, random)
        share = self._share_kept(x, codes, random)
        self.ranking_, self.importance_, self.confidence_, self.attention_, self.losses_ = self._rank(x, codes, share, random)
        thinned = np.isin(classes, list(self.sampling_strategy_))
        self.sample_indices_ = _first_of_each(self.ranking_, codes, share, thinned, self.n_samples)
        given = checked if scipy.sparse.issparse(X) else X  # not every sparse format can be indexed
        return _safe_indexing(given, self.sample_indices_), _safe_indexing(y, self.sample_indices_)

    def _fit_resample(self, X: Any, y: Any, **params: Any) -> tuple[Any, Any]:
        """What imbalanced-learn's base class would call."""
        return self.fit_resample(X, y)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.sampler_tags.sample_indices = True
        tags.input_tags.allow_nan = self.missing == "impute"
        tags.input_tags.sparse = True
        return tags

    def _check_X_y(self, X: Any, y: Any, accept_sparse: Any = None) -> tuple[Any, Any, bool]:
        labels, binarized = check_target_type(y, indicate_one_vs_all=True)
        finite = True if self.missing == "raise" else "allow-nan"
        if isinstance(X, pd.DataFrame) and not all(pd.api.types.is_numeric_dtype(kind) for kind in X.dtypes):
            validate_data(self, X=X, y=labels, reset=True, skip_check_array=True)
            if len(X) != len(labels):
                raise ValueError(f"expected as many labels as rows; got {len(labels)} labels for {len(X)} rows")
            empty = X.isna().any()
            if self.missing == "raise" and empty.any():
                raise ValueError(f"Input X contains NaN, first in column {empty.idxmax()!r}; fill it, or take missing='impute'")
            return X, labels, binarized
        checked, labels = validate_data(
            self, X=X, y=labels, reset=True, accept_sparse="csr", ensure_all_finite=finite, dtype=[np.float64, np.float32], ensure_min_samples=2
        )
        return checked, labels, binarized

    # --- the table as points -------------------------------------------------------------------------------------------------------------

    def _encoded(self, table: Any, random: np.random.Generator) -> Float[np.ndarray, "rows features"]:
        if scipy.sparse.issparse(table) and table.shape[1] > WIDEST:
            # Centring would fill the zeros in, and distances do not need it: columns are scaled, then projected.
            mean = np.asarray(table.mean(0)).ravel()
            deviation = np.sqrt(np.maximum(np.asarray(table.multiply(table).mean(0)).ravel() - mean**2, 0))
            x = table @ scipy.sparse.diags(1 / np.where(deviation > 0, deviation, 1.0))
        elif scipy.sparse.issparse(table):
            x = encode(pd.DataFrame(table.toarray()))
        else:
            x = encode(table if isinstance(table, pd.DataFrame) else pd.DataFrame(table))
        if x.shape[1] > WIDEST:
            seed = int(random.integers(2**31))
            x = GaussianRandomProjection(WIDEST, random_state=seed).fit_transform(x)
        return np.ascontiguousarray(x, dtype=np.float32)

    # --- how much ------------------------------------------------------------------------------------------------------------------------

    def _share_kept(self, x: np.ndarray, codes: np.ndarray, random: np.random.Generator) -> float:
        if self.n_samples is not None:
            if self.n_samples > len(x):
                raise ValueError(f"expected n_samples up to the number of rows, {len(x)}; got {self.n_samples}")
            return self.n_samples / len(x)
        return 1 - self.reduction if self.tolerance is None else self._share_within_tolerance(x, codes, random)

    def _share_within_tolerance(self, x: np.ndarray, codes: np.ndarray, random: np.random.Generator) -> float:
        """The smallest share on the ladder that keeps to the tolerance on rows that neither the ranking nor the classifier saw."""
        alone = np.isin(codes, np.flatnonzero(np.bincount(codes) < 2))
        several = np.flatnonzero(~alone)
        splits = []
        for _ in range(min(MOST_SPLITS, max(1, round(HELD_OUT / (0.25 * len(several)))))):
            learn, held = train_test_split(several, test_size=0.25, stratify=_splittable(codes[several]), random_state=int(random.integers(2**31)))
            learn = np.sort(np.concatenate((learn, np.flatnonzero(alone))))
            within = np.unique(codes[learn], return_inverse=True)[1]
            splits.append((learn, within, self._rank(x[learn], within, max(LADDER), random)[0], held))

        def accuracy(share: float) -> float:
            found = []
            for learn, within, ranking, held in splits:
                rows = learn[_first_of_each(ranking, within, share, np.ones(within.max() + 1, dtype=bool))] if share < 1 else learn
                model = KNeighborsClassifier(min(3, len(rows))) if self.estimator is None else clone(self.estimator)
                found.append((model.fit(x[rows], codes[rows]).predict(x[held]) == codes[held]).mean())
            return float(np.mean(found))

        full = accuracy(1.0)
        self.tolerance_curve_: list[tuple[float, float]] = []
        for share in LADDER:
            self.tolerance_curve_.append((share, accuracy(share)))
            if self.tolerance_curve_[-1][1] >= full - float(self.tolerance or 0):
                break
        else:
            share = 1.0
        self.tolerance_curve_.append((1.0, full))
        return share

    # --- which ---------------------------------------------------------------------------------------------------------------------------

    def _rank(self, x: np.ndarray, codes: np.ndarray, share: float, random: np.random.Generator) -> tuple[Any, ...]:
        """Order of admission, importance, confidence and attention of all rows, and the losses of training."""
        device = resolve_device(self.device)
        cuts = list(
            partitions(
                x, codes, variant=self.variant, size=self.batch_size, bits=self.n_bits, levels=self.n_levels, views=self.n_views, random=random
            )
        )
        of_training = [(part, finer) for parts, finer in cuts for part in parts]
        chosen = random.permutation(len(of_training))[:TRAINING_PARTS]
        graphs = [self._graph(x, codes, *of_training[place]) for place in chosen]
        sizes = SelectionGATConfig(x.shape[1], int(codes.max()) + 1, self.hidden, self.n_heads, self.n_layers, self.dropout)
        task = train(graphs, sizes, steps=self.n_steps, learning_rate=self.learning_rate, seed=int(random.integers(2**31)), device=device)
        confidence, doubt, attention = (np.zeros(len(x), np.float32) for _ in range(3))
        for parts, finer in cuts:
            for part in parts:
                sure, denied, heard = _score(task.network, self._graph(x, codes, part, finer).to(device), random)
                confidence[part] += sure / len(cuts)
                doubt[part] += denied / len(cuts)
                attention[part] += heard / len(cuts)
        importance = self._importance(confidence, attention)
        places = np.zeros(len(x))
        for parts, _ in cuts:
            for rows in self._blocks(parts, codes, random):
                order = self._order(x[rows], doubt[rows] > 0.5, importance[rows], share)
                places[rows[order]] += (np.arange(len(rows)) + 0.5) / len(rows) / len(cuts)
        return np.lexsort((-importance, places)), importance, confidence, attention, task.losses

    def _graph(self, x: np.ndarray, codes: np.ndarray, part: np.ndarray, finer: list[np.ndarray]) -> Graph:
        return graph_of(x[part], codes[part], self.n_neighbors, [code[part] for code in finer])

    def _importance(self, confidence: np.ndarray, attention: np.ndarray) -> np.ndarray:
        # Equal parts would crowd the subset around a few rows that everybody looks at; a tenth decides between rows of like confidence.
        if self.scoring == "confidence":
            return confidence
        return attention if self.scoring == "attention" else confidence * (9 + attention) / 10

    def _blocks(self, parts: list[np.ndarray], codes: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
        """Rows of one class among which admission is decided.

        A hash bucket is a region, and its own rows cover it. A mini-batch is everywhere: were each to admit its two or three rows of a class, all
        would take them from the same middle. So rows of a class are dealt out anew, in blocks as large as a part.
        """
        if self.variant == "mini_batch":
            for one in np.unique(codes):
                members = random.permutation(np.flatnonzero(codes == one))
                yield from np.array_split(members, max(1, round(len(members) / self.batch_size)))
        else:
            for part in parts:
                yield from (part[codes[part] == one] for one in np.unique(codes[part]))

    def _order(self, x: np.ndarray, doubted: np.ndarray, importance: np.ndarray, share: float) -> np.ndarray:
        """Order of admission of the rows of one class; those that the network takes for one other class come last, not those it knows none for."""
        if not self.coverage:
            return np.argsort(-importance, kind="stable")
        orders, wanted = [], min(len(x), int(np.ceil(share * len(x))) + 1)
        for rows in (np.flatnonzero(~doubted), np.flatnonzero(doubted)):
            if len(rows):
                points = torch.from_numpy(x[rows])
                distances = torch.cdist(points, points, compute_mode="use_mm_for_euclid_dist").numpy()
                # Importance says who is to be covered, not who covers: typical rows in the middle would else stand for all, however many are kept.
                orders.append(rows[cover(_similarity(distances), importance[rows], wanted)])
                wanted = max(0, wanted - len(rows))
        return np.concatenate(orders)


def _similarity(distances: Float[np.ndarray, "rows rows"]) -> Float[np.ndarray, "rows rows"]:
    """Falling in a straight line from 1 on a row itself to 0 at the farthest."""
    farthest = distances.max()
    return 1 - distances / (farthest if farthest > 0 else 1.0)


@torch.no_grad()
def _score(network: SelectionGAT, graph: Graph, random: np.random.Generator) -> tuple[Float[np.ndarray, " rows"], ...]:
    """Of each row, the probability of its own class without its label, that of the likeliest other class, and the attention that rows of its class
    pay to it, over the most in the part.
    """
    rows = torch.arange(len(graph.x), device=graph.x.device)
    fold = torch.from_numpy(random.permutation(len(rows)) % FOLDS).to(rows.device)
    source, target = graph.edges.edge_index()
    alike = graph.labels[source] == graph.labels[target]
    confidence, doubt, attention = (torch.zeros(len(rows), device=rows.device) for _ in range(3))
    for index in range(min(FOLDS, len(rows))):
        hidden = fold == index
        scored = network(graph.x, graph.labels, hidden, graph.edges, graph.edge)
        probability = scored.logits.softmax(-1)
        confidence[hidden] = probability[rows, graph.labels][hidden]
        doubt[hidden] = probability.scatter(1, graph.labels[:, None], 0.0).amax(1)[hidden]
        counted = alike & hidden[target]
        attention.index_add_(0, source[counted], scored.attention[counted])
    return confidence.cpu().numpy(), doubt.cpu().numpy(), (attention / attention.max().clamp(min=1e-12)).cpu().numpy()


def _splittable(codes: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"] | None:
    """Classes to stratify a split by, or None where the held-out quarter has no room for each."""
    return codes if len(codes) // 4 >= len(np.unique(codes)) else None


def _first_of_each(
    ranking: Int[np.ndarray, " rows"], codes: Int[np.ndarray, " rows"], share: float, thinned: np.ndarray, total: int | None = None
) -> Int[np.ndarray, " kept"]:
    """The first rows of each thinned class in proportion to its size, at least one, and all rows of the others; ascending."""
    sizes = np.bincount(codes)
    exact = np.where(thinned, share * sizes, sizes)
    counts = np.maximum(np.floor(exact).astype(int), 1)
    wanted = total if total is not None else round(exact.sum())
    # The largest remainders get what rounding down left over.
    for one in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        if counts.sum() >= wanted:
            break
        counts[one] += bool(thinned[one] and counts[one] < sizes[one])
    if total is not None:
        counts = _exactly(counts, sizes, thinned, total)
    kept: list[np.ndarray] = []
    by_class = codes[ranking]
    kept = [ranking[by_class == one][: counts[one]] for one in range(len(sizes))]
    return np.sort(np.concatenate(kept))


def _exactly(counts: np.ndarray, sizes: np.ndarray, thinned: np.ndarray, total: int) -> np.ndarray:
    """Counts that add up to `total`, as far as one row a class and whole classes allow."""
    while counts.sum() != total:
        grow = counts.sum() < total
        able = thinned & ((counts < sizes) if grow else (counts > 1))
        if not able.any():
            raise ValueError(
                f"n_samples={total} cannot be kept: classes that are thinned keep at least one row each, the others all ({Counter(sizes.tolist())})"
            )
        fullest = np.where(able, counts / sizes, np.inf if grow else -np.inf)
        counts[fullest.argmin() if grow else fullest.argmax()] += 1 if grow else -1
    return counts
