"""The commands tag and embed."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ced.cli import options
from ced.cli.console import complain, reporting, show, show_data
from ced.errors import ConfigError
from ced.machine import cores
from ced.progress import NotedProgress, silent
from ced.tag.options import TagOptions

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.batch import Outcome, Timed
    from ced.tag.inputs import Input
    from ced.tag.records import Record
    from ced.tag.results import Format
    from ced.tag.tagger import Scorer

T = TypeVar("T", bound="Timed")


def tag(
    sounds: options.Sounds,
    allow_private: options.AllowPrivate = False,
    model: options.Model = "ced_mini",
    precision: options.Precision = "float32",
    window: options.Window = TagOptions.window,
    hop: options.Hop = None,
    columns: options.Columns = False,
    tail: options.Tails = TagOptions.tail,
    silence: options.Silence = None,
    topk: options.TopK = None,
    threshold: options.Threshold = None,
    labels: options.Labels = None,
    exclude: options.Exclude = None,
    rollup: options.Rollup = False,
    events: options.Events = False,
    release: options.Release = TagOptions.release,
    gap: options.Gap = TagOptions.gap,
    shortest: options.Shortest = TagOptions.shortest,
    format: options.Formats = None,
    clock: options.Clock = None,
    out: options.Out = None,
    combine: options.Combine = False,
    jobs: options.Jobs = None,
) -> None:
    """Tag sounds: print the most probable classes of each window, or write them to files.

    A sound that cannot be read is named and left out; the exit code is then 1.
    """
    from ced.tag.inputs import find_inputs
    from ced.tag.tagger import Tagger

    settings = TagOptions(
        window=window,
        hop=hop,
        columns=columns,
        tail=tail,
        silence=silence,
        top_k=topk,
        only=tuple(labels or ()),
        exclude=tuple(exclude or ()),
        rollup=rollup,
        events=events,
        release=release,
        gap=gap,
        shortest=shortest,
        clock=clock,
    )
    inputs = find_inputs(sounds, sys.stdin.buffer, allow_private=allow_private)
    kind = _checked_output(format, out, combine, len(inputs), clock)
    with (
        reporting() as progress,
        Tagger(model, precision=precision, jobs=jobs or cores(), progress=progress) as tagger,
    ):
        if threshold is not None:
            settings = replace(settings, thresholds=thresholds(threshold, tagger.labels))
        settings = tagger.checked(settings)

        def process(sound: "Input") -> "Record":
            return tagger.tag(sound.source, settings, name=sound.name)

        if out is None:
            failed = _print_records(inputs, process, kind, jobs or cores(), progress)
        else:
            journalled = {"model": _fingerprint(tagger.scorer), **settings.settings()}
            failed = _write_records(
                inputs, process, out, journalled, format or ["text"], combine, jobs or cores(), progress
            )
    if failed:
        raise typer.Exit(1)


def embed(
    sounds: options.Sounds,
    out: options.EmbeddingsOut,
    allow_private: options.AllowPrivate = False,
    model: options.Model = "ced_mini",
    precision: options.Precision = "float32",
    window: options.Window = TagOptions.window,
    hop: options.Hop = None,
    tail: options.Tails = TagOptions.tail,
    windows: options.EachWindow = False,
    jobs: options.Jobs = None,
) -> None:
    """Write an embedding of each sound, a vector for classifiers and searches of your own.

    A sound that cannot be read is named and left out; the exit code is then 1.
    """
    from ced.tag import batch
    from ced.tag.embeddings import check_suffix, rows_of, write_embeddings
    from ced.tag.inputs import Input, find_inputs
    from ced.tag.tagger import Embedding, Tagger

    check_suffix(out)
    inputs = find_inputs(sounds, sys.stdin.buffer, allow_private=allow_private)
    jobs = jobs or cores()
    failed: list[str] = []
    with reporting() as progress, Tagger(model, precision=precision, jobs=jobs, progress=progress) as tagger:

        def process(sound: Input) -> Embedding:
            return tagger.embed(sound.source, window=window, hop=hop, tail=tail)

        found = _without_failures(
            batch.results(inputs, process, jobs=jobs, task="embedding", progress=progress), failed
        )
        rows = (row for sound, vectors in found for row in rows_of(sound.name, vectors, windows=windows))
        count = write_embeddings(out, rows)
    show(f"{out}: {count} vectors of {len(inputs) - len(failed)} sounds, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _checked_output(
    names: list[str] | None, out: Path | None, combine: bool, sounds: int, clock: str | None
) -> "Format":
    """Refuse impossible outputs before any work is done for them; return the first, which may be printed."""
    from ced.tag.results import formats

    if combine and out is None:
        raise ConfigError("--combine says how files are written; name their folder with --out")
    if out is None and len(names or ()) > 1:
        raise ConfigError(f"{' and '.join(names or ())} cannot be printed at once; name a folder with --out")
    if clock not in (None, "auto") and sounds > 1:
        raise ConfigError(f"--clock {clock} is the start of one sound; {sounds} are named")
    shared = combine or (out is None and sounds > 1)
    return formats(names or ["text"], shared=shared, printed=out is None, clock=clock is not None)[0]


def _print_records(
    inputs: "Sequence[Input]",
    process: "Callable[[Input], Record]",
    kind: "Format",
    jobs: int,
    progress: NotedProgress,
) -> int:
    """Print what is found in each sound, as it comes; return how many failed."""
    from ced.tag import batch

    failed: list[str] = []
    shown = silent if sys.stdout.isatty() else progress  # results on a terminal are progress enough
    found = _without_failures(batch.results(inputs, process, jobs=jobs, progress=shown), failed)
    assert kind.text is not None
    for text in kind.text(record for _, record in found):
        show_data(text)
    return len(failed)


def _write_records(
    inputs: "Sequence[Input]",
    process: "Callable[[Input], Record]",
    out: Path,
    settings: "Mapping[str, Any]",
    output: "Sequence[str]",
    combined: bool,
    jobs: int,
    progress: NotedProgress,
) -> int:
    """Write what is found in each sound into a folder; return how many failed."""
    from ced.tag import batch

    summary = batch.run(
        inputs,
        process,
        out,
        settings=settings,
        output=output,
        combined=combined,
        jobs=jobs,
        progress=progress,
        failed=lambda outcome: complain(outcome.error, hint=outcome.hint),
    )
    show(summary)
    return summary.failed


def _without_failures(outcomes: "Iterable[Outcome[T]]", failed: list[str]) -> "Iterator[tuple[Input, T]]":
    """Yield sounds with what was made of them; of the others, show why not and add it to `failed`."""
    for outcome in outcomes:
        if outcome.result is None:
            complain(outcome.error, hint=outcome.hint)
            failed.append(outcome.error)
        else:
            yield outcome.input, outcome.result


def thresholds(text: str, labels: "ClassTable") -> float | tuple[float, ...]:
    """Return the threshold of all classes that an option gives, or those of its file, one for each class."""
    try:
        threshold = float(text)
    except ValueError:
        from ced.tag.thresholds import read_thresholds

        return read_thresholds(Path(text), labels)
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold is {text}; it must be a probability, 0 to 1, or a file")
    return threshold


def _fingerprint(model: "Scorer") -> str:
    """Return the digest of a model's graph, which tells it from others that were at the same path before."""
    from ced.model.runtime import OnnxModel

    assert isinstance(model, OnnxModel)  # opened by a name or path
    with model.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
