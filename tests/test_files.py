"""Files that are there whole or not at all, and are never written through links."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from ced import files
from ced.errors import BusyError, CedError, WriteError
from ced.files import claimed, make_folders, name_with, open_to_append, remove_leftovers, written_aside

POSIX = pytest.mark.skipif(os.name == "nt", reason="links and FIFOs as POSIX has them")


def test_files_are_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_aside(path) as aside:
        assert aside.parent == tmp_path
        assert aside.name.endswith(".partial")
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fault", [ValueError("no"), KeyboardInterrupt()])
def test_a_failed_write_changes_nothing(tmp_path: Path, fault: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise fault

    with pytest.raises(type(fault)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with written_aside(path) as first:
        first.write_text("first")
        with written_aside(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


@POSIX
def test_no_link_is_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("kept")
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "a.txt"
    for name in ("a.txt", "a.txt.partial"):
        (folder / name).symlink_to(outside)
    with written_aside(path) as aside:
        aside.write_text("new")
    assert outside.read_text() == "kept"
    assert not path.is_symlink()
    assert path.read_text() == "new"


@POSIX
def test_a_link_in_place_of_the_temporary_file_is_an_error(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("kept")

    def swap() -> None:
        with written_aside(tmp_path / "a.txt") as aside:
            aside.unlink()
            aside.symlink_to(outside)

    with pytest.raises(WriteError, match="link"):
        swap()
    assert list(tmp_path.iterdir()) == [outside]


@POSIX
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_only_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(WriteError, match=re.escape(str(path))), written_aside(path):
        raise AssertionError("it was given to write to")
    assert list(tmp_path.iterdir()) == [path]


def test_long_names_have_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".txt")
    with written_aside(path) as aside:
        aside.write_text("x")
    assert path.read_text() == "x"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.txt"
    with pytest.raises(WriteError, match=f"{re.escape(str(path))}: No such file") as raised, written_aside(path):
        pass
    assert raised.value.path == str(path)
    assert isinstance(raised.value, CedError)


def test_permissions_are_those_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with written_aside(tmp_path / "a") as aside:
        aside.write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@POSIX
def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom ced.files import written_aside\n"
        "with written_aside(Path(sys.argv[1])) as aside:\n"
        "    aside.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "deep" / "a.txt"
    path.parent.mkdir()
    (tmp_path / "song.partial").write_text("of the user")
    done = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = path.parent.iterdir()
    with written_aside(path) as aside:
        aside.write_text("whole")
    assert set(path.parent.iterdir()) == {left, path}  # for all this process knows, another is writing it
    remove_leftovers(path.with_name("b.txt"))
    assert left.exists()
    for place in (path, tmp_path):
        left.touch()
        remove_leftovers(place)
        assert list(path.parent.iterdir()) == [path]
    assert (tmp_path / "song.partial").exists()


def test_a_stale_temporary_file_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    old, new = tmp_path / "b.txt.0123abcd.partial", tmp_path / "a.txt.0123abcd.partial"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 2 * files._STALE,) * 2)
    with written_aside(tmp_path / "a.txt") as aside:
        aside.write_text("x")
    assert set(tmp_path.iterdir()) == {new, tmp_path / "a.txt"}


@POSIX
def test_folders_are_created_only_below_their_root(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "out"
    assert make_folders(root, Path("a/b")) == root / "a" / "b"
    assert make_folders(root, Path("a/b")).is_dir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    for bad in ("link", "link/deep", "../elsewhere"):
        with pytest.raises(WriteError, match="out"):
            make_folders(root, Path(bad))
    with pytest.raises(WriteError, match="out"):
        make_folders(root, tmp_path / "elsewhere" / "deep")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "named").symlink_to(root)
    assert make_folders(tmp_path / "named", Path("c")).is_dir()  # the root itself may be a link


@POSIX
def test_a_link_in_place_of_a_lock_is_named(tmp_path: Path) -> None:
    lock = tmp_path / ".journal.jsonl.lock"
    lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match=r"\.journal\.jsonl\.lock: it is a link"), claimed(tmp_path / "journal.jsonl"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_names_fit_into_file_systems() -> None:
    assert name_with("a.wav", ".csv") == "a.wav.csv"
    assert name_with("a" * 251, ".csv") == "a" * 251 + ".csv"
    for name in ("a" * 252, "虫" * 84, "a" * 251 + "\udce9"):
        names = {name_with(name, ".selections.txt"), name_with(f"{name}b", ".selections.txt")}
        assert len(names) == 2
        for found in names:
            assert len(os.fsencode(found)) <= 255
            assert found.endswith(".selections.txt")
            assert found.startswith(name[:70])


@POSIX
def test_appending_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"kept")
    (tmp_path / "link").symlink_to(outside)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(WriteError, match=name):
            open_to_append(tmp_path / name)
    with open_to_append(tmp_path / "new") as file:
        file.write(b"one")
    with open_to_append(tmp_path / "new") as file:
        file.write(b"two")
        file.seek(0)
        assert file.read() == b"onetwo"


def _write_bytes(path: Path) -> None:
    path.write_bytes(bytes(1 << 20))


def _write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=np.ones(1 << 18))


def _write_torch(path: Path) -> None:
    torch.save(torch.ones(1 << 18), path)


def _write_parquet(path: Path) -> None:
    table = pyarrow.table({"x": np.random.default_rng(0).normal(size=1 << 18)})
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("write", [_write_bytes, _write_hdf5, _write_torch, _write_parquet])
def test_a_full_disk_is_one_line_naming_the_file(small_disk: Path, write: Callable[[Path], None]) -> None:
    path = small_disk / "a.bin"
    with pytest.raises(WriteError, match=r"a\.bin: No space left on device$") as raised, written_aside(path) as aside:
        write(aside)
    assert "\n" not in str(raised.value)
    assert list(small_disk.iterdir()) == []


def test_a_claim_waits_for_another_process_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with claimed(tmp_path / "out"):
            held.set()
            free.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with pytest.raises(BusyError, match="out"), claimed(tmp_path / "out"):
        pass
    threading.Timer(0.2, free.set).start()
    with caplog.at_level(logging.INFO), claimed(tmp_path / "out", wait=60):
        assert free.is_set()
    assert "waiting" in caplog.text
    holder.join()
    assert list(tmp_path.iterdir()) == []
