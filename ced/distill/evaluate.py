"""Evaluate a tagger: mean average precision over the clips of a labelled table.

Clips are scored whole, in batches of equal length, so that a clip's scores do not depend on the others. A clip that
needs many forward passes is read and scored in blocks, so that memory does not grow with its length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ced.config import Mode, TaggerConfig
from ced.distill.dataset import Batch, ViewDataset, in_batches, prefetch, whole_clips
from ced.distill.distributed import World, autocast
from ced.distill.pack_reader import AudioPack
from ced.errors import ConfigError, PackError, TableError
from ced.files import writing, written_aside
from ced.model.config import ModelConfig
from ced.model.metrics import Figures, accuracy, average_precision
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.features import PATCH, TOP_DB, frames_of
from ced.sound.labels import ClassTable
from ced.sound.tables import multi_hot
from ced.text import csv_lines

DELIMITERS = {".tsv": "\t", ".csv": ","}  # of tables of results, by suffix
PIECES_AT_ONCE = 32  # clips of more forward passes are scored in blocks; this is 5 minutes with published networks


@dataclass(frozen=True, eq=False)
class Evaluation(Figures):
    """The metrics of a tagger on a labelled table, and the results of each class."""

    per_class: NDArray[np.float64]  # (c,) average precision; NaN for the missing classes
    positives: NDArray[np.int64]  # (c,) number of clips with the class
    recall: NDArray[np.float64] | None  # (c,) part of a class's clips in which it scores highest; None as `accuracy`
    missing: tuple[str, ...]  # classes without a positive clip, which are left out of the mean
    clips: int  # number of clips
    labels: ClassTable

    @property
    def summary(self) -> str:
        """The results in one line."""
        covered = len(self.labels) - len(self.missing)
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        return f"mAP {self.map:.4f}{accuracy} ({self.clips} clips, {covered} of {len(self.labels)} classes)"


class Evaluator:
    """A labelled table on which taggers are evaluated.

    Every process of a run must take part; each scores its share of the clips and gets the whole result. Memory does
    not grow with the length of the clips, and only by their scores with their number.
    """

    def __init__(
        self, table: Path, labels: ClassTable, *, batch_size: int = 32, num_workers: int = 4, mode: Mode = "off"
    ) -> None:
        """Open a table.

        Args:
            table: a labelled table with the columns filename, labels and hdf5path.
            labels: the classes that its indices mean.
            batch_size: clips of a batch; fewer if they are longer than one forward pass.
            num_workers: threads that read audio.
            mode: precision of the network.

        Raises:
            TableError: a column is missing, an index is out of range, or no clip has any class.
            PackError: a clip of the table is not in its pack.
        """
        self.table, self.labels = table, labels
        self.batch_size, self.num_workers, self.mode = batch_size, num_workers, mode
        pack = AudioPack(table)
        self.targets = multi_hot(pack.labels(len(labels)), len(labels))
        if not self.targets.any():
            raise TableError(f"no clip of {table} has a class: there is nothing to evaluate ({len(pack)} clips)")
        self.dataset = ViewDataset(pack, whole_clips(pack, range(len(pack))))

    @property
    def missing(self) -> tuple[str, ...]:
        """Classes without a positive clip."""
        return tuple(self.labels.names[column] for column in np.flatnonzero(~self.targets.any(0)))

    def __call__(
        self, models: CED | Sequence[CED], *, world: World | None = None, progress: Progress = silent
    ) -> Evaluation:
        """Evaluate a tagger, or the mean of the probabilities of several.

        Raises:
            ConfigError: the classes of a tagger are not those of the table.
            TrainingError: a score is NaN.
        """
        members = [models] if isinstance(models, CED) else list(models)
        for member in members:
            if member.labels.names != self.labels.names:
                raise ConfigError("the tagger's classes are not those of the table")
        scores = self.scores(members, world=world, progress=progress)
        per_class = average_precision(self.targets, scores)
        found = accuracy(self.targets, scores)
        highest = scores.argmax(1)
        positives = self.targets.sum(0)
        hits = np.bincount(highest[self.targets[np.arange(len(scores)), highest]], minlength=len(positives))
        return Evaluation(
            map=float(np.nanmean(per_class)),
            per_class=per_class,
            positives=positives,
            recall=None if found is None else np.where(positives, hits / np.maximum(positives, 1), np.nan),
            missing=self.missing,
            clips=len(scores),
            labels=self.labels,
            accuracy=found,
        )

    def scores(
        self, members: Sequence[CED], *, world: World | None = None, progress: Progress = silent
    ) -> NDArray[np.float32]:
        """Return the mean probabilities of all clips, (n, c), in every process."""
        world = world or World(0, 1, next(members[0].parameters()).device)
        longest = min(member.config.target_length * member.config.hop_size for member in members)
        batches = list(self._batches(longest))[world.rank :: world.size]
        long = np.flatnonzero(self.dataset.chunks.stops > PIECES_AT_ONCE * longest)[world.rank :: world.size].tolist()
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
                    progress("evaluate", done, len(batches) + len(long))
            for done, clip in enumerate(long, start=1 + len(batches)):
                probs = torch.stack([self._long_probs(member, clip, world) for member in members]).mean(0)
                found.append((np.array([clip]), probs[None].cpu().numpy()))
                if world.is_main:
                    progress("evaluate", done, len(batches) + len(long))
        for member, training in zip(members, was_training, strict=True):
            member.train(training)
        scores = np.full(self.targets.shape, np.nan, np.float32)
        for items, probs in (pair for share in world.gather(found) for pair in share):
            scores[items] = probs
        return scores

    def _long_probs(self, member: CED, clip: int, world: World) -> Tensor:
        """Return the probabilities of a clip that is read in blocks, (c,)."""
        return probs_in_blocks(member, partial(self._read, clip, world.device), self.dataset.pack.samples(clip))

    def _read(self, clip: int, device: torch.device, start: int, stop: int) -> Tensor:
        """Return samples of a clip, (1, t) float32 on a device."""
        wave = torch.from_numpy(self.dataset.pack.read(clip, start, stop).copy())
        return Batch(np.array([clip]), wave[None], torch.zeros(1, 2)).to_device(device)[0]

    def _batches(self, longest: int) -> Iterator[NDArray[np.int64]]:
        """Yield batches of clips of equal length; those that are scored in blocks are left out.

        Clips longer than `longest` samples, one forward pass, are put into proportionally smaller batches.
        """
        lengths = self.dataset.chunks.stops
        for length in np.unique(lengths[lengths <= PIECES_AT_ONCE * longest]):
            clips = np.flatnonzero(lengths == length)
            size = max(1, self.batch_size * longest // max(int(length), longest))
            for batch in in_batches(len(clips), size):
                yield clips[batch]


def probs_in_blocks(model: CED, read: Callable[[int, int], Tensor], samples: int) -> Tensor:
    """Score a long clip as `CED.probs` does, with at most `PIECES_AT_ONCE` + 1 pieces of it in memory.

    Features are clamped at a level relative to the maximum of the whole clip, so the clip is read twice.

    Args:
        model: in eval mode.
        read: returns samples [start, stop) of the clip, (1, t) float in [-1, 1], on the model's device.
        samples: of the clip; more than two forward passes.

    Returns:
        (c,) float32 probabilities.
    """
    config = model.config
    frames = frames_of(samples, config.hop_size) if config.center else 1 + (samples - config.n_fft) // config.hop_size
    # Every block but the last consists of whole pieces. The last one is longer than a piece, so that its own last piece
    # is padded as in a clip that is scored whole.
    ends = list(range(PIECES_AT_ONCE * config.target_length, frames, PIECES_AT_ONCE * config.target_length))
    if ends and frames - ends[-1] <= config.target_length:
        ends.pop()
    blocks = list(pairwise([0, *ends, frames]))
    floor = max(float(_decibels(model, read, samples, *block).max()) for block in blocks) - TOP_DB
    total, pieces = torch.zeros(()), 0
    for first, last in blocks:
        scores = model.forward_mel(_decibels(model, read, samples, first, last).clamp_min(floor))[0].float()
        count = _pieces(last - first, config)
        if config.eval_avg == "max":
            total = scores if not pieces else total.maximum(scores)
        else:
            total = scores if not pieces else total + (scores - total) * (count / (pieces + count))
        pieces += count
    return model.as_probs(total)


def _pieces(frames: int, config: ModelConfig) -> int:
    """Return how many pieces of a mel are scored: a short last one is padded or, if shorter than a patch, left out."""
    whole, rest = divmod(frames, config.target_length)
    return whole + (rest > 0 if config.pad_last else rest >= PATCH)


def _decibels(model: CED, read: Callable[[int, int], Tensor], samples: int, first: int, last: int) -> Tensor:
    """Return the features of frames [first, last) of a clip, not clamped, (1, f, n)."""
    config = model.config
    margin = config.n_fft // 2 if config.center else 0  # samples of padding on both sides of the clip
    start, stop = first * config.hop_size - margin, (last - 1) * config.hop_size + config.n_fft - margin
    wave = read(max(start, 0), min(stop, samples))
    wave = F.pad(wave, (max(-start, 0), max(stop - samples, 0)), mode="reflect")
    return model.front_end.decibels(wave, center=False)


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
    """Evaluate a tagger on a labelled table, or the mean of the probabilities of several; see `Evaluator`."""
    first = models if isinstance(models, CED) else models[0]
    evaluator = Evaluator(table, first.labels, batch_size=batch_size, num_workers=num_workers, mode=mode)
    return evaluator(models, world=world, progress=progress)


def write_results(path: Path, found: Evaluation) -> None:
    """Write a table with one row for each class, separated by tabs or, in a .csv file, by commas.

    Its columns are index, mid (if the classes have mids), name, positives, average_precision, and recall if every clip
    has exactly one class. The results of a class without a positive clip are empty.

    Raises:
        WriteError: it cannot be written.
    """
    labels = found.labels
    columns: dict[str, Sequence[object]] = {"index": range(len(labels))}
    if labels.mids is not None:
        columns["mid"] = labels.mids
    columns |= {"name": labels.names, "positives": found.positives.tolist()}
    figures = {"average_precision": found.per_class, "recall": found.recall}
    for name, values in figures.items():
        if values is not None:
            columns[name] = ["" if np.isnan(value) else f"{value:.6f}" for value in values]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        for line in csv_lines((tuple(columns), *zip(*columns.values(), strict=True)), DELIMITERS[path.suffix.lower()]):
            file.write(f"{line}\n")


@dataclass(frozen=True, eq=False)
class Validation:
    """How a training run is validated."""

    evaluator: Evaluator
    every: int  # epochs from one validation to the next
    early_stop: int | None  # stop after this number of validations without gain
    n_saved: int  # number of best networks to keep
    average: bool  # the result is the mean of the kept networks; False: the best of them


def open_validation(config: TaggerConfig, labels: ClassTable) -> Validation | None:
    """Open the table that a training run is validated on; None if there is none.

    Raises:
        TableError, PackError: as `Evaluator`, with the key to change as hint.
    """
    if config.eval_data is None:
        return None
    try:
        evaluator = Evaluator(
            config.eval_data,
            labels,
            batch_size=config.eval_batch_size,
            num_workers=config.num_workers,
            mode=config.mode,
        )
    except (TableError, PackError) as error:
        error.hint = error.hint or "eval_data is the table to validate on; --eval-data null trains without one"
        raise
    return Validation(evaluator, config.valid_every, config.early_stop, config.n_saved, config.average)
