"""One HDF5 file of an audio pack: how it is written, and where in it the samples of a clip are.

Each clip is one contiguous dataset at 16 kHz, int16 or float32, (t,), or (t, 2) if stereo was kept. It is named by the
clip's base name, or by its whole filename, whose "/" make groups. Packs have been published in this form; what files
written here have beyond it are attributes: a format, a version, and a fingerprint of what the file was made from.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, PackError
from ced.sound.audio import SAMPLE_RATE, load_stored

FORMAT = "ced-pack"
FORMAT_VERSION = 1
INT16_SCALE = 32_768
_AHEAD = 4  # clips decoded ahead of the one that is written, a thread

DType = Literal["int16", "float32"]
Wave = NDArray[np.int16] | NDArray[np.float32]
Outcome = int | str  # of a clip: its samples, or why it could not be read


@dataclass(frozen=True)
class Settings:
    """What becomes of a clip."""

    dtype: DType
    stereo: bool
    fullname: bool

    def key(self, filename: str) -> str:
        """Return the name of a clip's dataset."""
        return whole_key(filename) if self.fullname else os.path.basename(filename)

    def decode(self, filename: str) -> Wave | str:
        """Return the samples of a clip, or why there are none."""
        try:
            samples = load_stored(filename, self.stereo)
        except AudioError as error:
            return str(error)
        return to_int16(samples) if self.dtype == "int16" else to_float32(samples)


@dataclass(frozen=True)
class Part:
    """One file of a pack, and the clips that it is for."""

    path: Path
    filenames: Sequence[str]
    settings: Settings

    def attributes(self) -> dict[str, Any]:
        """Return what the file says of itself."""
        made_from = json.dumps([self.filenames, asdict(self.settings)])
        fingerprint = hashlib.sha256(made_from.encode()).hexdigest()
        return {"format": FORMAT, "version": FORMAT_VERSION, "sample_rate": SAMPLE_RATE, "fingerprint": fingerprint}


def write(part: Part, path: Path, pool: Executor, threads: int) -> Iterator[Outcome]:
    """Write a part to `path`, and yield the outcome of each of its clips.

    The threads only decode: clips are written here, in their order, so that the bytes do not depend on the threads.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    naming = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    naming.set_char_encoding(h5py.h5t.CSET_UTF8)
    naming.set_create_intermediate_group(True)
    stored = h5py.h5t.STD_I16LE if part.settings.dtype == "int16" else h5py.h5t.IEEE_F32LE
    with h5py.File(path, "w", libver="earliest") as file:
        file.attrs.update(part.attributes())
        for filename, wave in _decoded(part, pool, _AHEAD * threads):
            if isinstance(wave, str):
                yield wave
                continue
            # These calls take half the time of create_dataset.
            key = part.settings.key(filename).encode()
            space = h5py.h5s.create_simple(wave.shape)
            dataset = h5py.h5d.create(file.id, key, stored, space, creation, naming)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, wave)
            yield len(wave)


def _decoded(part: Part, pool: Executor, ahead: int) -> Iterator[tuple[str, Wave | str]]:
    """Yield filenames and what decoding them gave, in their order, at most `ahead` of them waiting in memory."""
    waiting: deque[tuple[str, Future[Wave | str]]] = deque()
    for filename in part.filenames:
        waiting.append((filename, pool.submit(part.settings.decode, filename)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for filename, future in waiting:
        yield filename, future.result()


def outcomes_of(part: Part) -> list[Outcome] | None:
    """Return the outcomes of a part that is complete, or None if it has to be written (again).

    It has to be if it is not there, was made from other clips or settings, is older than one of its clips, or lacks
    one that can be read by now.
    """
    try:
        written = part.path.stat().st_mtime_ns
        file = h5py.File(part.path, "r")
    except OSError:
        return None
    outcomes: list[Outcome] = []
    with file:
        if dict(file.attrs) != part.attributes():
            return None
        for filename, place in zip(part.filenames, places_in(file, part.filenames), strict=True):
            if place is None:
                if not isinstance(reason := part.settings.decode(filename), str):
                    return None
                outcomes.append(reason)
            elif _changed(filename) > written:
                return None
            else:
                outcomes.append(place.samples)
    return outcomes


def _changed(filename: str) -> int:
    try:
        return os.stat(filename).st_mtime_ns
    except OSError:
        return 0  # gone, but packed it is


class Place(NamedTuple):
    """Where the samples of a clip are."""

    key: str
    dtype: np.dtype[Any]
    samples: int
    channels: int
    channels_first: bool  # (channels, t), as some packs have it
    offset: int | None  # of the first byte in the file; None if they do not lie there as they are

    @property
    def bytes(self) -> int:
        """Return how much room they take."""
        return self.samples * self.channels * self.dtype.itemsize


def places_in(file: h5py.File, filenames: Iterable[str]) -> Iterator[Place | None]:
    """Yield where each clip is, named by its whole filename or else its base name; None if it is not there.

    Raises:
        PackError: there is something else than int16 or float samples, (t,) or in channels.
    """
    groups: dict[str, bool] = {}  # whether the file has a group of this name: a whole name begins with one
    for filename in filenames:
        base, whole = os.path.basename(filename), whole_key(filename)
        top = whole.partition("/")[0]
        if whole != base and top not in groups:
            groups[top] = file.id.links.exists(top.encode())
        keys = (whole, base) if whole != base and groups[top] else (base,)
        yield next((place for key in keys if (place := _place(file, key)) is not None), None)


def _place(file: h5py.File, key: str) -> Place | None:
    try:
        dataset = h5py.h5d.open(file.id, key.encode())
    except (KeyError, ValueError):  # not there; not a dataset
        return None
    shape, dtype = dataset.shape, dataset.dtype
    if len(shape) not in (1, 2) or not (dtype.kind == "f" or (dtype.kind, dtype.itemsize) == ("i", 2)):
        kinds = "int16 or float samples, (t,) or (t, channels)"
        raise PackError(f"clip {key} in {file.filename} is {dtype} of shape {shape}; expected {kinds}")
    first = len(shape) == 2 and shape[0] < shape[1]
    samples, channels = (shape[1], shape[0]) if first else (shape[0], shape[1] if len(shape) == 2 else 1)
    direct = dtype in (np.int16, np.float32) and dtype.isnative and not first
    return Place(key, dtype, samples, channels, first, dataset.get_offset() if direct else None)


def whole_key(filename: str) -> str:
    """Return the name of a dataset in groups, without the "/" and "." that HDF5 passes over."""
    return "/".join(part for part in filename.split("/") if part not in ("", "."))


def to_int16(samples: Wave) -> NDArray[np.int16]:
    """Scale floats by 32768, round and clip them; leave int16 as it is."""
    if samples.dtype == np.int16:
        return samples.astype(np.int16, copy=False)
    scaled = samples * np.float32(INT16_SCALE)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -INT16_SCALE, INT16_SCALE - 1, out=scaled)
    return scaled.astype(np.int16)


def to_float32(samples: Wave) -> NDArray[np.float32]:
    """Divide int16 by 32768; leave floats as they are."""
    if samples.dtype == np.int16:
        return samples * np.float32(1 / INT16_SCALE)
    return samples.astype(np.float32, copy=False)
