from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from ced.errors import ConfigError, TableError
from ced.sound.labels import ClassTable
from ced.tag.calibrate import calibrate
from ced.tag.tagger import Tagger
from ced.tag.thresholds import NEVER, read_thresholds


class Loudness:
    """Scores a wave by how loud it is; the third class hears nothing."""

    labels = ClassTable(("loud", "quiet", "none"))

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        loud = np.abs(waves).max(axis=1)
        return np.stack([loud, 0.5 - loud / 2, np.zeros_like(loud)], axis=1)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write clips of 3 s, the first of which is loud in its last second alone."""
    for name, levels in {"a": (0.0, 0.0, 0.5), "b": (0.25, 0.25, 0.25), "c": (0.0, 0.125, 0.0)}.items():
        wave = np.repeat(np.array(levels, np.float32), 16_000)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000, subtype="FLOAT")
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    path = tmp_path / "clips.tsv"
    path.write_text("filename\tlabels\na.wav\t0\nb.wav\t0\nbad.wav\t1\nc.wav\t1\n", encoding="utf-8")
    return path


def test_thresholds_are_fitted_to_the_highest_of_a_clips_windows(table: Path, tmp_path: Path) -> None:
    told: list[int] = []
    out = tmp_path / "new" / "thresholds.tsv"
    tagger = Tagger(Loudness())

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        told.append(done)

    found = calibrate(tagger, table, out, window=1.0, jobs=2, progress=progress)
    # The clips' scores are 0.5, 0.25, 0.125 for loud, and 0.5, 0.375, 0.5 for quiet, which is right of the last only.
    thresholds = read_thresholds(out, tagger.labels)
    assert list(thresholds) == pytest.approx([0.1875, 0.4375, thresholds[2]])
    assert (found.clips, found.classes, found.unseen, found.never) == (3, 2, ("none",), ())
    assert found.f1_before == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.f1_after == pytest.approx((1 + 2 / 3) / 2)
    assert len(found.unreadable) == 1
    assert "bad.wav" in found.unreadable[0]
    assert told == [1, 2, 3, 4]
    assert out.read_text(encoding="utf-8").splitlines()[2] == "0\tloud\t0.1875\t1.0000\t1.0000\t1.0000\t2"


def test_with_a_precision(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "thresholds.tsv"
    found = calibrate(Tagger(Loudness()), table, out, precision=0.9, window=1.0)
    assert found.never == ("quiet", "none")  # all classes together reach it as little
    assert read_thresholds(out, Loudness.labels)[:2] == (0.1875, NEVER)


def test_what_is_refused(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "thresholds.tsv"
    tagger = Tagger(Loudness())
    with pytest.raises(ConfigError, match="precision is 2"):
        calibrate(tagger, table, out, precision=2)
    table.write_text("filename\tlabels\nbad.wav\t1\n", encoding="utf-8")
    with pytest.raises(TableError, match=r"none of 1 clips of .* can be read; the first: .*bad\.wav"):
        calibrate(tagger, table, out)
    table.write_text("filename\tlabels\na.wav\t\n", encoding="utf-8")
    with pytest.raises(TableError, match="none of 1 clips has a label"):
        calibrate(tagger, table, out)
    assert not out.exists()
