"""Many files: tagged side by side, with outputs, a report of failures, and a journal that a broken run goes on from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ced.errors import AudioError, ConfigError
from ced.files import claimed, make_folders, open_to_append, remove_leftovers, writing
from ced.parallel import attempts
from ced.progress import NotedProgress, silent
from ced.tag.inputs import Input
from ced.tag.journal import Journal, stamp_of
from ced.tag.records import Record
from ced.tag.results import FORMATS, Format, formats, write
from ced.text import json_line

JOURNAL_NAME, ERRORS_NAME, COMBINED_STEM = "journal.jsonl", "errors.jsonl", "tags"


class Timed(Protocol):
    """What is made of a sound, and knows how long that was."""

    @property
    def seconds(self) -> float:
        """The length of the sound."""


T = TypeVar("T", bound=Timed)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an input."""

    input: Input
    result: T | None
    error: str = ""  # why there is no result, in one line
    hint: str = ""  # what would help, the same for all sounds with such an error


@dataclass(frozen=True)
class Summary:
    """What became of a run."""

    files: int
    failed: int
    skipped: int  # done by an earlier run
    seconds: float  # of sound, tagged by this run
    elapsed: float  # seconds that it took

    def __str__(self) -> str:
        counts = f"{self.files - self.failed - self.skipped} tagged, {self.failed} failed"
        before = f", {self.skipped} done before" if self.skipped else ""
        return f"{self.files} files: {counts}{before}; {_speed(self.seconds, self.elapsed)}"


def _speed(seconds: float, elapsed: float) -> str:
    return f"{seconds / 3600:.2f} h of sound, {seconds / max(elapsed, 1e-9):.0f} x real time"


