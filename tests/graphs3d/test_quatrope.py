"""QuatRoPE: the released code's numbers, the paper's properties, and language models of transformers with it."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.graphs3d.llama import add_quatrope
from foveal.graphs3d.models.magnifier import AdaptiveMagnifier, admitted
from foveal.graphs3d.models.quatrope import LearnedExtension, QuatRoPEConfig, extension, object_logits, objects_of

transformers = pytest.importorskip("transformers")
GOLDEN = Path(__file__).parents[1] / "golden" / "graphs3d"


def llama(implementation: str = "sdpa", hidden: int = 64, heads: int = 4, kv_heads: int = 2, layers: int = 2, dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        attn_implementation=implementation, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(dtype)


def scene(batch: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Text, objects with one text token among them, text."""
    points = torch.zeros(batch, length, 3)
    points[:, 5:13] = torch.rand(batch, 8, 3, generator=torch.Generator().manual_seed(seed)) * 6 + 0.1
    points[:, 9] = 0
    return points


# --- the authors' numbers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [128, 32])
def test_official_values_are_the_released_ones(head_dim):
    arrays = np.load(GOLDEN / "quatrope.npz")
    points = torch.from_numpy(arrays[f"in_positions_{head_dim}"])
    found = extension(points, QuatRoPEConfig("official", head_dim))
    torch.testing.assert_close(found, torch.from_numpy(arrays[f"out_extension_{head_dim}"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "implementation"), [("attention", "sdpa"), ("attention_small", "sdpa"), ("attention", "eager")])
def test_a_patched_attention_layer_gives_the_authors_outputs_and_gradients(golden_weights, case, implementation):
    arrays, about = np.load(GOLDEN / "quatrope.npz"), json.loads((GOLDEN / "quatrope.json").read_text())
    sizes = about["config"][case]
    config = transformers.LlamaConfig(
        hidden_size=sizes["hidden_size"], num_attention_heads=sizes["num_attention_heads"], num_key_value_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"], num_hidden_layers=1, vocab_size=8, intermediate_size=8, attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    layer = model.layers[0].self_attn
    layer.load_state_dict({key: torch.from_numpy(golden_weights(key, shape)) for key, shape in about["state_dict"][case].items()})
    name = f"{case}_x"
    shape = (2, 20, 256) if case == "attention" else (2, 24, 64)
    drawn = np.random.default_rng(zlib.crc32(f"in:{name}".encode())).standard_normal(shape).astype(np.float32)
    x = torch.from_numpy(drawn).requires_grad_()
    points = torch.from_numpy(arrays[f"in_{case}_positions"])
    patch = add_quatrope(model, "official", fused_scale=implementation == "sdpa")
    with patch.objects(points):
        causal = torch.full((shape[1], shape[1]), -torch.inf).triu(1)[None, None] if implementation == "eager" else None
        out = layer(x, position_embeddings=model.rotary_emb(x, torch.arange(shape[1])[None]), attention_mask=causal)[0]
    ending = "" if implementation == "sdpa" else "_eager"
    expected = torch.from_numpy(arrays[f"out_{case}{ending}"])
    assert (out - expected).norm() / expected.norm() < 1e-5
    probe = np.random.default_rng(zlib.crc32(f"r:{case}{ending}".encode())).standard_normal(shape).astype(np.float32)
    loss = (out * torch.from_numpy(probe)).sum()
    loss.backward()
    for key in about["state_dict"][case]:
        gradient = layer.get_parameter(key).grad.norm().item()
        assert gradient == pytest.approx(float(arrays[f"{case}{ending}.grad_{key}"]), rel=1e-3), key


@pytest.fixture
def golden_weights():
    def fill(key: str, shape: list[int]) -> np.ndarray:
        z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape))
        return np.asarray(z / np.sqrt(np.prod(shape[1:])), dtype=np.float32)

    return fill


# --- the paper's properties ----------------------------------------------------------------------------------------------------------------


def logits_of(points: torch.Tensor, mode: str = "paper") -> torch.Tensor:
    config = QuatRoPEConfig(mode, 64)
    vectors = extension(points, config, torch.ones(points.shape[:2], dtype=torch.bool))
    return object_logits(vectors, vectors, config)


