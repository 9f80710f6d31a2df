"""What can go wrong, as one family of exceptions: the command line turns any of them into one line."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

DISTRIBUTION = "ced-audio"  # the name of this project on the package index; the name "ced" there is another project's
# Optional modules: the package that brings each, and the smallest extra of this project that installs it.
_OPTIONAL = {
    "accelerate": ("accelerate", "hf"),
    "av": ("av", "media"),
    "bitsandbytes": ("bitsandbytes", "gpu"),
    "fastapi": ("fastapi", "serve"),
    "h5py": ("h5py", "train"),
    "matplotlib": ("matplotlib", "train"),
    "multipart": ("python-multipart", "serve"),
    "paho": ("paho-mqtt", "mqtt"),
    "prometheus_client": ("prometheus-client", "serve"),
    "pyarrow": ("pyarrow", "parquet"),
    "python_multipart": ("python-multipart", "serve"),
    "ray": ("ray", "ray"),
    "sounddevice": ("sounddevice", "live"),
    "starlette": ("starlette", "serve"),
    "tensorboard": ("tensorboard", "train"),
    "torch": ("torch", "train"),
    "transformers": ("transformers", "hf"),
    "uvicorn": ("uvicorn", "serve"),
    "websockets": ("websockets", "serve"),
}


class CedError(Exception):
    """Base of every error this package raises on purpose; its message says what came and what is allowed.

    Attributes:
        message: one line about this very case.
        details: further lines, such as each error of a configuration.
        hint: what is allowed or would help, where that is the same for every error of the kind; it ends the first line.
    """

    def __init__(self, message: str = "", *, details: Iterable[str] = (), hint: str = "") -> None:
        super().__init__(message)
        self.message, self.details, self.hint = message, tuple(details), hint

    def __str__(self) -> str:
        first = f"{self.message}; {self.hint}" if self.hint else self.message
        return "\n".join([first, *self.details])


class AudioError(CedError):
    """A sound that cannot be read: missing, empty, of an unknown kind, or with samples that are not numbers.

    Attributes:
        reason: what is wrong, without the name.
        name: what the sound is called; None where `reason` says it all.
    """

    def __init__(self, reason: str, name: str | None = None, *, hint: str = "") -> None:
        super().__init__(reason if name is None else f"{name}: {reason}", hint=hint)
        self.args = reason, name  # what copies of it are made from
        self.reason, self.name = reason, name


class TooLongError(AudioError):
    """A sound with more samples than the caller allows."""


class ConfigError(CedError):
    """A configuration or an option that is unknown, of the wrong type, or contradicts another."""


class TableError(CedError):
    """A table (clips, labels, classes) with a missing column or a value out of range."""


class CheckpointError(CedError):
    """Weights that do not fit the network, or a file that holds none."""


class WriteError(CedError, OSError):
    """A file that cannot be written: the disk is full, a folder is read-only, a link leads elsewhere.

    Attributes:
        path: the file, as the user named it or as it follows from that.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        """Explain why `path` cannot be written."""
        self.path = os.fspath(path)
        super().__init__(f"cannot write {self.path}: {reason}")
        self.args = self.path, reason  # what copies of it are made from


class DownloadError(CedError):
    """A file that is not here and could not be fetched."""


class ChecksumError(DownloadError):
    """A downloaded file whose content is not the published one."""


class PackError(CedError):
    """An audio pack that lacks a clip, or two clips with one name."""


class StoreError(CedError):
    """A view store that is incomplete, of another format version, or written under other settings."""


class TrainingError(CedError):
    """Training whose numbers are no longer finite, or an experiment that cannot be continued."""


class ExportError(CedError):
    """An exported graph that does not answer as its network does."""


class ProcessError(CedError):
    """A run of several processes that cannot begin, or that one of them has left."""


class BusyError(CedError):
    """A place that another process is writing to."""


class ClosedError(CedError):
    """Work that was still going on when whoever does it was closed."""


class MissingPackageError(CedError, ImportError):
    """An optional package that is not installed.

    Attributes:
        package: its name on the package index.
        extra: the extra of this project that installs it.
        command: the command that installs that extra.
    """

    def __init__(self, module: str, purpose: str = "") -> None:
        """Explain which package brings `module`; `purpose` says what needs it, as the subject of a sentence."""
        self.package, self.extra = _OPTIONAL[module]
        self.command = install_command(self.extra)
        super().__init__(f"{purpose or 'this'} needs the package {self.package}: {self.command}")
        self.args = module, purpose  # what copies of it are made from


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this project."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


@contextmanager
def optional_packages(purpose: str = "") -> Iterator[None]:
    """Import optional packages inside: one that is missing raises `MissingPackageError`.

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
