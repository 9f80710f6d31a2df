"""Files in stores: fsspec's memory file system, and a local S3 server."""

import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ced import remote
from ced.errors import AudioError, MissingPackageError, WriteError
from ced.sound.audio import load, name_of
from ced.sound.web import Web
from ced.tag.inputs import find_inputs
from tests.stores import CLIPS, KEYS, bucket, memory, s3, tar_of

__all__ = ["bucket", "memory", "s3"]  # fixtures
ROOT = Path(__file__).parents[1]
NAME, SOUND = next(iter(CLIPS.items()))


def test_addresses() -> None:
    assert remote.address_of("s3://bucket/a b?.wav") == "s3://bucket/a b?.wav"
    assert remote.address_of(Path("gs://bucket/a.wav")) == "gs://bucket/a.wav"
    assert remote.address_of("HF://datasets/x/y") == "hf://datasets/x/y"
    for name in (
        "a.wav",
        "s3/a.wav",
        "http://host/a.wav",
        "file:///etc/passwd",
        "zip://a::s3://b/c",
        "ftp://a/b",
        "C:/a",
    ):
        assert remote.address_of(name) is None
    listed = pickle.loads(pickle.dumps(remote.Listed("s3://a/b", (1, 2))))
    assert (listed, listed.stamp) == ("s3://a/b", (1, 2))


def test_secrets_are_removed() -> None:
    assert remote.without_secrets("s3://me:pw@b/a.wav?X-Sig=1&b=2") == "s3://me:***@b/a.wav"
    assert remote.without_secrets("cannot read s3://b/what?.wav") == "cannot read s3://b/what?.wav"
    assert name_of("s3://me:pw@b/a.wav?versionId=1") == "s3://me:***@b/a.wav"
    with pytest.raises(AudioError, match=r"s3://me:\*\*\*@b/a\.wav: .*passwords in addresses"):
        load("s3://me:pw@b/a.wav?versionId=1")
    with pytest.raises(WriteError, match=r"s3://me:\*\*\*@b/out: .*passwords in addresses"):
        remote.check_writable("s3://me:pw@b/out")
    assert "pw" not in str(WriteError("x", remote._reason(PermissionError("az://u:pw@c/x?sig=pw denied"))))


