"""Store views: teachers score every chunk under a new view in each epoch, and their highest scores go to disk.

The steps are: chunks of the pack and new seeds -> waves, shifted -> front end and masks -> each teacher -> mean of
probabilities -> top k -> view store. Training later makes the same mel from the same seeds.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from ced.config import Mode, StoreConfig
from ced.distill import view_store
from ced.distill.dataset import (
    Chunks,
    ViewDataset,
    chunk_samples,
    cut_chunks,
    fingerprint,
    in_batches,
    prefetch,
)
from ced.distill.distributed import claim_wait, half_type, join_processes
from ced.distill.pack_reader import AudioPack
from ced.distill.teachers import Ensemble, Teacher, load_teacher, teacher_name
from ced.distill.view_store import META_NAME, Rows, StoreMeta, epoch_seeds
from ced.distill.views import check_masks, recipe_of
from ced.errors import ConfigError, StoreError
from ced.files import claimed, remove_leftovers
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable, class_table

logger = logging.getLogger(__name__)

_MAX_CLASSES = 2**15  # class indices are stored as int16
MIXED = "mixed"  # the precision of teachers that compute in different ones
_PRECISIONS = {None: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

Part = tuple[int, int]  # epoch from 1, and number of the part from 0


def store(config: StoreConfig, *, progress: Progress = silent) -> Path:
    """Store the teachers' scores of `config.epochs` views of every chunk of `config.train_data`.

    Runs alone or as one of the processes of torchrun. Parts that are complete and undamaged are kept, so an interrupted
    run can be repeated and then gives the same bytes as an uninterrupted one. There are as many parts of each epoch as
    processes that began the store; any number of processes can complete it.

    Returns:
        The store's folder.

    Raises:
        StoreError: the folder has a store made with other settings, a teacher's scores are not probabilities, or there
            is no chunk to score.
        ConfigError: a teacher cannot be loaded, the masks blank whole chunks, or the settings contradict the teachers.
        PackError: the pack lacks a clip.
        ProcessError: another process of the run has stopped, has other settings or data, or sees another folder.
    """
    world = join_processes()
    folder = store_folder(config)
    pack, samples = AudioPack(config.train_data), chunk_samples(config.chunk_length)
    chunks = _list_chunks(pack, config.chunk_length)
    filenames, (starts, ends) = pack.names(chunks.clips), chunks.seconds()
    recipe = recipe_of(config.wavtransforms, config.spectransforms, samples)
    check_masks(recipe, samples)
    progress = progress if world.is_main else silent
    teachers = [load_teacher(entry, config.model_args, world.device, progress) for entry in config.model]
    classes = class_table(config.classes) if config.classes else None
    ensemble = Ensemble(teachers, config.mode, recipe, samples, world.device, classes)
    _check_classes(config.topk, ensemble)
    meta = StoreMeta(
        recipe=recipe,
        topk=config.topk,
        num_classes=ensemble.num_classes,
        chunk_length=config.chunk_length,
        teachers=tuple(teacher_name(entry.name) for entry in config.model),
        labels=ensemble.labels,
        precision=_shared(_precisions(teachers, config.mode)),
        weights=tuple(_fingerprint(teacher, ensemble.labels) for teacher in teachers),
        members=_members(teachers, config.mode),
        model_args=config.model_args,
        seed=config.seed,
        batch_size=config.batch_size,
        world_size=world.size,
        rows=len(chunks),
        chunks=fingerprint(pack, chunks, filenames, starts, ends),
    )
    world.check_same({field.name: getattr(meta, field.name) for field in fields(meta)})
    with claimed(folder / META_NAME, claim_wait()) if world.is_main else nullcontext():
        begun = _begin(folder, meta, config.epochs) if world.is_main else None
        parts, missing = cast("tuple[int, set[Part]]", world.broadcast(begun))
        world.check_shared(folder)
        for epoch in sorted({epoch for epoch, _ in missing}):
            written: dict[str, str] = {}
            seeds = epoch_seeds(config.seed, epoch, len(chunks))
            views = ViewDataset(pack, chunks, recipe, seeds, samples)
            for part in range(world.rank, parts, world.size):
                if (epoch, part) not in missing:
                    continue
                batches = _share(len(chunks), config.batch_size, part, parts)
                mine = _span(batches)  # the rows of this part
                name = f"epoch {epoch} of {config.epochs}" + (f", part {part + 1} of {parts}" if parts > 1 else "")
                report = partial(progress, name)
                scores = _top_scores(ensemble, views, batches, config.topk, config.num_workers, report)
                rows = Rows(*scores, seeds[mine], filenames[mine], starts[mine], ends[mine])
                written |= view_store.write_part(folder, epoch, part, rows)
            digests = {name: digest for each in world.gather(written) for name, digest in each.items()}
            if world.is_main:
                view_store.add_digests(folder, digests)
        world.barrier()
    return folder


def _check_classes(topk: int, ensemble: Ensemble) -> None:
    """Check that the scores of an ensemble can be stored.

    Raises:
        ConfigError: there are more classes than a store can have, or fewer scored ones than `topk`.
    """
    if ensemble.num_classes > _MAX_CLASSES:
        raise ConfigError(f"the teachers have {ensemble.num_classes} classes; a store can have at most {_MAX_CLASSES}")
    if topk > ensemble.known:
        raise ConfigError(f"topk is {topk} and the teachers have {ensemble.known} classes; set topk to at most these")


def _top_scores(
    ensemble: Ensemble,
    views: ViewDataset,
    batches: Sequence[range],
    topk: int,
    num_workers: int,
    report: Callable[[int, int], None],
) -> tuple[NDArray[np.float16], NDArray[np.int16]]:
    """Return the highest scores of views, (n, topk), highest first, and the indices of their classes, (n, topk).

    Args:
        ensemble: the teachers.
        views: of all chunks.
        batches: those that this process scores, n views in all.
        topk: scores of a view.
        num_workers: threads that read audio.
        report: called after each batch, with the number of scored ones and of all.
    """
    values, indexes = [np.empty((0, topk), np.float16)], [np.empty((0, topk), np.int16)]
    for done, batch in enumerate(prefetch(views, batches, num_workers), start=1):
        top = ensemble(*batch.to_device(ensemble.device)).topk(topk)
        values.append(top.values.half().cpu().numpy())
        indexes.append(top.indices.short().cpu().numpy())
        report(done, len(batches))
    return np.concatenate(values), np.concatenate(indexes)


def _list_chunks(pack: AudioPack, chunk_length: float) -> Chunks:
    """Cut the clips of a pack into chunks; clips shorter than half a chunk have none, with a warning.

    Raises:
        StoreError: no clip is long enough.
    """
    lengths = pack.lengths()
    chunks = cut_chunks(lengths, chunk_length)
    half = chunk_length / 2
    if not len(chunks):
        raise StoreError(
            f"{pack.path} has no clip of half a chunk ({half:g} s) or more: its longest has "
            f"{lengths.max() / SAMPLE_RATE:.2f} s; set chunk_length to the length of the clips"
        )
    if short := len(pack) - len(np.unique(chunks.clips)):
        logger.warning(
            "%d of %d clips are shorter than half a chunk (%g s) and are left out; a shorter chunk_length keeps them",
            *(short, len(pack), half),
        )
    return chunks


def _share(chunks: int, batch_size: int, part: int, parts: int) -> list[range]:
    """Return the batches of a part of an epoch: whole ones, so which chunks are scored together does not vary."""
    batches = list(in_batches(chunks, batch_size))
    first, last = (math.ceil(each * len(batches) / parts) for each in (part, part + 1))
    return batches[first:last]


def store_folder(config: StoreConfig) -> Path:
    """Return the folder of a store: `<outputpath>/<model>/<stem of train_data>/chunk_<seconds>`.

    `<model>` is the name of the teacher; of several, their names without `audiotransformer_`, joined by `_`.

    Raises:
        ConfigError: there is no teacher.
    """
    if not config.model:
        raise ConfigError("model is an empty list; name at least one teacher")
    names = [re.sub(r"[^\w.-]+", "_", teacher_name(entry.name)) for entry in config.model]
    model = names[0] if len(names) == 1 else "_".join(name.replace("audiotransformer_", "") for name in names)
    return config.outputpath / model / config.train_data.stem / f"chunk_{config.chunk_length:g}"


def _precisions(teachers: Sequence[Teacher], mode: Mode) -> list[str]:
    """Return the precision that each teacher computes in: fp32, fp16 or bf16."""
    return [_PRECISIONS[half_type(teacher.mode or mode, teacher.device)] for teacher in teachers]


def _shared(precisions: Sequence[str]) -> str:
    """Return the precision of all teachers, or that it is mixed."""
    return precisions[0] if len(set(precisions)) == 1 else MIXED


def _fingerprint(teacher: Teacher, labels: ClassTable | None) -> str:
    """Return the fingerprint of a teacher, with its class table where that is not the store's, which meta.json has."""
    if teacher.labels is None or teacher.labels == labels:
        return teacher.weights
    table = json.dumps([teacher.labels.names, teacher.labels.mids])
    return hashlib.sha256(f"{teacher.weights} {table}".encode()).hexdigest()


