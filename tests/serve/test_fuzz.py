"""Fuzzing: requests generated from the OpenAPI document, and mutated ones; none may make the server fail."""

import json
import os
import random
from collections import Counter
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ced.serve.schema import CLASSIFY, MODEL, STREAM, STREAM_TYPE
from tests.serve.served import connected, constant, encode, noise

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("CED_FUZZ_EXAMPLES", "15"))  # of each kind of request that is described
MUTATED = int(os.environ.get("CED_FUZZ_REQUESTS", "300"))
SOUNDS = [
    constant(0.5),
    encode(noise(1.5), "OGG", "VORBIS"),
    encode(noise(0.5), "FLAC", "PCM_16"),
    encode(noise(0.5), "MP3", "MPEG_LAYER_III"),
    encode(noise(0.3), "AIFF", "PCM_16"),
]
QUERIES = ["", "?top_k=2&window=1", "?events=true&hop=0.5&window=1&threshold=0.3", "?embeddings=windows&labels=bark"]
PIECES = [
    b"\0",
    b"\r\n",
    b"\xff",
    b"%00",
    b"9" * 40,
    b"-1",
    b"nan",
    b"NaN",
    b"%FF%FE",
    b"[]",
    b"=",
    b"&",
    b"\x80",
    b" ",
]


@schemathesis.deserializer(STREAM_TYPE)
def read_lines(context: Any, response: Any) -> Any:
    """Return the first line of a stream, which has the schema StreamLine."""
    return json.loads(response.content.splitlines()[0])


schemathesis.openapi.media_type("audio/*", st.sampled_from([*SOUNDS, b"RIFF"]))


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (CLASSIFY, GenerationMode.POSITIVE),
        (CLASSIFY, GenerationMode.NEGATIVE),
        (STREAM, GenerationMode.POSITIVE),
        (STREAM, GenerationMode.NEGATIVE),
        (MODEL, GenerationMode.POSITIVE),
        ("/healthz/live", GenerationMode.POSITIVE),
        ("/healthz/ready", GenerationMode.POSITIVE),
    ],
)
def test_answers_conform_to_the_openapi_document(address: str, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operation = schema[path]["post" if path in (CLASSIFY, STREAM) else "get"]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case[Any]) -> None:
        # The server may refuse what the schema allows, which cannot describe valid sounds or combinations of options.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()


def mutated(seed: int) -> bytes:
    """Return a request with a few random changes, anywhere from its first line to the end of its body."""
    chance = random.Random(seed)
    sound = chance.choice(SOUNDS)
    kind = chance.choice(["audio/wav", "application/octet-stream", "audio/pcm; rate=16000; channels=2", "form"])
    if kind == "form":
        kind = "multipart/form-data; boundary=x"
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        sound = head + sound + b"\r\n--x--\r\n"
    lines = f"POST {chance.choice([CLASSIFY, STREAM])}{chance.choice(QUERIES)} HTTP/1.1\r\nHost: localhost\r\n"
    head = f"{lines}Content-Type: {kind}\r\nConnection: close\r\n".encode()
    parts = [bytearray(head), bytearray(sound)]
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        part = parts[chance.random() < 0.5]
        place = chance.randrange(len(part))
        match chance.randrange(4):
            case 0:
                part[place] = chance.randrange(256)
            case 1:
                part[place:place] = chance.choice(PIECES)
            case 2:
                del part[place : place + chance.randrange(1, 20)]
                part += b"\0"
            case 3:
                end = min(len(part), place + chance.randrange(1, 64))
                part[place:place] = part[place:end]
    length = len(parts[1]) if chance.random() < 0.95 else chance.randrange(2 * len(parts[1]))
    return bytes(parts[0]) + f"Content-Length: {length}\r\n\r\n".encode() + bytes(parts[1])


def status_of(url: str, request: bytes) -> int | None:
    """Send a request; return the status of the answer, None if the server closed the connection without an answer."""
    with connected(url) as connection:
        connection.settimeout(0.5)  # where a body is shorter than announced, or a mutated header lacks its end
        with suppress(OSError):  # it was refused before its end
            connection.sendall(request)
        try:
            answer = connection.makefile("rb").read()
        except OSError:
            return None
    return int(answer.split(None, 2)[1]) if answer else None


def test_mutated_requests_are_never_status_500(address: str) -> None:
    statuses = Counter(status_of(address, mutated(seed)) for seed in range(MUTATED))
    print(dict(statuses))
    assert statuses.keys() <= {200, 400, 404, 405, 408, 413, 415, 422, 501, 505, None}
    assert statuses[200] > MUTATED / 20
    assert statuses[422] > MUTATED / 20
    assert httpx.get(f"{address}/healthz/ready").status_code == 200
