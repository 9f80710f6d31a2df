"""Files of the Hugging Face hub, fetched by the hub's own client into its own cache.

The client brings what its users know: retries that continue a broken download, `HF_TOKEN`, `HF_ENDPOINT` (mirrors),
`HF_HUB_OFFLINE`, `HF_HOME` and proxies.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ced.errors import CheckpointError, DownloadError
from ced.progress import Progress, silent
from ced.telemetry import SWITCHES

os.environ.update(SWITCHES)

LARGEST_CONFIG = 16 << 20  # bytes of a config.json
_REASONS = {  # of statuses whose own text says little
    401: "401, not authorised; a repository that needs a token takes it from HF_TOKEN",
    403: "403, forbidden; a repository that needs a token takes it from HF_TOKEN",
    404: "404, no such file at this revision",
    429: "429, too many requests; try again later, or with a token in HF_TOKEN",
}


def offline() -> bool:
    """Return whether `CED_OFFLINE` forbids the network; the client itself obeys `HF_HUB_OFFLINE`."""
    return os.environ.get("CED_OFFLINE", "0") not in ("", "0")


def cached(repo: str, file: str, revision: str) -> Path | None:
    """Return a file of a repository if it is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(repo: str, file: str, revision: str, progress: Progress = silent) -> Path:
    """Return a file of a repository at a fixed revision, downloaded on first use.

    Args:
        repo: as `owner/name`.
        file: its path in the repository.
        revision: a commit, so that the content cannot change.
        progress: called during the download, with bytes.

    Raises:
        DownloadError: the file is not cached and could not be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    endpoint = (os.environ.get("HF_ENDPOINT") or "").strip().rstrip("/") or None
    try:
        with _quiet_client():
            return Path(
                hf_hub_download(
                    repo,
                    file,
                    revision=revision,
                    endpoint=endpoint,
                    local_files_only=offline(),
                    library_name="ced-audio",
                    tqdm_class=_bar(f"download {repo}", progress),
                )
            )
    except Exception as error:  # HTTP, network and file errors of several libraries, and invalid addresses
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if offline():
            reason = DownloadError("CED_OFFLINE is set")
        where = f"{endpoint or 'the Hugging Face hub'}, {repo}/{file} at {revision[:12]}"
        raise DownloadError(f"cannot download from {where}: {_reason(reason)}") from error


def forget(path: Path) -> None:
    """Remove a file from the hub's cache, with the content in its repository's `blobs` that it links to.

    Raises:
        DownloadError: it cannot be removed.
    """
    content = path.resolve()
    try:
        path.unlink(missing_ok=True)
        if content.parent.name == "blobs" and content.parent.parent in path.absolute().parents:
            content.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot remove {error.filename}: {error.strerror}") from error


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the `config.json` beside weights or a graph; None if there is none.

    Raises:
        CheckpointError: it is too large, damaged, or not a configuration.
    """
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {LARGEST_CONFIG} are read")
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds a {type(settings).__name__}, not a configuration")
    return settings


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's warnings about retries; what ends the download comes back as an error."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _bar(task: str, progress: Progress) -> Any:
    """Return a progress bar class that reports instead of drawing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Passes each update on to `progress`."""

        def __init__(self, *given: Any, **settings: Any) -> None:
            self.task = task
            self.seen = settings.get("initial") or 0
            settings.pop("name", None)
            super().__init__(*given, **settings | {"disable": True})
            self.total = settings.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            """Report bytes that came in."""
            self.seen += int(n or 0)
            if self.total and 0 < self.seen <= self.total:
                progress(self.task, self.seen, int(self.total))
            return None

    return Bar


def _reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _REASONS[status] if status in _REASONS else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
