import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ced.errors import AudioError, CheckpointError
from ced.parallel import attempts, in_order


def test_results_are_in_order_and_read_ahead_is_bounded() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        time.sleep(0.005 * (number % 3 == 0))
        return number

    with ThreadPoolExecutor(4) as pool:
        for number in in_order(work, items(), pool.submit, 8):
            assert len(taken) - 8 <= number
    assert taken == list(range(50))


def test_a_result_does_not_wait_for_later_items() -> None:
    """Items that arrive slowly, as from a search of folders, delay no result."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        results = in_order(str, items(), pool.submit, 100)
        assert next(results) == "0"
        assert len(taken) < 50
        assert list(results) == [str(number) for number in range(1, 100)]
    found = attempts(str, items(), 1, name=str, ahead=100)
    assert next(found) == "0"
    assert len(taken) < 150


def test_an_item_is_submitted_before_each_result() -> None:
    """So threads stay busy while results are used."""
    submitted: list[Future[str]] = []

    def submit(work: Callable[[int], str], number: int) -> Future[str]:
        """Submit an item, and finish the one before it."""
        submitted.append(Future())
        if number:
            submitted[-2].set_result(work(number - 1))
        return submitted[-1]

    results = in_order(str, range(100), submit, 50)  # type: ignore[arg-type]
    for number in range(20):
        assert next(results) == str(number)
        assert len(submitted) == number + 2


def test_results_before_an_error_come_first() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1, 2)
        raise AudioError("cut short")

    found: list[int] = []
    with ThreadPoolExecutor(2) as pool, pytest.raises(AudioError, match="cut short"):
        found.extend(in_order(lambda item: item, items(), pool.submit, 8))
    assert found == [0, 1, 2]


def test_closing_the_iterator_cancels_work() -> None:
    started = threading.Event()
    done: list[int] = []

    def work(number: int) -> int:
        if number:
            started.wait(5)
        done.append(number)
        return number

    with ThreadPoolExecutor(1) as pool:
        results = in_order(work, range(100), pool.submit, 10)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        started.set()
    assert len(done) <= 2  # the first, and one that had been started


def test_errors_about_one_sound_are_results_and_others_are_raised() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise AudioError("1 is cut short")
        if item == 2:
            raise IndexError("no stream")
        if item == 9:
            raise CheckpointError("no such output")
        return item

    first, second, third, last = attempts(work, [0, 1, 2, 3], 2, name=str)
    assert (first, last) == (0, 3)
    assert [str(second), str(third)] == ["1 is cut short", "2: IndexError: no stream"]
    assert isinstance(third, AudioError)
    with pytest.raises(CheckpointError):
        list(attempts(work, [0, 9], 2, name=str))
