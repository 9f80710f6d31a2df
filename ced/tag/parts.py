"""A folder of Parquet parts that several machines write, in a file system or a store, each part the rows of some files.

The folder has `run.json` (`{"format": 1, "settings": {...}}`), the rows in `tags/NAME.parquet` or
`vectors/NAME.parquet`, and at the end of a run `files.parquet` (`FILES`) and `errors.jsonl`, a line for each file that
failed. NAME is a digest of the files of the part and of their stamps. The files of a part, with those that have no
rows, are in the metadata of its schema (`ced.files`, JSON), so rows and files are replaced at once, whichever of two
machines that write the same part is the last. A part appears when it is complete: in a file system it is written aside
and renamed, in a store it is uploaded as one object.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from ced import remote
from ced.errors import CedError, ConfigError, StoreError, optional_packages
from ced.files import claimed, make_folders, remove_leftovers, writing, written_aside
from ced.tag.batch import ERRORS_NAME, JOURNAL_NAME
from ced.tag.inputs import InputSound
from ced.tag.journal import Stamp, stamp_of
from ced.tag.uploads import outputs_folder
from ced.tag.writers import as_utf8, write_tables
from ced.text import json_line

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

FORMAT_VERSION = 1
RUN_NAME, FILES_NAME = "run.json", "files.parquet"
FILES = (
    "file",
    "seconds",
    "complete",
    "error",
    "size",
    "modified",
)  # columns; size in bytes, modified in ns since 1970
_MOST_FILES, _MOST_BYTES = 256, 1 << 28  # of a part: what a machine that is lost may have to do again
_FILES_KEY = b"ced.files"
_PARTS_EACH = 16  # parts for each worker, where there are few files
_PARTS_AT_ONCE = 16  # whose files are read
_READ_AT_ONCE = 1 << 20  # bytes of a part in a store; of larger ones, only the end with the metadata may be needed
_AGAIN = "choose another folder, or remove that file to start again"


@dataclass(frozen=True)
class FileResult:
    """What became of a file: a row of `files.parquet`."""

    file: str  # as `as_utf8` has it
    seconds: float  # of sound that were processed
    complete: bool  # False: the file is cut short, or failed
    error: str | None  # why there are no rows of it
    stamp: Stamp | None


@dataclass(frozen=True)
class Part:
    """Some files that are processed together, and their stamps."""

    inputs: tuple[InputSound, ...]
    stamps: tuple[Stamp | None, ...]

    @property
    def name(self) -> str:
        """A digest of the names and stamps."""
        about = [[as_utf8(item.name), stamp] for item, stamp in zip(self.inputs, self.stamps, strict=True)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


class Files(Protocol):
    """The files of a run, by their names in its folder."""

    def begin(self, rows: str) -> None:
        """Prepare the folder, with one for rows in it.

        Raises:
            WriteError: it cannot be written to.
        """

    def claim(self) -> AbstractContextManager[None]:
        """Keep other processes of this machine from writing it.

        Raises:
            BusyError: another process is writing it.
        """

    def parts(self, rows: str) -> list[str]:
        """Return the names of the parts, the oldest first."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file.

        Raises:
            AudioError, OSError: it cannot be read.
        """

    def write(self, name: str) -> AbstractContextManager[Path]:
        """Yield a local file to write to; at the end it replaces the one with this name, as a whole.

        Raises:
            WriteError: it cannot be written.
        """

    def remove(self, name: str) -> None:
        """Remove a file, if it exists.

        Raises:
            WriteError: it cannot be removed.
        """


@dataclass(frozen=True)
class _LocalFiles:
    """Files in a folder of the file system."""

    out: Path

    def begin(self, rows: str) -> None:
        make_folders(self.out, Path(rows))
        remove_leftovers(self.out)

    def claim(self) -> AbstractContextManager[None]:
        return claimed(self.out / RUN_NAME)

    def parts(self, rows: str) -> list[str]:
        paths = (self.out / rows).glob("*.parquet")
        ordered = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [f"{rows}/{path.name}" for path in ordered]

    def exists(self, name: str) -> bool:
        return (self.out / name).exists()

    def open(self, name: str) -> IO[bytes]:
        return (self.out / name).open("rb")

    def write(self, name: str) -> AbstractContextManager[Path]:
        return written_aside(self.out / name)

    def remove(self, name: str) -> None:
        path = self.out / name
        with writing(path):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _StoredFiles:
    """Files below an address of a store (`ced.remote`)."""

    out: str

    def begin(self, rows: str) -> None:
        remote.check_writable(self.out)

    def claim(self) -> AbstractContextManager[None]:
        return claimed(outputs_folder(self.out))

    def parts(self, rows: str) -> list[str]:
        found = [each for each in remote.find_below(f"{self.out}/{rows}") if each.endswith(".parquet")]
        return [each[len(self.out) + 1 :] for each in sorted(found, key=lambda each: (each.modified, each))]

    def exists(self, name: str) -> bool:
        return remote.stamp_of(f"{self.out}/{name}") is not None

    def open(self, name: str) -> IO[bytes]:
        return remote.open_file(f"{self.out}/{name}", _READ_AT_ONCE)

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="ced-") as folder:
            path = Path(folder, os.path.basename(name))
            yield path
            remote.upload({path: f"{self.out}/{name}"})

    def remove(self, name: str) -> None:
        remote.remove(f"{self.out}/{name}")


@dataclass(frozen=True)
class PartFolder:
    """The folder, which all machines see under one path or address.

    Attributes:
        out: its path, or the address of one in a store.
        rows: what the folder of rows is called, "tags" or "vectors".
    """

    out: Path
    rows: str

    @cached_property
    def files(self) -> Files:
        """The files in it."""
        address = remote.address_of(self.out)
        return _LocalFiles(self.out) if address is None else _StoredFiles(address.rstrip("/"))

    def begin(self, settings: Mapping[str, Any]) -> str:
        """Begin a run, or continue one with the same settings; return what `check` compares on other machines.

        Raises:
            ConfigError: the folder was begun with other settings, or by a run on one machine.
            StoreError: its `run.json` is damaged.
            WriteError: the folder cannot be written to.
        """
        if self.files.exists(JOURNAL_NAME):
            raise ConfigError(f"{self.out} holds a run of one machine ({JOURNAL_NAME}); choose another folder")
        self.files.begin(self.rows)
        now = json.loads(json.dumps({**settings, "rows": self.rows}))
        if self.files.exists(RUN_NAME):
            self._check_settings(now)
        else:
            with self.files.write(RUN_NAME) as aside:
                aside.write_text(json.dumps({"format": FORMAT_VERSION, "settings": now}) + "\n", encoding="utf-8")
        return self._digest()

    def _digest(self) -> str:
        with self.files.open(RUN_NAME) as file:
            return hashlib.sha256(file.read()).hexdigest()

    def _check_settings(self, now: dict[str, Any]) -> None:
        path = f"{self.out}/{RUN_NAME}"
        try:
            with self.files.open(RUN_NAME) as file:
                values = json.load(file)
            version, before = values["format"], dict(values["settings"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StoreError(f"{path} is damaged; {_AGAIN}") from error
        if version != FORMAT_VERSION:
            raise StoreError(f"{path} has format {version}; this program writes {FORMAT_VERSION}; {_AGAIN}")
        changed = [key for key in before | now if before.get(key) != now.get(key)]
        if changed:
            then = ", ".join(f"{key} {_short(before.get(key))}, now {_short(now.get(key))}" for key in changed)
            raise ConfigError(f"{path} was begun with {then}; {_AGAIN}")

    def check(self, begun: str, machine: str) -> None:
        """Make sure that this machine sees the folder that `begin` has made, before anything is written into it.

        Raises:
            ConfigError: it does not.
        """
        try:
            found = self._digest()
        except FileNotFoundError:
            found = ""
        except (CedError, OSError) as error:
            raise ConfigError(f"machine {machine} cannot read the folder of --out: {error}") from error
        if found != begun:
            raise ConfigError(f"machine {machine} does not see the folder {self.out}; name one that all machines share")

    def results(self) -> dict[str, list[FileResult]]:
        """Return the files of each part, by the name of the part, the oldest part first.

        Raises:
            StoreError: a part is damaged.
        """
        names = self.files.parts(self.rows)
        with ThreadPoolExecutor(_PARTS_AT_ONCE, "parts") as pool:
            return {Path(name).stem: found for name, found in zip(names, pool.map(self._files_of, names), strict=True)}

    def result_of(self, name: str) -> list[FileResult] | None:
        """Return the files of a part, None if it is not there."""
        return self._files_of(self._path(name)) if self.files.exists(self._path(name)) else None

    def write(
        self, name: str, schema: "pa.Schema", tables: "Iterable[pa.Table]", results: Sequence[FileResult]
    ) -> None:
        """Write a part: the rows, and the files that they are of.

        Raises:
            WriteError: the part cannot be written.
        """
        files = json.dumps([[each.file, each.seconds, each.complete, each.error, each.stamp] for each in results])
        metadata = {**(schema.metadata or {}), _FILES_KEY: files.encode()}
        with self.files.write(self._path(name)) as aside:
            write_tables(aside, schema.with_metadata(metadata), tables)

    def _path(self, name: str) -> str:
        return f"{self.rows}/{name}.parquet"

    def _files_of(self, path: str) -> list[FileResult]:
        """Return the files of a part."""
        with self._open_part(path) as part:
            values = json.loads(part.schema_arrow.metadata[_FILES_KEY])
            return [
                FileResult(str(file), float(seconds), bool(complete), error, stamp and (int(stamp[0]), int(stamp[1])))
                for file, seconds, complete, error, stamp in values
            ]

    @contextmanager
    def _open_part(self, path: str) -> "Iterator[parquet.ParquetFile]":
        with optional_packages("a folder of parts"):
            import pyarrow as pa
            from pyarrow import parquet
        try:
            with self.files.open(path) as file:
                yield parquet.ParquetFile(file)
        except CedError:
            raise
        except (OSError, pa.ArrowException, ValueError, LookupError, TypeError) as error:
            reason = "" if isinstance(error, LookupError | TypeError) else f" ({' '.join(str(error).split())})"
            raise StoreError(f"{self.out}/{path} is damaged, or not a part{reason}; {_AGAIN}") from error

    def settle(self, again: Iterable[str] = ()) -> dict[str, FileResult]:
        """Leave the rows of each file in one part, the newest, and return what became of each file.

        Args:
            again: files whose rows are removed, because they are processed again.
        """
        taken = set(again)
        found: dict[str, FileResult] = {}
        for name, results in reversed(self.results().items()):
            kept = [each for each in results if each.file not in taken]
            if not kept:
                self.files.remove(self._path(name))
            elif len(kept) < len(results):
                self._keep(name, kept)
            taken |= {each.file for each in kept}
            found.update((each.file, each) for each in kept)
        return found

    def _keep(self, name: str, results: Sequence[FileResult]) -> None:
        """Leave the rows of these files only in a part."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with self._open_part(self._path(name)) as part:
            table = part.read()
        files = pa.array([each.file for each in results], pa.string())
        self.write(name, table.schema, [table.filter(pc.is_in(table["file"], value_set=files))], results)

    def finish(self, found: Iterable[FileResult]) -> None:
        """Write what became of files: the table `files.parquet`, and `errors.jsonl`, or no such file if none failed.

        Raises:
            WriteError: a file cannot be written.
        """
        import pyarrow as pa

        results = list(found)
        kinds = (pa.string(), pa.float64(), pa.bool_(), pa.string(), pa.int64(), pa.int64())
        schema = pa.schema(list(zip(FILES, kinds, strict=True)), {"ced.parts": str(FORMAT_VERSION)})
        rows = [(each.file, each.seconds, each.complete, each.error, *(each.stamp or (None, None))) for each in results]
        with self.files.write(FILES_NAME) as aside:
            table = [dict(zip(FILES, row, strict=True)) for row in rows]
            write_tables(aside, schema, [pa.Table.from_pylist(table, schema=schema)])
        lines = [json_line({"file": each.file, "error": each.error}) + "\n" for each in results if each.error]
        if lines:
            with self.files.write(ERRORS_NAME) as aside:
                aside.write_text("".join(lines), encoding="utf-8")
        else:
            self.files.remove(ERRORS_NAME)


