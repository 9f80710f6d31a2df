"""Tables of clips: reading and writing them, the labels in them, and AudioSet's segment lists as such tables.

The parser is the standard `csv`, so that a core install reads them.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ced.errors import TableError
from ced.files import written_aside
from ced.sound.audio import AUDIO_SUFFIXES
from ced.sound.labels import ClassTable, numbered
from ced.text import csv_lines, open_text

LABEL_SEPARATOR = ";"
TABLE_OF_A_FOLDER = "meta.tsv"
_BATCH = 16_384  # rows
_AT_ONCE = 256  # rows that become columns together: more of them do not fit into a processor's cache


@dataclass(frozen=True)
class Table:
    """A table with a header, as columns of text."""

    columns: dict[str, list[str]]
    path: Path

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[str]:
        """Return a column by its name.

        Raises:
            TableError: the table does not have it.
        """
        if name not in self.columns:
            raise missing_column(self.path, name, self.columns)
        return self.columns[name]


def missing_column(path: Path, name: str, columns: Iterable[str]) -> TableError:
    """Return the error that a table lacks a column."""
    return TableError(f"table {path} has no column {name!r}; its columns are {', '.join(columns)}")


def read_table(
    path: str | os.PathLike[str], delimiter: str = "\t", required: Sequence[str] = (), comments: bool = False
) -> Table:
    """Read a table: a header line, then one row on each line; blank lines are skipped.

    Args:
        path: a text file in UTF-8, or in UTF-16 with its byte-order mark.
        delimiter: one character.
        required: columns that the table must have.
        comments: lines that begin with "#" are skipped as well.

    Raises:
        TableError: it cannot be read, has no rows, lacks a column, or a row has more or fewer fields than the header.
    """
    columns: dict[str, list[str]] = {}
    for batch in read_batches(path, delimiter, required, comments):
        for name, values in batch.columns.items():
            columns.setdefault(name, []).extend(values)
    return Table(columns, Path(path))


def read_batches(
    path: str | os.PathLike[str], delimiter: str = "\t", required: Sequence[str] = (), comments: bool = False
) -> Iterator[Table]:
    """Yield a table in batches of rows, for tables that are too large for `read_table`, whose arguments these are.

    Raises:
        TableError: as for `read_table`.
    """
    lines = _lines(Path(path), delimiter, comments)
    _, header = next(lines, (0, []))
    if not header:
        raise TableError(f"table {path} is empty; it needs a line of column names, then rows")
    if twice := {name for name in header if header.count(name) > 1}:
        raise TableError(f"table {path} has more than one column {min(twice)!r}")
    for name in required:
        Table({column: [] for column in header}, Path(path)).column(name)
    columns: dict[str, list[str]] = {name: [] for name in header}
    records: list[list[str]] = []
    last = 0
    for last, record in lines:
        if len(record) != len(header):
            raise TableError(f"table {path}, line {last}: {len(record)} fields; the header has {len(header)}")
        records.append(record)
        if len(records) == _AT_ONCE:
            _move(records, columns)
            if len(columns[header[0]]) >= _BATCH:
                yield Table(columns, Path(path))
                columns = {name: [] for name in header}
    _move(records, columns)
    if columns[header[0]]:
        yield Table(columns, Path(path))
    elif not last:
        raise TableError(f"table {path} has a header ({', '.join(header)}) but no rows")


def _move(records: list[list[str]], columns: Mapping[str, list[str]]) -> None:
    """Append the fields of records to their columns, and clear the records."""
    for column, fields in zip(columns.values(), zip(*records, strict=True), strict=bool(records)):
        column.extend(fields)
    records.clear()


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Sequence[str]], comment: str = "") -> None:
    """Write a tab-separated table, below a line of `comment` if there is one; a crash leaves the file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        if comment:
            file.write(f"# {comment}\n")
        for line in csv_lines((tuple(columns), *zip(*columns.values(), strict=True)), "\t"):
            file.write(f"{line}\n")


def parse_labels(fields: Sequence[str], num_classes: int, path: Path) -> list[tuple[int, ...]]:
    """Return the class indices of each row of the table `path`, from its column `labels`: joined by ";", or empty.

    Raises:
        TableError: a label is not one of 0 ... num_classes - 1; the error has the row.
    """
    parsed: dict[str, tuple[int, ...]] = {"": ()}  # many rows have the same field
    labels = []
    for number, field in enumerate(fields, 1):
        if field not in parsed:
            parsed[field] = tuple(_label(part, num_classes, path, number) for part in field.split(LABEL_SEPARATOR))
        labels.append(parsed[field])
    return labels


