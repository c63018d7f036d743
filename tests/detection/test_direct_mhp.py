"""DirectMHP: the authors' numbers from the authors' weights, their loss and its gradients, and angles that mean what is drawn."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import UserError
from foveal.detection import load_official, to_official
from foveal.detection.checkpoints import convert_file, model_from_weights, systems
from foveal.detection.checkpoints.direct_mhp import DIRECT_MHP, sizes_of
from foveal.detection.models.direct_mhp import SIZES, DirectMHP, DirectMHPConfig, axes, to_degrees, to_share
from foveal.detection.models.direct_mhp_loss import HeadPoseLoss, match


@pytest.fixture(scope="module")
def reference(golden: Any) -> Any:
    return golden("direct_mhp")


@pytest.fixture(scope="module")
def state(reference: Any) -> dict[str, torch.Tensor]:
    """The authors' state dict; anchors are constants."""
    shapes = reference.about["tiny"]["state_dict"]
    constants = to_official("direct_mhp", DirectMHP(DirectMHPConfig(0.125, 0.33)))
    drawn = reference.state({key: shape for key, shape in shapes.items() if "anchor" not in key})
    return {key: drawn.get(key, constants[key]) for key in shapes}


@pytest.fixture
def published(state: dict[str, torch.Tensor]) -> DirectMHP:
    model = load_official("direct_mhp", state)
    assert isinstance(model, DirectMHP)
    return model


@pytest.mark.parametrize(("size", "short"), [("small", "s"), ("medium", "m")])
def test_sizes_and_keys_are_those_of_the_authors_code(reference: Any, size: str, short: str) -> None:
    with torch.device("meta"):
        model, known = DirectMHP(DirectMHPConfig(*SIZES[size])), reference.about[short]
    assert sum(parameter.numel() for parameter in model.parameters()) == known["parameters"]
    theirs = to_official("direct_mhp", model)
    assert len(theirs) == known["entries"]
    if size == "small":
        assert {key: list(value.shape) for key, value in theirs.items()} == known["state_dict"]
        assert {system.name: system.parameters for system in systems()}["direct_mhp"] == known["parameters"]
    assert sizes_of(theirs) == {"width_multiple": model.config.width, "depth_multiple": model.config.depth}


def test_outputs_equal_the_authors(reference: Any, published: DirectMHP, draw: Any) -> None:
    image = draw("image", (2, 3, 128, 192))
    with torch.no_grad():
        raw, found = published.raw(image), published(image)
    for level, numbers in enumerate(raw):
        assert reference.error(f"out_raw{level}", numbers) < 1e-5
    decoded = reference.tensor("out_decoded")
    torch.testing.assert_close(found.boxes, decoded[..., :4], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.scores, decoded[..., 4] * decoded[..., 5])
    torch.testing.assert_close(to_share(found.angles), decoded[..., 6:])


@pytest.mark.parametrize(("name", "least"), [("a", 0.0), ("b", -0.5), ("c", 0.4)])
def test_the_loss_and_its_parts_equal_the_authors(reference: Any, published: DirectMHP, draw: Any, name: str, least: float) -> None:
    targets = reference.tensor("in_targets")
    targets = torch.cat((targets[:, :1], targets[:, 2:]), 1)  # there is one class
    published.double().train()
    raw = published.raw(draw("image", (2, 3, 128, 192)).double())
    cells = published.head.anchor_cells
    assert [len(match(targets, cells[level], *raw[level].shape[2:4]).picture) for level in range(4)] == reference.about["tiny"]["targets_per_level"]
    loss, parts = HeadPoseLoss(192, least=least)(raw, targets, cells)
    expected = reference.tensor(f"loss_{name}").double()
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.stack(list(parts.values())), expected[[1, 2, 4]], rtol=1e-5, atol=0)
    if name == "a":
        loss.backward()
        norms = reference.about["tiny"]["grad_norms"]
        for ours, theirs, _ in _named(published):
            gradient = published.get_parameter(ours).grad
            assert float(gradient.norm()) == pytest.approx(norms[theirs], rel=1e-4, abs=1e-9), theirs


