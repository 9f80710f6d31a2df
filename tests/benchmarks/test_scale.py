import json
import sys
from pathlib import Path

import pytest
import soundfile

from benchmarks.scale import __main__ as scale
from benchmarks.scale import costs, estimate, packs, report, results, sounds
from benchmarks.scale.costs import Cost
from benchmarks.scale.results import Part, Results, Row
from ced.sound.audio import SAMPLE_RATE
from ced.tag.batch import JOURNAL_NAME

DOCS = Path(__file__).parents[2] / "docs"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def work_here(prepare: object, *arguments: object) -> Cost:
    """Do the work in this process: starting one for each step would take longer than the steps."""
    assert callable(prepare)
    prepare(*arguments)()
    return Cost(0.5, 0.25, 10.0)


@pytest.mark.parametrize("part", ["table", "store"])
def test_packs_and_stores_are_measured_step_by_step(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "of_work", work_here)
    monkeypatch.setattr(packs, "PER_FILE", 40)
    rows = list(scale.measure(part, 100, tmp_path, [], "", 1))
    assert len({row.work for row in rows}) == len(rows) >= 3
    assert {row.size for row in rows} == {100}
    if part == "table":
        assert len(list((tmp_path / "hdf5").iterdir())) == 3
        assert len((tmp_path / "labels" / "large.tsv").read_text().splitlines()) == 101


@needs_linux
def test_work_is_measured_in_a_process_of_its_own() -> None:
    cost = costs.of_work(packs.prepare_cutting, 1_000_000)
    assert 0 < cost.processor < 60
    assert cost.memory is not None
    assert 20 < cost.memory < 500


@needs_linux
def test_the_command_of_short_files_and_its_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds, "DIFFERENT", 3)
    for page in (report.PAGE, report.PERFORMANCE):
        (tmp_path / page).write_bytes((DOCS / page).read_bytes())
    scale.main(["files", "--sizes", "7", "--out", str(tmp_path), "--work", str(tmp_path)])
    part = results.read(tmp_path / results.JSON).parts["files"]
    assert [row.work for row in part.rows] == [sounds.TAG, sounds.RESUME, *sounds.COMBINED.values()]
    tag = part.largest(sounds.TAG)
    assert tag.size == 7
    assert 7 * 100 < (tag.bytes or 0) < 7 * 3000
    assert 20 < (tag.memory or 0) < 1000
    assert tag.processor > 0
    page = (tmp_path / report.PAGE).read_text()
    assert f"| 7 | {1000 * tag.seconds / 7:.2f} |" in page
    assert "<svg" in (tmp_path / report.PLOT).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [report.PAGE, report.PERFORMANCE, results.JSON, report.PLOT]
    )


def test_a_long_file_is_tagged_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def of_command(command: list[str | Path]) -> Cost:
        commands.append([str(word) for word in command])
        out = Path(commands[-1][commands[-1].index("--out") + 1])
        out.mkdir()
        (out / JOURNAL_NAME).write_text("tags")
        return Cost(1.0, 1.0, 90.0)

    monkeypatch.setattr(sounds, "of_work", work_here)
    monkeypatch.setattr(sounds, "of_command", of_command)
    monkeypatch.setattr(sounds, "OPUS_HOURS", 0.001)
    rows = list(sounds.hours_part(tmp_path, 0.01, sounds.generated_sounds(), "esc10"))
    assert [(row.work, row.size) for row in rows] == [(sounds.TAG, 0.01), (sounds.DECODE, 0.01), (sounds.OPUS, 0.001)]
    assert commands[0][-1].endswith("long.flac")
    assert soundfile.info(tmp_path / "long.flac").frames == 36 * SAMPLE_RATE
    opus = soundfile.info(tmp_path / "long.ogg")
    assert (opus.samplerate, opus.channels, opus.subtype) == (48_000, 2, "OPUS")
    assert opus.duration == pytest.approx(3.6, abs=0.1)


def test_the_sides_of_a_cluster_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def of_processes(command: list[str | Path]) -> Cost:
        text = " ".join(map(str, command))
        ran.append(text)
        workers, count = 1 + ("2 --format" in text or "--workers 2" in text), 40 if text.endswith("40") else 16
        start, each = (10.0, 0.011) if "--ray" in text else (1.0, 0.01)
        return Cost(start + count * each / workers, count * each, None)

    monkeypatch.setattr(sounds, "of_processes", of_processes)
    part = Part("a machine", "2026-01-01", 0.0, "")
    part.rows = list(sounds.ray_part(tmp_path, 40, sounds.generated_sounds(), "model.onnx", 2))
    assert len(ran) == 2 * 4 * 2
    assert len(list((tmp_path / "40").rglob("*.wav"))) == 40
    assert estimate.gain(part) == pytest.approx(2.0, abs=0.05)
    assert estimate.overheads(part) == {1: pytest.approx(0.1, abs=0.01), 2: pytest.approx(0.1, abs=0.05)}
    assert "2.0" in report.page(Results(parts={"ray": part}), (DOCS / "scale.md").read_text(), DOCS / "performance.md")


