"""Distil a student: from the views of a store it learns to give the scores that the teachers gave, without labels.

The walk is: row of the store -> chunk of the pack, shifted as its seed says -> front end and masks -> student;
top scores spread over all classes -> targets; step.
"""

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ced.config import TrainConfig
from ced.distill.dataset import Chunks, ViewDataset, chunks_of_rows, fingerprint
from ced.distill.evaluate import validation
from ced.distill.loop import VIEWS, EpochData, Task, run
from ced.distill.pack_reader import AudioPack
from ced.distill.start import start_network, warn_of_cuts
from ced.distill.targets import spread
from ced.distill.view_store import Rows, ViewStore
from ced.distill.views import blanking
from ced.errors import ConfigError, PackError, StoreError
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import default_classes

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, name: str, resume: Path | None = None, progress: Progress = silent) -> Path:
    """Distil a student from a view store; see `loop.run` for the arguments, the result and further errors.

    Raises:
        StoreError: the store is incomplete or damaged.
        PackError: the pack lacks a clip of the store, has it in another length, or has other audio.
        ConfigError: the store has other classes than the configuration.
    """
    return run(config, lambda: _task(config, progress), name=name, resume=resume, progress=progress)


def _task(config: TrainConfig, progress: Progress) -> Task:
    try:
        store = ViewStore(config.logitspath)
    except StoreError as error:
        error.hint = error.hint or "logitspath is the folder that `ced store` prints"
        raise
    meta = store.meta
    if meta.num_classes != config.num_classes:
        raise ConfigError(
            f"num_classes is {config.num_classes}, but {config.logitspath} has {meta.num_classes} classes; "
            f"set num_classes to {meta.num_classes}"
        )
    labels = meta.labels or default_classes(meta.num_classes)
    views = StoredViews(config, store, AudioPack(config.train_data))
    if not views.items:
        raise StoreError(f"view store {config.logitspath} has no views")
    views.check_audio()
    network = start_network(config, labels, {"pooling": "logit", "activation": "sigmoid"}, progress)
    if other := network.config.unpublished_feature:
        raise ConfigError(f"the student has {other}; its features have to be those of its teachers")
    warn_of_cuts(network, views.samples)
    if problem := blanking(views.recipe, views.samples):
        logger.warning("the views of %s were stored with masks too wide: %s; store them again", store.folder, problem)
    loss = F.binary_cross_entropy_with_logits
    return Task(network, views.items, views.epoch, loss, validation(config, labels), config.mixup)


class StoredViews:
    """The epochs of a store as training data."""

    def __init__(self, config: TrainConfig, store: ViewStore, pack: AudioPack) -> None:
        self.config, self.store, self.pack = config, store, pack
        self.samples = round(store.meta.chunk_length * SAMPLE_RATE)
        self.recipe = store.meta.recipe
        if config.disable_consistency:
            self.recipe = replace(self.recipe, shift=None)
        self._load = lru_cache(maxsize=1)(self._read)

    @property
    def items(self) -> int:
        """Views of the first stored epoch."""
        return len(self._load(1)[0])

    def epoch(self, epoch: int) -> EpochData:
        """Return the data of a training epoch (1, 2, ...): the stored epochs in turn, then again from the first."""
        rows, chunks = self._load(self.store.epoch_of(epoch, self.config.max_aug_epochs))
        seeds = rows.seeds
        if self.config.disable_consistency:
            rng = np.random.default_rng([self.config.seed, VIEWS, epoch])
            seeds = rng.integers(2**31, size=len(rows), dtype=np.int32)

        def targets(items: NDArray[np.int64], generator: torch.Generator) -> Tensor:
            values, indexes = torch.from_numpy(rows.values[items]), torch.from_numpy(rows.indexes[items])
            return spread(values, indexes, self.store.meta.num_classes, self.config.label_type, generator)

        return EpochData(ViewDataset(self.pack, chunks, self.recipe, seeds, self.samples), targets)

    def check_audio(self) -> None:
        """Compare the audio of the pack with that of the store, where the store has a fingerprint of it.

        Raises:
            PackError: they differ.
        """
        rows, chunks = self._load(1)
        expected = self.store.meta.chunks
        if expected is not None and expected != fingerprint(self.pack, chunks, rows.filenames, rows.starts, rows.ends):
            raise PackError(
                f"the audio differs: {self.pack.path} has the names and lengths of the clips that the teachers "
                f"of {self.store.folder} scored, but other samples; use the pack that was stored, or store the views "
                "of this one"
            )

    def _read(self, stored_epoch: int) -> tuple[Rows, Chunks]:
        rows = self.store.rows(stored_epoch)
        return rows, chunks_of_rows(self.pack, rows, self.store.meta.chunk_length)