def plan(inputs: Sequence[InputSound], workers: int) -> Iterator[Part]:
    """Yield the parts that files are processed in: in order, none too large to be done again.

    Raises:
        ConfigError: two files have one name.
    """
    if len({as_utf8(item.name) for item in inputs}) < len(inputs):
        raise ConfigError("two sounds have one name, which tells their rows apart; rename one of them")
    most = min(_MOST_FILES, max(1, -(-len(inputs) // (_PARTS_EACH * workers))))
    some: list[tuple[InputSound, Stamp | None]] = []
    size = 0
    for item in inputs:
        stamp = stamp_of(item)
        here = stamp[0] if stamp else 0
        if some and (len(some) == most or size + here > _MOST_BYTES):
            yield _part(some)
            some, size = [], 0
        some.append((item, stamp))
        size += here
    if some:
        yield _part(some)


def to_do(inputs: Iterable[InputSound], found: Mapping[str, FileResult]) -> list[InputSound]:
    """Return the inputs that are not done, have failed, or have changed since."""

    def is_done(item: InputSound) -> bool:
        result = found.get(as_utf8(item.name))
        return result is not None and not result.error and result.stamp == stamp_of(item)

    return [item for item in inputs if not is_done(item)]


def _part(some: Sequence[tuple[InputSound, Stamp | None]]) -> Part:
    inputs, stamps = zip(*some, strict=True)
    return Part(inputs, stamps)


def _short(value: Any) -> str:
    shown = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