def results(
    inputs: Sequence[Input],
    process: Callable[[Input], T],
    *,
    jobs: int = 1,
    task: str = "tagging",
    progress: NotedProgress = silent,
) -> Iterator[Outcome[T]]:
    """Process inputs side by side and yield what becomes of each, in the order of the inputs.

    What fails is an outcome, too. Memory is bounded: few inputs are ahead of the one whose turn it is.

    Args:
        inputs: what to do.
        process: what to do with each; it is called by `jobs` threads.
        jobs: inputs that are worked on at once.
        task: what progress calls it.
        progress: told of each that is done, with the hours of sound and the speed.

    Raises:
        ConfigError: `jobs` is below 1.
        CedError: `process` raised one that has nothing to do with the one sound, that is, no AudioError.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be 1 or more")
    began, seconds = time.monotonic(), 0.0
    found = attempts(process, inputs, jobs, name=lambda item: item.name)
    for done, (item, result) in enumerate(zip(inputs, found, strict=True), start=1):
        if isinstance(result, AudioError):
            outcome: Outcome[T] = Outcome(item, None, _line(result.message), result.hint)
        else:
            outcome = Outcome(item, result)
            seconds += result.seconds
        progress(task, done, len(inputs), _speed(seconds, time.monotonic() - began))
        yield outcome


def _line(message: str) -> str:
    return " ".join(message.splitlines())


def run(
    inputs: Sequence[Input],
    process: Callable[[Input], Record],
    out: Path,
    *,
    settings: Mapping[str, Any],
    output: Sequence[str] = ("jsonl",),
    combined: bool = False,
    jobs: int = 1,
    progress: NotedProgress = silent,
    failed: Callable[[Outcome[Record]], None] = lambda outcome: None,
) -> Summary:
    """Process inputs and write their records into a folder; what an earlier run has done there is not done again.

    A file is done again when its size or time of change differs, and when it failed. Failures are listed in
    `errors.jsonl` of the folder. A run may be killed at any time: the next one goes on from `journal.jsonl`.

    Args:
        inputs: what to do.
        process: what to do with each; it is called by `jobs` threads.
        out: the folder, which is made if need be.
        settings: what records depend on besides the sounds, as JSON has it; a later run must have the same. With a
            `clock` that is not None, tables have clock times.
        output: formats (`results.FORMATS`); they may differ from an earlier run's.
        combined: write one output for all of these inputs, `tags` with the format's suffix, at the end, instead of one
            for each in a tree like the inputs' (`Input.relative` with the format's suffix behind it).
        jobs: inputs that are worked on at once.
        progress: told of each that is done.
        failed: told of each that failed.

    Raises:
        BusyError: another process writes into the folder.
        ConfigError: the folder was begun under other settings, two inputs would have one output, or a format or
            `jobs` is impossible.
        StoreError: the folder's journal is none.
        CedError: as for `results`.
    """
    chosen = formats(output, shared=combined, clock=settings.get("clock") is not None)
    targets = {} if combined else _targets(inputs, chosen, out)
    errors = out / ERRORS_NAME
    began = time.monotonic()
    failures, seconds = 0, 0.0
    with claimed(out / JOURNAL_NAME), Journal(out / JOURNAL_NAME, settings) as journal:
        remove_leftovers(out)
        if not combined:
            _check_owners(inputs, journal, out)
        stamps = {item.name: stamp_of(item) for item in inputs}
        todo = [item for item in inputs if not journal.holds(item, stamps[item.name])]
        done = {item.name for item in inputs} - {item.name for item in todo}
        errors.unlink(missing_ok=True)
        for item in inputs:
            if item.name in done and not all(path.exists() for _, path in targets.get(item.name, ())):
                _write_outputs(journal.record(item), targets[item.name], out)
        for outcome in results(todo, process, jobs=jobs, progress=progress):
            item = outcome.input
            if not combined and journal.owner(item) == item.name:
                _remove_outputs(item, out)  # of what the file held before, in whatever format
            if outcome.result is None:
                failures += 1
                _note_error(errors, outcome)
                failed(outcome)
                continue
            seconds += outcome.result.seconds
            # Outputs first: what the journal holds has its outputs, even after a kill between the two.
            _write_outputs(outcome.result, targets.get(item.name, ()), out)
            journal.add(item, stamps[item.name], outcome.result)
            done.add(item.name)
        if combined:
            for kind in chosen:
                records = (journal.record(item) for item in inputs if item.name in done)
                write(kind, records, out / f"{COMBINED_STEM}{kind.suffix}")
    return Summary(len(inputs), failures, len(inputs) - len(todo), seconds, time.monotonic() - began)


_Targets = Sequence[tuple[Format, Path]]


def _targets(inputs: Sequence[Input], chosen: Sequence[Format], out: Path) -> dict[str, _Targets]:
    """Return where each input's outputs go, by name."""
    targets: dict[str, _Targets] = {}
    owners = {out / JOURNAL_NAME: "the journal", out / ERRORS_NAME: "the list of failures"}
    for item in inputs:
        place = out / item.relative
        targets[item.name] = [(kind, place.with_name(f"{place.name}{kind.suffix}")) for kind in chosen]
        for _, path in targets[item.name]:
            if owners.setdefault(path, item.name) != item.name:
                raise ConfigError(
                    f"{owners[path]} and {item.name} would both be written to {path}; name the folder that holds both,"
                    " or write one combined output"
                )
    return targets


def _check_owners(inputs: Sequence[Input], journal: Journal, out: Path) -> None:
    for item in inputs:
        if (owner := journal.owner(item) or item.name) != item.name:
            raise ConfigError(
                f"{item.name} would be written to {out / item.relative}, where an earlier run wrote {owner}; choose"
                " another folder"
            )


def _remove_outputs(item: Input, out: Path) -> None:
    make_folders(out, item.relative.parent)  # nothing is removed through a link, either
    for kind in FORMATS.values():
        (out / f"{item.relative}{kind.suffix}").unlink(missing_ok=True)


def _write_outputs(record: Record, targets: _Targets, out: Path) -> None:
    for kind, path in targets:
        make_folders(out, path.parent.relative_to(out))
        write(kind, [record], path)


def _note_error(errors: Path, outcome: Outcome[Record]) -> None:
    line = json_line({"file": outcome.input.name, "error": outcome.error})
    with writing(errors), open_to_append(errors) as file:
        file.write(f"{line}\n".encode())
