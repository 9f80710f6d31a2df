"""Ordered read-ahead: work on many items in threads, with the results in the order of the items."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from ced.errors import AudioError, CedError

T = TypeVar("T")
R = TypeVar("R")


class Submit(Protocol):
    """A function that submits work to threads, such as `Executor.submit`."""

    def __call__(self, work: Callable[[T], R], item: T, /) -> Future[R]:
        """Start `work(item)` and return its future."""


def in_order(work: Callable[[T], R], items: Iterable[T], submit: Submit, ahead: int) -> Iterator[R]:
    """Yield `work(item)` for each item, in the order of the items.

    Items are taken in the caller's thread. An exception of `items` is raised after the results of the items before it,
    one of `work` in place of its result. Work that has not started is then cancelled.

    Args:
        work: called in other threads.
        items: its arguments.
        submit: starts the work, such as the method of an executor.
        ahead: items that may be submitted before the first result is taken.
    """
    waiting: deque[Future[R]] = deque()
    rest = iter(items)
    fault: Exception | None = None
    ended = False
    try:
        while True:
            while not ended and len(waiting) < ahead:
                try:
                    item = next(rest)
                except StopIteration:
                    ended = True
                except Exception as error:
                    fault, ended = error, True
                else:
                    waiting.append(submit(work, item))
            if not waiting:
                break
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
    if fault is not None:
        raise fault


def attempts(
    work: Callable[[T], R], items: Iterable[T], jobs: int, *, name: Callable[[T], str], ahead: int = 32
) -> Iterator[R | AudioError]:
    """Yield `work(item)` for each sound, or its error if it cannot be read, in the order of the items.

    Args:
        work: called in `jobs` threads of its own.
        items: its arguments, one for each sound.
        jobs: sounds processed at a time.
        name: returns the name of an item's sound, for errors.
        ahead: sounds that may be finished before the first result is taken.

    Raises:
        CedError: an error of `work` that is not about one sound, that is, not an AudioError.
    """

    def attempt(item: T) -> R | AudioError:
        try:
            return work(item)
        except AudioError as error:
            return error
        except CedError:
            raise
        except Exception as error:  # an unforeseen error of a decoder must not stop the other sounds
            return AudioError(f"{type(error).__name__}: {error}", name(item))

    pool = ThreadPoolExecutor(jobs, thread_name_prefix="sound")
    try:
        yield from in_order(attempt, items, pool.submit, jobs + ahead)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
