"""Runs over many files: the folder of their outputs, which an interrupted run resumes and a later run reads again.

A folder holds the journal (`ced.tag.journal`), the outputs in a tree like that of the inputs or combined, the list of
failures, and with kept scores their files (`ced.tag.scores`) and class table. `ced.tag.runs` is the tagging itself.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ced.errors import AudioError, ConfigError
from ced.files import claimed, make_folders, name_with, open_to_append, remove_leftovers, writing
from ced.parallel import attempts
from ced.sound.labels import ClassTable
from ced.sound.tables import write_table
from ced.tag import writers
from ced.tag.inputs import InputSound
from ced.tag.journal import Journal, Stamp, is_name, is_place, stamp_of
from ced.tag.options import EACH
from ced.tag.records import Record
from ced.tag.scores import KEPT, UNFINISHED
from ced.tag.writers import FORMATS, Format, write_records
from ced.text import json_line

JOURNAL_NAME, ERRORS_NAME, COMBINED_STEM = "journal.jsonl", "errors.jsonl", "tags"
CLASSES_NAME = "classes.tsv"  # the class table of kept scores

T = TypeVar("T")


@dataclass(frozen=True)
class SoundOutcome(Generic[T]):
    """The result of an input, or the reason why there is none."""

    input: InputSound
    result: T | None
    error: str = ""  # why there is no result, in one line
    hint: str = ""  # what would help, the same for all sounds with such an error


def outcomes(
    inputs: Sequence[InputSound], process: Callable[[InputSound], T], *, jobs: int = 1
) -> Iterator[SoundOutcome[T]]:
    """Process several inputs at a time and yield the outcome of each, in the order of the inputs.

    An AudioError is an outcome, too. Memory is bounded: only a few inputs are processed ahead of the next outcome.

    Args:
        inputs: what to process.
        process: called for each input, by `jobs` threads.
        jobs: inputs that are processed at the same time.

    Raises:
        ConfigError: `jobs` is below 1.
        CedError: `process` raised one that is not about a single sound, that is, no AudioError.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be 1 or more")
    found = attempts(process, inputs, jobs, name=lambda item: item.name)
    for item, result in zip(inputs, found, strict=True):
        if isinstance(result, AudioError):
            yield SoundOutcome(item, None, " ".join(result.message.splitlines()), result.hint)
        else:
            yield SoundOutcome(item, result)


@dataclass(frozen=True)
class Summary:
    """The counts of a run."""

    files: int
    failed: int
    incomplete: int  # tagged, but truncated
    skipped: int  # done by an earlier run
    seconds: float  # of sound, tagged by this run
    elapsed: float  # seconds that it took

    def __str__(self) -> str:
        counts = f"{self.files - self.failed - self.skipped} tagged, {self.failed} failed"
        before = f", {self.skipped} done before" if self.skipped else ""
        cut = f", {self.incomplete} truncated" if self.incomplete else ""
        return f"{self.files} files: {counts}{before}{cut}"


