"""EquiformerV3 against the authors' outputs: every part alone, small networks in every form, and the published configurations."""

from __future__ import annotations

import re
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.graphs3d.calculator import FovealCalculator
from foveal.graphs3d.checkpoints import convert_file, energy_terms, load_official, to_official
from foveal.graphs3d.checkpoints.equiformer_v3 import official_name, published_terms
from foveal.graphs3d.checkpoints.terms import EnergyTerms
from foveal.graphs3d.models import equivariant
from foveal.graphs3d.models.equiformer_v3 import (
    Denoising,
    EdgeDegreeEmbedding,
    Edges,
    EquiformerV3,
    EquiformerV3Config,
    FeedForward,
    GraphAttention,
    StressHead,
    envelope,
    gaussian_basis,
)
from foveal.graphs3d.models.harmonics import edge_frames
from foveal.kernels import CSR

#: Sizes of the reference's parts.
PARTS = EquiformerV3Config(
    channels=4, lmax=3, mmax=2, attention_hidden=6, heads=2, alpha_channels=5, value_channels=4, ffn_hidden=10, edge_channels=7, radial=8,
    attention_grid=(10, 8), ffn_grid=(10, 10), cutoff=5.0, max_elements=10, average_degree=3.5,
)  # fmt: skip
PRECISIONS = [(torch.float64, "64", 1e-10), (torch.float32, "", 1e-5)]


def filled(module: torch.nn.Module, golden, part: str, dtype: torch.dtype, prefix: str) -> torch.nn.Module:
    """The module with the reference's weights; `prefix` is where it stands in the whole network."""
    official, whole = golden.state(dtype, part), official_name(f"{prefix}.").removesuffix("affine_")
    state = {key: official[official_name(f"{prefix}.{key}").removeprefix(whole)].view(value.shape) for key, value in module.state_dict().items()}
    module.to(dtype).load_state_dict(state)
    return module.eval()


def edges_of_parts(golden, dtype: torch.dtype) -> Edges:
    source, target = golden.tensor("in_graph_edges")
    csr = CSR.from_edge_index(torch.stack((source, target)), 5)
    order = csr.permutation
    source, target = source[order], target[order]
    csr = CSR(csr.indptr, csr.source, torch.arange(len(order)), 5)
    vectors = golden.tensor("in_attention_vectors", dtype)[order]
    distance = vectors.norm(dim=1)
    numbers, frames = golden.tensor("in_attention_numbers"), edge_frames(vectors / distance.unsqueeze(1), 3, 2)
    return Edges(csr, source, target, numbers[source], numbers[target], gaussian_basis(distance, 5.0, 8), envelope(distance, 5.0), frames)


def build(part: str, dtype: torch.dtype, golden):
    """The part as a function of its inputs, and its parameters by the authors' key."""
    if part == "merged_layer_norm":
        return filled(equivariant.MergedLayerNorm(3, 4), golden, part, dtype, "norm")
    if part == "per_degree_linear":
        return filled(equivariant.DegreeLinear(3, 4, 8), golden, part, dtype, "force_embedding")
    if part in ("so2_linear", "so2_linear_extra"):
        module = equivariant.OrderLinear(3, 2, 4, *((8,) if part == "so2_linear" else (4, 9)))
        return filled(module, golden, part, dtype, "blocks.0.attention.mix")
    if part == "radial_function":
        return filled(equivariant.RadialFunction(8, 6, 16), golden, part, dtype, "blocks.0.attention.invariants.radial")
    if part == "feed_forward":
        return filled(FeedForward(PARTS), golden, part, dtype, "blocks.0.feed")
    if part == "stress_head":
        return filled(StressHead(PARTS), golden, part, dtype, "stress_head")
    if part == "graph_attention":
        return filled(GraphAttention(PARTS, 4), golden, part, dtype, "blocks.0.attention")
    if part == "force_head":
        return filled(GraphAttention(PARTS, 1, sphere=False), golden, part, dtype, "force_head")
    assert part == "edge_degree"
    return filled(EdgeDegreeEmbedding(PARTS), golden, part, dtype, "degree")


