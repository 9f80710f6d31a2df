"""The tagger: cut a sound into windows, score them with a model, and turn scores into tags, events or embeddings."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice, pairwise
from queue import SimpleQueue
from threading import Semaphore
from typing import TYPE_CHECKING, Protocol, TypeVar, Unpack, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, CedError, CheckpointError, ClosedError, ConfigError
from ced.model.graph import PRECISIONS, Precision
from ced.model.zoo import DEFAULT_MODEL
from ced.parallel import attempt, in_order, submitted_sounds
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.audio import Sound, Source, Window, name_of, open_sound
from ced.sound.labels import ClassTable
from ced.tag import clock
from ced.tag.events import events
from ced.tag.options import BATCH, MOST_BATCH, TagKeywords, TagOptions
from ced.tag.records import Embedding, Kind, Record, Scored, Tags
from ced.tag.scores import ScoreLog
from ced.tag.shared_calls import SharedCalls

if TYPE_CHECKING:
    from ced.model.vit import CED

_AHEAD = 2  # windows in memory per scoring thread
_REMEMBERED = 64  # checked options that are kept
_ROUNDING = 1e-6  # how far rounding may take a probability out of [0, 1]

Array = NDArray[np.float32]
WindowProgress = Callable[[float, float | None], None]
T = TypeVar("T")
R = TypeVar("R")


class Scorer(Protocol):
    """A model that scores waves; several threads may call it at once."""

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""

    def __call__(self, waves: Array, /) -> Array:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c)."""


@runtime_checkable
class Embedder(Protocol):
    """A model that returns embeddings."""

    def embed(self, waves: Array, /) -> Array:
        """Return an embedding of each wave, (b, t) -> (b, d)."""


@runtime_checkable
class ColumnScorer(Protocol):
    """A model that scores every 0.16 s of a wave."""

    def columns(self, waves: Array, /) -> Array:
        """Return the probability of each class in each column of patches, (b, t) -> (b, columns, c)."""

    def column_starts(self, count: int) -> NDArray[np.float64]:
        """Return the start of each of the `count` columns of a wave, (count,) seconds."""


@runtime_checkable
class WindowLimited(Protocol):
    """A model that limits the length of a window."""

    def check_window(self, seconds: float) -> None:
        """Raise ConfigError if a window of this length is too long for the model."""


