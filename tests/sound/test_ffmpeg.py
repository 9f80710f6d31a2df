import io
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from ced.errors import AudioError, MissingPackageError
from ced.sound import ffmpeg
from ced.sound.audio import SAMPLE_RATE, load, load_stored, open_sound, stream

av: Any = pytest.importorskip("av")

SECONDS = 3.0
KINDS = [  # suffix, container, codec, rate
    (".m4a", "ipod", "aac", 44_100),
    (".mp4", "mp4", "aac", 48_000),
    (".webm", "webm", "libopus", 48_000),
    (".avi", "avi", "mp2", 44_100),
    (".ac3", "ac3", "ac3", 48_000),
    (".aac", "adts", "aac", 22_050),
]


def tones(rate: int, seconds: float = SECONDS) -> NDArray[np.float32]:
    """Return two channels, (2, t): 440 Hz on the left, silence on the right."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * 440 * time), 0.0 * time]).astype(np.float32)


def write(path: Path, container: str, codec: str, rate: int, samples: NDArray[np.float32]) -> Path:
    """Encode two channels, (2, t)."""
    options = {"movflags": "faststart"} if container in ("ipod", "mp4") else {}
    with av.open(str(path), "w", format=container, options=options) as out:
        track = out.add_stream(codec, rate=rate)
        track.layout, track.bit_rate = "stereo", 128_000
        size = track.codec_context.frame_size or 1024
        resampler = av.AudioResampler(track.codec_context.format.name, "stereo", rate)
        for start in range(0, samples.shape[1], size):
            frame = av.AudioFrame.from_ndarray(samples[:, start : start + size].copy(), "fltp", "stereo")
            frame.rate, frame.pts = rate, start
            for converted in resampler.resample(frame):
                out.mux(track.encode(converted))
        out.mux(track.encode(None))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    return {
        suffix: write(folder / f"tone{suffix}", container, codec, rate, tones(rate))
        for suffix, container, codec, rate in KINDS
    }


@pytest.mark.parametrize(("suffix", "container", "codec", "rate"), KINDS)
def test_kinds(files: dict[str, Path], suffix: str, container: str, codec: str, rate: int) -> None:
    path = files[suffix]
    wave = load(path)
    assert wave.dtype == np.float32
    assert abs(len(wave) / SAMPLE_RATE - SECONDS) < 0.1
    # One channel of two at 0.4: their mean is at 0.2, not 3 dB above.
    middle = wave[SAMPLE_RATE : 2 * SAMPLE_RATE]
    assert pytest.approx(float(np.sqrt(np.mean(middle**2))), rel=0.02) == 0.2 / 2**0.5
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440
    for seconds in (0.1, 1.0, 60.0):
        np.testing.assert_array_equal(np.concatenate(list(stream(path, seconds))), wave)
    np.testing.assert_array_equal(load(path.read_bytes()), wave)
    both = load_stored(path, stereo=True)
    assert both.shape == (len(wave), 2)
    np.testing.assert_allclose(both.mean(axis=1), wave, atol=1e-6)
    with av.open(str(path)) as decoded:
        frames = [frame.to_ndarray() for frame in decoded.decode(audio=0)]
    expected = np.concatenate([frame if len(frame) == 2 else frame.reshape(-1, 2).T for frame in frames], axis=1)
    if expected.dtype == np.int16:
        expected = expected / np.float32(32768)
    whole = soxr.resample(expected.mean(axis=0), rate, SAMPLE_RATE, "HQ")
    same = len(wave) - 100  # the encoder's padding is removed where the file tells how much it is
    np.testing.assert_allclose(wave[:same], whole[:same], atol=1e-6)
    if suffix in (".m4a", ".mp4", ".webm"):
        assert len(wave) == SECONDS * SAMPLE_RATE


@pytest.mark.parametrize("suffix", [".m4a", ".mp4", ".webm", ".avi", ".aac"])
def test_cut_short(files: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    data = files[suffix].read_bytes()
    half = tmp_path / f"half{suffix}"
    half.write_bytes(data[: len(data) // 2])
    blocks: list[NDArray[np.float32]] = []
    with pytest.raises(AudioError, match=rf"half{suffix}: cut short: it ends after 1\.\d\d s"):
        blocks.extend(stream(half, 0.3))
    wave = np.concatenate(blocks)
    np.testing.assert_allclose(wave[:16_000], load(files[suffix])[:16_000], atol=1e-5)
    half.write_bytes(data[:40])
    with pytest.raises(AudioError, match="half"):
        load(half)


def test_a_picture_has_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as out:
        track = out.add_stream("mpeg4", rate=10)
        track.width = track.height = 16
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    with pytest.raises(AudioError, match=r"silent\.mp4: no sound track"):
        load(path)


@pytest.mark.parametrize("codec", ["pcm_s16le", "flac", "aac"])
def test_many_channels(codec: str) -> None:
    """Frames of eight channels and more are more than PyAV's own arrays can hold."""
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    samples = np.stack([tone, *np.zeros((7, 48_000))]).astype(np.float32)
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        track = out.add_stream(codec, rate=48_000)
        track.layout = "7.1"
        resampler = av.AudioResampler(track.codec_context.format.name, "7.1", 48_000)
        for start in range(0, 48_000, 960):
            part = np.ascontiguousarray(samples[:, start : start + 960].T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(part, "flt", "7.1")
            frame.rate, frame.pts = 48_000, start
            for converted in resampler.resample(frame):
                out.mux(track.encode(converted))
        out.mux(track.encode(None))
    wave = load(file.getvalue())
    middle = wave[4_000:12_000]
    assert pytest.approx(float(np.sqrt(np.mean(middle**2))), rel=0.05) == 0.4 / 8 / 2**0.5
    assert load_stored(file.getvalue(), stereo=True).ndim == 1


def test_a_title_that_is_not_text(files: dict[str, Path]) -> None:
    data = files[".m4a"].read_bytes()
    assert b"Lavf" in data
    np.testing.assert_array_equal(load(data.replace(b"Lavf", b"\xb2avf")), load(data))


@pytest.mark.parametrize(
    "playlist",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"],
)
def test_a_playlist_file_is_not_followed(files: dict[str, Path], playlist: str) -> None:
    path = files[".m4a"].with_name("list.m3u8")
    path.write_text(playlist.format(files[".m4a"].name))
    with pytest.raises(AudioError, match=r"cannot be decoded: Format not recognised; readable are .*, M4A, MP4"):
        load(path)


def test_a_variable_mp3_without_a_header_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """libsndfile takes the first frames' bit rate for that of all, and stops where the file would end then."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * 4)
    path = tmp_path / "vbr.mp3"
    with soundfile.SoundFile(
        path, "w", 44_100, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5
    ) as file:
        for samples in (noise, np.zeros(44_100 * 16)):
            file.write(samples)
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"\xff\xfb", 4) :])  # without the first frame, which holds the header
    wave = load(path)
    assert 19.9 < len(wave) / SAMPLE_RATE < 20.2
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match="cut short"):
        load(path)
    assert len(load(path, strict=False)) / SAMPLE_RATE < 15
    assert "vbr.mp3: its length is not in its header" in caplog.text
    assert "pip install 'ced-audio[media]'" in caplog.text


def test_without_pyav_the_extra_is_named(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"tone.m4a: .* pip install 'ced-audio\[media\]' adds M4A"):
        load(files[".m4a"])
    with pytest.raises(MissingPackageError, match=r"http://x/a .* av: pip install 'ced-audio\[media\]'"):
        load("http://x/a")


def test_padding_of_mp4_files_is_removed(tmp_path: Path) -> None:
    """By the length of the track (edit list), or in the words of iTunes; Opus in WebM and OGG has its own."""
    for rate, codec in ((44_100, "aac"), (48_000, "aac"), (48_000, "libopus")):
        path = write(tmp_path / "a.mp4", "mp4", codec, rate, tones(rate, 10.0))
        wave = load(path)
        assert len(wave) == 10 * SAMPLE_RATE
        expected = soxr.resample(tones(rate, 10.0).mean(axis=0), rate, SAMPLE_RATE, "HQ")
        assert np.corrcoef(wave, expected)[0, 1] > 0.999  # not a sample late
    for kind in ("webm", "ogg"):
        assert len(load(write(tmp_path / "a", kind, "libopus", 48_000, tones(48_000, 10.0)))) == 10 * SAMPLE_RATE


def box(name: bytes, body: bytes) -> bytes:
    return (8 + len(body)).to_bytes(4) + name + body


def test_padding_in_itunes_metadata(tmp_path: Path) -> None:
    frames = 3 * 44_100
    path = tmp_path / "a.m4a"
    samples = np.pad(tones(44_100), ((0, 0), (0, 1000)))
    write(path, "ipod", "aac", 44_100, samples)
    assert len(load(path)) > 3.02 * SAMPLE_RATE
    words = f" 00000000 00000400 {1000:08X} {frames:016X}" + " 00000000" * 8
    said = (
        box(b"mean", bytes(4) + b"com.apple.iTunes")
        + box(b"name", bytes(4) + b"iTunSMPB")
        + box(b"data", b"\0\0\0\1" + bytes(4) + words.encode())
    )
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4) + handler + box(b"ilst", box(b"----", said))))
    data = path.read_bytes()
    film = data.index(b"moov") - 4
    size = int.from_bytes(data[film : film + 4])
    body = data[film + 8 : film + size]
    body = body[: body.index(b"udta") - 4] + tags
    moved = len(tags) - (size - 8 - (len(body) - len(tags)))
    place = body.index(b"stco") + 8
    count = int.from_bytes(body[place : place + 4])
    offsets = np.frombuffer(body[place + 4 : place + 4 + 4 * count], ">u4") + moved
    body = body[: place + 4] + offsets.astype(">u4").tobytes() + body[place + 4 + 4 * count :]
    path.write_bytes(data[:film] + box(b"moov", body) + data[film + size :])
    assert len(load(path)) == 3 * SAMPLE_RATE


def test_an_unfinished_recording_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="ipod") as out:
        track = out.add_stream("aac", rate=44_100)
        track.layout = "stereo"
        for start in range(0, 44_100, 1024):
            frame = av.AudioFrame.from_ndarray(tones(44_100)[:, start : start + 1024].copy(), "fltp", "stereo")
            frame.rate, frame.pts = 44_100, start
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    data = path.read_bytes()
    index = data.index(b"moov") - 4
    for cut, why in ((data[:index], "not finished"), (data[: index // 2], "cut short")):
        with pytest.raises(AudioError, match=rf"no index \(moov\).*{why}"):
            load(cut, strict=False)


def test_a_track_that_changes_its_channels_and_rate(tmp_path: Path) -> None:
    """As radio programmes do: AAC that goes from mono to stereo."""
    parts = []
    for rate, layout in ((44_100, "mono"), (44_100, "stereo"), (22_050, "stereo")):
        file = io.BytesIO()
        with av.open(file, "w", format="adts") as out:
            track = out.add_stream("aac", rate=rate)
            track.layout = layout
            channels = track.codec_context.layout.nb_channels
            for start in range(0, 2 * rate, 1024):
                samples = np.repeat(tones(rate)[:1, start : start + 1024], channels, axis=0)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
                frame.rate, frame.pts = rate, start
                out.mux(track.encode(frame))
            out.mux(track.encode(None))
        parts.append(file.getvalue())
    with open_sound(b"".join(parts), block_seconds=0.5) as sound:
        wave = np.concatenate(list(sound.blocks()))
        assert sound.complete
        assert [re.sub(" at [0-9.]+ s", "", warning) for warning in sound.warnings] == [
            "changes from 1 channel at 44100 Hz to 2 channels at 44100 Hz",
            "changes from 2 channels at 44100 Hz to 2 channels at 22050 Hz",
        ]
    np.testing.assert_array_equal(load(b"".join(parts)), wave)
    assert abs(len(wave) / SAMPLE_RATE - 6) < 0.3
    for second in (1, 3, 5):
        piece = wave[second * SAMPLE_RATE :][:8_000]
        assert pytest.approx(float(np.sqrt(np.mean(piece**2))), rel=0.02) == 0.4 / 2**0.5
    assert load_stored(b"".join(parts), stereo=True).ndim == 1


@pytest.mark.parametrize(
    ("container", "codec"), [("flv", "aac"), ("matroska", "aac"), ("webm", "libopus"), ("mp4", "aac"), ("avi", "mp2")]
)
def test_joined_containers(tmp_path: Path, container: str, codec: str) -> None:
    """What follows the length that a file announces is another file, and is read as one."""
    data = write(tmp_path / "a", container, codec, 48_000, tones(48_000)).read_bytes()
    other = write(tmp_path / "b", container, codec, 24_000, tones(24_000, 2.0)).read_bytes()
    first, second = load(data), load(other)
    with open_sound(data + other + data) as sound:
        wave = np.concatenate(list(sound.blocks()))
        assert sound.complete
        assert sound.warnings == []
    np.testing.assert_allclose(wave[: len(first) - 100], first[:-100], atol=1e-6)
    assert abs(len(wave) - 2 * len(first) - len(second)) < 5
    with open_sound(data + other[: len(other) // 2]) as sound:
        assert sum(len(block) for block in sound.blocks()) >= len(first)
        assert not sound.complete
        assert sound.warnings


@pytest.mark.parametrize(("container", "codec"), [("wv", "wavpack"), ("tta", "tta"), ("flv", "aac")])
def test_cut_files_of_rarer_kinds(tmp_path: Path, container: str, codec: str) -> None:
    data = write(tmp_path / "a", container, codec, 44_100, tones(44_100, 6.0)).read_bytes()
    assert abs(len(load(data)) / SAMPLE_RATE - 6) < 0.1
    with open_sound(data[: len(data) // 2]) as sound:
        assert sum(len(block) for block in sound.blocks())
        assert not sound.complete
        assert sound.expected_seconds is not None
        assert abs(sound.expected_seconds - 6) < 0.1


def test_joined_programme_streams(tmp_path: Path) -> None:
    """A film behind a sound: streams appear while the file is read."""
    data = write(tmp_path / "a.mpg", "mpeg", "mp2", 44_100, tones(44_100)).read_bytes()
    film = io.BytesIO()
    with av.open(film, "w", format="mpeg") as out:
        track = out.add_stream("mpeg1video", rate=25)
        track.width = track.height = 64
        for value in range(10):
            out.mux(track.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8))))
        out.mux(track.encode(None))
    assert abs(len(load(data + film.getvalue() + data)) / SAMPLE_RATE - 6) < 0.3


def test_a_track_that_appears_late(files: dict[str, Path]) -> None:
    """PyAV looks for streams that it does not know, at the end and by chance of memory."""

    class Container:
        def __init__(self, container: Any) -> None:
            self.read_timeout = container.read_timeout
            self.container = container

        def demux(self, track: Any) -> Iterator[Any]:
            yield from self.container.demux(track)
            raise IndexError("list index out of range")

    with av.open(str(files[".m4a"])) as container:
        track = container.streams.audio[0]
        found = list(ffmpeg._in_time(cast(Any, Container(container)), track, "a"))
    assert sum(1 for packet in found if packet.size) > 100


@pytest.mark.parametrize(
    "fault", [ValueError("odd"), IndexError("0"), RuntimeError("x\ny"), MemoryError(), OSError(5, "I/O")]
)
def test_any_error_of_a_library_is_an_audio_error(
    files: dict[str, Path], fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    def refused() -> AudioError:
        with pytest.raises(AudioError) as caught:
            load(files[".webm"])
        assert caught.value.name == str(files[".webm"])
        assert str(caught.value).isprintable()
        return caught.value

    with monkeypatch.context() as patch:
        patch.setattr(ffmpeg, "_samples", fail)
        refused()
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", fail)
        refused()
    with monkeypatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "_open", fail)
        refused()


def test_wma_that_is_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wma", "asf", "wmav2", 44_100, tones(44_100, 6.0))
    data = path.read_bytes()
    assert abs(len(load(data)) / SAMPLE_RATE - 6) < 0.2
    with pytest.raises(AudioError, match="cut short"):
        load(data[: len(data) // 2])


class Site:
    """A web server on this machine."""

    def __init__(self, pages: dict[str, bytes], lost: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                if page is None:
                    self.send_error(404)
                    return
                first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(page) - 1}/{len(page)}")
                self.send_header("Content-Length", str(len(page) - first))
                self.end_headers()
                self.wfile.write(page[first : len(page) - lost])

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site(files: dict[str, Path]) -> Iterator[str]:
    pages = {f"/{path.name}": path.read_bytes() for path in files.values()}
    sound = io.BytesIO()
    soundfile.write(sound, tones(8_000).T, 8_000, format="WAV")
    pages["/tone.wav"] = sound.getvalue()
    made = Site(pages)
    yield made.url
    made.server.shutdown()


@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".aac"])
def test_an_address(files: dict[str, Path], site: str, suffix: str) -> None:
    np.testing.assert_array_equal(load(f"{site}/tone{suffix}"), load(files[suffix]))


def test_an_address_of_a_file_that_libsndfile_reads(site: str) -> None:
    expected = tones(8_000).mean(axis=0)
    stored = np.round(expected * 32768) / 32768
    np.testing.assert_allclose(load(f"{site}/tone.wav"), soxr.resample(stored, 8_000, SAMPLE_RATE, "HQ"), atol=1e-4)


def test_an_unreachable_address(site: str) -> None:
    with pytest.raises(AudioError, match=r"/none.mp3: .*the server answers 404 Not Found"):
        load(f"{site}/none.mp3")


def test_an_address_that_is_cut_short(files: dict[str, Path]) -> None:
    made = Site({"/tone.webm": files[".webm"].read_bytes()}, lost=10_000)
    with pytest.raises(AudioError, match=r"tone\.webm: cut short: it ends after [12]\.\d\d s"):
        load(f"{made.url}/tone.webm")
    made.server.shutdown()
