"""Outputs in stores: complete or not there, and continued on another machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ced import remote
from ced.errors import ConfigError, WriteError
from ced.model.zoo import cache_dir
from ced.sound import audio
from ced.tag.batch import Summary, process_to_folder
from ced.tag.inputs import InputSound, find_inputs
from ced.tag.records import Record, Tag, Tags
from ced.tag.uploads import local_file, local_folder
from tests.stores import CLIPS, memory, tar_of

__all__ = ["memory"]  # fixture
OUT = Path("memory://out/run")
SETTINGS = {"model": "loudness"}


class StoppedError(Exception):
    """An error while a file is written."""


class Loudness:
    """Tags each sound with its peak; after some sounds, it stops."""

    def __init__(self, stop_after: int = 100) -> None:
        self.left = stop_after
        self.done: list[str] = []

    def __call__(self, item: InputSound) -> Record:
        if not self.left:
            raise KeyboardInterrupt
        wave = audio.load(item.source)
        self.left -= 1
        self.done.append(item.name)
        seconds = len(wave) / audio.SAMPLE_RATE
        pieces = (Tags(0.0, seconds, (Tag("Sound", 0, None, float(np.abs(wave).max())),)),)
        return Record(item.name, "loudness", seconds, pieces)


def run(process: Loudness, words: list[str], out: Path = OUT, **options: Any) -> Summary:
    with local_folder(out) as folder:
        return process_to_folder(find_inputs(words), process, folder, settings=SETTINGS, **options)


@pytest.fixture
def sounds(memory: Any) -> list[str]:
    """A folder of three sounds and a shard of them in the store."""
    for name, data in CLIPS.items():
        memory.pipe(f"/in/{name}", data)
    memory.pipe("/shards/a.tar", tar_of(CLIPS))
    return ["memory://in", "memory://shards/*.tar"]


def there(memory: Any) -> set[str]:
    return {path.removeprefix("/out/run/") for path in memory.find("/out/run")} if memory.exists("/out/run") else set()


def test_outputs_are_uploaded_at_the_end_and_equal_local_ones(memory: Any, sounds: list[str], tmp_path: Path) -> None:
    summary = run(Loudness(), sounds, formats=["jsonl", "csv"])
    run(Loudness(), sounds, tmp_path / "run", formats=["jsonl", "csv"])
    assert (summary.files, summary.failed) == (6, 0)
    local = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert there(memory) == local
    assert "a.tar/guitar.flac.csv" in local
    for name in local:
        assert memory.cat(f"/out/run/{name}") == (tmp_path / "run" / name).read_bytes()
    assert not list((cache_dir() / "outputs").glob("*/folder"))


def test_an_interrupted_run_uploads_nothing_and_is_continued(memory: Any, sounds: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Loudness(stop_after=2), sounds)
    assert there(memory) == set()
    rest = Loudness()
    summary = run(rest, sounds, combined=True)
    assert (summary.skipped, len(rest.done)) == (2, 4)
    assert len(memory.cat("/out/run/tags.jsonl").splitlines()) == 6


def test_a_run_is_continued_on_another_machine_by_its_journal(memory: Any, sounds: list[str]) -> None:
    run(Loudness(), sounds[:1], combined=True)
    shutil.rmtree(cache_dir() / "outputs")
    memory.pipe("/in/guitar.flac", CLIPS["rooster.flac"])  # changed
    again = Loudness()
    assert run(again, sounds, combined=True).skipped == 2
    assert again.done == ["memory://in/guitar.flac", *(f"memory://shards/a.tar!{name}" for name in CLIPS)]
    records = [json.loads(line) for line in memory.cat("/out/run/tags.jsonl").splitlines()]
    assert [record["file"] for record in records] == [item.name for item in find_inputs(sounds)]
    with pytest.raises(ConfigError, match="begun with"), local_folder(OUT) as folder:
        process_to_folder(find_inputs(sounds), Loudness(), folder, settings={"model": "other"})


def test_outputs_that_another_machine_wrote_replace_those_of_an_interrupted_run(memory: Any, sounds: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Loudness(stop_after=1), sounds)
    held = cache_dir() / "outputs"
    held.rename(held.with_name("aside"))
    run(Loudness(), sounds[1:], combined=True)
    shutil.rmtree(held)
    held.with_name("aside").rename(held)
    again = Loudness()
    run(again, sounds, combined=True)
    assert again.done == [f"memory://in/{name}" for name in CLIPS]


def test_an_interrupted_upload_is_repeated(memory: Any, sounds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_UPLOADED", 1)
    put, calls = type(memory).put, []

    def lose(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise ConnectionError("lost")
        put(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put", lose)
        with pytest.raises(WriteError, match="lost"):
            run(Loudness(), sounds[:1])
    assert len(there(memory)) == 2
    assert "journal.jsonl" not in there(memory)
    again = Loudness()
    assert run(again, sounds[:1]).skipped == 3
    assert again.done == []
    assert there(memory) == {"journal.jsonl", *(f"{name}.jsonl" for name in CLIPS)}


def test_two_versions_of_a_file_are_not_mixed_up(memory: Any, sounds: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"two sounds have the name memory://in/guitar\.flac"):
        run(Loudness(), ["memory://in/guitar.flac?versionId=1", "memory://in/guitar.flac?versionId=2"])


def test_a_store_that_cannot_be_written_to_is_noticed_before_sounds_are_read(
    memory: Any, sounds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("denied")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    process = Loudness()
    with pytest.raises(WriteError, match="no permission"):
        run(process, sounds)
    assert process.done == []


def test_failures_are_listed_until_they_are_mended(memory: Any, sounds: list[str]) -> None:
    memory.pipe("/in/bad.wav", b"not sound at all" * 100)
    memory.pipe("/shards/a.tar", tar_of({"text.wav": b"hello" * 100, **CLIPS}))
    summary = run(Loudness(), sounds)
    assert (summary.files, summary.failed) == (8, 2)
    failed = [json.loads(line)["file"] for line in memory.cat("/out/run/errors.jsonl").splitlines()]
    assert failed == ["memory://in/bad.wav", "memory://shards/a.tar!text.wav"]
    memory.pipe("/in/bad.wav", CLIPS["guitar.flac"])
    memory.pipe("/shards/a.tar", tar_of(CLIPS))
    assert run(Loudness(), sounds).failed == 0
    assert "errors.jsonl" not in there(memory)


def test_a_file_is_uploaded_with_those_beside_it_or_not_at_all(memory: Any, tmp_path: Path) -> None:
    with local_file(Path("memory://out/e.npy")) as path:
        path.write_bytes(b"1")
        path.with_name("e.npy.tsv").write_bytes(b"2")
        assert not memory.exists("/out/e.npy")
    assert (memory.cat("/out/e.npy"), memory.cat("/out/e.npy.tsv")) == (b"1", b"2")
    with pytest.raises(StoppedError):
        _stop_while_writing(Path("memory://out/f.npy"))
    assert not memory.exists("/out/f.npy")
    with local_file(tmp_path / "e.npy") as path:
        assert path == tmp_path / "e.npy"
    with pytest.raises(WriteError, match="hf upload"), local_file(Path("hf://datasets/a/b/e.npy")):
        pass


def _stop_while_writing(out: Path) -> None:
    with local_file(out) as path:
        path.write_bytes(b"1")
        raise StoppedError
