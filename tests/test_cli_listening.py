"""`ced live` as a user meets it: a station and an input of PortAudio's, with the model that comes with the package."""

import io
import json
import os
import re
import signal
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


def test_a_stream_is_told_of_line_by_line(station: str) -> None:
    pytest.importorskip("av")
    lines, notes, code = listened(station, "--threshold", "0", end=signal.SIGTERM, env=ENVIRONMENT)
    assert len(lines) == 10  # all ten classes go on, and what goes on is not reported again
    assert len({line[9:-5] for line in lines}) == len(lines)
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d [A-Z][A-Za-z ,]+ [01]\.\d\d", line) for line in lines)
    assert f"ced: listening to {station}\n" in notes
    assert code == 0


def test_what_is_open_ends_with_the_command(station: str) -> None:
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


def test_an_input_is_heard_and_listed(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.wav"], "a.wav is no http(s) address; sounds in files are for `ced tag`"),
        (["-d", "1", "http://a/"], "--device 1 and http://a/ cannot both be listened to; leave one out"),
        (["-f", "csv"], "there is no live format csv; allowed: text, jsonl"),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    command = [sys.executable, "-m", "ced", "live", "-m", "esc10", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (1, f"ced: error: {said}\n")
