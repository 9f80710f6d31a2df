"""Store views: teachers score every chunk under newly drawn views in each epoch, and their top scores go to disk.

The walk is: chunks of the pack, new seeds -> waves, shifted -> front end and masks -> each teacher -> mean of
probabilities -> top k -> view store. A student later makes the same mel from the same seeds.
"""

import logging
import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ced.config import StoreConfig, TeacherEntry
from ced.distill import view_store
from ced.distill.dataset import Chunks, ViewDataset, chunk_samples, cut, fingerprint, in_order, prefetch
from ced.distill.distributed import World, join
from ced.distill.pack_reader import AudioPack
from ced.distill.precision import half_type
from ced.distill.teachers import Ensemble, Teacher, load_teacher, teacher_name
from ced.distill.view_store import META_NAME, Rows, StoreMeta, epoch_seeds
from ced.distill.views import check_masks, recipe_of
from ced.errors import ConfigError, StoreError
from ced.files import claimed, remove_leftovers
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import class_table

_log = logging.getLogger(__name__)

_MAX_CLASSES = 2**15  # class indices are stored as int16
_PRECISIONS = {None: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def store(config: StoreConfig, *, progress: Progress = silent) -> Path:
    """Store the teachers' scores of `config.epochs` views of every chunk of `config.train_data`.

    Runs alone or as one of the processes of torchrun. Parts that are complete and undamaged are kept, so an interrupted
    run may be repeated and ends with the same bytes as an unbroken one.

    Returns:
        The store's folder.

    Raises:
        StoreError: the folder has a store made with other settings, a teacher's scores are not probabilities, or there
            is nothing to score.
        ConfigError: a teacher cannot be loaded, the masks blank whole chunks, or the settings contradict the teachers.
        PackError: the pack lacks a clip.
        ProcessError: another process of the run has stopped.
    """
    pack = AudioPack(config.train_data)
    listed = _list_chunks(config, pack)
    recipe = recipe_of(config.wavtransforms, config.spectransforms, listed.samples)
    check_masks(recipe, listed.samples)
    world = join()
    progress = progress if world.is_main else silent
    teachers = [load_teacher(entry, config.model_args, world.device, progress) for entry in _teachers(config)]
    classes = class_table(config.classes) if config.classes else None
    ensemble = Ensemble(teachers, config.mode, recipe, listed.samples, world.device, classes)
    if not (config.topk <= ensemble.known and ensemble.num_classes <= _MAX_CLASSES):
        raise ConfigError(
            f"topk is {config.topk} and the teachers have {ensemble.known} classes; "
            f"set topk to at most the number of classes, which is at most {_MAX_CLASSES}"
        )
    meta = StoreMeta(
        recipe=recipe,
        topk=config.topk,
        num_classes=ensemble.num_classes,
        chunk_length=config.chunk_length,
        teachers=tuple(teacher_name(entry.name) for entry in config.model),
        labels=ensemble.labels,
        precision=_PRECISIONS[half_type(config.mode, world.device)],
        weights=tuple(teacher.weights for teacher in teachers),
        members=_members(teachers),
        model_args=config.model_args,
        seed=config.seed,
        batch_size=config.batch_size,
        world_size=world.size,
        rows=len(listed.chunks),
        chunks=fingerprint(pack, listed.chunks, listed.filenames, listed.starts, listed.ends),
    )
    # Runs of whole batches: what a chunk is scored together with does not depend on the number of processes.
    mine = _share(len(listed.chunks), config.batch_size, world.rank, world.size)
    folder = store_folder(config)
    with claimed(folder / META_NAME) if world.is_main else nullcontext():
        missing = world.broadcast(_missing_parts(folder, meta, config.epochs) if world.is_main else None)
        for epoch in range(1, config.epochs + 1):
            written: dict[str, str] = {}
            if (epoch, world.rank) in missing:
                seeds = epoch_seeds(config.seed, epoch, len(listed.chunks))
                views = ViewDataset(pack, listed.chunks, recipe, seeds, listed.samples)
                task = f"epoch {epoch} of {config.epochs}"
                values, indexes = _score(views, mine, ensemble, config.topk, config.num_workers, world, task, progress)
                here = slice(mine[0].start, mine[-1].stop) if mine else slice(0)
                rows = Rows(
                    values, indexes, seeds[here], listed.filenames[here], listed.starts[here], listed.ends[here]
                )
                written = view_store.write_part(folder, epoch, world.rank, rows)
            if any(part[0] == epoch for part in missing):
                digests = {name: one for each in world.gather(written) for name, one in each.items()}
                if world.is_main:
                    view_store.add_digests(folder, digests)
        world.barrier()
    return folder


@dataclass(frozen=True, eq=False)
class _Listed:
    """The chunks of a pack, as the rows of a store name them."""

    samples: int  # of a whole chunk
    chunks: Chunks
    filenames: NDArray[np.object_]  # (n,) str
    starts: NDArray[np.float32]  # (n,) seconds
    ends: NDArray[np.float32]  # (n,) seconds


def _list_chunks(config: StoreConfig, pack: AudioPack) -> _Listed:
    chunks = cut(pack, config.chunk_length)
    half = config.chunk_length / 2
    if not len(chunks):
        longest = max(pack.samples(clip) for clip in range(len(pack))) / SAMPLE_RATE
        raise StoreError(
            f"{config.train_data} has no clip of half a chunk ({half:g} s) or more: its longest has {longest:.2f} s; "
            "set chunk_length to the length of the clips"
        )
    if without := len(pack) - len(np.unique(chunks.clips)):
        _log.warning(
            "%d of %d clips are shorter than half a chunk (%g s) and are left out; a shorter chunk_length keeps them",
            *(without, len(pack), half),
        )
    filenames = np.array(pack.names, dtype=object)[chunks.clips]
    starts, ends = ((at / SAMPLE_RATE).astype(np.float32) for at in (chunks.starts, chunks.stops))
    return _Listed(chunk_samples(config.chunk_length), chunks, filenames, starts, ends)


def _share(chunks: int, batch_size: int, rank: int, size: int) -> list[range]:
    """Return the batches of one of `size` processes."""
    batches = list(in_order(chunks, batch_size))
    first, last = (math.ceil(part * len(batches) / size) for part in (rank, rank + 1))
    return batches[first:last]


def _score(
    views: ViewDataset,
    batches: Sequence[range],
    ensemble: Ensemble,
    topk: int,
    num_workers: int,
    world: World,
    task: str,
    progress: Progress,
) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
    """Return the ensemble's highest scores of views, (n, k), and their classes, (n, k)."""
    # A first part of no rows, for a process without batches.
    values, indexes = [np.empty((0, topk), np.float16)], [np.empty((0, topk), np.int16)]
    for done, batch in enumerate(prefetch(views, batches, num_workers), start=1):
        waves, uniforms = batch.to_device(world.device)
        top = ensemble(waves, uniforms).topk(topk)
        values.append(top.values.half().cpu().numpy())
        indexes.append(top.indices.short().cpu().numpy())
        progress(task, done, len(batches))
    return np.concatenate(values), np.concatenate(indexes)


def store_folder(config: StoreConfig) -> Path:
    """Return where a store goes: `<outputpath>/<model>/<stem of train_data>/chunk_<seconds>`."""
    names = [re.sub(r"[^\w.-]+", "_", teacher_name(entry.name)) for entry in _teachers(config)]
    model = names[0] if len(names) == 1 else "_".join(name.replace("audiotransformer_", "") for name in names)
    return config.outputpath / model / config.train_data.stem / f"chunk_{config.chunk_length:g}"


def _teachers(config: StoreConfig) -> list[TeacherEntry]:
    if not config.model:
        raise ConfigError("model is an empty list; name at least one teacher")
    return config.model


def _members(teachers: Sequence[Teacher]) -> tuple[dict[str, Any], ...] | None:
    """Return what a store records about teachers that differ from a CED network with the store's own settings."""
    ordinary = Teacher("", teachers[0].score)
    names = ("takes", "masks", "weight", "batch_size", "mode")
    members = tuple(
        {name: value for name in names if (value := getattr(teacher, name)) != getattr(ordinary, name)}
        for teacher in teachers
    )
    return members if any(members) else None


def _missing_parts(folder: Path, meta: StoreMeta, epochs: int) -> set[tuple[int, int]]:
    """Begin a store, or compare the one that is there with the settings; return which parts have to be written.

    Returns:
        Epoch and rank of each part.

    Raises:
        StoreError: there are views without a meta.json, or the settings differ.
    """
    remove_leftovers(folder)
    if not (folder / META_NAME).exists():
        if any(folder.glob("logits_ep*.h5")):
            raise StoreError(f"{folder} has views but no {META_NAME}; choose another outputpath")
        view_store.write_meta(folder, meta)
        return {(epoch, rank) for epoch in range(1, epochs + 1) for rank in range(meta.world_size or 1)}
    stored = view_store.read_meta(folder)
    # As many processes as before only matter when something is left to do.
    if changed := view_store.difference(replace(stored, world_size=meta.world_size), meta):
        raise StoreError(_other_settings(folder, changed))
    parts = {(epoch, rank) for epoch in range(1, epochs + 1) for rank in range(stored.world_size or 1)}
    missing = {part for part in parts if not _is_stored(folder, *part, stored)}
    if missing and (changed := view_store.difference(stored, meta)):
        raise StoreError(_other_settings(folder, changed))
    digests = {name: one for part in parts - missing for name, one in view_store.digests_of(folder, *part).items()}
    if digests.items() - (stored.digests or {}).items():  # written just before a kill, or by a release without digests
        view_store.add_digests(folder, digests)
    if complete := epochs - len({epoch for epoch, _ in missing}):
        _log.info("%d of %d epochs are already stored in %s", complete, epochs, folder)
    return missing


def _other_settings(folder: Path, changed: str) -> str:
    return f"{folder} was stored with other settings: {changed}; use those, or another outputpath"


def _is_stored(folder: Path, epoch: int, rank: int, meta: StoreMeta) -> bool:
    """Return whether a part is there and undamaged, with the seeds of its epoch."""
    if not view_store.part_complete(folder, epoch, rank):
        return False
    try:
        rows = view_store.read_part(folder, epoch, rank, meta)
    except StoreError as error:
        _log.warning("%s; it is stored again", error)
        return False
    share = _share(meta.rows or 0, meta.batch_size or 1, rank, meta.world_size or 1)
    expected = epoch_seeds(meta.seed or 0, epoch, meta.rows or 0)
    if not np.array_equal(rows.seeds, np.concatenate([expected[:0], *(expected[batch] for batch in share)])):
        _log.warning("%s has other seeds; it is stored again", view_store.part_path(folder, epoch, rank))
        return False
    return True
