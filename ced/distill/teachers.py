"""Teachers: load what `model` of a store names, and average the probabilities of several teachers.

A teacher takes CED's mel or waves. Those that take mel get the student's own masked mel. Those that take waves compute
features of their own and mask the same seconds and hertz in them.
"""

import hashlib
import importlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ced.config import Activation, Mode, TeacherEntry
from ced.distill.dataset import in_batches
from ced.distill.distributed import autocast
from ced.distill.experiment import run_name
from ced.distill.hf_teacher import HfTeacher
from ced.distill.onnx_teacher import OnnxTeacher
from ced.distill.views import SoundView, ViewRecipe, mask, sound_views
from ced.errors import CedError, ConfigError, StoreError, TableError
from ced.model.frontend import LogMel
from ced.model.loading import load_model
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import ClassTable, audioset, matched, mostly_audioset, named
from ced.text import quoted, some

MODEL_ARGS = ("pooling", "target_length")  # what a configuration may change about a CED network
HF, ONNX = "hf:", "onnx:"
_ROUNDING = 1e-6  # by which probabilities may exceed 0 or 1
_SHOWN = 20  # classes that a warning names before the rest is counted

logger = logging.getLogger(__name__)

Takes = Literal["mel", "waves"]
Score = Callable[[Tensor, int, Sequence[SoundView]], Tensor]


@dataclass(frozen=True, eq=False)
class Teacher:
    """One member of an ensemble.

    `score` takes b chunks, the sampling rate in Hz, and b views, and returns probabilities (b, c). With `takes` "mel"
    the chunks are CED's masked mel, (b, f, n). With "waves" they are shifted waves, (b, t) in [-1, 1], in which `score`
    has to mask the bands of each view.
    """

    name: str
    score: Score
    takes: Takes = "mel"
    labels: ClassTable | None = None
    weights: str = ""  # fingerprint; "" for a teacher without weights
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    weight: float = 1.0  # in the mean of the ensemble
    batch_size: int | None = None  # chunks a call; None: the whole batch
    mode: Mode | None = None  # precision; None: that of the ensemble
    masks: str = ""  # where a teacher that takes waves masks: features or waves; "" if unknown


def teacher_name(spec: str) -> str:
    """Return the name of a teacher in a store: its model, repository, callable, experiment, or the stem of its file."""
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
    """Load one teacher: a CED network by name or path, a model of Transformers, an ONNX graph, or `module:callable`.

    A callable whose attribute `takes` is "waves" takes waves, any other takes mel. One that is a torch module is moved
    to its device and set to evaluation. Modules are also searched in the working directory, as by `python -m`.

    Args:
        entry: its name and settings.
        model_args: changes to a CED network, of `MODEL_ARGS`.
        device: where it computes, unless the entry names a device.
        progress: called during a download, with bytes.

    Raises:
        ConfigError: the callable cannot be imported, the network takes other features, or a setting is not allowed.
    """
    if unknown := [name for name in model_args if name not in MODEL_ARGS]:
        raise ConfigError(f"model_args.{unknown[0]} cannot be changed in a teacher; {', '.join(MODEL_ARGS)} can")
    spec = entry.name
    _check_entry(entry)
    device = device if entry.device is None else _device(entry.device)
    if spec.startswith(ONNX):
        teacher = _load_onnx(spec)
    elif spec.startswith(HF):
        teacher = _load_hf(spec, device, progress, entry.activation)
    elif _is_callable(spec):
        teacher = _load_callable(spec, device)
    else:
        teacher = _ced_teacher(spec, load_model(spec, progress=progress, **model_args), device)
    return replace(teacher, weight=entry.weight, batch_size=entry.batch_size, mode=entry.mode or teacher.mode)


