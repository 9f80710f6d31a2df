"""Thresholds of a model's classes: calibration on labelled clips, the fit to scores, and the file of thresholds."""

import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError, TableError
from ced.progress import Progress, silent
from ced.sound.audio import Source
from ced.sound.labels import ClassTable
from ced.sound.tables import Table, multi_hot, read_labelled, read_table, write_table
from ced.tag.batch import outcomes
from ced.tag.inputs import InputSound
from ced.tag.options import TagOptions
from ced.tag.records import Scored
from ced.text import open_text

FORMAT_VERSION = 1
NEVER = math.inf  # the threshold of a class that never becomes a tag
USUAL_THRESHOLD = 0.5  # what the fitted thresholds are compared with

logger = logging.getLogger(__name__)


class ScoresSounds(Protocol):
    """Anything that scores sounds window by window, several at a time, as a `Tagger` does."""

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""

    def score(self, source: Source, options: TagOptions) -> Iterator[Scored]:
        """Yield the scores of each window."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of a calibration; all figures are on the clips that the thresholds were fitted to."""

    out: Path
    clips: int  # that were scored
    unreadable: tuple[str, ...]  # the errors of the clips that were skipped
    classes: int  # with positives
    unseen: tuple[str, ...]  # names of classes without positives, which got the common threshold
    never: tuple[str, ...]  # names of classes that are never tagged, as no threshold is precise enough
    f1_before: float  # mean over classes with positives, with `USUAL_THRESHOLD` for all
    f1_after: float


@dataclass(frozen=True, eq=False)
class _ClipScores:
    probs: NDArray[np.float32]  # (c,)
    seconds: float  # the length of the clip


@dataclass(frozen=True)
class _ClipScorer:
    tagger: ScoresSounds
    options: TagOptions

    def __call__(self, clip: InputSound) -> _ClipScores:
        windows = list(self.tagger.score(clip.source, self.options))
        return _ClipScores(np.maximum.reduce([window.probs for window in windows]), windows[-1].end)


