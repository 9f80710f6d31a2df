"""Tagging on a cluster of three nodes: the rows are those of one machine, whatever is lost on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import soundfile
from pyarrow import parquet

from ced.errors import CedError, ConfigError, ProcessError
from ced.integrations import ray as on_ray
from ced.integrations.ray import Embedding, Model, Tagging
from ced.tag.batch import process_to_folder
from ced.tag.inputs import InputSound, find_inputs
from ced.tag.options import TagOptions
from ced.tag.parts import FileResult
from ced.tag.tagger import Tagger
from ced.tag.writers import embedding_rows, write_embeddings
from tests.crashing import POISONED, crashing_site, lacking_site
from tests.stores import KEYS, bucket, s3, tar_of

__all__ = ["bucket", "s3"]  # fixtures
pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
OPTIONS = TagOptions(window=1.0, hop=0.1)  # slow enough for a node to be lost in mid-run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3: str) -> Iterator[Any]:
    """A cluster of three nodes with a core each, which know an S3 server."""
    from ray.cluster_utils import Cluster

    site = crashing_site(tmp_path_factory.mktemp("site"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{site}{os.pathsep}{ROOT}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")  # on a busy machine
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        nodes.add_node(num_cpus=1)
        on_ray.connect(nodes.address, silent=True)
        yield nodes
        import ray

        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for number in range(30):
        seconds = SECONDS if number % 2 else 2.5
        wave = random.normal(0.0, 0.1, round(seconds * 16_000)).astype(np.float32)
        soundfile.write(folder / f"{number:02d}.wav", wave, 16_000)
    (folder / "broken.wav").write_bytes(b"RIFF" + bytes(100))
    return folder


@pytest.fixture(scope="module")
def expected(clips: Path, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The Parquet table that tagging on one machine writes."""
    out = tmp_path_factory.mktemp("expected")
    with Tagger(graph, jobs=2) as tagger:

        def process(item: InputSound) -> Any:
            return tagger.tag(item.source, OPTIONS, name=item.name)

        process_to_folder(
            find_inputs([str(clips)]), process, out, settings={}, formats=["parquet"], combined=True, jobs=2
        )
    return parquet.read_table(out / "tags.parquet")


