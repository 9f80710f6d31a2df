"""The view store: what teachers said about each view of each chunk, and the seeds that make the views again.

A folder holds, for each epoch e = 1, 2, ... and each process r = 0, 1, ... that wrote it, `logits_ep<e>_<r>.h5` with
`topk_values` float16 (n, k), `topk_indexes` int16 (n, k) and `seeds` int32 (n), and beside it, row for row,
`logits_ep<e>_<r>.parquet` with `filename`, `start` and `end` (float32 seconds). meta.json says how they were made; a
published store has a meta.pt instead. Every file is written aside and renamed, the .h5 of a pair last, so a pair
with an .h5 is complete.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ced.distill.legacy import read_meta_pt
from ced.distill.views import ViewRecipe
from ced.errors import StoreError
from ced.files import remove_leftovers, written_aside
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable, audioset

FORMAT_VERSION = 1
META_NAME = "meta.json"
_PART_NAME = re.compile(r"logits_ep(\d+)_(\d+)\.(?:h5|parquet)")
_SCHEMA = pa.schema([("filename", pa.large_string()), ("start", pa.float32()), ("end", pa.float32())])


@dataclass(frozen=True)
class StoreMeta:
    """How the views of a store were made; None where a published store does not say."""

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
    model_args: Mapping[str, Any] | None = None  # what was changed about the teachers
    seed: int | None = None
    batch_size: int | None = None
    world_size: int | None = None  # processes, and so parts an epoch
    rows: int | None = None  # an epoch
    chunks: str | None = None  # fingerprint of the chunks' names and times


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
    """Write a store's meta.json; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / META_NAME) as path:
        content = {"format": "ced view store", "version": FORMAT_VERSION, **dataclasses.asdict(meta)}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
        kind, version = content.pop("format"), content.pop("version")
        if (kind, version) != ("ced view store", FORMAT_VERSION):
            raise StoreError(f"{path} is {kind!r} version {version}; this program reads version {FORMAT_VERSION}")
        recipe = content.pop("recipe")
        labels = content.pop("labels")
        for name in ("teachers", "weights"):
            content[name] = None if content[name] is None else tuple(content[name])
        return StoreMeta(
            recipe=ViewRecipe(**{**recipe, "shift": recipe["shift"] and tuple(recipe["shift"])}),
            labels=labels and ClassTable(tuple(labels["names"]), labels["mids"] and tuple(labels["mids"])),
            **content,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def difference(stored: StoreMeta, asked: StoreMeta) -> str | None:
    """Name the first setting in which two stores differ and its two values; None if there is none."""
    for field in dataclasses.fields(StoreMeta):
        before, now = getattr(stored, field.name), getattr(asked, field.name)
        if before != now:
            if field.name == "labels":
                return "the class table is another"
            return f"{field.name} was {_short(before)} and is now {_short(now)}"
    return None


def _short(value: object) -> str:
    if isinstance(value, ViewRecipe):
        return f"(shift {value.shift}, time_mask {value.time_mask}, freq_mask {value.freq_mask})"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def part_path(folder: Path, epoch: int, rank: int) -> Path:
    """Return the .h5 of one epoch and process; its .parquet is beside it."""
    return folder / f"logits_ep{epoch}_{rank}.h5"


def part_complete(folder: Path, epoch: int, rank: int) -> bool:
    """Say whether both files of one epoch and process are there; what is there is whole."""
    path = part_path(folder, epoch, rank)
    return path.exists() and path.with_suffix(".parquet").exists()


def write_part(folder: Path, epoch: int, rank: int, rows: Rows) -> None:
    """Write the rows of one epoch and process; the same rows give the same bytes."""
    path = part_path(folder, epoch, rank)
    for unfinished in (path, path.with_suffix(".parquet")):
        remove_leftovers(unfinished)
    with written_aside(path.with_suffix(".parquet")) as aside:
        columns = [pa.array(rows.filenames, pa.large_string()), pa.array(rows.starts), pa.array(rows.ends)]
        pq.write_table(pa.table(columns, schema=_SCHEMA), aside, compression="zstd")
    with written_aside(path) as aside, h5py.File(aside, "w") as file:
        file.create_dataset("topk_values", data=rows.values.astype(np.float16, copy=False))
        file.create_dataset("topk_indexes", data=rows.indexes.astype(np.int16, copy=False))
        file.create_dataset("seeds", data=rows.seeds.astype(np.int32, copy=False))


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
                _check_part(part_path(folder, epoch, rank), self.meta)

    def epoch_of(self, training_epoch: int, at_most: int | None = None) -> int:
        """Return the stored epoch that serves a training epoch (1, 2, ...): all in turn, then again from the first.

        `at_most` uses only so many of the stored epochs.
        """
        return (training_epoch - 1) % min(self.epochs, at_most or self.epochs) + 1

    def rows(self, epoch: int) -> Rows:
        """Return all views of a stored epoch (1, ..., `epochs`), those of process 0 first.

        Raises:
            StoreError: a file is damaged, its two halves do not agree, or rows are missing.
        """
        if not 1 <= epoch <= self.epochs:
            raise StoreError(f"view store {self.folder} has epochs 1 to {self.epochs}, not {epoch}")
        rows = Rows.concat([_read_part(part_path(self.folder, epoch, rank), self.meta) for rank in range(self._ranks)])
        if self.meta.rows is not None and len(rows) != self.meta.rows:
            raise StoreError(
                f"epoch {epoch} of view store {self.folder} has {len(rows)} rows; {META_NAME} says {self.meta.rows}"
            )
        return rows


def _damaged(path: Path, error: Exception) -> StoreError:
    return StoreError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())}")


def _check_part(path: Path, meta: StoreMeta) -> None:
    """Look at the heads of a pair of files: damage is better known before the first epoch than in the last."""
    try:
        with h5py.File(path, "r") as file:
            shapes = {name: file[name].shape for name in ("topk_values", "topk_indexes", "seeds")}
    except (OSError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error
    rows = shapes["seeds"][0] if len(shapes["seeds"]) == 1 else 0
    expected = {"topk_values": (rows, meta.topk), "topk_indexes": (rows, meta.topk), "seeds": (rows,)}
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise StoreError(f"{path}: {name} is {shape}, expected {expected[name]}")
    path = path.with_suffix(".parquet")
    try:
        named = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    if named != rows:
        raise StoreError(f"{path} has {named} rows, its .h5 {rows}")


def _read_part(path: Path, meta: StoreMeta) -> Rows:
    try:
        with h5py.File(path, "r") as file:
            values, indexes, seeds = (file[name][()] for name in ("topk_values", "topk_indexes", "seeds"))
    except OSError as error:
        raise _damaged(path, error) from error
    rows = len(seeds)
    if rows and not 0 <= indexes.min() <= indexes.max() < meta.num_classes:
        found = f"{indexes.min()} to {indexes.max()}"
        raise StoreError(f"{path}: topk_indexes are {found}; allowed: 0 to {meta.num_classes - 1}")
    if rows and not 0 <= values.min() <= values.max() <= 1:  # false for NaN, too
        raise StoreError(f"{path}: topk_values are {values.min()} to {values.max()}; probabilities are 0 to 1")
    path = path.with_suffix(".parquet")
    try:
        table = pq.read_table(path, columns=_SCHEMA.names)
        filenames, starts, ends = (table[name].to_numpy() for name in _SCHEMA.names)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    return Rows(values, indexes, seeds, filenames, starts, ends)
