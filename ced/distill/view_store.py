"""The view store: the teachers' scores of each view of each chunk, and the seeds that reproduce the views.

For each epoch e = 1, 2, ... and each part r = 0, 1, ... of it, a folder has `logits_ep<e>_<r>.h5` with
`topk_values` float16 (n, k), `topk_indexes` int16 (n, k) and `seeds` int32 (n), and `logits_ep<e>_<r>.parquet` with the
`filename`, `start` and `end` (float32 seconds) of each row. meta.json has the settings, the SHA-256 of every file of
every complete epoch, and its own; a published store has a meta.pt instead. Every file is made in memory, written to a
temporary file and renamed; the .h5 of a pair is written last, so a pair with an .h5 is complete.
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
    """The settings that the views of a store were made with; None where they are not known."""

    recipe: ViewRecipe
    topk: int
    num_classes: int
    chunk_length: float  # seconds
    teachers: tuple[str, ...]
    labels: ClassTable | None = None
    sample_rate: int = SAMPLE_RATE
    values: str = "probabilities"
    precision: str | None = None  # of the teachers' forward pass: fp32, fp16 or bf16; mixed: as `members` has it
    # Fingerprint of each teacher: its weights and settings, and its class table if it differs; "" where it has none.
    weights: tuple[str, ...] | None = None
    # What is special about each teacher: what it takes, its weight in the mean, ...; None: nothing about any.
    members: tuple[Mapping[str, Any], ...] | None = None
    model_args: Mapping[str, Any] | None = None  # what was changed about the teachers
    seed: int | None = None
    batch_size: int | None = None
    world_size: int | None = None  # parts of each epoch: the number of processes that began the store
    rows: int | None = None  # of each epoch
    chunks: str | None = None  # `dataset.fingerprint` of the names, times and audio of the chunks
    # SHA-256 of each file of the complete epochs, by file name; None in stores of format version 1.
    digests: Mapping[str, str] | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Rows:
    """Stored views, one in each row."""

    values: NDArray[np.float16]  # (n, k) probabilities, highest first
    indexes: NDArray[np.int16]  # (n, k) the classes of the values
    seeds: NDArray[np.int32]  # (n,)
    filenames: NDArray[np.object_]  # (n,) str, the clips' names in their pack
    starts: NDArray[np.float32]  # (n,) seconds
    ends: NDArray[np.float32]  # (n,) seconds

    def __len__(self) -> int:
        return len(self.seeds)

    @staticmethod
    def concat(parts: "Sequence[Rows]") -> "Rows":
        """Join the rows of parts, in the order of the parts."""
        names = [field.name for field in dataclasses.fields(Rows)]
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def write_meta(folder: Path, meta: StoreMeta) -> None:
    """Write the meta.json of a store; the folder is made if it is missing."""
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
    """Add the digests of files to the meta.json of a store, which marks them as complete."""
    meta = read_meta(folder)
    write_meta(folder, dataclasses.replace(meta, digests={**(meta.digests or {}), **digests}))


def _digest_of_meta(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path) -> StoreMeta:
    """Read the settings of a store from its meta.json or, in a published store, its meta.pt.

    Raises:
        StoreError: there is neither of them, it is damaged, or it has an unknown format version.
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
            raise StoreError(f"{path} does not match its own digest: it is damaged, or was edited")
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
    """Return the first setting in which two stores differ, with both values, as text; None if there is none."""
    for one in dataclasses.fields(StoreMeta):
        before, now = getattr(stored, one.name), getattr(asked, one.name)
        if before != now and one.compare:
            if one.name in _DIFFERENCES:
                return _DIFFERENCES[one.name]
            if one.name == "weights":
                return _differing_weights(stored, asked)
            if one.name == "members":
                return _differing_members(stored, asked)
            return f"{one.name} was {_short(before)} and is now {_short(now)}"
    return None


_DIFFERENCES = {  # settings whose values are digests or long tables
    "labels": "the class table differs",
    "chunks": "the audio differs, or the names of the clips do",
}


