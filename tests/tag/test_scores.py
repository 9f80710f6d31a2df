"""Files of scores: what is written comes back, exactly or rounded, whatever a kill or damage leaves of the file."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ced.errors import StoreError, WriteError
from ced.tag.records import Scored
from ced.tag.scores import ScoreLog, ScoreType, read_scores

ABOUT = {"sound": "a.wav", "window": 1.0}


def windows(count: int, rows: int = 1, classes: int = 5) -> list[list[Scored]]:
    probs = np.random.default_rng(0).random((count, rows, classes), dtype=np.float32)
    return [
        [Scored(window + row / rows, window + (row + 1) / rows, probs[window, row], window == 1) for row in range(rows)]
        for window in range(count)
    ]


def log(folder: Path, kind: ScoreType = "float32", about: dict[str, object] | None = None) -> ScoreLog:
    return ScoreLog(folder, Path("sub/a.wav.unfinished"), 5, about or ABOUT, kind)


def assert_equal(found: Sequence[Sequence[Scored]], expected: Sequence[Sequence[Scored]]) -> None:
    assert len(found) == len(expected)
    for some, others in zip(found, expected, strict=True):
        for row, other in zip(some, others, strict=True):
            assert (row.start, row.end, row.silent) == (other.start, other.end, other.silent)
            np.testing.assert_array_equal(row.probs, other.probs)


@pytest.mark.parametrize("rows", [1, 6])
def test_windows_come_back_exactly(tmp_path: Path, rows: int) -> None:
    given = windows(7, rows)
    with log(tmp_path) as scores:
        assert_equal([scores.add(window) for window in given[:3]], given[:3])
        scores.flush()
        for window in given[3:]:
            scores.add(window)
    assert_equal(list(read_scores(tmp_path / "sub/a.wav.unfinished", 5)), given)
    with log(tmp_path) as scores:
        assert_equal(list(scores.stored()), given)
        scores.add(given[0])
    assert_equal(list(read_scores(tmp_path / "sub/a.wav.unfinished", 5)), [*given, given[0]])


def test_tags_are_made_from_rounded_scores(tmp_path: Path) -> None:
    given = windows(200)
    with log(tmp_path, "float16") as scores:
        kept = [scores.add(window) for window in given]
        scores.close(finish=True)
    path = tmp_path / "sub/a.wav.unfinished"
    assert_equal(list(read_scores(path, 5)), kept)
    assert max(np.abs(a.probs - b.probs).max() for (a,), (b,) in zip(given, kept, strict=True)) < 4e-4
    assert path.stat().st_size < 200 * 5 * 4 + 200 * 17


def test_a_short_sound_leaves_no_file(tmp_path: Path) -> None:
    with log(tmp_path) as scores:
        for window in windows(3):
            scores.add(window)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_yields_its_complete_chunks(tmp_path: Path) -> None:
    given = windows(4)
    with log(tmp_path) as scores:
        for window in given:
            scores.add(window)
            scores.flush()
    path = tmp_path / "sub/a.wav.unfinished"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with log(tmp_path) as scores:
            found = list(scores.stored())
            assert_equal(found, given[: len(found)])
            for window in given[len(found) :]:
                scores.add(window)
        assert_equal(list(read_scores(path, 5)), given)


def test_scores_with_another_header_are_dropped(tmp_path: Path) -> None:
    for about, kind in (({"sound": "b.wav"}, "float32"), (ABOUT, "float16")):
        with log(tmp_path) as scores:
            scores.add(windows(1)[0])
            scores.flush()
        with log(tmp_path, kind, about) as scores:  # type: ignore[arg-type]
            assert list(scores.stored()) == []


def test_damage_is_reported(tmp_path: Path) -> None:
    with log(tmp_path) as scores:
        scores.add(windows(1)[0])
        scores.flush()
    path = tmp_path / "sub/a.wav.unfinished"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    for content in (bytes(damaged), whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="damaged"):
            list(read_scores(path, 5))
    for header in (b"", b"\x00", b"[" * 100_000, b"[]", json.dumps({"format": 2, "classes": 5}).encode()):
        path.write_bytes(header + b"\n")
        with pytest.raises(StoreError, match=r"a\.wav"):
            list(read_scores(path, 5))
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="5 classes"):
        list(read_scores(path, 6))
    with pytest.raises(StoreError, match="No such file"):
        list(read_scores(tmp_path / "none.scores", 5))


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "sub/a.wav.unfinished").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(WriteError, match="link"):
        log(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
