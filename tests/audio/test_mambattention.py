"""MambAttention against the authors' code: whole, in parts, in float32 and float64, with gradients and with their losses."""

from __future__ import annotations

import pytest
import torch

from foveal.audio import load_official, to_official
from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig, unit_gain
from foveal.core.errors import UserError


@pytest.fixture(scope="module")
def whole(golden):
    return load_official("mambattention", golden.load("mambattention").state())


@pytest.fixture(scope="module")
def double(golden):
    return load_official("mambattention", golden.load("mambattention").state(torch.float64))


def tiny_model(golden, dtype):
    reference = golden.load("mambattention_tiny")
    return load_official("mambattention", reference.state(dtype), **reference.about["config"])


def test_parameters_are_the_published_count(whole):
    assert sum(parameter.numel() for parameter in whole.parameters()) == 2_325_841


def test_half_a_second_equals_the_authors_output(golden, whole):
    reference = golden.load("mambattention")
    magnitude, phase = (torch.from_numpy(reference[name]) for name in ("mag", "pha"))
    with torch.inference_mode():
        out = whole(magnitude, phase)
        x = torch.from_numpy(reference["x"])
        wave = whole.signal(out.magnitude, out.phase, x.shape[-1]) / unit_gain(x)
    assert golden.relative_error(out.magnitude, reference["mag_out"]) < 1e-5
    expected = torch.polar(torch.from_numpy(reference["mag_out"]), torch.from_numpy(reference["pha_out"]))
    assert golden.relative_error(out.parts, torch.view_as_real(expected)) < 1e-5
    assert golden.relative_error(wave, reference["wav"]) < 1e-5


PREFIXES = {torch.float32: "out_", torch.float64: "out64_"}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-7}


@pytest.mark.parametrize("dtype", PREFIXES)
def test_every_block_equals_the_authors(golden, whole, double, dtype):
    reference, model = golden.load("mambattention_parts"), {torch.float32: whole, torch.float64: double}[dtype]
    mid, out = PREFIXES[dtype].replace("out", "mid"), PREFIXES[dtype]

    def equal(name, actual):
        if dtype == torch.float64 and name.startswith("mid"):
            return  # only outputs were kept
        assert reference.error(name, actual) < TOLERANCE[dtype], name

    magnitude, phase = (torch.from_numpy(reference[name]).to(dtype) for name in ("in_magnitude", "in_phase"))
    with torch.inference_mode():
        x = model.encoder(torch.stack([magnitude, phase], dim=1).mT)
        equal(f"{out}encoder", x)
        x = x.permute(0, 2, 3, 1)
        for index, block in enumerate(model.blocks):
            x = block(x)
            equal(f"{mid}block{index}", x.permute(0, 3, 1, 2))
        x = x.permute(0, 3, 1, 2)
        equal(f"{mid}mask", model.mask_decoder(x)[:, None])
        real, imaginary = model.phase_decoder(x).split(1, dim=1)
        equal(f"{mid}phase_real", real)
        equal(f"{mid}phase_imag", imaginary)
        enhanced = model(magnitude, phase)
        equal(f"{out}magnitude", enhanced.magnitude)
        equal(f"{out}phase_cos", enhanced.phase.cos())
        equal(f"{out}phase_sin", enhanced.phase.sin())
        equal(f"{out}complex", enhanced.parts)
        signal = golden.signal(1600, 23)[None].to(dtype)
        equal(f"{out}wav", model.signal(enhanced.magnitude, enhanced.phase, 1600) / unit_gain(signal))


def test_front_end_equals_the_authors_up_to_the_sign_of_real_bins(golden, whole):
    reference = golden.load("mambattention_parts")
    signal = golden.signal(1600, 23)[None]
    for name, floor in (("out_spectrum", 0.0), ("out_spectrum_with_eps", 1e-10)):
        magnitude, phase = whole.spectrum(signal * unit_gain(signal), floor)
        assert reference.error(name, torch.view_as_real(torch.polar(magnitude, phase))) < 1e-5


