"""Training to enhance: noisy speech is what is asked for, what is optimised is what is promised, the configs run, nothing waits for PESQ."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
import yaml

from foveal.audio.data.librispeech import find_utterances
from foveal.audio.data.mixing import MixingRule, Utterance
from foveal.audio.data.noisy_folders import DNSChallenge, NoisyFolders, VoiceBankDEMAND
from foveal.audio.data.noisy_speech import NoiseKinds, NoisyLibriSpeech, NoisySpeech
from foveal.audio.enhance import Enhancer
from foveal.audio.enhancement_losses import LossWeights, MetricDiscriminator
from foveal.audio.metrics import has_perceptual_extras
from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig
from foveal.audio.speech_quality import Scorers
from foveal.audio.tasks.enhancement import EnhancementTask
from foveal.audio.tasks.export import export
from foveal.audio.tasks.metric_discriminator import DiscriminatorTraining
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "audio").glob("mambattention*.yaml"))
TINY = MambAttentionConfig(fft=64, window=64, hop=32, channels=8, heads=2, blocks=1, state=4, expansion=1, dense_layers=2, residual=True)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
RULE = MixingRule(seconds=0.75, sources=1, noisy=1.0, snr=(0.0, 10.0))
FEW = NoiseKinds(talkers=(2, 3))
KINDS = {"babble": "babble", "speech-shaped": "speech_shaped", "coloured": "coloured", "recorded": "recorded"}


@pytest.fixture(scope="session")
def noises(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noises")
    for index in range(3):
        soundfile.write(folder / f"noise{index}.wav", 0.1 * np.random.default_rng(index).standard_normal(9000), 16_000)
    return folder


def data_of(librispeech: Path, noises: Path, **further: Any) -> NoisyLibriSpeech:
    settings = {"validation_speakers": 3, "validation_examples": 2, "test_examples": 3, "examples": 4, "batch_size": 2, **further}
    kinds = {"noise": FEW, "evaluation_noise": NoiseKinds(talkers=(2, 2), coloured=0)}
    return NoisyLibriSpeech(str(librispeech), str(librispeech), str(noises), ["noise2.wav"], mixing=RULE, evaluation=RULE, **kinds, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_noise_stands_at_the_snr_that_was_drawn(librispeech: Path, noises: Path, kind: str):
    weights = {name: float(name == KINDS[kind]) for name in KINDS.values()}
    rule = MixingRule(seconds=0.75, sources=1, noisy=1.0, snr=(3.0, 3.0))
    data = NoisySpeech(find_utterances(librispeech), rule, NoiseKinds(talkers=(2, 3), **weights), 4, seed=0, noises=sorted(noises.iterdir()))
    for index in range(4):
        example = data[index]
        clean, noise = example.sources[0], example.mixture - example.sources[0]
        assert example.group == kind
        assert float(20 * torch.log10(clean.norm() / noise.norm())) == pytest.approx(3.0, abs=0.01)
        assert noise.unfold(0, 1000, 1000).square().mean(-1).min() > 0, "a part of the noise is silence"


def test_noisy_speech_is_a_function_of_its_number(librispeech: Path, noises: Path):
    first, second = (NoisySpeech(find_utterances(librispeech), RULE, FEW, 9, seed=1, noises=sorted(noises.iterdir())) for _ in range(2))
    second[3]
    assert torch.equal(first[7].mixture, second[7].mixture)
    assert not torch.equal(first[7].mixture, first[8].mixture)


def test_babble_is_of_others_than_the_speaker(tmp_path: Path):
    """Every speaker hums at a pitch of their own: the speaker's is absent from the noise, several others are in it."""
    time_axis = np.arange(32_000) / 16_000
    for speaker in range(5):
        soundfile.write(tmp_path / f"{speaker}.flac", 0.1 * np.sin(2 * np.pi * 200 * (speaker + 1) * time_axis), 16_000)
    utterances = [Utterance(tmp_path / f"{speaker}.flac", str(speaker)) for speaker in range(5)]
    kinds = NoiseKinds(talkers=(3, 3), speech_shaped=0, coloured=0, recorded=0)
    data = NoisySpeech(utterances, MixingRule(seconds=1.0, sources=1, noisy=1.0), kinds, 6, seed=0)
    for index in range(6):
        example = data[index]
        speaker = int(example.name.split("-")[1])
        spectrum = torch.fft.rfft(example.mixture - example.sources[0]).abs()
        heard = [int(spectrum[200 * (pitch + 1)] > 0.1 * spectrum.max()) for pitch in range(5)]
        assert heard[speaker] == 0
        assert sum(heard) == 3


