"""Measure training, packing and storing against plain versions of the same work, alternating in one run.

Run as `python benchmarks/distill.py` (about ten minutes on two cores; `--only NAME ...` for a part). Each pair
alternates; figures are medians, and the ratio is what carries to another machine. The sounds are generated, the
weights random.

`--only reading` has tables of its own: what training reads from a pack, and how fast this disk delivers it, with a cold
and a warm page cache (`--folder` chooses the disk).
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from ced.config import Mode, StoreConfig, check
from ced.distill import targets, views
from ced.distill.dataset import Batch, ViewDataset, chunks_of_rows, in_batches, prefetch, whole_clips
from ced.distill.distributed import World
from ced.distill.pack_reader import AudioPack
from ced.distill.pack_writer import pack
from ced.distill.step import Stepper, TargetLoss, TrainingBatch
from ced.distill.store import store
from ced.distill.view_store import ViewStore, part_path
from ced.model import loading
from ced.model.vit import attend
from ced.sound.audio import SAMPLE_RATE
from ced.sound.labels import audioset

SECONDS = 10
CLASSES = 527
RECIPE = views.ViewRecipe()
Measurement = tuple[str, str, float, float]  # what, unit, plain, ours


def alternate(rounds: int, *sides: Callable[[], float]) -> list[float]:
    """Run the sides in turn, after one round to warm up, and return the median of what each returns."""
    runs = [[side() for side in sides] for _ in range(rounds + 1)][1:]
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def rate(count: int, work: Callable[[], object]) -> float:
    """Return how many of `count` items `work` processes per second."""
    begin = time.perf_counter()
    work()
    return count / (time.perf_counter() - begin)


def make_sounds(folder: Path, clips: int) -> Path:
    """Write 16-bit WAV files of noise under a slow tremolo, and their list."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    time_axis = np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    for clip in range(clips):
        wave = rng.normal(0, 0.1, len(time_axis)) * (1 + np.sin(2 * np.pi * rng.uniform(0.5, 4) * time_axis))
        soundfile.write(folder / f"clip{clip:05d}.wav", wave.clip(-1, 1), SAMPLE_RATE, subtype="PCM_16")
    table = folder / "clips.tsv"
    table.write_text("filename\n" + "".join(f"{path}\n" for path in sorted(folder.glob("*.wav"))))
    return table


class PlainDataset(Dataset[tuple[Tensor, Tensor, float, float]]):
    """A plain training item: HDF5 for wave and target, the global generator for the view."""

    def __init__(self, pack: Path, store: Path, names: list[str]) -> None:
        self.pack, self.store, self.names = pack, store, names
        self.files: tuple[h5py.File, h5py.File] | None = None  # opened in the worker that reads

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, float, float]:
        if self.files is None:
            self.files = h5py.File(self.pack, "r"), h5py.File(self.store, "r")
        pack, store = self.files
        wave = torch.as_tensor(pack[self.names[item]][0 : SECONDS * SAMPLE_RATE] / 32768.0, dtype=torch.float32)
        values = torch.as_tensor(store["topk_values"][item]).float()
        indexes = torch.as_tensor(store["topk_indexes"][item]).long()
        torch.manual_seed(int(store["seeds"][item]))
        if torch.distributions.Bernoulli(0.5).sample((1,)):
            reach = len(wave) // 2
            wave = wave.roll(int(torch.randint(-reach, reach + 1, (1,), dtype=torch.int32)))
        u1, u2 = float(torch.rand(1)), float(torch.rand(1))
        return wave, torch.zeros(CLASSES).scatter(0, indexes, values), u1, u2


