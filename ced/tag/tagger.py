"""Tagging: a sound becomes a timeline of its most probable classes, window by window."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Semaphore
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, CheckpointError, ClosedError, ConfigError
from ced.model.zoo import DEFAULT_MODEL
from ced.progress import Progress, silent
from ced.sound import audio
from ced.sound.audio import Window
from ced.sound.labels import ClassTable
from ced.tag.records import Scored, Tags
from ced.tag.select import Selection

if TYPE_CHECKING:
    from ced.model.runtime import OnnxModel
    from ced.model.vit import CED

_AHEAD = 2  # windows that wait for each thread

Waves = NDArray[np.float32]
T = TypeVar("T")


class Scorer(Protocol):
    """Anything that scores waves: a graph, a network behind an adapter, a function with a class table.

    What also has `embed`, or `columns` and `column_starts`, as `ced.model.runtime.OnnxModel` has all of them, gives
    embeddings or fine timelines too.
    """

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""

    def __call__(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c)."""


class TorchScorer:
    """The torch network as a `Scorer`: numpy in, numpy out, on the device where its weights lie."""

    def __init__(self, network: CED) -> None:
        self.network = network.eval()

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""
        return self.network.labels

    def __call__(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probability of each class, (b, t) -> (b, c)."""
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(waves).to(self.network.freq_pos_embed.device)
            probs: NDArray[np.float32] = self.network.probs(batch).float().cpu().numpy()
        return probs


@dataclass(frozen=True, eq=False)
class Embedding:
    """What a model remembers of a sound."""

    starts: NDArray[np.float64]  # (w,) seconds
    ends: NDArray[np.float64]
    vectors: NDArray[np.float32]  # (w, d), one a window

    @property
    def seconds(self) -> float:
        """The length of the sound."""
        return float(self.ends[-1])

    @property
    def clip(self) -> NDArray[np.float32]:
        """The sound as a whole, (d,): the mean of its windows, each as heavy as it is long."""
        mean: NDArray[np.float32] = np.average(self.vectors, axis=0, weights=self.ends - self.starts).astype(np.float32)
        return mean


class Tagger:
    """Tags sounds with a model.

    Each window is scored on its own, so a window's scores depend on nothing but the window.

    Args:
        model: a model name, an ONNX file, a checkpoint (file or experiment folder), a torch network, or any `Scorer`.
        jobs: windows scored at a time, each in one thread; two threads with a window each do more than two threads
            on one window.
        progress: told of a download, if the named model needs one.

    Raises:
        CheckpointError, DownloadError: the model is not known, not readable, or not here and not to be fetched.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | CED | Scorer = DEFAULT_MODEL,
        *,
        jobs: int = 1,
        progress: Progress = silent,
    ) -> None:
        if isinstance(model, str | os.PathLike):
            from ced.model.runtime import open_model

            model = open_model(model, progress=progress)
        # A torch network is known by its method `probs`: torch itself need not be there to ask.
        self.scorer: Scorer = TorchScorer(cast("CED", model)) if hasattr(model, "probs") else model
        if jobs < 1:
            raise ConfigError(f"jobs is {jobs}; it must be 1 or more")
        self._jobs = jobs
        self._closed = False
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="scorer") if jobs > 1 else None
        self._room = Semaphore(_AHEAD * jobs)  # bounds the waves in memory, however many sounds are read at once

    def __enter__(self) -> Tagger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the threads; what is being scored ends with its window, in an error."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def labels(self) -> ClassTable:
        """The classes that the model knows."""
        return self.scorer.labels

    def tag(
        self, source: audio.Source, *, top_k: int = 3, window: float = 10.0, hop: float | None = None
    ) -> Iterator[Tags]:
        """Tag a sound window by window; a long file never lies in memory as a whole.

        The last window, and a sound shorter than one, is scored at its own length.

        Args:
            source: path, bytes, binary file, or (array, rate).
            top_k: classes a window.
            window: seconds.
            hop: seconds from one window's start to the next; None: windows lie end to end.

        Raises:
            AudioError: the sound cannot be read; raised when the iteration comes to the place.
            ConfigError: `top_k`, `window` or `hop` is not positive.
        """
        selection = Selection(self.labels, top_k=top_k)
        return map(selection.tags, self.score(source, window=window, hop=hop))

    def score(
        self,
        source: audio.Source,
        *,
        window: float = 10.0,
        hop: float | None = None,
        columns: bool = False,
        silence: float | None = None,
    ) -> Iterator[Scored]:
        """Score a sound window by window.

        Args:
            source: path, bytes, binary file, or (array, rate).
            window: seconds.
            hop: seconds from one window's start to the next; None: windows lie end to end.
            columns: score every 0.16 s of a window instead of the whole of it; windows then lie end to end.
            silence: windows of a lower level (root mean square, in dB of full scale, so below 0) are not scored.

        Raises:
            AudioError: the sound cannot be read; raised when the iteration comes to the place.
            CheckpointError: the model cannot score columns.
            ConfigError: `window` or `hop` is not positive, `hop` is longer than `window` or given with `columns`, or
                `silence` is not below 0.
        """
        if columns and hop is not None:
            raise ConfigError(f"hop is {hop}; the columns of overlapping windows would be scored twice")
        score = self.scoring(columns=columns, silence=silence)
        scored = self._ahead(_windows(source, window, hop), score)
        return (one for several in scored for one in several)

    def scoring(self, *, columns: bool = False, silence: float | None = None) -> Callable[[Window], list[Scored]]:
        """Return what scores a single window, for callers with windows of their own; all as `score` has it.

        Args:
            columns: give the scores of every 0.16 s.
            silence: windows of a lower level, in dB of full scale, are not scored.

        Raises:
            CheckpointError: the model cannot score columns.
            ConfigError: `silence` is not below 0.
        """
        if silence is not None and not silence < 0:
            raise ConfigError(f"silence is {silence} dB of full scale; it must be below 0, as -60")
        answer = self._answerer("columns" if columns else "__call__", (1, len(self.labels)))
        nothing = np.zeros(len(self.labels), np.float32)

        def score(piece: Window) -> list[Scored]:
            if silence is not None and _level(piece.wave) < silence:
                return [Scored(piece.start, piece.end, nothing, silent=True)]
            (probs,) = answer(piece.wave)
            if not columns:
                return [Scored(piece.start, piece.end, probs)]
            return list(_columns(piece, probs, cast("OnnxModel", self.scorer).column_starts(len(probs))))

        return score

    def embed(self, source: audio.Source, *, window: float = 10.0, hop: float | None = None) -> Embedding:
        """Return a vector for each window of a sound: the mean of its tokens, from which the model scores.

        Args:
            source: path, bytes, binary file, or (array, rate).
            window: seconds.
            hop: seconds from one window's start to the next; None: windows lie end to end.

        Raises:
            AudioError: the sound cannot be read.
            CheckpointError: the model gives no embeddings.
            ConfigError: `window` or `hop` is not positive.
        """
        answer = self._answerer("embed", (1,))
        found = list(
            self._ahead(_windows(source, window, hop), lambda piece: (piece.start, piece.end, answer(piece.wave)))
        )
        starts, ends, vectors = zip(*found, strict=True)
        return Embedding(np.array(starts), np.array(ends), np.concatenate(vectors))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the tagger is closed")

    def _answerer(self, method: str, shape: tuple[int, ...]) -> Callable[[Waves], NDArray[np.float32]]:
        """Return what asks the scorer about one wave, (t,), and checks that the answer fits the class table."""
        ask = getattr(self.scorer, method, None)
        if ask is None:
            raise CheckpointError(f"a {type(self.scorer).__name__} has no {method}; an exported ONNX file has")
        classes = len(self.labels)

        def answer(wave: Waves) -> NDArray[np.float32]:
            found: NDArray[np.float32] = ask(wave[None])
            if len(found) != 1 or (method != "embed" and found.shape[-1] != classes):
                raise CheckpointError(
                    f"the model answers one wave with scores of shape {found.shape}; its class table asks for"
                    f" (1, {classes})"
                )
            return found

        return answer

    def _ahead(self, pieces: Iterable[Window], work: Callable[[Window], T]) -> Iterator[T]:
        """Do the work of windows in several threads, and yield the results in order.

        If reading fails, the windows before the fault come out first.
        """
        if self._pool is None:
            for each in pieces:
                self._check_open()
                yield work(each)
            return
        waiting: deque[Future[T]] = deque()
        pieces = iter(pieces)
        fault: AudioError | None = None
        while fault is None:
            try:
                piece = next(pieces, None)
            except AudioError as error:
                fault = error
                break
            if piece is None:
                break
            self._check_open()
            self._room.acquire()
            future = self._pool.submit(work, piece)
            future.add_done_callback(lambda _: self._room.release())
            waiting.append(future)
            while waiting and (waiting[0].done() or len(waiting) > _AHEAD * self._jobs):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if fault is not None:
            raise fault


def _windows(source: audio.Source, window: float, hop: float | None) -> Iterator[Window]:
    """Cut a sound into windows that leave nothing of it out."""
    if hop is not None and hop > window:
        raise ConfigError(f"the window hop is {hop} s, the length {window} s; what lies between would not be heard")
    return audio.windows(source, window, hop)


def _level(wave: Waves) -> float:
    """Return the level of a wave (t,) in dB below full scale."""
    power = float(np.mean(np.square(wave, dtype=np.float64)))
    return 10.0 * math.log10(power) if power > 0 else -math.inf


def _columns(piece: Window, probs: NDArray[np.float32], starts: NDArray[np.float64]) -> Iterator[Scored]:
    """Yield the columns of a window, (columns, c); what no column hears is part of the one before."""
    times = [*(piece.start + starts).tolist(), piece.end]
    for row, (start, end) in zip(probs, pairwise(times), strict=True):
        yield Scored(start, end, row)
