"""How good a tagger is: mean average precision over the clips of a labelled table.

Clips are scored whole, those of equal length together, so that a clip's scores do not depend on its neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ced.config import Mode, TaggerConfig
from ced.distill.datasets import ViewDataset, in_order, prefetch, whole
from ced.distill.distributed import World
from ced.distill.precision import autocast
from ced.distill.wavpack import WavPack
from ced.errors import ConfigError, TableError
from ced.model.metrics import accuracy, average_precision
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable
from ced.sound.tables import multi_hot, parse_labels


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a labelled table says about a tagger."""

    map: float  # mean of the classes' average precision
    per_class: NDArray[np.float64]  # (c,) average precision; NaN for the missing classes
    missing: tuple[str, ...]  # classes without a positive clip, left out of the mean
    clips: int  # how many clips the figures are about
    labels: ClassTable
    accuracy: float | None  # part of the clips whose label scores highest; None unless each has exactly one

    @property
    def summary(self) -> str:
        """The figures in one line."""
        covered = len(self.labels) - len(self.missing)
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        return f"mAP {self.map:.4f}{accuracy} ({self.clips} clips, {covered} of {len(self.labels)} classes)"


class Evaluator:
    """A labelled table, opened to evaluate any number of taggers on it.

    Every process of a run must take part; each scores its share of the clips and gets the whole result. Memory grows
    with the longest clip, by 2 to 3 GB an hour for a small network, and hardly with the number of clips.
    """

    def __init__(
        self, table: Path, labels: ClassTable, *, batch_size: int = 32, num_workers: int = 4, mode: Mode = "off"
    ) -> None:
        """Open a table.

        Args:
            table: a labelled table with the columns filename, labels and hdf5path.
            labels: the classes that its indices mean.
            batch_size: clips scored at once; fewer of those that are longer than one forward pass.
            num_workers: threads that read audio.
            mode: precision of the network.

        Raises:
            TableError: a column is missing, an index is out of range, or no clip has any class.
            PackError: a clip of the table is not in its pack.
        """
        self.labels, self.batch_size, self.num_workers, self.mode = labels, batch_size, num_workers, mode
        pack = WavPack(table)
        self.targets = multi_hot(parse_labels(pack.table, len(labels)), len(labels))
        if not self.targets.any():
            raise TableError(f"no clip of {table} has a class: there is nothing to evaluate ({len(pack)} clips)")
        self.dataset = ViewDataset(pack, whole(pack, range(len(pack))))

    @property
    def missing(self) -> tuple[str, ...]:
        """Classes without a positive clip."""
        return tuple(self.labels.names[column] for column in np.flatnonzero(~self.targets.any(0)))

    def __call__(
        self, models: CED | Sequence[CED], *, world: World | None = None, progress: Progress = silent
    ) -> Evaluation:
        """Evaluate a tagger, or several by the mean of their probabilities.

        Raises:
            ConfigError: a tagger has other classes than the table.
            TrainingError: a score is NaN.
        """
        members = [models] if isinstance(models, CED) else list(models)
        for member in members:
            if member.labels.names != self.labels.names:
                raise ConfigError("the tagger's classes are not those of the table")
        scores = self.scores(members, world=world, progress=progress)
        per_class = average_precision(self.targets, scores)
        return Evaluation(
            map=float(np.nanmean(per_class)),
            per_class=per_class,
            missing=self.missing,
            clips=len(scores),
            labels=self.labels,
            accuracy=accuracy(self.targets, scores),
        )

    def scores(
        self, members: Sequence[CED], *, world: World | None = None, progress: Progress = silent
    ) -> NDArray[np.float32]:
        """Return the mean probabilities of all clips, (n, c), in every process."""
        world = world or World(0, 1, next(members[0].parameters()).device)
        longest = min(member.config.target_length * member.config.hop_size for member in members)
        batches = list(self._batches(longest))[world.rank :: world.size]
        was_training = [member.training for member in members]
        for member in members:
            member.eval()
        found = []
        with torch.inference_mode(), autocast(self.mode, world.device):
            for done, batch in enumerate(prefetch(self.dataset, batches, self.num_workers), start=1):
                waves, _ = batch.to_device(world.device)
                probs = torch.stack([member.probs(waves) for member in members]).mean(0)
                found.append((batch.items, probs.cpu().numpy()))
                if world.is_main:
                    progress("evaluate", done, len(batches))
        for member, training in zip(members, was_training, strict=True):
            member.train(training)
        scores = np.full(self.targets.shape, np.nan, np.float32)
        for items, probs in (pair for share in world.gather(found) for pair in share):
            scores[items] = probs
        return scores

    def _batches(self, longest: int) -> Iterator[NDArray[np.int64]]:
        """Group clips of equal length; clips longer than `longest` samples weigh as many as they are long."""
        lengths = self.dataset.chunks.stops
        for length in np.unique(lengths):
            clips = np.flatnonzero(lengths == length)
            size = max(1, self.batch_size * longest // max(int(length), longest))
            for batch in in_order(len(clips), size):
                yield clips[batch]


def evaluate(
    models: CED | Sequence[CED],
    table: Path,
    *,
    batch_size: int = 32,
    num_workers: int = 4,
    mode: Mode = "off",
    world: World | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a tagger on a labelled table, or several by the mean of their probabilities; see `Evaluator`."""
    first = models if isinstance(models, CED) else models[0]
    evaluator = Evaluator(table, first.labels, batch_size=batch_size, num_workers=num_workers, mode=mode)
    return evaluator(models, world=world, progress=progress)


@dataclass(frozen=True, eq=False)
class Validation:
    """How a training run is validated, and what follows from it."""

    evaluator: Evaluator
    config: TaggerConfig


def validation(config: TaggerConfig, labels: ClassTable) -> Validation | None:
    """Open the table that a training run is validated on, if it has one."""
    if config.eval_data is None:
        return None
    evaluator = Evaluator(
        config.eval_data,
        labels,
        batch_size=config.eval_batch_size,
        num_workers=config.num_workers,
        mode=config.mode,
    )
    return Validation(evaluator, config)