def rows(table: pa.Table) -> list[tuple[Any, ...]]:
    """Return the rows, by file and in the order that they have there."""
    found: list[tuple[Any, ...]] = sorted(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return found


def settled(out: Path) -> pa.Table:
    return parquet.read_table(out / "tags")


def tagging(graph: Path) -> Tagging:
    return Tagging(Model(str(graph)), OPTIONS)


def wait_for_parts(out: Path, count: int) -> None:
    end = time.monotonic() + 120
    while len(list((out / "tags").glob("*.parquet"))) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def ced(*words: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ced", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_node_that_is_lost_costs_no_row_and_doubles_none(
    cluster: Any, clips: Path, graph: Path, expected: pa.Table, tmp_path: Path
) -> None:
    inputs = find_inputs([str(clips)])
    lost = cluster.add_node(num_cpus=1)

    def lose() -> None:
        wait_for_parts(tmp_path, 2)
        cluster.remove_node(lost, allow_graceful=False)

    killer = Thread(target=lose)
    killer.start()
    done: list[FileResult] = []
    summary = on_ray.run(inputs, tagging(graph), tmp_path, settings={}, finished=done.append, workers=4)
    killer.join()
    assert (summary.files, summary.failed, summary.skipped) == (31, 1, 0)
    assert sorted(each.file for each in done) == sorted(item.name for item in inputs)
    assert [Path(each.file).name for each in done if each.error] == ["broken.wav"]
    found = settled(tmp_path)
    assert found.schema.equals(expected.schema)
    assert (found.schema.metadata or {}).items() >= (expected.schema.metadata or {}).items()
    assert rows(found) == rows(expected)
    (line,) = (tmp_path / "errors.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == str(clips / "broken.wav")


def test_a_clip_that_crashes_its_worker_is_reported_and_the_rest_is_tagged(
    cluster: Any, clips: Path, graph: Path, expected: pa.Table, tmp_path: Path
) -> None:
    few = [item for item in find_inputs([str(clips)]) if item.name.endswith(("0.wav", "2.wav"))]
    bad = tmp_path / POISONED
    soundfile.write(bad, np.zeros(16_000), 16_000)
    done: list[FileResult] = []
    inputs = [*few[:2], InputSound(str(bad), str(bad), POISONED), *few[2:]]
    summary = on_ray.run(inputs, tagging(graph), tmp_path / "out", settings={}, finished=done.append)
    assert (summary.files, summary.failed) == (len(few) + 1, 1)
    (error,) = (each.error for each in done if each.error)
    assert error == f"{bad}: the process that read it ended, twice: SIGSEGV"
    names = {item.name for item in few}
    assert rows(settled(tmp_path / "out")) == [row for row in rows(expected) if row[0] in names]


def test_a_killed_run_is_continued(cluster: Any, clips: Path, graph: Path, expected: pa.Table, tmp_path: Path) -> None:
    words = ["tag", "-m", graph, "-c", "1", "--hop", "0.1", "--ray", cluster.address, "--out", tmp_path, clips]
    with ced(*words) as first:
        wait_for_parts(tmp_path, 3)
        first.send_signal(signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tags").glob("*.parquet")}
    with ced(*words) as second:
        said, errors = second.communicate(timeout=240)
    assert second.returncode == 1, errors  # for the broken file
    assert "31 files" in said
    assert "done before" in said
    assert "broken.wav" in errors
    assert "Traceback" not in errors
    assert rows(settled(tmp_path)) == rows(expected)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tags").glob("*.parquet")}
    kept = [name for name, changed in before.items() if after.get(name) == changed]
    assert len(kept) >= len(before) - 1  # but the part of the broken file

    with ced(*words[:3], "-k", "1", *words[3:]) as other:
        _, errors = other.communicate(timeout=240)
    assert other.returncode == 1
    assert "top_k 3, now 1" in errors


def test_a_killed_run_between_stores_is_continued(
    cluster: Any, clips: Path, graph: Path, expected: pa.Table, bucket: Any
) -> None:
    names = ["00.wav", "01.wav", "02.wav", "03.wav", "05.wav", "broken.wav"]
    for name in names:
        bucket.pipe(f"bucket/in/{name}", (clips / name).read_bytes())
    bucket.pipe("bucket/s/0.tar", tar_of({name: (clips / name).read_bytes() for name in ("04.wav", "06.wav")}))
    options = ["tag", "-m", graph, "-w", "1", "--hop", "0.1", "--ray", cluster.address, "--out", "s3://bucket/out"]
    words = [*options, "s3://bucket/in/", "s3://bucket/s/0.tar"]
    with ced(*words) as first:
        end = time.monotonic() + 120
        while not bucket.find("bucket/out/tags"):
            assert time.monotonic() < end
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    with ced(*words) as second:
        said, errors = second.communicate(timeout=240)
    assert second.returncode == 1, errors  # for the broken file
    assert "8 files" in said
    assert "done before" in said
    assert "s3://bucket/in/broken.wav" in errors
    assert "Traceback" not in errors
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in said + errors
    given = {f"s3://bucket/in/{name}": name for name in names} | {
        f"s3://bucket/s/0.tar!{name}": name for name in ("04.wav", "06.wav")
    }
    found = rows(parquet.read_table("bucket/out/tags", filesystem=bucket))
    assert sorted((given[row[0]], *row[1:]) for row in found) == sorted(
        (Path(row[0]).name, *row[1:]) for row in rows(expected) if Path(row[0]).name in given.values()
    )
    files = parquet.read_table("bucket/out/files.parquet", filesystem=bucket).to_pylist()
    assert {each["file"]: each["error"] is None for each in files} == {
        file: name != "broken.wav" for file, name in given.items()
    }


def test_data_sets_hold_the_same_rows(
    cluster: Any, clips: Path, graph: Path, expected: pa.Table, tmp_path: Path
) -> None:
    import ray

    some = [str(clips / name) for name in ("00.wav", "02.wav", "broken.wav")]
    wanted = [row for row in rows(expected) if row[0] in some]
    by_path = on_ray.tag(some, graph, OPTIONS)
    content = ray.data.read_binary_files(some, include_paths=True)
    for found in (by_path, on_ray.tag(content, graph, OPTIONS)):
        table = pa.Table.from_pylist(found.take_all(), schema=expected.schema.append(pa.field("error", pa.string())))
        good = table.filter(pc.is_null(table["error"])).drop_columns(["error"])
        assert rows(good) == wanted
        (bad,) = table.filter(pc.is_valid(table["error"])).to_pylist()
        assert bad["file"] == some[2]
        assert bad["label"] is None
        assert "broken.wav" in bad["error"]


def test_embeddings_are_those_of_one_machine(cluster: Any, clips: Path, graph: Path, tmp_path: Path) -> None:
    inputs = find_inputs([str(clips / "00.wav"), str(clips / "02.wav")])
    with Tagger(graph) as tagger:
        given = [row for item in inputs for row in embedding_rows(item.name, tagger.embed(item.source, window=1.0))]
    write_embeddings(tmp_path / "one.parquet", given)
    options = TagOptions(window=1.0)
    on_ray.run(inputs, Embedding(Model(str(graph)), options), tmp_path / "out", settings={})
    found, one = parquet.read_table(tmp_path / "out" / "vectors"), parquet.read_table(tmp_path / "one.parquet")
    assert found.schema.equals(one.schema)
    assert found.sort_by("file").to_pylist() == one.sort_by("file").to_pylist()
    table = on_ray.embed([item.name for item in inputs], graph, options).take_all()
    assert sorted((row["file"], list(row["vector"])) for row in table) == [
        (row["file"], row["vector"]) for row in one.sort_by("file").to_pylist()
    ]


def test_what_the_cluster_cannot_run_is_refused(cluster: Any, clips: Path, graph: Path, tmp_path: Path) -> None:
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    inputs = find_inputs([str(clips)])
    with pytest.raises(ConfigError, match=f"has {cpus} CPU.*{cpus + 1} worker"):
        on_ray.run(inputs, tagging(graph), tmp_path, settings={}, workers=cpus + 1)
    with pytest.raises(ConfigError, match="one CPU to read"):
        on_ray.tag(ray.data.read_binary_files(str(clips), include_paths=True), graph, workers=cpus)
    with pytest.raises(ConfigError, match="0 GPU"):
        on_ray.tag([str(clips)], graph, device="cuda")
    with pytest.raises(ConfigError, match="columns id; it must have path"):
        on_ray.tag(ray.data.range(3), graph)
    with pytest.raises(ConfigError, match="cannot be read by other machines"):
        on_ray.run([InputSound("<stdin>", b"", "stdin")], tagging(graph), tmp_path, settings={})


def test_a_machine_without_the_package_is_named(cluster: Any, clips: Path, graph: Path, tmp_path: Path) -> None:
    bare = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(lacking_site(tmp_path))})
    try:
        inputs = find_inputs([str(clips / "00.wav")])
        with pytest.raises(ProcessError, match=r"cannot import ced \(No module named 'ced'\); install"):
            on_ray.run(inputs, tagging(graph), tmp_path / "out", settings={})
        with pytest.raises(ProcessError, match="cannot import ced"):
            on_ray.tag([str(clips / "00.wav")], graph)
    finally:
        cluster.remove_node(bare, allow_graceful=False)


def test_faults_that_concern_every_sound_end_the_run(cluster: Any, clips: Path, graph: Path, tmp_path: Path) -> None:
    inputs = find_inputs([str(clips)])
    other = Tagging(Model(str(graph), digest="0" * 64), OPTIONS)
    with pytest.raises(CedError, match="is not the one that the run was begun with"):
        on_ray.run(inputs, other, tmp_path, settings={})