def test_speech_shaped_noise_has_the_spectrum_of_speech_and_no_pauses(librispeech: Path):
    kinds = NoiseKinds(babble=0, coloured=0, recorded=0)
    data = NoisySpeech(find_utterances(librispeech), MixingRule(seconds=2.0, sources=1, noisy=1.0), kinds, 1, seed=0)
    noise = data[0].mixture - data[0].sources[0]
    power = torch.stft(noise, 512, window=torch.hann_window(512), return_complex=True).abs().square()
    assert 10 * torch.log10(power[3:30].mean() / power[160:].mean()) > 10, "speech falls towards high frequencies"
    levels = 10 * torch.log10(noise.unfold(0, 800, 800).square().mean(-1))
    assert levels.max() - levels.min() < 12


def test_noises_kept_for_testing_are_heard_in_testing_alone(librispeech: Path, noises: Path):
    data = data_of(librispeech, noises)
    data.setup()
    assert [path.name for path in data.test.noises] == ["noise2.wav"]
    assert {path.name for part in (data.train, data.validation) for path in part.noises} == {"noise0.wav", "noise1.wav"}
    assert not set(data.train.speakers) & set(data.validation.speakers)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda: NoiseKinds(talkers=(5, 2)), "swap"),
        (lambda: NoiseKinds(0, 0, 0, 0), "not all 0"),
        (lambda: NoisySpeech([Utterance(Path("a"), "a")], MixingRule(sources=2), NoiseKinds(), 1), "one source"),
        (lambda: NoisySpeech([Utterance(Path("a"), "a")], RULE, NoiseKinds(), 1), "noise files"),
        (lambda: NoisySpeech([Utterance(Path("a"), "a")], RULE, NoiseKinds(recorded=0), 1), "speakers for babble"),
    ],
)
def test_rules_that_cannot_be_are_refused(change: Callable[[], Any], complaint: str):
    with pytest.raises(UserError, match=complaint):
        change()


def test_unknown_test_noises_are_named(librispeech: Path, noises: Path):
    data = NoisyLibriSpeech(str(librispeech), str(librispeech), str(noises), ["gone.wav"])
    with pytest.raises(UserError, match=r"gone\.wav"):
        data.setup("fit")


# --- folders -------------------------------------------------------------------------------------------------------------------------


def write_pairs(speech: list[np.ndarray], noisy: Path, clean: Path, names: list[tuple[str, str]], rate: int = 16_000, seconds: float = 2.5) -> None:
    for index, (name, other) in enumerate(names):
        signal = speech[index % len(speech)][: int(seconds * rate)]
        for folder, file, content in ((noisy, name, 2 * signal), (clean, other, signal)):
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / file, content, rate, subtype="FLOAT")


def test_demandex_folders_are_read_in_crops_and_whole(speech: list[np.ndarray], tmp_path: Path):
    for part in ("train", "valid", "test"):
        write_pairs(speech, tmp_path / f"noisy_{part}", tmp_path / f"clean_{part}", [(f"{index}.wav",) * 2 for index in range(4)])
    data = NoisyFolders(str(tmp_path), seconds=1.0, batch_size=2, workers=0)
    data.setup()
    (batch, _) = list(data.train_dataloader())
    assert batch.mixture.shape == (2, 16_000)
    torch.testing.assert_close(batch.mixture, 2 * batch.sources[:, 0])
    assert next(iter(data.test_dataloader())).mixture.shape == (1, 40_000)


def test_crops_of_short_files_are_filled_with_zeros(speech: list[np.ndarray], tmp_path: Path):
    write_pairs(speech, tmp_path / "noisy_train", tmp_path / "clean_train", [("a.wav", "a.wav")], seconds=0.5)
    data = NoisyFolders(str(tmp_path), seconds=1.0, batch_size=1, workers=0)
    (file,) = data.find("train")
    example = data.files([file], 16_000, 1.0)[0]
    assert example.mixture.shape == (16_000,)
    assert not example.mixture[8000:].any()
    assert example.mixture[:8000].any()


