"""The page of `ced serve` in Chromium: display, playback and exports, compared with those of the commands."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ced.serve.app import Access, Application
from ced.sound.labels import ClassTable
from ced.tag.events import events
from ced.tag.options import TagOptions
from ced.tag.records import Scored
from tests.serve.served import Mean, constant, running

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "ced" / "serve" / "static"
RATE = 16_000
PATIENCE = 120_000  # ms; generous, for machines under load
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG = 30  # minutes
WINDOWS = ("--window", "2", "--hop", "1")  # which the page begins with

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


def test_vendored_files_are_those_of_the_package() -> None:
    table = (STATIC / "vendor" / "VENDORED.md").read_text()
    sums = dict(re.findall(r"^\| (\S+\.js) \|.*\| ([0-9a-f]{64}) \|$", table, re.MULTILINE))
    found = {path.name: sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").glob("*.js")}
    assert sums == found
    assert "BSD" in (STATIC / "vendor" / "LICENSE").read_text()


def test_no_file_of_the_page_inserts_text_as_html() -> None:
    for path in STATIC.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", path.read_text()), path.name


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recordings in a row; esc10 finds events of several classes in them."""
    parts = []
    for name in ("thunder", "rooster", "guitar", "speech"):
        wave, rate = soundfile.read(ROOT / "resources" / f"{name}.ogg", dtype="float32")
        parts.append(np.interp(np.arange(int(len(wave) / rate * RATE)) / RATE, np.arange(len(wave)) / rate, wave))
    path = tmp_path_factory.mktemp("sounds") / 'a <b> "c".wav'
    soundfile.write(path, np.concatenate(parts), RATE, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server with esc10, started as users start it."""
    with serving("ced", "app", "-m", "esc10", "--no-browser") as url:
        yield url


class serving:  # noqa: N801
    """A server in a process of its own, and its address."""

    def __init__(self, *words: str, **variables: str) -> None:
        command = [sys.executable, "-m", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )

    def __enter__(self) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line):
                return found[0]
        raise AssertionError("the server did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, whose microphone plays the recording in a loop."""
    playwright = pytest.importorskip("playwright.sync_api")
    picked_up = tmp_path_factory.mktemp("microphone") / "microphone.wav"
    wave, rate = soundfile.read(recording)
    soundfile.write(picked_up, np.repeat(np.repeat(wave, 3)[:, None], 2, axis=1), 3 * rate, subtype="PCM_16")
    flags = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--autoplay-policy=no-user-gesture-required",
    ]
    flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*flags, f"--use-file-for-fake-audio-capture={picked_up}"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, its policy must have blocked nothing, and no script may have failed."""
    contexts, faults, asked, hosts = [], [], [], set()

    def open_page(url: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url or address)
        hosts.add(page.url.split("/")[2])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [fault for fault in faults if "the server responded with a status of 4" not in fault] == []
    assert {url.split("/")[2] for url in asked if url.startswith("http")} <= hosts


def until(page: Any, condition: str) -> None:
    """Wait for an expression to be true; Playwright's own way to do so is refused by the policy of the page."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(30)


def choose(page: Any, *paths: Path) -> None:
    page.set_input_files("#files", list(paths))


def wait_until_done(page: Any, count: int = 1) -> None:
    until(page, f"document.querySelectorAll('#queue .done').length === {count}")


