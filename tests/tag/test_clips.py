from pathlib import Path

import numpy as np
import pytest
import soundfile

from ced.errors import AudioError
from ced.tag.clips import write_clips
from ced.tag.records import Tag, Tags


def event(start: float, end: float, label: str = "Dog") -> Tags:
    return Tags(start, end, (Tag(label, 0, None, 0.75),))


def test_clips_keep_samples_rate_and_channels_of_the_sound(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, (35 * 44_100, 2), np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 44_100)
    events = [event(0.0, 1.0), event(0.5, 21.25, "Bark/woof"), event(9.5, 10.5, "Cat"), event(34.0, 35.0001)]
    paths = write_clips(tmp_path / "a.wav", events, tmp_path / "out", Path("sub/a.wav"))
    assert [path.name for path in paths] == [
        "a.wav 0000.000-0001.000 Dog.flac",
        "a.wav 0000.500-0021.250 Bark_woof.flac",
        "a.wav 0009.500-0010.500 Cat.flac",
        "a.wav 0034.000-0035.000 Dog.flac",
    ]
    assert sorted((tmp_path / "out/sub").iterdir()) == sorted(paths)
    for one, path in zip(events, paths, strict=True):
        clip, rate = soundfile.read(path, dtype="int16")
        assert rate == 44_100
        np.testing.assert_array_equal(clip, samples[round(one.start * 44_100) : round(one.end * 44_100)])


def test_floats_have_24_bits_and_many_channels_are_wav(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-1.5, 1.5, (8_000, 9)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 8_000, "FLOAT")
    (path,) = write_clips(tmp_path / "a.wav", [event(0.25, 0.75)], tmp_path, Path("a.wav"))
    assert path.suffix == ".wav"
    clip, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(clip, samples[2_000:6_000].clip(-1, 1), atol=2e-7)


def test_a_truncated_sound_leaves_no_incomplete_clip(tmp_path: Path) -> None:
    samples = np.zeros(20 * 8_000, np.float32)
    samples[100_000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 8_000, "FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        write_clips(tmp_path / "a.wav", [event(1.0, 2.0), event(5.0, 15.0)], tmp_path / "out", Path("a.wav"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.wav 0001.000-0002.000 Dog.flac"]
    assert write_clips(tmp_path / "a.wav", [], tmp_path / "none", Path("a.wav")) == []
