"""Downloads: files of the Hugging Face hub through its own client, files of Zenodo resumed and checked.

The hub's client brings what its users know: its cache, retries that resume a broken download, `HF_TOKEN`,
`HF_ENDPOINT` (mirrors), `HF_HUB_OFFLINE`, `HF_HOME` and proxies. Zenodo's files are downloaded here: no small library
both resumes and checks the md5 that Zenodo sends, and the largest file has 340 MB.
"""

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock

from ced.environment import SWITCHES
from ced.errors import DownloadError
from ced.progress import Progress, silent

os.environ.update(SWITCHES)

BLOCK = 1 << 20  # the most bytes of a read
TIMEOUT = 30.0  # seconds without data after which a connection counts as broken
MOST_FAILURES = 3  # attempts in a row without a new byte
PAUSE = 0.5  # seconds before the second attempt, doubled after each further failure
_REASONS = {  # for statuses whose text is no help
    401: "401, not authorised; a repository that needs a token takes it from HF_TOKEN",
    403: "403, forbidden; a repository that needs a token takes it from HF_TOKEN",
    404: "404, no such file at this revision",
    429: "429, too many requests; try again later, or with a token in HF_TOKEN",
}


def offline() -> bool:
    """Return whether `CED_OFFLINE` forbids downloads; the hub's client itself obeys `HF_HUB_OFFLINE`."""
    return os.environ.get("CED_OFFLINE", "0") not in ("", "0")


def cached_hub_file(repo: str, file: str, revision: str) -> Path | None:
    """Return a file of a repository if it is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def hub_file(repo: str, file: str, revision: str, progress: Progress = silent) -> Path:
    """Return a file of a repository at a fixed revision, downloaded on first use.

    Args:
        repo: as `owner/name`.
        file: its path in the repository.
        revision: a commit, so that the content is fixed.
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
                    tqdm_class=_progress_bar(f"download {repo}", progress),
                )
            )
    except Exception as error:  # HTTP, network and file errors of several libraries, and invalid addresses
        reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if offline():
            reason = DownloadError("CED_OFFLINE is set")
        where = f"{endpoint or 'the Hugging Face hub'}, {repo}/{file} at {revision[:12]}"
        raise DownloadError(f"cannot download from {where}: {_hub_reason(reason)}") from error


def remove_hub_file(path: Path) -> None:
    """Remove a file from the hub's cache, and the content that it links to in the `blobs` of its repository.

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


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the client's warnings about retries; the last failure is raised as an error."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _progress_bar(task: str, progress: Progress) -> Any:
    """Return a subclass of tqdm that calls `progress` instead of drawing a bar."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Reports each update to `progress`."""

        def __init__(self, *given: Any, **settings: Any) -> None:
            self.task = task
            self.seen = settings.get("initial") or 0
            settings.pop("name", None)
            super().__init__(*given, **settings | {"disable": True})
            self.total = settings.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            """Report received bytes."""
            self.seen += int(n or 0)
            if self.total and 0 < self.seen <= self.total:
                progress(self.task, self.seen, int(self.total))
            return None

    return Bar


