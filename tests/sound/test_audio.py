import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import soundfile
import soxr
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound.audio import (
    AUDIO_SUFFIXES,
    SAMPLE_RATE,
    TAILS,
    Tail,
    cut_windows,
    load,
    load_stored,
    name_of,
    stream,
)
from ced.sound.decode import plain_wav
from ced.sound.features import MIN_SAMPLES

ESC10 = os.environ.get("CED_ESC10")


def noise(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    """Return smooth noise, (t, channels), within [-0.5, 0.5]."""
    white = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    smooth = np.apply_along_axis(lambda column: np.convolve(column, np.ones(8) / 8, "same"), 0, white)
    return np.asarray(smooth / np.abs(smooth).max() / 2, np.float32)


def write(path: Path, samples: NDArray[Any], rate: int, kind: str, subtype: str) -> Path:
    """Write a sound file in blocks (libsndfile cannot take long Vorbis writes at once)."""
    channels = samples.shape[1]
    with soundfile.SoundFile(path, "w", rate, channels, format=kind, subtype=subtype) as file:
        for start in range(0, len(samples), rate):
            file.write(samples[start : start + rate])
    return path


# kind, subtype, rate, greatest error of a sample, or None where the code is lossy
KINDS = [
    ("WAV", "PCM_16", 44_100, 2**-15),
    ("WAV", "PCM_24", 48_000, 2**-22),
    ("WAV", "PCM_32", 16_000, 1e-7),
    ("WAV", "PCM_U8", 22_050, 2**-6),
    ("WAV", "FLOAT", 8_000, 1e-7),
    ("WAV", "DOUBLE", 16_001, 1e-7),
    ("AIFF", "PCM_16", 16_000, 2**-15),
    ("FLAC", "PCM_24", 96_000, 2**-22),
    ("OGG", "VORBIS", 44_100, None),
    ("OGG", "OPUS", 48_000, None),
    ("MP3", "MPEG_LAYER_III", 44_100, None),
]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "subtype", "rate", "error"), KINDS)
def test_kinds(tmp_path: Path, kind: str, subtype: str, rate: int, error: float | None, channels: int) -> None:
    samples = noise(2.5, rate, channels)
    path = write(tmp_path / "sound", samples, rate, kind, subtype)  # without a suffix: the content decides
    wave = load(path)
    assert wave.dtype == np.float32
    assert wave.flags.c_contiguous
    assert len(wave) == round(len(samples) * SAMPLE_RATE / rate)
    # What soundfile and soxr make of it in one go, channels averaged first.
    decoded, _ = soundfile.read(path, dtype="float32", always_2d=True)
    expected = soxr.resample(decoded.mean(axis=1, dtype=np.float32), rate, SAMPLE_RATE, "HQ")
    np.testing.assert_allclose(wave, expected, atol=1e-6)
    original = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE, "HQ")
    if error is not None:
        assert np.abs(wave - original).max() < 2 * error
    else:
        assert np.corrcoef(wave, original)[0, 1] > 0.97
    np.testing.assert_array_equal(load(path.read_bytes()), wave)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load(file), wave)
        assert not file.closed
    for seconds in (0.1, 1.0, 60.0):
        np.testing.assert_array_equal(np.concatenate(list(stream(path, seconds))), wave)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("i1", [0, 64, -128, 32]),
        ("u1", [128, 192, 0, 160]),
        ("i2", [0, 16_384, -32_768, 8_192]),
        (">i2", [0, 16_384, -32_768, 8_192]),
        ("u2", [32_768, 49_152, 0, 40_960]),
        ("i4", [0, 2**30, -(2**31), 2**29]),
        ("i8", [0, 2**62, -(2**63), 2**61]),
        ("f2", [0, 0.5, -1, 0.25]),
        ("f4", [0, 0.5, -1, 0.25]),
        (">f4", [0, 0.5, -1, 0.25]),
        ("f8", [0, 0.5, -1, 0.25]),
    ],
)
def test_integers_are_scaled_and_floats_are_not(dtype: str, values: list[float]) -> None:
    wave = load((np.array(values, dtype), SAMPLE_RATE))
    assert wave.dtype == np.float32
    assert wave.tolist() == [0.0, 0.5, -1.0, 0.25]


