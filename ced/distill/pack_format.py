"""One HDF5 file of an audio pack: how it is written, and where in it the samples of a clip are.

Each clip is one contiguous dataset at 16 kHz, int16 or float32, (t,), or (t, 2) if stereo was kept. It is named by the
clip's base name, or by its whole filename, whose "/" make groups. Packs have been published in this form; what files
written here have beyond it are attributes: of the file a format and its version, the settings, and a fingerprint of
what it was made from; of each clip `crc32`, the CRC-32 of its bytes.
"""

import hashlib
import json
import math
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, PackError
from ced.files import errors_held
from ced.sound.audio import SAMPLE_RATE, load_stored
from ced.sound.decode import FULL_SCALE, to_float
from ced.text import quoted

FORMAT = "ced-pack"
FORMAT_VERSION = 2
CHECKSUM = b"crc32"
_LARGEST_RATIO = 1032  # of a compressed dataset: what deflate makes of zeros
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
        return key_of(filename, self.fullname)

    def decode(self, filename: str) -> Wave | str:
        """Return the samples of a clip, or why there are none."""
        try:
            filename.encode()
        except UnicodeEncodeError:
            return f"the name of {filename} is no UTF-8, as names in HDF5 files are; rename the file"
        try:
            samples = load_stored(filename, self.stereo)
        except AudioError as error:
            return error.message
        return to_int16(samples) if self.dtype == "int16" else to_float(samples)


@dataclass(frozen=True)
class Part:
    """One file of a pack, and the clips that it is for."""

    path: Path
    filenames: Sequence[str]
    settings: Settings

    def attributes(self) -> dict[str, Any]:
        """Return what the file says of itself."""
        settings = asdict(self.settings)
        fingerprint = hashlib.sha256(json.dumps([self.filenames, settings]).encode()).hexdigest()
        form = {"format": FORMAT, "version": FORMAT_VERSION, "sample_rate": SAMPLE_RATE}
        return form | settings | {"fingerprint": fingerprint}


