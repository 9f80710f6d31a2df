"""How long work reports its progress; the caller decides how to show it."""

import math
import time
from threading import Lock
from typing import Protocol

REPORT_SECONDS = 0.1  # between two reports within a file


class Progress(Protocol):
    """Called as work advances."""

    def __call__(self, task: str, done: int, total: int, note: str = "", /) -> None:
        """Take one report: `done` of `total` steps of `task` are finished, all of them when the two are equal.

        `note` is shown after the numbers.
        """


def silent(task: str, done: int, total: int, note: str = "", /) -> None:
    """Ignore every report; the default of library calls."""


def speed(seconds: float, elapsed: float) -> str:
    """Return how much sound was processed in how many seconds, for progress and summaries."""
    return f"{seconds / 3600:.2f} h of sound, {seconds / max(elapsed, 1e-9):.0f} x real time"


class Meter:
    """Reports the progress of a run over files: in files or, for a single file, in seconds of sound; thread-safe.

    Args:
        progress: called a few times a second at most, and for each file.
        files: how many there are.
        task: what is done with them.
    """

    def __init__(self, progress: Progress, files: int, task: str) -> None:
        self._progress, self._files, self._task = progress, files, task
        self._began, self._reported = time.monotonic(), -math.inf
        self._seconds, self._done = 0.0, 0
        self._expected: float | None = None
        self._lock = Lock()

    def sound(self, seconds: float, expected: float | None = None) -> None:
        """Add seconds of sound; `expected` is the length of the sound that they are part of."""
        with self._lock:
            self._seconds += seconds
            self._expected = expected
            if time.monotonic() - self._reported >= REPORT_SECONDS:
                self._report()

    def file(self, seconds: float = 0.0) -> None:
        """Add a finished file, with its seconds of sound unless `sound` added them."""
        with self._lock:
            self._seconds += seconds
            self._done += 1
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        note = speed(self._seconds, self._reported - self._began)
        if self._files > 1 or self._expected is None:
            self._progress(self._task, self._done, self._files, note)
            return
        expected = max(1, math.ceil(self._expected))
        done = expected if self._done else min(int(self._seconds), expected - 1)
        self._progress(f"{self._task}, seconds", done, expected, note)
