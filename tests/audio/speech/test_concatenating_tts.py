"""Transformer TTS in soobinseo's layout against that code's own outputs, losses and gradients, and its cache against none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from foveal.audio import load_official, systems, to_official
from foveal.audio.checkpoints import convert_file, model_from_weights
from foveal.audio.models.concatenating_tts import ConcatenatingTTS, ConcatenatingTTSConfig
from foveal.core.errors import UserError

SMALL = ConcatenatingTTSConfig(symbols=9, mels=6, embed_channels=8, dim=16, heads=2, layers=2)


def test_the_published_sizes_give_the_reference_frames_and_stops(golden, soobinseo_state):
    reference = golden.load("soobinseo_transformer_tts")
    model = load_official("transformer_tts", soobinseo_state(), layout="soobinseo", **reference.about["config"])
    published = next(system for system in systems() if system.name == "transformer_tts_soobinseo")
    values = sum(value.numel() for name, value in model.state_dict().items() if "running" not in name and "num_batches" not in name)
    assert values == published.parameters == reference.about["parameters"]
    with torch.no_grad():
        output = model(torch.from_numpy(reference["tokens"]), torch.from_numpy(reference["mel"]))
    assert reference.error("mel_before", output.before) < 1e-5
    assert reference.error("mel_after", output.after) < 1e-5
    assert reference.error("stop", output.stop_logits[..., None]) < 1e-5


@pytest.mark.parametrize("mode", ["plain", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_attention_loss_and_gradient_equals_the_reference_on_a_padded_batch(golden, soobinseo_state, mode, dtype):
    reference = golden.load("soobinseo_transformer_tts_parts")
    model = load_official("transformer_tts", soobinseo_state(dtype), layout="soobinseo")
    tokens, mel, target = (torch.from_numpy(reference[f"in_{name}"]) for name in ("tokens", "mel", "mel_target"))
    lengths = [(torch.from_numpy(reference[f"in_{name}_positions"]) > 0).sum(1) for name in ("token", "mel")]
    output = model(tokens, mel.to(dtype), *lengths, heads=model.config.heads, masked=mode == "masked")
    memory, _ = model.encode(tokens, model.mask(tokens, lengths[0]), masked=mode == "masked")
    tolerance = 1e-5
    assert reference.error(f"out_{mode}_encoder", memory) < tolerance
    assert reference.error(f"out_{mode}_before", output.before) < tolerance
    assert reference.error(f"out_{mode}_after", output.after) < tolerance
    assert reference.error(f"out_{mode}_stop", output.stop_logits[..., None]) < tolerance
    for name, kind in (("out_{}_cross", "cross"), ("mid_{}_self", "decoder"), ("mid_{}_encoder", "encoder")):
        folded = output.attentions[kind][-1].transpose(0, 1).flatten(0, 1)  # the reference has heads before the batch
        assert reference.error(f"{name.format(mode)}_attention_last", folded) < tolerance
    loss = F.l1_loss(output.before, target.to(dtype)) + F.l1_loss(output.after, target.to(dtype))
    assert reference.error(f"loss_{mode}_l1", loss.detach()) < tolerance
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    official = to_official("transformer_tts_soobinseo", _with_values(model, gradients))
    names = [name for name in reference.arrays.files if name.startswith(f"grad_{mode}.")]
    assert len(names) == 11
    for name in names:
        assert reference.error(name, official[name.removeprefix(f"grad_{mode}.")].double().norm()) < 1e-3, name


def _with_values(model: ConcatenatingTTS, values: dict[str, torch.Tensor | None]) -> ConcatenatingTTS:
    """The model with other values in its parameters, to have them under the authors' keys."""
    other = ConcatenatingTTS(model.config).to(next(model.parameters()).dtype)
    state = {name: value for name, value in values.items() if value is not None}
    other.load_state_dict({**other.state_dict(), **state})
    return other


def test_the_cache_changes_nothing_and_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    model = ConcatenatingTTS(SMALL).eval()
    tokens, lengths = torch.randint(1, 9, (2, 7)), torch.tensor([7, 4])
    tokens[1, 4:] = 0
    cached, again = (model.generate(tokens, lengths, threshold=2.0, maximum_ratio=3.0, attention=True, cache=cache) for cache in (True, False))
    assert cached.lengths.tolist() == [21, 12]
    assert torch.allclose(cached.mel, again.mel, atol=1e-5)
    assert torch.allclose(cached.cross_attention, again.cross_attention, atol=1e-5)
    assert torch.allclose(cached.cross_attention[..., :21, :].sum(-1)[0], torch.ones(()), atol=1e-5)


def test_what_it_says_by_itself_is_what_it_says_when_fed_its_own_frames():
    torch.manual_seed(1)
    model = ConcatenatingTTS(SMALL).eval()
    tokens = torch.randint(1, 9, (1, 5))
    spoken = model.generate(tokens, threshold=2.0, maximum_ratio=2.0, attention=True)
    frames = torch.zeros(1, 1, 6)
    with torch.no_grad():
        for _ in range(10):
            output = model(tokens, frames)
            frames = torch.cat([frames, output.before[:, -1:]], 1)
    assert torch.allclose(spoken.mel, output.after, atol=1e-5)


def test_no_frame_sees_a_later_one_not_even_in_the_postnet():
    torch.manual_seed(2)
    model = ConcatenatingTTS(SMALL).eval()
    tokens, mel = torch.randint(1, 9, (1, 5)), torch.randn(1, 12, 6)
    changed = mel.clone()
    changed[:, 8:] += 1.0
    with torch.no_grad():
        before, after = model(tokens, mel).after, model(tokens, changed).after
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_a_checkpoint_is_converted_and_comes_back_with_every_key(soobinseo_state, tmp_path):
    state = soobinseo_state()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "checkpoint_transformer_172000.pth.tar")
    for system, options in (("transformer_tts", {"layout": "soobinseo"}), ("transformer_tts_soobinseo", {})):
        assert isinstance(load_official(system, state, **options), ConcatenatingTTS)
    convert_file("transformer_tts_soobinseo", tmp_path / "checkpoint_transformer_172000.pth.tar", tmp_path / "ours.safetensors")
    again = to_official("transformer_tts_soobinseo", model_from_weights(tmp_path / "ours.safetensors", "transformer_tts_soobinseo"))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_layout_that_a_keyword_asks_for_is_converted_and_comes_back(soobinseo_state, tmp_path):
    state = soobinseo_state()
    torch.save(state, tmp_path / "theirs.pth")
    convert_file("transformer_tts", tmp_path / "theirs.pth", tmp_path / "ours.safetensors", layout="soobinseo")
    convert_file("transformer_tts", tmp_path / "ours.safetensors", tmp_path / "back.pth", back=True, layout="soobinseo")
    again = torch.load(tmp_path / "back.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layout": "tacotron"}, "espnet, soobinseo"),
        ({"layout": "soobinseo", "adim": 3}, "adim"),
        ({"layout": "soobinseo", "outputs_per_step": 2}, "one frame"),
    ],
)
def test_a_layout_or_a_keyword_that_is_not_there_is_named(soobinseo_state, keywords, message):
    with pytest.raises(UserError, match=message):
        load_official("transformer_tts", soobinseo_state(), **keywords)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        replace(SMALL, heads=3)
