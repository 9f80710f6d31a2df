"""Measure `ced serve` under load: requests per second and latency by number of clients.

Run as `python benchmarks/serve.py` (some minutes on two cores), with `--against CHECKOUT` to compare with the server of
another version, from a checkout of it (`git worktree add`). Sounds are generated, weights random and the same for all.

Clients send the next request as soon as they have their answer, over loopback, for clips of 1 and 10 s. The servers
alternate in each round; rates are medians over rounds, percentiles over all requests. The processor time per request
(Linux only) hardly depends on other load. Liveness is requested every 50 ms during the rounds with the most clients.
"""

import argparse
import http.client
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch

from ced.environment import cores
from ced.model import loading, zoo
from ced.model.vit import CED

ROOT = Path(__file__).parents[1]
RATE = 16_000
PATH = "/v1/audio/classification"


@dataclass
class Side:
    """One server, and its measurements for one length and number of clients."""

    name: str
    port: int
    process: int
    rates: list[float] = field(default_factory=list)  # requests a second, of each round
    took: list[float] = field(default_factory=list)  # seconds, of each request
    live: list[float] = field(default_factory=list)  # seconds, of each request for liveness
    worked: float = 0.0  # seconds of processor time


def environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def exported(checkout: Path, weights: Path, folder: Path) -> Path:
    """Return the graph that a version exports from weights."""
    path = folder / "model.onnx"
    command = [sys.executable, "-m", "ced", "export", "-m", str(weights), "-o", str(path)]
    subprocess.run(command, env=environment(checkout), cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path


@contextmanager
def serving(checkout: Path, graph: Path, jobs: int, waiting: int) -> Iterator[tuple[int, int]]:
    """Run the server of a version, and yield its port and process id."""
    words = ["-m", str(graph), "--port", "0", "-j", str(jobs), "--queue", str(waiting)]
    command = [sys.executable, "-m", "ced", "serve", *words]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(checkout), cwd=graph.parent, **pipes) as process:  # type: ignore[call-overload]
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127.0.0.1:(\d+)", line)
        if found is None:
            raise SystemExit(f"the server does not start: {line}{process.stderr.read()}")
        try:
            yield int(found[1]), process.pid
        finally:
            process.terminate()


def sound(seconds: float) -> bytes:
    """Return a file of noise, 16-bit FLAC."""
    held = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * RATE))
    soundfile.write(held, wave, RATE, format="FLAC", subtype="PCM_16")
    return held.getvalue()


def client(port: int, body: bytes, until: float) -> list[float]:
    """Send requests until a time, over one connection; return the seconds that each answer took."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    took = []
    while time.perf_counter() < until:
        begin = time.perf_counter()
        connection.request("POST", PATH, body, {"Content-Type": "audio/flac"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"the server answers {answer.status}")
        took.append(time.perf_counter() - begin)
    connection.close()
    return took


def ask_for_liveness(port: int, until: float) -> list[float]:
    """Return the seconds that each answer took, over a new connection each time."""
    took = []
    while time.perf_counter() < until:
        begin = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/healthz/live")
        connection.getresponse().read()
        connection.close()
        took.append(time.perf_counter() - begin)
        time.sleep(0.05)
    return took


def processor_time(process: int) -> float:
    """Return the processor seconds of a process so far."""
    fields = Path("/proc", str(process), "stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(side: Side, body: bytes, count: int, seconds: float, pool: ThreadPoolExecutor) -> None:
    begin, worked = time.perf_counter(), processor_time(side.process)
    live = pool.submit(ask_for_liveness, side.port, begin + seconds)
    clients = [pool.submit(client, side.port, body, begin + seconds) for _ in range(count)]
    answers = [each for one in clients for each in one.result()]
    side.rates.append(len(answers) / (time.perf_counter() - begin))
    side.took += answers
    side.worked += processor_time(side.process) - worked
    side.live += live.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in zoo.MODELS if name.startswith("ced")], default="ced_tiny")
    parser.add_argument("--against", type=Path, help="checkout of another version")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--lengths", nargs="+", type=float, default=[1, 10], help="seconds of a clip")
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each side of a round")
    given = parser.parse_args()
    torch.manual_seed(0)
    versions = {"here": ROOT} | ({} if given.against is None else {"there": given.against.resolve()})
    most = max(given.clients)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        weights = Path(name, "weights.safetensors")
        loading.save(weights, CED(zoo.MODELS[given.model].config).eval())
        servers = {}
        for version, checkout in versions.items():
            folder = Path(name, version)
            folder.mkdir()
            graph = exported(checkout, weights, folder)
            servers[version] = stack.enter_context(serving(checkout, graph, given.jobs, most))
        pool = stack.enter_context(ThreadPoolExecutor(most + 1))
        print(
            "| clip | clients | server | requests/s | median | 99th percentile | processor time | liveness, longest |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for length in given.lengths:
            body = sound(length)
            for port, _ in servers.values():
                client(port, body, time.perf_counter() + 1)
            for count in given.clients:
                sides = [Side(version, *server) for version, server in servers.items()]
                for _ in range(given.rounds):
                    for side in sides:
                        measure(side, body, count, given.seconds, pool)
                for side in sides:
                    median, late = np.percentile(side.took, [50, 99]) * 1000
                    rate, live = statistics.median(side.rates), max(side.live) * 1000
                    print(
                        f"| {length:g} s | {count} | {side.name} | {rate:.3g} | {median:.0f} ms | {late:.0f} ms"
                        f" | {1000 * side.worked / len(side.took):.1f} ms | {live:.0f} ms |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
