"""Measure what millions of clips cost: time and memory of tables, packs and view stores.

Run from the root of the repository as `python -m benchmarks.scale` (some minutes), or with the names of parts. Parts:

    table   the table of a pack of 2,000,000 clips, in files of 50,000 clips: open it, read the first clip, which finds
            all clips of its file, find every clip by its name, and cut the clips into chunks
    store   an epoch of a view store of 2,000,000 views, k = 20: write it, open the store, and read the epoch

Each measurement has a process of its own. Columns: elapsed seconds, processor seconds, and the peak of resident memory
above what the process had after importing its modules and making its input.
"""

import argparse
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

CLIPS, PER_FILE, TOPK = 2_000_000, 50_000, 20
SAMPLES = 160  # of a packed clip: short, as only the number of clips matters
CHUNK = 10.0  # seconds

Work = Callable[[], object]  # what is measured


@dataclass(frozen=True)
class Cost:
    """What a piece of work took."""

    seconds: float
    processor: float  # seconds
    memory: float  # MB


def measured(prepare: Callable[..., Work], *arguments: Any) -> Cost:
    """Return the cost of the work that `prepare` returns, in a process of its own; preparing is not counted."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        cost: Cost = receiver.recv()
    except EOFError as error:
        raise SystemExit(f"{prepare.__name__} failed; its own message is above") from error
    process.join()
    return cost


def _measure(sender: Connection, prepare: Callable[..., Work], arguments: Iterable[Any]) -> None:
    work = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    result = work()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    sender.send(Cost(seconds, processor, _status("VmHWM") - before))
    del result


def _status(name: str) -> float:
    """Return a figure of this process in MB: VmRSS, its resident memory, or VmHWM, the peak of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def clip_name(clip: int) -> str:
    return f"Y{clip:011d}_30.000.wav"


def table_part(folder: Path, clips: int) -> Iterator[tuple[str, Cost]]:
    """Measure the table of a pack."""
    table = folder / "labels" / "large.tsv"
    yield "write the table and one file", measured(prepare_table, folder, clips)
    yield "open the table", measured(prepare_opening, table)
    yield f"read the first clip of {min(clips, PER_FILE):,}", measured(prepare_first_read, table)
    yield "find all clips by name", measured(prepare_finding, table)
    yield "cut all clips into chunks", measured(prepare_cutting, clips)


def prepare_table(folder: Path, clips: int) -> Work:
    """Return the writing of a pack's table and of its first file; the other files are links to that one."""
    from ced.distill.pack_format import PackSettings, write_file
    from ced.sound.tables import write_table

    def write() -> None:
        (folder / "hdf5").mkdir()
        files = [folder / "hdf5" / f"large_{number}.h5" for number in range(-(-clips // PER_FILE))]
        names = [f"/data/audioset/unbalanced_train/wavs/{clip_name(clip)}" for clip in range(clips)]
        labels = [f"{clip % 527};{clip * 7 % 527};{clip // 527 % 527}" for clip in range(clips)]
        paths = [str(files[clip // PER_FILE]) for clip in range(clips)]
        write_table(folder / "labels" / "large.tsv", {"filename": names, "labels": labels, "hdf5path": paths})
        wave = np.arange(SAMPLES, dtype=np.int16)
        settings = PackSettings("int16", stereo=False, fullname=False)
        for _ in write_file(files[0], names[:PER_FILE], (wave for _ in names[:PER_FILE]), settings):
            pass
        for file in files[1:]:
            os.link(files[0], file)

    return write


def prepare_opening(table: Path) -> Work:
    from ced.distill.pack_reader import AudioPack

    return lambda: AudioPack(table)


def prepare_first_read(table: Path) -> Work:
    from ced.distill.pack_reader import AudioPack

    pack = AudioPack(table)
    return lambda: pack.read(0, 0, SAMPLES)


def prepare_finding(table: Path) -> Work:
    from ced.distill.pack_reader import AudioPack

    pack = AudioPack(table)
    names = pack.names()
    return lambda: pack.find(names)


def prepare_cutting(clips: int) -> Work:
    from ced.distill.dataset import cut_chunks

    lengths = np.random.default_rng(0).integers(1, 320_000, clips)
    return lambda: cut_chunks(lengths, CHUNK)


def store_part(folder: Path, views: int) -> Iterator[tuple[str, Cost]]:
    """Measure an epoch of a view store."""
    yield "write an epoch", measured(prepare_writing, folder, views)
    yield "open the store", measured(prepare_store, folder)
    yield "read the epoch", measured(prepare_reading, folder)


def prepare_writing(folder: Path, views: int) -> Work:
    from ced.distill.view_store import Rows, StoreMeta, epoch_seeds, write_meta, write_part
    from ced.distill.views import ViewRecipe

    write_meta(folder, StoreMeta(ViewRecipe(), TOPK, 527, CHUNK, ("teacher",), seed=42, world_size=1, rows=views))
    rng = np.random.default_rng(0)
    rows = Rows(
        values=np.sort(rng.random((views, TOPK), np.float32), axis=1)[:, ::-1].astype(np.float16),
        indexes=rng.integers(527, size=(views, TOPK), dtype=np.int16),
        seeds=epoch_seeds(42, 1, views),
        filenames=np.array([clip_name(clip) for clip in range(views)], dtype=object),
        starts=np.zeros(views, np.float32),
        ends=np.full(views, CHUNK, np.float32),
    )
    return lambda: write_part(folder, 1, 0, rows)


def prepare_store(folder: Path) -> Work:
    from ced.distill.view_store import ViewStore

    return lambda: ViewStore(folder)


def prepare_reading(folder: Path) -> Work:
    from ced.distill.view_store import ViewStore

    store = ViewStore(folder)
    return lambda: store.rows(1)


PARTS: dict[str, Callable[[Path, int], Iterator[tuple[str, Cost]]]] = {"table": table_part, "store": store_part}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of the table, views of the store (%(default)s)")
    given = parser.parse_args(words)
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    print("| part | work | seconds | processor s | MB |\n|---|---|---|---|---|")
    for part in given.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for work, cost in PARTS[part](Path(folder), given.clips):
                figures = f"{cost.seconds:.2f} | {cost.processor:.2f} | {cost.memory:.0f}"
                print(f"| {part} | {work} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
