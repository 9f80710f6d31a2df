"""Many files: tagged side by side, with outputs, a report of failures, and a journal that a broken run goes on from."""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

from ced.errors import AudioError, ConfigError
from ced.files import claimed, make_folders, name_with, open_to_append, remove_leftovers, writing
from ced.parallel import attempts
from ced.progress import Progress, silent
from ced.tag.inputs import Input
from ced.tag.journal import Journal, stamp_of
from ced.tag.options import EACH
from ced.tag.records import Record
from ced.tag.results import FORMATS, Format, formats, write
from ced.tag.scores import KEPT, UNFINISHED
from ced.text import json_line

_REPORT_SECONDS = 0.1  # between two reports of progress
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
    """The counts of a run."""

    files: int
    failed: int
    incomplete: int  # tagged, but cut short
    skipped: int  # done by an earlier run
    seconds: float  # of sound, tagged by this run
    elapsed: float  # seconds that it took

    def __str__(self) -> str:
        counts = f"{self.files - self.failed - self.skipped} tagged, {self.failed} failed"
        before = f", {self.skipped} done before" if self.skipped else ""
        cut = f", {self.incomplete} cut short" if self.incomplete else ""
        return f"{self.files} files: {counts}{before}{cut}; {_speed(self.seconds, self.elapsed)}"


def _speed(seconds: float, elapsed: float) -> str:
    return f"{seconds / 3600:.2f} h of sound, {seconds / max(elapsed, 1e-9):.0f} x real time"


class Meter:
    """Reports how far a run is: in files or, of a single file, in seconds of sound. Any thread may call it.

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
        """Take note of further seconds of sound; `expected` is the length of the sound that they are of."""
        with self._lock:
            self._seconds += seconds
            self._expected = expected
            if time.monotonic() - self._reported >= _REPORT_SECONDS:
                self._report()

    def file(self, seconds: float = 0.0) -> None:
        """Take note of a file that is done, with its seconds of sound where `sound` was not called."""
        with self._lock:
            self._seconds += seconds
            self._done += 1
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        note = _speed(self._seconds, self._reported - self._began)
        if self._files > 1 or self._expected is None:
            self._progress(self._task, self._done, self._files, note)
            return
        expected = max(1, math.ceil(self._expected))
        done = expected if self._done else min(int(self._seconds), expected - 1)
        self._progress(f"{self._task}, seconds", done, expected, note)


def results(
    inputs: Sequence[Input],
    process: Callable[[Input], T],
    *,
    jobs: int = 1,
    meter: Meter | None = None,
    task: str = "tagging",
    progress: Progress = silent,
) -> Iterator[Outcome[T]]:
    """Process inputs side by side and yield the outcome of each, in the order of the inputs.

    An AudioError is an outcome, too. Memory is bounded: few inputs are ahead of the one whose turn it is.

    Args:
        inputs: what to do.
        process: what to do with each; it is called by `jobs` threads.
        jobs: inputs that are worked on at once.
        meter: is told of each file that is done, where `process` tells it of the sound; None: one is made.
        task: what progress calls the work.
        progress: called for each input that is done, with the hours of sound and the speed.

    Raises:
        ConfigError: `jobs` is below 1.
        CedError: `process` raised one that is not about the one sound, that is, no AudioError.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be 1 or more")
    shown = meter or Meter(progress, len(inputs), task)
    found = attempts(process, inputs, jobs, name=lambda item: item.name)
    for item, result in zip(inputs, found, strict=True):
        if isinstance(result, AudioError):
            outcome: Outcome[T] = Outcome(item, None, one_line(result.message), result.hint)
        else:
            outcome = Outcome(item, result)
        shown.file(result.seconds if meter is None and not isinstance(result, AudioError) else 0.0)
        yield outcome


def one_line(message: str) -> str:
    """Return a message without line breaks."""
    return " ".join(message.splitlines())