def test_voicebank_at_48_khz_is_resampled_and_validated_on_speakers_of_its_own(speech: list[np.ndarray], tmp_path: Path):
    names = [(f"p{speaker}_{index:03d}.wav",) * 2 for speaker in (225, 226, 228) for index in range(2)]
    for part in ("trainset_28spk", "testset"):
        write_pairs(speech, tmp_path / f"noisy_{part}_wav", tmp_path / f"clean_{part}_wav", names, rate=48_000, seconds=0.75)
    data = VoiceBankDEMAND(str(tmp_path), validation_speakers=("p226",), seconds=0.25, batch_size=4, workers=0)
    data.setup()
    assert {file.mixture.stem[:4] for file in data.train.files} == {"p225", "p228"}
    assert {file.mixture.stem[:4] for file in data.validation.files} == {"p226"}
    batch = next(iter(data.train_dataloader()))
    assert batch.mixture.shape == (4, 4000)
    torch.testing.assert_close(batch.mixture, 2 * batch.sources[:, 0], atol=1e-5, rtol=1e-4)
    assert next(iter(data.test_dataloader())).mixture.shape[-1] == pytest.approx(12_000 * 2.5 / 2.5, abs=2)


def test_dns_files_are_matched_by_their_number(speech: list[np.ndarray], tmp_path: Path):
    names = [(f"book_x_snr{index}_tl-20_fileid_{index}.wav", f"clean_fileid_{index}.wav") for index in range(6)]
    write_pairs(speech, tmp_path / "noisy", tmp_path / "clean", names)
    data = DNSChallenge(str(tmp_path), validation_files=2, seconds=1.0, batch_size=4, workers=0)
    data.setup()
    assert (len(data.train), len(data.validation)) == (4, 2)
    assert not set(data.train.files) & set(data.validation.files)
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(batch.mixture, 2 * batch.sources[:, 0])


@pytest.mark.parametrize("fault", ["no folder", "no clean file", "nothing"])
def test_what_is_missing_in_a_folder_is_named(speech: list[np.ndarray], tmp_path: Path, fault: str):
    noisy, clean = tmp_path / "noisy_train", tmp_path / "clean_train"
    write_pairs(speech, noisy, clean, [("a.wav", "a.wav")])
    if fault == "no clean file":
        (clean / "a.wav").unlink()
    elif fault == "nothing":
        (noisy / "a.wav").unlink()
    else:
        tmp_path = tmp_path / "gone"
    with pytest.raises(UserError, match=str(tmp_path)):
        NoisyFolders(str(tmp_path)).setup("fit")


# --- the task ------------------------------------------------------------------------------------------------------------------------


