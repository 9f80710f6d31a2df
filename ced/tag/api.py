"""The server's interface: what can be asked, what is answered, and a page that says so, which loads nothing else."""

from collections.abc import Sequence
from html import escape
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from ced.errors import ConfigError
from ced.tag.intake import FIELD, PCM
from ced.tag.options import EVENT_THRESHOLD, TOP_K, TagOptions
from ced.tag.records import Channel, Kind, Tags

PATH = "/v1/audio/classification"
_LEAST_WINDOW, _LEAST_HOP, _LONGEST = 0.16, 0.02, 3600.0  # seconds

_Label = Annotated[str, Field(max_length=100)]
_Labels = Annotated[list[_Label], Field(max_length=100)]
_Count = Annotated[int, Field(ge=1, le=10_000)]
_Probability = Annotated[float, Field(ge=0, le=1)]
_Level = Annotated[float, Field(ge=-200, lt=0)]
_Hop = Annotated[float, Field(ge=_LEAST_HOP, le=_LONGEST)]
_Seconds = Annotated[float, Field(ge=0, le=_LONGEST)]
_Missing = SkipJsonSchema[None]  # an option that is left out; null is not written in an address


class Options(BaseModel):
    """What is asked about a sound; as the options of `ced tag`."""

    model_config = ConfigDict(extra="forbid")

    top_k: _Count | _Missing = Field(
        None, description=f"Most classes of a window; {TOP_K}, or with a threshold all. Not of events."
    )
    threshold: _Probability | _Missing = Field(
        None, description=f"Least probability; none, or {EVENT_THRESHOLD} for events."
    )
    window: float = Field(10.0, ge=_LEAST_WINDOW, le=_LONGEST, description="Seconds of a window.")
    hop: _Hop | _Missing = Field(None, description="Seconds from one window to the next; else they lie end to end.")
    silence: _Level | _Missing = Field(
        None, description="Windows below this level have no tags, in dB of full scale, as -60."
    )
    labels: _Labels = Field([], description="Only these classes, or all below these headings of the ontology.")
    exclude: _Labels = Field([], description="Not these classes or headings.")
    rollup: bool = Field(False, description="Give classes the highest probability of their kinds, and add headings.")
    events: bool = Field(False, description="Merge windows into events, which are pieces with one tag.")
    release: float = Field(0.5, gt=0, le=1, description="Of events: part of the threshold that keeps one going.")
    gap: _Seconds = Field(0.0, description="Of events: those so many seconds apart become one.")
    shortest: _Seconds = Field(0.0, description="Of events: shorter ones are dropped, in seconds.")
    embeddings: Literal["none", "clip", "windows"] = Field(
        "none", description="Vectors that scores are made from, for the sound or for each window."
    )

    def tag_options(self) -> TagOptions:
        """Return the options as all of the package has them.

        Raises:
            ConfigError: they contradict each other.
        """
        given = self.model_dump(exclude={"threshold", "labels", "embeddings"})
        return TagOptions(**given, thresholds=self.threshold, only=tuple(self.labels))


def check_once(names: Sequence[str]) -> None:
    """Make sure that no option that has one value is given twice.

    Raises:
        ConfigError: one is.
    """
    for name in names:
        if name in Options.model_fields.keys() - {"labels", "exclude"} and names.count(name) > 1:
            raise ConfigError(f"{name} is given {names.count(name)} times; it has one value")


class Vector(BaseModel):
    """What the model makes of a piece of a sound."""

    start: float = Field(description="Seconds.")
    end: float
    vector: list[float]


class Answer(BaseModel):
    """What was found in a sound: a record of `ced tag -f jsonl`, and the embeddings that were asked for."""

    format: int = Field(description="The version of this record.")
    file: str = Field(description="What the client called the sound.")
    model: str
    seconds: float = Field(description="The length of the sound.")
    pieces: list[Tags]
    kind: Kind = Field(description="Whether the pieces are windows or events.")
    channel: Channel = Field(description="What was tagged of a sound of several channels.")
    rate: int | None = Field(description="The sampling rate of the sound, in Hz.")
    complete: bool = Field(description="False: the sound is cut short.")
    expected_seconds: float | None = Field(description="The length of the sound according to its header.")
    embeddings: list[Vector] = Field([], description="Only there when asked for.")


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="One line.")


class Health(BaseModel):
    """Whether the server can do its work."""

    status: str


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "type": "object",
    "required": [FIELD],
    "properties": {FIELD: {"type": "string", "format": "binary"}},
    "additionalProperties": False,
}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A sound: a form with a file, a file as it is, or raw samples, whose type says what they are.",
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "audio/*": _BINARY,
            "video/*": _BINARY,
            "application/octet-stream": _BINARY,
            **{f"{kind}; rate=16000; channels=1": _BINARY for kind in PCM},
        },
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": reason}
    for status, reason in {
        408: "The body came too slowly.",
        413: "The body is too large, or the sound too long.",
        415: "The body is no sound by its type.",
        422: "The body cannot be read as a sound, or an option is unknown or out of range.",
        429: "Too many requests of one client; Retry-After says when to come back.",
        500: "The server failed; the request may be right.",
        503: "Too many requests at once, or the server is going down; Retry-After says when to come back.",
    }.items()
}

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
td, th {{ text-align: left; vertical-align: top; padding: .2em 1em .2em 0 }}
</style>
<h1>{title}</h1>
<p>{description} The same for machines: <a href="openapi.json">openapi.json</a>.</p>
{operations}
<h2>Try it</h2>
<form action=".{path}" method="post" enctype="multipart/form-data">
<input type="file" name="{field}" required aria-label="Sound"> <button>Tag</button></form>
</html>
"""


def page(openapi: dict[str, Any]) -> str:
    """Return what an OpenAPI document says as a page for people."""
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    )
    info = openapi["info"]
    title = escape(f"{info['title']} {info['version']}")
    return _PAGE.format(
        title=title, description=escape(info["description"]), operations=operations, path=PATH, field=FIELD
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    options = [
        (each["name"], each.get("description", ""), _values(each["schema"])) for each in operation.get("parameters", ())
    ]
    body = operation.get("requestBody", {}).get("content", {})
    kinds = [(kind, "") for kind in body]
    answers = [(status, answer["description"]) for status, answer in operation["responses"].items()]
    parts: list[tuple[str, list[Any]]] = [("Options", options), ("Body", kinds), ("Answers", answers)]
    tables = "".join(f"<h3>{heading}</h3>{_table(rows)}" for heading, rows in parts if rows)
    return f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation.get('description', ''))}</p>{tables}"


def _values(schema: dict[str, Any]) -> str:
    """Return what a parameter may be, as words."""
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words = [f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema]
    kind = " | ".join(schema["enum"]) if "enum" in schema else schema.get("type", "")
    default = [f"default {schema['default']}"] if schema.get("default") not in (None, []) else []
    return ", ".join([kind, *words, *default])


def _table(rows: list[Any]) -> str:
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
