"""Downloads: one file from one address, resumed after a cut, checked, and never seen half-written."""

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from filelock import FileLock

from ced.errors import DownloadError
from ced.progress import Progress, silent

BLOCK = 1 << 20  # bytes read at once, at most
TIMEOUT = 30.0  # seconds of silence after which a connection counts as cut
FRUITLESS_TRIES = 3  # in a row, without one new byte
PAUSE = 0.5  # seconds before the second try, doubled before each further one that brought nothing


@dataclass(frozen=True)
class _Origin:
    """What identifies the content of a part file, kept beside it so that a later run can go on with it."""

    url: str
    validator: str | None = None  # a strong ETag, or a date: the server continues only while it still holds
    md5: str | None = None  # hex, of the whole file, where the server tells
    sha256: str | None = None  # likewise


class _Redirects(HTTPRedirectHandler):
    """Follows redirects and keeps what the hub's says of the file: `X-Linked-Etag`, the sha256 of a large one."""

    linked = ""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """Note the header, then redirect as usual."""
        self.linked = headers.get("X-Linked-Etag", self.linked)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _CutError(Exception):
    """The connection broke or never came about; another try may help."""


def download(url: str, path: Path, *, sha256: str | None = None, progress: Progress = silent) -> None:
    """Fetch `url` into `path`, unless that file is there already; progress is in bytes.

    The bytes gather in `<path>.part`. After a cut the next try, or the next run, continues behind them, provided that
    the server vouches for the file being the same. Of several processes one downloads and the others wait for it.

    Raises:
        DownloadError: CED_OFFLINE is set, the address cannot be reached or answers with an error, the file cannot be
            written, or its checksum is wrong (it is removed then).
    """
    if path.is_file():
        return
    if os.environ.get("CED_OFFLINE", "0") not in ("", "0"):
        raise DownloadError(f"cannot fetch {url}: CED_OFFLINE is set")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():  # another process may have fetched it meanwhile
                _fetch(url, path, sha256, progress)
    except OSError as error:
        raise DownloadError(f"cannot write {path}: {error.strerror or error}") from error


def _fetch(url: str, path: Path, sha256: str | None, progress: Progress) -> None:
    """Receive the part file, in as many tries as bring new bytes; check it; give it its name."""
    part, notes = Path(f"{path}.part"), Path(f"{path}.part.json")
    fruitless, origin = 0, None
    while origin is None:
        before = _size(part)
        try:
            origin = _receive(url, part, notes, progress)
        except _CutError as cut:
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless == FRUITLESS_TRIES:
                raise DownloadError(f"cannot fetch {url}: {cut}") from cut
            time.sleep(PAUSE * 2 ** max(fruitless - 1, 0))
    for kind, expected in (("sha256", sha256 or origin.sha256), ("md5", origin.md5)):
        if expected is None:
            continue
        with part.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != expected:
            part.unlink()
            raise DownloadError(f"{url} came with {kind} {found}, expected {expected}; removed")
    part.replace(path)
    notes.unlink(missing_ok=True)


def _receive(url: str, part: Path, notes: Path, progress: Progress) -> _Origin:
    """Receive what the part file lacks of the file at `url`, once."""
    origin, start = _read_origin(notes), _size(part)
    headers = {"User-Agent": "ced"}
    if origin is not None and origin.url == url and origin.validator and start:
        headers |= {"Range": f"bytes={start}-", "If-Range": origin.validator}
    redirects = _Redirects()
    with _open(Request(url, headers=headers), redirects, part) as response:
        spans = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if origin is not None and response.status == 206 and spans and int(spans[1]) == start:
            total = int(spans[2])
        elif response.status == 200:  # a new file, a server without ranges, or the file has changed
            part.unlink(missing_ok=True)  # first, as the notes must never vouch for other bytes
            origin, start, total = (
                _origin_of(url, response, redirects.linked),
                0,
                int(response.headers.get("Content-Length", 0)),
            )
            notes.write_text(json.dumps(asdict(origin)), encoding="utf-8")
        else:
            part.unlink(missing_ok=True)
            raise _CutError(f"status {response.status} with bytes that were not asked for")
        with part.open("ab") as file:
            for block in _blocks(response):
                file.write(block)
                start += len(block)
                if total:
                    progress(f"download {part.stem}", start, total)
    if start < total:
        raise _CutError(f"the connection broke after {start} of {total} bytes, which are kept in {part}")
    return origin


@contextmanager
def _open(request: Request, redirects: _Redirects, part: Path) -> Iterator[HTTPResponse]:
    try:
        response = build_opener(redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DownloadError(f"cannot fetch {request.full_url}: {error.code} {error.reason}") from error
            raise _CutError(f"{error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _CutError(str(getattr(error, "reason", error))) from error
    with response:
        yield response


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes in; a body that ends early just ends."""
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, HTTPException) as error:
            raise _CutError(f"the connection broke ({error})") from error
        if not block:
            return
        yield block


def _origin_of(url: str, response: HTTPResponse, linked: str) -> _Origin:
    """Note what the answer to a request for the whole file says of it."""
    tag = response.headers.get("ETag", "")
    validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
    digest = None
    if found := re.fullmatch(r'(?:W/)?"?md5:([0-9a-fA-F]{32})"?', tag):
        digest = found[1].lower()
    elif encoded := response.headers.get("Content-MD5"):
        digest = base64.b64decode(encoded).hex()
    sha256 = found[1].lower() if (found := re.fullmatch(r'(?:W/)?"?([0-9a-fA-F]{64})"?', linked)) else None
    return _Origin(url, validator, digest, sha256)


def _read_origin(notes: Path) -> _Origin | None:
    try:
        return _Origin(**json.loads(notes.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # none, or cut short by a kill: the download starts anew


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
