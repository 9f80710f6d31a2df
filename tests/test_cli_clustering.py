"""`ced tag --ray` and `ced embed --ray`: what is refused before a cluster is asked, and clusters that do not answer."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOUNDS = str(ROOT / "resources")


def ced(*words: str) -> tuple[int, str]:
    """Run a command; return its exit code and what it wrote on standard error."""
    done = subprocess.run([sys.executable, "-m", "ced", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("address", "part"),
    [("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"), ("cluster", "cluster; it must be auto, HOST:PORT")],
)
def test_an_address_without_a_cluster_is_an_error(tmp_path: Path, address: str, part: str) -> None:
    code, errors = ced("tag", "-m", "esc10", SOUNDS, "--ray", address, "--out", str(tmp_path / "out"))
    assert code == 1
    assert part in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["tag"], "--out"),
        (["tag", "--out", "a", "--combine"], "--combine"),
        (["tag", "--out", "a", "-f", "csv"], "--format csv"),
        (["tag", "--out", "a", "--keep-scores"], "--keep-scores"),
        (["tag", "--out", "a", "--events", "--clips", "b"], "--clips"),
        (["tag", "--out", "a", "--jobs", "77"], "--workers"),
        (["tag", "--out", "hf://datasets/me/tags"], "hf upload"),
        (["embed", "--out", "a.npy"], "a.npy"),
        (["embed", "--out", "s3://bucket/a.parquet"], "a.parquet"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: Sequence[str], part: str) -> None:
    code, errors = ced(words[0], SOUNDS, "-m", "esc10", "--ray", "auto", *words[1:])
    assert code == 1
    assert part in errors
    assert "Traceback" not in errors
