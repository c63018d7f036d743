"""Films: whatever the format they mean the same; patients stay in one part; classes are learnt, measured and told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.apps.main import run
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.medical.classification_metrics import film_scores
from foveal.medical.classify import FilmClassifier
from foveal.medical.data.film_tables import FilmCase, find_films
from foveal.medical.data.films import FilmAugmentation, FilmFolders, Films, LabelledFilm, split_by_patient
from foveal.medical.film_net import FilmNet, FilmNetConfig
from foveal.medical.film_plots import film_attention_figure
from foveal.medical.films import Film, FilmPreparation, collect_films, film_from_array, read_film
from foveal.medical.models.medusa import Medusa, MedusaConfig
from foveal.medical.tasks.classification import FilmTask

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "medical").glob("medusa_*.yaml"))
ATTENTION = MedusaConfig(width=4, halvings=2, map_width=3, size=16)
TINY = FilmNetConfig(backbone="mobilenet_v3_small", attention=ATTENTION)


def rendered(sick: bool, seed: int, size: int = 40) -> np.ndarray:
    """Two dark lungs in a grey chest; in the sick a white patch."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size
    film = np.full((size, size), 150.0)
    for middle in (0.3, 0.7):
        film[((rows - 0.5) / 0.35) ** 2 + ((columns - middle) / 0.15) ** 2 < 1] = 50
    if sick:
        film[((rows - 0.6) / 0.15) ** 2 + ((columns - 0.3) / 0.12) ** 2 < 1] = 220
    return (film + generator.normal(0, 8, film.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def write_dicom(tmp_path):
    """Write a film as DICOM, upright whatever `inverted` makes of its numbers; gives the file."""

    def write(pixels: np.ndarray, name: str = "film.dcm", modality: str = "DX", inverted: bool = False, patient: str = "17", **tags) -> Path:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        place = tmp_path / name
        data = FileDataset(str(place), {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Modality, data.PatientID, data.SeriesInstanceUID, data.StudyInstanceUID = modality, patient, generate_uid(), generate_uid()
        data.Rows, data.Columns, data.SamplesPerPixel = *pixels.shape[-2:], 1
        data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
        bits = pixels.dtype.itemsize * 8
        data.BitsAllocated = data.BitsStored = bits
        data.HighBit, data.PixelRepresentation = bits - 1, 0
        data.PixelData = (np.iinfo(pixels.dtype).max - pixels if inverted else pixels).tobytes()
        for tag, value in tags.items():
            setattr(data, tag, value)
        data.save_as(place, enforce_file_format=True)
        return place

    return write


@pytest.fixture
def corpus(tmp_path):
    """Write rendered films as a corpus of a layout; gives its root."""

    def write(layout: str, count: int = 12) -> Path:
        root = tmp_path / layout
        root.mkdir()
        films = [(rendered(bool(number % 2), number), number % 2) for number in range(count)]
        if layout == "medmnist":
            arrays = {}
            for part in ("train", "val", "test"):
                arrays |= {f"{part}_images": np.stack([film for film, _ in films]), f"{part}_labels": np.array([[sick] for _, sick in films])}
            np.savez(root / "some.npz", **arrays)
            return root / "some.npz"
        if layout == "folders":
            for number, (film, sick) in enumerate(films):
                (root / ("sick" if sick else "well")).mkdir(exist_ok=True)
                Image.fromarray(film).save(root / ("sick" if sick else "well") / f"{number}.png")
        elif layout == "covidx":
            for part, chosen in (("train", films[2:]), ("test", films[:2])):
                (root / part).mkdir()
                lines = []
                for number, (film, sick) in enumerate(chosen):
                    Image.fromarray(film).save(root / part / f"{part} {number}.png")
                    lines.append(f"{part}{number // 2} {part} {number}.png {'positive' if sick else 'negative'} rendered")
                (root / f"{part}_COVIDx8B.txt").write_text("\n".join(lines) + "\n")
        elif layout == "rsna":
            (root / "stage_2_train_images").mkdir()
            rows = ["patientId,x,y,width,height,Target"]
            for number, (film, sick) in enumerate(films):
                Image.fromarray(film).save(root / "stage_2_train_images" / f"patient{number}.png")
                rows += [f"patient{number},{box},2,3,4,1" for box in (1, 2)] if sick else [f"patient{number},,,,,0"]
            (root / "stage_2_train_labels.csv").write_text("\n".join(rows) + "\n")
        return root

    return write


def test_a_film_means_the_same_as_png_and_as_dicom_also_stored_inverted(tmp_path, write_dicom):
    pixels = rendered(True, 0)
    Image.fromarray(pixels).save(tmp_path / "film.png")
    as_png = read_film(tmp_path / "film.png").pixels
    for inverted in (False, True):
        film = read_film(write_dicom(pixels, inverted=inverted))
        np.testing.assert_allclose(film.pixels, as_png, atol=1e-6)
        assert film.patient == "17"


@pytest.mark.parametrize("inverted", [False, True])
def test_a_dicom_films_window_says_what_is_black_and_white(write_dicom, inverted):
    pixels = np.linspace(0, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    center = 65535 - 2047 if inverted else 2048  # the window is of the stored values
    film = read_film(write_dicom(pixels, inverted=inverted, WindowCenter=center, WindowWidth=1024)).pixels
    assert (film[pixels < 1530] == 0).all()
    assert (film[pixels > 2565] == 1).all()
    between = (pixels > 1540) & (pixels < 2550)
    np.testing.assert_allclose(film[between], (pixels[between] - 2047.5) / 1023 + 0.5, atol=2e-3)


@pytest.mark.parametrize("shape", ["stretch", "pad", "crop"])
def test_a_film_of_any_size_becomes_the_networks_square(shape):
    preparation = FilmPreparation(size=24, shape=shape, normalise="imagenet")
    film = Film(np.pad(np.ones((30, 30), np.float32), ((0, 0), (15, 15))))
    square = preparation.square(film)
    assert square.shape == (24, 24)
    middle = {"stretch": 12, "pad": 12, "crop": 24}[shape]
    assert abs(float((square[12] > 0.5).sum()) - middle) <= 1, "the bright half is the middle of a film twice as wide as high"
    assert float(square[0, 12]) == pytest.approx(0.0 if shape == "pad" else 1.0)
    expected = (float(square[3, 3]) - 0.485) / 0.229
    assert float(preparation(film)[0, 3, 3]) == pytest.approx(expected, abs=1e-5)


def test_bad_films_are_refused_in_one_line(tmp_path, write_dicom):
    (tmp_path / "letter.png").write_text("dear colleague")
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path / "blank.png")
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rest")
    frames = write_dicom(np.zeros((4, 8, 8), np.uint8), "frames.dcm", NumberOfFrames=4)
    cases = {
        tmp_path / "letter.png": "expected a picture; .*letter.png cannot be read",
        tmp_path / "scan.nii.gz": "expected a film .*got scan.nii.gz",
        tmp_path / "blank.png": "every pixel of .*blank.png has the same value",
        tmp_path / "broken.dcm": "broken.dcm",
        tmp_path / "nowhere.png": "does not exist",
        tmp_path: "is a folder",
        write_dicom(rendered(False, 0), "slice.dcm", modality="CT"): r"expected a film \(modality CR or DX\); .*slice.dcm is CT",
        frames: "holds 4 frames",
    }
    for place, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            read_film(place)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"expected a film of shape \(rows, columns\); got \(1, 1, 8, 8\)"):
        film_from_array(np.zeros((1, 1, 8, 8)))


def test_a_folder_gives_its_films_whatever_else_lies_there(tmp_path, write_dicom):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "inner").mkdir()
    Image.fromarray(rendered(False, 0)).save(tmp_path / "inner" / "a.JPG")
    write_dicom(rendered(False, 1), "IM0001")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert [path.name for path in collect_films([tmp_path])] == ["IM0001", "a.JPG"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected films .* found none"):
        collect_films([tmp_path / "empty"])


@pytest.mark.parametrize("layout", ["folders", "covidx", "rsna", "medmnist"])
def test_a_corpus_gives_every_film_with_its_class(corpus, layout):
    cases = find_films(corpus(layout), layout)
    sick = {"folders": "sick", "covidx": "positive", "rsna": "opacity", "medmnist": "1"}[layout]
    assert len(cases) == (36 if layout == "medmnist" else 12)
    assert sum(case.label == sick for case in cases) == len(cases) / 2
    for case in cases:
        bright = (case.read().pixels > 0.75).mean() > 0.02
        assert bright == (case.label == sick), case
    if layout == "covidx":
        assert {case.part for case in cases} == {"train", "test"}
        assert len({case.patient for case in cases}) == 6
        assert {case.source for case in cases} == {"rendered"}


def test_a_table_with_columns_of_any_name_is_read_and_films_without_a_finding_are_left_out(tmp_path):
    for number in range(3):
        Image.fromarray(rendered(False, number)).save(tmp_path / f"f{number}.png")
    (tmp_path / "meta.csv").write_text('Bild;Befund;wer;finding\nf0.png;normal;a;39 °C\nf1;"flu, mild";a;x\nf2.png;;b;x\n', encoding="cp1252")
    cases = find_films(tmp_path, "table", {"file": "Bild", "label": "Befund", "patient": "wer"})
    assert sorted((case.label, case.patient, case.file.name) for case in cases) == [("flu, mild", "a", "f1.png"), ("normal", "a", "f0.png")]
    with pytest.raises(UserError, match=r"expected column Herz in .*; it has Bild, Befund"):
        find_films(tmp_path, "table", {"file": "Herz"})


def test_what_is_wrong_with_a_corpus_is_said_in_one_line(tmp_path, corpus):
    root = corpus("covidx")
    (root / "train" / "train 3.png").unlink()
    with pytest.raises(UserError, match=r"expected the films that .*train_COVIDx8B.txt names.*1 are not there: train 3.png"):
        find_films(root, "covidx")
    (root / "train_COVIDx8B.txt").write_text("1 alone.png\n")
    with pytest.raises(UserError, match="expected patient, file, class and source in line 1"):
        find_films(root, "covidx")
    classes = corpus("folders")
    (classes / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected films of class empty in .*; found none"):
        find_films(classes)
    (classes / "empty").rmdir()
    with pytest.raises(UserError, match=r"expected films of every class to learn from.*; there are none of tuberculosis"):
        FilmFolders(str(classes), class_names=["well", "sick", "tuberculosis"]).setup()
    with pytest.raises(UserError, match=r"expected classes well in .*; it also has sick; see names_of_labels"):
        FilmFolders(str(classes), class_names=["well"]).setup()
    table = corpus("rsna")
    (table / "stage_2_train_labels.csv").write_text("patientId,Target\npatient0,2\n")
    with pytest.raises(UserError, match="expected Target 0 or 1"):
        find_films(table, "rsna")
    (tmp_path / "some.npz").write_text("no")
    with pytest.raises(UserError, match="expected a MedMNIST file"):
        find_films(tmp_path / "some.npz", "medmnist")
    with pytest.raises(UserError, match="does not exist"):
        find_films(tmp_path / "nowhere")


@given(seed=st.integers(0, 50), patients=st.integers(8, 40))
def test_no_patient_is_in_two_parts_and_no_film_is_lost(seed, patients):
    generator = np.random.default_rng(seed)
    cases = [
        FilmCase(f"{patient}_{film}", "ab"[patient % 2], str(patient)) for patient in range(patients) for film in range(generator.integers(1, 4))
    ]
    parts = split_by_patient(cases, 0.2, 0.2, seed)
    who = [{case.patient for case in films} for films in parts.values()]
    assert sum(map(len, who)) == len(set.union(*who))
    assert sorted(case.name for films in parts.values() for case in films) == sorted(case.name for case in cases)
    assert all({case.label for case in films} == {"a", "b"} for films in parts.values())


def test_a_patient_of_the_given_test_set_is_left_out_of_training():
    cases = [FilmCase(str(number), "ab"[number % 2], str(number // 2), part="test" if number == 0 else "train") for number in range(40)]
    parts = split_by_patient(cases, 0.2, 0.2, 0)
    assert [case.name for case in parts["test"]] == ["0"]
    assert "1" not in {case.name for case in (*parts["train"], *parts["validation"])}


def test_balanced_training_draws_a_rare_class_as_often_as_the_others():
    cases = [FilmCase(str(number), "rare" if number < 3 else "usual", str(number), pixels=rendered(False, number)) for number in range(60)]
    films = Films(cases, ["rare", "usual"], FilmPreparation(size=8), balanced=True)
    assert np.mean([films[index].label for index in range(60)]) == pytest.approx(0.5)
    assert {films[index].index for index in range(60)} >= {0, 1, 2}


def test_augmentation_moves_films_and_keeps_their_range_and_is_the_same_for_the_same_seed():
    cases = [FilmCase("one", "a", "one", pixels=rendered(True, 0))]
    plain, moved = (Films(cases, ["a"], FilmPreparation(size=32), augmentation) for augmentation in (None, FilmAugmentation()))
    torch.manual_seed(3)
    first = moved[0].image
    torch.manual_seed(3)
    torch.testing.assert_close(moved[0].image, first)
    assert not torch.allclose(first, plain[0].image, atol=0.05)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


@given(seed=st.integers(0, 30))
def test_scores_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.ones(3), 40).round(2)
    labels = generator.integers(0, 3, 40)
    labels[:3] = 0, 1, 2
    found = film_scores(torch.from_numpy(shares), torch.from_numpy(labels), ["a", "b", "c"])
    taken = shares.argmax(1)
    recalls, precisions = (
        recall_score(labels, taken, average=None, labels=[0, 1, 2]),
        precision_score(labels, taken, average=None, labels=[0, 1, 2], zero_division=np.nan),
    )
    for number, name in enumerate("abc"):
        assert found[f"sensitivity_{name}"] == pytest.approx(recalls[number])
        assert found[f"ppv_{name}"] == pytest.approx(precisions[number], nan_ok=True)
        assert found[f"auroc_{name}"] == pytest.approx(roc_auc_score(labels == number, shares[:, number]), abs=1e-6)
    assert found["accuracy"] == pytest.approx((labels == taken).mean())


def test_sure_films_are_told_apart_and_no_float64_is_asked_of_the_device():
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), function
            return out

    task = FilmTask(torch.nn.Identity())
    logits = torch.tensor([[0.0, 40.0], [0.0, 30.0], [0.0, 20.0], [0.0, -1.0]]).flip(1)  # of the first class: 1.0 in float32 but for the last
    with Refusing():
        task.validation_step(LabelledFilm(logits, torch.tensor([0, 0, 1, 1]), torch.arange(4)), 0)
    seen, labels, index = task._all_seen()
    assert index.tolist() == [0, 1, 2, 3]
    assert film_scores(seen.softmax(1), labels, ["a", "b"])["auroc_a"] == 1.0
    assert film_scores(seen.float().softmax(1), labels, ["a", "b"])["auroc_a"] < 1.0, "the case that this is about"


def test_a_class_without_films_is_unknown_and_counts_in_no_mean():
    found = film_scores(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([0, 1]), ["a", "b", "c"])
    assert np.isnan([found["sensitivity_c"], found["ppv_c"], found["auroc_c"]]).all()
    assert found["balanced_accuracy"] == found["auroc"] == 1.0


def test_backbones_of_both_libraries_take_attention_and_unknown_ones_are_refused():
    for name in ("resnet18", "timm/resnet10t"):
        network = FilmNet(FilmNetConfig(classes=3, backbone=name, attention=ATTENTION)).eval()
        assert len(network.attended(torch.rand(1, 3, 64, 64))) == 4
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    assert not isinstance(FilmNet(FilmNetConfig(backbone="resnet18", attention=None)).network, Medusa)
    with pytest.raises(UserError, match=r"did you mean .*resnet50"):
        FilmNet(FilmNetConfig(backbone="resnet5O"))
    with pytest.raises(UserError, match="expected stages for backbone vgg11"):
        FilmNet(FilmNetConfig(backbone="vgg11"))
    with pytest.raises(UserError, match=r"expected names of the backbone's stages.*; set stages"):
        FilmNet(FilmNetConfig(backbone="resnet18", stages=("layer9",)))


def test_a_backbone_starts_from_a_file_of_other_classes(tmp_path):
    import torchvision

    theirs = torchvision.models.resnet18(num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    network = FilmNet(FilmNetConfig(backbone="resnet18", attention=None), initial=str(tmp_path / "theirs.pth"))
    torch.testing.assert_close(network.network.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    torch.save({"conv1.weight": theirs.conv1.weight}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"expected weights of the backbone in .*part.pth; \d+ tensors are missing"):
        FilmNet(FilmNetConfig(backbone="resnet18", attention=None), initial=str(tmp_path / "part.pth"))


@pytest.fixture(scope="module")
def classifier() -> FilmClassifier:
    torch.manual_seed(0)
    return FilmClassifier(FilmNet(TINY), FilmPreparation(size=32), ("well", "sick"), "cpu")


def test_attention_that_is_nearly_even_is_not_drawn_as_a_finding():
    maps = {"even": np.linspace(0.5, 0.51, 16).reshape(4, 4), "uneven": np.linspace(0.1, 0.9, 16).reshape(4, 4)}
    figure = film_attention_figure(rendered(False, 0) / 255, maps, {"well": 0.3, "sick": 0.7})
    _, even, uneven, _ = figure.axes
    assert even.images[1].get_clim() == pytest.approx((0.455, 0.555))
    assert uneven.images[1].get_clim() == pytest.approx((0.1, 0.9))
    assert even.get_title() == "even: 0.500 to 0.510, even"
    assert even.images[0].get_extent() == even.images[1].get_extent(), "the map lies on the film"


def test_weights_keep_what_a_users_film_needs(classifier, tmp_path):
    again = FilmClassifier.from_pretrained(classifier.save(tmp_path / "tiny.safetensors"), "cpu")
    film = rendered(True, 1)
    assert again(film) == classifier(film)
    assert sum(again(film).values()) == pytest.approx(1.0)
    assert (again.preparation, again.class_names) == (classifier.preparation, ("well", "sick"))
    with pytest.raises(UserError, match=r"expected a film of shape \(rows, columns\); got \(2, 3, 8, 8\)"):
        again(np.zeros((2, 3, 8, 8)))


def test_the_command_goes_on_past_a_bad_film_and_keeps_what_is_there(classifier, tmp_path, capsys, write_dicom, monkeypatch):
    weights, films, out = classifier.save(tmp_path / "tiny.safetensors"), tmp_path / "films", tmp_path / "out"
    films.mkdir()
    Image.fromarray(rendered(False, 0)).save(films / "a.png")
    (films / "letter.png").write_text("dear colleague")
    write_dicom(rendered(True, 1), "films/b.dcm")
    write_dicom(rendered(True, 2), "films/slice.dcm", modality="CT")
    command = ["medical", "classify", str(films), "-o", str(out), "--checkpoint", str(weights), "--device", "cpu"]
    assert run([*command, "--json"]) == 2
    entries = {Path(entry["source"]).name: entry for entry in json.loads(capsys.readouterr().out)["files"]}
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "a.png": "done",
        "b.dcm": "done",
        "letter.png": "failed",
        "slice.dcm": "failed",
    }
    table = pd.read_csv(out / "probabilities.csv")
    assert list(table.columns) == ["film", "patient", "likeliest", "well", "sick"]
    np.testing.assert_allclose(table[["well", "sick"]].sum(axis=1), 1, atol=1e-5)
    assert {path.name for path in out.iterdir()} == {"probabilities.csv", "a_attention.png", "b_attention.png"}
    assert Image.open(out / "a_attention.png").size[0] > 600
    assert run([*command, "--json"]) == 2
    states = [entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]]
    assert sorted(states) == ["failed", "failed", "kept", "kept"]
    assert len(pd.read_csv(out / "probabilities.csv")) == 2
    monkeypatch.chdir(tmp_path)
    again = [*command[:2], "films/a.png", str(films / "a.png"), "films", *command[3:], "--json"]
    assert run(again) == 2
    assert [entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]].count("kept") == 2, "a film is the same by another name"
    assert run([*again, "--overwrite"]) == 2
    assert pd.read_csv(out / "probabilities.csv")["film"].tolist() == ["films/a.png", "films/b.dcm"]
    assert run([*command, "--overwrite"]) == 2
    capsys.readouterr()
    (tmp_path / "truth.csv").write_text(f"file,label\n{films / 'a.png'},well\n{films / 'b.dcm'},sick\n")
    assert run([*command, "--json", "--truth", str(tmp_path / "truth.csv")]) == 2
    scores = json.loads((out / "scores.json").read_text())
    likeliest = pd.read_csv(out / "probabilities.csv").set_index("film")["likeliest"]
    right = [likeliest[str(films / "a.png")] == "well", likeliest[str(films / "b.dcm")] == "sick"]
    assert (scores["films"], scores["accuracy"]) == (2, np.mean(right))
    capsys.readouterr()
    (tmp_path / "truth.csv").write_text(f"file,label\n{films / 'a.png'},ill\n")
    assert run([*command, "--truth", str(tmp_path / "truth.csv")]) == 2
    assert "expected classes well, sick in" in capsys.readouterr().err
    (out / "probabilities.csv").write_text("")
    assert run([*command, "--overwrite"]) == 2
    assert "as an earlier call wrote it; it cannot be read" in capsys.readouterr().err
    assert run(command[:3]) == 2
    assert "no weights of MEDUSA exist" in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_tests_and_its_run_classifies(config, corpus, tmp_path, capsys):
    written = yaml.safe_load(config.read_text())
    network, data = written["model"]["init_args"]["network"]["init_args"], written["data"]["init_args"]
    network["config"] |= {"backbone": "mobilenet_v3_small", "attention": {"width": 4, "halvings": 2, "map_width": 3, "size": 16}}
    network.pop("initial", None)
    data |= {"root": str(corpus(data["layout"], 16)), "batch_size": 4, "workers": 0, "preparation": {"size": 32}}
    changed, runs = tmp_path / "changed.yaml", tmp_path / "runs"
    changed.write_text(yaml.safe_dump(written))
    shared = ["--config", str(changed), "--runs", str(runs), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    shared += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    FovealCLI("medical", ["fit", *shared, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.max_epochs", "1"])
    cli = FovealCLI("medical", ["test", *shared, "--ckpt_path", "best"])
    assert 0 <= cli.trainer.callback_metrics["test/auroc"] <= 1
    table = pd.read_csv(cli.run_folder / "films.csv")
    assert len(table) == len(cli.datamodule.films("test"))
    assert (cli.run_folder / "report.html").stat().st_size > 10_000
    names = cli.datamodule.class_names
    np.testing.assert_allclose(table[names].sum(axis=1), 1, atol=1e-3)
    trained = next(runs.rglob("best.ckpt")).parent.parent
    film = tmp_path / "film.png"
    Image.fromarray(rendered(True, 0)).save(film)
    assert set(FilmClassifier.from_pretrained(trained, "cpu")(film)) == set(names)


def test_a_network_of_another_number_of_classes_is_refused_before_the_first_step(corpus, tmp_path):
    changed = tmp_path / "changed.yaml"
    written = yaml.safe_load(CONFIGS[-1].read_text())
    written["model"]["init_args"]["network"]["init_args"]["config"] |= {"classes": 3, "backbone": "mobilenet_v3_small"}
    written["data"]["init_args"] |= {"root": str(corpus("medmnist"))}
    changed.write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match=r"expected a network of 2 classes, as the films have \(normal, pneumonia\); it has 3"):
        FovealCLI("medical", ["fit", "--config", str(changed), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "1"])
