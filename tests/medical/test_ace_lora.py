"""ACE-LoRA gives the authors' numbers: low-rank layers, hypergraph, losses, the whole path; their released adapter loads."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from foveal.core.errors import UserError
from foveal.core.official import to_official as mapped_back
from foveal.medical.checkpoints import ace_lora, convert_file, load_official, model_from_weights, to_official
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig, AdaptedCLIP, ContextEnhancement, label_guided_loss
from foveal.medical.models.biomed_clip import BiomedCLIP, BiomedCLIPConfig, SelfAttention, TextBlock
from foveal.medical.models.low_rank import LowRank, adapted_linear, merged

# the rule that made the reference weights; test folders are no packages to import from
fill = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["fill"]

SIDES = {"img": "image", "text": "text"}
DTYPES = pytest.mark.parametrize(("dtype", "width", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "64", 1e-9)])
#: The reference's double-precision figures of what holds a low-rank layer agree with its own definition W x + b + s B A x to 2e-8 only.
LORA_DTYPES = pytest.mark.parametrize(("dtype", "width", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "64", 2e-7)])


def rule(shapes, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The weight rule for a table of shapes that is not under the usual name."""
    return {key: torch.from_numpy(fill(key, tuple(shape))).to(dtype) for key, shape in shapes.items()}


def released(medical_data):
    file = medical_data / "ace_lora" / "ACE_LoRA.pt"
    if not file.is_file():
        pytest.skip("the released adapter (../shared/data/medical/ace_lora) is not here")
    return file


def hypergraphs(reference, dtype, medical_data_or_none=None) -> dict[str, ContextEnhancement]:
    """Both modalities' graphs with the case's weights."""
    sizes = reference.about.get("config", {"D": 512, "hidden_features": 128, "topk": 5})
    adapter = ACELoRA(ACELoRAConfig(1, 8, 1, 8, width=sizes["D"], hidden=sizes["hidden_features"], neighbours=sizes["topk"])).to(dtype)
    if medical_data_or_none is None:
        official = reference.state(dtype)
    else:
        official = {key: value.to(dtype) for key, value in ace_lora.read_adapter(released(medical_data_or_none)).items()}
    state = {}
    for key, (source, *_) in ace_lora.ACE_LORA.table(adapter).items():
        if key.startswith(("image.", "text.")):
            state[key] = official[source.key]
    adapter.load_state_dict({**adapter.state_dict(), **state})
    return {"img": adapter.image, "text": adapter.text}


@pytest.mark.parametrize("case", ["hgnn_small", "hgnn_filled", "hgnn_shipped"])
@DTYPES
def test_hypergraph_and_its_gradients_equal_the_authors(golden, request, case, dtype, width, tolerance):
    reference = golden("ace", case)
    graphs = hypergraphs(reference, dtype, request.getfixturevalue("medical_data") if case == "hgnn_shipped" else None)
    for side, graph in graphs.items():
        tokens, attention = reference.tensor(f"in_{side}_tokens", dtype), reference.tensor(f"in_{side}_attention", dtype)
        nodes = graph.nodes(tokens, attention)
        assert reference.error(f"out{width}_{side}_nodes", nodes) < tolerance
        assert reference.error(f"out{width}_{side}_global", F.normalize(nodes[:, 0], dim=-1)) < tolerance
        assert reference.error(f"out{width}_{side}_global", graph(tokens, attention)) < tolerance, "by six hyperedges"
        if not width:
            incidence = graph.incidence(tokens, attention)
            assert reference.error(f"mid_{side}_hyperedges_raw", incidence @ tokens) < tolerance
            assert reference.error(f"mid_{side}_context_raw", incidence.mT @ graph.edge(incidence @ tokens)) < tolerance
        (nodes * reference.cotangent(f"{side}_nodes", nodes.shape, dtype)).sum().backward()
        names = [name for name in reference.arrays.files if name.startswith(f"grad{width}_{side}_")]
        assert len(names) == 4
        for name in names:
            layer, half, leaf = name.removeprefix(f"grad{width}_{side}_").split(".")
            parameter = getattr(graph, layer.removesuffix("_adapter"))[0 if half == "down" else 2].get_parameter(leaf)
            assert reference.error(name, parameter.grad.norm()) < 10 * tolerance, name


