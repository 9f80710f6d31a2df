"""Sources without end: real servers, PortAudio itself where it is installed, and sources made to fail."""

import contextlib
import io
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError, MissingPackageError
from ced.sound import live, live_sources, web
from ced.sound.audio import SAMPLE_RATE, Channel, Window, cut_windows, stream
from ced.sound.live import Arrival, Listening
from ced.sound.live_sources import LiveSource

Waves = Iterator[NDArray[np.float32]]
ROOT = Path(__file__).parents[2]


def tone(seconds: float, rate: int) -> NDArray[np.float32]:
    """Return 440 Hz, (t,)."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def taken(listening: Listening, enough: Callable[[list[Window]], bool] = lambda _: False) -> list[Window]:
    """Take windows until the source ends, or they are enough."""
    found: list[Window] = []
    deadline = time.monotonic() + 20
    while not listening.ended and not enough(found):
        assert time.monotonic() < deadline
        if (arrival := listening.take()) is not None:
            found.append(arrival.window)
    return found


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no window be left out because the machine is busy."""
    monkeypatch.setattr(live, "_WAITING", 60.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_DELAYS", (0.05, 0.1, 0.2))


class Flaky:
    """A source that is heard for some blocks of a tenth of a second at each visit, and then fails."""

    def __init__(self, *visits: int) -> None:
        self.visits = list(visits)
        self.opened: list[float] = []
        self.heard: list[float] = []  # when a visit's first block came

    def __call__(self) -> Waves:
        self.opened.append(time.monotonic())
        count = self.visits.pop(0) if self.visits else 1000
        for number in range(count):
            time.sleep(0.01)
            if number == 0:
                self.heard.append(time.monotonic())
            yield np.full(1600, number, np.float32)
        raise AudioError("the cable is out")


def test_windows_are_those_of_the_complete_sound() -> None:
    rate = 44_100
    samples = np.stack([tone(3.0, rate), 0 * tone(3.0, rate)], 1)
    scaled = (samples * 32767).astype(np.int16)
    source = live_sources.blocks(np.array_split(scaled, 40), rate)
    with Listening(source, 0.5, 0.25) as listening:
        found = taken(listening)
    expected = list(cut_windows(stream((scaled, rate)), 0.5, 0.25))
    assert [(each.start, each.end) for each in found] == [(each.start, each.end) for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.wave, other.wave)


@pytest.mark.usefixtures("impatient")
def test_a_lost_source_is_reopened_until_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    flaky = Flaky(7, 0, 0, 0, 0)
    caplog.set_level(logging.INFO, "ced")
    with Listening(LiveSource("the shed", flaky), 0.5, 0.25) as listening:
        found = taken(listening, lambda found: len(found) == 4)
    waits = np.diff(flaky.opened)
    assert waits[0] >= 0.05 + 0.07
    assert (waits[1:] >= (0.1, 0.2, 0.2, 0.2)).all()  # each wait is longer, up to a limit
    assert (found[0].start, found[0].end) == (0, 0.5)  # the one behind it is broken off, and so is none
    assert found[1].start == pytest.approx(flaky.heard[1] - flaky.heard[0], abs=0.2)
    assert found[1].end - found[1].start == pytest.approx(0.5)
    np.testing.assert_array_equal(np.unique(found[1].wave), np.arange(5))  # nothing from before the outage
    listening_to, lost, back = caplog.messages
    assert (listening_to, lost) == (
        "listening to the shed",
        "the cable is out; reopening it until it is back",
    )
    assert re.fullmatch(r"the shed is back after \d s", back)


def test_a_source_that_cannot_be_opened_is_an_error() -> None:
    with Listening(LiveSource("nowhere", Flaky(0)), 0.5, 0.25) as listening, pytest.raises(AudioError, match="cable"):
        taken(listening)


def test_a_finite_source_ends_with_its_error() -> None:
    with Listening(LiveSource("once", Flaky(6), endless=False), 0.5, 0.5) as listening:
        assert len(taken(listening, lambda found: len(found) == 1)) == 1
        with pytest.raises(AudioError, match="cable"):
            taken(listening)


def test_times_include_outages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(live, "_DELAYS", (0.01,))
    visits = 0

    def stalls() -> Waves:
        nonlocal visits
        visits += 1
        yield from np.zeros((6, 1600), np.float32)
        if visits == 1:
            time.sleep(2)
            raise AudioError("nothing comes")

    with Listening(LiveSource("the shed", stalls), 0.5, 0.5) as listening:
        taken(listening, lambda found: len(found) == 2)
    assert "the shed is back after 2 s" in caplog.messages  # less the sound that came when it was back


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (np.zeros(1600, np.float32), r"a block of shape (1600,) and type float32; expected (t, channels) of"),
        (np.zeros((1600, 0), np.float32), r"a block of shape (1600, 0) and type float32; expected (t, channels) of"),
        (np.zeros((1600, 1), np.bool_), r"a block of shape (1600, 1) and type bool; expected (t, channels) of"),
        (np.full((1600, 1), 1e20, np.float32), "<blocks>: a sample of 1e+20 at 0.100 s"),
        (np.full((1600, 1), np.nan, np.float32), "<blocks>: samples that are not finite numbers"),
    ],
)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_invalid_blocks(block: NDArray[Any], said: str, rate: int) -> None:
    good = np.zeros((rate // 10, 1), np.float32)
    with pytest.raises(AudioError, match=re.escape(said)):
        list(live_sources.blocks([good, block], rate).open())


def test_a_listener_can_be_used_once() -> None:
    listening = Listening(live_sources.blocks([np.zeros((1600, 1))], SAMPLE_RATE), 0.1, 0.1)
    with listening:
        assert len(taken(listening)) == 1
    with pytest.raises(ConfigError, match="<blocks> was used before"), listening:
        pass


def test_the_oldest_windows_are_dropped(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(live, "_WAITING", 1.0)
    source = live_sources.blocks((np.full((1600, 1), number, np.float32) for number in range(100)), SAMPLE_RATE)
    with Listening(source, 0.1, 0.1) as listening:
        listening._thread.join(10)  # nobody takes any until all have come
        found = taken(listening)
    assert [int(each.wave[0]) for each in found] == list(range(90, 100))
    assert listening.left_out == 90
    assert [record.getMessage() for record in caplog.records] == [
        "sound arrives faster than it is scored: 1 windows dropped so far; a longer hop or a smaller model would help"
    ]


def test_windows_have_the_time_of_their_last_sample() -> None:
    before = time.time()
    with Listening(LiveSource("clock", Flaky(20)), 0.5, 0.5) as listening:
        arrival: Arrival | None = None
        while arrival is None:
            arrival = listening.take()
    assert before + 0.05 <= arrival.clock <= time.time()


def test_a_window_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="window hop is 0"):
        Listening(live_sources.blocks([], SAMPLE_RATE), 1.0, 0.0)


@pytest.mark.parametrize("word", ["a.wav", "file:///etc/passwd", "rtmp://host/a", "concat:a|b"])
def test_only_http_and_rtsp_addresses_are_streams(word: str) -> None:
    with pytest.raises(ConfigError, match="is not an http"):
        live_sources.address(word)


class Radio(ThreadingHTTPServer):
    """A station that sends a second of sound at its pace, breaks off, is away once, and is back."""

    daemon_threads = True

    def __init__(self, sound: bytes, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Station)
        self.sound, self.seconds, self.visits = sound, seconds, 0


class Station(BaseHTTPRequestHandler):
    server: Radio

    def do_GET(self) -> None:
        self.server.visits += 1
        if self.server.visits == 2:
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        steps = round(self.server.seconds / 0.05)
        for place in range(steps):
            size = len(self.server.sound)
            try:
                self.wfile.write(self.server.sound[place * size // steps : (place + 1) * size // steps])
            except OSError:
                return
            time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def radio(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the address of a station; its parameter is a format that soundfile writes."""
    file = io.BytesIO()
    soundfile.write(file, tone(1.0, 44_100), 44_100, format=request.param)
    sound = file.getvalue()
    if request.param == "WAV":  # as stations send it: of no known length
        sound = sound[:4] + b"\xff" * 4 + sound[8:40] + b"\xff" * 4 + sound[44:]
    server = Radio(sound, 1.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/live"
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("radio", ["WAV", "OGG", "MP3"], indirect=True)
def test_a_lost_station_is_reopened(radio: str) -> None:
    pytest.importorskip("av")
    began = time.monotonic()
    with Listening(live_sources.address(radio), 0.5, 0.25) as listening:
        found = taken(listening, lambda found: bool(found) and found[-1].start > 1.2)
    assert time.monotonic() - began > 0.9  # it was heard as it came
    pauses = [later.start - earlier.end for earlier, later in pairwise(found)]
    assert 0.1 < max(pauses) < 5.0  # the outage: a failed attempt and what opening takes
    assert sum(pause > 0 for pause in pauses) == 1
    for each in (found[1], found[-1]):
        spectrum = np.abs(np.fft.rfft(each.wave[:4000]))
        assert np.argmax(spectrum) * SAMPLE_RATE / 4000 == pytest.approx(440, abs=4)


def test_a_silent_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    monkeypatch.setattr(web, "PATIENCE", 0.5)
    release = threading.Event()

    class Silent(Station):
        def do_GET(self) -> None:
            release.wait(20)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    with (
        Listening(live_sources.address(url), 0.5, 0.25) as listening,
        pytest.raises(AudioError, match="no answer within"),
    ):
        taken(listening)
    release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Callable[[type[Station]], str]]:
    """Yield what starts a server and returns its address."""
    servers = []

    def start(kind: type[Station]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize("kind", ["WAV", "MP3", "OGG", "FLAC"])
def test_a_stalled_stream_is_cut_short(
    monkeypatch: pytest.MonkeyPatch, server: Callable[[type[Station]], str], kind: str
) -> None:
    pytest.importorskip("av")
    monkeypatch.setattr(web, "PATIENCE", 0.5)
    monkeypatch.setattr(live_sources, "_SPEED", 100)
    release = threading.Event()
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 6 * 16_000)
    soundfile.write(file, noise, 16_000, format=kind)

    class Stalled(Station):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(file.getvalue()[:-3300])
            release.wait(20)

    url = server(Stalled)
    came = []

    def hear() -> None:
        for block in live_sources.address(url).open():
            came.append((time.monotonic(), len(block)))

    with pytest.raises(AudioError, match=rf"^{url}: .*no sound arrived for 0\.5 s$"):
        hear()
    assert time.monotonic() - came[-1][0] > 0.4  # nothing is held back until the fault
    assert sum(length for _, length in came) > 3 * SAMPLE_RATE
    release.set()


@pytest.mark.parametrize("page", ["page", "empty", "nothing", "loop"])
def test_an_answer_without_sound(server: Callable[[type[Station]], str], page: str) -> None:
    pytest.importorskip("av")

    class Page(Station):
        def do_GET(self) -> None:
            if self.path == "/nothing":
                return
            self.send_response(302 if self.path == "/loop" else 200)
            self.send_header("Location", "/loop")
            self.end_headers()
            if self.path == "/page":
                self.wfile.write(b"<html><body>Radio</body></html>" * 20)

    url = server(Page) + page
    why = {"nothing": ".*closed connection", "loop": ".*more than 5 redirects"}.get(page, "the answer is not sound")
    with pytest.raises(AudioError, match=f"{re.escape(url)}: cannot be read: {why}"):
        next(live_sources.address(url).open())


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 80 + ".com", "["])
def test_an_unknown_host(host: str) -> None:
    pytest.importorskip("av")
    with pytest.raises(AudioError, match=r"the host .* cannot be found|a host$"):
        next(live_sources.address(f"http://{host}").open())


class FakePortAudio(SimpleNamespace):
    """sounddevice where the microphone is pulled out after each half second, and plugged in when it is looked for."""

    PortAudioError = RuntimeError

    def __init__(self) -> None:
        super().__init__(default=SimpleNamespace(device=(1, 0)), looked=1, there=True)

    def query_devices(self, name: str | int | None = None, kind: str = "") -> Any:
        found = [
            {"index": 0, "name": "speaker", "max_input_channels": 0, "default_samplerate": 48_000.0},
            {"index": 1, "name": "microphone", "max_input_channels": 2, "default_samplerate": 48_000.0},
        ]
        if not kind:
            return found
        if not self.there:
            raise ValueError(f"No input device matching {name!r}")
        return found[1]

    def _terminate(self) -> None:
        self.looked += 1

    def _initialize(self) -> None:
        self.there = self.looked >= 3

    def InputStream(self, rate: int, size: int, index: int, **rest: Any) -> "FakeStream":  # noqa: N802
        assert (rate, size, index, rest["dtype"]) == (48_000, 4800, 1, "float32")
        self.channels = rest["channels"]
        return FakeStream(self, rest["callback"], rest["finished_callback"])


class FakeStream:
    def __init__(self, port: FakePortAudio, callback: Callable[..., None], finished: Callable[[], None]) -> None:
        self.port, self.callback, self.finished = port, callback, finished

    def __enter__(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        pass

    def run(self) -> None:
        for _ in range(5):
            time.sleep(0.01)
            block = np.tile(np.array([0.25, -0.75], np.float32)[: self.port.channels], (4800, 1))
            self.callback(block, 4800, None, None)
        self.port.there = False
        self.finished()


@pytest.mark.usefixtures("impatient")
def test_a_lost_device_is_reopened(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    port = FakePortAudio()
    monkeypatch.setitem(sys.modules, "sounddevice", port)
    assert live_sources.devices() == [live_sources.Device(1, "microphone", 2, 48_000, True)]
    with Listening(live_sources.device("micro"), 0.2, 0.2) as listening:
        found = taken(listening, lambda found: bool(found) and found[-1].start > 0.6)
    assert port.looked == 3  # in vain once
    assert found[0].wave[2000] == pytest.approx(0.25, abs=1e-3)
    assert "input device micro is lost; reopening it until it is back" in caplog.messages


@pytest.mark.usefixtures("impatient")
def test_a_failed_restart_of_portaudio_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restarting(FakePortAudio):
        started = True

        def _terminate(self) -> None:
            if not self.started:
                raise self.PortAudioError("PortAudio not initialized")
            self.started = False

        def _initialize(self) -> None:
            self.looked += 1
            if self.looked < 4:
                raise self.PortAudioError("the sound server is gone")
            self.started = self.there = True

    port = Restarting()
    monkeypatch.setitem(sys.modules, "sounddevice", port)
    with Listening(live_sources.device("micro"), 0.2, 0.2) as listening:
        taken(listening, lambda found: bool(found) and found[-1].start > 0.6)
    assert port.looked == 4  # twice in vain


@pytest.mark.parametrize("name", ["0", "7", "99999999999999999999"])
def test_an_unknown_device_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakePortAudio())
    said = f"cannot record from input device {name}: no such input device; `ced live --list-devices` lists them"
    with pytest.raises(AudioError, match=re.escape(said)):
        next(live_sources.device(name).open())


def test_a_silent_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakePortAudio())
    monkeypatch.setattr(live_sources, "_SILENT_SECONDS", 0.1)
    monkeypatch.setattr(FakeStream, "run", lambda _: None)
    with pytest.raises(AudioError, match=r"the default input device gives no sound for 0\.1 s"):
        next(live_sources.device().open())


@pytest.mark.parametrize(("channel", "level"), [("left", 0.25), ("right", -0.75), (2, -0.75), ("mean", -0.25)])
def test_a_channel_of_a_device(monkeypatch: pytest.MonkeyPatch, channel: Channel, level: float) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakePortAudio())
    heard = live_sources.device(channel=channel).open()
    next(heard)  # the resampler begins with it
    assert float(np.median(next(heard))) == pytest.approx(level, abs=1e-3)
    monkeypatch.setitem(sys.modules, "sounddevice", FakePortAudio())
    with pytest.raises(AudioError, match="no channel 3; it has 2 channels"):
        next(live_sources.device(channel=3).open())
    with pytest.raises(ConfigError, match="mean, left, right"):
        live_sources.device(channel="middle")


def test_a_channel_of_blocks_and_addresses() -> None:
    stereo = np.tile(np.array([0.5, -0.25], np.float32), (1600, 1))
    for channel, level in (("left", 0.5), ("right", -0.25), ("mean", 0.125)):
        (wave,) = live_sources.blocks([stereo], SAMPLE_RATE, channel=channel).open()
        assert set(wave.tolist()) == {level}
    with pytest.raises(AudioError, match="no channel 3; it has 2 channels"):
        list(live_sources.blocks([stereo], SAMPLE_RATE, channel=3).open())
    with pytest.raises(ConfigError, match="mean, left, right"):
        live_sources.blocks([stereo], SAMPLE_RATE, channel=0)
    with pytest.raises(ConfigError, match="mean, left, right"):
        live_sources.address("http://x/a", "both")


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingPackageError, match=r"sounddevice: pip install 'ced-audio\[live\]'$"):
        live_sources.devices()
    monkeypatch.delitem(sys.modules, "sounddevice")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AudioError, match=r"need the PortAudio library \(.* not found\); .* libportaudio2"):
        live_sources.devices()


ALSA = Path("/usr/share/alsa/alsa.conf")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which PortAudio itself finds an input that plays a file, as fast as it is read."""
    try:
        import sounddevice  # noqa: F401
    except (ImportError, OSError):
        pytest.skip("PortAudio is not installed")
    if not ALSA.exists():
        pytest.skip("inputs of a file's sound are of ALSA")
    tone(2.0, 44_100).tofile(tmp_path / "tone.raw")
    (tmp_path / ".asoundrc").write_text(
        'pcm.nothing { type null }\npcm.cedtone { type file slave.pcm "nothing" format "raw" file "/dev/null"'
        f' infile "{tmp_path / "tone.raw"}" }}\n'
    )
    return {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}


def test_recording_through_portaudio(inputs: dict[str, str]) -> None:
    program = """
import numpy as np
from ced.errors import AudioError
from ced.sound.live_sources import device, devices
assert "cedtone" in [each.name for each in devices()]
source = device("cedtone")
for again in range(2):
    found = source.open()
    heard = np.concatenate([next(found) for _ in range(10)])[2000:10000]
    found.close()
    print(round(float(np.abs(heard).max()), 2), np.argmax(np.abs(np.fft.rfft(heard))) * 2)
try:
    next(device("no such thing").open())
except AudioError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], env=inputs, capture_output=True, text=True, check=False)
    missing = "cannot record from input device no such thing: No input device matching 'no such thing'"
    assert done.stdout.splitlines() == ["0.5 440", "0.5 440", missing], done.stderr


class Camera:
    """An RTSP 1.0 server (RFC 2326) as cameras have: a picture and a sound track, RTP within the connection."""

    SDP = (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\n"
        "m=video 0 RTP/AVP 26\r\na=control:picture\r\n"
        "m=audio 0 RTP/AVP 96\r\na=rtpmap:96 L16/16000/2\r\na=control:sound\r\n"
    )

    def __init__(self, seconds: float = 30.0) -> None:
        self.asked: list[str] = []
        self._seconds = seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as requests, contextlib.suppress(OSError):
            while line := requests.readline().decode().strip():
                headers = dict(header.decode().strip().split(": ", 1) for header in iter(requests.readline, b"\r\n"))
                method, target, _ = line.split()
                self.asked.append(f"{method} {target.rpartition('/')[2]}")
                reply, body = f"CSeq: {headers['CSeq']}\r\nSession: 1\r\n", ""
                if method == "DESCRIBE":
                    body = self.SDP
                    reply += f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
                if method == "SETUP":
                    reply += f"Transport: {headers['Transport']}\r\n"
                client.sendall(f"RTSP/1.0 200 OK\r\n{reply}\r\n{body}".encode())
                if method == "PLAY":
                    self._play(client)
                    return

    def _play(self, client: socket.socket) -> None:
        left = 0.5 * 32767 * np.sin(2 * np.pi * 440 * np.arange(320) / 16_000)
        payload = np.stack([left, 0 * left], 1).astype(">i2").tobytes()
        for number in range(round(self._seconds / 0.02)):
            packet = struct.pack(">BBHII", 0x80, 96, number & 0xFFFF, 320 * number, 1) + payload
            client.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)
            time.sleep(0.02)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def camera() -> Iterator[Camera]:
    made = Camera()
    yield made
    made.close()


@pytest.mark.parametrize(("channel", "level"), [("mean", 0.25), ("left", 0.5), ("right", 0.0)])
def test_a_camera_is_read(camera: Camera, channel: str, level: float) -> None:
    pytest.importorskip("av")
    source = live_sources.address(f"rtsp://me:secret@127.0.0.1:{camera.port}/stream", channel)
    assert source.name == f"rtsp://me:***@127.0.0.1:{camera.port}/stream"
    with Listening(source, 0.5, 0.25) as listening:
        found = taken(listening, lambda found: len(found) == 2)
    assert float(np.abs(found[1].wave).max()) == pytest.approx(level, abs=0.01)
    assert "SETUP sound" in camera.asked
    assert "SETUP picture" not in camera.asked


def test_a_channel_that_a_device_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", FakePortAudio())
    with pytest.raises(AudioError, match="there is no channel 3; it has 2 channels"):
        next(live_sources.device("micro", 3).open())
    with pytest.raises(ConfigError, match="channel"):
        live_sources.device("micro", "middle")


@pytest.mark.usefixtures("impatient")
def test_a_lost_camera_is_reopened(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("av")
    camera = Camera(seconds=1.0)
    with Listening(live_sources.address(f"rtsp://me:secret@127.0.0.1:{camera.port}/stream"), 0.5, 0.25) as listening:
        taken(listening, lambda found: bool(found) and found[-1].start > 1.2)
    camera.close()
    assert sum(line.startswith("PLAY") for line in camera.asked) >= 2
    assert "reopening it" in caplog.text
    assert "secret" not in caplog.text


def test_an_unreachable_camera() -> None:
    pytest.importorskip("av")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        AudioError, match=rf"^rtsp://me:\*\*\*@127\.0\.0\.1:{port}/: cannot be read: Connection refused"
    ):
        next(live_sources.address(f"rtsp://me:secret@127.0.0.1:{port}/").open())
