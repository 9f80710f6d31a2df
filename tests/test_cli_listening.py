"""`ced live` as a user meets it: a station and an input of PortAudio's, with the model that comes with the package."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ced.tag.records import Record

ROOT = Path(__file__).parents[1]
ALSA = Path("/usr/share/alsa/alsa.conf")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1"}


class Station(BaseHTTPRequestHandler):
    """Sends noise at its pace, as FLAC, until nobody listens."""

    def do_GET(self) -> None:
        file = io.BytesIO()
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * 16_000)
        soundfile.write(file, noise, 16_000, format="FLAC")
        sound = file.getvalue()
        self.send_response(200)
        self.end_headers()
        for start in range(0, len(sound), len(sound) // 300):
            try:
                self.wfile.write(sound[start : start + len(sound) // 300])
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def station() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Station)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/live"
    server.shutdown()
    server.server_close()


def listened(*words: str, end: signal.Signals, env: dict[str, str]) -> tuple[list[str], str, int]:
    """Run `ced live` until it has said something, and stop it; return its lines, its notes and its exit code."""
    command = [sys.executable, "-m", "ced", "live", "-m", "esc10", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        process.send_signal(end)
        rest, notes = process.stdout.read(), process.stderr.read()  # of few lines
    assert "Traceback" not in notes
    return [first.rstrip("\n"), *rest.splitlines()], notes, process.returncode


def test_a_stream_is_reported_line_by_line(station: str) -> None:
    pytest.importorskip("av")
    lines, notes, code = listened(station, "--threshold", "0", end=signal.SIGTERM, env=ENVIRONMENT)
    assert len(lines) == 10  # all ten classes go on, and what goes on is not reported again
    assert len({line[9:-5] for line in lines}) == len(lines)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d [A-Z][A-Za-z ,]+ [01]\.\d\d", line) for line in lines)
    assert f"ced: listening to {station}\n" in notes
    assert code == 0


def test_open_events_end_with_the_command(station: str) -> None:
    pytest.importorskip("av")
    words = (station, "--threshold", "0", "-f", "jsonl")
    lines, notes, code = listened(*words, end=signal.SIGINT, env=ENVIRONMENT)
    assert (notes.splitlines()[-1], code) == ("ced: interrupted", 130)
    values = [json.loads(line) for line in lines]
    begun = [each["event"] for each in values if each["state"] == "begin"]
    ended = [each["event"] for each in values if each["state"] == "end"]
    assert begun == list(range(1, len(begun) + 1))
    assert sorted(ended) == begun
    record = Record.from_json(values[-1])
    assert (record.file, record.model, len(record.pieces)) == (station, "esc10", 1)


def test_a_device_is_tagged_and_listed(tmp_path: Path) -> None:
    """PortAudio's own way to sound: ALSA has an input here that gives silence, as fast as it is read."""
    try:
        import sounddevice  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("PortAudio is not installed")
    if not ALSA.exists():
        pytest.skip("inputs without a device are of ALSA")
    (tmp_path / ".asoundrc").write_text("pcm.cednothing { type null }\n")
    environment = {**ENVIRONMENT, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "ced", "live", "--list-devices"]
    listed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert re.search(r"^ +\d+ cednothing, \d+ channels, \d+ Hz", listed, re.M)
    words = ("--device", "cednothing", "--threshold", "0", "--gap", "1e9")
    lines, notes, code = listened(*words, end=signal.SIGINT, env=environment)
    assert "ced: listening to input device cednothing\n" in notes
    assert (len(lines), code) == (10, 130)