def test_loud_floats_are_kept() -> None:
    assert load((np.array([3.0, -7.5]), SAMPLE_RATE)).tolist() == [3.0, -7.5]


def test_channels_are_averaged_not_summed() -> None:
    stereo = np.array([[0.5, 0.25], [1.0, -1.0], [-0.5, -0.75]])
    np.testing.assert_array_equal(load((stereo, SAMPLE_RATE)), np.array([0.375, 0.0, -0.625], np.float32))
    five = np.array([[0.1, 0.2, 0.3, 0.4, 0.5]])
    np.testing.assert_allclose(load((five, SAMPLE_RATE)), [0.3], rtol=1e-6)


def test_a_tone_keeps_its_pitch_and_level() -> None:
    for rate in (8_000, 44_100, 192_000):
        tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
        wave = load((tone, rate))
        expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
        np.testing.assert_allclose(wave[1000:-1000], expected[1000:-1000], atol=1e-3)


def test_array_and_file_agree(tmp_path: Path) -> None:
    samples = noise(1.3, 22_050, 2)
    path = write(tmp_path / "a.wav", samples, 22_050, "WAV", "FLOAT")
    np.testing.assert_array_equal(load((samples, 22_050)), load(path))
    np.testing.assert_array_equal(load(str(path)), load(path))


def test_stored_samples_are_unchanged(tmp_path: Path) -> None:
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, (4000, 2)).astype(np.int16)
    mono = write(tmp_path / "mono.wav", integers[:, :1], SAMPLE_RATE, "WAV", "PCM_16")
    stereo = write(tmp_path / "stereo.flac", integers, SAMPLE_RATE, "FLAC", "PCM_16")
    kept = load_stored(mono)
    assert kept.dtype == np.int16
    np.testing.assert_array_equal(kept, integers[:, 0])
    both = load_stored(stereo, stereo=True)
    assert both.dtype == np.int16
    np.testing.assert_array_equal(both, integers)
    averaged = load_stored(stereo)
    assert averaged.dtype == np.float32
    np.testing.assert_array_equal(averaged, load(stereo))
    fast = write(tmp_path / "fast.wav", noise(0.5, 48_000, 2), 48_000, "WAV", "PCM_16")
    np.testing.assert_array_equal(load_stored(fast), load(fast))
    assert load_stored(fast, stereo=True).shape == (8000, 2)
    three = (noise(0.1, SAMPLE_RATE, 3), SAMPLE_RATE)
    np.testing.assert_array_equal(load_stored(three, stereo=True), load(three))


def test_plain_wav_files_have_the_samples_of_libsndfile(tmp_path: Path) -> None:
    """Plain 16-bit files take a way of their own; what is out of the ordinary must not."""
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, (5000, 2)).astype("<i2")
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 2, 8_000, 32_000, 4, 16)
    long_fmt = struct.pack("<4sIHHIIHHH", b"fmt ", 18, 1, 2, 8_000, 32_000, 4, 16, 0)
    data = struct.pack("<4sI", b"data", integers.nbytes) + integers.tobytes()
    odd = struct.pack("<4sI", b"LIST", 5) + b"INFOx\0"
    big = struct.pack("<4sI", b"junk", 8_000) + b"\0" * 8_000
    streamed = struct.pack("<4sI", b"data", 0xFFFFFFFF) + integers.tobytes()
    for number, chunks in enumerate(
        (fmt + data, long_fmt + data, odd + fmt + odd + data + odd, fmt + big + data, fmt + streamed)
    ):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
        expected, rate = soundfile.read(path, dtype="float32")
        assert (len(expected), rate) == (5000, 8_000)
        np.testing.assert_array_equal(load((expected, rate)), load(path))
        np.testing.assert_array_equal(np.concatenate(list(stream(path, 0.1))), load(path))
        with path.open("rb") as file:
            assert (plain_wav(file) is None) == (number in (3, 4))
    for kind, subtype in (
        ("WAV", "PCM_24"),
        ("WAVEX", "PCM_16"),
        ("RF64", "PCM_16"),
        ("WAV", "ULAW"),
        ("W64", "PCM_16"),
    ):
        path = write(tmp_path / subtype, integers, 8_000, kind, subtype)
        expected, rate = soundfile.read(path, dtype="float32")
        np.testing.assert_allclose(load(path), load((expected, rate)), atol=1e-7)
        with path.open("rb") as file:
            assert plain_wav(file) is None


