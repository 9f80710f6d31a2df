"""The page, as a program meets it and as a browser does."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.sound.labels import ClassTable
from ced.tag.hearing import Hearing, Limits
from ced.tag.tagger import Tagger

pytest.importorskip("gradio", reason="the page needs the extra app")
import gradio_client
import uvicorn

from ced.tag.app import serving

RATE = 16_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Pitch:
    """Tells low sounds from high ones: the share of energy on either side of 1 kHz."""

    labels = ClassTable(("low", "high <b>"))

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        power = np.abs(np.fft.rfft(waves)) ** 2
        edge = 1000 * waves.shape[1] // RATE
        shares = np.stack([power[:, :edge].sum(1), power[:, edge:].sum(1)], axis=1) / (power.sum(1)[:, None] + 1e-9)
        return np.asarray(0.9 * shares, np.float32)


def tones(path: Path, seconds: int = 4) -> Path:
    """Write a sound that is low, then from its middle on high."""
    time = np.arange(seconds * RATE) / RATE
    wave = 0.5 * np.sin(2 * np.pi * np.where(time < seconds / 2, 300, 3000) * time)
    soundfile.write(path, wave, RATE)
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    limits = Limits(megabytes=2, minutes=0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Tagger(Pitch()) as tagger,
        serving(Hearing(tagger, "pitch", limits)) as application,
    ):
        server = uvicorn.Server(uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(address: str) -> gradio_client.Client:
    return gradio_client.Client(address, verbose=False, analytics_enabled=False)


def handed(client: gradio_client.Client, path: Path, detail: str = "1 s") -> list[str]:
    shown = client.predict(gradio_client.handle_file(path), detail, 0.5, [], 8, api_name="/file")
    return [part if isinstance(part, str) else "" for part in shown]


def test_a_file_is_tagged_filtered_and_downloaded(client: gradio_client.Client, address: str, tmp_path: Path) -> None:
    player, picture, events, _ = handed(client, tones(tmp_path / "a & b.wav"))
    assert "a &amp; b" in player or "a  b" in player
    assert "high &lt;b&gt;" in picture
    assert "high &lt;b&gt;" in events
    assert "2 events of probability 0.5 or more" in events
    _, events = client.predict("1 s", 0.5, ["low"], 8, api_name="/redraw")
    assert "1 event of" in events
    link = events.split('href="')[1].split('"')[0].replace("&amp;", "&")
    link = f"{address}/{link}"
    lines = urlopen(link).read().decode().splitlines()
    assert len(lines) == 2
    assert lines[1].split(",")[1:4] == ["0.000000", "2.250000", "low"]
    record = json.loads(urlopen(link.replace("/csv?", "/jsonl?")).read())
    assert (record["model"], record["seconds"]) == ("pitch", 4.0)
    assert urlopen(link.replace("/csv?", "/audacity?")).read().decode().startswith("0.000000\t2.250000\tlow ")
    sound = urlopen(f"{link.rpartition('/')[0]}/clip.flac").read()
    assert sound.startswith(b"fLaC")
    assert not list(Path(gettempdir()).glob("ced-app-*/uploads/**/*.wav"))


@pytest.mark.parametrize(
    ("seconds", "said"), [(31, "is longer than 0.5 min, which is all that is taken here"), (0, "is empty")]
)
def test_what_cannot_be_tagged_is_said(client: gradio_client.Client, seconds: int, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"") if not seconds else tones(path, seconds)
    with pytest.raises(Exception, match=said) as error:
        handed(client, path)
    assert "uploads" not in str(error.value)


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:1/a.wav"])
def test_only_uploads_are_read(client: gradio_client.Client, path: str) -> None:
    with pytest.raises(Exception, match=r"."):
        client.predict({"path": path, "meta": {"_type": "gradio.FileData"}}, "1 s", 0.5, [], 8, api_name="/file")


def test_private_addresses_are_refused(client: gradio_client.Client, address: str) -> None:
    with pytest.raises(Exception, match="not a public address"):
        client.predict(f"{address}/", "1 s", 0.5, [], 8, api_name="/address")


def test_other_names_of_this_machine_and_other_tokens_are_refused(address: str) -> None:
    with pytest.raises(HTTPError, match="421"):
        urlopen(Request(address, headers={"Host": "evil.example"}))
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{address}/sounds/guess/csv")
    assert "default-src 'self'" in urlopen(address).headers["Content-Security-Policy"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "broken.wav").write_bytes(b"RIFF\x24\0\0\0WAVEjunk")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.set_input_files("#ced-file input[type=file]", tones(tmp_path / "a.wav"))
        rows = page.locator("#ced-table tbody tr")
        rows.nth(1).wait_for()
        assert rows.count() == 2
        limit = page.locator("#ced-threshold input[type=number]")
        limit.fill("1")
        limit.press("Enter")
        page.get_by_text("0 events of probability 1 or more").wait_for()
        limit.fill("0.5")
        limit.press("Enter")
        rows.nth(1).wait_for()
        with page.expect_download() as download:
            page.get_by_role("link", name="CSV").click()
        assert len(Path(download.value.path()).read_text().splitlines()) == 3
        rows.nth(1).get_by_role("button").click()
        page.wait_for_function("() => document.querySelector('.ced-player audio').currentTime > 1.7")
        page.set_input_files("#ced-file input[type=file]", tmp_path / "broken.wav")
        page.locator("[data-testid^=toast]").filter(has_text="cannot decode broken.wav").first.wait_for()
        browser.close()
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}
