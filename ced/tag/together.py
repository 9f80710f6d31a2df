"""One model, many askers: so many calls at a time, in order of arrival, and short waves that wait go together."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Event

import numpy as np
from numpy.typing import NDArray

from ced.errors import ClosedError
from ced.sound.labels import ClassTable
from ced.tag.tagger import Scorer

Waves = NDArray[np.float32]


@dataclass(eq=False)
class _Question:
    method: str
    wave: Waves  # (1, t)
    first: bool  # of its sound
    answer: NDArray[np.float32] | None = None  # (1, ...)
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.answer is not None or self.error is not None


class SharedModel:
    """Lets any number of threads ask a model, each about one wave at a time.

    Nobody waits for company: only waves that wait while the model is busy, and are of one length, go together, as far
    as the model gains by it (`OnnxModel.at_once`). The one who has waited longest goes first, so a long sound, which
    asks window by window, does not hold up a short one.

    Args:
        model: what is asked.
        jobs: calls of the model at a time, each in the thread of one who asks.
        observe: told how many waves each call had.
    """

    def __init__(self, model: Scorer, jobs: int, observe: Callable[[int], None] = lambda count: None) -> None:
        self.labels = model.labels
        self._model, self._free, self._observe = model, jobs, observe
        self._at_once: int = getattr(model, "at_once", 0)
        self._waiting: deque[_Question] = deque()
        self._stopping = self._stopped = False
        self._changed = Condition()

    def stop(self, *, begun: bool) -> None:
        """Answer no further sounds: those of which nothing was heard yet, or with `begun` those, too."""
        with self._changed:
            self._stopping, self._stopped = True, begun
            self._changed.notify_all()

    def ask(self, method: str, wave: Waves, *, first: bool = False) -> NDArray[np.float32]:
        """Return what a method of the model, `__call__` or `embed`, answers a wave, (1, t) -> (1, ...).

        Args:
            method: the method's name.
            wave: what it is asked about.
            first: nothing else was asked about its sound before.

        Raises:
            ClosedError: the model was stopped before it came to the wave.
        """
        mine = _Question(method, wave, first)
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: mine.done or self._is_next(mine) or self._is_refused(mine))
            if self._is_refused(mine):
                self._waiting.remove(mine)
                self._changed.notify_all()  # another may be the first now
                raise ClosedError("the model answers no more")
            group = [] if mine.done else self._take()
        if group:
            self._answer(group)
        if mine.error is not None:
            raise mine.error
        assert mine.answer is not None
        return mine.answer

    def _is_next(self, question: _Question) -> bool:
        return self._free > 0 and bool(self._waiting) and self._waiting[0] is question

    def _is_refused(self, question: _Question) -> bool:
        return (self._stopped or (self._stopping and question.first)) and question in self._waiting

    def _take(self) -> list[_Question]:
        """Take the first who waits and all that can go along."""
        first = self._waiting[0]
        alike = [each for each in self._waiting if (each.method, each.wave.shape) == (first.method, first.wave.shape)]
        share = -(-len(alike) // self._free)  # what is left is for the others who are free
        group = alike[: max(1, min(share, self._at_once // first.wave.shape[1]))]
        self._waiting = deque(each for each in self._waiting if each not in group)
        self._free -= 1
        self._changed.notify_all()  # another may be the first now
        return group

    def _answer(self, group: list[_Question]) -> None:
        try:
            self._observe(len(group))
            answers = getattr(self._model, group[0].method)(np.concatenate([each.wave for each in group]))
            for row, each in enumerate(group):
                each.answer = answers[row : row + 1]
        except Exception as error:  # everyone who was in the call has to know
            for each in group:
                each.error = error
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


class Asker:
    """A shared model for one sound, as a `Scorer`, until whoever asked for it has gone."""

    def __init__(self, model: SharedModel, gone: Event) -> None:
        self.labels: ClassTable = model.labels
        self._model, self._gone, self._first = model, gone, True

    def __call__(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return the probability of each class, (1, t) -> (1, c)."""
        return self._ask("__call__", waves)

    def embed(self, waves: Waves, /) -> NDArray[np.float32]:
        """Return what the network makes of a wave, (1, t) -> (1, d)."""
        return self._ask("embed", waves)

    def _ask(self, method: str, wave: Waves) -> NDArray[np.float32]:
        if self._gone.is_set():
            raise ClosedError("nobody waits for the answer any more")
        answer = self._model.ask(method, wave, first=self._first)
        self._first = False
        return answer
