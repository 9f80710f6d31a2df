"""`ced tag` on long sounds: windows as they come, runs that are interrupted or killed, and scores that are kept."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import soundfile

from ced.tag.records import Record

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

RATE = 16_000
SECONDS = 300
SLOW = """
import sys, time
import ced.cli.console, ced.tag.scores
from ced.model.runtime import OnnxModel
ced.tag.scores._FLUSH_SECONDS = ced.cli.console.LINE_SECONDS = 0.5
score = OnnxModel.__call__
def slowly(self, waves):
    time.sleep(0.05)
    return score(self, waves)
OnnxModel.__call__ = slowly
ced.cli.main()
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five minutes of noise that comes and goes, in two channels."""
    path = tmp_path_factory.mktemp("sounds") / "long.wav"
    rng = np.random.default_rng(0)
    loud = np.repeat(rng.choice([0.001, 0.03, 0.3], SECONDS), RATE)
    noise = rng.standard_normal(SECONDS * RATE) * loud
    soundfile.write(path, np.stack([noise, noise[::-1]], axis=1).clip(-1, 1), RATE)
    return path


def start(place: Path, *words: str | Path, slow: bool = True, errors: IO[bytes] | int = subprocess.PIPE) -> "Process":
    """Start `ced tag -m esc10`, with a model that takes its time."""
    program = ["-c", SLOW] if slow else ["-m", "ced"]
    model = [] if "--from" in words else ["-m", "esc10"]
    command = [sys.executable, *program, "tag", *model, "-j", "2", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=errors, bufsize=0)


Process = subprocess.Popen[bytes]


def finished(place: Path, *words: str | Path, code: int = 0) -> str:
    """Run `ced tag -m esc10` to its end."""
    process = start(place, *words, slow=False)
    out, err = process.communicate(timeout=120)
    assert b"Traceback" not in err
    assert process.returncode == code, err.decode()
    return out.decode()


@pytest.mark.parametrize("kind", ["text", "csv", "jsonl", "audacity", "raven"])
def test_windows_are_printed_at_once_and_stay_after_ctrl_c(long: Path, tmp_path: Path, kind: str) -> None:
    whole = finished(tmp_path, long, "-c", "2", "-f", kind, "-k", "1")
    process = start(tmp_path, long, "-c", "2", "-f", kind, "-k", "1")
    assert process.stdout is not None
    out = b""
    while len(out) < 500:  # far less than all, and long before the end
        read = process.stdout.read(500)
        assert read, process.communicate()[1].decode()
        out += read
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    out += rest
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "ced: interrupted"
    assert len(out) < len(whole) / 2
    if kind == "jsonl":
        record, complete = Record.from_json(json.loads(out)), Record.from_json(json.loads(whole))
        assert (record.complete, complete.complete) == (False, True)
        assert record.pieces == complete.pieces[: len(record)]
        assert record.seconds >= record[-1].end
    else:
        assert whole.startswith(out.decode())
        assert out.endswith(b"\n")


def test_progress_is_in_seconds_of_sound(long: Path, tmp_path: Path) -> None:
    with (tmp_path / "err").open("wb") as errors:
        process = start(tmp_path, long, "-c", "2", "-o", "out", errors=errors)
        process.communicate(timeout=120)
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines
    done = [int(line.split()[2]) for line in lines if line.startswith("tagging, seconds: ")]
    assert len(done) == len(lines)
    assert done == sorted(done)
    assert 0 < done[0] < SECONDS
    assert f" of {SECONDS}, 0." in lines[0]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("words", [["-f", "csv", "-f", "jsonl"], ["--events", "-f", "csv", "--keep-scores"]])
def test_a_run_resumes_within_a_sound(long: Path, tmp_path: Path, words: list[str], stop: signal.Signals) -> None:
    words = [str(long), "-c", "2", "--hop", "1", *words]
    finished(tmp_path, *words, "-o", "whole")
    process = start(tmp_path, *words, "-o", "out")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if [path for path in (tmp_path / "out" / ".unfinished").glob("*") if path.stat().st_size > 2_000]:
            break
    process.send_signal(stop)
    process.communicate(timeout=30)
    assert process.returncode in (-stop, 130)
    counting = SLOW.replace("time.sleep(0.05)", "print('scored', file=sys.stderr)")
    again = subprocess.run(
        [sys.executable, "-c", counting, "tag", "-m", "esc10", "-j", "2", *words, "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
        timeout=120,
    )
    scored = again.stderr.count(b"scored")
    assert 0 < scored < SECONDS - 20  # the others are those of the first run
    names = files(tmp_path / "whole")
    assert names == files(tmp_path / "out")
    for name in names - {"long.wav.scores"}:  # whose chunks may be others
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_tags_are_made_again_from_kept_scores(long: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.flac"
    soundfile.write(short, np.random.default_rng(1).uniform(-0.3, 0.3, 5 * RATE), RATE)
    finished(tmp_path, long, short, "-c", "2", "-o", "kept", "--keep-scores", "-f", "jsonl")
    assert len(list((tmp_path / "kept").rglob("*.scores"))) == 2
    # The same options give the same tags, as scores were rounded before tags were made of them.
    records = [json.loads(line) for line in finished(tmp_path, "--from", "kept", "-f", "jsonl").splitlines()]
    written = [json.loads(path.read_text()) for path in (tmp_path / "kept").rglob("*.*.jsonl")]
    assert len(records) == len(written) == 2
    assert all(record in written for record in records)
    size = sum(path.stat().st_size for path in (tmp_path / "kept").rglob("*.scores"))
    assert size < (SECONDS / 2 + 3) * (10 * 2 + 25) + 1_500

    options = ["--events", "--threshold", "0.3", "--labels", "Rain", "--gap", "2", "-f", "csv"]
    assert finished(tmp_path, "--from", "kept", *options, "-o", "again").startswith("2 files: 2 tagged, 0 failed")
    finished(tmp_path, long, short, "-c", "2", *options, "-o", "direct")
    for name in [path.relative_to(tmp_path / "direct") for path in (tmp_path / "direct").rglob("*.csv")]:
        made, direct = (list(csv.DictReader((tmp_path / out / name).open())) for out in ("again", "direct"))
        assert len(made) == len(direct)
        for one, other in zip(made, direct, strict=True):
            assert (one["start"], one["end"], one["label"]) == (other["start"], other["end"], other["label"])
            assert float(one["prob"]) == pytest.approx(float(other["prob"]), abs=4e-4)

    next((tmp_path / "kept").rglob("short.flac.scores")).unlink()
    process = start(tmp_path, "--from", "kept", slow=False)
    _, err = process.communicate()
    assert process.returncode == 1
    assert "short.flac" in err.decode()
    assert "cannot read the scores" in err.decode()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--from", "kept", "a.wav"], "leave out a.wav"),
        (["--from", "kept", "-c", "3"], "window is fixed"),
        (["--from", "kept", "--channel", "each"], "channel is fixed"),
        (["--from", "kept", "-m", "ced_mini"], "model is fixed"),
        (["--from", "kept", "-o", "kept"], "another folder"),
        (["--from", "plain"], "--keep-scores"),
        (["--from", "nowhere"], "nowhere/journal.jsonl"),
        (["--keep-scores", "a.wav"], "--out"),
        (["--clips", "clips", "a.wav"], "--events"),
        (["--clips", "clips", "--events", "-"], "second reading, which <stdin> does not allow"),
    ],
)
def test_invalid_uses_of_from_are_one_line(tmp_path: Path, words: list[str], part: str) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    finished(tmp_path, "a.wav", "-o", "kept", "--keep-scores")
    finished(tmp_path, "a.wav", "-o", "plain")
    process = start(tmp_path, *words, slow=False)
    out, err = process.communicate()
    assert (process.returncode, out) == (1, b"")
    (line,) = err.decode().splitlines()
    assert part in line
    assert not (tmp_path / "nowhere").exists()


def test_events_are_written_as_clips(long: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [long, "-c", "2", "--events", "--threshold", "0.6", "-f", "csv"]
    printed = list(csv.DictReader(finished(tmp_path, *words, "--clips", "one").splitlines()))
    finished(tmp_path, *words, "--clips", "two", "-o", "out")
    assert len(printed) > 1
    for folder in ("one", "two"):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert names == sorted(
            f"long.wav {float(row['start']):08.3f}-{float(row['end']):08.3f} {row['label']}.flac" for row in printed
        )
    samples, rate = soundfile.read(tmp_path / "one" / names[0], dtype="int16")
    start, end = (round(float(printed[0][name]) * RATE) for name in ("start", "end"))
    expected, _ = soundfile.read(long, start=start, stop=end, dtype="int16")
    assert rate == RATE
    np.testing.assert_array_equal(samples, expected)


def test_each_channel_is_tagged_on_its_own(long: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in finished(tmp_path, long, "--channel", "each", "-f", "jsonl").splitlines()]
    assert [record["channel"] for record in records] == [1, 2]
    for name, record in zip(("left", "right"), records, strict=True):
        one = json.loads(finished(tmp_path, long, "--channel", name, "-f", "jsonl"))
        assert (one["channel"], one["pieces"]) == (name, record["pieces"])
    assert records[0]["pieces"] != records[1]["pieces"]
    finished(tmp_path, long, "--channel", "each", "-f", "csv", "-o", "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"journal.jsonl", "long.wav.channel1.csv", "long.wav.channel2.csv"}
    assert "2 done before" in finished(tmp_path, long, "--channel", "each", "-f", "csv", "-o", "out")
    assert "there is no channel 3" in run_error(tmp_path, long, "--channel", "3")


def test_the_readable_part_of_a_truncated_file_is_tagged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-0.5, 0.5, 20 * RATE), RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    record = json.loads(finished(tmp_path, "cut.flac", "-f", "jsonl", code=1))
    assert (record["complete"], record["expected_seconds"]) == (False, 20.0)
    assert 9 < record["seconds"] < 10
    for _ in range(2):  # when it is done before, too
        assert "1 truncated" in finished(tmp_path, "cut.flac", "-o", "out", code=1)
    error = run_error(tmp_path, "cut.flac", "--strict")
    assert "cut.flac: cut short" in error


def run_error(place: Path, *words: str | Path) -> str:
    process = start(place, *words, slow=False)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    (line,) = err.decode().splitlines()
    return line
