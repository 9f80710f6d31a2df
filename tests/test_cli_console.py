"""What the command line prints: safe text whatever files and labels are called, one line for every fault."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ced
from ced.cli import console
from ced.errors import AudioError, ConfigError, WriteError

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b]0;pwned\x07\x9b2J\u202egpj\r\n\tx"
UNSAFE = set(HOSTILE) - set("]0;pwned2Jgpj\tx")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")


def run(*words: str | Path, stdout: Any = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CED_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from ced.cli import main; main()", *map(str, words)]
    done = subprocess.run(command, check=False, env=environment, timeout=120, stdout=stdout, stderr=subprocess.PIPE)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def hints() -> None:
    console._hints.clear()


def test_all_printed_text_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(f"a {HOSTILE}")
    console.show_note(f"b {HOSTILE}")
    console.show_error(f"c {HOSTILE}")
    console.show_error(ConfigError(f"d {HOSTILE}", details=[f"e {HOSTILE}"], hint=f"f {HOSTILE}"))
    lines = console.ProgressLines(clock=iter([0.0, 100.0]).__next__)
    lines(f"g {HOSTILE}", 1, 2, f"h {HOSTILE}")
    out, err = capsys.readouterr()
    assert len((out + err).splitlines()) == 6
    assert not UNSAFE & set((out + err).replace("\n", ""))
    assert r"\x1b]0;pwned\x07\x9b2J\u202egpj\r\n\tx" in out


def test_warnings_of_the_library_are_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ced.test_console")
    handler = console._NoteHandler()
    logger.addHandler(handler)
    logger.warning("%s is odd", f"a{HOSTILE}.wav")
    logger.removeHandler(handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ced: warning: a\\x1b")
    assert line.endswith(".wav is odd")


def test_progress_bars_show_safe_text_and_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=shown, force_terminal=True, width=200))
    bars = console._Bars()
    bars("[red]task[/red] \x1b]0;pwned\x07", 1, 2, "[bold]note[/bold] \x9b2J")
    bars.stop()
    text = shown.getvalue()
    assert r"[red]task[/red] \x1b]0;pwned\x07" in text
    assert r"[bold]note[/bold] \x9b2J" in text
    assert "\x1b]0;pwned" not in text


def test_data_is_exact_in_a_file_and_safe_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"1\t{HOSTILE}\n"
    for kind, expected in ((io.StringIO, line), (Terminal, "1\t\\x1b]0;pwned\\x07\\x9b2J\\u202egpj\\r\\n\tx\n")):
        shown = kind()
        monkeypatch.setattr(sys, "stdout", shown)
        console.show_data(line)
        assert shown.getvalue() == expected


def test_a_hint_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.wav", "b.wav"):
        console.show_error(AudioError("unknown kind", name, hint="readable are WAV"))
    console.show_error(AudioError("unknown kind", "c.wav", hint="another hint"))
    assert capsys.readouterr().err.splitlines() == [
        "ced: error: a.wav: unknown kind; readable are WAV",
        "ced: error: b.wav: unknown kind",
        "ced: error: c.wav: unknown kind; another hint",
    ]


@POSIX
def test_a_hostile_name_is_escaped_in_every_output(tmp_path: Path) -> None:
    name = f"{HOSTILE}.wav"
    (tmp_path / name).write_bytes(b"no sound")
    sound = tmp_path / f"{HOSTILE} good.flac"
    sound.write_bytes((ROOT / "resources/robin.ogg").read_bytes())
    done = run("tag", "-m", "esc10", tmp_path / name, sound)
    assert done.returncode == 1
    text = (done.stdout + done.stderr).decode()
    assert not UNSAFE & set(text.replace("\n", ""))
    assert len(done.stderr.splitlines()) == 1
    assert rb"pwned\x07\x9b2J\u202egpj\r\n\tx good.flac =====" in done.stdout
    for format in ("csv", "jsonl"):
        done = run("tag", "-m", "esc10", "-f", format, sound)
        assert done.returncode == 0
        assert (HOSTILE.encode() in done.stdout) == (format == "csv")
        if format == "jsonl":
            assert json.loads(done.stdout)["file"] == str(sound)


@POSIX
@pytest.mark.parametrize(
    "words", [["tag", f"--{HOSTILE}"], [f"tag{HOSTILE}"], ["tag", "-k", HOSTILE, "a.wav"], [f"--{HOSTILE}"]]
)
def test_usage_errors_escape_arguments(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert not UNSAFE & set(done.stderr.decode().replace("\n", ""))
    assert (b"x1b" in done.stderr) == ("-k" not in words)  # where it is quoted at all


@POSIX
def test_a_closed_output_is_an_error_if_results_would_be_lost(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.ogg"
    Path(os.fsdecode(path)).write_bytes((ROOT / "resources/robin.ogg").read_bytes())
    for closed, expected in ((">&-", 1), ("2>&-", 0), (">&- 2>&-", 1)):
        code = f'exec "$0" -m ced tag -m esc10 "$1" {closed}'
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [b"sh", b"-c", code.encode(), os.fsencode(sys.executable), path]
        done = subprocess.run(command, capture_output=True, check=False, env=environment, timeout=120)
        assert done.returncode == expected
        assert (b"Topk-1" in done.stdout) == (closed == "2>&-")
        assert done.stderr.count(b"\n") == (closed == ">&-")
        assert b"standard output: it is closed" in done.stderr or closed != ">&-"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
@pytest.mark.parametrize("words", [["--version"], ["models"], ["--help"]])
def test_a_full_output_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*words, stdout=full)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("ced: error: ")
    assert "standard output" in line
    assert "No space left" in line


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as broken:
        done = run("models", stdout=broken)
    assert (done.returncode, done.stderr) == (1, b"")


def test_write_errors_of_standard_output_are_project_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(WriteError, match="standard output: No space left"):
        console.show("a")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"ced {ced.__version__}\n")
