"""Text in, speech out: strings to arrays, files to files.

Text of any length is normalised, split into sentences, and each is spoken by itself: memory does not grow, and a sentence that goes wrong does not
spoil the next. A sentence that the network does not end, or does not read through, is tried again with other random numbers; the best attempt counts
and what was wrong with it is said.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from foveal.audio.audio_files import write_sources
from foveal.audio.checkpoints import model_from_weights
from foveal.audio.models.free_running import Spoken
from foveal.audio.models.transformer_tts import TransformerTTS
from foveal.audio.synthesis_metrics import Alignment, best_alignment
from foveal.audio.text.normalisation import normalise, split_sentences
from foveal.audio.text.symbols import spell
from foveal.audio.vocoders import Vocoder, load_vocoder
from foveal.audio.voice import Voice, read_voice
from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, each_once, output_folder, output_names
from foveal.core.reports import BatchReport, Entry

#: The small trained voice that ships with the package; its card stands beside it.
BUNDLED_WEIGHTS = Path(__file__).with_name("weights") / "transformer_tts_small.safetensors"

_PAUSES = {".": 0.35, "?": 0.35, "!": 0.35, ",": 0.2}  # seconds after a sentence, by how it ends
_MOST_FRAMES = (8.0, 90.0)  # a symbol, and for the whole sentence: at which speech is ended by force
_ATTEMPTS = 3
_READ_THROUGH = 0.75  # share of the symbols that the best head must get to
_PANELS = 12  # sentences of one picture


@dataclass(frozen=True)
class Sentence:
    """One sentence as it was spoken.

    Attributes:
        text: normalised.
        symbols: that the network read, the end last.
        waveform: float32, full scale 1, without the pause after it.
        stopped: whether the network ended it; otherwise it was ended by force.
        attention: (layer, head, step, symbol) probabilities of the cross-attention.
        alignment: of the head that reads best.
    """

    text: str
    symbols: list[str]
    waveform: Float[ndarray, " samples"]
    stopped: bool
    attention: Float[Tensor, "layer head step symbol"]
    alignment: Alignment

    @property
    def complaint(self) -> str:
        """What went wrong with it, or nothing."""
        if not self.stopped:
            return "did not end by itself"
        return "" if self.alignment.coverage >= _READ_THROUGH else "was not read to its end"


@dataclass(frozen=True)
class Speech:
    """A spoken text.

    Attributes:
        waveform: float32, full scale 1.
        sample_rate: Hz.
        sentences: its parts.
        warnings: what the reader should know: characters left out, sentences that went wrong.
    """

    waveform: Float[ndarray, " samples"]
    sample_rate: int
    sentences: list[Sentence]
    warnings: list[str] = field(default_factory=list)


class Speaker:
    """A voice that says texts.

    >>> speaker = Speaker.from_pretrained()
    >>> speech = speaker("Please enter your number.")
    >>> speech.waveform, speech.sample_rate

    Args:
        model: the network, in eval mode.
        voice: its symbols and spectrogram.
        vocoder: as `load_vocoder` gives it; None is Griffin-Lim.
        device: of the network.
        seed: of the frame prenet's dropout and of Griffin-Lim's first phase; the same seed and text give the same speech.
        threshold: of the stop probability.

    Raises:
        UserError: the voice does not fit the network.
    """

    def __init__(
        self,
        model: TransformerTTS,
        voice: Voice,
        vocoder: Vocoder | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        threshold: float = 0.5,
    ) -> None:
        if (len(voice.vocabulary), voice.mel.mels) != (model.config.symbols, model.config.mels):
            raise UserError(
                f"expected a voice of {model.config.symbols - 2} symbols and {model.config.mels} mel bands, as the network has; "
                f"it has {len(voice.symbols)} and {voice.mel.mels}"
            )
        self.model, self.voice, self.device = model.to(device).eval(), voice, torch.device(device)
        self.vocoder = load_vocoder("griffin_lim", voice.mel) if vocoder is None else vocoder
        self.seed, self.threshold = seed, threshold

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        *,
        vocoder: str = "griffin_lim",
        vocoder_checkpoint: str | Path | None = None,
        voice: str | Path | None = None,
        seed: int = 0,
    ) -> Speaker:
        """The bundled voice, or another.

        Args:
            checkpoint: ``.safetensors`` of ours, or a folder with one; None is the bundled voice.
            device: ``auto``, ``cpu`` or ``cuda[:N]``.
            vocoder: ``griffin_lim``, ``vocos`` or ``hifigan``.
            vocoder_checkpoint: its weights; None is the bundled ones.
            voice: JSON file that describes the voice, for weights that come without it, such as converted ones.
            seed: as of `Speaker`.

        Raises:
            UserError: weights that are missing, do not fit, or come without a voice; no such device.
        """
        where, path = resolve_device(device), BUNDLED_WEIGHTS if checkpoint is None else Path(checkpoint)
        model = model_from_weights(path, "transformer_tts")
        assert isinstance(model, TransformerTTS)
        if voice is not None:
            described = read_voice(voice)
        else:
            header = load_weights(path, "transformer_tts").metadata.get("voice")
            if header is None:
                raise UserError(
                    f"expected weights that say which symbols and spectrogram they are for; {path} does not; name a JSON file with --voice "
                    "(foveal.audio.voice says what is in it)"
                )
            described = _parse_voice(header, path)
        return cls(model, described, load_vocoder(vocoder, described.mel, vocoder_checkpoint, where), where, seed)

    def __call__(self, text: str) -> Speech:
        """Say a text.

        Raises:
            UserError: nothing in the text can be said, or it needs phonemes and espeak-ng is not installed.
        """
        sentences, warnings = self.prepare(text)
        spoken = [self.say(sentence, index) for index, sentence in enumerate(sentences)]
        parts = [part for one in spoken for part in (one.waveform, self._pause(one))]
        warnings += [complaint for one in spoken if (complaint := describe(one))]
        return Speech(np.concatenate(parts[:-1]), self.voice.mel.sample_rate, spoken, warnings)

    def prepare(self, text: str) -> tuple[list[str], list[str]]:
        """Sentences to say, normalised, and warnings about characters that cannot be said as they are.

        Raises:
            UserError: nothing can be said.
        """
        normalised = normalise(text)
        sentences = split_sentences(normalised.text)
        if not sentences:
            shown = text.strip()[:40]
            raise UserError(f"expected text with letters or numbers to say; got {shown!r}" if shown else "expected text to say; it is empty")
        warnings = []
        if normalised.dropped:
            warnings.append(f"left out {normalised.dropped[:20]!r}, which {'have' if len(normalised.dropped) > 1 else 'has'} no sound")
        if normalised.transliterated:
            warnings.append(f"read {normalised.transliterated[:20]!r} in Latin letters; the voice speaks {self.voice.language}")
        return sentences, warnings

    def say(self, sentence: str, index: int = 0) -> Sentence:
        """Say one normalised sentence; `index` changes the random numbers from sentence to sentence.

        Raises:
            UserError: none of its letters is among the voice's symbols.
        """
        spelled = spell(sentence, self.voice.alphabet, self.voice.language)
        numbers, _ = self.voice.vocabulary.encode(spelled)
        if len(numbers) < 2:
            raise UserError(f"expected text in the voice's symbols; {sentence[:40]!r} has none of them; choose another voice")
        tokens = torch.tensor([numbers], device=self.device)
        best: tuple[float, Spoken, Alignment] | None = None
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            for attempt in range(_ATTEMPTS):
                torch.manual_seed(self.seed + 1000 * index + attempt)
                most = _MOST_FRAMES[0] + _MOST_FRAMES[1] / len(numbers)
                spoken = self.model.generate(tokens, threshold=self.threshold, maximum_ratio=most, attention=True)
                assert spoken.cross_attention is not None
                read = best_alignment(spoken.cross_attention[0])
                score = float(spoken.stopped[0]) + min(read.coverage, _READ_THROUGH) + 0.1 * read.monotonic
                if best is None or score > best[0]:
                    best = score, spoken, read
                if bool(spoken.stopped[0]) and read.coverage >= _READ_THROUGH:
                    break
            assert best is not None
            _, spoken, read = best
            assert spoken.cross_attention is not None
            waveform = self.vocoder(self.voice.denormalised(spoken.mel[0].float()).T).float().cpu().numpy()
        peak = float(np.abs(waveform).max(initial=0.0))
        waveform = waveform * min(1.0, 0.97 / max(peak, 1e-9))
        symbols = [*(self.voice.symbols[number - 1] for number in numbers[:-1]), "end"]
        return Sentence(sentence, symbols, waveform.astype(np.float32), bool(spoken.stopped[0]), spoken.cross_attention[0].cpu(), read)

    def _pause(self, sentence: Sentence) -> ndarray:
        seconds = _PAUSES.get(sentence.text[-1], 0.1)
        return np.zeros(round(seconds * self.voice.mel.sample_rate), np.float32)

    def stream(self, sentences: Sequence[str], spoken: list[Sentence]) -> Iterator[Float[ndarray, "1 samples 1"]]:
        """Waveforms of the sentences with their pauses, one after the other; what was said is added to `spoken`."""
        for index, sentence in enumerate(sentences):
            said = self.say(sentence, index)
            yield said.waveform[None, :, None]
            if index < len(sentences) - 1:
                yield self._pause(said)[None, :, None]
            spoken.append(Sentence(said.text, said.symbols, said.waveform[:0], said.stopped, said.attention, said.alignment))


def describe(sentence: Sentence) -> str:
    """A warning about a sentence that went wrong, or nothing."""
    shown = sentence.text if len(sentence.text) <= 40 else f"{sentence.text[:37]}..."
    return f"{shown!r} {sentence.complaint}" if sentence.complaint else ""


def _parse_voice(header: str, path: Path) -> Voice:
    import json

    try:
        fields: Any = json.loads(header)
    except json.JSONDecodeError:
        raise UserError(f"expected a voice in the header of {path}; it is not JSON; write the checkpoint again") from None
    return Voice.from_mapping(fields, f"the header of {path}")


def plot_sentences(sentences: Sequence[Sentence]) -> Any:
    """The alignment of one sentence in every head, or of several in the head that reads each best; a matplotlib figure."""
    from foveal.audio.plots import plot_alignment, plot_readings

    if len(sentences) == 1:
        only = sentences[0]
        return plot_alignment(only.attention, only.symbols, only.alignment, only.text[:90])
    shown = sentences[:_PANELS]
    return plot_readings([one.attention[one.alignment.layer, one.alignment.head] for one in shown], [one.text for one in shown])


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        UserError: it cannot be read, or is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"expected a text file in UTF-8; {path} is something else; save it as plain text in UTF-8") from None
    except OSError as error:
        raise UserError(f"expected a text file that can be read; {path}: {error.strerror}") from None
    if "\0" in text:
        raise UserError(f"expected a text file; {path} is binary; save it as plain text in UTF-8")
    return text


def speak_command(
    text: str | None,
    *,
    files: Sequence[Path] = (),
    output: Path | None = None,
    plot: Path | None = None,
    vocoder: str = "griffin_lim",
    vocoder_checkpoint: Path | None = None,
    voice: Path | None = None,
    checkpoint: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    seed: int = 0,
    as_json: bool = False,
) -> int:
    """What ``foveal audio speak`` does: a wav file for the text, or one for every text file, a report at the end, and the exit code.

    Args:
        text: to say; ``-`` or None reads standard input, where no files are named.
        files: text files and folders of ``.txt`` to say instead.
        output: the wav file (None is ``speech.wav`` here), or for files the folder (None is ``spoken`` here).
        plot: picture of the attention to write; for one text.
        vocoder: ``griffin_lim``, ``vocos`` or ``hifigan``.
        vocoder_checkpoint: its weights.
        voice: JSON file, for weights that come without a voice.
        checkpoint: weights; None is the package's own.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results instead of keeping them.
        seed: of everything random.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a text could not be said.

    Raises:
        UserError: nothing can be done at all: no text, no weights, no such device, an output that cannot be written.
    """
    if files and text is not None:
        raise UserError("expected a text or --file; got both; name one")
    report = BatchReport()
    jobs: list[tuple[str, str | Path, Path]]
    if files:
        jobs = _files_to_say(files, output, report)
    else:
        jobs = [("text", _given_text(text), Path("speech.wav") if output is None else output)]
    if not jobs:
        return report.finish(as_json)
    _check_outputs([target for _, _, target in jobs], plot)
    speaker = Speaker.from_pretrained(checkpoint, device, vocoder=vocoder, vocoder_checkpoint=vocoder_checkpoint, voice=voice, seed=seed)
    for name, source, target in jobs:
        present = [str(path) for path in (target, plot) if path is not None and path.exists()]
        if present and not overwrite:
            report.kept(name, present)
            continue
        with report.item(name) as entry:
            _speak_one(speaker, read_text(source) if isinstance(source, Path) else source, target, plot, entry)
    return report.finish(as_json, {"seconds": ".1f", "real-time factor": ".3f", "sentences": ".0f"})


def _given_text(text: str | None) -> str:
    """The text of the command line, or of standard input."""
    if text is not None and text != "-":
        return text
    if sys.stdin.isatty():
        raise UserError('expected a text to say, as in: foveal audio speak "Hello." -o hello.wav; got none')
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("expected text in UTF-8 on standard input; got something else") from None


def _files_to_say(files: Sequence[Path], output: Path | None, report: BatchReport) -> list[tuple[str, str | Path, Path]]:
    """Name, text file and target of each; a single file may have its target named, others go into a folder. What is missing is reported."""
    found: list[Path] = []
    for file in files:
        with report.item(file) as missing:
            found += collect_inputs([file], (".txt",))
        if missing.state == "done":
            report.entries.remove(missing)
    found = each_once(found)
    if len(files) == 1 and not files[0].is_dir() and output is not None and output.suffix:
        return [(str(path), path, output) for path in found]
    folder = output_folder("spoken" if output is None else output)
    return [(str(path), path, folder / f"{name}.wav") for path, name in zip(found, output_names(found), strict=True)]


def _check_outputs(targets: Sequence[Path], plot: Path | None) -> None:
    if plot is not None and len(targets) != 1:
        raise UserError(f"expected one text with --plot; got {len(targets)}; name one")
    for target in targets:
        if target.suffix.lower() != ".wav":
            raise UserError(f"expected an output that ends in .wav; got {target}; choose another -o/--output")
        output_folder(target.parent)
    if plot is not None and (plot.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or not plot.parent.is_dir()):
        raise UserError(f"expected --plot in an existing folder, ending in .png, .pdf, .svg or .jpg; got {plot}")


def _speak_one(speaker: Speaker, text: str, target: Path, plot: Path | None, entry: Entry) -> None:
    sentences, warnings = speaker.prepare(text)
    spoken: list[Sentence] = []
    rate, samples, began = speaker.voice.mel.sample_rate, 0, time.perf_counter()

    def blocks() -> Iterator[ndarray]:
        nonlocal samples
        for block in speaker.stream(sentences, spoken):
            samples += block.shape[1]
            yield block

    write_sources([target], blocks(), rate, 1, 0, "PCM_16")
    taken = time.perf_counter() - began
    entry.outputs = [str(target)]
    if plot is not None:
        with atomic_write(plot) as temporary:
            plot_sentences(spoken).savefig(temporary)
        entry.outputs.append(str(plot))
    seconds = samples / rate
    entry.numbers = {"seconds": seconds, "real-time factor": taken / max(seconds, 1e-9), "sentences": float(len(sentences))}
    complaints = [complaint for sentence in spoken if (complaint := describe(sentence))]
    more = [f"and {len(complaints) - 3} more"] if len(complaints) > 3 else []
    entry.message = "; ".join([*warnings, *complaints[:3], *more])
    if len(spoken) > _PANELS and plot is not None:
        entry.message = "; ".join(part for part in (entry.message, f"the picture shows the first {_PANELS} sentences") if part)
