"""Runs over many files: what is written, what a broken run leaves, and what the next one makes of it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from ced.errors import AudioError, BusyError, CheckpointError, ConfigError, StoreError, WriteError
from ced.sound import audio
from ced.tag.batch import SoundOutcome, Summary, outcomes, process_to_folder
from ced.tag.inputs import InputSound, find_inputs
from ced.tag.records import Record, Tag, Tags

SETTINGS = {"model": "loudness", "window": 1.0}
CRASHING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_batch import SETTINGS, loudness
from ced.tag.batch import process_to_folder
from ced.tag.inputs import find_inputs

def process(item):
    time.sleep(0.02)
    return loudness(item)

print("begun", flush=True)
inputs, out = find_inputs([sys.argv[2]]), Path(sys.argv[3])
print(process_to_folder(inputs, process, out, settings=SETTINGS, formats=["csv", "text"], jobs=2))
"""


def loudness(item: InputSound) -> Record:
    """Tag each second with how loud it is: as much of a model as a batch needs."""
    pieces, end = [], 0.0
    for window in audio.cut_windows(audio.stream(item.source), 1.0, 1.0):
        level = float(np.sqrt(np.mean(window.wave**2)))
        pieces.append(Tags(window.start, window.end, (Tag("Sound", 0, None, level),)))
        end = window.end
    return Record(item.name, "loudness", end, tuple(pieces))


