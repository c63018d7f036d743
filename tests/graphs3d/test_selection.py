"""GAIS: what it keeps, that it obeys imbalanced-learn and scikit-learn, and tables that are hard to select from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn.utils.estimator_checks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imblearn.pipeline import make_pipeline
from imblearn.utils.estimator_checks import parametrize_with_checks
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.datasets import load_iris, make_blobs, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from foveal.graphs3d import GAIS
from foveal.graphs3d.coverage import cover
from foveal.graphs3d.data.partitions import VARIANTS, graph_of, hash_codes, hashed, stratified
from foveal.graphs3d.data.tables import encode
from foveal.graphs3d.models.gat import SelectionGAT, SelectionGATConfig
from foveal.graphs3d.selection_report import stratified_sample

QUICK = {"n_steps": 5, "random_state": 0}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(rows: int = 300, centers: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return make_blobs(rows, n_features=5, centers=centers, cluster_std=1.5, random_state=seed)


@parametrize_with_checks([GAIS(n_steps=1, random_state=0)])
def test_it_obeys_what_imbalanced_learn_asks_of_a_sampler(estimator, check):
    check(estimator)


SCIKIT_LEARNS = list(sklearn.utils.estimator_checks.estimator_checks_generator(GAIS(n_steps=1, random_state=0), legacy=True, mark="skip"))


@pytest.mark.parametrize(("estimator", "check"), SCIKIT_LEARNS, ids=lambda value: getattr(getattr(value, "func", None), "__name__", "GAIS"))
def test_it_obeys_what_scikit_learn_asks_of_an_estimator(estimator, check):
    check(estimator)


# --- how many, of which class --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_keeps_the_asked_share_of_every_class(variant):
    x, y = make_classification(700, 8, n_informative=5, n_classes=3, weights=[0.6, 0.3, 0.1], random_state=0)
    sampler = GAIS(variant=variant, batch_size=128, reduction=0.8, **QUICK)
    kept_x, kept_y = sampler.fit_resample(x, y)
    assert len(kept_y) == 140
    assert np.abs(np.bincount(kept_y) - 0.2 * np.bincount(y)).max() <= 1
    assert np.array_equal(kept_x, x[sampler.sample_indices_])
    assert sorted(sampler.ranking_) == list(range(700))
    assert sampler.importance_.shape == (700,)
    assert ((sampler.importance_ >= 0) & (sampler.importance_ <= 1)).all()


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(20, 120), size=st.integers(3, 20), seed=st.integers(0, 50))
def test_exactly_as_many_rows_are_kept_as_asked_for(rows, size, seed):
    x, y = blobs(rows, seed=seed)
    _, kept = GAIS(n_samples=size, n_steps=0, random_state=seed).fit_resample(x, y)
    assert len(kept) == size
    assert set(kept) == set(y)


def test_a_smaller_selection_is_part_of_a_larger_one():
    x, y = blobs()
    sampler = GAIS(reduction=0.7, **QUICK)
    sampler.fit_resample(x, y)
    first = [sampler.ranking_[y[sampler.ranking_] == one][:30] for one in range(3)]
    assert set(np.concatenate(first)) == set(sampler.sample_indices_)


def test_with_a_tolerance_the_smallest_sufficient_share_is_kept():
    x, y = make_blobs(400, n_features=4, centers=2, cluster_std=0.5, random_state=1)
    sampler = GAIS(tolerance=0.01, **QUICK)
    _, kept = sampler.fit_resample(x, y)
    assert len(kept) <= 8  # two clouds far apart
    hard, labels = make_classification(400, 6, n_informative=3, flip_y=0.0, class_sep=1.2, random_state=0)
    _, kept = sampler.fit_resample(hard, labels)
    shares, scores = zip(*sampler.tolerance_curve_, strict=True)
    assert shares[-1] == 1
    assert len(kept) == round(400 * shares[-2])
    assert scores[-2] >= scores[-1] - 0.01
    assert all(score < scores[-1] - 0.01 for score in scores[:-2])


def test_classes_that_are_not_to_be_thinned_stay_whole():
    x, y = make_classification(400, 6, n_informative=4, weights=[0.9], random_state=0)
    _, kept = GAIS(sampling_strategy="not minority", **QUICK).fit_resample(x, y)
    assert (kept == 1).sum() == (y == 1).sum()
    assert (kept == 0).sum() == pytest.approx(0.1 * (y == 0).sum(), abs=1)


# --- which rows ----------------------------------------------------------------------------------------------------------------------------


def test_rows_with_a_wrong_label_are_doubted_and_left_out():
    x, y = make_blobs(400, n_features=4, centers=[[0] * 4, [4] * 4], random_state=0)
    wrong = np.random.default_rng(0).permutation(400)[:40]
    y[wrong] = 1 - y[wrong]
    sampler = GAIS(random_state=0, n_steps=80)
    sampler.fit_resample(x, y)
    right = np.setdiff1d(np.arange(400), wrong)
    assert sampler.confidence_[wrong].max() < 0.5 < np.quantile(sampler.confidence_[right], 0.02)
    assert sampler.attention_[wrong].mean() < sampler.attention_[right].mean()
    assert not set(wrong) & set(sampler.sample_indices_)


def test_rows_whose_class_the_network_cannot_tell_are_not_taken_for_wrong_ones():
    # Half of each of six classes has a cloud of its own, the other halves share one: nothing there says that a label is wrong.
    random = np.random.default_rng(0)
    y = np.tile(np.arange(6), 100)
    shared = np.arange(600) >= 300
    x = random.normal(0, 1, (600, 2)) + np.where(shared, 0, 20)[:, None] * np.stack((np.cos(y * np.pi / 3), np.sin(y * np.pi / 3)), 1)
    sampler = GAIS(random_state=0, n_steps=80)
    sampler.fit_resample(x, y)
    assert (sampler.confidence_[shared] < 0.5).mean() > 0.8
    kept = sampler.sample_indices_[shared[sampler.sample_indices_]]
    assert set(y[kept]) == set(range(6))


def test_a_classifier_learns_more_from_it_than_from_as_many_rows_by_chance():
    x, y = make_classification(1500, 10, n_informative=6, n_classes=3, n_clusters_per_class=2, flip_y=0.1, random_state=3)
    train, test = slice(0, 1000), slice(1000, None)
    sampler = GAIS(reduction=0.95, random_state=0)
    kept = LogisticRegression().fit(*sampler.fit_resample(x[train], y[train])).score(x[test], y[test])
    chance = [
        LogisticRegression().fit(x[train][rows], y[train][rows]).score(x[test], y[test])
        for rows in (np.random.default_rng(seed).permutation(1000)[:50] for seed in range(10))
    ]
    assert kept > np.mean(chance) + 0.02


def test_mini_batches_do_not_all_keep_the_same_middle_of_a_class():
    # Each part of 128 holds six rows of a class. Were each to keep the most central of its six, the corners of a class would be left to nobody.
    random = np.random.default_rng(0)
    y = np.repeat(np.arange(20), 100)
    x = random.random((2000, 2)) + 1.5 * np.stack((y % 5, y // 5), 1)
    sampler = GAIS(reduction=0.9, batch_size=128, **QUICK)
    sampler.fit_resample(x, y)

    def way_to_the_nearest_kept(kept: np.ndarray) -> float:
        return float(np.mean([cdist(x[y == one], x[kept[y[kept] == one]]).min(1).mean() for one in range(20)]))

    by_chance = [way_to_the_nearest_kept(stratified_sample(y, 200, np.random.default_rng(seed))) for seed in range(5)]
    assert way_to_the_nearest_kept(sampler.sample_indices_) < 0.85 * np.mean(by_chance)


def test_a_tolerance_is_measured_on_enough_rows_of_a_small_table(monkeypatch):
    # A quarter of iris is 38 rows, each 2.6 points: one split would let chance decide.
    x, y = load_iris(return_X_y=True)
    measured = []
    score = KNeighborsClassifier.predict
    monkeypatch.setattr(KNeighborsClassifier, "predict", lambda self, rows: (measured.append(len(rows)), score(self, rows))[1])
    sampler = GAIS(tolerance=0.02, **QUICK)
    sampler.fit_resample(x, y)
    assert sum(measured) / len(sampler.tolerance_curve_) >= 150


def test_the_same_seed_keeps_the_same_rows_whatever_the_global_generators_do():
    x, y = blobs()
    torch.manual_seed(1)
    first = GAIS(**QUICK)
    first.fit_resample(x, y)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = clone(first)
    second.fit_resample(x, y)
    assert np.array_equal(first.sample_indices_, second.sample_indices_)
    assert np.array_equal(first.importance_, second.importance_)
    assert torch.equal(state, torch.get_rng_state())
    other = GAIS(n_steps=5, random_state=1)
    other.fit_resample(x, y)
    assert not np.array_equal(first.importance_, other.importance_)


def test_a_hidden_label_does_not_reach_the_row_it_is_hidden_from():
    x, y = blobs(60)
    graph = graph_of(encode(pd.DataFrame(x)), y, 6, [])
    torch.manual_seed(0)
    network = SelectionGAT(SelectionGATConfig(5, 3)).eval()
    hidden = torch.zeros(60, dtype=torch.bool)
    hidden[7] = True
    changed = graph.labels.clone()
    changed[7] = (changed[7] + 1) % 3
    before, after = (network(graph.x, labels, hidden, graph.edges, graph.edge).logits for labels in (graph.labels, changed))
    assert torch.equal(before, after)
    shown = network(graph.x, changed, ~hidden, graph.edges, graph.edge).logits
    assert not torch.equal(network(graph.x, graph.labels, ~hidden, graph.edges, graph.edge).logits, shown)


def test_attention_of_a_row_adds_up_to_one():
    x, y = blobs(80)
    graph = graph_of(encode(pd.DataFrame(x)), y, 7, [])
    network = SelectionGAT(SelectionGATConfig(5, 3)).eval()
    attention = network(graph.x, graph.labels, torch.ones(80, dtype=torch.bool), graph.edges, graph.edge).attention
    paid = torch.zeros(80).index_add(0, graph.edges.edge_index()[1], attention)
    torch.testing.assert_close(paid, torch.ones(80))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 14), count=st.integers(1, 14), seed=st.integers(0, 99))
def test_lazy_admission_is_the_greedy_order(rows, count, seed):
    random = np.random.default_rng(seed)
    similarity, demand = random.random((rows, rows)), random.random(rows)
    order = cover(similarity, demand, count)
    assert sorted(order) == list(range(rows))
    covered = np.zeros(rows)
    for row in order[: min(rows, count)]:
        gains = [demand @ np.maximum(similarity[:, other] - covered, 0) for other in range(rows)]
        assert gains[row] >= max(gains) - 1e-9
        covered = np.maximum(covered, similarity[:, row])


def test_mini_batches_have_every_class_in_its_proportion():
    y = np.repeat([0, 1, 2], [600, 300, 100])
    parts = stratified(y, 100, np.random.default_rng(0))
    assert len(parts) == 10
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert all(np.array_equal(np.bincount(y[part]), [60, 30, 10]) for part in parts)


def test_rows_that_are_near_share_a_hash_bucket_more_often():
    random = np.random.default_rng(0)
    centres = random.normal(0, 5, (20, 8))
    owner = np.repeat(np.arange(20), 50)
    x = (centres[owner] + random.normal(0, 0.1, (1000, 8))).astype(np.float32)
    parts = hashed(hash_codes(x, 12, random), 50, random)
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert np.mean([np.bincount(owner[part]).max() / len(part) for part in parts]) > 0.6


# --- what goes in comes out ------------------------------------------------------------------------------------------------------------------


def mixed_table() -> tuple[pd.DataFrame, pd.Series]:
    random = np.random.default_rng(0)
    kind = random.integers(0, 2, 200)
    table = pd.DataFrame(
        {
            "length": kind * 3 + random.normal(size=200),
            "colour": pd.Categorical(np.where(random.random(200) < 0.9, np.array(["red", "blue"])[kind], "green")),
            "sold": pd.Timestamp("2024-01-01") + pd.to_timedelta(random.integers(0, 300, 200), unit="D"),
            "note": [f"row {place}" for place in range(200)],
            "flag": random.random(200) < 0.5,
        },
        index=pd.RangeIndex(1000, 1200),
    )
    return table, pd.Series(np.array(["ja", "nein"])[kind], index=table.index, name="answer")


def test_frames_of_mixed_types_come_back_with_their_types_and_index():
    x, y = mixed_table()
    sampler = GAIS(**QUICK)
    kept_x, kept_y = sampler.fit_resample(x, y)
    assert kept_x.dtypes.equals(x.dtypes)
    assert kept_x.index.equals(kept_y.index)
    pd.testing.assert_frame_equal(kept_x, x.iloc[sampler.sample_indices_])
    assert set(kept_y) == {"ja", "nein"}


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.csc_array, scipy.sparse.coo_array])
def test_sparse_rows_stay_sparse(form):
    x, y = make_classification(300, 40, n_informative=10, random_state=0)
    x[np.abs(x) < 0.8] = 0
    sampler = GAIS(**QUICK)
    kept, _ = sampler.fit_resample(form(x), y)
    assert scipy.sparse.issparse(kept)
    np.testing.assert_array_equal(kept.toarray(), x[sampler.sample_indices_])


def test_a_wide_sparse_table_is_projected_and_not_filled_in():
    x = scipy.sparse.random(200, 50_000, density=0.001, format="csr", random_state=0)
    kept, _ = GAIS(**QUICK).fit_resample(x, np.arange(200) % 3)
    assert kept.shape == (20, 50_000)


def test_it_is_a_step_of_a_pipeline():
    x, y = load_iris(return_X_y=True)
    assert make_pipeline(GAIS(reduction=0.8, random_state=0, n_steps=30), LogisticRegression()).fit(x, y).score(x, y) > 0.9


def test_a_category_counts_as_much_as_a_number_and_a_name_not_at_all():
    x, _ = mixed_table()
    encoded = encode(x)
    assert encoded.shape == (200, 1 + 3 + 1 + 2)
    coded = encode(x[["colour"]])
    red, blue = (np.flatnonzero(x["colour"] == colour)[0] for colour in ("red", "blue"))
    assert np.square(coded[red] - coded[blue]).sum() == pytest.approx(2)
    number = encode(x[["length"]])
    assert np.square(number[:, None] - number[None]).mean() == pytest.approx(2, rel=0.01)


# --- tables that are hard to select from -------------------------------------------------------------------------------------------------


def test_one_class_only_is_refused():
    with pytest.raises(ValueError, match=r"at least two classes; all 20 are of class 'a'"):
        GAIS().fit_resample(np.random.default_rng(0).random((20, 3)), np.full(20, "a"))


@pytest.mark.parametrize("more", [{}, {"tolerance": 0.02}])
def test_a_class_with_one_member_is_kept(more):
    x, y = blobs(200, 2)
    y[17] = 9
    _, kept = GAIS(**QUICK, **more).fit_resample(x, y)
    assert (kept == 9).sum() == 1


def test_constant_columns_change_nothing():
    x, y = blobs()
    first, second = GAIS(**QUICK), GAIS(**QUICK)
    first.fit_resample(x, y)
    second.fit_resample(np.column_stack((x, np.full(300, 7.0), np.zeros(300))), y)
    assert np.array_equal(first.sample_indices_, second.sample_indices_)


def test_a_table_of_constants_is_refused():
    with pytest.raises(ValueError, match="every column is constant"):
        GAIS().fit_resample(np.ones((50, 3)), np.arange(50) % 2)


def test_missing_values_are_refused_or_filled_in_for_the_distances_alone():
    x, y = blobs()
    x[5, 2] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        GAIS(**QUICK).fit_resample(x, y)
    frame = pd.DataFrame(x, columns=list("abcde")).assign(word="w")
    with pytest.raises(ValueError, match="NaN, first in column 'c'"):
        GAIS(**QUICK).fit_resample(frame, y)
    kept, _ = GAIS(missing="impute", reduction=0.0, **QUICK).fit_resample(x, y)
    assert np.isnan(kept[5, 2])
    assert len(kept) == 300


def test_text_and_other_classes_come_back_as_they_were():
    x, y = blobs()
    names = np.array(["swan", "goose", "duck"])[y]
    _, kept = GAIS(**QUICK).fit_resample(x, names)
    assert kept.dtype == names.dtype
    assert set(kept) == set(names)
    _, numbers = GAIS(**QUICK).fit_resample(x, y * 10 - 7)
    assert set(numbers) == {-7, 3, 13}


def test_more_features_than_rows():
    x, y = make_classification(30, 600, n_informative=20, random_state=0)
    kept, labels = GAIS(**QUICK).fit_resample(x, y)
    assert kept.shape == (3, 600)
    assert set(labels) == {0, 1}


def test_duplicated_rows_with_different_labels_are_no_obstacle():
    x = np.repeat(np.random.default_rng(0).random((20, 3)), 10, axis=0)
    y = np.tile([0, 1], 100)
    sampler = GAIS(**QUICK)
    sampler.fit_resample(x, y)
    assert len(sampler.sample_indices_) == 20
    assert np.isfinite(sampler.importance_).all()


def test_a_continuous_target_and_impossible_sizes_are_refused():
    x, y = blobs()
    with pytest.raises(ValueError, match="Unknown label type"):
        GAIS().fit_resample(x, y + 0.5 * np.random.default_rng(0).random(300))
    with pytest.raises(ValueError, match="up to the number of rows, 300; got 301"):
        GAIS(n_samples=301).fit_resample(x, y)
    with pytest.raises(ValueError, match="cannot be kept"):
        GAIS(n_samples=2, n_steps=0).fit_resample(x, y)
    with pytest.raises(ValueError, match="variant"):
        GAIS(variant="tree").fit_resample(x, y)
