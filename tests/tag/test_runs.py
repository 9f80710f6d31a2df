"""Runs of a tagger into folders from Python, which are those of the command line."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from ced import Tagger, TagOptions
from ced.errors import ConfigError, StoreError
from ced.model.config import ModelConfig
from ced.model.vit import CED
from ced.sound.labels import ClassTable
from ced.tag.inputs import InputSound, find_inputs
from ced.tag.runs import EarlierRun, tag_to_folder

ROOT = Path(__file__).parents[2]
RATE = 16_000
OPTIONS = TagOptions(window=1.0, top_k=2)


class Level:
    """A model of one's own: scores how loud a window is."""

    def __init__(self, names: Sequence[str] = ("loud", "quiet")) -> None:
        self.labels = ClassTable(tuple(names))

    def __call__(self, waves: NDArray[np.float32], /) -> NDArray[np.float32]:
        level = np.sqrt(np.mean(waves**2, axis=1))
        return np.stack([level, *(1 - level for _ in self.labels.names[1:])], axis=1)


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[InputSound]:
    """A mono sound of 3 s and a stereo one of 2 s in `in`, in the working directory."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * RATE, 2))
    Path("in/b").mkdir(parents=True)
    soundfile.write("in/a.wav", noise[:, 0], RATE)
    soundfile.write("in/b/c.wav", noise[: 2 * RATE], RATE)
    return find_inputs(["in"])


def ced_tag(*words: str | Path) -> str:
    """Run `ced tag`, and return what it prints."""
    command = [sys.executable, "-m", "ced", "tag", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=environment).stdout


def outputs(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_run_and_one_of_the_command_line_continue_each_other(graph: Path, sounds: list[InputSound]) -> None:
    done: list[int] = []
    with Tagger(graph, jobs=2) as tagger:
        summary = tag_to_folder(
            tagger,
            sounds,
            Path("api"),
            OPTIONS,
            formats=["csv", "jsonl"],
            keep_scores=True,
            progress=lambda task, count, total, note="": done.append(count),
        )
    assert (summary.files, summary.failed, summary.skipped) == (2, 0, 0)
    assert done[-1] == 2
    words: list[str | Path] = ["-m", graph, "in", "-w", "1", "-k", "2", "-f", "csv", "-f", "jsonl", "--keep-scores"]
    ced_tag(*words, "--out", "cli")
    assert "b/c.wav.csv" in outputs("api")
    # Records name the model as it was given, and the scores of both have equal headers.
    assert outputs("api") == outputs("cli")
    assert "2 done before" in ced_tag(*words, "--out", "api")


def test_tags_are_made_again_from_kept_scores(graph: Path, sounds: list[InputSound]) -> None:
    events = TagOptions(events=True, threshold=0.4)
    with Tagger(graph) as tagger:
        tag_to_folder(tagger, sounds, Path("kept"), OPTIONS, keep_scores=True)
    run = EarlierRun(Path("kept"))
    summary = run.tag_to_folder(Path("events"), events, formats=["csv"], combined=True, clips=Path("clips"))
    assert (summary.files, summary.failed, summary.seconds) == (2, 0, 5.0)
    ced_tag("--from", "kept", "--events", "--threshold", "0.4", "-f", "csv", "--combine", "--out", "cli")
    assert outputs("events") == outputs("cli")
    found = [piece for item in run.inputs for piece in run.record(item, events).events]
    assert len(found) == len(list(Path("clips").rglob("*.flac"))) > 0
    with pytest.raises(ConfigError, match="kept is the folder of the earlier run"):
        run.tag_to_folder(Path("kept"))
    with pytest.raises(ConfigError, match="there is no label 'dog'"):
        run.tag_to_folder(Path("dogs"), TagOptions(labels=("dog",)))
    assert not Path("dogs").exists()


def test_a_refused_run_leaves_the_classes_of_the_scores(sounds: list[InputSound]) -> None:
    with Tagger(Level(), name="mine") as tagger:
        tag_to_folder(tagger, sounds, Path("kept"), OPTIONS, keep_scores=True)
        assert tag_to_folder(tagger, sounds, Path("kept"), OPTIONS, keep_scores=True).skipped == 2
    with (
        Tagger(Level(["a", "b", "c"]), name="another") as tagger,
        pytest.raises(ConfigError, match=r'begun with model "mine, 2 classes .*now "another, 3 classes'),
    ):
        tag_to_folder(tagger, sounds, Path("kept"), OPTIONS, keep_scores=True)
    with Tagger(Level(["a", "b", "c"]), name="mine") as tagger, pytest.raises(ConfigError, match="was begun with"):
        tag_to_folder(tagger, sounds, Path("kept"), OPTIONS, keep_scores=True)
    run = EarlierRun(Path("kept"))
    assert run.labels.names == ("loud", "quiet")
    assert [len(run.record(item, OPTIONS)) for item in run.inputs] == [3, 2]


def test_sounds_are_named_as_on_the_command_line(graph: Path, sounds: list[InputSound]) -> None:
    with Tagger(graph) as tagger:
        tag_to_folder(tagger, sounds, "found", OPTIONS, formats=["csv"])
        tag_to_folder(tagger, Path("in"), Path("named"), OPTIONS, formats=["csv"])
        summary = tag_to_folder(tagger, ["in/a.wav", "in/missing.wav"], "some", OPTIONS)
        with pytest.raises(ConfigError, match="nothing to tag"):
            tag_to_folder(tagger, [], "none")
    assert outputs("found") == outputs("named")
    assert (summary.files, summary.failed) == (2, 1)
    assert "No such file" in Path("some/errors.jsonl").read_text()


@pytest.mark.parametrize("given", [None, 1, [b"RIFF"], io.BytesIO(b"RIFF"), [(np.zeros(RATE), RATE)], ["in/a.wav", 1]])
def test_sounds_that_are_not_names_are_refused(sounds: list[InputSound], given: Any) -> None:
    with Tagger(Level()) as tagger, pytest.raises(ConfigError, match=r"sound is given as .* InputSound"):
        tag_to_folder(tagger, given, "out")
    assert not Path("out").exists()


def test_sounds_in_memory_have_names_and_places(sounds: list[InputSound]) -> None:
    samples = np.full(RATE, 0.5, np.float32)
    with Tagger(Level()) as tagger:
        tag_to_folder(tagger, InputSound("tone", (samples, RATE), "tones/1"), "out", OPTIONS)
        for place in ("/tone", "../tone", "./tone", "a//tone", "", "a\0", "\ud800", None):
            with pytest.raises(ConfigError, match="the place of tone is"):
                tag_to_folder(tagger, InputSound("tone", (samples, RATE), place), "others", OPTIONS, combined=True)  # type: ignore[arg-type]
        for name in ("", "\ud800", 7, None):
            with pytest.raises(ConfigError, match="the name of a sound is"):
                tag_to_folder(tagger, InputSound(name, (samples, RATE), "tone"), "others", OPTIONS)  # type: ignore[arg-type]
        assert tag_to_folder(tagger, InputSound("tone", (samples, RATE), "tones/1"), "out", OPTIONS).skipped == 0
    assert "tones/1.jsonl" in outputs("out")
    assert not Path("others").exists()


def test_numbers_of_numpy_are_those_of_python(sounds: list[InputSound]) -> None:
    options: Any = {"window": np.float32(1), "top_k": np.int64(2)}
    with Tagger(Level()) as tagger:
        tag_to_folder(tagger, sounds, "out", TagOptions(**options))
        assert tag_to_folder(tagger, sounds, "out", OPTIONS).skipped == 2


class Unreadable(io.RawIOBase):
    """A file on a broken disk."""

    def read(self, size: int = -1, /) -> bytes:
        raise OSError(5, "Input/output error")


def closed() -> io.BytesIO:
    file = io.BytesIO(b"RIFF")
    file.close()
    return file


@pytest.mark.parametrize("source", [Unreadable(), closed(), io.StringIO("in/a.wav")])
def test_open_files_that_cannot_be_read_are_failures(sounds: list[InputSound], source: Any) -> None:
    with Tagger(Level()) as tagger:
        inputs = [InputSound("broken", source, "broken"), *sounds]
        summary = tag_to_folder(tagger, inputs, "out", OPTIONS, each_channel=True)
    assert (summary.files, summary.failed) == (4, 1)
    assert '"broken"' in Path("out/errors.jsonl").read_text()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"options": {"window": 1.0}}, "options is .* must be TagOptions"),
        ({"formats": None}, "formats is None; it must be a list"),
        ({"combined": "no"}, "combined is 'no'; it must be True or False"),
        ({"out": "a\0b"}, "out is .* must be the path of a folder"),
        ({"clips": 1}, "clips is 1; it must be the path of a folder"),
    ],
)
def test_arguments_of_wrong_types_are_refused(sounds: list[InputSound], wrong: dict[str, Any], error: str) -> None:
    with Tagger(Level()) as tagger:
        tag_to_folder(tagger, sounds, "kept", OPTIONS, keep_scores=True)
        arguments: dict[str, Any] = {"out": "out", **wrong}
        with pytest.raises(ConfigError, match=error):
            tag_to_folder(tagger, sounds, **arguments)
    with pytest.raises(ConfigError, match=error):
        EarlierRun("kept").tag_to_folder(**arguments)
    assert not Path("out").exists()


def test_flags_and_taggers_of_wrong_types_are_refused(sounds: list[InputSound]) -> None:
    given: Any = "left"
    with Tagger(Level()) as tagger, pytest.raises(ConfigError, match="each_channel is 'left'"):
        tag_to_folder(tagger, sounds, "out", each_channel=given)
    with pytest.raises(ConfigError, match="tagger is 'left'; it must be a Tagger"):
        tag_to_folder(given, sounds, "out")
    with pytest.raises(ConfigError, match="labels is"):
        TagOptions(labels=[given, 1])  # type: ignore[list-item]


KILLED = """
import os, sys
import ced.progress, ced.tag.scores
from ced import Tagger, TagOptions
from ced.tag.runs import tag_to_folder

