"""Measure peak memory and time of hostile files, in every program that reads them.

Run from the root of the repository as `python -m benchmarks.hostile` (a few minutes). The files are those of
tests/hostile.py, the model is `esc10` of the package. Programs:

    read      the sound alone (`ced.sound.audio.open_sound`), with the budget of the server
    tagger    `ced.Tagger`, from Python
    tag       the command `ced tag FILE`
    serve     `ced serve`, an upload each

Each file has a process of its own, except for `serve`, where all are sent to one server, whose memory so far is
reported. The exit code is 1 if a file takes more than 400 MB or 10 s.
"""

import argparse
import http.client
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import hostile

MOST_MEMORY, MOST_SECONDS, PATIENCE = 400, 10, 120  # MB, s, s
READ = """
import sys
from ced.errors import CedError
from ced.sound.audio import open_sound
try:
    with open_sound(sys.argv[1], budget=3_600 * 48_000 * 2) as sound:
        seconds = sum(len(block) for block in sound.blocks()) / 16_000
    print(f"{seconds:.1f} s, {'complete' if sound.complete else 'incomplete'}")
except CedError as error:
    print(getattr(error, "reason", error))
"""
TAGGER = """
import sys
from ced import Tagger
from ced.errors import CedError
try:
    with Tagger("esc10", jobs=1) as tagger:
        result = tagger.tag(sys.argv[1])
    print(f"{result.seconds:.1f} s, {'complete' if result.complete else 'incomplete'}")
except CedError as error:
    print(getattr(error, "reason", error))
"""


@dataclass(frozen=True)
class Cost:
    """Memory and time for one file, and the result."""

    seconds: float
    megabytes: float
    outcome: str

    @property
    def too_much(self) -> bool:
        """Return whether it exceeds the limits."""
        return self.seconds > MOST_SECONDS or self.megabytes > MOST_MEMORY


def run(command: list[str]) -> Cost:
    """Run a command in a process of its own."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        usage = None
        while usage is None and time.monotonic() - begin < PATIENCE:
            found, status, spent = os.wait4(process.pid, os.WNOHANG)
            if found:
                process.returncode = os.waitstatus_to_exitcode(status)
                usage = spent
            else:
                time.sleep(0.01)
        if usage is None:
            process.kill()
            process.wait()
            return Cost(PATIENCE, 0, "not finished")
        out.seek(0)
        lines = out.read().decode(errors="replace").strip().splitlines()
    if process.returncode not in (0, 1):
        return Cost(time.monotonic() - begin, megabytes(usage), f"exit code {process.returncode}")
    return Cost(time.monotonic() - begin, megabytes(usage), lines[-1] if lines else "")


def megabytes(usage: resource.struct_rusage) -> float:
    """Return the peak memory of a process that has ended."""
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@contextmanager
def server() -> Iterator[tuple[int, int]]:
    """Start `ced serve`; return its process and port."""
    command = [sys.executable, "-m", "ced", "serve", "-m", "esc10", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"http://[^ ]*?:(\d+)", line):
                yield process.pid, int(found[1])
                break
        else:
            raise SystemExit("ced serve did not start")
    finally:
        process.terminate()
        process.wait()


def send(path: Path, port: int, pid: int) -> Cost:
    """Upload a file."""
    begin = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        kind = {"Content-Type": "application/octet-stream"}
        connection.request("POST", "/v1/audio/classification", path.read_bytes(), kind)
        answer = connection.getresponse()
        outcome = f"{answer.status} {answer.read().decode(errors='replace')}"
    except OSError as error:
        outcome = f"no answer: {error}"
    finally:
        connection.close()
    return Cost(time.monotonic() - begin, server_peak(pid), outcome)


def server_peak(pid: int) -> float:
    """Return the peak memory of a running process, if the system reports it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))


def costs(way: str, paths: list[Path]) -> Iterator[Cost]:
    """Yield the cost of each file in one program."""
    if way == "serve":
        with server() as (pid, port):
            for path in paths:
                yield send(path, port, pid)
        return
    commands = {
        "read": [sys.executable, "-c", READ],
        "tagger": [sys.executable, "-c", TAGGER],
        "tag": [sys.executable, "-m", "ced", "tag", "-m", "esc10", "--jobs", "1"],
    }
    for path in paths:
        yield run([*commands[way], str(path)])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = ("read", "tagger", "tag", "serve")
    parser.add_argument("ways", nargs="*", default=list(ways), metavar="way", help=f"some of {', '.join(ways)}")
    parser.add_argument("--only", default="", help="files whose names contain this")
    arguments = parser.parse_args()
    if unknown := set(arguments.ways) - set(ways):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ways)}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path in hostile.write(Path(folder)) if arguments.only in path.name]
        for way in arguments.ways:
            print(f"\n{way:<28} {'kB':>9} {'s':>7} {'MB':>6}")
            worst = Cost(0, 0, "")
            for path, cost in zip(paths, costs(way, paths), strict=True):
                failed += cost.too_much
                worst = Cost(max(worst.seconds, cost.seconds), max(worst.megabytes, cost.megabytes), "")
                figures = f"{path.stat().st_size / 1e3:9.1f} {cost.seconds:7.2f} {cost.megabytes:6.0f}"
                mark = "!" if cost.too_much else " "
                print(f"{path.name:<28} {figures} {mark} {' '.join(cost.outcome.split())[:100]}", flush=True)
            print(f"{'worst':<28} {'':9} {worst.seconds:7.2f} {worst.megabytes:6.0f}")
    print(f"\n{failed} over {MOST_MEMORY} MB or {MOST_SECONDS} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
