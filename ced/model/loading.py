"""Weights as torch networks: by name or path to tag with, or freshly made to be trained."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ced.errors import ConfigError
from ced.model import weights, zoo
from ced.model.config import ModelConfig, Pooling, checked_config
from ced.model.vit import CED
from ced.model.weights import Weights
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path,
    *,
    pooling: Pooling | None = None,
    target_length: int | None = None,
    progress: Progress = silent,
) -> CED:
    """Return a network in eval mode, with its class table as `.labels`, by published name or from a file or folder.

    Args:
        name_or_path: one of `list_models()`, or a checkpoint as `weights.read` reads it.
        pooling: how tokens become scores; None keeps the checkpoint's own ("mean" in published files).
        target_length: frames of one forward pass; None keeps the checkpoint's own.
        progress: called during a download, with bytes.

    Raises:
        CheckpointError: neither a name nor a checkpoint, or weights that do not fit.
        DownloadError: a file that is not in the cache and cannot be fetched.
    """
    return build(zoo.read(name_or_path, progress), pooling=pooling, target_length=target_length)


def build(given: Weights, *, pooling: Pooling | None = None, target_length: int | None = None) -> CED:
    """Make the network of a checkpoint, in eval mode; None keeps the checkpoint's own setting.

    Weights of masked pre-training have no head: the network then has a fresh one, and a warning is logged.

    Raises:
        CheckpointError: the weights do not fit their configuration, or lack what the pooling needs.
        ConfigError: the settings contradict each other.
    """
    config, arrays = weights.configured(given, pooling=pooling, target_length=target_length)
    model = CED(config, given.labels)
    if not given.has_head:
        logger.warning("%s has no output layer (masked pre-training): that of the network is random", given.source)
    _fill(model, arrays)
    return model.eval()


def weights_of(model: CED) -> Weights:
    """Return the weights of a network; on a CPU the arrays share memory with it."""
    arrays = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return Weights(
        {key: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for key, value in arrays.items()},
        model.config,
        model.labels,
        "the network",
    )


def save(path: Path, model: CED) -> None:
    """Write a network, its configuration and its class table to one safetensors file; a crash leaves no half file."""
    weights.save(path, weights_of(model))


def create(
    name: str,
    *,
    model_args: Mapping[str, Any],
    pretrained: bool | str,
    labels: ClassTable,
    progress: Progress = silent,
) -> CED:
    """Return a network to be trained, in training mode.

    Args:
        name: a published name, or a checkpoint, whose size it has.
        model_args: fields of `ModelConfig`, in place of that size's own.
        pretrained: True starts from the weights of `name`, a string from those of another name or path, False from
            fresh ones. The output layer is taken over only where its classes are those of `labels`.
        labels: the classes to be learned.
        progress: called during a download, with bytes.

    Raises:
        ConfigError: an unknown or contradictory argument.
        CheckpointError: no such name, or weights that do not fit.
        DownloadError: a file that is not in the cache and cannot be fetched.
    """
    config = zoo.MODELS[name].config if name in zoo.MODELS else zoo.read(name, progress).config
    model = CED(_adapted(config, model_args, labels), labels)
    # With nothing known yet, one class of all is likely. From even odds, the first steps would only lower every class,
    # at the cost of what pre-training taught. After a softmax it makes no difference.
    nn.init.constant_(model.outputlayer.get_parameter("1.bias"), -math.log(max(len(labels) - 1, 1)))
    if pretrained is not False:
        given = zoo.read(name if pretrained is True else pretrained, progress)
        head = given.has_head and given.classes.names == labels.names
        _fill(model, weights.fitted(given, model.config, head=head))
    return model


def _fill(model: CED, arrays: Mapping[str, weights.Array]) -> None:
    """Copy arrays that fit into a network; the others of its own stay."""
    model.load_state_dict({key: torch.as_tensor(value) for key, value in arrays.items()}, strict=False)


def _adapted(config: ModelConfig, model_args: Mapping[str, Any], labels: ClassTable) -> ModelConfig:
    """Return a size's configuration with some settings replaced, for the given classes."""
    known = [field.name for field in fields(ModelConfig)]
    for name in model_args:
        if name not in known:
            raise ConfigError(f"unknown model setting {name!r}{zoo.nearest(name, known)}; known: {', '.join(known)}")
    if model_args.get("outputdim", len(labels)) != len(labels):
        raise ConfigError(f"outputdim is {model_args['outputdim']}, but there are {len(labels)} classes")
    return checked_config({**asdict(config), **model_args, "outputdim": len(labels)})
