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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from ced.cli import main
from ced.cli.serving import _keys
from ced.errors import ConfigError
from ced.tag.tagger import Tagger

ROOT = Path(__file__).parents[1]
RATE = 16_000
KEY = "0123456789abcdef"
Server = subprocess.Popen[str]
PATH = "/v1/audio/classification"


@contextmanager
def serving(graph: Path, *words: str, command: str = "serve", **variables: str) -> Iterator[tuple[Server, str]]:
    """Run `ced serve` or `ced app`, and give the process and its address once it listens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1", **variables}
    line = [sys.executable, "-m", "ced", command, "-m", str(graph), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            for told in process.stderr:  # behind a warning, if it listens for other machines
                if found := re.fullmatch(r"ced: serving .*small.onnx at (\S+?)(, described at .*/docs)?\n", told):
                    yield process, found[1].replace("0.0.0.0", "127.0.0.1")
                    break
                assert told.startswith("ced: warning: "), told
            else:
                raise AssertionError(process.wait())
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
    (tmp_path / "keys").write_text(f"{KEY}\n")
    servers = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("ced serve")]
    assert len(servers) >= 4
    for words in servers:
        if "-m" in words:
            del words[words.index("-m") : words.index("-m") + 2]
        words = [word.replace("/run/ced", str(tmp_path)).replace("keys", str(tmp_path / "keys")) for word in words]
        is_unix = "--unix-socket" in words
        with serving(graph, *words, *([] if is_unix else ["--port", "0"])) as (_, url):
            transport = httpx.HTTPTransport(uds=url.removeprefix("unix:")) if is_unix else httpx.HTTPTransport()
            with httpx.Client(transport=transport, base_url="http://localhost" if is_unix else url) as client:
                assert client.get("/healthz/live").status_code == 200
    curls = [line for line in lines if line.startswith("curl ")]
    assert len(curls) >= 8
    with serving(graph, "--port", "0", CED_API_KEY=KEY) as (_, url):
        for line in curls:
            words = shlex.split(line.replace("http://127.0.0.1:8000", url).replace("KEY", KEY), comments=True)
            done = subprocess.run(
                [*words, "-sS", "--fail", "-H", f"Authorization: Bearer {KEY}"],
                capture_output=True,
                cwd=tmp_path,
                check=False,
            )
            assert done.returncode == 0, (line, done.stderr)
            if "classification" in line:
                assert json.loads(done.stdout)["seconds"] == 3.0


def test_the_live_client_of_its_page_works(graph: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(encoding="utf-8"), re.S)
    with serving(graph, "--port", "0") as (_, url):
        program = program.replace("ws://127.0.0.1:8000", url.replace("http", "ws")).replace("sleep(0.1)", "sleep(0.01)")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kinds = done.stdout.split()
    assert (kinds[0], kinds[-1]) == ("begin", "end")
    assert "window" in kinds


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_is_quiet_and_prompt(graph: Path, number: signal.Signals, code: int, workers: str) -> None:
    with serving(graph, "--port", "0", "--workers", workers) as (process, url):
        assert httpx.get(f"{url}/healthz/ready", timeout=60).status_code == 200
        form = {"content-type": "multipart/form-data; boundary=x"}
        assert httpx.post(url + PATH, content=b"--x\r\n\0: \0\r\n", headers=form).status_code == 422
        place = ("127.0.0.1", httpx.URL(url).port or 80)
        with socket.create_connection(place, timeout=20) as junk:
            junk.sendall(b"\0junk\r\n\r\n")
            assert junk.recv(12) == b"HTTP/1.1 400"
        idle = [socket.create_connection(place) for _ in range(10)]  # just before the signal
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == code
        assert time.monotonic() - began < 10
        for each in idle:
            each.close()
        assert process.stderr is not None
        assert process.stderr.read() == ("" if code == 0 else "ced: interrupted\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_right_after_the_start_is_not_missed(graph: Path, workers: str) -> None:
    for _ in range(3):
        with serving(graph, "--port", "0", "--workers", workers) as (process, _):
            process.terminate()
            assert process.wait(30) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""


def test_each_request_is_a_line_on_standard_output(graph: Path) -> None:
    for words, count in (((), 2), (("--workers", "2"), 2), (("--no-access-log",), 0)):
        with serving(graph, "--port", "0", *words) as (process, url):
            for path in ("/healthz/ready", "/v1/model"):
                assert httpx.get(url + path, timeout=60).status_code == 200
            process.terminate()
            assert process.stdout is not None
            lines = [json.loads(line) for line in process.stdout.read().splitlines()]
        assert [line["path"] for line in lines] == ["/healthz/ready", "/v1/model"][:count]


def test_workers_share_a_port_and_are_replaced(graph: Path) -> None:
    def get(path: str) -> str:
        return httpx.get(url + path, timeout=60).text

    with serving(graph, "--port", "0", "--workers", "2", "--no-access-log") as (process, url):
        sound = io.BytesIO()
        soundfile.write(sound, np.zeros(RATE), RATE, format="WAV")
        for _ in range(10):
            assert httpx.post(url + PATH, content=sound.getvalue(), timeout=60).status_code == 200
        assert 'ced_requests_total{status="200"} 10.0' in get("/metrics")  # of both processes together
        workers = workers_of(process)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        for _ in range(10):
            assert get("/healthz/ready") == '{"status":"ok"}'
        assert 'ced_requests_total{status="200"} 10.0' in get("/metrics")
        process.kill()  # and workers do not outlive the first process
        process.wait()
        end = time.monotonic() + 30
        while any(is_running(pid) for pid in workers) or is_listening(url):
            assert time.monotonic() < end
            time.sleep(0.1)


def workers_of(process: Server) -> list[int]:
    children = (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in (Path("/proc") / pid / "cmdline").read_bytes()]


def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_workers_that_fail_after_the_server_was_ready_do_not_end_it(graph: Path) -> None:
    with serving(graph, "--port", "0", "--workers", "2", "--no-access-log") as (process, url):
        assert httpx.get(f"{url}/healthz/ready", timeout=60).status_code == 200
        until(lambda: len(workers_of(process)) == 2)
        for pid in workers_of(process):  # all of them, seconds after their start
            os.kill(pid, signal.SIGKILL)
        assert httpx.get(f"{url}/healthz/ready", timeout=60).status_code == 200
        until(lambda: len(workers_of(process)) == 2)
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr is not None
        told = process.stderr.read().splitlines()
    assert len(told) == 2
    assert all(line.startswith("ced: warning: ") and "exit code -9" in line for line in told)


def test_workers_that_fail_before_the_server_was_ready_end_it(graph: Path) -> None:
    with serving(graph, "--port", "0", "--workers", "2") as (process, _):
        until(lambda: len(workers_of(process)) > 0)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert "before it was ready, with exit code -9" in process.stderr.read()


def test_metrics_of_killed_servers_are_removed(graph: Path, tmp_path: Path) -> None:
    def start() -> AbstractContextManager[tuple[Server, str]]:
        return serving(graph, "--port", "0", "--workers", "2", "--no-access-log", TMPDIR=str(tmp_path))

    def folders() -> set[str]:
        return {path.name for path in tmp_path.glob("ced-metrics-*")}

    with start() as (process, url):
        assert httpx.get(f"{url}/healthz/ready", timeout=60).status_code == 200
        killed = folders()
        process.kill()
        process.wait()
        assert folders() == killed != set()
    with start() as (process, _):
        until(lambda: bool(folders() - killed))
        first = folders()
        assert not first & killed
        with start() as (other, _):
            until(lambda: len(folders()) == 2)
            assert first < folders()
            other.terminate()
            assert other.wait(60) == 0
        assert folders() == first
        process.terminate()
        assert process.wait(60) == 0
    assert folders() == set()


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in (Path("/proc") / str(pid) / "status").read_text()
    except FileNotFoundError:
        return False


def is_listening(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz/live")
    except httpx.TransportError:
        return False
    return True


def test_api_keys_come_from_a_file_or_the_environment(graph: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\n{KEY}\n  another-key-0123\n")
    for words, variables, keys in (
        (("--api-key", str(file)), {}, [KEY, "another-key-0123"]),
        ((), {"CED_API_KEY": f"{KEY}\n"}, [KEY]),
    ):
        with serving(graph, "--port", "0", "--host", "0.0.0.0", *words, **variables) as (_, url):
            assert httpx.get(f"{url}/v1/model").status_code == 401
            for key in keys:
                headers = {"Authorization": f"Bearer {key}"}
                assert httpx.get(f"{url}/v1/model", headers=headers).status_code == 200


def test_a_unix_socket_is_removed_at_the_end_and_replaced_after_a_kill(graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "ced.sock"
    for number in (signal.SIGKILL, signal.SIGTERM):
        with serving(graph, "--unix-socket", str(path)) as (process, url):
            assert url == f"unix:{path}"
            transport = httpx.HTTPTransport(uds=str(path))
            headers = {"X-Forwarded-For": "203.0.113.7"}
            with httpx.Client(transport=transport, base_url="http://any", headers=headers) as client:
                assert client.get("/healthz/ready").status_code == 200
            process.send_signal(number)
            assert process.wait(60) == (-9 if number == signal.SIGKILL else 0)
            assert process.stdout is not None
            if number == signal.SIGTERM:
                assert json.loads(process.stdout.read())["client"] == "203.0.113.7"
        assert path.exists() == (number == signal.SIGKILL)


def test_app_is_the_server_for_this_machine_only(graph: Path, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    with serving(graph, command="app", BROWSER=f"{browser} %s") as (process, url):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        assert "<html" in httpx.get(url).text
        assert httpx.get(url, headers={"Host": "example.org"}).status_code == 400
        limits = httpx.get(f"{url}/v1/model").json()["limits"]
        assert limits["seconds"] >= 3600
        end = time.monotonic() + 30
        while not opened.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) == 0
    assert opened.read_text().strip() == url
    opened.unlink()
    with serving(graph, "--no-browser", command="app", BROWSER=f"{browser} %s") as (_, url):
        assert httpx.get(url).status_code == 200
    assert not opened.exists()


def test_an_upload_leaves_nothing_behind_when_the_server_is_killed(graph: Path, tmp_path: Path) -> None:
    """An upload that is too large for memory lies in a file without a name."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    with serving(graph, "--port", "0", TMPDIR=str(folder)) as (process, url):
        place = ("127.0.0.1", httpx.URL(url).port or 80)
        with socket.create_connection(place) as sender:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n\r\n"
            sender.sendall(head.encode() + bytes(10_000_000))
            files = Path("/proc") / str(process.pid) / "fd"
            end = time.monotonic() + 30
            while not any(str(folder) in os.readlink(each) for each in files.iterdir() if each.is_symlink()):
                assert time.monotonic() < end
                time.sleep(0.05)
            process.kill()
            process.wait()
    assert not list(folder.iterdir())


