"""Files as recorders, streams and crashes leave them: all that can be read is read, and what is odd is said."""

import io
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError
from ced.sound import libsndfile
from ced.sound.audio import SAMPLE_RATE, load, load_stored, open_sound, stream

HEADER = 44  # bytes of a plain WAV file


def tone(seconds: float, rate: int = SAMPLE_RATE, channels: int = 1, hertz: float = 440) -> NDArray[np.float32]:
    """Return a tone over a little noise, (t, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, (len(time), channels))
    return (0.4 * np.sin(2 * np.pi * hertz * time)[:, None] + noise).astype(np.float32)


def encoded(kind: str, subtype: str, seconds: float, rate: int = SAMPLE_RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, channels, format=kind, subtype=subtype) as out:
        samples = tone(seconds, rate, channels)
        for start in range(0, len(samples), rate):
            out.write(samples[start : start + rate])
    return file.getvalue()


def wav(seconds: float, rate: int = SAMPLE_RATE) -> bytes:
    return encoded("WAV", "PCM_16", seconds, rate)


def resized(data: bytes, size: int, at: int = 40, layout: str = "<I") -> bytes:
    """Return a file with another size in its header."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, size)
    return bytes(changed)


def read(data: bytes, tmp_path: Path, name: str = "sound") -> tuple[float, bool, list[str]]:
    """Read a file in all ways, which must agree; return its seconds, whether it is complete, and what is odd."""
    path = tmp_path / name
    path.write_bytes(data)
    found = []
    for source in (path, data, io.BytesIO(data)):
        for seconds in (0.3, 60.0):
            with open_sound(source, block_seconds=seconds) as sound:
                wave = np.concatenate(list(sound.blocks()))
                found.append((wave, sound.complete, sound.warnings))
                assert abs(len(wave) / SAMPLE_RATE - sound.seconds) < 0.001
    for wave, complete, warnings in found[1:]:
        np.testing.assert_array_equal(wave, found[0][0])
        assert (complete, warnings) == found[0][1:]
    wave, complete, warnings = found[0]
    return len(wave) / SAMPLE_RATE, complete, warnings


# Joined files


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("second", [("VORBIS", 2.0, 48_000, 2), ("OPUS", 2.0, 48_000, 1), ("VORBIS", 2.0, 22_050, 1)])
def test_chained_ogg(tmp_path: Path, subtype: str, second: tuple[str, float, int, int]) -> None:
    """As radio stations send them, a stream a song; codec, rate and channels may change."""
    data = encoded("OGG", subtype, 3.0, 48_000, 2) + encoded("OGG", *second) + encoded("OGG", subtype, 1.0, 48_000, 2)
    assert read(data, tmp_path) == (6.0, True, [])


def test_the_same_ogg_file_twice(tmp_path: Path) -> None:
    data = encoded("OGG", "VORBIS", 2.0)
    assert read(data + data, tmp_path) == (4.0, True, [])
    once = load(data)
    np.testing.assert_array_equal(load(data + data), np.concatenate([once, once]))


