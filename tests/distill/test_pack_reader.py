import gc
import multiprocessing
import os
import pickle
import subprocess
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from numpy.typing import NDArray

from ced.distill.pack_reader import AudioPack
from ced.distill.pack_writer import pack
from ced.errors import PackError, TableError
from ced.sound.tables import write_table

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "published_store"
PUBLISHED = Path(os.environ.get("CED_PUBLISHED_STORE", _BESIDE))


def table_of(path: Path, filenames: list[str], **columns: list[str]) -> Path:
    write_table(path, {"filename": filenames, **columns})
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A pack of another program: the same samples, 0 ... 9999 scaled, in every storage layout."""
    ramp = np.arange(10_000, dtype=np.int16)
    floats = ramp.astype(np.float32) / 32768
    both = np.stack([ramp, ramp + 2], axis=1)
    folder = tmp_path / "far" / "hdf5"
    folder.mkdir(parents=True)
    with h5py.File(folder / "f_0.h5", "w", userblock_size=512) as file:
        file["plain"] = ramp
        file["float"] = floats
        file["stereo"] = both
        file["float stereo"] = np.stack([floats, floats], axis=1)
        file["stereo, channels first"] = np.ascontiguousarray(both.T)
        file.create_dataset("chunked", data=ramp, chunks=(999,))
        file.create_dataset("compressed", data=ramp, compression="gzip", shuffle=True)
        file["big-endian"] = ramp.astype(">i2")
        file["big-endian float"] = floats.astype(">f4")
        file["double"] = floats.astype(np.float64)
        file["half"] = floats.astype(np.float16)
        file["empty"] = np.zeros(0, np.int16)
        names = [*file]
    with h5py.File(folder / "f_1.h5", "w", libver="latest") as file:
        file["newest"] = ramp
        names.append("newest")
    table = tmp_path / "far" / "labels" / "f.tsv"
    paths = ["elsewhere/hdf5/f_0.h5"] * (len(names) - 1) + ["elsewhere/hdf5/f_1.h5"]
    return table_of(table, [f"x/{name}" for name in names], hdf5path=paths)


def test_every_storage_layout_is_read(foreign: Path) -> None:
    packed = AudioPack(foreign)
    assert len(packed) == 13
    for row, name in enumerate(packed.names()):
        if name == "empty":
            assert packed.samples(row) == 0
            assert packed.read(row, 0, 0).shape == (0,)
            continue
        assert packed.samples(row) == 10_000
        wave = packed.read(row, 100, 4_000)
        floats = any(word in name for word in ("float", "double", "half"))
        assert wave.dtype == (np.float32 if floats else np.int16), name
        assert wave.dtype.isnative
        expected = np.arange(100, 4_000) + (1 if name.startswith("stereo") else 0)
        np.testing.assert_allclose(wave * (32768 if floats else 1), expected, rtol=1e-3 if name == "half" else 0)
        np.testing.assert_array_equal(packed.read(row, 0, 10_000)[100:4_000], wave)
        assert packed.read(row, 10_000, 10_000).shape == (0,)


def test_threads_forks_and_pickles_read_the_same(foreign: Path) -> None:
    packed = AudioPack(foreign)
    fresh = pickle.loads(pickle.dumps(packed))
    expected = [packed.read(row, 0, packed.samples(row)).copy() for row in range(len(packed))]
    rows = list(range(len(packed))) * 20
    with ThreadPoolExecutor(8) as threads:
        for row, wave in zip(rows, threads.map(lambda row: fresh.read(row, 0, fresh.samples(row)), rows), strict=True):
            np.testing.assert_array_equal(wave, expected[row])
    used = pickle.loads(pickle.dumps(packed))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            for row, wave in enumerate(pool.map(_Read(used if method == "spawn" else packed), range(len(packed)))):
                np.testing.assert_array_equal(wave, expected[row])


class _Read:
    """Reads a whole clip, in another process."""

    def __init__(self, packed: AudioPack) -> None:
        self.packed = packed

    def __call__(self, row: int) -> NDArray[Any]:
        return np.array(self.packed.read(row, 0, self.packed.samples(row)))


def test_reads_out_of_range_and_of_unknown_clips_are_refused(foreign: Path) -> None:
    packed = AudioPack(foreign)
    row = packed.find(["plain"])[0]
    assert packed.find(["x/plain"]) == row
    for start, stop in ((-1, 5), (5, 4), (0, 10_001)):
        with pytest.raises(PackError, match=rf"x/plain .* 10000 samples, not {start} to {stop}"):
            packed.read(row, start, stop)
    with pytest.raises(PackError, match=r"f\.tsv has no clip nothing$"):
        packed.find(["plain", "nothing"])
    with pytest.raises(ValueError, match="read-only"):
        packed.read(row, 0, 5)[0] = 1


def test_invalid_packs_are_refused(tmp_path: Path) -> None:
    part = tmp_path / "p.h5"
    with h5py.File(part, "w") as file:
        file["a"] = np.zeros(50_000, np.int16)
        file["wide"] = np.zeros(5, np.int32)
        file["deep"] = np.zeros((5, 5, 5), np.int16)
        file["text"] = "hello"
        file.create_group("group")

    def refused(name: str, path: Path = part) -> str:
        packed = AudioPack(table_of(tmp_path / "p.tsv", ["a", name], hdf5path=[str(path)] * 2))
        with pytest.raises(PackError) as caught:
            packed.samples(0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused("b") == f"{part} lacks clip b, row 2 of {tmp_path / 'p.tsv'}"
    assert refused("group") == f"{part} lacks clip group, row 2 of {tmp_path / 'p.tsv'}"
    assert refused("wide").startswith(f"clip wide in {part} is int32 of shape (5,); expected int16 or float samples")
    assert refused("deep").startswith(f"clip deep in {part} is int16 of shape (5, 5, 5)")
    assert refused("text").startswith(f"clip text in {part} is object of shape ()")
    cut = tmp_path / "cut.h5"
    cut.write_bytes(part.read_bytes()[:50_000])
    assert refused("a", cut).startswith(f"cannot read {cut}: ")
    table = table_of(tmp_path / "p.tsv", ["a"], hdf5path=["gone/q.h5"])
    with pytest.raises(PackError, match=r"p\.tsv lacks .* gone/q\.h5"):
        AudioPack(table)
    with pytest.raises(TableError, match="no column 'hdf5path'"):
        AudioPack(table_of(tmp_path / "p.tsv", ["a"]))


def test_clip_names_in_packs_of_other_programs(tmp_path: Path) -> None:
    def write(stem: str, clips: dict[str, int]) -> str:
        with h5py.File(tmp_path / f"{stem}.h5", "w") as file:
            for name, value in clips.items():
                file[name] = np.array([value], np.int16)
        return str(tmp_path / f"{stem}.h5")

    def read(filenames: list[str], parts: list[str]) -> list[int]:
        packed = AudioPack(table_of(tmp_path / "p.tsv", filenames, hdf5path=parts))
        return [int(packed.read(row, 0, 1)[0]) for row in range(len(packed))]

    base, other, whole = write("base", {"0": 1, "1": 2}), write("other", {"0": 3}), write("w", {"0": 4, "x/0": 5})
    assert read(["1", "x/0"], [base] * 2) == [2, 1]
    assert read(["x/0", "y/0"], [base, other]) == [1, 3]  # one name, but two files
    assert read(["0", "/./x//0"], [whole] * 2) == [4, 5]
    for filenames in (["0", "x/0"], ["x/1", "y/1"]):
        with pytest.raises(PackError) as caught:
            read(filenames, [base] * 2)
        expected = f"{base} has one clip {filenames[0][-1]} for two rows, {filenames[0]} and {filenames[1]}"
        assert str(caught.value) == expected
    with pytest.raises(PackError, match=r"lacks clip y/0, row 2"):
        read(["x/0", "y/0"], [whole] * 2)


def test_a_pack_that_another_tool_compressed_is_read(tmp_path: Path) -> None:
    """Tools that compress HDF5 files keep the attributes."""
    waves = {f"{seed}.wav": np.arange(seed, 5_000 + seed, dtype=np.int16) for seed in range(2)}
    for name, wave in waves.items():
        soundfile.write(tmp_path / name, wave, 16_000)
    index = pack(table_of(tmp_path / "p.tsv", [str(tmp_path / name) for name in waves]), tmp_path / "out").index
    part = tmp_path / "out" / "hdf5" / "p_0.h5"
    with h5py.File(part, "r+") as file:
        del file["1.wav"]
        file.create_dataset("1.wav", data=waves["1.wav"], compression="gzip")
    packed = AudioPack(index)
    for row, wave in enumerate(waves.values()):
        assert packed.samples(row) == 5_000
        np.testing.assert_array_equal(packed.read(row, 0, 5_000), wave)


def test_memory_of_many_clips(tmp_path: Path) -> None:
    """A pack of millions of clips has to fit into memory: bytes for each clip, when opened and when indexed."""
    count = 2_000
    with h5py.File(tmp_path / "p.h5", "w") as file:
        for clip in range(count):
            file[f"clip{clip}"] = np.zeros(clip + 1, np.int16)
    table = table_of(tmp_path / "p.tsv", [f"clip{clip}" for clip in range(count)], hdf5path=["p.h5"] * count)
    AudioPack(table)  # fills the caches of libraries
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    packed = AudioPack(table)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    assert before + pa.total_allocated_bytes() - arrow < 100 * count
    assert packed.samples(count - 1) == count
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert taken < 40 * count


def test_folders_in_which_the_files_of_a_pack_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, value: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["a"] = np.array([value], np.int16)

    def value() -> int:
        return int(AudioPack(table).read(0, 0, 1)[0])

    home, cwd = tmp_path / "home", tmp_path / "cwd"
    cwd.mkdir()
    table = table_of(home / "data" / "labels" / "p.tsv", ["a"], hdf5path=["data/h/p.h5"])
    monkeypatch.chdir(cwd)
    write(home / "data" / "hdf5" / "p.h5", 4)
    assert value() == 4
    write(home / "data" / "h" / "p.h5", 3)
    assert value() == 3
    write(home / "data" / "labels" / "data" / "h" / "p.h5", 2)
    assert value() == 2
    write(cwd / "data" / "h" / "p.h5", 1)
    assert value() == 1
    packed = AudioPack(table)
    monkeypatch.chdir(tmp_path)
    assert packed.read(0, 0, 1)[0] == 1  # later moves do not matter


def test_rows_that_repeat_a_clip(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["a.wav"] = np.arange(4, dtype=np.int16)
    table = table_of(tmp_path / "p.tsv", ["x/a.wav", "x/a.wav"], hdf5path=[str(tmp_path / "p.h5")] * 2)
    packed = AudioPack(table)
    assert packed.names().tolist() == ["a.wav", "a.wav"]
    assert packed.find(["a.wav"]).tolist() == [0]
    assert packed.read(1, 0, 4).tolist() == [0, 1, 2, 3]


def test_a_filename_that_is_not_utf8_is_refused_with_its_row(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["a.wav"] = np.arange(4, dtype=np.int16)
    table = table_of(tmp_path / "p.tsv", ["a.wav", "\udce4.wav"], hdf5path=[str(tmp_path / "p.h5")] * 2)
    with pytest.raises(TableError, match=r"p\.tsv, row 2: filename '\\udce4\.wav' is not UTF-8"):
        AudioPack(table)
    packed = AudioPack(table_of(table, ["a.wav"], hdf5path=[str(tmp_path / "p.h5")]))
    with pytest.raises(PackError, match="has no clip"):
        packed.find(["a.wav", "\udce4.wav"])


def test_clips_are_found_by_base_name_or_whole_filename(tmp_path: Path) -> None:
    (tmp_path / "p.h5").touch()
    (tmp_path / "q.h5").touch()
    filenames = ["x/a.wav", "b.wav", "y/b.wav", "x/c.wav", "x/c.wav", "z/d\ne.wav"]
    paths = [str(tmp_path / f"{name}.h5") for name in "pppppq"]
    packed = AudioPack(table_of(tmp_path / "p.tsv", filenames, hdf5path=paths))
    assert packed.find(["a.wav", "x/a.wav", "c.wav", "y/b.wav", "d\ne.wav"]).tolist() == [0, 0, 3, 2, 5]
    assert packed.names().tolist() == filenames  # as two clips have the base name b.wav
    assert packed.names(np.array([2, 2])).tolist() == ["y/b.wav"] * 2
    with pytest.raises(PackError, match=r"more than one clip b\.wav: rows 2 and 3"):
        packed.find(["a.wav", "b.wav"])
    twice = AudioPack(table_of(tmp_path / "p.tsv", ["x/c.wav"] * 2, hdf5path=paths[-2:]))  # in two files
    with pytest.raises(PackError, match=r"more than one clip x/c\.wav: rows 1 and 2"):
        twice.find(["x/c.wav"])


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no published store here")
def test_a_published_pack_is_read() -> None:
    packed = AudioPack(PUBLISHED / "pack" / "labels" / "mine.tsv")
    assert packed.names().tolist() == [f"clip{number}.wav" for number in range(6)]
    assert [packed.samples(row) for row in range(6)] == [48_000, 32_000, 16_000, 35_000, 64_000, 31_000]
    with h5py.File(PUBLISHED / "pack" / "hdf5" / "mine_0.h5") as file:
        for row, name in enumerate(packed.names()):
            np.testing.assert_array_equal(packed.read(row, 1_000, 15_000), file[name][1_000:15_000])


def packed_noise(folder: Path, count: int = 3) -> Path:
    """Pack a few clips of noise and return the table."""
    rng = np.random.default_rng(0)
    names = [str(folder / f"c{number}.wav") for number in range(count)]
    for name in names:
        soundfile.write(name, rng.integers(-9_000, 9_000, 700, dtype=np.int16), 16_000)
    return pack(table_of(folder / "p.tsv", names, labels=["0"] * count), folder / "out").index


def test_any_flipped_bit_in_audio_is_detected(tmp_path: Path) -> None:
    """With any single bit of a file flipped, the samples are right or the error names the file."""
    index = packed_noise(tmp_path)
    part = tmp_path / "out/hdf5/p_0.h5"
    whole = AudioPack(index)
    waves = [whole.read(row, 0, 700).copy() for row in range(3)]
    content = part.read_bytes()
    rng = np.random.default_rng(1)
    refused: list[str] = []
    for place in rng.permutation(len(content))[:400].tolist():
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        part.write_bytes(flipped)
        try:
            packed = AudioPack(index)
            found = [packed.read(row, 0, packed.samples(row)) for row in range(3)]
        except PackError as error:
            refused.append(str(error))
        else:
            for wave, expected in zip(found, waves, strict=True):
                np.testing.assert_array_equal(wave, expected)
    assert all("p_0.h5" in message and "\n" not in message for message in refused)
    assert len(refused) > 100  # the rest is free space, names of attributes, and the like


def test_a_changed_table_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = packed_noise(tmp_path)
    AudioPack(index)
    assert not caplog.records
    digest = index.with_name("p.tsv.sha256")
    assert subprocess.run(["sha256sum", "-c", digest.name], cwd=index.parent, check=False).returncode == 0
    index.write_text(index.read_text().replace("\t0\t", "\t1\t", 1))
    AudioPack(index)
    (record,) = caplog.records
    assert "p.tsv is not as `ced pack` wrote it" in record.getMessage()
    digest.unlink()
    caplog.clear()
    AudioPack(index)
    assert not caplog.records


def test_links_to_other_files_are_refused(tmp_path: Path) -> None:
    """Offsets in the other file, applied to this one, would give the samples of another clip."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.arange(50, dtype=np.int16)
    np.arange(50, dtype=np.int16).tofile(tmp_path / "raw.bin")
    layout = h5py.VirtualLayout((50,), np.int16)
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "a", (50,))
    for number, kind in enumerate(("link", "folder", "raw", "virtual", "nothing")):
        path = tmp_path / f"{number}.h5"
        with h5py.File(path, "w") as file:
            file["b"] = np.ones(5_000, np.int16)
            if kind == "link":
                file["x/a"] = h5py.ExternalLink("other.h5", "a")
            elif kind == "folder":
                file["x"] = h5py.ExternalLink("other.h5", "/")
            elif kind == "raw":
                file.create_dataset("x/a", (50,), np.int16, external=[(str(tmp_path / "raw.bin"), 0, 100)])
            elif kind == "virtual":
                file.create_virtual_dataset("x/a", layout)
            else:
                file.create_dataset("x/a", (10**12,), np.int16)  # samples were never written
        packed = AudioPack(table_of(tmp_path / "p.tsv", ["x/a", "b"], hdf5path=[str(path)] * 2))
        with pytest.raises(PackError, match="damaged" if kind == "nothing" else "another file"):
            packed.samples(0)
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["b"], file["a"] = np.arange(9, dtype=np.int16), h5py.SoftLink("/b")
    packed = AudioPack(table_of(tmp_path / "p.tsv", ["a", "b"], hdf5path=[str(tmp_path / "soft.h5")] * 2))
    assert packed.read(0, 0, 9).tolist() == packed.read(1, 0, 9).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("dtype", "iht16"), ("dtype", "int17"), ("dtype", 5), ("sample_rate", 16_001), ("stereo", "x" * 9)],
)
def test_attributes_out_of_range_are_reported_as_damage(tmp_path: Path, attribute: str, value: object) -> None:
    index = packed_noise(tmp_path)
    with h5py.File(tmp_path / "out/hdf5/p_0.h5", "a") as file:
        file.attrs[attribute] = value
    if attribute == "stereo":  # the layout of every clip is then read
        assert AudioPack(index).samples(0) == 700
    else:
        with pytest.raises(PackError, match=r"p_0\.h5 is damaged"):
            AudioPack(index).samples(0)
    assert pack(tmp_path / "p.tsv", tmp_path / "out").kept == 0
    assert AudioPack(index).samples(0) == 700
