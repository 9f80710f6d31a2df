"""The view store: the teachers' scores of each view of each chunk, and the seeds that reproduce the views.

A folder holds, for each epoch e = 1, 2, ... and each process r = 0, 1, ... that wrote it, `logits_ep<e>_<r>.h5` with
`topk_values` float16 (n, k), `topk_indexes` int16 (n, k) and `seeds` int32 (n), and beside it, row for row,
`logits_ep<e>_<r>.parquet` with `filename`, `start` and `end` (float32 seconds). meta.json holds the settings, the
SHA-256 of every file of every complete epoch, and its own; a published store has a meta.pt instead. Every file is made
in memory, written to a temporary file and renamed, the .h5 of a pair last, so a pair with an .h5 is complete.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ced.distill.published_store import read_meta_pt
from ced.distill.views import ViewRecipe
from ced.errors import StoreError, TableError
from ced.files import written_aside
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable, audioset

FORMAT_VERSION = 2
MEMBERS_VERSION = 3  # has `members`: only stores that need it, so that earlier releases read all others
_READ_VERSIONS = (1, FORMAT_VERSION, MEMBERS_VERSION)  # version 1 had no digests
META_NAME = "meta.json"
_DATASETS = ("topk_values", "topk_indexes", "seeds")
_LARGEST_UNPACKED = 1 << 30  # bytes of a compressed dataset; an epoch of AudioSet has 80 MB
_PART_NAME = re.compile(r"logits_ep(\d+)_(\d+)\.(?:h5|parquet)")
_SCHEMA = pa.schema([("filename", pa.large_string()), ("start", pa.float32()), ("end", pa.float32())])


@dataclass(frozen=True)
class StoreMeta:
    """How the views of a store were made; None where the store does not tell."""

    recipe: ViewRecipe
    topk: int
    num_classes: int
    chunk_length: float  # seconds
    teachers: tuple[str, ...]
    labels: ClassTable | None = None
    sample_rate: int = SAMPLE_RATE
    values: str = "probabilities"
    precision: str | None = None  # of the teachers' forward pass: fp32, fp16 or bf16
    weights: tuple[str, ...] | None = None  # fingerprint of each teacher's weights, "" where it has none
    # What is special about each teacher: what it takes, its weight in the mean, ...; None: nothing about any.
    members: tuple[Mapping[str, Any], ...] | None = None
    model_args: Mapping[str, Any] | None = None  # what was changed about the teachers
    seed: int | None = None
    batch_size: int | None = None
    world_size: int | None = None  # processes, and so parts an epoch
    rows: int | None = None  # an epoch
    chunks: str | None = None  # `dataset.fingerprint` of the chunks' names, times and audio
    # SHA-256 of each file of the complete epochs, by its name; None: the store was written without.
    digests: Mapping[str, str] | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Rows:
    """Stored views, one a row."""

    values: NDArray[np.float16]  # (n, k) probabilities, highest first
    indexes: NDArray[np.int16]  # (n, k) their classes
    seeds: NDArray[np.int32]  # (n,)
    filenames: NDArray[np.object_]  # (n,) str, the clips' names in their pack
    starts: NDArray[np.float32]  # (n,) seconds
    ends: NDArray[np.float32]  # (n,) seconds

    def __len__(self) -> int:
        return len(self.seeds)

    @staticmethod
    def concat(parts: "Sequence[Rows]") -> "Rows":
        """Join parts, the rows of the first before those of the second."""
        names = [field.name for field in dataclasses.fields(Rows)]
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def write_meta(folder: Path, meta: StoreMeta) -> None:
    """Write a store's meta.json; the folder is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    version = FORMAT_VERSION if meta.members is None else MEMBERS_VERSION
    content = {"format": "ced view store", "version": version, **dataclasses.asdict(meta)}
    if meta.members is None:
        del content["members"]
    content["digests"] = dict(sorted((meta.digests or {}).items()))
    content["sha256"] = _digest_of_meta(content)
    with written_aside(folder / META_NAME) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def add_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Add the digests of written files to a store's meta.json, which counts them as complete from then on."""
    meta = read_meta(folder)
    write_meta(folder, dataclasses.replace(meta, digests={**(meta.digests or {}), **digests}))


