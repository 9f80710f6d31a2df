"""Writers: what records look like on paper, each kind as other programs read it. Column names are an interface."""

import csv as rfc4180
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ced.errors import ConfigError, MissingPackageError
from ced.files import written_aside
from ced.tag.records import FORMAT_VERSION, Tag, Tags, Timeline

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
HIGHEST = 8000  # Hz; what models hear reaches so far up
_ROW_GROUP = 1 << 16  # rows of a Parquet file that are in memory at a time
_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")  # what would break a line or a column that nothing quotes


def text(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield lines for a reader: a heading with the name, then each window's tags, a blank line after each window."""
    for record in records:
        yield f"===== {_plain(record.file)} =====\n"
        for number, piece in enumerate(record):
            if number:
                yield "\n"
            for rank, tag in enumerate(piece.tags, start=1):
                yield f"[{piece.start:.1f}s]-[{piece.end:.1f}s] Topk-{rank} {tag.label} {tag.prob:.4f}\n"
        yield "\n"


def jsonl(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield each record as a line of JSON, piece by piece; an interrupted one is closed, as not complete."""
    for record in records:
        head = {"format": FORMAT_VERSION, "file": record.file, "model": record.model, "kind": record.kind}
        yield f'{json.dumps({**head, "channel": record.channel}, ensure_ascii=False)[:-1]}, "pieces": ['
        try:
            for number, piece in enumerate(record):
                yield ", " * (number > 0) + json.dumps(asdict(piece), ensure_ascii=False)
        except GeneratorExit:
            raise
        except BaseException:
            yield _end(record, complete=False)
            raise
        yield _end(record, complete=record.complete)


def _end(record: Timeline, complete: bool) -> str:
    values = {"seconds": record.seconds, "complete": complete, "expected_seconds": record.expected_seconds}
    return f"], {json.dumps(values)[1:]}\n"


def csv(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a header and a line a tag, quoted as RFC 4180 has it."""
    yield ",".join(COLUMNS) + "\n"
    line = io.StringIO()
    writer = rfc4180.writer(line, lineterminator="\n")
    for record, piece, tag in _rows(records):
        times = (f"{piece.start:.6f}", f"{piece.end:.6f}")
        writer.writerow((record.file, *times, tag.label, tag.mid or "", f"{tag.prob:.6f}"))
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def audacity(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a label a tag, for Audacity's File > Import > Labels.

    A label is all that Audacity shows of it, so the probability is a part of its text.
    """
    for _, piece, tag in _rows(records):
        yield f"{piece.start:.6f}\t{piece.end:.6f}\t{_plain(tag.label)} {tag.prob:.2f}\n"


def raven(records: Iterable[Timeline]) -> Iterator[str]:
    """Yield a selection table for Raven: a header and a row a tag, over all frequencies that models hear.

    Raven opens several sounds as one sequence: "Begin Time (s)" counts from the start of the first,
    "File Offset (s)" from the start of each.
    """
    yield "\t".join(RAVEN_COLUMNS) + "\n"
    number, before = 0, 0.0
    for record in records:
        for _, piece, tag in _rows([record]):
            number += 1
            times = f"{before + piece.start:.6f}\t{before + piece.end:.6f}\t0.0\t{HIGHEST:.1f}"
            where = f"{_plain(record.file)}\t{piece.start:.6f}"
            yield f"{number}\tSpectrogram 1\t1\t{times}\t{where}\t{_plain(tag.label)}\t{tag.prob:.6f}\n"
        before += record.seconds


def _rows(records: Iterable[Timeline]) -> Iterator[tuple[Timeline, Tags, Tag]]:
    for record in records:
        for piece in record:
            for tag in piece.tags:
                yield record, piece, tag


def _plain(words: str) -> str:
    return _BREAKS.sub(" ", words)


def _write_parquet(records: Iterable[Timeline], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = (pa.string(), pa.float64(), pa.float64(), pa.string(), pa.string(), pa.float32())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)), {"ced.format": str(FORMAT_VERSION)})
    columns: list[list[object]] = [[] for _ in COLUMNS]
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            for column in columns:
                column.clear()

        for record, piece, tag in _rows(records):
            name = record.file.encode("utf-8", "backslashreplace").decode()
            row = (name, piece.start, piece.end, tag.label, tag.mid, tag.prob)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            if len(columns[0]) == _ROW_GROUP:
                flush()
        flush()


@dataclass(frozen=True)
class Format:
    """A way to write records."""

    suffix: str  # of its files, behind the name of the sound
    text: Callable[[Iterable[Timeline]], Iterator[str]] | None  # yields text as pieces come; None: binary
    shared: bool = True  # whether the sounds of several files can share one output
    package: str | None = None  # what writing needs beyond the core installation


FORMATS: Mapping[str, Format] = {
    "text": Format(".txt", text),
    "jsonl": Format(".jsonl", jsonl),
    "csv": Format(".csv", csv),
    "audacity": Format(".labels.txt", audacity, shared=False),
    "raven": Format(".selections.txt", raven),
    "parquet": Format(".parquet", None, package="pyarrow"),
}


def formats(names: Sequence[str], *, shared: bool = False, lines: bool = False) -> list[Format]:
    """Look formats up by name, before any work is done for them.

    Args:
        names: some of `FORMATS`.
        shared: the sounds of several files go into one output.
        lines: the output is printed, line by line.

    Raises:
        ConfigError: a name is unknown, a format cannot do what is asked, or its package is not installed.
    """
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"there is no output format {name}; there are {', '.join(FORMATS)}")
        chosen = FORMATS[name]
        if shared and not chosen.shared:
            raise ConfigError(f"the output format {name} has no place for a file's name; write an output for each file")
        if lines and chosen.text is None:
            raise ConfigError(f"the output format {name} is no text that could be printed; write it to a folder")
        if chosen.package and find_spec(chosen.package) is None:
            raise MissingPackageError(chosen.package, f"the output format {name}")
    return [FORMATS[name] for name in names]


def write(chosen: Format, records: Iterable[Timeline], path: Path) -> None:
    """Write records to a file, which is there whole or not at all; of any number of them few are in memory.

    Text is UTF-8; of a file name that is not valid text, the bytes that are none are written as escapes.
    """
    with written_aside(path, sync=False) as aside:
        if chosen.text is None:
            _write_parquet(records, aside)
            return
        with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(chosen.text(records))
