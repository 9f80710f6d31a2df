"""Workers of a cluster, without one: sounds are read in a process of their own, which may crash."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ced.errors import AudioError, CheckpointError
from ced.integrations import ray
from ced.integrations.ray import Model, Rows, Tagging, _Reader
from ced.remote import Listed
from ced.tag.inputs import InputSound
from tests.crashing import POISONED, crashing_site

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[InputSound]:
    """Three sounds, the second of which crashes its reader, and a file that is none."""
    monkeypatch.setattr(ray, "_SECONDS_TO_BE_LOST", 0.0)
    monkeypatch.setenv("PYTHONPATH", f"{crashing_site(tmp_path)}{os.pathsep}{ROOT}")
    paths = [tmp_path / name for name in ("a.wav", POISONED, "b.wav")]
    for path in paths:
        soundfile.write(path, np.zeros(16_000), 16_000)
    paths.append(tmp_path / "none.wav")
    return [InputSound(f"./{path.name}", str(path), path.name) for path in paths]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_sound_that_crashes_its_process_costs_no_other(
    sounds: list[InputSound], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(ray, "_GROUP", size)
    found = list(_Reader(Tagging(Model("esc10"))).read(sounds))
    good, crashed, other, missing = found
    for rows in (good, other):
        assert isinstance(rows, Rows)
        assert rows.seconds == 1.0
    assert isinstance(crashed, AudioError)
    assert str(crashed) == f"./{POISONED}: the process that read it ended, twice: SIGSEGV"
    assert isinstance(missing, AudioError)
    assert str(missing).startswith("./none.wav: ")


def test_sources_are_those_that_other_machines_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("a/../b.wav", str(tmp_path / "b.wav")),
        (Path("b.wav"), str(tmp_path / "b.wav")),
        ("s3://bucket/a b?.wav", "s3://bucket/a b?.wav"),
        ("https://host/a.wav?x=1", "https://host/a.wav?x=1"),
        ("s/0.tar!x/../a.wav", f"{tmp_path}/s/0.tar!x/../a.wav"),
        ("s3://bucket/0.tar!a.wav", "s3://bucket/0.tar!a.wav"),
    ):
        assert ray._source(InputSound("name", given, "a")) == expected
    stamped = ray._source(InputSound("name", Listed("s3://bucket/a.wav", (1, 2)), "a"))
    assert isinstance(stamped, Listed)
    assert stamped.stamp == (1, 2)


def test_faults_of_the_model_are_raised(sounds: list[InputSound]) -> None:
    with pytest.raises(CheckpointError, match="is not the one that the run was begun with"):
        list(_Reader(Tagging(Model("esc10", digest="0" * 64))).read(sounds))
