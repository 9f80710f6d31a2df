"""What the machine has to offer."""

import os
import sys
from contextlib import suppress


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allow_open_files() -> None:
    """Let this process have as many files and connections open as it may, not as many as is usual."""
    if sys.platform == "win32":  # which knows no such limit
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # where the kernel allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
