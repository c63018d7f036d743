"""BEVANet: the authors' numbers from the authors' weights, any size of picture, and an inference form that says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveal.core.errors import UserError
from foveal.detection import load_official, to_official
from foveal.detection.checkpoints import convert_file, model_from_weights, systems
from foveal.detection.models.bevanet import SIZES, BEVANet, BEVANetConfig
from foveal.detection.models.large_kernel import KERNELS, ChannelNorm, EfficientAttentionBlock, SelectedKernel, SeparableKernel


@pytest.fixture(scope="module")
def reference(golden: Any) -> Any:
    return golden("bevanet")


@pytest.fixture(scope="module")
def published(reference: Any) -> BEVANet:
    """The reference's network, whose sizes are read off its tensors."""
    model = load_official("bevanet", reference.state(reference.about["tiny"]["state_dict"]))
    assert isinstance(model, BEVANet)
    return model


def _unsettled(model: nn.Module) -> nn.Module:
    """Norms and layer scales as after a training, so that nothing is hidden by ones, zeros and hundredths."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.exp(0.3 * torch.randn(value.shape, generator=generator)))
        elif value.dim() == 1:
            value.copy_(0.5 + 0.3 * torch.randn(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("size", ["base", "small"])
def test_sizes_and_keys_are_those_of_the_authors_code(reference: Any, size: str) -> None:
    with torch.device("meta"):
        training, inference = BEVANet(BEVANetConfig(**SIZES[size])), BEVANet(BEVANetConfig(**SIZES[size], auxiliary=False))
    known = reference.about[size]
    assert sum(parameter.numel() for parameter in training.parameters()) == known["parameters"]
    assert sum(parameter.numel() for parameter in inference.parameters()) == known["parameters_inference"]
    assert (len(training.state_dict()), len(inference.state_dict())) == (known["entries"], known["entries_inference"])
    if size == "base":
        theirs = to_official("bevanet", training)
        assert {key: list(value.shape) for key, value in theirs.items()} == known["state_dict"]
        assert {system.name: system.parameters for system in systems()}["bevanet"] == known["parameters_inference"]


def test_outputs_equal_the_authors(reference: Any, published: BEVANet, draw: Any) -> None:
    with torch.no_grad():
        said = published.raw(draw("image", (2, 3, 128, 192)))
        exact = published.double()(draw("image", (2, 3, 128, 192)).double())
        published.float()
    for name in said._fields:
        assert reference.error(f"out_{name}", getattr(said, name)) < 1e-5
    assert reference.error("out64_classes", exact[:, :, ::2, ::2]) < 1e-12


def test_a_training_file_of_the_authors_comes_and_goes_back(reference: Any, tmp_path: Path) -> None:
    """Their files have ``model.`` before the keys, the weights of the classes beside them, and no prefix that all keys share."""
    state = reference.state(reference.about["tiny"]["state_dict"])
    torch.save({**{f"model.{key}": value for key, value in state.items()}, "sem_loss.criterion.weight": torch.ones(5)}, tmp_path / "best.pt")
    account = convert_file("bevanet", tmp_path / "best.pt", tmp_path / "ours.safetensors")
    assert "sem_loss.criterion.weight" in account.unused
    model = model_from_weights(tmp_path / "ours.safetensors", "bevanet")
    back = to_official("bevanet", model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_weights_for_inference_alone_make_a_network_without_the_heads_of_training(reference: Any) -> None:
    state = {key: value for key, value in reference.state(reference.about["tiny"]["state_dict"]).items() if not key.startswith("seghead_")}
    model = load_official("bevanet", state)
    assert not model.config.auxiliary  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="auxiliary=True"):
        model.raw(torch.zeros(1, 3, 64, 64))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"planes": 32}, "shape|misshapen"),
        ({"semantic_kernel_size": [35, 35, 35]}, "a zero and then window sizes"),
        ({"semantic_kernel_size": [0, 35, 36]}, "windows"),
        ({"n_blocks": [2, 2]}, "n_blocks five numbers"),
        ({"mlp_expand": [4, 4, 2]}, "mlp_expand three equal"),
        ({"depth": 3}, "depth"),
    ],
)
def test_keywords_that_do_not_fit_are_named(reference: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_official("bevanet", reference.state(reference.about["tiny"]["state_dict"]), **keywords)


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"blocks": (2, 2)}, {"blocks": (2, 0, 2)}, {"windows": (35, 35, 9)}, {"expansion": 0.0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        BEVANetConfig(**wrong)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (3, 64, 64), (1, 3, 0, 64)])
def test_what_is_no_picture_is_refused(published: BEVANet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image must have shape"):
        published(torch.zeros(shape))


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 65), (130, 71)])
def test_a_picture_of_any_size_has_an_answer_for_every_eight_pixels(published: BEVANet, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = published(torch.rand(1, 3, *size))
    assert logits.shape == (1, 5, -(-size[0] // 8), -(-size[1] // 8))
    assert logits.isfinite().all()


@pytest.mark.parametrize("window", sorted(KERNELS))
@pytest.mark.parametrize("kernel", [SeparableKernel, SelectedKernel])
def test_a_large_kernel_sees_its_window_along_rows_and_columns(window: int, kernel: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, side = kernel(2, window).double().eval(), 2 * window + 1
    x = torch.randn(1, 2, side, side, dtype=torch.float64, requires_grad=True)
    middle = window
    if isinstance(module, SelectedKernel):
        dense = module.dense(x)
        seen = (module.wide(dense) + module.tall(dense))[0, 0, middle, middle]  # the gates of channels see all of the map
    else:
        seen = (module(x) / x)[0, 0, middle, middle]
    (gradient,) = torch.autograd.grad(seen, x)
    rows, columns = gradient[0].abs().amax(0).nonzero(as_tuple=True)
    near, far, dilation = KERNELS[window]
    reach = (near // 2) + dilation * (far // 2)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (middle - reach, middle + reach, middle - reach, middle + reach)


def test_gradients_of_the_attention_block_are_those_of_its_formula() -> None:
    torch.manual_seed(0)
    block = _unsettled(EfficientAttentionBlock(2, 7, 2.0)).double().eval()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), eps=1e-7, atol=1e-5)


def test_the_channel_norm_is_a_layer_norm_of_each_place() -> None:
    norm, x = ChannelNorm(6), torch.randn(2, 6, 3, 4)
    expected = torch.stack([nn.functional.layer_norm(x[:, :, row, column], (6,)) for row in range(3) for column in range(4)], -1).unflatten(
        -1, (3, 4)
    )
    torch.testing.assert_close(norm(x), expected)
