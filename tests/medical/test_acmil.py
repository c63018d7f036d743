"""ACMIL gives the authors' numbers in both forms, hides what it should, and takes bags of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.errors import UserError
from foveal.core.official import to_official as mapped_back
from foveal.medical.checkpoints import acmil, load_official, to_official
from foveal.medical.models.acmil import (
    HIDDEN,
    BagOutput,
    GatedACMIL,
    GatedACMILConfig,
    MultiHeadACMIL,
    MultiHeadACMILConfig,
    acmil_loss,
    hide_best,
)

VARIANTS = ["ga_k1", "ga_k5_384", "ga_k3_1024", "ga_tiny_bag", "mha_k1", "mha_k3_1024", "mha_k5_384", "mha_tiny_bag"]
ADAPTERS = {"acmil_ga": acmil.ACMIL_GA, "acmil_mha": acmil.ACMIL_MHA}


@pytest.fixture(params=VARIANTS)
def reference(request, golden):
    return golden("acmil", request.param)


def system_of(reference) -> str:
    return {"ACMIL_GA": "acmil_ga", "ACMIL_MHA": "acmil_mha"}[reference.about["official_class"]]


def official_state(reference, dtype=torch.float32):
    config = reference.about["config"]
    factors = {"attention.attention_weights.weight": 8.0, "q": (config["n_token"] * config["D_inner"]) ** 0.5}
    return reference.state(dtype, factors)


def loaded(reference, dtype=torch.float32):
    return load_official(system_of(reference), official_state(reference, dtype), **reference.about["config"])


def tiny_models():
    sizes = {"features": 12, "inner": 8, "classes": 3, "branches": 3}
    return [GatedACMIL(GatedACMILConfig(**sizes)), MultiHeadACMIL(MultiHeadACMILConfig(**sizes, heads=2))]


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    return model


def close(reference, name: str, actual: torch.Tensor, tolerance: float) -> bool:
    """Relative; absolute where the stored value is 0."""
    return actual.abs().max() < tolerance if not reference[name].any() else reference.error(name, actual) < tolerance


@pytest.mark.parametrize(("dtype", "name", "tolerance"), [(torch.float32, "out_", 1e-5), (torch.float64, "out64_", 1e-9)])
def test_logits_and_attention_equal_the_authors(reference, dtype, name, tolerance):
    with torch.no_grad():
        output = loaded(reference, dtype)(reference.tensor("in_features", dtype))
    assert reference.error(f"{name}branch_logits", output.branch_logits) < tolerance
    assert reference.error(f"{name}bag_logits", output.bag_logits) < tolerance
    assert reference.error(f"{name}attention", output.attention) < tolerance


def test_features_inside_equal_the_authors(reference):
    model, found = loaded(reference), {}
    model.branch_heads.register_forward_pre_hook(lambda _, inputs: found.update(branch=inputs[0][0]))
    model.bag_head.register_forward_pre_hook(lambda _, inputs: found.update(bag=inputs[0]))
    model.reduce.register_forward_hook(lambda _, __, out: found.update(inner=out.relu()))
    with torch.no_grad():
        model(reference.tensor("in_features", torch.float32))
    assert reference.error("mid_inner", found["inner"]) < 1e-5
    assert reference.error("mid_bag_feature", found["bag"]) < 1e-5
    assert reference.error("mid_last_branch_feature", found["branch"][-1].reshape(reference["mid_last_branch_feature"].shape)) < 1e-5


@pytest.mark.parametrize(("dtype", "width", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "64", 1e-9)])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_the_authors_with_and_without_hidden_instances(reference, dtype, width, tolerance, masked):
    model = without_dropout(loaded(reference, dtype)).train(masked)  # the stored case hides all candidates, so no draw plays a part
    with torch.no_grad():
        output = model(reference.tensor("in_features", dtype))
    losses = acmil_loss(output, reference.tensor("in_label"))
    tag = "masked_" if masked else ""
    for part in ("bag", "branch", "diversity", "total"):
        assert close(reference, f"loss{width}_{tag}{part}", getattr(losses, part), tolerance), part
    if masked:
        assert reference.error(f"out{width}_masked_branch_logits", output.branch_logits) < tolerance
        assert reference.error(f"out{width}_masked_bag_logits", output.bag_logits) < tolerance
        assert (output.attention == HIDDEN).sum(-1).tolist() == reference["out_masked_count"].tolist()


@pytest.mark.parametrize(("dtype", "name", "tolerance"), [(torch.float32, "grad_", 1e-4), (torch.float64, "grad64_", 1e-9)])
def test_gradients_equal_the_authors(reference, dtype, name, tolerance):
    model = loaded(reference, dtype)
    output = model(reference.tensor("in_features", dtype))
    parts = {"branch_logits": output.branch_logits, "bag_logits": output.bag_logits}
    sum((value * reference.cotangent(part, value.shape, dtype)).sum() for part, value in parts.items()).backward()
    table = ADAPTERS[system_of(reference)].table(model)
    gradients = mapped_back(table, {key: value.grad for key, value in model.named_parameters()}).state
    names = [key for key in reference.arrays.files if key.startswith(name)]
    assert len(names) >= 6
    for key in names:
        assert close(reference, key, gradients[key.removeprefix(name)].norm(), tolerance), key


def test_converting_back_gives_every_key_of_the_authors(reference):
    state = official_state(reference)
    back = to_official(system_of(reference), loaded(reference))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_published_sizes_are_the_defaults():
    for model, count in ((GatedACMIL(), 84_369), (MultiHeadACMIL(), 416_140)):
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_weights_of_the_other_form_are_refused(golden):
    with pytest.raises(UserError):
        load_official("acmil_mha", golden("acmil", "ga_k5_384").state())


@pytest.mark.parametrize("model", tiny_models(), ids=["gated", "multi_head"])
@settings(deadline=None, max_examples=15)
@given(instances=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_bag_has_no_order(model, instances, seed):
    generator = torch.Generator().manual_seed(seed)
    bag = torch.randn(1, instances, 12, generator=generator)
    order = torch.randperm(instances, generator=generator)
    model.eval()
    with torch.no_grad():
        plain, shuffled = model(bag), model(bag[:, order])
    torch.testing.assert_close(shuffled.bag_logits, plain.bag_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shuffled.importance, plain.importance[order], atol=1e-5, rtol=1e-4)
    assert abs(float(plain.importance.sum()) - 1) < 1e-5


@pytest.mark.parametrize("model", tiny_models(), ids=["gated", "multi_head"])
@pytest.mark.parametrize("instances", [1, 4, 3000])
def test_bags_of_any_length_train_with_finite_gradients_in_half_precision(model, instances):
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(1, instances, 12))
        acmil_loss(output, torch.tensor([1])).total.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@given(instances=st.integers(1, 30), candidates=st.integers(0, 12), share=st.floats(0, 1))
def test_hiding_takes_whole_instances_from_the_best_of_each_branch(instances, candidates, share):
    attention = torch.randn(2, 3, instances)
    hidden = hide_best(attention, candidates, share) == HIDDEN
    count = min(candidates, instances)
    assert (hidden.sum(-1) == int(count * share)).all()
    best = torch.zeros_like(hidden).scatter(-1, attention.topk(count).indices, True)
    assert not (hidden & ~best).any()


def test_what_is_hidden_is_drawn_anew():
    attention = torch.randn(1, 1, 50)
    assert len({tuple((hide_best(attention, 10, 0.5) == HIDDEN).nonzero()[:, 2].tolist()) for _ in range(20)}) > 5


def test_equal_branches_are_as_alike_as_can_be_and_disjoint_ones_not_at_all():
    logits = torch.zeros(2, 2), torch.zeros(1, 2)
    same = torch.tensor([[[5.0, 0, 0], [5.0, 0, 0]]])
    apart = torch.tensor([[[50.0, 0, 0], [0.0, 50, 0]]])
    assert abs(float(acmil_loss(BagOutput(*logits, same), torch.tensor([0])).diversity) - 1) < 1e-6
    assert float(acmil_loss(BagOutput(*logits, apart), torch.tensor([0])).diversity) < 1e-6


@pytest.mark.parametrize("shape", [(1, 0, 12), (2, 5, 12), (1, 5, 11), (5, 12)])
def test_what_is_not_one_bag_is_refused_in_a_sentence(shape):
    for model in tiny_models():
        with pytest.raises(ValueError, match=r"expected one bag \(1, instances, 12\) with at least one instance; got"):
            model(torch.zeros(shape))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        MultiHeadACMILConfig(inner=10, heads=4)
    with pytest.raises(UserError, match="hide be from 0 to 1"):
        load_official("acmil_ga", {}, mask_drop=1.5)