def test_a_sound_in_memory_is_read_at_once_or_in_blocks(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe(f"/a/{NAME}", SOUND)
    memory.pipe("/a/s.tar", tar_of(CLIPS))
    for _ in range(2):
        assert np.array_equal(load(f"memory://a/{NAME}"), load(SOUND))
        assert np.array_equal(load(Path(f"memory://a/{NAME}")), load(SOUND))
        assert np.array_equal(load(f"memory://a/s.tar!{NAME}"), load(SOUND))
        monkeypatch.setattr(remote, "WHOLE", 1000)


def test_files_of_a_bucket(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/2.flac", "a/b/1.flac", "a.b/x.flac"):
        bucket.pipe(f"bucket/{name}", SOUND)
    found = list(remote.find("s3://bucket"))
    assert found == ["s3://bucket/a/2.flac", "s3://bucket/a/b/1.flac", "s3://bucket/a.b/x.flac"]
    assert list(remote.find("s3://bucket/a/**/*.flac")) == found[:2]
    (one,) = remote.find("s3://bucket/a/2.flac")
    assert one == found[0]
    assert one.stamp == found[0].stamp
    assert one.stamp is not None
    assert one.stamp[0] == len(SOUND)
    bucket.pipe("bucket/a/2.flac", SOUND[:-1] + b"x")
    assert remote.stamp_of("s3://bucket/a/2.flac") not in (None, one.stamp)
    assert np.array_equal(load(found[1]), load(SOUND))
    monkeypatch.setattr(remote, "WHOLE", 1000)
    monkeypatch.setattr(remote, "_BLOCK", 5000)
    assert np.array_equal(load(found[1]), load(SOUND))


NAMES = (
    "a b.flac",
    "c#d.flac",
    "e?f.flac",
    "g%20h.flac",
    "i[1].flac",
    "j*k.flac",
    "q?x=1.flac",
    "q?x=2.flac",
    "ü日.flac",
)


def test_names_with_special_characters(bucket: Any) -> None:
    for number, name in enumerate(NAMES):
        bucket.pipe(f"bucket/in/{name}", list(CLIPS.values())[number % 2])
    bucket.pipe("bucket/in/", b"")  # what some programs write for a folder
    found = find_inputs(["s3://bucket/in/"])
    assert sorted(item.name for item in found) == sorted(f"s3://bucket/in/{name}" for name in NAMES)
    for item in found:
        number = NAMES.index(os.path.basename(item.name))
        assert np.array_equal(load(item.source), load(list(CLIPS.values())[number % 2]))
        (again,) = find_inputs([item.name])  # by its name, which may look like a pattern
        assert again.source == item.source
    with pytest.raises(AudioError, match=r"no file matches s3://bucket/in/none\[1\]"):
        find_inputs(["s3://bucket/in/none[1].flac"])


class Ranges(BaseHTTPRequestHandler):
    """An S3 server that ignores the ranges of requests, or sends less than the size that it told."""

    size = 0
    content = b""

    def do_HEAD(self) -> None:
        self.answer(self.size)

    def do_GET(self) -> None:
        self.answer(len(self.content))
        self.wfile.write(self.content)

    def answer(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"1"')
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.mark.parametrize("whole", [remote.WHOLE, 1000])
def test_other_bytes_than_those_requested_are_an_error(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(remote, "WHOLE", whole)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        remote._file_system.cache_clear()
        monkeypatch.setattr(Ranges, "content", SOUND[:-5000])
        monkeypatch.setattr(Ranges, "size", len(SOUND))
        with pytest.raises(AudioError, match=rf"{len(SOUND) - 5000} bytes arrived instead of {len(SOUND)}"):
            load("s3://bucket/a.flac")
        with pytest.raises(AudioError, match=f"{len(SOUND) - 5000} bytes arrived instead of 100"):
            remote.read_range("s3://bucket/a.flac", 200, 300)
        server.shutdown()
    remote._file_system.cache_clear()


def test_a_store_that_cannot_be_written_to_is_noticed_at_once(bucket: Any, s3: str) -> None:
    remote.check_writable("s3://bucket/out")
    remote.check_writable("s3://bucket/")
    assert bucket.find("bucket") == []
    with pytest.raises(WriteError, match=r"s3://nowhere/out: .*no such"):
        remote.check_writable("s3://nowhere/out")
    httpx.post(f"{s3}/moto-api/reset-auth", content=b"0")
    try:
        with pytest.raises(WriteError, match="no permission"):
            remote.check_writable("s3://bucket/out")
    finally:
        httpx.post(f"{s3}/moto-api/reset-auth", content=b"inf")


def test_errors_of_a_bucket(bucket: Any, s3: str) -> None:
    bucket.pipe("bucket/a.flac", SOUND)
    with pytest.raises(AudioError, match=r"^s3://bucket/none\.flac: .*no such file"):
        load("s3://bucket/none.flac")
    with pytest.raises(AudioError, match="no such file or bucket"):
        list(remote.find("s3://nowhere/"))
    httpx.post(f"{s3}/moto-api/reset-auth", content=b"0")
    try:
        with pytest.raises(AudioError, match="no permission") as caught:
            load("s3://bucket/a.flac")
        with pytest.raises(WriteError, match="no permission"):
            remote.upload({Path(__file__): "s3://bucket/x"})
    finally:
        httpx.post(f"{s3}/moto-api/reset-auth", content=b"inf")
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


def test_a_store_that_does_not_answer_is_an_error(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    remote._file_system.cache_clear()
    with pytest.raises(AudioError, match=r"cannot be read: .*connect"):
        load("s3://bucket/a.flac")
    remote._file_system.cache_clear()


@pytest.mark.parametrize(
    ("address", "package"), [("s3://b/a.wav", "s3fs"), ("gs://b/a.wav", "gcsfs"), ("az://b/a", "adlfs")]
)
def test_a_missing_package_is_named_before_the_store_is_asked(address: str, package: str) -> None:
    program = f"""if True:
        import sys
        sys.modules[{package!r}] = None
        from ced.errors import MissingPackageError
        from ced.sound.audio import load
        from ced.tag.inputs import find_inputs
        for read in (load, lambda address: find_inputs([address])):
            try:
                read({address!r})
            except MissingPackageError as error:
                print(error.package, error.command)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{package} pip install 'ced-audio[cloud]'"] * 2


class Hub(BaseHTTPRequestHandler):
    """A hub with one data set, which has one sound: the answers that its client needs to list and read it."""

    def do_GET(self) -> None:
        commit, path = "b" * 40, f"data/{NAME}"
        answers = {
            f"/datasets/me/set/resolve/main/{path}": SOUND,
            "/api/datasets/me/set/tree/main": [
                {"type": "directory", "oid": "c" * 40, "size": 0, "path": "data"},
                {"type": "file", "oid": "a" * 40, "size": len(SOUND), "path": path},
            ],
            "/api/datasets/me/set": {"id": "me/set", "sha": commit, "private": False, "tags": []},
        }
        answers["/api/datasets/me/set/tree/main/data"] = answers["/api/datasets/me/set/tree/main"]
        answer = answers.get(self.path.partition("?")[0])
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def test_data_sets_of_the_hub() -> None:
    program = """if True:
        from ced import remote
        from ced.errors import AudioError
        from ced.sound.audio import load
        (found,) = remote.find("hf://datasets/me/set/data/*.flac")
        print(found, found.stamp[0], len(load(found)))
        try:
            load("hf://datasets/me/none/a.flac")
        except AudioError as error:
            print(error)
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        leads_here = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret"}
        environment = {**os.environ, **leads_here, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
        server.shutdown()
    found, missing = done.stdout.splitlines()
    assert found == f"hf://datasets/me/set/data/{NAME} {len(SOUND)} {len(load(SOUND))}"
    assert missing.startswith("hf://datasets/me/none/a.flac: cannot be read")
    assert "hf_secret" not in done.stdout + done.stderr


def test_the_hub_is_only_read() -> None:
    with pytest.raises(WriteError, match="hf upload"):
        remote.check_writable("hf://datasets/me/x")
    assert issubclass(MissingPackageError, ImportError)


def test_the_web_client_of_the_server_refuses_addresses_of_stores() -> None:
    for address in ("s3://bucket/a.wav", "memory://a.wav", "hf://datasets/a/b"):
        with pytest.raises(AudioError, match="http"):
            Web(address, private="none")
