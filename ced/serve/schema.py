"""The HTTP interface: request options, answers, the lines of a stream, and their OpenAPI description."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel
from pydantic.json_schema import SkipJsonSchema

from ced.errors import ConfigError
from ced.serve.overview import FINEST as OVERVIEW_RATE
from ced.sound.audio import Tail
from ced.tag.live import OPTIONS as LIVE
from ced.tag.options import EVENT_THRESHOLD, TOP_K, TagOptions
from ced.tag.records import Tag, Tags

CLASSIFY, STREAM, MODEL, LIVE_PATH = "/v1/audio/classification", "/v1/audio/stream", "/v1/model", "/v1/live"
FIELD = "file"  # the form field with the sound
# Media types of raw samples, with their sample formats and NumPy types. RFC 3551 defines L16.
PCM = {"audio/l16": {"s16be": ">i2"}, "audio/pcm": {"s16le": "<i2", "f32le": "<f4"}}
STREAM_TYPE = "application/x-ndjson"
LIVE_PROTOCOL = "ced.live.v1"  # WebSocket subprotocol
_MOST_ERRORS = 10  # that an answer lists
_SHORTEST_WINDOW, _SHORTEST_HOP, _LONGEST = 0.16, 0.02, 3600.0  # seconds

_Label = Annotated[str, Field(max_length=100)]
_Labels = Annotated[list[_Label], Field(max_length=100)]
_Count = Annotated[int, Field(ge=1, le=10_000)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Level = Annotated[float, Field(ge=-200, lt=0)]
_Hop = Annotated[float, Field(ge=_SHORTEST_HOP, le=_LONGEST)]
_Seconds = Annotated[float, Field(ge=0, le=_LONGEST)]
_Channel = Annotated[str, Field(pattern="^(mean|left|right|[1-9][0-9]?)$")]
_Rate = Annotated[float, Field(gt=0, le=OVERVIEW_RATE)]
_Missing = SkipJsonSchema[None]  # value of an option that is not given; a query string cannot hold null


class _Selection(BaseModel):
    """Options shared by all requests, with the meaning that they have in `ced tag`."""

    model_config = ConfigDict(extra="forbid")

    silence: _Level | _Missing = Field(
        None, description="Do not score windows below this level, in dB of full scale, for example -60."
    )
    labels: _Labels = Field([], description="Keep only these classes, or all classes below these AudioSet headings.")
    exclude: _Labels = Field([], description="Leave out these classes or headings.")
    rollup: bool = Field(
        False, description="Raise each class to the highest probability of its descendants, and add the headings."
    )
    release: float = Field(
        0.5, gt=0, le=1, description="Events: an event continues above this fraction of its threshold."
    )


class RequestOptions(_Selection):
    """Options of a request that tags a whole sound."""

    top_k: _Count | _Missing = Field(
        None, description=f"Most classes of a window; default {TOP_K}, or all with a threshold. Not with events."
    )
    threshold: _Probability | _Missing = Field(
        None, description=f"Least probability of a tag; default none, for events {EVENT_THRESHOLD}."
    )
    window: float = Field(10.0, ge=_SHORTEST_WINDOW, le=_LONGEST, description="Length of a window in seconds.")
    hop: _Hop | _Missing = Field(
        None, description="Seconds from one window's start to the next; default: the window length."
    )
    tail: Tail = Field(
        "aligned",
        description="The end of the sound: aligned: the last window has full length and ends with the sound; short: the"
        " last window is as short as the rest.",
    )
    channel: _Channel = Field(
        "mean", description="Channel to tag: mean (of all), left, right, or the number of a channel, from 1."
    )
    strict: bool = Field(False, description="Refuse files that are cut short, instead of tagging what can be read.")
    events: bool = Field(False, description="Merge windows into events: pieces with one tag each.")
    gap: _Seconds = Field(0.0, description="Events: merge events of a class at most this many seconds apart.")
    shortest: _Seconds = Field(0.0, description="Events: drop events shorter than this many seconds.")
    embeddings: Literal["none", "clip", "windows"] = Field(
        "none", description="Embedding vectors in the answer: of the whole clip, or of each window."
    )

    def tag_options(self) -> TagOptions:
        """Return the options as `TagOptions`.

        Raises:
            ConfigError: they contradict each other.
        """
        return TagOptions(
            window=self.window,
            hop=self.hop,
            tail=self.tail,
            silence=self.silence,
            channel=int(self.channel) if self.channel.isdigit() else self.channel,
            strict=self.strict,
            top_k=self.top_k,
            threshold=self.threshold,
            labels=tuple(self.labels),
            exclude=tuple(self.exclude),
            rollup=self.rollup,
            events=self.events,
            release=self.release,
            gap=self.gap,
            shortest=self.shortest,
        )


class StreamOptions(RequestOptions):
    """Options of a request whose answer is streamed."""

    scores: Literal["none", "windows", "columns"] = Field(
        "none",
        description="Send the probabilities of all classes as well: of each window, or of each 0.16 s column of it.",
    )
    encoding: Literal["uint8", "float32"] = Field(
        "uint8", description="Encoding of these probabilities: uint8 is round(255 p), float32 is little-endian."
    )
    overview: _Rate | _Missing = Field(
        None, description="Send peaks and a log-mel spectrogram as well, for drawing the sound: columns a second."
    )

    def tag_options(self) -> TagOptions:
        """Return the options as `TagOptions`.

        Raises:
            ConfigError: they contradict each other.
        """
        return replace(super().tag_options(), columns=self.scores == "columns")


class LiveOptions(_Selection):
    """Options of a live connection, with the meaning that they have in `ced live`."""

    threshold: _Probability = Field(EVENT_THRESHOLD, description="Probability at which an event begins.")
    window: float = Field(LIVE.window, ge=_SHORTEST_WINDOW, le=10.0, description="Length of a window in seconds.")
    hop: float = Field(LIVE.step, ge=0.1, le=10.0, description="Seconds from one window's start to the next.")
    gap: _Seconds = Field(LIVE.gap, description="Merge events of a class at most this many seconds apart.")
    shortest: _Seconds = Field(LIVE.shortest, description="Do not report events shorter than this many seconds.")
    scores: bool = Field(True, description="Send the probabilities of all classes with each window (base64, uint8).")

    def tag_options(self) -> TagOptions:
        """Return the options as `TagOptions`.

        Raises:
            ConfigError: they contradict each other.
        """
        return TagOptions(
            window=self.window,
            hop=self.hop,
            silence=self.silence,
            threshold=self.threshold,
            labels=tuple(self.labels),
            exclude=tuple(self.exclude),
            rollup=self.rollup,
            events=True,
            release=self.release,
            gap=self.gap,
            shortest=self.shortest,
        )


def check_repeated(names: Iterable[str], repeatable: Iterable[str] = ("labels", "exclude")) -> None:
    """Check that only options with several values are given more than once.

    Raises:
        ConfigError: another option is repeated.
    """
    given = list(names)
    for name in given:
        if name not in repeatable and given.count(name) > 1:
            raise ConfigError(f"{name} is given {given.count(name)} times; it takes one value")


def describe_errors(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the validation errors of options as one line."""
    found = []
    for error in errors:
        place = error["loc"][1:] if error["loc"][0] == "query" and len(error["loc"]) > 1 else error["loc"]
        name = str(place[0])[:100]
        if error["type"] == "extra_forbidden":
            found.append(f"there is no option {name}")
        elif error["type"] != "none_required":  # the alternative None of an optional option
            found.append(f"{name}: {error['msg']}")
    more = [f"and {len(found) - _MOST_ERRORS} more faults"] if len(found) > _MOST_ERRORS else []
    return "; ".join([*found[:_MOST_ERRORS], *more])