def multi_hot(labels: Sequence[Sequence[int]], num_classes: int) -> NDArray[np.bool_]:
    """Return whether each of n clips has each class, (n, c), from their class indices."""
    rows = np.zeros((len(labels), num_classes), np.bool_)
    for row, classes in zip(rows, labels, strict=True):
        row[list(classes)] = True
    return rows


def _label(text: str, num_classes: int, path: Path, number: int) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) >= num_classes:
        raise TableError(f"table {path}, row {number}: label {text!r} is not one of 0 to {num_classes - 1}")
    return int(text)


@dataclass(frozen=True)
class LabelledClip:
    """A sound file and its classes."""

    path: Path
    labels: tuple[int, ...]  # indices of the class table


def read_labelled(table: str | os.PathLike[str], classes: ClassTable) -> list[LabelledClip]:
    """Read a table of labelled clips: tab-separated, columns `filename` and `labels` (class indices joined by ";").

    A column `label` with one class index may replace `labels`. A file is looked for in the folder of the table, in its
    folder `audio`, and at its name as given.

    Args:
        table: the table, or a folder with a table meta.tsv.
        classes: the classes that labels are indices of.

    Raises:
        TableError: the table cannot be read, a label is not a class or not that of the column `name` (with its row), or
            files do not exist (their number, and the first).
    """
    path = Path(table)
    if path.is_dir():
        path = path / TABLE_OF_A_FOLDER
    rows = read_table(path, required=("filename",))
    if "labels" not in rows.columns and "label" in rows.columns:
        rows = Table({**rows.columns, "labels": rows.columns["label"]}, path)
    labels = parse_labels(rows.column("labels"), len(classes), path)
    _check_class_names(rows, labels, classes)
    names = rows.column("filename")
    found = [_find_file(name, path.parent) for name in names]
    if missing := [name for name, file in zip(names, found, strict=True) if file is None]:
        raise TableError(
            f"table {path}: {len(missing)} of {len(names)} files do not exist, the first is {missing[0]!r};"
            f" they are looked for in {path.parent}, in {path.parent / 'audio'}, and as given"
        )
    return [LabelledClip(file, indices) for file, indices in zip(found, labels, strict=True) if file is not None]


def _check_class_names(rows: Table, labels: list[tuple[int, ...]], classes: ClassTable) -> None:
    """Refuse labels of another class table, if the table has their names in a column `name`.

    Raises:
        TableError: a name is not that of its class.
    """
    if classes.names == numbered(len(classes)).names:  # the classes have no names to compare with
        return
    for row, (name, indices) in enumerate(zip(rows.columns.get("name", ()), labels, strict=False), start=1):
        if len(indices) == 1 and name.casefold() != classes.names[indices[0]].casefold():
            raise TableError(
                f"table {rows.path}, row {row}: label {indices[0]} has the name {name!r}, but"
                f" {classes.names[indices[0]]!r} in the model; labels are indices of the model's classes"
            )


def _find_file(name: str, folder: Path) -> Path | None:
    for place in (folder / name, folder / "audio" / name, Path(name)):
        if place.is_file():
            return place
    return None


@dataclass(frozen=True)
class LabelsReport:
    """The result of turning a segment list into a table."""

    table: Path
    rows: int
    missing: tuple[str, ...]  # segments without a file, by YTID
    unlisted: tuple[str, ...]  # files without a segment
    unlabelled: tuple[str, ...]  # files left out because they have none of the classes
    unknown_mids: tuple[str, ...]  # labels that are not in the class table


