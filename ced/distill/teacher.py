"""Store views: teachers score every chunk under views drawn anew each epoch, and their top scores go to disk.

The walk is: chunks of the pack, new seeds -> waves, shifted -> front end and masks -> each teacher -> mean of
probabilities -> top k -> view store. A student later makes the same mel from the same seeds.
"""

import hashlib
import logging
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ced.config import StoreConfig
from ced.distill import viewstore
from ced.distill.datasets import Batch, Chunks, ViewDataset, chunk_samples, cut, in_order, prefetch
from ced.distill.distributed import World, join
from ced.distill.ensemble import Ensemble, is_callable_spec, load_teacher
from ced.distill.precision import half_type
from ced.distill.views import mask, recipe_of
from ced.distill.viewstore import META_NAME, Rows, StoreMeta
from ced.distill.wavpack import WavPack
from ced.errors import ConfigError, StoreError
from ced.files import claimed
from ced.model.frontend import LogMel
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE

_log = logging.getLogger(__name__)

_HEARD = 256  # chunks that tell audio packed anew from what was there
_MAX_CLASSES = 2**15  # class indices are stored as int16
_PRECISIONS = {None: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def store(config: StoreConfig, *, progress: Progress = silent) -> Path:
    """Store the teachers' scores of `config.epochs` views of every chunk of `config.train_data`.

    Runs alone or as one of the processes of torchrun. Parts that are complete are kept, so an interrupted run may be
    repeated and ends with the same bytes as an unbroken one.

    Returns:
        The store's folder.

    Raises:
        StoreError: the folder has a store made with other settings, a teacher's scores are not probabilities, or there
            is nothing to score.
        ConfigError: a teacher cannot be had, or the settings contradict the teachers.
        PackError: the pack lacks a clip.
    """
    pack = WavPack(config.train_data)
    chunks = cut(pack, config.chunk_length)
    if not len(chunks):
        raise StoreError(f"{config.train_data} has no clip of half a chunk ({config.chunk_length / 2:g} s) or more")
    folder = store_folder(config)
    world = join()
    if (without := len(pack) - len(np.unique(chunks.clips))) and world.is_main:
        half = f"half a chunk ({config.chunk_length / 2:g} s)"
        _log.warning("%d of %d clips are shorter than %s and left out", without, len(pack), half)
    walk = _Walk(config, pack, chunks, world, progress if world.is_main else silent)
    with claimed(folder / META_NAME) if world.is_main else nullcontext():
        if _claim(folder, walk.meta, config.epochs, world):
            for epoch in range(1, config.epochs + 1):
                if not viewstore.part_complete(folder, epoch, world.rank):
                    viewstore.write_part(folder, epoch, world.rank, walk.epoch(epoch))
            world.barrier()
    return folder


def store_folder(config: StoreConfig) -> Path:
    """Return where a store goes: `<outputpath>/<model>/<stem of train_data>/chunk_<seconds>`."""
    names = [_file_name(spec) for spec in _specs(config)]
    model = names[0] if len(names) == 1 else "_".join(name.replace("audiotransformer_", "") for name in names)
    return config.outputpath / model / config.train_data.stem / f"chunk_{config.chunk_length:g}"


def epoch_seeds(seed: int, epoch: int, count: int) -> NDArray[np.int32]:
    """Draw the seeds of an epoch's views, (count,), the same for any number of processes."""
    numbers = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    return numbers.randint(0, 2**31, size=count, dtype=np.int64).astype(np.int32)


class _Walk:
    """All that one process needs to score its share of the chunks."""

    def __init__(self, config: StoreConfig, pack: WavPack, chunks: Chunks, world: World, progress: Progress) -> None:
        self._config, self._pack, self._chunks, self._world, self._progress = config, pack, chunks, world, progress
        self._samples = chunk_samples(config.chunk_length)
        # Runs of whole batches: what a chunk is scored together with does not depend on the number of processes.
        batches = list(in_order(len(chunks), config.batch_size))
        first, last = (math.ceil(rank * len(batches) / world.size) for rank in (world.rank, world.rank + 1))
        self._batches = batches[first:last]
        self._front_end = LogMel().to(world.device)
        self._recipe = recipe_of(config.wavtransforms, config.spectransforms)
        self._filenames = np.array(pack.names, dtype=object)[chunks.clips]
        self._starts, self._ends = ((at / SAMPLE_RATE).astype(np.float32) for at in (chunks.starts, chunks.stops))
        silence = self._front_end(torch.zeros(2, self._samples, device=world.device))
        teachers = [load_teacher(spec, config.model_args, world.device, progress) for spec in _specs(config)]
        self._ensemble = Ensemble(teachers, config.mode, silence)
        if not config.topk <= self._ensemble.num_classes <= _MAX_CLASSES:
            raise ConfigError(
                f"topk is {config.topk} and the teachers have {self._ensemble.num_classes} classes; "
                f"topk is at most the number of classes, that at most {_MAX_CLASSES}"
            )

    @property
    def meta(self) -> StoreMeta:
        """What the store says about itself."""
        config, ensemble = self._config, self._ensemble
        return StoreMeta(
            recipe=self._recipe,
            topk=config.topk,
            num_classes=ensemble.num_classes,
            chunk_length=config.chunk_length,
            teachers=tuple(_name(spec) for spec in _specs(config)),
            labels=ensemble.labels,
            precision=_PRECISIONS[half_type(config.mode, self._world.device)],
            weights=tuple(teacher.weights for teacher in ensemble.teachers),
            model_args=config.model_args,
            seed=config.seed,
            batch_size=config.batch_size,
            world_size=self._world.size,
            rows=len(self._chunks),
            chunks=self._fingerprint(),
        )

    def _fingerprint(self) -> str:
        """Return a digest of the chunks' names and times, and of what some of them sound like: all would take long."""
        digest = hashlib.sha256("\n".join(self._filenames).encode())
        digest.update(self._starts.tobytes() + self._ends.tobytes())
        some = np.linspace(0, len(self._chunks) - 1, min(len(self._chunks), _HEARD)).astype(int)
        for item in some.tolist():
            digest.update(self._pack.read(*self._chunks.place(item)).tobytes())
        return digest.hexdigest()

    def epoch(self, epoch: int) -> Rows:
        """Score this process's share of the chunks under an epoch's views."""
        config = self._config
        seeds = epoch_seeds(config.seed, epoch, len(self._chunks))
        views = ViewDataset(self._pack, self._chunks, self._recipe, seeds, self._samples)
        # A first part of no rows, for a process without batches.
        values, indexes = [np.empty((0, config.topk), np.float16)], [np.empty((0, config.topk), np.int16)]
        for done, batch in enumerate(prefetch(views, self._batches, config.num_workers), start=1):
            top = self._score(batch)
            values.append(top.values.half().cpu().numpy())
            indexes.append(top.indices.short().cpu().numpy())
            self._progress(f"epoch {epoch} of {config.epochs}", done, len(self._batches))
        mine = slice(self._batches[0].start, self._batches[-1].stop) if self._batches else slice(0)
        return Rows(
            values=np.concatenate(values),
            indexes=np.concatenate(indexes),
            seeds=seeds[mine],
            filenames=self._filenames[mine],
            starts=self._starts[mine],
            ends=self._ends[mine],
        )

    def _score(self, batch: Batch) -> torch.return_types.topk:
        waves, uniforms = batch.to_device(self._world.device)
        mel = mask(self._front_end(waves), uniforms, self._recipe)
        return self._ensemble(mel).topk(self._config.topk)


def _specs(config: StoreConfig) -> list[str]:
    specs = [config.model] if isinstance(config.model, str) else config.model
    if not specs:
        raise ConfigError("model is an empty list; name at least one teacher")
    return specs


def _name(spec: str) -> str:
    """Return what a teacher is called: its name, the stem of its path, or its `module:callable`."""
    path = Path(spec)
    return spec if is_callable_spec(spec) else path.stem if path.is_file() else path.name


def _file_name(spec: str) -> str:
    return re.sub(r"[^\w.-]+", "_", _name(spec))


def _claim(folder: Path, meta: StoreMeta, epochs: int, world: World) -> bool:
    """Make the folder this run's, in all processes alike; say whether there is something left to do."""
    left, problem = world.broadcast(_claim_alone(folder, meta, epochs) if world.is_main else None)
    if problem:
        raise StoreError(problem)
    return bool(left)


def _claim_alone(folder: Path, meta: StoreMeta, epochs: int) -> tuple[bool, str | None]:
    """Write meta.json, or compare it with the one that is there; return whether work is left, and what forbids it."""
    if not (folder / META_NAME).exists():
        if any(folder.glob("logits_ep*.h5")):
            return False, f"{folder} has views but no {META_NAME}; choose another outputpath"
        viewstore.write_meta(folder, meta)
        return True, None
    try:
        stored = viewstore.read_meta(folder)
    except StoreError as error:
        return False, str(error)
    # As many processes as before only matter when something is left to do.
    changed = viewstore.difference(replace(stored, world_size=meta.world_size), meta)
    ranks = range(stored.world_size or 1)
    complete = [e for e in range(1, epochs + 1) if all(viewstore.part_complete(folder, e, r) for r in ranks)]
    if changed is None and len(complete) < epochs:
        changed = viewstore.difference(stored, meta)
    if changed is not None:
        return False, f"{folder} was stored with other settings: {changed}; use those, or another outputpath"
    if complete:
        _log.info("%d of %d epochs are already stored in %s", len(complete), epochs, folder)
    return len(complete) < epochs, None
