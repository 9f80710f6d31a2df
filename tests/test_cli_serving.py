"""`ced serve` as a process: how it begins, what a kill leaves behind, how it ends."""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
import torch

from ced.model.config import ModelConfig
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.vit import CED
from ced.sound.labels import ClassTable
from ced.tag.tagger import Tagger

ROOT = Path(__file__).parents[1]
RATE = 16_000
PATH = "/v1/audio/classification"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = CED(
        ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=3, target_length=112),
        ClassTable(("bark", "bell", "rain")),
    ).eval()
    path = tmp_path_factory.mktemp("graph") / "small.onnx"
    export(weights_of(network), path)
    return path


@contextmanager
def serving(graph: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `ced serve`, and give the process and its address once it listens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1"}
    command = [sys.executable, "-m", "ced", "serve", "-m", str(graph), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        try:
            said = re.fullmatch(
                r"ced: serving .*small.onnx at http://(127.0.0.1|0.0.0.0)(:\d+), described at .*/docs\n", line
            )
            assert said, line
            yield process, f"http://127.0.0.1{said[2]}"
        finally:
            process.kill()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


class Clients:
    """Clients that ask again and again, each about a sound of its own, whatever becomes of the server."""

    def __init__(self, url: str, sounds: list[tuple[bytes, object]]) -> None:
        self.right, self.broken = 0, 0
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, body, pieces)) for body, pieces in sounds]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, body: bytes, pieces: object) -> None:
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{url}{PATH}?window=1", content=body, timeout=60)
            except httpx.TransportError:
                self.broken += 1
                time.sleep(0.05)
                continue
            if answer.status_code == 200 and answer.json()["pieces"] == pieces:
                self.right += 1
            else:
                self.wrong.append(answer.text)

    def wait_for(self, more: int) -> None:
        """Wait until so many more answers have come."""
        goal, end = self.right + more, time.monotonic() + 120
        while self.right < goal:
            assert not self.wrong
            assert time.monotonic() < end
            time.sleep(0.02)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_killed_and_begun_again_under_load_it_never_gives_a_wrong_answer(graph: Path) -> None:
    sounds: list[tuple[bytes, object]] = []
    for seed in range(4):
        wave = np.random.default_rng(seed).uniform(-0.1 * seed, 0.5, 2 * RATE).astype(np.float32)
        held = io.BytesIO()
        soundfile.write(held, wave, RATE, format="WAV", subtype="FLOAT")
        tags = Tagger(graph).tag((wave, RATE), window=1.0)
        pieces = json.loads(json.dumps([vars(piece) | {"tags": [vars(tag) for tag in piece.tags]} for piece in tags]))
        sounds.append((held.getvalue(), pieces))
    port = free_port()
    with serving(graph, "--port", port, "-j", "2") as (process, url):
        clients = Clients(url, sounds)
        try:
            clients.wait_for(40)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            with serving(graph, "--port", port, "-j", "2"):
                clients.wait_for(40)
        finally:
            clients.stop()
    assert clients.wrong == []
    assert clients.broken > 0  # the kill was noticed


def test_the_commands_of_its_page_work(graph: Path, tmp_path: Path) -> None:
    lines = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8").splitlines()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)
    for kind in ("wav", "flac"):
        soundfile.write(tmp_path / f"a.{kind}", wave, RATE)
    (wave * 32_767).astype("<i2").tofile(tmp_path / "a.s16")
    servers = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("ced serve")]
    for words in servers:
        assert len(words) >= 2
        if "-m" in words:
            del words[words.index("-m") : words.index("-m") + 2]
        with serving(graph, *words, "--port", "0") as (_, url):
            assert httpx.get(f"{url}/healthz/live").status_code == 200
    curls = [line for line in lines if line.startswith("curl ")]
    assert len(curls) == 7
    with serving(graph, "--port", "0") as (_, url):
        for line in curls:
            words = shlex.split(line.replace("http://127.0.0.1:8000", url), comments=True)
            done = subprocess.run([*words, "-sS", "--fail"], capture_output=True, cwd=tmp_path, check=False)
            assert done.returncode == 0, (line, done.stderr)
            if "classification" in line:
                assert json.loads(done.stdout)["seconds"] == 3.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stop_is_quiet(graph: Path, number: signal.Signals, code: int) -> None:
    with serving(graph, "--port", "0") as (process, url):
        assert httpx.get(f"{url}/healthz/ready").status_code == 200
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert httpx.post(url + PATH, content=b"--x\r\n\0: \0\r\n", headers=form).status_code == 422
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 80), timeout=20) as junk:
            junk.sendall(b"\0junk\r\n\r\n")
            assert junk.recv(12) == b"HTTP/1.1 400"
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr is not None
        assert process.stderr.read() in ("", "ced: interrupted\n")


def test_what_cannot_be_served_is_said_in_a_line(graph: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, said in (
            (("-m", str(graph), "--port", port), f"cannot listen at 127.0.0.1, port {port}: Address already in use"),
            (("-m", str(graph), "--host", "203.0.113.1", "--port", "0"), "cannot listen at 203.0.113.1, port 0: "),
            (("-m", "nothing.onnx", "--port", "0"), "nothing.onnx"),
            (
                ("-m", str(graph), "--port", "0", "--max-seconds", "nan"),
                "--max-seconds is nan; it must be a number above 0",
            ),
            (("-m", str(graph), "--port", "0", "--proxy", "junk"), "--proxy junk is no address or network"),
        ):
            command = [sys.executable, "-m", "ced", "serve", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
            assert done.returncode == 1
            (line,) = done.stderr.splitlines()
            assert line.startswith("ced: error: ")
            assert said in line
