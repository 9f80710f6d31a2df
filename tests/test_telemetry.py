"""No telemetry and no leftover files: system calls of the commands, recorded by strace."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile

from ced.environment import SWITCHES

ROOT = Path(__file__).parents[1]
STRACE = [
    "strace",
    "-f",
    "-qq",
    "-s",
    "4096",
    "-e",
    "trace=socket,connect,bind,sendto,sendmsg,sendmmsg,open,openat,creat",
]


def traceable() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "true"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not traceable(), reason="strace is not installed, or must not trace here"),
]


@dataclass(frozen=True)
class Trace:
    """The system calls of a process and its children.

    Attributes:
        addresses: "connect 1.2.3.4:80", "bind ...", of internet sockets. A socket without an address is not counted:
            libuuid opens one to read the MAC address.
        lookups: files that are read to look up a host name.
        written: files that were opened for writing.
    """

    addresses: list[str]
    lookups: list[str]
    written: list[Path]


def read_trace(path: Path) -> Trace:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    text = "\n".join(line for line in lines if "open" not in line or " = -1 E" not in line)  # files that do not exist
    addresses = [
        f"{call} {address}:{port}"
        for call, port, address in re.findall(
            r"(connect|bind|send\w+)\(.*?sin6?_port=htons\((\d+)\).*?inet_(?:addr|pton)\((?:AF_INET6, )?\"([^\"]+)\"",
            text,
        )
    ]
    opened = re.findall(r"(?:open|openat|creat)\((?:AT_FDCWD, )?\"([^\"]+)\"(?:, (\S+))?", text)
    lookups = [name for name, _ in opened if name in ("/etc/resolv.conf", "/etc/hosts")]
    written = [Path(name) for name, flags in opened if re.search(r"O_WRONLY|O_RDWR|O_CREAT", flags)]
    return Trace(addresses, lookups, written)


@dataclass(frozen=True)
class Machine:
    """A home folder in a temporary place, in which commands are traced."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
        return {name: os.environ[name] for name in kept if name in os.environ} | {
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "CED_CACHE": str(self.folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @contextmanager
    def started(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Start a Python command under strace; its trace is complete at the end of the block."""
        command = [*STRACE, "-o", str(self.folder / "trace"), sys.executable, *words]
        # Its own group: a signal must reach the command itself, which strace would keep from it.
        with subprocess.Popen(
            command,
            cwd=self.folder / "work",
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def run(self, *words: str) -> Trace:
        with self.started(*words) as process:
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return self.trace()

    def trace(self) -> Trace:
        return read_trace(self.folder / "trace")

    def left(self) -> list[str]:
        """Return the files in the home and temporary folders."""
        return [str(path) for name in ("home", "tmp") for path in (self.folder / name).rglob("*") if path.is_file()]

    def assert_quiet(self, trace: Trace) -> None:
        """Check that no name was looked up and only outputs and ced's own cache were written."""
        assert trace.lookups == []
        allowed = (self.folder / "work", self.folder / "cache", self.folder / "tmp", Path("/dev"))
        absolute = [path if path.is_absolute() else self.folder / "work" / path for path in trace.written]
        assert [path for path in absolute if not any(path.is_relative_to(folder) for folder in allowed)] == []
        assert self.left() == []


@pytest.fixture
def machine(tmp_path: Path, small_checkpoint: Path) -> Machine:
    for name in ("home", "tmp", "work", "cache"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "work" / "a.wav", rng.uniform(-0.5, 0.5, 32_000), 16_000)
    shutil.copy(small_checkpoint, tmp_path / "work")
    return Machine(tmp_path)


def test_sockets_lookups_and_files_are_recorded(machine: Machine) -> None:
    program = """if 1:
        import os, pathlib, socket
        pathlib.Path(os.environ["HOME"], "device-id").write_text("1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(("127.0.0.9", 9))
        try:
            socket.getaddrinfo("collector.invalid", 443)
        except OSError:
            pass
    """
    trace = machine.run("-c", program)
    assert "connect 127.0.0.9:9" in trace.addresses
    assert trace.lookups
    assert machine.left() == [str(machine.folder / "home" / "device-id")]
    with pytest.raises(AssertionError):
        machine.assert_quiet(trace)


@pytest.mark.parametrize(
    "words",
    [
        ["tag", "-m", "esc10", "a.wav", "-f", "jsonl", "--out", "tags"],
        ["tag", "-m", "small.safetensors", "a.wav"],
        ["embed", "-m", "esc10", "a.wav", "-o", "vectors.npy"],
        ["export", "-m", "small.safetensors", "-o", "small.onnx", "--int8"],
    ],
    ids=" ".join,
)
def test_commands_send_nothing_and_leave_nothing(machine: Machine, words: list[str]) -> None:
    trace = machine.run("-m", "ced", *words)
    assert trace.addresses == []
    machine.assert_quiet(trace)


def test_serve_opens_only_its_own_port(machine: Machine) -> None:
    with machine.started("-m", "ced", "serve", "-m", "esc10", "--port", "0") as process:
        assert process.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stderr.readline())
        assert address is not None
        sound = (machine.folder / "work" / "a.wav").read_bytes()
        asked = Request(f"{address[0]}/v1/audio/classification", sound, {"Content-Type": "audio/wav"})
        with urlopen(asked, timeout=60) as answer:
            assert answer.status == 200
        time.sleep(3)  # time in which a library would begin to upload
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    trace = machine.trace()
    assert [each for each in trace.addresses if not each.startswith("bind 127.0.0.1:")] == []
    machine.assert_quiet(trace)


class Station(BaseHTTPRequestHandler):
    """Sends noise as FLAC for half a minute, in real time."""

    def do_GET(self) -> None:
        file = io.BytesIO()
        soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 30 * 16_000), 16_000, format="FLAC")
        sound, step = file.getvalue(), len(file.getvalue()) // 300
        self.send_response(200)
        self.end_headers()
        for start in range(0, len(sound), step):
            try:
                self.wfile.write(sound[start : start + step])
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the output of the tests clean."""


def test_live_connects_only_to_its_stream(machine: Machine) -> None:
    pytest.importorskip("av")
    with ThreadingHTTPServer(("127.0.0.1", 0), Station) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with machine.started("-m", "ced", "live", "-m", "esc10", "--threshold", "0", f"http://{address}/") as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
        server.shutdown()
    trace = machine.trace()
    assert set(trace.addresses) == {f"connect {address}"}
    machine.assert_quiet(trace)


def test_transformers_sends_nothing(machine: Machine) -> None:
    pytest.importorskip("transformers")
    program = """if 1:
        import os
        import numpy as np
        import ced
        from ced.integrations.transformers import CedFeatureExtractor, CedForAudioClassification
        from ced.environment import SWITCHES
        from huggingface_hub import constants
        from transformers import pipeline

        assert SWITCHES.items() <= os.environ.items()
        assert constants.HF_HUB_DISABLE_TELEMETRY

        CedForAudioClassification.from_network(ced.load_model("small.safetensors")).save_pretrained("folder")
        CedFeatureExtractor().save_pretrained("folder")
        classify = pipeline("audio-classification", model="folder")
        assert len(classify(np.zeros(16_000, np.float32))) == 3
    """
    trace = machine.run("-c", program)
    # Accelerate imports boto3 where it is installed, and with it urllib3, which binds to find out about IPv6.
    assert [each for each in trace.addresses if each != "bind ::1:0"] == []
    machine.assert_quiet(trace)


def test_the_container_switches_telemetry_off() -> None:
    container = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for name, value in SWITCHES.items():
        assert f"{name}={value}" in container
