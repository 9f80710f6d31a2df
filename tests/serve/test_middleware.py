"""API keys, host names and origins; the headers of every answer and the fields of every log line."""

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import websockets
from websockets.sync.client import connect

from ced.serve.app import Access, Application
from ced.serve.middleware import KEY_PROTOCOL
from ced.serve.schema import CLASSIFY, LIVE_PATH, LIVE_PROTOCOL, MODEL, STREAM
from tests.serve.served import Mean, constant, error, running, until

KEYS = ("0123456789abcdef", "another-key-that-is-valid")


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A server with an API key, two host names and a path prefix."""
    access = Access(KEYS, ("127.0.0.1", "[::1]", "tagger.example.org"), "/tagger")
    with running(Application(Mean(), "mean", access=access)) as url:
        yield url


def test_an_api_key_is_required(guarded: str) -> None:
    with httpx.Client(base_url=guarded) as client:
        for path in (MODEL, "/metrics", f"/tagger{MODEL}", "/v1/nothing"):
            for headers in (
                {},
                {"Authorization": f"Bearer {KEYS[0]}x"},
                {"Authorization": KEYS[0]},
                {"Authorization": f"Basic {KEYS[0]}"},
                {"Authorization": "Bearer"},
                {"Authorization": b"Bearer \xff\xfe"},
            ):
                refused = client.get(path, headers=headers)  # type: ignore[arg-type]
                assert "Bearer" in error(refused, 401)
                assert refused.headers["www-authenticate"] == "Bearer"
        for path in (CLASSIFY, STREAM):
            error(client.post(path, content=constant(0.5)), 401)
            for key in KEYS:
                answer = client.post(path, content=constant(0.5), headers={"Authorization": f"bearer {key}"})
                assert answer.status_code == 200
        for path in ("/", "/docs", "/openapi.json", "/healthz/live", "/healthz/ready"):
            assert client.get(path).status_code == 200


def socket_url(url: str) -> str:
    return f"ws{url.removeprefix('http')}{LIVE_PATH}"


def as_protocol(key: str) -> str:
    return KEY_PROTOCOL + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


def test_a_live_connection_takes_the_key_from_a_header_or_a_subprotocol(guarded: str) -> None:
    url = socket_url(guarded)
    for key in KEYS:
        with connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as connection:
            assert json.loads(connection.recv())["type"] == "begin"
        with connect(url, subprotocols=[LIVE_PROTOCOL, as_protocol(key)]) as connection:  # type: ignore[list-item]
            assert connection.subprotocol == LIVE_PROTOCOL  # the key is not echoed
    for protocols in ([LIVE_PROTOCOL], [LIVE_PROTOCOL, as_protocol("x")], [LIVE_PROTOCOL, KEY_PROTOCOL + "*"]):
        with pytest.raises(websockets.InvalidStatus) as refused:
            connect(url, subprotocols=protocols)  # type: ignore[arg-type]
        assert refused.value.response.status_code == 401
        assert b"API key" in refused.value.response.body


def test_only_known_hosts_are_answered(guarded: str) -> None:
    key = {"Authorization": f"Bearer {KEYS[0]}"}
    for host, status in (
        ("127.0.0.1:8000", 200),
        ("tagger.example.org", 200),
        ("TAGGER.example.org:443", 200),
        ("[::1]:8000", 200),
        ("evil.example.org", 400),
        ("tagger.example.org.evil.org", 400),
        ("127.0.0.1@evil.org", 400),
        ("", 400),
    ):
        answer = httpx.get(guarded + MODEL, headers={**key, "Host": host})
        assert answer.status_code == status, host
        if status == 400:
            assert "host" in error(answer, 400).lower()
    with pytest.raises(websockets.InvalidStatus) as refused:
        connect(socket_url(guarded), additional_headers={**key, "Host": "evil.example.org"})
    assert refused.value.response.status_code == 400


def test_pages_of_other_sites_are_refused(guarded: str) -> None:
    key, host = {"Authorization": f"Bearer {KEYS[0]}"}, httpx.URL(guarded).netloc.decode()
    for origin, status in (
        (guarded, 200),
        (f"https://{host}", 200),  # behind a proxy that ends TLS
        ("https://evil.example.org", 403),
        ("null", 403),
        (f"http://{host}.evil.org", 403),
        ("http://127.0.0.1:1", 403),
        ("", 403),
    ):
        answer = httpx.post(guarded + CLASSIFY, content=constant(0.5), headers={**key, "Origin": origin})
        assert answer.status_code == status, origin
        if status == 403:
            error(answer, 403)
            with pytest.raises(websockets.InvalidStatus) as refused:
                connect(socket_url(guarded), additional_headers={**key, "Origin": origin})
            assert refused.value.response.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_paths_with_and_without_the_proxys_prefix(guarded: str) -> None:
    for prefix in ("", "/tagger"):
        for path in ("/", "/docs", "/healthz/live", "/healthz/ready", "/vendor/swagger-ui/swagger-ui.css"):
            assert httpx.get(guarded + prefix + path).status_code == 200, prefix + path
    assert httpx.get(f"{guarded}/openapi.json").json()["servers"] == [{"url": "/tagger"}]


def test_the_openapi_document_describes_the_key(guarded: str, address: str) -> None:
    described = httpx.get(f"{guarded}/openapi.json").json()
    (name,) = described["components"]["securitySchemes"]
    assert described["components"]["securitySchemes"][name]["scheme"] == "bearer"
    assert described["paths"][CLASSIFY]["post"]["security"] == [{name: []}]
    assert "securitySchemes" not in httpx.get(f"{address}/openapi.json").json()["components"]


def test_every_answer_has_strict_headers(guarded: str) -> None:
    for path in ("/", "/docs", "/nothing", MODEL, "/healthz/ready"):
        headers = httpx.get(guarded + path).headers
        policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert policy["script-src"].split()[0] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers


def test_each_request_has_a_line_in_the_log(guarded: str, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("ced.access")

    def lines_so_far() -> list[dict[str, Any]]:
        found = [json.loads(record.getMessage()) for record in caplog.records if record.name == "ced.access"]
        return [line for line in found if not line["path"].startswith("/healthz")]  # of the test before, perhaps

    log.addHandler(caplog.handler)
    log.setLevel(logging.INFO)
    try:
        key = {"Authorization": f"Bearer {KEYS[0]}", "X-Request-ID": "from.a-proxy_1"}
        body = constant(0.5)
        named = httpx.post(guarded + CLASSIFY, params={"top_k": 1}, content=body, headers=key)
        odd = httpx.get(guarded + "/\u202ea", headers={"X-Request-ID": "a b\x1b"})
        refused = httpx.get(guarded + MODEL)
        with connect(socket_url(guarded), additional_headers=key):
            pass
        assert httpx.get(guarded + "/healthz/live").status_code == 200
        until(lambda: len(lines_so_far()) == 4)  # a line is written after the end of its answer
    finally:
        log.removeHandler(caplog.handler)
        log.setLevel(logging.NOTSET)
    lines = lines_so_far()
    assert all(record.getMessage().isascii() for record in caplog.records if record.name == "ced.access")
    first = lines[0]
    assert (first["id"], first["client"], first["method"]) == ("from.a-proxy_1", "127.0.0.1", "POST")
    assert (first["path"], first["query"], first["status"]) == (CLASSIFY, "top_k=1", 200)
    assert (first["received"], first["sent"]) == (str(len(body)), len(named.content))
    assert 0 < first["seconds"] < 60
    assert named.headers["x-request-id"] == "from.a-proxy_1"
    assert lines[1]["id"] == odd.headers["x-request-id"]
    assert len(lines[1]["id"]) == 16
    assert (lines[2]["id"], lines[2]["status"]) == (refused.headers["x-request-id"], 401)
    assert (lines[3]["method"], lines[3]["status"]) == ("WEBSOCKET", 101)
    assert not any("healthz/live" in record.getMessage() for record in caplog.records)
    assert not any(key in json.dumps(lines) for key in KEYS)
