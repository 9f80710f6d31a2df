"""Read audio packs: the samples of a clip straight from their place in the file."""

import hashlib
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from ced.distill.pack_format import (
    ClipIndex,
    ClipLocation,
    SampleLayout,
    Wave,
    checksum_in,
    checksum_of,
    digest_path,
    key_of,
)
from ced.errors import PackError, TableError
from ced.sound.tables import Table, read_table
from ced.text import quoted

logger = logging.getLogger(__name__)


class _Open:
    """The files of a pack that a process has open; they are not part of a pickle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.maps: dict[int, mmap.mmap] = {}  # by the number of the file
        self.handles: dict[tuple[int, int], h5py.File] = {}  # by process and file: a handle does not survive a fork

    def __reduce__(self) -> tuple[type["_Open"], tuple[()]]:
        return _Open, ()


class AudioPack:
    """The clips of a pack, by the rows of its table.

    Several threads may read at once; training does. Forks and pickles can be read too, as the workers of torch's
    DataLoader do: what is known about the files goes along, and each process opens them when it reads.
    """

    table: Table
    names: list[str]  # of each row: the clip's base name, or its whole filename if base names are not unique

    def __init__(self, table: str | os.PathLike[str]) -> None:
        """Read the table of a pack; its files are opened when the first of their clips is needed.

        A table that does not have the digest which packing wrote beside it is read with a warning: it was edited, or it
        is damaged.

        Args:
            table: has the columns `filename` and `hdf5path`. A relative path starts from the working directory, else
                from the table's folder or one above it, else its file is in the folder `hdf5` beside the table's.

        Raises:
            TableError: the table cannot be read, lacks a column, or has no rows.
            PackError: a file of the pack is missing.
        """
        self.table = read_table(table, required=("filename",))
        if "hdf5path" not in self.table.columns:
            raise TableError(f"table {table} has no column 'hdf5path'", hint="`ced pack` makes a pack, and its table")
        _check_table(self.table.path)
        paths = self.table.column("hdf5path")
        numbers = {path: number for number, path in enumerate(dict.fromkeys(paths))}
        self._paths = [_resolve(path, self.table.path) for path in numbers]
        self._file = np.array([numbers[path] for path in paths], np.int32)  # of each row
        # Of each row, once its file was looked into; arrays, as objects for millions of clips would take gigabytes.
        self._samples = np.full(len(paths), -1)
        self._offsets = np.zeros(len(paths), np.int64)  # of the first byte; -1: read through HDF5
        self._layouts = np.zeros(len(paths), np.int16)  # which of `_kinds`
        self._kinds: list[SampleLayout] = []
        self._checked = np.zeros(len(paths), np.bool_)  # whose samples were compared with their checksum
        self._whole: dict[int, bool] = {}  # file: whether it names clips by whole filenames
        self._open = _Open()
        self._name_rows()

    def _name_rows(self) -> None:
        filenames, files = self.table.column("filename"), self._file
        bases = [os.path.basename(filename) for filename in filenames]
        self._rows: dict[str, int] = {}
        self._ambiguous: dict[str, int] = {}  # name: another row that has it
        for names in (filenames, bases):
            for row, name in enumerate(names):
                first = self._rows.setdefault(name, row)
                if first != row and (filenames[first], files[first]) != (filenames[row], files[row]):
                    self._ambiguous[name] = row
        self.names = bases if self._ambiguous.keys().isdisjoint(bases) else filenames

    def __len__(self) -> int:
        return len(self._file)

    def find(self, name: str) -> int:
        """Return the row of the clip with a base name or whole filename.

        Raises:
            PackError: there is none, or more than one.
        """
        row = self._rows.get(name)
        if row is None:
            raise PackError(f"pack {self.table.path} has no clip {quoted(name)}")
        if name in self._ambiguous:
            both = f"rows {row + 1} and {self._ambiguous[name] + 1}"
            raise PackError(f"pack {self.table.path} has more than one clip {quoted(name)}: {both}")
        return row

    def samples(self, row: int) -> int:
        """Return the length of a clip.

        Raises:
            PackError: the file of the clip cannot be read, or lacks one of its clips.
        """
        if self._samples[row] < 0:
            self._look_up(int(self._file[row]))
        return int(self._samples[row])

    def lengths(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the number of samples of clips, (n,); None: of all.

        Raises:
            PackError: as for `samples`.
        """
        files = self._file if rows is None else self._file[rows]
        for number in np.unique(files).tolist():
            self._look_up(number)
        return self._samples.copy() if rows is None else self._samples[rows]

    def names_of(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Return the names of n clips, (n,) str."""
        return np.array(self.names, dtype=object)[rows]

    def find_all(self, names: NDArray[np.object_]) -> NDArray[np.int64]:
        """Return the rows of n clips, (n,); see `find`."""
        return np.array([self.find(name) for name in names], np.int64)

    def read(self, row: int, start: int, stop: int) -> Wave:
        """Return the samples from `start` to before `stop` of a clip, its channels averaged.

        The first time, the whole clip is compared with its checksum, if it has one.

        Returns:
            (stop - start,) int16 (full scale 32768) or float32, as packed; read-only where it is a view of the file.

        Raises:
            PackError: the clip is shorter, it is damaged, or as for `samples`.
        """
        samples = self.samples(row)
        if not 0 <= start <= stop <= samples:
            raise PackError(f"clip {quoted(self.names[row])} has {samples} samples, not {start} to {stop}")
        number, layout, offset = int(self._file[row]), self._kinds[self._layouts[row]], int(self._offsets[row])
        if not self._checked[row]:
            self._check(row, number, layout, offset, samples)
        if offset < 0:
            wave = self._slice(row, layout, start, stop)
        else:
            # A view of the mapped file: half the time of copying it, and nothing of HDF5 on the way.
            data = self._open.maps.get(number) or self._map(number)
            wave = np.frombuffer(data, layout.dtype, (stop - start) * layout.channels, offset + start * layout.frame)
        return wave if layout.channels == 1 else _average(wave.reshape(-1, layout.channels))

    def _check(self, row: int, number: int, layout: SampleLayout, offset: int, samples: int) -> None:
        """Compare the samples of a clip with their checksum, if it has one.

        Raises:
            PackError: they do not have it.
        """
        key = key_of(self.table.column("filename")[row], self._whole[number])
        with self._open.lock, _damage_of(self._paths[number]):
            expected = checksum_in(self._handle(number), key)
        if expected is not None:
            if offset < 0:
                found = checksum_of(self._slice(row, layout, 0, samples))
            else:
                data = self._open.maps.get(number) or self._map(number)
                found = checksum_of(np.frombuffer(data, np.uint8, samples * layout.frame, offset))
            if found != expected:
                raise PackError(
                    f"{self._paths[number]} is damaged: clip {quoted(self.names[row])} does not have its checksum;"
                    " remove the file and run `ced pack` again"
                )
        self._checked[row] = True

    def _look_up(self, number: int) -> None:
        """Find all clips of a file that the table names."""
        path = self._paths[number]
        with self._open.lock:
            rows = np.flatnonzero(self._file == number)
            if self._samples[rows[0]] >= 0:  # by another thread, meanwhile
                return
            filenames, names = self.table.column("filename"), self.names
            places: list[ClipLocation] = []
            size = path.stat().st_size
            with _opened(path) as file, _damage_of(path):
                index = ClipIndex(file)
                self._whole[number] = index.named_whole([filenames[row] for row in rows])
                for row in rows.tolist():
                    place = index.locate(key_of(filenames[row], self._whole[number]))
                    if place is None:
                        raise PackError(f"{path} lacks clip {quoted(names[row])}, row {row + 1} of {self.table.path}")
                    if place.offset is not None and place.offset + place.samples * place.layout.frame > size:
                        raise PackError(f"{path} is cut short: clip {quoted(names[row])} lies beyond its end")
                    places.append(place)
            kinds, samples, offsets = zip(*places, strict=True)
            self._kinds += set(kinds) - set(self._kinds)
            self._layouts[rows] = [self._kinds.index(kind) for kind in kinds]
            self._offsets[rows] = [-1 if offset is None else offset for offset in offsets]
            self._samples[rows] = samples  # the last, as it says that the others are there

    def _map(self, number: int) -> mmap.mmap:
        with self._open.lock, open(self._paths[number], "rb") as file:
            data = self._open.maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data

    def _slice(self, row: int, layout: SampleLayout, start: int, stop: int) -> Wave:
        """Read samples that do not lie in the file as they are: (t,) or (t, channels), int16 or float32."""
        number = int(self._file[row])
        key = key_of(self.table.column("filename")[row], self._whole[number])
        with self._open.lock, _damage_of(self._paths[number]):
            dataset = self._handle(number)[key]
            samples = dataset[:, start:stop].T if layout.channels_first else dataset[start:stop]
        wave: Wave = samples.astype(np.int16 if layout.dtype.kind == "i" else np.float32, order="C")
        return wave

    def _handle(self, number: int) -> h5py.File:
        """Return a file of the pack, open in this process; the lock is held."""
        place = os.getpid(), number
        if place not in self._open.handles:
            self._open.handles[place] = _opened(self._paths[number])
        return self._open.handles[place]


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except Exception as error:  # HDF5 fails in many ways on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise PackError(f"cannot read {path}: it is not an HDF5 file, or it is cut short ({reason})") from error


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn whatever HDF5 raises on a damaged file into an error that names it."""
    try:
        yield
    except PackError:
        raise
    except Exception as error:
        raise PackError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _check_table(table: Path) -> None:
    """Warn if a table is not the one that packing wrote, whose digest lies beside it."""
    beside = digest_path(table)
    if not beside.is_file():
        return
    written = beside.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
    if written != hashlib.sha256(table.read_bytes()).hexdigest():
        logger.warning(
            "%s is not as `ced pack` wrote it: if nobody edited it, it is damaged (remove %s to accept it)",
            *(table, beside),
        )


def _average(frames: Wave) -> Wave:
    """Average channels, (t, channels) -> (t,) of the same type."""
    mean = frames[:, 0].astype(np.float32)
    for channel in range(1, frames.shape[1]):
        mean += frames[:, channel]
    mean /= frames.shape[1]
    return np.rint(mean).astype(np.int16) if frames.dtype == np.int16 else mean


def _resolve(path: str, table: Path) -> Path:
    """Find a file of a pack from what its table says."""
    folders = [Path.cwd(), *table.absolute().parents]
    beside = folders[1].parent / "hdf5" / Path(path).name
    for candidate in (*(folder / path for folder in folders), beside):
        if candidate.is_file():
            return candidate
    places = f"the working directory, {folders[1]} and above, {beside.parent}"
    raise PackError(f"pack {table} lacks its file {path}; looked for in {places}")
