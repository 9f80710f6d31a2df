"""Measure what Ray costs, and what a second worker gains: a folder of clips on one machine, plain and as a cluster.

Run as `python benchmarks/cluster.py FOLDER` (some minutes on two cores). Four sides take turns, each in processes of
its own: `ced tag` with one and with two threads, and a Ray cluster of this machine with one and with two workers. Each
tags a few clips of the folder, then all of it. Printed are medians of

    start   seconds for the few clips: of Python, of Ray, of workers and models
    rate    clips a second beyond these
    cpu     milliseconds of processor time for each clip beyond these, of all processes together
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil

from ced.tag.batch import tag_to_folder
from ced.tag.inputs import InputSound, find_inputs
from ced.tag.options import TagOptions
from ced.tag.records import Record
from ced.tag.tagger import Tagger

SIDES = {
    "ced tag -j 1": (False, 1),
    "ced tag -j 2": (False, 2),
    "Ray, 1 worker": (True, 1),
    "Ray, 2 workers": (True, 2),
}
OPTIONS = TagOptions()
FEW = 16  # clips


class ProcessorTime(Thread):
    """Adds up the processor time of this process and of all that it starts, also of those that have ended."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._found: dict[tuple[int, float], float] = {}

    def run(self) -> None:
        """Look a few times a second."""
        while True:
            self.seconds()
            time.sleep(0.2)

    def seconds(self) -> float:
        """Return the seconds so far."""
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._found[process.pid, process.create_time()] = times.user + times.system
        return sum(self._found.values())


def tag(on_ray: bool, workers: int, model: str, inputs: list[InputSound], out: Path) -> None:
    if on_ray:
        from ced.integrations import ray

        ray.connect(silent=True)
        work = ray.Tagging(ray.Model(model), OPTIONS)
        ray.run(inputs, work, out, settings={}, workers=workers)
        return
    with Tagger(model, jobs=workers) as tagger:

        def process(item: InputSound) -> Record:
            return tagger.tag(item.source, OPTIONS, name=item.name)

        tag_to_folder(inputs, process, out, settings={}, output=["parquet"], combined=True, jobs=workers)


def measured(side: str, folder: Path, model: str, clips: int) -> tuple[float, float]:
    """Tag some clips in a process of its own; return seconds, and seconds of processor time."""
    command = [sys.executable, __file__, str(folder), "--model", model, "--side", side, "--clips", str(clips)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return time.perf_counter() - began, float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of clips")
    parser.add_argument("--model", default="ced_mini", help="a name or a path")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--clips", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    inputs = find_inputs([str(arguments.folder)])
    if arguments.side:
        used = ProcessorTime()
        used.start()
        with tempfile.TemporaryDirectory() as out:
            tag(*SIDES[arguments.side], arguments.model, inputs[: arguments.clips], Path(out))
            print(used.seconds())
        return
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, rounds in found.items():
            start, few = measured(side, arguments.folder, arguments.model, FEW)
            whole, all_of_it = measured(side, arguments.folder, arguments.model, len(inputs))
            more = len(inputs) - FEW
            rounds.append((start, more / (whole - start), 1000 * (all_of_it - few) / more))
            print(side, *(f"{value:.2f}" for value in rounds[-1]), file=sys.stderr, flush=True)
    print(f"{'':16}{'start s':>10}{'clips/s':>10}{'cpu ms':>10}")
    for side, rounds in found.items():
        print(f"{side:16}" + "".join(f"{statistics.median(values):10.2f}" for values in zip(*rounds, strict=True)))


if __name__ == "__main__":
    main()
