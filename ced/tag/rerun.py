"""Tags from the scores that an earlier run kept: other thresholds, labels or events, without reading the sounds."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ced.errors import AudioError, StoreError
from ced.sound.labels import ClassTable, read_classes
from ced.sound.tables import write_table
from ced.tag.batch import JOURNAL_NAME, kept_scores
from ced.tag.inputs import Input
from ced.tag.journal import Journal, stamp_of
from ced.tag.options import TagOptions
from ced.tag.records import Record
from ced.tag.scores import read_scores

CLASSES_NAME = "classes.tsv"  # the classes of kept scores, in the folder of a run


class EarlierRun:
    """A folder of `ced tag --out --keep-scores`.

    Attributes:
        labels: the classes of the scores.
        settings: the settings of the run, as JSON has them.
        inputs: its sounds, whose sources are the files of their scores.

    Raises:
        StoreError: there is no journal in the folder, or it is damaged, or no scores were kept.
        TableError: the class table is damaged.
    """

    def __init__(self, folder: Path) -> None:
        with Journal(folder / JOURNAL_NAME, None) as journal:
            self.settings: Mapping[str, Any] = journal.settings
            records = {place: journal.record_at(place) for place in journal.places()}
            self._stamps = {place: journal.stamp_at(place) for place in records}
        if not (folder / CLASSES_NAME).is_file():
            raise StoreError(f"the run in {folder} kept no scores; repeat it with --keep-scores")
        self.labels: ClassTable = read_classes(folder / CLASSES_NAME)
        self._records = {place: replace(record, pieces=()) for place, record in records.items()}
        self.inputs = [
            Input(record.file, folder / kept_scores(place), place, _number(record))
            for place, record in self._records.items()
        ]

    def check_unchanged(self, item: Input) -> None:
        """Make sure that the file of a sound is the one that was tagged, before it is read again.

        Raises:
            AudioError: it has changed since.
        """
        stamp = stamp_of(replace(item, source=item.name))
        if stamp is not None and stamp != self._stamps[item.relative]:
            raise AudioError("it has changed since it was tagged; tag it again", item.name)

    def record(self, item: Input, options: TagOptions) -> Record:
        """Return the record of a sound under other options; those of windows, channels and the clock stay as they were.

        Raises:
            AudioError: its scores are missing or damaged.
        """
        earlier = self._records[item.relative]
        try:
            windows = read_scores(self._source(item), len(self.labels))
            pieces = tuple(options.pieces((row for window in windows for row in window), self.labels))
        except StoreError as error:
            raise AudioError(error.message, item.name) from error
        return replace(earlier, pieces=pieces, kind="events" if options.events else "windows")

    def _source(self, item: Input) -> Path:
        assert isinstance(item.source, Path)
        return item.source


def write_classes(folder: Path, labels: ClassTable) -> None:
    """Write the classes of the scores that a run keeps into its folder."""
    columns = {"index": [str(index) for index in range(len(labels))], "name": list(labels.names)}
    if labels.mids is not None:
        columns["mid"] = list(labels.mids)
    write_table(folder / CLASSES_NAME, columns)


def _number(record: Record) -> int | None:
    """Return the number of the channel that a record is of, where each of a sound's was tagged on its own."""
    return record.channel if isinstance(record.channel, int) else None