def _digest_of_meta(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> StoreMeta:
    """Read how a store was made, from its meta.json or, in a published store, its meta.pt.

    Raises:
        StoreError: there is neither, or it is damaged or of another format version.
    """
    path = folder / META_NAME
    if path.exists():
        return _read_meta_json(path)
    if (folder / "meta.pt").exists():
        published = read_meta_pt(folder / "meta.pt")
        labels = audioset()  # all published teachers have these classes
        return StoreMeta(
            published.recipe, published.topk, len(labels), published.chunk_length, published.teachers, labels
        )
    raise StoreError(f"{folder} is not a view store: it has neither {META_NAME} nor meta.pt")


def _read_meta_json(path: Path) -> StoreMeta:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, version = content["format"], content["version"]
        if kind != "ced view store" or version not in _READ_VERSIONS:
            known = ", ".join(map(str, _READ_VERSIONS))
            raise StoreError(f"{path} is {kind!r} version {version!r}; this program reads versions {known}")
        if version > 1 and content.pop("sha256") != _digest_of_meta(content):
            raise StoreError(f"{path} does not have the digest that it names: it is damaged, or was edited")
        del content["format"], content["version"]
        recipe = content.pop("recipe")
        labels = content.pop("labels")
        for name in ("teachers", "weights", "members"):
            content[name] = None if content.get(name) is None else tuple(content[name])
        return StoreMeta(
            recipe=ViewRecipe(**{**recipe, "shift": recipe["shift"] and tuple(recipe["shift"])}),
            labels=labels and ClassTable(tuple(labels["names"]), labels["mids"] and tuple(labels["mids"])),
            **content,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, TableError) as error:
        raise _damaged(path, error) from error


def difference(stored: StoreMeta, asked: StoreMeta) -> str | None:
    """Name the first setting in which two stores differ and its two values; None if there is none."""
    for one in dataclasses.fields(StoreMeta):
        before, now = getattr(stored, one.name), getattr(asked, one.name)
        if before != now and one.compare:
            if one.name in _DIFFERENCES:
                return _DIFFERENCES[one.name]
            return f"{one.name} was {_short(before)} and is now {_short(now)}"
    return None


_DIFFERENCES = {  # settings whose values would tell nobody anything
    "labels": "the class table differs",
    "weights": "the weights of a teacher differ",
    "chunks": "the audio differs, or the names of the clips do",
}


def _short(value: object) -> str:
    if isinstance(value, ViewRecipe):
        return f"(shift {value.shift}, time_mask {value.time_mask}, freq_mask {value.freq_mask})"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def epoch_seeds(seed: int, epoch: int, count: int) -> NDArray[np.int32]:
    """Draw the seeds of an epoch's views, (count,), the same for any number of processes."""
    numbers = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    return numbers.randint(0, 2**31, size=count, dtype=np.int64).astype(np.int32)


def part_path(folder: Path, epoch: int, rank: int) -> Path:
    """Return the .h5 of one epoch and process; its .parquet is beside it."""
    return folder / f"logits_ep{epoch}_{rank}.h5"


def part_complete(folder: Path, epoch: int, rank: int) -> bool:
    """Return whether both files of one epoch and process are there."""
    path = part_path(folder, epoch, rank)
    return path.exists() and path.with_suffix(".parquet").exists()


def write_part(folder: Path, epoch: int, rank: int, rows: Rows) -> dict[str, str]:
    """Write the rows of one epoch and process; the same rows give the same bytes.

    The files are made in memory: HDF5 drops the error of a full disk when it closes a file, and may crash.

    Returns:
        The SHA-256 of each file, by its name.

    Raises:
        WriteError: a file cannot be written; what was there before is as it was.
    """
    path = part_path(folder, epoch, rank)
    columns = [pa.array(rows.filenames, pa.large_string()), pa.array(rows.starts), pa.array(rows.ends)]
    table = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_SCHEMA), table, compression="zstd")
    contents = {path.with_suffix(".parquet"): table.getvalue().to_pybytes(), path: _hdf5_of(rows)}
    for target, content in contents.items():
        with written_aside(target) as aside:
            aside.write_bytes(content)
    return {target.name: hashlib.sha256(content).hexdigest() for target, content in contents.items()}


