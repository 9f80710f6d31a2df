"""Ordered read-ahead: work on many items in threads, with the results in the order of the items."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Protocol, TypeVar

from ced.errors import AudioError, CedError

T = TypeVar("T")
R = TypeVar("R")


class Submit(Protocol):
    """A function that submits work to threads, such as `Executor.submit`."""

    def __call__(self, work: Callable[[T], R], item: T, /) -> Future[R]:
        """Start `work(item)` and return its future."""


def in_order(work: Callable[[T], R], items: Iterable[T], submit: Submit, ahead: int) -> Iterator[R]:
    """Yield `work(item)` for each item, in the order of the items, as soon as it is known.

    Items are taken in the caller's thread. An exception of `items` is raised after the results of the items before it,
    one of `work` in place of its result. Work that has not started is then cancelled.

    Args:
        work: called in other threads.
        items: its arguments.
        submit: starts the work, such as the method of an executor.
        ahead: items that may be submitted before the first result is taken.
    """
    with closing(_submitted(work, items, submit, ahead)) as submitted:
        for _, future in submitted:
            yield future.result()


def _submitted(
    work: Callable[[T], R], items: Iterable[T], submit: Submit, ahead: int
) -> Generator[tuple[T, Future[R]]]:
    """Yield each item with its future, when that is done, or when `ahead` items or all are submitted."""
    waiting: deque[tuple[T, Future[R]]] = deque()
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
                    waiting.append((item, submit(work, item)))
                    if waiting[0][1].done():  # after an item was submitted, so that threads stay busy
                        break
            if not waiting:
                break
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()
    if fault is not None:
        raise fault


def submitted_sounds(
    work: Callable[[T], R], items: Iterable[T], jobs: int, ahead: int = 32
) -> Generator[tuple[T, Future[R]]]:
    """Yield each item with the future of `work(item)`, in the order of the items, while later ones are processed.

    Args:
        work: called in `jobs` threads of its own.
        items: its arguments, one for each sound; taken one by one, when there is room for them.
        jobs: sounds processed at a time.
        ahead: finished sounds that may wait for an earlier one.
    """
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="sound")
    try:
        yield from _submitted(work, items, pool.submit, jobs + ahead)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def attempts(
    work: Callable[[T], R], items: Iterable[T], jobs: int, *, name: Callable[[T], str], ahead: int = 32
) -> Iterator[R | AudioError]:
    """Yield `work(item)` for each sound, or its error if it cannot be read, in the order of the items.

    Args:
        work, items, jobs, ahead: as for `submitted_sounds`.
        name: returns the name of an item's sound, for errors.

    Raises:
        CedError: an error of `work` that is not about one sound, that is, not an AudioError.
    """
    with closing(submitted_sounds(partial(attempt, work, name=name), items, jobs, ahead)) as submitted:
        for _, future in submitted:
            yield future.result()


def attempt(work: Callable[[T], R], item: T, *, name: Callable[[T], str]) -> R | AudioError:
    """Return `work(item)`, or the error of its sound; arguments and errors are those of `attempts`."""
    try:
        return work(item)
    except AudioError as error:
        return error
    except CedError:
        raise
    except Exception as error:  # an unforeseen error of a decoder must not stop the other sounds
        return AudioError(f"{type(error).__name__}: {error}", name(item))