def run(*words: str, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ced", "live", "-m", "esc10", *words]
    return subprocess.run(command, input=stdin, capture_output=True, env=ENVIRONMENT, check=False, timeout=120)


def noise(seconds: float) -> bytes:
    """Return noise on the left, silence on the right: 16-bit samples at 16 kHz."""
    left = np.random.default_rng(0).uniform(-8000, 8000, round(16_000 * seconds))
    return np.stack([left, 0 * left], 1).astype("<i2").tobytes()


def wav(samples: bytes) -> bytes:
    """Return a WAV file as a recording program writes it to a pipe: without a length."""
    form = struct.pack("<HHIIHH", 1, 2, 16_000, 64_000, 4, 16)
    return b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<I", 16) + form + b"data\xff\xff\xff\xff" + samples


RAW = ("--rate", "16000", "--channels", "2", "--sample-format", "S16_LE")


@pytest.mark.parametrize("words", [(), RAW])
def test_standard_input_of_a_recording_program_is_tagged(words: tuple[str, ...]) -> None:
    samples = noise(3.0)
    given = ("-", "--threshold", "0", "--labels", "Rain", "-f", "JSONL", *words)
    done = run(*given, stdin=samples if words else wav(samples))
    assert (done.returncode, done.stderr) == (0, b"ced: listening to standard input\n")
    begin, end = (json.loads(line) for line in done.stdout.splitlines())
    assert (begin["state"], end["state"], end["file"], end["channel"]) == ("begin", "end", "standard input", "mean")
    assert end["pieces"][0]["end"] == pytest.approx(3.0, abs=0.01)


def test_one_channel_is_tagged_live() -> None:
    words = ("-", "--threshold", "0", "--silence", "-60", "-f", "jsonl", *RAW)
    left, right = (run(*words, "--channel", channel, stdin=noise(2.0)) for channel in ("left", "2"))
    assert (left.returncode, right.returncode) == (0, 0)
    assert json.loads(left.stdout.splitlines()[0])["channel"] == "left"
    assert right.stdout == b""  # silence


@pytest.mark.parametrize(("on", "states"), [("begin", ["begin"]), ("end", ["end"]), ("both", ["begin", "end"])])
def test_events_run_a_command_and_go_to_a_webhook(tmp_path: Path, on: str, states: list[str]) -> None:
    got: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "hook.py").write_text(
        "import os, sys\n"
        f"with open({str(tmp_path / 'got')!r}, 'a') as file:\n"
        "    file.write(os.environ['CED_STATE'] + ' ' + sys.stdin.readline())\n"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        command = f'"{sys.executable}" "{tmp_path / "hook.py"}"'
        words = ("-", *RAW, "--threshold", "0", "--labels", "Rain", "--exec", command, "--webhook", url, "--on", on)
        done = run(*words, stdin=noise(2.0))
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert [event["state"] for event in got] == states
    lines = (tmp_path / "got").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines] == states
    assert [json.loads(line.partition(" ")[2]) for line in lines] == got


def test_a_failing_action_does_not_change_the_events() -> None:
    words = ("-", *RAW, "--threshold", "0", "--labels", "Rain")
    alone = run(*words, stdin=noise(2.0))
    failing = run(*words, "--exec", "false", "--webhook", "http://127.0.0.1:9/", stdin=noise(2.0))
    assert (failing.returncode, failing.stdout[9:]) == (0, alone.stdout[9:])  # behind the time
    assert b"command false: exit code 1" in failing.stderr
    assert b"webhook http://127.0.0.1:9: 2 of 2 events were not delivered" in failing.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.wav"], "a.wav is not an http(s) or rtsp address"),
        (["-d", "1", "http://a/"], "--device 1 and http://a/ cannot be used together; leave one out"),
        (["http://a/", "--model-device", "tpu"], "device is 'tpu'; available here: auto, "),
        (["-f", "csv"], "unknown live format csv; allowed: text, jsonl"),
        (["--rate", "16000"], "--rate applies to samples on standard input"),
        (["-", "--channels", "2"], "--channels needs --rate, the rate of raw samples in Hz"),
        (["-", "--rate", "1"], "rate is 1 Hz; it must be 1000 to 768000 Hz"),
        (["http://a/", "--exec", "no-such-command x"], "command not found: no-such-command"),
        (["http://a/", "--webhook", "a/"], "the address of a webhook is a/; it must begin with http:// or https://"),
    ],
)
def test_invalid_options_are_one_line(words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "ced", "live", "-m", "esc10", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"ced: error: {said}")


def test_a_missing_channel() -> None:
    done = run("-", "--channel", "middle", stdin=b"")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"ced: error: " in done.stderr
    assert b"middle" in done.stderr


def test_input_that_is_not_sound() -> None:
    done = run("-", stdin=b"no sound at all, but text")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"standard input: no WAV header; name the rate of raw samples with --rate" in done.stderr
