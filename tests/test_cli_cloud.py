"""`ced tag`, `embed` and `pack` with sounds and outputs in a local S3 server, and with shards."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from ced.cli import app
from ced.distill.pack_reader import AudioPack
from ced.sound.audio import load
from ced.sound.tables import read_table, write_table
from tests.stores import CLIPS, KEYS, audio_table, bucket, memory, parquet_of, s3, tar_of

__all__ = ["bucket", "memory", "s3"]  # fixtures
ROOT = Path(__file__).parents[1]
NAMES = list(CLIPS)


@pytest.fixture
def stored(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with sounds and shards, the same files in the working directory, and a cache for this test alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CED_CACHE", str(tmp_path / "cache"))
    shards = {"s/0.tar": tar_of(CLIPS), "s/1.parquet": parquet_of(audio_table(CLIPS))}
    for name, data in {**{f"in/{name}": data for name, data in CLIPS.items()}, **shards}.items():
        bucket.pipe(f"bucket/{name}", data)
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    return bucket


def ced(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `ced`; it must neither show a traceback nor a secret."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1"}
    command = [sys.executable, "-m", "ced", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    return done


def records(text: str) -> list[tuple[str, Any]]:
    return [(record["file"], record["pieces"]) for record in map(json.loads, text.splitlines())]


def test_sounds_in_a_bucket_and_in_shards_have_the_tags_of_local_files(graph: Path, stored: Any) -> None:
    words = ["tag", "-m", str(graph), "-w", "1", "-f", "jsonl"]
    expected = [pieces for _, pieces in records(ced(*words, "in").stdout)]
    found = records(ced(*words, "s3://bucket/in/", "s3://bucket/s/*", "s/0.tar", "s/1.parquet").stdout)
    assert [pieces for _, pieces in found] == 5 * expected
    folders = ("s3://bucket/in/", "s3://bucket/s/0.tar!", "s3://bucket/s/1.parquet!", "s/0.tar!", "s/1.parquet!")
    assert [name for name, _ in found] == [f"{folder}{name}" for folder in folders for name in NAMES]
    again = records(ced(*words, found[4][0], found[7][0]).stdout)  # members by their names
    assert again == [found[4], found[7]]


def test_tags_are_written_to_a_bucket_and_a_run_is_resumed(graph: Path, stored: Any) -> None:
    words = [
        "tag",
        "-m",
        str(graph),
        "-w",
        "1",
        "-f",
        "csv",
        "-f",
        "parquet",
        "--out",
        "s3://bucket/out",
        "s3://bucket/s/0.tar",
    ]
    ced(*words)
    names = {name.removeprefix("bucket/out/") for name in stored.find("bucket/out")}
    assert names == {
        "journal.jsonl",
        *(f"bucket/s/0.tar/{name}.{kind}" for name in NAMES for kind in ("csv", "parquet")),
    }
    assert not Path("s3:").exists()
    stored.pipe("bucket/s/2.tar", tar_of({"bad.flac": b"bad" * 100, "b.flac": CLIPS[NAMES[0]]})[:2000])
    done = ced(*words[:-1], "s3://bucket/s/*.tar", "--combine", code=1)
    assert "6 files: 0 tagged, 3 failed, 3 done before" in done.stdout
    for message in ("s3://bucket/s/2.tar!bad.flac", "s3://bucket/s/2.tar: ", "damaged"):
        assert message in done.stderr
    done = ced(*words, "s3://bucket/gone.wav", code=1)
    assert "3 done before" in done.stdout
    assert "gone.wav: cannot be read: no such file" in done.stderr


def test_an_interrupted_run_leaves_the_bucket_as_it_was(graph: Path, stored: Any) -> None:
    command = [sys.executable, "-m", "ced", "tag", "-m", str(graph), "--out", "s3://bucket/out", "s3://bucket/in/", "-"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        outputs = Path(os.environ["CED_CACHE"], "outputs")
        while process.poll() is None:
            if any(path.read_text().count("\n") == 4 for path in outputs.glob("*/folder/journal.jsonl")):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not stored.exists("bucket/out")
    assert "3 done before" in ced(*command[3:-1]).stdout


def test_embeddings_of_a_shard_are_written_to_a_bucket(graph: Path, stored: Any) -> None:
    ced("embed", "-m", graph, "s3://bucket/s/1.parquet", "--out", "s3://bucket/e.npy")
    ced("embed", "-m", graph, "in", "--out", "e.npy")
    assert stored.cat("bucket/e.npy") == Path("e.npy").read_bytes()
    assert stored.cat("bucket/e.npy.tsv").decode().splitlines()[1].startswith(f"s3://bucket/s/1.parquet!{NAMES[0]}\t")


def test_shards_and_a_table_of_remote_sounds_are_packed(stored: Any) -> None:
    done = ced("pack", "s3://bucket/s/0.tar", "s/1.parquet", "out")
    names = [f"{shard}!{name}" for shard in ("s3://bucket/s/0.tar", "s/1.parquet") for name in NAMES]
    assert "6 packed" in done.stdout
    assert read_table("out/labels/clips.tsv").column("filename") == names
    assert list(AudioPack("out/labels/clips.tsv").names()) == [os.path.basename(name) for name in names]
    with h5py.File("out/hdf5/clips_0.h5") as file:
        assert np.array_equal(file[os.path.basename(names[0])][()], np.round(load(CLIPS[NAMES[0]]) * 32768))
    before = Path("out/hdf5/clips_0.h5").stat().st_mtime_ns
    write_table("table.tsv", {"filename": ["s3://bucket/in/none.flac", *(f"s3://bucket/in/{name}" for name in NAMES)]})
    done = ced("pack", "table.tsv", "out", code=1)
    assert "3 packed, 1 failed" in done.stdout
    assert "no such file" in done.stderr
    ced("pack", "s3://bucket/s/0.tar", "s/1.parquet", "out")
    assert Path("out/hdf5/clips_0.h5").stat().st_mtime_ns == before
    assert "local" in ced("pack", "table.tsv", "s3://bucket/pack", code=1).stderr


def test_options_that_need_local_files_are_refused_before_any_work(graph: Path, stored: Any) -> None:
    words = ["tag", "-m", str(graph), "s3://bucket/in", "--out", "s3://bucket/out"]
    assert "--keep-scores" in ced(*words, "--keep-scores", code=1).stderr
    assert "--clips" in ced(*words, "--events", "--clips", "s3://bucket/clips", code=1).stderr
    assert "hf upload" in ced(*words[:-1], "hf://datasets/me/tags", code=1).stderr
    assert not stored.exists("bucket/out")


def test_the_commands_of_the_page(graph: Path, stored: Any, memory: Any) -> None:
    page = (ROOT / "docs" / "cloud.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    assert len(lines) > 10
    shard = tar_of({"YT/abc.flac": CLIPS[NAMES[0]]})
    files = {"station/2024/night_1.flac": CLIPS[NAMES[0]], "a.wav": CLIPS[NAMES[0]], "shards/000.tar": shard}
    for name, data in {**files, "sounds/b.flac": CLIPS[NAMES[1]]}.items():
        stored.pipe(f"bucket/{name}", data)
    memory.pipe("/other/b.wav", CLIPS[NAMES[1]])  # in place of Google Cloud
    memory.pipe("/datasets/OWNER/NAME/data/0.parquet", parquet_of(audio_table(CLIPS)))  # in place of the hub
    Path("shards").mkdir()
    Path("shards/000.tar").write_bytes(shard)
    Path("list.txt").write_text("s3://bucket/sounds/b.flac\n")
    write_table("table.tsv", {"filename": ["s3://bucket/a.wav", "shards/000.tar!YT/abc.flac"]})
    for line in lines:
        words = shlex.split(line.replace("gs://", "memory://").replace("hf://", "memory://"), comments=True)[1:]
        model = [] if words[0] == "pack" else ["-m", str(graph)]
        done = CliRunner().invoke(app, [*words, *model], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        shutil.rmtree("pack", ignore_errors=True)
    assert {"bucket/tags/b.flac.csv", "bucket/tags/tags.parquet", "bucket/vectors.npy"} <= set(stored.find("bucket"))
