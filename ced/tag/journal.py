"""The journal of a run over many files: a line with the settings, then a line with the record of each finished file.

An interrupted run resumes from it, and outputs are written from it. The first line is
`{"format": 1, "settings": {...}}`, the others are `{"name": ..., "place": ..., "stamp": [bytes, nanoseconds] or null,
"record": {...}}`, where the place is the path of the outputs without their suffixes; of two lines with one name the
later counts.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ced.errors import ConfigError, StoreError
from ced.files import open_to_append, writing
from ced.remote import Listed
from ced.tag.inputs import InputSound
from ced.tag.records import FORMAT_VERSION as RECORD_FORMAT
from ced.tag.records import Record

FORMAT_VERSION = 1
_AGAIN = "choose another folder, or remove that file to start again"

Stamp = tuple[int, int]  # size in bytes; time of the last change in ns since 1970, or a digest of the version


def stamp_of(item: InputSound) -> Stamp | None:
    """Return a file's size and time of change, or its version in a store, to detect changes; None if unknown."""
    if isinstance(item.source, Listed):
        return item.source.stamp
    if not isinstance(item.source, str | os.PathLike):
        return None
    try:
        status = os.stat(item.source)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


class Journal:
    """A journal, open for reading and appending.

    Args:
        path: the file, created if missing.
        settings: what records depend on besides the sounds, as JSON values; None: those in the file.

    Attributes:
        settings: those in the file.

    Raises:
        ConfigError: the file was begun with other settings.
        StoreError: the file is not a journal of this format.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None) -> None:
        self.path = path
        self.settings: Mapping[str, Any] = settings or {}
        self._incomplete: set[str] = set()
        self._lines: dict[str, tuple[int, Stamp | None]] = {}  # name -> offset of its line, stamp
        self._owners: dict[str, str] = {}  # place of outputs -> name
        self._file: BinaryIO = open_to_append(path) if settings is not None else _opened(path)
        try:
            now = None if settings is None else json.loads(json.dumps({**settings, "record format": RECORD_FORMAT}))
            self._read(now)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    def _read(self, settings: dict[str, Any] | None) -> None:
        """Check the first line, index the others, and drop an incomplete last one."""
        self._file.seek(0)
        place = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                if number == 0 and not line.startswith(b'{"format"'[: len(line)]):
                    raise StoreError(f"{self.path} is not a journal; {_AGAIN}")
                break
            try:
                values = json.loads(line)
                if number == 0:
                    self._check(values["format"], _object(values["settings"]), settings)
                else:
                    stamp = None if values["stamp"] is None else (int(values["stamp"][0]), int(values["stamp"][1]))
                    name, outputs = _name(values["name"]), _place(values["place"])
                    self._owners[outputs] = name
                    self._lines[name] = place, stamp
                    self._note(name, _object(values["record"]).get("complete"))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise self._damaged(number + 1) from error
            place += len(line)
        if settings is None and not place:
            raise StoreError(f"{self.path} is not a journal; name the folder of a finished run")
        if settings is None:
            return
        self._file.truncate(place)
        if not place:
            self._append({"format": FORMAT_VERSION, "settings": settings})

    def _damaged(self, line: int) -> StoreError:
        return StoreError(f"line {line} of {self.path} is not a line of a journal; {_AGAIN}")

    def _check(self, version: int, before: dict[str, Any], now: dict[str, Any] | None) -> None:
        if version != FORMAT_VERSION:
            raise StoreError(f"{self.path} has format {version}; this program writes {FORMAT_VERSION}; {_AGAIN}")
        self.settings = before
        if now is None:
            return
        changed = [key for key in (before | now) if before.get(key) != now.get(key)]
        if changed:
            then = ", ".join(f"{key} {_short(before.get(key))}, now {_short(now.get(key))}" for key in changed)
            raise ConfigError(f"{self.path} was begun with {then}; {_AGAIN}")

    def _append(self, values: dict[str, Any]) -> int:
        """Append a line, flush it to the operating system, and return its offset."""
        with writing(self.path):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()
        return place

    def holds(self, item: InputSound) -> bool:
        """Return whether a file is finished and has not changed since; a stream never is."""
        if not isinstance(item.source, str | os.PathLike) or item.key not in self._lines:
            return False
        return self._lines[item.key][1] == stamp_of(item)

    def add(self, item: InputSound, stamp: Stamp | None, record: Record) -> None:
        """Append the record of a finished file."""
        outputs = item.place
        place = self._append({"name": item.key, "place": outputs, "stamp": stamp, "record": record.to_json()})
        self._lines[item.key] = place, stamp
        self._owners[outputs] = item.key
        self._note(item.key, record.complete)

    def _note(self, key: str, complete: object) -> None:
        (self._incomplete.add if complete is False else self._incomplete.discard)(key)

    def is_complete(self, item: InputSound) -> bool:
        """Return whether the whole file was tagged, that is, whether it is not truncated."""
        return item.key not in self._incomplete

    def places(self) -> list[Path]:
        """Return the paths of the outputs of all finished files, without their suffixes."""
        return [Path(place) for place in self._owners]

    def record_at(self, place: Path) -> Record:
        """Read the record of the file whose outputs are at a place.

        Raises:
            StoreError: the journal is damaged.
        """
        return self._record(self._owners[str(place)])

    def stamp_at(self, place: Path) -> Stamp | None:
        """Return the stamp, when it was tagged, of the file whose outputs are at a place."""
        return self._lines[self._owners[str(place)]][1]

    def owner(self, item: InputSound) -> str | None:
        """Return the name of the input whose outputs are where those of `item` would be; None if there is none."""
        return self._owners.get(item.place)

    def record(self, item: InputSound) -> Record:
        """Read the record of a finished file.

        Raises:
            StoreError: the journal is damaged.
        """
        return self._record(item.key)

    def _record(self, key: str) -> Record:
        place = self._lines[key][0]
        self._file.seek(place)
        try:
            return Record.from_json(json.loads(self._file.readline())["record"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self._file.seek(0)
            raise self._damaged(self._file.read(place).count(b"\n") + 1) from error


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise StoreError(f"cannot read the journal {path}: {error.strerror}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} is not an object")
    return value


def _name(value: Any) -> str:
    if not is_name(value):
        raise TypeError(f"{value!r:.40} is not a name")
    return str(value)


def _place(value: Any) -> str:
    """Check that a place of outputs is one that `add` writes: relative, and within the folder of the run."""
    if not is_place(value):
        raise ValueError(f"{value!r:.40} is not a place in a folder")
    return str(value)


def is_name(value: object) -> bool:
    """Return whether a value is the name of an input: a text that is not empty, in the encoding of file names."""
    try:
        return isinstance(value, str) and os.fsencode(value) != b""
    except UnicodeEncodeError:
        return False


def is_place(value: object) -> bool:
    """Return whether a value is the place of outputs: a relative path within the folder, in its shortest form."""
    if not (isinstance(value, str) and is_name(value)) or "\0" in value:
        return False
    path = Path(value)
    return not (path.is_absolute() or path.drive or ".." in path.parts or not path.name or str(path) != value)


def _short(value: Any) -> str:
    """Return a setting as shown in messages."""
    shown = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