@pytest.mark.parametrize(("dtype", "suffix", "limit"), PRECISIONS)
@pytest.mark.parametrize(
    "part",
    ["merged_layer_norm", "per_degree_linear", "so2_linear", "so2_linear_extra", "radial_function", "feed_forward", "stress_head",
     "graph_attention", "force_head", "edge_degree"],
)  # fmt: skip
def test_part_alone_gives_the_authors_output(golden, part, dtype, suffix, limit):
    reference = golden("parts")
    module = build(part, dtype, reference)
    extra = []
    if part == "edge_degree":
        out = module(edges_of_parts(reference, dtype))
    else:
        x = reference.drawn(f"{part}_x", dtype)
        if part in ("graph_attention", "force_head"):
            extra = [edges_of_parts(reference, dtype)]
        elif part == "stress_head":
            extra = [reference.tensor("in_stress_head_batch"), 2]
        elif part.startswith("so2_linear"):
            x = equivariant.by_order(x, 3, 2)
        out = module(x, *extra)
    if part == "radial_function":
        # Theirs writes each degree's weight once an order.
        out = out.view(5, 4, 4)[:, equivariant.degree_index(3)]
    if part.startswith("so2_linear"):
        out, second = out
        if part == "so2_linear_extra":
            assert reference.error(f"out{suffix}_so2_linear_extra_extra", second) < limit
    assert reference.error(f"out{suffix}_{part}", out.flatten(1) if part == "stress_head" else out) < limit


@pytest.mark.parametrize(("dtype", "suffix", "limit"), PRECISIONS)
def test_activations_give_the_authors_output(golden, dtype, suffix, limit):
    reference = golden("parts")

    def inputs(name: str) -> list[torch.Tensor]:
        return [reference.drawn(f"{name}_x", dtype), reference.drawn(f"{name}_scalars", dtype).flatten(1)]

    outs = {
        "swiglu_s2_edge": equivariant.gated_sphere_product(*inputs("swiglu_s2_edge"), 3, 2),
        "swiglu_s2_node": equivariant.gated_sphere_product(*inputs("swiglu_s2_node"), 3, None),
        "gate_edge": equivariant.gated(*inputs("gate_edge"), 3, 2),
        "gate_node": equivariant.gated(*inputs("gate_node"), 3, None),
    }
    for name, out in outs.items():
        assert reference.error(f"out{suffix}_{name}", out) < limit, name


def test_envelope_and_gaussians_are_the_authors(golden):
    reference = golden("parts")
    distance = reference.tensor("in_distance")
    assert reference.error("out64_envelope", envelope(distance, 5.0).unsqueeze(1)) < 1e-12
    assert reference.error("out64_radial_basis", gaussian_basis(distance, 5.0, 9)) < 1e-12


def loaded(golden, dtype: torch.dtype) -> EquiformerV3:
    return load_official("equiformer_v3", golden.state(dtype), **golden.about["config"])


def check(golden, case: str, suffix: str, prediction, limit: float) -> None:
    for name in ("energy", "forces", "stress"):
        value = getattr(prediction, name)
        key = f"out{suffix}_{case}_{name}"
        if key in golden.arrays:
            # The authors' own float32 is this far from their float64.
            own = golden.about["relative_error_fp32_against_fp64"].get(f"{case}_{name}", 0.0) if not suffix else 0.0
            assert golden.error(key, value.flatten(1) if name == "stress" else value) < limit + 3 * own, key


@pytest.mark.parametrize(("dtype", "suffix", "limit"), PRECISIONS)
@pytest.mark.parametrize("case", ["crystal", "molecule", "batch"])
@pytest.mark.parametrize("name", ["tiny_gradient", "tiny_direct", "tiny_denoising"])
def test_small_network_gives_the_authors_energy_forces_and_stress(golden, name, case, dtype, suffix, limit):
    reference = golden(name)
    model = loaded(reference, dtype)
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.about["parameters"]
    check(reference, case, suffix, model(*reference.structure(case, dtype)), limit)


@pytest.mark.parametrize(("dtype", "suffix", "limit"), PRECISIONS)
@pytest.mark.parametrize("case", ["nacl", "ethanol"])
@pytest.mark.parametrize("name", ["seeded_grad_L4", "seeded_dens_L4", "seeded_grad_L6"])
def test_network_with_the_authors_own_random_weights_gives_their_outputs(golden, name, case, dtype, suffix, limit):
    reference = golden(name)
    official = {key.removeprefix("weight_"): reference.tensor(key, dtype) for key in reference.arrays.files if key.startswith("weight_")}
    model = load_official("equiformer_v3", official, **reference.about["config"])
    check(reference, case, suffix, model(*reference.structure(case, dtype)), limit)