def process_to_folder(
    inputs: Sequence[InputSound],
    process: Callable[[InputSound], Record],
    out: Path,
    *,
    settings: Mapping[str, Any],
    formats: Sequence[str] = ("jsonl",),
    combined: bool = False,
    classes: ClassTable | None = None,
    jobs: int = 1,
    finished: Callable[[SoundOutcome[Record]], None] = lambda outcome: None,
) -> Summary:
    """Process inputs and write their records into a folder; inputs that an earlier run finished there are skipped.

    A file is processed again if its size or time of change differs, or if it failed. Failures are listed in
    `errors.jsonl` of the folder. A run may be killed at any time: the next one resumes from `journal.jsonl`, and within
    a sound from the scores that `process` left in its unfinished `ScoreLog`.

    Args:
        inputs: what to process.
        process: called for each input, by `jobs` threads.
        out: the folder, created if missing.
        settings: what records depend on besides the sounds, as JSON values; a later run must have the same. With a
            `clock` that is not None, tables have clock times; with the `channel` "each", channels.
        formats: of the outputs (`writers.FORMATS`); they may differ from those of an earlier run.
        combined: write one output for all of these inputs, `tags` with the format's suffix, at the end, instead of one
            for each in a tree like that of the inputs (`InputSound.place` followed by the format's suffix).
        classes: of the score logs, which `process` has finished and which are kept; None: none are kept.
        jobs: inputs that are processed at the same time.
        finished: called after each input, once it is in the journal or in the list of failures.

    Raises:
        BusyError: another process writes into the folder.
        ConfigError: the folder was begun with other settings, two inputs would have one output, or a format or
            `jobs` is not possible.
        StoreError: the folder's journal is damaged or not a journal.
        CedError: as for `outcomes`.
    """
    each, clock = settings.get("channel") == EACH, settings.get("clock") is not None
    chosen = writers.formats(formats, shared=combined, channel=each, clock=clock)
    folder = _Folder(out, inputs, () if combined else chosen, combined, classes is not None)
    began = time.monotonic()
    failed, seconds = 0, 0.0
    with claimed(out / JOURNAL_NAME), Journal(out / JOURNAL_NAME, settings) as journal:
        remove_leftovers(out)
        folder.check_owners(journal)
        if classes is not None:
            _write_classes(out / CLASSES_NAME, classes)
        done = {item.key for item in inputs if folder.has(item, journal)}
        todo = [item for item in inputs if item.key not in done]
        folder.errors.unlink(missing_ok=True)
        for item in inputs:
            if item.key in done:
                folder.write_missing(item, journal)
        for outcome in outcomes(todo, _Stamped(process), jobs=jobs):
            record = folder.write(outcome, journal)
            if record is None:
                failed += 1
            else:
                seconds += record.seconds
                done.add(outcome.input.key)
            finished(SoundOutcome(outcome.input, record, outcome.error, outcome.hint))
        if combined:
            for kind in chosen:
                records = (journal.record(item) for item in inputs if item.key in done)
                write_records(kind, records, out / f"{COMBINED_STEM}{kind.suffix}")
        with suppress(OSError):  # it is missing, or has scores of sounds that are not among these inputs
            (out / UNFINISHED).rmdir()
        incomplete = sum(item.key in done and not journal.is_complete(item) for item in inputs)
    return Summary(len(inputs), failed, incomplete, len(inputs) - len(todo), seconds, time.monotonic() - began)


def _write_classes(path: Path, labels: ClassTable) -> None:
    columns = {"index": [str(index) for index in range(len(labels))], "name": list(labels.names)}
    if labels.mids is not None:
        columns["mid"] = list(labels.mids)
    write_table(path, columns)


@dataclass(frozen=True)
class _Stamped:
    """Processes a sound, and returns its stamp as well.

    The stamp is from before it is read, so that a file that changes meanwhile is processed again by the next run.
    """

    process: Callable[[InputSound], Record]

    def __call__(self, item: InputSound) -> tuple[Stamp | None, Record]:
        """Process a sound."""
        stamp = stamp_of(item)
        return stamp, self.process(item)