def _members(teachers: Sequence[Teacher], mode: Mode) -> tuple[dict[str, Any], ...] | None:
    """Return the fields that a store records of each teacher where they differ from their defaults; None if none do.

    If the teachers compute in different precisions, that of each is among them.
    """
    defaults = {field.name: field.default for field in fields(Teacher)}
    names = ("takes", "masks", "weight", "batch_size")
    members = tuple(
        {name: value for name in names if (value := getattr(teacher, name)) != defaults[name]} for teacher in teachers
    )
    precisions = _precisions(teachers, mode)
    if _shared(precisions) == MIXED:
        return tuple({**member, "precision": precision} for member, precision in zip(members, precisions, strict=True))
    return members if any(members) else None


def _begin(folder: Path, meta: StoreMeta, epochs: int) -> tuple[int, set[Part]]:
    """Begin a store, or compare an existing one with the settings.

    Returns:
        The number of parts of each epoch, and the parts that have to be written.

    A folder without a part, as after a run that failed in its first epoch, is begun again with the present settings.

    Raises:
        StoreError: there are views without a meta.json, or the settings differ.
    """
    remove_leftovers(folder)
    begun = any(folder.glob("logits_ep*.h5"))
    if begun and not (folder / META_NAME).exists():
        raise StoreError(f"{folder} has views but no {META_NAME}; choose another outputpath")
    if not begun:
        view_store.write_meta(folder, meta)
        return meta.world_size or 1, _parts(epochs, meta)
    stored = view_store.read_meta(folder)
    if changed := view_store.difference(stored, replace(meta, world_size=stored.world_size)):
        raise StoreError(f"{folder} was stored with other settings: {changed}; use those, or another outputpath")
    parts = _parts(epochs, stored)
    missing = {part for part in parts if not _is_stored(folder, *part, stored)}
    digests = {
        name: digest for part in parts - missing for name, digest in view_store.digests_of(folder, *part).items()
    }
    # Files have no digest in meta.json if the run was killed after writing them, or in stores of format version 1.
    if digests.items() - (stored.digests or {}).items():
        view_store.add_digests(folder, digests)
    if complete := epochs - len({epoch for epoch, _ in missing}):
        logger.info("%d of %d epochs are already stored in %s", complete, epochs, folder)
    return stored.world_size or 1, missing


def _parts(epochs: int, meta: StoreMeta) -> set[Part]:
    """Return all parts of a store of this many epochs."""
    return {(epoch, part) for epoch in range(1, epochs + 1) for part in range(meta.world_size or 1)}


def _is_stored(folder: Path, epoch: int, part: int, meta: StoreMeta) -> bool:
    """Return whether a part exists, is undamaged, and has the seeds of its epoch."""
    if not view_store.part_complete(folder, epoch, part):
        return False
    try:
        rows = view_store.read_part(folder, epoch, part, meta)
    except StoreError as error:
        logger.warning("%s; it is stored again", error)
        return False
    share = _share(meta.rows or 0, meta.batch_size or 1, part, meta.world_size or 1)
    expected = epoch_seeds(meta.seed or 0, epoch, meta.rows or 0)
    if not np.array_equal(rows.seeds, expected[_span(share)]):
        logger.warning("%s has other seeds; it is stored again", view_store.part_path(folder, epoch, part))
        return False
    return True


def _span(batches: Sequence[range]) -> slice:
    """Return the slice of all items of successive batches."""
    return slice(batches[0].start, batches[-1].stop) if batches else slice(0)