def test_six_hyperedges_have_the_gradients_of_the_whole_graph():
    torch.manual_seed(0)
    graph = ContextEnhancement(16, 8, 5).double()
    tokens, attention = F.normalize(torch.randn(2, 30, 16, dtype=torch.float64), dim=-1), torch.randn(2, 29, dtype=torch.float64)
    found = []
    for whole in (False, True):
        inputs = tokens.clone().requires_grad_(), attention.clone().requires_grad_()
        out = F.normalize(graph.nodes(*inputs)[:, 0], dim=-1) if whole else graph(*inputs)
        found.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), (*inputs, *graph.parameters()))])
    for short, full in zip(*found, strict=True):
        torch.testing.assert_close(short, full, atol=1e-12, rtol=1e-9)


@LORA_DTYPES
@pytest.mark.parametrize("case", [0, 1])
def test_a_low_rank_layer_equals_the_authors_also_merged(golden, case, dtype, width, tolerance):
    reference, name = golden("ace", "lora_layer"), f"linear{case}"
    about = reference.about["cases"][case]
    state = {key.removeprefix(f"{name}."): value for key, value in rule(about["state_dict"], dtype).items()}
    down, up = (state[f"w_lora_{leaf}"][None].requires_grad_() for leaf in "AB")
    bias, scale, x = state["bias"].requires_grad_(), about["alpha"] * about["r"] ** -0.5, reference.tensor(f"in_{name}", dtype)
    out = adapted_linear(x, state["weight"], bias, down, up, scale)
    assert reference.error(f"out{width}_{name}", out) < tolerance
    whole = merged(state["weight"], down, up, scale)
    assert reference.error(f"out{width}_{name}_merged", F.linear(x, whole, bias)) < tolerance
    if not width:
        assert reference.error(f"mid_{name}_merged_weight", whole) < tolerance
        (out * reference.cotangent(name, out.shape)).sum().backward()
        for key, value in {"w_lora_A": down, "w_lora_B": up, "bias": bias}.items():
            assert reference.error(f"grad_{name}.{key}", value.grad.norm()) < 1e-4


def low_rank(case, state) -> LowRank:
    lora = LowRank(1, case["dim"], case["r"], case["alpha"], 0.1).to(next(iter(state.values())).dtype)
    for leaf, parameter in (("A", lora.down), ("B", lora.up)):
        parameter.data = torch.stack([state[f"{case['name']}.{part}_proj.w_lora_{leaf}"] for part in "qkv"])[None]
    return lora.eval()


@LORA_DTYPES
def test_attention_of_an_image_block_equals_the_authors(golden, dtype, width, tolerance):
    reference = golden("ace", "lora_layer")
    case = reference.about["cases"][2]
    state = rule(case["state_dict"], dtype)
    layer = SelfAttention(case["dim"], case["heads"]).to(dtype)
    names = {"qkv.weight": "qkv.weight", "qkv.bias": "qkv.bias", "project.weight": "proj.weight", "project.bias": "proj.bias"}
    layer.load_state_dict({ours: state[f"vit_attention.{theirs}"] for ours, theirs in names.items()})
    with torch.no_grad():
        out, query, keys = layer(reference.tensor("in_vit_attention", dtype), low_rank(case, state))
    assert reference.error(f"out{width}_vit_attention", out) < tolerance
    scores = torch.einsum("bhd,bnhd->bhn", query, keys) * query.shape[-1] ** -0.5
    torch.testing.assert_close(scores, reference.tensor(f"out{width}_vit_attention_scores", dtype)[:, :, 0], atol=10 * tolerance, rtol=tolerance)


@LORA_DTYPES
def test_attention_of_a_text_block_equals_the_authors_where_texts_are_padded(golden, dtype, width, tolerance):
    reference = golden("ace", "lora_layer")
    case = reference.about["cases"][3]
    state = rule(case["state_dict"], dtype)
    block = TextBlock(case["dim"], case["heads"], 8).to(dtype)
    for ours, theirs in {block.attention.project: "output.dense", block.norm1: "output.LayerNorm"}.items():
        ours.load_state_dict({leaf: state[f"bert_attention.{theirs}.{leaf}"] for leaf in ("weight", "bias")})
    qkv = {leaf: torch.cat([state[f"bert_attention.self.{part}.{leaf}"] for part in ("query", "key", "value")]) for leaf in ("weight", "bias")}
    block.attention.qkv.load_state_dict(qkv)
    x, mask = reference.tensor("in_bert_attention", dtype), reference.tensor("in_bert_attention_mask").bool()
    with torch.no_grad():
        out = block.norm1(x + block.attention(x, low_rank(case, state), 0, mask)[0])
    assert reference.error(f"out{width}_bert_attention", out) < tolerance


