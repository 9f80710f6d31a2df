"""Downloads from a server on this machine that cuts connections, ignores ranges and changes its files."""

import base64
import hashlib
import json
import multiprocessing
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request

import pytest

from ced.errors import DownloadError
from ced.model import download as download_module
from ced.model.download import download

CONTENT = bytes(range(256)) * 1_000


@dataclass
class Site:
    """One file on a server, and how the server behaves."""

    content: bytes = CONTENT
    headers: dict[str, str] = field(default_factory=lambda: {"ETag": '"first"'})
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # bytes of the body after which each of the next answers breaks off
    statuses: list[int] = field(default_factory=list)  # of the next answers, in place of the file
    asked: list[str | None] = field(default_factory=list)  # the Range of each request
    length: bool = True  # whether Content-Length is sent
    url: str = ""


def handler_of(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append(wanted)
            if site.statuses:
                self.send_error(site.statuses.pop(0))
                return
            start = 0
            same = self.headers.get("If-Range") in (site.headers.get("ETag"), site.headers.get("Last-Modified"))
            if wanted and site.ranges and same:
                start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
                if start >= len(site.content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
            else:
                self.send_response(200)
            for name, value in site.headers.items():
                self.send_header(name, value)
            if site.length:
                self.send_header("Content-Length", str(len(site.content) - start))
            self.end_headers()
            body = site.content[start:]
            self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the output of the tests clean."""

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(site))
    site.url = f"http://127.0.0.1:{server.server_port}/model.pt?download=1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "PAUSE", 0.01)
    monkeypatch.delenv("CED_OFFLINE", raising=False)


def left(folder: Path) -> list[str]:
    """Return what a download left in its folder, but for the lock."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def test_a_file_and_its_progress(site: Site, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    path = tmp_path / "new" / "model.pt"
    download(site.url, path, progress=lambda *report: reports.append(report))
    assert path.read_bytes() == CONTENT
    assert left(path.parent) == ["model.pt"]
    assert reports[-1] == ("download model.pt", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})
    download(site.url, path)  # is there now: the server is not asked again
    assert site.asked == [None]


def test_continues_from_the_byte_where_a_connection_broke(site: Site, tmp_path: Path) -> None:
    site.cuts = [100_000, 50_000]
    reports: list[int] = []
    download(site.url, tmp_path / "model.pt", progress=lambda _, done, *rest: reports.append(done))
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert site.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert reports == sorted(reports)


def test_a_later_run_resumes(site: Site, tmp_path: Path) -> None:
    site.cuts, site.statuses = [100_000], []
    site.cuts += [0, 0, 0]
    with pytest.raises(DownloadError, match=r"the connection broke after 100000 of 256000 bytes, which are kept in"):
        download(site.url, tmp_path / "model.pt")
    assert left(tmp_path) == ["model.pt.part", "model.pt.part.json"]
    site.asked.clear()
    download(site.url, tmp_path / "model.pt")
    assert site.asked == ["bytes=100000-"]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    assert left(tmp_path) == ["model.pt"]


def test_a_server_without_ranges_restarts_the_download(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cuts = False, [100_000]
    download(site.url, tmp_path / "model.pt")
    assert site.asked == [None, "bytes=100000-"]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_without_a_validator_the_download_restarts(site: Site, tmp_path: Path, headers: dict[str, str]) -> None:
    site.headers, site.cuts = headers, [100_000]
    download(site.url, tmp_path / "model.pt")
    assert site.asked == [None, None]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


def test_a_modification_date_allows_resuming(site: Site, tmp_path: Path) -> None:
    site.headers, site.cuts = {"Last-Modified": "Tue, 22 Aug 2023 10:00:00 GMT"}, [100_000]
    download(site.url, tmp_path / "model.pt")
    assert site.asked == [None, "bytes=100000-"]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


def test_a_file_that_changed_restarts_the_download(site: Site, tmp_path: Path) -> None:
    site.cuts = [100_000, 0, 0, 0]
    with pytest.raises(DownloadError):
        download(site.url, tmp_path / "model.pt")
    site.content, site.headers = CONTENT[::-1], {"ETag": '"second"'}
    download(site.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT[::-1]


def test_a_part_of_another_address_is_not_resumed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "model.pt.part").write_bytes(b"x" * 100)
    notes = {"url": "http://127.0.0.1/other.pt", "validator": '"first"', "md5": None}
    (tmp_path / "model.pt.part.json").write_text(json.dumps(notes))
    download(site.url, tmp_path / "model.pt")
    assert site.asked == [None]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"colour": 1}', None])
def test_a_part_without_notes_is_not_resumed(site: Site, tmp_path: Path, notes: str | None) -> None:
    (tmp_path / "model.pt.part").write_bytes(b"x" * 100)
    if notes is not None:
        (tmp_path / "model.pt.part.json").write_text(notes)
    download(site.url, tmp_path / "model.pt")
    assert site.asked == [None]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_discarded(site: Site, tmp_path: Path) -> None:
    site.cuts = [0, 0, 0]
    with pytest.raises(DownloadError):
        download(site.url, tmp_path / "model.pt")
    (tmp_path / "model.pt.part").write_bytes(CONTENT + b"more")
    download(site.url, tmp_path / "model.pt")
    assert site.asked[3:] == ["bytes=256004-", None]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


def test_a_body_of_unknown_length(site: Site, tmp_path: Path) -> None:
    site.length = False
    download(site.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


MD5 = hashlib.md5(CONTENT)


def test_right_checksums(site: Site, tmp_path: Path) -> None:
    site.headers = {"ETag": f'"md5:{MD5.hexdigest()}"'}
    site.cuts = [1_000]  # the checksum of the whole file is remembered over a cut
    download(site.url, tmp_path / "a.pt")
    site.headers = {"Content-MD5": base64.b64encode(MD5.digest()).decode()}
    download(site.url, tmp_path / "b.pt")
    assert left(tmp_path) == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    "headers", [{"ETag": '"md5:' + "0" * 32 + '"'}, {"Content-MD5": base64.b64encode(bytes(16)).decode()}]
)
def test_a_wrong_checksum(site: Site, tmp_path: Path, headers: dict[str, str]) -> None:
    site.headers = headers
    with pytest.raises(DownloadError, match=r"its md5 is [0-9a-f]+, but .* 0{32}; removed"):
        download(site.url, tmp_path / "model.pt")
    assert left(tmp_path) == []
    site.headers = {"ETag": '"good"'}
    download(site.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("headers", [{"Content-MD5": "@"}, {"Content-MD5": "abc"}, {"ETag": "md5"}])
def test_an_invalid_checksum_is_ignored(site: Site, tmp_path: Path, headers: dict[str, str]) -> None:
    site.headers = headers
    download(site.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT


def test_content_that_does_not_verify_is_removed(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="not the published file: it is HTML; removed"):
        download(site.url, tmp_path / "model.pt", verify=lambda _: "it is HTML")
    assert left(tmp_path) == []
    seen: list[bytes] = []
    download(site.url, tmp_path / "model.pt", verify=lambda part: seen.append(part.read_bytes()))
    assert seen == [CONTENT]


def test_an_unrequested_encoding(site: Site, tmp_path: Path) -> None:
    site.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(DownloadError, match="in encoding gzip"):
        download(site.url, tmp_path / "model.pt")
    assert left(tmp_path) == []


@pytest.mark.parametrize("length", ["abc", "-5", "1e9", ""])
def test_a_length_that_is_not_a_number(site: Site, tmp_path: Path, length: str) -> None:
    site.length, site.headers = False, {"Content-Length": length}
    with suppress(DownloadError):  # http.client itself may refuse it
        download(site.url, tmp_path / "model.pt")
        assert (tmp_path / "model.pt").read_bytes() == CONTENT


def test_https_is_never_followed_to_http(tmp_path: Path) -> None:
    redirects = download_module._Redirects()
    secure = Request("https://zenodo.org/records/1/files/a.pt")
    with pytest.raises(DownloadError, match=r"redirects to http://mirror\.example/a\.pt, which is not encrypted"):
        redirects.redirect_request(secure, None, 302, "Found", {}, "http://mirror.example/a.pt")
    followed = redirects.redirect_request(secure, None, 302, "Found", {}, "https://mirror.example/a.pt")
    assert followed is not None
    assert followed.full_url == "https://mirror.example/a.pt"


def test_an_address_without_a_file(site: Site, tmp_path: Path) -> None:
    site.statuses = [404]
    with pytest.raises(DownloadError, match=r"^cannot download http://127.*model\.pt\?download=1: 404 Not Found$"):
        download(site.url, tmp_path / "model.pt")
    assert len(site.asked) == 1  # no use in asking again
    assert left(tmp_path) == []


def test_a_busy_server_is_retried(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    download(site.url, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
    site.statuses = [503, 503, 503]
    with pytest.raises(DownloadError, match="503 Service Unavailable"):
        download(site.url, tmp_path / "other.pt")


def test_an_unreachable_server(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=r"cannot download http://127\.0\.0\.1.*refused") as caught:
        download(f"http://127.0.0.1:{port}/model.pt", tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_offline_uses_only_the_cache(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CED_OFFLINE", "1")
    with pytest.raises(DownloadError, match="CED_OFFLINE is set"):
        download(site.url, tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"here")
    download(site.url, tmp_path / "model.pt")
    assert site.asked == []
    monkeypatch.setenv("CED_OFFLINE", "0")
    download(site.url, tmp_path / "other.pt")
    assert (tmp_path / "other.pt").read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"^cannot write .*file/model\.pt: .*(exists|directory)"):
        download(site.url, tmp_path / "file" / "model.pt")


def test_several_processes_download_a_file_once(site: Site, tmp_path: Path) -> None:
    site.cuts = [100_000]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=download, args=(site.url, tmp_path / "model.pt")) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert site.asked == [None, "bytes=100000-"]
    assert (tmp_path / "model.pt").read_bytes() == CONTENT
