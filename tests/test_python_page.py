"""The Python examples of three pages, run in order; their output is compared with the page."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+\.\d+")


@pytest.mark.parametrize("name", ["python.md", "panns.md", "cloud.md"])
def test_the_examples_print_the_output_of_the_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resources").symlink_to(ROOT / "resources")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", page, re.M | re.S)
    assert len(examples) == page.count("```python")
    names: dict[str, Any] = {}
    for code, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        shown = printed.getvalue()
        assert NUMBER.sub("#", shown) == NUMBER.sub("#", expected)
        # Another processor may round the last digit another way.
        assert list(map(float, NUMBER.findall(shown))) == pytest.approx(
            list(map(float, NUMBER.findall(expected))), abs=0.015
        )
