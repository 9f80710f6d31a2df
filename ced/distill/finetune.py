"""Train a tagger on a labelled table: from random weights, or from those of a network with other classes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ced.config import FinetuneConfig
from ced.distill.dataset import ViewDataset, chunk_samples, crop
from ced.distill.evaluate import open_validation
from ced.distill.pack_reader import AudioPack
from ced.distill.step import TargetLoss
from ced.distill.trainer import (
    VIEWS,
    EpochData,
    Trainer,
    begin_run,
    initial_network,
    warn_of_padding,
    warn_of_splitting,
)
from ced.distill.views import check_masks, recipe_of
from ced.errors import ConfigError, TableError
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.labels import AUDIOSET, ClassTable, audioset, class_table
from ced.sound.tables import multi_hot
from ced.text import quoted


def finetune(config: FinetuneConfig, *, name: str, resume: Path | None = None, progress: Progress = silent) -> Path:
    """Train a network on a labelled table, alone or as one of torchrun's processes.

    Args:
        config: what to train, on what, and how.
        name: of the experiment, the folder above the one named by the time.
        resume: folder of an experiment to resume; None: that of this job of torchrun, or a new one.
        progress: called after each step and evaluated batch, in the first process.

    Returns:
        The experiment's folder; a finished experiment is not changed.

    Raises:
        TableError: a table lacks a column, a label is out of range, or with task `single` a clip has not one label.
        ConfigError: classes that are not AudioSet's have no class table, the masks blank whole chunks, or the
            configuration contradicts itself or the experiment to resume.
        PackError: the pack lacks a clip.
        TrainingError: the loss is not finite, or `resume` cannot be resumed.
        BusyError: another process is training in this experiment.
    """
    run = begin_run(config, name=name, resume=resume, progress=progress)
    if run.folder and run.state.finished:
        return run.folder
    labels = class_table(config.classes or Path(AUDIOSET))
    data = LabelledClips(config, labels)
    if config.classes is None:
        refuse_numbered_classes(data)
    warn_of_padding(data.pack, data.samples)
    single = config.task == "single"
    needs = {"pooling": "logit", "activation": "softmax" if single else "sigmoid"}
    network = initial_network(config, labels, needs, run.progress)
    warn_of_splitting(network, data.samples)
    if config.trainable == "head":
        train_head_only(network)
    objective = TargetLoss(network, F.cross_entropy if single else F.binary_cross_entropy_with_logits)
    validation = open_validation(config, labels)
    return Trainer(config, run, network, objective, data, validation=validation, mixup=config.mixup).fit()


def refuse_numbered_classes(clips: "LabelledClips") -> None:
    """Refuse a table whose labels are exactly 0 to some last number, if there is no class table for them.

    As indices of AudioSet's classes they would mean "Speech", "Male speech, man speaking", and so on.

    Raises:
        ConfigError: the labels are numbered so.
    """
    used = sorted({label for labels in clips.labels for label in labels})
    if used == list(range(len(used))) and len(used) < clips.num_classes:
        first = ", ".join(map(quoted, audioset().names[: min(len(used), 3)]))
        raise ConfigError(
            f"the labels of {clips.pack.path} are 0 to {used[-1]}, and as AudioSet's classes they would be "
            f"{first}{', ...' if len(used) > 3 else ''}; give a class table (index, name) with --classes, or, if they "
            f"are AudioSet's, --classes {AUDIOSET}"
        )


def train_head_only(network: CED) -> None:
    """Freeze all parameters of a network except those of its output layer."""
    network.requires_grad_(False)
    network.outputlayer.requires_grad_(True)


def balancing(labels: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """Return the weights (n,) to draw clips with, so that all classes are drawn about equally often.

    A class of n clips adds 1 / n to the weight of each of them; clips without a label count as a class of their own.
    """
    groups = [row or (-1,) for row in labels]
    counts = Counter(label for row in groups for label in row)
    return np.array([sum(1 / counts[label] for label in row) for row in groups])


class LabelledClips:
    """The clips of a labelled table: one random crop of each clip an epoch, under a view of its own."""

    def __init__(self, config: FinetuneConfig, labels: ClassTable) -> None:
        """Open the table of a configuration.

        Args:
            config: the table, the task, the length of the crops, their views, balancing and label smoothing.
            labels: the classes that the table's indices mean.

        Raises:
            TableError: a column is missing, no clip has a label, or with task `single` a clip has not one label.
            PackError: the pack lacks a clip.
            ConfigError: the crops are too short, or the masks blank whole crops.
        """
        self.samples = chunk_samples(config.chunk_length)
        self.pack = AudioPack(config.train_data)
        self.labels, self.num_classes = self.pack.labels(len(labels)), len(labels)
        if not any(self.labels):
            raise TableError(f"no clip of {config.train_data} has a label: there is nothing to learn")
        if config.task == "single":
            for number, labelled in enumerate(self.labels):
                if len(labelled) != 1:
                    where = f"table {config.train_data}, row {number + 1} ({self.pack.filename(number)})"
                    raise TableError(f"{where} has {len(labelled)} labels; task single needs exactly one a clip")
        self.recipe = recipe_of(config.wavtransforms, config.spectransforms, self.samples)
        check_masks(self.recipe, self.samples)
        self.seed = config.seed
        self.weights = balancing(self.labels) if config.balanced else None
        # Smoothing moves a target towards a uniform distribution: over the classes, or over yes and no for each class.
        uniform = 1 / self.num_classes if config.task == "single" else 0.5
        self.smoothing, self.offset = config.label_smoothing, config.label_smoothing * uniform

    def __len__(self) -> int:
        return len(self.pack)

    def epoch(self, epoch: int) -> EpochData:
        """Return the data of an epoch (1, 2, ...)."""
        rng = np.random.default_rng([self.seed, VIEWS, epoch])
        chunks = crop(self.pack, self.samples, rng)
        seeds = rng.integers(2**31, size=len(chunks), dtype=np.int32)
        dataset = ViewDataset(self.pack, chunks, self.recipe, seeds, self.samples)
        return EpochData(dataset, targets=self.targets, weights=self.weights)

    def targets(self, items: NDArray[np.int64], generator: torch.Generator) -> Tensor:
        """Return the smoothed labels of clips, (b,) -> (b, c); nothing is drawn."""
        rows = multi_hot([self.labels[item] for item in items], self.num_classes)
        return torch.from_numpy(rows).float() * (1 - self.smoothing) + self.offset
