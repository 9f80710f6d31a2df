"""The results as a page: a table, a plot, and every single number beside them."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.esc10.judge import Verdict
from ced.files import written_aside


class Results:
    """All verdicts so far, in a file that is rewritten with each new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.verdicts: list[Verdict] = []
        if path.exists():
            self.verdicts = [Verdict(**row) for row in json.loads(path.read_text(encoding="utf-8"))]

    def has(self, arm: str, fold: int, seed: int) -> bool:
        """Say whether a network has been judged."""
        return any((one.arm, one.fold, one.seed) == (arm, fold, seed) for one in self.verdicts)

    def add(self, verdict: Verdict) -> None:
        """Take up a verdict, and write all."""
        self.verdicts = sorted([*self.verdicts, verdict], key=lambda one: (one.arm, one.seed, one.fold))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(self.path) as path:
            path.write_text(json.dumps([asdict(one) for one in self.verdicts], indent=1) + "\n", encoding="utf-8")


def write(results: Results, out: Path) -> None:
    """Write the page."""
