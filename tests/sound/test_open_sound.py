"""The reader of one sound: what it reports while it is read, limits, channels, cut files."""

import io
import os
import pickle
import socket
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.errors import AudioError, ClosedError, ConfigError, TooLongError
from ced.sound import decode, reading
from ced.sound.audio import SAMPLE_RATE, Channel, load, load_stored, open_sound, stream


def tone(seconds: float, rate: int = SAMPLE_RATE, hertz: float = 440, level: float = 0.4) -> NDArray[np.float32]:
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(samples: NDArray[Any], rate: int = SAMPLE_RATE, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def test_what_is_known_before_and_after_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, np.stack([tone(3, 8_000), tone(3, 8_000)], axis=1), 8_000)
    with open_sound(path, block_seconds=1.0) as sound:
        assert (sound.name, sound.rate, sound.channels) == (str(path), 8_000, 2)
        assert (sound.expected_seconds, sound.seconds, sound.complete, sound.warnings) == (3.0, 0.0, True, [])
        blocks = sound.blocks()
        first = next(blocks)
        assert 0 < sound.seconds < 2
        wave = np.concatenate([first, *blocks])
        assert (sound.seconds, sound.complete, sound.warnings) == (3.0, True, [])
    np.testing.assert_array_equal(wave, load(path))


def test_a_truncated_sound_is_read_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(tone(4))[: 44 + 3 * 2 * SAMPLE_RATE])
    with open_sound(path) as sound:
        wave = np.concatenate(list(sound.blocks()))
        assert not sound.complete
        assert sound.seconds == 3.0
        assert len(sound.warnings) == 1
        assert "cut short" in sound.warnings[0]
    assert len(wave) == 3 * SAMPLE_RATE
    np.testing.assert_array_equal(load(path, strict=False), wave)
    assert f"{path}: cut short" in caplog.text
    np.testing.assert_array_equal(np.concatenate(list(stream(path, 1.0, strict=False))), wave)
    with open_sound(path, strict=True) as sound, pytest.raises(AudioError) as caught:
        list(sound.blocks())
    assert caught.value.name == str(path)
    assert caught.value.reason.startswith("cut short")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name) == (str(caught.value), str(path))
    for read in (load, load_stored):
        with pytest.raises(AudioError, match="cut short"):
            read(path)


def test_a_cut_sound_without_any_sample_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(tone(4))[:44])
    with pytest.raises(AudioError, match=r"a\.wav: "):
        load(path, strict=False)


@pytest.mark.parametrize(("channel", "hertz"), [("left", 440), (1, 440), ("right", 1000), (2, 1000), ("2", 1000)])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_one_channel(channel: Channel, hertz: int, rate: int) -> None:
    stereo = np.stack([tone(1, rate, 440), tone(1, rate, 1000)], axis=1)
    for source in (wav(stereo, rate), (stereo, rate)):
        wave = load(source, channel=channel)
        np.testing.assert_allclose(wave[500:-500], tone(1, hertz=hertz)[500:-500], atol=1e-3)
        for seconds in (0.1, 60.0):
            np.testing.assert_array_equal(np.concatenate(list(stream(source, seconds, channel=channel))), wave)


def test_a_missing_channel() -> None:
    np.testing.assert_array_equal(load((tone(1), SAMPLE_RATE), channel="left"), tone(1))
    with pytest.raises(AudioError, match="no channel 2; it has 1 channel"):
        load((tone(1), SAMPLE_RATE), channel="right")
    for channel in ("middle", 0, -1, 65, "1.5", "", 1.5):
        with pytest.raises(ConfigError, match="mean, left, right or a number"):
            load((tone(1), SAMPLE_RATE), channel=channel)  # type: ignore[arg-type]


def warnings_of(source: Any, channel: Channel = "mean") -> list[str]:
    with open_sound(source, channel=channel) as sound:
        for _ in sound.blocks():
            pass
        return sound.warnings


def test_channels_that_cancel_each_other() -> None:
    left, noise = tone(2), np.random.default_rng(0).normal(0, 0.001, 2 * SAMPLE_RATE).astype(np.float32)
    for right in (-left, -left + noise, -0.8 * left):
        source = wav(np.stack([left, right], axis=1))
        (warning,) = warnings_of(source)
        assert "cancel" in warning
        assert "channel" in warning
        assert warnings_of(source, "left") == []
    for right in (left, 0 * left, tone(2, hertz=1000), np.roll(left, 9)):
        assert warnings_of(wav(np.stack([left, right], axis=1))) == []
    assert warnings_of((np.zeros((SAMPLE_RATE, 2)), SAMPLE_RATE)) == []
    alone = np.zeros((SAMPLE_RATE, 64), np.float32)
    alone[:, 5] = tone(1)
    assert warnings_of((alone, SAMPLE_RATE)) == []


def test_a_sound_shorter_than_a_patch_has_a_warning() -> None:
    (warning,) = warnings_of((np.zeros(2_399), SAMPLE_RATE))
    assert "0.150 s" in warning
    assert "too short" in warning
    assert warnings_of((np.zeros(2_400), SAMPLE_RATE)) == []


def test_floats_on_an_integer_scale() -> None:
    loud = 30_000 * tone(1, level=1)
    (warning,) = warnings_of(wav(loud, subtype="FLOAT"))
    assert "30000" in warning
    assert warnings_of(wav(8 * tone(1, level=1), subtype="FLOAT")) == []
    assert warnings_of((loud.astype(np.int16), SAMPLE_RATE)) == []


