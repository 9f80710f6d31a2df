"""Request bodies: the limits of the server, and how a body is read into an upload that can be decoded."""

import asyncio
import io
import json
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from email.utils import collapse_rfc2231_value
from pathlib import PurePosixPath
from tempfile import SpooledTemporaryFile
from threading import Event, Lock
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit

import numpy as np
from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ced.errors import AudioError, CedError, ConfigError
from ced.files import FULL
from ced.serve.schema import FIELD, PCM
from ced.sound import audio
from ced.sound.web import Web

RATES = (1_000, 768_000)  # hertz, of raw samples
_IN_MEMORY = 1 << 20  # bytes of a body; more of them go to an unnamed temporary file
_LONGEST_NAME = 255
_LONGEST_JSON = 4096  # bytes of a body that holds an address
_FETCHERS = 4  # addresses that are fetched at the same time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The largest requests, and the slowest clients, that a server accepts."""

    megabytes: float = 50.0  # of a body
    seconds: float = 600.0  # of sound in a request; overlapping windows count in full
    waiting: int = 16  # requests in the queue
    live: int = 4  # live connections
    patience: float = 10.0  # seconds that a body or an answer may take at any rate
    slowest: float = 20_000.0  # bytes per second of a body or an answer that takes longer
    deadline: float = 600.0  # seconds for a whole body

    def __post_init__(self) -> None:
        for name in ("megabytes", "seconds", "patience", "slowest", "deadline"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"the limit {name} is {value}; it must be a number above 0")
        for name in ("waiting", "live"):
            if getattr(self, name) < 0:
                raise ConfigError(f"the limit {name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def bytes(self) -> int:
        """The size limit of a body, a whole number."""
        return round(self.megabytes * 1e6)


class RefusedError(CedError):
    """A request that is refused, with the HTTP status and the headers of the answer."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def busy() -> RefusedError:
    """Return the error of a request when no place is free."""
    return RefusedError(503, "too many requests are waiting; try again soon", {"Retry-After": "1"})


class Upload:
    """An uploaded sound, which is deleted when it is closed.

    Attributes:
        name: its file name from the client, without control characters.
        source: file or samples to decode.
    """

    def __init__(self, name: str, source: audio.Source, close: Callable[[], None]) -> None:
        self.name, self.source = name, source
        self._close = close

    def close(self) -> None:
        """Delete the sound; any thread may call this once no other one reads it."""
        self._close()

    def __del__(self) -> None:  # if the request ended before its work began
        self.close()


class Bodies:
    """Reads bodies into uploads, and limits the bytes of all uploads together.

    An upload of up to a megabyte stays in memory. A larger one goes to a temporary file without a name, so the system
    removes it when it is closed or when the process ends, however that happens.

    Args:
        limits: size, rate and deadline of a body.
        places: how many uploads of the largest size may be held at once.
        addresses: whether a body may hold the address of a sound, which is then fetched from a public host.
    """

    def __init__(self, limits: Limits, places: int, *, addresses: bool = False) -> None:
        self.limits = limits
        self._most = limits.bytes * places
        self._held = 0  # bytes of all uploads
        self._lock = Lock()
        # Threads of their own, so that a slow host delays no uploads.
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "ced-fetch") if addresses else None
        self._fetching = 0
        self._full = False  # whether the last write to the temporary folder failed because it was full

    def close(self) -> None:
        """End the threads that fetch."""
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=False, cancel_futures=True)

    def hold(self, count: int) -> bool:
        """Add bytes to those of all uploads; return whether the sum is within the limit."""
        with self._lock:
            self._held += count
            return self._held <= self._most

    async def receive(self, request: Request) -> Upload:
        """Read a body: a form with one file, the bytes of a file, or raw samples.

        Raises:
            RefusedError: too large (413), not a sound by its type (415), too slow (408), too many bytes held (503), no
                room to store it (507), or not what its type requires (422).
            ClientDisconnect: the client closed the connection.
        """
        kind = _content_type(request)
        is_form = kind.get_content_type() == "multipart/form-data"
        samples = None if is_form else _sample_format(kind)
        held = _Incoming(self)
        try:
            parts = _bounded(request, held)
            with self._storing(held):
                held.file = file = await (_file_of_form(request.headers, parts) if is_form else _file_of_body(parts))
                await file.seek(0)  # flushes the buffers
            name = _printable(file.filename or "") or FIELD
            if not file.size:
                raise RefusedError(422, f"{name} is empty (0 bytes)")
            if samples is None:
                return Upload(name, cast(BinaryIO, _NamedFile(file.file, name)), held.close)
            return Upload(name, _decode_samples(await file.read(), *samples), held.close)
        except BaseException:
            held.close()
            raise

    async def address(self, request: Request) -> str | None:
        """Read the address in a JSON body; None if the body is of another type.

        Raises:
            RefusedError: the body holds no address (422); others as for `receive`.
        """
        if self._fetchers is None or _content_type(request).get_content_type() != "application/json":
            return None
        held = _Incoming(self)
        try:
            body = b"".join([part async for part in _bounded(request, held, _LONGEST_JSON)])
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RefusedError(422, f"the body is not JSON: {error}") from error
        finally:
            held.close()
        match values:
            case {"address": str(address)} if len(values) == 1:
                return address.strip()
        raise RefusedError(422, 'the body must be {"address": "https://..."}')

    async def fetch(self, address: str) -> Upload:
        """Fetch the sound at an address, from a public host only.

        Raises:
            RefusedError: it cannot be fetched (422), is too large (413) or too slow (408), there is no room to store it
                (507), or too many sounds are being fetched (503).
        """
        assert self._fetchers is not None
        with self._lock:
            if self._fetching >= _FETCHERS:
                raise busy()
            self._fetching += 1
        cancelled = Event()
        job = self._fetchers.submit(self._fetch_in_thread, address, cancelled)
        job.add_done_callback(self._end_fetch)
        try:
            return await asyncio.shield(asyncio.wrap_future(job))
        except asyncio.CancelledError:
            cancelled.set()
            job.add_done_callback(_close_result)
            raise

    def _fetch_in_thread(self, address: str, cancelled: Event) -> Upload:
        held = _Incoming(self)
        with self._storing(held):
            return _fetch(address, held, cancelled)

    @contextmanager
    def _storing(self, held: "_Incoming") -> Iterator[None]:
        """Convert errors of a full temporary folder; the first of several in a row is logged.

        Raises:
            RefusedError: there is no room to store an upload (507).
        """
        try:
            yield
        except OSError as error:
            # tempfile raises FileNotFoundError if all temporary folders are full when it chooses one.
            if error.errno not in FULL and not isinstance(error, FileNotFoundError):
                raise
            if not self._full:
                self._full = True
                logger.error("uploads cannot be stored in the temporary folder: %s", error.strerror or error)
            raise RefusedError(507, "the server has no room left to store this upload; smaller ones may fit") from error
        if held.size > _IN_MEMORY:
            self._full = False

    def _end_fetch(self, _: object) -> None:
        with self._lock:
            self._fetching -= 1


class _Incoming:
    """The bytes of one upload while they arrive, and its file.

    Attributes:
        size: bytes so far.
        file: holds them; None before the first one.
    """

    def __init__(self, bodies: Bodies) -> None:
        self.limits = bodies.limits
        self._hold = bodies.hold
        self.size = 0
        self.file: UploadFile | None = None
        self._began = time.monotonic()

    @property
    def latest(self) -> float:
        """When the next bytes must have arrived, as of time.monotonic()."""
        limits = self.limits
        return self._began + min(limits.deadline, limits.patience + self.size / limits.slowest)

    def add(self, count: int) -> None:
        """Count bytes that arrived.

        Raises:
            RefusedError: the upload, or all of them together, is too large.
        """
        self.size += count
        within = self._hold(count)
        if self.size > self.limits.bytes:
            raise _too_large(self.limits)
        if not within:
            raise busy()

    def close(self) -> None:
        """Delete the upload."""
        self._hold(-self.size)
        self.size = 0
        if self.file is not None:
            self.file.file.close()


async def _bounded(request: Request, held: _Incoming, most: float = math.inf) -> AsyncGenerator[bytes, None]:
    """Yield the parts of a body as they arrive.

    Raises:
        RefusedError: it is too large, by its Content-Length or as it arrives, or too slow.
    """
    if _content_length(request.headers) > held.limits.bytes:
        raise _too_large(held.limits)
    parts = request.stream()
    while True:
        try:
            async with asyncio.timeout(max(0.0, held.latest - time.monotonic())):
                part = await anext(parts, None)
        except TimeoutError as error:
            raise _too_slow("the body arrived", held.limits) from error
        if part is None:
            return
        held.add(len(part))
        if held.size > most:
            raise RefusedError(413, f"the body is larger than {most:g} bytes")
        yield part


def _fetch(address: str, held: _Incoming, cancelled: Event) -> Upload:
    """Fetch the sound at an address; errors are those of `Bodies.fetch`."""
    name = _printable(PurePosixPath(unquote(urlsplit(address).path)).name) or "address"
    try:
        held.file = _empty_file(name)
        with Web(address, private="none").open() as source:
            while not cancelled.is_set() and (part := source.read(1 << 16)):
                held.add(len(part))
                held.file.file.write(part)
                if time.monotonic() > held.latest:
                    raise _too_slow("the sound arrived", held.limits)
        held.file.file.seek(0)  # flushes the buffers
    except BaseException as error:
        held.close()
        if isinstance(error, AudioError):
            raise RefusedError(422, str(error)) from error
        raise
    return Upload(name, cast(BinaryIO, _NamedFile(held.file.file, name)), held.close)


def _close_result(job: "Future[Upload]") -> None:
    if not job.cancelled() and job.exception() is None:
        job.result().close()


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(413, f"the body is larger than {limits.megabytes:g} MB, the limit of this server")


def _too_slow(what: str, limits: Limits) -> RefusedError:
    return RefusedError(
        408,
        f"{what} too slowly; it may take {limits.patience:g} s, and another second for every"
        f" {limits.slowest / 1000:g} kB, at most {limits.deadline:g} s",
    )


def _content_type(request: Request) -> Message:
    kind = Message()
    kind["content-type"] = request.headers.get("content-type") or "application/octet-stream"
    return kind


def _printable(name: str) -> str:
    """Return a file name from a client without control characters, shortened if it is long."""
    return "".join(filter(str.isprintable, name))[:_LONGEST_NAME]


def _content_length(headers: Headers) -> int:
    """Return the Content-Length of a body, 0 if there is none."""
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise RefusedError(400, f"Content-Length is {text[:100]!r}; it must be a number of bytes")
    return int(text)


class _NamedFile(io.RawIOBase):
    """An uploaded file with the name that its client gave it.

    Seeking to an impossible position, as libsndfile does in damaged files, does not change the position.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__()
        self.name = name
        self._file = file
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        found = self._file.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OverflowError, OSError):
            return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()