def rows(page: Any) -> list[list[str]]:
    """Return the cells of the table: play, start, end, length, label, probability, save."""
    found: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('#events tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    return found


def in_lanes(page: Any, expression: str) -> Any:
    """Evaluate an expression about `root`, the shadow tree that holds the lanes."""
    return page.evaluate(f"(root => {expression})(document.querySelector('#lanes > div > div').shadowRoot)")


def downloaded(page: Any, press: Callable[[], None]) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        press()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def ced_tag(path: Path, *options: str, form: str = "csv") -> str:
    command = [sys.executable, "-m", "ced", "tag", "-m", "esc10", "--events", *options, "-f", form, path.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def faults_of(page: Any) -> list[tuple[str, str]]:
    """Return the violations that axe-core finds: the rule, and the first element that breaks it."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing")
    found = axe.Axe().run(page).response["violations"]
    return [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] != "minor"]


@in_browser
def test_events_are_those_of_the_command(visit: Callable[..., Any]) -> None:
    """On random windows, overlapping or with gaps, silent ones among them, for all options of events."""
    rng = np.random.default_rng(1)
    cases, expected = [], []
    labels = ClassTable(tuple("abcde"))
    for number in range(60):
        window, hop = (2.0, 2.0) if number % 3 == 0 else (2.0, float(rng.choice([0.1, 1.0, 1.7])))
        starts = np.arange(rng.integers(1, 40)) * hop + (rng.random() if number % 5 == 0 else 0)
        starts[len(starts) // 2 :] += 3.0 if number % 7 == 0 else 0.0
        probs = (rng.random((len(starts), 5)) ** 2).astype(np.float32)
        silent = rng.random(len(starts)) < 0.1
        probs[silent] = 0
        options = {
            "threshold": float(rng.choice([0.1, 0.3, 0.7])),
            "release": float(rng.choice([0.3, 0.5, 1.0])),
            "gap": float(rng.choice([0.0, 0.05, 1.3])),
            "shortest": float(rng.choice([0.0, 2.5])),
        }
        if number % 4 == 0:  # a threshold that is reached exactly
            options["threshold"] = float(probs.flat[0])
        scored = [
            Scored(float(start), float(start + window), row, bool(quiet))
            for start, row, quiet in zip(starts, probs, silent, strict=True)
        ]
        selection = TagOptions(events=True, threshold=options["threshold"]).selection(labels)
        merging = {name: options[name] for name in ("release", "gap", "shortest")}
        expected.append([[e.start, e.end, e.tags[0].index, e.prob] for e in events(scored, selection, **merging)])
        windows = [[s.start, s.end, s.silent, base64.b64encode(s.probs.tobytes()).decode()] for s in scored]
        cases.append({"labels": list(labels.names), "windows": windows, "options": options})
    assert sum(map(len, expected)) > 300
    found = visit().evaluate(
        """async (cases) => {
          const [{ findEvents }, { Scores }, { floats }] = await Promise.all(
            ["events", "state", "api"].map((name) => import(new URL(`${name}.js`, document.baseURI))));
          return cases.map(({ labels, windows, options }) => {
            const scores = new Scores(labels);
            for (const [start, end, silent, probs] of windows) scores.add(start, end, floats(probs), silent);
            return findEvents(scores, options).map(({ onset, offset, index, peak }) => [onset, offset, index, peak]);
          });
        }""",
        cases,
    )
    assert found == expected


@in_browser
def test_numbers_are_written_as_by_the_command(visit: Callable[..., Any]) -> None:
    rng = np.random.default_rng(2)
    numbers = [0.0, 1.0, 20.0, 0.125, 0.375, 1 / 128, 3 / 128, 1e-4, 9.999e-5, 1e-7, 123456.5, 1e16, 1.5e16, 1e22]
    numbers += [float(np.float32(value)) for value in rng.random(300) ** 8] + (rng.random(300) * 1000).tolist()
    found = visit().evaluate(
        """async (numbers) => {
          const { fixed, float } = await import(new URL("export.js", document.baseURI));
          return numbers.map((number) => [float(number), number < 1e16 ? fixed(number, 6) : "", fixed(number % 1, 2)]);
        }""",
        numbers,
    )
    assert found == [[json.dumps(x), f"{x:.6f}" if x < 1e16 else "", f"{x % 1:.2f}"] for x in numbers]


@in_browser
def test_control_characters_are_escaped(visit: Callable[..., Any]) -> None:
    """In JSON, which must read the same, and in cells of tables, which are not quoted."""
    name = 'a"b\\c\t\n\x1b[31m\x85\u2028\u202e\U000e0001\u200d\U0001f600,.wav'
    lines = visit().evaluate(
        """async (name) => {
          const { text } = await import(new URL("export.js", document.baseURI));
          const pieces = [{ start: 0, end: 1, tags: [{ label: name, index: 0, mid: null, prob: 0.5 }] }];
          const record = { file: name, seconds: 1, pieces };
          return ["jsonl", "csv", "audacity", "raven"].map((format) => text(format, [record]));
        }""",
        name,
    )
    tag = {"label": name, "index": 0, "mid": None, "prob": 0.5}
    record = {"file": name, "pieces": [{"start": 0.0, "end": 1.0, "tags": [tag]}], "seconds": 1.0}
    assert lines[0] == "".join(
        c if c in "\u200d\U0001f600" or c.isascii() else json.dumps(c)[1:-1]
        for c in json.dumps(record, ensure_ascii=False) + "\n"
    )
    assert list(csv.reader(io.StringIO(lines[1], newline="")))[1] == [
        name,
        "0.000000",
        "1.000000",
        name,
        "",
        "0.500000",
    ]
    escaped = 'a"b\\c\\t\\n\\x1b[31m\\x85\\u2028\u202e\U000e0001\u200d\U0001f600,.wav'
    assert lines[2] == f"0.000000\t1.000000\t{escaped} 0.50\n"
    assert lines[3].splitlines()[1].split("\t")[7:10] == [escaped, "0.000000", escaped]


@in_browser
def test_a_file_is_shown_filtered_played_and_exported(visit: Callable[..., Any], recording: Path) -> None:
    page = visit()
    choose(page, recording)
    wait_until_done(page)
    page.wait_for_selector("#events tbody tr:nth-child(3)")
    assert page.inner_text("#name") == recording.name
    # The picture: a row for each class, and regions where the events are.
    table = rows(page)
    assert page.inner_text("#count").startswith(f"{len(table)} events, {len({row[4] for row in table})} labels")
    assert page.locator("#rows li").count() == 8
    until(page, "document.querySelector('#lanes > div > div').shadowRoot.querySelector('[part~=region]')")
    wide = in_lanes(page, "[...root.querySelectorAll('[part~=region]')].map((each) => each.title)")
    assert {title.split(",")[0] for title in wide} == {row[4] for row in table}
    colours = in_lanes(
        page,
        """[...root.querySelectorAll('.lane canvas')].map((canvas) => new Set(new Uint32Array(
          canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size)""",
    )
    assert colours[0] > 100  # shades of the spectrogram
    assert colours[1] > 20  # and of the heat map
    # Filters act without a request.
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.fill("#threshold-number", "0.3")
    until(page, f"document.querySelectorAll('#events tbody tr').length > {len(table)}")
    page.fill("#top", "3")
    until(page, "document.querySelectorAll('#rows li').length === 3")
    for kind, suffix in (
        ("csv", ".csv"),
        ("jsonl", ".jsonl"),
        ("audacity", ".labels.txt"),
        ("raven", ".selections.txt"),
    ):
        button = page.locator("#export button").nth(["csv", "jsonl", "audacity", "raven"].index(kind))
        name, content = downloaded(page, button.click)
        assert name.endswith(suffix)
        expected = ced_tag(recording, *WINDOWS, "--threshold", "0.3", form=kind)
        # A browser does not tell a page the folder of a file, which Raven's tables have.
        assert content.decode() == expected.replace(f"{recording.parent}{os.sep}", "")
    label = rows(page)[0][4]
    page.fill("#gap", "1.5")
    page.fill("#search", label.upper())
    until(page, "document.querySelectorAll('#rows li').length === 1")
    options = (*WINDOWS, "--threshold", "0.3", "--labels", label, "--gap", "1.5")
    assert downloaded(page, page.locator("#export button").first.click)[1].decode() == ced_tag(recording, *options)
    assert asked == []
    # A piece is the samples of the file.
    start, end = (float(row) for row in ced_tag(recording, *options).splitlines()[1].split(",")[1:3])
    name, content = downloaded(page, page.locator("#events [data-action=save]").first.click)
    assert name.endswith(f"_{label.replace(' ', '_')}_{start:.2f}-{end:.2f}.wav")
    (recording.parent / "piece.wav").write_bytes(content)
    whole, piece = soundfile.read(recording)[0], soundfile.read(recording.parent / "piece.wav")[0]
    np.testing.assert_array_equal(piece, whole[round(start * RATE) : round(end * RATE)])


@in_browser
def test_events_are_played_with_mouse_and_keys(visit: Callable[..., Any], recording: Path) -> None:
    page = visit()
    choose(page, recording)
    wait_until_done(page)
    page.wait_for_selector("#events tbody tr:nth-child(3)")
    audio = "document.getElementById('audio')"
    until(page, f"{audio}.readyState > 0")
    page.locator("#events [data-action=play]").nth(1).click()
    until(page, f"!{audio}.paused")
    page.keyboard.press("Escape")
    page.locator("#timeline").focus()
    page.keyboard.press(" ")
    until(page, f"{audio}.paused")
    # Arrows go from event to event, and space plays the one that is picked.
    times = [float(row[1].partition(":")[2]) for row in rows(page)]
    for key, place in (("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        page.wait_for_selector(f"#events tbody tr:nth-child({place + 1}).picked")
    page.keyboard.press(" ")
    until(page, f"!{audio}.paused && {audio}.currentTime < {times[0] + 1.5}")
    page.keyboard.press(" ")
    # Zooming makes the lanes wider, to the same width all of them; 0 shows the whole sound again.
    width = in_lanes(page, "root.querySelector('.wrapper').clientWidth")
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert in_lanes(page, "root.querySelector('.wrapper').clientWidth") == pytest.approx(4 * width, abs=4)
    assert in_lanes(page, "root.querySelectorAll('.lane')[1].clientWidth") == pytest.approx(4 * width, abs=4)
    page.keyboard.press("0")
    assert in_lanes(page, "root.querySelector('.wrapper').clientWidth") == width
    # A click on an event plays it; a click beside events moves the cursor.
    in_lanes(page, "root.querySelector('[part~=region]').click()")
    until(page, f"!{audio}.paused")
    page.click("#play")
    page.locator("#lanes").click(position={"x": width / 2, "y": 60})
    assert page.evaluate(f"{audio}.currentTime / {audio}.duration") == pytest.approx(0.5, abs=0.02)
    # Sorting.
    page.get_by_role("button", name="Probability").click()
    probabilities = [row[5] for row in rows(page)]
    assert probabilities == sorted(probabilities, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Probability")


@in_browser
def test_several_files_other_windows_broken_files_and_cancelling(
    visit: Callable[..., Any], recording: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken <img src=x>.wav"
    broken.write_bytes(b"RIFF\x24\0\0\0WAVEjunk")
    aiff = tmp_path / "b.aiff"  # which Chromium cannot play
    soundfile.write(aiff, soundfile.read(recording)[0], RATE, format="AIFF")
    cut = tmp_path / "cut.flac"
    soundfile.write(tmp_path / "whole.flac", soundfile.read(recording)[0], RATE)
    cut.write_bytes((tmp_path / "whole.flac").read_bytes()[:200_000])
    page = visit()
    choose(page, broken, recording, aiff, cut)
    wait_until_done(page, 3)
    assert "decoded" in page.inner_text("#queue .failed .state")
    assert page.inner_text("#queue .failed .name") == broken.name
    assert "decoded" in page.inner_text("#notes")  # it came first, so it is shown
    assert rows(page) == [["No events at this threshold."]]
    assert "cut short" in page.locator("#queue .state").nth(3).inner_text()
    page.locator("#queue .open").nth(2).click()
    until(page, "/cannot play/.test(document.getElementById('notes').textContent)")
    page.wait_for_selector("#events tbody tr:nth-child(3)")
    assert page.inner_text("#time").endswith("/ 0:31.9")
    page.select_option("#windows", "0.16 s")
    until(page, "document.querySelectorAll('#queue .done').length === 3")
    page.wait_for_selector("#events tbody tr:nth-child(3)")
    content = downloaded(page, page.locator("#export button").first.click)[1].decode()
    assert content == ced_tag(aiff, "--columns")
    page.check("#all")
    content = downloaded(page, page.locator("#export button").first.click)[1].decode()
    lines = [line for line in content.splitlines() if not line.startswith("cut.flac,")]
    assert len(lines) < len(content.splitlines())
    assert lines == ced_tag(recording, *WINDOWS).splitlines() + ced_tag(aiff, "--columns").splitlines()[1:]
    # One that is being sent and one that waits are cancelled, and tried again.
    page.route("**/v1/audio/stream?*", lambda _: None)  # it is never answered
    choose(page, recording, recording)
    for place in (-1, -2):
        page.locator("#queue li").nth(place).get_by_role("button", name="Cancel").click()
    until(page, "document.querySelectorAll('#queue .cancelled').length === 2")
    page.unroute("**/v1/audio/stream?*")
    for place in (-1, -2):
        page.locator("#queue li").nth(place).get_by_role("button", name="Try again").click()
    wait_until_done(page, 5)
    page.get_by_role("button", name="Remove").first.click()
    assert page.locator("#queue li").count() == 5


@in_browser
def test_a_long_file_shows_its_first_events_while_it_is_tagged(
    visit: Callable[..., Any], recording: Path, tmp_path: Path
) -> None:
    wave = soundfile.read(recording, dtype="int16")[0]
    path = tmp_path / "long.flac"
    soundfile.write(path, np.resize(wave, LONG * 60 * RATE), RATE)
    page = visit()
    page.select_option("#windows", "10 s")
    page.evaluate(
        """() => {
          new MutationObserver(() => {
            if (window.early || !document.querySelector("#rows li")) return;
            const state = document.querySelector("#queue .tagging .state")?.innerText;
            const events = document.querySelectorAll("#events tbody tr").length;
            window.early = { events, state, part: document.querySelector("#queue progress").value };
          }).observe(document.getElementById("rows"), { childList: true });
        }"""
    )
    choose(page, path)
    until(page, "window.early")
    wait_until_done(page)
    early = page.evaluate("window.early")
    assert re.search(r"tagging, \d+:\d\d of 30:00", early["state"])
    assert early["part"] < 1
    until(page, f"document.querySelectorAll('#events tbody tr').length > {early['events']}")
    for _ in range(6):
        page.click("#zoom-in")
    canvases = in_lanes(page, "root.querySelectorAll('canvas').length")
    box = page.locator("#map").bounding_box()
    for part in (0.2, 0.5, 0.9):
        page.mouse.click(box["x"] + part * box["width"], box["y"] + 10)
        page.wait_for_timeout(100)
    left, total = in_lanes(
        page, "[root.querySelector('.scroll').scrollLeft, root.querySelector('.wrapper').clientWidth]"
    )
    assert left / total == pytest.approx(0.9, abs=0.02)
    assert in_lanes(page, "root.querySelectorAll('canvas').length") < canvases + 20  # what is out of view is dropped


@in_browser
def test_the_microphone_is_recorded_and_tagged_live(visit: Callable[..., Any]) -> None:
    page = visit(permissions=["microphone"])
    page.click("#record")
    until(page, "/Stop 0:03/.test(document.getElementById('record').textContent)")
    page.click("#record")
    wait_until_done(page)
    assert page.inner_text("#queue .name").startswith("recording ")
    assert float(page.inner_text("#queue .state").partition(":")[2]) == pytest.approx(3.2, abs=0.8)
    page.click("#listen")
    page.wait_for_selector("#live-events tr")
    until(page, "document.getElementById('live-level').value > -50")
    until(page, "document.querySelectorAll('#live-rows li').length === 8")
    page.wait_for_selector("#live-events tr:not(.going)")
    page.click("#live-stop")
    until(page, "document.getElementById('live-state').textContent === 'Stopped'")
    assert page.locator("#live-events tr.going").count() == 0
    count = page.locator("#live-events tr").count()
    assert faults_of(page) == []
    lines = downloaded(page, page.locator("#live-save").click)[1].decode().splitlines()
    assert len(lines) == count
    assert {json.loads(line)["state"] for line in lines} == {"end"}


@in_browser
def test_the_resampler_keeps_what_is_below_half_the_rate_and_removes_the_rest(visit: Callable[..., Any]) -> None:
    found = visit().evaluate(
        """async () => {
          const { Resampler } = await import(new URL("resample.js", document.baseURI));
          const measure = (from, hertz) => {
            const resampler = new Resampler(from, 16000);
            const made = [];
            for (let start = 0; start < from; start += 128)
              made.push(...resampler.add(Float32Array.from({ length: 128 }, (_, at) =>
                Math.sin((2 * Math.PI * hertz * (start + at)) / from))));
            const middle = made.slice(2000, 14000);
            return [made.length, Math.sqrt(middle.reduce((sum, value) => sum + value * value, 0) / middle.length)];
          };
          return [
            [48000, 1000], [48000, 6500], [48000, 10000], [44100, 440], [44100, 15000], [16000, 5000], [8000, 1000],
          ].map((given) => measure(...given));
        }"""
    )
    lengths, levels = zip(*found, strict=True)
    assert all(abs(length - 16_000) < 100 for length in lengths)
    assert levels == pytest.approx([0.707, 0.707, 0.0, 0.707, 0.0, 0.707, 0.707], abs=0.01)


@in_browser
def test_an_api_key_is_asked_for_once(visit: Callable[..., Any], recording: Path) -> None:
    key = "a-key-of-some-length"
    with serving("ced", "serve", "-m", "esc10", "--port", "0", CED_API_KEY=key) as url:
        page = visit(url)
        for given in ("wrong", key):
            page.fill("#key-value", given)
            page.press("#key-value", "Enter")
        until(page, "document.getElementById('model').textContent")
        choose(page, recording)
        wait_until_done(page)
        page.reload()
        until(page, "document.getElementById('model').textContent")
        assert not page.locator("#key").is_visible()
        page.click("#listen")
        until(page, "document.getElementById('live-state').textContent === 'Listening'")
        page.close()


class _Site(BaseHTTPRequestHandler):
    """A web server with one sound."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(constant(0.75, 3.0))

    def log_message(self, format: str, *args: object) -> None:
        pass


@in_browser
def test_a_sound_from_an_address_is_tagged(
    visit: Callable[..., Any], recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server fetches it; the browser connects to no other host, which `visit` checks."""
    monkeypatch.setattr("ced.sound.web.is_public", lambda address: True)
    app = Application(Mean(), "mean", access=Access(addresses=True))
    with ThreadingHTTPServer(("127.0.0.1", 0), _Site) as site, running(app) as url:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        page = visit(url)
        until(page, "!document.getElementById('fetch').hidden")
        page.fill("#address", "ftp://example.org/a.wav")
        page.press("#address", "Enter")
        assert page.locator("#queue li").count() == 0
        page.fill("#address", f"http://127.0.0.1:{site.server_port}/x/a%20%3Cimg%20src=x%3E.wav?y=1")
        page.press("#address", "Enter")
        wait_until_done(page)
        site.shutdown()
        page.wait_for_selector("#events tbody tr:nth-child(1)")
        assert page.inner_text("#name") == page.inner_text("#queue .name") == "a <img src=x>.wav"
        assert page.locator("img").count() == 0
        assert page.input_value("#address") == ""
        assert [row[1:5] for row in rows(page)] == [["0:00.00", "0:03.00", "3.00", "loud"]]
        assert "not played" in page.inner_text("#notes")
        assert page.is_disabled("#play")
        content = downloaded(page, page.locator("#export button").first.click)[1].decode()
        assert content.splitlines()[1].startswith("a <img src=x>.wav,0.000000,3.000000,loud")
        page.locator("#events [data-action=save]").first.click()
        until(page, "/cannot be saved/.test(document.getElementById('problem').textContent)")
        # One that the server cannot fetch fails, and a file can be played after it.
        page.fill("#address", "http://127.0.0.1:9/")
        page.press("#address", "Enter")
        until(page, "document.querySelectorAll('#queue .failed').length === 1")
        choose(page, recording)
        wait_until_done(page, 2)
        until(page, "document.getElementById('audio').readyState > 0")
        assert page.is_enabled("#play")
        assert faults_of(page) == []
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@in_browser
def test_the_field_for_addresses_is_hidden_if_the_server_fetches_none(visit: Callable[..., Any]) -> None:
    page = visit()
    until(page, "document.getElementById('model').textContent")
    assert page.is_hidden("#address")


@in_browser
def test_events_are_cut_from_wav_files_with_long_chunks_before_the_samples(visit: Callable[..., Any]) -> None:
    wave = np.arange(RATE, dtype="<i2")
    plain = io.BytesIO()
    soundfile.write(plain, wave, RATE, format="WAV", subtype="PCM_16")
    content = plain.getvalue()
    texts = b"LIST" + (200_001).to_bytes(4, "little") + bytes(200_002)  # padded to an even length
    whole = content[:12] + texts + content[12:36] + texts + content[36:]
    found = visit().evaluate(
        """async (text) => {
          const [{ snippet }, { bytes }] = await Promise.all(
            ["wav", "api"].map((name) => import(new URL(`${name}.js`, document.baseURI))));
          const piece = await snippet(new Blob([bytes(text)]), 0.25, 0.5, 1);
          return [...new Uint8Array(await piece.arrayBuffer())];
        }""",
        base64.b64encode(whole).decode(),
    )
    piece, rate = soundfile.read(io.BytesIO(bytes(found)), dtype="int16")
    assert rate == RATE
    np.testing.assert_array_equal(piece, wave[RATE // 4 : RATE // 2])


@in_browser
def test_a_player_that_reports_no_length_does_not_delay_the_queue(visit: Callable[..., Any], recording: Path) -> None:
    page = visit()
    page.evaluate("() => { window.Audio = class { load() {} removeAttribute() {} }; }")
    choose(page, recording)
    page.get_by_role("button", name="Cancel").click()
    until(page, "document.querySelectorAll('#queue .cancelled').length === 1")
    page.get_by_role("button", name="Try again").click()
    wait_until_done(page)


@in_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_the_page_is_accessible(visit: Callable[..., Any], recording: Path, scheme: str, width: int) -> None:
    page = visit(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    choose(page, recording)
    wait_until_done(page)
    page.wait_for_selector("#events tbody tr:nth-child(3)")
    page.locator("#events tbody tr").nth(1).click()
    page.locator("#search").focus()
    assert faults_of(page) == []
    # Nothing is wider than the screen, and a theme that is chosen overrules the system's and stays.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before == ("rgb(244, 246, 248)" if scheme == "light" else "rgb(15, 18, 21)")
    for _ in range(2 if scheme == "light" else 1):
        page.click("#theme")
    page.reload()
    other = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert other == ("rgb(15, 18, 21)" if scheme == "light" else "rgb(244, 246, 248)")
