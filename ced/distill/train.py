"""Distil a student: train it on the views of a store to predict the teachers' scores, without labels.

In each step: rows of the store -> chunks of the pack, shifted by their seeds -> front end and masks -> student; the
stored top scores, spread over all classes -> targets; loss and optimiser.
"""

import logging
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ced.config import Fill, TrainConfig
from ced.distill.dataset import Chunks, ViewDataset, chunks_of_rows, fingerprint
from ced.distill.evaluate import open_validation
from ced.distill.pack_reader import AudioPack
from ced.distill.step import TargetLoss
from ced.distill.targets import spread
from ced.distill.trainer import VIEWS, EpochData, Trainer, begin_run, initial_network, warn_of_splitting
from ced.distill.view_store import Rows, ViewStore
from ced.distill.views import blanking
from ced.errors import ConfigError, PackError, StoreError
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import default_classes

logger = logging.getLogger(__name__)


def train(config: TrainConfig, *, name: str, resume: Path | None = None, progress: Progress = silent) -> Path:
    """Distil a student from a view store, alone or as one of torchrun's processes.

    Args:
        config: what to train, on what, and how.
        name: of the experiment, the folder above the one named by the time.
        resume: folder of an experiment to resume; None: that of this job of torchrun, or a new one.
        progress: called after each step and evaluated batch, in the first process.

    Returns:
        The experiment's folder; a finished experiment is not changed.

    Raises:
        StoreError: the store is incomplete or damaged.
        PackError: the pack lacks a clip of the store, or has one with another length or other samples.
        ConfigError: the configuration contradicts itself, the store, or the experiment to resume.
        TrainingError: the loss is not finite, or `resume` cannot be resumed.
        BusyError: another process is training in this experiment.
    """
    run = begin_run(config, name=name, resume=resume, progress=progress)
    if run.folder and run.state.finished:
        return run.folder
    store = open_store(config.logitspath, config.num_classes)
    labels = store.meta.labels or default_classes(store.meta.num_classes)
    data = StoredViews(
        store,
        AudioPack(config.train_data),
        fill=config.label_type,
        max_epochs=config.max_aug_epochs,
        consistent=not config.disable_consistency,
        seed=config.seed,
    )
    data.check()
    network = initial_network(config, labels, {"pooling": "logit", "activation": "sigmoid"}, run.progress)
    if other := network.config.unpublished_feature:
        raise ConfigError(f"the student has {other}; its features have to be those of its teachers")
    warn_of_splitting(network, data.samples)
    objective = TargetLoss(network, F.binary_cross_entropy_with_logits)
    validation = open_validation(config, labels)
    return Trainer(config, run, network, objective, data, validation=validation, mixup=config.mixup).fit()


def open_store(folder: Path, num_classes: int) -> ViewStore:
    """Open a view store that has `num_classes` classes.

    Raises:
        StoreError: it is not there, incomplete or damaged.
        ConfigError: it has another number of classes.
    """
    try:
        store = ViewStore(folder)
    except StoreError as error:
        error.hint = error.hint or "logitspath is the folder that `ced store` prints"
        raise
    if store.meta.num_classes != num_classes:
        raise ConfigError(
            f"num_classes is {num_classes}, but {folder} has {store.meta.num_classes} classes; "
            f"set num_classes to {store.meta.num_classes}"
        )
    return store


class StoredViews:
    """The views of a store, with the teachers' scores as targets."""

    def __init__(
        self,
        store: ViewStore,
        pack: AudioPack,
        *,
        fill: Fill = "zero",
        max_epochs: int | None = None,
        consistent: bool = True,
        seed: int = 42,
    ) -> None:
        """Join a store with the pack that its views are of.

        Args:
            store: the views.
            pack: the audio of their clips.
            fill: scores of the classes outside the stored ones.
            max_epochs: use only this number of stored epochs; None: all.
            consistent: whether the student gets the teachers' views, or masks of its own and no shift.
            seed: of the student's own masks.
        """
        self.store, self.pack, self.fill, self.max_epochs = store, pack, fill, max_epochs
        self.consistent, self.seed = consistent, seed
        self.samples = round(store.meta.chunk_length * SAMPLE_RATE)
        self.recipe = store.meta.recipe if consistent else replace(store.meta.recipe, shift=None)
        self._load = lru_cache(maxsize=1)(self._read)

    def __len__(self) -> int:
        """Return the number of views of the first stored epoch."""
        return len(self._load(1)[0])

    def epoch(self, epoch: int) -> EpochData:
        """Return the data of an epoch (1, 2, ...): the stored epochs in turn, then again from the first."""
        rows, chunks = self._load(self.store.epoch_of(epoch, self.max_epochs))
        seeds = rows.seeds
        if not self.consistent:
            rng = np.random.default_rng([self.seed, VIEWS, epoch])
            seeds = rng.integers(2**31, size=len(rows), dtype=np.int32)
        dataset = ViewDataset(self.pack, chunks, self.recipe, seeds, self.samples)
        return EpochData(dataset, targets=partial(self._targets, rows))

    def check(self) -> None:
        """Check that there are views, and that the pack has the audio that was stored, where its digest is known.

        Raises:
            StoreError: there are no views.
            PackError: the audio differs.
        """
        rows, chunks = self._load(1)
        if not len(rows):
            raise StoreError(f"view store {self.store.folder} has no views")
        expected = self.store.meta.chunks
        if expected is not None and expected != fingerprint(self.pack, chunks, rows.filenames, rows.starts, rows.ends):
            raise PackError(
                f"the audio differs: {self.pack.path} has the names and lengths of the clips that the teachers "
                f"of {self.store.folder} scored, but other samples; use the pack that was stored, or store the views "
                "of this one"
            )
        if problem := blanking(self.recipe, self.samples):
            logger.warning(
                "the views of %s were stored with masks too wide: %s; store them again", self.store.folder, problem
            )

    def _read(self, stored_epoch: int) -> tuple[Rows, Chunks]:
        rows = self.store.rows(stored_epoch)
        return rows, chunks_of_rows(self.pack, rows, self.store.meta.chunk_length)

    def _targets(self, rows: Rows, items: NDArray[np.int64], generator: torch.Generator) -> Tensor:
        values, indexes = torch.from_numpy(rows.values[items]), torch.from_numpy(rows.indexes[items])
        return spread(values, indexes, self.store.meta.num_classes, self.fill, generator)