def test_one_batch_can_be_learnt(librispeech: Path, noises: Path):
    torch.manual_seed(0)
    data = data_of(librispeech, noises)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    task = EnhancementTask(MambAttention(TINY), loss=LossWeights(metric=0.0, phase=0.0, consistency=0.0), scorers=0)
    task.log_dict = lambda *arguments, **named: None  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_before_training_a_network_that_turns_the_phase_leaves_it_as_it_is():
    network = MambAttention(TINY)
    magnitude, phase = network.spectrum(torch.randn(1, 1600))
    torch.testing.assert_close(network(magnitude, phase).phase, phase)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_changes_every_weight_and_scores_validation(librispeech: Path, noises: Path, precision: Any, tmp_path: Path):
    torch.manual_seed(0)
    task = EnhancementTask(MambAttention(TINY), learning_rate=1e-2, loss=LossWeights(metric=0.0), scorers=0)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = pl.Trainer(max_steps=3, precision=precision, default_root_dir=tmp_path, num_sanity_val_steps=0, max_epochs=-1, **QUIET)
    trainer.fit(task, data_of(librispeech, noises))
    # a convolution before an instance norm has a bias that the norm takes off again
    unchanged = {name for name, value in task.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged == set(), unchanged
    assert {f"train/{name}" for name in ("magnitude", "phase", "complex", "time", "consistency", "total")} <= set(trainer.callback_metrics)
    assert torch.isfinite(trainer.callback_metrics["val/si_sdr_improvement"])
    examples = {path.name for path in (tmp_path / "examples").iterdir()}
    assert examples == {"noisy.wav", "enhanced.wav", "clean.wav", "enhancement.png"}


def test_testing_tells_every_example_and_the_mean_of_each_kind_of_noise(librispeech: Path, noises: Path, tmp_path: Path, capsys):
    trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)
    trainer.test(EnhancementTask(MambAttention(TINY), loss=LossWeights(metric=0.0), scorers=0), data_of(librispeech, noises, test_examples=5))
    with (tmp_path / "test_mixtures.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "test_summary.csv").open() as file:
        summary = {row["group"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5
    assert summary["all"]["mixtures"] == "5"
    assert set(summary) - {"all"} == {row["group"] for row in rows} or len({row["group"] for row in rows}) == 1
    mean = np.mean([float(row["si_sdr"]) for row in rows])
    assert trainer.callback_metrics["test/si_sdr"].item() == pytest.approx(mean, abs=1e-3)
    gain = np.mean([float(row["si_sdr"]) - float(row["noisy_si_sdr"]) for row in rows])
    assert trainer.callback_metrics["test/si_sdr_improvement"].item() == pytest.approx(gain, abs=1e-3)


class Slow(Scorers):
    """Scores that come when they are told to."""

    def __init__(self) -> None:
        super().__init__(processes=1)
        self.sent: list[Future] = []

    def submit(self, score: Callable[..., Any], *arguments: Any) -> Future:
        self.sent.append(Future())
        return self.sent[-1]


def spectra(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    clean, estimate = torch.rand(2, 2, 33, 40, generator=generator)
    return clean, estimate, *torch.randn(2, 2, 1600, generator=generator)


def test_the_discriminator_learns_when_scores_come_and_nothing_waits_for_them():
    torch.manual_seed(0)
    scorers, discriminator = Slow(), MetricDiscriminator(4).requires_grad_(False)
    training = DiscriminatorTraining(discriminator, scorers, 1e-3, (0.8, 0.99))
    before = {name: value.clone() for name, value in discriminator.named_parameters()}
    began = time.monotonic()
    for seed in range(8):
        assert training.step(*spectra(seed), 16_000) == {}
    assert time.monotonic() - began < 30
    assert len(scorers.sent) == 6, "where the processes are behind, batches are left out"
    assert all(torch.equal(value, before[name]) for name, value in discriminator.named_parameters())
    scorers.sent[0].set_result(2.0)
    scorers.sent[1].set_result(float("nan"))  # silence: this one alone is left out
    logged = training.step(*spectra(9), 16_000)
    assert float(logged["pesq"]) == 2.0
    assert not any(torch.equal(value, before[name]) for name, value in discriminator.named_parameters() if "bias" not in name)
    assert not any(parameter.requires_grad for parameter in discriminator.parameters())


def test_batches_without_any_score_teach_nothing_and_end_nothing():
    scorers, discriminator = Slow(), MetricDiscriminator(4).requires_grad_(False)
    training = DiscriminatorTraining(discriminator, scorers, 1e-3, (0.8, 0.99))
    before = {name: value.clone() for name, value in discriminator.named_parameters()}
    training.step(*spectra(0), 16_000)
    for future in scorers.sent:
        future.set_result(float("nan"))
    assert training.step(*spectra(1), 16_000) == {}
    assert all(torch.equal(value, before[name]) for name, value in discriminator.named_parameters())


def test_a_discriminator_learns_to_tell_good_from_bad():
    torch.manual_seed(0)
    scorers, discriminator = Slow(), MetricDiscriminator(4).requires_grad_(False)
    training = DiscriminatorTraining(discriminator, scorers, 1e-2, (0.8, 0.99))
    losses = []
    for _ in range(40):
        clean, _, one, other = spectra(0)
        noise = torch.rand(2, 33, 40, generator=torch.Generator().manual_seed(1))
        logged = training.step(clean, clean + noise, one, other, 16_000)
        for future in scorers.sent[-2:]:
            if not future.done():
                future.set_result(1.0)
        losses += [float(logged["discriminator"])] if logged else []
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.skipif(not has_perceptual_extras(), reason="needs the extra foveal-audio[metrics]")
def test_training_with_a_discriminator_goes_on_from_a_checkpoint(librispeech: Path, noises: Path, tmp_path: Path):
    torch.manual_seed(0)
    quiet = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(max_steps=2, default_root_dir=tmp_path, num_sanity_val_steps=0, limit_val_batches=0, **quiet)
    task = EnhancementTask(MambAttention(TINY), scorers=0)
    trainer.fit(task, data_of(librispeech, noises))
    assert {"train/metric", "train/discriminator", "train/pesq"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = EnhancementTask(MambAttention(TINY), scorers=0)
    trainer = pl.Trainer(max_steps=3, default_root_dir=tmp_path, num_sanity_val_steps=0, limit_val_batches=0, max_epochs=-1, **quiet)
    trainer.fit(resumed, data_of(librispeech, noises), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    (steps,) = {int(state["step"]) for state in resumed._train_discriminator().optimizer.state.values()}
    assert steps == 3


def test_a_linear_schedule_without_an_end_is_refused():
    task = EnhancementTask(MambAttention(TINY), schedule="linear", loss=LossWeights(metric=0.0))
    task.trainer = pl.Trainer(max_epochs=1, **QUIET)
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        task.configure_optimizers()


# --- configs and export --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(librispeech: Path, noises: Path, speech: list[np.ndarray], tmp_path: Path) -> dict[str, list[str]]:
    """For each data class, the options that point it at a tiny folder of its layout."""
    for part in ("train", "valid", "test"):
        write_pairs(speech, tmp_path / "pairs" / f"noisy_{part}", tmp_path / "pairs" / f"clean_{part}", [(f"{n}.wav",) * 2 for n in range(4)])
    short = [f"{rule}.seconds=0.75" for rule in ("mixing", "evaluation")]
    few = ["noise.talkers=[2,2]", "evaluation_noise.talkers=[2,2]", "examples=4", "validation_speakers=3", "validation_examples=2"]
    places = [f"train_dir={librispeech}", f"test_dir={librispeech}", f"noise_dir={noises}", "test_noises=[noise2.wav]", "mixing.reverberant=0"]
    return {
        "NoisyFolders": [f"root={tmp_path / 'pairs'}", "seconds=0.75", "workers=0"],
        "NoisyLibriSpeech": [*places, *short, *few, "impulse_response_dir=null"],
    }


def fit(config: Path, options: dict[str, list[str]], runs: Path, *further: str) -> FovealCLI:
    corpus = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["class_path"].rpartition(".")[2]
    arguments = ["fit", "--config", str(config), "--runs", str(runs), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    arguments += ["--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false", "--model.init_args.scorers=0"]
    small = {"fft": 64, "window": 64, "hop": 32, "channels": 8, "heads": 2, "blocks": 1, "state": 4, "expansion": 1, "dense_layers": 2}
    arguments += [f"--model.init_args.network.init_args.config.{name}={value}" for name, value in small.items()]
    return FovealCLI("audio", [*arguments, *(f"--data.init_args.{option}" for option in options[corpus]), *further])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_trains_two_batches(config: Path, options: dict[str, list[str]], tmp_path: Path):
    if config.stem.endswith("paper") and not has_perceptual_extras():
        pytest.skip("needs the extra foveal-audio[metrics]")
    cli = fit(config, options, tmp_path / "runs", "--trainer.fast_dev_run=2")
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["val/si_sdr"])


@pytest.mark.parametrize(("name", "parameters"), [("mambattention_paper", 2_325_841), ("mambattention_small", 40_361)])
def test_a_config_names_the_network_it_is_about(name: str, parameters: int):
    (config,) = (path for path in CONFIGS if path.stem == name)
    written = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["init_args"]["network"]["init_args"]["config"]
    assert sum(one.numel() for one in MambAttention(MambAttentionConfig(**written)).parameters()) == parameters


def test_an_exported_network_enhances_as_the_checkpoint_does(options: dict[str, list[str]], tmp_path: Path):
    (config,) = (path for path in CONFIGS if path.stem == "mambattention_small")
    further = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.logger=false", "--best.monitor=val/si_sdr"]
    fit(config, options, tmp_path / "runs", *further)
    (run,) = (tmp_path / "runs" / "audio" / "mambattention_small").iterdir()
    target = export(run / "checkpoints" / "best.ckpt", tmp_path / "small.safetensors", dtype=torch.float32)
    state = torch.load(run / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    for key, value in Enhancer.from_pretrained(target, "cpu").model.state_dict().items():
        assert torch.equal(value, state[f"network.{key}"]), key
