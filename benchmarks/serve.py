"""Measure `ced serve` under load: requests a second and how long they take, by clients at once.

Run as `python benchmarks/serve.py` (some minutes on two cores). The sounds are generated, the weights random.

    load      clients that ask again as soon as they have their answer, over loopback, for clips of 1 and 10 s; with one
              client, requests are answered one at a time
    together  the same waves from 16 threads, to the model as the server shares it and to the model itself, by as many
              threads as there are jobs: what it brings to score short waves together

Sides take turns, and rates are medians of rounds; percentiles are of all requests of a side.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch

from ced.machine import cores
from ced.model.graph.export import export
from ced.model.loading import weights_of
from ced.model.runtime import OnnxModel
from ced.model.vit import CED
from ced.model.zoo import MODELS
from ced.tag.together import SharedModel

RATE = 16_000
PATH = "/v1/audio/classification"
THREADS = 16  # that ask for waves


@contextmanager
def serving(graph: Path, jobs: int, waiting: int) -> Iterator[int]:
    """Run a server, and give its port."""
    words = ["-m", str(graph), "--port", "0", "-j", str(jobs), "--queue", str(waiting)]
    with subprocess.Popen([sys.executable, "-m", "ced", "serve", *words], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = re.search(r"http://127.0.0.1:(\d+)", process.stderr.readline())
        if said is None:
            raise SystemExit(f"the server does not begin: {process.stderr.read()}")
        try:
            yield int(said[1])
        finally:
            process.terminate()


def sound(seconds: float) -> bytes:
    """Return a file of noise, 16-bit FLAC."""
    held = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * RATE))
    soundfile.write(held, wave, RATE, format="FLAC", subtype="PCM_16")
    return held.getvalue()


def client(port: int, body: bytes, until: float) -> list[float]:
    """Ask until a time, over one connection; return the seconds that each answer took."""
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


def load(graph: Path, jobs: int, counts: list[int], rounds: int, seconds: float) -> None:
    """Print requests a second and percentiles for each number of clients."""
    print("| clip | clients | requests/s | times one at a time | median | 99th percentile |\n|---|---|---|---|---|---|")
    with serving(graph, jobs, max(counts)) as port, ThreadPoolExecutor(max(counts)) as pool:
        for length in (1, 10):
            body = sound(length)
            client(port, body, time.perf_counter() + 1)
            rates: dict[int, list[float]] = {count: [] for count in counts}
            took: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(rounds):
                for count in counts:
                    begin = time.perf_counter()
                    clients = [pool.submit(client, port, body, begin + seconds) for _ in range(count)]
                    answers = [each for one in clients for each in one.result()]
                    rates[count].append(len(answers) / (time.perf_counter() - begin))
                    took[count] += answers
            for count in counts:
                rate = statistics.median(rates[count])
                ratio = statistics.median(many / one for many, one in zip(rates[count], rates[counts[0]], strict=True))
                median, late = np.percentile(took[count], [50, 99]) * 1000
                print(
                    f"| {length} s | {count} | {rate:.3g} | {ratio:.2f} | {median:.0f} ms | {late:.0f} ms |", flush=True
                )


def together(graph: Path, jobs: int, rounds: int) -> None:
    """Print waves a second, scored together and one by one."""
    print("| wave | together | one by one | times |\n|---|---|---|---|")
    model = OnnxModel(graph)
    shared = SharedModel(model, jobs)
    with ThreadPoolExecutor(THREADS) as askers, ThreadPoolExecutor(jobs) as workers:
        for length, count in ((1, 128), (2, 64), (5, 32), (10, 32)):
            waves = np.random.default_rng(0).uniform(-0.1, 0.1, (count, 1, length * RATE)).astype(np.float32)
            sides: dict[str, Callable[[], object]] = {
                "together": lambda waves=waves: list(askers.map(lambda wave: shared.ask("__call__", wave), waves)),  # type: ignore[misc]
                "one by one": lambda waves=waves: list(workers.map(model, waves)),  # type: ignore[misc]
            }
            rates: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(rounds + 1):
                for side, work in sides.items():
                    begin = time.perf_counter()
                    work()
                    rates[side].append(count / (time.perf_counter() - begin))
            both, single = (rates[side][1:] for side in sides)
            ratio = statistics.median(many / one for many, one in zip(both, single, strict=True))
            print(
                f"| {length} s | {statistics.median(both):.3g}/s | {statistics.median(single):.3g}/s | {ratio:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name.startswith("ced")], default="ced_tiny")
    parser.add_argument("--only", nargs="+", choices=["load", "together"], default=["load", "together"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="the first is compared with")
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each side of a round")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "model.onnx")
        export(weights_of(CED(MODELS[given.model].config).eval()), graph)
        if "load" in given.only:
            load(graph, given.jobs, given.clients, given.rounds, given.seconds)
        if "together" in given.only:
            together(graph, given.jobs, given.rounds)


if __name__ == "__main__":
    main()
