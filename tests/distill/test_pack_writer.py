import logging
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.distill.pack_reader import AudioPack
from ced.distill.pack_writer import pack
from ced.errors import BusyError, CedError, ConfigError, PackError, TableError
from ced.files import claimed
from ced.sound.audio import load
from ced.sound.tables import read_table, write_table

RATE = 16_000


def samples_of(seed: int, length: int = 800, channels: int = 1) -> NDArray[np.int16]:
    """Return int16 noise over the whole range, (t,) or (t, channels)."""
    drawn = np.random.default_rng(seed).integers(-(2**15), 2**15, (length, channels)).astype(np.int16)
    return drawn[:, 0] if channels == 1 else drawn


def write_clips(folder: Path, count: int) -> list[str]:
    """Write clips of many kinds and rates: WAV, FLAC, OGG; 16-bit and float; mono and stereo."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        rate = (RATE, RATE, 44_100, 8_000)[number % 4]
        path = folder / f"clip{number}.{('wav', 'flac', 'wav', 'ogg')[number % 4]}"
        wave = samples_of(number, 500 + 10 * number, 1 + number % 3 // 2) / 2**16
        soundfile.write(path, wave, rate, subtype="FLOAT" if number % 8 == 2 else None)
        names.append(str(path))
    return names


def table_of(path: Path, filenames: list[str], **columns: list[str]) -> Path:
    write_table(path, {"filename": filenames, **columns})
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def test_sixteen_bit_clips_are_packed_as_they_are(tmp_path: Path) -> None:
    waves = {f"c{seed}.wav": samples_of(seed, 700 + seed) for seed in range(3)}
    for name, wave in waves.items():
        soundfile.write(tmp_path / name, wave, RATE)
    names = [str(tmp_path / name) for name in waves]
    table = table_of(tmp_path / "mine.tsv", names, labels=["0", "1;2", ""])
    report = pack(table, tmp_path / "out", duration=True)
    index = tmp_path / "out" / "labels" / "mine.tsv"
    part = tmp_path / "out" / "hdf5" / "mine_0.h5"
    assert (report.index, report.packed, report.failed, report.parts, report.kept) == (index, 3, (), 1, 0)
    assert read_table(index).columns == {
        "filename": names,
        "labels": ["0", "1;2", ""],
        "duration": ["0.0437", "0.0438", "0.0439"],
        "hdf5path": [str(part)] * 3,
    }
    assert files_in(tmp_path / "out").keys() == {"labels/mine.tsv", "labels/mine.tsv.sha256", "hdf5/mine_0.h5"}
    with h5py.File(part) as file:  # as other programs read it
        assert list(file) == list(waves)
        for name, wave in waves.items():
            assert file[name].dtype == np.int16
            assert file[name].chunks is None
            assert file[name].attrs["crc32"] == zlib.crc32(wave.tobytes())
            np.testing.assert_array_equal(file[name][:], wave)


def test_other_clips_are_scaled_averaged_and_resampled(tmp_path: Path) -> None:
    names = write_clips(tmp_path / "clips", 8)
    loud = str(tmp_path / "loud.wav")
    soundfile.write(loud, np.array([0.5, 1.5, -2.0, 1 / 32768, 0.6 / 32768]), RATE, subtype="FLOAT")
    report = pack(table_of(tmp_path / "mine.tsv", [*names, loud]), tmp_path / "out")
    packed = AudioPack(report.index)
    for row, name in enumerate(names):
        expected = np.clip(np.rint(load(name) * 32768), -32768, 32767)
        assert packed.samples(row) == len(expected)
        np.testing.assert_array_equal(packed.read(row, 0, len(expected)), expected)
    assert packed.read(8, 0, 5).tolist() == [16384, 32767, -32768, 1, 1]
    floats = AudioPack(pack(tmp_path / "mine.tsv", tmp_path / "floats", dtype="float32").index)
    for row, name in enumerate([*names, loud]):
        wave = floats.read(row, 0, floats.samples(row))
        assert wave.dtype == np.float32
        np.testing.assert_array_equal(wave, load(name))


def test_stereo_is_kept_on_request_and_averaged_on_reading(tmp_path: Path) -> None:
    both, mono = samples_of(1, 600, 2), samples_of(2, 300)
    soundfile.write(tmp_path / "two.wav", both, RATE)
    soundfile.write(tmp_path / "one.wav", mono, RATE)
    table = table_of(tmp_path / "mine.tsv", [str(tmp_path / "two.wav"), str(tmp_path / "one.wav")])
    packed = AudioPack(pack(table, tmp_path / "out", stereo=True).index)
    with h5py.File(tmp_path / "out" / "hdf5" / "mine_0.h5") as file:
        np.testing.assert_array_equal(file["two.wav"][:], both)
        np.testing.assert_array_equal(file["one.wav"][:], mono)
    assert packed.samples(0) == 600
    expected = np.rint(both[100:200].astype(np.float64).mean(axis=1))
    assert packed.read(0, 100, 200).dtype == np.int16
    np.testing.assert_array_equal(packed.read(0, 100, 200), expected)
    np.testing.assert_array_equal(packed.read(1, 0, 300), mono)


def test_delimiter_filename_column_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = write_clips(Path("clips"), 5)
    Path("mine.csv").write_text("path,note\n" + "".join(f'{name},"a, b"\n' for name in names))
    report = pack(
        "mine.csv", "out", size_per_file=2, hdf5_dirname="h", index_dirname="i", filename_column="path", delimiter=","
    )
    assert report.index == Path("out/i/mine.tsv")
    table = read_table(report.index)
    assert list(table.columns) == ["path", "note", "filename", "hdf5path"]
    assert table.column("filename") == table.column("path") == names
    assert table.column("note") == ["a, b"] * 5
    assert table.column("hdf5path") == [f"out/h/mine_{part}.h5" for part in (0, 0, 1, 1, 2)]
    assert len(AudioPack(report.index)) == 5


def test_two_clips_with_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "x.wav", samples_of(ord(folder)), RATE)
    soundfile.write(tmp_path / "x.wav", samples_of(0), RATE)
    names = [str(tmp_path / "x.wav"), f"{tmp_path}/a/x.wav", f"{tmp_path}/./b//x.wav"]
    table = table_of(tmp_path / "mine.tsv", names)
    with pytest.raises(PackError) as caught:
        pack(table, tmp_path / "out")
    assert str(caught.value) == (
        f"two clips of {table} have the name x.wav: {names[0]} (row 1) and {names[1]} (row 2)"
        "; rename one, or name clips by their whole filename (--fullname)"
    )
    assert not (tmp_path / "out").exists()
    packed = AudioPack(pack(table, tmp_path / "out", fullname=True).index)
    assert packed.names().tolist() == names
    for row, seed in enumerate((0, ord("a"), ord("b"))):
        np.testing.assert_array_equal(packed.read(row, 0, 800), samples_of(seed))
        assert packed.find([names[row]]) == row
    with pytest.raises(PackError, match=r"more than one clip x\.wav: rows 1 and [23]"):
        packed.find(["x.wav"])
    twice = table_of(tmp_path / "twice.tsv", [f"{tmp_path}/a/x.wav", f"{tmp_path}/a//x.wav"])
    with pytest.raises(PackError, match=r"\(row 1\) and .* \(row 2\)$"):
        pack(twice, tmp_path / "out", fullname=True)


def test_a_failed_clip_is_not_confused_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    for seed, name in enumerate(("0.wav", "x/zz.wav")):
        soundfile.write(name, samples_of(seed), RATE)
    Path("x/0.wav").write_bytes(b"no sound")
    table = table_of(Path("mine.tsv"), ["0.wav", "x/0.wav", "x/zz.wav"])
    first = pack(table, "out", fullname=True)
    again = pack(table, "out", fullname=True)
    for report in (first, again):
        assert (report.packed, [name for name, _ in report.failed]) == (2, ["x/0.wav"])
        assert read_table("out/labels/mine.failed.tsv").column("filename") == ["x/0.wav"]
    assert again.kept == 1
    packed = AudioPack(again.index)
    assert packed.names().tolist() == ["0.wav", "zz.wav"]
    for row in (0, 1):
        np.testing.assert_array_equal(packed.read(row, 0, 800), samples_of(row))
    # The same for a table that the user wrote.
    part = "out/hdf5/mine_0.h5"
    packed = AudioPack(table_of(Path("all.tsv"), ["0.wav", "x/0.wav"], hdf5path=[part, part]))
    with pytest.raises(PackError, match=r"mine_0\.h5 lacks clip x/0\.wav, row 2 of all\.tsv$"):
        packed.samples(1)


def test_a_clip_without_a_folder_is_not_confused_with_one_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for seed, name in enumerate(("x.wav", "a/x.wav")):
        soundfile.write(name, samples_of(seed), RATE)
    packed = AudioPack(pack(table_of(Path("mine.tsv"), ["x.wav", "a/x.wav"]), "out", fullname=True).index)
    for row in (0, 1):
        np.testing.assert_array_equal(packed.read(row, 0, 800), samples_of(row))


def test_unreadable_files_are_listed_and_the_rest_is_packed(tmp_path: Path) -> None:
    names = write_clips(tmp_path / "clips", 6)
    Path(names[1]).write_bytes(b"")
    Path(names[3]).write_text("no sound")
    missing = str(tmp_path / "clips" / "missing.wav")
    names.insert(4, missing)
    out = tmp_path / "out"
    report = pack(table_of(tmp_path / "mine.tsv", names), out, size_per_file=2, duration=True)
    failures = out / "labels" / "mine.failed.tsv"
    assert (report.packed, report.parts, report.failures) == (4, 4, failures)
    listed = read_table(failures).columns
    assert list(zip(listed["filename"], listed["reason"], strict=True)) == list(report.failed)
    assert listed["filename"] == [names[1], names[3], missing]
    assert listed["reason"][0] == f"{names[1]}: empty (0 bytes)"
    assert "No such file" in listed["reason"][2]
    # The row of a clip decides its file, so a clip that fails does not move others.
    index = read_table(report.index)
    assert index.column("filename") == [names[0], names[2], names[5], names[6]]
    assert [path[-4] for path in index.column("hdf5path")] == ["0", "1", "2", "3"]
    packed = AudioPack(report.index)
    np.testing.assert_allclose(packed.read(1, 0, 50) / 32768, load(names[2])[:50], atol=2**-16)
    # Nothing has changed: nothing is written, and the report is the same.
    before = files_in(out)
    again = pack(tmp_path / "mine.tsv", out, size_per_file=2, duration=True)
    assert (again.kept, again.failed) == (4, report.failed)
    assert files_in(out) == before
    # One clip is repaired: its file is written again, the others are kept.
    soundfile.write(names[3], samples_of(3), RATE, format="WAV")
    mended = pack(tmp_path / "mine.tsv", out, size_per_file=2, duration=True)
    assert (mended.packed, mended.kept) == (5, 3)
    assert AudioPack(mended.index).find(["clip3.ogg"]) == 2
    # All clips can be read: the list of failures is removed.
    soundfile.write(names[1], samples_of(1), RATE, format="WAV")
    soundfile.write(missing, samples_of(9), RATE)
    assert pack(tmp_path / "mine.tsv", out, size_per_file=2).failures is None
    assert not failures.exists()


def test_a_table_without_readable_clips_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path / "mine.tsv", ["no.wav", "nothing.wav"])
    with pytest.raises(PackError, match=r"none of 2 clips .* no\.wav: .*No such file"):
        pack(table, tmp_path / "out")
    assert not (tmp_path / "out" / "labels" / "mine.tsv").exists()
    assert len(read_table(tmp_path / "out" / "labels" / "mine.failed.tsv")) == 2


def test_the_result_is_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    names = write_clips(tmp_path / "clips", 60)
    Path(names[17]).write_bytes(b"RIFF")
    table = table_of(tmp_path / "mine.tsv", names)
    out = tmp_path / "out"
    results = []
    for workers in (1, 2, 7):
        pack(table, out, size_per_file=25, workers=workers)
        results.append(files_in(out))
        for path in out.rglob("*.h5"):
            path.unlink()
        time.sleep(0.6)  # HDF5 could write the time in seconds; files must not depend on it
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 6


PACK_SLOWLY = """
import sys, time
from ced.distill.pack_writer import pack
def wait(task, done, total):
    print(done, flush=True)
    time.sleep(0.005)