class Counting:
    """Calls `loudness` and keeps the names it was called for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, item: InputSound) -> Record:
        self.names.append(Path(item.name).name)
        return loudness(item)


def sound(path: Path, seconds: float = 0.5, level: float = 0.25) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(round(seconds * 16_000), level), 16_000)
    return path


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        sound(Path("in", str(number % 3), f"{number:02}.wav"), 0.5 + 0.25 * number, number / 16)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_are_in_the_order_of_the_inputs(tree: Path) -> None:
    inputs = find_inputs(["in"])

    def process(item: InputSound) -> Record:
        time.sleep(0.02 * (inputs.index(item) % 4 == 0))
        return loudness(item)

    alone = [outcome.result for outcome in outcomes(inputs, process)]
    together = [outcome.result for outcome in outcomes(inputs, process, jobs=5)]
    assert alone == together
    assert [record.file for record in alone if record] == [item.name for item in inputs]


def test_inputs_are_processed_concurrently_with_bounded_read_ahead() -> None:
    inputs = [InputSound(str(number), b"", str(number)) for number in range(500)]
    both = threading.Barrier(2, timeout=5)
    begun: list[int] = []

    def process(item: InputSound) -> Record:
        if int(item.name) < 2:
            both.wait()
        begun.append(int(item.name))
        return Record(item.name, "", 0.0, ())

    found = outcomes(inputs, process, jobs=2)
    assert next(found).input.name == "0"
    time.sleep(0.05)
    assert max(begun) < 50
    assert [outcome.input.name for outcome in found] == [str(number) for number in range(1, 500)]


def test_an_unreadable_sound_is_an_outcome_and_a_model_error_is_raised() -> None:
    inputs = [InputSound(str(number), b"", str(number)) for number in range(4)]
    raised: dict[str, Exception] = {
        "0": AudioError("0 is cut\nshort"),
        "1": ValueError("a\nb"),
        "2": MemoryError(),
    }

    def process(item: InputSound) -> Record:
        if item.name in raised:
            raise raised[item.name]
        return Record(item.name, "", 0.0, ())

    found = list(outcomes(inputs, process, jobs=2))
    assert [outcome.error for outcome in found] == ["0 is cut short", "1: ValueError: a b", "2: MemoryError: ", ""]
    raised["3"] = CheckpointError("no such output")
    with pytest.raises(CheckpointError):
        list(outcomes(inputs, process, jobs=2))
    with pytest.raises(ConfigError, match="jobs is 0"):
        list(outcomes(inputs, process, jobs=0))


def test_a_run_writes_a_tree_like_the_inputs(tree: Path) -> None:
    finished: list[SoundOutcome[Record]] = []
    summary = process_to_folder(
        find_inputs(["in"]),
        loudness,
        Path("out"),
        settings=SETTINGS,
        formats=["csv", "audacity"],
        finished=finished.append,
    )
    assert (summary.files, summary.failed, summary.skipped) == (12, 0, 0)
    assert summary.seconds == sum(0.5 + 0.25 * number for number in range(12))
    files = contents(tree / "out")
    expected = {f"{number % 3}/{number:02}.wav{end}" for number in range(12) for end in (".csv", ".labels.txt")}
    assert set(files) == {*expected, "journal.jsonl"}
    assert files["1/01.wav.csv"].decode() == (
        "file,start,end,label,mid,prob\nin/1/01.wav,0.000000,0.750000,Sound,,0.062500\n"
    )
    header, first, *_ = lines(tree / "out/journal.jsonl")
    assert header == {"format": 1, "settings": {"model": "loudness", "window": 1.0, "record format": 1}}
    status = os.stat("in/0/00.wav")
    assert first["name"] == "in/0/00.wav"
    assert first["stamp"] == [status.st_size, status.st_mtime_ns]
    assert Record.from_json(first["record"]) == loudness(find_inputs(["in/0/00.wav"])[0])
    assert [outcome.input.name for outcome in finished] == [item.name for item in find_inputs(["in"])]


def test_a_run_writes_combined_outputs(tree: Path) -> None:
    inputs = find_inputs(["in"])
    process_to_folder(
        inputs, loudness, Path("out"), settings=SETTINGS, formats=["csv", "parquet"], combined=True, jobs=3
    )
    assert {*contents(tree / "out")} == {"journal.jsonl", "tags.csv", "tags.parquet"}
    table = pyarrow.parquet.read_table("out/tags.parquet")
    rows = [(item.name, piece.start) for item in inputs for piece in loudness(item).pieces]
    assert list(zip(table["file"].to_pylist(), table["start"].to_pylist(), strict=True)) == rows
    assert len(Path("out/tags.csv").read_text().splitlines()) == 1 + len(rows)
    with pytest.raises(ConfigError, match="audacity"):
        process_to_folder(inputs, loudness, Path("new"), settings=SETTINGS, formats=["audacity"], combined=True)
    assert not Path("new").exists()


def test_an_unreadable_file_is_reported_and_retried(tree: Path) -> None:
    Path("in/0/03.wav").write_bytes(b"RIFF")
    Path("in/0/04.wav").write_text("no sound")
    inputs = [*find_inputs(["in"]), *find_inputs(["missing.wav"])]
    finished: list[SoundOutcome[Record]] = []
    summary = process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS, jobs=2, finished=finished.append)
    assert (summary.files, summary.failed) == (14, 3)
    errors = lines(Path("out/errors.jsonl"))
    assert [error["file"] for error in errors] == ["in/0/03.wav", "in/0/04.wav", "missing.wav"]
    assert errors[2]["error"] == "missing.wav: cannot be read: No such file or directory"
    assert [outcome.error for outcome in finished if outcome.result is None] == [error["error"] for error in errors]
    assert str(summary) == "14 files: 11 tagged, 3 failed"
    sound(Path("in/0/03.wav"))
    process = Counting()
    summary = process_to_folder(inputs, process, Path("out"), settings=SETTINGS)
    assert process.names == ["03.wav", "04.wav", "missing.wav"]
    assert (summary.failed, summary.skipped) == (2, 11)
    assert len(lines(Path("out/errors.jsonl"))) == 2
    Path("in/0/04.wav").unlink()
    process_to_folder(find_inputs(["in"]), process, Path("out"), settings=SETTINGS)
    assert not Path("out/errors.jsonl").exists()


def test_a_changed_file_is_processed_again(tree: Path) -> None:
    inputs = find_inputs(["in"])
    process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS)
    process = Counting()
    sound(Path("in/1/01.wav"), 3.0)
    process_to_folder(inputs, process, Path("out"), settings=SETTINGS, formats=["jsonl"], combined=True)
    assert process.names == ["01.wav"]
    assert [line["seconds"] for line in lines(Path("out/tags.jsonl"))][4] == 3.0
    process_to_folder(inputs, process, Path("out"), settings=SETTINGS)
    assert process.names == ["01.wav"]
    Path("in/1/01.wav").write_text("no sound any more")
    process_to_folder(inputs, process, Path("out"), settings=SETTINGS, formats=["jsonl"])
    assert not Path("out/1/01.wav.jsonl").exists()
    process_to_folder(inputs, process, Path("out"), settings=SETTINGS, formats=["jsonl"], combined=True)
    assert len(lines(Path("out/tags.jsonl"))) == 11


def test_a_file_that_changes_during_a_run(tree: Path) -> None:
    """Its new content is tagged once if it changes before its turn, and by the next run if it changes meanwhile."""
    inputs = find_inputs(["in"])

    def process(item: InputSound) -> Record:
        record = loudness(item)
        if item is inputs[0]:
            sound(Path(item.name), 3.0)
            sound(Path(inputs[-1].name), 4.0)
        return record

    process_to_folder(inputs, process, Path("out"), settings=SETTINGS)
    again = Counting()
    process_to_folder(inputs, again, Path("out"), settings=SETTINGS, formats=["jsonl"], combined=True)
    assert again.names == [Path(inputs[0].name).name]
    seconds = [line["seconds"] for line in lines(Path("out/tags.jsonl"))]
    assert (seconds[0], seconds[-1]) == (3.0, 4.0)


def test_other_formats_are_written_from_the_journal(tree: Path) -> None:
    inputs = find_inputs(["in"])
    process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS)
    process = Counting()
    Path("out/1/01.wav.jsonl").unlink()
    process_to_folder(inputs, process, Path("out"), settings=SETTINGS, formats=["jsonl", "csv"])
    process_to_folder(inputs, loudness, Path("fresh"), settings=SETTINGS, formats=["jsonl", "csv"])
    assert process.names == []
    assert contents(tree / "out") == contents(tree / "fresh")


def test_other_settings_are_refused_by_name(tree: Path) -> None:
    inputs = find_inputs(["in"])
    process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS)
    before = contents(tree / "out")
    with pytest.raises(ConfigError) as caught:
        process_to_folder(inputs, loudness, Path("out"), settings={"model": "loudness", "window": 2.0, "hop": 1.0})
    assert str(caught.value) == (
        "out/journal.jsonl was begun with window 1.0, now 2.0, hop unset, now 1.0;"
        " choose another folder, or remove that file to start again"
    )
    assert contents(tree / "out") == before


@pytest.mark.parametrize("junk", ["no json\n", "[1]\n", '{"format": 2, "settings": {}}\n', '{"settings": {}}\n'])
def test_a_file_that_is_not_a_journal_is_refused(tree: Path, junk: str) -> None:
    Path("out").mkdir()
    Path("out/journal.jsonl").write_text(junk)
    with pytest.raises(StoreError, match=r"remove that file to start again"):
        process_to_folder(find_inputs(["in"]), loudness, Path("out"), settings=SETTINGS)
    assert contents(tree / "out") == {"journal.jsonl": junk.encode()}


@pytest.mark.parametrize("cut", [1, 40, 200, 100_000])
def test_an_incomplete_last_line_is_dropped(tree: Path, cut: int) -> None:
    inputs = find_inputs(["in"])
    process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS)
    whole = contents(tree / "out")
    journal = Path("out/journal.jsonl")
    journal.write_bytes(journal.read_bytes()[:-cut])
    process = Counting()
    process_to_folder(inputs, process, Path("out"), settings=SETTINGS)
    assert contents(tree / "out") == whole
    assert len(process.names) == {1: 1, 40: 1, 200: 1, 100_000: 12}[cut]


def test_two_inputs_with_the_same_output_are_refused(tree: Path) -> None:
    sound(Path("other/0/00.wav"))
    inputs = find_inputs(["in", "other"])
    with pytest.raises(
        ConfigError, match=r"^in/0/00\.wav and other/0/00\.wav would both be written to out/0/00\.wav\.j"
    ):
        process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS)
    assert not Path("out").exists()
    assert process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS, combined=True).failed == 0
    assert (
        process_to_folder(find_inputs(["in/*/*", "other/0/*"]), loudness, Path("more"), settings=SETTINGS).failed == 0
    )


def test_two_runs_in_one_folder_are_refused(tree: Path) -> None:
    inputs = find_inputs(["in"])

    def process(item: InputSound) -> Record:
        with pytest.raises(BusyError, match=r"another process is writing out/journal\.jsonl"):
            process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS)
        return loudness(item)

    assert process_to_folder(inputs[:1], process, Path("out"), settings=SETTINGS).failed == 0


def test_standard_input_is_processed_in_every_run(tree: Path) -> None:
    data = Path("in/0/00.wav").read_bytes()
    for _ in range(2):
        inputs = find_inputs(["-"], io.BytesIO(data))
        assert process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS).skipped == 0
    assert lines(Path("out/stdin.jsonl"))[0]["file"] == "<stdin>"


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_names_that_are_not_valid_text(tree: Path) -> None:
    sound(Path("in/a.wav")).rename(os.fsdecode(b"in/caf\xe9.wav"))
    process = Counting()
    for _ in range(2):
        process_to_folder(find_inputs(["in"]), process, Path("out"), settings=SETTINGS, formats=["csv"])
    assert len(process.names) == 13
    assert b"in/caf\\udce9.wav" in Path(os.fsdecode(b"out/caf\xe9.wav.csv")).read_bytes()


def broken_off(folder: Path, stop: Callable[["subprocess.Popen[str]"], None], after: int) -> int:
    """Start a run in a process, stop it when some files are done, and return its exit code."""
    command = [sys.executable, "-c", CRASHING, str(Path(__file__).parent), "in", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        end = time.monotonic() + 20
        while time.monotonic() < end and child.poll() is None:
            journal = folder / "journal.jsonl"
            if journal.exists() and journal.read_bytes().count(b"\n") > after:
                break
            time.sleep(0.002)
        stop(child)
        return child.wait(timeout=20)


def test_a_killed_run_resumes_and_ends_like_an_uninterrupted_one(tree: Path) -> None:
    for number in range(60):
        sound(Path("in/more", f"{number:02}.wav"), 0.3, number / 100)
    inputs = find_inputs(["in"])
    out = Path("out")
    for after in (5, 15, 30):
        assert broken_off(out, lambda child: child.kill(), after) == -signal.SIGKILL
    assert broken_off(out, lambda child: child.send_signal(signal.SIGINT), 45) == -signal.SIGINT
    process = Counting()
    summary = process_to_folder(inputs, process, out, settings=SETTINGS, formats=["csv", "text"], jobs=3)
    assert 45 <= summary.skipped < 72
    assert len(process.names) == 72 - summary.skipped
    counts = f"{72 - summary.skipped} tagged, 0 failed, {summary.skipped} done before"
    assert str(summary) == f"72 files: {counts}"
    process_to_folder(inputs, loudness, Path("whole"), settings=SETTINGS, formats=["csv", "text"])
    assert contents(tree / out) == contents(tree / "whole")


def test_a_summary_without_time() -> None:
    summary = str(Summary(2, 0, 0, 2, 0.0, 0.0))
    assert summary == "2 files: 0 tagged, 0 failed, 2 done before"


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
def test_outputs_stay_within_their_folder(tree: Path) -> None:
    outside = tree / "outside"
    outside.mkdir()
    kept = outside / "06.wav.csv"
    kept.write_text("kept")
    Path("out").mkdir()
    Path("out/0").symlink_to(outside)
    inputs = find_inputs(["in"])
    with pytest.raises(WriteError, match=r"out/0: it is a link"):
        process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS, formats=["csv"])
    assert contents(outside) == {"06.wav.csv": b"kept"}
    Path("out/0").unlink()
    Path("out/0").mkdir()
    for name in ("00.wav.csv.partial", "00.wav.csv", "03.wav.csv.0123abcd.partial"):
        Path("out/0", name).symlink_to(kept)
    process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS, formats=["csv"])
    assert kept.read_text() == "kept"
    assert "0.wav" in Path("out/0/00.wav.csv").read_text()
    assert not list(Path("out").rglob("*.0123abcd.partial"))  # as a killed run leaves them


@pytest.mark.skipif(os.name == "nt", reason="links as POSIX has them")
@pytest.mark.parametrize("name", ["journal.jsonl", "errors.jsonl", ".journal.jsonl.lock"])
def test_records_of_a_run_are_not_written_through_links(tree: Path, name: str) -> None:
    outside = tree / "outside"
    outside.write_text("kept")
    Path("out").mkdir()
    Path("out", name).symlink_to(outside)
    Path("in/empty.wav").touch()
    with suppress(WriteError, BusyError):
        process_to_folder(find_inputs(["in"]), loudness, Path("out"), settings=SETTINGS)
    assert outside.read_text() == "kept"


def test_a_full_disk_is_one_error_that_names_the_file(tree: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    out.mkdir()
    (small_disk / "filler").write_bytes(bytes(56 << 10))
    inputs = find_inputs(["in"])
    with pytest.raises(WriteError, match="No space left on device"):
        process_to_folder(inputs, loudness, out, settings={**SETTINGS, "long": "x" * 4000}, formats=["jsonl", "csv"])
    (small_disk / "filler").unlink()
    summary = process_to_folder(
        inputs, loudness, out, settings={**SETTINGS, "long": "x" * 4000}, formats=["jsonl"], combined=True
    )
    assert (summary.failed, summary.files) == (0, 12)
    process_to_folder(inputs, loudness, tree / "unbroken", settings=SETTINGS, formats=["jsonl"], combined=True)
    assert (out / "tags.jsonl").read_bytes() == (tree / "unbroken/tags.jsonl").read_bytes()


RECORD: dict[str, Any] = {"format": 1, "file": "in", "model": "m", "seconds": 1.0, "pieces": []}
PIECE = {"start": 0.0, "end": 1.0, "tags": [{"label": "a", "index": 0, "mid": None, "prob": 0.5}]}


BAD_PLACES: list[object] = ["/tmp/elsewhere", "../elsewhere", "", 5, None]


def damaged_lines() -> list[str]:
    """Return lines that a damaged or hostile journal may have, about the sound `in/0/00.wav`."""
    good = {"name": "in/0/00.wav", "place": "0/00.wav", "stamp": None, "record": RECORD}
    wrong: list[object] = [
        *([], 1, None, "x", {}),
        *({**good, "name": {}}, {**good, "place": []}, {**good, "stamp": "xy"}, {**good, "stamp": [1]}),
    ]
    places: list[object] = [*BAD_PLACES, "a/../b", "a//b", "./a", ".", "a\0", "\ud800"]
    wrong += [*({**good, "place": place} for place in places), {**good, "name": ""}]
    records: list[object] = [None, [], "x", 1, {}, {**RECORD, "format": 2}]
    wrong += [{**good, "record": record} for record in records]
    changes: list[tuple[str, object]] = [("file", 1), ("seconds", "x"), ("pieces", 1), ("pieces", [1]), ("kind", "x")]
    changes += [("rate", "x"), ("began", "yesterday"), ("pieces", [{**PIECE, "start": "x"}])]
    changes += [("pieces", [{**PIECE, "tags": [1]}]), ("pieces", [{**PIECE, "tags": [{"label": "a"}]}])]
    wrong += [{**good, "record": {**RECORD, key: changed}} for key, changed in changes]
    deep = "[" * 100_000 + "]" * 100_000
    return [*map(json.dumps, wrong), deep, json.dumps(good).replace('"m"', deep), "{", "\x00", json.dumps(good)[:-5]]


@pytest.mark.parametrize("line", damaged_lines(), ids=lambda line: line[:60])
def test_a_damaged_journal_is_one_error(tree: Path, line: str) -> None:
    """With the stamp of the file, so that its record is used, where the line has one to replace."""
    status = os.stat("in/0/00.wav")
    line = line.replace('"stamp": null', f'"stamp": [{status.st_size}, {status.st_mtime_ns}]')
    Path("out").mkdir()
    first = json.dumps({"format": 1, "settings": {**SETTINGS, "record format": 1}})
    Path("out/journal.jsonl").write_text(f"{first}\n{line}\n")
    inputs = [InputSound("in/0/00.wav", "in/0/00.wav", "0/00.wav")]
    with pytest.raises(StoreError, match=r"line 2 of out/journal\.jsonl is not a line of a journal") as raised:
        process_to_folder(inputs, loudness, Path("out"), settings=SETTINGS, formats=["csv"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"format": 1, "settings": []}', '{"format": [], "settings": {}}', "[]"]
)
def test_a_journal_with_a_damaged_first_line_is_one_error(tree: Path, line: str) -> None:
    Path("out").mkdir()
    Path("out/journal.jsonl").write_text(f"{line}\n")
    with pytest.raises(StoreError, match=r"journal\.jsonl"):
        process_to_folder(find_inputs(["in"]), loudness, Path("out"), settings=SETTINGS)
