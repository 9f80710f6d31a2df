"""Torch networks: loaded from weights, created for training, saved, and used as scorers of NumPy waves."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ced.errors import CheckpointError, ConfigError
from ced.model import weights, zoo
from ced.model.config import ModelConfig, Pooling, checked_config
from ced.model.vit import CED
from ced.model.weights import Weights
from ced.progress import Progress, silent
from ced.sound.features import PATCH, column_starts
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
        name_or_path: one of `list_models()`, or a checkpoint that `weights.read` can read.
        pooling: how tokens become scores; None keeps the checkpoint's own ("mean" in published files).
        target_length: frames of one forward pass; None keeps the checkpoint's own.
        progress: called during a download, with bytes.

    Raises:
        CheckpointError: neither a name nor a checkpoint, or weights that do not fit.
        DownloadError: a file is not cached and could not be downloaded.
    """
    return build(zoo.read_weights(name_or_path, progress), pooling=pooling, target_length=target_length)


def build(given: Weights, *, pooling: Pooling | None = None, target_length: int | None = None) -> CED:
    """Make the network of a checkpoint, in eval mode; None keeps the checkpoint's own setting.

    Weights of masked pre-training have no output layer: the network gets a random one, and a warning is logged.

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
    """Return the weights of a network; on a CPU the arrays share its memory."""
    arrays = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return Weights(
        {key: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for key, value in arrays.items()},
        model.config,
        model.labels,
        "the network",
    )


def save(path: Path, model: CED) -> None:
    """Write a network, its configuration and its class table to one safetensors file, atomically."""
    weights.save(path, weights_of(model))


def create(
    name: str,
    *,
    model_args: Mapping[str, Any],
    pretrained: bool | str,
    labels: ClassTable,
    progress: Progress = silent,
) -> CED:
    """Return a network for training, in training mode.

    Args:
        name: a published name or a checkpoint, which gives the configuration.
        model_args: fields of `ModelConfig` to replace.
        pretrained: True starts from the weights of `name`, a string from those of another name or path, False from
            random ones. The output layer is copied only if its classes are `labels`.
        labels: the classes to learn.
        progress: called during a download, with bytes.

    Raises:
        ConfigError: an unknown or contradictory argument.
        CheckpointError: no such name, or weights that do not fit.
        DownloadError: a file is not cached and could not be downloaded.
    """
    config = zoo.MODELS[name].config if name in zoo.MODELS else zoo.read_weights(name, progress).config
    model = CED(_adapted(config, model_args, labels), labels)
    # The initial bias is the odds of one class among all. From even odds, the first steps would only lower all scores,
    # which damages pre-trained weights. With softmax it makes no difference.
    nn.init.constant_(model.outputlayer.get_parameter("1.bias"), -math.log(max(len(labels) - 1, 1)))
    if pretrained is not False:
        given = zoo.read_weights(name if pretrained is True else pretrained, progress)
        head = given.has_head and given.classes.names == labels.names
        _fill(model, weights.fitted(given, model.config, head=head))
    return model


def _fill(model: CED, arrays: Mapping[str, weights.Array]) -> None:
    """Copy arrays into a network; its other arrays are kept."""
    model.load_state_dict({key: torch.as_tensor(value) for key, value in arrays.items()}, strict=False)


def _adapted(config: ModelConfig, model_args: Mapping[str, Any], labels: ClassTable) -> ModelConfig:
    """Return a configuration with some settings replaced, for the given classes."""
    known = [field.name for field in fields(ModelConfig)]
    for name in model_args:
        if name not in known:
            raise ConfigError(f"unknown model setting {name!r}{zoo.nearest(name, known)}; known: {', '.join(known)}")
    if model_args.get("outputdim", len(labels)) != len(labels):
        raise ConfigError(f"outputdim is {model_args['outputdim']}, but there are {len(labels)} classes")
    return checked_config({**asdict(config), **model_args, "outputdim": len(labels)})


class TorchScorer:
    """Scores NumPy waves with a torch network, with the outputs of its exported graph.

    Args:
        network: is set to eval mode.
        device: to move it to, such as "cuda"; "auto": an accelerator if torch has one here, else the CPU; None: it is
            not moved.

    Raises:
        ConfigError: torch cannot use the device.
    """

    def __init__(self, network: CED, device: str | None = None) -> None:
        self.network = network.eval()
        if device is not None:
            try:
                self.network.to(_accelerator() if device == "auto" else device)
            except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
                reason = str(error).partition("\n")[0]
                raise ConfigError(f"device is {device!r}; torch cannot use it here: {reason}") from error

    @property
    def accelerated(self) -> bool:
        """Whether the network runs on another device than the CPU."""
        return self.network.freq_pos_embed.device.type != "cpu"

    @property
    def labels(self) -> ClassTable:
        """The classes, in the order of the scores."""
        return self.network.labels

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, the configuration and the classes."""
        given = weights_of(self.network)
        about = json.dumps([weights.fingerprint(given.arrays), asdict(given.config), self.labels.names])
        return hashlib.sha256(about.encode()).hexdigest()

    def __call__(self, waves: weights.Array, /) -> weights.Array:
        """Return the probability of each class, (b, t) 16 kHz in [-1, 1] -> (b, c)."""
        return self._run(self.network.probs, waves)

    def embed(self, waves: weights.Array, /) -> weights.Array:
        """Return the mean over tokens after the last LayerNorm (the class token, if there is one), (b, t) -> (b, d)."""
        return self._run(partial(_embedding, self.network), waves)

    def columns(self, waves: weights.Array, /) -> weights.Array:
        """Return the probability of each class in each column of patches (0.16 s), (b, t) -> (b, columns, c).

        Raises:
            CheckpointError: the waves are longer than `target_length`, and the network does not pad the last piece.
        """
        return self._run(partial(_columns, self.network), waves)

    def column_starts(self, count: int) -> NDArray[np.float64]:
        """Return the start of each of the `count` columns of a wave, (count,) seconds."""
        return column_starts(count, self.network.config.target_length, self.network.config.hop_size)

    def _run(self, function: Callable[[Tensor], Tensor], waves: weights.Array) -> weights.Array:
        with torch.inference_mode():
            batch = torch.from_numpy(waves).to(self.network.freq_pos_embed.device)
            result: weights.Array = function(batch).float().cpu().numpy()
        return result


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def _embedding(network: CED, waves: Tensor) -> Tensor:
    def pooled(tokens: Tensor) -> Tensor:
        return tokens[:, 0] if network.config.pooling == "token" else tokens.mean(1)

    return network.in_pieces(network.front_end(waves), pooled).mean(1)


def _columns(network: CED, waves: Tensor) -> Tensor:
    mel, config = network.front_end(waves), network.config
    frames = mel.shape[-1]
    if frames > config.target_length and not config.pad_last:
        raise CheckpointError(
            f"the network takes {config.target_length} frames a pass and does not pad the last piece of longer waves;"
            f" it cannot score the columns of {frames} frames"
        )

    def scores(tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:] if config.pooling == "token" else tokens
        by_column = patches.unflatten(1, (config.rows, -1)).mean(1)  # frequency is slowest
        return network.activate(network.outputlayer(by_column))

    by_piece = network.in_pieces(mel, scores)  # (b, pieces, columns, c)
    whole, rest = divmod(frames, min(frames, config.target_length))
    inside = whole * by_piece.shape[2] + rest // PATCH  # later columns are padding
    return by_piece.flatten(1, 2)[:, :inside]
