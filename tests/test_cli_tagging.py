"""`ced tag` and `ced embed` as a user meets them, on a small graph."""

import csv
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from ced.tag.tagger import Tagger

ROOT = Path(__file__).parents[1]
RATE = 16_000


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight sounds of several kinds, rates and lengths in a tree, which is the working directory's."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(8):
        rate, suffix = (RATE, 44_100, 8_000)[number % 3], ("wav", "flac", "ogg")[number % 3]
        path = tmp_path / "in" / ("a" if number < 4 else "b") / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, ((number + 1) * rate // 2, 1 + number % 2)), rate)
    return Path("in")


def ced(*words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run `ced`; it must not show a traceback."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1"}
    command = [sys.executable, "-m", "ced", *words]
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, check=False)
    assert b"Traceback" not in done.stderr
    return done


def said(done: subprocess.CompletedProcess[bytes], code: int = 0) -> str:
    """Return what was printed by a command with this exit code."""
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode()


def test_one_file_and_many_and_any_number_of_jobs_give_the_same(graph: Path, sounds: Path) -> None:
    words = ["tag", "-m", str(graph), "-c", "0.8", "--hop", "0.4", "-f", "jsonl"]
    together = said(ced(*words, "-j", "3", sounds)).splitlines()
    assert said(ced(*words, "-j", "1", "in/**/*.*")).splitlines() == together
    listed = "\n".join(json.loads(line)["file"] for line in together)
    assert said(ced(*words, "@-", stdin=listed.encode())).splitlines() == together
    assert [said(ced(*words, name)).rstrip("\n") for name in listed.splitlines()[:2]] == together[:2]
    record = json.loads(together[0])
    assert record["format"] == 1
    assert record["model"] == str(graph)
    expected = list(Tagger(graph).tag(record["file"], window=0.8, hop=0.4))
    assert [(piece["start"], piece["end"]) for piece in record["pieces"]] == [(t.start, t.end) for t in expected]
    assert [tag["prob"] for tag in record["pieces"][0]["tags"]] == [tag.prob for tag in expected[0].tags]


def test_a_sound_on_standard_input(graph: Path, sounds: Path) -> None:
    whole = said(ced("tag", "-m", graph, "in/a/0.wav", "-f", "csv"))
    piped = said(ced("tag", "-m", graph, "-", "-f", "csv", stdin=Path("in/a/0.wav").read_bytes()))
    assert piped == whole.replace("in/a/0.wav", "<stdin>")
    words = ["tag", "-m", str(graph), "-", "--events", "--threshold", "0.1", "--clips", "clips"]
    assert "<stdin> does not allow" in ced(*words, stdin=b"RIFF").stderr.decode()
    said(ced(*words, "--channel", "each", stdin=Path("in/a/1.flac").read_bytes()))  # kept for its channels, and clips
    assert {path.name.partition(" ")[0] for path in Path("clips").iterdir()} == {"stdin.channel1", "stdin.channel2"}