class WindowScorer:
    """Scores and embeds single windows, and checks every answer of the model.

    For callers that cut a sound into windows themselves; a `Tagger` has one as `windows`.

    Args:
        model: scores waves; with `embed`, or `columns` and `column_starts`, it can also embed or score columns.
        name: the name of the model in errors.
        batch: windows of several threads that share a call of a model that is `accelerated`, that is, not on the CPU.
    """

    def __init__(self, model: Scorer, name: str, batch: int = BATCH) -> None:
        self.model, self.name = model, name
        self._batch = batch
        self._calls = SharedCalls(batch) if getattr(model, "accelerated", False) else None
        self._checked: set[TagOptions] = set()  # options that fit the model; checking may run it

    @property
    def labels(self) -> ClassTable:
        """The classes of the model."""
        return self.model.labels

    def threads(self, jobs: int) -> int:
        """Return how many threads keep the model busy: `jobs`, or on an accelerator at least twice the batch."""
        return jobs if self._calls is None else max(jobs, 2 * self._batch)

    def close(self) -> None:
        """End the calls that threads share; those that wait end with a ClosedError."""
        if self._calls is not None:
            self._calls.close()

    def check(self, options: TagOptions) -> None:
        """Check options against the model, before any sound is read.

        Raises:
            CheckpointError: the model cannot score columns.
            ConfigError: an option does not fit the model (its classes, its longest window).
        """
        if options in self._checked:
            return
        options.check(self.labels)
        if options.columns:
            self._column_scorer()
        if isinstance(self.model, WindowLimited):
            self.model.check_window(options.window)
        self._checked = {options, *(self._checked if len(self._checked) < _REMEMBERED else ())}

    def score(self, window: Window, options: TagOptions) -> list[Scored]:
        """Return the scores of one window, or with `options.columns` of each 0.16 s of it.

        Raises:
            CheckpointError: the model cannot score columns, or returned invalid scores.
        """
        if options.silence is not None and _level(window.wave) < options.silence:
            return [Scored(window.start, window.end, np.zeros(len(self.labels), np.float32), silent=True)]
        if not options.columns:
            (probs,) = self._probs(self._call(self.model, window.wave[None]), 2)
            return [Scored(window.start, window.end, probs)]
        model = self._column_scorer()
        (rows,) = self._probs(self._call(model.columns, window.wave[None]), 3)
        # The last column also covers the samples after it; columns that earlier windows cover are left out.
        times = [*(window.start + model.column_starts(len(rows))).tolist(), window.end]
        return [
            Scored(max(start, window.new), end, row)
            for row, (start, end) in zip(rows, pairwise(times), strict=True)
            if end > window.new
        ]

    def score_together(self, windows: Sequence[Window], options: TagOptions) -> list[list[Scored]]:
        """Return the scores of windows of one length from one call of the model: what `score` returns for each.

        That is faster for short windows and models with an `at_once` (see `OnnxModel`), and slower for others.

        Raises:
            CheckpointError: as for `score`.
        """
        if len(windows) == 1 or options.columns or options.silence is not None:
            return [self.score(window, options) for window in windows]
        waves = np.stack([window.wave for window in windows])
        rows = self._probs(self._call(self.model, waves), 2, len(windows))
        return [[Scored(window.start, window.end, row)] for window, row in zip(windows, rows, strict=True)]

    def embed(self, window: Window) -> Array:
        """Return the embedding of one window, (d,).

        Raises:
            CheckpointError: the model has no embeddings, or returned values that are not finite.
        """
        if not isinstance(self.model, Embedder):
            raise CheckpointError(f"the model {self.name} has no embeddings; graphs written by `ced export` have them")
        vector: Array = self._answer(self._call(self.model.embed, window.wave[None]), 2)[0]
        return vector

    def _call(self, function: Callable[[Array], Array], waves: Array) -> Array:
        return function(waves) if self._calls is None else self._calls(function, waves)

    def _column_scorer(self) -> ColumnScorer:
        if not isinstance(self.model, ColumnScorer):
            raise CheckpointError(f"the model {self.name} cannot score columns; graphs written by `ced export` can")
        return self.model

    def _probs(self, answer: Array, dimensions: int, count: int = 1) -> Array:
        """Check the probabilities of `count` waves, (count, ..., c)."""
        answer = self._answer(answer, dimensions, count)
        classes = len(self.labels)
        if answer.shape[-1] != classes:
            raise CheckpointError(
                f"the model {self.name} returned scores of shape {answer.shape} for {count} sound(s); its class table"
                f" has {classes} classes"
            )
        least, most = float(answer.min(initial=0.0)), float(answer.max(initial=1.0))
        if least < -_ROUNDING or most > 1 + _ROUNDING:
            worst = least if least < -_ROUNDING else most
            raise CheckpointError(f"the model {self.name} returned a score of {worst:g}; probabilities are 0 to 1")
        return answer if least >= 0 and most <= 1 else answer.clip(0.0, 1.0)

    def _answer(self, answer: Array, dimensions: int, count: int = 1) -> Array:
        """Check what the model returned for `count` waves; all scores and embeddings pass here."""
        if not isinstance(answer, np.ndarray):
            raise CheckpointError(f"the model {self.name} returned {type(answer).__name__}; it must be a NumPy array")
        if answer.ndim != dimensions or len(answer) != count:
            raise CheckpointError(
                f"the model {self.name} returned an array of shape {answer.shape} for {count} sound(s); it must have"
                f" {dimensions} dimensions, the first of length {count}"
            )
        if not np.isfinite(answer).all():
            raise CheckpointError(
                f"the model {self.name} returned values that are not finite numbers (NaN or infinity)"
            )
        return answer


