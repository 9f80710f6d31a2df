"""Read audio packs: the samples of a clip straight from their place in the file."""

import hashlib
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from ced.sound.reading import mean_of_channels
from ced.sound.tables import missing_column, parse_labels, read_batches
from ced.text import quoted

logger = logging.getLogger(__name__)

_TEXT = pa.large_string()


class _OpenFiles:
    """The files of a pack that a process has open; they are not part of a pickle."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.maps: dict[int, mmap.mmap] = {}  # by the number of the file
        self.handles: dict[tuple[int, int], h5py.File] = {}  # by process and file: a handle does not survive a fork

    def __reduce__(self) -> tuple[type["_OpenFiles"], tuple[()]]:
        return _OpenFiles, ()


class AudioPack:
    """The clips of a pack, by the rows of its table.

    Several threads may read at once; training does. Forks and copies by pickle can read too, as the workers of torch's
    DataLoader do: they share what is known about the files, and each process opens them when it reads.

    What is kept of each row are a few bytes in arrays; Python objects for millions of clips would take gigabytes.
    """

    path: Path  # of the table

    def __init__(self, table: str | os.PathLike[str]) -> None:
        """Read the table of a pack; its files are opened when the first of their clips is needed.

        A table that does not have the digest which packing wrote beside it is read with a warning: it was edited, or it
        is damaged.

        Args:
            table: has the columns `filename` and `hdf5path`. A relative path starts from the working directory, else
                from the table's folder or one above it, else its file is in the folder `hdf5` beside the table's.

        Raises:
            TableError: the table cannot be read, lacks a column, has no rows, or has a name that is not UTF-8.
            PackError: a file of the pack is missing.
        """
        self.path = Path(table)
        read = _read_table(self.path)
        self._columns, self._file, self._filenames, self._labels = read.columns, read.file, read.filenames, read.labels
        self._paths = [_resolve(path, self.path) for path in read.paths]
        # Whole filenames are unique if base names are.
        self._ambiguous = self._ambiguous_names() if read.repeated else frozenset[str]()
        self._check_digest()
        rows = len(self._file)
        # Of each row, known once its file was indexed.
        self._samples = np.full(rows, -1)
        self._offsets = np.zeros(rows, np.int64)  # of the first byte; -1: read by HDF5
        self._layouts = np.zeros(rows, np.int16)  # index into `_kinds`
        self._kinds: list[SampleLayout] = []
        self._checked = np.zeros(rows, np.bool_)  # whose samples were compared with their checksum
        self._whole: dict[int, bool] = {}  # file: whether it names clips by whole filenames
        self._open = _OpenFiles()

    def _base_names(self) -> pa.ChunkedArray:
        return pc.replace_substring_regex(self._filenames, pattern="(?s)^.*/", replacement="")

    def _ambiguous_names(self) -> frozenset[str]:
        """Return the base names and whole filenames that rows of different clips have in common."""
        columns = self._filenames, self._base_names()
        codes = [names.combine_chunks().dictionary_encode().indices.to_numpy() for names in columns]
        found: set[str] = set()
        for names, code in zip(columns, codes, strict=True):
            first = np.unique(code, return_index=True)[1][code]  # of each row: the first row with its name
            other = np.flatnonzero((codes[0] != codes[0][first]) | (self._file != self._file[first]))
            found.update(names.take(pa.array(other)).to_pylist())
        return frozenset(found)

    def _check_digest(self) -> None:
        """Warn if the table is not the one that packing wrote, whose digest is beside it."""
        beside = digest_path(self.path)
        if not beside.is_file():
            return
        expected = beside.read_text(encoding="utf-8", errors="replace").partition(" ")[0]
        with self.path.open("rb") as file:
            if expected == hashlib.file_digest(file, "sha256").hexdigest():
                return
        logger.warning(
            "%s is not as `ced pack` wrote it: if nobody edited it, it is damaged (remove %s to accept it)",
            *(self.path, beside),
        )

    def __len__(self) -> int:
        return len(self._file)

    def filename(self, row: int) -> str:
        """Return the filename of a clip, as it is in the table."""
        return str(self._filenames[row])

    def names(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.object_]:
        """Return the names of clips, (n,) str: base names, or whole filenames where base names are not unique.

        Args:
            rows: (n,); None: all.
        """
        names = self._base_names()
        if self._ambiguous and pc.any(pc.is_in(names, pa.array(self._ambiguous, _TEXT))).as_py():
            names = self._filenames
        # All of them, so that a row that occurs often has one object.
        found: NDArray[np.object_] = names.to_numpy()
        return found if rows is None else found[rows]

    def find(self, names: Sequence[str] | NDArray[np.object_]) -> NDArray[np.int64]:
        """Return the rows of n clips by their base names or whole filenames, (n,).

        Raises:
            PackError: there is no clip of that name, or more than one.
        """
        try:
            wanted = pa.array(names, _TEXT)
        except UnicodeEncodeError as error:
            missing = next(str(name) for name in names if not _is_utf8(name))
            raise PackError(f"pack {self.path} has no clip {quoted(missing)}") from error
        base_names = self._base_names()
        rows = pc.index_in(wanted, base_names, skip_nulls=True)
        if rows.null_count:
            rows = pc.coalesce(rows, pc.index_in(wanted, self._filenames, skip_nulls=True))
        if rows.null_count:
            missing = str(names[int(rows.is_null().to_numpy(zero_copy_only=False).argmax())])
            raise PackError(f"pack {self.path} has no clip {quoted(missing)}")
        for name in names if self._ambiguous else ():
            if name in self._ambiguous:
                same = pc.or_(pc.equal(base_names, name), pc.equal(self._filenames, name))
                both = " and ".join(str(row + 1) for row in np.flatnonzero(same)[[0, -1]])
                raise PackError(f"pack {self.path} has more than one clip {quoted(name)}: rows {both}")
        found: NDArray[np.int64] = rows.to_numpy().astype(np.int64)
        return found

    def labels(self, num_classes: int) -> list[tuple[int, ...]]:
        """Return the class indices of each clip, from the column `labels`; see `tables.parse_labels`.

        Raises:
            TableError: there is no such column, or a label is not one of 0 ... num_classes - 1.
        """
        if "labels" not in self._columns:
            raise missing_column(self.path, "labels", self._columns)
        return parse_labels(self._labels.to_numpy().tolist(), num_classes, self.path)

    def samples(self, row: int) -> int:
        """Return the length of a clip.

        Raises:
            PackError: the file of the clip cannot be read, or lacks one of its clips.
        """
        if self._samples[row] < 0:
            self._index(int(self._file[row]))
        return int(self._samples[row])

    def lengths(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the number of samples of clips, (n,).

        Args:
            rows: (n,); None: all.

        Raises:
            PackError: as for `samples`.
        """
        for number in np.unique(self._file if rows is None else self._file[rows]).tolist():
            self._index(number)
        return self._samples.copy() if rows is None else self._samples[rows]

    def read(self, row: int, start: int, stop: int) -> Wave:
        """Return the samples from `start` to before `stop` of a clip, its channels averaged.

        The first time, the whole clip is compared with its checksum, if it has one.

        Returns:
            (stop - start,) int16 (full scale 32768) or float32, as packed; read-only if it is a view of the file.

        Raises:
            PackError: the clip is shorter, it is damaged, or as for `samples`.
        """
        samples = self.samples(row)
        if not 0 <= start <= stop <= samples:
            raise PackError(f"clip {quoted(self.filename(row))} has {samples} samples, not {start} to {stop}")
        number, layout, offset = int(self._file[row]), self._kinds[self._layouts[row]], int(self._offsets[row])
        if not self._checked[row]:
            self._check(row, number, layout, offset, samples)
        if offset < 0:
            wave = self._slice(row, layout, start, stop)
        else:
            # A view of the mapped file takes half the time of a copy, and does not involve HDF5.
            data = self._open.maps.get(number) or self._map(number)
            wave = np.frombuffer(data, layout.dtype, (stop - start) * layout.channels, offset + start * layout.frame)
        return wave if layout.channels == 1 else _average(wave.reshape(-1, layout.channels))

    def _check(self, row: int, number: int, layout: SampleLayout, offset: int, samples: int) -> None:
        """Compare the samples of a clip with their checksum, if it has one.

        Raises:
            PackError: they differ.
        """
        key = key_of(self.filename(row), self._whole[number])
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
                    f"{self._paths[number]} is damaged: clip {quoted(self.filename(row))} does not have its checksum;"
                    " remove the file and run `ced pack` again"
                )
        self._checked[row] = True

    def _index(self, number: int) -> None:
        """Find all clips of a file that the table names, unless this was done before."""
        path = self._paths[number]
        with self._open.lock:
            rows = np.flatnonzero(self._file == number)
            if self._samples[rows[0]] >= 0:
                return
            filenames: list[str] = self._filenames.take(pa.array(rows)).to_pylist()
            locations: list[ClipLocation] = []
            size = path.stat().st_size
            with _opened(path) as file, _damage_of(path):
                index = ClipIndex(file)
                self._whole[number] = index.named_whole(filenames)
                for row, filename in zip(rows.tolist(), filenames, strict=True):
                    found = index.locate(key_of(filename, self._whole[number]))
                    if found is None:
                        raise PackError(f"{path} lacks clip {quoted(filename)}, row {row + 1} of {self.path}")
                    if found.offset is not None and found.offset + found.samples * found.layout.frame > size:
                        raise PackError(f"{path} is cut short: clip {quoted(filename)} is beyond its end")
                    locations.append(found)
            layouts, samples, offsets = zip(*locations, strict=True)
            self._kinds += set(layouts) - set(self._kinds)
            self._layouts[rows] = [self._kinds.index(layout) for layout in layouts]
            self._offsets[rows] = [-1 if offset is None else offset for offset in offsets]
            self._samples[rows] = samples  # last, as other threads take it to mean that the file is indexed

    def _map(self, number: int) -> mmap.mmap:
        with self._open.lock, open(self._paths[number], "rb") as file:
            data = self._open.maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data

    def _slice(self, row: int, layout: SampleLayout, start: int, stop: int) -> Wave:
        """Read samples by HDF5, if their bytes cannot be used as they are: (t,) or (t, channels), int16 or float32."""
        number = int(self._file[row])
        key = key_of(self.filename(row), self._whole[number])
        with self._open.lock, _damage_of(self._paths[number]):
            dataset = self._handle(number)[key]
            samples = dataset[:, start:stop].T if layout.channels_first else dataset[start:stop]
        wave: Wave = samples.astype(np.int16 if layout.dtype.kind == "i" else np.float32, order="C")
        return wave

    def _handle(self, number: int) -> h5py.File:
        """Return a file of the pack, open in this process; the caller holds the lock."""
        place = os.getpid(), number
        if place not in self._open.handles:
            self._open.handles[place] = _opened(self._paths[number])
        return self._open.handles[place]


