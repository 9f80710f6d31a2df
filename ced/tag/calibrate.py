"""The walk that fits thresholds: labelled clips -> scores -> the best threshold of each class -> a file."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ced.errors import ConfigError, TableError
from ced.progress import Progress, silent
from ced.sound.audio import Source
from ced.sound.labelled import read_labelled
from ced.sound.labels import ClassTable
from ced.sound.tables import multi_hot
from ced.tag import batch
from ced.tag.inputs import Input
from ced.tag.records import Scored
from ced.tag.thresholds import Fit, fit_thresholds, measure, write_thresholds

USUAL_THRESHOLD = 0.5  # what the fitted thresholds are compared with

log = logging.getLogger(__name__)


class ScoresSounds(Protocol):
    """Anything that scores sounds window by window, several at a time, as a `Tagger` does."""

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""

    def score(self, source: Source, *, window: float = 10.0, hop: float | None = None) -> Iterator[Scored]:
        """Yield the scores of each window."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What became of labelled clips; all figures are on the clips that the thresholds were fitted to."""

    out: Path
    clips: int  # that were scored
    unreadable: tuple[str, ...]  # why each of the others was left out
    classes: int  # with positives
    unseen: tuple[str, ...]  # names of classes without positives, which got a threshold common to all
    never: tuple[str, ...]  # names of classes that no threshold makes precise enough, and that are never tagged
    f1_before: float  # mean over classes with positives, with `USUAL_THRESHOLD` for all
    f1_after: float


@dataclass(frozen=True, eq=False)
class _Heard:
    probs: NDArray[np.float32]  # (c,)
    seconds: float  # the length of the clip


def calibrate(
    tagger: ScoresSounds,
    table: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: float | None = None,
    window: float = 10.0,
    hop: float | None = None,
    jobs: int = 1,
    progress: Progress = silent,
) -> Calibration:
    """Fit a threshold for each class to labelled clips, and write them.

    A clip's probability is the highest of its windows: a clip then has a tag exactly when one of its windows has it,
    which is how thresholds are used. Clips that cannot be read are left out and named.

    Args:
        tagger: what scores.
        table: as for `read_labelled`.
        out: the file of thresholds.
        precision: the least precision of each class; None: the best F1.
        window: seconds.
        hop: seconds from one window's start to the next; None: windows lie end to end.
        jobs: clips scored at a time, each in a thread.
        progress: told of each clip.

    Raises:
        TableError: the table cannot be understood, or none of the clips can be read or has a label.
        ConfigError: `precision` or `jobs` is out of range.
    """
    if precision is not None and not 0 < precision <= 1:
        raise ConfigError(f"precision is {precision}; it must be above 0 and at most 1")
    clips = read_labelled(table, tagger.labels)
    inputs = [Input(str(clip.path), clip.path, Path(clip.path.name)) for clip in clips]

    def score(clip: Input) -> _Heard:
        windows = list(tagger.score(clip.source, window=window, hop=hop))
        return _Heard(np.maximum.reduce([scored.probs for scored in windows]), windows[-1].end)

    rows, labels, unreadable = [], [], []
    outcomes = batch.results(inputs, score, jobs=jobs, task="calibrating", progress=progress)
    for clip, outcome in zip(clips, outcomes, strict=True):
        if outcome.result is None:
            unreadable.append(outcome.error)
            log.warning("left out: %s", outcome.error)
        else:
            rows.append(outcome.result.probs)
            labels.append(clip.labels)
    if not rows:
        raise TableError(f"none of {len(clips)} clips of {table} can be read; the first: {unreadable[0]}")
    probs, targets = np.stack(rows), multi_hot(labels, len(tagger.labels))
    fit = fit_thresholds(probs, targets, precision=precision)
    before = measure(probs, targets, np.full(len(tagger.labels), USUAL_THRESHOLD, np.float32))
    write_thresholds(out, fit, tagger.labels)
    return _report(Path(out), fit, before, tagger.labels, len(rows), tuple(unreadable))


def _report(
    out: Path, fit: Fit, before: Fit, labels: ClassTable, clips: int, unreadable: tuple[str, ...]
) -> Calibration:
    seen = fit.positives > 0
    return Calibration(
        out=out,
        clips=clips,
        unreadable=unreadable,
        classes=int(seen.sum()),
        unseen=tuple(labels.names[index] for index in np.flatnonzero(~seen)),
        never=tuple(labels.names[index] for index in np.flatnonzero(fit.thresholds > 1)),
        f1_before=float(before.f1[seen].mean()),
        f1_after=float(fit.f1[seen].mean()),
    )
