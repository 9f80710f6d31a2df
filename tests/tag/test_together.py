import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import ClosedError
from ced.sound.labels import ClassTable
from ced.tag.together import Asker, SharedModel


class Sums:
    """Answers a wave with its sum, once it may."""

    labels = ClassTable(("sum",))

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.go = threading.Event()
        self.calls: list[tuple[int, int]] = []

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        self.calls.append((waves.shape[0], waves.shape[1]))
        assert self.go.wait(60)
        sums: NDArray[np.float32] = waves.sum(1, keepdims=True)
        return sums

    def embed(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        return -self(waves)


def ask_at_once(model: Sums, lengths: list[int], jobs: int) -> list[float]:
    """Ask about waves of ones, from a thread each that begin in order, while the model is held up by the first."""
    shared = SharedModel(model, jobs)
    answers = [0.0] * len(lengths)

    def ask(place: int) -> None:
        answers[place] = float(shared.ask("__call__", np.ones((1, lengths[place]), np.float32))[0, 0])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(lengths))]
    for number, thread in enumerate(threads):
        thread.start()
        end = time.monotonic() + 60
        while len(model.calls) + len(shared._waiting) <= number and time.monotonic() < end:
            time.sleep(0.001)
    model.go.set()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize(
    ("at_once", "calls"),
    [
        (30, [(1, 10), (3, 10), (2, 5), (1, 10)]),  # the oldest first, with all of its length that fit
        (15, [(1, 10), (1, 10), (2, 5), (1, 10), (1, 10), (1, 10)]),
        (0, [(1, 10), (1, 10), (1, 5), (1, 10), (1, 10), (1, 5), (1, 10)]),
    ],
)
def test_who_waits_goes_together_in_order_of_arrival(at_once: int, calls: list[tuple[int, int]]) -> None:
    model = Sums(at_once)
    lengths = [10, 10, 5, 10, 10, 5, 10]
    assert ask_at_once(model, lengths, 1) == lengths
    assert model.calls == calls


def test_an_error_reaches_everyone_in_the_call() -> None:
    class Broken(Sums):
        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            raise ValueError("no answer")

    shared = SharedModel(Broken(0), 1)
    for _ in range(2):  # and the model is free again
        with pytest.raises(ValueError, match="no answer"):
            shared.ask("__call__", np.ones((1, 3), np.float32))


def test_one_who_has_gone_does_not_ask() -> None:
    model, gone = Sums(0), threading.Event()
    model.go.set()
    asker = Asker(SharedModel(model, 1), gone)
    assert asker(np.ones((1, 3), np.float32)) == 3
    assert asker.embed(np.ones((1, 3), np.float32)) == -3
    gone.set()
    with pytest.raises(ClosedError, match="nobody waits"):
        asker(np.ones((1, 3), np.float32))
