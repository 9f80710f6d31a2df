"""The part `ray`: a folder of clips tagged on one machine, by `ced tag` and by `ced tag --ray`.

Four sides take turns: `ced tag` with one and with two threads, and a Ray cluster of this machine with one and with two
workers. Each tags a few clips, then all of them, in processes of its own. What the larger run takes beyond the smaller
is the rate; what the smaller takes is mostly the start: of Python, of Ray, of workers and models. Seconds and processor
seconds are medians over rounds; the processor time is that of all processes together, with Ray's own.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.scale.costs import Cost, of_processes
from benchmarks.scale.results import Row
from benchmarks.scale.sounds import Wave, tagging, write_files

PLAIN = {1: "ced tag -j 1", 2: "ced tag -j 2"}
RAY = {1: "Ray, 1 worker", 2: "Ray, 2 workers"}
FEW = 16  # clips
SECONDS = 5.0  # of a clip


def options(side: str) -> list[str]:
    """Return the options of a side; both write Parquet."""
    for workers, name in PLAIN.items():
        if side == name:
            return ["--jobs", str(workers), "--format", "parquet", "--combine"]
    (workers,) = (workers for workers, name in RAY.items() if side == name)
    return ["--ray", "auto", "--workers", str(workers)]


def ray_part(folder: Path, clips: int, sounds: Sequence[Wave], model: str, rounds: int) -> Iterator[Row]:
    """Measure all sides, each with few clips and with all of them."""
    found: dict[tuple[str, int], list[Cost]] = {}
    for count in (FEW, clips):
        write_files(folder / f"{count}", sounds, count, SECONDS)
    for number in range(rounds):
        for side in (*PLAIN.values(), *RAY.values()):
            for count in (FEW, clips):
                out = folder / f"out-{number}-{count}-{side}"
                cost = of_processes(tagging(folder / f"{count}", out, model, *options(side)))
                found.setdefault((side, count), []).append(cost)
    for (side, count), costs in found.items():
        seconds = statistics.median(cost.seconds for cost in costs)
        processor = statistics.median(cost.processor for cost in costs)
        yield Row.of(side, count, Cost(seconds, processor, None))
