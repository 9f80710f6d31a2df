"""Metrics of a tagger on labelled clips: average precision and accuracy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ced.errors import TrainingError


@dataclass(frozen=True)
class Figures:
    """The metrics of a tagger on labelled clips."""

    map: float  # mean average precision, over the classes that a clip has
    accuracy: float | None  # part of the clips whose label scores highest; None unless each has exactly one


def figures(targets: NDArray[np.bool_], scores: NDArray[np.floating]) -> Figures:
    """Return the metrics of scores, (n, c) both.

    Raises:
        TrainingError: a score is NaN.
    """
    return Figures(float(np.nanmean(average_precision(targets, scores))), accuracy(targets, scores))


def average_precision(targets: NDArray[np.bool_], scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the average precision of each class, by scikit-learn's definition: the sum over the distinct scores, from
    the highest down, of the gain in recall times the precision there. Equal scores count as one step.

    Args:
        targets: (n, c), True where a clip has a class.
        scores: (n, c).

    Returns:
        (c,); NaN for a class without a positive clip.

    Raises:
        TrainingError: a score is NaN.
    """
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        raise TrainingError(f"the score of clip {row} for class {column} is NaN; the network's weights are unusable")
    found = np.full(targets.shape[1], np.nan)
    for column in np.flatnonzero(targets.any(0)):
        found[column] = _one_class(targets[:, column], scores[:, column])
    return found


def accuracy(targets: NDArray[np.bool_], scores: NDArray[np.floating]) -> float | None:
    """Return the part of the clips whose label scores highest, (n, c) both; None unless each clip has one label."""
    if not (targets.sum(1) == 1).all():
        return None
    return float(targets[np.arange(len(scores)), scores.argmax(1)].mean())


def _one_class(hits: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    order = np.argsort(-scores)
    hits, scores = hits[order], scores[order]
    steps = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # the last clip of each distinct score
    found = hits.cumsum()[steps]
    return float(np.diff(found, prepend=0) @ (found / (steps + 1)) / found[-1])