def test_outputs_in_a_tree_and_combined(graph: Path, sounds: Path) -> None:
    words = ["tag", "-m", str(graph), str(sounds), "-c", "1"]
    kinds = ["text", "jsonl", "csv", "audacity", "raven", "parquet"]
    done = ced(*words, "-o", "tree", *(word for kind in kinds for word in ("-f", kind)))
    assert said(done).startswith("8 files: 8 tagged, 0 failed; 0.01 h of sound")
    found = {str(path.relative_to("tree")) for path in Path("tree").rglob("0.wav.*")}
    suffixes = ("txt", "jsonl", "csv", "labels.txt", "selections.txt", "parquet")
    assert found == {f"a/0.wav.{suffix}" for suffix in suffixes}
    said(ced(*words, "-o", "one", "--combine", "-f", "csv", "-f", "parquet"))
    with open("one/tags.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "start", "end", "label", "mid", "prob"]
    assert len(rows) == pq.read_table("one/tags.parquet").num_rows == 3 * sum(-(-n // 2) for n in range(1, 9))
    assert said(ced(*words, "-f", "csv")) == Path("one/tags.csv").read_text()


def test_a_run_resumes_and_refuses_other_settings(graph: Path, sounds: Path) -> None:
    words = ["tag", "-m", str(graph), str(sounds), "-o", "out", "-f", "csv"]
    Path("in/a/broken.wav").write_bytes(b"RIFF")
    done = ced(*words)
    assert said(done, 1).startswith("9 files: 8 tagged, 1 failed")
    assert "in/a/broken.wav" in done.stderr.decode()
    assert json.loads(Path("out/errors.jsonl").read_text())["file"] == "in/a/broken.wav"
    Path("in/a/broken.wav").unlink()
    assert said(ced(*words)).startswith("8 files: 0 tagged, 0 failed, 8 done before")
    done = ced(*words, "--topk", "1")
    assert said(done, 1) == ""
    assert "top_k 3, now 1" in done.stderr.decode()


def test_outputs_never_belong_to_another_sound(graph: Path, sounds: Path) -> None:
    for folder, source in (("p", "in/a/0.wav"), ("q", "in/a/3.wav")):
        Path(folder).mkdir()
        Path(folder, "a.wav").write_bytes(Path(source).read_bytes())
    words = ["tag", "-m", str(graph), "-o", "out", "-k", "1"]
    said(ced(*words, "p", "-f", "csv", "-f", "jsonl"))
    done = ced(*words, "q", "-f", "csv")
    assert said(done, 1) == ""
    assert "q/a.wav would be written to out/a.wav, where an earlier run wrote p/a.wav" in done.stderr.decode()
    Path("p/a.wav").write_bytes(Path("in/a/3.wav").read_bytes())
    said(ced(*words, "p", "-f", "csv"))
    assert not Path("out/a.wav.jsonl").exists()  # it was of what the file held before
    said(ced(*words, "p", "-f", "jsonl"))
    assert json.loads(Path("out/a.wav.jsonl").read_text())["seconds"] == 2.0


def test_a_journal_of_another_program_is_unchanged(graph: Path, sounds: Path) -> None:
    Path("out").mkdir()
    Path("out/journal.jsonl").write_text("my diary")
    done = ced("tag", "-m", graph, sounds, "-o", "out")
    assert said(done, 1) == ""
    assert "out/journal.jsonl is not a journal" in done.stderr.decode()
    assert Path("out/journal.jsonl").read_text() == "my diary"


def test_thresholds_labels_and_events(graph: Path, sounds: Path) -> None:
    sound = "in/b/7.flac"
    first = Tagger(graph).tag(sound, top_k=1, window=1.0)[0]
    label, prob = first.tags[0].label, first.tags[0].prob
    words = ["tag", "-m", str(graph), sound, "-c", "1", "-f", "csv"]
    lines = said(ced(*words, "--threshold", "0", "--labels", label)).splitlines()[1:]
    assert len(lines) == 4
    assert all(f",{label},," in line for line in lines)
    assert f",{label}," not in said(ced(*words, "--exclude", label))
    assert said(ced(*words, "--threshold", "0.99")).count("\n") == 1
    (event,) = said(ced(*words, "--threshold", str(prob / 2), "--labels", label, "--events")).splitlines()[1:]
    assert event.split(",")[1:4] == ["0.000000", "4.000000", label]
    Path("t.tsv").write_text(f"name\tthreshold\n{label}\tinf\n")
    assert f",{label}," not in said(ced(*words, "--threshold", "t.tsv"))


def test_columns_are_a_timeline_of_sixths_of_a_second(graph: Path, sounds: Path) -> None:
    lines = said(ced("tag", "-m", graph, "in/a/3.wav", "--columns", "-k", "1", "-f", "csv", "-c", "1")).splitlines()[1:]
    assert len(lines) == 2 * 6  # of 2 s, in windows of 101 frames
    assert lines[1].split(",")[1:3] == ["0.160000", "0.320000"]


def test_silence_has_no_tags(graph: Path, sounds: Path) -> None:
    soundfile.write("in/quiet.wav", np.zeros(2 * RATE), RATE)
    words = ["tag", "-m", str(graph), "in/quiet.wav", "-f", "csv"]
    assert said(ced(*words, "--silence", "-60")) == "file,start,end,label,mid,prob\n"
    assert said(ced(*words)).count("\n") == 4


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["-c", "0"], "window is 0.0 s"),
        (["--hop", "-1"], "hop is -1.0 s"),
        (["--hop", "20"], "hop is 20.0 s, window 10.0 s"),
        (["--silence", "3"], "below 0"),
        (["--threshold", "40"], "0 to 1"),
        (["--gap", "1"], "of events"),
        (["--events", "-k", "1"], "top_k 1 does not apply to events"),
        (["--columns", "--hop", "1"], "twice"),
        (["--threshold", "none.tsv"], "none.tsv"),
        (["--threshold", "-1"], "-1"),
        (["--labels", "barc"], "did you mean 'bark'?"),
        (["--rollup"], "mids"),
        (["--events", "--release", "2"], "release is 2.0"),
        (["-f", "xml"], "text, jsonl, csv"),
        (["-f", "csv", "-f", "jsonl"], "--out"),
        (["-f", "parquet"], "folder"),
        (["--combine"], "--out"),
        (["-f", "audacity", "-o", "out", "--combine"], "audacity"),
        (["nowhere/*.wav"], "nowhere/*.wav"),
    ],
)
def test_contradictory_options_are_one_line(graph: Path, sounds: Path, words: list[str], part: str) -> None:
    done = ced("tag", "-m", graph, "in/a/0.wav", *words)
    assert said(done, 1) == ""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("ced: error: ")
    assert part in line


