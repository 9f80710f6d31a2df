"""Calls that wait are joined, and none gets the answer or the error of another."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import CheckpointError, ClosedError
from ced.tag.shared_calls import SharedCalls

Waves = NDArray[np.float32]


def wave(value: float, samples: int = 100) -> Waves:
    return np.full((1, samples), value, np.float32)


class Model:
    """Answers with the first sample of each wave; the first call waits until `go` is set."""

    def __init__(self) -> None:
        self.began, self.go = Event(), Event()
        self.sizes: list[int] = []

    def __call__(self, waves: Waves) -> Waves:
        self.sizes.append(len(waves))
        self.began.set()
        assert self.go.wait(60)
        if (waves < 0).any():
            raise CheckpointError("a negative wave")
        return waves[:, :1]

    def double(self, waves: Waves) -> Waves:
        return 2 * self(waves)


def asked(calls: SharedCalls, model: Model, *asks: tuple[Any, Waves]) -> list[Any]:
    """Ask from a thread each, while a first call is being worked on; return answers or errors."""
    with ThreadPoolExecutor(len(asks) + 1) as pool:
        first = pool.submit(calls, model, wave(0.0))
        assert model.began.wait(60)
        futures = []
        for function, waves in asks:
            futures.append(pool.submit(calls, function, waves))
            while len(calls._waiting) < len(futures):
                pass
        model.go.set()
        first.result(60)
        return [future.exception(60) or future.result().tolist() for future in futures]


def test_calls_that_wait_are_joined_by_function_and_length() -> None:
    model, calls = Model(), SharedCalls(8)
    found = asked(
        calls,
        model,
        (model, wave(1.0)),
        (model, wave(2.0, 50)),
        (model.double, wave(3.0)),
        (model, np.concatenate([wave(4.0), wave(5.0)])),
    )
    assert found == [[[1.0]], [[2.0]], [[6.0]], [[4.0], [5.0]]]
    assert model.sizes == [1, 3, 1, 1]
    calls.close()


def test_a_call_has_no_more_windows_than_a_batch_and_of_long_ones_fewer() -> None:
    for samples, sizes in ((100, [1, 4, 2]), (320_000, [1, 2, 2, 2])):
        model, calls = Model(), SharedCalls(4)
        asked(calls, model, *((model, wave(float(number), samples)) for number in range(6)))
        assert model.sizes == sizes
        calls.close()


def test_an_error_reaches_those_of_the_call_and_the_next_call_works() -> None:
    model, calls = Model(), SharedCalls(8)
    found = asked(calls, model, (model, wave(-1.0)), (model, wave(1.0)), (model, wave(2.0, 50)))
    assert [str(each) for each in found[:2]] == ["a negative wave"] * 2
    assert found[2] == [[2.0]]
    calls.close()


def test_after_the_end_calls_are_refused() -> None:
    model, calls = Model(), SharedCalls(8)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(calls, model, wave(1.0))
        assert model.began.wait(60)
        second = pool.submit(calls, model, wave(2.0))
        while not calls._waiting:
            pass
        calls.close()
        model.go.set()
        assert first.result(60).tolist() == [[1.0]]
        with pytest.raises(ClosedError):
            second.result(60)
    with pytest.raises(ClosedError):
        calls(model, wave(3.0))