def test_a_cut_file_in_the_middle_and_at_the_end_of_joined_ones(tmp_path: Path) -> None:
    data = encoded("OGG", "VORBIS", 4.0)
    seconds, complete, (warning,) = read(data + data[: len(data) // 2], tmp_path)
    assert 4.5 < seconds < 7
    assert not complete
    assert "cut short" in warning
    lost = data[: len(data) // 2] + data
    seconds, complete, warnings = read(lost, tmp_path)
    assert 4.5 < seconds < 7
    assert complete
    assert not [warning for warning in warnings if "cut short: " in warning and "joined" not in warning]


def test_an_unreadable_joined_file(tmp_path: Path) -> None:
    """Wherever it is, the others are read."""
    data = encoded("OGG", "VORBIS", 2.0)
    bad = bytearray(data)
    second = data.index(b"OggS", 4)  # the page with the tables of the codec
    bad[second + 60 : second + 200] = bytes(140)
    for parts, complete in ((bad + data + data, True), (data + bad + data, True), (data + data + bad, False)):
        seconds, found, warnings = read(bytes(parts), tmp_path)
        assert (seconds, found) == (4.0, complete)
        assert any("of 3 joined files" in warning for warning in warnings)
    with pytest.raises(AudioError):
        load(bytes(bad + bad), strict=False)


@pytest.mark.parametrize("rate", [44_100, 24_000])
def test_joined_mp3(tmp_path: Path, rate: int) -> None:
    """Each with its own header, which announces the frames up to the next; tags may lie between them."""
    first, second = encoded("MP3", "MPEG_LAYER_III", 3.0, 44_100), encoded("MP3", "MPEG_LAYER_III", 2.0, rate)
    id3 = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 64, 1, 0xA0000000) + bytes(8) + bytes(64)
    for between in (b"", b"TAG" + bytes(125), ape + b"TAG" + bytes(125) + id3):
        for name in ("sound", "sound.mp3"):
            seconds, complete, warnings = read(first + between + second, tmp_path, name)
            assert abs(seconds - 5.0) < 0.001
            assert (complete, warnings) == (True, [])


def test_an_mp3_file_with_tags_is_not_joined(tmp_path: Path) -> None:
    data = encoded("MP3", "MPEG_LAYER_III", 3.0, 44_100)
    picture = b"ID3\4\0\0\0\1\0\0" + np.random.default_rng(0).bytes(1 << 14)
    assert read(picture + data + b"TAG" + bytes(125), tmp_path) == (3.0, True, [])


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("WAV", "PCM_24")])
def test_joined_lossless_files(tmp_path: Path, kind: str, subtype: str) -> None:
    data = encoded(kind, subtype, 3.0, 8_000) + encoded(kind, subtype, 2.0, 48_000, 2) + encoded(kind, subtype, 1.0)
    assert read(data, tmp_path) == (6.0, True, [])


def test_joined_files_of_different_forms_can_be_packed() -> None:
    first, second = wav(1.0), encoded("WAV", "PCM_16", 1.0, 48_000, 2)
    for stereo in (False, True):
        np.testing.assert_array_equal(load_stored(first + second, stereo), load(first + second))
    assert load_stored(first + first).dtype == np.int16


def frames_of(data: bytes) -> bytes:
    """Return an MP3 file without its first frame, which holds the header that announces its length."""
    return data[data.index(b"\xff\xfb", 4) :]


def test_an_mp3_file_with_two_rates(tmp_path: Path) -> None:
    pytest.importorskip("av")
    first, second = encoded("MP3", "MPEG_LAYER_III", 3.0, 44_100), encoded("MP3", "MPEG_LAYER_III", 2.0, 32_000)
    seconds, complete, (warning,) = read(frames_of(first) + frames_of(second), tmp_path)
    assert abs(seconds - 5) < 0.3
    assert complete
    assert re.search("changes from .* 44100 Hz to .* 32000 Hz", warning)
    # The same under a header that announces the frames of both.
    both = bytearray(first + frames_of(second))
    place = both.index(b"Xing") + 8
    counts = [struct.unpack(">I", data[data.index(b"Xing") + 8 :][:4])[0] for data in (first, second)]
    struct.pack_into(">II", both, place, sum(counts), len(both))
    seconds, complete, warnings = read(bytes(both), tmp_path)
    assert abs(seconds - 5) < 0.3
    assert complete
    assert re.search("changes from .* 44100 Hz to .* 32000 Hz", warnings[0])


