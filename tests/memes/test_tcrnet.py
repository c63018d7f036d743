"""TCRNet against the numbers of the authors' code, and what must hold whatever its weights are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveal.core.errors import UserError
from foveal.memes import TCRNet, TCRNetConfig, load_official, systems, to_official
from foveal.memes.checkpoints import convert_file
from foveal.memes.models.tcrnet import Tokens


def image_of(reference) -> torch.Tensor:
    small = reference.tensor("in_image_small", torch.float64) / 127.5 - 1
    factor = {16: 2, 28: 8}[small.shape[-1]]
    return F.interpolate(small, scale_factor=factor, mode="bilinear", align_corners=False).float()


def inputs(reference, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    names = ("text_ids", "text_mask", "text_types", "reason_ids", "reason_mask")
    return [image_of(reference).to(dtype), *(reference.tensor(f"in_{name}", torch.int64) for name in names)]


def model_of(reference, dtype: torch.dtype = torch.float32):
    return load_official("tcrnet", reference.state(dtype), **reference.about["config"])


@pytest.mark.parametrize(("dtype", "prefix", "limit"), [(torch.float32, "", 1e-5), (torch.float64, "64", 1e-9)])
def test_fusion_gives_the_authors_logits_weights_and_gradients(golden, dtype, prefix, limit) -> None:
    reference = golden("tcrnet", "fusion")
    model = model_of(reference, dtype)
    vectors = [reference.tensor(f"in_cls_{name}", dtype).requires_grad_() for name in ("text", "image", "reason")]
    out = model(*vectors)
    assert reference.error(f"out{prefix}_logits", out.logits) < limit
    for name, weights in (("text", out.text_weights), ("vis", out.image_weights), ("reason", out.reason_weights)):
        assert reference.error(f"out{prefix}_weights_cross_attn_{name}", weights) < limit
    loss = F.cross_entropy(out.logits, reference.tensor("in_label"))
    assert reference.error(f"loss{prefix}_cross_entropy", loss) < limit
    (out.logits * reference.cotangent("logits", out.logits.shape)).sum().backward()
    assert reference.error(f"grad{prefix}_cls_text", vectors[0].grad) < 10 * limit
    official = {theirs: ours for ours, theirs in _names(model).items()}
    parameters = dict(model.named_parameters())
    norms = [name for name in reference.arrays.files if name.startswith(f"grad{prefix}_") and "cls" not in name]
    assert len(norms) >= 8
    for name in norms:
        gradient = parameters[official[name.removeprefix(f"grad{prefix}_")]].grad
        assert reference.error(name, gradient.norm()) < 10 * limit, name


def _names(model) -> dict[str, str]:
    from foveal.memes.checkpoints.tcrnet import _official_name

    return {key: _official_name(key) for key in model.state_dict()}


@pytest.mark.parametrize("variant", ["small", pytest.param("base", marks=pytest.mark.slow)])
def test_the_whole_model_gives_the_authors_numbers(golden, variant) -> None:
    reference = golden("tcrnet", variant)
    model = model_of(reference)
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.about["parameters"]
    with torch.no_grad():
        out = model(*inputs(reference))
    assert reference.error("out_logits", out.logits) < 1e-5
    for name, vector in (("bert", out.text), ("vit", out.image), ("llm_encoder", out.reason)):
        assert reference.error(f"out_cls_{name}", vector) < 1e-5


def test_the_whole_model_in_float64_and_its_gradients_reach_every_encoder(golden) -> None:
    reference = golden("tcrnet", "small")
    model = model_of(reference, torch.float64)
    out = model(*inputs(reference, torch.float64))
    assert reference.error("out64_logits", out.logits) < 1e-9
    (out.logits * reference.cotangent("logits", out.logits.shape)).sum().backward()
    official = {theirs: ours for ours, theirs in _names(model).items()}
    parameters = dict(model.named_parameters())
    for name in (name for name in reference.arrays.files if name.startswith("grad64_")):
        assert reference.error(name, parameters[official[name.removeprefix("grad64_")]].grad.norm()) < 1e-9, name


def test_a_checkpoint_goes_to_ours_and_back_to_the_same_bits(golden) -> None:
    state = golden("tcrnet", "small").state()
    again = to_official("tcrnet", load_official("tcrnet", state, **golden("tcrnet", "small").about["config"]))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("variant", ["fusion", "small"])
def test_a_file_with_or_without_encoders_is_converted_and_comes_back_to_the_same_bits(golden, tmp_path, variant) -> None:
    reference = golden("tcrnet", variant)
    state = reference.state()
    torch.save(state, tmp_path / "theirs.pth")
    convert_file("tcrnet", tmp_path / "theirs.pth", tmp_path / "ours.safetensors", **reference.about["config"])
    convert_file("tcrnet", tmp_path / "ours.safetensors", tmp_path / "back.pth", back=True)
    again = torch.load(tmp_path / "back.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_the_names_of_a_newer_transformers_load_to_the_same_model(golden) -> None:
    reference = golden("tcrnet", "small")
    new = {
        ".attention.attention.query.": ".attention.q_proj.",
        ".attention.attention.key.": ".attention.k_proj.",
        ".attention.attention.value.": ".attention.v_proj.",
        ".attention.output.dense.": ".attention.o_proj.",
        ".intermediate.dense.": ".mlp.fc1.",
        ".output.dense.": ".mlp.fc2.",
        "vit.encoder.layer.": "vit.layers.",
    }
    renamed = {}
    for key, value in reference.state().items():
        if key.startswith("vit."):
            for old, name in new.items():
                key = key.replace(old, name)
        renamed[key] = value
    assert any(key.startswith("vit.layers.0.attention.q_proj") for key in renamed)
    ours = load_official("tcrnet", renamed, **reference.about["config"]).state_dict()
    expected = model_of(reference).state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_a_missing_key_is_refused_by_name(golden) -> None:
    reference = golden("tcrnet", "fusion")
    state = reference.state()
    del state["fc.3.weight"]
    with pytest.raises(UserError, match=r"missing fc\.3\.weight"):
        load_official("tcrnet", state, **reference.about["config"])


def test_the_system_is_listed_with_its_published_size() -> None:
    assert [(system.name, system.parameters) for system in systems()] == [("tcrnet", 315_402_626)]


# --- token-level fusion, several tasks, absent streams -------------------------------------------------------------------------------

WIDTHS = {"text": 12, "image": 10, "reason": 14}
CLASSES = {"dark": 2, "target": 6, "intensity": 3}


def tokens(width: int, lengths: list[int], padded: int, seed: int = 0) -> Tokens:
    states = torch.randn(len(lengths), padded, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Tokens(states, torch.arange(padded)[None, :] < torch.tensor(lengths)[:, None])


def network(fusion: str, **changes) -> TCRNet:
    torch.manual_seed(0)
    return TCRNet(TCRNetConfig(WIDTHS, CLASSES, width=16, heads=4, hidden=8, fusion=fusion, **changes)).double().eval()


def some_memes(padded: int = 9) -> dict[str, Tokens]:
    return {
        "text": tokens(12, [5, 2, 7], padded, 1),
        "image": Tokens(torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)),
        "reason": tokens(14, [9, 3, 1], padded, 3),
    }


def test_token_fusion_is_the_papers_formula_written_out() -> None:
    model, memes = network("paper"), some_memes()
    out = model(**memes)
    projected = {name: model.project[name](given.states) for name, given in memes.items()}
    for asking, asked in (("text", "image"), ("text", "reason"), ("image", "reason")):
        layer = model.attend[f"{asking}_{asked}"]
        reference = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
        reference.load_state_dict(
            {
                "in_proj_weight": layer.inputs.weight,
                "in_proj_bias": layer.inputs.bias,
                "out_proj.weight": layer.output.weight,
                "out_proj.bias": layer.output.bias,
            }
        )
        padding = None if memes[asked].mask is None else ~memes[asked].mask
        read, _ = reference(projected[asking], projected[asked], projected[asked], key_padding_mask=padding, need_weights=False)
        mask = memes[asking].mask
        expected = torch.stack([(row if mask is None else row[mask[place]]).mean(0) for place, row in enumerate(read)])
        torch.testing.assert_close(out.streams[f"{asking}_{asked}"], expected)
    assert {task: tuple(logits.shape) for task, logits in out.logits.items()} == {"dark": (3, 2), "target": (3, 6), "intensity": (3, 3)}


@pytest.mark.parametrize("fusion", ["code", "paper"])
def test_padding_and_the_company_of_other_memes_change_nothing(fusion: str) -> None:
    model, memes = network(fusion), some_memes()
    together = model(**memes).logits["dark"]
    wider = {
        name: given if given.mask is None else Tokens(F.pad(given.states, (0, 0, 0, 6), value=7.0), F.pad(given.mask, (0, 6)))
        for name, given in memes.items()
    }
    torch.testing.assert_close(model(**wider).logits["dark"], together)
    alone = [
        model(**{name: Tokens(given.states[i : i + 1], None if given.mask is None else given.mask[i : i + 1]) for name, given in memes.items()})
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat([one.logits["dark"] for one in alone]), together)


@pytest.mark.parametrize("fusion", ["code", "paper"])
def test_an_absent_stream_counts_the_same_however_it_is_left_out(fusion: str) -> None:
    model, memes = network(fusion, absent=True), some_memes()
    torch.nn.init.normal_(model.absent["reason"])
    empty = Tokens(memes["reason"].states, torch.zeros_like(memes["reason"].mask))
    without = {name: given for name, given in memes.items() if name != "reason"}
    expected = model(**without).logits["target"]
    torch.testing.assert_close(model(**without, reason=empty).logits["target"], expected)
    assert not torch.allclose(model(**memes).logits["target"], expected)


def test_attention_shares_of_each_stream_sum_to_one() -> None:
    weights = network("code")(**some_memes()).weights
    for asking in WIDTHS:
        torch.testing.assert_close(sum(share for (stream, _), share in weights.items() if stream == asking), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("fusion", ["code", "paper"])
def test_gradients_are_those_of_finite_differences(fusion: str) -> None:
    model, memes = network(fusion), some_memes()
    names = list(memes)

    def logits(*states: torch.Tensor) -> torch.Tensor:
        return model(**{name: Tokens(state, memes[name].mask) for name, state in zip(names, states, strict=True)}).logits["intensity"]

    assert torch.autograd.gradcheck(logits, [memes[name].states.requires_grad_() for name in names])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": {"text": 8}}, "two or three"),
        ({"widths": {"text": 8, "sound": 8}}, "two or three"),
        ({"heads": 5}, "heads must divide width"),
        ({"fusion": "sum"}, "fusion must be one of"),
        ({"classes": {"dark": 1}}, "at least two classes"),
    ],
)
def test_sizes_that_cannot_be_are_named(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        TCRNetConfig(**changes)


def test_a_stream_that_is_not_there_is_named() -> None:
    memes = some_memes()
    del memes["image"]
    with pytest.raises(ValueError, match="expected the streams text, image, reason; got text, reason"):
        network("code")(**memes)
