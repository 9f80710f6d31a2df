"""Weights as others publish them: `.pt` files and Hugging Face folders. Reading one never executes code from it."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from torch.serialization import safe_globals

from ced.errors import CheckpointError, ConfigError
from ced.model.vit import ModelConfig
from ced.sound.grid import PATCH
from ced.sound.labels import ClassTable, named_by_config

HEAD = "outputlayer."
CLASS_TOKEN = ("cls_token", "token_pos_embed")
PRETRAINING = ("decoder", "mask_token")  # beginnings of keys that only masked pre-training has

Contents = tuple[dict[str, Tensor], ModelConfig, ClassTable | None]

logger = logging.getLogger(__name__)


def _path_as_text(*parts: str) -> str:
    return "/".join(parts)


# Published configurations hold paths: all that becomes of one here is a string, whatever system wrote it.
_INERT = [
    (_path_as_text, f"{module}.{kind}Path")
    for module in ("pathlib", "pathlib._local")
    for kind in ("", "Posix", "Windows", "PurePosix", "PureWindows")
]


def read_pt(path: Path) -> Contents:
    """Read a file of torch.save: a state dict, or {"model": state dict, "config": ...}.

    Its restricted reader builds tensors and plain values only; what else a file asks for is refused.

    Raises:
        CheckpointError: the file is damaged, holds no CED weights, or would need code to be executed.
    """
    try:
        with safe_globals(list(_INERT)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may make the reader fail in any way
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            refusal = f"it asks to execute {found[1]}; only weights and plain values are read"
            raise CheckpointError(f"checkpoint {path} is refused: {refusal}") from error
        raise CheckpointError(f"checkpoint {path} is damaged, or not written by torch.save") from error
    settings: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        config = content.get("config")
        settings = config if isinstance(config, dict) else {}
        if isinstance(settings.get("model_args"), dict):  # a training configuration
            settings = settings["model_args"]
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"checkpoint {path} holds no weights but a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"checkpoint {path} holds a {type(value).__name__} under {key!r}, not a tensor")
    return _contents(content, settings, None, path)


def read_hugging_face(state: Mapping[str, Tensor], path: Path) -> Contents:
    """Interpret the tensors of a Hugging Face `model.safetensors` by the `config.json` beside it, if there is one.

    Raises:
        CheckpointError: the configuration is damaged or of another network.
    """
    beside = path.with_name("config.json")
    settings: dict[str, Any] = {}
    if beside.is_file():
        try:
            settings = json.loads(beside.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{beside} is damaged or no JSON ({error})") from error
        if not isinstance(settings, dict):
            raise CheckpointError(f"{beside} holds no configuration but a {type(settings).__name__}")
        if settings.get("problem_type") == "single_label_classification":
            settings = {"activation": "softmax"} | settings
    return _contents(state, settings, named_by_config(settings), path)


def has_head(state: Mapping[str, Tensor]) -> bool:
    """Whether weights have a trained output layer; those of masked pre-training have none worth the name."""
    return any(key.startswith(HEAD) for key in state) and not any(key.startswith(PRETRAINING) for key in state)


def checked_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Make a configuration from values of unknown types; what is no setting of a network is left out.

    Raises:
        ConfigError: a value is of a wrong type or out of its limits, or one is missing.
    """
    known = [field.name for field in fields(ModelConfig)]
    try:
        return pydantic.TypeAdapter(ModelConfig).validate_python(
            {name: settings[name] for name in known if name in settings}
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"model setting {first['loc'][-1]} is {first['input']!r}: {first['msg']}") from error


def _contents(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], labels: ClassTable | None, path: Path
) -> Contents:
    """Put together what a file says of a network, under the published key names."""
    state = {_published_name(key): value for key, value in state.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    shaped = _config_of_shapes(state, path)
    for name, value in shaped.items():
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"checkpoint {path} is of another size than its configuration: {name} {value}, not {settings[name]}"
            )
    guesses = {
        "num_heads": _heads(shaped["embed_dim"]),
        "target_length": _target_length(state["time_pos_embed"].shape[3]),
        # A tagger with a class token reads it; masked pre-training leaves one behind unread.
        "pooling": "token" if has_head(state) and all(key in state for key in CLASS_TOKEN) else "mean",
    }
    try:
        config = checked_config(guesses | settings | shaped)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    if labels is not None and len(labels) != config.outputdim:
        labels = None  # transformers' default of two classes, not the network's
    return state, config, labels


def _published_name(key: str) -> str:
    """Map a Hugging Face key to the published one; published keys stay."""
    return re.sub(r"^init_bn\.(?!1\.)", "init_bn.1.", key.removeprefix("encoder."))


def _config_of_shapes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the part of a configuration that the shapes of the weights fix."""

    def size(key: str, axis: int) -> int:
        if key not in state or state[key].dim() <= axis:
            raise CheckpointError(f"{path} is no CED checkpoint: {key} is missing or has fewer than {axis + 1} axes")
        return state[key].shape[axis]

    width = size("patch_embed.proj.weight", 0)
    size("time_pos_embed", 3)
    shaped: dict[str, Any] = {
        "embed_dim": width,
        "depth": len({found[1] for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}),
        "mlp_ratio": size("blocks.0.mlp.fc1.weight", 0) / width,
        "n_mels": size("freq_pos_embed", 2) * PATCH,
        "init_bn": "init_bn.1.weight" in state,
    }
    if has_head(state):
        shaped["outputdim"] = size(f"{HEAD}1.weight", 0)
    if "front_end.0.spectrogram.window" in state:
        shaped["win_size"] = size("front_end.0.spectrogram.window", 0)
    if "front_end.0.mel_scale.fb" in state:
        shaped["n_fft"] = 2 * (size("front_end.0.mel_scale.fb", 0) - 1)
    return shaped


def _heads(width: int) -> int:
    """Guess the number of heads, which shapes do not tell: those of published networks are 64 wide."""
    heads, rest = divmod(width, 64)
    return 1 if rest else heads


def _target_length(columns: int) -> int:
    """Return the longest input of a time embedding; the published 63 columns were made for 1012 frames."""
    return 1012 if columns == 1012 // PATCH else columns * PATCH
