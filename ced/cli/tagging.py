"""Commands that hear sounds: tag and embed."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ced.cli.console import complain, reporting
from ced.errors import ConfigError
from ced.machine import cores
from ced.progress import silent

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.batch import Outcome, Timed
    from ced.tag.tagger import Tagger

T = TypeVar("T", bound="Timed")

TOP_K = 3  # classes of a window, where no threshold is given
EVENT_THRESHOLD = 0.5  # of events, which need one

Sounds = Annotated[
    list[str],
    typer.Argument(
        metavar="SOUND...",
        help="Files, folders, patterns, http(s) addresses, @LIST (a path a line; @-: on standard input), or - (a sound "
        "on standard input).",
    ),
]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A model name (see `ced models`), an ONNX file, a checkpoint or an experiment."),
]
Window = Annotated[float, typer.Option("--chunk", "-c", "--window", help="Seconds of a window, above 0.")]
Hop = Annotated[
    float | None, typer.Option(help="Seconds from one window to the next; default: windows lie end to end.")
]
Jobs = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Windows scored at a time, a thread each; default: all cores.")
]


def tag(
    sounds: Sounds,
    model: Model = "ced_mini",
    topk: Annotated[
        int | None,
        typer.Option("--topk", "-k", min=1, help=f"Most classes of a window; default: {TOP_K}, with --threshold all."),
    ] = None,
    window: Window = 10.0,
    hop: Hop = None,
    columns: Annotated[bool, typer.Option("--columns", help="Score every 0.16 s instead of whole windows.")] = False,
    threshold: Annotated[
        str | None, typer.Option(help="Least probability, or a file with one a class (see `ced calibrate`).")
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option(help="Only this class, or all below this heading; may be repeated.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Not this class or heading; may be repeated.")] = None,
    rollup: Annotated[
        bool, typer.Option("--rollup", help="Give classes the highest probability of their kinds, and add headings.")
    ] = False,
    events: Annotated[
        bool, typer.Option("--events", help=f"Merge windows into events; threshold {EVENT_THRESHOLD} unless given.")
    ] = False,
    release: Annotated[float, typer.Option(help="With --events: part of the threshold that keeps one going.")] = 0.5,
    gap: Annotated[float, typer.Option(help="With --events: those so many seconds apart become one.")] = 0.0,
    shortest: Annotated[float, typer.Option(help="With --events: shorter ones are dropped, in seconds.")] = 0.0,
    silence: Annotated[
        float | None, typer.Option(help="Windows below this level are not scored, in dB of full scale, as -60.")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="text, jsonl, csv, audacity, raven, parquet; with --out several."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for outputs; an interrupted run goes on there.")
    ] = None,
    combine: Annotated[bool, typer.Option("--combine", help="With --out: one output of all sounds.")] = False,
    jobs: Jobs = None,
) -> None:
    """Tag sounds: print the most probable classes of each, window by window, or write them to files.

    A sound that cannot be read is named, the others are tagged all the same; the exit code is then 1.
    """
    from ced.tag import batch
    from ced.tag.inputs import find_inputs
    from ced.tag.recipe import Recipe, recording
    from ced.tag.results import formats
    from ced.tag.tagger import Tagger

    if combine and out is None:
        raise ConfigError("--combine says how files are written; name their folder with --out")
    if out is None and len(format or ()) > 1:
        raise ConfigError(f"{' and '.join(format or ())} cannot be printed at once; name a folder with --out")
    (printed, *_) = formats(format or ["text"], shared=combine, lines=out is None)
    inputs = find_inputs(sounds, sys.stdin.buffer)
    jobs = jobs or cores()
    if events and topk is not None:
        raise ConfigError(f"--topk {topk} says nothing of --events, which have one class each; leave it out")
    if events and threshold is None:
        threshold = str(EVENT_THRESHOLD)
    with reporting() as progress, Tagger(model, jobs=jobs, progress=progress) as tagger:
        recipe = Recipe(
            window=window,
            hop=hop,
            columns=columns,
            silence=silence,
            top_k=TOP_K if topk is None and threshold is None else topk,
            thresholds=None if threshold is None else _thresholds(threshold, tagger.labels),
            only=tuple(labels or ()),
            exclude=tuple(exclude or ()),
            rollup=rollup,
            events=events,
            release=release,
            gap=gap,
            shortest=shortest,
        )
        process = recording(tagger, recipe, model)
        failed = _Failures()
        if out is None:
            # Results on a terminal are progress enough.
            shown = silent if sys.stdout.isatty() else progress
            found = batch.results(inputs, process, jobs=jobs, progress=shown)
            assert printed.lines is not None
            for line in printed.lines(failed.sieve(found)):
                print(line, flush=True)
        else:
            summary = batch.run(
                inputs,
                process,
                out,
                settings={"model": _fingerprint(tagger), **recipe.settings()},
                output=format or ["text"],
                combined=combine,
                jobs=jobs,
                progress=progress,
                failed=failed,
            )
            print(summary)
    if failed.count:
        raise typer.Exit(1)


def embed(
    sounds: Sounds,
    out: Annotated[Path, typer.Option("--out", "-o", help="NAME.npy (with NAME.npy.tsv beside it) or NAME.parquet.")],
    model: Model = "ced_mini",
    window: Window = 10.0,
    hop: Hop = None,
    windows: Annotated[bool, typer.Option("--windows", help="A vector a window, not one a sound.")] = False,
    jobs: Jobs = None,
) -> None:
    """Write what a model makes of sounds: a vector for each, for classifiers and searches of your own.

    A sound that cannot be read is named and left out; the exit code is then 1.
    """
    from ced.tag import batch
    from ced.tag.embeddings import Row, check_suffix, rows_of, write_embeddings
    from ced.tag.inputs import Input, find_inputs
    from ced.tag.tagger import Embedding, Tagger

    check_suffix(out)
    inputs = find_inputs(sounds, sys.stdin.buffer)
    jobs = jobs or cores()
    with reporting() as progress, Tagger(model, jobs=jobs, progress=progress) as tagger:

        def process(sound: Input) -> Embedding:
            return tagger.embed(sound.source, window=window, hop=hop)

        failed = _Failures()

        def rows() -> Iterator[Row]:
            for outcome in batch.results(inputs, process, jobs=jobs, task="embedding", progress=progress):
                if outcome.result is None:
                    failed(outcome)
                else:
                    yield from rows_of(outcome.input.name, outcome.result, windows=windows)

        count = write_embeddings(out, rows())
    print(f"{out}: {count} vectors of {len(inputs) - failed.count} sounds, {failed.count} failed")
    if failed.count:
        raise typer.Exit(1)


class _Failures:
    """Names what failed, and counts it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, outcome: "Outcome[T]") -> None:
        """Take a sound that failed."""
        self.count += 1
        complain(outcome.error)

    def sieve(self, outcomes: "Iterator[Outcome[T]]") -> "Iterator[T]":
        """Take out the sounds that failed and pass the results of the others on."""
        for outcome in outcomes:
            if outcome.result is None:
                self(outcome)
            else:
                yield outcome.result


def _thresholds(text: str, labels: "ClassTable") -> float | tuple[float, ...]:
    """Return the threshold of all classes, or those of a file."""
    try:
        threshold = float(text)
    except ValueError:
        from ced.tag.thresholds import read_thresholds

        return tuple(read_thresholds(Path(text), labels).tolist())
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold is {text}; it must be a probability, 0 to 1, or a file")
    return threshold


def _fingerprint(tagger: "Tagger") -> str:
    """Return what tells a model from others that were at the same path before."""
    path = getattr(tagger.scorer, "path", None)
    if path is None:
        return type(tagger.scorer).__name__
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
