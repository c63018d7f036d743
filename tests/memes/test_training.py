"""Recipes train, tests report, checkpoints become weights that score the same."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas
import pytest
import torch
from PIL import Image, ImageDraw

from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.memes.data.features import Batch, Corpus, Encoding, MemeFeatures, leaked
from foveal.memes.data.records import Meme
from foveal.memes.models.tcrnet import TCRNetConfig
from foveal.memes.scoring import Network, ScorerConfig
from foveal.memes.store import Store
from foveal.memes.tasks.classification import MemeTask, log_odds
from foveal.memes.tasks.export import export
from foveal.memes.tasks.report import MemeReport, scores_of

CONFIGS = Path(__file__).parents[2] / "configs" / "memes"
LEVELS = ("not harmful", "somewhat harmful", "very harmful")


@pytest.fixture(scope="module")
def harmeme(tmp_path_factory) -> dict[str, Path]:
    """Files of HarMeme's form with harmless words."""
    folder = tmp_path_factory.mktemp("harmeme")
    files = {}
    for part, count in (("train", 48), ("val", 40), ("test", 24)):
        lines = []
        for place in range(count):
            level = LEVELS[place % 3]
            labels = [level] if level == LEVELS[0] else [level, ("individual", "society")[place % 2]]
            words = ("a quiet garden", "a noisy engine", "a very loud drum")[place % 3]
            lines.append({"id": f"{part}{place}", "image": f"{place}.png", "labels": labels, "text": f"{words} number {place} {part}"})
        files[part] = folder / f"{part}.jsonl"
        files[part].write_text("\n".join(map(json.dumps, lines)))
    return files


def small(files: dict[str, Path], runs: Path, verb: str = "fit", *more: str) -> list[str]:
    options = [verb, "--config", str(CONFIGS / "harmeme_small.yaml"), "--runs", str(runs), "--trainer.enable_progress_bar", "false"]
    for name, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        options += [f"--data.init_args.{name}", json.dumps([{"kind": "harmeme", "file": str(files[part])}])]
    return [*options, "--data.init_args.cache", str(runs / "cache.sqlite"), *more]


def test_memes_of_all_processes_are_measured_once_and_in_their_order(monkeypatch) -> None:
    task = MemeTask(TCRNetConfig({"text": 4, "reason": 4}, {"a": 2}, width=8, heads=2, hidden=4), {"a": ["n", "y"]})
    logits, labels = torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1])
    shares = []
    for places in ([0, 2, 4], [1, 3, 0]):  # the last share is filled up with the first meme again
        pick = torch.tensor(places)
        task._collect(Batch({}, {}, {"a": labels[pick]}, pick), {"a": logits[pick]})
        shares.append(task._collected)
        task._collected = []
    task._trainer = type("Trainer", (), {"world_size": 2})()
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), shares))
    found, known = task._gathered()
    assert np.array_equal(found["a"], logits.numpy())
    assert known["a"].tolist() == labels.tolist()