def test_invalid_server_options_are_one_line(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "short").write_text("secret\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, said in (
            (("-m", str(graph), "--port", port), f"port {port}: Address already in use"),
            (("-m", str(graph), "--host", "203.0.113.1", "--port", "0"), "203.0.113.1, port 0: "),
            (("-m", "nothing.onnx", "--port", "0"), "nothing.onnx"),
            (("-m", str(graph), "--port", "0", "--device", "tpu"), "device is 'tpu'; available here: auto, "),
            (("-m", "nothing.onnx", "--port", "0", "--workers", "2"), "nothing.onnx"),
            (("-m", str(graph), "--port", "0", "--max-seconds", "nan"), "--max-seconds is nan"),
            (("-m", str(graph), "--port", "0", "--proxy", "junk"), "--proxy junk"),
            (("-m", str(graph), "--port", "0", "--root-path", "a/"), "--root-path is a/"),
            (("-m", str(graph), "--port", "0", "--api-key", str(tmp_path / "none")), "No such file"),
            (("-m", str(graph), "--port", "0", "--api-key", str(tmp_path / "empty")), "has no API key"),
            (("-m", str(graph), "--port", "0", "--api-key", str(tmp_path / "short")), "has 6 characters"),
            (("-m", str(graph), "--unix-socket", str(tmp_path / "short")), "not a socket"),
        ):
            monkeypatch.setattr(sys, "argv", ["ced", "serve", *words])
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("ced: error: ")
            assert said in line
            assert "secret" not in line


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_closed_standard_output_ends_the_access_log_with_a_line(graph: Path, workers: str) -> None:
    with serving(graph, "--port", "0", "--workers", workers) as (process, url):
        assert process.stdout is not None
        assert process.stderr is not None
        assert httpx.get(f"{url}/healthz/ready", timeout=60).status_code == 200
        process.stdout.readline()
        process.stdout.close()
        for _ in range(20):
            assert httpx.get(f"{url}/healthz/ready", timeout=60).status_code == 200
        time.sleep(0.5)
        process.terminate()
        assert process.wait(60) == 0
        told = process.stderr.read().splitlines()
    assert 1 <= len(told) <= int(workers)  # each process has a log
    assert all(line.startswith("ced: warning: the access log ends") and "Broken pipe" in line for line in told)


def test_a_short_key_in_the_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    monkeypatch.setenv("CED_API_KEY", "short")
    for given in (None, file):
        with pytest.raises(ConfigError, match=r"\$CED_API_KEY has 5 characters"):
            _keys(given)
    monkeypatch.setenv("CED_API_KEY", KEY[::-1])
    assert _keys(file) == (KEY, KEY[::-1])


def test_a_blocked_standard_output_delays_no_request(graph: Path) -> None:
    with serving(graph, "--port", "0") as (process, url), httpx.Client(base_url=url, timeout=20) as client:
        for _ in range(500):  # more lines than a pipe takes
            assert client.get("/healthz/ready", params={"x": "y" * 500}).status_code == 200
        process.terminate()
        assert process.wait(60) == 0
