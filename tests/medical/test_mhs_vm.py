"""MHS-VM gives the authors' numbers: routes, scans, fusion, logits, losses and gradients."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foveal.core.official import to_official as mapped_back
from foveal.medical.checkpoints import load_official, mhs_vm, to_official
from foveal.medical.losses import bce_dice_loss
from foveal.medical.models.mhs_vm import MHSVM, MHSVMConfig, fuse_routes
from foveal.medical.models.scan_routes import PATTERNS, scan_routes


def official_state(reference, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The rule, with this system's offsets, factors and second names."""
    state, about = reference.state(), reference.about
    for key, (offset, factor) in about["adjust"].items():
        state[key] = (offset + factor * state[key].double()).float()
    for key, source in about["aliases"].items():
        state[key] = state[source].clone()
    return {key: value.to(dtype) for key, value in state.items()}


def official_gradients(model: MHSVM) -> dict[str, torch.Tensor]:
    table = mhs_vm.MHS_VM.table(model)
    return mhs_vm.with_second_names(mapped_back(table, {key: value.grad for key, value in model.named_parameters()}).state)


@pytest.fixture(params=["mhs_vm", "mhs_vm_three_heads"])
def reference(request, golden):
    return golden("mhs_vm", request.param)


def test_scan_orders_equal_the_generator_of_the_authors(golden):
    parts = golden("mhs_vm", "mhs_vm_parts")
    tables = [name for name in parts.arrays.files if name.startswith("out_routes_")]
    assert len(tables) == 6
    for name in tables:
        height, width = map(int, name.removeprefix("out_routes_").split("x"))
        order, _ = scan_routes(height, width, 4, torch.device("cpu"))
        np.testing.assert_array_equal(order.flatten(0, 1).numpy(), parts[name], err_msg=name)


@given(height=st.integers(1, 12), width=st.integers(1, 12))
def test_every_route_visits_every_cell_once_and_its_inverse_says_when(height, width):
    order, inverse = scan_routes(height, width, len(PATTERNS), torch.device("cpu"))
    everywhere = torch.arange(height * width).expand_as(order)
    assert torch.equal(order.sort(-1).values, everywhere)
    assert torch.equal(order.gather(-1, inverse), everywhere)


@pytest.mark.parametrize("name", ["t0", "t5", "t9"])
def test_fusion_and_its_gradient_equal_the_authors(golden, name):
    parts = golden("mhs_vm", "mhs_vm_parts")
    routes = parts.tensor(f"in_gfu_{name}").requires_grad_()
    out = fuse_routes(routes, parts.about["gfu"][name]["t"])
    assert parts.error(f"out_gfu_{name}", out) < 1e-6
    (out * parts.cotangent(f"gfu_{name}", out.shape)).sum().backward()
    assert parts.error(f"grad_input_gfu_{name}", routes.grad) < 1e-5
    assert torch.equal(out[..., 0, 0], torch.zeros_like(out[..., 0, 0])), "four equal routes give nothing"


def test_scans_maps_and_logits_equal_the_authors(reference):
    model = load_official("mhs_vm", official_state(reference), **reference.about["config"])
    found, block = {}, model.encoder[0][0]
    watched = {
        "mid_patch_embed": model.embed_norm, "mid_block0": block, "mid_down0": model.merge[0], "mid_bottom": model.encoder[-1][-1],
        "mid_up_last": model.decoder[-1][-1], "mid_final_up": model.final, "mid_attention0": None, "mid_mhs0": block.scan,
    }  # fmt: skip
    hooks = [layer.register_forward_hook(lambda _, __, out, name=name: found.update({name: out})) for name, layer in watched.items() if layer]
    hooks.append(block.norm.register_forward_hook(lambda _, __, out: found.update(mid_attention0=block.attended(out))))
    with torch.no_grad():
        image = reference.tensor("in_image", torch.float32)
        logits = model.logits(image)
        split = block.scan.split
        inputs: list[torch.Tensor] = []
        hooks.append(split.register_forward_hook(lambda _, __, out: inputs.append(out)))
        model.logits(image)
        split_maps = inputs[0].flatten(1, 2).mT.unflatten(1, (block.scan.heads, -1))
        routes = block.scan.routes(split_maps, inputs[0].shape[1:3])
    for hook in hooks:
        hook.remove()
    for head, pattern in enumerate(PATTERNS[: block.scan.heads]):
        assert reference.error(f"mid_routes0_{pattern}", routes[:, head]) < 1e-5
        assert reference.error(f"mid_head0_{pattern}", fuse_routes(routes[:, head], block.scan.threshold)) < 1e-5
    for name in ("mid_patch_embed", "mid_block0", "mid_attention0", "mid_mhs0", "mid_down0"):
        assert reference.error(name, found[name]) < 1e-5, name
    for name in ("mid_bottom", "mid_up_last", "mid_final_up"):
        assert reference.error(name, found[name]) < 1e-4, name
    assert reference.error("out_logits", logits) < 1e-4