@pytest.mark.parametrize("shift", [(3.0, 0, 0), (0, -70.0, 0), (1000.0, 2000.0, -500.0)])
def test_paper_mode_does_not_change_when_the_scene_is_moved(shift):
    points = torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 8
    assert (logits_of(points) - logits_of(points + torch.tensor(shift))).abs().max() < 1e-6
    single = points.float()  # the points themselves are rounded at 2,000 m, to about 1e-4 m
    assert (logits_of(single) - logits_of(single + torch.tensor(shift))).abs().max() < (1e-6 if max(map(abs, shift)) < 10 else 2e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_paper_mode_sees_an_object_move_along_each_axis(axis):
    points = torch.rand(1, 6, 3, generator=torch.Generator().manual_seed(1)) * 5
    moved = points.clone()
    moved[0, 2, axis] += 0.5
    change = (logits_of(points) - logits_of(moved))[0, 0]
    assert change[2].abs().max() > 0.05
    others = [0, 1, 3, 4, 5]
    assert change[others][:, others].abs().max() < 1e-5


def test_official_mode_is_blind_to_x_and_not_invariant_as_released():
    points = torch.rand(1, 6, 3, generator=torch.Generator().manual_seed(1)) * 5 + 0.1
    along_x, along_y = points.clone(), points.clone()
    along_x[0, 2, 0] += 5
    along_y[..., 1] += 1
    assert torch.equal(logits_of(points, "official"), logits_of(along_x, "official"))
    assert (logits_of(points, "official") - logits_of(along_y, "official")).abs().max() > 1e-3


def test_an_object_meets_itself_with_the_full_strength_and_others_with_less():
    points = torch.rand(1, 10, 3, generator=torch.Generator().manual_seed(1)) * 5
    found = logits_of(points)[0, 0]
    torch.testing.assert_close(found.diagonal(), torch.ones(10))
    assert (found - 2 * torch.eye(10)).max() < 1
    torch.testing.assert_close(found, found.T)


def test_learned_vectors_see_differences_alone_and_which_side_is_which():
    torch.manual_seed(0)
    module = LearnedExtension(8, 2, QuatRoPEConfig(head_dim=4, dims=12)).double()
    states, points = torch.randn(1, 5, 8, dtype=torch.float64), torch.rand(1, 5, 3, dtype=torch.float64) * 4
    objects = torch.tensor([[True, True, False, True, True]])

    def logits(places: torch.Tensor) -> torch.Tensor:
        q, k = module(states, places, objects)
        return q @ k.transpose(-1, -2)

    here = logits(points)
    assert (here[:, :, 2] == 0).all()
    assert (here[:, :, :, 2] == 0).all()
    assert (here - logits(points + torch.tensor([5.0, -3.0, 2.0]))).abs().max() < 1e-9
    mirrored = logits(points * torch.tensor([-1.0, 1, 1]))
    assert (here - mirrored).abs().max() > 0.1


# --- in a language model -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["official", "paper"])
def test_text_alone_gets_the_logits_of_the_unpatched_model_to_the_bit(implementation, mode):
    model, ids = llama(implementation), torch.randint(1, 101, (2, 17), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    patch = add_quatrope(model, mode)
    assert torch.equal(model(ids).logits, before)
    patch.remove()
    assert torch.equal(model(ids).logits, before)


def test_text_before_the_objects_is_untouched_to_the_bit_and_what_comes_after_is_not():
    model, ids = llama("eager"), torch.randint(1, 101, (2, 20), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    with add_quatrope(model, "paper").objects(scene()):
        after = model(ids).logits
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 13:] - after[:, 13:]).abs().max() > 1e-4


def test_nothing_is_added_where_one_of_two_tokens_is_text():
    model = llama()
    patch = add_quatrope(model, "paper")
    with patch.objects(scene()):
        added = patch.logits(2, 20, 20, torch.zeros(1))
    objects = objects_of(scene())
    pairs = (objects[:, :, None] & objects[:, None, :]).unsqueeze(1)
    assert (added[~pairs] == 0).all()
    assert (added[pairs] != 0).float().mean() > 0.99


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["official", "paper"])
def test_a_cache_gives_what_the_whole_sequence_gives(implementation, mode):
    model, ids = llama(implementation, dtype=torch.float64), torch.randint(1, 101, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), add_quatrope(model, mode).objects(scene(2, 20)):
        whole = model(ids).logits
        first = model(ids[:, :8], use_cache=True)  # the cut lies inside the objects
        second = model(ids[:, 8:20], past_key_values=first.past_key_values, use_cache=True)
        steps, cache = [], second.past_key_values
        for place in range(20, 24):
            out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.past_key_values
    found = torch.cat((first.logits, second.logits, *steps), 1)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)  # transformers rotates in single precision


