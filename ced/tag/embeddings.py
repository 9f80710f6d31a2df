"""Files of embeddings: NumPy arrays with a table of what their rows are, or Parquet."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError, MissingPackageError
from ced.files import written_aside
from ced.sound.tables import write_table
from ced.tag.results import arrow_text
from ced.tag.tagger import Embedding

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
SUFFIXES = (".npy", ".parquet")
_ROWS_AT_ONCE = 1024  # rows of a Parquet group that wait in memory


@dataclass(frozen=True, eq=False)
class Row:
    """One vector, and the piece of a sound that it stands for."""

    file: str
    start: float  # seconds
    end: float
    vector: NDArray[np.float32]  # (d,)
    channel: str | int = "mean"  # of the sound


def rows_of(file: str, found: Embedding, *, windows: bool = False) -> Iterator[Row]:
    """Yield the rows of a sound: one for the whole of it, or one for each window."""
    if not windows:
        yield Row(file, 0.0, found.seconds, found.clip, found.channel)
        return
    for start, end, vector in zip(found.starts, found.ends, found.vectors, strict=True):
        yield Row(file, float(start), float(end), vector, found.channel)


def check_suffix(path: Path) -> None:
    """Make sure that a path names a format, and one that can be written here.

    Raises:
        ConfigError: it does not.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"embeddings go to a file named {' or '.join(SUFFIXES)}; got {path}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise MissingPackageError("pyarrow", f"writing {path}")


def write_embeddings(path: Path, rows: Iterable[Row]) -> int:
    """Write vectors in order, unless there are none; return how many.

    `.npy`: (rows, d) float32, and beside it `<name>.tsv` with the columns file, start, end, channel. `.parquet`: these
    columns and `vector`. No file is left half-written.

    Raises:
        ConfigError: the suffix is neither.
    """
    check_suffix(path)
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    return (_write_parquet if path.suffix == ".parquet" else _write_npy)(path, chain([first], rows))


def _write_npy(path: Path, rows: Iterable[Row]) -> int:
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


def _write_parquet(path: Path, rows: Iterable[Row]) -> int:
    import pyarrow.parquet as pq

    count = 0
    with written_aside(path) as aside, pq.ParquetWriter(aside, arrow_schema()) as writer:
        for group in _groups(rows):
            count += len(group)
            writer.write_table(arrow_table(group))
    return count


def arrow_schema() -> "pa.Schema":
    """Return the columns of a Parquet file of embeddings."""
    import pyarrow as pa

    fields = [
        ("file", pa.string()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("channel", pa.string()),
        ("vector", pa.list_(pa.float32())),
    ]
    return pa.schema(fields, metadata={"ced_embeddings": str(FORMAT_VERSION)})


def arrow_table(rows: Sequence[Row]) -> "pa.Table":
    """Return rows as they are in a Parquet file of embeddings."""
    import pyarrow as pa

    columns = {
        "file": [arrow_text(row.file) for row in rows],
        "start": [row.start for row in rows],
        "end": [row.end for row in rows],
        "channel": [str(row.channel) for row in rows],
        "vector": [row.vector for row in rows],
    }
    return pa.table(columns, schema=arrow_schema())


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
