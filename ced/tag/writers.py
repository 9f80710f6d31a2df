"""Writers of records (text, JSON lines, CSV, Parquet, Audacity, Raven) and of embeddings (NumPy, Parquet).

Column names are an interface, described in docs/formats.md.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ced import remote
from ced.errors import ConfigError, MissingPackageError
from ced.files import written_aside
from ced.sound.decode import is_address
from ced.sound.tables import write_table
from ced.tag.records import (
    CLOCK_KEYS,
    FORMAT_VERSION,
    Embedding,
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
CHANNEL_KEY = "channel"  # of CSV and Parquet, if each channel was tagged on its own
# The columns of CSV and Parquet: the type in Parquet, and the value for a tag (None: no value).
_COLUMNS: Mapping[str, tuple[str, Callable[[Timeline, Tags, Tag], str | int | float | None]]] = {
    "file": ("string", lambda record, piece, tag: record.file),
    "start": ("float64", lambda record, piece, tag: piece.start),
    "end": ("float64", lambda record, piece, tag: piece.end),
    "label": ("string", lambda record, piece, tag: tag.label),
    "mid": ("string", lambda record, piece, tag: tag.mid),
    "prob": ("float32", lambda record, piece, tag: tag.prob),
    CHANNEL_KEY: ("string", lambda record, piece, tag: str(record.channel)),
    CLOCK_KEYS[0]: ("string", lambda record, piece, tag: clock_times(record.began, piece)[0]),
    CLOCK_KEYS[1]: ("string", lambda record, piece, tag: clock_times(record.began, piece)[1]),
}
_SIDES: Mapping[str | int, int] = {"mean": 1, "left": 1, "right": 2}  # the channel that Raven shows
_HIGHEST = 8000.0  # Hz; upper edge of the mel filters of all models
_ROW_GROUP, _VECTOR_GROUP = 1 << 16, 1024  # rows of a Parquet file that are in memory at a time: tags, vectors
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins with these is a formula for spreadsheet programs
EMBEDDINGS_VERSION = 1
EMBEDDING_SUFFIXES = (".npy", ".parquet")
_MARK = "\ufeff"  # byte-order mark; without it Excel does not recognise UTF-8


def text(records: Iterable[Timeline], *, channel: bool = False) -> Iterator[str]:
    """Yield plain text: a heading with the name, then the tags of each window, with a blank line after each window.

    Unprintable characters become escapes.

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
    """Yield each record as a line of JSON, piece by piece; an interrupted record is closed, with complete: false."""
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
        clock: add the columns `CLOCK_KEYS`, empty for sounds without a clock time.
    """
    for line in csv_lines(_table(records, channel, clock)):
        yield f"{line}\n"


def spreadsheet(records: Iterable[Timeline], *, channel: bool = False, clock: bool = False) -> Iterator[str]:
    """Yield CSV for spreadsheet programs: with a byte-order mark, and an apostrophe before text like a formula.

    A file may be named `=HYPERLINK(...).wav`, which Excel, LibreOffice and Google Sheets would execute.
    """
    rows = (tuple(_inert(value) for value in row) for row in _table(records, channel, clock))
    for number, line in enumerate(csv_lines(rows)):
        yield f"{line}\n" if number else f"{_MARK}{line}\n"


def _inert(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA) else value


def _columns(channel: bool, clock: bool) -> tuple[str, ...]:
    left_out = (() if channel else (CHANNEL_KEY,)) + (() if clock else CLOCK_KEYS)
    return tuple(name for name in _COLUMNS if name not in left_out)


def _table(records: Iterable[Timeline], channel: bool, clock: bool) -> Iterator[tuple[str, ...]]:
    """Yield the names of the columns, then a row of texts for each tag."""
    names = _columns(channel, clock)
    yield names
    values = [_COLUMNS[name][1] for name in names]
    for row in _rows(records):
        yield tuple(_as_text(value(*row)) for value in values)


def _as_text(value: str | int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def audacity(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a label for each tag, for Audacity's File > Import > Labels.

    Audacity shows only the label, so its text includes the probability.
    """
    for _, piece, tag in _rows(records):
        yield f"{piece.start:.6f}\t{piece.end:.6f}\t{cell(tag.label)} {tag.prob:.2f}\n"