def test_embeddings_of_sounds_and_of_windows(graph: Path, sounds: Path) -> None:
    assert "8 vectors of 8 sounds, 0 failed" in said(ced("embed", "-m", graph, sounds, "-o", "e.npy"))
    assert np.load("e.npy").shape == (8, 32)
    assert "vectors of 8 sounds" in said(ced("embed", "-m", graph, sounds, "-o", "w.parquet", "-c", "1", "--windows"))
    assert pq.read_table("w.parquet").num_rows == sum(-(-n // 2) for n in range(1, 9))
    Path("in/bad.wav").write_bytes(b"")
    assert "0 vectors of 0 sounds, 1 failed" in said(ced("embed", "-m", graph, "in/bad.wav", "-o", "none.npy"), 1)
    assert not Path("none.npy").exists()
    done = ced("embed", "-m", graph, sounds, "-o", "e.npy")
    assert "8 vectors of 8 sounds, 1 failed" in said(done, 1)
    assert "in/bad.wav: empty" in done.stderr.decode()


def test_help_is_grouped() -> None:
    shown = said(ced("tag", "--help"))
    places = [shown.index(f"─ {panel} ─") for panel in ("Input", "Windows", "Selection", "Events", "Output")]
    assert places == sorted(places)
    panels = dict(zip(("Input", "Windows", "Selection", "Events"), pairwise(places), strict=True))
    for panel, option in (
        ("Input", "--precision"),
        ("Windows", "--hop"),
        ("Selection", "--threshold"),
        ("Events", "--gap"),
    ):
        assert option in shown[slice(*panels[panel])]


@pytest.mark.parametrize("model", ["a graph", "esc10"])
def test_tagging_imports_no_torch(graph: Path, sounds: Path, model: str) -> None:
    program = """if True:
        import sys, ced.cli
        try:
            ced.cli.main()
        finally:
            assert not {"torch", "onnx", "pyarrow", "yaml"} & set(sys.modules)
    """
    command = [sys.executable, "-c", program, "tag", "-m", str(graph) if model == "a graph" else model, "in/a/0.wav"]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def kept(graph: Path, sounds: Path) -> Path:
    """A run over one sound that has kept its scores."""
    said(ced("tag", "-m", str(graph), sounds / "a/0.wav", "--out", "kept", "--keep-scores"))
    return Path("kept")


@pytest.mark.parametrize("place", ["{}/elsewhere/x", "../elsewhere/x", "", 5, None])
def test_a_hostile_journal_is_one_line_and_writes_nothing(kept: Path, tmp_path: Path, place: object) -> None:
    journal = kept / "journal.jsonl"
    head, line = journal.read_text().splitlines()
    bad = {**json.loads(line), "place": place.format(tmp_path) if isinstance(place, str) else place}
    journal.write_text(f"{head}\n{json.dumps(bad)}\n")
    before = sorted(tmp_path.rglob("*"))
    for words in ([], ["--out", "again"], ["--events", "--clips", "clips"]):
        done = ced("tag", "--from", kept, *words)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().startswith("ced: error: line 2 of kept/journal.jsonl is not a line of a journal")
    assert sorted(tmp_path.rglob("*")) == before


def test_clips_are_cut_only_out_of_the_sound_that_was_tagged(kept: Path) -> None:
    words: list[str | Path] = ["tag", "--from", kept, "--events", "--threshold", "0", "--clips", "clips"]
    said(ced(*words))
    count = len(list(Path("clips").iterdir()))
    assert count
    soundfile.write("in/a/0.wav", np.zeros(3 * RATE), RATE)
    done = ced(*words)
    assert done.returncode == 1
    assert "in/a/0.wav: it has changed since it was tagged" in done.stderr.decode()
    assert len(list(Path("clips").iterdir())) == count


def test_each_channel_is_named_by_every_output(graph: Path, sounds: Path) -> None:
    words: list[str | Path] = ["-m", graph, "--channel", "each", sounds / "a/1.flac", sounds / "a/0.wav"]
    printed = said(ced("tag", *words)).splitlines()
    headings = [line for line in printed if line.startswith("=")]
    assert headings == [
        "===== in/a/1.flac, channel 1 =====",
        "===== in/a/1.flac, channel 2 =====",
        "===== in/a/0.wav, channel 1 =====",
    ]
    said(ced("tag", *words, "--out", "out", "--combine", "-f", "csv", "--keep-scores"))
    rows = list(csv.DictReader(Path("out/tags.csv").read_text().splitlines()))
    places = list(dict.fromkeys((row["file"], row["channel"]) for row in rows))
    assert places == [("in/a/1.flac", "1"), ("in/a/1.flac", "2"), ("in/a/0.wav", "1")]
    again = said(ced("tag", "--from", "out", "-f", "csv"))
    assert "channel" in again.splitlines()[0]
    timed = said(ced("tag", *words[:-1], "--clock", "2026-01-02T03:04:05Z", "-f", "csv")).splitlines()
    assert [line for line in timed if ",1," in line and "2026-01-02T03:04:05" in line]
    assert [line for line in timed if ",2," in line and "2026-01-02T03:04:05" in line]
    said(ced("embed", *words, "-o", "e.npy"))
    table = Path("e.npy.tsv").read_text().splitlines()
    cells = [line.split("\t") for line in table if not line.startswith("#")][1:]
    assert [(row[0], row[-1]) for row in cells] == places
    for command in (["tag"], ["embed", "-o", "f.npy"]):
        done = ced(*command, "--channel", "x", sounds)
        assert done.returncode == 1
        assert b"mean, left, right, each or a number" in done.stderr


@pytest.mark.parametrize("stem", ["a" * 247, "虫" * 82 + "a"], ids=["ascii", "wide"])
def test_the_longest_names_have_all_outputs(graph: Path, sounds: Path, stem: str) -> None:
    path = Path("in") / f"{stem}.wav"  # 251 bytes
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 2)), RATE)
    kinds = ["text", "jsonl", "csv", "spreadsheet", "audacity", "raven", "parquet"]
    words: list[str | Path] = ["tag", "-m", graph, path, "--channel", "each", "--events", "--threshold", "0"]
    words += [word for kind in kinds for word in ("-f", kind)]
    assert said(ced(*words, "--out", "out", "--keep-scores", "--clips", "clips")).startswith("2 files: 2 tagged")
    outputs = [path.name for path in Path("out").iterdir() if path.name.startswith(stem[:60])]
    assert len(outputs) == 2 * (len(kinds) + 1)
    assert len(list(Path("clips").iterdir())) >= 2
    assert "2 done before" in said(ced(*words, "--out", "out", "--keep-scores", "--clips", "clips"))
    assert said(ced("tag", "--from", "out")).count("=====") == 4


def test_standard_input_may_be_closed(graph: Path, sounds: Path) -> None:
    command = f'exec "{sys.executable}" -m ced tag -m "{graph}" "$0" <&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name, code, error in (("in/a/0.wav", 0, b""), ("-", 1, b"standard input")):
        done = subprocess.run(["sh", "-c", command, name], capture_output=True, env=environment, check=False)
        assert done.returncode == code
        assert error in done.stderr
        assert b"Traceback" not in done.stderr
