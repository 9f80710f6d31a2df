"""The commands tag, embed and calibrate."""

import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ced.cli import clustering, options
from ced.cli.clustering import ChosenModel, Cluster
from ced.cli.console import reporting, show, show_data, show_error
from ced.errors import AudioError, ConfigError
from ced.model.zoo import DEFAULT_MODEL
from ced.progress import Meter, Progress, silent, speed
from ced.tag.options import BATCH, EACH, TagOptions
from ced.text import some

if TYPE_CHECKING:
    from ced.sound.labels import ClassTable
    from ced.tag.batch import SoundOutcome, Summary
    from ced.tag.inputs import InputSound
    from ced.tag.records import Embedding, Record, Timeline
    from ced.tag.runs import EarlierRun
    from ced.tag.tagger import Tagger
    from ced.tag.writers import EmbeddingRow, Format


def tag(
    context: typer.Context,
    sounds: options.SoundsUnlessFrom = None,
    allow_private: options.AllowPrivate = False,
    model: options.ModelOption = DEFAULT_MODEL,
    precision: options.PrecisionOption = "float32",
    channel: options.ChannelOption = "mean",
    strict: options.Strict = False,
    earlier: options.From = None,
    window: options.WindowOption = TagOptions.window,
    hop: options.Hop = None,
    columns: options.Columns = False,
    tail: options.TailOption = TagOptions.tail,
    silence: options.Silence = None,
    top_k: options.TopK = None,
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
    jobs: options.Jobs = options.CORES,
    device: options.DeviceOption = None,
    batch: options.BatchOption = BATCH,
    ray: options.Ray = None,
    workers: options.WorkersOption = None,
) -> None:
    """Tag sounds: print the most probable classes of each window as it is scored, or write them to files.

    Sounds that cannot be read are reported and skipped, and of a truncated sound the readable part is tagged; the exit
    code is then 1.
    """
    chosen = TagOptions(
        window=window,
        hop=hop,
        columns=columns,
        tail=tail,
        silence=silence,
        channel=_one_channel(channel),
        strict=strict,
        top_k=top_k,
        labels=tuple(labels or ()),
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
    given: dict[str, object] = {"--from": earlier, "--combine": combine, "--keep-scores": keep_scores, "--clips": clips}
    given[f"--format {' '.join(others)}"] = others
    cluster = None if ray is None and workers is None else Cluster.chosen(ray, out, workers, jobs, given)
    formats = format or ["text" if cluster is None else "parquet"]
    output = _Output(formats, out, combine, keep_scores, clips, channel == EACH, clock is not None)
    output.check(chosen)
    scorer = ChosenModel(model, precision, device, batch)
    if cluster is not None:
        with reporting() as progress:
            inputs = _find(sounds or (), allow_private)
            output.check_inputs(inputs, chosen)
            with clustering.open_here(scorer, progress) as tagger:
                chosen = with_thresholds(chosen, threshold, tagger.labels)
                ok = clustering.tag(cluster, tagger, scorer, inputs, chosen, channel, progress)
    elif earlier is not None:
        _check_from(earlier, sounds, _given(context), output)
        with reporting() as progress:
            ok = _tag_again(earlier, chosen, threshold, output, progress)
    else:
        with reporting() as progress:
            inputs = _find(sounds or (), allow_private)
            output.check_inputs(inputs, chosen)
            ok = _tag_sounds(inputs, chosen, threshold, scorer, jobs, output, progress)
    if not ok:
        raise typer.Exit(1)


def embed(
    sounds: options.Sounds,
    out: options.EmbeddingsOut,
    allow_private: options.AllowPrivate = False,
    model: options.ModelOption = DEFAULT_MODEL,
    precision: options.PrecisionOption = "float32",
    channel: options.ChannelOption = "mean",
    strict: options.Strict = False,
    window: options.WindowOption = TagOptions.window,
    hop: options.Hop = None,
    tail: options.TailOption = TagOptions.tail,
    windows: options.EachWindow = False,
    jobs: options.Jobs = options.CORES,
    device: options.DeviceOption = None,
    batch: options.BatchOption = BATCH,
    ray: options.Ray = None,
    workers: options.WorkersOption = None,
) -> None:
    """Write an embedding of each sound: a vector for classifiers and searches of your own.

    Sounds that cannot be read are reported and skipped, and of a truncated sound the readable part is embedded; the
    exit code is then 1.
    """
    from ced.tag.inputs import split_channels
    from ced.tag.tagger import Tagger
    from ced.tag.uploads import local_file
    from ced.tag.writers import check_embeddings_path, write_embeddings

    chosen = TagOptions(window=window, hop=hop, tail=tail, channel=_one_channel(channel), strict=strict)
    cluster = None if ray is None and workers is None else Cluster.chosen(ray, out, workers, jobs, {})
    if cluster is not None:
        scorer, inputs = ChosenModel(model, precision, device, batch), _find(sounds, allow_private)
        with reporting() as progress, clustering.open_here(scorer, progress) as tagger:
            if not clustering.embed(cluster, tagger, scorer, inputs, chosen, channel, windows, progress):
                raise typer.Exit(1)
        return
    check_embeddings_path(out)
    with reporting() as progress, local_file(out) as path:
        inputs = _find(sounds, allow_private)
        if channel == EACH:
            inputs = list(split_channels(inputs))
        with Tagger(model, device=device, precision=precision, jobs=jobs, batch=batch, progress=progress) as tagger:
            embedding = _Embedding(tagger, chosen, windows, Meter(progress, len(inputs), "embedding"))
            count = write_embeddings(path, embedding.rows(inputs, tagger.jobs))
    failed, cut = embedding.failed, embedding.cut_short
    show(f"{out}: {count} vectors of {len(inputs) - failed} sounds, {failed} failed" + f", {cut} truncated" * bool(cut))
    if failed or cut:
        raise typer.Exit(1)


def calibrate(
    table: Annotated[
        Path, typer.Argument(help="Labelled clips: a table with filename and labels, or a folder with a meta.tsv.")
    ],
    model: options.ModelOption = DEFAULT_MODEL,
    out: Annotated[
        Path, typer.Option("--out", "-o", rich_help_panel="Output", help="The file of thresholds to write.")
    ] = Path("thresholds.tsv"),
    least_precision: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Selection",
            help="The least precision of each class, above 0, at most 1.",
            show_default="the best F1",
        ),
    ] = None,
    precision: options.PrecisionOption = "float32",
    window: options.WindowOption = TagOptions.window,
    hop: options.Hop = None,
    jobs: options.Jobs = options.CORES,
    device: options.DeviceOption = None,
    batch: options.BatchOption = BATCH,
) -> None:
    """Fit a threshold for each class to labelled clips, for `ced tag --threshold FILE`.

    Clips that cannot be read are reported and skipped; the exit code is then 1.
    """
    from ced.tag.tagger import Tagger
    from ced.tag.thresholds import USUAL_THRESHOLD, calibrate_thresholds

    with (
        reporting() as progress,
        Tagger(model, device=device, precision=precision, jobs=jobs, batch=batch, progress=progress) as tagger,
    ):
        found = calibrate_thresholds(
            tagger,
            table,
            out,
            least_precision=least_precision,
            window=window,
            hop=hop,
            jobs=tagger.jobs,
            progress=progress,
        )
    show(f"{found.out}: thresholds fitted to {found.clips} clips with {found.classes} classes")
    show(
        f"F1, mean over these classes, on the clips fitted to: {found.f1_after:.3f}"
        f" ({found.f1_before:.3f} with {USUAL_THRESHOLD} for all); expect less on others"
    )
    if found.unseen:
        show(f"without clips, so with a threshold common to all: {some(found.unseen)}")
    if found.never:
        show(f"never precise enough, so never a tag: {some(found.never)}")
    if found.unreadable:
        raise typer.Exit(1)


