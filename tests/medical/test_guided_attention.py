"""Guided attention gives the authors' numbers: outputs, intermediate maps, losses, running statistics and gradients."""

from __future__ import annotations

import pytest
import torch

from foveal.medical.checkpoints import load_official, systems, to_official
from foveal.medical.losses import guided_loss
from foveal.medical.models.guided_attention import GuidedAttentionConfig, GuidedAttentionNet, guided_attention_small

#: Without these the channel attention of random weights is one-hot.
FACTORS = {
    "cam_attention_*.attn.1.weight": 0.05,
    "cam_attention_*.attn.1.bias": 0.05,
    "cam_attention_*.attn.4.weight": 20.0,
}


@pytest.fixture(scope="module")
def official(golden) -> dict[str, torch.Tensor]:
    return golden("msa", "64").state(factors=FACTORS)


@pytest.fixture(scope="module")
def model(official) -> GuidedAttentionNet:
    return load_official("msa_guided", official)


def gradients_of(model, golden, prefix: str) -> dict[str, torch.Tensor]:
    """Official key -> gradient, for the gradients that the reference file stores under `prefix`."""
    with_gradients = GuidedAttentionNet(model.config).to(next(model.parameters()).dtype)
    with_gradients.load_state_dict({key: value.grad if value.grad is not None else torch.zeros_like(value)
                                    for key, value in model.state_dict(keep_vars=True).items()})  # fmt: skip
    named = to_official("msa_guided", with_gradients)
    return {name: named[name.removeprefix(prefix)] for name in golden.arrays.files if name.startswith(prefix) and name.removeprefix(prefix) in named}


def test_the_published_configuration_has_the_published_size(model, official):
    (system,) = [system for system in systems() if system.name == "msa_guided"]
    assert (
        sum(value.numel() for key, value in official.items() if not key.endswith(("running_mean", "running_var", "num_batches_tracked")))
        == system.parameters
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == system.parameters - 955_412


def test_converting_back_gives_every_key_and_value_that_the_authors_code_uses(model, official):
    back = to_official("msa_guided", model)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in official.items()}
    unused = [key for key in back if not torch.equal(back[key], official[key])]
    assert all(key.startswith(("conv6_", "conv7_", "attention", "refine")) for key in unused)


@pytest.mark.parametrize("size", ["64", pytest.param("256", marks=pytest.mark.slow)])
def test_logits_and_intermediate_maps_equal_the_authors(model, golden, size):
    reference = golden("msa", size)
    found = {}
    watched = {
        "mid_fuse1": model.fuse, "mid_pam_1_4": model.stages[0].position[3], "mid_cam_1_4": model.stages[0].channel[3],
        "mid_pam_2_1": model.stages[1].position[0], "mid_layer4": model.backbone.stages[3],
    }  # fmt: skip
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out})) for name, module in watched.items()]
    channel = model.stages[0].channel[3].attend
    hooks.append(channel.register_forward_hook(lambda module, inputs, _: found.update(mid_cam_map_1_4=module.weights(inputs[0]))))
    with torch.no_grad():
        logits = model(reference.tensor("in_image"))
    for hook in hooks:
        hook.remove()
    assert reference.error("out_logits", logits) < 1e-4
    for name, value in found.items():
        assert reference.error(name, value) < 1e-5, name


def test_training_outputs_losses_and_gradients_equal_the_authors_with_frozen_norms(model, golden):
    reference = golden("msa", "64")
    model.zero_grad()
    outputs = model.forward_guided(reference.tensor("in_image"))
    stored = {
        "out_predict1": outputs.first[0], "out_predict4": outputs.first[3], "out_predict3_2": outputs.second[2],
        "out_sem_1_1": outputs.codes[0][3].flatten(), "out_ae_in_level1_stage2": outputs.inputs[1][0],
        "out_ae_out_level1_stage2": outputs.reproduced[1][0],
    }  # fmt: skip
    for name, value in stored.items():
        assert reference.error(name, value) < 1e-5, name
    loss = guided_loss(outputs, reference.tensor("in_label"))
    for name, value in zip(("total", "ce", "semantic", "reconstruction"), loss, strict=True):
        assert reference.error(f"loss_{name}", value) < 1e-5, name
    logits = model(reference.tensor("in_image"))
    (logits * reference.cotangent("logits", logits.shape)).sum().backward()
    compared = gradients_of(model, reference, "grad_")
    assert len(compared) >= 13
    for name, gradient in compared.items():
        assert reference.error(name, gradient.norm()) < 1e-2, name
    model.zero_grad()


def test_one_training_step_moves_statistics_and_gradients_as_the_authors_do(official, golden):
    reference = golden("msa", "64")
    model = load_official("msa_guided", official).train()
    loss = guided_loss(model.forward_guided(reference.tensor("in_image")), reference.tensor("in_label"))
    assert reference.error("loss_train_total", loss.total) < 2e-4
    assert reference.error("loss_train_ce", loss.segmentation) < 2e-4
    back = to_official("msa_guided", model)
    assert reference.error("out_train_running_mean", back["semanticModule_1_1.enc1.encode.1.running_mean"]) < 1e-3
    assert reference.error("out_train_running_mean_layer4", back["resnext.layer4.2.bn3.running_mean"]) < 1e-3
    loss.total.backward()
    compared = gradients_of(model, reference, "grad_train.")
    assert len(compared) >= 4
    for name, gradient in compared.items():
        assert reference.error(name, gradient.norm()) < 5e-2, name


def test_a_float64_state_dict_gives_the_authors_float64_numbers(official, golden):
    reference = golden("msa", "64")
    model = load_official("msa_guided", {key: value.double() if value.is_floating_point() else value for key, value in official.items()})
    with torch.no_grad():
        outputs = model.forward_guided(reference.tensor("in_image", torch.float64))
    assert reference.error("out64_predict3_2", outputs.second[2]) < 1e-9
    assert reference.error("out64_ae_out_level1_stage2", outputs.reproduced[1][0]) < 1e-9


@pytest.mark.parametrize("size", [(37, 51), (16, 16), (64, 40)])
def test_a_small_network_takes_any_image_size_and_gives_its_size_back(size):
    model = GuidedAttentionNet(guided_attention_small(classes=3)).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, *size)).shape == (2, 3, *size)


def test_evaluation_logits_are_the_mean_of_the_second_stage():
    torch.manual_seed(0)
    model = GuidedAttentionNet(guided_attention_small(classes=3)).eval()
    image = torch.randn(1, 1, 32, 48)
    with torch.no_grad():
        expected = torch.stack(model.forward_guided(image).second).mean(0)
        torch.testing.assert_close(model(image), expected)


def test_sizes_that_cannot_be_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="multiple of 8"):
        GuidedAttentionConfig(width=20)
    with pytest.raises(ValueError, match="stride must be"):
        GuidedAttentionConfig(stride=3)


def test_recomputing_changes_neither_gradients_nor_statistics():
    torch.manual_seed(0)
    plain = GuidedAttentionNet(guided_attention_small(classes=3)).double().train()
    again = GuidedAttentionNet(plain.config, recompute=True).double().train()
    again.load_state_dict(plain.state_dict())
    image, label = torch.randn(2, 1, 32, 32, dtype=torch.float64), torch.randint(0, 3, (2, 32, 32))
    for model in (plain, again):
        for _ in range(2):
            guided_loss(model.forward_guided(image), label).total.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    for (name, one), (_, other) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(one, other), name
