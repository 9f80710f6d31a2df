"""`ced app` as a process: the commands of its page, how it ends, what cannot be shown."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import soundfile

pytest.importorskip("gradio", reason="the page needs the extra app")
import gradio_client

ROOT = Path(__file__).parents[1]
RATE = 16_000
COMMANDS = [
    line.partition("#")[0].strip()
    for line in (ROOT / "docs" / "app.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("ced app")
]
WITHOUT_GRADIO = "import sys; sys.modules['gradio'] = None; from ced.cli import main; main()"


@contextmanager
def showing(words: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `ced app` with its temporary files in a folder, and give the process and its address once it listens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "ced", "app", *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            said = re.fullmatch(r"http://(127\.0\.0\.1|0\.0\.0\.0)(:\d+)\n", line)
            assert said, (line, process.stderr.read() if process.stderr and process.poll() is not None else "")
            yield process, f"http://127.0.0.1{said[2]}"
        finally:
            process.kill()


def test_its_page_has_commands() -> None:
    assert len(COMMANDS) == 3


@pytest.mark.parametrize(
    ("command", "number", "code", "said"),
    list(
        zip(
            COMMANDS,
            (signal.SIGINT, signal.SIGTERM, signal.SIGINT),
            (130, 0, 130),
            ("ced: interrupted\n", "", "ced: interrupted\n"),
            strict=True,
        )
    ),
)
def test_a_stop_is_quiet_and_leaves_nothing(
    command: str, number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    """A page is open, a sound was uploaded, and a long one is being tagged."""
    words = [*shlex.split(command)[2:], "-m", "esc10", "--port", "0"]
    sound = tmp_path / "a.wav"
    soundfile.write(sound, np.random.default_rng(0).uniform(-0.5, 0.5, 300 * RATE), RATE)
    folder = tmp_path / "temporary"
    folder.mkdir()
    with showing(words, folder) as (process, url):
        (sounds,) = folder.glob("ced-app-*")
        page = urlopen(url, timeout=60).read().decode()
        assert ("10 min" in page, "50 MB" in page) == ("--max-minutes 10" in command, "--max-mb 50" in command)
        assert ("https://..." in page) == ("--no-addresses" not in command)
        opened = urlopen(f"{url}/gradio_api/heartbeat/someone", timeout=60)
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        job = client.submit(gradio_client.handle_file(sound), "1 s", 0.5, [], 8, api_name="/file")
        end = time.monotonic() + 60
        while not list(sounds.glob("sounds/*/clip.flac")):
            assert time.monotonic() < end
            assert not job.done()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == code
        opened.close()
        assert process.stderr is not None
        assert process.stderr.read() == said
    assert not sounds.exists()


def test_what_cannot_be_shown_is_said_in_a_line() -> None:
    command = [sys.executable, "-m", "ced", "app", "-m", "esc10"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, said in (
            (
                [*command, "--port", port],
                f"ced: error: cannot listen at 127.0.0.1, port {port}: Address already in use\n",
            ),
            (
                [sys.executable, "-c", WITHOUT_GRADIO, "app", "--port", "0"],
                "ced: error: ced app needs the package gradio: pip install 'ced-audio[app]'\n",
            ),
        ):
            done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
            assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