def _differing_weights(stored: StoreMeta, asked: StoreMeta) -> str:
    """Return which teacher has another fingerprint, as text."""
    pairs = zip(asked.teachers, stored.weights or (), asked.weights or (), strict=False)
    changed = next((name for name, before, now in pairs if before != now), asked.teachers[0])
    return f"the weights, the settings or the class table of teacher {changed} differ"


def _differing_members(stored: StoreMeta, asked: StoreMeta) -> str:
    """Return the first setting in which a teacher differs, as text."""
    nothing: tuple[Mapping[str, Any], ...] = tuple({} for _ in asked.teachers)
    for teacher, before, now in zip(asked.teachers, stored.members or nothing, asked.members or nothing, strict=False):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                was, is_now = before.get(key, "the default"), now.get(key, "the default")
                return f"{key} of teacher {teacher} was {was} and is now {is_now}"
    return "the settings of the teachers differ"


def _short(value: object) -> str:
    if isinstance(value, ViewRecipe):
        return f"(shift {value.shift}, time_mask {value.time_mask}, freq_mask {value.freq_mask})"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def epoch_seeds(seed: int, epoch: int, count: int) -> NDArray[np.int32]:
    """Draw the seeds of the views of an epoch, (count,); they do not depend on the number of processes."""
    numbers = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    return numbers.randint(0, 2**31, size=count, dtype=np.int64).astype(np.int32)


def part_path(folder: Path, epoch: int, part: int) -> Path:
    """Return the path of the .h5 of a part of an epoch; its .parquet has the same stem."""
    return folder / f"logits_ep{epoch}_{part}.h5"


def part_complete(folder: Path, epoch: int, part: int) -> bool:
    """Return whether both files of a part of an epoch exist."""
    path = part_path(folder, epoch, part)
    return path.exists() and path.with_suffix(".parquet").exists()


def write_part(folder: Path, epoch: int, part: int, rows: Rows) -> dict[str, str]:
    """Write the rows of a part of an epoch; the same rows give the same bytes.

    The files are made in memory, because HDF5 does not report a full disk when it closes a file, and may crash.

    Returns:
        The SHA-256 of each file, by file name.

    Raises:
        WriteError: a file cannot be written; an existing one is unchanged.
    """
    path = part_path(folder, epoch, part)
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


def digests_of(folder: Path, epoch: int, part: int) -> dict[str, str]:
    """Return the SHA-256 of both files of a part of an epoch, by file name."""
    path = part_path(folder, epoch, part)
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in (path.with_suffix(".parquet"), path)}


