"""TIGER against the authors' own outputs, gradients included, and what must hold for any weights."""

from __future__ import annotations

import pytest
import torch

from foveal.audio import TIGER, TIGERCinematic, TIGERConfig, load_official, systems, to_official
from foveal.audio.checkpoints import convert_file, model_from_weights
from foveal.audio.models.tiger import CINEMATIC_BANDS, overlap_average
from foveal.core.errors import UserError

SMALL = TIGERConfig(channels=16, hidden_channels=24, blocks=2, scales=3, window=512, hop=256, bands=((10, 100.0), (6, 500.0)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return TIGER(SMALL).eval()


def _parts(golden):
    reference = golden.load("tiger_parts")
    return reference, load_official("tiger", reference.state(), **reference.about["config"])


def test_small_and_one_block_models_give_the_authors_outputs_and_a_batch_equals_its_items(golden):
    reference = golden.load("tiger")
    first, second = golden.signal(8000, 1), golden.signal(8000, 2)
    with torch.no_grad():
        small = load_official("tiger", reference.state(), **reference.about["config"])
        assert reference.error("y_blocks4", small(first[None, None])) < 1e-5
        batch = small(torch.stack([first, second])[:, None])
        assert reference.error("y_blocks4_batch2", batch) < 1e-5
        assert golden.relative_error(batch[1:], small(second).numpy()) < 1e-5
        one = load_official("tiger", reference.state(), **{**reference.about["config"], "num_blocks": 1})
        assert reference.error("y_blocks1", one(first)) < 1e-5


def test_published_default_is_the_large_model_with_the_same_weights(golden):
    reference = golden.load("tiger")
    model = load_official("tiger", reference.state())
    assert model.config.blocks == 8
    assert sum(parameter.numel() for parameter in model.parameters()) == 821_932 == systems()[0].parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimates_and_gradient_norms_equal_the_authors(golden, dtype):
    reference = golden.load("tiger_parts")
    model = load_official("tiger", reference.state(dtype), **reference.about["config"])
    signal = golden.signal(1600, 3).to(dtype).requires_grad_()
    estimates = model(signal[None, None])
    suffix, tolerance = ("64", 1e-6) if dtype == torch.float64 else ("", 1e-4)  # the float64 outputs are stored in single precision
    assert reference.error(f"out{suffix}_estimates", estimates) < tolerance
    loss = (estimates * golden.draw("estimates", estimates.shape, reference.about["salt"], "probe").to(dtype)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(float(reference[f"loss{suffix}_probe"]), rel=1e-3 if not suffix else 1e-9)
    state = {key: value.grad if value.grad is not None else torch.zeros_like(value) for key, value in model.named_parameters()}
    gradients = _official_gradients(model, state)
    names = [name for name in reference.arrays if name.startswith(f"grad{suffix}_") and not name.endswith("in_signal")]
    assert len(names) == 17
    for name in names:
        expected = float(reference[name])
        assert gradients[name.removeprefix(f"grad{suffix}_")].double().norm().item() == pytest.approx(expected, rel=1e-3 if not suffix else 1e-8)
    assert signal.grad.double().norm().item() == pytest.approx(float(reference[f"grad{suffix}_in_signal"]), rel=1e-3)


def _official_gradients(model, gradients):
    """Gradients under the authors' keys: the table of keys maps them as it maps weights."""
    import copy

    carrier = copy.deepcopy(model)
    carrier.load_state_dict(gradients)
    return to_official("tiger", carrier)


def test_only_the_thrown_away_top_scale_gets_no_gradient(golden):
    reference, model = _parts(golden)
    model(golden.signal(1600, 3)).square().sum().backward()
    state = {key: torch.full_like(value, float(value.grad is not None)) for key, value in model.named_parameters()}
    dead = {key for key, value in _official_gradients(model, state).items() if not value.any()}
    assert dead == set(reference.about["no_gradient"])


def test_each_part_equals_the_authors_part(golden):
    reference, model = _parts(golden)
    salt = reference.about["salt"]
    frequency, frame = model.separator.frequency, model.separator.frame

    def given(name):
        return golden.draw(name, reference.about["arrays"][f"in_{name}"]["shape"], salt)

    with torch.no_grad():
        spectrum = model.spectrum(golden.signal(1600, 3)[None])
        features = model.band_features(spectrum)
        assert reference.error("mid_band_features", features.permute(0, 2, 3, 1)) < 1e-5
        for blocks in range(1, 5):
            model.separator.blocks = blocks
            passed = model.separator(features)
            assert reference.error(f"mid_pass{blocks - 1}", passed.permute(0, 3, 2, 1)) < 1e-5

        block = model.separator
        block.blocks = 1
        assert reference.error("out_ffi", block(given("ffi").permute(0, 3, 2, 1)).permute(0, 3, 2, 1)) < 1e-5
        # (batch, channel, frame, band): bands are attended; ours has the attended axis third
        assert (
            reference.error("out_attention_frequency", frequency.attention(given("attention_frequency").permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            < 1e-5
        )
        assert reference.error("out_attention_frame", frame.attention(given("attention_frame").permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) < 1e-5
        assert reference.error("out_norm", frequency.norm(given("norm").permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) < 1e-5
        for name, path in (("msa_frequency", frequency), ("msa_frame_short", frame), ("msa_frame_long", frame)):
            assert reference.error(f"out_{name}", path.msa(given(name).transpose(1, 2)).transpose(1, 2)) < 1e-5
        one = torch.from_numpy(reference["in_msa_frame_one"]).transpose(1, 2)
        assert reference.error("out_msa_frame_one", frame.msa(one).transpose(1, 2)) < 1e-4


def test_three_sources_stereo_and_one_dimension_give_the_authors_outputs(golden):
    reference = golden.load("tiger_tiny")
    model = load_official("tiger", reference.state(), **reference.about["config"])
    stereo = torch.stack([golden.signal(1200, seed) for seed in (4, 5, 6, 7)]).view(2, 2, 1200)
    with torch.no_grad():
        assert reference.error("out_estimates", model(stereo)) < 1e-5
        assert reference.error("out_one_dimension", model(stereo[0, 0])) < 1e-5
        assert reference.error("out_two_dimensions", model(stereo[:, 1])) < 1e-5


def test_a_branch_of_the_cinematic_model_gives_the_authors_outputs(golden):
    reference = golden.load("tiger_dnr")
    config = {key: value for key, value in reference.about["config"].items() if key != "sample_rate"}
    model = load_official("tiger_dnr", reference.state(), **config)
    assert model.config.band_widths == tuple(reference.about["band_widths"])
    with torch.no_grad():
        assert reference.error("out_estimates", model(golden.signal(8000, 8)[None, None])) < 1e-5


@pytest.mark.parametrize("kind", [TIGER, TIGERCinematic])
def test_a_converted_branch_or_the_whole_cinematic_model_is_read_as_what_it_is(tmp_path, kind):
    torch.manual_seed(0)
    sizes = {"channels": 6, "hidden_channels": 8, "blocks": 1, "scales": 2, "heads": 2, "sources": 3}
    model = kind(TIGERConfig(**sizes, window=2048, hop=512, sample_rate=44_100, bands=CINEMATIC_BANDS))
    torch.save(to_official("tiger_dnr", model), tmp_path / "theirs.pth")
    sizes = {"out_channels": 6, "in_channels": 8, "num_blocks": 1, "upsampling_depth": 2, "att_n_head": 2}
    convert_file("tiger_dnr", tmp_path / "theirs.pth", tmp_path / "ours.safetensors", **sizes)
    again = model_from_weights(tmp_path / "ours.safetensors", "tiger_dnr")
    assert type(again) is kind
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_chunks_of_the_cinematic_model_overlap_as_the_authors_do(golden):
    reference = golden.load("tiger_dnr")
    for index, (length, chunk, hop) in enumerate([(2500, 12, 4), (700, 12, 4), (2000, 6, 2)]):
        ramp = torch.linspace(0, 1, chunk * 100)
        ours = overlap_average(
            lambda v, ramp=ramp: torch.stack([v, v**2, v * ramp], 1), golden.signal(length, 58 + index)[None], chunk * 100, hop * 100
        )
        assert reference.error(f"out_chunk{index}", ours[0]) < 1e-5


def test_whole_cinematic_model_goes_to_the_authors_keys_and_back():
    config = TIGERConfig(
        channels=6, hidden_channels=8, blocks=1, scales=2, heads=2, sources=3, window=2048, hop=512, sample_rate=44100, bands=CINEMATIC_BANDS
    )
    torch.manual_seed(0)
    model = TIGERCinematic(config).eval()
    official = to_official("tiger_dnr", model)
    assert {key.split(".")[0] for key in official} == {"music", "effect", "dialog"}
    again = load_official("tiger_dnr", official, out_channels=6, in_channels=8, num_blocks=1, upsampling_depth=2, att_n_head=2)
    with torch.no_grad():
        mixture = torch.randn(1, 8000)
        assert again(mixture, 0.2, 0.1).shape == (1, 3, 8000)
        torch.testing.assert_close(again(mixture, 0.2, 0.1), model(mixture, 0.2, 0.1))


def test_official_keys_survive_a_round_trip_bit_for_bit(golden):
    official = golden.load("tiger").state()
    back = to_official("tiger", load_official("tiger", official))
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("BN.3.1.bias"), "missing BN.3.1.bias"),
        (lambda s: s.update(extra=torch.zeros(2)), "unexpected extra"),
        (lambda s: s.update({"BN.0.1.bias": torch.zeros(3)}), "misshapen BN.0.1.bias"),
    ],
)
def test_a_key_that_does_not_fit_is_named(golden, change, expected):
    state = golden.load("tiger").state()
    change(state)
    with pytest.raises(UserError, match=expected):
        load_official("tiger", state)


def test_unknown_system_and_keyword_are_named():
    with pytest.raises(UserError, match="tiger_tiny"):
        load_official("tiger_tiny", {})
    with pytest.raises(UserError, match="n_blocks"):
        load_official("tiger", {}, n_blocks=2)


def test_estimates_add_up_to_the_mixture(small):
    mixture = torch.randn(2, 4000)
    torch.testing.assert_close(small(mixture).sum(1), mixture, atol=1e-4, rtol=1e-4)


def test_estimates_scale_with_the_mixture_only_through_the_band_norm(small):
    # The band norm removes the level, so masks of a louder mixture are the same and estimates are louder by the same factor.
    mixture = torch.randn(1, 4000)
    with torch.no_grad():
        torch.testing.assert_close(small(3 * mixture), 3 * small(mixture), atol=1e-4, rtol=1e-3)


def test_masks_of_one_channel_separate_another(small):
    mixture = torch.randn(1, 4000)
    with torch.no_grad():
        masks = small.masks(mixture)
        torch.testing.assert_close(small.apply_masks(mixture, masks), small(mixture))
        other = small.apply_masks(2 * mixture, masks)
    torch.testing.assert_close(other, 2 * small(mixture).detach(), atol=1e-4, rtol=1e-3)


def test_c_kernels_and_torch_definition_give_the_same_training_step():
    torch.manual_seed(0)
    single = TIGER(SMALL).eval()
    double = TIGER(SMALL).double().eval()
    double.load_state_dict(single.state_dict())
    mixture = torch.randn(2, 4000)
    single(mixture).square().sum().backward()
    double(mixture.double()).square().sum().backward()  # float64 always takes the definition
    for (name, ours), definition in zip(single.named_parameters(), double.parameters(), strict=True):
        if definition.grad is None:
            assert ours.grad is None, name
        elif definition.grad.norm() > 1e-6:
            assert (ours.grad - definition.grad).norm() / definition.grad.norm() < 1e-3, name


def test_too_short_a_mixture_is_refused_with_the_length_it_needs(small):
    with pytest.raises(ValueError, match="at least 257 samples"):
        small(torch.randn(1, 256))
    assert small(torch.randn(1, 257)).shape == (1, 2, 257)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 10}, "multiple of heads"),
        ({"window": 256}, "widen the bands"),
        ({"channels": 4, "sources": 3, "heads": 2}, "multiple of sources"),
    ],
)
def test_impossible_sizes_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        TIGERConfig(**settings)


def test_bfloat16_autocast_keeps_the_spectrum_in_float32(small):
    mixture = torch.randn(1, 4000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = small(mixture)
    assert mixed.dtype == torch.float32
    with torch.no_grad():
        assert (mixed - small(mixture)).norm() / small(mixture).norm() < 0.05


def test_a_model_that_has_separated_can_still_be_trained(small):
    mixture = torch.randn(1, 3001)  # a length of its own: what the model keeps for a length is made in the first call
    with torch.inference_mode():
        small(mixture)
    small(mixture).square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in small.parameters() if parameter.grad is not None)
