"""Chunks of packed clips under views, read a batch at a time: what teacher, student and evaluation are fed with.

One data set serves all walks. The teacher cuts clips into chunks and draws new seeds, the student takes both from the
store, and evaluation takes whole clips without a view.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ced.distill.pack_reader import AudioPack
from ced.distill.view_store import Rows
from ced.distill.views import NO_VIEW, View, ViewRecipe, draw, mask_uniforms, shift_into
from ced.errors import ConfigError, PackError
from ced.sound.audio import SAMPLE_RATE
from ced.sound.decode import FULL_SCALE
from ced.sound.features import MIN_SAMPLES
from ced.text import quoted

_INT16_STEP = 1 / FULL_SCALE
_FINGERPRINTED = 256  # chunks whose samples tell audio that was packed again from the audio before

Items = Sequence[int] | NDArray[np.int64]  # which chunks of a data set, (b,)


@dataclass(frozen=True, eq=False)
class Chunks:
    """Pieces of clips: rows of a pack, first sample, and sample behind the last; (n,) each."""

    clips: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.clips)

    def place(self, item: int) -> tuple[int, int, int]:
        """Return the row in the pack, first sample and sample behind the last of one chunk."""
        return int(self.clips[item]), int(self.starts[item]), int(self.stops[item])


def chunk_samples(chunk_length: float) -> int:
    """Return the samples of a chunk of `chunk_length` seconds.

    Raises:
        ConfigError: it is shorter than what a model can hear.
    """
    samples = round(chunk_length * SAMPLE_RATE)
    if samples < MIN_SAMPLES:
        raise ConfigError(
            f"chunk_length is {chunk_length} s; the shortest a model can hear is {MIN_SAMPLES / SAMPLE_RATE} s"
        )
    return samples


def cut(pack: AudioPack, chunk_length: float) -> Chunks:
    """Cut the clips of a pack into chunks of `chunk_length` seconds; a rest shorter than half of that is dropped."""
    samples = chunk_samples(chunk_length)
    clips, starts, stops = [], [], []
    for clip in range(len(pack)):
        total = pack.samples(clip)
        for start in range(0, total, samples):
            stop = min(start + samples, total)
            if 2 * (stop - start) >= samples:
                clips.append(clip)
                starts.append(start)
                stops.append(stop)
    return Chunks(np.array(clips, np.int64), np.array(starts, np.int64), np.array(stops, np.int64))


def fingerprint(
    pack: AudioPack,
    chunks: Chunks,
    filenames: NDArray[np.object_],
    starts: NDArray[np.float32],
    ends: NDArray[np.float32],
) -> str:
    """Return a digest of the names and times of chunks, and of the samples of some: all of them would take long.

    Args:
        pack: where the chunks are.
        chunks: n pieces of its clips.
        filenames: (n,) str, the name of each chunk's clip.
        starts: (n,) seconds.
        ends: (n,) seconds.
    """
    digest = hashlib.sha256("\n".join(filenames).encode(errors="surrogateescape"))
    digest.update(starts.tobytes() + ends.tobytes())
    some = np.linspace(0, len(chunks) - 1, min(len(chunks), _FINGERPRINTED)).astype(int)
    for item in some.tolist():
        digest.update(pack.read(*chunks.place(item)).tobytes())
    return digest.hexdigest()


def stored(pack: AudioPack, rows: Rows, chunk_length: float) -> Chunks:
    """Return the chunks that the rows of a store speak of.

    A store holds seconds in float32, too coarse in a long clip to tell samples apart, and one sample more or less is
    another shift. So places are counted in chunks, as `cut` made them.

    Raises:
        PackError: a clip is missing from the pack, or does not have the length it had when its views were stored.
    """
    samples = chunk_samples(chunk_length)
    row_of = {name: pack.find(name) for name in dict.fromkeys(rows.filenames)}
    clips = np.array([row_of[name] for name in rows.filenames], np.int64)
    totals = {clip: pack.samples(clip) for clip in row_of.values()}
    starts = np.rint(rows.starts / chunk_length).astype(np.int64) * samples
    stops = np.minimum(starts + samples, [totals[clip] for clip in clips.tolist()])
    for stored_seconds, found in ((rows.starts, starts), (rows.ends, stops)):
        seconds = found / SAMPLE_RATE
        # Half a sample, and what float32 leaves out.
        off = np.abs(stored_seconds - seconds) > 0.5 / SAMPLE_RATE + 1e-7 * seconds
        if off.any():
            item = int(off.argmax())
            raise PackError(
                f"clip {quoted(str(rows.filenames[item]))}: the store says {stored_seconds[item]:.5f} s where the pack "
                f"has {seconds[item]:.5f} s; was it packed again after its views were stored?"
            )
    return Chunks(clips, starts, stops)


def whole(pack: AudioPack, clips: Sequence[int]) -> Chunks:
    """Return whole clips as chunks."""
    stops = np.array([pack.samples(clip) for clip in clips], np.int64)
    return Chunks(np.array(clips, np.int64), np.zeros_like(stops), stops)


def crop(pack: AudioPack, samples: int, rng: np.random.Generator) -> Chunks:
    """Return one random crop of at most `samples` samples of every clip."""
    totals = np.array([pack.samples(clip) for clip in range(len(pack))], np.int64)
    room = np.maximum(totals - samples, 0)
    starts = rng.integers(0, room, endpoint=True)
    return Chunks(np.arange(len(pack)), starts, np.minimum(starts + samples, totals))


@dataclass(frozen=True, eq=False)
class Batch:
    """Some chunks, ready for the device."""

    items: NDArray[np.int64]  # (b,) which chunks they are
    waves: Tensor  # (b, t) int16 or float32, shifted, padded with zeros
    uniforms: Tensor  # (b, 2) float32, for `views.mask`

    def to_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the waves as float32 in [-1, 1] and the uniforms, both on `device`."""
        waves = self.waves.to(device, non_blocking=True)
        scaled = waves.float().mul_(_INT16_STEP) if waves.dtype == torch.int16 else waves
        return scaled, self.uniforms.to(device, non_blocking=True)