def _one_channel(channel: str) -> str:
    """Check the option, and return the channel to tag of sounds whose channels are not tagged one by one."""
    from ced.sound.audio import check_channel

    if channel == EACH:
        return "mean"
    check_channel(channel, others=(EACH,))
    return channel


def _find(sounds: Sequence[str], allow_private: bool) -> "list[InputSound]":
    """Find the sounds that the arguments name.

    If none of them exists, this is reported before a model is downloaded or opened for them.
    """
    from ced.tag.inputs import find_inputs, none_exists

    stdin = None if sys.stdin is None else sys.stdin.buffer  # None: it was closed by the caller
    inputs = find_inputs(sounds, stdin, allow_private=allow_private)
    if none_exists(inputs):
        for item in inputs:
            show_error(AudioError("cannot be read: No such file or directory", item.name))
        raise typer.Exit(1)
    return inputs


@dataclass(frozen=True)
class _Output:
    """Where tags go: to standard output, or in several formats into a folder; and events as clips."""

    formats: Sequence[str]
    folder: Path | None
    combine: bool
    keep_scores: bool
    clips: Path | None
    channel: bool  # whether each channel is tagged on its own, and tables name it
    clock: bool  # whether tables have clock times

    def check(self, chosen: TagOptions) -> None:
        """Validate the options before any work is done for them."""
        if self.combine and self.folder is None:
            raise ConfigError("--combine applies to files; name their folder with --out")
        if self.keep_scores and self.folder is None:
            raise ConfigError("--keep-scores writes into the folder of a run; name it with --out")
        if self.folder is None and len(self.formats) > 1:
            raise ConfigError(f"{' and '.join(self.formats)} cannot be printed at once; name a folder with --out")
        if self.folder is not None or self.clips is not None:
            from ced.tag.runs import check_outputs

            check_outputs(self.folder, chosen, keep_scores=self.keep_scores, clips=self.clips)

    def check_inputs(self, inputs: "Sequence[InputSound]", chosen: TagOptions) -> None:
        """Check the options against the sounds, and that the formats are known and can be written."""
        from ced.tag.inputs import check_inputs

        check_inputs(inputs, chosen.clock, clips=self.clips is not None, each_channel=self.channel)
        self.found(len(inputs))

    def found(self, sounds: int) -> "Sequence[Format]":
        """Return the formats."""
        from ced.tag.writers import formats

        shared = self.combine or (self.folder is None and sounds > 1)
        printed = self.folder is None
        return formats(self.formats, shared=shared, printed=printed, channel=self.channel, clock=self.clock)

    def print(self, timelines: "Iterable[Timeline]", sounds: int) -> None:
        """Print timelines in the one format, each piece as soon as it is known."""
        (kind,) = self.found(sounds)
        assert kind.text is not None
        texts = kind.text(timelines)
        try:
            for text in texts:
                show_data(text)
        except KeyboardInterrupt as error:
            if isinstance(texts, Generator):  # if interrupted while printing: the end that the format writes then
                show_data(texts.throw(error))
            raise


