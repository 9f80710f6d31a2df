"""Files in object stores (S3, Google Cloud, Azure) and on the Hugging Face hub, through the file systems of fsspec.

Credentials are found as the client of each store finds them: in its environment variables, files and services, and in
fsspec's configuration. Messages and names of sounds have none.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import IO, Any

from ced.environment import SWITCHES
from ced.errors import AudioError, CedError, MissingPackageError, WriteError, optional_packages
from ced.progress import Progress, silent

os.environ.update(SWITCHES)  # fsspec imports the hub's client for hf://

# The module that opens the addresses of each scheme. fsspec has more schemes, such as those of local files and of web
# servers, which have rules of their own here.
_MODULES = {
    "s3": "s3fs",
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
    "memory": "fsspec",  # files of this process
}
_ADDRESS = re.compile(rf"({'|'.join(_MODULES)}):/+(.*)", re.DOTALL | re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*@")
_QUERY = re.compile(r"\?[^\s/?]*=[^\s]*")  # of addresses: versions, signatures; "?" alone may be part of a name
WHOLE = 1 << 25  # bytes that are read in one request
_BLOCK, _BLOCKS = 1 << 22, 8  # bytes of a request for a part of a larger file, and how many are kept
_UPLOADED = 64  # files that are uploaded between two reports of progress
_PROBE = ".ced-write-test"  # an object that is written and removed, to find out whether a store can be written to
_ENDS = "{} bytes arrived instead of {}; the file has changed, or the server does not send ranges"
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")

Stamp = tuple[int, int]  # size in bytes, and a number that changes with the content


class Listed(str):
    """The address of a file in a listing, or the name of a sound in it, with what was known of the file at that time.

    Attributes:
        stamp: changes when the file does; None: unknown.
        modified: when it was changed, in seconds since 1970; 0: unknown.
    """

    stamp: Stamp | None
    modified: float

    def __new__(cls, name: str, stamp: Stamp | None = None, modified: float = 0.0) -> "Listed":
        """Add the attributes to a name."""
        made = super().__new__(cls, name)
        made.stamp, made.modified = stamp, modified
        return made


def address_of(name: str | os.PathLike[str]) -> str | None:
    """Return the address that a name is; None for other names. `Path` removes a slash, which is added again."""
    found = _ADDRESS.match(os.fspath(name))
    if found is None:
        return None
    address = f"{found[1].lower()}://{found[2]}"
    return name if name == address and isinstance(name, str) else address


def without_secrets(text: str) -> str:
    """Return text with the passwords of addresses masked by ***, and without their queries."""
    return _QUERY.sub("", _PASSWORD.sub(r"\1:***@", text))


def has_wildcards(address: str) -> bool:
    """Return whether an address has `*`, `?` or `[`, outside of a query; they may be part of the name of a file."""
    return has_magic(_QUERY.sub("", address))


def is_pattern(address: str) -> bool:
    """Return whether an address has wildcards and is not the name of a file or folder itself, which the store is asked.

    Raises:
        AudioError: the store cannot be asked.
        MissingPackageError: the package for its scheme is not installed.
    """
    if not has_wildcards(address):
        return False
    with _reading(address):
        _, system, path = _located(address)
        return not system.exists(path)


def check_installed(address: str) -> None:
    """Check that an address can be read here at all; its store is not asked.

    Raises:
        MissingPackageError: the package for its scheme is not installed.
    """
    _import_file_system(address.partition(":")[0])


@cache
def _import_file_system(scheme: str) -> None:
    with optional_packages("the address"):
        from fsspec import get_filesystem_class
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        raise MissingPackageError(_MODULES[scheme], f"an address with {scheme}://") from error


def find(address: str) -> Iterator[Listed]:
    """Yield the files below a folder or that match a pattern, in sorted order, or the one file at an address.

    Raises:
        AudioError: it does not exist, or cannot be listed.
        MissingPackageError: the package for its scheme is not installed.
    """
    with _reading(address):
        root, system, path = _located(address)
        if is_pattern(address):
            found = system.glob(path, detail=True)
        elif (info := system.info(path))["type"] == "directory":
            found = system.find(path, detail=True)
        else:
            yield Listed(address, _stamp(info))
            return
        yield from _listed(root, system, found)


def find_below(folder: str) -> list[Listed]:
    """Return the files below a folder in sorted order; none if it does not exist.

    Raises:
        AudioError: it cannot be listed.
        MissingPackageError: the package for its scheme is not installed.
    """
    with _reading(folder):
        root, system, path = _located(folder)
        try:
            return list(_listed(root, system, system.find(path, detail=True)))
        except FileNotFoundError:
            return []


def open_file(address: str, at_once: int | None = None) -> IO[bytes]:
    """Open a file: those of up to `at_once` bytes (None: `WHOLE`) are read at once, others in blocks.

    Raises:
        AudioError: it does not exist, or cannot be read. Reading raises OSError.
        MissingPackageError: the package for its scheme is not installed.
    """
    with _reading(address):
        _, system, path = _located(address)
        stamp = address.stamp if isinstance(address, Listed) else None
        size = stamp[0] if stamp is not None else int(system.info(path)["size"])
        if size <= (WHOLE if at_once is None else at_once):
            return io.BytesIO(_content(system, path, 0, size))
        return io.BufferedReader(_Blocks(system, path, size), 1 << 16)


def read_range(address: str, start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` to `end`, in one request.

    Raises:
        AudioError: it does not exist, cannot be read, or ends before `end`.
        MissingPackageError: the package for its scheme is not installed.
    """
    with _reading(address):
        _, system, path = _located(address)
        return _content(system, path, start, end)


