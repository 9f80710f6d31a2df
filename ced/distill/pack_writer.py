"""Make audio packs: many clips in a few HDF5 files, so that training reads 16 kHz samples without decoding.

A pack is a table with one row for each clip, `labels/<stem>.tsv`, and the files that its column `hdf5path` names,
`hdf5/<stem>_<i>.h5` (see `pack_format`). File i holds the clips of the rows from i * size_per_file on. Clips that could
not be read have no row; they are listed in `labels/<stem>.failed.tsv`. `labels/<stem>.tsv.sha256` has the SHA-256 of
the table, in the format of `sha256sum`.
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from ced import remote
from ced.distill.pack_format import ClipIndex, DType, Outcome, PackSettings, Wave, digest_path, write_file
from ced.environment import cores
from ced.errors import AudioError, ConfigError, PackError, WriteError
from ced.files import claimed, remove_leftovers, written_aside
from ced.parallel import attempts
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE, load_stored
from ced.sound.decode import FULL_SCALE, to_float
from ced.sound.shards import split_member
from ced.sound.tables import read_table, write_table
from ced.text import quoted

logger = logging.getLogger(__name__)

_AHEAD = 3  # clips that each thread decodes beyond those it is working on


@dataclass(frozen=True)
class PackReport:
    """The result of packing a table of clips."""

    index: Path
    failures: Path | None  # the table that lists the clips that failed, if there are any
    packed: int
    failed: tuple[tuple[str, str], ...]  # filename, reason
    parts: int
    kept: int  # files that were complete before


@dataclass(frozen=True)
class PackFile:
    """One HDF5 file of a pack that is being made, with the clips that go into it."""

    path: Path
    filenames: Sequence[str]
    settings: PackSettings


def pack(
    table_path: str | os.PathLike[str],
    outdir: str | os.PathLike[str],
    *,
    size_per_file: int = 50_000,
    workers: int | None = None,
    duration: bool = False,
    hdf5_dirname: str = "hdf5",
    index_dirname: str = "labels",
    filename_column: str = "filename",
    fullname: bool = False,
    stereo: bool = False,
    delimiter: str = "\t",
    dtype: DType = "int16",
    progress: Progress = silent,
) -> PackReport:
    """Pack the clips of a table.

    The result does not depend on `workers`. After an interruption the call can be repeated: files that are complete,
    made from the same rows with the same settings and not older than their clips are kept, and the result has the same
    bytes as that of an uninterrupted call. The table of the pack is written last, so where it exists, its pack is
    complete.

    Args:
        table_path: a table with one clip a row; relative filenames start from the working directory.
        outdir: where the folders `hdf5_dirname` and `index_dirname` are made.
        size_per_file: rows of the table for each HDF5 file.
        workers: threads that decode; None: one for each processor.
        duration: add the column `duration`, in seconds, to the table of the pack.
        hdf5_dirname: folder of the HDF5 files.
        index_dirname: folder of the table of the pack.
        filename_column: the column with the paths of the clips; in the table of the pack it is named `filename`.
        fullname: name datasets by the whole filename instead of the base name.
        stereo: keep the channels of two-channel clips; any other number of channels is averaged.
        delimiter: of the table.
        dtype: of the samples; for int16, floats are scaled by 32768, rounded and clipped.
        progress: called after each clip.

    Raises:
        TableError: the table cannot be read, lacks the column, or has no rows.
        PackError: two rows have one name, no clip could be read, or `table_path` would be overwritten.
        ConfigError: an option is out of range.
        BusyError: another process is making this pack.
    """
    workers = cores() if workers is None else workers
    if size_per_file < 1 or workers < 1:
        raise ConfigError(f"size_per_file is {size_per_file}, workers {workers}; both must be at least 1")
    if dtype not in ("int16", "float32"):
        raise ConfigError(f"dtype is {dtype!r}; expected int16 or float32")
    if (address := remote.address_of(outdir)) is not None:
        raise ConfigError(f"a pack is written to local files, which training maps into memory; got {address}")
    table = read_table(table_path, delimiter, required=(filename_column,))
    filenames, stem, settings = table.column(filename_column), table.path.stem, PackSettings(dtype, stereo, fullname)
    _check_names(filenames, settings, table.path)
    index = Path(outdir, index_dirname, f"{stem}.tsv")
    if index.resolve() == table.path.resolve():
        raise PackError(f"the index of the pack would overwrite its own table {table.path}; name another folder")
    files = [
        PackFile(Path(outdir, hdf5_dirname, f"{stem}_{number}.h5"), filenames[start : start + size_per_file], settings)
        for number, start in enumerate(range(0, len(filenames), size_per_file))
    ]
    try:
        outcomes, kept = _write_files(files, index, workers, progress)
    except WriteError:
        raise
    except OSError as error:
        raise PackError(f"cannot write the pack to {outdir}: {error}") from error
    _warn_of_old_files(files, stem)
    columns = table.columns | {"filename": filenames}
    if duration:
        columns["duration"] = ["" if one.failure else f"{one.samples / SAMPLE_RATE:.4f}" for one in outcomes]
    columns |= {"hdf5path": [str(file.path) for file in files for _ in file.filenames]}
    return _write_index(index, columns, outcomes, len(files), kept)


def _write_files(files: Sequence[PackFile], index: Path, workers: int, progress: Progress) -> tuple[list[Outcome], int]:
    """Write the files that are not complete; return the outcome of each clip, and how many files were complete."""
    outcomes: list[Outcome] = []
    kept = 0
    total = sum(len(file.filenames) for file in files)
    for folder in (files[0].path.parent, index.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with claimed(index):
        for file in files:
            if (before := _complete(file)) is not None:
                kept += 1
                outcomes += before
                progress("pack", len(outcomes), total)
                continue
            digest_path(index).unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            remove_leftovers(file.path)
            # A pack can be made again, so there is no need to wait for the disk.
            with written_aside(file.path, sync=False) as aside:
                for outcome in _written(file, aside, workers):
                    outcomes.append(outcome)
                    progress("pack", len(outcomes), total)
    return outcomes, kept


def _written(file: PackFile, path: Path, workers: int) -> Iterator[Outcome]:
    """Write a file of a pack to `path`, and yield the outcome of each of its clips.

    Threads only decode; clips are written in this one, in their order, so the bytes do not depend on the threads.
    """
    decode = partial(decode_clip, settings=file.settings)
    waves = attempts(decode, file.filenames, workers, name=str, ahead=_AHEAD * workers)
    return write_file(path, file.filenames, waves, file.settings)


def decode_clip(filename: str, settings: PackSettings) -> Wave:
    """Return the samples of a clip as they are stored, (t,) or (t, 2).

    Raises:
        AudioError: it cannot be read, or its name cannot be the name of a dataset.
    """
    try:
        filename.encode()
    except UnicodeEncodeError as error:
        raise AudioError(
            f"the name of {filename} is not UTF-8, which names in HDF5 files must be; rename the file"
        ) from error
    samples = load_stored(filename, settings.stereo)
    return to_int16(samples) if settings.dtype == "int16" else to_float(samples)


def to_int16(samples: Wave) -> NDArray[np.int16]:
    """Scale floats to int16 full scale, round and clip them; int16 stays as it is."""
    if samples.dtype == np.int16:
        return samples.astype(np.int16, copy=False)
    scaled = samples * np.float32(FULL_SCALE)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled)
    return scaled.astype(np.int16)


def _complete(file: PackFile) -> list[Outcome] | None:
    """Return the outcomes of a file that is complete, or None if it has to be written (again).

    It has to be written if it does not exist, is damaged, was made from other clips or settings, is older than one of
    its clips, or lacks a clip that can be read now.
    """
    try:
        written = file.path.stat().st_mtime_ns
        with h5py.File(file.path, "r") as opened:
            if dict(opened.attrs) != file.settings.attributes(file.filenames):
                return None
            index = ClipIndex(opened)
            locations = [index.locate(file.settings.key(filename)) for filename in file.filenames]
    except Exception:  # HDF5 fails in many ways on a damaged file
        return None
    outcomes: list[Outcome] = []
    for filename, location in zip(file.filenames, locations, strict=True):
        if location is None:
            try:
                decode_clip(filename, file.settings)
            except AudioError as error:
                outcomes.append(Outcome(failure=error.message))
            else:
                return None
        elif _changed(filename) > written:
            return None
        else:
            outcomes.append(Outcome(location.samples))
    return outcomes


def _changed(filename: str) -> int:
    """Return when a clip was last changed, in ns; 0 if it no longer exists, as after packing it is not needed."""
    member = split_member(filename)
    place = filename if member is None else member[0]
    try:
        if (address := remote.address_of(place)) is not None:
            return remote.modified_ns(address)
        return os.stat(place).st_mtime_ns
    except (OSError, AudioError):
        return 0


def _write_index(
    index: Path, columns: dict[str, list[str]], outcomes: list[Outcome], parts: int, kept: int
) -> PackReport:
    """Write the table of the clips that failed, then that of the pack, then its digest."""
    failed = [(name, one.failure) for name, one in zip(columns["filename"], outcomes, strict=True) if one.failure]
    failures = index.with_name(f"{index.stem}.failed.tsv")
    if failed:
        names, reasons = zip(*failed, strict=True)
        write_table(failures, {"filename": names, "reason": reasons})
    else:
        failures.unlink(missing_ok=True)
    if len(failed) == len(outcomes):
        raise PackError(f"none of {len(failed)} clips could be read; the first: {failed[0][1]} (all: {failures})")
    packed = [row for row, outcome in enumerate(outcomes) if not outcome.failure]
    digest_path(index).unlink(missing_ok=True)
    write_table(index, {name: [column[row] for row in packed] for name, column in columns.items()})
    with written_aside(digest_path(index)) as path:
        path.write_text(f"{hashlib.sha256(index.read_bytes()).hexdigest()}  {index.name}\n", encoding="utf-8")
    return PackReport(index, failures if failed else None, len(packed), tuple(failed), parts, kept)


def _check_names(filenames: Sequence[str], settings: PackSettings, table: Path) -> None:
    """Refuse two clips with one name.

    Raises:
        PackError: there are two.
    """
    rows: dict[str, int] = {}
    for row, filename in enumerate(filenames):
        key = settings.key(filename)
        if (first := rows.setdefault(key, row)) != row:
            hint = "" if settings.fullname else "; rename one, or name clips by their whole filename (--fullname)"
            both = f"{quoted(filenames[first])} (row {first + 1}) and {quoted(filename)} (row {row + 1})"
            raise PackError(f"two clips of {table} have the name {quoted(key)}: {both}{hint}")


def _warn_of_old_files(files: Sequence[PackFile], stem: str) -> None:
    """Log which files belonged to an earlier pack of this name that had more files."""
    number = re.compile(re.escape(stem) + r"_(\d+)\.h5")
    current = {file.path for file in files}
    for path in sorted(files[0].path.parent.iterdir()):
        if number.fullmatch(path.name) and path not in current:
            logger.warning("%s is not part of this pack any more and can be deleted", path)