@pytest.mark.parametrize(("dtype", "suffix", "limit"), PRECISIONS)
@pytest.mark.parametrize("case", ["crystal", "molecule", "batch"])
def test_corrupted_atoms_are_denoised_as_by_the_authors(golden, case, dtype, suffix, limit):
    reference = golden("tiny_denoising")
    check(reference, f"{case}_denoising", suffix, loaded(reference, dtype)(*reference.structure(case, dtype), told(reference, case, dtype)), limit)


def told(golden, case: str, dtype: torch.dtype) -> Denoising:
    forces, corrupted, structures = (golden.tensor(f"in_{case}_{what}") for what in ("forces", "noise_mask", "dens_batch_mask"))
    return Denoising(forces.to(dtype), corrupted, structures)


def probe(golden, case: str, model: EquiformerV3, dtype: torch.dtype) -> torch.Tensor:
    """The reference's scalar: outputs weighted at random, of the denoising run where there is one."""
    extra = [told(golden, case, dtype)] if model.config.denoising else []
    prediction = model(*golden.structure(case, dtype), *extra)
    total = torch.zeros((), dtype=dtype)
    for output in golden.about["probes"][f"{case}.loss_probe"]:
        value = getattr(prediction, output.removeprefix(f"{case}_"))
        value = value.flatten(1) if output.endswith("stress") else value
        total = total + (value * golden.cotangent(output, value.shape, dtype)).sum()
    return total


@pytest.mark.parametrize("case", ["crystal", "molecule", "batch"])
@pytest.mark.parametrize("name", ["tiny_gradient", "tiny_direct", "tiny_denoising"])
def test_parameters_gradients_of_forces_and_stress_are_the_authors(golden, name, case):
    reference = golden(name)
    model = loaded(reference, torch.float64)
    total = probe(reference, case, model, torch.float64)
    assert float(total.detach()) == pytest.approx(float(reference[f"{case}.loss64_probe"]), rel=1e-8)
    total.backward()
    parameters = {official_name(key): value for key, value in model.named_parameters()}
    keys = [key for key in reference.arrays.files if key.startswith(f"{case}.grad64_")]
    assert len(keys) > 10
    for key in keys:
        size = float(parameters[key.removeprefix(f"{case}.grad64_")].grad.norm())
        assert size == pytest.approx(float(reference[key]), rel=1e-7), key


@pytest.mark.parametrize("name", ["tiny_gradient", "tiny_denoising"])
def test_features_inside_are_the_authors(golden, name):
    reference = golden(name)
    model, seen = loaded(reference, torch.float64), {}
    model.blocks[0].register_forward_hook(lambda module, inputs, out: seen.update(block0=out))
    model.norm.register_forward_hook(lambda module, inputs, out: seen.update(norm=out))
    model(*reference.structure("crystal", torch.float64))
    for where in ("block0", "norm"):
        assert reference.error(f"mid64_crystal_{where}", seen[where]) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "suffix", "limit"), PRECISIONS)
@pytest.mark.parametrize(("name", "case"), [("omat_gradient_l4", "crystal"), ("omat_denoising_l4", "crystal"), ("oc20_l6", "slab")])
def test_published_configuration_gives_the_authors_outputs(golden, name, case, dtype, suffix, limit):
    reference = golden(name)
    model = loaded(reference, dtype)
    with torch.no_grad():
        check(reference, case, suffix, model(*reference.structure(case, dtype)), limit)
        if model.config.denoising:
            check(reference, f"{case}_denoising", suffix, model(*reference.structure(case, dtype), told(reference, case, dtype)), limit)