def test_every_part_alone_equals_the_authors(golden, whole):
    reference = golden.load("mambattention_parts")
    sequence, features = (golden.draw(name, reference.about["arrays"][f"in_{name}"]["shape"]) for name in ("sequence", "features"))
    block = whole.blocks[0]
    forwards = block.time.forwards
    with torch.inference_mode():
        outputs = {
            "out_mixer": forwards.mamba(sequence),
            "out_rmsnorm": forwards.norm(sequence),
            "out_direction": forwards(sequence),
            "out_bidirectional_time": (time := torch.cat([forwards(sequence), block.time.backwards(sequence)], -1)),
            "out_bidirectional_freq": torch.cat([block.frequency.forwards(sequence), block.frequency.backwards(sequence)], -1),
            "out_tlinear": block.time.join(time),
            "out_attention": block.attention(sequence),
            "out_block": block(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            "out_dense_block": whole.mask_decoder.dense(features),
            "out_mask_decoder": whole.mask_decoder(features)[:, None],
            "out_encoder_alone": whole.encoder(golden.draw("encoder", reference.about["arrays"]["in_encoder"]["shape"])),
            # causal: four positions alone are the first four of seventeen
            "out_mixer_steps": forwards.mamba(sequence[:, :4]),
        }
        real, imaginary = whole.phase_decoder(features).split(1, dim=1)
        outputs |= {"out_phase_decoder_real": real, "out_phase_decoder_imag": imaginary}
    errors = {name: reference.error(name, value) for name, value in outputs.items()}
    assert not {name: error for name, error in errors.items() if error > 2e-5}


@pytest.mark.parametrize("name", ["mambattention_parts", "mambattention_tiny"])
def test_gradients_equal_the_authors(golden, name):
    reference = golden.load(name)
    model = tiny_model(golden, torch.float32) if name.endswith("tiny") else load_official("mambattention", reference.state())
    magnitude, phase = (torch.from_numpy(reference[key]) for key in ("in_magnitude", "in_phase"))
    magnitude.requires_grad_()
    out = model(magnitude, phase)
    probed = (("magnitude", out.magnitude), ("complex", out.parts))
    loss = sum((value * golden.draw(label, value.shape, kind="probe")).sum() for label, value in probed)
    assert golden.relative_error(loss, reference["loss_probe"]) < 1e-3
    loss.backward()
    assert golden.relative_error(magnitude.grad.double().norm(), reference["grad_in_magnitude"]) < 1e-3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    gradients = to_official("mambattention", model)
    expected = [key for key in reference.about["arrays"] if key.startswith("grad_") and not key.startswith("grad_in_")]
    assert len(expected) >= 6
    errors = {key: golden.relative_error(gradients[key.removeprefix("grad_")].double().norm(), reference[key]) for key in expected}
    assert max(errors.values()) < 2e-3, errors


@pytest.mark.parametrize("dtype", PREFIXES)
def test_another_shape_of_the_network_on_a_batch_equals_the_authors(golden, dtype):
    reference, model = golden.load("mambattention_tiny"), tiny_model(golden, dtype)
    magnitude, phase = (torch.from_numpy(reference[name]).to(dtype) for name in ("in_magnitude", "in_phase"))
    signals = torch.stack([golden.signal(320, seed) for seed in (24, 25)]).to(dtype)
    with torch.inference_mode():
        out = model(magnitude, phase)
        wave = model.signal(out.magnitude, out.phase, 320) / unit_gain(signals)
    prefix = PREFIXES[dtype]
    for name, actual in (("magnitude", out.magnitude), ("complex", out.parts), ("wav", wave)):
        assert reference.error(f"{prefix}{name}", actual) < TOLERANCE[dtype], name


def test_keys_come_back_as_they_were(golden, whole):
    official = golden.load("mambattention").state()
    back = to_official("mambattention", whole)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], value) for key, value in official.items())


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_a_key_that_does_not_fit_is_named(golden, change):
    state = golden.load("mambattention").state()
    key = "TFMambAttention.2.freq_mamba.backward_blocks.0.mixer.x_proj.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        key = "TFMambAttention.9.tlinear.bias"
        state[key] = torch.zeros(64)
    else:
        state[key] = state[key][:-1]
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_official("mambattention", state)


