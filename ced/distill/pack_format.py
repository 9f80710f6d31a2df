"""One HDF5 file of an audio pack: how its clips are written, and where in it the samples of a clip are.

Each clip is one contiguous dataset at 16 kHz, int16 or float32, of shape (t,), or (t, 2) if stereo was kept. Its name
is the clip's base name, or its whole filename, whose "/" make groups. Published packs have this form too. Files written
here have attributes in addition: of the file its format and version, the settings, and a fingerprint of the clips and
settings it was made from; of each clip `crc32`, the CRC-32 of its bytes.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from ced.errors import AudioError, PackError
from ced.files import errors_held
from ced.sound.audio import SAMPLE_RATE
from ced.text import quoted

FORMAT = "ced-pack"
FORMAT_VERSION = 2
CHECKSUM = b"crc32"
_LARGEST_RATIO = 1032  # deflate compresses zeros by this factor, and nothing by more

DType = Literal["int16", "float32"]
Wave = NDArray[np.int16] | NDArray[np.float32]


@dataclass(frozen=True)
class PackSettings:
    """How clips are stored and named."""

    dtype: DType
    stereo: bool
    fullname: bool

    def key(self, filename: str) -> str:
        """Return the name of a clip's dataset."""
        return key_of(filename, self.fullname)

    def attributes(self, filenames: Sequence[str]) -> dict[str, Any]:
        """Return the attributes of a file that is made from these clips."""
        settings = asdict(self)
        fingerprint = hashlib.sha256(json.dumps([filenames, settings]).encode()).hexdigest()
        about = {"format": FORMAT, "version": FORMAT_VERSION, "sample_rate": SAMPLE_RATE}
        return about | settings | {"fingerprint": fingerprint}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What packing made of a clip: its number of samples, or the reason why it was left out."""

    samples: int = 0
    failure: str | None = None


def key_of(filename: str, whole: bool) -> str:
    """Return the name of a clip's dataset: its whole filename, or its base name."""
    return whole_key(filename) if whole else os.path.basename(filename)


def whole_key(filename: str) -> str:
    """Return a filename as the name of a dataset in groups: without the empty parts and "." that HDF5 ignores."""
    return "/".join(part for part in filename.split("/") if part not in ("", "."))


def digest_path(table: Path) -> Path:
    """Return the path of the file with the SHA-256 of a pack's table."""
    return table.with_name(f"{table.name}.sha256")


def checksum_of(samples: NDArray[Any]) -> int:
    """Return the CRC-32 of the bytes of samples, in C order."""
    return zlib.crc32(np.ascontiguousarray(samples).data)