class Bounded(io.RawIOBase):
    """A file that fails when more than a part of it was asked for at once."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.most, self.place = data, most, 0

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert len(buffer) <= self.most
        part = self.data[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> int:
        self.place = place + (0, self.place, len(self.data))[whence]
        return self.place


def test_stream_yields_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "long.wav", noise(20, 44_100), 44_100, "WAV", "PCM_16")
    source = cast(BinaryIO, Bounded(path.read_bytes(), 2 * 44_100))
    blocks = list(stream(source, 0.5))
    assert max(map(len, blocks)) < 0.6 * SAMPLE_RATE
    np.testing.assert_array_equal(np.concatenate(blocks), load(path))


def test_stream_of_a_long_sound_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8_000, 1, format="FLAC") as file:
        for _ in range(60):  # an hour
            file.write(np.zeros(60 * 8_000, np.int16))
    program = (
        "import resource, sys; from ced.sound.audio import stream;"
        "next(stream(sys.argv[1]));"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print(sum(map(len, stream(sys.argv[1]))), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    samples, grown = map(int, done.stdout.split())
    assert samples == 3600 * SAMPLE_RATE
    assert grown < 30_000  # KB; the whole wave is 230,400


def spans(
    seconds: float, length: float, hop: float | None = None, tail: Tail = "short", rate: int = SAMPLE_RATE
) -> list[tuple[float, float]]:
    samples = np.zeros(round(seconds * rate), np.float32)
    return [
        (window.start, window.end) for window in cut_windows(stream((samples, rate)), length, hop or length, tail=tail)
    ]


def test_short_tails() -> None:
    assert spans(2.0, 1.0) == [(0.0, 1.0), (1.0, 2.0)]
    assert spans(2.25, 1.0) == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.25)]
    assert spans(0.25, 1.0) == [(0.0, 0.25)]
    assert spans(2.0, 1.0, 0.5) == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]
    assert spans(2.25, 1.0, 0.5) == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0), (1.5, 2.25)]
    assert spans(1.5, 0.5, 1.0) == [(0.0, 0.5), (1.0, 1.5)]
    assert spans(1.25, 0.5, 1.0) == [(0.0, 0.5), (1.0, 1.25)]
    assert spans(0.75, 0.5, 1.0) == [(0.0, 0.5)]
    assert spans(65.0, 30.0, 31.0) == [(0.0, 30.0), (31.0, 61.0), (62.0, 65.0)]
    assert spans(2.0, 1.0, rate=44_100) == [(0.0, 1.0), (1.0, 2.0)]


def test_an_aligned_last_window_has_full_length_and_ends_with_the_sound() -> None:
    assert spans(2.0, 1.0, tail="aligned") == [(0.0, 1.0), (1.0, 2.0)]
    assert spans(2.25, 1.0, tail="aligned") == [(0.0, 1.0), (1.0, 2.0), (1.25, 2.25)]
    assert spans(0.25, 1.0, tail="aligned") == [(0.0, 0.25)]
    assert spans(2.25, 1.0, 0.5, tail="aligned") == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0), (1.25, 2.25)]
    assert spans(33.0, 30.0, tail="aligned") == [(0.0, 30.0), (3.0, 33.0)]  # of more than one block
    shortest = MIN_SAMPLES / SAMPLE_RATE
    assert spans(1.0 + shortest, 1.0, tail="aligned") == [(0.0, 1.0), (shortest, 1.0 + shortest)]
    assert spans(1.0 + shortest - 1 / SAMPLE_RATE, 1.0, tail="aligned") == [(0.0, 1.0)]
    assert spans(0.1, 0.05, tail="aligned") == [(0.0, 0.05), (0.05, 0.1)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("length", "hop"), [(10.0, None), (1.0, 0.3), (7.0, 9.0), (45.0, 20.0)])
def test_windows_have_the_samples_of_load(tmp_path: Path, length: float, hop: float | None, tail: Tail) -> None:
    path = write(tmp_path / "a.ogg", noise(70, 8_000), 8_000, "OGG", "VORBIS")
    wave = load(path)
    end = 0
    for window in cut_windows(stream(path), length, hop or length, tail=tail):
        assert round(window.new * SAMPLE_RATE) == max(end, round(window.start * SAMPLE_RATE))
        start, end = round(window.start * SAMPLE_RATE), round(window.end * SAMPLE_RATE)
        np.testing.assert_array_equal(window.wave, wave[start:end])
    assert end >= len(wave) - MIN_SAMPLES or (hop or 0) > length


@pytest.mark.parametrize(("length", "hop"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (float("nan"), 1.0), (1e300, 1.0)])
def test_invalid_window_lengths(length: float, hop: float) -> None:
    with pytest.raises(ConfigError, match=r"window (length|hop) is"):
        cut_windows([], length, hop)


def refused(source: Any) -> str:
    messages = set()
    for read in (load, load_stored, lambda source: list(stream(source))):
        with pytest.raises(AudioError) as caught:
            read(source)
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    return message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, folder, empty, text = (tmp_path / name for name in ("no.wav", "folder.wav", "empty.wav", "text.wav"))
    folder.mkdir()
    empty.touch()
    text.write_text("not a sound\n" * 100)
    for path, said in [
        (missing, "No such file or directory"),
        (folder, "a folder"),
        (empty, "empty"),
        (text, "Format not recognised; readable are complete files of WAV, FLAC"),
    ]:
        assert refused(path).startswith(f"{path}: ")
        assert said in refused(path)
    assert refused(f"{tmp_path}/a\0b.wav").endswith("embedded null byte")
    raw = tmp_path / "samples.raw"
    raw.write_bytes(b"\0" * 100)
    assert "cannot be decoded" in refused(raw)
    silent = write(tmp_path / "none.wav", np.zeros((0, 1)), 8_000, "WAV", "PCM_16")
    assert "no samples" in refused(silent)
    one = write(tmp_path / "one.wav", np.zeros((1, 1)), 192_000, "WAV", "PCM_16")
    assert "too short" in refused(one)
    assert refused(b"").startswith("<bytes>: ")


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    path.write_bytes(write(tmp_path / "a.wav", noise(0.1, 8_000), 8_000, "WAV", "PCM_16").read_bytes())
    assert len(load(path)) == 1600


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(0.1, 8_000), 8_000, "WAV", "PCM_16")
    path.chmod(0)
    assert "Permission denied" in refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers(tmp_path: Path, value: float) -> None:
    samples = noise(1.0, 8_000, 2)
    samples[2000, 1] = value
    path = write(tmp_path / "nan.wav", samples, 8_000, "WAV", "FLOAT")
    for source in (path, (samples, 8_000)):
        assert "not finite numbers, the first at 0.250 s" in refused(source)


@pytest.mark.parametrize(("value", "said"), [(1e20, "1e+20"), (-3e38, "-3e+38"), (1.5e6, "1.5e+06")])
@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_samples_that_are_far_too_large(tmp_path: Path, rate: int, value: float, said: str) -> None:
    samples = noise(1.0, rate, 2)
    samples[rate // 4, 1] = value
    path = write(tmp_path / "huge.wav", samples, rate, "WAV", "FLOAT")
    for source in (path, (samples, rate)):
        assert f"a sample of {said} at 0.250 s" in refused(source)


def test_floats_up_to_a_million_are_accepted() -> None:
    loud = np.array([[1e6], [-1e6], [0]], np.float64)
    np.testing.assert_array_equal(load((loud, 16_000)), [1e6, -1e6, 0])
    np.testing.assert_array_equal(load((np.array([65_504, -1], np.float16), 16_000)), [65_504, -1])
    assert "a sample of 1e+306 at 0.000 s" in refused((1e300 * loud, 16_000))


def test_invalid_arrays() -> None:
    samples = np.zeros(8)
    assert "tuple of (int, ndarray); expected (samples, rate)" in refused((SAMPLE_RATE, samples))
    assert "positive" in refused((samples, 0))
    assert "positive" in refused((samples, 44_100.5))
    assert "shape (2, 48000); expected" in refused((np.zeros((2, 48_000)), SAMPLE_RATE))
    assert "shape (2, 3, 4)" in refused((np.zeros((2, 3, 4)), SAMPLE_RATE))
    assert "without a channel" in refused((np.zeros((4, 0)), SAMPLE_RATE))
    assert "no samples" in refused((np.zeros(0), SAMPLE_RATE))
    assert "type complex128" in refused((samples.astype(complex), SAMPLE_RATE))
    assert "type bool" in refused((samples > 0, SAMPLE_RATE))
    assert "ndarray cannot be read as sound; expected a path, " in refused(samples)


@pytest.mark.parametrize(("kind", "subtype", "rate", "error"), KINDS)
def test_cut_short(tmp_path: Path, kind: str, subtype: str, rate: int, error: float | None) -> None:
    """A cut file gives block by block what is there, then an error; never silence and never a traceback."""
    whole = write(tmp_path / "whole", noise(4.0, rate), rate, kind, subtype)
    data = whole.read_bytes()
    half = tmp_path / "half"
    half.write_bytes(data[: len(data) // 2])
    assert refused(half).startswith(f"{half}: cut short: it ends after ")
    assert refused(half.read_bytes()).startswith("<bytes>: cut short: it ends after ")
    blocks: list[NDArray[np.float32]] = []
    with pytest.raises(AudioError, match="cut short"):
        blocks.extend(stream(half, 0.3))
    wave = np.concatenate(blocks)
    assert 0.5 < len(wave) / SAMPLE_RATE < 3.5
    compared = len(wave) - 3000  # the end rings differently
    np.testing.assert_allclose(wave[:compared], load(whole)[:compared], atol=1e-5)
    for length in (1, 11, 20, 30):
        half.write_bytes(data[:length])
        assert str(half) in refused(half)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_a_wav_file_written_to_a_pipe(tmp_path: Path, size: int) -> None:
    data = bytearray(write(tmp_path / "a.wav", noise(0.5, 8_000), 8_000, "WAV", "PCM_24").read_bytes())
    data[4:8] = struct.pack("<I", size)
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", size)
    assert len(load(bytes(data))) == 8_000


def test_the_length_of_an_mp3_file_without_a_header_is_a_guess(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, noise(4.0, 44_100), 44_100, bitrate_mode="CONSTANT", compression_level=0.5)
    data = path.read_bytes()
    bare = data[data.index(b"\xff\xfb", 4) :]  # without the first frame, which holds the header
    assert b"Info" in data[: -len(bare)]
    tagged = b"ID3" + bytes([4, 0, 0, 0, 0, 64, 0]) + bytes(64 << 7) + data
    assert 3.9 < len(load(bare)) / SAMPLE_RATE < 4.2
    assert len(load(bare[: len(bare) // 2])) > SAMPLE_RATE
    np.testing.assert_array_equal(load(tagged), load(data))
    assert "cut short" in refused(tagged[: len(tagged) * 3 // 4])


def test_names() -> None:
    assert name_of("a/b.wav") == "a/b.wav"
    assert name_of(Path("a/b.wav")) == "a/b.wav"
    assert name_of(b"RIFF") == "<bytes>"
    assert name_of((np.zeros(1), 1)) == "<array>"
    assert name_of(io.BytesIO()) == "<file>"
    assert {".wav", ".flac", ".ogg", ".opus", ".mp3"} <= AUDIO_SUFFIXES


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", noise(0.5, 8_000), 8_000, "FLAC", "PCM_16")
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        np.testing.assert_array_equal(load(cast(BinaryIO, cat.stdout)), load(path))


def test_importing_needs_no_torch() -> None:
    program = "import sys, ced.sound.audio, ced.sound.labels; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(not ESC10, reason="CED_ESC10 is not set")
def test_real_recordings() -> None:
    clips = sorted(Path(str(ESC10), "audio").iterdir())[::80]
    assert clips
    for clip in clips:
        wave = load(clip)
        assert 4.9 < len(wave) / SAMPLE_RATE < 5.1
        assert 0.001 < np.abs(wave).max() < 1.5
        decoded, rate = soundfile.read(clip, dtype="float32")
        np.testing.assert_array_equal(wave, soxr.resample(decoded, rate, SAMPLE_RATE, "HQ"))
