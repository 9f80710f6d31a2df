"""How a name or a path becomes a torch network; the names themselves are in `zoo`, which needs no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from ced.errors import ConfigError
from ced.model import checkpoints, zoo
from ced.model.checkpoints import Checkpoint
from ced.model.published import checked_config
from ced.model.vit import CED, ModelConfig, Pooling
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable, default_classes


def config_of(entry: zoo.Entry) -> ModelConfig:
    """Return the configuration of a published model."""
    return ModelConfig(embed_dim=entry.width, num_heads=entry.heads)


def load_model(
    name_or_path: str | Path,
    *,
    pooling: Pooling | None = None,
    target_length: int | None = None,
    progress: Progress = silent,
) -> CED:
    """Return a network in eval mode, with its class table as `.labels`, by published name or from a file or folder.

    Args:
        name_or_path: one of `list_models()`, or what `checkpoints.read` reads.
        pooling: how tokens become scores; None keeps the checkpoint's own ("mean" in published files).
        target_length: frames of one forward pass; None keeps the checkpoint's own.
        progress: told of a download, in bytes.

    Raises:
        CheckpointError: neither a name nor a checkpoint, or weights that do not fit.
        DownloadError: a file that is not in the cache and cannot be fetched.
    """
    return checkpoints.build(_read(name_or_path, progress), pooling=pooling, target_length=target_length)


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
        progress: told of a download, in bytes.

    Raises:
        ConfigError: an unknown or contradictory argument.
        CheckpointError: no such name, or weights that do not fit.
        DownloadError: a file that is not in the cache and cannot be fetched.
    """
    config = config_of(zoo.MODELS[name]) if name in zoo.MODELS else _read(name, progress).config
    model = CED(_adapted(config, model_args, labels), labels)
    # Where nothing is known yet, one class of all is likely. From even odds, the first steps would go into saying no to
    # every class, at the cost of what pre-training taught. After a softmax it makes no difference.
    nn.init.constant_(model.outputlayer.get_parameter("1.bias"), -math.log(max(len(labels) - 1, 1)))
    if pretrained is not False:
        checkpoint = _read(name if pretrained is True else pretrained, progress)
        theirs = checkpoint.labels or default_classes(checkpoint.config.outputdim)
        checkpoints.load_state(model, checkpoint, head=checkpoint.has_head and theirs.names == labels.names)
    return model


def _read(name_or_path: str | Path, progress: Progress) -> Checkpoint:
    if isinstance(name_or_path, str) and name_or_path in zoo.MODELS:
        return checkpoints.read(zoo.fetch(name_or_path, progress))
    return checkpoints.read(zoo.local_path(name_or_path))


def _adapted(config: ModelConfig, model_args: Mapping[str, Any], labels: ClassTable) -> ModelConfig:
    """Return a size's configuration with some settings replaced, for the given classes."""
    known = [field.name for field in fields(ModelConfig)]
    for name in model_args:
        if name not in known:
            raise ConfigError(f"unknown model setting {name!r}{zoo.nearest(name, known)}; known: {', '.join(known)}")
    if model_args.get("outputdim", len(labels)) != len(labels):
        raise ConfigError(f"outputdim is {model_args['outputdim']}, but there are {len(labels)} classes")
    return checked_config({**asdict(config), **model_args, "outputdim": len(labels)})
