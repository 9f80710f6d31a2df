import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from ced.config import StoreConfig, check
from ced.distill.dataset import ViewDataset, cut_chunks
from ced.distill.pack_reader import AudioPack
from ced.distill.store import store, store_folder
from ced.distill.view_store import ViewStore, epoch_seeds
from ced.distill.views import ViewRecipe, mask
from ced.errors import CedError, ConfigError, StoreError
from ced.model import loading
from ced.model.config import ModelConfig
from ced.model.frontend import LogMel
from ced.model.vit import CED
from ced.sound.labels import ClassTable

SECONDS = {"a.wav": 2.0, "b.wav": 5.0, "c.wav": 0.5, "d.wav": 1.0, "e.wav": 1.5}
CHUNKS = [("a.wav", 0, 2), ("b.wav", 0, 2), ("b.wav", 2, 4), ("b.wav", 4, 5), ("d.wav", 0, 1), ("e.wav", 0, 1.5)]
ROOT = Path(__file__).parents[2]

# Teachers of a user.
TEACHERS = """
import torch
from ced.sound.labels import ClassTable

def ten(mel):
    return torch.sigmoid(mel.mean(2)[:, :10] / 20)

class Linear(torch.nn.Module):
    labels = ClassTable(tuple("abcdefghij"))

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.dropout = torch.nn.Dropout(0.9)
        torch.nn.init.constant_(self.layer.weight, 0.01)

    def forward(self, mel):
        return torch.sigmoid(self.dropout(self.layer(mel.mean(2) / 20)))

linear = Linear()

def many(mel):
    return torch.full((len(mel), 40_000), 0.5)

def five(mel):
    return ten(mel)[:, :5]

def logits(mel):
    return mel.mean(2)[:, :10]

def holes(mel):
    return ten(mel).where(mel.mean(2)[:, :10] < -99, torch.nan)

def shapeless(mel):
    return mel

def array(mel):
    return ten(mel).numpy()

def moody(mel):
    return ten(mel) if mel.mean() < -99 else ten(mel)[1:]

number = 5
"""