class Tagger:
    """Tags sounds with a model.

    Each window is scored on its own, so its scores depend neither on other windows nor on `jobs`.

    Args:
        model: a model name, an ONNX file, a checkpoint (file or experiment folder), a torch network, or any `Scorer`.
        device: where the model runs: "cpu"; "cuda", "coreml", "directml" and others that the installed ONNX Runtime
            can use, or for a torch network any device of torch; "auto", an accelerator if there is one, else the CPU.
            None: the CPU, or the device of the torch network's weights.
        precision: "float32", or "int8" for a smaller and faster graph whose scores differ slightly.
        jobs: windows scored at the same time, each in one thread; faster than several threads for one window.
        batch: windows of one length that share a call on an accelerator, from any sounds. On the CPU, each window has a
            call of its own.
        name: the name of the model in records and errors; None: the name or path given.
        progress: called during a download, if the model needs one.

    Attributes:
        windows: scores single windows.
        jobs: how many sounds to read at a time to keep the model busy: as given, or on an accelerator at least twice
            `batch`.

    Raises:
        CheckpointError, DownloadError: the model is unknown, unreadable, or could not be downloaded.
        ConfigError: the model cannot run on the device or in the precision, or `jobs` or `batch` is out of range.
    """

    def __init__(
        self,
        model: "str | os.PathLike[str] | CED | Scorer" = DEFAULT_MODEL,
        *,
        device: str | None = None,
        precision: Precision = "float32",
        jobs: int = 1,
        batch: int = BATCH,
        name: str | None = None,
        progress: Progress = silent,
    ) -> None:
        if not isinstance(jobs, int) or jobs < 1:
            raise ConfigError(f"jobs is {jobs!r}; it must be a whole number, 1 or more")
        if not isinstance(batch, int) or not 1 <= batch <= MOST_BATCH:  # as many windows, and threads, are in memory
            raise ConfigError(f"batch is {batch!r}; it must be a whole number, 1 to {MOST_BATCH}")
        self.name = name or (os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__)
        scorer = _open_scorer(model, device, precision, progress)
        self.windows = WindowScorer(scorer, self.name, batch)
        self.jobs = jobs = self.windows.threads(jobs)
        self._closed = False
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="scorer") if jobs > 1 else None
        self._slots = Semaphore(_AHEAD * jobs)  # limits the windows in memory, however many sounds are read at once

    def __enter__(self) -> "Tagger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; tagging in progress ends with a ClosedError after the current window."""
        self._closed = True
        self.windows.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def labels(self) -> ClassTable:
        """The classes of the model."""
        return self.windows.labels

    @property
    def digest(self) -> str | None:
        """SHA-256 of the graph or network, which distinguishes it from others of its name; None of other scorers."""
        digest = getattr(self.windows.model, "digest", None)
        return digest if isinstance(digest, str) else None

    def tag(
        self,
        source: Source | Sound,
        options: TagOptions | None = None,
        *,
        name: str | None = None,
        **changes: Unpack[TagKeywords],
    ) -> Record:
        """Tag a sound.

        Args:
            source: a path, an http(s) address, the bytes of a file, a binary file, (samples, rate), or a `Sound` that
                is already open (`channel` and `strict` then have no effect).
            options: how it is tagged; None: the defaults.
            name: the name of the sound in the record; None: its path or address.
            changes: fields of `TagOptions` that replace those of `options`.

        Raises:
            AudioError: the sound cannot be read.
            CheckpointError: the model cannot score columns, or returned invalid scores.
            ConfigError: an option is out of range, or does not fit the model.
        """
        return self.stream(source, options, name=name, **changes).record()

    def stream(
        self,
        source: Source | Sound,
        options: TagOptions | None = None,
        *,
        name: str | None = None,
        scores: ScoreLog | None = None,
        progress: WindowProgress = lambda seconds, expected: None,
        **changes: Unpack[TagKeywords],
    ) -> "TagStream":
        """Yield the windows or events of a sound as soon as they are known, in memory that does not grow with it.

        Arguments and errors are those of `tag`. Options are checked at once; other errors are raised while iterating.

        Args:
            source, options, name, changes: as for `tag`.
            scores: scores from an earlier run, which are not computed again; new ones are added.
            progress: called after each window, with the seconds that it adds and the expected length of the sound.
        """
        return TagStream(self, source, self._options(options, changes), name, scores, progress)

    def tag_many(
        self, sources: Iterable[Source], options: TagOptions | None = None, **changes: Unpack[TagKeywords]
    ) -> Iterator[Record | AudioError]:
        """Tag several sounds at a time; yield in order the record of each, or the error of one that cannot be read.

        Arguments and other errors are those of `tag`; options are checked at once.
        """
        checked = self._options(options, changes)
        streams = in_turn((self.stream(source, checked) for source in sources), self.jobs)
        return map(_result, streams)

    def score(
        self, source: Source | Sound, options: TagOptions | None = None, **changes: Unpack[TagKeywords]
    ) -> Iterator[Scored]:
        """Yield the scores of all classes for each window of a sound.

        Arguments and errors are those of `tag`; options about selection, events and the clock have no effect. Options
        are checked at once; other errors are raised while iterating.
        """
        return self._scores(source, self._options(options, changes))

    def embed(
        self, source: Source | Sound, options: TagOptions | None = None, **changes: Unpack[TagKeywords]
    ) -> Embedding:
        """Return an embedding of each window of a sound: the mean of the network's tokens, from which it scores.

        Arguments are those of `tag`; of the options, `window`, `hop`, `tail`, `channel` and `strict` apply.

        Raises:
            AudioError: the sound cannot be read.
            CheckpointError: the model has no embeddings, or returned values that are not finite.
            ConfigError: an option is out of range.
        """
        checked = self._options(options, changes)
        with self._open_sound(source, checked) as sound:
            found = list(self._in_pool(self._embed_window, _cut(sound, checked)))
        starts, ends, vectors = zip(*found, strict=True)
        return Embedding(np.array(starts), np.array(ends), np.stack(vectors), checked.channel, sound.complete)

    def _embed_window(self, window: Window) -> tuple[float, float, Array]:
        return window.start, window.end, self.windows.embed(window)

    def _options(self, options: TagOptions | None, changes: TagKeywords) -> TagOptions:
        """Return options with changes, checked against the model."""
        options = replace(options or TagOptions(), **changes)
        self.windows.check(options)
        return options

    @contextmanager
    def _open_sound(self, source: Source | Sound, options: TagOptions, name: str | None = None) -> Iterator[Sound]:
        """Open a sound as the options say; at the end log its warnings, under its own name or another."""
        if isinstance(source, Sound):
            yield source
            return
        with open_sound(
            source, channel=options.channel, strict=options.strict, cancelled=lambda: self._closed
        ) as sound:
            try:
                yield sound
            finally:
                sound.log_warnings(name)

    def _scores(self, source: Source | Sound, options: TagOptions) -> Iterator[Scored]:
        with self._open_sound(source, options) as sound:
            for window in self._score_windows(sound, options):
                yield from window

    def _score_windows(self, sound: Sound, options: TagOptions, skip: int = 0) -> Iterator[list[Scored]]:
        """Yield the scores of each window of an open sound except the first `skip`."""
        return self._in_pool(partial(self.windows.score, options=options), islice(_cut(sound, options), skip, None))

    def _in_pool(self, work: Callable[[Window], R], windows: Iterable[Window]) -> Iterator[R]:
        """Yield `work(window)` in order, computed in the threads of the tagger; errors come after earlier windows."""
        if self._pool is None:
            for window in windows:
                self._check_open()
                yield work(window)
        else:
            yield from in_order(work, windows, self._submit, _AHEAD * self.jobs)

    def _submit(self, work: Callable[[T], R], item: T, /) -> Future[R]:
        self._check_open()
        assert self._pool is not None
        self._slots.acquire()
        try:
            future = self._pool.submit(work, item)
        except RuntimeError as error:  # the pool has been shut down since
            raise ClosedError("the tagger is closed") from error
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the tagger is closed")