def test_an_mp3_file_without_a_header_and_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile guesses the length from the first frames; where the guess is short, the seconds are named."""
    loud, quiet = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100 * 4), np.zeros(44_100 * 16)
    path = tmp_path / "a.mp3"
    with soundfile.SoundFile(path, "w", 44_100, 1, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5) as out:
        out.write(loud)
        out.write(quiet)
    monkeypatch.setitem(sys.modules, "av", None)
    seconds, complete, warnings = read(frames_of(path.read_bytes()), tmp_path)
    assert seconds < 15
    assert not complete
    assert re.search(
        "about [0-9]+ s, cannot be read without FFmpeg$", warnings[0]
    )  # a server's clients install nothing
    constant = encoded("MP3", "MPEG_LAYER_III", 4.0, 44_100)
    assert read(constant, tmp_path) == (4.0, True, [])


# Sizes in headers


def test_a_size_that_is_too_small_or_wrapped(tmp_path: Path) -> None:
    seconds, complete, (warning,) = read(resized(wav(2.5), 3_200), tmp_path)
    assert (seconds, complete) == (2.5, True)
    assert re.search(r"announces 0\.10 s, but 2\.40 s more follow", warning)
    wide = encoded("WAV", "FLOAT", 2.5, 44_100, 2)
    place = wide.index(b"data") + 4
    assert read(resized(wide, 80, place), tmp_path)[:2] == (2.5, True)
    aiff = encoded("AIFF", "PCM_16", 2.5)
    seconds, complete, (warning,) = read(resized(aiff, 3_208, aiff.index(b"SSND") + 4, ">I"), tmp_path)
    assert (seconds, complete) == (2.5, True)
    au = encoded("AU", "PCM_16", 2.5)
    assert read(resized(au, 3_200, 8, ">I"), tmp_path)[:2] == (2.5, True)


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes are needed")
def test_a_wav_file_beyond_4_gib(tmp_path: Path) -> None:
    """Six hours of which the header announces ten seconds."""
    path, size = tmp_path / "long.wav", (1 << 32) + 10 * 96_000
    path.write_bytes(resized(wav(0.1, 48_000), 10 * 96_000)[:HEADER])
    with path.open("r+b") as file:
        file.seek(HEADER + 10 * 96_000)
        file.write(tone(1.0, 48_000).tobytes())
        file.truncate(HEADER + size)
    with open_sound(path) as sound:
        assert sound.expected_seconds == size / 96_000
        assert "more follow" in sound.warnings[0]
        for _ in sound.blocks():
            if sound.seconds > 20:
                break


def test_a_header_that_was_never_finished(tmp_path: Path) -> None:
    for data in (
        resized(wav(2.5), 0),
        resized(resized(wav(2.5), 0), 0, 4),
        resized(encoded("AU", "PCM_16", 2.5), 0, 8),
    ):
        seconds, complete, (warning,) = read(data, tmp_path)
        assert (seconds, complete) == (2.5, True)
        assert "never finished" in warning
    rf64 = encoded("RF64", "PCM_16", 2.5)
    seconds, complete, (warning,) = read(resized(rf64, 0, 28, "<Q"), tmp_path)
    assert (seconds, complete) == (2.5, True)
    w64 = encoded("W64", "PCM_16", 2.5)
    assert read(resized(w64, 24, w64.index(b"data") + 16, "<Q"), tmp_path)[:2] == (2.5, True)


def test_recorders_that_count_the_header_as_sound(tmp_path: Path) -> None:
    data = wav(2.5)
    for more in (36, 44):
        seconds, complete, (warning,) = read(resized(data, len(data) - HEADER + more), tmp_path)
        assert (seconds, complete) == (2.5, True)
        assert f"{more} bytes more" in warning


def test_chunks_after_the_samples(tmp_path: Path) -> None:
    data = wav(2.5)
    tags = struct.pack("<4sI", b"LIST", 4) + b"INFO"
    foreign = struct.pack("<4sI", b"xyzw", 3) + b"abc\0"
    cut = struct.pack("<4sI", b"LIST", 400) + b"INFO"
    for rest in (tags, foreign, tags + foreign, cut, bytes(4096), b"TAG" + bytes(125), b"\x80\x90\xa0"):
        assert read(data + rest, tmp_path) == (2.5, True, [])
    odd = encoded("WAV", "PCM_U8", 1.0000625)
    assert len(odd) % 2 == 0  # padded
    assert read(odd, tmp_path)[1:] == (True, [])
    assert read(odd[:-1], tmp_path)[1:] == (True, [])


def test_a_flac_file_of_unknown_length(tmp_path: Path) -> None:
    data = encoded("FLAC", "PCM_16", 2.0)
    unknown = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
    seconds, complete, (warning,) = read(unknown, tmp_path)
    assert (seconds, complete) == (2.0, True)
    assert "gives no length" in warning
    assert not read(unknown[: len(data) // 2], tmp_path)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="file descriptors are named here")
def test_a_growing_file_is_read_to_its_initial_length(tmp_path: Path) -> None:
    data = encoded("FLAC", "PCM_16", 2.0)
    path = tmp_path / "a.flac"
    path.write_bytes(data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:])
    with open_sound(path, block_seconds=0.5) as sound:
        blocks = sound.blocks()
        next(blocks)
        with path.open("ab") as file:
            file.write(data)
        for _ in blocks:
            pass
        assert sound.seconds == 2.0


# Damage within a file


@pytest.mark.parametrize(("subtype", "least"), [("VORBIS", 9.4), ("OPUS", 8.8)])
def test_a_lost_page(tmp_path: Path, subtype: str, least: float) -> None:
    data = encoded("OGG", subtype, 10.0, 48_000)
    pages = [found.start() for found in re.finditer(b"OggS", data)]
    middle = len(pages) // 2
    lost = data[: pages[middle]] + data[pages[middle + 1] :]
    damaged = bytearray(data)
    damaged[pages[middle] + 100] ^= 255
    for each in (lost, bytes(damaged)):
        seconds, complete, (warning,) = read(each, tmp_path)
        assert least < seconds < 9.99
        assert complete
        assert f"{10 - seconds:.2f} s are missing within it" in warning


def test_an_ogg_file_without_an_end_mark(tmp_path: Path) -> None:
    data = encoded("OGG", "VORBIS", 10.0)
    last = data.rindex(b"OggS")
    seconds, complete, (warning,) = read(data[:last], tmp_path)
    assert 9 < seconds < 10
    assert complete
    assert "no end mark" in warning


@pytest.mark.parametrize(("kind", "subtype"), [("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
def test_damaged_frames(tmp_path: Path, kind: str, subtype: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The sound before and behind them is read; what a decoder prints is said of the file, and not printed."""
    pytest.importorskip("av")
    data = encoded(kind, subtype, 10.0, 44_100)
    whole = load(data)
    middle = len(data) // 2
    damaged = data[:middle] + bytes(20_000) + data[middle + 20_000 :]
    seconds, complete, (warning,) = read(damaged, tmp_path)
    assert 7 < seconds < 9.9
    assert complete
    assert f"{10 - seconds:.2f} s are missing within it" in warning
    wave = load(damaged)
    np.testing.assert_allclose(wave[: 4 * SAMPLE_RATE], whole[: 4 * SAMPLE_RATE], atol=1e-3)
    spectrum = np.abs(np.fft.rfft(wave[-SAMPLE_RATE:]))
    assert np.argmax(spectrum) == 440
    np.testing.assert_allclose(np.std(wave[-SAMPLE_RATE:]), np.std(whole[-SAMPLE_RATE:]), rtol=0.01)
    assert capfd.readouterr().err == ""