def modified_ns(address: str) -> int:
    """Return when a file was changed, in ns since 1970.

    Raises:
        AudioError: it cannot be asked for.
    """
    with _reading(address):
        _, system, path = _located(address)
        return int(system.modified(path).timestamp() * 1e9)


def stamp_of(address: str) -> Stamp | None:
    """Return the stamp of a file; None if it does not exist.

    Raises:
        AudioError: it cannot be asked for.
    """
    with _reading(address):
        _, system, path = _located(address)
        try:
            return _stamp(system.info(path))
        except FileNotFoundError:
            return None


def download(address: str, path: Path) -> bool:
    """Copy a file to a local path; return whether it exists.

    Raises:
        AudioError: it cannot be read.
    """
    with _reading(address):
        _, system, place = _located(address)
        try:
            system.get_file(place, str(path))
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return False
        return True


def remove(address: str) -> None:
    """Remove a file, if it exists.

    Raises:
        WriteError: it cannot be removed.
    """
    with _writing(address):
        _, system, path = _located(address)
        if system.exists(path):
            system.rm_file(path)


def upload(files: Mapping[Path, str], progress: Progress = silent) -> None:
    """Copy local files to addresses of one store, in order; each appears there when it is complete.

    Raises:
        WriteError: one cannot be written.
        MissingPackageError: the package for the scheme is not installed.
    """
    pairs = list(files.items())
    for done in range(0, len(pairs), _UPLOADED):
        some = pairs[done : done + _UPLOADED]
        with _writing(some[0][1]):
            _, system, _ = _located(some[0][1])
            system.put([str(path) for path, _ in some], [system._strip_protocol(address) for _, address in some])
        progress("upload", min(done + _UPLOADED, len(pairs)), len(pairs))


def check_writable(folder: str) -> None:
    """Check, before any work is done, that files can be written below an address, by writing and removing one.

    Raises:
        WriteError: they cannot, or its files are only read here.
        MissingPackageError: the package for its scheme is not installed.
    """
    if folder.startswith("hf:"):
        raise WriteError(folder, "each file would be a commit; write to a folder, and upload it with `hf upload`")
    with _writing(folder):
        _, system, path = _located(f"{folder.rstrip('/')}/{_PROBE}")
        system.pipe_file(path, b"")
        with suppress(PermissionError):  # to remove files
            system.rm_file(path)