# Runs the store walk, alone or under torchrun; KILL_AT_SYNC kills it after writing that file, before its renaming.
PROGRAM = """
import os, signal, sys
import torch
from ced.config import StoreConfig, load_config
from ced.distill.store import store

torch.set_num_threads(1)
syncs, sync = 0, os.fsync

def fsync(fd):
    global syncs
    syncs += 1
    if syncs == int(os.environ.get("KILL_AT_SYNC", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(fd)

os.fsync = fsync
for out, batch_size in (run.split(":") for run in sys.argv[1].split(",")):
    store(load_config(StoreConfig, None, [*sys.argv[2:], "--outputpath", out, "--batch_size", batch_size]))
"""


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder with a pack and teachers, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "homemade", raising=False)
    Path("homemade.py").write_text(TEACHERS)
    rng = np.random.default_rng(0)
    with h5py.File("mine_0.h5", "w") as file:
        for name, seconds in SECONDS.items():
            file[name] = rng.integers(-9_000, 9_000, round(seconds * 16_000), dtype=np.int16)
    Path("mine.tsv").write_text("filename\thdf5path\n" + "".join(f"x/{name}\tmine_0.h5\n" for name in SECONDS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(**changes: Any) -> dict[str, Any]:
    common = {"train_data": "mine.tsv", "outputpath": "out", "model": "homemade:ten", "topk": 3, "chunk_length": 2}
    return common | {"batch_size": 2, "epochs": 2, "num_workers": 1, "seed": 7} | changes


def run(**changes: Any) -> Path:
    return store(check(StoreConfig, settings(**changes), "test"))


def save_tiny(path: str, seed: int, **changes: Any) -> CED:
    torch.manual_seed(seed)
    settings = {"embed_dim": 32, "num_heads": 1, "depth": 1, "outputdim": 10, "target_length": 208} | changes
    model = CED(ModelConfig(**settings), ClassTable(tuple("abcdefghij"))).eval()
    torch.nn.init.normal_(model.get_parameter("outputlayer.1.weight"))
    loading.save(Path(path), model)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def subprocess_run(words: list[str], runs: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    Path("program.py").write_text(PROGRAM)
    config = [word for key, value in settings().items() for word in (f"--{key}", str(value))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words, "program.py", runs, *config],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_stored_rows_are_the_mean_of_the_teachers() -> None:
    models = [save_tiny("one.safetensors", 1), save_tiny("two.safetensors", 2, pooling="logit")]
    folder = run(model=["one.safetensors", "two.safetensors"])
    assert folder == Path("out/one_two/mine/chunk_2")
    opened = ViewStore(folder)
    assert opened.epochs == 2
    pack = AudioPack(Path("mine.tsv"))
    for epoch in (1, 2):
        rows = opened.rows(epoch)
        assert list(zip(rows.filenames, rows.starts.tolist(), rows.ends.tolist(), strict=True)) == CHUNKS
        assert rows.seeds.tolist() == epoch_seeds(7, epoch, 6).tolist()
        views = ViewDataset(pack, cut_chunks(pack.lengths(), 2.0), ViewRecipe(time_mask=38), rows.seeds, 32_000)
        for items in ([0, 1], [2, 3], [4, 5]):
            waves, uniforms = views.__getitems__(items).to_device(torch.device("cpu"))
            with torch.inference_mode():
                mel = mask(LogMel()(waves), uniforms, ViewRecipe(time_mask=38))
                probs = (models[0].forward_mel(mel) + models[1].forward_mel(mel).sigmoid()) / 2
            values, indexes = probs.topk(3)
            np.testing.assert_array_equal(rows.values[items], values.half().numpy())
            np.testing.assert_array_equal(rows.indexes[items], indexes.numpy())


def test_the_metadata_of_a_store() -> None:
    save_tiny("one.safetensors", 1)
    spectrum = [{"TimeMasking": {"time_mask_param": 20}}]
    folder = run(model=["one.safetensors", "homemade:linear"], spectransforms=spectrum, mode="amp", epochs=1)
    meta = ViewStore(folder).meta
    assert meta.recipe == ViewRecipe(shift=(-0.5, 0.5), time_mask=20, freq_mask=None)
    assert (meta.topk, meta.num_classes, meta.chunk_length, meta.sample_rate) == (3, 10, 2.0, 16_000)
    assert meta.teachers == ("one", "homemade:linear")
    assert meta.weights is not None
    assert [len(weights) for weights in meta.weights] == [64, 64]
    assert meta.labels == ClassTable(tuple("abcdefghij"))
    assert meta.precision == "fp32"  # of "amp" on a CPU
    assert (meta.seed, meta.batch_size, meta.world_size, meta.rows) == (7, 2, 1, 6)
    assert json.loads((folder / "meta.json").read_text())["values"] == "probabilities"


@pytest.mark.parametrize(
    ("changes", "folder"),
    [
        ({"model": "audiotransformer_base_4740", "chunk_length": 10}, "audiotransformer_base_4740/mine/chunk_10"),
        (
            {"model": ["audiotransformer_base_4740", "ced_base", "models/my.teacher.safetensors"]},
            "base_4740_ced_base_my.teacher/mine/chunk_2",
        ),
        ({"model": "my.teachers:Big.one", "chunk_length": 2.5}, "my.teachers_Big.one/mine/chunk_2.5"),
        ({"model": "experiments/tiny v1.5", "train_data": "data/full.v2.tsv"}, "tiny_v1.5/full.v2/chunk_2"),
        (
            {"model": ["experiments/one/2026-02-03_04-05-06", "experiments/two/2026-02-03_04-05-06_2/"]},
            "one_two/mine/chunk_2",
        ),
        ({"model": "experiments/one/2026-02-03_04-05-06/averaged.safetensors"}, "one/mine/chunk_2"),
        ({"model": "experiments/one"}, "one/mine/chunk_2"),
    ],
)
def test_folders_are_named_after_teachers_and_data(changes: Mapping[str, Any], folder: str) -> None:
    Path("models").mkdir()
    Path("models/my.teacher.safetensors").touch()
    assert store_folder(check(StoreConfig, settings(**changes), "test")) == Path("out") / folder


def test_seeds_are_golden_and_do_not_depend_on_the_run() -> None:
    seeds = epoch_seeds(42, 1, 1_000)
    assert seeds.dtype == np.int32
    assert seeds[:3].tolist() == [1874818602, 1563416367, 207128527]
    assert seeds.min() >= 0
    assert len(set(seeds.tolist())) > 990
    assert epoch_seeds(42, 1, 3).tolist() == seeds[:3].tolist()
    assert epoch_seeds(42, 2, 3).tolist() != seeds[:3].tolist()
    assert epoch_seeds(43, 1, 3).tolist() != seeds[:3].tolist()


def test_a_killed_and_repeated_run_gives_the_bytes_of_an_uninterrupted_one() -> None:
    unbroken = contents(run())
    # Files are synced in the order meta.json, then for each epoch .parquet, .h5 and meta.json.
    folder = Path("killed/homemade_ten/mine/chunk_2")
    for sync in (6, 4):  # before the .h5 of epoch 2 is renamed; before meta.json has the digests of epoch 1
        killed = subprocess_run([], "killed:2", KILL_AT_SYNC=str(sync))
        assert killed.returncode == -signal.SIGKILL
        left = {name for name in contents(folder) if not name.endswith(".partial")}
        assert left == set(unbroken) - (
            {"logits_ep2_0.h5"} if sync == 6 else {"logits_ep2_0.h5", "logits_ep2_0.parquet"}
        )
        times = {name: (folder / name).stat().st_mtime_ns for name in ("logits_ep1_0.h5", "logits_ep1_0.parquet")}
        assert run(outputpath="killed") == folder
        assert contents(folder) == unbroken  # and no temporary file is left
        assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["zeros", "cut", "bit", "seeds"])
def test_a_damaged_part_is_stored_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = run()
    before = contents(folder)
    path = folder / "logits_ep1_0.h5"
    content = bytearray(path.read_bytes())
    if damage == "zeros":  # as after a full disk
        content[:] = bytes(len(content))
    elif damage == "cut":
        del content[-100:]
    elif damage == "bit":
        content[-1] ^= 1
    else:  # undamaged, but of another epoch, in a store without digests
        content[:] = (folder / "logits_ep2_0.h5").read_bytes()
        meta = json.loads((folder / "meta.json").read_text())
        del meta["digests"], meta["sha256"]
        (folder / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"logits_ep1_0\.h5"):
        ViewStore(folder).rows(1)
    run()
    assert contents(folder) == before
    (warning,) = (record.getMessage() for record in caplog.records if "is stored again" in record.getMessage())
    assert "logits_ep1_0.h5" in warning
    assert ViewStore(folder).rows(1)


def test_epochs_are_added_to_a_store_of_format_version_1() -> None:
    folder = run()
    meta = json.loads((folder / "meta.json").read_text())
    digests = meta.pop("digests")
    del meta["sha256"]
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 1}))
    run(epochs=3)
    found = ViewStore(folder).meta.digests
    assert found is not None
    assert {name: found[name] for name in digests} == digests
    assert {"logits_ep3_0.h5", "logits_ep3_0.parquet"} == found.keys() - digests