def test_float64_logits_equal_the_authors_to_nine_digits(reference):
    model = load_official("mhs_vm", official_state(reference, torch.float64), **reference.about["config"])
    with torch.no_grad():
        assert reference.error("out64_logits", model.logits(reference.tensor("in_image", torch.float64))) < 1e-9


def test_gradients_equal_the_authors(reference):
    model = load_official("mhs_vm", official_state(reference), **reference.about["config"])
    logits = model.logits(reference.tensor("in_image", torch.float32))
    (logits * reference.cotangent("logits", logits.shape)).sum().backward()
    gradients = official_gradients(model)
    names = [name for name in reference.arrays.files if name.startswith("grad_")]
    assert len(names) >= 12
    for name in names:
        assert reference.error(name, gradients[f"vmunet.{name.removeprefix('grad_')}"].norm()) < 1e-3, name


@pytest.mark.slow
def test_the_published_network_gives_the_authors_logits_probabilities_and_loss(golden):
    reference = golden("mhs_vm", "mhs_vm_published")
    model = load_official("mhs_vm", official_state(reference))
    assert sum(parameter.numel() for parameter in model.parameters()) == 17_257_129
    with torch.no_grad():
        probability = model(reference.tensor("in_image", torch.float32))
    assert reference.error("out_probability", probability) < 1e-4
    assert reference.error("loss_bce_dice", bce_dice_loss(probability, reference.tensor("in_target"))) < 1e-5


def test_the_loss_of_one_class_equals_the_authors(golden):
    reference = golden("mhs_vm", "mhs_vm")
    model = load_official("mhs_vm", official_state(reference), **reference.about["config"])
    with torch.no_grad():
        probability = model(reference.tensor("in_image", torch.float32))
    assert reference.error("loss_bce_dice", bce_dice_loss(probability, reference.tensor("in_target"))) < 1e-5


def test_converting_back_gives_every_key_of_the_authors_also_those_that_stand_twice(reference):
    state = official_state(reference)
    back = to_official("mhs_vm", load_official("mhs_vm", state, **reference.about["config"]))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_of_two_copies_of_a_scan_the_one_that_their_loader_writes_last_counts(reference):
    state = official_state(reference)
    for key in state:
        if re.search(r"\.mambaeng\.|x_ssproj_W", key):
            state[key] = state[key] + 1.0
    expected = load_official("mhs_vm", official_state(reference), **reference.about["config"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(expected.parameters(), load_official("mhs_vm", state, **reference.about["config"]).parameters(), strict=True)
    )


def test_reordering_has_exact_gradients():
    scan = MHSVM(MHSVMConfig(classes=2, channels=1, dims=(8, 16), depths=(1, 1), decoder_depths=(1, 1), state=2, drop_path=0.0, patch=2)).double()
    block: nn.Module = scan.encoder[0][0].scan
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_image_sizes_that_do_not_fit_are_refused_in_a_sentence():
    model = MHSVM(MHSVMConfig(classes=2, dims=(8, 16), depths=(1, 1), decoder_depths=(1, 1)))
    with pytest.raises(ValueError, match=r"multiples of 8; got \(20, 16\)"):
        model(torch.zeros(1, 3, 20, 16))