def _hdf5_of(rows: Rows) -> bytes:
    arrays = (rows.values.astype(np.float16), rows.indexes.astype(np.int16), rows.seeds.astype(np.int32))
    with h5py.File("in memory", "w", driver="core", backing_store=False) as file:
        for name, array in zip(_DATASETS, arrays, strict=True):
            file.create_dataset(name, data=array)
        file.flush()
        image: bytes = file.id.get_file_image()
    return image


def digests_of(folder: Path, epoch: int, rank: int) -> dict[str, str]:
    """Return the SHA-256 of both files of one epoch and process, by their names."""
    path = part_path(folder, epoch, rank)
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in (path.with_suffix(".parquet"), path)}


class ViewStore:
    """A store opened for reading: one's own or a published one.

    Raises:
        StoreError: there is no store in the folder, or one of its files is missing.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise StoreError(f"there is no view store {folder}: no such folder")
        self.folder = folder
        self.meta = read_meta(folder)
        matches = [match for path in folder.iterdir() if (match := _PART_NAME.fullmatch(path.name))]
        parts = {(int(match[1]), int(match[2])) for match in matches}
        if not parts:
            raise StoreError(f"view store {folder} has no epochs yet: no logits_ep1_0.h5")
        self.epochs = max(epoch for epoch, _ in parts)
        self._ranks = self.meta.world_size or 1 + max(rank for _, rank in parts)
        for epoch in range(1, self.epochs + 1):
            for rank in range(self._ranks):
                for suffix in (".h5", ".parquet"):
                    path = part_path(folder, epoch, rank).with_suffix(suffix)
                    if not path.exists():
                        raise StoreError(
                            f"{path} is missing; the store has {self.epochs} epochs of {self._ranks} part(s)"
                        )
                _check_heads(part_path(folder, epoch, rank), self.meta)

    def epoch_of(self, training_epoch: int, at_most: int | None = None) -> int:
        """Return the stored epoch that serves a training epoch (1, 2, ...): all in turn, then again from the first.

        `at_most` limits the number of stored epochs that are used.
        """
        return (training_epoch - 1) % min(self.epochs, at_most or self.epochs) + 1

    def rows(self, epoch: int) -> Rows:
        """Return all views of a stored epoch (1, ..., `epochs`), those of process 0 first.

        Raises:
            StoreError: a file is damaged, its two halves do not agree, rows are missing, or it is of another epoch.
        """
        if not 1 <= epoch <= self.epochs:
            raise StoreError(f"view store {self.folder} has epochs 1 to {self.epochs}, not {epoch}")
        rows = Rows.concat([read_part(self.folder, epoch, rank, self.meta) for rank in range(self._ranks)])
        expected, seed = self.meta.rows, self.meta.seed
        if expected is not None and len(rows) != expected:
            raise StoreError(
                f"epoch {epoch} of view store {self.folder} has {len(rows)} rows; {META_NAME} says {expected}"
            )
        if seed is not None and not np.array_equal(rows.seeds, epoch_seeds(seed, epoch, len(rows))):
            raise StoreError(
                f"{part_path(self.folder, epoch, 0)}: the seeds are not those of epoch {epoch} and seed {seed}; the "
                "file is damaged, or belongs to another epoch or store"
            )
        return rows


def read_part(folder: Path, epoch: int, rank: int, meta: StoreMeta) -> Rows:
    """Return the rows of one epoch and process.

    Raises:
        StoreError: a file does not have its digest, is damaged, or its two halves do not agree.
    """
    path = part_path(folder, epoch, rank)
    values, indexes, seeds = _read_hdf5(path, _read_whole(path, meta), meta)
    rows = len(seeds)
    if rows and not 0 <= indexes.min() <= indexes.max() < meta.num_classes:
        found = f"{indexes.min()} to {indexes.max()}"
        raise StoreError(f"{path}: topk_indexes are {found}; allowed: 0 to {meta.num_classes - 1}")
    if rows and not 0 <= values.min() <= values.max() <= 1:  # false for NaN, too
        raise StoreError(f"{path}: topk_values are {values.min()} to {values.max()}; probabilities are 0 to 1")
    path = path.with_suffix(".parquet")
    try:
        # As a dictionary, each name is in memory once, however many chunks its clip has.
        file = pq.ParquetFile(pa.BufferReader(_read_whole(path, meta)), read_dictionary=["filename"])
        _check_count(path, file.metadata.num_rows, rows)
        table = file.read(columns=_SCHEMA.names)
        names = table["filename"].unify_dictionaries().combine_chunks()
        known = names.dictionary.to_pylist()
        filenames = np.array([*known, None], dtype=object)[names.indices.fill_null(len(known)).to_numpy()]
        starts, ends = (table[name].to_numpy().astype(np.float32) for name in ("start", "end"))
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:  # ValueError: no UTF-8
        raise _damaged(path, error) from error
    if not all(isinstance(name, str) for name in set(filenames)) or not np.isfinite(starts + ends).all():
        raise StoreError(f"{path} is damaged: a row has no filename, start or end")
    return Rows(values, indexes, seeds, filenames, starts, ends)


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _read_whole(path: Path, meta: StoreMeta) -> bytes:
    """Return the bytes of a file of a store, which must have the digest that meta.json names."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error) from error
    expected = (meta.digests or {}).get(path.name)
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise StoreError(f"{path} is damaged: it does not have the digest that {META_NAME} names; `ced store` mends it")
    return content


