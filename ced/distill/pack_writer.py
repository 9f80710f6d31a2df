"""Make audio packs: many clips in a few HDF5 files, so that training reads 16 kHz samples without decoding.

A pack is a table with a row a clip, `labels/<stem>.tsv`, and the files that its column `hdf5path` names,
`hdf5/<stem>_<i>.h5` (see `pack_format`). File i holds the clips of the table's rows from i * size_per_file on. Clips
that could not be read have no row; they are listed in `labels/<stem>.failed.tsv`. `labels/<stem>.tsv.sha256` has the
digest of the table, as `sha256sum` writes and checks it.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ced.distill.pack_format import DType, Outcome, Part, Settings, outcomes_of, write
from ced.environment import cores
from ced.errors import ConfigError, PackError, WriteError
from ced.files import claimed, remove_leftovers, written_aside
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.tables import read_table, write_table
from ced.text import quoted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackReport:
    """What became of a table of clips."""

    index: Path
    failures: Path | None  # the table that lists them, if there are any
    packed: int
    failed: tuple[tuple[str, str], ...]  # filename, reason
    parts: int
    kept: int  # parts that were complete before


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

    The result does not depend on `workers`. After an interruption it can be called again: parts that are complete,
    made from the same rows with the same settings and not older than their clips are kept, and the end is the same,
    byte for byte. The index is written last: where there is one, its pack is complete.

    Args:
        table_path: a table with a clip a row; relative filenames start from the working directory.
        outdir: where the folders `hdf5_dirname` and `index_dirname` go.
        size_per_file: rows of the table a part.
        workers: threads that decode; None: one a processor.
        duration: add the column `duration`, seconds, to the index.
        hdf5_dirname: folder of the parts.
        index_dirname: folder of the index.
        filename_column: the column with the clips' paths; the index has it as `filename`.
        fullname: name datasets by the whole filename instead of the base name.
        stereo: keep the channels of two-channel clips; any other number is averaged all the same.
        delimiter: of the table.
        dtype: of the samples; floats are scaled by 32768, rounded and clipped to become int16.
        progress: told of each clip.

    Raises:
        TableError: the table cannot be read, lacks the column, or has no rows.
        PackError: two rows have one name, no clip could be read, or the index would overwrite the table.
        ConfigError: an option is out of range.
        BusyError: another process is making this pack.
    """
    workers = cores() if workers is None else workers
    if size_per_file < 1 or workers < 1:
        raise ConfigError(f"size_per_file is {size_per_file}, workers {workers}; both must be at least 1")
    if dtype not in ("int16", "float32"):
        raise ConfigError(f"dtype is {dtype!r}; expected int16 or float32")
    table = read_table(table_path, delimiter, required=(filename_column,))
    filenames, stem, settings = table.column(filename_column), table.path.stem, Settings(dtype, stereo, fullname)
    _check_names(filenames, settings, table.path)
    index = Path(outdir, index_dirname, f"{stem}.tsv")
    if index.resolve() == table.path.resolve():
        raise PackError(f"the index of the pack would overwrite its own table {table.path}; name another folder")
    parts = [
        Part(Path(outdir, hdf5_dirname, f"{stem}_{number}.h5"), filenames[start : start + size_per_file], settings)
        for number, start in enumerate(range(0, len(filenames), size_per_file))
    ]
    try:
        outcomes, kept = _write_parts(parts, index, workers, progress)
    except WriteError:
        raise
    except OSError as error:
        raise PackError(f"cannot write the pack to {outdir}: {error}") from error
    _note_leftovers(parts, stem)
    columns = table.columns | {"filename": filenames}
    if duration:
        columns["duration"] = ["" if isinstance(got, str) else f"{got / SAMPLE_RATE:.4f}" for got in outcomes]
    columns |= {"hdf5path": [str(part.path) for part in parts for _ in part.filenames]}
    return _write_index(index, columns, outcomes, len(parts), kept)


def _write_parts(parts: Sequence[Part], index: Path, workers: int, progress: Progress) -> tuple[list[Outcome], int]:
    """Write the parts that are not complete; return what became of each clip, and how many parts were complete."""
    outcomes: list[Outcome] = []
    kept = 0
    total = sum(len(part.filenames) for part in parts)
    for folder in (parts[0].path.parent, index.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with claimed(index), ThreadPoolExecutor(workers, thread_name_prefix="decoder") as pool:
        for part in parts:
            if (before := outcomes_of(part)) is not None:
                kept += 1
                outcomes += before
                progress("pack", len(outcomes), total)
                continue
            digest_path(index).unlink(missing_ok=True)
            index.unlink(missing_ok=True)
            remove_leftovers(part.path)
            # A pack can be made again, so it does not wait for the disk.
            with written_aside(part.path, sync=False) as aside:
                for outcome in write(part, aside, pool, workers):
                    outcomes.append(outcome)
                    progress("pack", len(outcomes), total)
    return outcomes, kept


def _write_index(
    index: Path, columns: dict[str, list[str]], outcomes: list[Outcome], parts: int, kept: int
) -> PackReport:
    """Write the tables of a pack: what failed, then the rest."""
    failed = [(name, why) for name, why in zip(columns["filename"], outcomes, strict=True) if isinstance(why, str)]
    failures = index.with_name(f"{index.stem}.failed.tsv")
    if failed:
        names, reasons = zip(*failed, strict=True)
        write_table(failures, {"filename": names, "reason": reasons})
    else:
        failures.unlink(missing_ok=True)
    if len(failed) == len(outcomes):
        raise PackError(f"none of {len(failed)} clips could be read; the first: {failed[0][1]} (all: {failures})")
    packed = [row for row, outcome in enumerate(outcomes) if isinstance(outcome, int)]
    digest_path(index).unlink(missing_ok=True)
    write_table(index, {name: [column[row] for row in packed] for name, column in columns.items()})
    with written_aside(digest_path(index)) as path:
        path.write_text(f"{hashlib.sha256(index.read_bytes()).hexdigest()}  {index.name}\n", encoding="utf-8")
    return PackReport(index, failures if failed else None, len(packed), tuple(failed), parts, kept)


def digest_path(index: Path) -> Path:
    """Return where the digest of a pack's table is."""
    return index.with_name(f"{index.name}.sha256")


def _check_names(filenames: Sequence[str], settings: Settings, table: Path) -> None:
    """Refuse two clips with one name."""
    rows: dict[str, int] = {}
    for row, filename in enumerate(filenames):
        key = settings.key(filename)
        if (first := rows.setdefault(key, row)) != row:
            hint = "" if settings.fullname else "; rename one, or name clips by their whole filename (--fullname)"
            both = f"{quoted(filenames[first])} (row {first + 1}) and {quoted(filename)} (row {row + 1})"
            raise PackError(f"two clips of {table} have the name {quoted(key)}: {both}{hint}")


def _note_leftovers(parts: Sequence[Part], stem: str) -> None:
    """Say which files look like parts of this pack, but are of an earlier one with more of them."""
    number = re.compile(re.escape(stem) + r"_(\d+)\.h5")
    mine = {part.path for part in parts}
    for path in sorted(parts[0].path.parent.iterdir()):
        if number.fullmatch(path.name) and path not in mine:
            logger.warning("%s is not part of this pack any more and can be deleted", path)
