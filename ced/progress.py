"""How long work reports its progress; the caller decides how to show it."""

from typing import Protocol


class Progress(Protocol):
    """Called as work advances."""

    def __call__(self, task: str, done: int, total: int, note: str = "", /) -> None:
        """Take one report: `done` of `total` steps of `task` are finished, all of them when the two are equal.

        `note` is shown after the numbers.
        """


def silent(task: str, done: int, total: int, note: str = "", /) -> None:
    """Ignore every report; the default of library calls."""