def _hub_reason(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _REASONS[status] if status in _REASONS else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__


# Zenodo.


@dataclass(frozen=True)
class _Origin:
    """The identity of the content of a part file, stored beside it so that a later run can resume."""

    url: str
    validator: str | None = None  # a strong ETag, or a date: the server resumes only if it is unchanged
    md5: str | None = None  # hex, of the whole file, if the server sends it


class NotFoundError(DownloadError):
    """The server has no such file (404)."""


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, except from https to http."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """Refuse a redirect from https to http; follow any other."""
        if req.full_url.lower().startswith("https:") and not newurl.lower().startswith("https:"):
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _ConnectionError(Exception):
    """The connection failed; another attempt may succeed."""


def download(
    url: str, path: Path, *, verify: Callable[[Path], str | None] = lambda _: None, progress: Progress = silent
) -> None:
    """Download `url` to `path`, unless that file exists; progress is in bytes.

    Bytes are collected in `<path>.part`. After a broken connection, the next attempt or the next run resumes there, if
    the server confirms that the file is unchanged. Of several processes, one downloads and the others wait.

    Args:
        url: http or https.
        path: the file; it gets this name only when it is complete and checked.
        verify: returns the problem of the content, or None.
        progress: called with the bytes so far.

    Raises:
        NotFoundError: the server has no such file.
        DownloadError: CED_OFFLINE is set, the server cannot be reached or answers with an error, the file cannot be
            written, or its content is wrong (it is then removed).
    """
    if path.is_file():
        return
    if offline():
        raise DownloadError(f"cannot download {url}: CED_OFFLINE is set")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():  # another process may have downloaded it meanwhile
                _fetch(url, path, verify, progress)
    except OSError as error:
        raise DownloadError(f"cannot write {path}: {error.strerror or error}") from error


def _fetch(url: str, path: Path, verify: Callable[[Path], str | None], progress: Progress) -> None:
    """Receive the part file, retrying as long as new bytes arrive; check it; rename it."""
    part, notes = Path(f"{path}.part"), Path(f"{path}.part.json")
    failures, origin = 0, None
    while origin is None:
        before = _size(part)
        try:
            origin = _receive(url, part, notes, progress)
        except _ConnectionError as cut:
            failures = 0 if _size(part) > before else failures + 1
            if failures == MOST_FAILURES:
                raise DownloadError(f"cannot download {url}: {cut}") from cut
            time.sleep(PAUSE * 2 ** max(failures - 1, 0))
    if (wrong := _wrong_md5(part, origin.md5) or verify(part)) is not None:
        part.unlink()
        notes.unlink(missing_ok=True)
        raise DownloadError(f"the content of {url} is not the published file: {wrong}; removed")
    part.replace(path)
    notes.unlink(missing_ok=True)


def _wrong_md5(part: Path, expected: str | None) -> str | None:
    if expected is None:
        return None
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return None if found == expected else f"its md5 is {found}, but the server announced {expected}"


def _receive(url: str, part: Path, notes: Path, progress: Progress) -> _Origin:
    """Receive the rest of the file at `url`, in one attempt."""
    origin, start = _read_origin(notes), _size(part)
    headers = {"User-Agent": "ced-audio", "Accept-Encoding": "identity"}
    if origin is not None and origin.url == url and origin.validator and start:
        headers |= {"Range": f"bytes={start}-", "If-Range": origin.validator}
    with _open(Request(url, headers=headers), part) as response:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise DownloadError(
                f"{url} was sent in encoding {response.headers['Content-Encoding']}, which was not requested"
            )
        spans = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if origin is not None and response.status == 206 and spans and int(spans[1]) == start:
            total = int(spans[2])
        elif response.status == 200:  # a new file, a server without ranges, or the file has changed
            part.unlink(missing_ok=True)  # first: the notes must never describe other bytes
            origin, start, total = _origin_of(url, response), 0, _length(response)
            notes.write_text(json.dumps(asdict(origin)), encoding="utf-8")
        else:
            part.unlink(missing_ok=True)
            raise _ConnectionError(f"status {response.status} with bytes that were not requested")
        with part.open("ab") as file:
            for block in _blocks(response):
                file.write(block)
                start += len(block)
                if total:
                    progress(f"download {part.stem}", start, total)
    if start < total:
        raise _ConnectionError(f"the connection broke after {start} of {total} bytes, which are kept in {part}")
    return origin


@contextmanager
def _open(request: Request, part: Path) -> Iterator[HTTPResponse]:
    try:
        response = build_opener(_Redirects()).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            if error.code == 404:
                raise NotFoundError(f"cannot download {request.full_url}: 404 {error.reason}") from error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DownloadError(f"cannot download {request.full_url}: {error.code} {error.reason}") from error
            raise _ConnectionError(f"{error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _ConnectionError(str(getattr(error, "reason", error))) from error
    except ValueError as error:  # an invalid address or header
        raise DownloadError(f"cannot download {request.full_url}: {error}") from error
    with response:
        yield response


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it arrives; a body may end early."""
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, HTTPException) as error:
            raise _ConnectionError(f"the connection broke ({error})") from error
        if not block:
            return
        yield block


def _length(response: HTTPResponse) -> int:
    """Return the announced length of a body; 0: none, or not a number."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _origin_of(url: str, response: HTTPResponse) -> _Origin:
    """Return the identity of a file from the response to a request for all of it."""
    tag = response.headers.get("ETag", "")
    validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
    digest = None
    if found := re.fullmatch(r'(?:W/)?"?md5:([0-9a-fA-F]{32})"?', tag):
        digest = found[1].lower()
    elif encoded := response.headers.get("Content-MD5"):
        with suppress(binascii.Error):
            digest = base64.b64decode(encoded, validate=True).hex()
    return _Origin(url, validator, digest if digest is not None and len(digest) == 32 else None)


def _read_origin(notes: Path) -> _Origin | None:
    try:
        return _Origin(**json.loads(notes.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # missing, or truncated by a kill: the download starts again


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
