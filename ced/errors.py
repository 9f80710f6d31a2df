"""The exceptions of this package; the command line prints any of them in one line."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

DISTRIBUTION = "ced-audio"  # on the package index, where "ced" is another project
# Optional modules: the package of each, and the smallest extra of this project that installs it.
_OPTIONAL = {
    "accelerate": ("accelerate", "hf"),
    "adlfs": ("adlfs", "cloud"),
    "av": ("av", "media"),
    "bitsandbytes": ("bitsandbytes", "gpu"),
    "fastapi": ("fastapi", "serve"),
    "fsspec": ("fsspec", "cloud"),
    "gcsfs": ("gcsfs", "cloud"),
    "h5py": ("h5py", "train"),
    "matplotlib": ("matplotlib", "train"),
    "multipart": ("python-multipart", "serve"),
    "paho": ("paho-mqtt", "mqtt"),
    "prometheus_client": ("prometheus-client", "serve"),
    "pyarrow": ("pyarrow", "parquet"),
    "python_multipart": ("python-multipart", "serve"),
    "ray": ("ray", "ray"),
    "s3fs": ("s3fs", "cloud"),
    "sounddevice": ("sounddevice", "live"),
    "starlette": ("starlette", "serve"),
    "tensorboard": ("tensorboard", "train"),
    "torch": ("torch", "train"),
    "transformers": ("transformers", "hf"),
    "uvicorn": ("uvicorn", "serve"),
    "websockets": ("websockets", "serve"),
}


class CedError(Exception):
    """Base of all errors that this package raises; the message states the value given and the values allowed.

    Attributes:
        message: one line about this case.
        details: further lines, such as each error of a configuration.
        hint: what is allowed or would help, where that is the same for all errors of the kind; it ends the first line.
    """

    def __init__(self, message: str = "", *, details: Iterable[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message, self.details, self.hint = message, tuple(details), hint

    def __str__(self) -> str:
        first = f"{self.message}; {self.hint}" if self.hint else self.message
        return "\n".join([first, *self.details])


class AudioError(CedError):
    """A sound that cannot be read: missing, empty, of an unknown format, or with invalid samples.

    Attributes:
        reason: the problem, without the name.
        name: of the sound; None where `reason` names it.
    """

    def __init__(self, reason: str, name: str | None = None, *, hint: str = "") -> None:
        super().__init__(reason if name is None else f"{name}: {reason}", hint=hint)
        self.args = reason, name  # for copying and pickling
        self.reason, self.name = reason, name


class TooLongError(AudioError):
    """A sound with more samples than the caller allows."""


class ConfigError(CedError):
    """A configuration or an option that is unknown, of the wrong type, out of range, or contradicts another."""


class TableError(CedError):
    """A table (clips, labels, classes) with a missing column or a value out of range."""


class CheckpointError(CedError):
    """A model that cannot be loaded or used: an unknown name, a damaged file, or weights that do not fit."""


class WriteError(CedError, OSError):
    """A file that cannot be written: the disk is full, a folder is read-only, or the path is a link.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        """Explain why `path` cannot be written."""
        self.path = os.fspath(path)
        super().__init__(f"cannot write {self.path}: {reason}")
        self.args = self.path, reason  # for copying and pickling


class DownloadError(CedError):
    """A file that is not cached and could not be downloaded."""


class ChecksumError(DownloadError):
    """A downloaded file whose content is not the published one."""


class PackError(CedError):
    """An audio pack that lacks a clip, or two clips with one name."""


class StoreError(CedError):
    """A view store that is incomplete, of another format version, or written with other settings."""


class TrainingError(CedError):
    """Training with values that are not finite, or an experiment that cannot be resumed."""


class ExportError(CedError):
    """A network that cannot be exported, or a graph whose scores differ from its network's."""


class ProcessError(CedError):
    """A run of several processes that cannot start, or of which one has failed."""


class BusyError(CedError):
    """An output that another process is writing to."""


class ClosedError(CedError):
    """Work that was cancelled, or that was still running when its owner was closed."""


class MissingPackageError(CedError, ImportError):
    """An optional package that is not installed.

    Attributes:
        package: its name on the package index.
        extra: the extra of this project that installs it.
        command: the command that installs that extra.
    """

    def __init__(self, module: str, purpose: str = "") -> None:
        """Name the package of `module`; `purpose` is what needs it, as the subject of a sentence."""
        self.package, self.extra = _OPTIONAL[module]
        self.command = install_command(self.extra)
        super().__init__(f"{purpose or 'this'} needs the package {self.package}: {self.command}")
        self.args = module, purpose  # for copying and pickling


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this project."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


@contextmanager
def optional_packages(purpose: str = "") -> Iterator[None]:
    """Import optional packages inside the `with` block: a missing one raises `MissingPackageError`.

    Args:
        purpose: what needs them, as the subject of the error's sentence.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _OPTIONAL:
            raise
        raise MissingPackageError(module, purpose) from error