def test_a_budget_counts_samples_times_channels() -> None:
    samples = np.zeros((10_000, 4), np.int16)
    with open_sound(wav(samples), budget=40_000) as sound:
        list(sound.blocks())
    with open_sound(wav(samples), budget=39_999, block_seconds=0.1) as sound:
        blocks = sound.blocks()
        next(blocks)
        with pytest.raises(TooLongError, match="39999") as caught:
            list(blocks)
    assert isinstance(caught.value, AudioError)


def test_reading_can_be_cancelled() -> None:
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 3

    blocks: list[NDArray[np.float32]] = []
    with (
        open_sound((np.zeros(SAMPLE_RATE), SAMPLE_RATE), cancelled=cancelled, block_seconds=0.1) as sound,
        pytest.raises(ClosedError),
    ):
        blocks.extend(sound.blocks())
    assert len(blocks) == 3


@pytest.mark.parametrize("rate", [1, 4, 999, 768_001, 2**31 - 1])
def test_implausible_rates_are_refused(rate: int) -> None:
    samples = np.zeros(100_000, np.int16)
    data = bytearray(wav(samples, 8_000))
    data[24:28] = rate.to_bytes(4, "little")
    for source in (bytes(data), (samples, rate)):
        with pytest.raises(AudioError, match=f"{rate} Hz; .* 1000 to 768000"):
            load(source)


def test_the_widest_range_of_rates_is_read() -> None:
    for rate in (1_000, 768_000):
        assert len(load((np.zeros(rate), rate))) == SAMPLE_RATE


def test_too_many_channels() -> None:
    for source in (wav(np.zeros((10, 65), np.int16)), (np.zeros((10, 65)), SAMPLE_RATE)):
        with pytest.raises(AudioError, match=r"64"):
            load(source)
    assert len(load(wav(np.zeros((10, 64), np.int16)))) == 10


def test_blocks_are_bounded_at_any_rate_and_channels() -> None:
    samples = np.zeros((768_000 // 4, 64), np.int16)
    lengths = [len(block) for block in stream((samples, 768_000), 60.0)]
    assert len(lengths) > 2
    assert sum(lengths) == SAMPLE_RATE // 4


@pytest.mark.skipif(os.name != "posix", reason="these are special files of POSIX")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Whoever opened these would wait for a writer, or read for ever."""
    pipe, link, place = tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "c.wav"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(place))
        for path, kind in ((pipe, "pipe"), (link, "device"), (place, "socket")):
            with pytest.raises(AudioError, match=f"a {kind}, not a regular file; .* as -"):
                load(path)
    real = tmp_path / "real.wav"
    real.write_bytes(wav(tone(1)))
    link.unlink()
    link.symlink_to(real)
    assert len(load(link)) == SAMPLE_RATE


class Pipe(io.RawIOBase):
    """A stream without an end, as from another program."""

    def __init__(self, data: bytes, most: int) -> None:
        self.data, self.left = data, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if part := self.data[: len(buffer)]:
            self.data = self.data[len(part) :]
        else:
            part = bytes(min(len(buffer), self.left))
            self.left -= len(part)
        buffer[: len(part)] = part
        return len(part)


def test_pipes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    data = wav(tone(2))
    np.testing.assert_array_equal(load(cast(BinaryIO, Pipe(data, 0))), tone_of(data))
    monkeypatch.setattr(decode, "_KEPT_IN_MEMORY", 1000)  # the rest is kept on disk
    np.testing.assert_array_equal(load(cast(BinaryIO, Pipe(data, 0))), tone_of(data))
    monkeypatch.setattr(decode, "_MOST_PIPED", 1 << 24)
    endless = Pipe(data, 1 << 40)
    with pytest.raises(AudioError, match="pipe"):
        load(cast(BinaryIO, endless))
    assert endless.left > 1 << 39
    with pytest.raises(ClosedError), open_sound(cast(BinaryIO, Pipe(data, 1 << 40)), cancelled=lambda: True):
        pass


def tone_of(data: bytes) -> NDArray[np.float32]:
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return np.asarray(samples, np.float32)


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLAC has a minute of silence in a few hundred bytes a second; a file of much less is made to exhaust us."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((SAMPLE_RATE * 60, 2), np.int16), SAMPLE_RATE, format="FLAC")
    assert len(load(file.getvalue())) == 60 * SAMPLE_RATE
    monkeypatch.setattr(reading, "_UNSUSPICIOUS", 10_000)
    assert len(load(file.getvalue())) == 60 * SAMPLE_RATE
    monkeypatch.setattr(reading, "_MOST_PER_BYTE", 10)
    with pytest.raises(TooLongError, match=f"each of its {len(file.getvalue())} bytes"):
        load(file.getvalue())


def test_a_file_that_cannot_be_read_to_its_end(tmp_path: Path) -> None:
    """A disk that fails is an error of the sound."""

    class Failing(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() > 40_000:
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    for kind, subtype in (("WAV", "PCM_24"), ("FLAC", "PCM_16")):
        file = io.BytesIO()
        soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 80_000), SAMPLE_RATE, subtype, format=kind)
        with pytest.raises(AudioError, match="cannot be read: Input/output error"):
            load(Failing(file.getvalue()), strict=False)
