"""The proxy configurations of docs/serve.md, run in front of a real server."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from ced.serve.app import Application
from ced.serve.schema import CLASSIFY, LIVE_PATH, STREAM
from ced.serve.server import Server, listen_unix
from tests.serve.served import Mean, constant

pytestmark = pytest.mark.slow

NGINX, CADDY = shutil.which("nginx"), shutil.which("caddy")
PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


def snippet(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    assert isinstance(found, str)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def process(command: list[str], port: int) -> Iterator[None]:
    """Run a proxy, and wait until it listens."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            end = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert time.monotonic() < end
                    assert running.poll() is None
                    time.sleep(0.05)
            yield
        finally:
            running.terminate()


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Path]:
    """A server on a Unix socket."""
    path = tmp_path / "ced.sock"
    with listen_unix(path) as listener:
        server = Server(Application(Mean(), "mean"), ["*"])
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        path.chmod(0o666)  # the proxy's processes may belong to another user
        yield path
        server.should_exit = True
        thread.join()


def check(url: str, context: ssl.SSLContext | bool) -> None:
    """Use all routes through a proxy."""
    with httpx.Client(base_url=url, verify=context, timeout=30) as client:
        assert client.get("/healthz/ready").json() == {"status": "ok"}
        answer = client.post(CLASSIFY, content=constant(0.5), headers={"Origin": url})
        assert answer.json()["pieces"][0]["tags"][0]["prob"] == 0.5
        assert len(answer.headers["x-request-id"]) >= 16
        assert client.post(STREAM, content=constant(0.5, 3), params={"window": 1}).text.count('"window"') >= 3
        assert client.post(CLASSIFY, content=constant(0.5), headers={"Origin": "https://evil.org"}).status_code == 403
    with connect(
        f"ws{url.removeprefix('http')}{LIVE_PATH}",
        ssl=context if isinstance(context, ssl.SSLContext) else None,
        origin=Origin(url),
    ) as live:
        assert json.loads(live.recv())["type"] == "begin"


@pytest.mark.skipif(NGINX is None or shutil.which("openssl") is None, reason="there is no nginx")
def test_nginx(upstream: Path, tmp_path: Path) -> None:
    port, probe = free_port(), free_port()
    key, certificate = tmp_path / "tagger.key", tmp_path / "tagger.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run(
        [*request, "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    site = snippet("nginx").replace("/etc/ssl/tagger", str(tmp_path / "tagger"))
    site = site.replace("rate=5r/s", "rate=1r/m").replace("/run/ced/ced.sock", str(upstream))
    site = site.replace("listen 443", f"listen 127.0.0.1:{port}")
    # A second server shows which clients count as one.
    site += f"""server {{ listen 127.0.0.1:{probe}; set_real_ip_from 127.0.0.1; real_ip_header X-Client;
        location / {{ limit_req zone=ced; limit_req_status 429; root {tmp_path}; }} }}"""
    folders = " ".join(
        f"{name}_temp_path {tmp_path / name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""  # another could not reach the folder
    configuration.write_text(
        f"{user} daemon off; pid {tmp_path / 'pid'}; error_log {tmp_path / 'error.log'};"
        f" events {{}} http {{ access_log off; {folders}\n{site}\n}}"
    )
    assert NGINX is not None
    tested = subprocess.run([NGINX, "-t", "-c", str(configuration)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    with process([NGINX, "-c", str(configuration)], port):
        check(f"https://localhost:{port}", ssl.create_default_context(cafile=str(certificate)))
        statuses = []
        for client in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2001:db8::ffff", "192.0.2.1", "192.0.2.2"):
            statuses.append(httpx.get(f"http://127.0.0.1:{probe}/x", headers={"X-Client": client}).status_code)
        assert statuses == [404, 429, 404, 429, 404, 404]


@pytest.mark.skipif(CADDY is None, reason="there is no Caddy")
def test_caddy(upstream: Path, tmp_path: Path) -> None:
    port = free_port()
    configuration = tmp_path / "Caddyfile"
    assert CADDY is not None
    configuration.write_text(snippet("caddyfile"))
    validate = [CADDY, "validate", "--config", str(configuration), "--adapter", "caddyfile"]
    tested = subprocess.run(validate, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    site = snippet("caddyfile").replace("tagger.example.org", f"http://localhost:{port}")
    site = site.replace("/run/ced/ced.sock", str(upstream))
    configuration.write_text(f"{{\n admin off\n auto_https off\n storage file_system {tmp_path}\n}}\n{site}")
    with process([CADDY, "run", "--config", str(configuration), "--adapter", "caddyfile"], port):
        check(f"http://localhost:{port}", True)
