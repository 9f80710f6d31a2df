"""Learn a labelled table: train a tagger from scratch, or fine-tune one that was trained on other classes."""

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
from ced.distill.evaluate import validation
from ced.distill.loop import VIEWS, EpochData, Task, run
from ced.distill.pack_reader import AudioPack
from ced.distill.start import start_network, warn_of_cuts, warn_of_padding
from ced.distill.step import Loss
from ced.distill.views import check_masks, recipe_of
from ced.errors import ConfigError, TableError
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.labels import AUDIOSET, ClassTable, audioset, class_table
from ced.sound.tables import multi_hot, parse_labels
from ced.text import quoted


def finetune(config: FinetuneConfig, *, name: str, resume: Path | None = None, progress: Progress = silent) -> Path:
    """Train a network on a labelled table; see `loop.run` for the arguments, the result and further errors.

    Raises:
        TableError: a table lacks a column, or a clip has a label out of range, or other than one with task `single`.
        ConfigError: there is no class table for classes that are not AudioSet's, or the masks blank whole chunks.
        PackError: the pack lacks a clip.
    """
    return run(config, lambda: _task(config, progress), name=name, resume=resume, progress=progress)


def _task(config: FinetuneConfig, progress: Progress) -> Task:
    labels = class_table(config.classes or Path(AUDIOSET))
    clips = LabelledClips(config, labels)
    if config.classes is None:
        refuse_numbered_classes(clips)
    single = config.task == "single"
    needs = {"pooling": "logit", "activation": "softmax" if single else "sigmoid"}
    network = start_network(config, labels, needs, progress)
    warn_of_cuts(network, clips.samples)
    if config.trainable == "head":
        learn_head(network)
    loss: Loss = F.cross_entropy if single else F.binary_cross_entropy_with_logits
    return Task(network, len(clips.pack), clips.epoch, loss, validation(config, labels), config.mixup)


def refuse_numbered_classes(clips: "LabelledClips") -> None:
    """Refuse a table whose labels are 0, 1, 2, ... to a last one, where no class table says what they are.

    As indices of AudioSet's classes they would be "Speech", "Male speech, man speaking", and so on.

    Raises:
        ConfigError: the labels are of that kind.
    """
    used = sorted({label for labels in clips.labels for label in labels})
    if used == list(range(len(used))) and len(used) < clips.num_classes:
        first = ", ".join(map(quoted, audioset().names[: min(len(used), 3)]))
        raise ConfigError(
            f"the labels of {clips.pack.table.path} are 0 to {used[-1]}, and as AudioSet's classes they would be "
            f"{first}{', ...' if len(used) > 3 else ''}; give a class table (index, name) with --classes, or, if they "
            f"are AudioSet's, --classes {AUDIOSET}"
        )


def learn_head(network: CED) -> None:
    """Freeze all of a network but its output layer."""
    network.requires_grad_(False)
    network.outputlayer.requires_grad_(True)


def balancing(labels: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """Return how often to draw each clip so that all classes come up about equally often, (n,).

    Each class of a clip adds one n-th to it, n being the clips of that class; clips without any are one more class.
    """
    groups = [row or (-1,) for row in labels]
    counts = Counter(label for row in groups for label in row)
    return np.array([sum(1 / counts[label] for label in row) for row in groups])


class LabelledClips:
    """A labelled table as training data: of each clip one random crop an epoch, under a view of its own."""

    def __init__(self, config: FinetuneConfig, labels: ClassTable) -> None:
        self.samples = chunk_samples(config.chunk_length)
        self.pack = AudioPack(config.train_data)
        self.labels, self.num_classes = parse_labels(self.pack.table, len(labels)), len(labels)
        if not any(self.labels):
            raise TableError(f"no clip of {config.train_data} has a label: there is nothing to learn")
        if config.task == "single":
            filenames = self.pack.table.column("filename")
            for number, (filename, row) in enumerate(zip(filenames, self.labels, strict=True), start=1):
                if len(row) != 1:
                    raise TableError(
                        f"table {config.train_data}, row {number} ({filename}) has {len(row)} labels; "
                        "task single needs exactly one a clip"
                    )
        self.recipe = recipe_of(config.wavtransforms, config.spectransforms, self.samples)
        check_masks(self.recipe, self.samples)
        warn_of_padding(self.pack, self.samples)
        self.seed = config.seed
        self.weights = balancing(self.labels) if config.balanced else None
        # Of a class among all, or of yes and no for each class.
        even = 1 / self.num_classes if config.task == "single" else 0.5
        self.smoothing, self.offset = config.label_smoothing, config.label_smoothing * even

    def epoch(self, epoch: int) -> EpochData:
        """Return the data of a training epoch (1, 2, ...)."""
        rng = np.random.default_rng([self.seed, VIEWS, epoch])
        chunks = crop(self.pack, self.samples, rng)
        seeds = rng.integers(2**31, size=len(chunks), dtype=np.int32)

        def targets(items: NDArray[np.int64], generator: torch.Generator) -> Tensor:
            rows = multi_hot([self.labels[item] for item in items], self.num_classes)
            return torch.from_numpy(rows).float() * (1 - self.smoothing) + self.offset

        return EpochData(ViewDataset(self.pack, chunks, self.recipe, seeds, self.samples), targets, self.weights)