class Vector(BaseModel):
    """An embedding of a piece of a sound."""

    start: float = Field(description="Seconds.")
    end: float
    vector: list[float]


class _Head(BaseModel):
    """Fields known before a sound is tagged."""

    format: int = Field(description="Version of this record.")
    file: str = Field(description="Name of the sound, as the client gave it.")
    model: str
    kind: Literal["windows", "events"] = Field(description="Whether pieces are windows or events.")
    channel: str | int = Field(description="Channel that is tagged.")
    rate: int | None = Field(description="Sampling rate of the file, if known.")


class _Tail(BaseModel):
    """Fields known after a sound has been tagged."""

    seconds: float = Field(description="Seconds of the sound that were tagged, from its start.")
    complete: bool = Field(description="False: the file is cut short.")
    expected_seconds: float | None = Field(description="Length of the sound by its header, if that gives one.")
    warnings: list[str] = Field(description="Warnings about the file.")


class Answer(_Head, _Tail):
    """The tags of a sound: a record of `ced tag -f jsonl`, with the requested embeddings."""

    pieces: list[Tags]
    embeddings: list[Vector] = Field([], description="Only present if requested.")


class BeginLine(_Head):
    """First line of a stream."""

    type: Literal["begin"]
    seconds: float | None = Field(description="Length of the sound by its header, if that gives one.")
    classes: int = Field(description="Number of classes, c; GET /v1/model lists them.")
    window: float
    hop: float
    scores: Literal["none", "windows", "columns"]
    encoding: Literal["uint8", "float32"]


class WindowLine(BaseModel):
    """One window, in order of time."""

    type: Literal["window"]
    start: float = Field(description="Seconds.")
    end: float
    silent: bool = Field(description="Below the silence level, so not scored: all probabilities are 0.")
    tags: list[Tag] = Field([], description="Only present without events and without scores=columns.")
    edges: list[float] = Field([], description="With scores=columns: n + 1 times; column i lies between i and i + 1.")
    scores: str = Field("", description="With scores: base64 of the probabilities, (1, c) or (n, c), row by row.")
    embedding: list[float] = Field([], description="With embeddings=windows.")


