"""Measure growth curves: `python -m benchmarks.scale PART...`, from the root of the repository.

    files    `ced tag` of 1,000, 10,000 and 100,000 files of one second
    hours    `ced tag` of a file of 1, 4, 12 and 24 hours
    table    the table of a pack of 20,000, 200,000 and 2,000,000 clips
    store    an epoch of a view store of as many views
    ray      a Ray cluster of this machine with one and two workers, against `ced tag`
    report   nothing is measured: only the page and the plot are written again, after scale.json was edited

Each measurement is made in processes of its own and goes into scale.json of the folder `--out`, where it replaces the
one of the same part, work and size; the page and the plot there are rewritten at the end. Stop other work meanwhile.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.scale import packs, report, results, sounds
from benchmarks.scale.results import Row
from benchmarks.scale.sounds import Wave

ROOT = Path(__file__).parents[2]
SIZES: dict[str, list[float]] = {
    "files": [1_000, 10_000, 100_000],
    "hours": [1, 4, 12, 24],
    "table": [20_000, 200_000, 2_000_000],
    "store": [20_000, 200_000, 2_000_000],
    "ray": [4_800],
}
MODEL, RANDOM = "esc10", "ced_tiny"
_PACKS = ("table", "store")  # parts without sounds


def measure(name: str, size: float, folder: Path, waves: Sequence[Wave], model: str, rounds: int) -> Iterator[Row]:
    """Measure a part at one size."""
    if name == "table":
        return packs.table_part(folder, int(size))
    if name == "store":
        return packs.store_part(folder, int(size))
    if name == "files":
        return sounds.files_part(folder, int(size), waves, model)
    if name == "hours":
        return sounds.hours_part(folder, size, waves, model)
    return sounds.ray_part(folder, int(size), waves, model, rounds)


def run(name: str, model: str, about: str, waves: Sequence[Wave], given: argparse.Namespace) -> None:
    """Measure a part, and add it to the file of results after each size."""
    path: Path = given.out / results.JSON
    for size in given.sizes or SIZES[name]:
        part, rows = results.part_here(about), []
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            for row in measure(name, size, Path(folder), waves, model, given.rounds):
                memory = "" if row.memory is None else f", {row.memory:.0f} MB"
                print(
                    f"{name} {row.size:g}: {row.work}: {row.seconds:.2f} s, processor {row.processor:.2f} s{memory}",
                    flush=True,
                )
                rows.append(row)
        everything = results.read(path)
        everything.add(name, part, rows)
        results.write(path, everything)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", metavar="PART", choices=[*SIZES, "report"])
    parser.add_argument("--sizes", nargs="+", type=float, help="instead of those above; of ray: clips (4,800)")
    parser.add_argument("--data", type=Path, help="a folder of sounds of 5 s or more (default: generated ones)")
    parser.add_argument("--model", help=f"(default: {MODEL}; of ray a {RANDOM} with random weights)")
    parser.add_argument("--rounds", type=int, default=3, help="of ray (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="the folder of the results")
    parser.add_argument("--work", type=Path, help="a folder for sounds and outputs, up to 6 GB (default: temporary)")
    given = parser.parse_args(words)
    parts = [name for name in given.parts if name != "report"]
    waves: Sequence[Wave] = []
    if set(parts) - set(_PACKS):
        waves = sounds.real_sounds(given.data) if given.data else sounds.generated_sounds()
    source = "Recordings" if given.data else "Generated sounds"
    for name in parts:
        if name in _PACKS:
            run(name, "", "", waves, given)
        elif name == "ray" and given.model is None:
            from benchmarks.tag_files import models

            with models(RANDOM) as paths:
                run(name, str(paths["ced tag"]), f"{source}; {RANDOM} with random weights.", waves, given)
        else:
            model = given.model or MODEL
            run(name, model, f"{source}; {Path(model).name}.", waves, given)
    report.write(given.out)


if __name__ == "__main__":
    main()
