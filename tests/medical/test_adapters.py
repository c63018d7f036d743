"""Adapting vision-language models: open_clip's own models load and give its numbers, adapters train, are small and answer from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from foveal.apps.main import run
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError
from foveal.medical import vision_language
from foveal.medical.checkpoints import load_official, to_official
from foveal.medical.data.image_texts import find_pairs
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig, AdaptedCLIP
from foveal.medical.models.biomed_clip import BiomedCLIP, BiomedCLIPConfig
from foveal.medical.models.clip import CLIP, CLIPConfig
from foveal.medical.retrieval_metrics import ranks, recalls
from foveal.medical.tasks.export import export
from foveal.medical.vision_language import BaseChoice, load_base, open_clip_tokenizer, word_pieces
from foveal.medical.zero_shot import ZeroShot, load_adapter, read_prompts

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "medical").glob("ace_lora_*.yaml"))
TINY = BiomedCLIPConfig(width=16, image_size=32, patch=8, image_width=64, image_layers=2, image_heads=1, vocabulary=40, context=24, text_width=64,
                        text_layers=2, text_heads=1, text_inner=64)  # fmt: skip
TINY_CLIP = CLIPConfig(width=16, image_size=32, patch=8, image_width=128, image_layers=2, image_heads=2, text_width=64, text_layers=2, text_heads=1)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "chest", "x", "-", "ray", "image", "of", "find", "##ings", "suggesting", ".", "no", "finding", "pneumonia", "effusion", "left", "right"],
]


def adapter_of(config: BiomedCLIPConfig | CLIPConfig) -> ACELoRA:
    sizes = {name: getattr(config, name) for name in ("text_layers", "text_width", "image_layers", "image_width", "width")}
    adapter = ACELoRA(ACELoRAConfig(**sizes, hidden=8, neighbours=3))
    for lora in (adapter.text_lora, adapter.image_lora):
        torch.nn.init.normal_(lora.up, std=0.1)
    return adapter.eval()


@pytest.fixture
def tiny_folder(tmp_path):
    """A folder as a hub publishes BiomedCLIP, tiny; gives it."""
    torch.manual_seed(0)
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(to_official("biomed_clip", BiomedCLIP(TINY)), folder / "open_clip_pytorch_model.bin")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def write_pairs(tmp_path):
    """Write a table of films and texts; gives it."""

    def write(count: int = 16, header: str = "file,text,label,patient", line=None) -> Path:
        generator, lines = np.random.default_rng(0), [header]
        for number in range(count):
            sick = number % 2
            pixels = generator.integers(0, 80, (36, 30)) + 150 * sick
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"film{number}.png")
            said = f"a chest x-ray image of {'pneumonia' if sick else 'no finding'} {'left' if number % 4 < 2 else 'right'}."
            lines.append(line(number, said) if line else f'film{number}.png,"{said}",{"pneumonia" if sick else "none"},p{number}')
        (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "pairs.csv"

    return write


@pytest.mark.parametrize("quick", [False, True])
def test_open_clips_own_models_load_and_give_its_embeddings(quick):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
    theirs = open_clip.CLIP(16, sizes, {"context_length": 77, "width": 64, "heads": 1, "layers": 2}, quick_gelu=quick).eval()
    ours = load_official("open_clip", theirs.state_dict(), **vision_language.sizes_of(theirs.state_dict(), "open_clip"), quick=quick)
    assert isinstance(ours, CLIP)
    image = torch.randn(2, 3, 32, 32)
    text = open_clip_tokenizer(77)(["left lower lobe pneumonia", "no acute finding in this film of the chest"])
    with torch.no_grad():
        found_image, found_text = ours(image, text)
        torch.testing.assert_close(found_image, theirs.encode_image(image, normalize=True), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found_text, theirs.encode_text(text, normalize=True), atol=1e-5, rtol=1e-5)
    back = to_official("open_clip", ours)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in theirs.state_dict().items()}


def test_a_model_that_open_clip_names_loads_through_it_with_its_own_heads_and_activation(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-S-32-alt", pretrained=None).state_dict(), tmp_path / "small.pt")
    base = load_base(BaseChoice(f"ViT-S-32-alt/{tmp_path / 'small.pt'}"))
    assert base.network.config.image_heads == 6
    alone = load_base(BaseChoice(str(tmp_path / "small.pt")))
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(base.network.image(image).tokens, alone.network.image(image).tokens)
    with pytest.raises(UserError, match="expected a folder, a file, hf-hub:OWNER/NAME, or open_clip's NAME/TAG"):
        load_base(BaseChoice("ViT-of-nobody/laion"))


def test_tokens_after_a_texts_end_have_no_attention_and_the_class_token_comes_first():
    torch.manual_seed(0)
    tower = CLIP(TINY_CLIP).text.eval().requires_grad_(False)
    text = open_clip_tokenizer(77)(["pneumonia"])
    tokens, attention = tower(text)
    assert int(text.argmax()) == 2
    assert (attention[0, 2:] == 0).all()
    assert float(attention.sum()) < 1, "the rest is what the class token attends to in itself"
    changed = text.clone()
    changed[0, 5] = 7
    torch.testing.assert_close(tower(changed).tokens[:, 0], tokens[:, 0])


def test_an_adapter_that_has_learnt_nothing_leaves_both_makes_towers_as_they_are():
    torch.manual_seed(0)
    for model, config, text in (
        (BiomedCLIP(TINY), TINY, torch.randint(1, 40, (2, 24))),
        (CLIP(TINY_CLIP), TINY_CLIP, open_clip_tokenizer(77)(["a", "b c"])),
    ):
        adapter = adapter_of(config)
        for lora in (adapter.text_lora, adapter.image_lora):
            torch.nn.init.zeros_(lora.up)
        adapted, image = AdaptedCLIP(model.eval(), adapter), torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(adapted.image_tokens(image), model.image(image))
        torch.testing.assert_close(adapted.text_tokens(text), model.text(text))
        assert adapted.classes(text[None]).shape == (1, 16)


def test_a_hubs_folder_gives_the_model_its_sizes_and_its_tokenizer(tiny_folder, monkeypatch):
    base = load_base(BaseChoice(str(tiny_folder)))
    assert base.network.config == TINY
    assert base.preparation.size == 32
    assert base.tokenizer(["No Finding."]).tolist() == [[2, 16, 17, 15, 3, *[0] * 19]]
    torch.testing.assert_close(base.tokenizer(["left " * 90])[0, -1], torch.tensor(3), msg="a long text keeps its end token")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tiny_folder))
    again = load_base(BaseChoice("hf-hub:owner/name"))
    torch.testing.assert_close(again.network.text.words.weight, base.network.text.words.weight)
    assert asked[0][0] == "owner/name"
    assert {"open_clip_config.json", "tokenizer.json", "open_clip_pytorch_model.bin"} <= set(asked[0][1])


def test_what_is_no_model_is_refused_in_one_line(tiny_folder, tmp_path, monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("Network is unreachable\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    (tmp_path / "empty").mkdir()
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pt")
    weights = tiny_folder / "open_clip_pytorch_model.bin"
    (tiny_folder / "vocab.txt").unlink()
    cases = {
        "hf-hub:owner/name": "expected to fetch owner/name from its hub; Network is unreachable second line; download",
        str(tmp_path / "empty"): "expected weights .*; found none",
        str(tmp_path / "resnet.pt"): "expected weights of CLIP's ViTs or of BiomedCLIP's make.*is missing",
        str(weights): "expected the tokenizer of .*name it with --tokenizer",
        "random:nothing": "expected random:biomed_clip or random:open_clip",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_base(BaseChoice(source))
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read as one"):
        word_pieces(tmp_path / "tokenizer.json", 8)
    (tiny_folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}})
    )
    with pytest.raises(UserError, match="expected a model of images with CLIP's mean and spread"):
        load_base(BaseChoice(str(tiny_folder)))


def test_a_table_gives_pairs_with_findings_of_one_column_or_of_chexperts(write_pairs):
    cases, findings = find_pairs(write_pairs())
    assert findings == ["none", "pneumonia"]
    assert [case.findings for case in cases[:2]] == [(1.0, 0.0), (0.0, 1.0)]
    table = write_pairs(header="file,text,Edema,Fracture", line=lambda number, said: f'film{number}.png,"{said}",{("1", "-1", "0", "")[number % 4]},')
    cases, findings = find_pairs(table, label_columns=["Edema", "Fracture"])
    assert findings == ["Edema", "Fracture"]
    assert [case.findings[0] for case in cases[:3]] == [1.0, -1.0, 0.0]
    assert np.isnan([cases[3].findings[0], cases[0].findings[1]]).all()
    assert find_pairs(write_pairs(header="file,text", line=lambda number, said: f'film{number}.png,"{said}"'))[1] == []


def test_what_is_wrong_with_a_table_of_pairs_is_said_in_one_line(write_pairs, tmp_path):
    with pytest.raises(UserError, match=r"expected a column for the text in .*; it has file, label"):
        find_pairs(write_pairs(header="file,label", line=lambda number, said: f"film{number}.png,a"))
    with pytest.raises(UserError, match=r"expected a text for every image in .*; line 4 has none"):
        find_pairs(write_pairs(line=lambda number, said: f"film{number}.png,{'' if number == 2 else 'said'},a,p"))
    with pytest.raises(UserError, match=r"expected columns of findings in .*; Edema is not there"):
        find_pairs(write_pairs(), label_columns=["Edema"])
    with pytest.raises(UserError, match=r"expected 1, 0, -1 or nothing in column label .*; line 2 has 'none'"):
        find_pairs(write_pairs(), label_columns=["label"])
    table = write_pairs()
    (tmp_path / "film3.png").unlink()
    with pytest.raises(UserError, match=r"names in .*; 1 are not there: film3.png"):
        find_pairs(table)


@given(seed=st.integers(0, 100))
def test_ranks_are_what_sorting_gives_and_a_model_that_cannot_tell_is_wrong(seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    fitting = torch.zeros(6, 9, dtype=torch.bool)
    fitting[torch.arange(6), torch.randint(9, (6,), generator=generator)] = True
    expected = [1 + similarity[row].argsort(descending=True).tolist().index(int(fitting[row].nonzero())) for row in range(6)]
    assert ranks(similarity, fitting).tolist() == expected
    assert ranks(torch.zeros(6, 9), fitting).tolist() == [9] * 6


def test_recall_counts_a_text_that_stands_beside_several_images_as_right_for_each():
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=-1)
    swapped = vectors[[1, 0, 2]]
    assert recalls(vectors, swapped, ["same", "same", "other"])["image_to_text_recall_at_1"] == 1.0
    apart = recalls(vectors, swapped, ["a", "b", "c"])
    assert apart["image_to_text_recall_at_1"] == apart["text_to_image_recall_at_1"] == pytest.approx(1 / 3)
    assert "image_to_text_recall_at_5" not in apart


def test_prompts_are_names_or_sentences(tmp_path):
    (tmp_path / "names.txt").write_text("pneumonia\n\nno finding\n")
    assert read_prompts(tmp_path / "names.txt")["pneumonia"] == ["a chest X-ray image of pneumonia.", "Findings suggesting pneumonia."]
    (tmp_path / "said.yaml").write_text("sick: [white lungs, opacity]\nwell: clear lungs\n")
    assert read_prompts(tmp_path / "said.yaml") == {"sick": ["white lungs", "opacity"], "well": ["clear lungs"]}
    (tmp_path / "one.txt").write_text("alone\n")
    (tmp_path / "empty.yaml").write_text("a: x\nb:\n")
    for name, message in {"one.txt": "expected at least two classes", "empty.yaml": "b has none", "no.txt": "does not exist"}.items():
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)


def test_classes_of_equal_sentences_get_equal_probabilities_and_the_adapter_matters(tiny_folder):
    base, film = load_base(BaseChoice(str(tiny_folder))), np.random.default_rng(0).random((40, 30))
    plain, adapted = ZeroShot(base, None, "cpu"), ZeroShot(base, adapter_of(TINY), "cpu")
    prompts = {"a": ["left pneumonia"], "b": ["left pneumonia"], "c": ["no finding", "x-ray"], "d": ["right"]}
    for asked in (plain, adapted):
        shares = asked.classify(film, prompts)
        assert shares["a"] == pytest.approx(shares["b"], rel=1e-5)
        assert sum(shares.values()) == pytest.approx(1.0)
    assert abs(plain.classify(film, prompts)["c"] - adapted.classify(film, prompts)["c"]) > 1e-3
    torch.testing.assert_close(adapted.text_vectors(["left", "right"])[1:], adapted.class_vectors({"d": ["right"]}))


def test_the_command_classifies_and_measures_retrieval_with_a_base_on_disk(tiny_folder, write_pairs, tmp_path, capsys):
    table, out = write_pairs(), tmp_path / "out"
    (tmp_path / "names.txt").write_text("pneumonia\nno finding\n")
    (tmp_path / "letter.png").write_text("dear colleague")
    shared = ["medical", "zero-shot", "--base", str(tiny_folder), "-o", str(out), "--device", "cpu", "--json"]
    assert run([*shared, str(tmp_path / "film0.png"), str(tmp_path / "letter.png"), "--prompts", str(tmp_path / "names.txt")]) == 2
    good, bad = json.loads(capsys.readouterr().out)["files"]
    assert (good["state"], bad["state"]) == ("done", "failed")
    assert good["numbers"]["pneumonia"] + good["numbers"]["no finding"] == pytest.approx(1.0)
    assert (out / "zero_shot.csv").read_text().startswith("film,likeliest,pneumonia,no finding\n")
    truth = ["--truth", str(table), "--overwrite"]
    (tmp_path / "names.txt").write_text("pneumonia\nnone\n")
    assert run([*shared, *(str(tmp_path / f"film{n}.png") for n in range(4)), "--prompts", str(tmp_path / "names.txt"), *truth]) == 0
    assert json.loads(capsys.readouterr().out)["files"][-1]["source"] == "4 films of known class"
    assert json.loads((out / "zero_shot.json").read_text())["films"] == 4
    assert run([*shared, "--pairs", str(table)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert 0 <= entry["numbers"]["image to text R@5"] <= 1
    assert json.loads((out / "retrieval.json").read_text())["pairs"] == 16
    assert len((out / "retrieval.csv").read_text().splitlines()) == 17
    assert run([*shared, "--pairs", str(table)]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"
    for wrong, message in {(): "expected one of --prompts", ("--prompts", str(tmp_path / "names.txt")): "expected images to classify"}.items():
        assert run([*shared, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_released_adapter_is_refused_on_a_model_of_other_sizes_and_loads_as_it_is(tiny_folder, medical_data):
    file = medical_data / "ace_lora" / "ACE_LoRA.pt"
    if not file.is_file():
        pytest.skip("the released adapter (../shared/data/medical/ace_lora) is not here")
    adapter = load_adapter(file)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 969_217
    with pytest.raises(UserError, match=r"expected an adapter with text_layers = 2.*choose the base model that the adapter was trained on"):
        ZeroShot(load_base(BaseChoice(str(tiny_folder))), adapter, "cpu")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_its_adapter_alone_exports_it_small_and_asks_with_it(config, tiny_folder, write_pairs, tmp_path, capsys):
    written = yaml.safe_load(config.read_text())
    columns = written["data"]["init_args"].get("label_columns", [])
    header, line = "file,text,label,patient", None
    if columns:
        header = f"file,text,patient,{','.join(columns)}"
        line = lambda number, said: f'film{number}.png,"{said}",p{number},{",".join("1" if k == number % 2 else "0" for k in range(len(columns)))}'
    written["data"]["init_args"] |= {"root": str(write_pairs(24, header, line).parent), "batch_size": 4, "workers": 0}
    written["data"]["init_args"] |= {"validation": 0.2, "test": 0.2}
    written["model"]["init_args"]["base"] = {"source": str(tiny_folder)}
    changed, runs = tmp_path / "changed.yaml", tmp_path / "runs"
    changed.write_text(yaml.safe_dump(written))
    shared = ["--config", str(changed), "--runs", str(runs), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    shared += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    cli = FovealCLI("medical", ["fit", *shared, "--trainer.max_steps", "3", "--trainer.max_epochs", "1", "--trainer.val_check_interval", "1"])
    before = load_base(BaseChoice(str(tiny_folder))).network.state_dict()
    for key, value in cli.model.network.base.state_dict().items():
        torch.testing.assert_close(value, before[key], msg="the model is frozen")
    assert float(cli.model.network.adapter.image_lora.up.abs().max()) > 0, "the adapter learns"
    best = next(runs.rglob("best.ckpt"))
    saved = torch.load(best, weights_only=True)
    assert all(key.startswith("network.adapter.") for key in saved["state_dict"])
    tested = FovealCLI("medical", ["test", *shared, "--ckpt_path", "best"])
    assert 0 <= float(tested.trainer.callback_metrics["test/recall_at_1"]) <= 1
    torch.testing.assert_close(tested.model.network.adapter.image_lora.up, saved["state_dict"]["network.adapter.image_lora.up"])
    adapter = load_adapter(export(best, tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(adapter.image_lora.up, saved["state_dict"]["network.adapter.image_lora.up"], atol=1e-3, rtol=1e-3)
    assert load_adapter(best.parent.parent).config == adapter.config
    (tmp_path / "names.txt").write_text("pneumonia\nno finding\n")
    command = ["medical", "zero-shot", str(tmp_path / "film0.png"), "--prompts", str(tmp_path / "names.txt"), "--base", str(tiny_folder)]
    assert run([*command, "--adapter", str(tmp_path / "adapter.safetensors"), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "film0.png" in capsys.readouterr().out


def test_an_exported_adapter_of_the_published_size_is_under_five_megabytes(tmp_path):
    from foveal.core.checkpoint import save_weights

    adapter = ACELoRA()
    file = save_weights(tmp_path / "adapter.safetensors", adapter.state_dict(), system="ace_lora", config=adapter.config)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == 969_217
    assert file.stat().st_size < 5_000_000


def test_retrieval_of_several_processes_is_over_all_pairs(tiny_folder, monkeypatch):
    from types import SimpleNamespace

    from foveal.medical.tasks.adaptation import AdaptationTask, AdapterChoice

    torch.manual_seed(0)
    task = AdaptationTask(BaseChoice(str(tiny_folder)), AdapterChoice(rank=2))
    image, text = (torch.nn.functional.normalize(torch.randn(7, 4), dim=-1) for _ in range(2))
    texts, logged = [f"text {number}" for number in range(7)], {}
    # Dealt out in turn to two processes, the first pair again at the end of the second share.
    dealt = ([0, 2, 4, 6], [1, 3, 5, 0])
    shares = [[(image[index], text[index], texts[index]) for index in part] for part in dealt]
    task._trainer = SimpleNamespace(world_size=2, datamodule=SimpleNamespace(pairs=lambda part: range(7)))
    task._seen, task._texts = [(image[dealt[0]], text[dealt[0]])], [texts[index] for index in dealt[0]]
    monkeypatch.setattr(task, "log", lambda name, value, **how: logged.update({name: float(value)}))
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), shares))
    task._log_recalls("val")
    for name, value in recalls(image, text, texts).items():
        assert logged[f"val/{name}"] == pytest.approx(value), name


def test_a_batch_size_of_one_and_a_checkpoint_of_other_sizes_are_refused(tiny_folder):
    from foveal.medical.data.image_texts import PairTable
    from foveal.medical.tasks.adaptation import AdaptationTask, AdapterChoice

    with pytest.raises(UserError, match="expected batches of at least 2 pairs"):
        PairTable("x", batch_size=1)
    task = AdaptationTask(BaseChoice(str(tiny_folder)), AdapterChoice(rank=2))
    other = AdaptationTask(BaseChoice(str(tiny_folder)), AdapterChoice(rank=3))
    with pytest.raises(UserError, match=r"expected a checkpoint of the same model and adapter; 4 tensors differ"):
        task.on_load_checkpoint({"state_dict": other.state_dict()})


_PROCESSES = """
import sys, torch, lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from foveal.medical.data.image_texts import PairTable
from foveal.medical.tasks.adaptation import AdaptationTask, AdapterChoice
from foveal.medical.vision_language import BaseChoice

