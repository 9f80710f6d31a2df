"""The overview of a sound, compared with a direct computation."""

import base64

import numpy as np
import pytest
from numpy.typing import NDArray

from ced.serve.overview import QUIETEST, STEPS, Overview
from ced.sound.audio import SAMPLE_RATE


def columns(wave: NDArray[np.float32], rate: float, block: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return peaks (n,) and mels (n, 64) of a wave that arrives in blocks."""
    overview = Overview(rate)
    peaks, mels, expected = [], [], 0.0
    for start in range(0, len(wave) + block, block):
        overview.add(wave[start : start + block])
        line = overview.take(finish=start + block >= len(wave) + block)
        if line is None:
            continue
        assert line["start"] == pytest.approx(expected)
        peaks.append(np.frombuffer(base64.b64decode(line["peaks"]), np.uint8))
        mels.append(np.frombuffer(base64.b64decode(line["mels"]), np.uint8).reshape(-1, line["bands"]))
        expected += len(peaks[-1]) / rate
    return np.concatenate(peaks), np.concatenate(mels)


@pytest.mark.parametrize("rate", [100.0, 30.0, 6.667])
@pytest.mark.parametrize("block", [100, 16_000])
def test_columns_do_not_depend_on_blocks(rate: float, block: int) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 40_123).astype(np.float32)
    whole, parts = columns(wave, rate, len(wave)), columns(wave, rate, block)
    assert len(whole[0]) == pytest.approx(len(wave) / SAMPLE_RATE * rate, abs=2.5)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_peaks_and_bands_match_time_and_frequency_of_a_tone() -> None:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = np.where(time < 1, 0.0, 0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    peaks, mels = columns(tone, 10.0, 4000)
    assert peaks[:9].max() == 0
    assert peaks[11:19].tolist() == [128] * 8
    assert mels[:9].max() == mels[:9].min()  # silence
    assert set(mels[11:19].argmax(1)) == {22}  # 1 kHz on the mel scale of 64 bands up to 8 kHz
    loudest = mels[12].max() / STEPS + QUIETEST
    assert loudest == pytest.approx(20 * np.log10(0.5 * 256 / 2), abs=2)  # the power of a sine behind a Hann window
