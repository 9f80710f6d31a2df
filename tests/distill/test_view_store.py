import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ced.distill.view_store import (
    Rows,
    StoreMeta,
    ViewStore,
    add_digests,
    difference,
    digests_of,
    epoch_seeds,
    part_complete,
    read_meta,
    write_meta,
    write_part,
)
from ced.distill.views import ViewRecipe
from ced.errors import StoreError
from ced.sound.labels import ClassTable, audioset

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "published_store"
PUBLISHED = Path(os.environ.get("CED_PUBLISHED_STORE", _BESIDE))
needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason="no published store here")

META = StoreMeta(
    recipe=ViewRecipe(shift=(-0.5, 0.25), time_mask=100, freq_mask=None),
    topk=3,
    num_classes=10,
    chunk_length=2.5,
    teachers=("ced_tiny", "mine:teach"),
    labels=ClassTable(tuple("abcdefghij"), tuple(f"/m/{n}" for n in range(10))),
    precision="fp32",
    weights=("12ab", ""),
    model_args={"target_length": 312},
    batch_size=8,
    world_size=1,
    rows=4,
    chunks="34cd",
)


def make_rows(count: int, first: int = 0, topk: int = 3) -> Rows:
    """Return rows with the seeds `first`, `first` + 1, ..."""
    numbers = np.arange(first, first + count)
    return Rows(
        values=np.linspace(0.9, 0.1, count * topk).astype(np.float16).reshape(count, topk),
        indexes=(np.arange(count * topk) % 10).astype(np.int16).reshape(count, topk),
        seeds=numbers.astype(np.int32),
        filenames=np.array([f"clip{n}.wav" for n in numbers], dtype=object),
        starts=(numbers * 2.5).astype(np.float32),
        ends=(numbers * 2.5 + 2.5).astype(np.float32),
    )


