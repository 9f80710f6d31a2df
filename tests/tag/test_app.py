"""The page, as a program meets it and as a browser does."""

import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.cli import main
from ced.demo.sounds import generate
from ced.model.runtime import open_model
from ced.sound.labels import ClassTable
from ced.tag.hearing import Hearing, Limits
from ced.tag.tagger import Scorer, Tagger

pytest.importorskip("gradio", reason="the page needs the extra app")
import gradio_client
import uvicorn

from ced.tag.app import Server, serving
from ced.tag.desk import Access

RATE = 16_000
COLUMN = 2_560  # samples
PATIENCE = 120_000  # ms
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Pitch:
    """Tells low sounds from high ones: the share of energy on either side of 1 kHz."""

    labels = ClassTable(("low", "high <b>"))

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        power = np.abs(np.fft.rfft(waves)) ** 2
        edge = 1000 * waves.shape[1] // RATE
        shares = np.stack([power[:, :edge].sum(1), power[:, edge:].sum(1)], axis=1) / (power.sum(1)[:, None] + 1e-9)
        return np.asarray(0.9 * shares, np.float32)

    def columns(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        count = waves.shape[1] // COLUMN
        return self(waves[:, : count * COLUMN].reshape(count, COLUMN))[None]

    def column_starts(self, count: int) -> NDArray[np.float64]:
        return np.arange(count, dtype=np.float64) * (COLUMN / RATE)


def tones(path: Path, seconds: int = 4) -> Path:
    """Write a sound that is low, then from its middle on high."""
    time = np.arange(seconds * RATE) / RATE
    wave = 0.5 * np.sin(2 * np.pi * np.where(time < seconds / 2, 300, 3000) * time)
    soundfile.write(path, wave, RATE)
    return path


@contextmanager
def shown(scorer: Scorer, model: str, limits: Limits) -> Iterator[str]:
    """Run the page, and give its address."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Tagger(scorer) as tagger,
        serving(Hearing(tagger, model, limits), Access()) as application,
    ):
        server = Server(uvicorn.Config(application, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with shown(Pitch(), "pitch", Limits(megabytes=2, minutes=0.5)) as url:
        yield url


@pytest.fixture
def client(address: str) -> gradio_client.Client:
    return gradio_client.Client(address, verbose=False, analytics_enabled=False)


def handed(client: gradio_client.Client, path: Path, detail: str = "1 s") -> list[str]:
    shown = client.predict(gradio_client.handle_file(path), detail, 0.5, [], 8, api_name="/file")
    return [part if isinstance(part, str) else "" for part in shown]


def test_a_file_is_tagged_filtered_and_downloaded(client: gradio_client.Client, address: str, tmp_path: Path) -> None:
    player, picture, events = handed(client, tones(tmp_path / "a & b.wav"))
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
    assert f'src="{link[len(address) + 1 :].rpartition("/")[0]}/mel.png"' in picture
    assert urlopen(f"{link.rpartition('/')[0]}/mel.png").read()[12:24] == b"IHDR" + struct.pack(">II", 400, 64)
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


def called(address: str, path: str) -> str:
    """Return what is answered to a request that names a file itself; the client would upload it first."""
    words = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "1 s", 0.5, [], 8], "session_hash": "mine"}
    call = f"{address}/gradio_api/call/file"
    request = Request(call, json.dumps(words).encode(), {"Content-Type": "application/json"})
    event = json.load(urlopen(request))["event_id"]
    answer: str = urlopen(f"{call}/{event}").read().decode()
    return answer


@pytest.mark.parametrize("path", ["{outside}", "{around}", "{server}/a.wav"])
def test_only_uploads_are_read(address: str, path: str, tmp_path: Path) -> None:
    """Neither a sound that lies on this machine, which could be tagged, nor one behind an address."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

    outside = tones(tmp_path / "a.wav")
    uploads = next(Path(gettempdir()).glob("ced-app-*/uploads"))
    around = f"{uploads}/{os.path.relpath(outside, uploads)}"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        server = f"http://127.0.0.1:{other.server_port}"
        answer = called(address, path.format(outside=outside, around=around, server=server))
        other.shutdown()
    assert answer.startswith("event: error\n")
    assert "only what was uploaded is read" in answer
    assert asked == []
    assert outside.exists()


def test_private_addresses_are_refused(client: gradio_client.Client, address: str) -> None:
    with pytest.raises(Exception, match="not a public address"):
        client.predict(f"{address}/", "1 s", 0.5, [], 8, api_name="/address")


def test_other_names_of_this_machine_and_other_tokens_are_refused(address: str) -> None:
    with pytest.raises(HTTPError, match="421"):
        urlopen(Request(address, headers={"Host": "evil.example"}))
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{address}/sounds/guess/csv")
    assert "default-src 'self'" in urlopen(address).headers["Content-Security-Policy"]


def test_events_are_those_of_ced_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    barks, bells = generate("Bark", rng, 2.0), generate("Bell", rng, 2.5)
    soundfile.write(tmp_path / "a.wav", np.concatenate((barks, bells, barks)), RATE)
    monkeypatch.chdir(tmp_path)
    with shown(open_model("esc10"), "esc10", Limits()) as url:
        client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
        for detail, windows in (("1 s", ["--window", "1", "--hop", "0.5"]), ("0.16 s", ["--columns"])):
            shown_events = client.predict(gradio_client.handle_file("a.wav"), detail, 0.15, [], 8, api_name="/file")[2]
            link = f"{url}/" + re.findall('href="(.*?)/csv', shown_events)[0]
            for kind in ("csv", "jsonl", "audacity"):
                words = ["ced", "tag", "-m", "esc10", "--events", "--threshold", "0.15", "-f", kind, *windows, "a.wav"]
                monkeypatch.setattr(sys, "argv", words)
                with pytest.raises(SystemExit):
                    main()
                expected = capsys.readouterr().out
                assert urlopen(f"{link}/{kind}?threshold=0.15").read().decode() == expected
            rows = re.findall(r"</button></td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", shown_events)
            lines = [line.split("\t") for line in expected.splitlines()]
            assert len(rows) == len(lines) > 1
            for (begin, end, label, _), (first, last, said) in zip(rows, lines, strict=True):
                assert (float(begin), float(end)) == pytest.approx((float(first), float(last)), abs=0.005)
                assert said.startswith(label)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, whose microphone hears a high tone."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    heard = tmp_path_factory.mktemp("microphone") / "high.wav"
    soundfile.write(heard, 0.5 * np.sin(2 * np.pi * 3000 * np.arange(48_000) / 48_000), 48_000)
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, f"--use-file-for-fake-audio-capture={heard}"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page()
    opened.set_default_timeout(PATIENCE)
    yield opened
    opened.close()


def drop(page: Any, path: Path) -> None:
    page.set_input_files("#ced-file input[type=file]", path)


def complaint(page: Any, said: str) -> None:
    page.locator("[data-testid^=toast]").filter(has_text=said).first.wait_for()


def test_a_sound_is_seen_filtered_taken_along_and_heard(page: Any, address: str, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    drop(page, tones(tmp_path / "a.wav"))
    rows = page.locator("#ced-table tbody tr")
    rows.nth(1).wait_for()
    assert rows.count() == 2
    limit = page.locator("#ced-threshold input[type=number]")
    for threshold, count in (("1", 0), ("0.5", 2)):
        limit.fill(threshold)
        limit.press("Enter")
        page.get_by_text(f"{count} events of probability {threshold} or more").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 3
    assert page.evaluate("() => document.querySelector('.ced-mel').naturalWidth") == 400
    page.evaluate(
        """() => { window.sought = [];
        document.addEventListener("seeking", (event) => window.sought.push(event.target.currentTime), true); }"""
    )
    rows.nth(1).get_by_role("button").click()
    page.wait_for_function("() => window.sought.length == 1")
    box = page.locator(".ced-plot").bounding_box()
    page.locator(".ced-plot").click(position={"x": box["width"] * 0.25, "y": 5})
    page.wait_for_function("() => window.sought.length == 2")
    assert page.evaluate("() => window.sought") == pytest.approx([2.5, 1.0], abs=0.02)
    assert not page.evaluate("() => document.querySelector('.ced-player audio').paused")
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.split("/")[2]}


def test_other_windows_tag_it_again(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(address)
    drop(page, tones(tmp_path / "a.wav"))
    page.locator("#ced-table tbody tr").nth(1).wait_for()
    page.locator("#ced-windows input").click()
    page.get_by_role("option", name="0.16 s").click()
    page.locator("#ced-table td").get_by_text("2.08", exact=True).first.wait_for()
    cells = page.locator("#ced-table tbody td").all_inner_texts()
    assert [cells[1:4], cells[6:9]] == [["0", "2.08", "low"], ["2.08", "4", "high <b>"]]


def test_a_recording_is_tagged(page: Any, address: str) -> None:
    page.goto(address)
    page.get_by_role("tab", name="Microphone").click()
    page.locator("#ced-microphone .record-button").click()
    page.locator("#ced-microphone .stop-button").wait_for()
    page.wait_for_timeout(1500)
    page.locator("#ced-microphone .stop-button").click()
    page.locator("#ced-table tbody tr").get_by_text("high <b>").wait_for()
    assert page.evaluate("() => +document.querySelector('.ced-plot').dataset.seconds") > 1


def test_what_is_wrong_with_a_sound_is_said(page: Any, address: str, tmp_path: Path) -> None:
    page.goto(address)
    (tmp_path / "broken.wav").write_bytes(b"RIFF\x24\0\0\0WAVEjunk")
    drop(page, tmp_path / "broken.wav")
    complaint(page, "cannot decode broken.wav")
    soundfile.write(tmp_path / "large.wav", np.zeros(1_100_000, np.int16), RATE)
    drop(page, tmp_path / "large.wav")
    complaint(page, 'exceed the maximum allowed size of 1.9 MB: "large.wav"')  # of 1,048,576 bytes
    drop(page, tones(tmp_path / "a.wav"))
    page.locator("#ced-table tbody tr").nth(1).wait_for()


def test_a_long_sound_shows_how_far_it_is(page: Any, tmp_path: Path) -> None:
    class Slow(Pitch):
        def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
            time.sleep(0.001)
            return super().__call__(waves)

    soundfile.write(tmp_path / "long.flac", soundfile.read(tones(tmp_path / "a.wav", 1200))[0], RATE)
    with shown(Slow(), "pitch", Limits(minutes=20)) as url:
        page.goto(url)
        drop(page, tmp_path / "long.flac")
        page.get_by_text(re.compile(r"tagging: \d+:\d\d of 20:00 min")).first.wait_for()
        page.locator("#ced-table tbody tr").nth(1).wait_for()
        assert page.locator("#ced-table tbody td").all_inner_texts()[1:4] == ["0:00", "10:00.5", "low"]
