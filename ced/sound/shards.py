"""Sounds in shards: members of tar files (WebDataset) and rows of Parquet files, each with the name SHARD!MEMBER.

A tar file is searched once for its members, which are then read by their position. Of a Parquet file the names are read
first, then rows in order, a few at a time; a page of the file is in memory as a whole, because Arrow has no smaller
unit. Both may be local files or remote ones (`ced.remote`).
"""

import io
import logging
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from itertools import accumulate
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from ced import remote
from ced.errors import AudioError, CedError, optional_packages
from ced.sound.reading import FileRange, Reading

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

SUFFIXES = (".tar", ".parquet")
_MEMBER = re.compile(r"(.+?\.(?:tar|parquet))!(.*)", re.DOTALL | re.IGNORECASE)
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_READERS = 8  # Parquet files that rows are read from at a time
_COLUMN = "audio"  # of sounds, where several columns could have them
_NAMES = ("path", "file", "filename", "file_name")  # columns with names of sounds
_ROWS, _BATCHES = 16, 4  # rows that are read at a time, and how many times are kept
_BUFFER = 1 << 20  # bytes that are read ahead of a column
_CHUNK = 1 << 20  # bytes of an archive that are searched for data at a time
_searching = Lock()

logger = logging.getLogger(__name__)


def is_shard(name: str) -> bool:
    """Return whether a file has sounds as its members, by its suffix."""
    return name.lower().endswith((*SUFFIXES, *_COMPRESSED))


def split_member(name: str) -> tuple[str, str] | None:
    """Return the shard and the member in the name of a sound; None if it is the name of a file."""
    found = _MEMBER.fullmatch(name)
    if found is None or (remote.address_of(name) is None and os.path.lexists(name)):
        return None
    shard = remote.Listed(found[1], name.stamp) if isinstance(name, remote.Listed) else found[1]
    return shard, found[2]


def stamp_of(shard: str) -> remote.Stamp | None:
    """Return size and version of a shard, to detect changes; None: unknown."""
    if isinstance(shard, remote.Listed):
        return shard.stamp
    if remote.address_of(shard) is not None:
        return None
    try:
        status = os.stat(shard)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def members(shard: str) -> tuple[Sequence[str], str | None]:
    """Return the names of the members of a shard, in order, and why there may be more; None if these are all.

    Raises:
        AudioError: the shard cannot be read, is damaged at its beginning, or has no column of sounds.
        MissingPackageError: the package for Parquet, or for the address, is not installed.
    """
    found = _searched(shard)
    return tuple(found.places), found.fault


def open_member(shard: str, member: str, reading: Reading, stack: ExitStack) -> IO[bytes] | FileRange:
    """Open a member of a shard as a file; `stack` closes it. The end of the shard may cut it short (`reading.broken`).

    Raises:
        AudioError: the shard cannot be read, or has no such member.
        MissingPackageError: as for `members`.
    """
    found = _searched(shard)
    if member not in found.places:
        missing = f"the shard has no member {member}" if member else "the shard has no sounds"
        raise AudioError(found.fault or missing, remote.without_secrets(shard))
    return found.open(member, reading, stack)


def _searched(shard: str) -> "_Tar | _Parquet":
    with _searching:  # a shard is searched by one thread
        return _search(shard, stamp_of(shard))


@cache  # no larger than the list of the sounds
def _search(shard: str, stamp: remote.Stamp | None) -> "_Tar | _Parquet":
    if shard.lower().endswith(_COMPRESSED):
        name = remote.without_secrets(shard)
        raise AudioError("compressed archives cannot be read member by member; decompress it to .tar", name)
    try:
        return _Parquet(shard) if shard.lower().endswith(".parquet") else _Tar(shard)
    except CedError:
        raise
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror or error}", remote.without_secrets(shard)) from error


def _open(shard: str) -> IO[bytes]:
    if remote.address_of(shard) is not None:
        return remote.open_file(shard)
    return open(shard, "rb")


