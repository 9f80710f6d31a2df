"""The configuration of a network: its shape, its features, and how its scores are read. Needs no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ced.errors import CheckpointError, ConfigError
from ced.sound.features import PATCH, PUBLISHED, FrontEnd

Pooling = Literal["mean", "logit", "token", "dm"]
POOLINGS: tuple[Pooling, ...] = ("mean", "logit", "token", "dm")

# Far above any useful network, so that a damaged or hostile file cannot exhaust memory.
_LIMITS = {"embed_dim": 1 << 14, "num_heads": 1 << 10, "depth": 1 << 9, "outputdim": 1 << 20, "target_length": 1 << 17}
LARGEST_FILE = 16 << 20  # bytes of a config.json


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a network; the names are those of the published configuration.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    embed_dim: int  # width d
    num_heads: int
    depth: int = 12
    mlp_ratio: float = 4.0
    outputdim: int = 527  # classes c
    target_length: int = 1012  # frames of one forward pass; longer inputs are cut into pieces
    pooling: Pooling = "mean"
    activation: Literal["sigmoid", "softmax"] = "sigmoid"  # softmax: exactly one class per clip
    eval_avg: Literal["mean", "max"] = "mean"  # how the scores of the pieces of a long input are combined
    pad_last: bool = True  # pad the last piece of a long input with zeros
    init_bn: bool = True
    n_mels: int = PUBLISHED.n_mels
    n_fft: int = PUBLISHED.n_fft
    win_size: int = PUBLISHED.win_size
    hop_size: int = PUBLISHED.hop_size
    f_min: float = PUBLISHED.f_min
    f_max: float = PUBLISHED.f_max
    center: bool = PUBLISHED.center

    def __post_init__(self) -> None:
        allowed = {
            "pooling": POOLINGS,
            "activation": ("sigmoid", "softmax"),
            "eval_avg": ("mean", "max"),
        }
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ConfigError(f"{field} is {getattr(self, field)!r}; allowed: {', '.join(values)}")
        for field, most in _LIMITS.items():
            least = PATCH if field == "target_length" else 1
            if not least <= getattr(self, field) <= most:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be {least} to {most}")
        if self.embed_dim % self.num_heads:
            raise ConfigError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if not 0 < self.mlp_ratio <= 64:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}; it must be above 0 and at most 64")
        _ = self.front_end  # checks its settings

    @property
    def front_end(self) -> FrontEnd:
        """The settings of the log-mel features."""
        return FrontEnd(**{field.name: getattr(self, field.name) for field in fields(FrontEnd)})

    @property
    def rows(self) -> int:
        """Rows of patches."""
        return self.n_mels // PATCH

    @property
    def columns(self) -> int:
        """Columns of patches in one forward pass."""
        return self.target_length // PATCH

    @property
    def unpublished_feature(self) -> str | None:
        """The first setting of the features that differs from the published one; None if all are the same."""
        for field in fields(FrontEnd):
            has, published = getattr(self, field.name), getattr(PUBLISHED, field.name)
            if has != published:
                return f"{field.name} {has} instead of {published}"
        return None


def checked_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Make a configuration from untrusted values; unknown names are ignored.

    Raises:
        ConfigError: a value is of a wrong type or out of range, or one is missing.
    """
    import pydantic  # slow to import, and only checkpoints need it

    known = [field.name for field in fields(ModelConfig)]
    try:
        return pydantic.TypeAdapter(ModelConfig).validate_python(
            {name: settings[name] for name in known if name in settings}
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"model setting {first['loc'][-1]} is {first['input']!r}: {first['msg']}") from error


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the content of a `config.json`; None if the file does not exist.

    Raises:
        CheckpointError: it is too large, damaged, or not a configuration.
    """
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_FILE} are read")
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds a {type(settings).__name__}, not a configuration")
    return settings


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a network under its published name, in the order of the network."""
    dim = config.embed_dim
    found: dict[str, tuple[int, ...]] = {
        "time_pos_embed": (1, dim, 1, config.columns),
        "freq_pos_embed": (1, dim, config.rows, 1),
    }
    if config.pooling == "token":
        found |= {"cls_token": (1, 1, dim), "token_pos_embed": (1, dim)}
    if config.init_bn:
        found |= {f"init_bn.1.{name}": (config.n_mels,) for name in ("weight", "bias", "running_mean", "running_var")}
        found["init_bn.1.num_batches_tracked"] = ()
    found |= {"patch_embed.proj.weight": (dim, 1, PATCH, PATCH), "patch_embed.proj.bias": (dim,)}
    for number in range(config.depth):
        found |= {f"blocks.{number}.{name}": shape for name, shape in _block_shapes(dim, config.mlp_ratio)}
    found |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    found |= {"outputlayer.0.weight": (dim,), "outputlayer.0.bias": (dim,)}
    return found | {"outputlayer.1.weight": (config.outputdim, dim), "outputlayer.1.bias": (config.outputdim,)}


def _block_shapes(dim: int, mlp_ratio: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = int(dim * mlp_ratio)
    for name in ("norm1", "norm2"):
        yield from ((f"{name}.weight", (dim,)), (f"{name}.bias", (dim,)))
    for name, given, made in (
        ("attn.qkv", dim, 3 * dim),
        ("attn.proj", dim, dim),
        ("mlp.fc1", dim, hidden),
        ("mlp.fc2", hidden, dim),
    ):
        yield from ((f"{name}.weight", (made, given)), (f"{name}.bias", (made,)))
