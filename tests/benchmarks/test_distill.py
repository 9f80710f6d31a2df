from pathlib import Path

import pytest

from benchmarks import distill
from ced.distill.pack_writer import pack


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
def test_reading_is_measured_with_a_cold_and_a_warm_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "SECONDS", 1)
    monkeypatch.setattr(distill, "training_step", lambda *_, **__: lambda: 10.0)
    table = pack(distill.make_sounds(tmp_path / "sounds", 40), tmp_path / "pack", workers=1).index
    distill.print_reading(table, 1, [500])
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| the loader")]
    assert [row[1:3] for row in rows] == [
        ["cold", "in order"],
        ["cold", "shuffled"],
        ["cold", "shuffled"],
        ["warm", "shuffled"],
    ]
    assert rows[-1][-1] == "0"  # nothing from the disk
    for row in rows:
        # Both are rounded.
        assert float(row[3].replace(",", "")) == pytest.approx(float(row[4].replace(",", "")) * 0.032, abs=1)
    assert "| ced_base on this processor, float32 | 10 | 0.32 |" in printed
    assert "| a GPU that trains on 500 clips/s | 500 | 16 |" in printed
