"""Read audio packs: the samples of a clip straight from their place in the file."""

import mmap
import os
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ced.distill.packfile import Place, Wave, places_in
from ced.distill.packing import PackReport, pack
from ced.distill.tables import Table, read_table
from ced.errors import PackError

__all__ = ["PackReport", "WavPack", "Wave", "pack"]


class WavPack:
    """The clips of a pack, by the rows of its table.

    Several threads may read at once. It can be pickled: open files stay behind, what is known about them goes along.
    """

    table: Table
    names: list[str]  # of each row: the clip's base name, or its whole filename if base names are not unique

    def __init__(self, table: str | os.PathLike[str]) -> None:
        """Read the table of a pack; its files are opened when the first of their clips is asked for.

        Args:
            table: has the columns `filename` and `hdf5path`. A relative path starts from the working directory, else
                from the table's folder or one above it, else its file is in the folder `hdf5` beside the table's.

        Raises:
            TableError: the table cannot be read, lacks a column, or has no rows.
            PackError: a file of the pack is missing.
        """
        self.table = read_table(table, required=("filename", "hdf5path"))
        paths = self.table.column("hdf5path")
        numbers = {path: number for number, path in enumerate(dict.fromkeys(paths))}
        self._paths = [_resolve(path, self.table.path) for path in numbers]
        self._file = [numbers[path] for path in paths]  # of each row
        self._rows_in: list[list[int]] = [[] for _ in self._paths]  # of each file
        for row, number in enumerate(self._file):
            self._rows_in[number].append(row)
        self._places: list[Place | None] = [None] * len(self.table)  # of each row, once its file was looked into
        self._name_rows()
        self._close()

    def _name_rows(self) -> None:
        filenames = self.table.column("filename")
        bases = [os.path.basename(filename) for filename in filenames]
        self._rows: dict[str, int] = {}
        self._ambiguous: dict[str, int] = {}  # name: another row that has it
        for names in (filenames, bases):
            for row, name in enumerate(names):
                first = self._rows.setdefault(name, row)
                if first != row and (filenames[first], self._file[first]) != (filenames[row], self._file[row]):
                    self._ambiguous[name] = row
        self.names = bases if self._ambiguous.keys().isdisjoint(bases) else filenames

    def _close(self) -> None:
        self._lock = threading.Lock()
        self._maps: list[mmap.mmap | None] = [None] * len(self._paths)
        self._handles: dict[int, h5py.File] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_maps", "_handles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._close()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, name: str) -> int:
        """Return the row of the clip with a base name or whole filename.

        Raises:
            PackError: there is none, or more than one.
        """
        row = self._rows.get(name)
        if row is None:
            raise PackError(f"pack {self.table.path} has no clip {name}")
        if name in self._ambiguous:
            both = f"rows {row + 1} and {self._ambiguous[name] + 1}"
            raise PackError(f"pack {self.table.path} has more than one clip {name}: {both}")
        return row

    def samples(self, row: int) -> int:
        """Return the length of a clip.

        Raises:
            PackError: the file of the clip cannot be read, or lacks one of its clips.
        """
        return (self._places[row] or self._look_up(row)).samples

    def read(self, row: int, start: int, stop: int) -> Wave:
        """Return the samples from `start` to before `stop` of a clip, its channels averaged.

        Returns:
            (stop - start,) int16 (full scale 32768) or float32, as packed; read-only where it is a view of the file.

        Raises:
            PackError: the clip is shorter, or as for `samples`.
        """
        place = self._places[row] or self._look_up(row)
        if not 0 <= start <= stop <= place.samples:
            raise PackError(f"clip {self.names[row]} has {place.samples} samples, not {start} to {stop}")
        if place.offset is None:
            wave = self._slice(row, place, start, stop)
        else:
            # A view of the mapped file: half the time of copying it, and nothing of HDF5 on the way.
            number = self._file[row]
            first = place.offset + start * place.channels * place.dtype.itemsize
            data = self._maps[number] or self._map(number)
            wave = np.frombuffer(data, place.dtype, (stop - start) * place.channels, first)
        return wave if place.channels == 1 else _average(wave.reshape(-1, place.channels))

    def _look_up(self, row: int) -> Place:
        """Look into the file of a row, for all rows it has."""
        number = self._file[row]
        path, rows, filenames = self._paths[number], self._rows_in[number], self.table.column("filename")
        with self._lock:
            if (found := self._places[row]) is not None:  # by another thread, meanwhile
                return found
            size = path.stat().st_size
            known: dict[int, Place] = {}
            with _open(path) as file:
                places = places_in(file, (filenames[other] for other in rows))
                for other, place in zip(rows, places, strict=True):
                    if place is None:
                        raise PackError(f"{path} lacks clip {self.names[other]}, row {other + 1} of {self.table.path}")
                    if place.offset is not None and place.offset + place.bytes > size:
                        raise PackError(f"{path} is cut short: clip {self.names[other]} lies beyond its end")
                    known[other] = place
            for other, place in known.items():
                self._places[other] = place
        return known[row]

    def _map(self, number: int) -> mmap.mmap:
        with self._lock, open(self._paths[number], "rb") as file:
            data = self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data

    def _slice(self, row: int, place: Place, start: int, stop: int) -> Wave:
        """Read samples that do not lie in the file as they are: (t,) or (t, channels), int16 or float32."""
        number = self._file[row]
        with self._lock:
            if self._process != os.getpid():  # a handle does not survive a fork
                self._handles, self._process = {}, os.getpid()
            if number not in self._handles:
                self._handles[number] = _open(self._paths[number])
            dataset = self._handles[number][place.key]
            samples = dataset[:, start:stop].T if place.channels_first else dataset[start:stop]
        wave: Wave = samples.astype(np.int16 if place.dtype.kind == "i" else np.float32, order="C")
        return wave


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise PackError(f"cannot read {path}: it is no HDF5 file, or cut short ({error})") from error


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
