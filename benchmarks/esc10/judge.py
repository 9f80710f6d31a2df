"""What the held-out fold says about networks that never heard it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.esc10 import plan, teachers
from ced.distill.datasets import ViewDataset, whole
from ced.distill.evaluate import Evaluator
from ced.distill.wavpack import WavPack
from ced.model.loading import load_model
from ced.model.metrics import accuracy, average_precision
from ced.sound.frontend import LogMel
from ced.sound.labels import read_classes

ENSEMBLE = "ensemble"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Verdict:
    """How good one network is on one held-out fold."""

    arm: str
    fold: int
    seed: int
    accuracy: float
    map: float
    per_class: dict[str, float]  # average precision
    parameters: int


def student(folder: Path, job: plan.Job, fold: int) -> Verdict:
    """Judge what a job has trained."""
    network = load_model(folder / plan.MODELS / job.name)
    evaluator = _evaluator(folder)
    return _verdict(job.arm or job.name, fold, job.seed, evaluator, evaluator.scores([network]), [network])


def ensemble(folder: Path, fold: int) -> Iterator[Verdict]:
    """Judge the three teachers and what they say together."""
    evaluator = _evaluator(folder)
    members = {name: teachers.trained(name, folder) for name in plan.TEACHERS}
    scores = {name: _scores(member, folder) for name, member in members.items()}
    for name, member in members.items():
        yield _verdict(name, fold, 1, evaluator, scores[name], [member])
    together = np.mean(list(scores.values()), axis=0)
    yield _verdict(ENSEMBLE, fold, 1, evaluator, together, list(members.values()))


def _evaluator(folder: Path) -> Evaluator:
    return Evaluator(_table(folder), read_classes(folder / teachers.CLASSES), num_workers=0)


def _table(folder: Path) -> Path:
    return folder / "pack/labels/judge.tsv"


def _scores(teacher: teachers.Network, folder: Path) -> NDArray[np.float32]:
    """Return the probabilities of all clips, one by one, as their lengths differ by a few samples; (n, c)."""
    pack, front_end = WavPack(_table(folder)), LogMel()
    clips = ViewDataset(pack, whole(pack, range(len(pack))))
    with torch.inference_mode():
        rows = [teacher(front_end(clips[item].to_device(CPU)[0])) for item in range(len(clips))]
    return torch.cat(rows).numpy()


def _verdict(
    arm: str, fold: int, seed: int, evaluator: Evaluator, scores: NDArray[np.float32], networks: list[nn.Module]
) -> Verdict:
    per_class = average_precision(evaluator.targets, scores)
    right = accuracy(evaluator.targets, scores)
    assert right is not None  # each clip has one label
    return Verdict(
        arm,
        fold,
        seed,
        accuracy=round(right, 4),
        map=round(float(per_class.mean()), 4),
        per_class={name: round(float(ap), 4) for name, ap in zip(evaluator.labels.names, per_class, strict=True)},
        parameters=sum(parameter.numel() for network in networks for parameter in network.parameters()),
    )