def _check_entry(entry: TeacherEntry) -> None:
    """Check that the settings of a teacher apply to its kind.

    Raises:
        ConfigError: one does not.
    """
    if entry.name.startswith(ONNX):
        if entry.device not in (None, "cpu"):
            raise ConfigError(f"teacher {entry.name}: device is {entry.device}; ONNX graphs run on the cpu")
        if entry.mode is not None:
            raise ConfigError(f"teacher {entry.name}: mode is {entry.mode}; ONNX graphs have a precision of their own")
        if entry.activation is not None:
            raise ConfigError(f"teacher {entry.name}: set activation in the YAML file of the graph")
    elif entry.activation is not None and not entry.name.startswith(HF):
        raise ConfigError(f"teacher {entry.name}: activation is for models of Transformers (hf:) alone")


def _load_onnx(spec: str) -> Teacher:
    graph = OnnxTeacher(Path(spec.removeprefix(ONNX)).expanduser())
    return Teacher(teacher_name(spec), graph, "waves", graph.labels, graph.fingerprint, mode="off", masks=graph.masks)


def _load_hf(spec: str, device: torch.device, progress: Progress, activation: Activation | None) -> Teacher:
    model = HfTeacher(spec.removeprefix(HF), device, progress, activation)
    weights = _fingerprint(spec, model.model, model.settings)
    return Teacher(teacher_name(spec), model, "waves", model.labels, weights, device, masks=model.masks)


def _load_callable(spec: str, device: torch.device) -> Teacher:
    found = _import(spec)
    if isinstance(found, CED):
        return _ced_teacher(spec, found, device)
    if isinstance(found, nn.Module):
        try:
            found.to(device).eval()
        except Exception as error:  # a module of the user may raise anything
            raise ConfigError(f"cannot move teacher {spec} to {device}: {_reason(error)}") from error
    takes: Takes = getattr(found, "takes", "mel")
    if takes not in get_args(Takes):
        raise ConfigError(f"teacher {spec} has takes = {takes!r}; allowed: {' and '.join(map(repr, get_args(Takes)))}")
    score = partial(_score_with_callable, found, takes)
    return Teacher(spec, score, takes, _labels_of(spec, found), _fingerprint(spec, found), device)


def _score_with_callable(
    found: Callable[..., Tensor], takes: Takes, chunks: Tensor, rate: int, views: Sequence[SoundView]
) -> Tensor:
    own = chunks.clone()  # code of the user may change it, and the other teachers get the same chunks
    return found(own, rate, views) if takes == "waves" else found(own)


def _labels_of(spec: str, found: object) -> ClassTable | None:
    """Return the class table of a callable, whose `labels` may also be the names alone."""
    labels = getattr(found, "labels", None)
    if labels is None or isinstance(labels, ClassTable):
        return labels
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not all(isinstance(one, str) for one in labels):
        raise ConfigError(f"the labels of teacher {spec} are {type(labels).__name__}; allowed: a ClassTable, or names")
    try:
        return named(labels)
    except TableError as error:
        raise ConfigError(f"the labels of teacher {spec}: {error.message}") from error


