"""CED: audio tagging with small vision transformers, trained by Consistent Ensemble Distillation.

import ced

for window in ced.Tagger("esc10").tag("rooster.ogg"):
    print(window.start, window.end, window.label, window.prob)
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ced.errors import (
    AudioError,
    BusyError,
    CedError,
    CheckpointError,
    ClosedError,
    ConfigError,
    DownloadError,
    ExportError,
    MissingPackageError,
    PackError,
    ProcessError,
    StoreError,
    TableError,
    TooLongError,
    TrainingError,
    WriteError,
    optional_packages,
)
from ced.progress import Progress, silent

if TYPE_CHECKING:
    from ced.model.config import Pooling
    from ced.model.vit import CED
    from ced.model.zoo import list_models as list_models
    from ced.tag.options import TagOptions as TagOptions
    from ced.tag.records import Record as Record
    from ced.tag.tagger import Tagger as Tagger

__version__ = "0.2.0"
__all__ = [
    "AudioError",
    "BusyError",
    "CedError",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "DownloadError",
    "ExportError",
    "MissingPackageError",
    "PackError",
    "ProcessError",
    "Record",
    "StoreError",
    "TableError",
    "TagOptions",
    "Tagger",
    "TooLongError",
    "TrainingError",
    "WriteError",
    "__version__",
    "list_models",
    "load_model",
]

# Imported on first use, so that `import ced` takes no time.
_MODULES = {
    "Record": "ced.tag.records",
    "TagOptions": "ced.tag.options",
    "Tagger": "ced.tag.tagger",
    "list_models": "ced.model.zoo",
}


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    pooling: "Pooling | None" = None,
    target_length: int | None = None,
    progress: Progress = silent,
) -> "CED":
    """Return a torch network in eval mode, with its class table as `.labels`, for training and research.

    Tagging needs no torch: see `Tagger`.

    Args:
        name_or_path: one of `list_models()`, or a checkpoint file or folder.
        pooling: how tokens become scores; None keeps the checkpoint's own ("mean" in published files).
        target_length: frames of one forward pass; None keeps the checkpoint's own.
        progress: called during a download, with bytes.

    Raises:
        MissingPackageError: torch is not installed.
        CheckpointError: neither a name nor a checkpoint, or weights that do not fit.
        DownloadError: a file that is not in the cache could not be downloaded.
    """
    with optional_packages("ced.load_model"):
        from ced.model import loading
    given = name_or_path if isinstance(name_or_path, str) else Path(name_or_path)
    return loading.load_model(given, pooling=pooling, target_length=target_length, progress=progress)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ced' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
