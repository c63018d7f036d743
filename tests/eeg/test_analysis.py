"""Figures about a vocabulary, against small cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveal.eeg.analysis import (
    BANDS,
    class_distinctiveness,
    class_token_uniqueness,
    codebook_use,
    consistency,
    frequency_content,
    histograms,
    sequence_entropy,
)


def test_use_counts_ids_and_leaves_missing_ones_out():
    use = codebook_use(np.array([[[0, 0, 1, 1, -1]]]), 8)
    assert use == {"tokens": 4.0, "used": 2.0, "utilisation": 0.25, "perplexity": pytest.approx(2.0)}


def test_histograms_are_shares_of_the_tokens_that_are_there():
    found = histograms(np.array([[[0, 0, 1, -1]], [[-1, -1, -1, -1]]]), 3)
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3, 0], [0, 0, 0]], rtol=1e-6)


def test_an_id_of_one_class_only_speaks_for_it_and_a_shared_one_for_none():
    ids = np.array([[[0, 2]] * 3] * 10 + [[[1, 2]] * 3] * 10)
    labels = np.array([0] * 10 + [1] * 10)
    table = class_distinctiveness(ids, labels, 4, ["a", "b"]).set_index(["class", "token"])
    assert table.loc[("a", 0), "z"] > 2
    assert table.loc[("b", 1), "z"] > 2
    assert table.loc[("a", 1), "z"] == pytest.approx(-table.loc[("b", 1), "z"])
    assert table.loc[("a", 2), "log_odds"] == pytest.approx(0)
    assert table.loc[("a", 0), "unique"]
    assert not table.loc[("a", 2), "unique"]
    assert class_token_uniqueness(table.reset_index()).to_dict() == {"a": 0.5, "b": 0.5}


def test_windows_of_a_class_with_ids_of_its_own_are_each_others_neighbours():
    generator = np.random.default_rng(0)
    ids = np.concatenate([generator.integers(0, 4, (12, 2, 6)), generator.integers(4, 8, (12, 2, 6)), generator.integers(0, 8, (3, 2, 6))])
    labels = np.array([0] * 12 + [1] * 12 + [-1] * 3)
    table = consistency(ids, labels, 8, ["a", "b"])
    assert table["precision@5"].tolist() == [1.0, 1.0]
    assert table["chance"].tolist() == [0.5, 0.5]
    shuffled = consistency(generator.integers(0, 8, (300, 2, 6)), generator.integers(0, 2, 300), 8, ["a", "b"])
    assert (abs(shuffled["precision@5"] - shuffled["chance"]) < 0.1).all()


def test_the_spectrum_of_an_id_has_the_peak_that_its_decoder_gives_it(tiny_tokenizer, monkeypatch):
    model = tiny_tokenizer.model
    spectrum = torch.zeros(model.config.codes, model.config.bins, 1)
    spectrum[:, 3] = 6.0  # what all have does not stand out
    spectrum[3, :, 0], spectrum[7, :, 0] = 0, 0
    spectrum[3, 10], spectrum[7, 20] = 5.0, 5.0
    monkeypatch.setattr(type(model), "decode", lambda self, vectors: spectrum)
    table = frequency_content(model, np.array([3, 7]))
    assert table["peak_hz"].tolist() == [10.0, 20.0]
    np.testing.assert_allclose(table["centroid_hz"], [10, 20])
    assert table.loc[0, "alpha"] == table.loc[1, "beta"] == 1
    assert table.loc[0, [band for band in BANDS if band != "alpha"]].sum() == 0


def test_saying_one_thing_over_and_over_has_no_entropy():
    found = sequence_entropy(np.array([[[5, 5, 5, 5], [1, 2, 1, 2], [-1, -1, -1, -1]]]))
    np.testing.assert_allclose(found, [[0, 1, 0]], atol=1e-12)
