"""The environment of this process: processors, open files, and switches that keep libraries from sending usage data."""

import os
import sys
from contextlib import suppress

# Usage data. A module that imports one of these libraries sets the variables before the import, as each library reads
# its own only once.
SWITCHES = {
    # ONNX Runtime keeps a device id and a database with names of models in the user's cache, and uploads it.
    "ORT_DISABLE_TELEMETRY": "1",
    # The hub's client, and through it Transformers, send the versions of installed packages with each request.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Ray sends the size of the cluster and the names of the libraries in use.
    "RAY_USAGE_STATS_ENABLED": "0",
}


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files() -> None:
    """Raise the limit of open files and connections to the most that this process may have."""
    if sys.platform == "win32":  # it has no such limit
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # kernels may allow less than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