class TagStream:
    """The windows or events of one sound, each as soon as it is known; a `Timeline` for writers.

    Attributes:
        file, model, kind, channel, rate, began: as in a `Record`; `rate` is known with the first piece.
        seconds: how much of the sound has been tagged so far.
        complete: whether the whole sound has been tagged.
        expected_seconds: the length of the sound according to its header, once that is known.
        events: the events so far, if the pieces are events.
        error: with `use_queue`, why the sound could not be read, or not to its end.
    """

    def __init__(
        self,
        tagger: Tagger,
        source: Source | Sound,
        options: TagOptions,
        name: str | None,
        scores: ScoreLog | None,
        progress: WindowProgress,
    ) -> None:
        self.file = name or (source.name if isinstance(source, Sound) else name_of(source))
        self.model, self.channel = tagger.name, options.channel
        self.kind: Kind = "events" if options.events else "windows"
        self.began = None if options.clock is None else clock.begin(source, self.file, options.clock)
        self.rate: int | None = None
        self.seconds, self.complete = 0.0, False
        self.expected_seconds: float | None = None
        self.events: list[Tags] = []
        self.error: AudioError | None = None
        self._pieces = self._tagged_pieces = self._tagged(tagger, source, options, scores, progress)
        self._queue: SimpleQueue[Tags | BaseException | None] = SimpleQueue()  # None: the end

    def __iter__(self) -> Iterator[Tags]:
        return self

    def __next__(self) -> Tags:
        piece = next(self._pieces)
        if self.kind == "events":
            self.events.append(piece)
        return piece

    def record(self) -> Record:
        """Tag the rest of the sound, and return the record of all of it."""
        pieces = tuple(self)
        return Record(
            self.file,
            self.model,
            self.seconds,
            pieces,
            self.kind,
            self.channel,
            self.complete,
            self.expected_seconds,
            self.rate,
            self.began,
        )

    def use_queue(self) -> "TagStream":
        """Let the iteration wait for what `fill_queue` finds in another thread from now on; return the stream."""
        self._tagged_pieces, self._pieces = self._pieces, _taken(self._queue)
        return self

    def fill_queue(self) -> None:
        """Tag the sound.

        An AudioError ends the iteration and is kept in `error`; the iteration raises other errors.
        """
        try:
            fault = attempt(self._put, self._tagged_pieces, name=lambda _: self.file)
            if isinstance(fault, AudioError):
                self.error = fault
        except CedError as error:
            self._queue.put(error)
        finally:
            self._queue.put(None)

    def _put(self, pieces: Iterator[Tags]) -> None:
        for piece in pieces:
            self._queue.put(piece)

    def wait(self) -> bool:
        """Wait for the first piece or the end of the sound; return whether there is something to write."""
        first = next(self._pieces, None)
        if first is not None:
            self._pieces = chain([first], self._pieces)
        return first is not None or self.error is None

    def _tagged(
        self,
        tagger: Tagger,
        source: Source | Sound,
        options: TagOptions,
        scores: ScoreLog | None,
        progress: WindowProgress,
    ) -> Iterator[Tags]:
        with tagger._open_sound(source, options, self.file) as sound:
            self.rate = sound.rate
            windows = _windows(tagger, sound, options, scores)
            yield from pieces(self._scored(windows, sound, progress), options, tagger.labels)
            self.complete = sound.complete

    def _scored(self, windows: Iterable[Sequence[Scored]], sound: Sound, progress: WindowProgress) -> Iterator[Scored]:
        """Yield the scores of windows one by one, and report how far the sound has been tagged."""
        for window in windows:
            added, self.seconds = window[-1].end - self.seconds, window[-1].end
            self.expected_seconds = sound.expected_seconds
            progress(added, self.expected_seconds)
            yield from window