def test_two_processes_give_the_rows_of_one_and_end_together_on_an_error() -> None:
    ran = subprocess_run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "many:2,many_empty:8,many:4"
    )
    assert "StoreError: many/homemade_ten/mine/chunk_2 was stored with other settings: batch_size" in ran.stderr
    assert ran.returncode != 0  # and the other process has ended too
    for out, batch_size, parts in (("many", 2, [4, 2]), ("many_empty", 8, [6, 0])):
        together = ViewStore(Path(out) / "homemade_ten/mine/chunk_2")
        alone = ViewStore(run(outputpath=f"alone{batch_size}", batch_size=batch_size))
        for epoch in (1, 2):
            many, one = together.rows(epoch), alone.rows(epoch)
            for name in ("values", "indexes", "seeds", "filenames", "starts", "ends"):
                np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
        for rank, count in enumerate(parts):
            with h5py.File(together.folder / f"logits_ep1_{rank}.h5") as file:
                assert len(file["seeds"]) == count
    before = contents(Path("many/homemade_ten/mine/chunk_2"))
    assert contents(run(outputpath="many")) == before


def test_more_epochs_are_added_and_fewer_change_nothing() -> None:
    two = contents(run())
    assert contents(run(epochs=1)) == two
    three = contents(run(epochs=3))
    assert set(three) - set(two) == {"logits_ep3_0.h5", "logits_ep3_0.parquet"}
    assert {name: three[name] for name in two if name != "meta.json"} == {
        name: content for name, content in two.items() if name != "meta.json"
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"topk": 5}, "topk was 3 and is now 5"),
        ({"batch_size": 4}, "batch_size was 2 and is now 4"),
        ({"seed": 8}, "seed was 7 and is now 8"),
        ({"mode": "amp_bf16"}, "precision was fp32 and is now bf16"),
        (
            {"wavtransforms": None},
            "recipe was (shift (-0.5, 0.5), time_mask 38, freq_mask 24) and is now (sh",
        ),
    ],
)
def test_a_folder_with_other_settings_is_refused(changes: Mapping[str, Any], expected: str) -> None:
    before = contents(run())
    with pytest.raises(StoreError) as caught:
        run(**changes)
    assert f"out/homemade_ten/mine/chunk_2 was stored with other settings: {expected}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(Path("out/homemade_ten/mine/chunk_2")) == before