class _Folder:
    """The outputs of a run: where each is, and what is written and removed there.

    Args:
        out: the folder.
        inputs: the sounds of the run.
        chosen: the formats that each sound has a file of its own in.
        combined: whether there is one output for all sounds.
        keep_scores: whether the scores of sounds are kept.

    Raises:
        ConfigError: two outputs would have one path, two inputs have one name, or a name or place is not possible.
    """

    def __init__(
        self, out: Path, inputs: Sequence[InputSound], chosen: Sequence[Format], combined: bool, keep_scores: bool
    ) -> None:
        self.errors = out / ERRORS_NAME
        self._out, self._inputs, self._chosen, self._keep_scores = out, inputs, chosen, keep_scores
        self._shares_paths = not combined or keep_scores  # whether sounds have outputs at paths of their own
        if len({item.key for item in inputs}) < len(inputs):
            key, _ = Counter(item.key for item in inputs).most_common(1)[0]
            raise ConfigError(f"two sounds have the name {key}, as versions of one file have; tag one at a time")
        for item in inputs:
            if not is_name(item.name):
                raise ConfigError(f"the name of a sound is {item.name!r}; it must be a text that is not empty")
            if not is_place(item.place):
                raise ConfigError(
                    f"the place of {item.name} is {item.place!r}; it must be a path within the folder, as 'birds/a.wav'"
                )
        owners = {str(out / JOURNAL_NAME): "the journal", str(self.errors): "the list of failures"}
        for item in inputs if self._shares_paths else ():
            paths = [path for _, path in self._targets(item)]
            for path in [*paths, self._kept(item)] if keep_scores else paths:
                if owners.setdefault(str(path), item.key) != item.key:
                    raise ConfigError(
                        f"{owners[str(path)]} and {item.key} would both be written to {path}; name the folder that"
                        " holds both, or write one combined output"
                    )

    def _targets(self, item: InputSound) -> list[tuple[Format, Path]]:
        """Return the outputs of a sound; computed each time, as runs may have millions of sounds."""
        place = self._out / item.relative
        return [(kind, place.with_name(name_with(place.name, kind.suffix))) for kind in self._chosen]

    def _kept(self, item: InputSound) -> Path:
        return self._out / kept_scores(item.relative)

    def check_owners(self, journal: Journal) -> None:
        """Make sure that no output belongs to another sound of an earlier run.

        Raises:
            ConfigError: one does.
        """
        for item in self._inputs if self._shares_paths else ():
            if (owner := journal.owner(item) or item.key) != item.key:
                raise ConfigError(
                    f"{item.key} would be written to {self._out / item.relative}, where an earlier run wrote {owner};"
                    " choose another folder"
                )

    def has(self, item: InputSound, journal: Journal) -> bool:
        """Return whether an earlier run finished a sound that has not changed since."""
        return journal.holds(item) and (not self._keep_scores or self._kept(item).exists())

    def write_missing(self, item: InputSound, journal: Journal) -> None:
        """Write the outputs of a finished sound from the journal, unless all of them exist."""
        if not all(path.exists() for _, path in self._targets(item)):
            self._write(item, journal.record(item))

    def write(self, outcome: SoundOutcome[tuple[Stamp | None, Record]], journal: Journal) -> Record | None:
        """Write the outputs of a processed sound and its line in the journal, or one in the list of failures.

        Returns:
            The record; None: it failed.
        """
        item = outcome.input
        self._remove_outdated(item, journal)
        if outcome.result is None:
            self._note_failure(item, outcome.error)
            record = None
        else:
            stamp, record = outcome.result
            # Outputs first: what is in the journal has its outputs, even after a kill between the two.
            self._write(item, record)
            if self._keep_scores:
                make_folders(self._out, item.relative.parent)
                (self._out / unfinished_scores(item)).replace(self._kept(item))
            journal.add(item, stamp, record)
        (self._out / unfinished_scores(item)).unlink(missing_ok=True)
        return record

    def _remove_outdated(self, item: InputSound, journal: Journal) -> None:
        """Remove the outputs of what a changed file held before, in any format."""
        if not self._shares_paths or journal.owner(item) != item.key:
            return
        make_folders(self._out, item.relative.parent)  # nothing is removed through a link, either
        for suffix in (*(kind.suffix for kind in FORMATS.values()), KEPT):
            (self._out / item.relative.with_name(name_with(item.relative.name, suffix))).unlink(missing_ok=True)

    def _write(self, item: InputSound, record: Record) -> None:
        for kind, path in self._targets(item):
            make_folders(self._out, path.parent.relative_to(self._out))
            write_records(kind, [record], path)

    def _note_failure(self, item: InputSound, error: str) -> None:
        line = json_line({"file": item.name, "error": error})
        with writing(self.errors), open_to_append(self.errors) as file:
            file.write(f"{line}\n".encode())


def kept_scores(place: Path) -> Path:
    """Return where scores are kept, from the place of a sound's outputs."""
    return place.with_name(name_with(place.name, KEPT))


def unfinished_scores(item: InputSound) -> Path:
    """Return where the scores of an input are in the folder of a run while it is tagged."""
    return Path(UNFINISHED, f"{hashlib.sha256(os.fsencode(item.key)).hexdigest()[:32]}{KEPT}")