def make_store(folder: Path, epochs: int = 2, ranks: int = 1, meta: StoreMeta = META) -> Path:
    """Write a store with 4 rows in each epoch, whose seeds are 100 * epoch + row."""
    write_meta(folder, replace(meta, world_size=ranks))
    bounds = [rank * 4 // ranks for rank in range(ranks + 1)]
    for epoch in range(1, epochs + 1):
        for rank in range(ranks):
            rows = make_rows(bounds[rank + 1] - bounds[rank], 100 * epoch + bounds[rank])
            write_part(folder, epoch, rank, rows)
    return folder


def same(left: Rows, right: Rows) -> bool:
    names = ("values", "indexes", "seeds", "filenames", "starts", "ends")
    return all(
        getattr(left, name).dtype == getattr(right, name).dtype
        and np.array_equal(getattr(left, name), getattr(right, name))
        for name in names
    )


def test_a_part_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_meta(tmp_path, META)
    rows = make_rows(4)
    write_part(tmp_path, 1, 0, rows)
    assert same(ViewStore(tmp_path).rows(1), rows)


@needs_published
def test_files_are_laid_out_as_published(tmp_path: Path) -> None:
    write_part(tmp_path, 1, 0, make_rows(8, topk=20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits_ep1_0.h5", "logits_ep1_0.parquet"]
    with h5py.File(tmp_path / "logits_ep1_0.h5") as ours, h5py.File(PUBLISHED / "logits_ep1_0.h5") as theirs:
        assert list(ours) == list(theirs)
        for name in theirs:
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
            assert ours[name].chunks is None
    ours, theirs = (pq.read_schema(folder / "logits_ep1_0.parquet") for folder in (tmp_path, PUBLISHED))
    assert ours.equals(theirs)  # names and types


@needs_published
def test_a_published_store_is_read() -> None:
    store = ViewStore(PUBLISHED)
    assert store.epochs == 2
    assert store.meta.recipe == ViewRecipe()
    assert (store.meta.topk, store.meta.num_classes, store.meta.chunk_length) == (20, 527, 2.0)
    assert store.meta.teachers == ("audiotransformer_base_4740",)
    assert store.meta.labels == audioset()
    rows = store.rows(2)
    assert len(rows) == 8
    assert rows.seeds.tolist()[:3] == [1_023_514_133, 1_884_038_884, 509_097_860]
    assert rows.indexes[0].tolist()[:4] == [497, 223, 417, 418]
    assert rows.values[0, :3].tolist() == [0.86962890625, 0.85791015625, 0.84912109375]
    assert rows.filenames.tolist() == [f"clip{n}.wav" for n in (0, 0, 1, 2, 3, 4, 4, 5)]
    assert rows.starts.tolist() == [0, 2, 0, 0, 0, 0, 2, 0]
    assert rows.ends.tolist() == [2, 3, 2, 1, 2, 2, 4, 1.9375]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_meta(tmp_path / name, META)
        write_part(tmp_path / name, 1, 0, make_rows(4))
        time.sleep(1.1)  # HDF5 could write the time in seconds
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_empty_part_is_read(tmp_path: Path) -> None:
    write_meta(tmp_path, replace(META, world_size=2))
    write_part(tmp_path, 1, 0, make_rows(4))
    write_part(tmp_path, 1, 1, make_rows(0))
    assert part_complete(tmp_path, 1, 1)
    assert same(ViewStore(tmp_path).rows(1), make_rows(4))


def test_parts_are_joined_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    store = ViewStore(make_store(tmp_path, epochs=1, ranks=2))
    rows = store.rows(1)
    assert rows.seeds.tolist() == [100, 101, 102, 103]
    assert rows.filenames.tolist() == [f"clip{n}.wav" for n in (100, 101, 102, 103)]


def test_ten_ranks_are_not_sorted_as_text(tmp_path: Path) -> None:
    write_meta(tmp_path, replace(META, world_size=None, rows=None))
    for rank in range(11):
        write_part(tmp_path, 1, rank, make_rows(1, rank))
    assert ViewStore(tmp_path).rows(1).seeds.tolist() == list(range(11))


@pytest.mark.parametrize(("epochs", "served"), [(1, [1, 1, 1, 1]), (3, [1, 2, 3, 1, 2, 3, 1])])
def test_training_epochs_repeat_all_stored_epochs(tmp_path: Path, epochs: int, served: list[int]) -> None:
    store = ViewStore(make_store(tmp_path, epochs))
    assert store.epochs == epochs
    assert [store.epoch_of(epoch) for epoch in range(1, len(served) + 1)] == served


def test_the_last_stored_epoch_is_read(tmp_path: Path) -> None:
    store = ViewStore(make_store(tmp_path, epochs=3))
    assert store.rows(store.epoch_of(3)).seeds.tolist() == [300, 301, 302, 303]


def test_a_part_is_complete_if_both_files_exist(tmp_path: Path) -> None:
    assert not part_complete(tmp_path, 1, 0)
    write_part(tmp_path, 1, 0, make_rows(4))
    assert part_complete(tmp_path, 1, 0)
    (tmp_path / "logits_ep1_0.parquet").unlink()
    assert not part_complete(tmp_path, 1, 0)


def test_a_part_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    rows = make_rows(4)
    with pytest.raises(ValueError, match="could not convert"):
        write_part(tmp_path, 1, 0, replace(rows, values=np.array([["x"]])))
    assert not part_complete(tmp_path, 1, 0)
    assert list(tmp_path.iterdir()) == []
    write_part(tmp_path, 1, 0, rows)
    assert part_complete(tmp_path, 1, 0)


def test_temporary_and_other_files_are_ignored(tmp_path: Path) -> None:
    make_store(tmp_path)
    for name in ("logits_ep3_0.h5.partial", "logits_ep3_0.parquet.partial", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert ViewStore(tmp_path).epochs == 2


def test_metadata_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for meta in (META, replace(META, recipe=ViewRecipe(None, None, None), labels=None, weights=None, seed=42)):
        write_meta(tmp_path, meta)
        assert read_meta(tmp_path) == meta


def test_the_content_of_meta_json(tmp_path: Path) -> None:
    write_meta(tmp_path / "new" / "store", META)
    content = json.loads((tmp_path / "new" / "store" / "meta.json").read_text())
    assert (content["format"], content["version"]) == ("ced view store", 2)
    assert content["recipe"] == {"shift": [-0.5, 0.25], "time_mask": 100, "freq_mask": None}
    assert content["values"] == "probabilities"
    assert content["sample_rate"] == 16_000
    assert content["labels"]["names"] == list("abcdefghij")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (META, None),
        (replace(META, topk=5), "topk was 3 and is now 5"),
        (replace(META, teachers=("a", "b")), "teachers was ced_tiny, mine:teach and is now a, b"),
        (
            replace(META, recipe=ViewRecipe()),
            "recipe was (shift (-0.5, 0.25), time_mask 100, freq_mask None) "
            "and is now (shift (-0.5, 0.5), time_mask 192, freq_mask 24)",
        ),
        (replace(META, labels=None), "the class table differs"),
        (
            replace(META, weights=("34cd", "")),
            "the weights, the settings or the class table of teacher ced_tiny differ",
        ),
        (replace(META, members=({}, {"weight": 2.0})), "weight of teacher mine:teach was the default and is now 2.0"),
        (replace(META, chunks="56ef"), "the audio differs, or the names of the clips do"),
        (replace(META, digests={"logits_ep1_0.h5": "78"}), None),
    ],
)
def test_differences_are_named(asked: StoreMeta, expected: str | None) -> None:
    assert difference(META, asked) == expected


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(path: Path, name: str, array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = array


def drop_dataset(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["seeds"]


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("meta.json", Path.unlink, "is not a view store: it has neither meta.json nor meta.pt"),
        ("meta.json", truncate, "meta.json is damaged: JSONDecodeError"),
        ("meta.json", lambda path: edit(path, '"topk": 3', '"topk": 4'), "meta.json does not match its own digest"),
        ("logits_ep2_1.h5", Path.unlink, "logits_ep2_1.h5 is missing; the store has 3 epochs of 2 part(s)"),
        ("logits_ep3_1.parquet", Path.unlink, "logits_ep3_1.parquet is missing"),
        ("logits_ep2_0.h5", truncate, "logits_ep2_0.h5 is damaged: OSError: Unable to"),
        ("logits_ep2_0.h5", drop_dataset, "logits_ep2_0.h5 is damaged: KeyError: "),
        ("logits_ep2_0.parquet", truncate, "logits_ep2_0.parquet is damaged: ArrowInvalid: "),
        (
            "logits_ep2_0.parquet",
            lambda path: shutil.copy(path.with_name("longer.parquet"), path),
            "logits_ep2_0.parquet has 3 rows, its .h5 2",
        ),
        (
            "logits_ep2_0.h5",
            lambda path: rewrite(path, "topk_values", np.zeros((2, 4), np.float16)),
            "logits_ep2_0.h5: topk_values is (2, 4), expected (2, 3)",
        ),
        (
            "logits_ep2_0.h5",
            lambda path: rewrite(path, "topk_indexes", np.array([[0, 1, 2], [3, 4, 10]], np.int16)),
            "logits_ep2_0.h5: topk_indexes are 0 to 10; allowed: 0 to 9",
        ),
    ],
)
def test_damage_gives_a_one_line_error_with_the_file(
    tmp_path: Path, name: str, damage: Callable[[Path], object], expected: str
) -> None:
    make_store(tmp_path / "other", epochs=1)
    write_part(tmp_path / "other", 1, 0, make_rows(3))
    folder = make_store(tmp_path / "store", epochs=3, ranks=2)
    shutil.copy(tmp_path / "other" / "logits_ep1_0.parquet", folder / "longer.parquet")
    damage(folder / name)
    with pytest.raises(StoreError) as caught:
        ViewStore(folder).rows(2)
    message = str(caught.value)
    assert expected in message
    assert str(folder) in message
    assert "\n" not in message


def test_missing_rows_are_detected(tmp_path: Path) -> None:
    make_store(tmp_path, epochs=2)
    write_part(tmp_path, 2, 0, make_rows(3))
    with pytest.raises(StoreError, match=r"epoch 2 of view store .* has 3 rows; meta\.json has 4"):
        ViewStore(tmp_path).rows(2)


def test_other_format_versions_are_refused(tmp_path: Path) -> None:
    edit(make_store(tmp_path) / "meta.json", '"version": 2', '"version": 4')
    with pytest.raises(StoreError, match=r"version 4; .* versions 1, 2, 3"):
        ViewStore(tmp_path)


def without_digests(folder: Path) -> None:
    """Turn a store into one of format version 1."""
    content = json.loads((folder / "meta.json").read_text())
    del content["digests"], content["sha256"]
    (folder / "meta.json").write_text(json.dumps(content | {"version": 1}))


def test_a_store_of_format_version_1_is_read(tmp_path: Path) -> None:
    rows = ViewStore(make_store(tmp_path)).rows(2)
    without_digests(tmp_path)
    store = ViewStore(tmp_path)
    assert store.meta.digests is None
    assert same(store.rows(2), rows)


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    """In a store with digests; without them (format version 1), the only requirement is that reading does not crash."""
    folder = make_store(tmp_path, epochs=1)
    digests = digests_of(folder, 1, 0)
    add_digests(folder, digests)
    rows = ViewStore(folder).rows(1)
    old = shutil.copytree(folder, tmp_path / "old")
    without_digests(old)
    rng = np.random.default_rng(0)
    for name in ("meta.json", *digests):
        content = (folder / name).read_bytes()
        for place in rng.integers(len(content), size=60).tolist():
            flipped = bytearray(content)
            flipped[place] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(flipped)
            with pytest.raises(StoreError) as caught:
                ViewStore(folder).rows(1)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
            if name != "meta.json":
                (old / name).write_bytes(flipped)
                with suppress(StoreError):
                    assert len(ViewStore(old).rows(1)) == len(rows)
        for one in {folder, old} if name != "meta.json" else {folder}:
            (one / name).write_bytes(content)
    assert same(ViewStore(folder).rows(1), rows)


def test_a_file_of_another_epoch_is_detected_by_its_seeds(tmp_path: Path) -> None:
    write_meta(tmp_path, replace(META, seed=42))
    for epoch in (1, 2):
        write_part(tmp_path, epoch, 0, replace(make_rows(4), seeds=epoch_seeds(42, epoch, 4)))
    assert ViewStore(tmp_path).rows(2).seeds.tolist() == epoch_seeds(42, 2, 4).tolist()
    for suffix in (".h5", ".parquet"):
        shutil.copy(tmp_path / f"logits_ep1_0{suffix}", tmp_path / f"logits_ep2_0{suffix}")
    with pytest.raises(StoreError, match=r"logits_ep2_0\.h5: the seeds are not those of epoch 2"):
        ViewStore(tmp_path).rows(2)


def hostile(path: Path, name: str, **how: Any) -> None:
    """Replace an array of a part by another one."""
    with h5py.File(path, "a") as file:
        del file[name]
        if "link" in how:
            file[name] = how["link"]
        else:
            file.create_dataset(name, **how)


@pytest.mark.parametrize(
    ("name", "how", "expected"),
    [
        ("seeds", {"link": h5py.ExternalLink("other.h5", "seeds")}, "seeds is stored in another file"),
        ("seeds", {"shape": (4,), "dtype": "i4", "external": [("/etc/hostname", 0, 16)]}, "stored in another file"),
        ("topk_values", {"shape": (10**9, 3), "dtype": "f2"}, "topk_values is (1000000000, 3), expected (4, 3)"),
        ("seeds", {"shape": (10**9,), "dtype": "i4"}, "topk_values is (4, 3), expected (1000000000, 3)"),
        ("seeds", {"data": ["a", "b", "c", "d"]}, "seeds has type object"),
        ("seeds", {"data": np.zeros(4)}, "seeds has type float64"),
        ("seeds", {"shape": (4,), "dtype": "i4", "chunks": None}, "needs 16 bytes"),
    ],
)
def test_arrays_of_another_type_or_place_are_refused(
    tmp_path: Path, name: str, how: dict[str, Any], expected: str
) -> None:
    folder = make_store(tmp_path, epochs=1)
    shutil.copy(folder / "logits_ep1_0.h5", folder / "other.h5")
    hostile(folder / "logits_ep1_0.h5", name, **how)
    with pytest.raises(StoreError) as caught:
        ViewStore(folder).rows(1)
    assert expected in str(caught.value)


def test_arrays_larger_than_their_file_take_no_memory(tmp_path: Path) -> None:
    folder = make_store(tmp_path, epochs=1)
    with h5py.File(folder / "logits_ep1_0.h5", "w") as file:  # 10^9 rows without data
        for name, width, kind in (("topk_values", 3, "f2"), ("topk_indexes", 3, "i2")):
            file.create_dataset(name, shape=(10**9, width), dtype=kind)
        file.create_dataset("seeds", shape=(10**9,), dtype="i4")
    with pytest.raises(StoreError, match="topk_values needs 6,000,000,000 bytes"):
        ViewStore(folder)


def test_filenames_that_are_not_text_are_reported_as_damage(tmp_path: Path) -> None:
    folder = make_store(tmp_path, epochs=1)
    path = folder / "logits_ep1_0.parquet"
    table = pq.read_table(path)
    names = pa.array([b"caf\xe9"] * 4, pa.large_binary()).view(pa.large_string())
    pq.write_table(table.set_column(0, "filename", names), path)
    with pytest.raises(StoreError, match=r"logits_ep1_0\.parquet is damaged: UnicodeDecodeError"):
        ViewStore(folder).rows(1)
    for missing in (["a", None, "b", "c"], [None] * 4):
        pq.write_table(table.set_column(0, "filename", pa.array(missing, pa.string())), path)
        with pytest.raises(StoreError, match=r"logits_ep1_0\.parquet .* no filename"):
            ViewStore(folder).rows(1)
    for values in (pa.array([1, 2, 3, 4]), pa.array([b"a"] * 4)):
        pq.write_table(table.set_column(0, "filename", values), path)
        with pytest.raises(StoreError, match=r"logits_ep1_0\.parquet is damaged"):
            ViewStore(folder).rows(1)


def test_one_long_name_in_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    count = 20_000
    write_meta(tmp_path, replace(META, rows=count))
    write_part(tmp_path, 1, 0, make_rows(count))
    names = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["x" * 100_000])
    table = pq.read_table(tmp_path / "logits_ep1_0.parquet")
    pq.write_table(table.set_column(0, "filename", names), tmp_path / "logits_ep1_0.parquet")
    assert (tmp_path / "logits_ep1_0.parquet").stat().st_size < 1_000_000
    tracemalloc.start()
    read = ViewStore(tmp_path).rows(1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read.filenames[-1] == "x" * 100_000
    assert most < 20_000_000  # not 2 GB


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no view store .*: no such folder"):
        ViewStore(tmp_path / "nowhere")
    write_meta(tmp_path, META)
    with pytest.raises(StoreError, match=r"has no epochs yet: no logits_ep1_0\.h5"):
        ViewStore(tmp_path)


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_out_of_range_is_refused(tmp_path: Path, epoch: int) -> None:
    with pytest.raises(StoreError, match=f"has epochs 1 to 2, not {epoch}"):
        ViewStore(make_store(tmp_path)).rows(epoch)