class Task(AdaptationTask):
    def on_after_backward(self):
        gradient = torch.cat([p.grad.flatten() for p in self.network.adapter.parameters()])
        if self.trainer.is_global_zero:
            torch.save(gradient, sys.argv[3])

if __name__ == "__main__":
    processes = int(sys.argv[4])
    torch.manual_seed(0)
    task = Task(BaseChoice(sys.argv[1]), AdapterChoice(dropout=0.0, neighbours=3))
    for lora in (task.network.adapter.text_lora, task.network.adapter.image_lora):
        torch.nn.init.normal_(lora.up, std=0.1)
    data = PairTable(sys.argv[2], batch_size=8 // processes)
    strategy = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer = pl.Trainer(accelerator="cpu", devices=processes, strategy=strategy, max_steps=1, limit_val_batches=0, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[2])
    trainer.fit(task, data)
"""


@pytest.mark.slow
def test_two_processes_hold_all_their_pairs_against_each_other_and_get_the_gradients_of_one(tiny_folder, write_pairs, tmp_path):
    script, folder = tmp_path / "script.py", write_pairs(24).parent
    script.write_text(_PROCESSES)
    for processes in (1, 2):
        command = [sys.executable, str(script), str(tiny_folder), str(folder), str(tmp_path / f"{processes}.pt"), str(processes)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert float(one.norm()) > 0
    torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)