class _Tar:
    """The members of a tar file.

    Attributes:
        places: first byte and size of each member, by name; None: a link to another file.
        fault: why there may be more members; None: these are all.
    """

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self.places: dict[str, tuple[int, int] | None] = {}
        self.fault: str | None = None
        with _open(shard) as file:
            self._size = file.seek(0, os.SEEK_END)
            file.seek(0)
            self.fault = self._search(file)
        if self.fault is not None and not self.places:
            raise AudioError(self.fault, remote.without_secrets(shard))

    def _search(self, file: IO[bytes]) -> str | None:
        """Find the members, also those of joined archives and behind damaged headers; return why there may be more."""
        head = file.read(tarfile.BLOCKSIZE)
        try:
            if head.strip(b"\0") or not head:  # zeros: an archive without members, which others may follow
                tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            return "not a tar archive, or damaged from the start"
        file.seek(0)
        last, end, fault, repeated = "its beginning", 0, None, 0
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as archive:
                for member in archive:
                    if fault is None and _has_data(file, end, member.offset):
                        fault = last
                    last, end = f"the member {member.name}", archive.offset
                    if member.isreg() or member.islnk() or member.issym():
                        repeated += member.name in self.places
                        self.places[member.name] = self._place_of(member)
                if fault is None and _has_data(file, end, self._size):
                    fault = last
        except (OSError, CedError):
            raise
        except Exception:  # tarfile raises errors of many kinds on damaged files
            fault = fault or last
        if repeated:
            name = remote.without_secrets(self._shard)
            logger.warning("%s: %d members are replaced by later ones with the same name", name, repeated)
        return None if fault is None else f"damaged after {fault}; there may have been more members"

    def _place_of(self, member: tarfile.TarInfo) -> tuple[int, int] | None:
        if member.islnk():  # another name of an earlier member
            return self.places.get(member.linkname)
        return (member.offset_data, member.size) if member.isreg() and not member.issparse() else None

    def open(self, member: str, reading: Reading, stack: ExitStack) -> IO[bytes] | FileRange:
        """Open a member."""
        place = self.places[member]
        if place is None:
            raise AudioError("a link or a sparse file; only complete files are read from archives", reading.name)
        start, size = place
        if start + size > self._size:
            reading.warn("the archive ends within it")
            reading.broken = True
        end = max(start, min(start + size, self._size))
        if remote.address_of(self._shard) is None:
            return FileRange(stack.enter_context(open(self._shard, "rb", buffering=0)), start, end)
        if end - start <= remote.WHOLE:
            return io.BytesIO(remote.read_range(self._shard, start, end))
        return FileRange(stack.enter_context(remote.open_file(self._shard)), start, end)


def _has_data(file: IO[bytes], start: int, end: int) -> bool:
    """Return whether there are other bytes than zeros between two offsets."""
    for place in range(start, end, _CHUNK):
        file.seek(place)
        if file.read(min(_CHUNK, end - place)).strip(b"\0"):
            return True
    return False


class _Parquet:
    """The rows of a Parquet file, with a column of sounds: the bytes of a file, or {bytes, path}.

    Attributes:
        places: the number of each row, by the name of its sound, or by the number as text if names are missing or
            occur twice.
        fault: None; these are all.
    """

    fault: str | None = None

    def __init__(self, shard: str) -> None:
        self._shard = shard
        with _reading_parquet(remote.without_secrets(shard)):
            file = _open_parquet(shard)
            self._column, name = _columns(file.schema_arrow, remote.without_secrets(shard))
            names = [] if name is None else _values(file.read([name], use_threads=False).column(0), name)
            count = file.metadata.num_rows
            file.close()
        if len(set(names)) < count or not all(isinstance(each, str) and each for each in names):
            names = list(map(str, range(count)))
        self.places: Mapping[str, int] = {each: row for row, each in enumerate(names)}

    def open(self, member: str, reading: Reading, stack: ExitStack) -> IO[bytes]:
        """Open the sound of a row."""
        with _reading_parquet(reading.name, "the Parquet file is damaged here"):
            with _searching:
                rows = _rows_of(self._shard, stamp_of(self._shard), self._column)
            data = rows.read(self.places[member])
        if data is None:
            raise AudioError("the row has no bytes; paths to other files are not followed", reading.name)
        return io.BytesIO(data)


