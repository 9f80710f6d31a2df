"""The tagger: a sound is cut into windows, a model scores them, and the scores become tags, events or embeddings."""

import logging
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from ced.parallel import in_order
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.audio import Sound, Source, Window, name_of, open_sound
from ced.sound.labels import ClassTable
from ced.tag import clock
from ced.tag.options import BATCH, TagKeywords, TagOptions, Tail
from ced.tag.records import Kind, Record, Scored, Tags
from ced.tag.scores import ScoreLog
from ced.tag.shared_calls import SharedCalls
from ced.text import printable

if TYPE_CHECKING:
    from ced.model.vit import CED

_AHEAD = 2  # windows in memory for each thread that scores
_REMEMBERED = 64  # options that are not checked again
_ROUNDING = 1e-6  # how far a probability may lie outside [0, 1]

_log = logging.getLogger(__name__)

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
    """A model that gives embeddings."""

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
    """A model that may not take windows of any length."""

    def check_window(self, seconds: float) -> None:
        """Raise ConfigError if the model does not take windows of this length."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """The embeddings of the windows of one sound."""

    starts: NDArray[np.float64]  # (w,) seconds
    ends: NDArray[np.float64]
    vectors: Array  # (w, d)
    channel: str | int = "mean"
    complete: bool = True  # False: the file is cut short

    @property
    def seconds(self) -> float:
        """The length of the sound."""
        return float(self.ends[-1])

    @property
    def clip(self) -> Array:
        """The embedding of the sound as a whole, (d,): the mean of its windows, weighted by their length."""
        mean: Array = np.average(self.vectors, axis=0, weights=self.ends - self.starts).astype(np.float32)
        return mean


class Tagger:
    """Tags sounds with a model.

    Each window is scored on its own, so its scores do not depend on its neighbours or on `jobs`.

    Args:
        model: a model name, an ONNX file, a checkpoint (file or experiment folder), a torch network, or any `Scorer`.
        device: where the model runs: "cpu"; "cuda", "coreml", "directml" and others for which the installed ONNX
            Runtime has a provider, or for a torch network any device of torch; "auto", an accelerator if there is one,
            else the CPU. None: the CPU, or where the weights of the torch network are.
        precision: "float32", or "int8" for a smaller and faster graph whose scores differ a little.
        jobs: windows scored at a time, each in one thread; that is faster than several threads for one window.
        batch: windows of one length that share a call on an accelerator, whichever sounds they are of. On the CPU each
            window has a call of its own.
        name: the name of the model in records and errors; None: the name or path given.
        progress: called during a download, if the model needs one.

    Raises:
        CheckpointError, DownloadError: the model is unknown, unreadable, or could not be downloaded.
        ConfigError: the model cannot run on the device or in the precision, or `jobs` or `batch` is below 1.

    Attributes:
        scorer: the model.
        name: its name.
        jobs: sounds to read at a time, so that the model never waits: as given, but on an accelerator at least twice
            `batch`.
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
        for what, number in (("jobs", jobs), ("batch", batch)):
            if not isinstance(number, int) or number < 1:
                raise ConfigError(f"{what} is {number!r}; it must be a whole number, 1 or more")
        self.scorer = _open(model, device, precision, progress)
        accelerated: bool = getattr(self.scorer, "accelerated", False)
        self._shared = SharedCalls(batch) if accelerated else None
        self.jobs = jobs = max(jobs, 2 * batch) if accelerated else jobs  # threads that decode, and wait for a call
        self.name = name or (os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__)
        self._closed = False
        self._fitting: set[TagOptions] = set()  # that were checked, as checking may run the model
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="scorer") if jobs > 1 else None
        self._room = Semaphore(_AHEAD * jobs)  # bounds the windows in memory, however many sounds are read at once

    def __enter__(self) -> "Tagger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; sounds that are being tagged end with a ClosedError after the current window."""
        self._closed = True
        if self._shared is not None:
            self._shared.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def labels(self) -> ClassTable:
        """The classes of the model."""
        return self.scorer.labels

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
            source: a path, an http(s) address, the bytes of a file, a binary file, (samples, rate), or a sound that is
                open already (`channel` and `strict` then have no effect).
            options: how it is tagged; None: the defaults.
            name: the name of the sound in the record; None: its path or address.
            changes: fields of `TagOptions` that replace those of `options`.

        Raises:
            AudioError: the sound cannot be read.
            CheckpointError: the model cannot score columns, or answers with impossible scores.
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
        """Yield the windows or events of a sound as soon as they are known; a long sound is never in memory as a whole.

        Arguments and errors are those of `tag`; options are checked at once, other errors come with the iteration.

        Args:
            source, options, name, changes: as for `tag`.
            scores: scores that an earlier run left, which are not computed again; further ones are added.
            progress: called after each window, with the seconds that it adds and the expected length of the sound.
        """
        return TagStream(self, source, self.checked(options, **changes), name, scores, progress)

    def tag_many(
        self, sources: Iterable[Source], options: TagOptions | None = None, **changes: Unpack[TagKeywords]
    ) -> Iterator[Record | AudioError]:
        """Tag several sounds at a time; yield a record for each, in order, or the error of one that cannot be read.

        Arguments and other errors are those of `tag`; options are checked at once.
        """
        options = self.checked(options, **changes)
        streams = in_turn((self.stream(source, options) for source in sources), self.jobs)
        return map(_result, streams)

    def score(
        self,
        source: Source,
        *,
        window: float = TagOptions.window,
        hop: float | None = None,
        columns: bool = False,
        tail: Tail = TagOptions.tail,
        silence: float | None = None,
        channel: str | int = TagOptions.channel,
        strict: bool = False,
    ) -> Iterator[Scored]:
        """Yield the scores of all classes for each window of a sound.

        Arguments are those of `TagOptions`, errors those of `tag`; arguments are checked at once, other errors come
        with the iteration.
        """
        options = self.checked(
            TagOptions(
                window=window, hop=hop, columns=columns, tail=tail, silence=silence, channel=channel, strict=strict
            )
        )
        return self._scores(source, options)

    def embed(
        self,
        source: Source,
        *,
        window: float = TagOptions.window,
        hop: float | None = None,
        tail: Tail = TagOptions.tail,
        channel: str | int = TagOptions.channel,
        strict: bool = False,
    ) -> Embedding:
        """Return an embedding of each window of a sound: the mean of the network's tokens, from which it scores.

        Arguments are those of `TagOptions`.

        Raises:
            AudioError: the sound cannot be read.
            CheckpointError: the model gives no embeddings, or some that are not finite.
            ConfigError: an argument is out of range.
        """
        options = self.checked(TagOptions(window=window, hop=hop, tail=tail, channel=channel, strict=strict))
        with self.reading(source, options) as sound:
            windows = audio.cut(sound.blocks(), options.window, options.step, tail=options.tail)
            found = list(self._ahead(windows, lambda window: (window.start, window.end, self.embed_window(window))))
        starts, ends, vectors = zip(*found, strict=True)
        return Embedding(np.array(starts), np.array(ends), np.stack(vectors), options.channel, sound.complete)

    def checked(self, options: TagOptions | None = None, **changes: Unpack[TagKeywords]) -> TagOptions:
        """Return options with changes, checked against the model before any sound is read.

        Raises:
            CheckpointError: the model cannot score columns.
            ConfigError: an option is out of range, or does not fit the model (its classes, its longest window).
        """
        options = replace(options or TagOptions(), **changes)
        if options not in self._fitting:
            options.check(self.labels)
            if options.columns:
                self._column_scorer()
            if isinstance(self.scorer, WindowLimited):
                self.scorer.check_window(options.window)
            self._fitting = {options, *(self._fitting if len(self._fitting) < _REMEMBERED else ())}
        return options

    def score_window(self, window: Window, options: TagOptions) -> list[Scored]:
        """Return the scores of one window, or with `options.columns` of each 0.16 s of it.

        Raises:
            CheckpointError: the model cannot score columns, or answers with impossible scores.
        """
        if options.silence is not None and _level(window.wave) < options.silence:
            return [Scored(window.start, window.end, np.zeros(len(self.labels), np.float32), silent=True)]
        if not options.columns:
            (probs,) = self._probs(self._call(self.scorer, window.wave[None]), 2)
            return [Scored(window.start, window.end, probs)]
        model = self._column_scorer()
        (rows,) = self._probs(self._call(model.columns, window.wave[None]), 3)
        # The samples after the last whole column belong to the last one; what earlier windows have is left out.
        times = [*(window.start + model.column_starts(len(rows))).tolist(), window.end]
        return [
            Scored(max(start, window.new), end, row)
            for row, (start, end) in zip(rows, pairwise(times), strict=True)
            if end > window.new
        ]

    def score_together(self, windows: Sequence[Window], options: TagOptions) -> list[list[Scored]]:
        """Return the scores of windows of one length from one call of the model, as `score_window` does for each.

        That is faster for short windows, for models with an `at_once` (see `OnnxModel`); for others, one by one is.

        Raises:
            CheckpointError: as for `score_window`.
        """
        if len(windows) == 1 or options.columns or options.silence is not None:
            return [self.score_window(window, options) for window in windows]
        waves = np.stack([window.wave for window in windows])
        rows = self._probs(self._call(self.scorer, waves), 2, len(windows))
        return [[Scored(window.start, window.end, row)] for window, row in zip(windows, rows, strict=True)]

    @contextmanager
    def reading(self, source: Source | Sound, options: TagOptions, name: str | None = None) -> Iterator[Sound]:
        """Open a sound as the options have it, and log once what was odd about it, under its name or another."""
        if isinstance(source, Sound):
            yield source
            return
        with open_sound(
            source, channel=options.channel, strict=options.strict, cancelled=lambda: self._closed
        ) as sound:
            try:
                yield sound
            finally:
                for warning in sound.warnings:
                    _log.warning("%s: %s", printable(name or sound.name), warning)

    def score_windows(self, sound: Sound, options: TagOptions, skip: int = 0) -> Iterator[list[Scored]]:
        """Yield the scores of each window of an open sound but the first `skip`, as `score_window` does."""
        windows = audio.cut(sound.blocks(), options.window, options.step, tail=options.tail)
        return self._ahead(islice(windows, skip, None), partial(self.score_window, options=options))

    def _scores(self, source: Source, options: TagOptions) -> Iterator[Scored]:
        with self.reading(source, options) as sound:
            for window in self.score_windows(sound, options):
                yield from window

    def _column_scorer(self) -> ColumnScorer:
        if not isinstance(self.scorer, ColumnScorer):
            raise CheckpointError(f"the model {self.name} cannot score columns; a graph written by `ced export` can")
        return self.scorer

    def embed_window(self, window: Window) -> Array:
        """Return the embedding of one window, (d,).

        Raises:
            CheckpointError: the model gives no embeddings, or some that are not finite.
        """
        if not isinstance(self.scorer, Embedder):
            raise CheckpointError(f"the model {self.name} gives no embeddings; a graph written by `ced export` does")
        vector: Array = self._answer(self._call(self.scorer.embed, window.wave[None]), 2)[0]
        return vector

    def _call(self, function: Callable[[Array], Array], waves: Array) -> Array:
        """Call the model, on an accelerator together with what other threads ask of it."""
        return function(waves) if self._shared is None else self._shared(function, waves)

    def _probs(self, answer: Array, dimensions: int, count: int = 1) -> Array:
        """Check the probabilities of `count` waves, (count, ..., c)."""
        answer = self._answer(answer, dimensions, count)
        classes = len(self.labels)
        if answer.shape[-1] != classes:
            raise CheckpointError(
                f"the model {self.name} gives scores of shape {answer.shape} for {count} sound(s); its class table has"
                f" {classes} classes"
            )
        least, most = float(answer.min(initial=0.0)), float(answer.max(initial=1.0))
        if least < -_ROUNDING or most > 1 + _ROUNDING:
            worst = least if least < -_ROUNDING else most
            raise CheckpointError(f"the model {self.name} gives a score of {worst:g}; probabilities are 0 to 1")
        return answer if least >= 0 and most <= 1 else answer.clip(0.0, 1.0)

    def _answer(self, answer: Array, dimensions: int, count: int = 1) -> Array:
        """Check what the model answers for `count` waves: the one place that every score and embedding passes."""
        if answer.ndim != dimensions or len(answer) != count:
            raise CheckpointError(
                f"the model {self.name} gives an answer of shape {answer.shape} for {count} sound(s); it must have"
                f" {dimensions} dimensions, the first of them {count}"
            )
        if not np.isfinite(answer).all():
            raise CheckpointError(f"the model {self.name} gives values that are not finite numbers (NaN or infinity)")
        return answer

    def _ahead(self, windows: Iterable[Window], work: Callable[[Window], R]) -> Iterator[R]:
        """Apply `work` to windows in the threads of the tagger, in order; windows before a fault come out first."""
        if self._pool is None:
            for window in windows:
                self._check_open()
                yield work(window)
        else:
            yield from in_order(work, windows, self._submit, _AHEAD * self.jobs)

    def _submit(self, work: Callable[[T], R], item: T, /) -> Future[R]:
        self._check_open()
        assert self._pool is not None
        self._room.acquire()
        try:
            future = self._pool.submit(work, item)
        except RuntimeError as error:  # the pool was shut down since
            raise ClosedError("the tagger is closed") from error
        future.add_done_callback(lambda _: self._room.release())
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
        expected_seconds: the length of the sound according to its header, as far as that is known by now.
        events: the events so far, where the pieces are events.
        error: after `read_ahead`, why the sound could not be read, or not to its end.
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
        self._pieces = self._tagged(tagger, source, options, scores, progress)

    def __iter__(self) -> Iterator[Tags]:
        return self

    def __next__(self) -> Tags:
        piece = next(self._pieces)
        if self.kind == "events":
            self.events.append(piece)
        return piece

    def record(self) -> Record:
        """Tag what is left of the sound, and return the record of all of it."""
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

    def read_ahead(self, pool: Executor) -> None:
        """Tag in a thread of `pool` from now on; the iteration waits for the pieces.

        An AudioError ends the iteration and is kept in `error`; others are raised by it.
        """
        found: SimpleQueue[Tags | BaseException | None] = SimpleQueue()
        pool.submit(self._fill, self._pieces, found)
        self._pieces = _taken(found)

    def wait(self) -> bool:
        """Wait until a piece has come or the sound has ended; return whether there is something to write of it."""
        first = next(self._pieces, None)
        if first is not None:
            self._pieces = chain([first], self._pieces)
        return first is not None or self.error is None

    def _fill(self, pieces: Iterator[Tags], found: "SimpleQueue[Tags | BaseException | None]") -> None:
        try:
            for piece in pieces:
                found.put(piece)
        except AudioError as error:
            self.error = error
        except CedError as error:
            found.put(error)
        except Exception as error:  # an unforeseen error of a decoder must not stop the other sounds
            self.error = AudioError(f"{type(error).__name__}: {error}", self.file)
        finally:
            found.put(None)

    def _tagged(
        self,
        tagger: Tagger,
        source: Source | Sound,
        options: TagOptions,
        scores: ScoreLog | None,
        progress: WindowProgress,
    ) -> Iterator[Tags]:
        with tagger.reading(source, options, self.file) as sound:
            self.rate = sound.rate
            windows = _windows(tagger, sound, options, scores)
            yield from options.pieces(self._rows(windows, sound, progress), tagger.labels)
            self.complete = sound.complete

    def _rows(self, windows: Iterable[Sequence[Scored]], sound: Sound, progress: WindowProgress) -> Iterator[Scored]:
        for window in windows:
            added, self.seconds = window[-1].end - self.seconds, window[-1].end
            self.expected_seconds = sound.expected_seconds
            progress(added, self.expected_seconds)
            yield from window


