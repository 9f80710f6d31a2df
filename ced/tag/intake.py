"""What a server lets in: how much, how long, how often, and how the body of a request becomes a sound."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import collapse_rfc2231_value
from threading import Lock

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ced.errors import AudioError, CedError, ConfigError, install_command
from ced.sound import audio

FIELD = "file"  # of a form, which holds the sound
PCM = {"audio/l16": {"s16be": ">i2"}, "audio/pcm": {"s16le": "<i2", "f32le": "<f4"}}  # types, their formats, as numpy's
RATES = (1_000, 768_000)  # hertz
LEAST_COST = 1.0  # seconds that a window counts, be it as short as it may
_BLOCK = 1.0  # seconds decoded at a time, so that a header which lies about its rate costs little
_LONGEST_NAME = 255
_KNOWN_CLIENTS = 10_000  # who asked longest ago is forgotten when there are more


@dataclass(frozen=True)
class Limits:
    """What a server takes upon itself; at most (jobs + waiting) bodies are in memory at once."""

    megabytes: float = 50.0  # of a request's body
    seconds: float = 600.0  # of sound in a request, counted as often as windows hear it
    waiting: int = 16  # requests that wait for the one before them
    a_minute: int | None = None  # requests of one client
    patience: float = 10.0  # seconds that a body may take at any rate
    slowest: float = 100_000.0  # bytes a second of a body that takes longer

    def __post_init__(self) -> None:
        for name in ("megabytes", "seconds", "patience", "slowest"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ConfigError(f"the limit {name} is {value}; it must be a number above 0")
        if self.waiting < 0 or (self.a_minute is not None and self.a_minute < 1):
            raise ConfigError(f"the limits are {self}; waiting must be 0 or more, a_minute 1 or more")

    @property
    def bytes(self) -> int:
        """The most of a request's body, a whole number."""
        return round(self.megabytes * 1e6)


class RefusedError(CedError):
    """A request that is not answered, with the HTTP status that says why."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}


class Room:
    """Places for so many requests at once; what is over is refused, so that memory and waiting are bounded."""

    def __init__(self, places: int) -> None:
        self._places, self._taken, self._lock = places, 0, Lock()

    @property
    def taken(self) -> int:
        """How many requests are in."""
        return self._taken

    @property
    def full(self) -> bool:
        """Whether the next would be refused."""
        return self._taken >= self._places

    def enter(self) -> bool:
        """Take a place, if there is one."""
        with self._lock:
            if self.full:
                return False
            self._taken += 1
            return True

    def leave(self) -> None:
        """Give a place back."""
        with self._lock:
            self._taken -= 1


class Allowance:
    """So many requests of each client at once, and as many more with every minute (a leaky bucket)."""

    def __init__(self, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._step, self._clock = 60.0 / a_minute, clock
        self._empty: dict[str, float] = {}  # when a client's bucket will have run out; who asked last is last

    def ask(self, client: str) -> float:
        """Count a request and return 0; where it would be one too many, return the seconds until it is not."""
        now = self._clock()
        empty = max(now, self._empty.get(client, now)) + self._step
        if empty - now > 60.0 + 1e-6:
            return empty - now - 60.0
        self._empty.pop(client, None)
        self._empty[client] = empty
        if len(self._empty) > _KNOWN_CLIENTS:
            del self._empty[next(iter(self._empty))]
        return 0.0


@dataclass(frozen=True, eq=False)
class Upload:
    """The body of a request, and what it is."""

    name: str
    source: audio.Source


async def receive(request: Request, limits: Limits) -> Upload:
    """Read the body of a request: a form with one file, a file as it is, or raw samples.

    The body stays in memory, nothing is written anywhere.

    Raises:
        RefusedError: it is too large (413), of another kind (415), too slow (408), or not what its kind asks for (422).
        ClientDisconnect: nobody waits for an answer.
    """
    kind = Message()
    kind["content-type"] = request.headers.get("content-type") or "application/octet-stream"
    try:
        async with asyncio.timeout(limits.patience) as deadline:
            parts = _bounded(request, limits, deadline)
            if kind.get_content_type() == "multipart/form-data":
                return await _file_of_form(request.headers, parts, limits)
            form = _form_of(kind)
            body = b"".join([part async for part in parts])
    except TimeoutError as error:
        rule = f"it may take {limits.patience:g} s, and a second more for every {limits.slowest / 1000:g} kB"
        raise RefusedError(408, f"the body came too slowly; {rule}") from error
    if not body:
        raise RefusedError(422, "the body is empty; it must be a sound")
    return Upload("body", audio.SoundBytes(body, "body") if form is None else _samples(body, *form))


def load(upload: Upload, seconds: float) -> NDArray[np.float32]:
    """Decode an upload, (t,) at 16 kHz.

    Raises:
        RefusedError: it is longer than so many seconds (413), or cannot be decoded (422).
    """
    blocks, held = [], 0
    try:
        for block in audio.stream(upload.source, _BLOCK):
            blocks.append(block)
            held += len(block)
            if held > seconds * audio.SAMPLE_RATE:
                raise RefusedError(413, f"{upload.name} is longer than {seconds:g} s, which is the most in a request")
    except AudioError as error:
        # Samples have no name of their own, and what to install is nothing that a client could do.
        message = str(error).replace(audio.name_of(upload.source), upload.name)
        message = message.partition(f"; {install_command('media')}")[0]
        raise RefusedError(422, message) from error
    except CedError:
        raise
    except Exception as error:  # whatever a decoder comes up with is about the one sound
        raise RefusedError(422, f"cannot decode {upload.name}: {type(error).__name__}: {error}") from error
    return np.concatenate(blocks)


def check_cost(samples: int, window: float, hop: float, seconds: float) -> None:
    """Make sure that scoring so many samples window by window is no more than is allowed.

    Raises:
        RefusedError: it is (413).
    """
    length = samples / audio.SAMPLE_RATE
    count = 1 + max(0, math.ceil((length - window) / hop))
    cost = count * max(LEAST_COST, min(window, length))
    if count > 1 and cost > seconds + window:  # of windows end to end, the last may reach past the sound
        raise RefusedError(
            413,
            f"{count} windows of {window:g} s are {cost:g} s to listen to (a window counts for {LEAST_COST:g} s at"
            f" least), and {seconds:g} s is the most in a request; take a longer hop or window, or less of the sound",
        )


async def _bounded(request: Request, limits: Limits, deadline: asyncio.Timeout) -> AsyncGenerator[bytes, None]:
    """Yield the body as it comes, unless it says or turns out to be too large; what comes puts off the deadline."""
    first = deadline.when()
    assert first is not None
    message = f"the body is larger than {limits.megabytes:g} MB, which is the most in a request"
    if int(request.headers.get("content-length", "0")) > limits.bytes:
        raise RefusedError(413, message)
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limits.bytes:
            raise RefusedError(413, message)
        deadline.reschedule(first + size / limits.slowest)
        yield part


class _Form(MultiPartParser):
    """Starlette's parser, which also tells whether the end of the form has come."""

    whole = False

    def on_end(self) -> None:
        self.whole = True