@lru_cache(_READERS)
def _rows_of(shard: str, stamp: remote.Stamp | None, column: str) -> "_Rows":
    return _Rows(_open_parquet(shard), column)


class _Rows:
    """Reads rows of a Parquet file, best in order; several threads may do so.

    Args:
        file: the file.
        column: with the bytes of sounds; with a dot before the field of a struct.
    """

    def __init__(self, file: "parquet.ParquetFile", column: str) -> None:
        self._file, self._column, self._lock = file, column, Lock()
        groups = (file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
        self._firsts = [0, *accumulate(groups)]  # rows of the groups
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._group, self._next = -1, 0  # what is being read
        self._held: dict[int, Any] = {}  # the last rows that were read
        self._damaged: dict[int, tuple[int, Exception]] = {}  # by group: the row from which it cannot be read, and why

    def read(self, row: int) -> bytes | None:
        """Return the bytes of a row; a row before the last few is read again from the start of its group."""
        with self._lock:
            if row not in self._held:
                self._read_to(row)
            value = self._held[row].as_py()
        assert value is None or isinstance(value, bytes)
        return value

    def _read_to(self, row: int) -> None:
        group = bisect_right(self._firsts, row) - 1
        if group in self._damaged and row >= self._damaged[group][0]:
            raise self._damaged[group][1]
        if group != self._group or row < self._next:
            self._held, self._group, self._next = {}, group, self._firsts[group]
            self._batches = self._file.iter_batches(_ROWS, [group], [self._column], use_threads=False)
        while row >= self._next:
            try:
                values = _scalars(next(self._batches).column(0), self._column)
            except Exception as error:
                self._damaged[group], self._group = (self._next, error), -1
                raise
            self._held.update(enumerate(values, self._next))
            self._next += len(values)
            for old in list(self._held)[: -_ROWS * _BATCHES]:
                del self._held[old]
        if self._next == self._firsts[group + 1]:
            self._batches = iter(())  # frees the last page of the group


@contextmanager
def _reading_parquet(name: str, what: str = "not a Parquet file, or damaged") -> Iterator[None]:
    """Turn the errors of Arrow, which are ValueErrors, OSErrors and others, into those of a sound."""
    with optional_packages("reading sounds from Parquet"):
        import pyarrow as pa
    try:
        yield
    except CedError:
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.strerror:  # of the file, not of what it has
            raise
        reason = " ".join(remote.without_secrets(str(error)).split())
        raise AudioError(f"{what}: {reason}", name) from error


def _open_parquet(shard: str) -> "parquet.ParquetFile":
    from pyarrow import parquet

    return parquet.ParquetFile(_open(shard), buffer_size=_BUFFER, pre_buffer=False)


def _columns(schema: "pa.Schema", name: str) -> tuple[str, str | None]:
    """Return the column of sounds and that of their names, with a dot before the field of a struct."""
    import pyarrow as pa

    def has_bytes(kind: "pa.DataType") -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found: dict[str, tuple[str, str | None]] = {}
    texts = [field.name for field in schema if field.name in _NAMES and pa.types.is_string(field.type)]
    for field in schema:
        if has_bytes(field.type):
            found[field.name] = field.name, texts[0] if texts else None
        elif pa.types.is_struct(field.type):
            parts = {part.name: part.type for part in field.type}
            if has_bytes(parts.get("bytes", pa.null())):
                path = f"{field.name}.path" if pa.types.is_string(parts.get("path", pa.null())) else None
                found[field.name] = f"{field.name}.bytes", path
    if _COLUMN in found:
        return found[_COLUMN]
    if len(found) != 1:
        what = "several columns with bytes" if found else "no column with the bytes of sounds, or with {bytes, path}"
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise AudioError(f"{what}; its columns are {columns}", name)
    return next(iter(found.values()))


def _scalars(column: Any, name: str) -> Any:
    """Return the values of a column, or of the field of a struct after a dot in its name."""
    return column if "." not in name else column.field(name.rpartition(".")[2])


def _values(column: Any, name: str) -> list[Any]:
    return [value for chunk in column.chunks for value in _scalars(chunk, name).to_pylist()]
