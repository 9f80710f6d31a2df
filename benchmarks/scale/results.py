"""The file of results, docs/scale.json: what was measured, by part, and the prices of the extrapolation."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.scale.costs import Cost
from ced.files import written_aside

JSON = "scale.json"
_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI"}  # that matter for speed


@dataclass(frozen=True)
class Row:
    """A measurement."""

    work: str
    size: float  # files, hours, clips
    seconds: float
    processor: float  # seconds
    memory: float | None = None  # MB
    bytes: int | None = None  # of the file that is written or read, if it is part of the figures

    @classmethod
    def of(cls, work: str, size: float, cost: Cost, bytes: int | None = None) -> "Row":
        """Round the figures of a measurement."""
        memory = None if cost.memory is None else round(cost.memory, 1)
        return cls(work, size, round(cost.seconds, 3), round(cost.processor, 3), memory, bytes)


@dataclass
class Part:
    """The measurements of a part, all on one machine."""

    machine: str
    date: str
    load: float  # mean number of running processes in the minute before the last measurement began
    input: str  # what was tagged, and with which model
    rows: list[Row] = field(default_factory=list)

    def of(self, work: str) -> list[Row]:
        """Return the measurements of one kind of work, by size."""
        return sorted((row for row in self.rows if row.work == work), key=lambda row: row.size)

    def largest(self, work: str) -> Row:
        """Return the measurement of the largest size."""
        return self.of(work)[-1]

    @property
    def sizes(self) -> list[float]:
        """The sizes, ascending."""
        return sorted({row.size for row in self.rows})

    @property
    def works(self) -> list[str]:
        """The kinds of work, in the order of their first measurement."""
        return list(dict.fromkeys(row.work for row in self.rows))


@dataclass(frozen=True)
class Prices:
    """Assumptions of the extrapolation; typical on-demand list prices, rounded. Edit them in the file of results."""

    date: str = "2025"
    currency: str = "US$"
    core_hour: float = 0.05
    gpu_hour: float = 3.0  # of a data-centre GPU with its host
    host_cores: int = 16  # that come with a GPU
    gpu_tflops: float = 20.0  # sustained, of one GPU: assumed, not measured
    storage_gb_month: float = 0.023
    egress_gb: float = 0.09
    cores: int = 64  # of the machines for which days are given


@dataclass
class Results:
    """All measurements so far."""

    prices: Prices = field(default_factory=Prices)
    parts: dict[str, Part] = field(default_factory=dict)

    def add(self, name: str, about: Part, rows: Sequence[Row]) -> None:
        """Add measurements; they replace those of the same work and size, and all of another machine or input."""
        before = self.parts.get(name)
        if before is not None and (before.machine, before.input) == (about.machine, about.input):
            again = {(row.work, row.size) for row in rows}
            about.rows = [row for row in before.rows if (row.work, row.size) not in again]
        about.rows += rows
        self.parts[name] = about


def read(path: Path) -> Results:
    """Read the file of results; without one, nothing has been measured."""
    return TypeAdapter(Results).validate_json(path.read_bytes()) if path.exists() else Results()


def write(path: Path, results: Results) -> None:
    """Write the file of results."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")


def part_here(about: str) -> Part:
    """Return a part without measurements yet, of this machine and now."""
    return Part(machine(), time.strftime("%Y-%m-%d"), round(os.getloadavg()[0], 1), about)


def machine() -> str:
    """Return the processor of this machine, its instruction sets that matter, and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = (line.partition(":") for line in reversed(lines))
    found = {key.strip(): value.strip() for key, _, value in pairs}
    flags = [name for flag, name in _FLAGS.items() if flag in found.get("flags", "").split()]
    kinds = f" ({', '.join(flags)})" if flags else ""
    return f"{found.get('model name', 'unknown processor')}{kinds}, {len(os.sched_getaffinity(0))} cores"