class _Blocks(io.RawIOBase):
    """A large file, read in blocks as they are needed; the last ones are kept."""

    def __init__(self, system: Any, path: str, size: int) -> None:
        kept = {"maxblocks": _BLOCKS}
        self._file = system.open(path, "rb", block_size=_BLOCK, cache_type="blockcache", cache_options=kept)
        self._size = size

    def readinto(self, buffer: Any) -> int:
        """Read up to as many bytes as `buffer` has; 0 at the end."""
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # clients of stores raise errors of all kinds
            raise OSError(None, _reason(error)) from error
        if not data and len(buffer) and self._file.tell() < self._size:
            raise OSError(None, _ENDS.format(self._file.tell(), self._size))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, place: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to an offset."""
        return int(self._file.seek(place, whence))

    def tell(self) -> int:
        """Return the current offset."""
        return int(self._file.tell())

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self._file.close()
        super().close()


def _content(system: Any, path: str, start: int, end: int) -> bytes:
    """Return a range of a file; servers may send another one, or less of a file that has changed."""
    data: bytes = system.cat_file(path, start=start, end=end) if end > start else b""
    if len(data) != end - start:
        raise OSError(None, _ENDS.format(len(data), end - start))
    return data


def _located(address: str) -> tuple[str, Any, str]:
    """Return the scheme and host of an address, its file system, and the path there."""
    if _PASSWORD.search(address):  # the clients would take it for a part of the name, and show it in messages
        raise OSError(None, "user names and passwords in addresses are not used; see the credentials in docs/cloud.md")
    scheme, _, rest = address.partition("://")
    root = f"{scheme}://{rest.partition('/')[0]}"
    system = _file_system(root, os.getpid())
    return root, system, system._strip_protocol(address)


@cache
def _file_system(root: str, process: int) -> Any:
    """Return the file system of an address; its connections are shared by threads, but not across a fork."""
    check_installed(root)
    from fsspec.core import url_to_fs

    return url_to_fs(root, use_listings_cache=False, skip_instance_cache=True)[0]  # files may change


def _listed(root: str, system: Any, found: Mapping[str, Any]) -> Iterator[Listed]:
    """Yield the files among what a store has listed."""
    start = len(system._strip_protocol(root))
    for place in sorted(found, key=lambda place: place.split("/")):
        info = found[place]
        if info["type"] == "file" and not place.endswith("/"):  # an empty object may stand for a folder
            times = (info[key].timestamp() for key in _VERSIONS if isinstance(info.get(key), datetime))
            yield Listed(f"{root}{place[start:]}", _stamp(info), next(times, 0.0))


def _stamp(info: Mapping[str, Any]) -> Stamp:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    text = str(version.timestamp() if isinstance(version, datetime) else version).strip('"')
    return int(info["size"]), int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


@contextmanager
def _reading(address: str) -> Iterator[None]:
    try:
        yield
    except CedError:
        raise
    except Exception as error:  # clients of stores raise errors of all kinds
        raise AudioError(f"cannot be read: {_reason(error)}", without_secrets(address)) from error


@contextmanager
def _writing(address: str) -> Iterator[None]:
    try:
        yield
    except CedError:
        raise
    except Exception as error:  # clients of stores raise errors of all kinds
        raise WriteError(without_secrets(address), _reason(error)) from error


def _reason(error: BaseException) -> str:
    """Return the error of a client in one line without credentials."""
    if isinstance(error, FileNotFoundError):
        return "no such file or bucket"
    told = " ".join(without_secrets(str(getattr(error, "strerror", None) or error)).split())
    if isinstance(error, PermissionError):
        return f"no permission: {told}" if told else "no permission"
    if type(error) is OSError and told:
        return told
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