def _named(model: DirectMHP) -> list[tuple[str, str, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    return [(ours, sources[0][0], parameters[ours]) for ours, sources in DIRECT_MHP.table(model).items() if ours in parameters]


def test_a_released_file_is_read_without_its_classes(state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' ``.pt`` is a pickled network of classes of ``models.yolo``, in half precision, inside a training checkpoint."""
    module = types.ModuleType("models.yolo")
    module.Model = kind = type("Model", (torch.nn.Module,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    root = kind()
    for key, value in state.items():
        part, (*path, leaf) = root, key.split(".")
        for name in path:
            if name not in part._modules:
                part.add_module(name, kind())
            part = part._modules[name]
        part.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.save({"epoch": -1, "model": root, "ema": None, "optimizer": None}, tmp_path / "agora_s.pt")
    monkeypatch.undo()

    convert_file("direct_mhp", tmp_path / "agora_s.pt", tmp_path / "ours.safetensors")
    back = to_official("direct_mhp", model_from_weights(tmp_path / "ours.safetensors", "direct_mhp"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key].half().to(state[key].dtype)) for key in state)


def test_anchors_are_those_that_the_weights_were_trained_with(state: dict[str, torch.Tensor]) -> None:
    wider = {**state, "model.33.anchor_grid": state["model.33.anchor_grid"] * 2, "model.33.anchors": state["model.33.anchors"] * 2}
    model = load_official("direct_mhp", wider)
    assert model.config.anchors[0][0] == (38.0, 54.0)  # type: ignore[union-attr]
    torch.testing.assert_close(model.head.anchors / model.head.anchor_cells, torch.tensor([8.0, 16, 32, 64]).view(4, 1, 1).expand(4, 3, 2))  # type: ignore[union-attr, operator]


def test_other_networks_and_sizes_are_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match="missing"):
        load_official("direct_mhp", {key: value for key, value in state.items() if "model.8." not in key})
    with pytest.raises(UserError, match="anchors must be three"):
        load_official("direct_mhp", {key: value for key, value in state.items() if "anchor" not in key}, anchors=[[[1, 2]]])
    with pytest.raises(ValueError, match="multiples of 64"):
        DirectMHP(DirectMHPConfig(0.125))(torch.zeros(1, 3, 96, 64))
    with pytest.raises(ValueError, match="width and depth must be positive"):
        DirectMHPConfig(0.0)


_ANGLES = st.tuples(st.floats(-90, 90), st.floats(-180, 180), st.floats(-90, 90))


@given(_ANGLES)
@settings(max_examples=40, deadline=None)
def test_axes_turn_by_their_angles_and_degrees_come_back(angles: tuple[float, float, float]) -> None:
    degrees = torch.tensor(angles, dtype=torch.float64)
    turned = axes(degrees)
    torch.testing.assert_close(turned.T @ turned, torch.eye(3, dtype=torch.float64))
    assert turned.det() == pytest.approx(1.0)
    torch.testing.assert_close(to_degrees(to_share(degrees)), degrees)


@pytest.mark.parametrize(
    ("angles", "nose", "chin"),
    [
        ((0, 0, 0), (0, 0, 1), (0, 1, 0)),
        ((0, 90, 0), (-1, 0, 0), (0, 1, 0)),  # turned to the picture's left
        ((0, 180, 0), (0, 0, -1), (0, 1, 0)),  # the back of the head
        ((90, 0, 0), (0, -1, 0), (0, 0, 1)),  # looking up, the chin to the viewer
        ((0, 0, 90), (0, 0, 1), (-1, 0, 0)),  # lying on a shoulder, the chin to the left
    ],
)
def test_the_nose_points_where_the_angles_say(angles: tuple[float, ...], nose: tuple[float, ...], chin: tuple[float, ...]) -> None:
    turned = axes(torch.tensor(angles, dtype=torch.float64))
    torch.testing.assert_close(turned[:, 2], torch.tensor(nose, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(turned[:, 1], torch.tensor(chin, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_yaw_on_either_side_of_the_back_of_the_head_is_near_only_when_it_is_wrapped() -> None:
    """-179 and 179 degrees are two apart."""
    model = DirectMHP(DirectMHPConfig(0.125))
    targets = torch.tensor([[0, 0.5, 0.5, 0.2, 0.2, *to_share(torch.tensor([0.0, 179.0, 0.0])).tolist()]])
    raw = [torch.zeros(1, 3, side, side, 9) for side in (16, 8, 4, 2)]
    for level in raw:
        level[..., 6:] = torch.logit(to_share(torch.tensor([0.0, -179.0, 0.0])))
    plain, wrapped = (HeadPoseLoss(128, least=-1.0, wrap_yaw=wrap)(raw, targets, model.head.anchor_cells)[1]["angles"] for wrap in (False, True))
    assert plain / wrapped == pytest.approx(358 / 2, rel=1e-3)


def test_a_batch_without_heads_teaches_that_there_are_none() -> None:
    torch.manual_seed(0)
    model = DirectMHP(DirectMHPConfig(0.125))
    loss, parts = HeadPoseLoss(64)(model.raw(torch.rand(2, 3, 64, 64)), torch.zeros(0, 8), model.head.anchor_cells)
    loss.backward()
    assert parts["boxes"] == parts["angles"] == 0
    assert loss > 0