def test_generation_is_the_same_with_and_without_a_cache_and_with_beams():
    model, ids = llama(), torch.randint(1, 101, (2, 20), generator=torch.Generator().manual_seed(0))
    patch = add_quatrope(model, "paper", strength=4.0)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with patch.objects(scene()):
        cached = model.generate(ids, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        beams = model.generate(ids, num_beams=3, **options)
        assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
    with patch.objects(scene()[:1]):
        assert torch.equal(model.generate(ids[:1], **{**options, "attention_mask": options["attention_mask"][:1]}), cached[:1])


def test_padding_on_the_left_changes_nothing():
    model, ids = llama(dtype=torch.float64), torch.randint(1, 101, (1, 20), generator=torch.Generator().manual_seed(0))
    patch = add_quatrope(model, "paper")
    with patch.objects(scene(1)):
        plain = model(ids, attention_mask=torch.ones_like(ids)).logits
    padded, mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1), torch.cat((torch.zeros(1, 3), torch.ones(1, 20)), 1).long()
    with patch.objects(torch.cat((torch.zeros(1, 3, 3), scene(1)), 1)):
        shifted = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(shifted[:, 3:], plain, rtol=1e-6, atol=1e-6)


def test_gradients_pass_through_a_patched_model():
    model, ids = llama(), torch.randint(1, 101, (2, 20), generator=torch.Generator().manual_seed(0))
    with add_quatrope(model, "paper").objects(scene()):
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_what_cannot_be_patched_is_refused():
    model = llama()
    patch = add_quatrope(model)
    with pytest.raises(ValueError, match="call remove"):
        add_quatrope(model)
    with pytest.raises(ValueError, match=r"\(batch, tokens, 3\); got \(20, 3\)"), patch.objects(scene()[0]):
        pass
    with pytest.raises(ValueError, match="for 2 sequences; the model is called with 3"), patch.objects(scene()):
        model(torch.ones(3, 20, dtype=torch.long))
    patch.remove()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2'"):
        add_quatrope(model)
    with pytest.raises(ValueError, match="mode must be one of official, paper; got 'both'"):
        QuatRoPEConfig("both")


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "relations.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/relations.md", "exec"), {})


def test_two_thousand_objects():
    points = torch.rand(1, 2000, 3) * 40
    found = logits_of(points)
    assert found.shape == (1, 1, 2000, 2000)
    assert found.isfinite().all()


# --- LSceneLLM's magnifier -----------------------------------------------------------------------------------------------------------------


def test_the_magnifier_admits_the_dense_tokens_of_what_was_looked_at():
    previous = torch.zeros(1, 2, 3, 8)
    previous[0, :, 0, 2:6] = torch.tensor([0.1, 0.4, 0.0, 0.2])
    previous[0, :, 1, 2:6] = 0.1  # the same everywhere: nothing stands out
    found = admitted(previous, slice(2, 6), 2)
    assert found[0, 0].tolist() == [False, False, True, True, False, False, True, True]  # 0.25, 1, 0 and 0.5 of the way
    assert not found[0, 1].any()


def test_the_magnifier_equals_attention_over_what_a_query_may_see():
    torch.manual_seed(0)
    module = AdaptiveMagnifier(16, 2, 5, dense_tokens=2, warm_up=0).double().eval()
    q, k, v = (torch.randn(1, heads, 7, 8, dtype=torch.float64) for heads in (2, 1, 1))
    dense, previous = torch.randn(1, 6, 5, dtype=torch.float64), torch.rand(1, 2, 7, 7, dtype=torch.float64)
    visible, text = torch.ones(7, 7).tril().bool()[None, None], torch.tensor([[False] * 4 + [True] * 3])
    out = module(q, k, v, dense, previous, slice(0, 3), visible, text)
    more_k, more_v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in module.project(dense).chunk(2, -1))
    closer = admitted(previous, slice(0, 3), 2)
    for query in range(7):
        for head in range(2):
            see = torch.cat((visible[0, 0, query], closer[0, query] & text[0, query]))
            keys, values = torch.cat((k[0, 0], more_k[0, head]))[see], torch.cat((v[0, 0], more_v[0, head]))[see]
            expected = torch.softmax(q[0, head, query] @ keys.T * 8**-0.5, -1) @ values
            torch.testing.assert_close(out[0, head, query], expected)


def test_the_magnifier_grows_in_over_its_warm_up():
    torch.manual_seed(0)
    module = AdaptiveMagnifier(16, 2, 5, dense_tokens=1, warm_up=4)
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
    arguments = (torch.randn(2, 3, 5), torch.rand(2, 2, 5, 5), slice(0, 3), torch.ones(1, 1, 5, 5).bool(), torch.ones(2, 5).bool())
    module.steps.fill_(2)
    half = module.eval()(q, k, v, *arguments)
    module.steps.fill_(0)
    none = module(q, k, v, *arguments)
    module.steps.fill_(4)
    full = module(q, k, v, *arguments)
    torch.testing.assert_close(half, (none + full) / 2)
    assert (full - none).abs().max() > 0.01
    module.train()(q, k, v, *arguments)
    assert int(module.steps) == 5
    with pytest.raises(ValueError, match="1 rows for each of 3 scene tokens; got"):
        module(q, k, v, torch.randn(2, 4, 5), *arguments[1:])
