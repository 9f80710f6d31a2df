"""Outputs in stores (`ced.remote`): written to a local folder first, and uploaded when they are complete."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ced import remote
from ced.files import claimed, writing
from ced.model.zoo import cache_dir
from ced.progress import Progress, silent
from ced.tag.batch import ERRORS_NAME, JOURNAL_NAME
from ced.tag.scores import UNFINISHED

_BEGUN = "begun.json"  # beside the outputs: the stamp of the store's journal when they were begun


@contextmanager
def local_file(out: Path) -> Iterator[Path]:
    """Yield a local path to write a file to; if `out` is an address, it is uploaded at the end, with files beside it.

    Raises:
        WriteError: it cannot be uploaded.
        MissingPackageError: the package for the store is not installed.
    """
    address = remote.address_of(out)
    if address is None:
        yield out
        return
    folder, _, name = address.rpartition("/")
    remote.check_writable(folder)
    with tempfile.TemporaryDirectory(prefix="ced-") as place:
        yield Path(place, name)
        remote.upload({path: f"{folder}/{path.name}" for path in sorted(Path(place).iterdir())})


@contextmanager
def local_folder(out: Path, progress: Progress = silent) -> Iterator[Path]:
    """Yield a local folder for the outputs of `runs.tag_to_folder`; for an address, they are uploaded at the end.

    The journal of an earlier run is downloaded, so that it can be continued on any machine. An interrupted run uploads
    nothing; its outputs stay in the cache, where the next run on this machine resumes, unless another one has uploaded
    outputs in the meantime. The journal is uploaded last.

    Raises:
        AudioError: the journal cannot be read.
        WriteError: files cannot be uploaded.
        BusyError: another process of this machine writes to the address.
        MissingPackageError: the package for the store is not installed.
    """
    address = remote.address_of(out)
    if address is None:
        yield out
        return
    remote.check_writable(address)
    address = address.rstrip("/")
    place = outputs_folder(address)
    with claimed(place):
        folder = place / "folder"
        _begin(address, place, folder)
        yield folder
        _upload(address, folder, progress)
        shutil.rmtree(place)


def outputs_folder(address: str) -> Path:
    """Return the folder of the cache for outputs at an address, to be claimed by the process that writes there."""
    return cache_dir() / "outputs" / hashlib.sha256(address.encode()).hexdigest()[:32]


def _begin(address: str, place: Path, folder: Path) -> None:
    """Prepare the local folder: keep that of an interrupted run, or begin with the journal in the store."""
    stamp = remote.stamp_of(f"{address}/{JOURNAL_NAME}")
    begun = json.dumps({"journal": stamp})
    marker = place / _BEGUN
    if marker.is_file() and marker.read_text(encoding="utf-8") == begun:
        return
    with writing(place):
        shutil.rmtree(place, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in (JOURNAL_NAME, ERRORS_NAME):
            remote.download(f"{address}/{name}", folder / name)
        marker.write_text(begun, encoding="utf-8")


def _upload(address: str, folder: Path, progress: Progress) -> None:
    """Upload the outputs; the journal is the last one, so what it names is there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.relative_to(folder).parts[0] != UNFINISHED]
    files.sort(key=lambda path: path == folder / JOURNAL_NAME)
    remote.upload({path: f"{address}/{path.relative_to(folder).as_posix()}" for path in files}, progress)
    if not (folder / ERRORS_NAME).exists():
        remote.remove(f"{address}/{ERRORS_NAME}")