pack(sys.argv[1], sys.argv[2], size_per_file=10, workers=2, duration=True, progress=wait)
"""


def test_a_killed_run_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_clips(tmp_path / "clips", 40)
    Path(names[3]).write_bytes(b"")
    table = table_of(tmp_path / "mine.tsv", names)
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = pack(table, "out", size_per_file=10, duration=True)
    monkeypatch.chdir(tmp_path / "killed")
    with subprocess.Popen([sys.executable, "-c", PACK_SLOWLY, str(table), "out"], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        while int(run.stdout.readline()) < 24:  # in the middle of the third part
            pass
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    left = files_in(Path("out"))
    (unfinished,) = left.keys() - {"hdf5/mine_0.h5", "hdf5/mine_1.h5"}
    assert re.fullmatch(r"hdf5/mine_2\.h5\.\w+\.partial", unfinished)
    kept = {name: os.stat(Path("out", name)).st_mtime_ns for name in ("hdf5/mine_0.h5", "hdf5/mine_1.h5")}
    finished = pack(table, "out", size_per_file=10, duration=True)
    assert (finished.kept, finished.packed, finished.failed) == (2, whole.packed, whole.failed)
    assert {name: os.stat(Path("out", name)).st_mtime_ns for name in kept} == kept
    assert files_in(Path("out")) == files_in(tmp_path / "whole" / "out")


@pytest.mark.parametrize("change", ["rows", "order", "dtype", "stereo", "fullname", "size", "clip", "part", "foreign"])
def test_files_of_other_clips_or_settings_are_not_kept(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = write_clips(tmp_path / "clips", 6)
    table, out = table_of(tmp_path / "mine.tsv", names), tmp_path / "out"
    pack(table, out, size_per_file=3)
    options: dict[str, Any] = {"size_per_file": 3}
    redone = 2
    if change == "rows":
        names = names[1:]
    elif change == "order":
        names[4], names[5] = names[5], names[4]
        redone = 1
    elif change == "clip":
        soundfile.write(names[0], samples_of(99), RATE)
        redone = 1
    elif change == "part":
        damaged = out / "hdf5" / "mine_1.h5"
        damaged.write_bytes(damaged.read_bytes()[:-100])
        redone = 1
    elif change == "foreign":
        with h5py.File(out / "hdf5" / "mine_0.h5", "w") as file:
            file["clip0.wav"] = np.zeros(8, np.int16)
        redone = 1
    elif change == "size":
        options, redone = {"size_per_file": 6}, 1
    else:
        options |= {"dtype": "float32"} if change == "dtype" else {change: True}
    table_of(table, names)
    report = pack(table, out, **options)
    assert report.parts - report.kept == redone
    fresh = tmp_path / "fresh"
    pack(table, fresh, **options)
    for path in (fresh / "hdf5").iterdir():
        assert path.read_bytes() == (out / "hdf5" / path.name).read_bytes()
    left = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = f"{out}/hdf5/mine_1.h5 is not part of this pack any more and can be deleted"
    assert left == ([expected] if change == "size" else [])


def test_there_is_no_index_while_files_are_written(tmp_path: Path) -> None:
    """While files change, an index would list old files with new ones."""
    names = write_clips(tmp_path / "clips", 4)
    table, out = table_of(tmp_path / "mine.tsv", names), tmp_path / "out"
    index = pack(table, out).index
    table_of(table, names[::-1])
    seen = []

    def look(task: str, done: int, total: int, _: str = "") -> None:
        seen.append((task, done, total, index.exists()))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(table, out, progress=look)
    assert seen == [("pack", done, 4, False) for done in (1, 2, 3)]
    assert files_in(out).keys() == {"hdf5/mine_0.h5"}
    pack(table, out)
    assert AudioPack(index).names().tolist() == ["clip3.ogg", "clip2.wav", "clip1.flac", "clip0.wav"]


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    table, out = table_of(tmp_path / "mine.tsv", write_clips(tmp_path / "clips", 1)), tmp_path / "out"
    cases: list[tuple[dict[str, Any], type[CedError], str]] = [
        ({"size_per_file": 0}, ConfigError, "size_per_file is 0"),
        ({"workers": 0}, ConfigError, "workers 0"),
        ({"dtype": "int32"}, ConfigError, "dtype is 'int32'; expected int16 or float32"),
        ({"filename_column": "path"}, TableError, "no column 'path'; its columns are filename"),
        ({"delimiter": "tab"}, TableError, "one character"),
    ]
    for options, error, expected in cases:
        with pytest.raises(error, match=expected):
            pack(table, out, **options)
    with pytest.raises(PackError, match="would overwrite its own table"):
        pack(table, tmp_path, index_dirname=".")
    assert not out.exists()
    out.touch()
    with pytest.raises(PackError, match=r"^cannot write the pack to .*out"):
        pack(table, out)


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path / "mine.tsv", write_clips(tmp_path, 1))
    with (
        claimed(tmp_path / "out" / "labels" / "mine.tsv"),
        pytest.raises(BusyError, match=r"another process is writing .*mine\.tsv"),
    ):
        pack(table, tmp_path / "out")
    assert pack(table, tmp_path / "out").packed == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_a_clip_whose_name_is_not_utf8_is_listed_and_the_rest_is_packed(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.wav", os.fsdecode(b"caf\xe9.wav"))]
    for name in names:
        soundfile.write(os.fsencode(name), samples_of(0), RATE, format="WAV", subtype="PCM_16")
    report = pack(table_of(tmp_path / "mine.tsv", names), tmp_path / "out")
    assert report.packed == 1
    ((name, reason),) = report.failed
    assert name == names[1]
    assert "is not UTF-8" in reason
    assert b"caf\xe9.wav" in (tmp_path / "out" / "labels" / "mine.failed.tsv").read_bytes()
