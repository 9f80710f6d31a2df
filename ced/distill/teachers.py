"""Teachers: where they come from, and what several of them say together about a mel."""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ced.config import Mode
from ced.distill.distributed import autocast
from ced.errors import ConfigError, StoreError
from ced.model.loading import load_model
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable
from ced.text import quoted

MODEL_ARGS = ("pooling", "target_length")  # what a configuration may change about a teacher


@dataclass(frozen=True, eq=False)
class Teacher:
    """One member of an ensemble, on its device."""

    name: str
    score: Callable[[Tensor], Tensor]  # mel (b, f, n) -> probabilities (b, c)
    labels: ClassTable | None = None
    weights: str = ""  # fingerprint; "" for a teacher without weights


def is_callable_spec(spec: str) -> bool:
    """Say whether a teacher is given as `module:callable`, and not as a model name or a path."""
    return re.fullmatch(r"[\w.]+:[\w.]+", spec) is not None and not Path(spec).exists()


def load_teacher(
    spec: str, model_args: Mapping[str, Any], device: torch.device, progress: Progress = silent
) -> Teacher:
    """Get one teacher: a model by name, a checkpoint by path, or any `module:callable` from mel to probabilities.

    A callable that is a torch module is moved to `device` and set to evaluation. Modules are looked for in the working
    directory too, as `python -m` does.

    Raises:
        ConfigError: the callable is not there, the model was made for other features, or `model_args` are not
            `MODEL_ARGS`.
    """
    if unknown := [name for name in model_args if name not in MODEL_ARGS]:
        raise ConfigError(f"model_args.{unknown[0]} cannot be changed in a teacher; {', '.join(MODEL_ARGS)} can")
    found = _import(spec) if is_callable_spec(spec) else load_model(spec, progress=progress, **model_args)
    if isinstance(found, nn.Module):
        found.to(device).eval()
    if not isinstance(found, CED):
        labels = getattr(found, "labels", None)
        return Teacher(spec, found, labels if isinstance(labels, ClassTable) else None, _fingerprint(found))
    if other := found.config.unpublished_feature:
        raise ConfigError(f"teacher {spec} takes features with {other}; all teachers of a store see one mel")
    return Teacher(spec, lambda mel: found.as_probs(found.forward_mel(mel)), found.labels, _fingerprint(found))


def _import(spec: str) -> Any:
    module_name, _, name = spec.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = attrgetter(name)(importlib.import_module(module_name))
    except Exception as error:  # importing runs code of others, which may fail in any way
        reason = " ".join(str(error).split())
        raise ConfigError(f"cannot import teacher {spec}: {type(error).__name__}: {reason}") from error
    if not callable(found):
        raise ConfigError(f"teacher {spec} is {type(found).__name__}; it must be callable: mel -> probabilities")
    return found


def _fingerprint(found: object) -> str:
    """Return a digest of a module's weights; "" for what is no module."""
    if not isinstance(found, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(found.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Ensemble:
    """Teachers that score together.

    Raises:
        ConfigError: the teachers have other classes, or one does not answer with scores (b, c).
    """

    def __init__(self, teachers: Sequence[Teacher], mode: Mode, probe: Tensor) -> None:
        """Make an ensemble.

        Args:
            teachers: its members.
            mode: the precision they compute in.
            probe: any mel (b, f, n), on the teachers' device, that shows what they answer.
        """
        self.teachers, self.mode = teachers, mode
        self.num_classes, self.labels = self._classes(probe)

    def __call__(self, mel: Tensor) -> Tensor:
        """Return the mean of the teachers' probabilities, (b, f, n) -> (b, c) float32.

        Raises:
            StoreError: a teacher's scores are not (b, c) probabilities.
        """
        expected = (len(mel), self.num_classes)
        scores = []
        for teacher, answer in zip(self.teachers, self._answers(mel), strict=True):
            if answer.shape != expected:
                raise StoreError(f"teacher {teacher.name} gave scores {tuple(answer.shape)}, expected {expected}")
            scores.append(answer.float())
        stacked = torch.stack(scores)  # (teachers, b, c)
        proper = ((stacked >= 0) & (stacked <= 1)).flatten(1).all(1)  # false for NaN, too
        if not proper.all():
            name = self.teachers[int(proper.int().argmin())].name
            raise StoreError(f"teacher {name} gave scores that are not probabilities in [0, 1]")
        return stacked.mean(0)

    def _answers(self, mel: Tensor) -> list[Tensor]:
        with torch.inference_mode(), autocast(self.mode, mel.device):
            return [_ask(teacher, mel) for teacher in self.teachers]

    def _classes(self, probe: Tensor) -> tuple[int, ClassTable | None]:
        """Return the number of classes and their table, which must be the same for all."""
        counts: dict[str, int] = {}
        tables: dict[str, ClassTable] = {}
        for teacher, answer in zip(self.teachers, self._answers(probe), strict=True):
            if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(probe):
                came = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise ConfigError(
                    f"teacher {teacher.name} answered {len(probe)} clips with {came}; expected (b, classes)"
                )
            counts[teacher.name] = answer.shape[1]
            if teacher.labels is not None:
                tables[teacher.name] = teacher.labels
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{quoted(name)} {count}" for name, count in counts.items())
            raise ConfigError(f"teachers have different numbers of classes: {said}")
        if len({table.names for table in tables.values()}) > 1:
            raise ConfigError(f"teachers {', '.join(map(quoted, tables))} do not have the same class table")
        return next(iter(counts.values())), next(iter(tables.values()), None)


def _ask(teacher: Teacher, mel: Tensor) -> Tensor:
    try:
        return teacher.score(mel)
    except Exception as error:  # code of others, which may fail in any way
        reason = " ".join(str(error).split())
        raise StoreError(f"teacher {teacher.name} failed: {type(error).__name__}: {reason}") from error
