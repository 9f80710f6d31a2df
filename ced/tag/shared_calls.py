"""Calls of a model that windows share on an accelerator, whichever sounds and threads they come from."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

import numpy as np
from numpy.typing import NDArray

from ced.errors import ClosedError
from ced.sound.audio import SAMPLE_RATE

Array = NDArray[np.float32]
Function = Callable[[Array], Array]

_USUAL_SECONDS = 10.0  # of a window; longer ones share a call in smaller numbers, so that they need no more memory


@dataclass(eq=False)
class _Call:
    function: Function
    waves: Array  # (b, t)
    answer: "Future[Array]" = field(default_factory=Future)

    def fits(self, other: "_Call") -> bool:
        return self.function == other.function and self.waves.shape[1:] == other.waves.shape[1:]


class SharedCalls:
    """Joins the calls that wait into one call of the model, in a thread of its own.

    A call never waits until it is full: those that arrive while the model works on one are joined for the next.

    Args:
        batch: windows of 10 s in one call at most; of longer windows fewer, of shorter ones no more.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._waiting: deque[_Call] = deque()
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._work, name="accelerator", daemon=True)
        self._thread.start()

    def __call__(self, function: Function, waves: Array) -> Array:
        """Return what `function` answers for waves, (b, t) -> (b, ...), from a call that may have further waves.

        Raises:
            ClosedError: the calls have ended.
            CedError: as `function` raises it.
        """
        call = _Call(function, waves)
        with self._changed:
            if self._closed:
                raise ClosedError("the tagger is closed")
            self._waiting.append(call)
            self._changed.notify()
        return call.answer.result()

    def close(self) -> None:
        """End after the call that is being worked on; those that wait end with a ClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while group := self._next():
            try:
                _answer(group)
            except Exception as error:
                for call in group:
                    call.answer.set_exception(error)
        for call in self._waiting:
            call.answer.set_exception(ClosedError("the tagger is closed"))

    def _next(self) -> list[_Call]:
        """Wait for calls, and take those that can be one; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            first = self._waiting[0]
            seconds = first.waves.shape[1] / SAMPLE_RATE
            room = self._batch if seconds <= _USUAL_SECONDS else int(self._batch * _USUAL_SECONDS / seconds)
            group: list[_Call] = []
            rest: deque[_Call] = deque()
            for call in self._waiting:
                if call is first or (call.fits(first) and len(call.waves) <= room):
                    group.append(call)
                    room -= len(call.waves)
                else:
                    rest.append(call)
            self._waiting = rest
            return group


def _answer(group: list[_Call]) -> None:
    answer = group[0].function(np.concatenate([call.waves for call in group]) if len(group) > 1 else group[0].waves)
    start = 0
    for call in group:
        call.answer.set_result(answer[start : start + len(call.waves)])
        start += len(call.waves)