TINY = MambAttentionConfig(fft=64, window=64, hop=32, channels=8, heads=2, blocks=1, state=4, expansion=2, dense_layers=2)


@pytest.fixture(scope="module")
def small() -> MambAttention:
    torch.manual_seed(0)
    return MambAttention(TINY).eval()


def test_silence_stays_silence_and_does_not_disturb_its_batch(small):
    signal = torch.randn(1, 800, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.inference_mode():
        both = small.enhance(torch.cat([signal, torch.zeros_like(signal)]))
        alone = small.enhance(signal)
    assert not both[1].any()
    torch.testing.assert_close(both[:1], alone, atol=1e-6, rtol=1e-4)


def test_level_in_is_level_out(small):
    signal = torch.randn(1, 800, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # powers of two: a rounding error may turn the phase of a real bin by half a turn
        quiet, loud = small.enhance(2**-10 * signal), small.enhance(4 * signal)
    torch.testing.assert_close(2**12 * quiet, loud, atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_weight_and_stay_finite(small):
    model = MambAttention(TINY)
    clean = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))
    model.enhance(clean).square().mean().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_half_precision_computes_angles_in_single(small):
    signal = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = small(*small.spectrum(signal))
    assert out.parts.dtype == torch.float32
    with torch.inference_mode():
        exact = small(*small.spectrum(signal))
    assert (out.parts - exact.parts).norm() < 0.1 * exact.parts.norm()


@pytest.mark.parametrize("shape", [(1, 201, 5), (33, 5), (1, 5, 33)])
def test_a_spectrum_of_another_shape_is_refused(small, shape):
    with pytest.raises(ValueError, match=r"33 bins"):
        small(torch.zeros(shape), torch.zeros(shape))


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 10, "heads": 4},
        {"fft": 401, "window": 401},
        {"hop": 300},
        {"window": 512},
        {"narrowing": 3},
        {"residual": True, "largest_mask": 1.0},
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        MambAttentionConfig(**wrong)


@pytest.mark.parametrize("changed", [{}, {"narrowing": 4}, {"largest_mask": 3.0}])
def test_a_residual_network_starts_as_the_identity_and_can_leave_it(changed):
    torch.manual_seed(0)
    config = MambAttentionConfig(
        fft=64, window=64, hop=32, channels=8, heads=2, blocks=1, state=4, expansion=1, dense_layers=2, residual=True, **changed
    )
    model, noisy = MambAttention(config), torch.randn(2, 1000)
    torch.testing.assert_close(model.enhance(noisy), noisy, atol=1e-5, rtol=1e-4)
    model.enhance(noisy).square().sum().backward()
    assert model.mask_decoder.last.weight.grad.abs().sum() > 0
    assert model.phase_decoder.parts.weight.grad is not None


@pytest.mark.parametrize("narrowing", [1, 2, 4, 8])
def test_features_have_as_many_bands_as_the_narrowing_leaves_and_bins_come_back(narrowing):
    config = MambAttentionConfig(fft=64, window=64, hop=32, channels=4, heads=2, blocks=1, state=2, expansion=1, dense_layers=1, narrowing=narrowing)
    model = MambAttention(config)
    magnitude, phase = torch.rand(1, 33, 5), torch.randn(1, 33, 5)
    assert model.encoder(torch.stack([magnitude, phase], 1).mT).shape == (1, 4, 5, 32 // narrowing)
    assert model(magnitude, phase).parts.shape == (1, 33, 5, 2)


def test_a_network_without_place_in_the_authors_code_is_not_converted_back():
    small = {"fft": 64, "window": 64, "hop": 32, "channels": 4, "heads": 2, "blocks": 1, "state": 2, "expansion": 1, "dense_layers": 1}
    for change in ({"residual": True}, {"narrowing": 4}):
        with pytest.raises(UserError, match="no place"):
            to_official("mambattention", MambAttention(MambAttentionConfig(**small, **change)))