def _read_hdf5(path: Path, content: bytes, meta: StoreMeta) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            _check_shapes(path, file, meta)
            values, indexes, seeds = (file[name][()] for name in _DATASETS)
    except StoreError:
        raise
    except Exception as error:  # HDF5 fails in many ways on a damaged file
        raise _damaged(path, error) from error
    return values, indexes, seeds


def _check_heads(path: Path, meta: StoreMeta) -> None:
    """Check the headers of a pair of files, so that most damage shows before the first epoch and not in the last."""
    try:
        with h5py.File(path, "r") as file:
            rows = _check_shapes(path, file, meta)
    except StoreError:
        raise
    except Exception as error:  # HDF5 fails in many ways on a damaged file
        raise _damaged(path, error) from error
    path = path.with_suffix(".parquet")
    try:
        named = pq.read_metadata(path).num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    _check_count(path, named, rows)


def _check_shapes(path: Path, file: h5py.File, meta: StoreMeta) -> int:
    """Check the arrays of a part before anything is allocated for them.

    Returns:
        The number of rows.
    """
    arrays = {name: file[name] for name in _DATASETS}
    for name, array in arrays.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or array.external or array.is_virtual:
            raise StoreError(f"{path}: {name} lies in another file; a store holds its arrays itself")
    rows = arrays["seeds"].shape[0] if arrays["seeds"].ndim == 1 else 0
    expected = {"topk_values": (rows, meta.topk), "topk_indexes": (rows, meta.topk), "seeds": (rows,)}
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise StoreError(f"{path}: {name} is {array.shape}, expected {expected[name]}")
        if array.dtype.kind != ("f" if name == "topk_values" else "i"):
            raise StoreError(f"{path}: {name} is of type {array.dtype}, which it cannot be")
        there = array.id.get_storage_size()
        if array.nbytes > (there if array.chunks is None else _LARGEST_UNPACKED):
            raise StoreError(f"{path} is damaged: {name} claims {array.nbytes:,} bytes and has {there:,}")
    return rows


def _check_count(path: Path, named: int, rows: int) -> None:
    if named != rows:
        raise StoreError(f"{path} has {named} rows, its .h5 {rows}")