def _windows(tagger: Tagger, sound: Sound, options: TagOptions, scores: ScoreLog | None) -> Iterator[Sequence[Scored]]:
    """Yield the windows that a log has, then score those behind them, which are added to it."""
    if scores is None:
        yield from tagger.score_windows(sound, options)
        return
    done = 0
    for window in scores.stored():
        done += 1
        yield window
    yield from map(scores.add, tagger.score_windows(sound, options, skip=done))


def _taken(found: "SimpleQueue[Tags | BaseException | None]") -> Iterator[Tags]:
    while (piece := found.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece


def in_turn(streams: Iterable[TagStream], jobs: int, ahead: int = 32) -> Iterator[TagStream]:
    """Tag several sounds at a time, and yield their streams in order; each has to be iterated over before the next.

    Args:
        streams: taken one by one, as their turn comes closer.
        jobs: sounds that are read at a time.
        ahead: sounds that may be done before the one whose turn it is.
    """
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="sound")
    waiting: deque[TagStream] = deque()
    try:
        for stream in streams:
            stream.read_ahead(pool)
            waiting.append(stream)
            if len(waiting) > jobs + ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(stream: TagStream) -> Record | AudioError:
    record = stream.record()
    return record if stream.error is None else stream.error


def _open(
    model: "str | os.PathLike[str] | CED | Scorer", device: str | None, precision: Precision, progress: Progress
) -> Scorer:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
    network = sys.modules.get("ced.model.vit")  # a torch network exists only if its module has been imported
    if network is not None and isinstance(model, network.CED):
        if precision != "float32":
            raise ConfigError(
                f"precision is {precision}; a torch network runs in its own, give a name or a file instead"
            )
        from ced.model.torch_scorer import TorchScorer

        return TorchScorer(model, device)
    if not isinstance(model, str | os.PathLike):
        if not callable(model) or not hasattr(model, "labels"):
            raise ConfigError(
                f"model is a {type(model).__name__}; allowed: a name, a path, a torch network, a scorer with labels"
            )
        if precision != "float32":
            raise ConfigError(f"precision is {precision}; a model that is open already runs in its own")
        if device not in (None, "cpu", "auto"):
            raise ConfigError(f"device is {device!r}; a model that is open already runs where it is")
        return cast(Scorer, model)
    from ced.model.runtime import open_model

    return open_model(model, precision=precision, device=device, progress=progress)


def _level(wave: Array) -> float:
    """Return the root mean square of a wave (t,) in dB of full scale."""
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    return 10.0 * math.log10(power) if power > 0 else -math.inf