def _windows(tagger: Tagger, sound: Sound, options: TagOptions, scores: ScoreLog | None) -> Iterator[Sequence[Scored]]:
    """Yield the windows that a log already has, then score the following ones and add them to it."""
    if scores is None:
        yield from tagger._score_windows(sound, options)
        return
    done = 0
    for window in scores.stored():
        done += 1
        yield window
    yield from map(scores.add, tagger._score_windows(sound, options, skip=done))


def pieces(scored: Iterable[Scored], options: TagOptions, labels: ClassTable) -> Iterator[Tags]:
    """Yield the windows or events that scored windows become, each as soon as it is known.

    Raises:
        ConfigError: as for `TagOptions.check`.
    """
    selection = options.selection(labels)
    if not options.events:
        return map(selection.tags, scored)
    return events(scored, selection, release=options.release, gap=options.gap, shortest=options.shortest)


def _cut(sound: Sound, options: TagOptions) -> Iterator[Window]:
    return audio.cut_windows(sound.blocks(), options.window, options.step, tail=options.tail)


def _taken(found: "SimpleQueue[Tags | BaseException | None]") -> Iterator[Tags]:
    while (piece := found.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def in_turn(streams: Iterable[TagStream], jobs: int, ahead: int = 32) -> Iterator[TagStream]:
    """Tag several sounds at a time, and yield their streams in order; read each to its end before asking for the next.

    Args:
        streams: taken one by one, when there is room for them.
        jobs: sounds that are read at the same time.
        ahead: finished sounds that may wait for an earlier one.
    """
    queued = (stream.use_queue() for stream in streams)
    with closing(submitted_sounds(TagStream.fill_queue, queued, jobs, ahead)) as submitted:
        for stream, _ in submitted:
            yield stream


def _result(stream: TagStream) -> Record | AudioError:
    record = stream.record()
    return record if stream.error is None else stream.error


def _open_scorer(
    model: "str | os.PathLike[str] | CED | Scorer", device: str | None, precision: Precision, progress: Progress
) -> Scorer:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
    network = sys.modules.get("ced.model.vit")  # a torch network exists only if its module has been imported
    if network is not None and isinstance(model, network.CED):
        if precision != "float32":
            raise ConfigError(
                f"precision is {precision}; a torch network runs in its own precision, pass a name or a file instead"
            )
        from ced.model.loading import TorchScorer

        return TorchScorer(model, device)
    if not isinstance(model, str | os.PathLike):
        if not callable(model) or not hasattr(model, "labels"):
            raise ConfigError(
                f"model is a {type(model).__name__}; allowed: a name, a path, a torch network, a scorer with labels"
            )
        if precision != "float32":
            raise ConfigError(f"precision is {precision}; an open model runs in its own precision")
        if device not in (None, "cpu", "auto"):
            raise ConfigError(f"device is {device!r}; an open model runs where it is")
        return cast(Scorer, model)
    from ced.model.runtime import open_model

    return open_model(model, precision=precision, device=device, progress=progress)


def _level(wave: Array) -> float:
    """Return the root mean square of a wave (t,) in dB of full scale."""
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    return 10.0 * math.log10(power) if power > 0 else -math.inf
