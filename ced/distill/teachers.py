"""Teachers: what a store's `model` may name, how each is loaded, and what several answer together.

A teacher takes CED's mel or waves. Those that take mel get the student's own masked mel. Those that take waves make
features of their own and mask the same seconds and hertz in them.
"""

import hashlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ced.config import Mode, TeacherEntry
from ced.distill.distributed import autocast
from ced.distill.experiment import run_name
from ced.distill.hf_teacher import HfTeacher
from ced.distill.onnx_teacher import OnnxTeacher
from ced.distill.views import SoundView, ViewRecipe, mask, sound_views
from ced.errors import CedError, ConfigError, StoreError
from ced.model.frontend import LogMel
from ced.model.loading import load_model
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable, audioset, matched
from ced.text import quoted, some

MODEL_ARGS = ("pooling", "target_length")  # what a configuration may change about a CED network
TAKES = ("mel", "waves")
HF, ONNX = "hf:", "onnx:"
_SHOWN = 20  # classes that a warning names before the rest is counted
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Teacher:
    """One member of an ensemble.

    `score` returns probabilities (b, c). With `takes` "mel" it is called with CED's masked mel, (b, f, n); with "waves"
    with shifted waves (b, t) in [-1, 1], their rate in Hz, and a `views.SoundView` for each, which it has to mask.
    """

    name: str
    score: Callable[..., Tensor]
    takes: Literal["mel", "waves"] = "mel"
    labels: ClassTable | None = None
    weights: str = ""  # fingerprint; "" for a teacher without weights
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    weight: float = 1.0  # in the mean of the ensemble
    batch_size: int | None = None  # chunks a call; None: all that there are
    mode: Mode | None = None  # precision; None: that of the ensemble
    masks: str = ""  # where a teacher that takes waves masks: features or waves; "" if it does not say


def teacher_name(spec: str) -> str:
    """Return what a teacher is called: its name, the name of its experiment, the stem of its file, or the callable."""
    if spec.startswith(ONNX):
        return ONNX + Path(spec.removeprefix(ONNX)).stem
    if spec.startswith(HF):
        folder = Path(spec.removeprefix(HF)).expanduser()
        return HF + folder.resolve().name if folder.is_dir() else spec
    path = Path(spec)
    return spec if _is_callable(spec) else run_name(path) or (path.stem if path.is_file() else path.name)


def load_teacher(
    entry: TeacherEntry, model_args: Mapping[str, Any], device: torch.device, progress: Progress = silent
) -> Teacher:
    """Get one teacher: a CED network by name or path, a model of Transformers, an ONNX graph, or `module:callable`.

    A callable whose attribute `takes` is "waves" takes waves, any other takes mel. One that is a torch module is moved
    to its device and set to evaluation. Modules are looked for in the working directory too, as `python -m` does.

    Args:
        entry: its name and settings.
        model_args: changes to a CED network, of `MODEL_ARGS`.
        device: where it computes, unless the entry names a device.
        progress: called during a download, with bytes.

    Raises:
        ConfigError: the callable is not there, the network was made for other features, or a setting is not allowed.
    """
    if unknown := [name for name in model_args if name not in MODEL_ARGS]:
        raise ConfigError(f"model_args.{unknown[0]} cannot be changed in a teacher; {', '.join(MODEL_ARGS)} can")
    spec = entry.name
    device = device if entry.device is None else _device(entry.device)
    settings: dict[str, Any] = {"weight": entry.weight, "batch_size": entry.batch_size, "mode": entry.mode}
    if spec.startswith(ONNX):
        if entry.device is not None and device.type != "cpu":
            raise ConfigError(f"teacher {spec}: device is {entry.device}; ONNX graphs run on the cpu")
        graph = OnnxTeacher(Path(spec.removeprefix(ONNX)).expanduser())
        return Teacher(
            teacher_name(spec), graph, "waves", graph.labels, graph.fingerprint, masks=graph.masks, **settings
        )
    if spec.startswith(HF):
        model = HfTeacher(spec.removeprefix(HF), device, progress)
        weights = _fingerprint(model.model, model.settings)
        return Teacher(teacher_name(spec), model, "waves", model.labels, weights, device, masks=model.masks, **settings)
    found = _import(spec) if _is_callable(spec) else load_model(spec, progress=progress, **model_args)
    if isinstance(found, nn.Module):
        found.to(device).eval()
    weights = _fingerprint(found)
    if not isinstance(found, CED):
        labels = getattr(found, "labels", None)
        labels = labels if isinstance(labels, ClassTable) else None
        return Teacher(spec, found, _taken(spec, found), labels, weights, device, **settings)
    if other := found.config.unpublished_feature:
        raise ConfigError(f"teacher {spec} takes features with {other}; all CED networks of a store share one mel")
    return Teacher(
        spec, lambda mel: found.as_probs(found.forward_mel(mel)), "mel", found.labels, weights, device, **settings
    )


