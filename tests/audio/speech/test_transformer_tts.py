"""Transformer TTS against ESPnet's own outputs, losses and gradients, and what must hold for any weights."""

from __future__ import annotations

import pytest
import torch

from foveal.audio import load_official, systems, to_official
from foveal.audio.models.free_running import valid_positions
from foveal.audio.models.transformer_tts import TransformerTTS, TransformerTTSConfig
from foveal.audio.tasks.synthesis_losses import guided_attention_loss, guided_attention_mask, last_heads, spectrogram_losses, stop_loss
from foveal.core.errors import UserError

SMALL = TransformerTTSConfig(
    symbols=12, mels=6, dim=16, heads=2, encoder_layers=1, encoder_hidden=16, decoder_layers=2, decoder_hidden=16,
    frame_prenet_channels=8, postnet_layers=2, postnet_channels=8, reduction=2, frame_prenet_dropout=0.0,
)  # fmt: skip


def _with_end(tokens: torch.Tensor, lengths: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.nn.functional.pad(tokens, (0, 1))
    tokens[torch.arange(len(tokens)), lengths] = end
    return tokens, lengths + 1


def _parts(golden, espnet_state, name, dtype=torch.float32):
    reference = golden.load(name)
    state = espnet_state("espnet_transformer_tts" if name.endswith("parts") else name, dtype)
    model = load_official("transformer_tts", state, **reference.about["config"])
    tokens, lengths = _with_end(torch.from_numpy(reference["in_tokens"]), torch.from_numpy(reference["in_token_lengths"]), model.config.end)
    return reference, model, (tokens, torch.from_numpy(reference["in_mel"]).to(dtype), lengths, torch.from_numpy(reference["in_mel_lengths"]))


def test_the_published_recipe_gives_espnets_frames_teacher_forced_and_speaking(golden, espnet_state):
    reference = golden.load("espnet_transformer_tts")
    model = load_official("transformer_tts", espnet_state("espnet_transformer_tts"), dprenet_dropout_rate=0.0)
    assert model.config == TransformerTTSConfig(prenet_dropout=0.5, frame_prenet_dropout=0.0)
    published = next(system for system in systems() if system.name == "transformer_tts")
    assert sum(parameter.numel() for parameter in model.parameters()) == published.parameters == 33_032_947
    tokens = torch.from_numpy(reference["tokens"])
    with torch.no_grad():
        output = model(tokens, torch.from_numpy(reference["mel"]))
        assert reference.error("after", output.after) < 1e-5
        assert reference.error("before", output.before) < 1e-5
        assert reference.error("logits", output.stop_logits) < 1e-5
        spoken = model.generate(tokens, threshold=2.0, maximum_ratio=1.0)
    assert reference.error("inf_feat", spoken.mel[0]) < 1e-5
    assert reference.error("inf_prob", spoken.stop_probabilities[0]) < 1e-5
    assert not spoken.stopped


@pytest.mark.parametrize("name", ["espnet_transformer_tts_parts", "espnet_transformer_tts_tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_part_loss_and_gradient_equals_espnets_on_a_padded_batch(golden, espnet_state, name, dtype):
    reference, model, (tokens, mel, lengths, mel_lengths) = _parts(golden, espnet_state, name, dtype)
    tolerance = 1e-5
    memory, maps = model.encode(tokens, valid_positions(lengths, tokens.shape[1]), heads=model.config.heads)
    valid = valid_positions(lengths, tokens.shape[1])
    assert reference.error("out_encoder", memory) < tolerance
    # rows of padded queries mean nothing
    expected = torch.from_numpy(reference["mid_encoder_attention_last"]).mT * valid[:, None, None]
    assert golden.relative_error(maps[-1].mT * valid[:, None, None], expected) < tolerance
    output = model(tokens, mel, lengths, mel_lengths, heads=model.config.heads, kinds=("cross", "encoder", "decoder"))
    assert reference.error("out_before", output.before) < tolerance
    assert reference.error("out_after", output.after) < tolerance
    assert reference.error("out_stop_logits", output.stop_logits) < tolerance
    assert reference.error("out_cross_attention_last", output.attentions["cross"][-1]) < tolerance
    assert reference.error("out_cross_attention_second_last", output.attentions["cross"][-2]) < tolerance
    r = model.config.reduction
    steps = mel_lengths // r
    own, mine = torch.from_numpy(reference["mid_self_attention_last"]), output.attentions["decoder"][-1]
    assert golden.relative_error(mine[0], own[0]) < tolerance
    assert golden.relative_error(mine[1][:, : steps[1], : steps[1]], own[1][:, : steps[1], : steps[1]]) < tolerance

    l1, l2 = spectrogram_losses(output, mel, mel_lengths, r)
    stop = stop_loss(output.stop_logits, mel_lengths, model.stop_weight, r)
    guided = guided_attention_loss(last_heads(output.attentions["cross"], 2, 2), lengths, steps)
    total = l1 + stop + guided
    found = {"l1": l1, "l2": l2, "stop": stop, "guided_attention": guided}
    if name.endswith("tiny"):
        found["guided_encoder"] = guided_attention_loss(last_heads(output.attentions["encoder"], 2, 2), lengths, lengths)
        found["guided_decoder"] = guided_attention_loss(last_heads(output.attentions["decoder"], 2, 2), steps, steps)
        total = total + l2 + found["guided_encoder"] + found["guided_decoder"]
    for loss, value in found.items():
        assert value.item() == pytest.approx(float(reference[f"loss_{loss}"]), rel=1e-4), loss
    assert total.item() == pytest.approx(float(reference["loss_total"]), rel=1e-4)
    total.backward()
    carrier = TransformerTTS(model.config).to(dtype)
    carrier.load_state_dict({**model.state_dict(), **{key: value.grad for key, value in model.named_parameters()}})
    gradients = to_official("transformer_tts", carrier)
    names = [key for key in reference.arrays if key.startswith("grad_") and "__" not in key]
    assert len(names) >= 10
    for key in names:
        assert gradients[key.removeprefix("grad_")].double().norm().item() == pytest.approx(float(reference[key]), rel=1e-3), key


@pytest.mark.parametrize("name", ["espnet_transformer_tts_parts", "espnet_transformer_tts_tiny"])
@pytest.mark.parametrize("cache", [True, False])
def test_speaking_with_and_without_cache_gives_espnets_frames_and_stops_where_it_stops(golden, espnet_state, name, cache):
    reference, model, (tokens, _, lengths, _) = _parts(golden, espnet_state, name)
    arguments = {"minlenratio": 0.0, **reference.about["inference_arguments"]}
    spoken = model.generate(
        tokens[:1, : lengths[0]],
        threshold=arguments["threshold"],
        minimum_ratio=arguments["minlenratio"],
        maximum_ratio=arguments["maxlenratio"],
        attention=True,
        cache=cache,
    )
    assert reference.error("out_inference_feat", spoken.mel[0]) < 1e-5
    assert reference.error("out_inference_prob", spoken.stop_probabilities[0]) < 1e-5
    assert reference.error("out_inference_attention", spoken.cross_attention[0]) < 1e-5
    assert bool(spoken.stopped) == (arguments["threshold"] < 1)


def test_guided_attention_masks_and_losses_on_given_attention_are_espnets(golden):
    reference = golden.load("espnet_transformer_tts_parts")
    for name in (key for key in reference.arrays if key.startswith("out_guided_mask")):
        sigma, symbols, steps = float(name.split("sigma0")[1][0]) / 10, *map(int, name.rsplit("_", 1)[1].split("x"))
        mask = guided_attention_mask(torch.tensor([symbols]), torch.tensor([steps]), sigma)
        assert golden.relative_error(mask[0], reference[name]) < 1e-6, name
    maps = torch.from_numpy(reference["in_guided_attention"])
    symbols, steps = (torch.from_numpy(reference[f"in_guided_{kind}_lengths"]) for kind in ("token", "frame"))
    assert guided_attention_loss(maps, symbols, steps).item() == pytest.approx(float(reference["loss_guided_multihead"]), rel=1e-5)
    stronger = 10 * guided_attention_loss(maps, symbols, steps, sigma=0.2)
    assert stronger.item() == pytest.approx(float(reference["loss_guided_multihead_alpha10_sigma02"]), rel=1e-5)
    assert guided_attention_loss(maps[:, :1], symbols, steps).item() == pytest.approx(float(reference["loss_guided_first_head"]), rel=1e-5)


@pytest.mark.parametrize("name", ["espnet_transformer_tts", "espnet_transformer_tts_tiny"])
def test_official_keys_come_back_bit_for_bit(golden, espnet_state, name):
    state = espnet_state(name)
    model = load_official("transformer_tts", state, **golden.load(name).about["config"])
    back = to_official("transformer_tts", model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_a_wrong_size_is_refused_with_the_keys_that_do_not_fit(espnet_state):
    with pytest.raises(UserError, match=r"misshapen.*\(512, 1024, 1\)"):
        load_official("transformer_tts", espnet_state("espnet_transformer_tts"), eunits=2048)
    with pytest.raises(UserError, match="multiple of heads"):
        load_official("transformer_tts", {}, aheads=7)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return TransformerTTS(SMALL).eval()


def test_a_batch_speaks_as_its_rows_alone_and_is_silent_behind_their_ends(small):
    with torch.no_grad():
        small.stop.bias += 0.3
    tokens = torch.tensor([[3, 4, 5, 6, 7, 11], [8, 9, 11, 0, 0, 0]])
    lengths = torch.tensor([6, 3])
    together = small.generate(tokens, lengths, threshold=2.0, maximum_ratio=4.0, attention=True)
    assert together.lengths.tolist() == [24, 12]
    for row, length in enumerate(lengths.tolist()):
        alone = small.generate(tokens[row : row + 1, :length], threshold=2.0, maximum_ratio=4.0)
        assert torch.allclose(together.mel[row, : together.lengths[row]], alone.mel[0], atol=1e-5)
    assert not together.mel[1, 12:].any()
    assert torch.allclose(together.cross_attention.sum(-1), torch.ones(()), atol=1e-5)
    assert not together.cross_attention[1, ..., 3:].any()


def test_cached_and_uncached_speech_are_the_same_with_dropout_in_the_frame_prenet():
    torch.manual_seed(0)
    model = TransformerTTS(TransformerTTSConfig(**{**vars(SMALL), "frame_prenet_dropout": 0.5})).eval()
    tokens = torch.tensor([[3, 4, 5, 11]])
    spoken = []
    for cache in (True, False):
        torch.manual_seed(1)
        spoken.append(model.generate(tokens, threshold=2.0, maximum_ratio=70.0, cache=cache).mel)  # the cache grows twice
    assert spoken[0].shape == (1, 280, 6)
    assert torch.allclose(*spoken, atol=1e-5)
    torch.manual_seed(2)
    assert not torch.allclose(model.generate(tokens, threshold=2.0, maximum_ratio=70.0).mel, spoken[0], atol=1e-2)


def test_no_frame_sees_a_later_one_before_the_postnet(small):
    tokens, mel = torch.tensor([[3, 4, 11]]), torch.randn(1, 10, 6)
    changed = mel.clone()
    changed[:, 6:] += 1.0  # step 3 holds frames 6 and 7; it is first read by step 4
    with torch.no_grad():
        first, second = small(tokens, mel).before, small(tokens, changed).before
    assert torch.equal(first[:, :8], second[:, :8])
    assert not torch.allclose(first[:, 8:], second[:, 8:])


def test_padding_changes_nothing(small):
    tokens, mel = torch.tensor([[3, 4, 5, 11]]), torch.randn(1, 8, 6)
    padded, longer = torch.nn.functional.pad(tokens, (0, 3)), torch.cat([mel, torch.randn(1, 6, 6)], 1)
    with torch.no_grad():
        alone, beside = small(tokens, mel), small(padded, longer, torch.tensor([4]), torch.tensor([8]))
    assert torch.allclose(alone.before, beside.before[:, :8], atol=1e-6)
    l1, _ = spectrogram_losses(alone, mel, torch.tensor([8]), 2)
    # the postnet's window reaches over the end of the padded row, so only what is before it is compared
    assert spectrogram_losses(beside._replace(after=beside.before), longer, torch.tensor([8]), 2)[0] == pytest.approx(
        spectrogram_losses(alone._replace(after=alone.before), mel, torch.tensor([8]), 2)[0].item(), rel=1e-5
    )
    assert torch.isfinite(l1)


def test_fewer_frames_than_a_step_makes_are_refused(small):
    with pytest.raises(ValueError, match="at least 2 frames"):
        small(torch.tensor([[3, 11]]), torch.zeros(1, 1, 6))


def test_a_padded_key_that_scores_far_above_the_others_leaves_the_gradient_finite():
    from foveal.audio.models.free_running import KeyValues
    from foveal.audio.models.transformer_tts import Attention

    torch.manual_seed(0)
    layer = Attention(8, 2, crossed=True)
    query, keys, values = (torch.randn(1, 3, 2, 4) for _ in range(3))
    keys[:, 2] = 1e3 * query.mean(1)  # it stands in the padding
    leaves = [tensor.requires_grad_() for tensor in (query, keys, values)]
    out, probabilities = layer.attend(leaves[0], KeyValues(*leaves[1:]), torch.tensor([[True, True, False]]), False, 2)
    assert probabilities is not None
    assert torch.equal(probabilities[..., 2], torch.zeros(1, 2, 3))
    gradients = torch.autograd.grad(out.sum() + probabilities.square().sum(), leaves)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