async def _file_of_body(parts: AsyncGenerator[bytes, None]) -> UploadFile:
    file = _empty_file("body")
    try:
        async for part in parts:
            await file.write(part)
    except BaseException:
        file.file.close()
        raise
    return file


def _empty_file(name: str) -> UploadFile:
    held = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (closed with its upload)
    return UploadFile(cast(BinaryIO, held), size=0, filename=name)


async def _file_of_form(headers: Headers, parts: AsyncGenerator[bytes, None]) -> UploadFile:
    wanted = f"a form has one field, {FIELD!r}, with the file; options are part of the address (?top_k=5)"
    parser = MultiPartParser(headers, parts, max_files=1, max_fields=0)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        fault = "" if error.message.startswith("Too many ") else f"{error.message.rstrip('.')}; "
        raise RefusedError(422, fault + wanted) from error
    except ValueError as error:  # an impossible charset
        raise RefusedError(422, f"the form cannot be read: {error}; {wanted}") from error
    file = form.get(FIELD)
    if not isinstance(file, UploadFile):
        await form.close()
        raise RefusedError(422, wanted)
    return file


def _sample_format(kind: Message) -> tuple[str, int, int] | None:
    """Return NumPy type, rate and channels of a body of raw samples; None if the body is a file.

    Raises:
        RefusedError: its media type is not that of a sound (415), or lacks valid parameters (422).
    """
    given = kind.get_content_type()
    if given not in PCM:
        main, _, sub = given.partition("/")
        if main in ("audio", "video") or sub in ("octet-stream", "ogg"):
            return None
        raise RefusedError(
            415,
            f"a body of type {given} is not a sound; send a form with the field {FIELD!r}, a file as audio/* or"
            f" application/octet-stream, or raw samples as {' or '.join(PCM)} with rate and channels",
        )
    formats = PCM[given]
    numbers = {}
    for name, usual, (least, most) in (("rate", None, RATES), ("channels", "1", (1, 64))):
        text = _parameter(kind, name, usual)
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise RefusedError(422, f"{given} needs {name}={least} to {most} (as {given}; rate=16000; channels=1)")
        numbers[name] = int(text)
    form = _parameter(kind, "format", next(iter(formats)))
    if form not in formats:
        raise RefusedError(422, f"{given} has no format {form}; known formats: {', '.join(formats)}")
    return formats[form], numbers["rate"], numbers["channels"]


def _parameter(kind: Message, name: str, usual: str | None) -> str:
    """Return a parameter of a media type, or its default."""
    try:
        value = kind.get_param(name, usual)
        return "" if value is None else collapse_rfc2231_value(value)
    except (
        TypeError,
        ValueError,
    ) as error:  # the value is split as RFC 2231 allows, but into parts that do not fit together
        raise RefusedError(422, f"the parameters of {kind.get_content_type()} cannot be read") from error


def _decode_samples(body: bytes, kind: str, rate: int, channels: int) -> audio.Source:
    """Return the samples of a body, (t, channels), and their rate."""
    frame = np.dtype(kind).itemsize * channels
    if len(body) % frame:
        raise RefusedError(422, f"the body has {len(body)} bytes, not a multiple of the {frame} bytes of a frame")
    native = np.dtype(kind).newbyteorder("=")
    return np.frombuffer(body, kind).astype(native).reshape(-1, channels), rate
