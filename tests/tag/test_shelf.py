from pathlib import Path

import numpy as np
import pytest

from ced.sound.labels import ClassTable
from ced.tag.hearing import Clip
from ced.tag.shelf import Kept, Shelf
from ced.tag.timeline import Timeline

NOTHING = np.zeros((1, 1), np.float32)


class Watch:
    """A clock that stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def shelf(tmp_path: Path, watch: Watch) -> Shelf:
    return Shelf(tmp_path / "shelf", most=2, longest=60.0, clock=watch)


def put(shelf: Shelf, owner: str) -> Kept:
    clip = Clip("a.wav", shelf.room() / "clip.flac", 1.0, NOTHING)
    clip.path.write_bytes(b"fLaC")
    return shelf.put(owner, clip, Timeline("a.wav", "m", 1.0, ClassTable(("bark",)), (), NOTHING))


def files(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "shelf").iterdir()}


def test_a_sound_is_found_by_its_owner_and_its_token(shelf: Shelf, tmp_path: Path) -> None:
    kept = put(shelf, "me")
    assert shelf.get("me") is kept
    assert shelf.find(kept.token) is kept
    assert shelf.get("you") is None
    assert shelf.find("guess") is None
    assert len(kept.token) >= 20  # 16 random bytes
    assert files(tmp_path) == {kept.token}


def test_the_next_sound_of_an_owner_takes_the_place_of_the_last(shelf: Shelf, tmp_path: Path) -> None:
    first, second = put(shelf, "me"), put(shelf, "me")
    assert shelf.find(first.token) is None
    assert files(tmp_path) == {second.token}


def test_other_scores_of_the_same_clip_leave_it_there(shelf: Shelf) -> None:
    kept = put(shelf, "me")
    again = shelf.put("me", kept.clip, kept.timeline)
    assert again.token == kept.token
    assert again.clip.path.exists()


def test_out_of_room_the_one_goes_that_was_not_asked_for_longest(shelf: Shelf, tmp_path: Path) -> None:
    first, second = put(shelf, "1"), put(shelf, "2")
    assert shelf.find(first.token) is first
    third = put(shelf, "3")
    assert shelf.get("2") is None
    assert files(tmp_path) == {first.token, third.token}
    assert not second.clip.path.exists()


def test_what_is_not_asked_for_is_swept_away(shelf: Shelf, watch: Watch, tmp_path: Path) -> None:
    _, second = put(shelf, "1"), put(shelf, "2")
    watch.now = 59.0
    shelf.get("2")
    shelf.sweep()
    assert len(files(tmp_path)) == 2
    watch.now = 61.0
    shelf.sweep()
    assert files(tmp_path) == {second.token}


def test_who_leaves_leaves_nothing(shelf: Shelf, tmp_path: Path) -> None:
    put(shelf, "me")
    shelf.forget("me")
    shelf.forget("nobody")
    assert files(tmp_path) == set()
