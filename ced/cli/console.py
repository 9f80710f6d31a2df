"""The command line: the program, its errors, what it prints on standard output, and progress on standard error.

The functions that print escape unsafe characters in file names, labels and messages of other programs.
"""

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import ced
from ced.errors import CedError, MissingPackageError, WriteError, optional_packages
from ced.files import FULL
from ced.progress import Progress, silent
from ced.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_SECONDS = 5.0  # between two plain lines of progress
# Published spellings of options, accepted as hidden aliases by the commands that have the option.
_PUBLISHED = {
    "topk": "top-k",
    "chunk-length": "window",
    "chunk": "window",  # abbreviated, as the published program also accepts it
    "c": "w",
    "n-workers": "jobs",
    "n": "j",
}
INTERRUPTED = 130  # exit code, as a shell gives it for SIGINT


def is_main_process() -> bool:
    """Return whether this process prints: under torchrun only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def show(text: object = "") -> None:
    """Print a line of text on standard output.

    Raises:
        WriteError: standard output cannot be written to.
    """
    _print(printable(str(text)) + "\n")


def show_data(text: str) -> None:
    """Print a part of a table or of JSON: unchanged, except on a terminal, where unsafe characters are escaped.

    Args:
        text: a line with its line break, or a part of a line.

    Raises:
        WriteError: standard output cannot be written to.
    """
    if sys.stdout.isatty():
        end = "\n" if text.endswith("\n") else ""
        text = printable(text.removesuffix("\n"), keep="\t") + end
    _print(text)


def _print(text: str) -> None:
    if isinstance(sys.stdout, _ClosedOutput):
        raise WriteError("standard output", "it is closed")
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError("standard output", error.strerror or str(error)) from error


def show_note(text: object) -> None:
    """Print a line on standard error, if that can be written to."""
    with suppress(OSError):
        print(printable(str(text)), file=sys.stderr, flush=True)


_hints: set[str] = set()  # hints that this command has shown


def show_error(error: CedError | str, hint: str = "") -> None:
    """Print an error: a line, with its hint only once in a run, then lines with its details."""
    message = error.message if isinstance(error, CedError) else error
    hint = error.hint if isinstance(error, CedError) else hint
    show_note(f"ced: error: {message}; {hint}" if hint and hint not in _hints else f"ced: error: {message}")
    _hints.add(hint)
    for line in error.details if isinstance(error, CedError) else ():
        show_note(line)


class Commands(TyperGroup):
    """The commands; an error in any of them is printed as one line."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the options before the name of the command, such as --version."""
        _hints.clear()
        with _errors_as_lines():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of the library becomes a line and exit code 1."""
        with _errors_as_lines():
            result = super().invoke(ctx)
            _flush()
        return result

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is named; it accepts the published spellings of its own options."""
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            spelling = {"token_normalize_func": partial(_current_spelling, options=_option_names(command))}
            command.context_settings = {**command.context_settings, **spelling}
        return name, command, rest


def _option_names(command: Any) -> set[str]:
    spellings = (name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))
    return {name.lstrip("-") for name in spellings}


def _current_spelling(name: str, options: set[str]) -> str:
    """Return the name of an option, which may be in a published spelling, as its command has it; else unchanged."""
    if name in options:
        return name
    current = name.replace("_", "-")
    current = _PUBLISHED.get(current, current)
    return current if current in options else name


app = typer.Typer(
    cls=Commands,
    name="ced",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(*words: str) -> None:
    """Run the command line, with `words` before its own, and exit."""
    set_up_streams()
    set_up_logging()
    app(args=[*words, *sys.argv[1:]], prog_name="ced")


def _show_version(asked: bool) -> None:
    if asked:
        show(f"ced {ced.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Tag sounds, and make small models that tag sounds."""


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # a class of Typer that it does not export


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:  # its message quotes arguments, which may be file names
        vars(error)["message"] = printable(vars(error)["message"])
        raise
    except BrokenPipeError:  # the reader of our output closed the pipe
        _drop_output()
        raise typer.Exit(1) from None
    except CedError as error:
        show_error(error)
        _drop_unwritten_output()
        raise typer.Exit(1) from None
    except OSError as error:
        where = error.filename or ("standard output" if error.errno in FULL else "")
        show_error(f"{where}: {error.strerror}" if where and error.strerror else str(error))
        _drop_unwritten_output()
        raise typer.Exit(1) from None
    except ModuleNotFoundError:
        try:
            with optional_packages():
                raise
        except MissingPackageError as missing:
            show_error(missing)
            raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise _interrupted() from None
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # some libraries raise an error of their own from it
            raise _interrupted() from None
        raise


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError("standard output", error.strerror or str(error)) from error


def _drop_unwritten_output() -> None:
    """Discard output that cannot be written, so that the interpreter does not try it again when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _drop_output()


def _drop_output() -> None:
    with suppress(OSError, ValueError):  # ValueError: it has no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> typer.Exit:
    show_note("ced: interrupted")
    return typer.Exit(INTERRUPTED)


class _NoteHandler(logging.Handler):
    """Prints log messages of the library, a line each, on the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.name == "py.warnings":  # the line of code follows it
            message = message.partition("\n")[0]
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        show_note(f"ced: {level}{message}")


class _ClosedOutput(io.TextIOWrapper):
    """Replaces an output that was closed when the program started."""


def set_up_streams() -> None:
    """Make standard output and error accept any file name; a closed output discards what is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            null = open(os.devnull, "wb")  # noqa: SIM115 (kept open; occupies the descriptor of the closed output)
            setattr(sys, name, _ClosedOutput(null, encoding="utf-8", errors="backslashreplace"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def set_up_logging() -> None:
    """Print log messages of the library and warnings of other packages; only in the first process of a run."""
    handler = _NoteHandler(logging.INFO if is_main_process() else logging.ERROR)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handler)
    library = logging.getLogger("ced")
    library.setLevel(logging.INFO)
    library.addHandler(handler)


def show_warnings_only() -> None:
    """Print only warnings, for runs of many steps."""
    for handler in logging.getLogger("ced").handlers:
        handler.setLevel(max(handler.level, logging.WARNING))


@contextmanager
def reporting() -> Iterator[Progress]:
    """Yield a progress callback: bars on a terminal, plain lines elsewhere, nothing outside the first process."""
    if not is_main_process():
        yield silent
    elif sys.stderr.isatty():
        bars = _Bars()
        try:
            yield bars
        finally:
            bars.stop()
    else:
        yield ProgressLines()


class ProgressLines:
    """Shows progress as plain lines, one every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, clock()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Take one report."""
        now = self._clock()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            show_note(f"{task}: {done} of {total}{', ' if note else ''}{note}")


class _Bars:
    """Shows progress as bars, which vanish when their task ends, so that results can be printed between tasks."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        bars = self._bars or self._start()
        note = printable(note)
        if task not in self._tasks:
            self._tasks[task] = bars.add_task(printable(task), total=total, note=note)
        bars.update(self._tasks[task], completed=done, total=total, note=note)
        if done >= total:
            bars.remove_task(self._tasks.pop(task))
            if not self._tasks:
                self.stop()

    def _start(self) -> "RichProgress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        # Messages on standard error appear above the bars; standard output is not redirected, it may be a file.
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
        )
        self._bars.start()
        return self._bars

    def stop(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._tasks.clear()