def raven(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a selection table for Raven: a header and a row for each tag, over all frequencies of model and sound.

    Raven opens several sounds as one sequence: "Begin Time (s)" is relative to the start of the first sound of the
    table, "File Offset (s)" to the start of each.
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
    """Return the absolute path of a file, which Raven needs; addresses and names such as <stdin> are unchanged."""
    is_local = not (is_address(file) or remote.address_of(file) or file.startswith("<"))
    return os.path.abspath(file) if is_local else file


def _rows(records: Iterable[Timeline]) -> Iterator[tuple[Timeline, Tags, Tag]]:
    for record in records:
        for piece in record:
            for tag in piece.tags:
                yield record, piece, tag


def tag_schema(*, channel: bool = False, clock: bool = False) -> "pa.Schema":
    """Return the columns of tags in Arrow and Parquet; arguments as for `csv`."""
    import pyarrow as pa

    types = [(name, pa.type_for_alias(_COLUMNS[name][0])) for name in _columns(channel, clock)]
    return pa.schema(types, {"ced.format": str(FORMAT_VERSION)})


def tag_tables(records: Iterable[Timeline], *, channel: bool = False, clock: bool = False) -> "Iterator[pa.Table]":
    """Yield Arrow tables with a row for each tag, in groups of rows; arguments as for `csv`."""
    values = [_COLUMNS[name][1] for name in _columns(channel, clock)]
    rows = (
        tuple(as_utf8(found) if isinstance(found := value(*row), str) else found for value in values)
        for row in _rows(records)
    )
    return _in_groups(tag_schema(channel=channel, clock=clock), rows, _ROW_GROUP)


def _write_parquet(records: Iterable[Timeline], path: Path, *, channel: bool = False, clock: bool = False) -> None:
    write_tables(path, tag_schema(channel=channel, clock=clock), tag_tables(records, channel=channel, clock=clock))


def _in_groups(schema: "pa.Schema", rows: Iterable[tuple[Any, ...]], size: int) -> "Iterator[pa.Table]":
    """Yield tables of `size` rows."""
    import pyarrow as pa

    rows = iter(rows)
    while group := list(islice(rows, size)):
        columns = zip(*group, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        yield pa.Table.from_arrays(arrays, schema=schema)


def write_tables(path: Path, schema: "pa.Schema", tables: "Iterable[pa.Table]") -> int:
    """Write tables to a Parquet file, one after the other; return the number of rows."""
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            count += len(table)
            writer.write_table(table)
    return count


def as_utf8(text: str) -> str:
    """Return text with escapes in place of bytes of a file name that are not text, which Parquet cannot store."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Format:
    """An output format of records.

    Attributes:
        suffix: of its files, after the name of the sound.
        text: yields the text of a file while the pieces of records arrive; None: not a text format.
        file: writes a file that is not text.
        shared: whether several sounds can share one output.
        package: an optional package that writing needs.
        channels: whether the writer takes `channel`, to name the channel of tags.
        clocks: whether the writer takes `clock`, to add the clock times of tags.
    """

    suffix: str
    text: Callable[[Iterable[Timeline]], Iterator[str]] | None = None
    file: Callable[[Iterable[Timeline], Path], None] | None = None
    shared: bool = True
    package: str | None = None
    channels: bool = False
    clocks: bool = False

    def with_columns(self, channel: bool, clock: bool) -> "Format":
        """Return the format with channels and clock times, as far as it has a place for them."""
        added = {"channel": True} if channel and self.channels else {}
        added |= {"clock": True} if clock and self.clocks else {}
        if not added:
            return self
        return replace(
            self,
            text=None if self.text is None else partial(self.text, **added),
            file=None if self.file is None else partial(self.file, **added),
        )


FORMATS: Mapping[str, Format] = {
    "text": Format(".txt", text, channels=True),
    "jsonl": Format(".jsonl", jsonl),
    "csv": Format(".csv", csv, channels=True, clocks=True),
    "spreadsheet": Format(".spreadsheet.csv", spreadsheet, channels=True, clocks=True),
    "audacity": Format(".labels.txt", audacity, shared=False),
    "raven": Format(".selections.txt", raven),
    "parquet": Format(".parquet", file=_write_parquet, package="pyarrow", channels=True, clocks=True),
}


def formats(
    names: Sequence[str], *, shared: bool = False, printed: bool = False, channel: bool = False, clock: bool = False
) -> list[Format]:
    """Look up formats by name, before any work is done.

    Args:
        names: names of `FORMATS`; case is ignored.
        shared: several sounds go into one output.
        printed: the output is printed, line by line.
        channel: tables and headings have the channel of tags.
        clock: tables have the clock times of tags.

    Raises:
        ConfigError: a name is unknown, or a format does not allow this.
        MissingPackageError: its package is not installed.
    """
    if isinstance(names, str):
        raise ConfigError(f"formats is the text {names!r}; it must be a list, as [{names!r}]")
    if not isinstance(names, Iterable):
        raise ConfigError(f"formats is {names!r}; it must be a list, as ['csv']")
    chosen = []
    for name in names:
        if str(name).lower() not in FORMATS:
            raise ConfigError(f"unknown output format {name}; allowed: {', '.join(FORMATS)}")
        found = FORMATS[name.lower()].with_columns(channel, clock)
        if shared and not found.shared:
            raise ConfigError(f"the output format {name} has no column for a file's name; write a file for each sound")
        if printed and found.text is None:
            raise ConfigError(f"the output format {name} is not text and cannot be printed; write it to a folder")
        if found.package and find_spec(found.package) is None:
            raise MissingPackageError(found.package, f"the output format {name}")
        chosen.append(found)
    return chosen


def write_records(chosen: Format, records: Iterable[Timeline], path: Path) -> None:
    """Write records to a file, in memory that does not grow with their number.

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


@dataclass(frozen=True, eq=False)
class EmbeddingRow:
    """One vector, and the piece of a sound that it represents."""

    file: str
    start: float  # seconds
    end: float
    vector: NDArray[np.float32]  # (d,)
    channel: str | int = "mean"  # of the sound


def embedding_rows(file: str, found: Embedding, *, windows: bool = False) -> Iterator[EmbeddingRow]:
    """Yield the rows of a sound: one for the whole sound, or one for each window."""
    if not windows:
        yield EmbeddingRow(file, 0.0, found.seconds, found.clip, found.channel)
        return
    for start, end, vector in zip(found.starts, found.ends, found.vectors, strict=True):
        yield EmbeddingRow(file, float(start), float(end), vector, found.channel)


def check_embeddings_path(path: Path) -> None:
    """Check that a path has the suffix of a format that can be written here.

    Raises:
        ConfigError: its suffix is another one.
        MissingPackageError: the package for Parquet is not installed.
    """
    if path.suffix not in EMBEDDING_SUFFIXES:
        raise ConfigError(f"embeddings are written to a file with suffix {' or '.join(EMBEDDING_SUFFIXES)}; got {path}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise MissingPackageError("pyarrow", f"writing {path}")


def write_embeddings(path: Path, rows: Iterable[EmbeddingRow]) -> int:
    """Write vectors in order, unless there are none; return their number.

    `.npy`: (rows, d) float32, and beside it `<name>.tsv` with the columns file, start, end, channel. `.parquet`: these
    columns and `vector`. An incomplete file is never left behind.

    Raises:
        ConfigError: the suffix is another one.
    """
    check_embeddings_path(path)
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    return (_write_vectors if path.suffix == ".parquet" else _write_array)(path, chain([first], rows))


def _write_array(path: Path, rows: Iterable[EmbeddingRow]) -> int:
    held = list(rows)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, np.stack([row.vector for row in held]))
    write_table(
        path.with_name(f"{path.name}.tsv"),
        {
            "file": [row.file for row in held],
            "start": [f"{row.start:.3f}" for row in held],
            "end": [f"{row.end:.3f}" for row in held],
            "channel": [str(row.channel) for row in held],
        },
    )
    return len(held)


def _write_vectors(path: Path, rows: Iterable[EmbeddingRow]) -> int:
    with written_aside(path) as aside:
        return write_tables(aside, embedding_schema(), embedding_tables(rows))


def embedding_schema() -> "pa.Schema":
    """Return the columns of embeddings in Arrow and Parquet."""
    import pyarrow as pa

    fields = [
        ("file", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("channel", pa.string()),
        ("vector", pa.list_(pa.float32())),
    ]
    return pa.schema(fields, metadata={"ced_embeddings": str(EMBEDDINGS_VERSION)})


def embedding_tables(rows: Iterable[EmbeddingRow]) -> "Iterator[pa.Table]":
    """Yield Arrow tables of embeddings, in groups of rows."""
    values = ((as_utf8(row.file), row.start, row.end, str(row.channel), row.vector) for row in rows)
    return _in_groups(embedding_schema(), values, _VECTOR_GROUP)