def _tag_sounds(
    inputs: "Sequence[InputSound]",
    chosen: TagOptions,
    threshold: str | None,
    model: ChosenModel,
    jobs: int,
    output: _Output,
    progress: Progress,
) -> bool:
    """Tag sounds; return whether all of them could be read to the end."""
    from ced.tag.runs import tag_to_folder
    from ced.tag.tagger import Tagger

    with Tagger(
        model.name,
        device=model.device,
        precision=model.precision,
        jobs=jobs,
        batch=model.batch,
        progress=progress,
    ) as tagger:
        chosen = with_thresholds(chosen, threshold, tagger.labels)
        if output.folder is None:
            return _print_tags(tagger, inputs, chosen, output, progress)
        summary = tag_to_folder(
            tagger,
            inputs,
            output.folder,
            chosen,
            formats=output.formats,
            combined=output.combine,
            keep_scores=output.keep_scores,
            clips=output.clips,
            each_channel=output.channel,
            finished=_show_failure,
            progress=progress,
        )
    return _show_summary(summary)


def _print_tags(
    tagger: "Tagger", inputs: "Sequence[InputSound]", chosen: TagOptions, output: _Output, progress: Progress
) -> bool:
    """Print the tags of sounds as they are known; return whether all of them could be read to the end."""
    from ced.tag.clips import write_clips
    from ced.tag.inputs import split_channels
    from ced.tag.tagger import in_turn

    tagger.windows.check(chosen)
    items = list(split_channels(inputs)) if output.channel else inputs
    # On a terminal, results are progress enough.
    meter = Meter(silent if sys.stdout.isatty() else progress, len(items), "tagging")
    streams = (
        tagger.stream(item.source, chosen.of_channel(item.channel), name=item.name, progress=meter.sound)
        for item in items
    )
    ok = True

    def readable() -> "Iterator[Timeline]":
        nonlocal ok
        for item, stream in zip(items, in_turn(streams, tagger.jobs), strict=True):
            if stream.wait():
                yield stream  # it is written before the next one is asked for
            try:
                if stream.error is not None:
                    raise stream.error
                if output.clips is not None:
                    write_clips(item.source, stream.events, output.clips, item.relative)
                ok = ok and stream.complete
            except AudioError as error:
                show_error(error)
                ok = False
            meter.file()

    output.print(readable(), len(items))
    return ok