class ViewStore:
    """A view store that is opened for reading, written here or published.

    Raises:
        StoreError: the folder has no store, or one of its files is missing or damaged.
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
        self._parts = self.meta.world_size or 1 + max(part for _, part in parts)
        for epoch in range(1, self.epochs + 1):
            for part in range(self._parts):
                for suffix in (".h5", ".parquet"):
                    path = part_path(folder, epoch, part).with_suffix(suffix)
                    if not path.exists():
                        raise StoreError(
                            f"{path} is missing; the store has {self.epochs} epochs of {self._parts} part(s)"
                        )
                _check_heads(part_path(folder, epoch, part), self.meta)

    def epoch_of(self, training_epoch: int, at_most: int | None = None) -> int:
        """Return the stored epoch for a training epoch (1, 2, ...): all in turn, then again from the first.

        Args:
            training_epoch: from 1.
            at_most: number of stored epochs that are used; None: all.
        """
        return (training_epoch - 1) % min(self.epochs, at_most or self.epochs) + 1

    def rows(self, epoch: int) -> Rows:
        """Return all views of a stored epoch (1, ..., `epochs`), in the order of the parts.

        Raises:
            StoreError: a file is damaged or of another epoch, a pair of files does not match, or rows are missing.
        """
        if not 1 <= epoch <= self.epochs:
            raise StoreError(f"view store {self.folder} has epochs 1 to {self.epochs}, not {epoch}")
        rows = Rows.concat([read_part(self.folder, epoch, part, self.meta) for part in range(self._parts)])
        expected, seed = self.meta.rows, self.meta.seed
        if expected is not None and len(rows) != expected:
            raise StoreError(
                f"epoch {epoch} of view store {self.folder} has {len(rows)} rows; {META_NAME} has {expected}"
            )
        if seed is not None and not np.array_equal(rows.seeds, epoch_seeds(seed, epoch, len(rows))):
            raise StoreError(
                f"{part_path(self.folder, epoch, 0)}: the seeds are not those of epoch {epoch} and seed {seed}; the "
                "file is damaged, or belongs to another epoch or store"
            )
        return rows


def read_part(folder: Path, epoch: int, part: int, meta: StoreMeta) -> Rows:
    """Return the rows of a part of an epoch.

    Raises:
        StoreError: a file does not match its digest or is damaged, or the pair does not match.
    """
    path = part_path(folder, epoch, part)
    values, indexes, seeds = _read_hdf5(path, _read_whole(path, meta), meta)
    rows = len(seeds)
    if rows and not 0 <= indexes.min() <= indexes.max() < meta.num_classes:
        found = f"{indexes.min()} to {indexes.max()}"
        raise StoreError(f"{path}: topk_indexes are {found}; allowed: 0 to {meta.num_classes - 1}")
    if rows and not 0 <= values.min() <= values.max() <= 1:  # False for NaN too
        raise StoreError(f"{path}: topk_values are {values.min()} to {values.max()}; probabilities are 0 to 1")
    path = path.with_suffix(".parquet")
    try:
        # With a dictionary, the name of a clip that has many chunks is in memory once.
        file = pq.ParquetFile(pa.BufferReader(_read_whole(path, meta)), read_dictionary=["filename"])
        _check_count(path, file.metadata.num_rows, rows)
        table = file.read(columns=_SCHEMA.names)
        names = table["filename"].unify_dictionaries().combine_chunks()
        if names.type.value_type not in (pa.string(), pa.large_string()):
            raise TypeError(f"filename has the type {names.type.value_type}")
        if names.null_count or names.dictionary.null_count:
            raise StoreError(f"{path} is damaged: a row has no filename")
        filenames = np.array(names.dictionary.to_pylist(), dtype=object)[names.indices.to_numpy()]
        starts, ends = (table[name].to_numpy().astype(np.float32) for name in ("start", "end"))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        # ValueError: a name is not UTF-8; AttributeError: filename is not text
        raise _damaged(path, error) from error
    if not np.isfinite(starts + ends).all():
        raise StoreError(f"{path} is damaged: a row has no start or end")
    return Rows(values, indexes, seeds, filenames, starts, ends)


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _read_whole(path: Path, meta: StoreMeta) -> bytes:
    """Return the bytes of a file of a store.

    Raises:
        StoreError: it cannot be read, or does not match its digest in meta.json.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error) from error
    expected = (meta.digests or {}).get(path.name)
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise StoreError(f"{path} is damaged: it does not match its digest in {META_NAME}; `ced store` writes it again")
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
    """Check the headers of a pair of files, so that most damage is found before training, not in its last epoch."""
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
    """Check the arrays of a part before memory is allocated for them.

    Returns:
        The number of rows.
    """
    arrays = {name: file[name] for name in _DATASETS}
    for name, array in arrays.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink) or array.external or array.is_virtual:
            raise StoreError(f"{path}: {name} is stored in another file; a store holds its arrays itself")
    rows = arrays["seeds"].shape[0] if arrays["seeds"].ndim == 1 else 0
    expected = {"topk_values": (rows, meta.topk), "topk_indexes": (rows, meta.topk), "seeds": (rows,)}
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise StoreError(f"{path}: {name} is {array.shape}, expected {expected[name]}")
        kind = "float" if name == "topk_values" else "int"
        if array.dtype.kind != kind[0]:
            raise StoreError(f"{path}: {name} has type {array.dtype}, expected {kind}")
        stored = array.id.get_storage_size()
        if array.nbytes > (stored if array.chunks is None else _LARGEST_UNPACKED):
            raise StoreError(f"{path} is damaged: {name} needs {array.nbytes:,} bytes and has {stored:,}")
    return rows


def _check_count(path: Path, named: int, rows: int) -> None:
    if named != rows:
        raise StoreError(f"{path} has {named} rows, its .h5 {rows}")