async def _file_of_form(headers: Headers, parts: AsyncGenerator[bytes, None], limits: Limits) -> Upload:
    wanted = f"a form has one field, {FIELD!r}, with the file; options are a part of the address (?top_k=5)"

    parser = _Form(headers, parts, max_files=1, max_fields=0)
    parser.spool_max_size = limits.bytes + 1  # never to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        fault = "" if error.message.startswith("Too many ") else f"{error.message.rstrip('.')}; "
        raise RefusedError(422, fault + wanted) from error
    except ValueError as error:  # a charset that cannot be
        raise RefusedError(422, f"the form cannot be read: {error}; {wanted}") from error
    if not parser.whole:
        raise RefusedError(422, f"the form is cut short; {wanted}")
    file = form.get(FIELD)
    if not isinstance(file, UploadFile):
        raise RefusedError(422, wanted)
    # What a client calls its file comes to logs and terminals, too.
    name = "".join(filter(str.isprintable, file.filename or ""))[:_LONGEST_NAME] or FIELD
    if not (held := await file.read()):
        raise RefusedError(422, f"{name} is empty (0 bytes)")
    return Upload(name, audio.SoundBytes(held, name))


def _form_of(kind: Message) -> tuple[str, int, int] | None:
    """Return type, rate and channels of raw samples; None: the body is a file.

    Raises:
        RefusedError: it is no sound by its type (415), or samples are not described (422).
    """
    given = kind.get_content_type()
    if given not in PCM:
        main, _, sub = given.partition("/")
        if main in ("audio", "video") or sub in ("octet-stream", "ogg"):
            return None
        raise RefusedError(
            415,
            f"a body of type {given} is no sound; send a form with the field {FIELD!r}, or a file as audio/* or"
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
        raise RefusedError(422, f"{given} has no format {form}; there is {' and '.join(formats)}")
    return formats[form], numbers["rate"], numbers["channels"]


def _parameter(kind: Message, name: str, usual: str | None) -> str:
    """Return a parameter of a type, or what is usual where it is left out."""
    try:
        value = kind.get_param(name, usual)
        return "" if value is None else collapse_rfc2231_value(value)
    except (TypeError, ValueError) as error:  # the pieces that RFC 2231 lets it come in do not fit together
        raise RefusedError(422, f"the parameters of {kind.get_content_type()} cannot be read") from error


def _samples(body: bytes, kind: str, rate: int, channels: int) -> audio.Source:
    """Return samples (t, channels) and their rate."""
    frame = np.dtype(kind).itemsize * channels
    if len(body) % frame:
        raise RefusedError(422, f"the body has {len(body)} bytes, which is no multiple of the {frame} of a frame")
    native = np.dtype(kind).newbyteorder("=")
    return np.frombuffer(body, kind).astype(native).reshape(-1, channels), rate
