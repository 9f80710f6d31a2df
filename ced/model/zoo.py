"""The published models: a table of networks, addresses and licences, and how a name becomes a model."""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ced.errors import CheckpointError, ConfigError, DownloadError
from ced.model import checkpoints
from ced.model.checkpoints import Checkpoint
from ced.model.download import download
from ced.model.published import checked_config
from ced.model.vit import CED, ModelConfig, Pooling
from ced.progress import Progress, silent
from ced.sound.labels import ClassTable, default_classes

TINY = ModelConfig(embed_dim=192, num_heads=3)
MINI = ModelConfig(embed_dim=256, num_heads=4)
SMALL = ModelConfig(embed_dim=384, num_heads=6)
BASE = ModelConfig(embed_dim=768, num_heads=12)


@dataclass(frozen=True)
class Entry:
    """One published model."""

    name: str
    config: ModelConfig
    url: str
    file: str  # its name in the cache
    params: float  # millions
    map: float | None  # mAP on AudioSet's evaluation set as published, percent; None: not a tagger yet
    note: str
    licence: str = "CC BY 4.0"
    sha256: str | None = None


_DISTILLED = "distilled from an ensemble of five teachers"
_PRETRAINED = "masked pre-training, where students start: its output layer is untrained"
_TEACHER = "the one released teacher"

MODELS: Mapping[str, Entry] = {
    name: Entry(name, config, f"https://zenodo.org/records/{record}/files/{file}?download=1", file, params, score, note)
    for name, config, params, score, record, file, note in (
        ("ced_tiny", TINY, 5.5, 48.1, 8275347, "audiotransformer_tiny_mAP_4814.pt", _DISTILLED),
        ("ced_mini", MINI, 9.6, 49.0, 8275347, "audiotransformer_mini_mAP_4896.pt", _DISTILLED),
        ("ced_small", SMALL, 22.0, 49.6, 8275347, "audiotransformer_small_mAP_4958.pt", _DISTILLED),
        ("ced_base", BASE, 86.0, 50.0, 8275347, "audiotransformer_base_mAP_4999.pt", _DISTILLED),
        ("audiotransformer_tiny", TINY, 5.5, None, 8275347, "audiotransformer_tiny_mae_as_10s.pt", _PRETRAINED),
        ("audiotransformer_mini", MINI, 9.6, None, 8275347, "audiotransformer_mini_mae_as_10s.pt", _PRETRAINED),
        ("audiotransformer_small", SMALL, 22.0, None, 8275347, "audiotransformer_small_mae_as_10s.pt", _PRETRAINED),
        ("audiotransformer_base", BASE, 86.0, None, 8275347, "audiotransformer_base_mae_as_10s.pt", _PRETRAINED),
        ("audiotransformer_base_4740", BASE, 86.0, 47.4, 7964975, "audiotransformer_base_mAP_47_40.pt", _TEACHER),
    )
}


def list_models() -> list[str]:
    """Return the names of the published models."""
    return list(MODELS)


def cache_dir() -> Path:
    """Return the folder of downloaded files: $CED_CACHE, else $XDG_CACHE_HOME/ced, else ~/.cache/ced."""
    if given := os.environ.get("CED_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ced"


def fetch(name: str, progress: Progress = silent) -> Path:
    """Return the file of a published model, downloaded on first use.

    Raises:
        CheckpointError: no such name.
        DownloadError: the file is not in the cache and cannot be fetched.
    """
    entry = _entry(name)
    path = cache_dir() / entry.file
    try:
        download(entry.url, path, sha256=entry.sha256, progress=progress)
    except DownloadError as error:
        raise DownloadError(
            f"{name} is not in the cache ({path}) and not to be had: {error}; put the file there by hand, or pass the "
            "path of a local file instead of the name"
        ) from error
    return path


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
    config = MODELS[name].config if name in MODELS else _read(name, progress).config
    model = CED(_adapted(config, model_args, labels), labels)
    if pretrained is not False:
        checkpoint = _read(name if pretrained is True else pretrained, progress)
        theirs = checkpoint.labels or default_classes(checkpoint.config.outputdim)
        checkpoints.load_state(model, checkpoint, head=checkpoint.has_head and theirs.names == labels.names)
    return model


def _read(name_or_path: str | Path, progress: Progress) -> Checkpoint:
    if isinstance(name_or_path, str) and name_or_path in MODELS:
        return checkpoints.read(fetch(name_or_path, progress))
    path = Path(name_or_path).expanduser()
    if not path.exists() and path.name == str(name_or_path) and not path.suffix:
        _entry(path.name)  # more likely a name than a path: says which names there are
    return checkpoints.read(path)


def _entry(name: str) -> Entry:
    if name not in MODELS:
        raise CheckpointError(
            f"no model and no file is called {name!r}{_nearest(name, MODELS)}; published models: {', '.join(MODELS)}"
        )
    return MODELS[name]


def _adapted(config: ModelConfig, model_args: Mapping[str, Any], labels: ClassTable) -> ModelConfig:
    """Return a size's configuration with some settings replaced, for the given classes."""
    known = [field.name for field in fields(ModelConfig)]
    for name in model_args:
        if name not in known:
            raise ConfigError(f"unknown model setting {name!r}{_nearest(name, known)}; known: {', '.join(known)}")
    if model_args.get("outputdim", len(labels)) != len(labels):
        raise ConfigError(f"outputdim is {model_args['outputdim']}, but there are {len(labels)} classes")
    return checked_config({**asdict(config), **model_args, "outputdim": len(labels)})


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""