@pytest.mark.parametrize("name", ["omat_gradient_l4", "omat_denoising_l4", "oc20_l6"])
def test_published_configuration_has_the_published_number_of_parameters(golden, name):
    about = golden(name).about
    with torch.device("meta"):
        from foveal.graphs3d.checkpoints.equiformer_v3 import EQUIFORMER_V3

        config = EQUIFORMER_V3.config_of(about["config"])
        model = EquiformerV3(replace(config, denoising="dens_block.alpha_dot" in about["state_dict"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == about["parameters"]


#: Published configuration -> what differs from the gradient form on OMat24 with lmax 4, and its parameters.
OTHERS = {
    "omat_direct_l6": ({"direct": True, "denoising": True, "lmax": 6, "attention_grid": (20, 8), "ffn_grid": (20, 20)}, 57_077_924),
    "omat_gradient_l6": ({"lmax": 6, "attention_grid": (20, 8), "ffn_grid": (20, 20)}, 48_841_313),
    "mptrj_direct_l4": ({"direct": True, "denoising": True, "radial": 10}, 34_859_044),
    "mptrj_gradient_l4": ({"radial": 10}, 30_278_113),
}


@pytest.mark.parametrize("name", OTHERS)
def test_configurations_without_reference_outputs_have_the_published_number_of_parameters(name):
    changes, parameters = OTHERS[name]
    with torch.device("meta"):
        model = EquiformerV3(EquiformerV3Config(**changes))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_scale_and_references_of_the_authors_checkpoint_make_the_calculator_answer_in_ev(golden, tmp_path):
    reference = golden("tiny_gradient")
    table = torch.zeros(100)
    table[[8, 11, 17]] = torch.tensor([-4.5, -1.25, -2.75])
    rmsd = torch.tensor(4.980640411)
    saved = {
        "state_dict": {f"module._orig_mod.{key}": value for key, value in reference.state(torch.float32).items()},
        "normalizers": {name: {"mean": torch.zeros(1), "rmsd": rmsd} for name in ("energy", "forces", "stress")},
        "elementrefs": {"energy": {"element_references": table}},
    }
    torch.save(saved, tmp_path / "theirs.pt")
    convert_file("equiformer_v3", tmp_path / "theirs.pt", tmp_path / "ours.safetensors", **reference.about["config"])
    calculator = FovealCalculator.from_pretrained(tmp_path / "ours.safetensors", device="cpu")
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    found = calculator.batch([atoms])[0]
    with torch.no_grad():
        raw = calculator.model(*calculator.new_neighbors()(atoms).to(dtype=torch.float32))
    assert found["energy"] == pytest.approx(4.980640411 * float(raw.energy) - 4.0, rel=1e-6)
    assert np.allclose(found["forces"], 4.980640411 * raw.forces.numpy(), rtol=1e-6)


def test_forces_of_another_scale_than_energies_keep_theirs_and_other_means_are_refused():
    oc20 = {"normalizers": {"energy": {"mean": 0.0, "rmsd": 24.9}, "forces": {"mean": 0.0, "rmsd": 0.511}}}
    assert published_terms(oc20).forces_scale == 0.511
    assert EnergyTerms.from_header(published_terms(oc20).header()) == published_terms(oc20)
    oc20["normalizers"]["energy"]["mean"] = 1.0
    with pytest.raises(UserError, match="mean 0"):
        published_terms(oc20)


def test_scale_and_references_go_back_with_the_weights(golden, tmp_path):
    reference, terms = golden("tiny_gradient"), EnergyTerms(2.5, {"Na": -1.25, "Cl": 3.0})
    model = load_official("equiformer_v3", reference.state(torch.float32), **reference.about["config"])
    ours, again = tmp_path / "ours.safetensors", tmp_path / "again.safetensors"
    save_weights(ours, model.state_dict(), system="equiformer_v3", config=model.config, metadata=terms.header())
    convert_file("equiformer_v3", ours, tmp_path / "theirs.pt", back=True)
    convert_file("equiformer_v3", tmp_path / "theirs.pt", again, **reference.about["config"])
    assert energy_terms(again) == terms
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    one, other = (FovealCalculator.from_pretrained(file, device="cpu").batch([atoms])[0] for file in (ours, again))
    assert one["energy"] == other["energy"]
    with pytest.raises(UserError, match=r"ending in \.pt"):
        convert_file("equiformer_v3", ours, tmp_path / "theirs.safetensors", back=True)


def test_weights_go_back_to_the_authors_keys(golden):
    reference = golden("tiny_denoising")
    official = reference.state(torch.float32)
    back = to_official("equiformer_v3", load_official("equiformer_v3", official, **reference.about["config"]))
    assert back.keys() == official.keys() - set(reference.about["kept"])
    assert all(torch.equal(back[key], official[key]) for key in back)


@pytest.mark.parametrize(("keyword", "value"), [("norm_type", "rms_norm"), ("softcap", 50.0), ("use_add_merge", True), ("nonsense", 1)])
def test_variant_that_was_never_published_is_refused(golden, keyword, value):
    reference = golden("tiny_gradient")
    with pytest.raises(UserError, match=keyword):
        load_official("equiformer_v3", reference.state(torch.float32), **{**reference.about["config"], keyword: value})


def test_missing_key_is_named(golden):
    reference = golden("tiny_gradient")
    state = reference.state(torch.float32)
    del state["blocks.1.ga.alpha_dot"]
    with pytest.raises(UserError, match=re.escape("missing blocks.1.ga.alpha_dot")):
        load_official("equiformer_v3", state, **reference.about["config"])
