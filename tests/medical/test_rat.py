"""RAT gives the authors' numbers, and does what its dense masked form does whatever the regions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.official import to_official as mapped_back
from foveal.core.official import to_ours
from foveal.medical.checkpoints import load_official, rat, to_official
from foveal.medical.losses import focal_region_loss
from foveal.medical.models.rat import RAT, RATConfig, RegionAttention, RegionLayer, sort_regions


def model_of(reference, dtype=torch.float32) -> RAT:
    return load_official("rat", reference.state(dtype), **reference.about["config"])


@pytest.mark.parametrize("variant", ["small", "small_x2", pytest.param("default", marks=pytest.mark.slow)])
def test_restored_images_and_intermediate_maps_equal_the_authors(golden, variant):
    reference = golden("rat", variant)
    model, found = model_of(reference), {}
    first = model.middle[0].layers[0]
    watched = {
        "mid_region_attention0": first.region, "mid_window_attention0": first.window, "mid_layer0": first, "mid_middle0": model.middle[0],
        "mid_middle_last": model.middle[-1],
    }  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out}))
    with torch.no_grad():
        out = model(reference.tensor("in_image"), reference.tensor("in_regions"))
    assert reference.error("out_image", out) < 2e-5
    for name, value in found.items():
        assert reference.error(name, value) < 1e-5, name
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.about["parameters"]


@pytest.mark.parametrize("variant", ["small", "small_x2"])
def test_losses_and_gradients_equal_the_authors(golden, variant):
    reference = golden("rat", variant)
    model, regions = model_of(reference), reference.tensor("in_regions")
    out = model(reference.tensor("in_image"), regions)
    assert reference.error("loss_focal", focal_region_loss(out, reference.tensor("in_target"), regions)) < 1e-5
    (out * reference.cotangent("image", out.shape)).sum().backward()
    gradients = mapped_back(rat.RAT_SYSTEM.table(model), {key: value.grad for key, value in model.named_parameters()}).state
    names = [name for name in reference.arrays.files if name.startswith("grad_")]
    assert len(names) >= 10
    for name in names:
        assert reference.error(name, gradients[name.removeprefix("grad_")].norm()) < 1e-4, name


@pytest.mark.parametrize("variant", ["small", "small_x2"])
def test_float64_images_equal_the_authors_to_nine_digits(golden, variant):
    reference = golden("rat", variant)
    with torch.no_grad():
        out = model_of(reference, torch.float64)(reference.tensor("in_image", torch.float64), reference.tensor("in_regions"))
    assert reference.error("out64_image", out) < 1e-9


@pytest.mark.parametrize("variant", ["layer_c32", "layer_c256"])
def test_one_layer_equals_the_authors_with_the_gradient_of_its_input(golden, variant):
    reference = golden("rat", variant)
    layer = RegionLayer(reference.about["config"]["n_feat"])
    table = rat.layer_table(layer)
    layer.load_state_dict(to_ours(table, reference.state(), {key: value.shape for key, value in layer.state_dict().items()}).state)
    x = reference.tensor("in_x").requires_grad_()
    out = layer(x, sort_regions(reference.tensor("in_regions")))
    assert reference.error("out_y", out) < 1e-5
    (out * reference.cotangent("y", out.shape)).sum().backward()
    assert reference.error("grad_input_x", x.grad) < 1e-4
    gradients = mapped_back(table, {key: value.grad for key, value in layer.named_parameters()}).state
    for name in [name for name in reference.arrays.files if name.startswith("grad_") and name != "grad_input_x"]:
        assert reference.error(name, gradients[name.removeprefix("grad_")].norm()) < 1e-4, name


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_focal_region_loss_and_its_gradient_equal_the_authors(golden, case):
    reference = golden("rat", "focal")
    image = reference.tensor(f"in_{case}_input").requires_grad_()
    beta = reference.about["cases"][case]["beta"]
    loss = focal_region_loss(image, reference.tensor(f"in_{case}_target"), reference.tensor(f"in_{case}_regions"), beta)
    assert reference.error(f"loss_{case}", loss) < 1e-5
    loss.backward()
    assert reference.error(f"grad_{case}_input", image.grad) < 1e-4


def test_equal_pictures_have_a_focal_loss_of_zero_where_the_authors_divide_by_zero():
    image = torch.rand(1, 1, 8, 8)
    assert focal_region_loss(image, image.clone(), torch.zeros(1, 8, 8, dtype=torch.int64)) == 0


def dense_region_attention(layer: RegionAttention, x: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """The authors' form: all pairs of pixels, those of other regions pushed down by 1000."""
    batch, width, height, columns = x.shape
    q, k, v = layer.qkv(x).flatten(2).unflatten(1, (3, layer.heads, -1)).mT.unbind(1)
    same = regions.flatten(1)[:, None, :] == regions.flatten(1)[:, :, None]
    logits = q @ k.mT * layer.heads**-0.5 + torch.where(same, 0.0, -1000.0).to(x.dtype)[:, None]
    return layer.project((logits.softmax(-1) @ v).mT.reshape(batch, width, height, columns))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), regions=st.integers(1, 30), height=st.integers(1, 9), width=st.integers(1, 9))
def test_sorted_regions_give_what_the_dense_masked_form_gives(seed, regions, height, width):
    torch.manual_seed(seed)
    layer = RegionAttention(16, 4).double()
    x = torch.randn(2, 16, height, width, dtype=torch.float64)
    numbers = 3 * torch.randint(0, regions, (2, height, width))  # with gaps
    torch.testing.assert_close(layer(x, sort_regions(numbers)), dense_region_attention(layer, x, numbers))


def test_renumbering_the_regions_changes_nothing():
    torch.manual_seed(0)
    model = RAT(RATConfig(width=8, middle_layers=3, encoder_blocks=(1, 1), decoder_blocks=(1, 1))).eval()
    for layer in model.middle[0].layers:
        torch.nn.init.ones_(layer.region_weight)
    image, regions = torch.rand(1, 1, 32, 32), torch.randint(0, 5, (1, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(image, regions), model(image, torch.tensor([7, 0, 40, 3, 1])[regions]))


def test_converting_back_gives_the_authors_state_dict(golden):
    state = golden("rat", "small").state()
    back = to_official("rat", load_official("rat", state, **golden("rat", "small").about["config"]))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_pixels_without_a_region_and_maps_of_another_size_are_refused():
    model = RAT(RATConfig(width=8, middle_layers=3))
    with pytest.raises(ValueError, match="numbered from 0"):
        model(torch.rand(1, 1, 32, 32), torch.full((1, 32, 32), -1))
    with pytest.raises(ValueError, match="regions must be integers of shape"):
        model(torch.rand(1, 1, 32, 32), torch.zeros(1, 16, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.rand(1, 1, 20, 32), torch.zeros(1, 20, 32, dtype=torch.int64))
