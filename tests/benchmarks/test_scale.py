from pathlib import Path

import pytest

from benchmarks import scale


@pytest.mark.parametrize("part", scale.PARTS)
def test_each_part_measures_its_steps(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def measured(prepare: object, *arguments: object) -> scale.Cost:
        """Do the work here: starting a process for each step would take longer than the steps."""
        assert callable(prepare)
        prepare(*arguments)()
        steps.append(getattr(prepare, "__name__", ""))
        return scale.Cost(0.0, 0.0, 0.0)

    monkeypatch.setattr(scale, "measured", measured)
    monkeypatch.setattr(scale, "PER_FILE", 40)
    rows = list(scale.PARTS[part](tmp_path, 100))
    assert len(rows) == len(steps) >= 3
    if part == "table":
        assert len(list((tmp_path / "hdf5").iterdir())) == 3
        assert len((tmp_path / "labels" / "large.tsv").read_text().splitlines()) == 101


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_step_is_measured_in_a_process_of_its_own() -> None:
    cost = scale.measured(scale.prepare_cutting, 1_000_000)
    assert 0 < cost.processor < 60
    assert 20 < cost.memory < 500