def test_a_damaged_mp3_file_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("MP3", "MPEG_LAYER_III", 10.0, 44_100)
    middle = len(data) // 2
    monkeypatch.setitem(sys.modules, "av", None)
    seconds, complete, (warning,) = read(data[:middle] + bytes(20_000) + data[middle + 20_000 :], tmp_path, "a.mp3")
    assert 7 < seconds < 9.9
    assert complete
    assert "s are missing within it" in warning


def test_only_the_last_frame_is_damaged(tmp_path: Path) -> None:
    data = encoded("FLAC", "PCM_16", 1.0, 44_100)
    seconds, complete, (warning,) = read(data[:-300] + bytes(300), tmp_path)
    assert 0.9 < seconds < 1.0
    assert not complete
    assert "of 1.00 s" in warning


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("VOC", "PCM_16"), ("SVX", "PCM_16")],
)
def test_cut_files_of_rarer_kinds(tmp_path: Path, kind: str, subtype: str) -> None:
    data = encoded(kind, subtype, 4.0)
    assert read(data, tmp_path) == (4.0, True, [])
    seconds, complete, warnings = read(data[: len(data) // 2], tmp_path)
    assert 1.9 < seconds < 2.1
    assert not complete
    assert "cut short" in warnings[-1]
    with pytest.raises(AudioError, match="cut short"):
        load(data[: len(data) // 2])


@pytest.mark.skipif(libsndfile._c_streams() is None, reason="only glibc lets standard error be caught")
def test_stderr_of_c_is_captured_per_thread() -> None:
    program = """
import ctypes, os, threading
from ced.sound.libsndfile import captured_stderr
libc = ctypes.CDLL(None)
def say(words):
    stream = ctypes.c_void_p.in_dll(libc, "stderr")
    libc.fputs(words, stream)
caught = []
with captured_stderr(caught):
    say(b"caught ")
    other = threading.Thread(target=say, args=(b"of another thread\\n",))
    other.start()
    other.join()
    os.write(2, b"of Python\\n")
    say(b"too")
say(b"behind\\n")
assert b"".join(caught) == b"caught too", caught
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stderr == b"of another thread\nof Python\nbehind\n"


def test_a_reader_can_stop_early() -> None:
    """A reader that stops early leaves nothing behind."""
    data: Any = encoded("MP3", "MPEG_LAYER_III", 4.0, 44_100)
    assert len(next(stream(data, 0.5)))