def test_another_teacher_of_the_same_name_is_detected() -> None:
    save_tiny("one.safetensors", 1)
    run(model="one.safetensors")
    run(model="one.safetensors")
    save_tiny("one.safetensors", 2)
    with pytest.raises(StoreError, match="the weights, the settings or the class table of teacher"):
        run(model="one.safetensors")


def test_other_data_of_the_same_name_are_detected() -> None:
    run()
    lines = Path("mine.tsv").read_text().splitlines()
    Path("mine.tsv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(StoreError, match="rows was 6 and is now 5"):
        run()


def test_other_audio_of_the_same_names_and_lengths_is_detected() -> None:
    run()
    with h5py.File("mine_0.h5", "a") as file:
        file["a.wav"][0] += 1
    with pytest.raises(StoreError, match="the audio differs"):
        run()


def test_a_folder_with_views_but_no_metadata_is_refused() -> None:
    (run() / "meta.json").unlink()
    with pytest.raises(StoreError, match=r"has views but no meta\.json; choose another outputpath"):
        run()


@pytest.mark.parametrize(
    ("changes", "kind", "expected"),
    [
        ({"topk": 11}, ConfigError, "topk is 11 and the teachers have 10 classes"),
        ({"model": "homemade:many"}, ConfigError, "have 40000 classes; a store can have at most 32768"),
        ({"model": []}, ConfigError, "model is an empty list; name at least one teacher"),
        ({"model": "nowhere:ten"}, ConfigError, "cannot import teacher nowhere:ten: ModuleNotFoundError: No module"),
        ({"model": "homemade:none"}, ConfigError, "cannot import teacher homemade:none: AttributeError: module"),
        ({"model": "broken:ten"}, ConfigError, "cannot import teacher broken:ten: ZeroDivisionError: division by"),
        (
            {"model": "homemade:number"},
            ConfigError,
            "teacher homemade:number is int; it must be callable with mel, or with waves",
        ),
        ({"model": "homemade:logits"}, StoreError, "teacher homemade:logits gave scores that are not probabilities"),
        ({"model": "homemade:holes"}, StoreError, "teacher homemade:holes gave scores that are not probabilities"),
        ({"model": "homemade:shapeless"}, ConfigError, "returned (2, 64, 201) for 2 chunks; expected (b, classes)"),
        ({"model": "homemade:array"}, ConfigError, "returned ndarray for 2 chunks; expected (b, classes)"),
        ({"model": "homemade:moody"}, StoreError, "gave scores (1, 10), expected (2, 10)"),
        (
            {"model": ["homemade:ten", "homemade:five"]},
            ConfigError,
            "teachers have different numbers of classes: homemade:ten 10, homemade:five 5",
        ),
        ({"model_args": {"depth": 3}}, ConfigError, "model_args.depth cannot be changed in a teacher; pooling, target"),
        ({"chunk_length": 0.1}, ConfigError, "chunk_length is 0.1 s; the shortest input of a model is 0.15 s"),
        (
            {"chunk_length": 30},
            StoreError,
            "has no clip of half a chunk (15 s) or more: its longest has 5.00 s; set chunk_l",
        ),
        (
            {"chunk_length": 1, "spectransforms": {"TimeMasking": {"time_mask_param": 192}}},
            ConfigError,
            "is 192 and a chunk of 1 s has 101 frames: the mask blanks 47% of the views; at most 101 fit; 19 is",
        ),
        (
            {"spectransforms": {"FrequencyMasking": {"freq_mask_param": 96}}},
            ConfigError,
            "freq_mask_param is 96 and a chunk has 64 mel bins: the mask blanks 33% of the views; at most 64 fit; 24",
        ),
    ],
)
def test_errors_are_one_line(changes: Mapping[str, Any], kind: type[CedError], expected: str) -> None:
    Path("broken.py").write_text("1 / 0\n")
    with pytest.raises(kind) as caught:
        run(**changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_teachers_with_other_class_tables_are_refused() -> None:
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=32, num_heads=1, depth=1, outputdim=10)
    loading.save(Path("other.safetensors"), CED(config, ClassTable(tuple("klmnopqrst"))))
    with pytest.raises(ConfigError, match=r"teacher other\.safetensors has no class in common"):
        run(model=["homemade:linear", "other.safetensors"])


def test_teachers_of_other_features_are_refused() -> None:
    save_tiny("wide.safetensors", 0, hop_size=320)
    with pytest.raises(ConfigError, match="hop_size 320 instead of 160"):
        run(model="wide.safetensors")


def test_a_module_is_set_to_evaluation() -> None:
    rows = ViewStore(run(model="homemade:linear", epochs=1)).rows(1)
    assert sys.modules["homemade"].linear.training is False
    assert rows.values.min() > 0  # dropout would have made zeros


def test_bf16_scores_are_close_to_fp32() -> None:
    save_tiny("one.safetensors", 1)
    exact, bf16 = (
        ViewStore(run(model="one.safetensors", mode=mode, outputpath=mode, topk=10)).rows(1)
        for mode in ("off", "amp_bf16")
    )
    left, right = (np.take_along_axis(rows.values, rows.indexes.argsort(1), 1) for rows in (exact, bf16))
    assert not np.array_equal(left, right)
    np.testing.assert_allclose(left, right, atol=0.03)


def test_progress_has_one_task_for_each_epoch() -> None:
    reports: list[tuple[str, int, int]] = []
    store(
        check(StoreConfig, settings(), "test"),
        progress=lambda task, done, total, _="": reports.append((task, done, total)),
    )
    assert reports == [(f"epoch {epoch} of 2", done, 3) for epoch in (1, 2) for done in (1, 2, 3)]