def _ced_teacher(spec: str, network: CED, device: torch.device) -> Teacher:
    """Return a CED network as a teacher.

    Raises:
        ConfigError: it takes other features than CED's published ones.
    """
    if other := network.config.unpublished_feature:
        raise ConfigError(f"teacher {spec} takes features with {other}; all CED networks of a store share one mel")
    network.to(device).eval()
    return Teacher(
        spec,
        lambda mel, rate, views: network.as_probs(network.forward_mel(mel)),
        "mel",
        network.labels,
        _fingerprint(spec, network),
        device,
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
    if device.type == "meta":
        raise ConfigError(f"the device of a teacher is {name!r}, on which nothing is computed")
    return device


def _reason(error: Exception) -> str:
    """Return an error of code of the user in one line, with its kind."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _import(spec: str) -> Any:
    module_name, _, name = spec.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = attrgetter(name)(importlib.import_module(module_name))
    except Exception as error:  # importing executes the module, which may raise anything
        raise ConfigError(f"cannot import teacher {spec}: {_reason(error)}") from error
    if not callable(found):
        raise ConfigError(
            f"teacher {spec} is {type(found).__name__}; it must be callable with mel, or with waves, rate and views, "
            "and return probabilities"
        )
    return found


def _fingerprint(spec: str, found: object, settings: str = "") -> str:
    """Return a digest of settings and a module's weights; "" for anything that is not a module.

    Raises:
        ConfigError: the weights cannot be read.
    """
    if not isinstance(found, nn.Module):
        return ""
    digest = hashlib.sha256(settings.encode())
    try:
        for name, value in sorted(found.state_dict().items()):
            digest.update(name.encode())
            _add_state(digest, value)
    except Exception as error:  # a module of the user may raise anything
        raise ConfigError(f"cannot read the weights of teacher {spec}: {_reason(error)}") from error
    return digest.hexdigest()


def _add_state(digest: "hashlib._Hash", value: object) -> None:
    """Add a value of a module's state to a digest: a tensor, or what `get_extra_state` of the user returned."""
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add_state(digest, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _add_state(digest, item)
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__name__.encode())  # its text may have an address, which changes from run to run


class Ensemble:
    """Teachers that score the same views.

    The classes of the result are those of `classes`. Without it, they are AudioSet's if a teacher has more than half of
    these, in any order, and no others; otherwise those of the first teacher that has a class table.

    Raises:
        ConfigError: a teacher does not return scores (b, c), or has no class in common with the table.
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
            mode: precision of the teachers that have no mode of their own.
            recipe: the augmentation of the views.
            samples: of every chunk, 16 kHz.
            device: of the waves and of the result.
            classes: the class table of the result.
        """
        self.teachers, self.mode, self.recipe, self.samples, self.device = teachers, mode, recipe, samples, device
        self._front_end = LogMel().to(device)
        self._counts: dict[int, int] = {}  # classes of each teacher
        silence, no_masks = torch.zeros(2, samples, device=device), torch.zeros(2, 2, device=device)
        self._counts = {number: scores.shape[1] for number, scores in enumerate(self._score(silence, no_masks))}
        self.labels = _store_classes(teachers, classes)
        self.num_classes = len(self.labels) if self.labels else self._same_count()
        self._columns = [self._columns_of(number) for number in range(len(teachers))]
        weights = torch.tensor([teacher.weight for teacher in teachers], device=device)
        known = torch.tensor([[column >= 0 for column in columns] for columns in self._columns], device=device)
        self._shares = known * weights[:, None]  # (teachers, c)
        own_order = [columns == list(range(self._counts[number])) for number, columns in enumerate(self._columns)]
        self._plain = all(own_order) and len(set(weights.tolist())) == 1
        self._warn_of_unmatched_classes()

    @property
    def known(self) -> int:
        """Number of classes that at least one teacher scores."""
        return int((self._shares > 0).any(0).sum())

    def __call__(self, waves: Tensor, uniforms: Tensor) -> Tensor:
        """Return the weighted mean of the teachers' probabilities, (b, t), (b, 2) -> (b, c) float32.

        The mean of a class is over the teachers that have it; a class that no teacher has gets the probability 0.

        Args:
            waves: of chunks, shifted, in [-1, 1], 16 kHz.
            uniforms: the random numbers that place the masks.

        Raises:
            StoreError: a teacher fails, or its scores are not (b, c) probabilities.
        """
        members = self._score(waves, uniforms)
        members = [_probabilities(*member) for member in zip(self.teachers, members, strict=True)]
        if self._plain:
            return torch.stack(members).mean(0)
        total = torch.zeros(len(waves), self.num_classes, device=waves.device)
        for scores, columns, share in zip(members, self._columns, self._shares, strict=True):
            total += scores[:, columns] * share  # the share of a class that the teacher lacks is 0
        return total / self._shares.sum(0).clamp_min(torch.finfo(torch.float32).tiny)

    def _score(self, waves: Tensor, uniforms: Tensor) -> list[Tensor]:
        """Return the scores of each teacher, (b, its classes) float32 on the device of the waves."""
        with torch.inference_mode():
            takes = {teacher.takes for teacher in self.teachers}
            mel = mask(self._front_end(waves), uniforms, self.recipe) if "mel" in takes else waves
            views = sound_views(uniforms, self.recipe, self.samples) if "waves" in takes else []
            # Calls on GPUs are asynchronous: they are started first, and the teachers on the CPU compute meanwhile.
            order = sorted(range(len(self.teachers)), key=lambda number: self.teachers[number].device.type == "cpu")
            chunks = {"mel": mel, "waves": waves}
            scores = {number: self._score_with(number, chunks[self.teachers[number].takes], views) for number in order}
            return [scores[number].to(waves.device).float() for number in range(len(self.teachers))]

    def _score_with(self, number: int, chunks: Tensor, views: Sequence[SoundView]) -> Tensor:
        """Return the scores of one teacher for mel or waves, (b, its classes) on its device."""
        teacher = self.teachers[number]
        parts = []
        for batch in in_batches(len(chunks), teacher.batch_size or len(chunks)):
            here = slice(batch.start, batch.stop)
            try:
                with autocast(teacher.mode or self.mode, teacher.device):
                    scores = teacher.score(chunks[here].to(teacher.device), SAMPLE_RATE, views[here])
            except ConfigError as error:
                raise ConfigError(f"teacher {teacher.name}: {error.message}") from error
            except CedError:
                raise
            except Exception as error:  # a callable of the user may raise anything
                raise StoreError(f"teacher {teacher.name} failed: {_reason(error)}") from error
            parts.append(self._checked(number, scores, len(batch)))
        return torch.cat(parts)

    def _checked(self, number: int, scores: object, chunks: int) -> Tensor:
        """Return the scores of a teacher for `chunks` chunks, if they have the right shape."""
        name, expected = self.teachers[number].name, self._counts.get(number)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or (expected is None and len(scores) != chunks):
            came = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(f"teacher {name} returned {came} for {chunks} chunks; expected (b, classes)")
        if expected is not None and scores.shape != (chunks, expected):
            raise StoreError(f"teacher {name} gave scores {tuple(scores.shape)}, expected {(chunks, expected)}")
        return scores

    def _same_count(self) -> int:
        """Return the number of classes of teachers none of which has a table."""
        if len(set(self._counts.values())) > 1:
            counts = ", ".join(f"{quoted(self.teachers[number].name)} {one}" for number, one in self._counts.items())
            raise ConfigError(f"teachers have different numbers of classes: {counts}")
        return self._counts[0]

    def _columns_of(self, number: int) -> list[int]:
        """Return, for each class of the result, its column in a teacher's scores; -1 if the teacher lacks it."""
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

    def _warn_of_unmatched_classes(self) -> None:
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
            parts.append(f"{len(unknown)} of {len(names)} of the store are in no teacher: {some(unknown, _SHOWN)}")
        if parts:
            logger.warning("classes are matched by mid or name; %s", "; ".join(parts))


def _probabilities(teacher: Teacher, scores: Tensor) -> Tensor:
    """Return scores as probabilities: what exceeds 0 or 1 by rounding alone is clamped.

    Raises:
        StoreError: they are no probabilities.
    """
    low, high = (float(one) for one in torch.stack(scores.aminmax()))
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # false for NaN, too
        came = "NaN is among them" if math.isnan(low) else f"they lie between {low:.4g} and {high:.4g}"
        raise StoreError(
            f"teacher {teacher.name} gave scores that are not probabilities in [0, 1]: {came}",
            hint="a callable has to apply a sigmoid or softmax itself, an ONNX graph has activation in its YAML file",
        )
    return scores.clamp(0, 1)


def _store_classes(teachers: Sequence[Teacher], classes: ClassTable | None) -> ClassTable | None:
    """Return the class table of a store: the given one, AudioSet's, or a teacher's; None if there is none."""
    tables = [teacher.labels for teacher in teachers if teacher.labels is not None]
    if classes is not None or not tables:
        return classes
    if any(mostly_audioset(table) and _no_others(table) for table in tables):
        return audioset()
    return tables[0]


def _no_others(table: ClassTable) -> bool:
    """Return whether all classes of a table are AudioSet's."""
    return sum(column >= 0 for column in matched(table, audioset())) == len(table)