@needs_linux
def test_processes_of_a_command_count() -> None:
    burn = "import time\nwhile time.process_time() < 0.6: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    cost = costs.of_processes([sys.executable, "-c", code])
    assert 0.5 < cost.processor < 30
    with pytest.raises(SystemExit, match="failed"):
        costs.of_command([sys.executable, "-c", "raise SystemExit(3)"])


def test_measurements_replace_those_of_the_same_size() -> None:
    found = Results()
    for load, rows in ((1.0, [Row("tag", 1, 9, 9), Row("tag", 2, 9, 9)]), (2.0, [Row("tag", 2, 5, 5)])):
        found.add("files", Part("a machine", "2026-01-01", load, "x"), rows)
    assert [row.seconds for row in found.parts["files"].of("tag")] == [9, 5]
    found.add("files", Part("another machine", "2026-01-01", 0.0, "x"), [Row("tag", 2, 1, 1)])
    assert [row.seconds for row in found.parts["files"].of("tag")] == [1]


def everything() -> Results:
    """Return results with figures that are easy to follow."""
    found = Results()
    found.add("files", Part("m", "d", 0, ""), [Row(sounds.TAG, 1000, 1, 1, 90, 600_000)])
    long = [
        Row(sounds.TAG, 10, 20, 40, 90, 720_000),
        Row(sounds.DECODE, 10, 10, 10, 5, 600_000_000),
        Row(sounds.OPUS, 0.1, 2, 1, 5, 5_000_000),
    ]
    found.add("hours", Part("m", "d", 0, ""), long)
    sides = [(name, workers, 0.0) for workers, name in sounds.PLAIN.items()]
    sides += [(name, workers, 0.1) for workers, name in sounds.RAY.items()]
    rows = [
        Row(name, count, 1 + count * (1 + more) / workers, count * (1 + more))
        for name, workers, more in sides
        for count in (16, 1016)
    ]
    found.add("ray", Part("m", "d", 0, ""), rows)
    return found


def test_the_extrapolation_follows_from_measurements_and_prices(tmp_path: Path) -> None:
    performance = tmp_path / "performance.md"
    header = "| model | clip | plain PyTorch | ONNX graph |\n|---|---|---|---|\n"
    lines = "".join(f"| {size} | 10 s | 99 | 36.0 (1.2) |\n" for size in estimate.SIZES)
    performance.write_text(f"{header}{lines}\n\n{header}{lines.replace('36.0', '72.0')}")
    tiny = next(estimate.computing(everything(), performance))
    # 2.1e6 files * 1 ms, 5833 h * 10 s, 2.1e6 windows * 36 or 72 ms, each with 10 %, in hours: 18.5 and 23.1 or 46.2
    assert tiny[:3] == ["AudioSet", "`ced_tiny`", "42 to 65"]
    assert tiny[4] == "2.1 to 3.2"
    assert tiny[5:] == ["1.2 (decoding)", "3.5"]
    rows = list(estimate.storing(everything()))
    assert rows[0] == ["AudioSet", "FLAC, 16 kHz, mono", "350", "8.1", "32"]
    # 600 bytes a file with a window, 200 for each further window
    assert [row[2] for row in rows if row[1].startswith("tags")] == ["1.3", "72"]


def test_the_page_equals_its_results() -> None:
    text = (DOCS / report.PAGE).read_text(encoding="utf-8")
    found = results.read(DOCS / results.JSON)
    assert report.page(found, text, DOCS / report.PERFORMANCE) == text
    assert len(estimate.model_times(DOCS / report.PERFORMANCE)) == 2
    changed = report.page(everything(), text, DOCS / report.PERFORMANCE)
    assert changed != text
    assert report.page(found, changed, DOCS / report.PERFORMANCE) == text
    if set(found.parts) & {"files", "hours", "table", "store"}:
        assert (DOCS / report.PLOT).exists()
    assert json.loads((DOCS / results.JSON).read_text())["prices"]["date"]
