"""Commands that hear sounds: tag and embed."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ced.cli import options
from ced.cli.console import complain, reporting
from ced.errors import ConfigError
from ced.machine import cores
from ced.progress import NotedProgress, silent
from ced.tag.defaults import EVENT_THRESHOLD, TOP_K

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.batch import Outcome, Timed
    from ced.tag.inputs import Input
    from ced.tag.records import Record
    from ced.tag.results import Format

T = TypeVar("T", bound="Timed")


def tag(
    sounds: options.Sounds,
    model: options.Model = "ced_mini",
    topk: options.TopK = None,
    window: options.Window = 10.0,
    hop: options.Hop = None,
    columns: options.Columns = False,
    threshold: options.Threshold = None,
    labels: options.Labels = None,
    exclude: options.Exclude = None,
    rollup: options.Rollup = False,
    events: options.Events = False,
    release: options.Release = 0.5,
    gap: options.Gap = 0.0,
    shortest: options.Shortest = 0.0,
    silence: options.Silence = None,
    format: options.Formats = None,
    out: options.Out = None,
    combine: options.Combine = False,
    jobs: options.Jobs = None,
) -> None:
    """Tag sounds: print the most probable classes of each, window by window, or write them to files.

    A sound that cannot be read is named, the others are tagged all the same; the exit code is then 1.
    """
    from ced.model.runtime import open_model
    from ced.tag.inputs import find_inputs
    from ced.tag.recipe import Recipe, recording
    from ced.tag.tagger import Tagger

    kind = _checked_output(format, out, combine)
    if events and topk is not None:
        raise ConfigError(f"--topk {topk} does not apply to --events, which have one class each; leave it out")
    inputs = find_inputs(sounds, sys.stdin.buffer)
    jobs = jobs or cores()
    with reporting() as progress:
        graph = open_model(model, progress=progress)
    with reporting() as progress, Tagger(graph, jobs=jobs) as tagger:
        least: float | tuple[float, ...] | None = EVENT_THRESHOLD if events else None
        if threshold is not None:
            least = thresholds(threshold, tagger.labels)
        recipe = Recipe(
            window=window,
            hop=hop,
            columns=columns,
            silence=silence,
            top_k=TOP_K if topk is None and least is None else topk,
            thresholds=least,
            only=tuple(labels or ()),
            exclude=tuple(exclude or ()),
            rollup=rollup,
            events=events,
            release=release,
            gap=gap,
            shortest=shortest,
        )
        process = recording(tagger, recipe, model)
        if out is None:
            failed = _print_records(inputs, process, kind, jobs, progress)
        else:
            settings = {"model": _fingerprint(graph.path), **recipe.settings()}
            failed = _write_records(inputs, process, out, settings, format or ["text"], combine, jobs, progress)
    if failed:
        raise typer.Exit(1)


def embed(
    sounds: options.Sounds,
    out: options.EmbeddingsOut,
    model: options.Model = "ced_mini",
    window: options.Window = 10.0,
    hop: options.Hop = None,
    windows: options.EachWindow = False,
    jobs: options.Jobs = None,
) -> None:
    """Write what a model makes of sounds: a vector for each, for classifiers and searches of your own.

    A sound that cannot be read is named and left out; the exit code is then 1.
    """
    from ced.tag import batch
    from ced.tag.embeddings import check_suffix, rows_of, write_embeddings
    from ced.tag.inputs import Input, find_inputs
    from ced.tag.tagger import Embedding, Tagger

    check_suffix(out)
    inputs = find_inputs(sounds, sys.stdin.buffer)
    jobs = jobs or cores()
    failed: list[str] = []
    with reporting() as progress, Tagger(model, jobs=jobs, progress=progress) as tagger:

        def process(sound: Input) -> Embedding:
            return tagger.embed(sound.source, window=window, hop=hop)

        found = _without_failures(
            batch.results(inputs, process, jobs=jobs, task="embedding", progress=progress), failed
        )
        rows = (row for sound, vectors in found for row in rows_of(sound.name, vectors, windows=windows))
        count = write_embeddings(out, rows)
    print(f"{out}: {count} vectors of {len(inputs) - len(failed)} sounds, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)


def _checked_output(names: list[str] | None, out: Path | None, combine: bool) -> "Format":
    """Refuse outputs that cannot be, before any work is done for them; return the first, which may be printed."""
    from ced.tag.results import formats

    if combine and out is None:
        raise ConfigError("--combine says how files are written; name their folder with --out")
    if out is None and len(names or ()) > 1:
        raise ConfigError(f"{' and '.join(names or ())} cannot be printed at once; name a folder with --out")
    return formats(names or ["text"], shared=combine, lines=out is None)[0]


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
    assert kind.lines is not None
    for line in kind.lines(record for _, record in found):
        print(line, flush=True)
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
        failed=lambda outcome: complain(outcome.error),
    )
    print(summary)
    return summary.failed


def _without_failures(outcomes: "Iterable[Outcome[T]]", failed: list[str]) -> "Iterator[tuple[Input, T]]":
    """Yield sounds with what was made of them; of the others, show why not and add it to `failed`."""
    for outcome in outcomes:
        if outcome.result is None:
            complain(outcome.error)
            failed.append(outcome.error)
        else:
            yield outcome.input, outcome.result


def thresholds(text: str, labels: "ClassTable") -> float | tuple[float, ...]:
    """Return the threshold of all classes that an option gives, or those of its file."""
    try:
        threshold = float(text)
    except ValueError:
        from ced.tag.thresholds import read_thresholds

        return tuple(read_thresholds(Path(text), labels).tolist())
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold is {text}; it must be a probability, 0 to 1, or a file")
    return threshold


def _fingerprint(path: Path) -> str:
    """Return what tells a graph from others that were at the same path before."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
