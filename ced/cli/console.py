"""What the command line shows besides results: errors, notes and progress, all of it on standard error."""

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from ced.errors import CedError, MissingPackageError, optional_packages
from ced.progress import NotedProgress, silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_SECONDS = 5.0  # between two plain lines of progress
INTERRUPTED = 130  # exit code, as a shell gives it for SIGINT


def is_main_process() -> bool:
    """Whether this process reports: under torchrun only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def complain(message: str) -> None:
    """Show what is wrong."""
    print(f"ced: error: {message}", file=sys.stderr)


class Commands(TyperGroup):
    """The commands, with one line for whatever goes wrong in any of them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the words name; errors of the library become exit code 1."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except CedError as error:
            complain(str(error))
            raise typer.Exit(1) from None
        except OSError as error:
            complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
            raise typer.Exit(1) from None
        except ModuleNotFoundError:
            try:
                with optional_packages():
                    raise
            except MissingPackageError as missing:
                complain(str(missing))
                raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise _interrupted() from None
        except Exception as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # some libraries wrap it into an error of their own
                raise _interrupted() from None
            raise
        return result


def _interrupted() -> typer.Exit:
    print("ced: interrupted", file=sys.stderr)
    return typer.Exit(INTERRUPTED)


class _NoteHandler(logging.Handler):
    """Shows notes and warnings of the library, a line each, on whatever standard error is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().partition("\n")[0]
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"ced: {level}{message}", file=sys.stderr)


def set_up_streams() -> None:
    """Print any file name on any terminal, and nothing where an output is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def set_up_logging() -> None:
    """Show what the library notes, and what other packages warn of; once, in the first process of a run."""
    handler = _NoteHandler(logging.INFO if is_main_process() else logging.ERROR)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handler)
    library = logging.getLogger("ced")
    library.setLevel(logging.INFO)
    library.addHandler(handler)


def hush() -> None:
    """Show warnings only, where the notes of single steps would be too many."""
    for handler in logging.getLogger("ced").handlers:
        handler.setLevel(max(handler.level, logging.WARNING))


@contextmanager
def reporting() -> Iterator[NotedProgress]:
    """Give a progress callback: bars on a terminal, plain lines elsewhere, nothing outside the first process."""
    if not is_main_process():
        yield silent
    elif sys.stderr.isatty():
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.stop()
    else:
        yield Lines()


class Lines:
    """Progress as plain lines, one every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, clock()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Take one report."""
        now = self._clock()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            print(f"{task}: {done} of {total}{', ' if note else ''}{note}", file=sys.stderr, flush=True)


class _Bars:
    """Progress as bars, which vanish when their task is done, so that results can be printed between two tasks."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        bars = self._bars or self._start()
        if task not in self._tasks:
            self._tasks[task] = bars.add_task(task, total=total, note=note)
        bars.update(self._tasks[task], completed=done, total=total, note=note)
        if done >= total:
            bars.remove_task(self._tasks.pop(task))
            if not self._tasks:
                self.stop()

    def _start(self) -> "RichProgress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        # Notes on standard error appear above the bars; standard output is left alone, it may be a file.
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
        )
        self._bars.start()
        return self._bars

    def stop(self) -> None:
        """Take the bars away."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()
