"""Chunks of packed clips under views, read a batch at a time: the input of teachers, student and evaluation.

All walks use this data set. Storing cuts clips into chunks and draws new seeds, training takes both from the store, and
evaluation takes whole clips without a view.
"""

import hashlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ced.distill.pack_reader import AudioPack
from ced.distill.view_store import Rows
from ced.distill.views import NO_VIEW, View, ViewRecipe, draw, mask_uniforms, shift_into
from ced.errors import ConfigError, PackError
from ced.parallel import in_order
from ced.sound.audio import SAMPLE_RATE
from ced.sound.decode import FULL_SCALE, to_float
from ced.sound.features import MIN_SAMPLES
from ced.text import quoted

_FINGERPRINTED = 256  # chunks whose samples are part of a fingerprint

Items = Sequence[int] | NDArray[np.int64]  # indices of chunks of a data set, (b,)


@dataclass(frozen=True, eq=False)
class Chunks:
    """Pieces of clips, n of them."""

    clips: NDArray[np.int64]  # (n,) rows of the pack
    starts: NDArray[np.int64]  # (n,) first sample
    stops: NDArray[np.int64]  # (n,) sample after the last one

    def __len__(self) -> int:
        return len(self.clips)

    def span(self, item: int) -> tuple[int, int, int]:
        """Return the row in the pack, the first sample, and the sample after the last one of one chunk."""
        return int(self.clips[item]), int(self.starts[item]), int(self.stops[item])

    def seconds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the start and the end of each chunk in seconds, (n,) each."""
        starts, ends = ((samples / SAMPLE_RATE).astype(np.float32) for samples in (self.starts, self.stops))
        return starts, ends


def chunk_samples(chunk_length: float) -> int:
    """Return the number of samples of a chunk of `chunk_length` seconds.

    Raises:
        ConfigError: it is shorter than the shortest input of a model.
    """
    samples = round(chunk_length * SAMPLE_RATE)
    if samples < MIN_SAMPLES:
        raise ConfigError(
            f"chunk_length is {chunk_length} s; the shortest input of a model is {MIN_SAMPLES / SAMPLE_RATE} s"
        )
    return samples


def cut_chunks(lengths: NDArray[np.int64], chunk_length: float) -> Chunks:
    """Cut clips into chunks; the rest of a clip is dropped if it is shorter than half a chunk.

    Args:
        lengths: (clips,) samples.
        chunk_length: seconds.
    """
    samples = chunk_samples(chunk_length)
    counts = lengths // samples + (2 * (lengths % samples) >= samples)
    clips = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # of each chunk: the first chunk of its clip
    starts = (np.arange(len(clips)) - first) * samples
    return Chunks(clips, starts, np.minimum(starts + samples, lengths[clips]))


def fingerprint(
    pack: AudioPack,
    chunks: Chunks,
    filenames: NDArray[np.object_],
    starts: NDArray[np.float32],
    ends: NDArray[np.float32],
) -> str:
    """Return a digest of the names and times of chunks, and of the samples of 256 of them; all would take too long.

    Args:
        pack: has the clips.
        chunks: n pieces of its clips.
        filenames: (n,) str, the name of each chunk's clip.
        starts: (n,) seconds.
        ends: (n,) seconds.
    """
    digest = hashlib.sha256("\n".join(filenames).encode(errors="surrogateescape"))
    digest.update(starts.tobytes() + ends.tobytes())
    some = np.linspace(0, len(chunks) - 1, min(len(chunks), _FINGERPRINTED)).astype(int)
    for item in some.tolist():
        digest.update(pack.read(*chunks.span(item)).tobytes())
    return digest.hexdigest()


def chunks_of_rows(pack: AudioPack, rows: Rows, chunk_length: float) -> Chunks:
    """Return the chunks of the rows of a view store.

    A store has seconds in float32, which in a long clip are too coarse to tell samples apart, and a chunk that is one
    sample longer draws another shift. So each row is mapped to one of the chunks that `cut_chunks` made.

    Raises:
        PackError: a clip is missing from the pack, or its length differs from that when its views were stored.
    """
    samples = chunk_samples(chunk_length)
    clips = pack.find(rows.filenames)
    starts = np.rint(rows.starts / chunk_length).astype(np.int64) * samples
    stops = np.minimum(starts + samples, pack.lengths(clips))
    for stored_seconds, found in ((rows.starts, starts), (rows.ends, stops)):
        seconds = found / SAMPLE_RATE
        # Half a sample, plus the rounding error of float32.
        off = np.abs(stored_seconds - seconds) > 0.5 / SAMPLE_RATE + 1e-7 * seconds
        if off.any():
            item = int(off.argmax())
            raise PackError(
                f"clip {quoted(str(rows.filenames[item]))}: a chunk starts or ends at {stored_seconds[item]:.5f} s in "
                f"the store, and at {seconds[item]:.5f} s in the pack; was it packed again after its views were stored?"
            )
    return Chunks(clips, starts, stops)


def whole_clips(pack: AudioPack, clips: Sequence[int]) -> Chunks:
    """Return clips of a pack, each as one chunk."""
    rows = np.array(clips, np.int64)
    return Chunks(rows, np.zeros_like(rows), pack.lengths(rows))


def crop(pack: AudioPack, samples: int, rng: np.random.Generator) -> Chunks:
    """Return one random crop of at most `samples` samples of every clip."""
    lengths = pack.lengths()
    room = np.maximum(lengths - samples, 0)
    starts = rng.integers(0, room, endpoint=True)
    return Chunks(np.arange(len(pack)), starts, np.minimum(starts + samples, lengths))


@dataclass(frozen=True, eq=False)
class Batch:
    """Some chunks, to be moved to the device."""

    items: NDArray[np.int64]  # (b,) indices of the chunks
    waves: Tensor  # (b, t) int16 or float32, shifted and padded with zeros
    uniforms: Tensor  # (b, 2) float32, for `views.mask`

    def to_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the waves as float32 in [-1, 1] and the uniforms, both on `device`."""
        waves = self.waves.to(device, non_blocking=True)
        scaled = waves.float().div_(FULL_SCALE) if waves.dtype == torch.int16 else waves
        return scaled, self.uniforms.to(device, non_blocking=True)