@pytest.mark.parametrize("case", range(4))
def test_losses_and_their_gradients_equal_the_authors(golden, case):
    reference = golden("ace", "infonce")
    image, text = (reference.tensor(f"in_{case}_{side}", torch.float32).requires_grad_() for side in ("image", "text"))
    scale = reference.tensor(f"in_{case}_logit_scale", torch.float32).requires_grad_()
    labels = reference.tensor(f"in_{case}_labels") if f"in_{case}_labels" in reference else None
    loss = label_guided_loss(image, text, scale, labels)
    loss.backward()
    pairs = {f"loss_{case}": loss, f"grad_{case}_image": image.grad, f"grad_{case}_logit_scale": scale.grad.reshape(1)}
    for name, value in pairs.items():
        if reference[name].any():
            assert reference.error(name, value.detach()) < (1e-5 if name.startswith("loss") else 1e-4), name
        else:
            assert not value.any(), name


def test_uncertain_and_missing_findings_count_as_absent():
    image, text = (F.normalize(torch.randn(3, 4), dim=-1) for _ in range(2))
    raw = torch.tensor([[1.0, -1, float("nan")], [1, 0, 0], [0, 1, 0]])
    clean = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    torch.testing.assert_close(label_guided_loss(image, text, 5.0, raw), label_guided_loss(image, text, 5.0, clean))


def whole_path(reference, dtype=torch.float32, adapter_file=None) -> AdaptedCLIP:
    about = reference.about
    small = isinstance(about["vit"], dict)
    vit, bert = (about["vit"], about["bert"]) if small else ({}, {})
    sizes = {} if not small else {
        "width": about["embed_dim"], "image_size": vit["img_size"], "patch": vit["patch_size"], "image_width": vit["embed_dim"],
        "image_layers": vit["depth"], "image_heads": vit["num_heads"], "vocabulary": bert["vocab_size"],
        "context": bert["max_position_embeddings"], "text_width": bert["hidden_size"], "text_layers": bert["num_hidden_layers"],
        "text_heads": bert["num_attention_heads"], "text_inner": bert["intermediate_size"],
    }  # fmt: skip
    base_state = rule(about["base_state_dict"], dtype)
    base_state["logit_scale"] = torch.tensor(10.0, dtype=dtype).log()
    base = load_official("biomed_clip", base_state, **sizes)
    shared = {name: sizes[name] for name in ("text_layers", "text_width", "image_layers", "image_width") if sizes}
    keywords = {"r": 4, "alpha": 1, "topk": about["topk"], "hidden_features": about["hidden_features"], "output_dim": about["embed_dim"], **shared}
    if adapter_file is None:
        state = rule(about["adapter_state_dict"], dtype)
        state["logit_scale"] = torch.tensor(10.0, dtype=dtype)
        adapter = load_official("ace_lora", state, **keywords)
    else:
        adapter = load_official("ace_lora", adapter_file)
    return AdaptedCLIP(base, adapter).eval()


def enlarged(reference, dtype) -> torch.Tensor:
    coarse = reference.tensor("in_image_small", torch.float64)
    return F.interpolate(coarse / 127.5 - 1, scale_factor=8, mode="bilinear", align_corners=False).float().to(dtype)


def check_whole_path(reference, model, dtype, width, tolerances):
    of_tokens, of_embeddings, of_logits = tolerances
    with torch.no_grad():
        image, text = enlarged(reference, dtype), reference.tensor("in_text").long()
        images, texts = model.image_tokens(image), model.text_tokens(text)
        found = model(image, text)
        prompts = reference.tensor("in_prompts").long()
        classes, probabilities = model.classes(prompts), model.zero_shot(image, prompts)
        losses = {
            "infonce": label_guided_loss(found.image, found.text, model.adapter.scale),
            "label_guided": label_guided_loss(found.image, found.text, model.adapter.scale, reference.tensor("in_labels")),
        }
    if not width:
        for name, value in {"image_tokens": images.tokens, "text_tokens": texts.tokens}.items():
            assert reference.error(f"mid_{name}", value) < of_tokens, name
        assert reference.error("mid_image_attention", images.attention) < of_tokens
        assert reference.error("mid_text_attention", texts.attention) < of_tokens
    for name, value in {"image_global": found.image, "text_global": found.text, "class_global": classes}.items():
        assert reference.error(f"out{width}_{name}", value) < of_embeddings, name
    for name, value in {"logits": model.adapter.scale * found.image @ found.text.mT, "zero_shot": probabilities}.items():
        assert (value - reference.tensor(f"out{width}_{name}", dtype)).abs().max() < of_logits, name
    for name, value in losses.items():
        assert (value - reference.tensor(f"loss{width}_{name}", dtype)).abs() < of_logits, name


