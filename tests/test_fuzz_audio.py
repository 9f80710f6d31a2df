"""Whatever bytes come: finite samples or an error in one line; never a crash, a hang, or a silent empty output.

CED_FUZZ=5000 tries as many examples a test, other ones each time, instead of the same hundred.
"""

import io
import logging
import os
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ced.errors import CedError
from ced.sound.audio import SAMPLE_RATE, cut_windows, load, open_sound, stream

LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
KINDS = [  # libsndfile's names of container and code
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "ULAW"),
    ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_32"),
    ("RF64", "PCM_16"),
    ("W64", "PCM_16"),
    ("AIFF", "PCM_16"),
    ("AU", "FLOAT"),
    ("CAF", "PCM_24"),
    ("FLAC", "PCM_16"),
]
MEDIA = [("mp4", "aac"), ("adts", "aac"), ("webm", "libopus"), ("avi", "mp2"), ("ac3", "ac3")]  # FFmpeg's

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("error"),
]  # what is raised where nobody can catch it, for one

EXAMPLES = os.environ.get("CED_FUZZ")

fuzzed = settings(
    deadline=None,
    derandomize=EXAMPLES is None,
    max_examples=int(EXAMPLES or 100),
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of warnings of packets that cannot be decoded are expected here."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def samples_of(frames: int, channels: int) -> NDArray[np.float32]:
    time = np.arange(frames, dtype=np.float32)[:, None] / 40 * np.arange(1, channels + 1, dtype=np.float32)
    return np.asarray(0.5 * np.sin(time), np.float32)


@cache
def encoded(kind: str, code: str, rate: int = 16_000, channels: int = 2, frames: int = 16_000) -> bytes:
    """Return a file of a kind; raises LibsndfileError where the kind has no such rate or channels."""
    file = io.BytesIO()
    soundfile.write(file, samples_of(frames, channels), rate, format=kind, subtype=code)
    return file.getvalue()


@cache
def media(container: str, codec: str) -> bytes:
    """Return a file that libsndfile does not read."""
    av: Any = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        track = out.add_stream(codec, rate=48_000)
        track.layout = "mono"
        form, size = track.codec_context.format.name, track.codec_context.frame_size or 1024
        scaled = samples_of(48_000, 1).T
        if form.startswith("s16"):
            scaled = (scaled * 32767).astype(np.int16)
        for start in range(0, 48_000, size):
            part = np.ascontiguousarray(scaled[:, start : start + size])
            frame = av.AudioFrame.from_ndarray(part, form, "mono")
            frame.rate, frame.pts = 48_000, start
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return file.getvalue()


def read(source: Any) -> int | None:
    """Read a source in all ways, which must agree; return how many samples it has, None if it is refused."""
    found: list[int | None] = []
    for way in (load, lambda source: np.concatenate(list(stream(source, 0.3))), joined):
        try:
            wave = way(source)
        except CedError as error:
            message = str(error)
            assert message
            assert message.isprintable(), message
            found.append(None)
        else:
            assert wave.dtype == np.float32
            assert wave.ndim == 1
            assert len(wave)
            assert np.isfinite(wave).all()
            found.append(len(wave))
    assert found == found[:1] * 3
    lenient(source, found[0])
    return found[0]


def lenient(source: Any, found: int | None) -> None:
    """Read what there is of a source of which `found` samples are read strictly, None if it is refused."""
    waves, reports = [], []
    for seconds in (0.3, 60.0):
        try:
            with open_sound(source, block_seconds=seconds) as sound:
                waves.append(np.concatenate(list(sound.blocks())))
                reports.append((sound.complete, sound.warnings))
        except CedError:
            assert found is None
            waves.append(np.zeros(0, np.float32))
    np.testing.assert_array_equal(waves[0], waves[1])
    assert reports[:1] == reports[1:]
    for complete, warnings in reports:
        assert complete == (found is not None)
        assert complete or warnings
        assert all(warning and warning.isprintable() for warning in warnings)
        assert complete is False or len(waves[0]) == found


def read_as_file_and_bytes(folder: Path, data: bytes) -> int | None:
    """Read a file by its path, which some kinds have a way of their own for, and its bytes: they must agree."""
    path = folder / "sound"
    path.write_bytes(data)
    found = read(path)
    assert read(data) == found
    return found


def joined(source: Any) -> NDArray[np.float32]:
    pieces = list(cut_windows(stream(source), 0.5, 0.5, tail="short"))
    assert all(len(piece.wave) for piece in pieces)
    return np.concatenate([piece.wave for piece in pieces])


@fuzzed
@given(
    kind=st.sampled_from(KINDS),
    rate=st.sampled_from([1, 100, 8_000, 11_025, 16_000, 44_100, 48_000, 96_000, 384_000]),
    channels=st.sampled_from([1, 2, 3, 6, 8, 64]),
    frames=st.sampled_from([0, 1, 2, 3, 100, 1_000, 20_000]),
)
def test_kinds_rates_channels_and_lengths(
    tmp_path: Path, kind: tuple[str, str], rate: int, channels: int, frames: int
) -> None:
    if frames / rate > 20:
        return
    try:
        data = encoded(*kind, rate, channels, frames)
    except soundfile.LibsndfileError:
        return
    found = read_as_file_and_bytes(tmp_path, data)
    expected = frames * SAMPLE_RATE / rate
    if found is None:
        assert expected < 2 or rate < 1_000
    else:
        padding = 5_000 if kind[1] == "IMA_ADPCM" else 0  # frames; its blocks are as long
        assert -1 <= found - expected <= 1 + padding * SAMPLE_RATE / rate


@fuzzed
@given(
    kind=st.sampled_from(LOSSY),
    rate=st.sampled_from([8_000, 16_000, 24_000, 48_000]),
    channels=st.integers(1, 2),
    frames=st.sampled_from([2_000, 20_000, 60_000]),
)
def test_lossy_kinds(kind: tuple[str, str], rate: int, channels: int, frames: int) -> None:
    found = read(encoded(*kind, rate, channels, frames))
    assert found is not None
    assert abs(found / SAMPLE_RATE - frames / rate) < 0.4


def damaged(data: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    """Cut a file at a part of its length, and flip bits: places near 0 are the likeliest, where the header is."""
    damage = bytearray(data[: max(1, round(cut * len(data)))])
    for place, bit in flips:
        damage[int(place**4 * len(damage))] ^= 1 << bit
    return bytes(damage)


cuts = st.one_of(st.just(1.0), st.floats(0, 1))
flipped = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=6)


@fuzzed
@given(kind=st.sampled_from(KINDS + LOSSY), cut=cuts, flips=flipped)
def test_damaged_files(tmp_path: Path, kind: tuple[str, str], cut: float, flips: list[tuple[float, int]]) -> None:
    read_as_file_and_bytes(tmp_path, damaged(encoded(*kind), cut, flips))


@fuzzed
@given(kind=st.sampled_from(MEDIA), cut=cuts, flips=flipped)
def test_damaged_media(kind: tuple[str, str], cut: float, flips: list[tuple[float, int]]) -> None:
    read(damaged(media(*kind), cut, flips))


@fuzzed
@given(
    kind=st.integers(0, 65_535) | st.sampled_from([1, 3, 6, 7, 0xFFFE]),
    channels=st.integers(0, 65_535) | st.integers(0, 3),
    rate=st.integers(0, 2**32 - 1) | st.sampled_from([8_000, 16_000]),
    frame=st.integers(0, 65_535) | st.integers(0, 8),
    bits=st.integers(0, 65_535) | st.sampled_from([8, 16, 24, 32, 64]),
    size=st.integers(0, 2**32 - 1) | st.integers(0, 2_000),
    data=st.binary(max_size=2_000),
)
def test_wav_headers(
    tmp_path: Path, kind: int, channels: int, rate: int, frame: int, bits: int, size: int, data: bytes
) -> None:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, (rate * frame) % 2**32, frame, bits)
    chunks = form + struct.pack("<4sI", b"data", size) + data
    read_as_file_and_bytes(tmp_path, b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)