def _tag_again(folder: Path, chosen: TagOptions, threshold: str | None, output: _Output, progress: Progress) -> bool:
    """Make tags from the scores of an earlier run; return whether all of its sounds have scores and are complete."""
    from ced.tag.runs import EarlierRun

    run = EarlierRun(folder)
    chosen = with_thresholds(chosen, threshold, run.labels)
    output = replace(output, channel=run.settings.get("channel") == EACH, clock=run.settings.get("clock") is not None)
    output.found(len(run.inputs))
    if output.folder is None:
        return _print_tags_again(run, chosen, output, progress)
    summary = run.tag_to_folder(
        output.folder,
        chosen,
        formats=output.formats,
        combined=output.combine,
        clips=output.clips,
        finished=_show_failure,
        progress=progress,
    )
    return _show_summary(summary)


def _print_tags_again(run: "EarlierRun", chosen: TagOptions, output: _Output, progress: Progress) -> bool:
    """Print tags from the scores of an earlier run; return whether all of its sounds have scores and are complete."""
    chosen.check(run.labels)
    meter = Meter(progress, len(run.inputs), "tagging")
    ok = True

    def readable() -> "Iterator[Timeline]":
        nonlocal ok
        for item in run.inputs:
            try:
                record = run.record(item, chosen, output.clips)
                ok = ok and record.complete
                yield record
                meter.file(record.seconds)
            except AudioError as error:
                show_error(error)
                ok = False
                meter.file()

    output.print(readable(), len(run.inputs))
    return ok


def _show_failure(outcome: "SoundOutcome[Record]") -> None:
    if outcome.result is None:
        show_error(outcome.error, hint=outcome.hint)


def _show_summary(summary: "Summary") -> bool:
    """Print what a run did; return whether all sounds could be read to the end."""
    show(f"{summary}; {speed(summary.seconds, summary.elapsed)}")
    return not summary.failed and not summary.incomplete


def _given(context: typer.Context) -> set[str]:
    """Return the names of the options that the command line has, also if they have their default values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _check_from(folder: Path, sounds: Sequence[str] | None, given: set[str], output: _Output) -> None:
    """Check that options can be applied to the scores of an earlier run."""
    from ced.tag.runs import SCORED

    if sounds:
        raise ConfigError(f"--from tags the sounds of an earlier run; leave out {', '.join(sounds)}")
    fixed = [name for name in ("model", "precision", "device", "batch", *SCORED) if name in given]
    if fixed:
        raise ConfigError(f"{fixed[0]} is fixed in the scores of an earlier run; leave it out with --from {folder}")
    if output.keep_scores:
        raise ConfigError("--keep-scores cannot be used with --from; the scores stay in the folder of the earlier run")


@dataclass
class _Embedding:
    """The embedding of many sounds with the same options."""

    tagger: "Tagger"
    options: TagOptions
    windows: bool  # a vector for each window, not for each sound
    meter: Meter
    failed: int = 0
    cut_short: int = 0

    def embed(self, item: "InputSound") -> "Embedding":
        """Return the embedding of a sound."""
        return self.tagger.embed(item.source, self.options.of_channel(item.channel))

    def rows(self, inputs: "Sequence[InputSound]", jobs: int) -> "Iterator[EmbeddingRow]":
        """Yield the vectors of sounds; report and count those that cannot be read."""
        from ced.tag.batch import outcomes
        from ced.tag.writers import embedding_rows

        for outcome in outcomes(inputs, self.embed, jobs=jobs):
            found = outcome.result
            self.meter.file(0.0 if found is None else found.seconds)
            if found is None:
                show_error(outcome.error, hint=outcome.hint)
                self.failed += 1
            else:
                self.cut_short += not found.complete
                yield from embedding_rows(outcome.input.name, found, windows=self.windows)


def with_thresholds(chosen: TagOptions, threshold: str | None, labels: "ClassTable") -> TagOptions:
    """Return options with the thresholds that --threshold names, if it is given."""
    return chosen if threshold is None else replace(chosen, threshold=_thresholds(threshold, labels))


def _thresholds(text: str, labels: "ClassTable") -> float | tuple[float, ...]:
    """Return the threshold of all classes that an option names, or those of its file, one for each class."""
    try:
        threshold = float(text)
    except ValueError:
        from ced.tag.thresholds import read_thresholds

        return read_thresholds(Path(text), labels)
    if not 0 <= threshold <= 1:
        raise ConfigError(f"the threshold is {text}; it must be a probability, 0 to 1, or a file")
    return threshold
