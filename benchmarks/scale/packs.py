"""The parts `table` and `store`: tables of packs, and epochs of view stores.

    table   the table of a pack, in files of 50,000 clips: open it, read the first clip, which finds all clips of its
            file, find every clip by its name, and cut the clips into chunks
    store   an epoch of a view store, k = 20: write it, open the store, and read the epoch

Memory is the peak of resident memory above what the process had after importing its modules and making its input.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.scale.costs import Work, of_work
from benchmarks.scale.results import Row

PER_FILE, TOPK = 50_000, 20
SAMPLES = 160  # of a packed clip: short, as only the number of clips matters
CHUNK = 10.0  # seconds


def clip_name(clip: int) -> str:
    return f"Y{clip:011d}_30.000.wav"


def table_part(folder: Path, clips: int) -> Iterator[Row]:
    """Measure the table of a pack."""
    table = folder / "labels" / "large.tsv"
    yield Row.of("write the table and one file", clips, of_work(prepare_table, folder, clips))
    yield Row.of("open the table", clips, of_work(prepare_opening, table))
    yield Row.of("read the first clip", clips, of_work(prepare_first_read, table))
    yield Row.of("find all clips by name", clips, of_work(prepare_finding, table))
    yield Row.of("cut all clips into chunks", clips, of_work(prepare_cutting, clips))


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


def store_part(folder: Path, views: int) -> Iterator[Row]:
    """Measure an epoch of a view store."""
    yield Row.of("write an epoch", views, of_work(prepare_writing, folder, views))
    yield Row.of("open the store", views, of_work(prepare_store, folder))
    yield Row.of("read the epoch", views, of_work(prepare_reading, folder))


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