def write(part: Part, path: Path, pool: Executor, threads: int) -> Iterator[Outcome]:
    """Write a part to `path`, and yield the outcome of each of its clips.

    The threads only decode: clips are written here, in their order, so that the bytes do not depend on the threads.

    Raises:
        OSError: the disk is full.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    naming = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    naming.set_char_encoding(h5py.h5t.CSET_UTF8)
    naming.set_create_intermediate_group(True)
    stored = h5py.h5t.STD_I16LE if part.settings.dtype == "int16" else h5py.h5t.IEEE_F32LE
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    # HDF5 itself must not see that a disk is full: it would print tracebacks and crash when it closes the file.
    with errors_held(path) as held, h5py.File(held, "w", libver="earliest") as file:
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
            checksum = h5py.h5a.create(dataset, CHECKSUM, h5py.h5t.STD_U32LE, scalar)
            checksum.write(np.array(checksum_of(wave), np.uint32))
            if held.error is not None:
                raise held.error
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


def checksum_of(samples: NDArray[Any]) -> int:
    """Return the CRC-32 of the bytes of samples, in C order."""
    return zlib.crc32(np.ascontiguousarray(samples).data)


def outcomes_of(part: Part) -> list[Outcome] | None:
    """Return the outcomes of a part that is complete, or None if it has to be written (again).

    It has to be if it is not there, is damaged, was made from other clips or settings, is older than one of its clips,
    or lacks one that can be read by now.
    """
    try:
        written = part.path.stat().st_mtime_ns
        with h5py.File(part.path, "r") as file:
            if dict(file.attrs) != part.attributes():
                return None
            clips = Clips(file)
            places = [clips.place(part.settings.key(filename)) for filename in part.filenames]
    except Exception:  # HDF5 fails in many ways on a damaged file
        return None
    outcomes: list[Outcome] = []
    for filename, place in zip(part.filenames, places, strict=True):
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
        return 0  # it is gone, but was packed


class Layout(NamedTuple):
    """How the samples of a clip are stored."""

    dtype: np.dtype[Any]
    channels: int
    channels_first: bool  # (channels, t), as some packs have it

    @property
    def direct(self) -> bool:
        """Return whether the bytes of a contiguous dataset are frames as they are read."""
        return self.dtype in (np.int16, np.float32) and self.dtype.isnative and not self.channels_first

    @property
    def frame(self) -> int:
        """Return the bytes of one sample in all channels."""
        return self.channels * self.dtype.itemsize


class Place(NamedTuple):
    """Where the samples of a clip are."""

    layout: Layout
    samples: int
    offset: int | None  # of the first byte in the file; None if they do not lie there as they are


class Clips:
    """The clips of an open file of a pack, written here or by another program."""

    def __init__(self, file: h5py.File) -> None:
        """Read the attributes of the file.

        Raises:
            PackError: an attribute is damaged, or something in the file lies in another one.
        """
        self._file = file
        self._settings = _settings_of(file)
        self._mono: Layout | None = None  # what all clips have, if the file says so
        if self._settings is not None and not self._settings.stereo:
            layout = Layout(np.dtype(self._settings.dtype).newbyteorder("<"), 1, False)
            self._mono = layout if layout.direct else None
        self._dtypes: list[tuple[h5py.h5t.TypeID, np.dtype[Any]]] = []  # a dtype takes longer to make than to find
        self._refuse_links()

    def _refuse_links(self) -> None:
        """Refuse links to other files: their offsets would be looked up in this one, where a neighbour's samples lie.

        Raises:
            PackError: there is one.
        """
        external = h5py.h5l.TYPE_EXTERNAL
        link = self._file.id.links.visit(lambda name, info: name if info.type == external else None, info=True)
        if link is not None:
            where = link.decode(errors="backslashreplace")
            raise PackError(f"{self._file.filename} has a link {where} to another file; a pack holds its clips itself")

    def named_whole(self, filenames: Sequence[str]) -> bool:
        """Return whether clips are named by their whole filenames, or else by their base names.

        Files of other programs have no attribute for it: they are if the first clip in a folder has its whole name.

        Raises:
            PackError: they are named by their base names, and two of `filenames` have the same one.
        """
        if self._settings is not None:
            whole = self._settings.fullname
        else:
            whole = next((key in self._file for key in map(whole_key, filenames) if "/" in key), False)
        owners: dict[str, str] = {}
        for filename in () if whole else filenames:
            key = os.path.basename(filename)
            owner = owners.setdefault(key, filename)
            if owner != filename and whole_key(owner) != whole_key(filename):
                both = f"{quoted(owner)} and {quoted(filename)}"
                raise PackError(f"{self._file.filename} has one clip {quoted(key)} for two rows, {both}")
        return whole

    def place(self, key: str) -> Place | None:
        """Return where a clip is; None if it is not there.

        Raises:
            PackError: there is something else than int16 or float samples, (t,) or in channels, or it is damaged.
        """
        try:
            dataset = h5py.h5d.open(self._file.id, key.encode())
        except (KeyError, ValueError):  # not there; not a dataset
            return None
        offset = dataset.get_offset()
        if self._mono is not None and offset is not None:  # sparing HDF5 its type and shape saves a third of the time
            return Place(self._mono, dataset.get_storage_size() // self._mono.frame, offset)
        shape, dtype = dataset.shape, self._dtype(dataset)
        if len(shape) not in (1, 2) or not (dtype.kind == "f" or (dtype.kind, dtype.itemsize) == ("i", 2)):
            kinds = "int16 or float samples, (t,) or (t, channels)"
            raise PackError(
                f"clip {quoted(key)} in {self._file.filename} is {dtype} of shape {shape}; expected {kinds}"
            )
        self._check_storage(key, dataset, math.prod(shape) * dtype.itemsize)
        first = len(shape) == 2 and shape[0] < shape[1]
        samples, channels = (shape[1], shape[0]) if first else (shape[0], shape[1] if len(shape) == 2 else 1)
        layout = Layout(dtype, channels, first)
        return Place(layout, samples, offset if layout.direct else None)

    def _check_storage(self, key: str, dataset: h5py.h5d.DatasetID, size: int) -> None:
        """Refuse samples that lie in another file, or of which the file has less than it claims."""
        creation, there = dataset.get_create_plist(), dataset.get_storage_size()
        if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
            raise PackError(
                f"clip {quoted(key)} of {self._file.filename} lies in another file; a pack holds its clips itself"
            )
        contiguous = creation.get_layout() == h5py.h5d.CONTIGUOUS
        if size > (there if contiguous else there * _LARGEST_RATIO):
            raise PackError(
                f"{self._file.filename} is damaged: clip {quoted(key)} claims {size:,} bytes and has {there:,}"
            )

    def _dtype(self, dataset: h5py.h5d.DatasetID) -> np.dtype[Any]:
        kind = dataset.get_type()
        for known, dtype in self._dtypes:
            if known.equal(kind):
                return dtype
        self._dtypes.append((kind, kind.dtype))
        return self._dtypes[-1][1]


def checksum_in(file: h5py.File, key: str) -> int | None:
    """Return the checksum of a clip; None if it has none, as in packs of other programs."""
    dataset = h5py.h5d.open(file.id, key.encode())
    if not h5py.h5a.exists(dataset, CHECKSUM):
        return None
    found = np.zeros((), np.uint32)
    h5py.h5a.open(dataset, CHECKSUM).read(found)
    return int(found)


def _settings_of(file: h5py.File) -> Settings | None:
    """Return the settings that a file written here has, None for one of another program."""
    said = file.attrs
    if str(said.get("format")) != FORMAT or said.get("version") != FORMAT_VERSION:
        return None
    settings = Settings(said["dtype"], bool(said["stereo"]), bool(said["fullname"]))
    if settings.dtype not in ("int16", "float32") or said["sample_rate"] != SAMPLE_RATE:
        raise PackError(
            f"{file.filename} is damaged: dtype {settings.dtype!r}, sample_rate {said['sample_rate']!r}; "
            f"a pack has int16 or float32 and {SAMPLE_RATE}"
        )
    return settings


def key_of(filename: str, whole: bool) -> str:
    """Return the name of a clip's dataset: its whole filename, or its base name."""
    return whole_key(filename) if whole else os.path.basename(filename)


def whole_key(filename: str) -> str:
    """Return the name of a dataset in groups, without the "/" and "." that HDF5 passes over."""
    return "/".join(part for part in filename.split("/") if part not in ("", "."))


def to_int16(samples: Wave) -> NDArray[np.int16]:
    """Scale floats by their full scale, round and clip them; leave int16 as it is."""
    if samples.dtype == np.int16:
        return samples.astype(np.int16, copy=False)
    scaled = samples * np.float32(FULL_SCALE)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled)
    return scaled.astype(np.int16)
