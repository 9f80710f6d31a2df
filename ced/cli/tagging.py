"""The commands tag and embed."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ced.cli import clustering, options
from ced.cli.clustering import ChosenModel, Cluster
from ced.cli.console import complain, reporting, show, show_data
from ced.errors import AudioError, ConfigError
from ced.machine import cores
from ced.progress import NotedProgress, silent
from ced.tag.options import BATCH, EACH, TagOptions

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.batch import Meter
    from ced.tag.inputs import Input
    from ced.tag.records import Record, Tags, Timeline
    from ced.tag.results import Format
    from ced.tag.tagger import Scorer, Tagger, TagStream

_SCORED = ("window", "hop", "columns", "tail", "silence", "channel", "strict", "clock")  # what scores depend on


def tag(
    sounds: options.SoundsUnlessFrom = None,
    allow_private: options.AllowPrivate = False,
    model: options.Model = "ced_mini",
    precision: options.Precision = "float32",
    channel: options.Channel = "mean",
    strict: options.Strict = False,
    earlier: options.From = None,
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
    keep_scores: options.KeepScores = False,
    clips: options.Clips = None,
    jobs: options.Jobs = None,
    device: options.Device = None,
    batch: options.Batch = BATCH,
    ray: options.Ray = None,
) -> None:
    """Tag sounds: print the most probable classes of each window as it is known, or write them to files.

    A sound that cannot be read is named and left out, one that is cut short is tagged as far as it goes; the exit code
    is then 1.
    """
    chosen = TagOptions(
        window=window,
        hop=hop,
        columns=columns,
        tail=tail,
        silence=silence,
        channel=_one_channel(channel),
        strict=strict,
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
    if not sounds and earlier is None:
        raise typer.BadParameter("name sounds, or with --from the folder of an earlier run", param_hint="SOUND...")
    others = [name for name in format or () if name.lower() != "parquet"]
    given = {"--from": earlier, "--combine": combine, "--keep-scores": keep_scores, "--clips": clips}
    cluster = Cluster.chosen(ray, out, jobs, {**given, f"--format {' '.join(others)}": others})
    output = _Output(format or ["text" if cluster is None else "parquet"], out, combine, keep_scores, clips)
    output.check(chosen)
    with reporting() as progress:
        if earlier is not None:
            _check_from(sounds, chosen, channel, (model, precision), output, earlier)
            ok = _tag_again(earlier, chosen, threshold, output, progress)
        else:
            from ced.tag.inputs import each_channel, find_inputs
            from ced.tag.tagger import Tagger

            inputs = find_inputs(sounds or (), sys.stdin.buffer, allow_private=allow_private)
            if channel == EACH and cluster is None:
                inputs = list(each_channel(inputs))
            output.check_inputs(inputs, chosen, channel)
            here = device if cluster is None else None  # the workers' machines may have devices that this one lacks
            with Tagger(
                model, device=here, precision=precision, jobs=jobs or cores(), batch=batch, progress=progress
            ) as tagger:
                if threshold is not None:
                    chosen = replace(chosen, thresholds=thresholds(threshold, tagger.labels))
                chosen = tagger.checked(chosen)
                if cluster is not None:
                    scorer = ChosenModel(model, precision, device, batch)
                    ok = clustering.tag(cluster, tagger, scorer, inputs, chosen, channel, progress)
                else:
                    ok = _tag_sounds(tagger, inputs, chosen, channel, output, tagger.jobs, progress)
    if not ok:
        raise typer.Exit(1)


def embed(
    sounds: options.Sounds,
    out: options.EmbeddingsOut,
    allow_private: options.AllowPrivate = False,
    model: options.Model = "ced_mini",
    precision: options.Precision = "float32",
    channel: options.Channel = "mean",
    strict: options.Strict = False,
    window: options.Window = TagOptions.window,
    hop: options.Hop = None,
    tail: options.Tails = TagOptions.tail,
    windows: options.EachWindow = False,
    jobs: options.Jobs = None,
    device: options.Device = None,
    batch: options.Batch = BATCH,
    ray: options.Ray = None,
) -> None:
    """Write an embedding of each sound, a vector for classifiers and searches of your own.

    A sound that cannot be read is named and left out, one that is cut short is embedded as far as it goes; the exit
    code is then 1.
    """
    from ced.tag.batch import results
    from ced.tag.embeddings import Row, check_suffix, rows_of, write_embeddings
    from ced.tag.inputs import Input, each_channel, find_inputs
    from ced.tag.tagger import Embedding, Tagger

    cluster = Cluster.chosen(ray, out, jobs, {})
    if cluster is None:
        check_suffix(out)
    single = _one_channel(channel)
    inputs = find_inputs(sounds, sys.stdin.buffer, allow_private=allow_private)
    if cluster is not None:
        chosen = TagOptions(window=window, hop=hop, tail=tail, channel=single, strict=strict)
        with reporting() as progress, Tagger(model, precision=precision, progress=progress) as tagger:
            chosen = tagger.checked(chosen)
            scorer = ChosenModel(model, precision, device, batch)
            ok = clustering.embed(cluster, tagger, scorer, inputs, chosen, channel, windows, progress)
        if not ok:
            raise typer.Exit(1)
        return
    if channel == EACH:
        inputs = list(each_channel(inputs))
    failed, cut = 0, 0
    with (
        reporting() as progress,
        Tagger(
            model, device=device, precision=precision, jobs=jobs or cores(), batch=batch, progress=progress
        ) as tagger,
    ):

        def process(item: Input) -> Embedding:
            one = item.channel or single
            return tagger.embed(item.source, window=window, hop=hop, tail=tail, channel=one, strict=strict)

        def rows() -> Iterator[Row]:
            nonlocal failed, cut
            for outcome in results(inputs, process, jobs=tagger.jobs, task="embedding", progress=progress):
                if outcome.result is None:
                    complain(outcome.error, hint=outcome.hint)
                    failed += 1
                    continue
                cut += not outcome.result.complete
                yield from rows_of(outcome.input.name, outcome.result, windows=windows)

        count = write_embeddings(out, rows())
    show(f"{out}: {count} vectors of {len(inputs) - failed} sounds, {failed} failed" + f", {cut} cut short" * bool(cut))
    if failed or cut:
        raise typer.Exit(1)


def _one_channel(channel: str) -> str:
    """Check the option, and return the channel to tag of sounds that are not tagged channel by channel."""
    from ced.sound.audio import check_channel

    if channel == EACH:
        return "mean"
    check_channel(channel, others=(EACH,))
    return channel


@dataclass(frozen=True)
class _Output:
    """Where tags go: to standard output, or in several formats into a folder; and events as clips."""

    formats: Sequence[str]
    folder: Path | None
    combine: bool
    keep_scores: bool
    clips: Path | None

    def check(self, chosen: TagOptions) -> None:
        """Refuse impossible outputs before any work is done for them."""
        if self.combine and self.folder is None:
            raise ConfigError("--combine says how files are written; name their folder with --out")
        if self.keep_scores and self.folder is None:
            raise ConfigError("--keep-scores keeps the scores of a run in its folder; name that with --out")
        if self.folder is None and len(self.formats) > 1:
            raise ConfigError(f"{' and '.join(self.formats)} cannot be printed at once; name a folder with --out")
        if self.clips is not None and not chosen.events:
            raise ConfigError("--clips cuts out events; ask for them with --events")

    def check_inputs(self, inputs: "Sequence[Input]", chosen: TagOptions, channel: str) -> None:
        """Refuse what these sounds do not allow, and formats that are unknown or cannot be written."""
        if chosen.clock not in (None, "auto") and len(inputs) > 1:
            raise ConfigError(f"--clock {chosen.clock} is the start of one sound; {len(inputs)} are named")
        if self.clips is not None and any(isinstance(item.source, io.IOBase) for item in inputs):
            raise ConfigError("--clips reads sounds twice, which standard input does not allow; name a file")
        self.found(len(inputs), channel=channel == EACH, clock=chosen.clock is not None)

    def found(self, sounds: int, *, channel: bool, clock: bool) -> "Sequence[Format]":
        """Return the formats."""
        from ced.tag.results import formats

        shared = self.combine or (self.folder is None and sounds > 1)
        return formats(self.formats, shared=shared, printed=self.folder is None, channel=channel, clock=clock)


def _tag_sounds(
    tagger: "Tagger",
    inputs: "Sequence[Input]",
    chosen: TagOptions,
    channel: str,
    output: _Output,
    jobs: int,
    progress: NotedProgress,
) -> bool:
    """Tag sounds; return whether all of them could be read to the end."""
    from ced.tag.batch import Meter, unfinished_scores
    from ced.tag.journal import stamp_of
    from ced.tag.scores import Kind, ScoreLog
    from ced.tag.tagger import in_turn

    def options_of(item: "Input") -> TagOptions:
        return chosen if item.channel is None else replace(chosen, channel=item.channel)

    if output.folder is None:
        # On a terminal, results are progress enough.
        meter = Meter(silent if sys.stdout.isatty() else progress, len(inputs), "tagging")
        streams = in_turn(
            (tagger.stream(item.source, options_of(item), name=item.name, progress=meter.sound) for item in inputs),
            jobs,
        )
        bad: list[str] = []
        (kind,) = output.found(len(inputs), channel=channel == EACH, clock=chosen.clock is not None)
        _print(_whole(zip(inputs, streams, strict=True), output, meter, bad), kind)
        return not bad

    folder, meter = output.folder, Meter(progress, len(inputs), "tagging")
    settings = {"model": _fingerprint(tagger.scorer), **chosen.settings(), "channel": channel}

    def process(item: "Input") -> "Record":
        # What comes through a pipe is never the same again.
        stamp = stamp_of(item) or os.urandom(8).hex()
        about = {"sound": item.key, "stamp": stamp, "settings": settings}
        kind: Kind = "float16" if output.keep_scores else "float32"
        with ScoreLog(folder, unfinished_scores(item), len(tagger.labels), about, kind) as scores:
            stream = tagger.stream(item.source, options_of(item), name=item.name, scores=scores, progress=meter.sound)
            record = stream.record()
            scores.close(finish=output.keep_scores)
        _cut(item.source, record.pieces, output, item)
        return record

    if output.keep_scores:
        from ced.tag.rerun import write_classes

        write_classes(folder, tagger.labels)
    return _write(inputs, process, settings, output, jobs, meter)


def _tag_again(
    folder: Path, chosen: TagOptions, threshold: str | None, output: _Output, progress: NotedProgress
) -> bool:
    """Make tags from the scores of an earlier run; return whether all of its sounds have them and are whole."""
    from ced.tag.batch import Meter
    from ced.tag.rerun import EarlierRun

    run = EarlierRun(folder)
    if threshold is not None:
        chosen = replace(chosen, thresholds=thresholds(threshold, run.labels))
    chosen.check(run.labels)
    each, clock = run.settings.get("channel") == EACH, run.settings.get("clock") is not None
    found = output.found(len(run.inputs), channel=each, clock=clock)
    meter = Meter(progress, len(run.inputs), "tagging")

    def process(item: "Input") -> "Record":
        record = run.record(item, chosen)
        meter.sound(record.seconds)
        if output.clips is not None:
            run.check_unchanged(item)
        _cut(item.name, record.pieces, output, item)
        return record

    if output.folder is None:
        bad: list[str] = []
        _print(_records(run.inputs, process, meter, bad), found[0])
        return not bad
    settings = {**chosen.settings(), **{name: run.settings.get(name) for name in ("model", *_SCORED)}}
    return _write(run.inputs, process, settings, output, 1, meter)


def _check_from(
    sounds: Sequence[str] | None,
    chosen: TagOptions,
    channel: str,
    model: tuple[str, str],
    output: _Output,
    folder: Path,
) -> None:
    """Refuse what cannot be asked of the scores of an earlier run."""
    if sounds:
        raise ConfigError(f"--from tags the sounds of an earlier run; leave out {', '.join(sounds)}")
    given = [name for name in _SCORED if getattr(chosen, name) != getattr(TagOptions, name)]
    given += ["channel"] * (channel == EACH) + ["model or precision"] * (model != ("ced_mini", "float32"))
    if given:
        raise ConfigError(f"{given[0]} is fixed in the scores of an earlier run; leave it out with --from {folder}")
    if output.keep_scores:
        raise ConfigError("--keep-scores is of no use with --from; the scores stay where they are")
    if output.folder is not None and output.folder.resolve() == folder.resolve():
        raise ConfigError(f"--out and --from are both {folder}; choose another folder for the new tags")


def _whole(
    pairs: "Iterable[tuple[Input, TagStream]]", output: _Output, meter: "Meter", bad: list[str]
) -> "Iterator[Timeline]":
    """Yield the streams that can be read, and add the names of those that could not, or not to the end, to `bad`."""
    for item, stream in pairs:
        if stream.wait():
            yield stream  # which is written before the next is asked for
        try:
            if stream.error is not None:
                raise stream.error
            _cut(item.source, stream.events, output, item)
        except AudioError as error:
            complain(error)
            bad.append(item.name)
        else:
            bad += [] if stream.complete else [item.name]
        meter.file()


def _records(
    inputs: "Sequence[Input]", process: "Callable[[Input], Record]", meter: "Meter", bad: list[str]
) -> "Iterator[Timeline]":
    for item in inputs:
        try:
            record = process(item)
        except AudioError as error:
            complain(error)
            bad.append(item.name)
        else:
            bad += [] if record.complete else [item.name]
            yield record
        meter.file()


def _print(timelines: "Iterable[Timeline]", kind: "Format") -> None:
    assert kind.text is not None
    for text in kind.text(timelines):
        show_data(text)


def _write(
    inputs: "Sequence[Input]",
    process: "Callable[[Input], Record]",
    settings: dict[str, Any],
    output: _Output,
    jobs: int,
    meter: "Meter",
) -> bool:
    from ced.tag import batch

    assert output.folder is not None
    summary = batch.run(
        inputs,
        process,
        output.folder,
        settings=settings,
        output=output.formats,
        combined=output.combine,
        keep_scores=output.keep_scores,
        jobs=jobs,
        meter=meter,
        failed=lambda outcome: complain(outcome.error, hint=outcome.hint),
    )
    show(summary)
    return not summary.failed and not summary.incomplete


def _cut(source: Any, events: "Sequence[Tags]", output: _Output, item: "Input") -> None:
    """Cut the events of a sound out, if clips are asked for."""
    if output.clips is not None:
        from ced.tag.clips import write_clips

        write_clips(source, events, output.clips, item.relative)


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
    return model.digest