class ViewDataset(Dataset[Batch]):
    """Chunks under the views of given seeds, read in batches (`__getitems__`); a single item is a batch of one."""

    def __init__(
        self,
        pack: AudioPack,
        chunks: Chunks,
        recipe: ViewRecipe = NO_VIEW,
        seeds: NDArray[np.int32] | None = None,
        samples: int | None = None,
    ) -> None:
        """Set up the data set.

        Args:
            pack: has the clips.
            chunks: n pieces of its clips.
            recipe: the augmentation of the views.
            seeds: (n,), one for each view; needed unless the recipe is empty.
            samples: length of every item, shorter chunks are padded with zeros; None: the longest of the batch.

        Raises:
            ValueError: there are no seeds for a recipe that needs them.
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
        waves = [self.pack.read(*self.chunks.span(item)) for item in items]
        views = [self._view(item, len(wave), generator) for item, wave in zip(items, waves, strict=True)]
        if len({wave.dtype for wave in waves}) > 1:
            waves = [to_float(wave) for wave in waves]
        samples = self.samples or max(map(len, waves))
        kind = torch.int16 if waves[0].dtype == np.int16 else torch.float32
        # A GPU can copy from pinned memory while it computes.
        out = torch.zeros((len(waves), samples), dtype=kind, pin_memory=torch.cuda.is_available())
        for row, wave, view in zip(out.numpy(), waves, views, strict=True):
            shift_into(row, wave, view.shift)
        return Batch(np.asarray(items, np.int64), out, mask_uniforms(views))

    def _view(self, item: int, samples: int, generator: torch.Generator) -> View:
        if self.seeds is None:
            return View(0, 0.0, 0.0)
        return draw(self.recipe, int(self.seeds[item]), samples, generator)


def in_batches(count: int, batch_size: int) -> Iterator[range]:
    """Yield 0 ... count - 1 in batches, in order; the last one may be shorter."""
    for start in range(0, count, batch_size):
        yield range(start, min(start + batch_size, count))


def shuffled(count: int, batch_size: int, seed: Sequence[int]) -> Iterator[NDArray[np.int64]]:
    """Yield batches without end: 0 ... count - 1 in random order, then in another; a rest starts the next round."""
    rng = np.random.default_rng(seed)
    pool = np.empty(0, np.int64)
    while True:
        while len(pool) < batch_size:
            pool = np.concatenate([pool, rng.permutation(count)])
        yield pool[:batch_size]
        pool = pool[batch_size:]


def weighted(
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
    """Yield the batches in their order, read ahead by `workers` threads (0: by this one).

    Threads are faster than processes here: reading is copying, which releases Python's lock, and no batch has to be
    sent to another process.
    """
    if workers == 0:
        yield from map(dataset.__getitems__, batches)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    try:
        yield from in_order(dataset.__getitems__, batches, pool.submit, 2 * workers + 1)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