def test_a_run_learns_reports_and_becomes_weights_that_score_the_same(harmeme, tmp_path, capsys) -> None:
    cli = FovealCLI("memes", small(harmeme, tmp_path, "fit", "--trainer.max_epochs", "12", "--data.init_args.batch_size", "8"))
    assert float(cli.trainer.callback_metrics["val/harmful/auroc"]) > 0.8  # gardens and drums are told apart
    checkpoint = next(tmp_path.rglob("best.ckpt"))
    FovealCLI("memes", small(harmeme, tmp_path, "test", "--ckpt_path", "best"))
    report = json.loads(next(tmp_path.rglob("test.json")).read_text(encoding="utf-8"))
    assert report["memes"] == 24
    low, high = report["intervals"]["harmful/auroc"]
    assert low <= report["all"]["harmful/auroc"] <= high
    for stage in ("val", "test"):  # the last validation of the training, and the test
        pictures = {path.stem.removeprefix(f"{stage}-harmful-") for path in tmp_path.rglob(f"{stage}-harmful-*.png")}
        assert pictures == {"calibration", "confusion", "curves"}
    network = Network.from_pretrained(export(checkpoint, tmp_path / "w.safetensors"), "cpu")
    assert network.calibration.fitted_on == 40
    garden, drum = network.probabilities([Meme("a", "a quiet garden number 5"), Meme("b", "a very loud drum number 5")])[1]
    assert garden < drum


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    """Folders that transformers loads as it loads the paper's encoders, of 768-wide networks with one layer and random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "sat", "on", "mat", "because", "it", "is", "loud", "quiet"]
    (folder / "vocab.txt").write_text("\n".join(words))
    layer = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    networks = {
        "bert": transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **layer)),
        "mpnet": transformers.MPNetModel(transformers.MPNetConfig(vocab_size=len(words), **layer)),
        "vit": transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **layer)),
    }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        if name == "vit":
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / name)
        else:
            transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / name)
    return {name: str(folder / name) for name in networks}


def test_the_papers_recipe_trains_from_the_corpus_own_files(encoders, tmp_path) -> None:
    """Tables and pictures as D-HUMOR's authors give them, through BERT, ViT and MPNet, to a report of all three tasks."""
    (tmp_path / "images").mkdir()
    for part, count in (("Train", 40), ("Test", 12)):
        rows = []
        for place in range(count):
            dark, name = place % 2, f"{part}{place}.png"
            Image.new("RGB", (40, 30), (40 * dark, 10 * (place % 20), 90)).save(tmp_path / "images" / name)
            words = f"the {('cat', 'dog')[dark]} sat on a mat {place}"
            target, intensity = (place % 6, 1 + place % 3) if dark else ("", "")
            explanation = f"because it is {('quiet', 'loud')[dark]}"
            rows.append({"post id": name, "Text": words, "Explanation1": explanation, "Dark": dark, "Target": target, "Intensity": intensity})
        pandas.DataFrame(rows).to_excel(tmp_path / f"{part}-Data.xlsx", index=False)
    options = ["--config", str(CONFIGS / "tcrnet_paper.yaml"), "--runs", str(tmp_path / "runs"), "--data.init_args.cache", ""]
    for name, part in (("train", "Train"), ("test", "Test")):
        corpus = {"kind": "dhumor", "file": str(tmp_path / f"{part}-Data.xlsx"), "images": str(tmp_path / "images")}
        options += [f"--data.init_args.{name}", json.dumps([corpus])]
    for side in ("model", "data"):
        encoding = {"text": f"{encoders['bert']}/cls/128", "reasons": f"{encoders['mpnet']}/cls/128", "image": encoders["vit"], "reason": "none"}
        options += [f"--{side}.init_args.encoding", json.dumps(encoding)]
    options += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    cli = FovealCLI("memes", ["fit", *options])
    assert cli.trainer.optimizers[0].defaults["lr"] == 2e-5
    assert cli.trainer.current_epoch == 5
    assert cli.datamodule.train.vectors["reason"].shape[1] == cli.datamodule.train.vectors["image"].shape[1] == 768
    assert not torch.equal(cli.datamodule.train.vectors["text"], cli.datamodule.train.vectors["reason"])
    FovealCLI("memes", ["test", *options, "--ckpt_path", "best"])
    report = json.loads(next((tmp_path / "runs").rglob("test.json")).read_text(encoding="utf-8"))
    assert {name.split("/")[0] for name in report["all"]} == {"dark", "target", "intensity"}


def test_memes_without_a_tasks_label_do_not_count_for_it() -> None:
    task = MemeTask(TCRNetConfig({"text": 4, "reason": 4}, {"a": 2, "b": 3}, width=8, heads=2, hidden=4), {"a": ["n", "y"], "b": ["1", "2", "3"]})
    logits = {"a": torch.randn(5, 2), "b": torch.randn(5, 3)}
    labels = {"a": torch.tensor([0, 1, 0, 1, 1]), "b": torch.tensor([-100, -100, 2, -100, -100])}
    expected = torch.nn.functional.cross_entropy(logits["a"], labels["a"]) + torch.nn.functional.cross_entropy(logits["b"][2:3], labels["b"][2:3])
    torch.testing.assert_close(task._loss(logits, labels), expected)


def test_a_left_out_stream_never_leaves_a_meme_with_nothing() -> None:
    task = MemeTask(TCRNetConfig({"text": 4, "reason": 4}, {"a": 2}, width=8, heads=2, hidden=4, absent=True), {"a": ["n", "y"]}, stream_dropout=0.9)
    present = {"text": torch.ones(500, dtype=torch.bool), "reason": torch.arange(500) % 2 == 0}
    vectors = {name: torch.ones(500, 4) for name in present}
    left = task._disturbed(Batch(vectors, present, {}, torch.arange(500))).present
    assert (left["text"] | left["reason"]).all()
    assert not left["text"].all()


def test_scores_are_those_of_the_definitions_and_undefined_ones_are_left_out() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 3.0], [4.0, 0.0], [9.0, 9.0]])
    labels = np.array([0, 1, 0, 1, -100])
    scores = scores_of(logits, labels, ("n", "y"))
    assert scores["accuracy"] == 0.5
    assert scores["auroc"] == 0.25
    assert scores["f1/y"] == scores["macro_f1"] == 0.5
    assert "auroc" not in scores_of(logits[:1], labels[:1], ("n", "y"))
    assert scores_of(logits[4:], labels[4:], ("n", "y")) == {}
    np.testing.assert_allclose(log_odds(logits[:2]), [-2, 1])