ced.progress.REPORT_SECONDS = ced.tag.scores._FLUSH_SECONDS = 0  # both after each window

def progress(task, done, total, note=""):
    if done == 2:
        os._exit(9)

with Tagger(sys.argv[1]) as tagger:
    tag_to_folder(tagger, "in/a.wav", "out", TagOptions(window=1.0), keep_scores="keep" in sys.argv, progress=progress)
"""


@pytest.mark.parametrize("first", ["keep", "leave"])
def test_a_killed_run_resumes_with_kept_scores(graph: Path, sounds: list[InputSound], first: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, graph, first], env=environment, check=False)
    assert killed.returncode == 9
    assert list(Path("out/.unfinished").iterdir())
    one = TagOptions(window=1.0)
    with Tagger(graph) as tagger:
        assert tag_to_folder(tagger, "in/a.wav", "out", one, keep_scores=True).failed == 0
        tag_to_folder(tagger, "in/a.wav", "whole", one, keep_scores=True)
    resumed, whole = EarlierRun("out"), EarlierRun("whole")
    assert resumed.record(resumed.inputs[0], one) == whole.record(whole.inputs[0], one)
    assert {*outputs("out")} == {*outputs("whole")}  # the files of scores may have other chunks
    assert Path("out/a.wav.jsonl").read_bytes() == Path("whole/a.wav.jsonl").read_bytes()


def test_networks_are_recognised_by_their_weights(sounds: list[InputSound]) -> None:
    config = ModelConfig(embed_dim=32, num_heads=2, depth=1, outputdim=2, target_length=112)
    network = CED(config, ClassTable(("loud", "quiet")))
    same = CED(config, ClassTable(("loud", "quiet")))
    same.load_state_dict(network.state_dict())
    with Tagger(network) as tagger:
        tag_to_folder(tagger, sounds, "out", OPTIONS)
    with Tagger(same) as tagger:
        assert tag_to_folder(tagger, sounds, "out", OPTIONS).skipped == 2
    with torch.no_grad():
        same.get_parameter("outputlayer.1.bias").add_(1.0)
    with Tagger(same) as tagger, pytest.raises(ConfigError, match="was begun with model"):
        tag_to_folder(tagger, sounds, "out", OPTIONS)


def test_clips_and_inputs_of_single_records_are_checked(graph: Path, sounds: list[InputSound]) -> None:
    events = TagOptions(events=True, threshold=0.4)
    with Tagger(graph) as tagger:
        tag_to_folder(tagger, sounds, "kept", OPTIONS, keep_scores=True)
    run = EarlierRun("kept")
    record = run.record(run.inputs[0], events, "clips")
    assert len(list(Path("clips").iterdir())) == len(record.events) > 0
    with pytest.raises(ConfigError, match="add --events"):
        run.record(run.inputs[0], OPTIONS, "clips")
    with pytest.raises(ConfigError, match="not one of the inputs"):
        run.record(sounds[0], events)
    with pytest.raises(ConfigError, match="local folder; got s3://bucket/kept"):
        EarlierRun("s3://bucket/kept")


def test_each_channel_is_tagged_on_its_own(graph: Path, sounds: list[InputSound]) -> None:
    with Tagger(graph) as tagger:
        summary = tag_to_folder(tagger, sounds, Path("out"), OPTIONS, each_channel=True)
    assert summary.files == 3
    assert {"b/c.wav.channel1.jsonl", "b/c.wav.channel2.jsonl"} < {*outputs("out")}


def test_clips_of_each_channel_of_a_stream(graph: Path, sounds: list[InputSound]) -> None:
    with Tagger(graph) as tagger, Path("in/b/c.wav").open("rb") as file:
        stream = InputSound("c", file, "c")
        options = TagOptions(events=True, threshold=0.4)
        assert tag_to_folder(tagger, stream, "out", options, clips="clips", each_channel=True).files == 2
    assert {path.name.partition(" ")[0] for path in Path("clips").iterdir()} == {"c.channel1", "c.channel2"}


def test_impossible_outputs_are_refused_before_a_sound_is_read(graph: Path, sounds: list[InputSound]) -> None:
    stream = [InputSound("<stdin>", io.BytesIO(b"no sound"), "stdin")]
    events = TagOptions(events=True)
    with Tagger(graph) as tagger:
        with pytest.raises(ConfigError, match="add --events"):
            tag_to_folder(tagger, sounds, Path("out"), clips=Path("clips"))
        with pytest.raises(ConfigError, match="<stdin> does not allow"):
            tag_to_folder(tagger, stream, Path("out"), events, clips=Path("clips"))
        with pytest.raises(ConfigError, match="need a local folder; the outputs go to memory"):
            tag_to_folder(tagger, sounds, Path("memory://out"), keep_scores=True)
        with pytest.raises(ConfigError, match="need a local folder; got s3://bucket/clips"):
            tag_to_folder(tagger, sounds, Path("out"), events, clips=Path("s3://bucket/clips"))
        with pytest.raises(ConfigError, match="unknown output format xml"):
            tag_to_folder(tagger, sounds, Path("out"), formats=["xml"])
        with pytest.raises(ConfigError, match=r"must be a list, as \['csv'\]"):
            tag_to_folder(tagger, sounds, Path("out"), formats="csv")
        with pytest.raises(ConfigError, match="the start of one sound; 2 are named"):
            tag_to_folder(tagger, sounds, Path("out"), TagOptions(clock="2026-11-27T12:00"))
        with pytest.raises(ConfigError, match="out is None; it must be the path of a folder"):
            tag_to_folder(tagger, sounds, None)  # type: ignore[arg-type]
        tag_to_folder(tagger, sounds, Path("without"))
    assert not Path("out").exists()
    with pytest.raises(StoreError, match="kept no scores"):
        EarlierRun(Path("without"))