@LORA_DTYPES
def test_the_whole_path_equals_the_authors_on_small_towers(golden, dtype, width, tolerance):
    reference = golden("ace", "small")
    check_whole_path(reference, whole_path(reference, dtype), dtype, width, (tolerance, tolerance, 10 * tolerance))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["base_filled", "base_shipped"])
def test_the_whole_path_equals_the_authors_at_the_size_of_biomed_clip(golden, request, case):
    reference = golden("ace", case)
    file = released(request.getfixturevalue("medical_data")) if case == "base_shipped" else None
    check_whole_path(reference, whole_path(reference, adapter_file=file), torch.float32, "", (1e-5, 1e-3, 1e-3))


def test_the_released_adapter_loads_and_goes_back_value_by_value(medical_data, tmp_path):
    file = released(medical_data)
    convert_file("ace_lora", file, tmp_path / "ours.safetensors")
    convert_file("ace_lora", tmp_path / "ours.safetensors", tmp_path / "theirs.pt", back=True)
    model = model_from_weights(tmp_path / "ours.safetensors", "ace_lora")
    assert sum(parameter.numel() for parameter in model.parameters()) == 969_217
    first, second = (torch.load(path, map_location="cpu", weights_only=True) for path in (file, tmp_path / "theirs.pt"))
    assert first["weights"].keys() == second["weights"].keys()
    before, after = ace_lora.flat(first), ace_lora.flat(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)
    assert second["metadata"]["r"] == first["metadata"]["r"]


def test_converting_back_gives_every_key_of_both(golden):
    about = golden("ace", "small").about
    model = whole_path(golden("ace", "small"))
    for system, part, shapes in (("biomed_clip", model.base, about["base_state_dict"]), ("ace_lora", model.adapter, about["adapter_state_dict"])):
        back = to_official(system, part)
        assert {key: list(value.shape) for key, value in back.items()} == shapes


def tiny() -> AdaptedCLIP:
    base = BiomedCLIP(BiomedCLIPConfig(16, 16, 4, 8, 2, 2, 20, 12, 8, 2, 2, 16))
    return AdaptedCLIP(base, ACELoRA(ACELoRAConfig(2, 8, 2, 8, 16, 4, neighbours=3)))


def test_only_the_adapter_learns_and_all_of_it_does():
    torch.manual_seed(0)
    model = tiny().train()
    torch.nn.init.normal_(model.adapter.text_lora.up)
    torch.nn.init.normal_(model.adapter.image_lora.up)
    before = copy.deepcopy(model.base.state_dict())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    images, texts = torch.randn(4, 3, 16, 16), torch.randint(1, 20, (4, 9))
    first = last = 0.0
    for step in range(40):
        found = model(images, texts)
        loss = label_guided_loss(found.image, found.text, model.adapter.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if not step else first), loss.item()
    assert last < 0.5 * first
    assert all(torch.equal(value, before[key]) for key, value in model.base.state_dict().items())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.adapter.parameters())


def test_an_untrained_adapter_leaves_the_towers_as_they_are_and_merging_changes_nothing():
    torch.manual_seed(0)
    model = tiny().double()
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model.image_tokens(image).tokens, model.base.image(image).tokens)
    torch.nn.init.normal_(model.adapter.image_lora.up)
    model.adapter.image_lora.dropout = 0.0
    apart = model.train().image_tokens(image).tokens
    torch.testing.assert_close(model.eval().image_tokens(image).tokens, apart, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(apart, model.base.image(image).tokens)


def test_what_does_not_fit_is_refused_in_a_sentence(medical_data):
    with pytest.raises(ValueError, match="expected an adapter with text_layers = 2"):
        AdaptedCLIP(tiny().base, ACELoRA(ACELoRAConfig(3, 8, 2, 8, 16, 4)))
    with pytest.raises(ValueError, match="at least 7 tokens"):
        ContextEnhancement(8, 4, 5)(torch.zeros(1, 6, 8), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, 16, 16\)"):
        tiny().images(torch.zeros(1, 3, 20, 16))
    with pytest.raises(UserError):
        load_official("ace_lora", released(medical_data), r=8)


def test_gradients_reach_the_adapters_by_official_names(golden):
    model = whole_path(golden("ace", "small"))
    found = model(enlarged(golden("ace", "small"), torch.float32), golden("ace", "small").tensor("in_text").long())
    label_guided_loss(found.image, found.text, model.adapter.scale).backward()
    table = ace_lora.ACE_LORA.table(model.adapter)
    gradients = mapped_back(table, {key: value.grad for key, value in model.adapter.named_parameters()}).state
    assert gradients["layer_4.v_proj.w_lora_B"].any(), "the image tower's last layer, counted after the text's"
