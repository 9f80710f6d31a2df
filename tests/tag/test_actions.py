"""What happens with events: real commands, a real web server, a real MQTT broker where one is installed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ced.errors import ConfigError, MissingPackageError
from ced.tag import actions
from ced.tag.actions import Actions, Command, Mqtt, Webhook, variables

HOSTILE = "$(touch pwned); `touch pwned` \"'\n\x1b[0m ü"


def event(number: int = 1, label: str = "Dog", state: str = "begin") -> dict[str, Any]:
    tag = {"label": label, "index": 74, "mid": None, "prob": 0.97}
    piece = {"start": 1.25, "end": 2.5, "tags": [tag]}
    head = {"format": 1, "file": "input device USB", "model": "esc10", "kind": "events"}
    return {**head, "pieces": [piece], "state": state, "event": number, "time": "2026-01-31T12:03:13.500+01:00"}


def wait_for(done: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "RETRIES", (0.05, 0.1))
    monkeypatch.setattr(actions, "_GLANCE", 0.05)


# Commands


def script(path: Path, code: str) -> str:
    path.write_text(code)
    return f'"{sys.executable}" "{path}" "an argument"'


def test_a_command_gets_the_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = script(
        tmp_path / "hook.py",
        "import json, os, sys\n"
        "given = {name: value for name, value in os.environ.items() if name.startswith('CED_')}\n"
        "with open('got.jsonl', 'a') as file:\n"
        "    print(json.dumps([sys.argv[1:], json.loads(sys.stdin.readline()), given]), file=file)\n",
    )
    events = [event(1, HOSTILE), event(1, HOSTILE, "end")]
    with Actions([Command(line)]) as running:
        for each in events:
            running.put(each)
    got = [json.loads(row) for row in Path("got.jsonl").read_text().splitlines()]
    assert [(words, value) for words, value, _ in got] == [(["an argument"], each) for each in events]
    given = got[0][2]
    assert (given["CED_LABEL"], given["CED_STATE"], given["CED_EVENT"]) == (HOSTILE, "begin", "1")
    assert (given["CED_PROB"], given["CED_START"], given["CED_END"], given["CED_MID"]) == ("0.9700", "1.25", "2.5", "")
    assert (given["CED_SOURCE"], given["CED_MODEL"]) == ("input device USB", "esc10")
    assert given["CED_TIME"] == "2026-01-31T12:03:13.500+01:00"
    assert not Path("pwned").exists()


def test_an_environment_takes_any_label() -> None:
    assert variables(event(label="a\0b"))["CED_LABEL"] == "ab"


def test_output_of_a_command_goes_to_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Actions([Command(script(tmp_path / "hook.py", "print('printed')"))]) as running:
        running.put(event())
    out, err = capfd.readouterr()
    assert out == ""
    assert "printed" in err


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.close(0); raise SystemExit(4)", "exit code 4")],
)
def test_a_failing_command_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str, said: str) -> None:
    with Actions([Command(script(tmp_path / "hook.py", code))]) as running:
        for number in range(3):
            running.put(event(number, "x" * 200_000))  # more than a pipe holds
    failed, missing = caplog.messages
    assert said in failed
    assert os.path.basename(sys.executable) in failed
    assert "3 of 3 events were not delivered" in missing


@pytest.mark.skipif(os.name == "nt", reason="process groups as POSIX has them")
def test_a_hanging_command_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(actions, "COMMAND_SECONDS", 1.0)
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    with Actions([Command(script(tmp_path / "hook.py", code))]) as running:
        running.put(event())
        wait_for(lambda: "killed" in caplog.text)
    pid = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{pid}/status")
    wait_for(lambda: not status.exists() or "Z (zombie)" in status.read_text())


@pytest.mark.parametrize(
    ("line", "said"), [("", "command not found: ''"), ("no-such-command -x", "no-such-command"), ("a 'b", "quot")]
)
def test_commands_that_are_refused(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Command(line)


# The queue


class Slow:
    """An action that takes its time."""

    name = "slow action"

    def __init__(self, seconds: float) -> None:
        self.seconds, self.seen, self.closed = seconds, list[int](), False

    def run(self, given: Mapping[str, Any], closing: threading.Event) -> None:
        time.sleep(self.seconds)
        self.seen.append(given["event"])

    def close(self) -> None:
        self.closed = True


def test_queueing_an_event_never_blocks(caplog: pytest.LogCaptureFixture) -> None:
    slow, quick = Slow(0.3), Slow(0.0)
    running = Actions([slow, quick])
    began = time.monotonic()
    for number in range(actions.WAITING + 50):
        running.put(event(number))
        time.sleep(0.0001)
    assert time.monotonic() - began < 2.0
    wait_for(lambda: len(quick.seen) == actions.WAITING + 50)
    running.close(0.5)
    assert quick.closed
    assert "slow action: events arrive faster" in caplog.text
    assert "quick" not in caplog.text
    assert caplog.messages[-1].startswith("slow action: ")
    assert caplog.messages[-1].endswith("events were not delivered")


def test_waiting_events_are_handled_at_the_end() -> None:
    slow = Slow(0.02)
    with Actions([slow]) as running:
        for number in range(20):
            running.put(event(number))
    assert slow.seen == list(range(20))
    assert slow.closed


def test_an_unexpected_error_does_not_stop_an_action(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Slow):
        def run(self, given: Mapping[str, Any], closing: threading.Event) -> None:
            if given["event"] == 0:
                raise KeyError("x")
            super().run(given, closing)

    faulty = Faulty(0.0)
    with Actions([faulty]) as running:
        for number in range(3):
            running.put(event(number))
    assert faulty.seen == [1, 2]
    assert "KeyError" in caplog.text


# Webhooks


class Receiver(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *answers: int, delay: float = 0.0) -> None:
        receiver = self
        self.answers, self.got = list(answers), list[tuple[str, dict[str, str], Any]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.path, dict(self.headers), json.loads(body)))
                time.sleep(delay)
                code = receiver.answers.pop(0) if receiver.answers else 204
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path: str = "/hook?token=secret", user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server_port}{path}"


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def start(*answers: int, delay: float = 0.0) -> Receiver:
        made.append(Receiver(*answers, delay=delay))
        return made[-1]

    yield start
    for each in made:
        each.shutdown()
        each.server_close()


def test_a_webhook_gets_the_event(receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    with Actions([Webhook(receiver.url(user="me:p%40ss@"))]) as running:
        running.put(event(1, HOSTILE))
    ((path, headers, body),) = receiver.got
    assert (path, body) == ("/hook?token=secret", event(1, HOSTILE))
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Basic bWU6cEBzcw=="


@pytest.mark.parametrize(
    ("answers", "tries", "delivered"),
    [((503, 500, 200), 3, True), ((503, 503, 503, 503), 3, False), ((400,), 1, False), ((302,), 1, False)],
)
def test_requests_are_retried_after_temporary_errors(
    receive: Callable[..., Receiver],
    caplog: pytest.LogCaptureFixture,
    answers: tuple[int, ...],
    tries: int,
    delivered: bool,
) -> None:
    receiver = receive(*answers)
    running = Actions([Webhook(receiver.url())])
    running.put(event())
    wait_for(lambda: len(receiver.got) == tries)
    wait_for(lambda: delivered or bool(caplog.messages))
    running.close()
    assert len(receiver.got) == tries
    assert delivered == (not caplog.messages)
    assert "secret" not in caplog.text
    if not delivered:
        assert f"the server answered {answers[0]}" in caplog.text


def test_an_unreachable_or_slow_server(
    receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(actions, "REQUEST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    slow = receive(delay=1.0)
    running = Actions([Webhook(f"http://127.0.0.1:{port}/secret"), Webhook(slow.url("/secret"))])
    running.put(event())
    wait_for(lambda: len(caplog.messages) >= 2)
    running.close()
    assert "refused" in caplog.text
    assert "no answer within 0.2 s" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_is_back_gets_the_waiting_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "RETRIES", (0.1,) * 50)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    running = Actions([Webhook(f"http://127.0.0.1:{port}/")])
    for number in range(3):
        running.put(event(number))
    time.sleep(0.3)

    class Back(Receiver):
        allow_reuse_address = True

        def server_bind(self) -> None:
            self.server_address = ("127.0.0.1", port)
            super().server_bind()

    receiver = Back()
    wait_for(lambda: len(receiver.got) == 3)
    running.close()
    assert [body["event"] for _, _, body in receiver.got] == [0, 1, 2]
    receiver.shutdown()
    receiver.server_close()


@pytest.mark.parametrize("address", ["ftp://a/", "a.b/hook", "http://", "http://[", "http://a:b/", ""])
def test_invalid_webhook_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="must begin with http:// or https://"):
        Webhook(address)


def test_messages_have_no_passwords() -> None:
    with pytest.raises(ConfigError) as raised:
        Webhook("ftp://me:secret@a/")
    assert "secret" not in str(raised.value)
    assert "secret" not in Webhook("https://me:secret@a/secret?secret").name


# MQTT

paho: Any = None
with suppress(ImportError):
    import paho.mqtt.client as paho
BROKER = shutil.which("mosquitto") or ("/usr/sbin/mosquitto" if Path("/usr/sbin/mosquitto").exists() else None)
with_broker = pytest.mark.skipif(BROKER is None or paho is None, reason="mosquitto or paho-mqtt is not installed")


class Broker:
    """mosquitto, with a subscriber that keeps what is published."""

    def __init__(self, folder: Path, port: int | None = None, password: str | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = port or free.getsockname()[1]
        settings = f"listener {self.port} 127.0.0.1\nallow_anonymous {'false' if password else 'true'}\n"
        if password:
            passwords = folder / "passwords"
            subprocess.run(["mosquitto_passwd", "-c", "-b", passwords, "me", password], check=True, capture_output=True)
            passwords.chmod(0o644)
            settings += f"password_file {passwords}\n"
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            settings += "user root\n"  # which else becomes one that may not read the folder
        (folder / "mosquitto.conf").write_text(settings)
        assert BROKER is not None
        self.process = subprocess.Popen([BROKER, "-c", folder / "mosquitto.conf"], stderr=subprocess.DEVNULL)
        self.got: list[tuple[str, Any, int]] = []
        self.subscribed = threading.Event()
        client = self.client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        if password:
            client.username_pw_set("me", password)
        client.on_connect = lambda *_: client.subscribe("#", 1)
        client.on_subscribe = lambda *_: self.subscribed.set()
        client.on_message = lambda *words: self.got.append((words[2].topic, json.loads(words[2].payload), words[2].qos))
        client.connect_async("127.0.0.1", self.port)
        client.reconnect_delay_set(1, 1)
        client.loop_start()

    def subscribe(self) -> None:
        assert self.subscribed.wait(15)

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        self.client.loop_stop()
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    made: list[Broker] = []

    def start(**options: Any) -> Broker:
        made.append(Broker(tmp_path, **options))
        made[-1].subscribe()
        return made[-1]

    yield start
    for broker in made:
        broker.stop()


@with_broker
def test_a_broker_gets_the_events(start_broker: Callable[..., Broker]) -> None:
    broker = start_broker()
    with Actions(
        [Mqtt(f"mqtt://127.0.0.1:{broker.port}"), Mqtt(f"mqtt://127.0.0.1:{broker.port}/home/garden%20x")]
    ) as running:
        for number in range(3):
            running.put(event(number, HOSTILE))
    wait_for(lambda: len(broker.got) == 6)
    broker.stop()
    for topic in ("ced/events", "home/garden x"):
        assert [got[1:] for got in broker.got if got[0] == topic] == [
            (event(number, HOSTILE), 1) for number in range(3)
        ]


@with_broker
@pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="mosquitto_passwd is not installed")
def test_a_broker_that_asks_for_a_password(
    start_broker: Callable[..., Broker], caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_broker(password="p@ss")
    with Actions([Mqtt(f"mqtt://me:p%40ss@127.0.0.1:{broker.port}")]) as running:
        running.put(event())
    wait_for(lambda: len(broker.got) == 1)
    assert caplog.messages == []
    running = Actions([Mqtt(f"mqtt://me:wrong@127.0.0.1:{broker.port}")])
    running.put(event())
    wait_for(lambda: "ot authori" in caplog.text)
    running.close()
    broker.stop()
    assert "1 of 1 events were not delivered" in caplog.text
    assert "wrong" not in caplog.text


@with_broker
def test_a_broker_that_is_back_gets_the_waiting_events(
    start_broker: Callable[..., Broker], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = Actions([Mqtt(f"mqtt://127.0.0.1:{port}")])
    began = time.monotonic()
    for number in range(3):
        running.put(event(number))
    assert time.monotonic() - began < 1
    wait_for(lambda: "cannot be reached" in caplog.text)
    broker = start_broker(port=port)
    wait_for(lambda: len(broker.got) == 3, 20)
    running.close()
    broker.stop()
    assert [got[1]["event"] for got in broker.got] == [0, 1, 2]
    assert "not delivered" not in caplog.text


@with_broker
def test_an_unreachable_broker_does_not_delay_the_end(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = Actions([Mqtt(f"mqtt://127.0.0.1:{port}")])
    running.put(event())
    began = time.monotonic()
    running.close(3.0)
    assert time.monotonic() - began < 5
    assert "1 of 1 events were not delivered" in caplog.text


@pytest.mark.skipif(paho is None, reason="paho-mqtt is not installed")
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://a/", "must begin with mqtt:// or mqtts://"),
        ("mqtt://", "host"),
        ("mqtt://a/%2B", "the topic of"),
        ("mqtt://a/x/#", "the topic of mqtt://a/x/# "),
    ],
)
def test_invalid_broker_addresses(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mqtt(address)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("paho", "paho.mqtt", "paho.mqtt.client", "paho.mqtt.enums"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=r"paho-mqtt: pip install 'ced-audio\[mqtt\]'"):
        Mqtt("mqtt://a")
