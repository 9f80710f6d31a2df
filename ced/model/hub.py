"""Files of the Hugging Face hub, fetched by the hub's own client into its own cache.

The client brings what its users know: resuming, `HF_TOKEN`, `HF_ENDPOINT` (mirrors), `HF_HUB_OFFLINE`, `HF_HOME` and
proxies.
"""

import os
from pathlib import Path
from typing import Any

from ced.errors import DownloadError
from ced.progress import Progress, silent
from ced.telemetry import SWITCHES

os.environ.update(SWITCHES)


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
        progress: told of the download, in bytes.

    Raises:
        DownloadError: the file is not cached and could not be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    endpoint = (os.environ.get("HF_ENDPOINT") or "").strip().rstrip("/") or None
    try:
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
        raise DownloadError(f"cannot download from {where}: {_first_line(reason)}") from error


def forget(path: Path) -> None:
    """Remove a file from the hub's cache, with the content that it links to."""
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