def calibrate_thresholds(
    tagger: ScoresSounds,
    table: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    least_precision: float | None = None,
    window: float = TagOptions.window,
    hop: float | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Calibration:
    """Fit a threshold for each class to labelled clips, and write them to a file.

    The probability of a clip is the highest of its windows, so a clip has a tag exactly if one of its windows has it,
    which is how thresholds are used. Clips that cannot be read are skipped and logged.

    Args:
        tagger: scores the clips.
        table: as for `read_labelled`.
        out: the file of thresholds.
        least_precision: the least precision of each class; None: the best F1.
        window, hop: as in `TagOptions`.
        jobs: clips scored at the same time, each in a thread.
        progress: called after each clip.

    Raises:
        TableError: the table is not valid, or none of the clips can be read or has a label.
        ConfigError: `least_precision`, `window`, `hop` or `jobs` is out of range.
    """
    _check_precision(least_precision)
    score = _ClipScorer(tagger, TagOptions(window=window, hop=hop))
    clips = read_labelled(table, tagger.labels)
    inputs = [InputSound(str(clip.path), clip.path, clip.path.name) for clip in clips]
    rows, labels, unreadable = [], [], []
    seconds = 0.0
    for number, (clip, outcome) in enumerate(zip(clips, outcomes(inputs, score, jobs=jobs), strict=True), 1):
        if outcome.result is None:
            unreadable.append(outcome.error)
            logger.warning("skipped: %s", outcome.error)
        else:
            rows.append(outcome.result.probs)
            labels.append(clip.labels)
            seconds += outcome.result.seconds
        progress("calibrating", number, len(clips), f"{seconds / 3600:.2f} h of sound")
    if not rows:
        raise TableError(f"none of {len(clips)} clips of {table} can be read; the first: {unreadable[0]}")
    probs, targets = np.stack(rows), multi_hot(labels, len(tagger.labels))
    fit = fit_thresholds(probs, targets, least_precision=least_precision)
    before = measure(probs, targets, np.full(len(tagger.labels), USUAL_THRESHOLD, np.float32))
    write_thresholds(out, fit, tagger.labels)
    seen, names = fit.positives > 0, tagger.labels.names
    return Calibration(
        out=Path(out),
        clips=len(rows),
        unreadable=tuple(unreadable),
        classes=int(seen.sum()),
        unseen=tuple(names[index] for index in np.flatnonzero(~seen)),
        never=tuple(names[index] for index in np.flatnonzero(fit.thresholds > 1)),
        f1_before=float(before.f1[seen].mean()),
        f1_after=float(fit.f1[seen].mean()),
    )


def _check_precision(least_precision: float | None) -> None:
    if least_precision is not None and not 0 < least_precision <= 1:
        raise ConfigError(f"least_precision is {least_precision}; it must be above 0 and at most 1")


@dataclass(frozen=True, eq=False)
class Fit:
    """Thresholds, and their measures on the scores that they were fitted to; arrays are (c,)."""

    thresholds: NDArray[np.float32]
    precision: NDArray[np.float64]  # NaN if no score reaches the threshold
    recall: NDArray[np.float64]  # NaN without positives, as is F1
    f1: NDArray[np.float64]
    positives: NDArray[np.int64]


def fit_thresholds(
    probs: NDArray[np.float32], targets: NDArray[np.bool_], *, least_precision: float | None = None
) -> Fit:
    """Fit a threshold for each class.

    It is the threshold with the best F1 or, with `least_precision`, with the best recall among those of at least this
    precision; of equals the highest. If no threshold reaches it, the class gets `NEVER`. A class without positives gets
    the threshold that is best for all classes together. A threshold is half-way between two scores.

    Args:
        probs: scores, (n, c).
        targets: the true labels, (n, c).
        least_precision: above 0, at most 1.

    Raises:
        ConfigError: `least_precision` is out of range.
        TableError: there are no positives, or a score is NaN.
    """
    _check_precision(least_precision)
    if not targets.any():
        raise TableError(f"none of {len(targets)} clips has a label, so there is nothing to fit thresholds to")
    if np.isnan(probs).any():
        raise TableError("the scores of a clip are not numbers (NaN)")
    seen = targets.sum(0) > 0
    thresholds = np.empty(seen.shape, np.float32)
    for index in np.flatnonzero(seen):
        thresholds[index] = _best(probs[:, index], targets[:, index], least_precision)
    if not seen.all():
        thresholds[~seen] = _best(probs.ravel(), targets.ravel(), least_precision)
    return measure(probs, targets, thresholds)


def measure(probs: NDArray[np.float32], targets: NDArray[np.bool_], thresholds: NDArray[np.float32]) -> Fit:
    """Measure thresholds (c,) on scores (n, c) and true labels (n, c)."""
    predicted = probs >= thresholds
    hits, called, positives = (predicted & targets).sum(0), predicted.sum(0), targets.sum(0)
    has_positives = positives > 0
    return Fit(
        thresholds=thresholds,
        precision=_ratio(hits, called, called > 0),
        recall=_ratio(hits, positives, has_positives),
        f1=_ratio(2 * hits, called + positives, has_positives),
        positives=positives,
    )


def _ratio(above: NDArray[np.int64], below: NDArray[np.int64], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    ratio = np.full(above.shape, np.nan)
    np.divide(above, below, out=ratio, where=valid)
    return ratio


def _best(scores: NDArray[np.float32], targets: NDArray[np.bool_], precision: float | None) -> float:
    """Return the best threshold of one class, from scores (n,) and true labels (n,), some of them positive."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    hits = np.cumsum(targets[order])  # if the highest 1, 2, ... n scores are positive
    called = np.arange(1, len(falling) + 1)
    worth = 2 * hits / (called + hits[-1]) if precision is None else np.where(hits / called >= precision, hits, -1)
    worth[:-1][falling[:-1] == falling[1:]] = -1  # equal scores are positive together
    count = int(np.argmax(worth))
    if worth[count] <= 0:
        return NEVER
    lowest = falling[count]
    below = falling[count + 1] if count + 1 < len(falling) else np.float32(0)
    between = np.float32((float(lowest) + float(below)) / 2)
    return float(between if between > below else lowest)  # two scores may be neighbouring floats


def write_thresholds(path: str | os.PathLike[str], fit: Fit, labels: ClassTable) -> None:
    """Write thresholds and their measures: tab-separated, a row for each class."""
    columns = {"index": [str(index) for index in range(len(labels))]}
    if labels.mids is not None:
        columns["mid"] = list(labels.mids)
    columns["name"] = list(labels.names)
    columns["threshold"] = [
        str(threshold) for threshold in fit.thresholds
    ]  # the shortest text that reads back as the same float32
    for name, values in (("precision", fit.precision), ("recall", fit.recall), ("f1", fit.f1)):
        columns[name] = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
    columns["positives"] = [str(count) for count in fit.positives]
    write_table(path, columns, comment=f"ced thresholds, format {FORMAT_VERSION}; inf: never")


def read_thresholds(path: str | os.PathLike[str], labels: ClassTable, default: float = 0.5) -> tuple[float, ...]:
    """Read a threshold for each class: tab-separated, column `threshold` and one or more of `index`, `mid` and `name`.

    Lines that begin with "#" are comments; other columns are ignored.

    Args:
        path: a file of `write_thresholds`, or one written by hand.
        labels: the classes of the model.
        default: the threshold of classes that are not listed.

    Raises:
        TableError: the file is not valid or has another format version, a class is unknown or is listed twice, or a
            threshold is not a number of 0 or more (with the row).
    """
    _check_version(Path(path))
    table = read_table(path, required=("threshold",), comments=True)
    known = {"index": [str(index) for index in range(len(labels))], "mid": labels.mids or (), "name": labels.names}
    given = {column: names for column, names in known.items() if names and column in table.columns}
    if not given:
        raise TableError(
            f"thresholds {path} have columns {', '.join(table.columns)}; one of index, mid, name is needed"
        )
    places = {column: {name: index for index, name in enumerate(names)} for column, names in given.items()}
    thresholds = np.full(len(labels), default, np.float32)
    listed: set[int] = set()
    for row in range(len(table)):
        index = _class_of(table, row, places, labels)
        if index in listed:
            raise TableError(f"thresholds {path}, row {row + 1}: class {labels.names[index]!r} is listed twice")
        listed.add(index)
        thresholds[index] = _number(table, row)
    return tuple(thresholds.tolist())


def _check_version(path: Path) -> None:
    try:
        with open_text(path) as file:
            line = file.readline(1000)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TableError(f"cannot read thresholds {path}: {reason}") from error
    version = re.match(r"# ced thresholds, format (\d+)", line)
    if version and int(version[1]) != FORMAT_VERSION:
        raise TableError(f"thresholds {path} have format {version[1]}; this program reads format {FORMAT_VERSION}")


def _class_of(table: Table, row: int, places: dict[str, dict[str, int]], labels: ClassTable) -> int:
    """Return the class of a row (from 0), by all columns that identify it."""
    found: dict[str, int] = {}
    for column, indices in places.items():
        value = table.column(column)[row]
        if value not in indices:
            raise TableError(
                f"thresholds {table.path}, row {row + 1}: {column} {value!r} is not one of the model's"
                f" {len(labels)} classes ({labels.names[0]}, ... {labels.names[-1]})"
            )
        found[column] = indices[value]
    if len(set(found.values())) > 1:
        values = ", ".join(f"{column} {table.column(column)[row]}" for column in found)
        raise TableError(
            f"thresholds {table.path}, row {row + 1}: {values} are different classes of this model;"
            " was the file made for another model?"
        )
    return next(iter(found.values()))


def _number(table: Table, row: int) -> float:
    text = table.column("threshold")[row]
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise TableError(
            f"thresholds {table.path}, row {row + 1}: threshold {text!r} is not a number of 0 or more (inf: never)"
        )
    return number
