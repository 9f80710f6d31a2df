"""The three walks: a real run of each enters few files, and calls the functions that docs/design.md draws, in order."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.walks import files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MOST_FILES = {"tag": 18, "store": 24, "train": 29}


@pytest.fixture(scope="module")
def walks() -> dict[str, list[str]]:
    """The functions that each walk calls, in the order of the first call."""
    # A process of its own: in this one a coverage run has the profiler, and caches are warm.
    command = [sys.executable, "-m", "scripts.walks", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(run.stdout)
    return found


def drawn(walk: str) -> list[str]:
    """Return the functions in the drawing of a walk in docs/design.md."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^### \d\. {walk.title()}\b.*?^```text\n(.*?)^```$", page, re.M | re.S)
    return [f"{file}:{name}" for file, name in re.findall(r"^ *([\w/]+\.py) +([\w.]+)", block, re.M)]


def test_each_walk_enters_few_files(walks: dict[str, list[str]]) -> None:
    entered = {walk: files(functions) for walk, functions in walks.items()}
    print(json.dumps(entered, indent=1))
    assert {walk: len(names) for walk, names in entered.items() if len(names) > MOST_FILES[walk]} == {}
    assert set(walks) == set(MOST_FILES)


@pytest.mark.parametrize("walk", MOST_FILES)
def test_the_drawn_functions_are_called_in_the_drawn_order(walks: dict[str, list[str]], walk: str) -> None:
    functions = drawn(walk)
    assert len(functions) > 4
    assert [name for name in functions if name not in walks[walk]] == []
    assert sorted(functions, key=walks[walk].index) == functions