def write_file(
    path: Path, filenames: Sequence[str], waves: Iterable[Wave | AudioError], settings: PackSettings
) -> Iterator[Outcome]:
    """Write one file of a pack, and yield the outcome of each of its clips as it is written.

    Args:
        path: the file to write.
        filenames: n clips.
        waves: n, the samples of each clip, or why it has none; taken one at a time.
        settings: how the clips are stored and named.

    Raises:
        OSError: the disk is full.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_obj_track_times(False)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    naming = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    naming.set_char_encoding(h5py.h5t.CSET_UTF8)
    naming.set_create_intermediate_group(True)
    stored = h5py.h5t.STD_I16LE if settings.dtype == "int16" else h5py.h5t.IEEE_F32LE
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    # HDF5 must not see the error of a full disk: it would print tracebacks and crash when it closes the file.
    with errors_held(path) as held, h5py.File(held, "w", libver="earliest") as file:
        file.attrs.update(settings.attributes(filenames))
        for filename, wave in zip(filenames, waves, strict=True):
            if isinstance(wave, AudioError):
                yield Outcome(failure=wave.message)
                continue
            # These calls take half the time of create_dataset.
            key = settings.key(filename).encode()
            space = h5py.h5s.create_simple(wave.shape)
            dataset = h5py.h5d.create(file.id, key, stored, space, creation, naming)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, wave)
            checksum = h5py.h5a.create(dataset, CHECKSUM, h5py.h5t.STD_U32LE, scalar)
            checksum.write(np.array(checksum_of(wave), np.uint32))
            if held.error is not None:
                raise held.error
            yield Outcome(len(wave))


class SampleLayout(NamedTuple):
    """How the samples of a clip are stored."""

    dtype: np.dtype[Any]
    channels: int
    channels_first: bool  # (channels, t), as in some packs of other programs

    @property
    def direct(self) -> bool:
        """Whether the bytes of a contiguous dataset can be used as samples without conversion."""
        return self.dtype in (np.int16, np.float32) and self.dtype.isnative and not self.channels_first

    @property
    def frame(self) -> int:
        """Bytes of one sample in all channels."""
        return self.channels * self.dtype.itemsize


class ClipLocation(NamedTuple):
    """Where the samples of a clip are."""

    layout: SampleLayout
    samples: int
    offset: int | None  # of the first byte in the file; None: the samples have to be read by HDF5


class ClipIndex:
    """Finds the clips of an open file of a pack, whether it was written here or by another program."""

    def __init__(self, file: h5py.File) -> None:
        """Read the attributes of the file.

        Raises:
            PackError: an attribute is damaged, or the file has a link to another one.
        """
        self._file = file
        self._settings = _settings_of(file)
        self._mono: SampleLayout | None = None  # the layout of all clips, if the file's attributes give it
        if self._settings is not None and not self._settings.stereo:
            layout = SampleLayout(np.dtype(self._settings.dtype).newbyteorder("<"), 1, False)
            self._mono = layout if layout.direct else None
        self._dtypes: list[tuple[h5py.h5t.TypeID, np.dtype[Any]]] = []  # making a dtype takes longer than finding it
        self._refuse_links()

    def _refuse_links(self) -> None:
        """Refuse links to other files: offsets of their clips would be applied to this file, at another clip's samples.

        Raises:
            PackError: there is one.
        """
        external = h5py.h5l.TYPE_EXTERNAL
        link = self._file.id.links.visit(lambda name, info: name if info.type == external else None, info=True)
        if link is not None:
            where = link.decode(errors="backslashreplace")
            raise PackError(f"{self._file.filename} has a link {where} to another file; a pack holds its clips itself")

    def named_whole(self, filenames: Sequence[str]) -> bool:
        """Return whether clips are named by their whole filenames (True) or by their base names (False).

        Files of other programs have no attribute for it: theirs are whole if the first of `filenames` that has a folder
        is found by its whole name.

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

    def locate(self, key: str) -> ClipLocation | None:
        """Return where the samples of a clip are; None if the file has no such clip.

        Raises:
            PackError: the dataset has another type or shape than (t,) or (t, channels) of int16 or float samples, or
                is damaged.
        """
        try:
            dataset = h5py.h5d.open(self._file.id, key.encode())
        except (KeyError, ValueError):  # not found, or not a dataset
            return None
        offset = dataset.get_offset()
        if (
            self._mono is not None and offset is not None
        ):  # not asking HDF5 for type and shape saves a third of the time
            return ClipLocation(self._mono, dataset.get_storage_size() // self._mono.frame, offset)
        shape, dtype = dataset.shape, self._dtype(dataset)
        if len(shape) not in (1, 2) or not (dtype.kind == "f" or (dtype.kind, dtype.itemsize) == ("i", 2)):
            kinds = "int16 or float samples, (t,) or (t, channels)"
            raise PackError(
                f"clip {quoted(key)} in {self._file.filename} is {dtype} of shape {shape}; expected {kinds}"
            )
        self._check_storage(key, dataset, math.prod(shape) * dtype.itemsize)
        first = len(shape) == 2 and shape[0] < shape[1]
        samples, channels = (shape[1], shape[0]) if first else (shape[0], shape[1] if len(shape) == 2 else 1)
        layout = SampleLayout(dtype, channels, first)
        return ClipLocation(layout, samples, offset if layout.direct else None)

    def _check_storage(self, key: str, dataset: h5py.h5d.DatasetID, size: int) -> None:
        """Refuse samples that are in another file, or a dataset with fewer bytes than its shape needs."""
        creation, stored = dataset.get_create_plist(), dataset.get_storage_size()
        if creation.get_layout() == h5py.h5d.VIRTUAL or creation.get_external_count():
            raise PackError(
                f"clip {quoted(key)} of {self._file.filename} is stored in another file; a pack holds its clips itself"
            )
        contiguous = creation.get_layout() == h5py.h5d.CONTIGUOUS
        if size > (stored if contiguous else stored * _LARGEST_RATIO):
            raise PackError(
                f"{self._file.filename} is damaged: clip {quoted(key)} needs {size:,} bytes and has {stored:,}"
            )

    def _dtype(self, dataset: h5py.h5d.DatasetID) -> np.dtype[Any]:
        kind = dataset.get_type()
        for known, dtype in self._dtypes:
            if known.equal(kind):
                return dtype
        self._dtypes.append((kind, kind.dtype))
        return self._dtypes[-1][1]


def checksum_in(file: h5py.File, key: str) -> int | None:
    """Return the stored checksum of a clip; None if it has none, as in packs of other programs."""
    dataset = h5py.h5d.open(file.id, key.encode())
    if not h5py.h5a.exists(dataset, CHECKSUM):
        return None
    found = np.zeros((), np.uint32)
    h5py.h5a.open(dataset, CHECKSUM).read(found)
    return int(found)


def _settings_of(file: h5py.File) -> PackSettings | None:
    """Return the settings of a file written here; None for one of another program.

    Raises:
        PackError: the attributes have values that are not allowed.
    """
    found = file.attrs
    if str(found.get("format")) != FORMAT or found.get("version") != FORMAT_VERSION:
        return None
    settings = PackSettings(found["dtype"], bool(found["stereo"]), bool(found["fullname"]))
    if settings.dtype not in ("int16", "float32") or found["sample_rate"] != SAMPLE_RATE:
        raise PackError(
            f"{file.filename} is damaged: dtype {settings.dtype!r}, sample_rate {found['sample_rate']!r}; "
            f"a pack has int16 or float32 and {SAMPLE_RATE}"
        )
    return settings
