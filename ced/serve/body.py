"""Request bodies: what a server accepts, and how a body becomes an upload that can be decoded."""

import asyncio
import io
import math
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from email.utils import collapse_rfc2231_value
from tempfile import SpooledTemporaryFile
from threading import Lock
from typing import BinaryIO, cast

import numpy as np
from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ced.errors import CedError, ConfigError
from ced.serve.schema import FIELD, PCM
from ced.sound import audio

RATES = (1_000, 768_000)  # hertz, of raw samples
_IN_MEMORY = 1 << 20  # bytes of a body; more of them go to an unnamed temporary file
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Limits:
    """What a server accepts."""

    megabytes: float = 50.0  # of a body
    seconds: float = 600.0  # of sound in a request; overlapping windows count in full
    waiting: int = 16  # requests that wait for their turn
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
    """A request that is not answered, with the HTTP status that says why, and headers of that answer."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def busy() -> RefusedError:
    """Return the refusal of a request that finds no place."""
    return RefusedError(503, "too many requests are waiting; try again soon", {"Retry-After": "1"})


class Upload:
    """The sound in a body, until it is closed.

    Attributes:
        name: what the client calls it, fit for logs.
        source: what is decoded.
    """

    def __init__(self, name: str, source: audio.Source, close: Callable[[], None]) -> None:
        self.name, self.source = name, source
        self._close = close

    def close(self) -> None:
        """Delete the sound; any thread may do so, once nothing reads it any more."""
        self._close()


class Bodies:
    """Reads bodies into uploads, and bounds the bytes of all uploads together.

    An upload of up to a megabyte stays in memory. A larger one goes to a temporary file without a name, so the system
    removes it when it is closed or when the process ends, however that happens.

    Args:
        limits: size, rate and deadline of a body.
        places: how many uploads of the largest size may be held at once.
    """

    def __init__(self, limits: Limits, places: int) -> None:
        self._limits = limits
        self._most = limits.bytes * places
        self._held = 0  # bytes of all uploads
        self._lock = Lock()

    async def receive(self, request: Request) -> Upload:
        """Read a body: a form with one file, the bytes of a file, or raw samples.

        Raises:
            RefusedError: too large (413), not a sound by its type (415), too slow (408), too many bytes held (503), or
                not what its type requires (422).
            ClientDisconnect: the client closed the connection.
        """
        limits = self._limits
        kind = Message()
        kind["content-type"] = request.headers.get("content-type") or "application/octet-stream"
        is_form = kind.get_content_type() == "multipart/form-data"
        samples = None if is_form else _sample_format(kind)
        file: UploadFile | None = None
        size = 0

        def close() -> None:
            nonlocal size
            self._hold(-size)
            size = 0
            if file is not None:
                file.file.close()

        def count(part: bytes) -> int:
            nonlocal size
            size += len(part)
            self._hold(len(part))
            return size

        try:
            try:
                async with asyncio.timeout(limits.patience) as deadline:
                    parts = self._bounded(request, deadline, count)
                    file = await (_file_of_form(request.headers, parts) if is_form else _file_of_body(parts))
            except TimeoutError as error:
                raise RefusedError(
                    408,
                    f"the body arrived too slowly; it may take {limits.patience:g} s, and another second for every"
                    f" {limits.slowest / 1000:g} kB, at most {limits.deadline:g} s",
                ) from error
            name = "".join(filter(str.isprintable, file.filename or ""))[:_LONGEST_NAME] or FIELD
            if not file.size:
                raise RefusedError(422, f"{name} is empty (0 bytes)")
            if samples is None:
                return Upload(name, cast(BinaryIO, _NamedFile(file.file, name)), close)
            return Upload(name, _decode_samples(await file.read(), *samples), close)
        except BaseException:
            close()
            raise

    def _hold(self, count: int) -> None:
        with self._lock:
            self._held += count

    async def _bounded(
        self, request: Request, deadline: asyncio.Timeout, count: Callable[[bytes], int]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives, unless it is announced or turns out too large; each part moves the deadline."""
        limits, first = self._limits, deadline.when()
        assert first is not None
        latest = first - limits.patience + limits.deadline
        too_large = RefusedError(413, f"the body is larger than {limits.megabytes:g} MB, the limit of this server")
        if _announced(request.headers) > limits.bytes:
            raise too_large
        async for part in request.stream():
            size = count(part)
            if size > limits.bytes:
                raise too_large
            if self._held > self._most:
                raise busy()
            deadline.reschedule(min(latest, first + size / limits.slowest))
            yield part


def _announced(headers: Headers) -> int:
    """Return the announced length of a body, 0 if there is none."""
    text = headers.get("content-length", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise RefusedError(400, f"Content-Length is {text[:100]!r}; it must be a number of bytes")
    return int(text)


class _NamedFile(io.RawIOBase):
    """An uploaded file under the name that its client gave it.

    Seeking to an impossible position, as libsndfile does in damaged files, leaves the position as it is.
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
    held = SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (closed by the caller)
    file = UploadFile(cast(BinaryIO, held), size=0, filename="body")
    try:
        async for part in parts:
            await file.write(part)
        await file.seek(0)
    except BaseException:
        held.close()
        raise
    return file


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
    """Return NumPy type, rate and channels of a body of raw samples; None: the body is a file.

    Raises:
        RefusedError: its type is not that of a sound (415), or does not describe its samples (422).
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
    except (TypeError, ValueError) as error:  # the parts that RFC 2231 splits a value into do not fit together
        raise RefusedError(422, f"the parameters of {kind.get_content_type()} cannot be read") from error


def _decode_samples(body: bytes, kind: str, rate: int, channels: int) -> audio.Source:
    """Return samples (t, channels) and their rate."""
    frame = np.dtype(kind).itemsize * channels
    if len(body) % frame:
        raise RefusedError(422, f"the body has {len(body)} bytes, not a multiple of the {frame} bytes of a frame")
    native = np.dtype(kind).newbyteorder("=")
    return np.frombuffer(body, kind).astype(native).reshape(-1, channels), rate
