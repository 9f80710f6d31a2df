from pathlib import Path

import numpy as np
import pytest
import soundfile

from ced.demo.sounds import KINDS, generate, write_sounds
from ced.sound.tables import read_table


@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_sound_is_audible_and_does_not_clip(kind: str) -> None:
    for seed in range(3):
        wave = generate(kind, np.random.default_rng(seed), 1.25)
        assert wave.shape == (20_000,)
        assert wave.dtype == np.float32
        assert 0.05 < np.abs(wave).max() < 0.9


def test_the_same_seed_makes_the_same_sound_and_another_seed_another() -> None:
    first, same, other = (generate("Bell", np.random.default_rng(seed), 0.5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


def test_sounds_are_written_as_files_with_a_table(tmp_path: Path) -> None:
    write_sounds(tmp_path, clips_per_class=6, seconds=0.25, seed=0)
    table = read_table(tmp_path / "meta.tsv")
    assert list(table.columns) == ["filename", "fold", "label", "name"]
    assert len(table) == 6 * len(KINDS)
    assert table.column("fold")[:6] == ["1", "2", "3", "4", "5", "1"]
    assert dict(zip(table.column("label"), table.column("name"), strict=True)) == {
        str(label): kind for label, kind in enumerate(KINDS)
    }
    for name in table.column("filename"):
        info = soundfile.info(tmp_path / "audio" / name)
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (16_000, 1, 4_000, "PCM_16")
