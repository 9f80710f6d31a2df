"""Writers of records: text, JSON lines, CSV, Parquet, Audacity and Raven tables. Column names are an interface."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ced.errors import ConfigError, MissingPackageError
from ced.files import written_aside
from ced.sound.web import is_address
from ced.tag.records import (
    CLOCK_KEYS,
    FORMAT_VERSION,
    Tag,
    Tags,
    Timeline,
    clock_times,
    json_head,
    json_piece,
    json_tail,
)
from ced.text import cell, csv_lines, json_line, printable

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("file", "start", "end", "label", "mid", "prob")  # of CSV and Parquet; seconds, and a probability
RAVEN_COLUMNS = (
    "Selection",
    "View",
    "Channel",
    "Begin Time (s)",
    "End Time (s)",
    "Low Freq (Hz)",
    "High Freq (Hz)",
    "Begin Path",
    "File Offset (s)",
    "Label",
    "Score",
)
CHANNEL_KEY = "channel"  # a further column where each channel was tagged on its own
_SIDES: Mapping[str | int, int] = {"mean": 1, "left": 1, "right": 2}  # the channel that Raven shows
_HIGHEST = 8000.0  # Hz; the upper edge of the mel filters of all models
_ROW_GROUP = 1 << 16  # rows of a Parquet file that are in memory at a time
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a cell begins with that spreadsheet programs take for a formula
_MARK = "\ufeff"  # byte-order mark, without which Excel takes UTF-8 for another encoding


def text(records: Iterable[Timeline], *, channel: bool = False) -> Iterator[str]:
    """Yield lines for a reader: a heading with the name, then each window's tags, a blank line after each window.

    All text is printable.

    Args:
        records: what to write.
        channel: name the channel in the heading.
    """
    for record in records:
        of_channel = f", channel {record.channel}" if channel else ""
        yield f"===== {printable(record.file)}{of_channel} =====\n"
        for number, piece in enumerate(record):
            if number:
                yield "\n"
            for rank, tag in enumerate(piece.tags, start=1):
                yield f"[{piece.start:.1f}s]-[{piece.end:.1f}s] Topk-{rank} {printable(tag.label)} {tag.prob:.4f}\n"
        yield "\n"


def jsonl(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield each record as a line of JSON, piece by piece; an interrupted one is closed, as not complete."""
    for record in records:
        yield f'{json_line(json_head(record))[:-1]}, "pieces": ['
        try:
            for number, piece in enumerate(record):
                yield ", " * (number > 0) + json_line(json_piece(record, piece))
        except GeneratorExit:
            raise
        except BaseException:  # Ctrl-C, too
            yield f"], {json_line({**json_tail(record), 'complete': False})[1:]}\n"
            raise
        yield f"], {json_line(json_tail(record))[1:]}\n"


def csv(records: Iterable[Timeline], *, channel: bool = False, clock: bool = False) -> Iterator[str]:
    """Yield a header and a line for each tag, quoted as in RFC 4180; fields that hold line breaks span lines.

    Args:
        records: what to write.
        channel: add the column `channel`.
        clock: add `CLOCK_KEYS`, empty for sounds whose clock time is not known.
    """
    for line in csv_lines(_table(records, channel, clock)):
        yield f"{line}\n"


def spreadsheet(records: Iterable[Timeline], *, channel: bool = False, clock: bool = False) -> Iterator[str]:
    """Yield CSV for spreadsheet programs: with a byte-order mark, and an apostrophe before what could be a formula.

    A file may be named `=HYPERLINK(...).wav`, which Excel, LibreOffice and Google Sheets would run.
    """
    rows = (tuple(_inert(value) for value in row) for row in _table(records, channel, clock))
    for number, line in enumerate(csv_lines(rows)):
        yield f"{line}\n" if number else f"{_MARK}{line}\n"


def _inert(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA) else value


def _columns(channel: bool, clock: bool) -> tuple[str, ...]:
    return COLUMNS + (CHANNEL_KEY,) * channel + CLOCK_KEYS * clock


def _table(records: Iterable[Timeline], channel: bool, clock: bool) -> Iterator[tuple[str, ...]]:
    yield _columns(channel, clock)
    for record, piece, tag in _rows(records):
        row = (record.file, f"{piece.start:.6f}", f"{piece.end:.6f}", tag.label, tag.mid or "", f"{tag.prob:.6f}")
        times = (time or "" for time in clock_times(record.began, piece)) if clock else ()
        yield (*row, *(str(record.channel),) * channel, *times)