class _TableOfPack(NamedTuple):
    """What is needed of the table of a pack, in a compact form."""

    columns: tuple[str, ...]  # all names
    file: NDArray[np.int32]  # (n,) number of the file of each row
    paths: tuple[str, ...]  # of the files
    filenames: pa.ChunkedArray  # (n,)
    labels: pa.ChunkedArray  # (n,); empty without this column
    repeated: bool  # whether a base name may occur more than once


def _read_table(path: Path) -> _TableOfPack:
    """Read the table of a pack.

    Raises:
        TableError: as for `AudioPack`.
    """
    columns: tuple[str, ...] = ()
    numbers: dict[str, int] = {}  # of the files, by their paths
    files: list[NDArray[np.int32]] = []
    hashes: list[NDArray[np.int64]] = []  # of the base names
    texts: dict[str, list[pa.LargeStringArray]] = {"filename": [], "labels": []}
    for batch in read_batches(path, required=("filename",)):
        columns = tuple(batch.columns)
        if "hdf5path" not in columns:
            raise TableError(f"table {path} has no column 'hdf5path'", hint="`ced pack` makes a pack, and its table")
        paths, rows_before = batch.column("hdf5path"), sum(map(len, files))
        for name in dict.fromkeys(paths):
            numbers.setdefault(name, len(numbers))
        files.append(np.fromiter(map(numbers.__getitem__, paths), np.int32, len(paths)))
        hashes.append(np.array([hash(name.rpartition("/")[2]) for name in batch.column("filename")], np.int64))
        for name in texts.keys() & batch.columns.keys():
            texts[name].append(_strings(path, name, batch.column(name), rows_before))
    return _TableOfPack(
        columns,
        np.concatenate(files),
        tuple(numbers),
        pa.chunked_array(texts["filename"], _TEXT),
        pa.chunked_array(texts["labels"], _TEXT),
        _repeated(np.concatenate(hashes)),
    )