def test_leaked_memes_are_counted_and_left_out_of_a_second_set_of_figures() -> None:
    logits, labels = {"a": np.array([[0.0, 5.0], [0.0, 5.0], [5.0, 0.0], [5.0, 0.0]])}, {"a": np.array([1, 0, 0, 1])}
    report = MemeReport({"a": ("n", "y")}, logits, labels, np.array([False, True, False, True]))
    assert report.figures()["a/accuracy"] == 0.5
    assert report.figures(np.flatnonzero(~report.leaks))["a/accuracy"] == 1.0


def test_leaks_are_found_by_words_whatever_their_case(tmp_path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nHello there!,0\nAnother one,1\nA third,0\n")
    (tmp_path / "test.csv").write_text("text,label\nhello THERE,0\nNew words,1\n")
    train, test = (Corpus("table", str(tmp_path / f"{part}.csv"), labels={"a": "label"}) for part in ("train", "test"))
    data = MemeFeatures([train], [test], ["a"], validation=[test], cache=str(tmp_path / "c.sqlite"))
    data.setup("test")
    assert data.leaks.tolist() == [True, False]


def test_a_table_of_ones_own_may_label_in_words_and_name_its_columns(tmp_path) -> None:
    (tmp_path / "mine.csv").write_text("file,caption,mark\na.png,Zoë,rude\nb.png,,kind\nc.png,words,\n", encoding="utf-8")
    memes = Corpus(
        "table", str(tmp_path / "mine.csv"), text="caption", image="file", labels={"tone": "mark"}, classes={"tone": ["kind", "rude"]}
    ).read()
    assert [(meme.text, meme.image, meme.labels) for meme in memes] == [
        ("Zoë", tmp_path / "a.png", {"tone": 1}),
        ("", tmp_path / "b.png", {"tone": 0}),
        ("words", tmp_path / "c.png", {}),
    ]


def test_names_for_other_classes_than_the_networks_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"expected classes .*got names for \{'a': 3\}"):
        MemeTask(TCRNetConfig(widths={"text": 8, "reason": 8}, classes={"a": 2}, width=8, heads=2, hidden=8), {"a": ["x", "y", "z"]})


def _table(folder: Path, labels: list[int]) -> list[dict]:
    rows = [f"words {place},{label}" for place, label in enumerate(labels)]
    (folder / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return [{"kind": "table", "file": str(folder / "t.csv"), "labels": {"harmful": "label"}}]


@pytest.mark.parametrize(
    ("data", "model", "complaint"),
    [
        ({"encoding": {"reason": "none"}}, {}, "one encoding in model and data"),
        (
            {},
            {"network": TCRNetConfig({"text": 384, "image": 4}, {"harmful": 2})},
            "network.widths of the encoding's streams, reason, text; got image, text",
        ),
        ({"tasks": []}, {}, "harmful lack"),
        ({"labels": [0, 1, 2]}, {}, "labels of harmful from 0 to 1, as it has classes; got 2"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused_in_one_line_before_training(tmp_path, monkeypatch, data, model, complaint) -> None:
    monkeypatch.setattr(
        "foveal.memes.data.features._encode_texts", lambda texts, *_: (np.zeros((len(texts), 384), np.float32), np.ones(len(texts), bool))
    )
    corpora = [Corpus(**one) for one in _table(tmp_path, data.get("labels", [0, 1, 1]))]
    encoding = Encoding(**data.get("encoding", {}))
    features = MemeFeatures(corpora, corpora, data.get("tasks", ["harmful"]), encoding, corpora, cache="")
    task = MemeTask(**{"network": TCRNetConfig({"text": 384, "reason": 384}, {"harmful": 2}), "classes": {"harmful": ["no", "yes"]}, **model})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    with pytest.raises(UserError, match=complaint):
        pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet).fit(task, features)


def test_a_network_without_a_task_of_two_classes_decides_nothing_and_says_so() -> None:
    config = ScorerConfig(TCRNetConfig({"text": 4, "reason": 4}, {"target": 3}), {"target": ("a", "b", "c")})
    with pytest.raises(UserError, match="expected a task of two classes, which decisions are about; target has 3"):
        config.decided  # noqa: B018


def test_leaks_are_found_by_pictures_that_were_resized_and_compressed_anew(tmp_path) -> None:
    across, down = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 200))
    one = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    ImageDraw.Draw(one).ellipse((60, 40, 180, 160), fill="white")
    one.save(tmp_path / "one.png")
    one.resize((150, 100)).save(tmp_path / "copy.jpg", quality=60)
    one.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "other.png")
    train = [Meme("a", "words", image=tmp_path / "one.png")]
    test = [Meme(name, name, image=tmp_path / name) for name in ("copy.jpg", "other.png", "missing.png")] + [Meme("d", "Words!")]
    store = Store(tmp_path / "c.sqlite")
    assert leaked(train, test, store).tolist() == leaked(train, test, store).tolist() == [True, False, False, True]
