"""A newcomer reads each walk in few files: `scripts/walks.py` runs the commands and counts the files they enter."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_FILES = {"tag": 14, "store": 24, "train": 29}


def test_each_walk_enters_few_files() -> None:
    # A process of its own: in this one a coverage run has the profiler, and caches are warm.
    command = [sys.executable, "-m", "scripts.walks", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    walks = json.loads(run.stdout)
    print(json.dumps(walks, indent=1))
    assert {walk: len(files) for walk, files in walks.items() if len(files) > MOST_FILES[walk]} == {}
    assert set(walks) == set(MOST_FILES)