class OverviewLine(BaseModel):
    """The next columns of the overview: peaks and a log-mel spectrogram, each the maximum of what a column covers."""

    type: Literal["overview"]
    start: float = Field(description="Seconds.")
    rate: float = Field(description="Columns a second.")
    bands: int = Field(description="Mel bands of a column, m.")
    peaks: str = Field(description="Base64, uint8 (n): 255 is full scale.")
    mels: str = Field(description="Base64, uint8 (n, m), low bands first: 0.4 dB a step, from -60 dB.")


class EventLine(BaseModel):
    """One event, sent as soon as no earlier one can follow."""

    type: Literal["event"]
    start: float
    end: float
    tags: list[Tag] = Field(description="One tag.")


class ProgressLine(BaseModel):
    """Progress: seconds of the sound that have been scored."""

    type: Literal["progress"]
    seconds: float


class EndLine(_Head, _Tail):
    """Last line of a complete stream: the record without its pieces."""

    type: Literal["end"]
    embedding: list[float] = Field([], description="With embeddings=clip.")


class ErrorLine(BaseModel):
    """Last line of a stream that failed."""

    type: Literal["error"]
    error: str


class StreamLine(
    RootModel[
        Annotated[
            BeginLine | WindowLine | OverviewLine | EventLine | ProgressLine | EndLine | ErrorLine,
            Field(discriminator="type"),
        ]
    ]
):
    """A line of a stream."""


class Label(BaseModel):
    """One class of the model."""

    index: int
    mid: str | None = Field(description="AudioSet identifier, if the class has one.")
    name: str


class WindowDefaults(BaseModel):
    """Defaults of window lengths."""

    window: float = Field(description="Seconds.")
    hop: float | None = Field(description="Seconds; null: the window length.")
    column: float = Field(description="Seconds of a column with scores=columns.")


class LiveDefaults(BaseModel):
    """Defaults of live connections."""

    rate: int = Field(description="Sampling rate of the PCM that the client sends.")
    window: float
    hop: float
    gap: float
    threshold: float


class RequestLimits(BaseModel):
    """The limits of the server."""

    megabytes: float = Field(description="Most megabytes of a body.")
    seconds: float = Field(description="Most seconds of sound; overlapping windows count in full.")
    waiting: int = Field(description="Most requests that wait for their turn.")
    live: int = Field(description="Most live connections.")


class ModelInfo(BaseModel):
    """The model, its classes, and how the server is set up."""

    version: str = Field(description="Version of the server.")
    model: str
    labels: list[Label]
    columns: bool = Field(description="Whether scores=columns is possible.")
    embeddings: bool = Field(description="Whether embeddings are possible.")
    addresses: bool = Field(description="Whether sounds can be fetched from http(s) addresses.")
    defaults: WindowDefaults
    live: LiveDefaults
    limits: RequestLimits


class Problem(BaseModel):
    """The error of a request that was refused or failed."""

    error: str = Field(description="One line.")


class Health(BaseModel):
    """The state of the server."""

    status: str


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "type": "object",
    "required": [FIELD],
    "properties": {FIELD: {"type": "string", "format": "binary"}},
    "additionalProperties": False,
}
_ADDRESS = {
    "type": "object",
    "required": ["address"],
    "properties": {"address": {"type": "string", "description": "http(s) address of a sound on a public host."}},
    "additionalProperties": False,
}


def body(addresses: bool) -> dict[str, Any]:
    """Return the description of a request body, for OpenAPI."""
    content = {
        "multipart/form-data": {"schema": _FORM},
        "audio/*": _BINARY,
        "video/*": _BINARY,
        "application/octet-stream": _BINARY,
        **{f"{kind}; rate=16000; channels=1": _BINARY for kind in PCM},
        **({"application/json": {"schema": _ADDRESS}} if addresses else {}),
    }
    description = "A sound: a form with one file, the bytes of a file, or raw samples that the type describes."
    return {"requestBody": {"required": True, "description": description, "content": content}}


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": reason}
    for status, reason in {
        400: "The request is not valid HTTP, or is for another host.",
        401: "The server requires an API key, and the request has no valid one.",
        403: "The request comes from a page of another site.",
        408: "The body arrived too slowly.",
        413: "The body, the sound or the answer is too large.",
        415: "The media type of the body is not a sound.",
        422: "The body cannot be decoded, or an option is unknown, out of range or contradicts another.",
        500: "The server failed; the request may be valid.",
        503: "Too many requests at once, or the server is shutting down; retry after the seconds in Retry-After.",
        507: "The server has no room left to store the body.",
    }.items()
}
STREAM_ANSWER = {
    "description": "One JSON object a line.",
    "content": {STREAM_TYPE: {"schema": {"$ref": "#/components/schemas/StreamLine"}}},
}
