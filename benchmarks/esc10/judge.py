"""Evaluate networks on the held-out fold, which they were not trained on."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import nn

from benchmarks.esc10 import plan, teachers
from ced.distill.dataset import ViewDataset, whole_clips
from ced.distill.evaluate import Evaluator
from ced.distill.pack_reader import AudioPack
from ced.model.frontend import LogMel
from ced.model.loading import load_model
from ced.model.metrics import accuracy, average_precision
from ced.sound.labels import read_classes

ENSEMBLE = "ensemble"
HELD_OUT = "pack/labels/judge.tsv"
TABLES = (HELD_OUT, plan.LEARNED)
CPU = torch.device("cpu")
_LEAST = 1e-6  # probabilities are clamped to this distance from 0 and 1


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Clips:
    """The verdict on each clip of a held-out fold."""

    source: tuple[str, ...]  # the recording that the clip was cut from
    right: str  # 1 or 0 for each clip
    adjusted: str | None = None  # the same with adjusted scores
    probe: str | None = None  # the same of a linear probe
    divergence: tuple[float, ...] | None = None  # from the teacher, mean over classes


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))  # a file of another version is refused
class Verdict:
    """The metrics of one network on one held-out fold."""

    arm: str
    fold: int
    seed: int
    accuracy: float
    map: float
    divergence: float | None  # from the teachers; None: other classes
    divergence_learned: float | None  # the same on the clips that it was trained on
    per_class: dict[str, float]  # average precision
    parameters: int | None  # None: unknown
    adjusted: float | None = None  # accuracy with the scores of each class divided by their mean over what was learned
    probe: float | None = None  # accuracy of a linear probe on its embeddings
    clips: Clips | None = None
    teacher: str | None = None  # name of the outside teacher


def student(folder: Path, job: plan.Job, fold: int) -> Verdict:
    """Evaluate the student that a job has trained."""
    network = load_model(folder / plan.MODELS / job.name)
    scores = {table: _evaluator(folder, table).scores([network]) for table in TABLES}
    return _verdict(job.arm or job.name, folder, fold, job.seed, scores, [network])


def ensemble(folder: Path, fold: int) -> Iterator[Verdict]:
    """Evaluate the three teachers and the mean of their probabilities."""
    members = {name: teachers.trained(name, folder) for name in plan.TEACHERS}
    for name, member in members.items():
        scores = {table: _scores(name, folder, table) for table in TABLES}
        yield _verdict(name, folder, fold, 1, scores, [member])
    scores = {table: _together(folder, table) for table in TABLES}
    yield _verdict(ENSEMBLE, folder, fold, 1, scores, list(members.values()))


def divergence(scores: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """Return the Kullback-Leibler divergence of scores from others, (n, c) both: in nats, mean over clips and classes.

    Each class is a binary decision, as in the students' loss, which differs from this by a constant.
    """
    return float(np.mean(divergences(scores, others)))


def divergences(scores: NDArray[np.floating], others: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the divergence of each clip, (n, c), (n, c) -> (n,): the mean over classes."""
    q, p = (np.clip(each.astype(np.float64), _LEAST, 1 - _LEAST) for each in (scores, others))
    by_class: NDArray[np.float64] = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    found: NDArray[np.float64] = by_class.mean(1)
    return found


@cache
def _together(folder: Path, table: str) -> NDArray[np.float32]:
    """Return the mean probabilities of the teachers of a fold for the clips of a table, (n, c)."""
    scores: NDArray[np.float32] = np.mean([_scores(name, folder, table) for name in plan.TEACHERS], axis=0)
    return scores


def _evaluator(folder: Path, table: str) -> Evaluator:
    return Evaluator(folder / table, read_classes(folder / teachers.CLASSES), num_workers=0)


@cache
def _scores(name: str, folder: Path, table: str) -> NDArray[np.float32]:
    """Return a teacher's probabilities of all clips, one by one, as their lengths differ by a few samples; (n, c)."""
    teacher, pack, front_end = teachers.trained(name, folder), AudioPack(folder / table), LogMel()
    clips = ViewDataset(pack, whole_clips(pack, range(len(pack))))
    with torch.inference_mode():
        rows = [teacher(front_end(clips[item].to_device(CPU)[0])) for item in range(len(clips))]
    return torch.cat(rows).numpy()


def _verdict(
    arm: str,
    folder: Path,
    fold: int,
    seed: int,
    scores: Mapping[str, NDArray[np.float32]],
    networks: list[nn.Module],
) -> Verdict:
    evaluator = _evaluator(folder, HELD_OUT)
    per_class = average_precision(evaluator.targets, scores[HELD_OUT])
    right = accuracy(evaluator.targets, scores[HELD_OUT])
    assert right is not None  # each clip has one label
    apart = {table: round(divergence(found, _together(folder, table)), 4) for table, found in scores.items()}
    return Verdict(
        arm,
        fold,
        seed,
        accuracy=round(right, 4),
        map=round(float(per_class.mean()), 4),
        divergence=apart[HELD_OUT],
        divergence_learned=apart[plan.LEARNED],
        per_class={name: round(float(ap), 4) for name, ap in zip(evaluator.labels.names, per_class, strict=True)},
        parameters=sum(parameter.numel() for network in networks for parameter in network.parameters()),
    )
