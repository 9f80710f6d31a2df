"""A folder of Parquet parts that several machines write, each part the rows of some files.

The folder has `run.json` (`{"format": 1, "settings": {...}}`), the rows in `tags/NAME.parquet` or
`vectors/NAME.parquet`, the files of each part in `files/NAME.parquet` (`FILES`), and `errors.jsonl`, a line for each
file that failed. NAME is a digest of the files of the part and of their stamps. A part counts once
`files/NAME.parquet` is there, which is written last, so a part may be written twice, or left half-written.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ced.errors import ConfigError, StoreError, optional_packages
from ced.files import make_folders, remove_leftovers, writing, written_aside
from ced.tag.batch import ERRORS_NAME, JOURNAL_NAME
from ced.tag.inputs import InputSound
from ced.tag.journal import Stamp, stamp_of
from ced.tag.writers import as_utf8, write_tables
from ced.text import json_line

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
RUN_NAME, FILES_FOLDER = "run.json", "files"
FILES = (
    "file",
    "seconds",
    "complete",
    "error",
    "size",
    "modified",
)  # columns; size in bytes, modified in ns since 1970
_MOST_FILES, _MOST_BYTES = 256, 1 << 28  # of a part: what a machine that is lost may have to do again
_PARTS_EACH = 8  # parts for each worker, where there are few files
_AGAIN = "choose another folder, or remove that file to start again"


@dataclass(frozen=True)
class FileResult:
    """What became of a file: a row of `files/NAME.parquet`."""

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


@dataclass(frozen=True)
class PartFolder:
    """The folder, which all machines see under one path.

    Attributes:
        out: its path.
        rows: what the folder of rows is called, "tags" or "vectors".
    """

    out: Path
    rows: str

    def begin(self, settings: Mapping[str, Any]) -> str:
        """Begin a run, or continue one with the same settings; return what `check` compares on other machines.

        Raises:
            ConfigError: the folder was begun with other settings, or by a run on one machine.
            StoreError: its `run.json` is damaged.
            WriteError: the folder cannot be written to.
        """
        if (self.out / JOURNAL_NAME).exists():
            raise ConfigError(f"{self.out} holds a run of one machine ({JOURNAL_NAME}); choose another folder")
        for name in (self.rows, FILES_FOLDER):
            make_folders(self.out, Path(name))
        remove_leftovers(self.out)
        path = self.out / RUN_NAME
        now = json.loads(json.dumps({**settings, "rows": self.rows}))
        if path.exists():
            self._check_settings(path, now)
        else:
            with written_aside(path) as aside:
                aside.write_text(json.dumps({"format": FORMAT_VERSION, "settings": now}) + "\n", encoding="utf-8")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _check_settings(self, path: Path, now: dict[str, Any]) -> None:
        try:
            values = json.loads(path.read_bytes())
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
            found = hashlib.sha256((self.out / RUN_NAME).read_bytes()).hexdigest()
        except OSError:
            found = ""
        if found != begun:
            raise ConfigError(f"machine {machine} does not see the folder {self.out}; name one that all machines share")

    def results(self) -> dict[str, list[FileResult]]:
        """Return the files of each part, by the name of the part, the oldest part first.

        Raises:
            StoreError: a table is damaged.
        """
        paths = (self.out / FILES_FOLDER).glob("*.parquet")
        ordered = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))
        return {path.stem: list(_read_files(path)) for path in ordered}

    def result_of(self, name: str) -> list[FileResult] | None:
        """Return the files of a part, None if it is not there."""
        path = self.out / FILES_FOLDER / f"{name}.parquet"
        return list(_read_files(path)) if path.exists() else None

    def rows_path(self, name: str) -> Path:
        """Return where the rows of a part are."""
        return self.out / self.rows / f"{name}.parquet"

    def write_rows(self, name: str, schema: "pa.Schema", tables: "Iterable[pa.Table]") -> None:
        """Write the rows of a part, before `finish`.

        Raises:
            WriteError: they cannot be written.
        """
        with written_aside(self.rows_path(name)) as aside:
            write_tables(aside, schema, tables)

    def finish(self, name: str, results: Sequence[FileResult]) -> None:
        """Write the files of a part whose rows are written.

        Raises:
            WriteError: the table cannot be written.
        """
        import pyarrow as pa
        from pyarrow import parquet

        kinds = (pa.string(), pa.float64(), pa.bool_(), pa.string(), pa.int64(), pa.int64())
        schema = pa.schema(list(zip(FILES, kinds, strict=True)), {"ced.parts": str(FORMAT_VERSION)})
        rows = [(each.file, each.seconds, each.complete, each.error, *(each.stamp or (None, None))) for each in results]
        columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
        with written_aside(self.out / FILES_FOLDER / f"{name}.parquet") as aside:
            parquet.write_table(pa.Table.from_arrays(columns, schema=schema), aside)

    def settle(self, again: Iterable[str] = ()) -> dict[str, FileResult]:
        """Leave the rows of each file in one part, the newest, and return what became of each file.

        Only for one process, while no other writes: rows without a table of files are removed.

        Args:
            again: files whose rows are removed, because they are processed again.
        """
        parts = self.results()
        for path in (self.out / self.rows).glob("*.parquet"):
            if path.stem not in parts:
                path.unlink()
        taken = set(again)
        found: dict[str, FileResult] = {}
        for name, results in reversed(parts.items()):
            kept = [each for each in results if each.file not in taken]
            if len(kept) < len(results):
                self._keep(name, kept, gone={each.file for each in results if each.file in taken and not each.error})
            taken |= {each.file for each in kept}
            found.update((each.file, each) for each in kept)
        return found

    def _keep(self, name: str, results: Sequence[FileResult], gone: set[str]) -> None:
        """Remove the rows of some files from a part."""
        path = self.rows_path(name)
        if not results:
            (self.out / FILES_FOLDER / f"{name}.parquet").unlink()
            path.unlink(missing_ok=True)
            return
        if gone:
            import pyarrow.compute as pc
            from pyarrow import parquet

            table = _read(path)
            mask = pc.invert(pc.is_in(table["file"], value_set=_array(sorted(gone))))
            with written_aside(path) as aside:
                parquet.write_table(table.filter(mask), aside, compression="zstd")
        self.finish(name, results)

    def write_errors(self, found: Iterable[FileResult]) -> None:
        """Write `errors.jsonl`: a line for each file that failed, or no file if none did."""
        path = self.out / ERRORS_NAME
        lines = [json_line({"file": each.file, "error": each.error}) + "\n" for each in found if each.error]
        if not lines:
            with writing(path):
                path.unlink(missing_ok=True)
            return
        with written_aside(path) as aside:
            aside.write_text("".join(lines), encoding="utf-8")


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


def _read_files(path: Path) -> Iterator[FileResult]:
    table = _read(path)
    if missing := set(FILES) - set(table.column_names):
        raise StoreError(f"{path} has no column {min(missing)}; {_AGAIN}")
    for row in table.to_pylist():
        stamp = None if row["size"] is None else (row["size"], row["modified"])
        yield FileResult(row["file"], row["seconds"], row["complete"], row["error"], stamp)


def _read(path: Path) -> "pa.Table":
    with optional_packages("a folder of parts"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        return parquet.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path} is damaged ({' '.join(str(error).split())}); {_AGAIN}") from error


def _array(values: Sequence[str]) -> "pa.Array":
    import pyarrow as pa

    return pa.array(values, pa.string())


def _short(value: Any) -> str:
    shown = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