def audacity(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a label for each tag, for Audacity's File > Import > Labels.

    Audacity shows nothing but the label, so the probability is a part of its text.
    """
    for _, piece, tag in _rows(records):
        yield f"{piece.start:.6f}\t{piece.end:.6f}\t{cell(tag.label)} {tag.prob:.2f}\n"


def raven(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a selection table for Raven: a header and a row for each tag, over all frequencies of models and sound.

    Raven opens several sounds as one sequence: "Begin Time (s)" counts from the start of the first sound of the table,
    "File Offset (s)" from the start of each.
    """
    yield "\t".join(RAVEN_COLUMNS) + "\n"
    number, before = 0, 0.0
    for record in records:
        highest = _HIGHEST if record.rate is None else min(_HIGHEST, record.rate / 2)
        place = cell(_whole_path(record.file))
        channel = _SIDES.get(record.channel, record.channel)
        for _, piece, tag in _rows([record]):
            number += 1
            times = f"{before + piece.start:.6f}\t{before + piece.end:.6f}\t0.0\t{highest:.1f}"
            what = f"{piece.start:.6f}\t{cell(tag.label)}\t{tag.prob:.6f}"
            yield f"{number}\tSpectrogram 1\t{channel}\t{times}\t{place}\t{what}\n"
        before += record.seconds


def _whole_path(file: str) -> str:
    """Return the absolute path of a file, which Raven needs; an address or a name such as <stdin> as it is."""
    return file if is_address(file) or file.startswith("<") else os.path.abspath(file)


def _rows(records: Iterable[Timeline]) -> Iterator[tuple[Timeline, Tags, Tag]]:
    for record in records:
        for piece in record:
            for tag in piece.tags:
                yield record, piece, tag


def arrow_tables(records: Iterable[Timeline], *, channel: bool = False, clock: bool = False) -> "Iterator[pa.Table]":
    """Yield the rows of a Parquet file as Arrow tables, a row for each tag; the last table may be empty.

    Args:
        records: what to write.
        channel, clock: as for `csv`.
    """
    import pyarrow as pa

    schema = arrow_schema(channel=channel, clock=clock)
    columns: list[list[object]] = [[] for _ in schema]

    def table() -> pa.Table:
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        for column in columns:
            column.clear()
        return pa.Table.from_arrays(arrays, schema=schema)

    for record, piece, tag in _rows(records):
        row = (arrow_text(record.file), piece.start, piece.end, tag.label, tag.mid, tag.prob)
        times = clock_times(record.began, piece) if clock else ()
        for column, value in zip(columns, (*row, *(str(record.channel),) * channel, *times), strict=True):
            column.append(value)
        if len(columns[0]) == _ROW_GROUP:
            yield table()
    yield table()


def arrow_schema(*, channel: bool = False, clock: bool = False) -> "pa.Schema":
    """Return the columns of `arrow_tables`."""
    import pyarrow as pa

    kinds = (pa.string(), pa.float64(), pa.float64(), pa.string(), pa.string(), pa.float32())
    names = _columns(channel, clock)
    fields = list(zip(names, kinds + (pa.string(),) * (len(names) - len(kinds)), strict=True))
    return pa.schema(fields, {"ced.format": str(FORMAT_VERSION)})


def arrow_text(name: str) -> str:
    """Return a file name as Arrow can hold it: bytes that are not text become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _write_parquet(records: Iterable[Timeline], path: Path, *, channel: bool = False, clock: bool = False) -> None:
    from pyarrow import parquet

    schema = arrow_schema(channel=channel, clock=clock)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in arrow_tables(records, channel=channel, clock=clock):
            writer.write_table(table)


@dataclass(frozen=True)
class Format:
    """A way to write records.

    Attributes:
        suffix: of its files, behind the name of the sound.
        text: yields what a file holds as the pieces of records come; None: not text.
        file: writes a file that is not text.
        shared: whether the sounds of several files can share one output.
        package: what writing needs beyond the core installation.
    """

    suffix: str
    text: Callable[[Iterable[Timeline]], Iterator[str]] | None = None
    file: Callable[[Iterable[Timeline], Path], None] | None = None
    shared: bool = True
    package: str | None = None


FORMATS: Mapping[str, Format] = {
    "text": Format(".txt", text),
    "jsonl": Format(".jsonl", jsonl),
    "csv": Format(".csv", csv),
    "spreadsheet": Format(".spreadsheet.csv", spreadsheet),
    "audacity": Format(".labels.txt", audacity, shared=False),
    "raven": Format(".selections.txt", raven),
    "parquet": Format(".parquet", file=_write_parquet, package="pyarrow"),
}


def _with_columns(name: str, channel: bool, clock: bool) -> Format:
    """Return a format that writes channels and clock times, too, if it does so in columns or headings of their own."""
    changed: Mapping[str, Format] = {
        "text": replace(FORMATS["text"], text=partial(text, channel=channel)),
        "csv": replace(FORMATS["csv"], text=partial(csv, channel=channel, clock=clock)),
        "spreadsheet": replace(FORMATS["spreadsheet"], text=partial(spreadsheet, channel=channel, clock=clock)),
        "parquet": replace(FORMATS["parquet"], file=partial(_write_parquet, channel=channel, clock=clock)),
    }
    return changed.get(name, FORMATS[name])


def formats(
    names: Sequence[str], *, shared: bool = False, printed: bool = False, channel: bool = False, clock: bool = False
) -> list[Format]:
    """Look formats up by name, before any work is done for them.

    Args:
        names: some of `FORMATS`, in capitals or not.
        shared: the sounds of several files go into one output.
        printed: the output is printed, line by line.
        channel: tables and headings have the channel of tags.
        clock: tables have the clock times of tags.

    Raises:
        ConfigError: a name is unknown, or a format cannot do what is asked.
        MissingPackageError: its package is not installed.
    """
    chosen = []
    for name in names:
        if name.lower() not in FORMATS:
            raise ConfigError(f"unknown output format {name}; allowed: {', '.join(FORMATS)}")
        found = _with_columns(name.lower(), channel, clock) if channel or clock else FORMATS[name.lower()]
        if shared and not found.shared:
            raise ConfigError(f"the output format {name} has no column for a file's name; write a file for each sound")
        if printed and found.text is None:
            raise ConfigError(f"the output format {name} is not text and cannot be printed; write it to a folder")
        if found.package and find_spec(found.package) is None:
            raise MissingPackageError(found.package, f"the output format {name}")
        chosen.append(found)
    return chosen


def write(chosen: Format, records: Iterable[Timeline], path: Path) -> None:
    """Write records to a file at once; of any number of records few are in memory.

    Text is UTF-8; bytes of a file name that are not text become escapes.

    Raises:
        WriteError: the file cannot be written.
    """
    with written_aside(path, sync=False) as aside:
        if chosen.file is not None:
            chosen.file(records, aside)
        elif chosen.text is not None:
            with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.writelines(chosen.text(records))
