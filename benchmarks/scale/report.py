"""Write the results: the tables of docs/scale.md between their markers, and the plot docs/scale.svg."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.scale import estimate, sounds
from benchmarks.scale.results import JSON, Part, Results, Row, read
from ced.files import written_aside

PAGE, PLOT, PERFORMANCE = "scale.md", "scale.svg", "performance.md"
MISSING = "Not measured yet."
_CURVES = ("files", "hours", "table", "store")


def write(out: Path) -> None:
    """Rewrite the page and the plot of a folder from its file of results."""
    results = read(out / JSON)
    if any(name in results.parts for name in _CURVES):
        _draw(results, out / PLOT)
    text = page(results, (out / PAGE).read_text(encoding="utf-8"), out / PERFORMANCE)
    with written_aside(out / PAGE) as aside:
        aside.write_text(text, encoding="utf-8")


def page(results: Results, text: str, performance: Path) -> str:
    """Return the text of the page with its tables replaced by those of the results."""
    blocks: dict[str, str] = {
        "plot": f"![time and memory against size]({PLOT})" if set(_CURVES) & results.parts.keys() else MISSING,
        **{name: _block(results.parts.get(name), rows) for name, rows in _TABLES.items()},
        "assumptions": "\n".join(_assumptions(results)) or MISSING,
        "computing": _computing(results, performance),
        "storage": _storage(results),
    }
    for name, block in blocks.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda found: f"{found[1]}{block}\n{found[2]}", text, flags=re.S)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for the table {name}; it must have one")
    return text


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _block(part: Part | None, table: Callable[[Part], str]) -> str:
    if part is None:
        return MISSING
    about = f"{part.machine}; {part.date}, load {part.load:g}. {part.input}".strip()
    return f"{about}\n\n{table(part)}"


def _files(part: Part) -> str:
    works = [sounds.RESUME, *sounds.COMBINED.values()]
    header = ["files", "ms a file", "processor, ms a file", "peak, MB", "journal, bytes a file"]
    header += [f"{work}, s | peak, MB" for work in works]
    rows = []
    for row in part.of(sounds.TAG):
        others = [each for work in works for each in part.of(work) if each.size == row.size]
        rows.append(
            [
                f"{row.size:,.0f}",
                f"{1000 * row.seconds / row.size:.2f}",
                f"{1000 * row.processor / row.size:.2f}",
                _memory(row),
                f"{(row.bytes or 0) / row.size:.0f}",
                *(f"{each.seconds:.1f} | {_memory(each)}" for each in others),
            ]
        )
    header = " | ".join(header).split(" | ")
    return _table(header, rows)


def _hours(part: Part) -> str:
    header = ["work", "hours", "s an hour", "times real time", "processor, s an hour", "peak, MB", "file, MB an hour"]
    rows = [
        [
            row.work,
            f"{row.size:g}",
            f"{row.seconds / row.size:.2f}",
            f"{3600 * row.size / row.seconds:,.0f}",
            f"{row.processor / row.size:.2f}",
            _memory(row),
            f"{(row.bytes or 0) / row.size / 1e6:.2f}",
        ]
        for work in part.works
        for row in part.of(work)
    ]
    return _table(header, rows)


def _packs(part: Part) -> str:
    header = ["work", *(f"{size:,.0f}: processor, s | MB" for size in part.sizes)]
    rows = []
    for work in part.works:
        by_size = {row.size: row for row in part.of(work)}
        cells = [
            f"{by_size[size].processor:.2f} | {_memory(by_size[size])}" if size in by_size else " | "
            for size in part.sizes
        ]
        rows.append([work, *cells])
    return _table(" | ".join(header).split(" | "), rows)


def _ray(part: Part) -> str:
    header = ["", "start, s", "clips/s", "processor, ms a clip"]
    rows = []
    for side in (*sounds.PLAIN.values(), *sounds.RAY.values()):
        start, seconds, processor = estimate.per_clip(part, side)
        rows.append([side, f"{start:.1f}", f"{1 / seconds:.1f}", f"{1000 * processor:.1f}"])
    found = estimate.overheads(part)
    return (
        f"{_table(header, rows)}\n\nTwo workers are {estimate.gain(part):.2f} times as fast as one (aim: 1.8). Against "
        f"`ced tag`, Ray takes {100 * found[1]:+.0f} % time with one worker and {100 * found[2]:+.0f} % with two (aim: "
        f"at most +15 %), and {100 * estimate.processor_overhead(part):+.0f} % processor time with two."
    )


_TABLES: dict[str, Callable[[Part], str]] = {
    "files": _files,
    "hours": _hours,
    "table": _packs,
    "store": _packs,
    "ray": _ray,
}


def _memory(row: Row) -> str:
    return "" if row.memory is None else f"{row.memory:.0f}"


def _assumptions(results: Results) -> Iterator[str]:
    found, prices = estimate.rates(results), results.prices
    if found is None:
        return
    yield f"- A file takes {1000 * found.file:.2f} ms of a core beside its model: the row of most files above."
    yield (
        f"- An hour of compressed sound takes {found.decode:.1f} s of a core to decode, resample and mix: the row of "
        "Opus above. Files of 16 kHz and one channel take less."
    )
    yield (
        "- The model takes the time of the ONNX graph for 10 s in [performance.md](performance.md#tagging), one core, "
        "float32; the two figures of a range are its two processors."
    )
    yield f"- A cluster adds {100 * found.overhead:.0f} % processor time: Ray with two workers above."
    yield (
        f"- **Not measured:** a GPU sustains {prices.gpu_tflops:g} TFLOP/s on these networks, and has a host of "
        f"{prices.host_cores} cores, which decode meanwhile; the longer of both counts and is named."
    )
    yield (
        f"- Prices are typical on-demand list prices of {prices.date}, rounded, in {prices.currency}: a core hour "
        f"{prices.core_hour:g}, an hour of a GPU with its host {prices.gpu_hour:g}, a GB stored for a month "
        f"{prices.storage_gb_month:g}, a GB of egress {prices.egress_gb:g}. Nothing is idle, and nothing is repeated; "
        "sounds arrive as fast as they are decoded."
    )


def _computing(results: Results, performance: Path) -> str:
    prices = results.prices
    rows = list(estimate.computing(results, performance))
    header = [
        "corpus",
        "model",
        "core hours",
        f"days of {prices.cores} cores",
        f"{prices.currency}, cores",
        "GPU hours (limit)",
        f"{prices.currency}, GPU",
    ]
    return _table(header, rows) if rows else MISSING


def _storage(results: Results) -> str:
    currency = results.prices.currency
    rows = list(estimate.storing(results))
    header = ["corpus", "what", "GB", f"{currency} a month", f"{currency}, egress once"]
    return _table(header, rows) if rows else MISSING


def _draw(results: Results, path: Path) -> None:
    """Draw time, above, and memory, below, against size, for the parts that are measured."""
    from scripts.drawing import figure

    shown = [name for name in _CURVES if name in results.parts]
    units = {"files": "files", "hours": "hours", "table": "clips", "store": "views"}
    with figure(path, 3.2 * len(shown), 6, rows=2, columns=len(shown)) as axes:
        for place, name in enumerate(shown):
            time, memory = axes[place], axes[place + len(shown)]
            part, scale = results.parts[name], 1000 if name == "files" else 1 if name == "hours" else 1e6
            for work in part.works:
                rows = part.of(work)
                time.plot(
                    [row.size for row in rows], [scale * row.processor / row.size for row in rows], "o-", label=work
                )
                memory.plot([row.size for row in rows], [row.memory or 0 for row in rows], "o-", label=work)
            unit = {1000: "ms a file", 1: "s an hour", 1e6: "µs each"}[scale]
            time.set(title=name, xscale="log", ylabel=f"processor time, {unit}")
            memory.set(xscale="log", ylabel="peak memory, MB", xlabel=units[name])
            for one in (time, memory):
                one.set_ylim(bottom=0)
                one.grid(alpha=0.3)
            time.legend(fontsize=7)
