"""Extrapolate to whole corpora: machine hours and money, from the measurements, docs/performance.md and prices."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scale import sounds
from benchmarks.scale.results import Part, Results
from ced.model.config import ModelConfig
from ced.model.zoo import MODELS
from scripts.draw_taggers import multiply_adds

WINDOW = 10.0  # seconds
SIZES = ("tiny", "mini", "small", "base")


@dataclass(frozen=True)
class Corpus:
    """Sounds to be tagged."""

    name: str
    files: float
    seconds: float  # of each

    @property
    def hours(self) -> float:
        """Hours of sound."""
        return self.files * self.seconds / 3600

    @property
    def windows(self) -> float:
        """Windows of ten seconds."""
        return self.files * self.seconds / WINDOW


CORPORA = (Corpus("AudioSet", 2.1e6, 10), Corpus("1 M hours", 1e6, 3600))


@dataclass(frozen=True)
class Rates:
    """What the measurements say about a unit of work.

    Attributes:
        file: processor seconds of a file beside its decoding and its model, with a small share of both.
        decode: processor seconds of an hour of compressed stereo sound.
        overhead: the share of processor time that a cluster adds.
        flac, opus: bytes of an hour of sound.
        line: bytes of the tags of a file with one window.
        tags: bytes of the tags of each further window.
    """

    file: float
    decode: float
    overhead: float
    flac: float
    opus: float
    line: float
    tags: float


def rates(results: Results) -> Rates | None:
    """Return the rates, or None while a part is missing."""
    if not {"files", "hours", "ray"} <= results.parts.keys():
        return None
    files, hours = (results.parts[name] for name in ("files", "hours"))
    file, opus, flac, long = (
        files.largest(sounds.TAG),
        hours.largest(sounds.OPUS),
        hours.largest(sounds.DECODE),
        hours.largest(sounds.TAG),
    )
    assert file.bytes is not None
    assert opus.bytes is not None
    assert flac.bytes is not None
    assert long.bytes is not None
    return Rates(
        file.processor / file.size,
        opus.processor / opus.size,
        processor_overhead(results.parts["ray"]),
        flac.bytes / flac.size,
        opus.bytes / opus.size,
        file.bytes / file.size,
        long.bytes / (long.size * 3600 / WINDOW),
    )


def per_clip(part: Part, side: str) -> tuple[float, float, float]:
    """Return the start of a side in seconds, and its seconds and processor seconds for each clip beyond the few."""
    few, *_, whole = part.of(side)
    more = whole.size - few.size
    return few.seconds, (whole.seconds - few.seconds) / more, (whole.processor - few.processor) / more


def gain(part: Part) -> float:
    """Return how many times as fast as one worker two are."""
    return per_clip(part, sounds.RAY[1])[1] / per_clip(part, sounds.RAY[2])[1]


def overheads(part: Part) -> dict[int, float]:
    """Return the share of time that Ray adds to `ced tag`, by the number of workers."""
    return {
        workers: per_clip(part, side)[1] / per_clip(part, sounds.PLAIN[workers])[1] - 1
        for workers, side in sounds.RAY.items()
    }


def processor_overhead(part: Part) -> float:
    """Return the share of processor time that Ray with two workers adds to `ced tag` with two threads."""
    return per_clip(part, sounds.RAY[2])[2] / per_clip(part, sounds.PLAIN[2])[2] - 1


def model_times(performance: Path) -> list[dict[str, float]]:
    """Return the milliseconds of ten seconds on one core, by size, for each processor of docs/performance.md."""
    page = performance.read_text(encoding="utf-8")
    found: list[dict[str, float]] = []
    for table in re.findall(r"^\| model \| clip \|.*\n(?:\|.*\n)+", page, re.M):
        header, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        column = header.index("ONNX graph")
        found.append({cells[0]: float(cells[column].split()[0]) for cells in lines if cells[1] == "10 s"})
    return found


def computing(results: Results, performance: Path) -> Iterator[list[str]]:
    """Yield the rows of the table of machine hours and money, without its header."""
    found, prices = rates(results), results.prices
    times = model_times(performance)
    if found is None:
        return
    for corpus in CORPORA:
        host = (corpus.files * found.file + corpus.hours * found.decode) * (1 + found.overhead) / 3600  # core hours
        for size in SIZES:
            model = [corpus.windows * each[size] / 1000 * (1 + found.overhead) / 3600 for each in times]
            slow, fast = max(host + each for each in model), min(host + each for each in model)
            entry = MODELS[f"ced_{size}"]
            operations = 2e9 * multiply_adds(ModelConfig(embed_dim=entry.width, num_heads=entry.heads))
            on_gpu = corpus.windows * operations / (prices.gpu_tflops * 1e12) / 3600
            gpu = max(on_gpu, host / prices.host_cores)
            yield [
                corpus.name,
                f"`ced_{size}`",
                f"{_round(fast)} to {_round(slow)}",
                f"{_round(fast / prices.cores / 24)} to {_round(slow / prices.cores / 24)}",
                f"{_round(fast * prices.core_hour)} to {_round(slow * prices.core_hour)}",
                f"{_round(gpu)} ({'decoding' if gpu > on_gpu else 'model'})",
                _round(gpu * prices.gpu_hour),
            ]


def storing(results: Results) -> Iterator[list[str]]:
    """Yield the rows of the table of storage, without its header."""
    found, prices = rates(results), results.prices
    if found is None:
        return
    for corpus in CORPORA:
        for name, bytes in (
            ("FLAC, 16 kHz, mono", found.flac * corpus.hours),
            ("Opus, 48 kHz, stereo", found.opus * corpus.hours),
            ("tags of the default options", corpus.files * found.line + (corpus.windows - corpus.files) * found.tags),
        ):
            size = bytes / 1e9
            month, egress = size * prices.storage_gb_month, size * prices.egress_gb
            yield [corpus.name, name, _round(size), _round(month), _round(egress)]


def _round(value: float) -> str:
    """Return a number with two digits that count, as an extrapolation has no more."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
