"""What can go wrong, as one family of exceptions: the command line turns any of them into one line."""


class CedError(Exception):
    """Base of every error this package raises on purpose; its message says what came and what is allowed."""


class AudioError(CedError):
    """A sound that cannot be read: missing, empty, of an unknown kind, or with samples that are not numbers."""


class ConfigError(CedError):
    """A configuration or an option that is unknown, of the wrong type, or contradicts another."""


class TableError(CedError):
    """A table (clips, labels, classes) with a missing column or a value out of range."""


class CheckpointError(CedError):
    """Weights that do not fit the network, or a file that holds none."""


class DownloadError(CedError):
    """A file that is not here and could not be fetched."""


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