def _strings(path: Path, column: str, values: list[str], rows_before: int) -> pa.LargeStringArray:
    """Return a column of a batch of a table as an array.

    Raises:
        TableError: a value is not UTF-8.
    """
    try:
        return pa.array(values, _TEXT)
    except UnicodeEncodeError as error:
        number = next(number for number, value in enumerate(values) if not _is_utf8(value))
        raise TableError(
            f"table {path}, row {rows_before + number + 1}: {column} {values[number]!r} is not UTF-8, which "
            "names in HDF5 files must be"
        ) from error


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _repeated(hashes: NDArray[np.int64]) -> bool:
    """Return whether a value occurs more than once."""
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except Exception as error:  # HDF5 fails in many ways on a damaged file
        reason = " ".join(str(error).split())[:200]
        raise PackError(f"cannot read {path}: it is not an HDF5 file, or it is cut short ({reason})") from error


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Turn any error of HDF5 on a damaged file into one that names the file."""
    try:
        yield
    except PackError:
        raise
    except Exception as error:
        raise PackError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _average(frames: Wave) -> Wave:
    """Average channels, (t, channels) -> (t,) of the same type."""
    mean = mean_of_channels(frames)
    return np.rint(mean).astype(np.int16) if frames.dtype == np.int16 else mean


def _resolve(path: str, table: Path) -> Path:
    """Return where a file of a pack is, by its path in the table.

    Raises:
        PackError: it is in none of the places.
    """
    folders = [Path.cwd(), *table.absolute().parents]
    beside = folders[1].parent / "hdf5" / Path(path).name
    for candidate in (*(folder / path for folder in folders), beside):
        if candidate.is_file():
            return candidate
    places = f"the working directory, {folders[1]} and above, {beside.parent}"
    raise PackError(f"pack {table} lacks its file {path}; looked for in {places}")