def run(
    inputs: Sequence[Input],
    process: Callable[[Input], Record],
    out: Path,
    *,
    settings: Mapping[str, Any],
    output: Sequence[str] = ("jsonl",),
    combined: bool = False,
    keep_scores: bool = False,
    jobs: int = 1,
    meter: Meter | None = None,
    progress: Progress = silent,
    failed: Callable[[Outcome[Record]], None] = lambda outcome: None,
) -> Summary:
    """Process inputs and write their records into a folder; what an earlier run has done there is not done again.

    A file is done again when its size or time of change differs, and when it failed. Failures are listed in
    `errors.jsonl` of the folder. A run may be killed at any time: the next one goes on from `journal.jsonl`, and within
    a sound from the scores that `process` left in its unfinished `ScoreLog`.

    Args:
        inputs: what to do.
        process: what to do with each; it is called by `jobs` threads.
        out: the folder, which is made if need be.
        settings: what records depend on besides the sounds, as JSON has it; a later run must have the same. With a
            `clock` that is not None, tables have clock times; with the `channel` "each", channels.
        output: formats (`results.FORMATS`); they may differ from an earlier run's.
        combined: write one output for all of these inputs, `tags` with the format's suffix, at the end, instead of one
            for each in a tree like the inputs' (`Input.relative` with the format's suffix behind it).
        keep_scores: keep the score logs, which `process` has finished.
        jobs: inputs that are worked on at once.
        meter, progress: as for `results`.
        failed: called for each input that failed.

    Raises:
        BusyError: another process writes into the folder.
        ConfigError: the folder was begun under other settings, two inputs would have one output, or a format or
            `jobs` is impossible.
        StoreError: the folder's journal is damaged or not a journal.
        CedError: as for `results`.
    """
    each, clock = settings.get("channel") == EACH, settings.get("clock") is not None
    chosen = formats(output, shared=combined, channel=each, clock=clock)
    targets = _targets(inputs, () if combined else chosen, out, keep_scores)
    errors = out / ERRORS_NAME
    began = time.monotonic()
    failures, seconds = 0, 0.0
    with claimed(out / JOURNAL_NAME), Journal(out / JOURNAL_NAME, settings) as journal:
        remove_leftovers(out)
        if not combined or keep_scores:
            _check_owners(inputs, journal, out)
        stamps = {item.key: stamp_of(item) for item in inputs}
        todo = [
            item
            for item in inputs
            if not journal.holds(item, stamps[item.key])
            or (keep_scores and not (out / kept_scores(item.relative)).exists())
        ]
        done = {item.key for item in inputs} - {item.key for item in todo}
        errors.unlink(missing_ok=True)
        for item in inputs:
            if item.key in done and not all(path.exists() for _, path in targets[item.key]):
                _write_outputs(journal.record(item), targets[item.key], out)
        for outcome in results(todo, process, jobs=jobs, meter=meter, progress=progress):
            item = outcome.input
            unfinished = out / unfinished_scores(item)
            if (not combined or keep_scores) and journal.owner(item) == item.key:
                _remove_outputs(item, out)  # of what the file held before, in whatever format
            if outcome.result is None:
                failures += 1
                unfinished.unlink(missing_ok=True)
                _note_error(errors, outcome)
                failed(outcome)
                continue
            seconds += outcome.result.seconds
            # Outputs first: what the journal holds has its outputs, even after a kill between the two.
            _write_outputs(outcome.result, targets[item.key], out)
            if keep_scores:
                make_folders(out, item.relative.parent)
                unfinished.replace(out / kept_scores(item.relative))
            journal.add(item, stamps[item.key], outcome.result)
            unfinished.unlink(missing_ok=True)
            done.add(item.key)
        if combined:
            for kind in chosen:
                records = (journal.record(item) for item in inputs if item.key in done)
                write(kind, records, out / f"{COMBINED_STEM}{kind.suffix}")
        with suppress(OSError):  # it is not there, or has scores of sounds that are not among these
            (out / UNFINISHED).rmdir()
        incomplete = sum(item.key in done and not journal.is_complete(item) for item in inputs)
    skipped = len(inputs) - len(todo)
    return Summary(len(inputs), failures, incomplete, skipped, seconds, time.monotonic() - began)


def kept_scores(place: Path) -> Path:
    """Return where scores are kept, from the place of a sound's outputs."""
    return place.with_name(name_with(place.name, KEPT))


def unfinished_scores(item: Input) -> Path:
    """Return where the scores of an input are while it is tagged, in the folder of a run."""
    return Path(UNFINISHED, f"{hashlib.sha256(os.fsencode(item.key)).hexdigest()[:32]}{KEPT}")


_Targets = Sequence[tuple[Format, Path]]


def _targets(inputs: Sequence[Input], chosen: Sequence[Format], out: Path, keep_scores: bool) -> dict[str, _Targets]:
    """Return where each input's outputs go, by name."""
    targets: dict[str, _Targets] = {}
    owners = {out / JOURNAL_NAME: "the journal", out / ERRORS_NAME: "the list of failures"}
    for item in inputs:
        place = out / item.relative
        targets[item.key] = [(kind, place.with_name(name_with(place.name, kind.suffix))) for kind in chosen]
        others = [out / kept_scores(item.relative)] if keep_scores else []
        for path in (*(path for _, path in targets[item.key]), *others):
            if owners.setdefault(path, item.key) != item.key:
                raise ConfigError(
                    f"{owners[path]} and {item.key} would both be written to {path}; name the folder that holds both,"
                    " or write one combined output"
                )
    return targets


def _check_owners(inputs: Sequence[Input], journal: Journal, out: Path) -> None:
    for item in inputs:
        if (owner := journal.owner(item) or item.key) != item.key:
            raise ConfigError(
                f"{item.key} would be written to {out / item.relative}, where an earlier run wrote {owner}; choose"
                " another folder"
            )


def _remove_outputs(item: Input, out: Path) -> None:
    make_folders(out, item.relative.parent)  # nothing is removed through a link, either
    for suffix in (*(kind.suffix for kind in FORMATS.values()), KEPT):
        (out / item.relative.with_name(name_with(item.relative.name, suffix))).unlink(missing_ok=True)


def _write_outputs(record: Record, targets: _Targets, out: Path) -> None:
    for kind, path in targets:
        make_folders(out, path.parent.relative_to(out))
        write(kind, [record], path)


def _note_error(errors: Path, outcome: Outcome[Record]) -> None:
    line = json_line({"file": outcome.input.name, "error": outcome.error})
    with writing(errors), open_to_append(errors) as file:
        file.write(f"{line}\n".encode())