STARTS = [
    b"RIFF\xff\xff\xff\xffWAVEfmt ",
    b"fLaC",
    b"OggS\0\2",
    b"ID3\4\0\0\0\0\0\0",
    b"\xff\xfb\x90\x64",
    b"FORM\0\0\0\0AIFF",
    b"\0\0\0\x18ftypM4A ",
    b"\x1a\x45\xdf\xa3",
    b"\xff\xf1\x50\x80",
    b".snd\0\0\0\x18",
    b"caff\0\1\0\0",
    b"#EXTM3U\n",
    b"",
]


@fuzzed
@given(start=st.sampled_from(STARTS), garbage=st.binary(min_size=1, max_size=4_000))
def test_garbage(tmp_path: Path, start: bytes, garbage: bytes) -> None:
    read_as_file_and_bytes(tmp_path, start + garbage)


@fuzzed
@given(seed=st.integers(0, 2**32), size=st.integers(1, 200_000))
def test_noise(seed: int, size: int) -> None:
    """Random bytes in amounts that hypothesis does not make."""
    read(np.random.default_rng(seed).bytes(size))


@fuzzed
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    kind=st.sampled_from(["u1", "i2", "u2", "i4", "i8", "f2", "f4", "f8", ">f4", "c8", "?", "S3", "O"]),
    rate=st.integers(-1, 400_000) | st.sampled_from([1, 16_000, 1.5, None, "16000", 2**40]),
    value=st.sampled_from([0, 1, -1, 1e30, float("nan"), float("inf")]),
)
def test_arrays(shape: list[int], kind: str, rate: Any, value: float) -> None:
    with np.errstate(all="ignore"):
        samples = np.full(shape, value).astype(kind)
        read((samples, rate))
