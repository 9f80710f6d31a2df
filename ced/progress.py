"""How long work reports that it advances; what becomes of a report is up to the caller."""

from typing import Protocol


class Progress(Protocol):
    """Called as work advances."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """Take one report: `done` of `total` steps of `task` are finished (done == total ends the task)."""


class NotedProgress(Protocol):
    """A `Progress` that can be told more than a number of steps."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Take one report; `note` is shown behind the numbers."""


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """Ignore every report; the default of library calls."""