def our_items(dataset: ViewDataset, store: ViewStore, workers: int, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield the batches of a student: waves, uniforms, and targets spread over the classes."""
    rows = store.rows(1)
    for batch in prefetch(dataset, in_batches(len(dataset), size), workers):
        values = torch.from_numpy(rows.values[batch.items])
        indexes = torch.from_numpy(rows.indexes[batch.items])
        yield batch, targets.spread(values, indexes, CLASSES, "zero")


def exhaust(items: Any) -> None:
    for _ in items:
        pass


def measure_items(pack_table: Path, store_folder: Path, rounds: int) -> Iterator[Measurement]:
    audio, views_stored = AudioPack(pack_table), ViewStore(store_folder)
    rows = views_stored.rows(1)
    chunks = chunks_of_rows(audio, rows, SECONDS)
    ours = ViewDataset(audio, chunks, views_stored.meta.recipe, rows.seeds, SECONDS * SAMPLE_RATE)
    h5 = next(pack_table.parent.parent.glob("hdf5/*.h5"))
    plain = PlainDataset(h5, part_path(store_folder, 1, 0), list(rows.filenames))
    count = len(plain)

    def plain_items() -> float:
        return rate(count, lambda: exhaust(plain[item] for item in range(count)))

    def plain_loader() -> float:
        loader = DataLoader(plain, batch_size=32, num_workers=2, multiprocessing_context="fork")
        return rate(count, lambda: exhaust(loader))

    def side(workers: int, size: int) -> Callable[[], float]:
        repeats = 5  # one pass is too short to be timed

        def work() -> None:
            for _ in range(repeats):
                exhaust(our_items(ours, views_stored, workers, size))

        return lambda: rate(repeats * count, work)

    yield "training item, one thread", "items/s", *alternate(rounds, plain_items, side(0, 32))  # type: ignore[misc]
    yield "training loader, 2 workers", "items/s", *alternate(rounds, plain_loader, side(2, 32))  # type: ignore[misc]


def read_wave(path: str) -> NDArray[np.int16]:
    wave: NDArray[np.int16] = soundfile.read(path, dtype="int16")[0]
    return wave


def plain_pack(paths: list[str], out: Path) -> None:
    """Pack plainly: a pool of processes sends arrays to one that writes the datasets."""
    with multiprocessing.get_context("fork").Pool(2) as pool, h5py.File(out, "w") as file:
        for path, wave in zip(paths, pool.imap(read_wave, paths), strict=True):
            file.create_dataset(Path(path).name, data=wave)


def measure_packing(sounds: Path, folder: Path, rounds: int) -> Iterator[Measurement]:
    paths = sounds.read_text().split()[1:]
    runs = iter(range(1000))

    def plain() -> float:
        return rate(len(paths), lambda: plain_pack(paths, folder / f"plain{next(runs)}.h5"))

    def ours() -> float:
        return rate(len(paths), lambda: pack(sounds, folder / f"ours{next(runs)}", workers=2))

    yield "packing 16 kHz WAV files", "clips/s", *alternate(rounds, plain, ours)  # type: ignore[misc]


def store_config(pack_table: Path, checkpoint: Path, out: Path) -> StoreConfig:
    values = {"train_data": pack_table, "model": str(checkpoint), "epochs": 1, "batch_size": 32, "mode": "off"}
    return check(StoreConfig, {**values, "outputpath": out}, "the benchmark")


def measure_store(pack_table: Path, checkpoint: Path, folder: Path, rounds: int) -> Iterator[Measurement]:
    """Compare the whole store walk with only the forward pass of the teacher over as many chunks."""
    network = loading.load_model(checkpoint)
    count, size = len(AudioPack(pack_table)), 32
    waves = torch.randn(size, SECONDS * SAMPLE_RATE) * 0.1
    with torch.inference_mode():
        mel = network.front_end(waves)
    runs = iter(range(1000))

    def forward() -> float:
        with torch.inference_mode():
            batches = [mel[: min(size, count - start)] for start in range(0, count, size)]
            return rate(count, lambda: [network.forward_mel(batch) for batch in batches])

    def walk() -> float:
        config = store_config(pack_table, checkpoint, folder / str(next(runs)))
        return rate(count, lambda: store(config))

    yield "storing views (plain: bare forward pass)", "views/s", *alternate(rounds, forward, walk)  # type: ignore[misc]


def training_step(
    mode: Mode, backend: SDPBackend | None = None, compiled: bool = False, model: str = "ced_tiny", size: int = 32
) -> Callable[[], float]:
    """Return a timed training step of a network on a batch of clips of 10 s, from waves to new weights."""
    network = loading.create(model, model_args={"pooling": "logit"}, pretrained=False, labels=audioset())
    objective = TargetLoss(network, torch.nn.functional.binary_cross_entropy_with_logits)
    stepper = Stepper(network, objective, World(0, 1, torch.device("cpu")), mode=mode, compiled=compiled)
    waves = (torch.randn(size, SECONDS * SAMPLE_RATE) * 3000).to(torch.int16)
    chunks = Batch(np.arange(size), waves, torch.rand(size, 2))
    batch = TrainingBatch(chunks, RECIPE, targets=torch.rand(size, CLASSES).pow(20))

    def step() -> None:
        with sdpa_kernel(backend) if backend else nullcontext():
            stepper.step(batch, 1e-4)

    return lambda: rate(size, step)


def measure_steps(rounds: int) -> Iterator[Measurement]:
    kinds = {
        "attention as products, fp32": training_step("off", SDPBackend.MATH),
        "fp32": training_step("off"),
        "bf16": training_step("amp_bf16"),
        "compiled, fp32": training_step("off", compiled=True),
        "compiled, bf16": training_step("amp_bf16", compiled=True),
    }
    first, *rest = alternate(rounds, *kinds.values())
    for name, value in zip(list(kinds)[1:], rest, strict=True):
        yield f"training step: {name} (plain: attention as products, fp32)", "clips/s", first, value


def attention(work: Callable[[Tensor, Tensor, Tensor], Tensor], half: torch.dtype) -> Callable[[], float]:
    """Return the timed attention of a layer of ced_tiny with its gradients, of 32 clips of 10 s."""
    inputs = [torch.randn(32, 3, 252, 64, dtype=half, requires_grad=True) for _ in range(3)]
    return lambda: rate(32, lambda: work(*inputs).sum().backward())


def measure_attention(rounds: int) -> Iterator[Measurement]:
    for half in (torch.float32, torch.bfloat16):
        sides = (attention(work, half) for work in (torch.nn.functional.scaled_dot_product_attention, attend))
        what = f"attention and its gradients, {str(half)[len('torch.') :]} (plain: PyTorch's fused)"
        yield what, "clips/s", *alternate(rounds, *sides)  # type: ignore[misc]


def evict(pack_table: Path) -> None:
    """Drop the files of a pack from the page cache; no process may have them mapped."""
    for path in pack_table.parent.parent.glob("hdf5/*.h5"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_from_disk() -> int:
    """Return the bytes that storage has delivered to this process so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def read_clips(pack_table: Path, cold: bool, shuffled: bool, workers: int) -> tuple[float, float]:
    """Read every clip of a pack once, as the first epoch of a training does.

    Returns:
        Clips per second, and bytes from the disk for each clip.
    """
    audio = AudioPack(pack_table)  # a new one: checksums are compared at the first reading
    chunks = whole_clips(audio, range(len(audio)))
    items = np.arange(len(audio))
    if shuffled:
        items = np.random.default_rng(0).permutation(items)
    dataset = ViewDataset(audio, chunks, samples=SECONDS * SAMPLE_RATE)
    batches = [items[list(places)] for places in in_batches(len(items), 32)]
    if cold:
        evict(pack_table)
    before = bytes_from_disk()
    found = rate(len(items), lambda: exhaust(prefetch(dataset, batches, workers)))
    return found, (bytes_from_disk() - before) / len(items)


def read_file(pack_table: Path) -> float:
    """Read the files of a pack from the disk in blocks of a megabyte; return the bytes per second."""
    evict(pack_table)
    block, total, begin = bytearray(1 << 20), 0, time.perf_counter()
    for path in pack_table.parent.parent.glob("hdf5/*.h5"):
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(block):
                total += read
    return total / (time.perf_counter() - begin)


def print_reading(pack_table: Path, rounds: int, gpu_rates: list[int]) -> None:
    """Print what training reads, and what this disk delivers."""
    clip = SECONDS * SAMPLE_RATE * 2  # bytes in int16
    print("| reading | cache | order | MB/s | clips/s | from disk, kB per clip |\n|---|---|---|---|---|---|")
    plain = statistics.median(read_file(pack_table) for _ in range(rounds))
    print(f"| the file, in blocks of 1 MB | cold | in order | {plain / 1e6:,.0f} | {plain / clip:,.0f} | |", flush=True)
    for cold, shuffled, workers in ((True, False, 4), (True, True, 4), (True, True, 1), (False, True, 4)):
        runs = [read_clips(pack_table, cold, shuffled, workers) for _ in range(rounds)]
        clips, fetched = (statistics.median(values) for values in zip(*runs, strict=True))
        what = f"the loader, {workers} thread{'s' if workers > 1 else ''}"
        state, order = "cold" if cold else "warm", "shuffled" if shuffled else "in order"
        figures = f"{clips * clip / 1e6:,.0f} | {clips:,.0f} | {fetched / 1e3:,.0f}"
        print(f"| {what} | {state} | {order} | {figures} |", flush=True)
    size = 8
    print(f"\n| training, batch {size} | clips/s | MB/s |\n|---|---|---|")
    for model in ("ced_tiny", "ced_mini", "ced_small", "ced_base"):
        (clips,) = alternate(rounds, training_step("off", model=model, size=size))
        print(f"| {model} on this processor, float32 | {clips:,.2g} | {clips * clip / 1e6:,.2g} |", flush=True)
    for clips in gpu_rates:
        print(f"| a GPU that trains on {clips:,} clips/s | {clips:,} | {clips * clip / 1e6:,.0f} |")


def main() -> None:
    """Run the chosen measurements and print a table in Markdown."""
    parts = ("items", "packing", "store", "attention", "steps", "reading")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where all files are made; default: that of temporary files")
    parser.add_argument("--gpu-rates", type=int, nargs="+", default=[500, 2_000, 8_000], help="clips/s, for `reading`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sounds = make_sounds(folder / "sounds", arguments.clips)
        pack_table = pack(sounds, folder / "pack", workers=2).index
        checkpoint = folder / "teacher.safetensors"
        loading.save(checkpoint, loading.create("ced_tiny", model_args={}, pretrained=False, labels=audioset()))
        machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        print(f"{machine}, torch {torch.__version__}")
        print(f"{arguments.clips} clips of {SECONDS} s, medians of {arguments.rounds} rounds\n")
        if "reading" in arguments.only:
            print_reading(pack_table, arguments.rounds, arguments.gpu_rates)
        chosen = [part for part in arguments.only if part != "reading"]
        if chosen:
            print("\n| work | unit | plain | ours | ratio |\n|---|---|---|---|---|")
        for part in chosen:
            if part == "items":
                stored_views = store(store_config(pack_table, checkpoint, folder / "store"))
                measured = measure_items(pack_table, stored_views, arguments.rounds)
            elif part == "packing":
                measured = measure_packing(sounds, folder, arguments.rounds)
            elif part == "store":
                measured = measure_store(pack_table, checkpoint, folder / "walks", max(arguments.rounds // 2, 1))
            elif part == "attention":
                measured = measure_attention(arguments.rounds)
            else:
                measured = measure_steps(arguments.rounds)
            for what, unit, plain, ours in measured:
                print(f"| {what} | {unit} | {plain:,.0f} | {ours:,.0f} | {ours / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
