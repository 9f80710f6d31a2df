"""Live sound on standard input: raw samples, and what recording programs write."""

import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.errors import AudioError, ConfigError
from ced.sound import live_sources
from ced.sound.live_sources import FORMATS, Samples, standard_input

RATE = 16_000


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is in the pipe be read as fast as it comes."""
    monkeypatch.setattr(live_sources, "_SPEED", 1e6)


@contextmanager
def piped(data: bytes) -> Iterator[int]:
    """Give the reading end of a pipe that these bytes are written to."""
    read, write = os.pipe()

    def send() -> None:
        with suppress(BrokenPipeError), os.fdopen(write, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield read
    finally:
        os.close(read)
        thread.join(5)


def heard(data: bytes, samples: Samples | None = None, channel: str | int = "mean") -> NDArray[np.float32]:
    with piped(data) as number:
        return np.concatenate([np.zeros(0, np.float32), *standard_input(number, samples, channel).open()])


def tone(channels: int = 1, seconds: float = 0.5) -> NDArray[np.float64]:
    """Return a tone of another level in each channel, (t, channels)."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    return np.stack([wave / (channel + 1) for channel in range(channels)], 1)


def encoded(wave: NDArray[np.float64], name: str) -> bytes:
    """Encode samples by arithmetic of this test's own."""
    kind, size = FORMATS[name]
    if kind[1] == "f":
        return wave.astype(kind).tobytes()
    bits = 24 if name == "s24_le" else 8 * size
    values = np.round(wave * (2 ** (bits - 1) - 1)).astype(np.int64) + (128 if name == "u8" else 0)
    order: Literal["big", "little"] = "big" if kind[0] == ">" else "little"
    signed = name != "u8"
    return b"".join(int(value).to_bytes(size, order, signed=signed) for value in values.ravel())


def header(channels: int = 1, kind: int = 1, bits: int = 16, size: int = 0xFFFFFFFF, extra: bytes = b"") -> bytes:
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", kind, channels, RATE, RATE * frame, frame, bits)
    if kind == 0xFFFE:
        form += struct.pack("<HHIH", 22, bits, 0, 1) + b"\0" * 14
    chunk = b"fmt " + struct.pack("<I", len(form)) + form
    return b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + extra + chunk + b"data" + struct.pack("<I", size)


@pytest.mark.parametrize("name", FORMATS)
def test_raw_samples(name: str) -> None:
    wave = tone(2)
    found = heard(encoded(wave, name), Samples(RATE, 2, name.upper()))
    np.testing.assert_allclose(found, wave.mean(1), atol=0.01 if "8" in name and "16" not in name else 1e-4)


@pytest.mark.parametrize(("channel", "level"), [("mean", 0.75), ("left", 1.0), ("right", 0.5), (2, 0.5)])
def test_channels(channel: str | int, level: float) -> None:
    wave = tone(2)
    found = heard(encoded(wave, "s16le"), Samples(RATE, 2), channel)
    np.testing.assert_allclose(found, level * wave[:, 0], atol=1e-3)


def test_a_missing_channel() -> None:
    with pytest.raises(AudioError, match="standard input: there is no channel 3; it has 2 channels"):
        heard(encoded(tone(2), "s16le"), Samples(RATE, 2), 3)
    with pytest.raises(ConfigError, match="channel"):
        standard_input(0, None, "middle")


@pytest.mark.parametrize(
    ("kind", "bits", "name"),
    [(1, 16, "s16le"), (1, 8, "u8"), (1, 24, "s24le"), (1, 32, "s32le"), (3, 32, "f32le"), (0xFFFE, 16, "s16le")],
)
@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_header_without_a_length(kind: int, bits: int, name: str, size: int) -> None:
    wave = tone(2)
    found = heard(header(2, kind, bits, size) + encoded(wave, name))
    np.testing.assert_allclose(found, wave.mean(1), atol=0.01 if bits == 8 else 1e-4)


def test_data_after_the_samples_is_not_sound() -> None:
    data = encoded(tone(), "s16le")
    listed = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    found = heard(header(size=len(data), extra=listed) + data + b"LIST" + b"\xff" * 5000)
    assert len(found) == len(data) // 2


def test_resampling_and_an_incomplete_last_frame() -> None:
    assert len(heard(encoded(tone(2), "s16le") + b"\1\2\3", Samples(2 * RATE, 2))) == pytest.approx(RATE / 4, abs=2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"fLaC" + bytes(100), "--rate"),
        (header()[:20], "cut short"),
        (header(kind=2), "format 2 with 16 bits"),
        (header(bits=12), "format 1 with 12 bits"),
        (header(channels=0), "channels is 0"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "no sample format"),
        (b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\x7f" + bytes(1 << 21), "a chunk of 2147483647 bytes"),
    ],
)
def test_invalid_input(data: bytes, said: str) -> None:
    with pytest.raises(AudioError, match=f"standard input: .*{said}"):
        heard(data)


@pytest.mark.parametrize("wrong", [{"rate": 10}, {"channels": 0}, {"channels": 65}, {"format": "s20le"}])
def test_samples_that_are_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Samples(**{"rate": RATE, **wrong})  # type: ignore[arg-type]


def test_sound_is_read_as_it_arrives() -> None:
    read, write = os.pipe()
    found = standard_input(read, Samples(RATE)).open()
    os.write(write, bytes(2 * RATE))
    began = time.monotonic()
    assert sum(len(next(found)) for _ in range(9)) >= 0.8 * RATE
    assert time.monotonic() - began < 5  # although the pipe is still open
    os.close(write)
    assert sum(map(len, found)) <= 0.2 * RATE
    os.close(read)


def test_pipes_of_sox_and_ffmpeg() -> None:
    commands = {
        "sox": "sox -n -r 16000 -c 2 -b 16 -t wav - synth 1 sine 440",
        "ffmpeg": "ffmpeg -v error -f lavfi -i sine=frequency=440:duration=1:sample_rate=16000 -f wav -",
    }
    found = 0
    for command in commands.values():
        try:
            data = subprocess.run(command.split(), capture_output=True, check=True).stdout
        except (FileNotFoundError, subprocess.CalledProcessError):
            continue
        found += 1
        wave = heard(data)
        assert len(wave) == pytest.approx(RATE, abs=10)
        assert np.argmax(np.abs(np.fft.rfft(wave[:RATE]))) == pytest.approx(440, abs=2)
    if not found:
        pytest.skip("neither sox nor ffmpeg is installed")


def test_the_pipe_is_read_without_a_lock() -> None:
    """A daemon thread that waits in a buffered reader would abort the interpreter when it ends."""
    code = (
        "import sys, threading, time\nfrom ced.sound.live_sources import Samples, standard_input\n"
        "source = standard_input(0, Samples(16000))\n"
        "threading.Thread(target=lambda: list(source.open()), daemon=True).start()\n"
        "time.sleep(0.2); print('ends')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert (process.stdout.read(), process.stderr.read(), process.wait(20)) == (b"ends\n", b"", 0)