def _is_callable(spec: str) -> bool:
    """Return whether a teacher is given as `module:callable`, and not as a model name or a path."""
    return re.fullmatch(r"[\w.]+:[\w.]+", spec) is not None and not Path(spec).exists()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the device of a teacher is {name!r}; torch cannot use it here: {reason}") from error
    return device


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


def _taken(spec: str, found: object) -> Literal["mel", "waves"]:
    """Return what a callable says that it takes."""
    takes = getattr(found, "takes", "mel")
    if takes not in ("mel", "waves"):
        raise ConfigError(f"teacher {spec} has takes = {takes!r}; allowed: {' and '.join(map(repr, TAKES))}")
    return "waves" if takes == "waves" else "mel"


def _fingerprint(found: object, settings: str = "") -> str:
    """Return a digest of settings and a module's weights; "" for anything that is not a module."""
    if not isinstance(found, nn.Module):
        return ""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(found.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Ensemble:
    """Teachers that score the same views.

    The classes of the answer are those of `classes`. Without it they are those of the teachers if all have the same,
    and otherwise, or where a teacher's are AudioSet's in another order or most of them, AudioSet's; failing that, those
    of the first teacher that has a table.

    Raises:
        ConfigError: a teacher does not answer with scores (b, c), or has no class in common with the table.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        mode: Mode,
        recipe: ViewRecipe,
        samples: int,
        device: torch.device,
        classes: ClassTable | None = None,
    ) -> None:
        """Make an ensemble.

        Args:
            teachers: its members.
            mode: the precision in which those compute that have none of their own.
            recipe: what views do.
            samples: of every chunk, 16 kHz.
            device: where the waves are.
            classes: the class table of the scores.
        """
        self.teachers, self.mode, self.recipe, self.samples = teachers, mode, recipe, samples
        self._front_end = LogMel().to(device)
        self._counts: dict[int, int] = {}  # classes of each teacher
        silence, no_masks = torch.zeros(2, samples, device=device), torch.zeros(2, 2, device=device)
        self._counts = {number: one.shape[1] for number, one in enumerate(self._answers(silence, no_masks))}
        self.labels = _store_classes(teachers, classes)
        self.num_classes = len(self.labels) if self.labels else self._same_count()
        self._columns = [self._columns_of(number) for number in range(len(teachers))]
        weights = torch.tensor([teacher.weight for teacher in teachers], device=device)
        known = torch.tensor([[column >= 0 for column in columns] for columns in self._columns], device=device)
        self._shares = known * weights[:, None]  # (teachers, c)
        own_order = [columns == list(range(self._counts[number])) for number, columns in enumerate(self._columns)]
        self._plain = all(own_order) and len(set(weights.tolist())) == 1
        self._report()

    @property
    def known(self) -> int:
        """How many classes at least one teacher knows."""
        return int((self._shares > 0).any(0).sum())

    def __call__(self, waves: Tensor, uniforms: Tensor) -> Tensor:
        """Return the weighted mean of the teachers' probabilities, (b, t), (b, 2) -> (b, c) float32.

        The mean of a class is that of the teachers that know it; a class that no teacher knows has the probability 0.

        Args:
            waves: of chunks, shifted, in [-1, 1], 16 kHz.
            uniforms: the draws that place the masks.

        Raises:
            StoreError: a teacher fails, or its scores are not (b, c) probabilities.
        """
        answers = self._answers(waves, uniforms)
        for teacher, scores in zip(self.teachers, answers, strict=True):
            if not ((scores >= 0) & (scores <= 1)).all():  # false for NaN, too
                raise StoreError(f"teacher {teacher.name} gave scores that are not probabilities in [0, 1]")
        if self._plain:
            return torch.stack(answers).mean(0)
        total = torch.zeros(len(waves), self.num_classes, device=waves.device)
        for scores, columns, share in zip(answers, self._columns, self._shares, strict=True):
            total += scores[:, columns] * share  # the share of an unknown class is 0
        return total / self._shares.sum(0).clamp_min(torch.finfo(torch.float32).tiny)

    def _answers(self, waves: Tensor, uniforms: Tensor) -> list[Tensor]:
        """Return the scores of each teacher, (b, its classes) float32 on the device of the waves."""
        with torch.inference_mode():
            takes = {teacher.takes for teacher in self.teachers}
            mel = mask(self._front_end(waves), uniforms, self.recipe) if "mel" in takes else waves
            views = sound_views(uniforms, self.recipe, self.samples) if "waves" in takes else []
            # GPUs compute while this process goes on: they are started first, and those on the CPU work meanwhile.
            order = sorted(range(len(self.teachers)), key=lambda number: self.teachers[number].device.type == "cpu")
            answers = {number: self._ask(number, waves, mel, views) for number in order}
            return [answers[number].to(waves.device).float() for number in range(len(self.teachers))]

    def _ask(self, number: int, waves: Tensor, mel: Tensor, views: Sequence[SoundView]) -> Tensor:
        """Return the scores of one teacher, (b, its classes) on its device."""
        teacher = self.teachers[number]
        answers = []
        for at in range(0, len(waves), teacher.batch_size or len(waves)):
            here = slice(at, at + (teacher.batch_size or len(waves)))
            try:
                with autocast(teacher.mode or self.mode, teacher.device):
                    if teacher.takes == "mel":
                        answer = teacher.score(mel[here].to(teacher.device))
                    else:
                        answer = teacher.score(waves[here].to(teacher.device), SAMPLE_RATE, views[here])
            except ConfigError as error:
                raise ConfigError(f"teacher {teacher.name}: {error.message}") from error
            except CedError:
                raise
            except Exception as error:  # code of others, which may fail in any way
                reason = " ".join(str(error).split())
                raise StoreError(f"teacher {teacher.name} failed: {type(error).__name__}: {reason}") from error
            answers.append(self._checked(number, answer, len(waves[here])))
        return torch.cat(answers)

    def _checked(self, number: int, answer: object, clips: int) -> Tensor:
        name, expected = self.teachers[number].name, self._counts.get(number)
        if not isinstance(answer, Tensor) or answer.ndim != 2 or (expected is None and len(answer) != clips):
            came = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ConfigError(f"teacher {name} answered {clips} clips with {came}; expected (b, classes)")
        if expected is not None and answer.shape != (clips, expected):
            raise StoreError(f"teacher {name} gave scores {tuple(answer.shape)}, expected {(clips, expected)}")
        return answer

    def _same_count(self) -> int:
        """Return the number of classes of teachers none of which has a table."""
        if len(set(self._counts.values())) > 1:
            counts = ", ".join(f"{quoted(self.teachers[number].name)} {one}" for number, one in self._counts.items())
            raise ConfigError(f"teachers have different numbers of classes: {counts}")
        return self._counts[0]

    def _columns_of(self, number: int) -> list[int]:
        """Return, for each class of the answer, its column in a teacher's scores; -1 if the teacher lacks it."""
        teacher, count = self.teachers[number], self._counts[number]
        if teacher.labels is not None and len(teacher.labels) != count:
            raise ConfigError(f"teacher {teacher.name} gives {count} scores; its class table has {len(teacher.labels)}")
        if teacher.labels is None or self.labels is None:
            if count != self.num_classes:
                raise ConfigError(
                    f"teachers have different numbers of classes: {teacher.name} has {count} without a class table, "
                    f"the store {self.num_classes}"
                )
            return list(range(count))
        columns = matched(teacher.labels, self.labels)
        if max(columns) < 0:
            raise ConfigError(f"teacher {teacher.name} has no class in common with the class table of the store")
        return columns

    def _report(self) -> None:
        """Name the classes that have no counterpart, in one warning."""
        parts = []
        for teacher, columns in zip(self.teachers, self._columns, strict=True):
            names = teacher.labels.names if teacher.labels else ()
            if left := [name for index, name in enumerate(names) if index not in columns]:
                parts.append(
                    f"{len(left)} of {len(names)} of teacher {teacher.name} are left out: {some(left, _SHOWN)}"
                )
        names = self.labels.names if self.labels else ()
        known = (self._shares > 0).any(0).tolist()
        if unknown := [name for name, yes in zip(names, known, strict=bool(names)) if not yes]:
            parts.append(
                f"{len(unknown)} of {len(names)} of the store are known to no teacher: {some(unknown, _SHOWN)}"
            )
        if parts:
            _log.warning("classes are matched by mid or name; %s", "; ".join(parts))


def _store_classes(teachers: Sequence[Teacher], asked: ClassTable | None) -> ClassTable | None:
    tables = [teacher.labels for teacher in teachers if teacher.labels is not None]
    if asked is not None or not tables:
        return asked
    if any(map(_mostly_audioset, tables)):
        return audioset()
    return tables[0]


def _mostly_audioset(table: ClassTable) -> bool:
    """Return whether a table has most of AudioSet's classes, in any order, and no others."""
    found = sum(column >= 0 for column in matched(table, audioset()))
    return found == len(table) and 2 * found > len(audioset())
