"""Stores and shards for tests: a local S3 server, fsspec's memory file system, shards of the clips in tests/data."""

import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

CLIPS = {path.name: path.read_bytes() for path in sorted((Path(__file__).parent / "data" / "clips").glob("*.flac"))}
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file system of an S3 server with an empty bucket named `bucket`; the environment leads to it."""
    import s3fs

    from ced import remote

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    remote._file_system.cache_clear()
    system = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if system.exists("bucket"):
        system.rm("bucket", recursive=True)
    system.mkdir("bucket")
    return system


@pytest.fixture
def memory() -> Iterator[Any]:
    """The memory file system, empty before and after."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """Return a tar file."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return made.getvalue()


def parquet_of(table: pa.Table, rows: int = 2) -> bytes:
    """Return a Parquet file with `rows` rows in a group."""
    made = io.BytesIO()
    parquet.write_table(table, made, row_group_size=rows, compression="none")
    return made.getvalue()


def audio_table(files: Mapping[str, bytes | None], **columns: list[Any]) -> pa.Table:
    """Return a table as the data sets of the hub have it: a column `audio` of {bytes, path}."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    audio = pa.array([{"bytes": data, "path": name} for name, data in files.items()], kind)
    return pa.table({"audio": audio, **columns})
