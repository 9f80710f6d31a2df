"""Teachers: what a store's `model` may name, and how each is loaded.

A teacher takes CED's mel or waves. Those that take mel get the student's own masked mel. Those that take waves make
features of their own and mask the same seconds and hertz in them.
"""

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ced.config import Mode, TeacherEntry
from ced.distill.experiment import run_name
from ced.distill.onnx_teacher import OnnxTeacher
from ced.errors import ConfigError
from ced.model.loading import load_model
from ced.model.vit import CED
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable

MODEL_ARGS = ("pooling", "target_length")  # what a configuration may change about a CED network
TAKES = ("mel", "waves")
ONNX = "onnx:"


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
    path = Path(spec)
    return spec if _is_callable(spec) else run_name(path) or (path.stem if path.is_file() else path.name)


def load_teacher(
    entry: TeacherEntry, model_args: Mapping[str, Any], device: torch.device, progress: Progress = silent
) -> Teacher:
    """Get one teacher: a CED network by name or path, an ONNX graph, or any `module:callable`.

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


def _fingerprint(found: object) -> str:
    """Return a digest of a module's weights; "" for anything that is not a module."""
    if not isinstance(found, nn.Module):
        return ""
    digest = hashlib.sha256()
    for name, tensor in sorted(found.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
