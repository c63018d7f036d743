"""Scenes, questions and their answers, the decoder that learns them, annotation files and their scores."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.apps import main
from foveal.core.errors import UserError
from foveal.graphs3d.data.annotations import (
    Referral,
    read_asr,
    read_multi3drefer,
    read_object_boxes,
    read_object_features,
    read_scanrefer,
    read_sqa3d,
)
from foveal.graphs3d.data.questions import ANYTHING, RELATIONS, Question, answer, candidates, draw_questions, parse
from foveal.graphs3d.data.relations import DrawnQuestions, asked_of, collate
from foveal.graphs3d.data.rooms import CARRIERS, FURNITURE, draw_room
from foveal.graphs3d.data.scenes import Scene, read_scenes, scene_of
from foveal.graphs3d.grounding import exact_match, grounding_accuracy, multiple_grounding_f1, objects_named, overlaps
from foveal.graphs3d.models.relations import POSITIONS, RelationDecoder, RelationDecoderConfig
from foveal.graphs3d.relations import Relations

SMALL = RelationDecoderConfig(width=16, heads=2, layers=2, dims=12)


def box(label: str, center: tuple[float, float, float], size: tuple[float, float, float] = (0.5, 0.5, 0.5), identity: str | None = None) -> dict:
    return {"class": label, "center": center, "size": size, **({} if identity is None else {"id": identity})}


@pytest.fixture
def room() -> Scene:
    """A table in the middle, chairs left (0), right (1) and far behind (2), a lamp on the table (4), a bed (5)."""
    return scene_of(
        "room",
        [
            box("chair", (-2, 0.3, 0.4)), box("chair", (1.2, -0.4, 0.4)), box("chair", (0.5, 5, 0.4), (0.6, 0.6, 1.0)),
            box("table", (0, 0, 0.4), (1.4, 0.8, 0.8)), box("lamp", (0.2, 0.1, 1.1), (0.2, 0.2, 0.5)), box("bed", (4, 0, 0.3), (2, 1.6, 0.6)),
        ],
    )  # fmt: skip


# --- questions -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Which chair is to the left of the lamp?", 0),
        ("which chair is nearest to the table", 1),
        ("What chair is the closest to the bed?", 1),
        ("Which chair is farthest from the bed?", 2),
        ("Which chair is in front of the table?", 1),
        ("Which object is above the table?", 4),
        ("What is on the table?", 4),
        ("Which thing is under the lamp?", 3),
        ("Which chair is between the table and the bed?", 1),
        ("Which chair is the largest?", 2),
        ("Which chair is the smallest?", 0),
        ("What is the largest object?", 5),
    ],
)
def test_questions_in_words_are_answered_from_the_boxes(room, text, expected):
    question = parse(text, room)
    if text == "Which chair is the smallest?":  # two are of one size
        assert answer(question, room, 0.05) is None
        return
    if text == "Which chair is to the left of the lamp?":
        assert answer(question, room) == 0
    assert answer(question, room) == expected


def test_a_question_that_two_objects_answer_has_no_answer(room):
    assert answer(Question("right", "chair", ("lamp",)), room) is None  # the one at 1.2 and the one at 0.5


def test_every_template_is_understood_as_it_was_meant(room):
    for relation in RELATIONS:
        others = {"between": ("table", "bed"), "largest": (), "smallest": ()}.get(relation, ("table",))
        for target in ("chair", ANYTHING):
            question = Question(relation, target, others)
            assert parse(question.text, room) == question


def test_what_is_not_understood_or_not_there_is_said(room):
    with pytest.raises(UserError, match="expected a question such as"):
        parse("Is the chair red?", room)
    with pytest.raises(UserError, match=r"expected a question such as .* and classes of scene 'room'"):
        parse("Which sofa is nearest to the table?", room)
    with pytest.raises(UserError, match="exactly one chair in scene 'room'; it has 3"):
        answer(Question("nearest", ANYTHING, ("chair",)), room)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_drawn_questions_are_clear_and_keep_their_answer_when_the_room_is_moved(seed):
    random = np.random.default_rng(seed)
    scene = draw_room(random)
    moved = replace(scene, centers=scene.centers + np.array([5.0, -3.0, 0.7]))
    for question, found in draw_questions(scene, random):
        assert found in candidates(question, scene)
        assert answer(question, moved) == found
        assert len(candidates(question, scene)) > 1
        if question.relation in ("left", "right"):
            opposite = Question("left" if question.relation == "right" else "right", question.target, question.others)
            mirrored = replace(scene, centers=scene.centers * np.array([-1.0, 1, 1]))
            assert answer(opposite, mirrored) == found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_drawn_rooms_are_furnished_without_overlap_and_in_reach(seed):
    scene = draw_room(np.random.default_rng(seed))
    low, high = scene.corners()
    shared = overlaps(low, high, low, high) - np.eye(len(scene))
    assert shared.max() < 1e-9
    assert (scene.sizes > 0).all()
    assert (high.max(0) - low.min(0) < 8.5).all()
    for index, label in enumerate(scene.labels):
        if FURNITURE[label][3] == "floor":
            assert low[index, 2] == pytest.approx(0, abs=1e-9)
        if FURNITURE[label][3] == "top":
            under = [other for other, name in enumerate(scene.labels) if name in CARRIERS and abs(low[index, 2] - high[other, 2]) < 0.01]
            assert any(((scene.centers[index] >= low[other]) & (scene.centers[index] <= high[other]))[:2].all() for other in under)


# --- the decoder ---------------------------------------------------------------------------------------------------------------------------


def batch(seed: int = 0):
    questions = DrawnQuestions(22, 12, 6, 10, 64, RELATIONS, seed, True)
    return collate([questions[index] for index in range(22)])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("coordinates", [False, True])
def test_moving_the_whole_scene_changes_the_answer_of_the_released_form_alone(positions, coordinates):
    torch.manual_seed(0)
    model, asked = RelationDecoder(replace(SMALL, positions=positions, coordinates=coordinates)).double().eval(), batch()
    asked = asked._replace(centers=asked.centers.double(), sizes=asked.sizes.double())
    here, there = model(asked), model(asked._replace(centers=asked.centers + torch.tensor([30.0, 15.0, -10.0])))
    change = (here - there)[here.isfinite()].abs().max()
    assert change > 1e-8 if positions == "official" else change < 1e-10


@pytest.mark.parametrize("positions", ["paper", "learned"])
def test_where_an_object_stands_matters(positions):
    torch.manual_seed(0)
    model, asked = RelationDecoder(replace(SMALL, positions=positions)).eval(), batch()
    for axis in range(3):
        moved = asked.centers.clone()
        moved[:, 0, axis] += 0.37
        finite = model(asked).isfinite()
        assert (model(asked) - model(asked._replace(centers=moved)))[finite].abs().max() > 1e-4, f"coordinate {axis} has no effect"
    blind = RelationDecoder(replace(SMALL, positions="rope")).eval()
    assert torch.equal(blind(asked), blind(asked._replace(centers=asked.centers * 2)))


def test_padding_changes_no_answer():
    torch.manual_seed(0)
    model = RelationDecoder(SMALL).eval()
    random = np.random.default_rng(0)
    scenes = [draw_room(random, 5, 6), draw_room(random, 14, 16)]
    items = [asked_of(scene, Question("largest", ANYTHING), 0, 64) for scene in scenes]
    together = model(collate(items))
    for row, item in enumerate(items):
        torch.testing.assert_close(together[row, : len(item.classes)], model(collate([item]))[0], rtol=1e-4, atol=1e-4)


def test_only_candidates_can_be_the_answer(room):
    found = Relations(RelationDecoder(SMALL)).probabilities(room, Question("nearest", "chair", ("table",)))
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert (found[:3] > 0).all()
    assert (found[3:] == 0).all()


def test_two_thousand_objects_can_be_asked_about():
    random = np.random.default_rng(0)
    places = random.random((2000, 3)) * 60
    scene = scene_of("hall", [box(f"kind {index % 50}", tuple(place)) for index, place in enumerate(places)])
    found = Relations(RelationDecoder(replace(SMALL, layers=1))).ask(scene, Question("largest", "kind 7"))
    assert scene.labels[found.by_network] == "kind 7"


def test_weights_come_back_as_they_were_saved(room, tmp_path):
    torch.manual_seed(0)
    relations = Relations(RelationDecoder(SMALL))
    again = Relations.from_pretrained(relations.save(tmp_path / "w.safetensors", "a card"), "cpu")
    question = Question("nearest", "chair", ("table",))
    np.testing.assert_allclose(again.probabilities(room, question), relations.probabilities(room, question), atol=2e-3)


# --- files ---------------------------------------------------------------------------------------------------------------------------------


def test_scenes_are_read_from_every_form_of_json_and_from_csv(tmp_path, room):
    boxes = [box(label, tuple(center), tuple(size)) for label, center, size in zip(room.labels, room.centers, room.sizes, strict=True)]
    flat = [{"label": one["class"], "bbox": [*one["center"], *one["size"]]} for one in boxes]
    forms = {
        "one": {"scene": "room", "objects": boxes},
        "several": [{"scene_id": "room", "objects": boxes}],
        "boxes": boxes,
        "bbox": flat,
        "map": {"room": flat},
    }
    for name, form in forms.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(form))
        (found,) = read_scenes(tmp_path / f"{name}.json")
        assert found.labels == room.labels
        np.testing.assert_allclose(found.centers, room.centers)
        np.testing.assert_allclose(found.sizes, room.sizes)
    lines = [f"a,{one['class']},{','.join(map(str, [*one['center'], *one['size']]))}" for one in boxes]
    (tmp_path / "table.csv").write_text("\n".join(["scene,class,x,y,z,width,depth,height", *lines, "b,bin,0,0,0,1,1,1"]))
    first, second = read_scenes(tmp_path / "table.csv")
    np.testing.assert_allclose(first.centers, room.centers)
    assert (second.name, second.labels) == ("b", ("bin",))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "at least one object in scene 'x'; it is empty"),
        ([box("chair", (0, 0, 0), (0.5, -0.5, 0.5))], r"positive sizes in metres for object 0 of scene 'x' \(chair\); got \[0.5, -0.5, 0.5\]"),
        ([box("chair", (0, float("nan"), 0))], "three finite numbers for the centre of object 0"),
        ([{"center": [0, 0, 0], "size": [1, 1, 1]}], "expected a class for object 0"),
        ([{"class": "bin", "center": [0, 0, 0]}], "expected the size of object 0"),
        ([{"class": "bin", "center": [0, 0], "size": [1, 1, 1]}], "expected the centre of object 0"),
    ],
)
def test_a_scene_that_is_none_is_refused_in_one_line(tmp_path, boxes, message):
    (tmp_path / "x.json").write_text(json.dumps({"scene": "x", "objects": boxes}))
    with pytest.raises(UserError, match=message):
        read_scenes(tmp_path / "x.json")


def test_annotation_files_are_read_as_published(tmp_path):
    def write(name: str, content: object):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    scanrefer = write("s.json", [{"scene_id": "s1", "object_id": "4", "object_name": "office_chair", "ann_id": "0", "description": "the grey chair"}])
    assert read_scanrefer(scanrefer) == [Referral("s1", "the grey chair", ("4",), "office chair")]
    multi = write("m.json", [{"scene_id": "s1", "object_ids": [2, 7], "object_name": "chair", "description": "both chairs", "eval_type": "mt"}])
    assert read_multi3drefer(multi) == [Referral("s1", "both chairs", ("2", "7"), "chair", "mt")]
    asr = write("a.json", [{"scene_id": "s1", "obj_id": 3, "ref_captions": [], "prompt": "The object is left of the bed."}])
    assert read_asr(asr)[0].objects == ("3",)
    questions = write("q.json", {"questions": [{"scene_id": "s1", "situation": "I face the door.", "question": "What is left?", "question_id": 9}]})
    note = {"question_id": 9, "answers": [{"answer": "bed"}], "position": {"x": 1, "y": 2, "z": 0}, "rotation": {"_x": 0, "_y": 0, "_z": 0, "_w": 1}}
    (found,) = read_sqa3d(questions, write("n.json", {"annotations": [note]}))
    assert (found.answers, found.position, found.rotation) == (("bed",), (1.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    with pytest.raises(UserError, match="annotation of question 9"):
        read_sqa3d(questions, write("e.json", {"annotations": []}))
    with pytest.raises(UserError, match="object_id, description is missing; is it ScanRefer's file"):
        read_scanrefer(asr)


def test_features_and_boxes_of_chat_scene_are_read_without_running_code(tmp_path):
    torch.save({"scene0011_00_03": torch.arange(4.0), "scene0011_00_10": torch.ones(4)}, tmp_path / "features.pt")
    found = read_object_features(tmp_path / "features.pt")
    assert sorted(found["scene0011_00"]) == [3, 10]
    torch.save({"s": {"locs": torch.tensor([[0.0, 1, 2, 1, 1, 0]]), "objects": ["chair"]}}, tmp_path / "attributes.pt")
    scene = read_object_boxes(tmp_path / "attributes.pt")["s"]
    assert scene.labels == ("chair",)
    assert scene.sizes.min() > 0
    torch.save({"s": Referral("a", "b", ())}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="cannot be read as one"):
        read_object_features(tmp_path / "code.pt")


# --- scores --------------------------------------------------------------------------------------------------------------------------------


def test_the_first_valid_identifier_counts_and_object_zero_where_there_is_none():
    assert objects_named("It is <OBJ999> or <OBJ002>, not <OBJ001>; <OBJ002>", 3) == [2, 1]
    truth = {"s": scene_of("s", [box("a", (0, 0, 0), (1, 1, 1), "17"), box("b", (5, 0, 0), (1, 1, 1), "21")])}
    shifted = {"s": scene_of("s", [box("a", (0, 0, 0.3), (1, 1, 1)), box("b", (5, 0, 0.5), (1, 1, 1))])}  # overlaps 0.7/1.3 and 0.5/1.5
    referrals = [Referral("s", "", ("17",)), Referral("s", "", ("21",)), Referral("s", "", ("17",)), Referral("s", "", ("17",))]
    found = grounding_accuracy(["<OBJ000>", "<OBJ001>", "no idea", "<OBJ001>"], referrals, shifted, truth)
    assert found == {"Acc@0.25": 0.75, "Acc@0.5": 0.5}
    with pytest.raises(UserError, match="output for each of 4"):
        grounding_accuracy([], referrals, shifted, truth)
    with pytest.raises(UserError, match="object 99 in scene 's'"):
        grounding_accuracy([""], [Referral("s", "", ("99",))], shifted, truth)


def test_several_boxes_are_paired_one_to_one():
    scene = {"s": scene_of("s", [box("a", (3.0 * index, 0, 0), (1, 1, 1)) for index in range(3)])}
    referrals = [Referral("s", "", ("0", "1")), Referral("s", "", ()), Referral("s", "", ()), Referral("s", "", ("2",))]
    found = multiple_grounding_f1(["<OBJ000> <OBJ002>", "none", "<OBJ001>", ""], referrals, scene, scene)
    assert found["F1@0.5"] == pytest.approx((0.5 + 1 + 0 + 0) / 4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_overlap_is_the_share_of_points_in_both(seed):
    random = np.random.default_rng(seed)
    low, other = random.random((2, 3)) * 0.5, random.random((1, 3)) * 0.5
    high, other_high = low + random.random((2, 3)) * 0.5 + 0.1, other + random.random((1, 3)) * 0.5 + 0.1
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1.2, 60)] * 3, indexing="ij"), -1).reshape(-1, 3)
    inside = [((grid >= a) & (grid <= b)).all(-1) for a, b in zip([*low, *other], [*high, *other_high], strict=True)]
    found = overlaps(low, high, other, other_high)
    for index in range(2):
        expected = (inside[index] & inside[2]).sum() / (inside[index] | inside[2]).sum()
        assert found[index, 0] == pytest.approx(expected, abs=0.06)


def test_exact_match_forgives_articles_and_the_refined_one_more_words():
    outputs, answers = ["The bed.", "a brown bed", "two", ""], [["bed"], ["bed"], ["twofold"], ["bed"]]
    assert exact_match(outputs, answers) == {"EM": 0.25, "EM-R": 0.5}


# --- the command ---------------------------------------------------------------------------------------------------------------------------


def test_the_command_answers_questions_about_the_users_boxes(tmp_path, capsys):
    weights = Relations(RelationDecoder(SMALL)).save(tmp_path / "w.safetensors")
    source = tmp_path / "room.json"
    source.write_text(json.dumps([box("chair", (0, 0, 0)), box("chair", (3, 0, 0)), box("table", (3.5, 1, 0))]))
    command = [
        "graphs3d",
        "ask",
        str(source),
        "-q",
        "Which chair is nearest to the table?",
        "--checkpoint",
        str(weights),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main.run(command) == 0
    assert "the boxes say chair 1; the network says chair" in capsys.readouterr().out
    assert (tmp_path / "out" / "room_answers.png").stat().st_size > 5000
    assert (tmp_path / "out" / "room_answers.csv").read_text().splitlines()[1].startswith("room,Which chair is nearest to the table?,1,chair,")
    assert main.run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"
    assert main.run(["graphs3d", "ask", str(source), "-q", "Is it red?", "--checkpoint", str(weights), "-o", str(tmp_path / "bad")]) == 2
    assert main.run(["graphs3d", "ask", "--demo", str(source)]) == 2
    assert "files of scenes or --demo; got both" in capsys.readouterr().err
    assert main.run(["graphs3d", "ask", "--demo", "--checkpoint", str(weights), "-o", str(tmp_path / "demo"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["numbers"]["questions"] > 10


def test_scenes_of_one_name_in_two_folders_both_get_answers(tmp_path, capsys):
    weights = Relations(RelationDecoder(SMALL)).save(tmp_path / "w.safetensors")
    for folder, far in (("a", 3), ("b", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "room.json").write_text(json.dumps([box("chair", (0, 0, 0)), box("chair", (far, 0, 0)), box("table", (1.6, 0.3, 0))]))
    command = ["graphs3d", "ask", str(tmp_path / "a"), str(tmp_path / "b"), "--checkpoint", str(weights), "-o", str(tmp_path / "out"), "--json"]
    assert main.run([*command, "-q", "Which chair is nearest to the table?"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [entry["state"] for entry in files] == ["done", "done"]
    assert len({output for entry in files for output in entry["outputs"]}) == 4