def segments_to_labels(
    segments_csv: str | os.PathLike[str],
    audio: str | os.PathLike[str],
    classes: ClassTable,
    out: str | os.PathLike[str],
) -> LabelsReport:
    """Turn one of AudioSet's segment lists into a labelled table with filename, labels and, for a pack, hdf5path.

    A file belongs to a segment if its stem is the YTID or "Y" and the YTID, also if "_" and any text follow.

    Args:
        segments_csv: lines `YTID, start_seconds, end_seconds, "mid,mid"`; lines that begin with "#" are comments.
        audio: a folder, which is searched with its subfolders, or the table of a pack, whose `hdf5path` is kept.
        classes: the classes that labels are indices of.
        out: the table to write.

    Raises:
        TableError: the list cannot be read, two files belong to one segment, or no file belongs to any.
    """
    if classes.mids is None:
        raise TableError("the class table has no mids, and AudioSet's segment lists have no other names of classes")
    index_of = {mid: index for index, mid in enumerate(classes.mids)}
    segments = _read_segments(Path(segments_csv))
    columns = _audio_columns(Path(audio))
    kept: dict[str, int] = {}  # YTID: row of `columns`
    unlisted = []
    for row, filename in enumerate(columns["filename"]):
        ytid = _segment_of(Path(filename).stem, segments)
        if ytid is None:
            unlisted.append(filename)
        elif ytid in kept:
            raise TableError(f"two files belong to segment {ytid}: {columns['filename'][kept[ytid]]} and {filename}")
        else:
            kept[ytid] = row
    if not kept:
        raise TableError(f"none of {len(columns['filename'])} files of {audio} belongs to a segment of {segments_csv}")
    labels = {ytid: sorted({index_of[mid] for mid in segments[ytid] if mid in index_of}) for ytid in kept}
    labelled = {row: labels[ytid] for ytid, row in kept.items() if labels[ytid]}
    if not labelled:
        raise TableError(f"none of {len(kept)} files has a label of the class table; {segments_csv} has other classes")
    written = {"filename": [columns["filename"][row] for row in labelled]}
    written["labels"] = [LABEL_SEPARATOR.join(map(str, indices)) for indices in labelled.values()]
    if "hdf5path" in columns:
        written["hdf5path"] = [columns["hdf5path"][row] for row in labelled]
    write_table(out, written)
    return LabelsReport(
        table=Path(out),
        rows=len(labelled),
        missing=tuple(ytid for ytid in segments if ytid not in kept),
        unlisted=tuple(unlisted),
        unlabelled=tuple(columns["filename"][row] for ytid, row in kept.items() if not labels[ytid]),
        unknown_mids=tuple(sorted({mid for mids in segments.values() for mid in mids} - index_of.keys())),
    )


def _read_segments(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the mids of each segment of AudioSet's list, by YTID."""
    segments: dict[str, tuple[str, ...]] = {}
    for number, record in _lines(path, ",", comments=True):
        if len(record) != 4:
            wanted = 'YTID, start_seconds, end_seconds, "mid,mid"'
            raise TableError(f"segment list {path}, line {number}: {len(record)} fields; expected {wanted}")
        ytid, mids = record[0].strip(), record[3]
        if ytid in segments:
            raise TableError(f"segment list {path}, line {number}: segment {ytid} occurs twice")
        segments[ytid] = tuple(mid.strip() for mid in mids.split(",") if mid.strip())
    if not segments:
        raise TableError(f"segment list {path} has no segments")
    return segments


def _audio_columns(audio: Path) -> dict[str, list[str]]:
    """Return the columns filename and, for the table of a pack, hdf5path."""
    if not audio.is_dir():
        table = read_table(audio, required=("filename", "hdf5path"))
        return {name: table.column(name) for name in ("filename", "hdf5path")}
    files = sorted(str(path) for path in audio.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    if not files:
        raise TableError(f"folder {audio} has no sound files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return {"filename": files}


def _segment_of(stem: str, segments: Mapping[str, object]) -> str | None:
    """Return the YTID a file belongs to. YTIDs can contain "_" and begin with "Y", so the longest match counts."""
    ends = [len(stem)] + [place for place in range(len(stem) - 1, 0, -1) if stem[place] == "_"]
    for end in ends:
        for begin in (0, 1) if stem.startswith("Y") else (0,):
            if stem[begin:end] in segments:
                return stem[begin:end]
    return None


def _lines(path: Path, delimiter: str, comments: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of each row; blank lines and, with `comments`, lines that begin with "#" are skipped.

    Raises:
        TableError: the file cannot be read, or a quote is not closed.
    """
    if len(delimiter) != 1:
        raise TableError(f"the delimiter of a table is one character; got {delimiter!r}")
    last = 0  # where the last complete row ended
    try:
        # Bytes that are not UTF-8 become lone surrogates: they are names of files, which may be opened and shown.
        with open_text(path) as file:
            lines = ("\n" if line.startswith("#") else line for line in file) if comments else file
            reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=comments)
            for record in reader:
                last = reader.line_num
                if record:
                    yield last, record
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TableError(f"cannot read table {path}: {reason}") from error
    except csv.Error as error:
        quote = "; is a quote not closed there?" if reader.line_num > last + 1 else ""
        raise TableError(f"cannot read table {path}, line {last + 1}: {error}{quote}") from error