class ViewDataset(Dataset[Batch]):
    """Chunks under the views of given seeds; a batch is read at once (`__getitems__`), an item is a batch of one."""

    def __init__(
        self,
        pack: AudioPack,
        chunks: Chunks,
        recipe: ViewRecipe = NO_VIEW,
        seeds: NDArray[np.int32] | None = None,
        samples: int | None = None,
    ) -> None:
        """Join chunks with their seeds.

        Args:
            pack: where the chunks are.
            chunks: n pieces of its clips.
            recipe: what a view does.
            seeds: (n,), one a view; needed unless the recipe is empty.
            samples: length of every item, shorter chunks are padded with zeros; None: the longest of the batch.
        """
        if seeds is None and recipe != NO_VIEW:
            raise ValueError("views need a seed for each chunk")
        self.pack, self.chunks, self.recipe, self.seeds, self.samples = pack, chunks, recipe, seeds, samples

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, item: int) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: Items) -> Batch:
        """Read the chunks `items`, each rolled by the shift of its view."""
        generator = torch.Generator()
        waves = [self.pack.read(*self.chunks.place(item)) for item in items]
        views = [self._view(item, len(wave), generator) for item, wave in zip(items, waves, strict=True)]
        if len({wave.dtype for wave in waves}) > 1:
            waves = [wave * np.float32(_INT16_STEP) if wave.dtype == np.int16 else wave for wave in waves]
        samples = self.samples or max(map(len, waves))
        kind = torch.int16 if waves[0].dtype == np.int16 else torch.float32
        # Pinned memory is what a GPU copies from while it computes.
        out = torch.zeros((len(waves), samples), dtype=kind, pin_memory=torch.cuda.is_available())
        for row, wave, view in zip(out.numpy(), waves, views, strict=True):
            shift_into(row, wave, view.shift)
        return Batch(np.asarray(items, np.int64), out, mask_uniforms(views))

    def _view(self, item: int, samples: int, generator: torch.Generator) -> View:
        if self.seeds is None:
            return View(0, 0.0, 0.0)
        return draw(self.recipe, int(self.seeds[item]), samples, generator)


def in_order(count: int, batch_size: int) -> Iterator[range]:
    """Yield 0 ... count - 1 in batches; the last may be shorter."""
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def shuffled(count: int, batch_size: int, seed: Sequence[int]) -> Iterator[NDArray[np.int64]]:
    """Yield batches for ever: 0 ... count - 1 in a random order, then in another; a rest opens the next round."""
    rng = np.random.default_rng(seed)
    pool = np.empty(0, np.int64)
    while True:
        while len(pool) < batch_size:
            pool = np.concatenate([pool, rng.permutation(count)])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def drawn(
    weights: NDArray[np.float64], batch_size: int, batches: int, seed: Sequence[int]
) -> Iterator[NDArray[np.int64]]:
    """Yield batches of items drawn in proportion to their weights, (n,), in a random order.

    Of N draws, an item gets N times its part of all weights, rounded up or down (systematic sampling): its number of
    draws varies as little as it can.
    """
    rng = np.random.default_rng(seed)
    count = batches * batch_size
    order = rng.permutation(len(weights))  # so that the rounding does not favour the same items each time
    places = (np.arange(count) + rng.random()) / count
    bounds = np.cumsum(weights[order]) / np.sum(weights)
    items = order[np.searchsorted(bounds, places, side="right").clip(max=len(weights) - 1)]
    yield from rng.permutation(items).reshape(batches, batch_size)


def prefetch(dataset: ViewDataset, batches: Iterable[Items], workers: int) -> Generator[Batch, None, None]:
    """Yield the batches in their order, read ahead by `workers` threads (0: in this one).

    Threads and not processes: reading is copying, which frees the interpreter, and no batch is sent anywhere.
    """
    if workers == 0:
        yield from map(dataset.__getitems__, batches)
        return
    waiting: deque[Future[Batch]] = deque()
    rest = iter(batches)
    with ThreadPoolExecutor(workers, thread_name_prefix="reader") as pool:
        try:
            waiting.extend(pool.submit(dataset.__getitems__, batch) for batch in islice(rest, 2 * workers))
            while waiting:
                ready = waiting.popleft().result()
                waiting.extend(pool.submit(dataset.__getitems__, batch) for batch in islice(rest, 1))
                yield ready
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
